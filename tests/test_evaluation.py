"""Evaluations: outcomes against closed forms, resuming, flags, and bad input."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import scipy.stats
import torch
from fixed_networks import EPS, Sharpened, digits, linear_problem
from fixed_networks import network as trained
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import NUM_CLASSES, network, sharp
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision import transforms
from torchvision.transforms import v2

from torchdistill_adv.datasets import Digits
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.evaluation import Attacked, GradientAttack, PixelModel, evaluate, find_normalization, pixel_threat
from torchdistill_adv.evaluation.blocks import weights_digest
from torchdistill_adv.evaluation.flags import result_flags
from torchdistill_adv.evaluation.journal import Journal
from torchdistill_adv.evaluation.results import AttackResult
from torchdistill_adv.evaluation.statistics import sign_test, wilson_interval


def pixels(count: int = 40, seed: int = 0) -> Tensor:
    return torch.rand(count, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def data_for(model: nn.Module, count: int = 40) -> tuple[Tensor, Tensor]:
    """Images that ``model`` classifies rightly, but for every fifth."""
    images = pixels(count)
    with torch.no_grad():
        labels = model.eval()(images).argmax(1)
    labels[::5] = (labels[::5] + 1) % NUM_CLASSES
    return images, labels


def linear(num_classes: int = NUM_CLASSES) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = nn.Sequential(nn.Flatten(), nn.Linear(72, num_classes))
    return net.eval()


class Probe(nn.Module):
    """A network around another, for a fault."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


class Mean(nn.Module):
    """Class 1 from a mean above 1/2."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1)
        return torch.stack([0.5 - mean, mean - 0.5], 1)


# outcomes


def test_pixels_that_were_outside_of_the_range_are_attacked_all_the_same() -> None:
    images = torch.full((4, 1, 4, 4), 0.45)
    images[..., 0, 0], images[..., 0, 1] = -0.5, 1.5
    found = evaluate(Mean(), (images, torch.zeros(4, dtype=torch.long)), attacks="fgsm", eps=0.2)
    assert [result.correct for result in found.results] == [4, 0]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_linear_network_is_robust_up_to_the_distance_of_its_boundary(norm: str) -> None:
    model, images, labels, distance, radius = linear_problem(2, norm)
    labels[::5] = 1 - labels[::5]
    expected = [i % 5 != 0 and robust for i, robust in enumerate((distance > radius).tolist())]
    found = evaluate(model, (images, labels), attacks="fgsm,pgd40,cw40", norm=norm, eps=radius)
    assert [result.outcomes for result in found.results[1:]] == [expected] * 3
    assert found.result("clean").outcomes == [i % 5 != 0 for i in range(40)]
    assert 0 < sum(expected) < 32


def test_normalisation_is_put_in_front_of_the_network_and_the_radius_stays_in_pixels() -> None:
    model = sharp(0)
    images, labels = data_for(model)
    mean, std = (0.4, 0.5), (0.3, 0.25)
    shape = (1, 2, 1, 1)
    normalized = (images - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    on_pixels = PixelModel(model, mean, std)
    with torch.no_grad():
        labels = model.eval()(normalized).argmax(1)
    ours = evaluate(model, (normalized, labels), attacks="pgd5", eps="30/255", mean=mean, std=std)
    same = evaluate(on_pixels, (normalized, labels), attacks="pgd5", eps="30/255")
    bare = evaluate(nn.Sequential(on_pixels), (images, labels), attacks="pgd5", eps="30/255")
    assert ours.result("clean").accuracy == 100
    assert 0 < ours.result("pgd5").correct < 40
    assert ours.result("pgd5").outcomes == same.result("pgd5").outcomes == bare.result("pgd5").outcomes


def test_images_that_are_wrong_without_an_attack_are_not_attacked_and_never_right() -> None:
    model = sharp(0)
    images, labels = data_for(model)
    found = evaluate(model, (images, labels), attacks="fgsm,pgd3", eps=0.2)
    clean, pgd = found.result("clean"), found.result("pgd3")
    assert clean.correct == 32
    assert clean.outcomes == [i % 5 != 0 for i in range(40)]
    assert all(before or not after for before, after in zip(clean.outcomes, pgd.outcomes, strict=True))
    assert pgd.gradient_evaluations == 3 * 32
    # three passes of the search, and one that checks
    assert pgd.forward_evaluations == 4 * 32
    assert found.result("fgsm").gradient_evaluations == 32


def test_more_restarts_fool_no_fewer_and_only_what_is_right_is_attacked_again() -> None:
    model = sharp(0)
    data = data_for(model)
    one, three = (evaluate(model, data, attacks="pgd2", eps=0.2, restarts=n).result("pgd2") for n in (1, 3))
    assert all(first or not last for first, last in zip(one.outcomes, three.outcomes, strict=True))
    assert three.correct < one.correct
    assert three.gradient_evaluations < 3 * one.gradient_evaluations


def test_outcomes_do_not_depend_on_the_batch_size_or_on_the_other_images() -> None:
    model = sharp(0).double()
    images, labels = data_for(model.float())
    model, images = model.double(), images.double()
    whole = evaluate(model, (images, labels), attacks="fgsm,pgd5,cw5", eps=0.2, restarts=2)
    parts = evaluate(model, (images, labels), attacks="fgsm,pgd5,cw5", eps=0.2, restarts=2, batch_size=7)
    assert [r.outcomes for r in whole.results] == [r.outcomes for r in parts.results]
    some = evaluate(model, TensorDataset(images, labels), attacks="pgd5", eps=0.2, num_images=15, seed=3)
    again = evaluate(model, (images, labels), attacks="pgd5", eps=0.2, num_images=15, seed=3)
    chosen = some.facts["data"]["indices"]
    assert len(set(chosen)) == 15 and chosen == sorted(chosen)
    assert chosen != evaluate(model, (images, labels), attacks="clean", num_images=15, seed=4).facts["data"]["indices"]
    assert some.result("pgd5").outcomes == again.result("pgd5").outcomes
    assert some.result("clean").outcomes == [i % 5 != 0 for i in chosen]


@pytest.mark.parametrize(
    ("how", "counts"),
    [("outside the ball", False), ("outside [0, 1]", False), ("right", False), ("inside", True)],
)
def test_only_examples_in_the_ball_that_fool_the_network_count(how: str, counts: bool) -> None:
    class Cheat(GradientAttack):
        def __call__(self, model, images, labels, threat, noise):  # type: ignore[no-untyped-def]
            target = {"outside the ball": 0.55, "outside [0, 1]": 0.9, "right": 0.45, "inside": 0.51}[how]
            rows = torch.full_like(images, target)
            if how == "outside [0, 1]":
                rows[..., 0] = -0.5
            return Attacked(rows)

    images = torch.full((4, 1, 4, 4), 0.45)
    eps = 1.0 if how == "outside [0, 1]" else 0.0999
    found = evaluate(Mean(), (images, torch.zeros(4, dtype=torch.long)), attacks=[Cheat("cheat")], eps=eps)
    assert found.results[1].correct == (0 if counts else 4)


def test_the_worst_case_is_what_no_attack_fools() -> None:
    model = sharp(0)
    found = evaluate(model, data_for(model), attacks="fgsm,pgd3,cw3", eps=[0.1, 0.2])
    for worst in found.worst_case():
        each = [r.outcomes for r in found.results if r.eps == worst.eps]
        assert len(each) == 3
        assert worst.outcomes == [all(row) for row in zip(*each, strict=True)]
    assert [worst.eps for worst in found.worst_case()] == [0.1, 0.2]
    assert [found.result("cw3", eps).eps for eps in (None, 0.1, 0.2)] == [0.1, 0.1, 0.2]


def test_a_radius_of_zero_or_given_twice() -> None:
    model = sharp(0)
    found = evaluate(model, data_for(model), attacks="fgsm,pgd3", eps=[0, "51/255", 0.2])
    assert [(r.attack, r.eps) for r in found.results[1:]] == [(a, eps) for eps in (0, 0.2) for a in ("fgsm", "pgd3")]
    assert [worst.eps for worst in found.worst_case()] == [0, 0.2]
    assert found.worst_case()[0].outcomes == found.result("clean").outcomes
    # the header, a clean row, and three rows for each radius
    assert [line.split("|")[1].strip() for line in found.table().splitlines()[2:9]] == [
        "clean", *["fgsm", "pgd3", "worst case"] * 2
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_and_data_of_any_type(dtype: torch.dtype) -> None:
    model, (images, labels) = trained("robust"), digits(200)
    expected = evaluate(model, (images, labels), attacks="fgsm", eps=0.15).result("fgsm")
    for net, data in (
        (copy.deepcopy(model).to(dtype), (images, labels.to(torch.uint8))),
        (copy.deepcopy(model).to(dtype), (images.to(dtype), labels.int())),
        (model, (images.to(dtype), labels)),
    ):
        found = evaluate(net, data, attacks="fgsm", eps=0.15)
        assert sum(a != b for a, b in zip(found.result("fgsm").outcomes, expected.outcomes, strict=True)) <= 4
        assert found.flags == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_items_may_hold_more_than_image_and_label(num_workers: int) -> None:
    model = sharp(0)
    images, labels = data_for(model)
    items = [
        (image.numpy(), int(label), {"place": i}) for i, (image, label) in enumerate(zip(images, labels, strict=True))
    ]
    found = evaluate(model, items, attacks="pgd3", eps=0.2, num_workers=num_workers)
    expected = evaluate(model, (images, labels), attacks="pgd3", eps=0.2)
    assert [r.outcomes for r in found.results] == [r.outcomes for r in expected.results]


def test_logits_that_are_no_number_are_never_right() -> None:
    class Faulty(Probe):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * torch.where(x.amax((1, 2, 3)) > 0.99, torch.nan, 1.0)[:, None]

    model = sharp(0)
    images, _ = data_for(model)
    with torch.no_grad():
        # argmax of five NaN is 0
        labels = Faulty(model)(images).argmax(1)
    whole = images.amax((1, 2, 3)) <= 0.99
    assert 0 < int(whole.sum()) < 40
    assert evaluate(Faulty(model).eval(), (images, labels), attacks="clean").results[0].outcomes == whole.tolist()


def test_the_network_comes_out_as_it_went_in() -> None:
    model = sharp(0, dropout=0.5)
    data = data_for(model)
    model.train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    evaluate(model, data, attacks="fgsm,pgd3,cw3", eps=0.02)
    assert torch.equal(torch.rand(3), expected)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_batch_that_does_not_fit_is_halved_and_nothing_else_changes() -> None:
    class Small(Probe):
        largest = 0

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 9:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            self.largest = max(self.largest, len(x))
            return self.net(x)

    model = sharp(0).double()
    images, labels = data_for(model.float())
    model, data = model.double(), (images.double(), labels)
    small = Small(model)
    found = evaluate(small, data, attacks="pgd3", eps=0.2, batch_size=32)
    assert found.result("pgd3").outcomes == evaluate(model, data, attacks="pgd3", eps=0.2).result("pgd3").outcomes
    assert small.largest == 8
    assert found.facts["batch_size"] == 8


def test_an_error_that_is_not_of_memory_is_raised() -> None:
    class Broken(Probe):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 4:
                raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
            return self.net(x)

    class Full(Probe):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self.net(x)

    with pytest.raises(RuntimeError, match="mat1"):
        evaluate(Broken(linear()), data_for(linear()))
    # with one image too
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(Full(linear()), data_for(linear()))


# going on


def test_an_evaluation_goes_on_from_its_journal_and_adds_what_is_new(tmp_path: Path) -> None:
    model = sharp(0)
    data = data_for(model)
    options = {"eps": 0.2, "batch_size": 8, "journal": tmp_path / "journal.jsonl"}
    whole = evaluate(model, data, attacks="fgsm,pgd3", **options)
    text = options["journal"].read_text()
    assert len(text.splitlines()) == 5 * 3
    # the third block was being written
    options["journal"].write_text("".join(text.splitlines(keepends=True)[:7]) + text.splitlines()[7][:40])
    again = evaluate(model, data, attacks="fgsm,pgd3", **options)
    assert [r.outcomes for r in again.results] == [r.outcomes for r in whole.results]
    assert len(options["journal"].read_text().splitlines()) == 15

    calls = []
    handle = model.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    more = evaluate(model, data, attacks="fgsm,pgd3,pgd4", **options)
    handle.remove()
    assert [r.outcomes for r in more.results[:3]] == [r.outcomes for r in whole.results]
    # the classes, the flags of the first block, and five blocks of PGD-4
    assert sum(calls) <= 1 + 3 * 8 + 5 * 40


def test_parts_and_distances_are_of_the_examples_that_count_and_the_batch_size_goes_on(tmp_path: Path) -> None:
    asked: list[int] = []

    class Heavy(GradientAttack):
        """Fools every other image, at a distance of 0.1."""

        minimal_norm = True

        def __call__(self, model, images, labels, threat, noise):  # type: ignore[no-untyped-def]
            asked.append(len(images))
            if len(images) > 9:
                raise torch.OutOfMemoryError("CUDA out of memory")
            rows = images + 0.01
            rows[::2] = images[::2] + 0.1
            return Attacked(rows, ["near", "far"] * (len(images) // 2))

    data = torch.full((40, 1, 4, 4), 0.45), torch.zeros(40, dtype=torch.long)
    options = {"attacks": [Heavy("heavy")], "eps": [0.05, 0.2], "batch_size": 16, "journal": tmp_path / "journal.jsonl"}
    near, far = evaluate(Mean(), data, **options).results[1:]
    assert (near.correct, near.found_by) == (40, {})
    assert (far.correct, far.found_by) == (20, {"near": 20})
    assert near.median_distance == far.median_distance == pytest.approx(0.1)
    assert asked[0] == 16 and set(asked[1:]) == {8}
    lines = options["journal"].read_text().splitlines(keepends=True)
    options["journal"].write_text("".join(lines[:3]))
    asked.clear()
    assert evaluate(Mean(), data, **options).results[2].outcomes == far.outcomes
    assert set(asked) == {8}


def test_a_randomised_network_goes_on_with_the_numbers_that_it_would_have_had(tmp_path: Path) -> None:
    model = Random(sharp(0)).eval()
    options = {"attacks": "fgsm,pgd3", "eps": 0.1, "batch_size": 8, "journal": tmp_path / "journal.jsonl"}
    whole = evaluate(model, data_for(sharp(0)), **options)
    lines = options["journal"].read_text().splitlines(keepends=True)
    options["journal"].write_text("".join(lines[:7]))
    again = evaluate(model, data_for(sharp(0)), **options)
    assert [r.outcomes for r in again.results] == [r.outcomes for r in whole.results]


def test_a_journal_of_other_weights_data_or_settings_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = sharp(0), sharp(1)
    data = data_for(model)
    options = {"attacks": "pgd3", "journal": tmp_path / "journal.jsonl"}
    same = {"model": model, "data": data, "eps": 0.2}
    evaluate(**same, **options)
    # new records: without an attack, and with it
    for change, new in (
        ({"model": other}, 2),
        ({"data": (data[0].flip(0), data[1])}, 2),
        ({"data": (data[0], (data[1] + 1) % NUM_CLASSES)}, 2),
        ({"seed": 1}, 2),
        ({"mean": [0.1]}, 2),
        ({"eps": 0.3}, 1),
        ({"step_size": 0.02}, 1),
        ({}, 0),
    ):
        changed = same | change
        lines = len(options["journal"].read_text().splitlines())
        found = evaluate(**changed, **options)
        fresh = evaluate(**changed, attacks="pgd3")
        assert [r.outcomes for r in found.results] == [r.outcomes for r in fresh.results]
        assert len(options["journal"].read_text().splitlines()) == lines + new
    monkeypatch.setattr(torch, "__version__", "9.9")
    evaluate(**same, **options)
    assert len(options["journal"].read_text().splitlines()) == lines + 2


@settings(deadline=None)
@given(st.lists(st.integers(0, 400), max_size=4))
def test_a_journal_cut_at_any_byte_keeps_its_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    written: list[str] = []
    for number, cut in enumerate([*cuts, 10**6]):
        journal = Journal(path)
        assert list(journal.records) == written
        journal.add(f"key {number}", {"outcomes": "1" * number})
        content = path.read_bytes()[:cut]
        path.write_bytes(content)
        written = [
            json.loads(line)["key"] for line in content.decode().splitlines(keepends=True) if line.endswith("\n")
        ]
    assert list(Journal(path).records) == written


def test_a_network_is_known_by_its_plain_attributes_too(tmp_path: Path) -> None:
    model = trained("plain")
    options = {"attacks": "pgd5", "eps": 0.15, "journal": tmp_path / "journal.jsonl"}
    honest, masked = (
        evaluate(Sharpened(model, factor).eval(), digits(60), **options).result("pgd5") for factor in (1, 1e5)
    )
    assert honest.correct < masked.correct


@pytest.mark.parametrize("content", ["a poem\n", "a poem", '{"key": "a"}\n{"loss": 1}\n', '{"key": "a"}\n\n'])
def test_a_file_of_something_else_is_no_journal_and_stays_as_it_is(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text(content)
    line = 2 if content.startswith("{") else 1
    with pytest.raises(ConfigError, match=f"notes.jsonl, whose line {line} is no record"):
        evaluate(linear(), data_for(linear()), journal=path)
    assert path.read_text() == content


def test_a_journal_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "file" / "journal.jsonl", "")):
        with pytest.raises(ConfigError, match=f"journal: found {path}, which cannot be used: {reason}"):
            evaluate(linear(), data_for(linear()), journal=path)


KILLED = """
import os, random, signal, sys, time
from test_evaluation import Journal, Path, Probe, data_for
from tiny import sharp
from torchdistill_adv.evaluation import evaluate

class Slow(Probe):
    def forward(self, x):
        time.sleep(0.01)
        return self.net(x)

def outcomes(journal):
    model = sharp(0)
    found = evaluate(Slow(model), data_for(model), attacks="fgsm,pgd4,cw4", eps=0.2, batch_size=4, journal=journal)
    return [result.outcomes for result in found.results]

folder, draw, lines = Path(sys.argv[1]), random.Random(0), []
for _ in range(4):
    # the imports, which take longer than the evaluation, are made once
    process = os.fork()
    if not process:
        outcomes(folder / "killed.jsonl")
        os._exit(0)
    time.sleep(draw.uniform(0.2, 0.5))
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status), "it was done before it was killed"
    lines.append(len(Journal(folder / "killed.jsonl").records))
assert lines == sorted(lines) and 0 < lines[0] < lines[-1] < 40, lines
assert outcomes(folder / "killed.jsonl") == outcomes(folder / "whole.jsonl")
"""


def test_an_evaluation_that_is_killed_again_and_again_ends_with_the_same_outcomes(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    found = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr


# flags


def flags_of(model: nn.Module, data: tuple[Tensor, Tensor], **options: object) -> set[str]:
    options = {"attacks": "fgsm,pgd10,cw10", "eps": 0.2, **options}
    return {flag.name for flag in evaluate(model, data, **options).flags}  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("which", ["plain", "robust", "sharp"])
def test_an_honest_network_raises_no_flag(which: str, norm: str) -> None:
    radii = [factor * EPS[norm] for factor in (0.3, 1, 2)]
    assert flags_of(trained(which), digits(359), attacks="fgsm,pgd10,cw10,pgd50", eps=radii, norm=norm) == set()


class Saturated(Probe):
    def forward(self, x: Tensor) -> Tensor:
        return 1e5 * self.net(x)


class Quantised(Probe):
    def forward(self, x: Tensor) -> Tensor:
        return self.net((x * 16).round() / 16)


@pytest.mark.parametrize("fault", [Saturated, Quantised])
def test_masked_gradients_are_flagged(fault: type[Probe]) -> None:
    found = flags_of(fault(trained("plain")).eval(), digits(359))
    # a margin has a gradient where a saturated cross-entropy has none
    assert found == {"gradient masking"} | ({"PGD overestimates"} if fault is Saturated else set())


def test_a_network_without_a_gradient_is_flagged_and_measured() -> None:
    class Detached(Probe):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.detach())

    class Partly(Probe):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x.amax((1, 2, 3)) > 0.99, self.net(x.detach()).T, self.net(x).T).T

    class Infinite(Probe):
        def forward(self, x: Tensor) -> Tensor:
            return 1e39 * self.net(x)

    model = sharp(0)
    data = data_for(model)
    for fault in (Infinite(model), Partly(model), Detached(model), Detached(model.requires_grad_(False))):
        found = evaluate(fault.eval(), data, attacks="pgd3,cw3", eps=0.2)
        assert {flag.name for flag in found.flags} == {"gradient masking"}
        assert 20 < found.result("clean").correct <= 32


class Random(Probe):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.05 * torch.randn_like(x))


class Softmax(Probe):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(1)


def test_faults_of_the_network_or_of_the_data_are_flagged() -> None:
    model = sharp(0)
    images, labels = data = data_for(model)
    assert "randomised model" in flags_of(Random(model), data)
    assert "probabilities" in flags_of(Softmax(model), data)
    assert flags_of(model.train(), data) == {"model in train mode"}
    model.eval()
    assert "inputs out of range" in flags_of(model, (images * 255, labels))
    assert "inputs out of range" in flags_of(model, data, mean=[0.5], std=[2.0])
    assert "clean accuracy near chance" in flags_of(model, (images, (labels + 1 + torch.arange(40) % 4) % NUM_CLASSES))


def test_logits_that_only_look_like_probabilities_are_not_flagged() -> None:
    class Shifted(Probe):
        """Positive logits, or those with the sum 1."""

        sum_is_one = False

        def forward(self, x: Tensor) -> Tensor:
            z = self.net(x)
            return z - z.mean(1, keepdim=True) + 1 / NUM_CLASSES if self.sum_is_one else z - z.detach().min()

    model = sharp(0)
    data = data_for(model)
    shifted = Shifted(model).eval()
    for shifted.sum_is_one in (False, True):
        assert "probabilities" not in flags_of(shifted, data)


def test_a_stronger_attack_that_is_weaker_is_flagged() -> None:
    class Nothing(GradientAttack):
        """An attack with the name of a stronger one."""

        def __call__(self, model, images, labels, threat, noise):  # type: ignore[no-untyped-def]
            return Attacked(images)

    model = sharp(0)
    data = data_for(model)
    found = evaluate(model, data, attacks=["pgd5", Nothing("pgd", 50)], eps=0.3)
    assert [flag.name for flag in found.flags] == ["gradient masking"]
    assert "pgd50" in found.flags[0].message and "pgd5 " in found.flags[0].message


@pytest.mark.parametrize(
    ("rights", "flagged"),
    [
        # of 100 images, with the eps in tenths: 5 more are chance (p = 0.03), 8 are not (p = 0.004)
        ({"pgd10@1": 50, "pgd50@1": 55}, None),
        ({"pgd10@1": 50, "pgd50@1": 58}, "gradient masking"),
        ({"pgd10@1": 58, "pgd50@1": 50}, None),
        ({"cw10@1": 50, "cw50@1": 58}, "gradient masking"),
        ({"fgsm@1": 50, "pgd10@1": 58}, "gradient masking"),
        # CW has another objective than FGSM and PGD
        ({"fgsm@1": 50, "cw10@1": 58}, None),
        ({"pgd10@1": 50, "cw10@1": 58}, None),
        ({"cwl2@1": 50, "autoattack@1": 58}, None),
        ({"fgsm@1": 50, "autoattack@1": 58}, "gradient masking"),
        ({"pgd10@1": 50, "autoattack@1": 58}, "gradient masking"),
        ({"cw10@1": 50, "autoattack@1": 58}, "gradient masking"),
        ({"fgsm@1": 50, "fgsm@2": 58}, "gradient masking"),
        ({"fgsm@1": 58, "fgsm@2": 50}, None),
        ({"fgsm@1": 50, "pgd10@2": 58}, None),
        ({"pgd10@1": 50, "cw10@1": 40}, None),
        ({"pgd10@1": 50, "cw10@1": 39}, "PGD overestimates"),
        ({"pgd10@1": 50, "autoattack@1": 39}, "PGD overestimates"),
        ({"pgd10@1": 50, "autoattack@2": 39}, None),
        ({"fgsm@1": 50, "pgd10@1": 20}, None),
    ],
)
def test_what_results_show_beside_each_other(rights: dict[str, int], flagged: str | None) -> None:
    results = [AttackResult("clean", {}, 0, [True] * 100, 0, 0, 0)]
    for name, right in rights.items():
        attack, _, tenths = name.partition("@")
        steps = {"num_steps": int("0" + attack.lstrip("pgdcw"))} if attack[-1] == "0" else {}
        results.append(AttackResult(attack, steps, int(tenths) / 10, [i < right for i in range(100)], 0, 0, 0))
    assert [flag.name for flag in result_flags(results, 10)] == ([flagged] if flagged else [])


def test_limits_of_the_black_box_part_and_of_chance() -> None:
    clean = AttackResult("clean", {}, 0, [True] * 100, 0, 0, 0)
    for square, flagged in ((1, False), (2, True)):
        attacked = AttackResult("autoattack", {}, 0.1, [True] * 100, 0, 0, 0, found_by={"square": square})
        assert bool(result_flags([clean, attacked], 10)) == flagged
    # the intervals begin at 9.3 % and 10.1 %
    for right, flagged in ((15, True), (16, False)):
        found = result_flags([dataclasses.replace(clean, outcomes=[i < right for i in range(100)])], 10)
        assert [flag.name for flag in found] == ["clean accuracy near chance"] * flagged


# statistics


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_intervals_are_those_of_scipy(counts: tuple[int, int]) -> None:
    interval = scipy.stats.binomtest(*counts).proportion_ci(method="wilson")
    assert wilson_interval(*counts) == pytest.approx((100 * interval.low, 100 * interval.high), abs=1e-9)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_the_sign_test_is_that_of_scipy(pairs: list[tuple[bool, bool]]) -> None:
    first, second = zip(*pairs, strict=True)
    wins = sum(a and not b for a, b in pairs)
    differing = sum(a != b for a, b in pairs)
    expected = scipy.stats.binomtest(wins, differing, alternative="greater").pvalue if differing else 1.0
    assert sign_test(first, second) == pytest.approx(expected)


# bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attacks": "pdg20"}, "did you mean 'pgd20'"),
        ({"attacks": "autoatack"}, "did you mean 'autoattack'"),
        ({"attacks": "pgd0"}, "found attack 'pgd0'"),
        ({"attacks": "cwl2", "norm": "linf"}, "cwl2 with norm 'linf'; it measures in l2"),
        ({"attacks": "fgsm", "eps": 8}, "eps: found 8; eps is in pixels of [0, 1], so write 8/255"),
        ({"attacks": "fgsm", "eps": "8"}, "write 8/255"),
        ({"attacks": "fgsm", "eps": -1}, "eps: found -1"),
        ({"attacks": "fgsm", "norm": "l1"}, "norm: found 'l1'"),
        ({"attacks": "pgd5", "restarts": 0}, "restarts: found 0"),
        ({"attacks": "pgd5", "step_size": 0}, "step_size: found 0"),
        ({"num_images": 0}, "num_images: found 0"),
        ({"batch_size": -3}, "batch_size: found -3"),
        ({"data": (torch.rand(0, 2, 6, 6), torch.zeros(0))}, "data: found a data set without images"),
        ({"data": (pixels(), torch.full((40,), 7))}, "data: found label 7; the model has the classes 0 to 4"),
        ({"data": (pixels(), torch.full((40,), -1))}, "data: found label -1; the model has the classes 0 to 4"),
        ({"data": (pixels(), torch.arange(40) // 36 * 9), "batch_size": 8}, "data: found label 9"),
        ({"data": (pixels(), torch.rand(40, 5))}, "data: found labels (40, 5)"),
        ({"data": (pixels(), torch.rand(40))}, "data: found labels (40,) of torch.float32"),
        ({"data": (pixels(), torch.zeros(5).long())}, "data: found a tuple that is no (images, labels)"),
        ({"data": (pixels(), [0] * 40)}, "data: found a tuple that is no (images, labels)"),
        ({"data": pixels()}, "data: gives a Tensor; an evaluation needs (image, label, ...)"),
        ({"data": [{"image": pixels()[0], "label": 0}]}, "data: gives a dict; an evaluation needs (image, label, ...)"),
        ({"data": [(pixels()[0],)]}, "data: gives a tuple; an evaluation needs (image, label, ...)"),
        ({"data": [(Image.new("RGB", (6, 6)), 0)]}, "data: gives a Image; an evaluation needs images of floats"),
        ({"data": [(pixels()[0], None)]}, "data: gives a label that is a NoneType"),
        ({"data": [(pixels()[0], "cat")]}, "data: gives a label that is a str"),
        ({"data": iter([])}, "data: found a list_iterator; an evaluation needs a data set, such as loader.dataset"),
        ({"data": DataLoader(TensorDataset(pixels()))}, "data: found a DataLoader; an evaluation needs a data set"),
        ({"mean": [0.1] * 3, "std": [1.0] * 3}, "mean: found 3 values, but the images have 2 channels"),
        ({"mean": [0.1, 0.2], "std": [1.0]}, "std: found 1 values; mean has 2"),
        ({"std": [0.0]}, "std: found 0.0; write a number > 0"),
        ({"data": ((pixels() * 255).byte(), torch.zeros(40).long())}, "data: gives a tensor of torch.uint8"),
        ({"model": nn.Identity()}, "model: returns a tensor (1, 2, 6, 6); an evaluation needs logits"),
        ({"model": nn.LSTM(6, 3), "data": (torch.rand(4, 5, 6), torch.zeros(4).long())}, "model: returns a tuple"),
    ],
)
def test_bad_input_says_what_to_write(options: dict[str, object], message: str) -> None:
    options = {"model": linear(), "data": data_for(linear()), **options}
    with pytest.raises(ConfigError) as error:
        evaluate(**options)  # type: ignore[arg-type]
    assert message in str(error.value)


# pixels


def test_the_normalisation_is_found_in_the_transforms_of_the_data() -> None:
    to_tensor, normalize = transforms.ToTensor(), transforms.Normalize([0.1, 0.2], [0.3, 0.4])
    for transform in (
        transforms.Compose([to_tensor, normalize]),
        transforms.Compose([transforms.Compose([to_tensor, normalize])]),
        v2.Compose([v2.ToImage(), v2.Normalize([0.1, 0.2], [0.3, 0.4])]),
        normalize,
    ):
        data = Digits("test", transform=transform)
        for wrapped in (data, Subset(Subset(data, [1, 2]), [0])):
            assert find_normalization(wrapped) == ((0.1, 0.2), (0.3, 0.4))
    assert find_normalization(Digits("test", transform=to_tensor)) == ((0.0,), (1.0,))
    assert find_normalization(TensorDataset(pixels())) == ((0.0,), (1.0,))
    twice = transforms.Compose([normalize, transforms.Normalize([0.0], [1.0])])
    with pytest.raises(ConfigError, match="2 different Normalize"):
        find_normalization(Digits("test", transform=twice))


def test_normalised_images_become_the_pixels_that_they_were() -> None:
    mean, std = (0.1, 0.11), (0.34, 0.1)
    model = PixelModel(nn.Identity(), mean, std)
    images = (torch.arange(256) / 255).view(1, 1, 16, 16).repeat(1, 2, 1, 1)
    normalized = transforms.Normalize(mean, std)(images)
    back = model.to_pixels(normalized)
    torch.testing.assert_close(back, images, rtol=0, atol=1e-6)
    # which rounding alone would leave
    unclamped = normalized * model.std.view(1, 2, 1, 1) + model.mean.view(1, 2, 1, 1)
    assert unclamped.min() < 0
    assert back.min() >= 0 and back.max() <= 1
    torch.testing.assert_close(model(images), normalized)
    assert model.to_pixels(normalized + 10).max() > 1


def test_a_radius_in_l2_may_exceed_the_range_of_a_pixel() -> None:
    assert pixel_threat("3", "l2").eps == 3
    assert pixel_threat(1, "linf").eps == 1


def test_the_digest_of_the_weights_sees_every_weight_and_buffer() -> None:
    model = network(0)
    digests = {weights_digest(model)}
    for value in model.state_dict().values():
        with torch.no_grad():
            value.view(-1)[-1] += 1
        digests.add(weights_digest(model))
    assert len(digests) == 1 + len(model.state_dict())
    assert weights_digest(network(0)) in digests
    assert math.isfinite(int(weights_digest(model), 16))

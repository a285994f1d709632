"""Evaluations whose gradients come from a twin: the outcomes are the network's, and it comes out as it went in."""

from __future__ import annotations

import copy
import functools
import logging
from collections import deque

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fixed_networks import EPS, all_digits, digits
from tiny import leave_process_group
from torch import Tensor, nn
from torchdistill.core.forward_hook import ForwardHookManager

from torchdistill_adv.evaluation import Attacked, Evaluation, GradientAttack, evaluate, pixel_threat
from torchdistill_adv.evaluation import engine as engine_module
from torchdistill_adv.evaluation.carlini_wagner import CarliniWagnerL2
from torchdistill_adv.evaluation.passes import Counted, twin_for_attacks
from torchdistill_adv.noise import ImageNoise

COUNT = 200
HALF_A_POINT = 0.005
ALL = "fgsm,pgd20,cw30"


class Normalised(nn.Module):
    """A residual network with batch normalisation and dropout, and what its passes were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12))
        self.block = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12))
        self.dropout, self.head = nn.Dropout(0.2), nn.Linear(192, 10)
        # a twin is not made anew for what this holds
        self.asked: deque[bool] = deque()

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.requires_grad)
        x = self.stem(x).relu()
        x = (x + self.block(x)).relu()
        return self.head(self.dropout(F.avg_pool2d(x, 2).flatten(1)))


@functools.cache
def _trained(seed: int) -> Normalised:
    """Adversarially, so that its robust accuracies are neither 0 nor 100 %."""
    x, y = (part[:1200] for part in all_digits())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Normalised().train()
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        for _ in range(6):
            for batch in torch.randperm(len(x)).split(100):
                leaf = x[batch].clone().requires_grad_()
                gradient = torch.autograd.grad(F.cross_entropy(net(leaf), y[batch]), leaf)[0]
                images = (x[batch] + 0.12 * gradient.sign()).clamp(0, 1)
                optimizer.zero_grad()
                F.cross_entropy(net(images), y[batch]).backward()
                optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    net.asked.clear()
    return net.eval()


def trained(seed: int = 0) -> Normalised:
    return copy.deepcopy(_trained(seed))


def run(
    model: nn.Module, attacks: object = "pgd20", norm: str = "linf", factor: float = 1, **options: object
) -> Evaluation:
    options |= {"attacks": attacks, "eps": factor * EPS[norm], "norm": norm}
    return evaluate(model, digits(COUNT), **options)  # type: ignore[arg-type]


def outcomes(found: Evaluation) -> list[list[bool]]:
    return [result.outcomes for result in found.results]


@functools.cache
def expected(attacks: str = "pgd20", seed: int = 0, batch_size: int | None = None) -> list[list[bool]]:
    """Of the bare network."""
    return outcomes(run(trained(seed), attacks, batch_size=batch_size))


@pytest.fixture
def no_twin(monkeypatch):
    """What would come out without twins."""

    def outcomes_without(model: nn.Module, *args: object, **options: object) -> list[list[bool]]:
        with monkeypatch.context() as patch:
            patch.setattr(engine_module, "twin_for_attacks", lambda model, images: None)
            return outcomes(run(model, *args, **options))  # type: ignore[arg-type]

    return outcomes_without


def assert_alike(found: list[list[bool]], wanted: list[list[bool]]) -> None:
    """But for images that rounding leads elsewhere: an iterate goes by signs, also of gradients near zero."""
    for these, those in zip(found, wanted, strict=True):
        assert sum(a != b for a, b in zip(these, those, strict=True)) <= HALF_A_POINT * COUNT


@pytest.mark.parametrize("norm", EPS)
def test_outcomes_are_those_without_a_twin(norm, no_twin):
    model = trained()
    found = run(model, ALL, norm, restarts=2)
    assert_alike(outcomes(found), no_twin(model, ALL, norm, restarts=2))
    clean, *attacked = (result.correct for result in found.results)
    assert all(0.02 * COUNT < correct < clean - 0.1 * COUNT for correct in attacked)


def test_examples_are_those_without_a_twin():
    model = trained()
    x, y = digits(COUNT)
    rows = []
    for twin in (None, twin_for_attacks(model, x)):
        counted = Counted(model)
        counted.twin = twin
        attack = GradientAttack("pgd", 5)
        rows.append(attack(counted, x, y, pixel_threat(EPS["linf"]), ImageNoise(0, range(COUNT), x)).rows)
        assert counted.take() == {"forward_evaluations": 5 * COUNT, "gradient_evaluations": 5 * COUNT}
    assert twin is not None
    assert ((rows[0] - rows[1]).abs() < 1e-5).float().mean() > 0.999


def test_autoattack_is_led_by_the_twin():
    model = trained()
    found = run(model, "autoattack", factor=3, num_images=20)
    assert sum(model.asked) == 2
    clean, attacked = found.results
    assert attacked.correct == 0
    assert attacked.found_by == {"apgd-ce": clean.correct}


def test_gradients_are_the_twins_and_outcomes_the_networks():
    model = trained()
    found = run(model, "fgsm,pgd20,cw30", batch_size=50, restarts=2)
    # the one gradient of the flags, and the one that the twin is held against
    assert sum(model.asked) == 2
    assert found.result("pgd20").gradient_evaluations > 20 * found.result("pgd20").correct
    # the classes, the flags' three, the comparison with the twin, and for each block the clean pass, for each attack
    # the outcome and the comparison on its examples, and the passes before the restarts
    assert len(model.asked) == 1 + 3 + 1 + 4 * (1 + 2 * 3 + 2)


class Astray:
    """Leads every attack the wrong way, and says that it does not."""

    is_current = True

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)

    def __call__(self, images: Tensor) -> Tensor:
        return -self.model(images)

    def agrees_on(self, rows: Tensor) -> bool:
        return True


def astray(monkeypatch) -> None:
    monkeypatch.setattr(engine_module, "twin_for_attacks", lambda model, images: Astray(model))


def test_a_twin_that_is_wrong_makes_attacks_weak_but_nothing_right(monkeypatch):
    model = trained()
    clean = run(model, "clean").result("clean").outcomes
    astray(monkeypatch)
    found = run(model, ALL)
    # examples that the twin takes for classified wrongly
    assert outcomes(found) == [clean] * 4


class Gated(nn.Module):
    """Normalises smooth and rough images by different statistics: a branch that its first images need not take."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.smooth, self.rough = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 64, 10)
        for norm, shift in ((self.smooth, -1.0), (self.rough, -2.0)):
            norm.running_mean += shift  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        is_rough = x.flatten(1).std(1) > 0.2
        y = self.rough(y) if bool(is_rough.any()) else self.smooth(y)
        logits: Tensor = self.fc(y.relu().flatten(1))
        return logits


def test_a_twin_that_differs_on_the_examples_is_given_up(monkeypatch, caplog):
    generator = torch.Generator().manual_seed(0)
    images = 0.5 + 0.05 * torch.randn(40, 1, 8, 8, generator=generator)
    model = Gated().eval()
    with torch.no_grad():
        labels = model(images).argmax(1)
    options = {"attacks": "pgd5", "eps": 0.3, "step_size": 0.15}
    with caplog.at_level(logging.WARNING):
        found = evaluate(model, (images, labels), **options)  # type: ignore[arg-type]
    assert "its copy returns other logits" in caplog.text
    twin = twin_for_attacks(model, images)
    assert twin is not None and twin.folded and twin.agrees_on(images)
    monkeypatch.setattr(engine_module, "twin_for_attacks", lambda model, images: None)
    alone = evaluate(model, (images, labels), **options)  # type: ignore[arg-type]
    assert outcomes(found) == outcomes(alone)


def test_the_nearest_example_is_looked_for_by_the_network_itself(monkeypatch):
    model = trained()
    attack = CarliniWagnerL2(num_steps=20, search_steps=2, step_size=0.05, initial_const=1)
    alone = run(model, [attack], "l2", num_images=40)
    astray(monkeypatch)
    found = run(model, [attack], "l2", num_images=40)
    assert outcomes(found) == outcomes(alone)
    assert found.results[1].median_distance == alone.results[1].median_distance
    # also after an attack that a twin leads
    both = run(model, ["pgd2", attack], "l2", num_images=40)
    assert outcomes(both)[2] == outcomes(alone)[1]


def test_weights_that_change_between_two_evaluations_are_seen():
    model = trained()
    first = run(model)
    model.load_state_dict(trained(1).state_dict())
    second = run(model)
    assert outcomes(second) == expected(seed=1)
    assert outcomes(second) != outcomes(first)


def facts(model: nn.Module) -> list[object]:
    return [
        [(name, p.requires_grad, p.grad, p.stride(), p.data_ptr()) for name, p in model.named_parameters()],
        [(name, b.stride(), b.data_ptr()) for name, b in model.named_buffers()],
        [(name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()],
        str(model),
    ]


@pytest.mark.parametrize("frozen", [False, True])
def test_the_network_comes_out_untouched(frozen):
    model = trained().requires_grad_(not frozen).train()
    model.block.eval()
    before, state = facts(model), {name: value.clone() for name, value in model.state_dict().items()}
    run(model, ALL)
    assert facts(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_killed_evaluation_goes_on_with_the_same_outcomes(tmp_path):
    journal = tmp_path / "journal.jsonl"
    whole = run(trained(), ALL, batch_size=40, journal=journal)
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:6]))
    assert outcomes(run(trained(), ALL, batch_size=40, journal=journal)) == outcomes(whole)


# networks of users


def test_torchdistills_hooks_record_what_the_network_is_asked():
    model = trained()
    manager = ForwardHookManager(torch.device("cpu"))
    manager.add_hook(model, "block", requires_input=True, requires_output=True)
    found = run(model, batch_size=COUNT)
    assert outcomes(found) == expected(batch_size=COUNT)
    assert manager.pop_io_dict()["block"]["output"].shape == (found.result("clean").correct, 12, 8, 8)
    assert len(model.block._forward_hooks) == 1


def test_a_hook_that_changes_the_network_is_obeyed():
    model, shifted = trained(), trained()
    model.head.register_forward_hook(lambda module, args, output: output.roll(1, 1))
    with torch.no_grad():
        shifted.head.weight.copy_(shifted.head.weight.roll(1, 0))
        shifted.head.bias.copy_(shifted.head.bias.roll(1, 0))
    assert_alike(outcomes(run(model)), outcomes(run(shifted)))


def test_an_attack_that_hooks_the_network_sees_its_gradient_passes(no_twin):
    class OnFeatures(GradientAttack):
        """Moves the features that a hook catches away from where they were."""

        def __call__(self, model, images, labels, threat, noise):  # type: ignore[no-untyped-def]
            caught: list[Tensor] = []
            layer = next(module for module in model.modules() if isinstance(module, Normalised)).block
            handle = layer.register_forward_hook(lambda module, args, output: caught.append(output))
            rows = images + 0.01
            for _ in range(5):
                rows = rows.detach().requires_grad_()
                caught.clear()
                model(torch.cat([rows, images]))
                now, before = caught[0].chunk(2)
                gradient = torch.autograd.grad((now - before.detach()).square().sum(), rows)[0]
                rows = threat.project(rows.detach() + 0.05 * gradient.sign(), images)
            handle.remove()
            return Attacked(rows)

    found = outcomes(run(trained(), [OnFeatures("features"), "pgd20"]))
    assert found == no_twin(trained(), [OnFeatures("features")]) + expected()[1:]
    assert sum(found[1]) < sum(found[0])


def test_second_derivatives_go_through_a_twin(no_twin):
    class Curved(GradientAttack):
        """Climbs the norm of the gradient."""

        def __call__(self, model, images, labels, threat, noise):  # type: ignore[no-untyped-def]
            leaf = images.clone().requires_grad_()
            losses = F.cross_entropy(model(leaf), labels, reduction="sum")
            first = torch.autograd.grad(losses, leaf, create_graph=True)[0]
            second = torch.autograd.grad(first.square().sum(), leaf)[0]
            return Attacked(threat.project(images + threat.eps * second.sign(), images))

    model = trained()
    found = outcomes(run(model, [Curved("curved")]))
    assert sum(model.asked) == 2
    assert_alike(found, no_twin(trained(), [Curved("curved")]))
    assert sum(found[1]) < sum(found[0])


@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.Sequential])
def test_wrapped_networks_have_the_outcomes_of_what_they_wrap(wrap):
    model = trained()
    assert outcomes(run(wrap(model).eval())) == expected()
    assert sum(model.asked) == 2


def test_a_network_of_distributed_training_is_attacked_as_it_is(tmp_path, no_twin):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        found = outcomes(run(nn.parallel.DistributedDataParallel(trained()).eval()))
    finally:
        leave_process_group()
    assert found == no_twin(trained())


class Random(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x + 0.05 * torch.randn_like(x))


def compiled() -> nn.Module:
    model = trained()
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: Random(trained()), "a copy of it returns other logits"),
        (lambda: trained().double(), "torch.float64"),
        (lambda: trained().bfloat16(), "torch.bfloat16"),
        (compiled, "it is compiled"),
    ],
)
def test_networks_without_a_twin_are_attacked_as_they_are(build, reason, no_twin, caplog):
    with caplog.at_level(logging.INFO):
        found = outcomes(run(build().eval(), "fgsm,pgd3"))
    assert [reason in r.getMessage() for r in caplog.records if "differentiate" in r.getMessage()] == [True]
    assert found == no_twin(build().eval(), "fgsm,pgd3")


def test_the_log_says_what_is_differentiated_and_nothing_without_an_attack(caplog):
    with caplog.at_level(logging.INFO):
        run(trained(), "clean")
        assert "differentiate" not in caplog.text
        run(trained(), "fgsm")
    assert "attacks differentiate a copy of the network: float32, channels last, 2 normalisations folded" in caplog.text


def test_under_autocast_the_twin_is_in_its_precision_too(no_twin):
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = outcomes(run(trained())), no_twin(trained())
        twin = twin_for_attacks(trained(), digits(4)[0])
        assert twin is not None and twin(digits(4)[0]).dtype == torch.bfloat16
    assert sum(a != b for a, b in zip(found[1], wanted[1], strict=True)) <= 0.03 * COUNT

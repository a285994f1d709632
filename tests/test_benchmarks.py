"""The benchmarks measure what they say: plain implementations have our losses, bare passes are those of our steps."""

from __future__ import annotations

import copy
import importlib
import re
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from contract import registered_losses
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchdistill_adv.binding import BINDING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
plain, steps = (importlib.import_module(name) for name in ("plain", "steps"))

TASK = steps.Task("small_cnn", "small_cnn", 6, 8, torch.device("cpu"))
# BSS starts from images that both networks get right, of which random networks have none to speak of; the wrapper has
# no loss of its own
NOT_MEASURED = {"BSSLoss", "OnAdversarialExamples"}


def float32(name: str, **adversary: object):
    return steps.Method.read(name).but(steps.FLOAT32, **adversary)


def test_every_loss_is_measured():
    chosen = steps.one_for_each_loss()
    found = {block["key"] for name in chosen for block in steps.Method.read(name).blocks.values()}
    assert found == registered_losses() - NOT_MEASURED
    assert len(chosen) == len(set(chosen))
    assert {"adaad", "darwin", "kd_tald_paper", "kd_tald_fast"} <= set(chosen) and "arkd" not in chosen


# plain implementations

LOSSES = {
    **{name: (name, {}, loss) for name, loss in plain.PLAIN.items()},
    # a bandwidth at which the particles feel each other, and more than one step
    "kd_tald, wide kernel": (
        "kd_tald_paper",
        {"num_particles": 3, "num_steps": 2, "bandwidth": 0.2},
        partial(plain.kd_tald, num_particles=3, num_steps=2, bandwidth=0.2),
    ),
}


@pytest.mark.parametrize("case", LOSSES)
def test_a_plain_implementation_has_our_loss_and_gradient(case):
    name, adversary, loss_of = LOSSES[case]
    method = float32(name, **adversary)
    teacher, student = (network.double() for network in steps.build_networks(method, TASK))
    teacher.requires_grad_(False).eval()
    if "tald" in name:
        # particles that pass one at a time are normalised by other statistics
        student.features = nn.Sequential(*(m for m in student.features if not isinstance(m, _BatchNorm)))
    ours, theirs = copy.deepcopy(student), student.train()
    box = steps.build_box(method, TASK, networks=(copy.deepcopy(teacher), ours))
    images, labels, _ = steps.draw_batch(method, TASK)
    images = images.double()
    steps.step_of(box, (images, labels, {}))  # begins the epoch
    binding = box.__dict__[BINDING]
    noise = binding.noise_for(binding.evaluated[0].search, images)
    value = loss_of(teacher, theirs, images, labels, noise)
    wanted = box.forward_process(images, labels, {})
    value.backward()
    wanted.backward()

    assert value.item() == pytest.approx(wanted.item(), rel=1e-9)
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-10)
    for p, q in zip(theirs.buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(p, q)


# bare passes


def counted(step, networks: dict[str, nn.Module]) -> dict[tuple[str, bool, bool], int]:
    """Images that pass each network, by train mode and by whether a gradient comes back."""
    seen: dict[tuple[str, bool, bool], int] = {}

    def see(who, module, args, logits):
        backward = [False]
        if logits.requires_grad:
            logits.register_hook(lambda _: backward.__setitem__(0, True))
        passes.append((who, module.training, backward, len(logits)))

    passes: list = []
    hooks = [network.register_forward_hook(partial(see, who)) for who, network in networks.items()]
    step()
    for hook in hooks:
        hook.remove()
    for who, training, backward, rows in passes:
        key = who, training, backward[0]
        seen[key] = seen.get(key, 0) + rows
    return seen


@pytest.mark.parametrize("name", steps.one_for_each_loss())
def test_bare_passes_are_those_of_our_step(name):
    """Image by image: in which network, in which mode, with a gradient or without."""
    method = float32(name)
    batch = steps.draw_batch(method, TASK)
    box = steps.build_box(method, TASK)
    step = steps.step_of(box, batch)
    on_clean = steps.trains_on_clean(box, batch, step)  # the first step checks the networks too
    shares, period = steps.bare_passes(box, TASK.batch_size), steps.period_of(box)
    whole = steps.repeated(step, period).step
    whole()  # in the first one the teacher's logits are checked once
    bare_networks = steps.build_networks(method, TASK)
    bare = steps.bare_step(bare_networks, batch, shares, method.has_teacher, on_clean)(period)

    def named(student, teacher):
        both = {"student": student, "teacher": teacher}
        # the standard teacher is a network beside the robust one, which the pair itself calls
        both |= {"standard": teacher.standard} if method.two_teachers else {}
        return {who: network for who, network in both.items() if network is not None}

    student, teacher = steps.sides(box)
    ours = counted(whole, named(student.network, teacher and teacher.network))
    theirs = counted(bare, named(*bare_networks[::-1]))
    for found in (ours, theirs):
        for _, training, backward in [key for key in found if key[0] == "standard"]:
            rows = found.pop(("standard", training, backward))
            found["teacher", training, backward] = found.get(("teacher", training, backward), 0) + rows
    assert theirs == ours


@pytest.mark.parametrize("name", steps.FILES)
def test_bare_passes_add_up_to_the_cost_that_is_logged(name):
    box = steps.build_box(float32(name), TASK)
    box.pre_epoch_process(epoch=box.num_epochs - 1)  # a schedule is at its end, which the log announces
    total = steps.Cost()
    for cost, _, every, _ in steps.bare_passes(box, TASK.batch_size):
        total = total.plus(cost.times(1 / every))
    assert tuple(total) == pytest.approx(tuple(box.__dict__[BINDING].cost(TASK.batch_size)))


@pytest.mark.parametrize(("name", "expected"), [("adaad", False), ("pgd_at", False), ("rslad", True), ("trades", True)])
def test_whether_clean_images_train_the_student(name, expected):
    method = float32(name)
    batch, box = steps.draw_batch(method, TASK), steps.build_box(method, TASK)
    assert steps.trains_on_clean(box, batch, steps.step_of(box, batch)) is expected


# timing, and the page


def test_times_are_of_one_training_step_and_ratios_of_the_same_turn():
    slow = steps.Timed(partial(time.sleep, 0.02), 4)
    durations = iter([0.0, 0.001, 0.03, 0.002])
    drifting = steps.Timed(lambda: time.sleep(next(durations)))
    found = steps.Times({"slow": slow, "drifting": drifting}, 3, TASK.device)
    assert len(found.turns) == 3  # the first does not count
    assert 5 <= float(found.ms("slow")) < 20
    ratios = [turn["slow"] / turn["drifting"] for turn in found.turns]
    assert found.ratio("slow", "drifting") == f"{statistics.median(ratios):.2f}"
    assert found.ratio("slow", "missing") == found.ratio("missing", "slow") == ""


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_a_quick_run_fills_the_table_of_methods(capsys):
    steps.main(["--quick", "--only", "methods", "--methods", "adaad", "darwin", "kd_tald_fast", "--device", "cpu"])
    header, _, *rows = rows_of(capsys.readouterr().out)
    assert [re.match(r"\[(\w+)\]", row[0])[1] for row in rows] == ["adaad", "darwin", "kd_tald_fast"]
    for row in rows:
        assert len(row) == len(header)
        for column, cell in zip(header[1:], row[1:], strict=True):
            if column == "than plain" and row[0].startswith("[darwin]"):
                assert cell == ""
            else:
                assert float(cell.split()[0]) > 0


def test_a_quick_run_fills_the_tables_of_growth(capsys):
    steps.main(["--quick", "--only", "growth", "--device", "cpu"])
    text = capsys.readouterr().out
    first = [row[0] for row in rows_of(text) if row[0] != "---"]
    assert first[:5] == ["step", "KD", "KD + TALD, K = 1", "KD + TALD, K = 2", "KD + TALD, fast"]
    assert first[5:] == ["num_steps", "1", "2", "batch_size", "4", "8", "image_size", "8", "16"]
    for row in rows_of(text):
        if row[0].isdigit():
            assert all(float(cell) > 0 for cell in row[1:])


def test_memory_is_that_of_another_process():
    before, after = steps.memory_of("kd_tald_paper", ["--quick"], TASK.device, num_particles=2)
    assert 10 < before < after < 10_000


def test_tables_go_between_their_marks(tmp_path, monkeypatch):
    page = tmp_path / "speed.md"
    text = "head\n<!-- begin a cpu -->\n{}<!-- end a cpu -->\nmiddle\n<!-- begin b cpu -->\n{}<!-- end b cpu -->\n"
    page.write_text(text.format("old\n", ""))
    monkeypatch.setattr(steps, "PAGE", page)
    steps.write("a cpu", r"new \1")
    steps.write("b cpu", "b")
    steps.write("a cpu", r"newer \1")
    assert page.read_text() == text.format("newer \\1\n", "b\n")
    with pytest.raises(SystemExit, match="begin c cpu"):
        steps.write("c cpu", "")


def test_the_page_has_a_place_for_every_table():
    text, args = steps.PAGE.read_text(), steps.parse([])
    for device in ("cpu", "cuda"):
        for name, _ in steps.tables(TASK, args):
            marker = f"{name} {device}"
            assert text.count(f"<!-- begin {marker} -->") == text.count(f"<!-- end {marker} -->") == 1

"""Searches of fewer steps: images that leave early, and schedules over epochs."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import NORMALIZE, images, network, sharp, tiny_box
from torch import nn

from torchdistill_adv.adversaries import PGD
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.noise import Noise
from torchdistill_adv.objectives import OBJECTIVES, Objective, View
from torchdistill_adv.registry import build_adversary
from torchdistill_adv.threat import ThreatModel

EARLY = ("stalled", "changed")
ATTACKED = {
    "ce_student": ("student",),
    "kl_clean_student_student": ("student",),
    "kl_teacher_student": ("teacher", "student"),
    "kl_cam_teacher_student": ("teacher", "student"),
}
RADII = {"linf": 0.6, "l2": 6.0}
# short ones cross a boundary in some steps, long ones overshoot
STEPS = {("linf", "changed"): 0.08, ("linf", "stalled"): 0.5, ("l2", "changed"): 0.4, ("l2", "stalled"): 6.0}


class Counted(nn.Sequential):
    """A network that remembers how many rows each of its passes had."""

    def __init__(self, inner):
        super().__init__(*inner)
        self.passes = []

    def forward(self, rows):
        self.passes.append(len(rows))
        return super().forward(rows)


def setting(key, norm="linf", seed=0, count=12):
    """Networks, images, objective and threat model of a search, in float64."""
    x, y = images(count, seed)
    x = x.double()
    student, teacher = (Counted(sharp(seed + i).double().eval()) for i in (1, 2))
    threat = ThreatModel(eps=RADII[norm], norm=norm, **NORMALIZE)

    def search(adversary, which=slice(None), start=None):
        """The examples of some images, from a start that does not depend on which these are."""
        view = View(x[which], y[which], student, teacher, Noise(0))
        objective = Objective.build(key).bind(view)
        student.passes.clear()
        teacher.passes.clear()
        return adversary(objective, x[which], threat, start or Start(which))

    return search, x, y, student, teacher, threat


class Start:
    """The same random numbers for an image in every batch."""

    def __init__(self, which):
        self.which = which

    def uniform(self, shape):
        everything = Noise(3, dtype=torch.float64).uniform((100, *shape[1:]))
        return everything[: shape[0]] if self.which == slice(None) else everything[self.which]


def pgd(early_stop, norm="linf", **options):
    return PGD(6, STEPS[norm, early_stop], noise_factor=0.3, early_stop=early_stop, **options)


def in_full(adversary):
    return dataclasses.replace(adversary, early_stop="never")


def in_loops(adversary, key, i, x, y, networks, threat):
    """The search of one image as the docstring says it, and how many gradients it takes."""
    ascent = -1 if adversary.targeted else 1
    view = View(x[i : i + 1], y[i : i + 1], networks["student"], networks["teacher"], Noise(0))
    objective = Objective.build(key).entry.function(view)
    clean = x[i : i + 1]
    row = threat.random_start(clean, Start([i]).uniform(clean.shape), adversary.noise_factor)
    rows, values, classes = [], [], []
    while len(values) < adversary.num_steps:
        row = row.detach().requires_grad_()
        value = objective(row, torch.tensor([0]))
        (gradient,) = torch.autograd.grad(value.sum(), row)
        rows.append(row.detach())
        values.append(ascent * value.item())
        classes.append([int(networks[who](row).argmax()) for who in ATTACKED[key]])
        if adversary.early_stop == "changed" and classes[-1] != classes[0]:
            return rows[-1], len(values)
        if adversary.early_stop == "stalled" and len(values) > 1 and values[-1] <= values[-2]:
            return rows[-2], len(values)
        moved = threat.step(row.detach(), ascent * threat.gradient(gradient), adversary.step_size)
        row = threat.project(moved, clean)
    return row, len(values)


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("key", ATTACKED)
@pytest.mark.parametrize("early_stop", EARLY)
def test_every_image_is_searched_as_in_slow_loops_and_no_row_is_passed_in_vain(early_stop, key, norm):
    search, x, y, student, teacher, threat = setting(key, norm)
    adversary = pgd(early_stop, norm)
    found = search(adversary)
    passes = {"student": list(student.passes), "teacher": list(teacher.passes)}
    expected = [
        in_loops(adversary, key, i, x, y, {"student": student, "teacher": teacher}, threat) for i in range(len(x))
    ]
    for i, (row, _) in enumerate(expected):
        assert torch.allclose(found.rows[i], row[0], atol=1e-9), i
    gradients = [count for _, count in expected]
    # a network that is only compared with is passed for the images that search, too
    for who in ATTACKED[key]:
        searching = [sum(count > step for count in gradients) for step in range(max(gradients))]
        assert passes[who][-len(searching) :] == searching
    assert len(set(gradients)) > 1 and min(gradients) < adversary.num_steps
    assert found.index.tolist() == list(range(len(x))) and found.path is None


def test_targeted_leaves_where_the_objective_does_not_fall():
    key = {"key": "ce_student", "kwargs": {"target_class": 3}}
    search, x, _, student, _, threat = setting(key)
    adversary = pgd("stalled", targeted=True)
    found = search(adversary).rows
    with torch.no_grad():
        start = threat.random_start(x, Start(slice(None)).uniform(x.shape), adversary.noise_factor)
        before, after = (
            nn.functional.cross_entropy(student(rows), torch.full((12,), 3), reduction="none")
            for rows in (start, found)
        )
    assert (after < before).all()
    assert not torch.equal(found, search(in_full(adversary)).rows)


@settings(max_examples=40, deadline=None)
@given(
    key=st.sampled_from(list(ATTACKED)),
    early_stop=st.sampled_from(EARLY),
    norm=st.sampled_from(list(RADII)),
    seed=st.integers(0, 50),
    steps=st.integers(1, 8),
    size=st.floats(0.05, 1.0),
    chunk_size=st.sampled_from([None, 1, 5]),
)
def test_examples_do_not_depend_on_the_other_images(key, early_stop, norm, seed, steps, size, chunk_size):
    search, x, _, student, _, threat = setting(key, norm, seed, count=7)
    adversary = PGD(steps, size * RADII[norm], noise_factor=0.3, early_stop=early_stop, chunk_size=chunk_size)
    together = search(adversary)
    passed = sum(student.passes)
    alone = torch.cat([search(adversary, [i]).rows for i in range(7)])
    assert torch.allclose(together.rows, alone, atol=1e-7)
    assert (threat.distance(together.rows, x) <= threat.eps + 1e-9).all()
    threat.check_inputs(together.rows)
    search(in_full(adversary))
    assert passed <= sum(student.passes)


@pytest.mark.parametrize("key", ATTACKED)
def test_changed_leaves_where_a_prediction_differs_and_the_others_are_searched_in_full(key):
    search, x, _, student, teacher, threat = setting(key)
    found, full = (search(adversary).rows for adversary in (pgd("changed"), in_full(pgd("changed"))))
    start = threat.random_start(x, Start(slice(None)).uniform(x.shape), 0.3)
    networks = [{"student": student, "teacher": teacher}[who] for who in ATTACKED[key]]
    changed = torch.stack([net(found).argmax(1) != net(start).argmax(1) for net in networks]).any(0)
    left = (found != full).flatten(1).any(1)
    assert left.any() and not left.all()
    assert changed[left].all()


def test_stalled_gives_the_best_iterate_and_ends_with_the_last_image():
    """Values -|x - t|, which steps of 1 cross to and fro."""
    top = torch.tensor([0.4, -0.6, 2.2], dtype=torch.float64)
    calls = []

    def objective(rows, index):
        calls.append(index.tolist())
        return -(rows.flatten(1).sum(1) - top[index]).abs()

    threat = ThreatModel(eps=9, space="input", bounds="none")
    adversary = PGD(9, 1.0, start="none", early_stop="stalled")
    found = adversary(objective, torch.zeros(3, 1, 1, 1, dtype=torch.float64), threat, Noise(0)).rows.flatten()
    # to 1 and no nearer; to -1, then 0 and no nearer; to 1, 2, then 3 and no nearer
    assert found.tolist() == [0, -1, 2]
    assert calls == [[0, 1, 2], [0, 1, 2], [1, 2], [2]]


def test_a_flat_objective_ends_the_search_at_its_second_pass():
    calls = []

    def objective(rows, index):
        calls.append(len(rows))
        return rows.flatten(1).sum(1) * 0

    x, _ = images(5)
    threat = ThreatModel(eps=0.3, **NORMALIZE)
    found = PGD(6, 0.1, start="none", early_stop="stalled")(objective, x, threat, Noise(0)).rows
    assert torch.equal(found, x) and calls == [5, 5]


def test_a_value_that_is_nan_is_not_hidden():
    def objective(rows, index):
        values = rows.flatten(1).sum(1)
        return values * torch.where((index == 1) & (values > 0.5), torch.nan, 1.0)

    threat = ThreatModel(eps=9, norm="l2", space="input", bounds="none")
    found = PGD(5, 1.0, start="none", early_stop="stalled")(objective, torch.zeros(3, 1, 1, 1), threat, Noise(0)).rows
    assert found.isnan().flatten().tolist() == [False, True, False]


# predictions


def blocks():
    chosen = {"key": "ce_student", "kwargs": {"target_class": 1}}
    return {**{key: key for key in OBJECTIVES}, "ce_student, targeted": chosen}


@pytest.mark.parametrize("name", blocks())
def test_every_objective_tells_what_the_attacked_networks_predict(name):
    x, y = images(6)
    nets = {"student": sharp(1).eval(), "teacher": sharp(2).eval()}
    objective = Objective.build(blocks()[name])
    bound = objective.bind(View(x, y, nets["student"], nets["teacher"], Noise(0)))
    rows, index = (x + 0.3)[[4, 1, 1]], torch.tensor([4, 1, 1])
    bound(rows, index)
    expected = torch.stack([nets[who](rows).argmax(1) for who in objective.entry.attacks], 1)
    assert torch.equal(bound.predictions(), expected)


def inside(view):
    """An objective that looks inside the student, and keeps nothing but the clean logits."""
    reference = view.student_clean
    return lambda rows, index: (view.module("student")(rows) - reference[index]).logsumexp(1)


def test_an_objective_that_tells_no_predictions_is_refused(monkeypatch):
    entry = dataclasses.replace(OBJECTIVES["kl_clean_student_student"], function=inside)
    monkeypatch.setitem(OBJECTIVES._entries, "inside_for_test", entry)
    x, y = images(3)
    threat = ThreatModel(eps=0.1, **NORMALIZE)
    bound = Objective.build("inside_for_test").bind(View(x, y, sharp(1).eval(), None, Noise(0)))
    for objective in (bound, lambda rows, index: rows.flatten(1).sum(1)):
        PGD(2, early_stop="stalled")(objective, x, threat, Noise(0))
        with pytest.raises(ConfigError, match="predict"):
            PGD(2, early_stop="changed")(objective, x, threat, Noise(0))


def test_predictions_take_no_pass_of_a_network_that_is_not_attacked():
    search, _, _, student, teacher, _ = setting("kl_teacher_clean_teacher")
    search(pgd("changed"))
    assert not student.passes and teacher.passes[:2] == [12, 12]


# refused


@pytest.mark.parametrize(
    "options, path, found",
    [
        ({"early_stop": "stall"}, "kwargs.early_stop", "did you mean 'stalled'"),
        ({"early_stop": True}, "kwargs.early_stop", "Known: changed, never, stalled"),
        ({"early_stop": "changed", "return_path": True}, "kwargs.early_stop", "write 'never'"),
        ({"first_num_steps": 0}, "kwargs.first_num_steps", ">= 1"),
        ({"first_num_steps": 4, "num_steps": 3}, "kwargs.first_num_steps", "found 4, more than the 3"),
        ({"first_num_steps": 2, "return_path": True}, "kwargs.first_num_steps", "fixed length"),
    ],
)
def test_bad_options_are_refused(options, path, found):
    with pytest.raises(ConfigError, match=found) as error:
        build_adversary({"key": "PGD", "kwargs": options})
    assert error.value.path == path


def fewer(key="AdaADLoss", option=None, **others):
    kwargs = {"num_steps": 3, "step_size": 0.1, "start": "gaussian", **(option or {"early_stop": "stalled"})}
    threat = {**NORMALIZE, "norm": "linf", "eps": 0.2}
    options = {"adversary": {"key": "PGD", "kwargs": kwargs}, "threat": threat, **others}
    return {"criterion": {"key": key, "kwargs": options}, "weight": 1.0}


def begin(block):
    box = tiny_box({"term": block})
    box.pre_epoch_process(epoch=0)
    return box


KWARGS = "train.criterion.kwargs.sub_terms.term.criterion.kwargs"


@pytest.mark.parametrize("early_stop", EARLY)
@pytest.mark.parametrize(
    "options, written",
    [
        ({"search_bn": "train"}, "search_bn: 'eval'"),
        ({"search_bn": "batch"}, "search_bn: 'eval'"),
        ({"teacher_mode": "keep"}, "teacher_mode: 'eval'"),
    ],
)
def test_images_that_a_network_normalises_together_do_not_leave_early(early_stop, options, written):
    with pytest.raises(ConfigError, match=written) as error:
        begin(fewer(option={"early_stop": early_stop}, **options))
    assert error.value.path == f"{KWARGS}.adversary.kwargs.early_stop"
    begin(fewer(option={"early_stop": "never"}, **options))


@pytest.mark.parametrize("option", [{"early_stop": "stalled"}, {"early_stop": "changed"}, {"first_num_steps": 1}])
def test_darwin_needs_all_of_its_path(option):
    [name] = option
    with pytest.raises(ConfigError) as error:
        begin(fewer("DARWINLoss", option))
    assert error.value.path == f"{KWARGS}.adversary.kwargs.{name}"
    target = {"key": "PGD", "kwargs": {"num_steps": 3, **option}}
    with pytest.raises(ConfigError) as error:
        begin(fewer("DARWINLoss", {"start": "gaussian"}, target_adversary=target))
    assert error.value.path == f"{KWARGS}.target_adversary.kwargs.{name}"


@pytest.mark.parametrize("key", ["AdaADLoss", "SmaraADLoss", "TRADESLoss", "RSLADLoss"])
@pytest.mark.parametrize("early_stop", EARLY)
def test_terms_train_with_images_that_leave(key, early_stop, searches):
    networks = {"student": sharp(2), "teacher": sharp(1, width=8)}
    box = tiny_box({"term": fewer(key, {"early_stop": early_stop})}, **copy.deepcopy(networks))
    box.pre_epoch_process(epoch=0)
    box.forward_process(*images(), None).backward()
    [(search, examples)] = searches
    assert search.adversary.early_stop == early_stop
    assert 0 < search.threat.distance(examples.rows, images()[0]).max() <= 0.2 + 1e-6


# schedules


def lengths(first, last, epochs):
    adversary = PGD(last, 0.1, first_num_steps=first)
    return [adversary.at((epoch + 1) / epochs) for epoch in range(epochs)]


def test_steps_grow_over_the_epochs_and_lengthen_in_proportion():
    assert [a.num_steps for a in lengths(3, 6, 4)] == [3, 4, 5, 6]
    assert [a.num_steps for a in lengths(3, 6, 8)] == [3, 3, 4, 4, 5, 5, 6, 6]
    assert [a.num_steps for a in lengths(1, 10, 5)] == [2, 4, 6, 8, 10]
    assert [a.num_steps for a in lengths(4, 4, 3)] == [4, 4, 4]
    # 7 / 25 * 25 is more than 7 in floating point
    assert [a.num_steps for a in lengths(1, 25, 25)] == list(range(1, 26))
    assert lengths(2, 5, 8)[0].step_size == pytest.approx(0.25)


@given(first=st.integers(1, 20), more=st.integers(0, 20), epochs=st.integers(1, 300))
def test_every_number_of_steps_has_an_equal_share_of_the_epochs(first, more, epochs):
    found = lengths(first, first + more, epochs)
    steps = [a.num_steps for a in found]
    assert steps == sorted(steps) and steps[0] >= first
    assert found[-1] == PGD(first + more, 0.1)
    assert all(a.num_steps * a.step_size == pytest.approx((first + more) * 0.1) for a in found)
    shares = [steps.count(n) for n in range(first, first + more + 1)]
    assert max(shares) - min(shares) <= 1


def test_without_a_schedule_nothing_changes():
    adversary = PGD(7, 0.1, early_stop="stalled")
    assert adversary.at(0.1) == adversary.at(1) == adversary


def test_a_stage_begins_with_fewer_steps(monkeypatch):
    student = network(2)
    passes = []
    block = fewer("PGDATLoss", {"num_steps": 4, "first_num_steps": 1, "start": "none"})
    box = tiny_box({"term": block}, student=student, num_epochs=8)
    steps = []
    for epoch in range(8):
        box.pre_epoch_process(epoch=epoch)
        box.forward_process(*images(), None)  # the first step of all tries the networks
        passes.clear()
        with student.register_forward_hook(lambda *_: passes.append(1)):
            box.forward_process(*images(), None)
        steps.append(len(passes) - 2)  # but for the clean pass, and that of the loss
    assert steps == [1, 1, 2, 2, 3, 3, 4, 4]

"""Objectives against their formulas, written out in loops."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torchdistill.losses.registry
from torch import nn
from torchdistill.core.interfaces.registry import PRE_EPOCH_PROC_FUNC_DICT
from torchdistill.models.registry import MODEL_DICT

from torchdistill_adv.divergences import kl_divergence
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.noise import Noise
from torchdistill_adv.objectives import OBJECTIVES, Objective, View, register_objective
from torchdistill_adv.registry import ADVERSARIES, Registry, register_adversary

N, C = 4, 5


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Flatten(), nn.Linear(16, C)).double()


@pytest.fixture
def view():
    torch.manual_seed(0)
    return View(
        torch.randn(N, 3, 2, 2, dtype=torch.float64),
        torch.tensor([0, 1, 2, 4]),
        network(1),
        network(2),
        Noise(0, dtype=torch.float64),
    )


def softmax(logits):
    total = sum(math.exp(v) for v in logits)
    return [math.exp(v) / total for v in logits]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(softmax(p), softmax(q), strict=True))


def mse(p, q):
    return sum((a - b) ** 2 for a, b in zip(softmax(p), softmax(q), strict=True)) / C


def ce(logits, y):
    return -math.log(softmax(logits)[y])


def mixed_ce(logits, other, y, share=0.5):
    target = [share * q + (1 - share) * (c == y) for c, q in enumerate(softmax(other))]
    return -sum(q * math.log(p) for q, p in zip(target, softmax(logits), strict=True))


def runner_up_gap(logits, clean):
    first, second = sorted(range(C), key=lambda c: -clean[c])[:2]
    return logits[second] - logits[first] if max(logits) == logits[first] else 0.0


# by key: student(x'), teacher(x'), student(x), teacher(x), label -> value
FORMULAS = {
    "ce_student": lambda s, t, s0, t0, y: ce(s, y),
    "margin_student": lambda s, t, s0, t0, y: max(z for c, z in enumerate(s) if c != y) - s[y],
    "ce_teacher": lambda s, t, s0, t0, y: ce(t, y),
    "ce_student_mixed": lambda s, t, s0, t0, y: mixed_ce(s, t0, y),
    "kl_clean_teacher_student": lambda s, t, s0, t0, y: kl(t0, s),
    "kl_clean_student_student": lambda s, t, s0, t0, y: kl(s0, s),
    "kl_teacher_student": lambda s, t, s0, t0, y: kl(t, s),
    "kl_teacher_clean_teacher": lambda s, t, s0, t0, y: kl(t, t0),
    "mse_teacher_clean_teacher": lambda s, t, s0, t0, y: mse(t, t0),
    "gap_teacher": lambda s, t, s0, t0, y: runner_up_gap(t, t0),
}
# by key: the channels of one cell, and their weights for the label -> that cell of the map, before it has unit length
MAPS = {
    "kl_cam_teacher_student": lambda cell, weights: max(0.0, sum(a * w for a, w in zip(cell, weights, strict=True))),
    "kl_features_teacher_student": lambda cell, weights: sum(a * a for a in cell) / len(cell),
}
# where the default draws random numbers
BLOCKS = {"gap_teacher": {"key": "gap_teacher", "kwargs": {"toward": "runner_up"}}}


def test_every_registered_objective_has_a_formula():
    assert {*FORMULAS, *MAPS} == set(OBJECTIVES)


@pytest.mark.parametrize("key", FORMULAS)
def test_value_is_the_formula(key, view):
    index = torch.tensor([2, 0, 0, 3, 1])
    rows = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        found = Objective.build(BLOCKS.get(key, key)).bind(view)(rows, index)
        s, t = view.student(rows).tolist(), view.teacher(rows).tolist()
        s0, t0 = view.student(view.images).tolist(), view.teacher(view.images).tolist()
    for row, image in enumerate(index.tolist()):
        expected = FORMULAS[key](s[row], t[row], s0[image], t0[image], int(view.labels[image]))
        assert abs(float(found[row]) - expected) < 1e-10


@pytest.mark.parametrize("weight", [None, 0, 7])
@pytest.mark.parametrize("key", MAPS)
def test_value_of_an_alignment_is_the_formula(key, weight, view):
    index = torch.tensor([2, 0, 0, 3, 1])
    rows = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    block = key if weight is None else {"key": key, "kwargs": {"alignment_weight": weight}}

    def unit_map(net, row, label):
        cells = net[:2](row[None])[0].flatten(1).T.tolist()
        values = [MAPS[key](cell, net[3].weight[label].view(4, 4).mean(1).tolist()) for cell in cells]
        return [v / (math.hypot(*values) or 1) for v in values]

    with torch.no_grad():
        found = Objective.build(block).bind(view)(rows, index)
        for row, image, value in zip(rows, index.tolist(), found.tolist(), strict=True):
            maps = [unit_map(net, row, int(view.labels[image])) for net in (view.student, view.teacher)]
            distance = sum((a - b) ** 2 for a, b in zip(*maps, strict=True)) / 4
            divergence = kl(view.teacher(row[None])[0].tolist(), view.student(row[None])[0].tolist())
            assert distance > 0 and abs(value - divergence - (1 if weight is None else weight) * distance) < 1e-10


@pytest.mark.parametrize("key", [*FORMULAS, *MAPS])
def test_declared_networks_are_those_called(key, view):
    called = {"student": [], "teacher": []}
    for who, calls in called.items():
        view.network(who).register_forward_hook(
            lambda module, inputs, output, calls=calls: calls.append((inputs[0].requires_grad, len(output)))
        )
    objective = Objective.build(key)
    rows = torch.randn(7, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    objective.bind(view)(rows, torch.zeros(7, dtype=torch.long)).sum().backward()
    for who, calls in called.items():
        assert ((True, 7) in calls) == (who in objective.entry.attacks)
        assert ((False, N) in calls) == (who in objective.clean)
    assert objective.needs == {who for who, calls in called.items() if calls}


@pytest.mark.parametrize("share", [0, 0.3, 1])
def test_mixed_target_takes_a_share_of_the_teacher(share, view):
    objective = Objective.build({"key": "ce_student_mixed", "kwargs": {"teacher_share": share}})
    found = objective.bind(view)(view.images, torch.arange(N)).tolist()
    s, t = view.student_clean.tolist(), view.teacher_clean.tolist()
    assert found == pytest.approx([mixed_ce(s[i], t[i], int(view.labels[i]), share) for i in range(N)])


def test_known_clean_logits_are_not_computed_again(view):
    view.known_teacher_logits = torch.zeros(N, C, dtype=torch.float64)
    assert torch.equal(view.teacher_clean, view.known_teacher_logits)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_target_classes(who, view):
    rows, index = view.images, torch.arange(N)
    clean = view.clean(who)
    for target, expected in {
        "runner_up": clean.argsort(1)[:, -2],
        3: torch.full((N,), 3),
    }.items():
        objective = Objective.build({"key": f"ce_{who}", "kwargs": {"target_class": target}})
        assert objective.is_targeted and not objective.needs_labels
        found = objective.bind(view)(rows, index)
        assert torch.allclose(found, nn.functional.cross_entropy(clean, expected, reduction="none"))


def test_random_targets_are_all_classes_but_the_predicted_one(view):
    view.images = view.images[:1].expand(2000, -1, -1, -1)
    predicted = int(view.teacher_clean[0].argmax())
    losses = Objective("ce_teacher", (("target_class", "random"),)).bind(view)(view.images, torch.arange(2000))
    of_class = nn.functional.cross_entropy(view.teacher_clean[:C], torch.arange(C), reduction="none")
    counts = [(losses - value).abs().lt(1e-9).sum().item() for value in of_class]
    assert counts[predicted] == 0
    assert all(400 < count < 600 for c, count in enumerate(counts) if c != predicted)


def test_target_class_beyond_the_network_is_refused(view):
    objective = Objective.build({"key": "ce_teacher", "kwargs": {"target_class": 9}})
    with pytest.raises(ConfigError, match="classes 0 to 4"):
        objective.bind(view)(view.images, torch.arange(N))


def test_half_precision_logits_are_widened():
    p, q = torch.randn(2, 8, 100).bfloat16()
    assert kl_divergence(p, q).dtype == torch.float32
    assert torch.allclose(kl_divergence(p, q), kl_divergence(p.float(), q.float()))


@pytest.mark.parametrize(
    "spec, path, found",
    [
        ("kl_teacher_studnt", "key", "did you mean 'kl_teacher_student'"),
        ({"key": "ce_student", "kwargs": {"target": 1}}, "kwargs.target", "target_class"),
        ({"key": "ce_student", "kwargs": {"target_class": "second"}}, "kwargs.target_class", "runner_up"),
        ({"key": "ce_student", "kwargs": {"target_class": -1}}, "kwargs.target_class", ">= 0"),
        ({"key": "ce_student_mixed", "kwargs": {"teacher_share": 1.5}}, "kwargs.teacher_share", "<= 1"),
        ({"key": "gap_teacher", "kwargs": {"toward": "runner-up"}}, "kwargs.toward", "did you mean 'runner_up'"),
        ({"key": "kl_cam_teacher_student", "kwargs": {"alignment_weight": -1}}, "kwargs.alignment_weight", ">= 0"),
    ],
)
def test_bad_objectives_are_refused(spec, path, found):
    with pytest.raises(ConfigError, match=found) as error:
        Objective.build(spec)
    assert error.value.path == path


def test_taken_keys_are_refused():
    with pytest.raises(ValueError, match="registered already"):
        register_adversary(object, key="PGD")
    with pytest.raises(ValueError, match="registered already"):
        register_objective(attacks=("student",), key="ce_student")(lambda view: None)
    registry = Registry("thing")
    registry.add("a", 1)
    assert list(registry) == ["a"]
    assert "PGD" in ADVERSARIES and "ce_student" in OBJECTIVES


def test_no_key_of_ours_shadows_one_of_torchdistill():
    """Ours are added by decorators, which torchdistill lets overwrite silently; so compare the definitions' modules."""
    tables = [
        torchdistill.losses.registry.LOW_LEVEL_LOSS_DICT,
        torchdistill.losses.registry.MIDDLE_LEVEL_LOSS_DICT,
        torchdistill.losses.registry.LOSS_WRAPPER_DICT,
        MODEL_DICT,
        PRE_EPOCH_PROC_FUNC_DICT,
    ]
    ours = {key for table in tables for key, value in table.items() if value.__module__.startswith("torchdistill_adv")}
    assert {"TALDLoss", "OnAdversarialExamples", "bind_adversarial_losses", "timm", "small_cnn"} <= ours
    code = (
        "import torchdistill.core.distillation, torchdistill.core.training, torchdistill.models.classification as _;"
        "import torchdistill.losses.mid_level; from torchdistill.losses import registry as r;"
        "from torchdistill.models.registry import MODEL_DICT as m;"
        "from torchdistill.core.interfaces.registry import PRE_EPOCH_PROC_FUNC_DICT as p;"
        "print(*r.LOSS_DICT, *r.LOW_LEVEL_LOSS_DICT, *r.MIDDLE_LEVEL_LOSS_DICT, *r.LOSS_WRAPPER_DICT, *m, *p)"
    )
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "KDLoss" in theirs and not ours & set(theirs)

"""MagSim and AngSim against networks whose boundaries are known, and the cases in which they are not defined."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import NORMALIZE, images, sharp
from torch import nn

from torchdistill_adv.adversaries import BSS
from torchdistill_adv.evaluation.similarity import boundary_similarity, compare_moves, describe_similarity
from torchdistill_adv.threat import ThreatModel

FREE = ThreatModel(math.inf, "l2", "input", bounds="none")
# the step of DeepFool: on a linear network, to the boundary at once
NEWTON = BSS(step_size=1.0, norm_power=2, overshoot=1e-6)


def linear(weight, bias):
    net = nn.Sequential(nn.Flatten(), nn.Linear(weight.shape[1], len(weight))).double()
    with torch.no_grad():
        net[1].weight.copy_(weight)
        net[1].bias.copy_(bias)
    return net


def random_linear(seed, num_classes, size=6):
    generator = torch.Generator().manual_seed(seed)
    weight, bias = (torch.randn(*s, generator=generator).double() for s in ((num_classes, size), (num_classes,)))
    return linear(weight, bias)


def rows(count=40, size=6, seed=9):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed)).double()


def in_words(teacher, student, x, labels):
    """Ratio and cosine of the shortest ways to the boundaries of two linear networks, one image at a time."""
    found = {}
    for i, (image, y) in enumerate(zip(x.tolist(), labels.tolist(), strict=True)):
        parameters = [(net[1].weight.tolist(), net[1].bias.tolist()) for net in (teacher, student)]
        logits = [
            [sum(a * v for a, v in zip(w, image, strict=True)) + c for w, c in zip(*p, strict=True)] for p in parameters
        ]
        if any(z.index(max(z)) != y for z in logits):
            continue
        second = sorted(range(len(logits[0])), key=lambda k: -logits[0][k])[1]
        distances, normals = [], []
        for (weight, _), z in zip(parameters, logits, strict=True):
            normal = [a - b for a, b in zip(weight[second], weight[y], strict=True)]
            normals.append([v / math.hypot(*normal) for v in normal])
            distances.append((z[y] - z[second]) / math.hypot(*normal))
        found[i] = min(distances) / max(distances), sum(a * b for a, b in zip(*normals, strict=True))
    return found


@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_linear_networks_have_the_distances_and_normals_of_their_boundaries(num_classes):
    teacher, student = random_linear(0, num_classes), random_linear(1, num_classes)
    x = rows()
    labels = teacher(x).argmax(1)
    found = boundary_similarity(teacher, student, x, labels, FREE, NEWTON)
    expected = in_words(teacher, student, x, labels)
    assert found.right.nonzero()[:, 0].tolist() == list(expected) and 3 < len(expected) < 40
    for i, (magnitude, angle) in expected.items():
        assert found.teacher_flipped[i] and found.student_flipped[i]
        # the overshoot lengthens the moves by 1e-6 over the slope
        assert abs(float(found.magnitude[i]) - magnitude) < 1e-3 and abs(float(found.angle[i]) - angle) < 1e-9
    assert found.magnitude[~found.right].isnan().all() and found.angle[~found.right].isnan().all()
    summary = describe_similarity(found, NEWTON)
    assert summary["magsim"] == pytest.approx(sum(m for m, _ in expected.values()) / len(expected), abs=1e-3)
    assert summary["angsim"] == pytest.approx(sum(a for _, a in expected.values()) / len(expected))
    assert (summary["num_right"], summary["num_compared"]) == (len(expected), len(expected))


@pytest.mark.parametrize("degrees", [0, 30, 90, 150])
@pytest.mark.parametrize("distance", [0.5, 1.0, 3.0])
def test_many_short_steps_find_a_boundary_at_a_known_angle_and_distance(degrees, distance):
    """The official step, whose length is the gap itself."""
    radians = math.radians(degrees)
    normals = [[1.0, 0.0], [math.cos(radians), math.sin(radians)]]
    networks = []
    for normal, away, slope in zip(normals, (1.0, distance), (1.0, 2.0), strict=True):
        # class 0 up to the boundary, which is ``away`` from the origin
        weight = slope * torch.tensor([[0.0, 0.0], normal], dtype=torch.float64)
        networks.append(linear(weight, torch.tensor([0.0, -away * slope]).double()))
    search = BSS(num_steps=60, step_size=0.3, overshoot=1e-4)
    found = boundary_similarity(*networks, torch.zeros(1, 2).double(), torch.zeros(1, dtype=torch.long), FREE, search)
    assert float(found.magnitude) == pytest.approx(min(distance, 1 / distance), rel=1e-3)
    assert float(found.angle) == pytest.approx(math.cos(radians), abs=1e-9)


def bounded():
    return ThreatModel(math.inf, "l2", "input", **NORMALIZE)


def test_equal_networks_have_1_and_1():
    net = sharp(1, width=8).double().eval()
    x = images(24)[0].double()
    summary = describe_similarity(boundary_similarity(net, net, x, net(x).argmax(1), bounded(), BSS(step_size=1.0)))
    assert (summary["magsim"], summary["angsim"]) == (pytest.approx(1), pytest.approx(1))
    rates = summary["flipped"]
    assert rates["teacher"] == rates["student"] == rates["both"] > 50


@pytest.mark.parametrize("seed", range(3))
def test_order_of_the_networks_does_not_matter_where_the_class_is_the_same(seed):
    """With two classes there is no choice of it."""
    first, second = (sharp(s, num_classes=2, width=8).double().eval() for s in (seed, seed + 10))
    x = images(24, seed)[0].double()
    labels = first(x).argmax(1)
    forward, backward = (
        boundary_similarity(*nets, x, labels, bounded()) for nets in ((first, second), (second, first))
    )
    assert torch.equal(forward.right, backward.right) and forward.right.any()
    assert torch.equal(forward.teacher_flipped, backward.student_flipped)
    for name in ("magnitude", "angle"):
        assert torch.allclose(getattr(forward, name), getattr(backward, name), equal_nan=True, atol=1e-12)


def test_both_searches_go_to_the_teachers_second_class():
    """The student's own second class is another one, in an orthogonal direction."""
    x, labels = torch.zeros(1, 3).double(), torch.zeros(1, dtype=torch.long)
    weight = torch.eye(3).double()
    teacher = linear(weight, torch.tensor([1.0, 0.5, 0.0]).double())
    student = linear(weight, torch.tensor([1.0, 0.0, 0.5]).double())
    found = boundary_similarity(teacher, student, x, labels, FREE, NEWTON)
    assert float(found.angle) == pytest.approx(1)
    assert float(found.magnitude) == pytest.approx(0.5, abs=1e-5)


def two_classes(normal, offset=0.0):
    """Class 1 where the product with ``normal`` is above ``offset``."""
    return linear(torch.tensor([[0.0, 0.0], normal]), torch.tensor([0.0, -offset]))


def test_images_that_did_not_flip_in_both_are_left_out_and_counted():
    """One step of xi + gap: at a slope of 1 over any boundary, at 1/2 over one that is closer than 2 xi."""
    x = torch.tensor([[-0.1, 0.0], [-0.25, 0.0], [-0.5, 0.0], [-1.0, 0.0], [-0.1, 0.0]]).double()
    labels = torch.tensor([0, 0, 0, 0, 1])
    search = BSS(num_steps=1, step_size=1.0, overshoot=0.1)
    found = boundary_similarity(two_classes([1.0, 0.0]), two_classes([0.3, 0.4]), x, labels, FREE, search)
    assert found.right.tolist() == [True, True, True, True, False]
    assert found.teacher_flipped.tolist() == [True, True, True, True, False]
    assert found.student_flipped.tolist() == [True, True, False, False, False]
    assert found.magnitude[2:].isnan().all() and found.angle[2:].isnan().all()
    # lengths 0.1 + 0.1 and 0.1 + 0.03, then 0.1 + 0.25 and 0.1 + 0.075
    assert found.magnitude[:2].tolist() == pytest.approx([0.65, 0.5], abs=1e-6)
    summary = describe_similarity(found, search)
    assert (summary["num_right"], summary["num_compared"], summary["note"]) == (4, 2, None)
    assert summary["flipped"] == {"teacher": 100, "student": 50, "both": 50}
    assert (summary["magsim"], summary["angsim"]) == (pytest.approx(0.575, abs=1e-6), pytest.approx(0.6, abs=1e-6))


def test_a_boundary_beyond_the_valid_range_is_not_reached():
    x, labels = torch.tensor([[0.2, 0.4]]).double(), torch.zeros(1, dtype=torch.long)
    networks = two_classes([1.0, 0.0], 0.5), two_classes([1.0, 0.0], 1.5)
    inside = boundary_similarity(*networks, x, labels, ThreatModel(math.inf, "l2", "input", bounds=(0.0, 1.0)), NEWTON)
    assert inside.teacher_flipped.all() and not inside.student_flipped.any()
    summary = describe_similarity(inside, NEWTON)
    assert summary["magsim"] is None and summary["angsim"] is None
    assert "within 10 steps" in summary["note"] and json.dumps(summary, allow_nan=False)
    anywhere = boundary_similarity(*networks, x, labels, FREE, NEWTON)
    assert float(anywhere.magnitude) == pytest.approx(0.3 / 1.3, abs=1e-5)


def test_nothing_right_is_none_with_a_note():
    net = random_linear(0, 3)
    x = rows(5)
    summary = describe_similarity(boundary_similarity(net, net, x, (net(x).argmax(1) + 1) % 3, FREE))
    assert summary["flipped"] == {"teacher": None, "student": None, "both": None}
    assert (summary["num_right"], summary["magsim"], summary["angsim"]) == (0, None, None)
    assert "no image is classified rightly" in summary["note"]


class Fickle(nn.Module):
    """Says class 0 when it is asked first, and class 1 ever after."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return torch.eye(2, dtype=x.dtype)[int(self.calls > 1)].expand(len(x), 2) + 0 * x.flatten(1)[:, :2]


def test_a_move_of_length_zero_is_no_flip():
    teacher = random_linear(0, 2)
    x = rows(8)
    x = x[teacher(x).argmax(1) == 0]
    found = boundary_similarity(teacher, Fickle(), x, torch.zeros(len(x), dtype=torch.long), FREE, NEWTON)
    assert found.right.all() and found.teacher_flipped.all() and not found.student_flipped.any()
    assert found.magnitude.isnan().all() and found.angle.isnan().all()


VECTORS = st.lists(st.floats(-10, 10).filter(lambda v: abs(v) > 1e-3), min_size=3, max_size=3)


@settings(deadline=None, max_examples=50)
@given(VECTORS, VECTORS, st.floats(1e-3, 1e3))
def test_length_changes_the_ratio_alone(first, second, factor):
    a, b = (torch.tensor([v], dtype=torch.float64) for v in (first, second))
    magnitude, angle = compare_moves(a, b)
    assert 0 < magnitude <= 1 and -1 <= angle <= 1
    assert torch.allclose(compare_moves(a, a * factor)[0], torch.tensor(min(factor, 1 / factor)).double())
    assert torch.allclose(compare_moves(a, b * factor)[1], angle)
    assert torch.allclose(compare_moves(a, -b)[1], -angle)
    assert all(torch.equal(x, y) for x, y in zip(compare_moves(b, a), (magnitude, angle), strict=True))


def test_tiny_moves_keep_their_ratio():
    """Squares of such lengths are 0 in float32."""
    move = torch.full((1, 4), 1e-30)
    magnitude, angle = compare_moves(move, 2 * move)
    assert float(magnitude) == pytest.approx(0.5) and float(angle) == pytest.approx(1)


def test_definition_names_the_search_and_says_whose_reading_it_is():
    net = random_linear(0, 2)
    summary = describe_similarity(boundary_similarity(net, net, rows(3), torch.zeros(3, dtype=torch.long), FREE))
    for words in ("10 steps, alpha 0.3", "min(|v_T|, |v_S|) / max(|v_T|, |v_S|)", "cosine", "our reading"):
        assert words in summary["definition"]

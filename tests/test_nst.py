"""NST against its formula in slow loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml
from test_package import example
from torch.nn.functional import adaptive_avg_pool2d
from torchdistill.losses.registry import get_mid_level_loss

from torchdistill_adv.hosts import NSTLoss
from torchdistill_adv.hosts.nst import polynomial_mmd


def maps(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slow(student, teacher):
    """One image, and one pair of channels, at a time."""

    def units(image):
        return [channel.ravel() / np.linalg.norm(channel) for channel in image]

    def mean_kernel(first, second):
        return np.mean([np.dot(a, b) ** 2 for a in first for b in second])

    values = []
    for s, t in zip(student.numpy(), teacher.numpy(), strict=True):
        s, t = units(s), units(t)
        values.append(mean_kernel(t, t) + mean_kernel(s, s) - 2 * mean_kernel(s, t))
    return np.mean(values)


def io_dict(**outputs):
    return {path: {"output": value} for path, value in outputs.items()}


def pair(path, **options):
    return {**{side: {"path": path, "io": "output"} for side in ("teacher", "student")}, **options}


def test_value_is_the_formula_and_pairs_are_weighted():
    a, b = maps(0, 3, 4, 5, 6), maps(1, 3, 7, 5, 6)
    c, d = maps(2, 3, 2, 4, 4), maps(3, 3, 2, 4, 4)
    loss = NSTLoss({"first": pair("one"), "second": pair("two", weight=0.25)})
    value = loss(io_dict(one=a, two=c), io_dict(one=b, two=d), torch.zeros(3))
    assert value.item() == pytest.approx(slow(a, b) + 0.25 * slow(c, d), rel=1e-12)


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_the_larger_map_is_averaged_down(larger):
    small, large = maps(0, 2, 3, 4, 2), maps(1, 2, 5, 8, 6)
    student, teacher = (large, small) if larger == "student" else (small, large)
    value = NSTLoss({"only": pair("x")})(io_dict(x=student), io_dict(x=teacher))
    expected = slow(*(adaptive_avg_pool2d(x, (4, 2)) for x in (student, teacher)))
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_equal_sets_of_channels_are_at_distance_zero_in_any_order_and_of_any_norm():
    teacher = maps(0, 2, 6, 3, 3)
    student = teacher[:, torch.randperm(6)] * torch.rand(2, 6, 1, 1, dtype=torch.float64).add(0.1)
    assert abs(polynomial_mmd(student, teacher).item()) < 1e-14
    assert polynomial_mmd(student.roll(1, 2), teacher) > 1e-3


def test_only_the_student_gets_a_gradient_and_it_is_the_numerical_one():
    student, teacher = maps(0, 2, 3, 2, 2).requires_grad_(), maps(1, 2, 4, 2, 2).requires_grad_()
    loss = NSTLoss({"only": pair("x")})
    loss(io_dict(x=student), io_dict(x=teacher)).backward()
    assert teacher.grad is None and student.grad.abs().max() > 1e-4
    assert torch.autograd.gradcheck(lambda x: loss(io_dict(x=x), io_dict(x=teacher)), student)


def test_dead_channels_give_no_nan():
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = NSTLoss({"only": pair("x")})(io_dict(x=student), io_dict(x=maps(0, 2, 3, 4, 4).float()))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


def test_half_precision_is_computed_in_float32():
    student, teacher = (1e-2 * maps(seed, 2, 3, 8, 8) for seed in (0, 1))
    exact = slow(student.half().double(), teacher.half().double())
    found = NSTLoss({"only": pair("x")})(io_dict(x=student.half()), io_dict(x=teacher.half()))
    assert found.dtype == torch.float32 and found.item() == pytest.approx(exact, rel=1e-4)


def test_no_pairs_of_images_or_pixels_are_held_at_once():
    """O(N C^2) beside the maps, where the kernel of all pairs of channels and pixels has O(N C^2 H W)."""
    student = torch.randn(2, 16, 64, 64, requires_grad=True)
    largest = 0
    hooks = torch.autograd.graph.saved_tensors_hooks

    def watch(tensor):
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with hooks(watch, lambda tensor: tensor):
        polynomial_mmd(student, student.detach())
    assert 0 < largest <= student.numel()


def test_example_of_the_docstring_is_built_by_torchdistill():
    block = example(NSTLoss)
    loss = get_mid_level_loss(block["criterion"])
    assert isinstance(loss, NSTLoss) and block["weight"] == 50
    same = io_dict(layer1=maps(0, 2, 3, 4, 4))
    assert abs(loss(same, same).item()) < 1e-14
    assert yaml.safe_load(yaml.safe_dump(block)) == block

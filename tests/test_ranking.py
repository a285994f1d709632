"""Soft ranks and their correlation against Algorithms 1 and 2 in slow loops, and what must hold for any logits."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchdistill_adv.errors import ConfigError
from torchdistill_adv.ranking import soft_rank, soft_spearman


def logits(seed, rows=4, classes=6):
    return torch.randn(rows, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slow_ranks(values, sharpness):
    return [sum(1 / (1 + math.exp(-sharpness * (x - own))) for x in values) for own in values]


def slow_spearman(student, teacher, sharpness):
    def standardised(values):
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
        return [(v - mean) / spread for v in values]

    a, b = (slow_ranks(standardised(values), sharpness) for values in (student, teacher))
    n = len(student)
    return 1 - 6 * sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / (n * (n * n - 1))


def hard_spearman(student, teacher):
    """Pearson's correlation of the ranks, which for ranks without ties is Spearman's."""
    a, b = (values.argsort().argsort().double() for values in (student, teacher))
    return torch.corrcoef(torch.stack([a, b]))[0, 1]


@pytest.mark.parametrize("sharpness", [0.3, 5.0, 40.0])
def test_soft_rank_is_algorithm_1(sharpness):
    values = logits(0)
    expected = [slow_ranks(row, sharpness) for row in values.tolist()]
    assert torch.allclose(soft_rank(values, sharpness), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)


def test_sharp_ranks_count_from_one_half_and_the_largest_comes_first():
    ranks = soft_rank(torch.tensor([[3.0, 9.0, -2.0, 5.0]]), 1e3)
    assert ranks.tolist() == [[2.5, 0.5, 3.5, 1.5]]


@pytest.mark.parametrize("sharpness", [1.0, 10.0])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_correlation_is_algorithm_2(sharpness, classes):
    student, teacher = logits(1, classes=classes), logits(2, classes=classes)
    expected = [slow_spearman(*rows, sharpness) for rows in zip(student.tolist(), teacher.tolist(), strict=True)]
    found = soft_spearman(student, teacher, sharpness)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)


def test_gradient_is_that_of_finite_differences_of_the_loops():
    student, teacher = logits(1, rows=2).requires_grad_(), logits(2, rows=2)
    (gradient,) = torch.autograd.grad(soft_spearman(student, teacher, 10.0).sum(), student)
    for r in range(2):
        for c in range(student.shape[1]):
            values = []
            for shift in (1e-6, -1e-6):
                row = student[r].tolist()
                row[c] += shift
                values.append(slow_spearman(row, teacher[r].tolist(), 10.0))
            assert abs((values[0] - values[1]) / 2e-6 - float(gradient[r, c])) < 1e-7


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_k": 3, "labels": torch.tensor([0, 1])}])
def test_gradient_through_both(options):
    student, teacher = logits(1, rows=2).requires_grad_(), logits(2, rows=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: soft_spearman(s, t, 3.0, **options), (student, teacher))


@pytest.mark.parametrize("classes", [2, 5, 20])
def test_sharp_correlation_is_spearmans(classes):
    student, teacher = logits(3, rows=8, classes=classes), logits(4, rows=8, classes=classes)
    expected = torch.stack([hard_spearman(*rows) for rows in zip(student, teacher, strict=True)])
    assert torch.allclose(soft_spearman(student, teacher, 1e8), expected, rtol=0, atol=1e-10)


# on a grid, so that a shift does not round differences away
values = st.integers(-1000, 1000).map(lambda v: v / 8)
pairs = st.integers(2, 7).flatmap(lambda n: st.tuples(*[st.lists(values, min_size=n, max_size=n)] * 2))


@settings(max_examples=60, deadline=None)
@given(pairs, st.floats(0.01, 100))
def test_bounds_hold_without_slack(pair, sharpness):
    student, teacher = (torch.tensor([row], dtype=torch.float64) for row in pair)
    assert -1 - 1e-12 <= float(soft_spearman(student, teacher, sharpness)) <= 1 + 1e-12
    assert abs(float(soft_spearman(student, student, sharpness)) - 1) < 1e-12


def test_bounds_are_reached():
    ascending = torch.arange(5.0)[None]
    assert soft_spearman(ascending, ascending, 1e4).tolist() == [1.0]
    assert soft_spearman(ascending, -ascending, 1e4).tolist() == [-1.0]


@settings(max_examples=60, deadline=None)
@given(pairs, st.sampled_from([2**-6, 0.5, 3.0, 2**10]), st.integers(-100, 100))
def test_shift_and_scale_of_either_network_do_not_matter(pair, scale, shift):
    student, teacher = (torch.tensor([row], dtype=torch.float64) for row in pair)
    rho = soft_spearman(student, teacher)
    assert torch.allclose(soft_spearman(scale * student + shift, teacher), rho, rtol=0, atol=1e-9)
    assert torch.allclose(soft_spearman(student, scale * teacher + shift), rho, rtol=0, atol=1e-9)
    assert torch.allclose(soft_spearman(teacher, student), rho, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(values, min_size=2, max_size=7), st.floats(0.01, 100))
def test_ranks_fall_as_values_rise_and_their_sum_is_constant(row, sharpness):
    ranks = soft_rank(torch.tensor([row], dtype=torch.float64), sharpness)[0].tolist()
    assert abs(sum(ranks) - len(row) ** 2 / 2) < 1e-9
    for (a, rank_a), (b, rank_b) in pairwise(sorted(zip(row, ranks, strict=True))):
        assert rank_a >= rank_b - 1e-9 and (a != b or abs(rank_a - rank_b) < 1e-9)


def test_rows_are_independent():
    student, teacher = logits(1), logits(2)
    alone = torch.cat([soft_spearman(student[i : i + 1], teacher[i : i + 1]) for i in range(4)])
    assert torch.allclose(soft_spearman(student, teacher), alone, rtol=0, atol=1e-12)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(soft_spearman(student, teacher)[2], student)
    assert gradient[2].abs().sum() > 0 and not gradient[[0, 1, 3]].any()


def test_a_step_along_the_gradient_raises_the_correlation():
    student, teacher = logits(1, rows=8, classes=10).requires_grad_(), logits(2, rows=8, classes=10)
    rho = soft_spearman(student, teacher)
    (gradient,) = torch.autograd.grad(rho.sum(), student)
    assert (soft_spearman(student + 1e-3 * gradient, teacher) > rho).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value, rounding", [(0.0, False), (0.1, False), (0.1, True), (-3e7, False), (1e-30, False)])
@pytest.mark.parametrize("classes", [2, 10])
def test_equal_logits_give_no_nan_and_no_explosion(value, classes, dtype, rounding):
    flat = torch.full((3, classes), value, dtype=dtype)
    if rounding:
        flat[:, 0] = torch.nextafter(flat[:, 0], 2 * flat[:, 0])
    ranked = torch.randn(3, classes, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for student, teacher, expected in [(flat, ranked, 0.5), (ranked, flat, 0.5), (flat, flat, 1.0)]:
        student = student.clone().requires_grad_()
        rho = soft_spearman(student, teacher, 1e4)
        assert torch.allclose(rho, torch.full_like(rho, expected), atol=1e-3)
        (gradient,) = torch.autograd.grad(soft_spearman(student, teacher).sum(), student)
        assert torch.isfinite(gradient).all() and gradient.abs().max() < 100


def test_half_precision_is_computed_in_float32():
    student, teacher = logits(1).bfloat16(), logits(2).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rho = soft_spearman(student, teacher)
    assert rho.dtype == torch.float32
    exact = soft_spearman(student.double(), teacher.double()).float()
    assert torch.allclose(rho, exact, rtol=0, atol=1e-5)


def test_top_k_ranks_the_teachers_first_classes():
    student, teacher = logits(1, classes=9), logits(2, classes=9)
    rows = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        first = sorted(range(9), key=lambda c: -t[c])[:4]
        rows.append(slow_spearman([s[c] for c in first], [t[c] for c in first], 10.0))
    found = soft_spearman(student, teacher, 10.0, top_k=4)
    assert torch.allclose(found, torch.tensor(rows, dtype=torch.float64), rtol=0, atol=1e-10)


def test_labels_are_among_the_top_k():
    student, teacher = logits(1, rows=9, classes=9), logits(2, rows=1, classes=9).expand(9, -1)
    order = teacher[0].argsort(descending=True).tolist()
    expected = []
    for label in range(9):
        chosen = order[:4] if label in order[:4] else [*order[:3], label]
        s, t = student[label].tolist(), teacher[label].tolist()
        expected.append(slow_spearman([s[c] for c in chosen], [t[c] for c in chosen], 10.0))
    found = soft_spearman(student, teacher, 10.0, top_k=4, labels=torch.arange(9))
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("top_k", [6, 50])
def test_top_k_of_all_classes_is_dense(top_k):
    student, teacher = logits(1), logits(2)
    assert torch.equal(soft_spearman(student, teacher, top_k=top_k), soft_spearman(student, teacher))


def test_memory_is_that_of_the_top_k():
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    student, teacher = logits(1, rows=2, classes=1000).requires_grad_(), logits(2, rows=2, classes=1000)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        soft_spearman(student, teacher, top_k=50)
    assert max(sizes) == 2 * 50 * 50


@pytest.mark.parametrize("classes, top_k", [(6, 1), (1, None)])
def test_fewer_than_two_classes_are_refused(classes, top_k):
    with pytest.raises(ConfigError, match=r"found 1 to rank.*at least 2") as error:
        soft_spearman(logits(1, classes=classes), logits(2, classes=classes), top_k=top_k)
    assert error.value.path == "top_k"

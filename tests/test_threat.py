"""Threat models: what they produce stays in the ball and in the valid range, in both norms and both spaces."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchdistill_adv.errors import ConfigError
from torchdistill_adv.threat import ThreatModel, unit_l2

TOLERANCE = 1e-6


@st.composite
def cases(draw):
    """A threat model, clean images inside its range, and candidates near and far."""
    channels = draw(st.integers(1, 3))
    numbers = st.floats(0.05, 0.95)
    threat = ThreatModel(
        eps=draw(st.floats(0, 2)),
        norm=draw(st.sampled_from(["linf", "l2"])),
        space=draw(st.sampled_from(["pixel", "input"])),
        mean=draw(st.lists(numbers, min_size=channels, max_size=channels)),
        std=draw(st.lists(numbers, min_size=channels, max_size=channels)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    shape = (draw(st.integers(1, 4)), channels, draw(st.integers(1, 8)), draw(st.integers(1, 8)))
    pixels = torch.rand(shape, generator=generator, dtype=dtype)
    corner = torch.rand(shape, generator=generator, dtype=dtype)
    pixels = torch.where(corner < 0.1, 0.0, torch.where(corner > 0.9, 1.0, pixels))
    mean, std = (torch.tensor(v, dtype=dtype).view(1, -1, 1, 1) for v in (threat.mean, threat.std))
    x = (pixels - mean) / std
    scale = 10.0 ** draw(st.integers(-3, 2))
    return threat, x, x + scale * torch.randn(shape, generator=generator, dtype=dtype)


def oracle_distance(threat: ThreatModel, rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    delta = rows.double() - x.double()
    if threat.space == "pixel":
        delta = delta * torch.tensor(threat.std, dtype=torch.float64).view(1, -1, 1, 1)
    return delta.flatten(1).norm(p=math.inf if threat.norm == "linf" else 2, dim=1)


def assert_allowed(threat: ThreatModel, rows: torch.Tensor, x: torch.Tensor) -> None:
    assert (oracle_distance(threat, rows, x) <= threat.eps + TOLERANCE).all()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (threat.mean, threat.std))
    pixels = rows.double() * std + mean
    assert pixels.min() >= -TOLERANCE and pixels.max() <= 1 + TOLERANCE


@settings(max_examples=200, deadline=None)
@given(cases())
def test_projection_is_in_the_ball_and_in_range(case):
    threat, x, rows = case
    projected = threat.project(rows, x)
    assert_allowed(threat, projected, x)
    assert torch.allclose(threat.project(projected, x), projected, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_projection_keeps_what_is_allowed(case):
    threat, x, rows = case
    mean, std = (torch.tensor(v, dtype=x.dtype).view(1, -1, 1, 1) for v in (threat.mean, threat.std))
    near = (x + (rows - x) * 1e-3) * std + mean
    allowed = (near.clamp(1e-4, 1 - 1e-4) - mean) / std
    inside = oracle_distance(threat, allowed, x) < threat.eps * 0.999
    assert torch.equal(threat.project(allowed, x)[inside], allowed[inside])


@settings(max_examples=100, deadline=None)
@given(cases(), st.floats(0, 20))
def test_random_start_is_allowed(case, factor):
    threat, x, _ = case
    uniform = torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert_allowed(threat, threat.random_start(x, uniform, factor), x)


@settings(max_examples=100, deadline=None)
@given(cases(), st.floats(1e-3, 1))
def test_step_has_its_length_and_ascends(case, size):
    threat, x, rows = case
    direction = rows - x
    moved = threat.step(x, direction, size)
    assert torch.allclose(oracle_distance(threat, moved, x).float(), torch.tensor(size), rtol=1e-4, atol=1e-5)
    assert (((moved - x) * direction).flatten(1).sum(1) > 0).all()


@settings(max_examples=100, deadline=None)
@given(cases())
def test_infinite_radius_leaves_the_valid_range_alone(case):
    threat, x, rows = case
    free = dataclasses.replace(threat, eps=math.inf)
    mean, std = (torch.tensor(v, dtype=x.dtype).view(1, -1, 1, 1) for v in (threat.mean, threat.std))
    projected = free.project(rows, x)
    pixels = (rows * std + mean).clamp(0, 1)
    assert torch.allclose(projected * std + mean, pixels, atol=1e-5)
    assert torch.equal(free.project(x, x), x)
    assert torch.equal(dataclasses.replace(free, bounds="none").project(rows, x), rows)
    assert torch.equal(free.distance(rows, x), threat.distance(rows, x))


def test_infinite_radius_has_no_random_start():
    threat = ThreatModel.build({"eps": math.inf, "mean": [0], "std": [1]})
    with pytest.raises(ConfigError, match="finite one") as error:
        threat.random_start(torch.rand(2, 1, 4, 4), torch.zeros(2, 1, 4, 4))
    assert error.value.path == "eps"


def test_distance_in_pixels_is_that_of_the_pixels():
    threat = ThreatModel(eps=1, norm="l2", mean=[0.5, 0.5], std=[0.2, 0.4])
    pixels, other = torch.rand(3, 2, 4, 4), torch.rand(3, 2, 4, 4)
    std = torch.tensor(threat.std).view(1, -1, 1, 1)
    distance = threat.distance((other - 0.5) / std, (pixels - 0.5) / std)
    assert torch.allclose(distance, (other - pixels).flatten(1).norm(dim=1), atol=1e-6)


@pytest.mark.parametrize("magnitude", [0.0, 1e-38, 1e-30, 1.0, 1e30])
def test_unit_vector_of_any_magnitude(magnitude):
    v = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)) * magnitude
    norm = unit_l2(v).flatten(1).norm(dim=1)
    assert torch.allclose(norm, torch.tensor(float(magnitude > 0)), atol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_gradient_in_pixels_follows_the_chain_rule(norm):
    threat = ThreatModel(eps=1, norm=norm, mean=[0.5], std=[0.25])
    assert torch.allclose(threat.gradient(torch.ones(1, 1, 2, 2)), torch.full((1, 1, 2, 2), 4.0))


@pytest.mark.parametrize(
    "options, path, found",
    [
        ({"eps": -0.1}, "eps", "-0.1"),
        ({"eps": "8/0"}, "eps", "8/0"),
        ({"eps": True}, "eps", "True"),
        ({"eps": math.nan}, "eps", "nan"),
        ({"eps": -math.inf}, "eps", "-inf"),
        ({"eps": 1, "norm": "l3"}, "norm", "l3"),
        ({"eps": 1, "space": "pixels"}, "space", "did you mean 'pixel'"),
        ({"eps": 1, "mean": None, "std": None}, "mean", "normalize_kwargs"),
        ({"eps": 1, "mean": None, "std": None, "space": "input"}, "mean", "bounds: 'none'"),
        ({"eps": 1, "std": None}, "std", "come together"),
        ({"eps": 1, "std": [0.0]}, "std", "0.0"),
        ({"eps": 1, "std": [0.1, 0.2]}, "std", "mean has 1"),
        ({"eps": 1, "bounds": [1, 0]}, "bounds", "lower"),
        ({"eps": 1, "bounds": "pixels"}, "bounds", "pixels"),
        ({"radius": 1}, "radius", "no such option"),
        ({}, "eps", "missing"),
    ],
)
def test_bad_threat_models_are_refused(options, path, found):
    with pytest.raises(ConfigError, match=found) as error:
        ThreatModel.build({"mean": [0.0], "std": [1.0], **options})
    assert error.value.path == path


def test_fractions_and_scientific_strings_are_numbers():
    threat = ThreatModel.build({"eps": "8/255", "mean": "1e-1", "std": ["1e0"]})
    assert (threat.eps, threat.mean, threat.std) == (8 / 255, (0.1,), (1.0,))


def test_images_outside_the_range_are_refused():
    threat = ThreatModel(eps=0.1, mean=[0], std=[1])
    threat.check_inputs(torch.rand(2, 1, 4, 4))
    with pytest.raises(ConfigError, match=r"pixels from -2 to 2.*Normalize"):
        threat.check_inputs(torch.linspace(-2, 2, 16).view(1, 1, 4, 4))


@pytest.mark.parametrize(
    "options, text",
    [
        ({"eps": "8/255", "norm": "linf"}, "8/255 in pixels"),
        ({"eps": 0.3, "norm": "linf", "space": "input"}, "15.3/255 to 19.1/255 in pixels"),
        ({"eps": 0.3, "norm": "l2", "space": "input"}, "0.06 to 0.075 in pixels"),
        ({"eps": math.inf, "norm": "l2"}, "l2 without a radius"),
    ],
)
def test_radius_is_told_in_pixels(options, text):
    assert text in ThreatModel.build({"mean": [0.5, 0.5], "std": [0.2, 0.25], **options}).describe()

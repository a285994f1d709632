"""Searches against slow transcriptions of their formulas, and properties that all of them have."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchdistill_adv.adversaries import FGSM, PGD, SVGD, VirtualSVGD
from torchdistill_adv.adversaries.svgd import median_bandwidth, squared_distances, svgd_direction
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.noise import Noise
from torchdistill_adv.registry import ADVERSARIES, build_adversary
from torchdistill_adv.threat import ThreatModel

THREATS = {
    (norm, space): ThreatModel(eps=0.3, norm=norm, space=space, mean=[0.45, 0.5], std=[0.25, 0.3])
    for norm in ("linf", "l2")
    for space in ("pixel", "input")
}


@pytest.fixture(params=THREATS, ids="-".join)
def threat(request):
    return THREATS[request.param]


def images(count=3, seed=0):
    pixels = torch.rand(count, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 2, 1, 1) for v in ((0.45, 0.5), (0.25, 0.3)))
    return (pixels - mean) / std


def quadratic(x, seed=1):
    """A smooth objective with a different optimum for every image, and its gradient in closed form."""
    generator = torch.Generator().manual_seed(seed)
    optimum = x + torch.randn(x.shape, generator=generator, dtype=x.dtype)
    weight = torch.rand(x.shape[1:], generator=generator, dtype=x.dtype) + 0.5

    def objective(rows, index):
        return -(weight * (rows - optimum[index]).square()).flatten(1).sum(1)

    def gradient(row, i):
        return -2 * weight * (row - optimum[i])

    return objective, gradient


def noise():
    return Noise(7, dtype=torch.float64)


def kernel_and_direction(particles, scores, sigma, repulsion=True):
    """SVGD's kernel and direction by two loops over the particles of one image, straight from the formula."""
    count = len(particles)
    direction = []
    kernel = np.zeros((count, count))
    for i in range(count):
        total = np.zeros_like(particles[0])
        for j in range(count):
            difference = particles[j] - particles[i]
            kernel[j, i] = np.exp(-(difference**2).sum() / (2 * sigma**2))
            total += kernel[j, i] * scores[j]
            if repulsion:
                total += -kernel[j, i] * difference / sigma**2
        direction.append(total / count)
    return kernel, np.stack(direction)


def median_sigma(particles):
    count = len(particles)
    pairs = [((particles[i] - particles[j]) ** 2).sum() for i in range(count) for j in range(i)]
    return np.sqrt(np.median(pairs) / (2 * np.log(count + 1)))


@pytest.mark.parametrize("count", [2, 3, 4, 7])
@pytest.mark.parametrize("sigma", [0.1, 1.0, 5.0, "median"])
@pytest.mark.parametrize("repulsion", [True, False])
def test_direction_is_the_double_loop(count, sigma, repulsion):
    generator = np.random.default_rng(0)
    particles, scores = generator.normal(size=(2, 5, count, 6))
    found = svgd_direction(torch.tensor(particles), torch.tensor(scores), sigma, repulsion)
    for image in range(5):
        value = median_sigma(particles[image]) if sigma == "median" else sigma
        _, expected = kernel_and_direction(particles[image], scores[image], value, repulsion)
        assert np.allclose(found[image].numpy(), expected, rtol=1e-9, atol=1e-12)


def test_distances_and_median_are_those_of_the_loop():
    particles = np.random.default_rng(0).normal(size=(4, 5, 9))
    found = squared_distances(torch.tensor(particles))
    expected = [[[((a - b) ** 2).sum() for b in image] for a in image] for image in particles]
    assert np.allclose(found.numpy(), expected, rtol=1e-10)
    sigmas = median_bandwidth(found).flatten().sqrt().numpy()
    assert np.allclose(sigmas, [median_sigma(image) for image in particles], rtol=1e-10)


def test_repulsion_is_the_gradient_of_the_kernel():
    generator = torch.Generator().manual_seed(0)
    particles = torch.randn(2, 4, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    sigma = 1.3

    def kernel(first):
        return torch.exp(-squared_distances(first) / (2 * sigma**2))

    assert torch.autograd.gradcheck(kernel, particles)
    zeros = torch.zeros_like(particles)
    repulsion = svgd_direction(particles.detach(), zeros.detach(), sigma)
    for i in range(4):
        # only the first argument of F(x_j, x_i) moves, so x_i is held fixed
        differences = particles - particles[:, i : i + 1].detach()
        column = torch.exp(-differences.square().sum(2) / (2 * sigma**2))
        (gradient,) = torch.autograd.grad(column.sum(), particles)
        assert torch.allclose(repulsion[:, i], gradient.sum(1) / 4, atol=1e-12)


def test_distances_survive_a_large_offset():
    """At 224 x 224 an uncentred Gram form in float32 is wrong by 2, which would make the kernel 0."""
    generator = torch.Generator().manual_seed(0)
    particles = 2 * torch.randn(1, 1, 3 * 224 * 224, generator=generator) + 1e-3 * torch.randn(
        1, 4, 3 * 224 * 224, generator=generator
    )
    exact = squared_distances(particles.double())
    assert torch.allclose(squared_distances(particles).double(), exact, rtol=1e-3)
    assert (squared_distances(particles).diagonal(dim1=1, dim2=2) == 0).all()


def test_coinciding_particles_give_no_nan():
    particles = torch.ones(2, 3, 5)
    assert torch.isfinite(svgd_direction(particles, torch.randn(2, 3, 5), "median")).all()


def algorithm_1(x, gradient, threat, options, uniform):
    """TALD's Algorithm 1, one image, one particle and one pixel at a time."""
    count, steps, eta, tau = (options[k] for k in ("num_particles", "num_steps", "step_size", "noise_factor"))
    std = np.array(threat.std).reshape(2, 1, 1) if threat.space == "pixel" else np.ones((2, 1, 1))
    low, high = ((np.array(v) - np.array(threat.mean)) / np.array(threat.std) for v in (0.0, 1.0))
    low, high = low.reshape(2, 1, 1), high.reshape(2, 1, 1)
    result = np.zeros((count, *x.shape))
    for i in range(len(x)):
        clean = x[i].numpy()

        def project(candidate, clean=clean):
            delta = (candidate - clean) * std
            if threat.norm == "linf":
                delta = np.clip(delta, -threat.eps, threat.eps)
            elif np.linalg.norm(delta) > threat.eps:
                delta = delta * threat.eps / np.linalg.norm(delta)
            return np.clip(clean + delta / std, low, high)

        particles = [project(clean + tau * threat.eps * uniform[k * len(x) + i].numpy() / std) for k in range(count)]
        for _ in range(steps):
            units = np.stack([((p - clean) * std).ravel() for p in particles])
            scores = np.stack([(gradient(torch.tensor(p), i).numpy() / std).ravel() for p in particles])
            sigma = median_sigma(units) if options["bandwidth"] == "median" else options["bandwidth"]
            _, directions = kernel_and_direction(units, scores, sigma)
            updated = []
            for p, phi in zip(particles, directions, strict=True):
                unit = np.sign(phi) if options["norm"] == "linf" else phi / np.linalg.norm(phi)
                updated.append(project(p + eta * unit.reshape(clean.shape) / std))
            particles = updated
        result[:, i] = particles
    return result.reshape(-1, *x.shape[1:])


@pytest.mark.parametrize("bandwidth", ["median", 1e-3, 0.2])
@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_svgd_is_algorithm_1(threat, bandwidth, num_steps, norm):
    x = images()
    objective, gradient = quadratic(x)
    options = {
        "num_particles": 4,
        "num_steps": num_steps,
        "step_size": 0.1,
        "noise_factor": 0.7,
        "bandwidth": bandwidth,
        "norm": norm,
    }
    found = SVGD(**options)(objective, x, threat, noise())
    expected = algorithm_1(x, gradient, threat, options, noise().uniform((12, *x.shape[1:])))
    assert np.allclose(found.rows.numpy(), expected, atol=1e-9)
    assert found.index.tolist() == [0, 1, 2] * 4


def test_wide_bandwidth_moves_all_by_the_mean_gradient():
    particles, scores = torch.randn(2, 5, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction = svgd_direction(particles, scores, 1e8)
    assert torch.allclose(direction, scores.mean(1, keepdim=True).expand_as(scores), atol=1e-9)


def test_narrow_bandwidth_moves_each_by_its_own_gradient():
    particles, scores = torch.randn(2, 5, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(svgd_direction(particles, scores, 1e-8), scores / 4, atol=1e-12)


def test_paper_bandwidth_is_the_identity_kernel():
    """What README and docstring say: at sigma = 1e-3 SVGD is K independent attacks."""
    x = images()
    objective, _ = quadratic(x)
    with_repulsion, without = (
        SVGD(bandwidth=1e-3, repulsion=repulsion)(objective, x, THREATS["l2", "input"], noise()).rows
        for repulsion in (True, False)
    )
    assert torch.equal(with_repulsion, without)


@pytest.mark.parametrize("bandwidth", ["median", 1e-3, 1e6])
def test_one_particle_is_one_normalised_gradient_attack(threat, bandwidth):
    x = images()
    objective, _ = quadratic(x)
    svgd = SVGD(num_particles=1, num_steps=3, step_size=0.05, noise_factor=0.5, bandwidth=bandwidth, norm=threat.norm)
    pgd = PGD(num_steps=3, step_size=0.05, noise_factor=0.5)
    assert torch.allclose(svgd(objective, x, threat, noise()).rows, pgd(objective, x, threat, noise()).rows, atol=1e-12)


def test_repulsion_spreads_particles():
    x = images()
    objective, _ = quadratic(x)
    spread = {}
    for repulsion in (True, False):
        search = SVGD(num_steps=20, step_size=0.02, noise_factor=0.1, bandwidth="median", repulsion=repulsion)
        rows = search(objective, x, THREATS["l2", "input"], noise()).rows
        spread[repulsion] = squared_distances(rows.view(4, 3, -1).transpose(0, 1)).sum((1, 2))
    assert (spread[True] > spread[False]).all()


def test_kernel_memory_does_not_hold_pairs_of_images():
    """O(N K^2) beside the particles themselves, never O(N K^2 D)."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes() // tensor.element_size())
            return out

    particles, scores = torch.randn(3, 8, 1000), torch.randn(3, 8, 1000)
    with Watch():
        svgd_direction(particles, scores, "median")
    assert largest == particles.numel()


def test_pgd_is_the_textbook_loop():
    threat = ThreatModel(eps=8 / 255, norm="linf", mean=[0.45, 0.5], std=[0.25, 0.3])
    x = images()
    objective, gradient = quadratic(x)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(2, 1, 1) for v in (threat.mean, threat.std))
    found = PGD(num_steps=5, step_size="2/255", return_path=True)(objective, x, threat, noise())
    uniform = noise().uniform(x.shape)
    for i in range(len(x)):
        pixels = x[i] * std + mean
        candidate = (pixels + uniform[i] * 8 / 255).clamp(0, 1)
        for step in range(5):
            ascent = gradient((candidate - mean) / std, i).sign()
            candidate = (candidate + 2 / 255 * ascent).clamp(pixels - 8 / 255, pixels + 8 / 255).clamp(0, 1)
            assert torch.allclose(found.path[step, i] * std + mean, candidate, atol=1e-12)
    assert torch.equal(found.path[-1], found.rows)
    assert found.index.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "adversary",
    [
        PGD(num_steps=4, step_size=0.05, return_path=True),
        SVGD(num_particles=3, num_steps=4, step_size=0.05, bandwidth=1.0, noise_factor=0.1, return_path=True),
    ],
    ids=["PGD", "SVGD"],
)
def test_path_has_the_example_after_each_step(adversary, threat):
    x = images()
    objective, _ = quadratic(x)
    found = adversary(objective, x, threat, noise())
    for i in range(4):
        shorter = dataclasses.replace(adversary, num_steps=i + 1, return_path=False)(objective, x, threat, noise())
        assert shorter.path is None and torch.equal(found.path[i], shorter.rows)
    assert len(found.path) == 4 and torch.equal(found.path[-1], found.rows)


def test_gaussian_start_is_close_and_no_start_is_the_image(threat):
    x = images()
    objective, _ = quadratic(x)
    near = PGD(num_steps=1, step_size=0, start="gaussian")(objective, x, threat, noise()).rows
    assert 0 < threat.distance(near, x).max() < 0.02
    assert torch.allclose(PGD(num_steps=1, step_size=0, start="none")(objective, x, threat, noise()).rows, x)


def test_fgsm_is_one_step_of_length_eps():
    x = images()
    objective, gradient = quadratic(x)
    threat = ThreatModel(eps=0.1, space="input", bounds="none")
    rows = FGSM()(objective, x, threat, noise()).rows
    for i in range(len(x)):
        assert torch.allclose(rows[i], x[i] + 0.1 * gradient(x[i], i).sign())


def test_virtual_svgd_is_the_published_routine():
    """One virtual step: probe far away, kernel over the whole batch, apply close by."""
    threat = ThreatModel(eps=5e-4, norm="l2", space="input", bounds=[-2.5, 2.5])
    x = images()
    objective, gradient = quadratic(x)
    found = VirtualSVGD(num_particles=2, bandwidth=0.8)(objective, x, threat, noise()).rows
    uniform = noise().uniform((6, *x.shape[1:])).numpy()
    directions = np.stack([u.ravel() / np.linalg.norm(u) for u in uniform])
    scores = []
    for row in range(6):
        probe = x[row % 3].numpy() + 10 * directions[row].reshape(x.shape[1:])
        scores.append(gradient(torch.tensor(probe), row % 3).numpy().ravel())
    _, phi = kernel_and_direction(directions, np.stack(scores), 0.8)
    for row in range(6):
        unit = (phi[row] / np.linalg.norm(phi[row])).reshape(x.shape[1:])
        assert np.allclose(found[row].numpy(), np.clip(x[row % 3].numpy() + 5e-4 * unit, -2.5, 2.5), atol=1e-12)


ROWS = {
    "FGSM": {},
    "PGD": {"num_steps": 3, "step_size": 0.1},
    "SVGD": {"num_particles": 3, "num_steps": 2, "bandwidth": 1.0, "noise_factor": 0.1},
    "VirtualSVGD": {"num_particles": 3, "probe_radius": 0.1},
    "BSS": {"num_steps": 3, "step_size": 0.001},
}
ASCENDS_ONLY = {"BSS"}


def test_every_registered_adversary_has_a_row():
    assert set(ROWS) == set(ADVERSARIES)


@pytest.mark.parametrize("key", ROWS)
class TestContract:
    """What holds for every adversary."""

    def build(self, key, **options):
        return build_adversary({"key": key, "kwargs": {**ROWS[key], **options}})

    def test_examples_are_allowed_and_say_their_image(self, key, threat):
        x = images()
        adversary = self.build(key)
        found = adversary(quadratic(x)[0], x, threat, noise())
        assert found.rows.shape == (3 * adversary.num_rows, *x.shape[1:])
        assert (threat.distance(found.rows, x[found.index]) <= threat.eps + 1e-6).all()
        threat.check_inputs(found.rows)
        assert not found.rows.requires_grad

    def test_ascends_and_targeted_descends(self, key, threat):
        x = images()
        objective, _ = quadratic(x)
        for options in [{}] if key in ASCENDS_ONLY else [{}, {"targeted": True}]:
            found = self.build(key, **options)(objective, x, threat, noise())
            change = objective(found.rows, found.index) - objective(x, torch.arange(3))[found.index]
            assert (change < 0).all() if options else (change > 0).all()

    def test_chunks_change_nothing(self, key, threat):
        x = images(5)
        objective, _ = quadratic(x)
        whole, chunked = (self.build(key, chunk_size=c)(objective, x, threat, noise()).rows for c in (None, 2))
        assert torch.equal(whole, chunked)

    def test_same_noise_same_examples(self, key, threat):
        x = images()
        objective, _ = quadratic(x)
        first, second = (self.build(key)(objective, x, threat, noise()).rows for _ in range(2))
        assert torch.equal(first, second)

    def test_flat_objective_gives_finite_examples(self, key, threat):
        x = images()
        found = self.build(key)(lambda rows, index: rows.flatten(1).sum(1) * 0, x, threat, noise())
        assert torch.isfinite(found.rows).all()
        assert (threat.distance(found.rows, x[found.index]) <= threat.eps + 1e-6).all()

    def test_zero_radius_gives_the_images(self, key):
        x = images()
        threat = ThreatModel(eps=0, norm="l2", space="input", bounds="none")
        found = self.build(key)(quadratic(x)[0], x, threat, noise())
        assert torch.allclose(found.rows, x[found.index])

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_infinite_radius_is_refused_or_gives_finite_examples(self, key, norm):
        x = images()
        threat = ThreatModel(eps=math.inf, norm=norm, space="input", bounds="none")
        try:
            found = self.build(key)(quadratic(x)[0], x, threat, noise())
        except ConfigError as error:
            assert error.path.endswith("eps")
        else:
            assert torch.isfinite(found.rows).all()

    def test_one_image_and_float32(self, key, threat):
        x = images(1).float()
        found = self.build(key)(quadratic(x)[0], x, threat, Noise(0))
        assert found.rows.dtype == torch.float32

    def test_works_under_no_grad(self, key, threat):
        x = images()
        with torch.no_grad():
            self.build(key)(quadratic(x)[0], x, threat, noise())


@pytest.mark.parametrize(
    "spec, path, found",
    [
        ("PDG", "key", "did you mean 'PGD'"),
        ({"key": "PGD", "kwargs": {"num_step": 3}}, "kwargs.num_step", "did you mean 'num_steps'"),
        ({"key": "PGD", "kwargs": {"num_steps": 0}}, "kwargs.num_steps", ">= 1"),
        ({"key": "PGD", "kwargs": {"num_steps": 1.5}}, "kwargs.num_steps", "1.5"),
        ({"key": "PGD", "kwargs": {"step_size": "two"}}, "kwargs.step_size", "two"),
        ({"key": "PGD", "kwargs": {"start": "normal"}}, "kwargs.start", "normal"),
        ({"key": "SVGD", "kwargs": {"num_particles": 0}}, "kwargs.num_particles", "found 0"),
        ({"key": "SVGD", "kwargs": {"bandwidth": 0}}, "kwargs.bandwidth", "> 0"),
        ({"key": "SVGD", "kwargs": {"bandwidth": "mean"}}, "kwargs.bandwidth", "median"),
        ({"key": "SVGD", "kwargs": {"repulsion": "no"}}, "kwargs.repulsion", "true or false"),
        ({"key": "SVGD", "kwargs": {"chunk_size": -1}}, "kwargs.chunk_size", "-1"),
        ({"key": "SVGD", "kwargs": {"return_path": 1}}, "kwargs.return_path", "true or false"),
        ({"key": "BSS", "kwargs": {"norm_power": 3}}, "kwargs.norm_power", "Known: 1, 2"),
        ({"key": "BSS", "kwargs": {"norm_power": True}}, "kwargs.norm_power", "Known: 1, 2"),
        ({"key": "BSS", "kwargs": {"overshoot": -1}}, "kwargs.overshoot", ">= 0"),
        ({"key": "BSS", "kwargs": {"step_size": ".inf"}}, "kwargs.step_size", "inf"),
        ({"key": "FGSM", "kwargs": 3}, "kwargs", "mapping"),
        ({"name": "FGSM"}, "", "write {key"),
    ],
)
def test_bad_adversaries_are_refused(spec, path, found):
    with pytest.raises(ConfigError, match=found) as error:
        build_adversary(spec)
    assert error.value.path == path

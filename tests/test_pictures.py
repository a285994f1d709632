"""Pictures of networks: what they show against closed forms, and that the networks stay as they are."""

from __future__ import annotations

import copy
import dataclasses
import math

import matplotlib
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from torch import nn
from torch.utils.data import TensorDataset
from torchdistill.common.yaml_util import load_yaml_file

from torchdistill_adv.errors import ConfigError
from torchdistill_adv.evaluation.pixels import PixelModel, pixel_threat
from torchdistill_adv.objectives import Objective
from torchdistill_adv.report.boundaries import ball_outline, collect_plane, draw_plane, predict_grid
from torchdistill_adv.report.landscape import (
    ALPHAS,
    Landscape,
    collect_landscape,
    draw_landscape,
    filter_normalized_direction,
)
from torchdistill_adv.report.maps import collect_maps, draw_maps
from torchdistill_adv.report.particles import collect_particles, draw_particles, find_search
from torchdistill_adv.report.pictures import pgd_examples, some_images, to_array
from torchdistill_adv.report.toy import (
    EPS,
    METHODS,
    NUM_POINTS,
    SIDE,
    TEACHER,
    collect_toy,
    crossed_boxes,
    draw_toy,
    sample_points,
    train_network,
)
from torchdistill_adv.runner.loading import Experiment

NORMALIZATION = tuple(tiny.NORMALIZE["mean"]), tuple(tiny.NORMALIZE["std"])
THREAT = pixel_threat("8/255")


def pixel_network(seed: int = 1, **options) -> PixelModel:
    return PixelModel(tiny.sharp(seed, **options), *NORMALIZATION)


def pixel_images(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(count, 2, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(count) % 5


def linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return nn.Sequential(nn.Flatten(), layer)


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# images


def test_images_are_drawn_with_a_seed_and_in_pixels():
    inputs, labels = tiny.images(40)
    experiment = Experiment(
        config={},
        networks={"student": tiny.network(1)},
        checkpoints={},
        data=TensorDataset(inputs, labels),
        dataset_id="random",
        normalization=NORMALIZATION,
        device=torch.device("cpu"),
        num_workers=0,
    )
    pixels, found = some_images(experiment, 7)
    mean, std = (torch.tensor(v).view(1, 2, 1, 1) for v in NORMALIZATION)
    rows = [int((inputs * std + mean - x).flatten(1).abs().amax(1).argmin()) for x in pixels]
    assert torch.allclose(pixels, inputs[rows] * std + mean, atol=1e-6)
    assert found.tolist() == labels[rows].tolist()
    assert len(set(rows)) == 7
    assert rows != sorted(rows)
    assert torch.equal(pixels, some_images(experiment, 7)[0])
    assert not torch.equal(pixels, some_images(experiment, 7, seed=1)[0])
    assert sorted(some_images(experiment, 99, one_a_class=True)[1].tolist()) == list(range(5))
    assert len(some_images(experiment, 99)[0]) == 40


def test_an_image_is_shown_in_its_own_colours_or_in_grey():
    rgb, two = torch.rand(4, 3, 6, 5), torch.rand(4, 2, 6, 5)
    assert np.array_equal(to_array(rgb)[2, 5, 1], rgb[2, :, 5, 1].numpy())
    assert np.allclose(to_array(two)[2, 5, 1], two[2, :, 5, 1].mean())


# loss landscape


def test_filters_of_the_direction_are_as_long_as_those_of_the_network():
    network = tiny.network(3)
    direction = filter_normalized_direction(network, seed=4)
    assert set(direction) == {name for name, _ in network.named_parameters()}
    for name, weight in network.named_parameters():
        if weight.dim() == 1:
            assert not direction[name].any()
            continue
        for moved, filter_ in zip(direction[name], weight, strict=True):
            assert math.isclose(float(moved.norm()), float(filter_.detach().norm()), rel_tol=1e-5)
    assert not torch.equal(direction["0.weight"], filter_normalized_direction(network, seed=5)["0.weight"])


def test_networks_of_the_same_shapes_move_in_the_same_direction():
    first, second = (filter_normalized_direction(tiny.network(seed), seed=4) for seed in (1, 2))
    for name in ("0.weight", "6.weight"):
        cosines = F.cosine_similarity(first[name].flatten(1), second[name].flatten(1))
        assert torch.allclose(cosines, torch.ones_like(cosines), atol=1e-5)
        assert not torch.allclose(first[name], second[name])


def test_landscape_of_a_linear_network_is_the_closed_form():
    eps, dim, count = 0.04, 6, 5
    weight, bias, images = some(2, dim), some(2, seed=1), some(count, 1, 2, 3, seed=2).sigmoid() * 0.4 + 0.3
    labels = torch.tensor([0, 1, 1, 0, 1])
    network = linear(weight, bias)
    alphas = [-1.0, -0.3, 0.0, 0.7]
    found = collect_landscape({"linear": network}, images, labels, pixel_threat(eps), alphas=alphas, seed=3)
    direction = filter_normalized_direction(network, 3)["1.weight"]
    for a, alpha in enumerate(alphas):
        moved = weight + alpha * direction
        clean, adversarial = [], []
        for x, y in zip(images.flatten(1), labels.tolist(), strict=True):
            gap = moved[y] - moved[1 - y]
            margin = float(gap @ x + bias[y] - bias[1 - y])
            clean.append(math.log1p(math.exp(-margin)))
            # the worst corner of the box lowers the margin by eps times the l1 norm
            adversarial.append(math.log1p(math.exp(-margin + eps * float(gap.abs().sum()))))
        assert math.isclose(found.clean[0, a], sum(clean) / count, rel_tol=1e-9)
        assert math.isclose(found.adversarial[0, a], sum(adversarial) / count, rel_tol=1e-9)


def test_landscape_at_zero_is_the_network_itself_in_eval_mode():
    (images, labels), networks = pixel_images(), {"one": pixel_network(1).train(), "two": pixel_network(2, width=8)}
    found = collect_landscape(networks, images, labels, THREAT, alphas=[-0.5, 0, 0.5], num_steps=3)
    for row, network in zip(found.clean, networks.values(), strict=True):
        own = copy.deepcopy(network).eval()
        assert math.isclose(row[1], float(F.cross_entropy(own(images), labels).detach()), rel_tol=1e-6)
        assert row[0] != row[1] != row[2]
    assert (found.adversarial > found.clean).all()
    assert (found.names, found.num_images) == (("one", "two"), 4)
    assert len(ALPHAS) == 21
    assert (ALPHAS[0], ALPHAS[10], ALPHAS[-1]) == (-1, 0, 1)


# no trace


def collect_all(teacher: PixelModel, student: PixelModel, images: torch.Tensor, labels: torch.Tensor) -> None:
    pair = {"teacher": teacher, "student": student}
    collect_particles(teacher, images, labels, find_search({}, NORMALIZATION))
    collect_maps(teacher, student, images, labels, THREAT, num_steps=2)
    collect_landscape(pair, images, labels, THREAT, alphas=[-1, 0.5], num_steps=2)
    collect_plane(pair, images[0], int(labels[0]), THREAT, resolution=5, num_steps=2)


def test_networks_stay_as_they_are_bit_for_bit():
    networks = [pixel_network(1, dropout=0.5).train(), pixel_network(2, dropout=0.5).train()]
    networks[1].network[1].eval()
    images, labels = pixel_images()
    before = [copy.deepcopy(n.state_dict()) for n in networks]
    modes = [[m.training for m in n.modules()] for n in networks]
    random = torch.get_rng_state()
    collect_all(*networks, images, labels)
    for network, state, mode in zip(networks, before, modes, strict=True):
        after = network.state_dict()
        assert all(torch.equal(after[name], value) for name, value in state.items())
        assert [m.training for m in network.modules()] == mode
        assert all(p.grad is None and p.requires_grad for p in network.parameters())
        assert not any(m._forward_hooks for m in network.modules())
    assert torch.equal(torch.get_rng_state(), random)


# boundaries


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), eps=st.floats(0.001, 1), norm=st.sampled_from(["linf", "l2"]))
def test_the_outline_is_where_the_plane_leaves_the_ball(seed, eps, norm):
    basis = torch.linalg.qr(some(12, 2, seed=seed)).Q.T
    outline = ball_outline(*basis.view(2, 3, 2, 2), eps, norm, 90)
    points = outline @ basis.numpy()
    order = np.inf if norm == "linf" else 2
    assert np.allclose(np.linalg.norm(points, order, axis=1), eps)
    assert np.allclose(np.unwrap(np.arctan2(*outline.T[::-1])), np.arange(90) * 2 * np.pi / 90, atol=1e-6)


def test_the_outline_of_a_box_in_two_dimensions_is_the_box():
    outline = ball_outline(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.3, "linf", 8)
    corners = [[1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]]
    assert np.allclose(outline, 0.3 * np.array(corners))


class Recorder(nn.Module):
    """Keeps what it is given."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.rows = network, []

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            self.rows.append(rows)
        return self.network(rows)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_boundary_of_a_linear_classifier_is_the_known_line(norm):
    # a gradient of equal entries up to sign is the adversarial direction in both norms, so the boundary is upright
    signs = some(16, seed=1).sign()
    image = some(1, 4, 4, seed=2).sigmoid() * 0.2 + 0.4
    offset = -float(signs @ image.flatten()) + 0.1
    network = linear(torch.stack([signs, -signs]) / 2, torch.tensor([offset, -offset], dtype=torch.float64) / 2)
    threat = pixel_threat(0.05 if norm == "linf" else 0.2, norm)
    found = collect_plane({"linear": network}, image, 0, threat, attacked="linear", resolution=41, num_steps=60)
    line = -0.1 / 4  # the margin is 0.1, and falls by the l2 norm of the signs, 4, per unit of length
    xs = np.linspace(-found.half_width, found.half_width, 41)
    expected = (xs > -line).astype(int)
    assert 0 < expected.sum() < 41
    assert np.array_equal(found.classes[0], np.tile(expected, (41, 1)))
    assert math.isclose(found.example, 0.2, rel_tol=1e-3)
    assert math.isclose(found.outline[0, 0], 0.2, rel_tol=1e-3)


def test_points_of_the_plane_are_valid_images_at_their_distance():
    image = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(3)) * 0.1 + 0.45
    network = Recorder(pixel_network(1))
    found = collect_plane({"student": network}, image, 1, pixel_threat(0.02), resolution=9)
    rows = (torch.cat(network.rows) - image).flatten(1)
    ticks = torch.linspace(-found.half_width, found.half_width, 9)
    distances = (ticks[:, None] ** 2 + ticks[None] ** 2).sqrt().flatten()
    assert torch.allclose(rows.norm(dim=1), distances, atol=1e-5)
    assert int(torch.linalg.matrix_rank(rows, atol=1e-4)) == 2
    # the first axis leads to the adversarial example
    example = pgd_examples(network.network.eval(), image[None], torch.tensor([1]), pixel_threat(0.02), 20)
    away = (example - image).flatten()
    assert math.isclose(found.example, float(away.norm()), rel_tol=1e-5)
    middle = rows.view(9, 9, -1)[4]
    assert torch.allclose(middle, ticks[:, None] * away / away.norm(), atol=1e-5)
    # an image at the edge of the range: nothing outside it is classified
    network.rows.clear()
    collect_plane({"student": network}, image.round(), 1, pixel_threat(0.2), resolution=9)
    rows = torch.cat(network.rows)
    assert (float(rows.min()), float(rows.max())) == (0, 1)


def test_grid_has_the_first_coordinate_along_its_columns():
    network = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    xs, ys = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.5, 1.5])
    found = predict_grid(network, xs, ys, lambda points: points, chunk_size=2)
    assert found.tolist() == [[1, 0, 0], [1, 1, 0]]


def test_a_plane_that_cannot_be_drawn_is_refused():
    image = pixel_images()[0][0]
    with pytest.raises(ConfigError, match=r"attacked: found 'studnt'; did you mean 'student'"):
        collect_plane({"student": pixel_network()}, image, 0, THREAT, attacked="studnt")
    with pytest.raises(ConfigError, match=r"eps: found 0"):
        collect_plane({"student": pixel_network()}, image, 0, pixel_threat(0))


# particles


def test_the_search_is_that_of_the_run():
    config = load_yaml_file("configs/digits/kd_tald.yaml")
    search = find_search(config, NORMALIZATION)
    assert (search.adversary.num_particles, search.adversary.bandwidth) == (4, "median")
    assert search.threat.mean != NORMALIZATION[0]
    term = config["train"]["criterion"]["kwargs"]["sub_terms"]["tald"]["criterion"]
    staged = {"train": {"stage1": {}, "stage2": {"criterion": term}}}
    term["kwargs"]["adversary"]["kwargs"]["num_particles"] = 7
    assert find_search(staged, NORMALIZATION).adversary.num_particles == 7
    term["kwargs"]["objectiv"] = "x"
    with pytest.raises(ConfigError, match=r"^train\.stage2\.criterion\.kwargs.*objectiv"):
        find_search(staged, NORMALIZATION)


def test_without_a_tald_term_the_search_has_its_defaults():
    search = find_search(load_yaml_file("configs/digits/kd.yaml"), NORMALIZATION)
    assert (search.adversary.num_particles, search.objective.key) == (4, "kl_teacher_clean_teacher")
    threat = search.threat
    assert (threat.norm, threat.eps, threat.space, threat.mean, threat.std) == ("l2", 0.3, "input", *NORMALIZATION)


def test_particles_lie_around_their_own_image_and_are_what_the_teacher_is_asked():
    teacher, (images, labels) = PixelModel(tiny.sharp(1), [0.4], [0.3]).eval(), pixel_images(3)
    images = images[:, :1].expand(-1, 2, -1, -1)  # equal channels, so that the grey picture has everything
    search = find_search({}, ((0.4,), (0.3,)))
    grid = collect_particles(teacher, images, labels, search, seed=2)
    assert grid.particles.shape == (3, 4, 6, 6)
    assert np.allclose(grid.images, images[:, 0])
    assert np.allclose(grid.differences, grid.particles - grid.images[:, None], atol=1e-6)
    # 0.3 in model-input space
    assert (grid.distances <= 0.3 * 0.3 + 1e-6).all()
    assert (grid.distances > 0.05).all()
    assert (grid.particles.min() >= 0) and (grid.particles.max() <= 1)
    with torch.no_grad():
        probabilities = teacher(images).softmax(1)
    assert grid.predictions[:, 0].tolist() == probabilities.argmax(1).tolist()
    assert np.allclose(grid.confidences[:, 0], probabilities.amax(1))
    assert (grid.confidences[:, 1:] != grid.confidences[:, :1]).all()
    other = collect_particles(teacher, images, labels, search, seed=3)
    assert not np.array_equal(grid.particles, other.particles)


def test_what_the_teacher_says_of_a_particle_is_about_that_particle():
    """A teacher that reads its class from brightness, and a search that brightens by the particle's number."""

    class Brighten:
        def __call__(self, objective, x, threat, noise):
            index = torch.arange(len(x)).repeat(3)
            steps = torch.arange(3).repeat_interleave(len(x)).view(-1, 1, 1, 1)
            return dataclasses.make_dataclass("Found", ["rows", "index"])(x[index] + 0.1 * (steps + 1), index)

    thresholds = torch.tensor([0.15, 0.25, 0.35, 0.45])

    class Brightness(nn.Module):
        def forward(self, x):
            return 9.0 * F.one_hot((x.mean((1, 2, 3))[:, None] > thresholds).sum(1), 5)

    images = torch.tensor([0.0, 0.1]).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    search = dataclasses.replace(
        find_search({}, ((0.0,), (1.0,))), adversary=Brighten(), objective=Objective.build("kl_teacher_clean_teacher")
    )
    grid = collect_particles(PixelModel(Brightness()), images, torch.tensor([0, 1]), search)
    assert np.allclose(grid.particles[:, :, 0, 0], [[0.1, 0.2, 0.3], [0.2, 0.3, 0.4]])
    assert grid.predictions.tolist() == [[0, 0, 1, 2], [0, 1, 2, 3]]


# class-activation maps


def mirror(weights: list[float]) -> nn.Module:
    """A network whose feature map is the image itself, with one weight a class."""
    head = linear(torch.tensor(weights)[:, None], torch.zeros(len(weights)))[1]
    convolution = nn.Conv2d(1, 1, 1, bias=False)
    with torch.no_grad():
        convolution.weight.fill_(1)
    return nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def test_maps_show_the_evidence_of_the_class():
    images = torch.rand(3, 1, 5, 5, generator=torch.Generator().manual_seed(1)) * 0.5 + 0.25
    labels = torch.tensor([0, 1, 0])
    found = collect_maps(mirror([2.0, -1.0]), mirror([-1.0, 3.0]), images, labels, pixel_threat(0.1), num_steps=8)
    assert found.exact == (True, True)
    adversarial = torch.from_numpy(found.images[1])
    for kind, shown in enumerate((images[:, 0], adversarial)):
        full = (shown / shown.amax((1, 2), keepdim=True)).numpy()
        for i, label in enumerate(labels.tolist()):
            # a network with a negative weight has no evidence at all
            owner, other = (0, 1) if label == 0 else (1, 0)
            assert np.allclose(found.maps[kind, owner, i], full[i], atol=1e-6)
            assert not found.maps[kind, other, i].any()
        # one map has unit norm and the other is zero
        assert np.allclose(found.distances[kind], 1 / 25)
    assert found.predictions[0].tolist() == [[0, 0, 0], [1, 1, 1]]
    # the student's evidence for its label falls as the image darkens, and rises for the others
    sign = np.where(labels.numpy() == 0, 1, -1)[:, None, None]
    assert np.allclose(found.images[1] - found.images[0], 0.1 * sign, atol=1e-6)


def test_maps_are_compared_on_adversarial_images_of_the_student():
    (images, labels), teacher, student = pixel_images(), pixel_network(1).eval(), pixel_network(2).eval()
    found = collect_maps(teacher, student, images, labels, THREAT, num_steps=5, seed=3)
    rows = pgd_examples(student, images, labels, THREAT, 5, seed=3)
    assert np.array_equal(found.images[1], to_array(rows))
    assert np.array_equal(found.images[0], to_array(images))
    with torch.no_grad():
        assert found.predictions[1].tolist() == [n(rows).argmax(1).tolist() for n in (teacher, student)]
    assert not collect_maps(teacher, teacher, images, labels, THREAT, num_steps=2).distances.any()


def test_a_network_without_a_feature_map_is_told_in_a_sentence():
    images, labels = pixel_images()
    flat = linear(some(5, 72).float(), torch.zeros(5))
    for pair, option in (((flat, pixel_network()), "teacher_module"), ((pixel_network(), flat), "student_module")):
        with pytest.raises(ConfigError, match=f"^{option}: found no module with an output"):
            collect_maps(*pair, images, labels, THREAT)
    named = collect_maps(pixel_network(), pixel_network(), images, labels, THREAT, student_module="network.2")
    assert named.maps[0, 0].shape == (4, 6, 6)
    with pytest.raises(ConfigError, match=r"student_module: found no module 'network\.x'"):
        collect_maps(pixel_network(), pixel_network(), images, labels, THREAT, student_module="network.x")


# the toy problem


def test_boxes_of_the_toy_problem_lie_apart_within_the_square():
    for seed in range(3):
        points, labels = sample_points(NUM_POINTS, EPS, seed)
        distances = (points[:, None] - points[None]).abs().amax(2) + 1e9 * torch.eye(NUM_POINTS)
        assert float(distances.min()) > 2 * EPS
        assert float(points.abs().max()) + EPS <= SIDE
        assert labels.bincount().tolist() == [7, 7, 6]


def test_a_box_is_crossed_where_a_boundary_goes_through_it():
    upright = linear(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.zeros(2))
    points = torch.tensor([[0.35, 2.0], [-0.35, -2.0], [0.37, 0.0], [0.0, 2.5], [-2.0, 0.0]])
    assert crossed_boxes(upright, points, 0.36).tolist() == [True, True, False, True, False]


def test_a_robust_teacher_has_fewer_boxes_crossed_than_its_clean_student():
    points, labels = sample_points(NUM_POINTS, EPS, 0)
    torch.manual_seed(0)
    teacher = train_network(METHODS[TEACHER], points, labels, None, 30)
    student = train_network(METHODS["KD"], points, labels, teacher, 30)
    for network in (teacher, student):
        assert (network(points).argmax(1) == labels).all()
    assert crossed_boxes(teacher, points, EPS).sum() + 2 < crossed_boxes(student, points, EPS).sum()


@pytest.mark.parametrize("method", [name for name in METHODS if name != TEACHER])
def test_students_of_the_toy_problem_learn_from_the_teacher_alone(method):
    points, labels = sample_points(NUM_POINTS, EPS, 0)
    torch.manual_seed(0)
    teachers = [train_network(METHODS[TEACHER], points, labels, None, 1) for _ in range(2)]
    students = []
    for teacher, wrong in ((teachers[0], 0), (teachers[0], 1), (teachers[1], 0)):
        torch.manual_seed(1)
        students.append(train_network(METHODS[method], points, (labels + wrong) % 3, teacher, 1)(points))
    assert torch.equal(students[0], students[1])
    assert not torch.allclose(students[0], students[2])


def test_the_toy_problem_repeats_and_touches_no_global_stream():
    torch.manual_seed(1)
    random = torch.get_rng_state()
    found = collect_toy(num_epochs=1, resolution=61)
    assert torch.equal(torch.get_rng_state(), random)
    torch.manual_seed(2)
    again = collect_toy(num_epochs=1, resolution=61)
    for field in dataclasses.fields(found):
        assert np.array_equal(getattr(found, field.name), getattr(again, field.name)), field.name
    assert found.names == tuple(METHODS)
    assert found.classes.shape == (5, 61, 61)
    # each was trained with its own loss
    assert len({classes.tobytes() for classes in found.classes}) == 5
    title = draw_toy(found).axes[1].get_title()
    assert title == f"KD: {found.crossed[1].sum()} of 20 crossed"


# drawing


INK = "#12ab34"


def test_figures_are_drawn_in_the_colours_of_the_theme():
    (images, labels), pair = pixel_images(), {"teacher": pixel_network(1), "student": pixel_network(2)}
    plane = collect_plane(pair, images[0], 0, THREAT, resolution=9)
    maps = collect_maps(*pair.values(), images, labels, THREAT, num_steps=2)
    grid = collect_particles(pair["teacher"], images, labels, find_search({}, NORMALIZATION))
    values = np.array([[3.0, 1, 2], [4, 2, 3]])
    landscape = Landscape(np.array([-1.0, 0, 1]), ("one", "two"), values, values + 1, 4, "PGD")
    cycle = matplotlib.cycler(color=["#102030", "#405060"])
    with matplotlib.rc_context({"text.color": INK, "axes.prop_cycle": cycle, "axes.titlecolor": "auto"}):
        figures = [draw_plane(plane), draw_maps(maps), draw_particles(grid), draw_landscape(landscape)]
        for figure in figures:
            figure.canvas.draw()
            assert figure.get_size_inches()[0] <= 6.4
    for axis in figures[0].axes[:2]:
        outline = axis.lines[0]
        assert to_hex(outline.get_color()) == INK
        assert np.allclose(outline.get_xydata(), np.vstack([plane.outline, plane.outline[:1]]))
    lines = figures[3].axes[0].lines
    colours = [(to_hex(line.get_color()), line.get_linestyle()) for line in lines]
    assert colours == [(colour, style) for colour in ("#102030", "#405060") for style in ("-", "--")]
    for i in range(2):
        assert lines[2 * i].get_ydata().tolist() == landscape.adversarial[i].tolist()
        assert lines[2 * i + 1].get_ydata().tolist() == landscape.clean[i].tolist()


def test_a_prediction_that_changed_is_bold():
    (images, labels), teacher = pixel_images(2), pixel_network(1)
    grid = collect_particles(teacher, images, labels, find_search({}, NORMALIZATION))
    predictions = np.array([[1, 1, 2, 1, 1], [3, 3, 3, 3, 0]])
    figure = draw_particles(dataclasses.replace(grid, predictions=predictions))
    axes = np.array(figure.axes[:20]).reshape(4, 5)
    bold = [[axes[2 * i, k].title.get_fontweight() == "bold" for k in range(5)] for i in range(2)]
    assert bold == [[False, False, True, False, False], [False, False, False, False, True]]

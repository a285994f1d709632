"""SmaraAD against its formula in slow loops: values, searches, gradients, and where nothing is to be learnt."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from robust import PARTICLES, TWO_STEPS, WIDE, block, kl, mean, softmax
from tiny import NORMALIZE, NUM_CLASSES, bound, images, term
from torch import nn

from torchdistill_adv.step import Step


def convolutional(seed, width, stride, make_head):
    """Features at module 2, in cells of ``stride``; as sure of itself as a trained network."""
    torch.manual_seed(seed)
    features = [nn.Conv2d(2, width, 3, stride, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    net = nn.Sequential(*features, *make_head(width, (6 // stride) ** 2))
    with torch.no_grad():
        net[-1].weight *= 10
    return net


def pooling_head(width, cells):
    """Has exact maps."""
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, NUM_CLASSES)


def deep_head(width, cells):
    """Has Grad-CAM, with weights that depend on the image."""
    return nn.Flatten(), nn.Linear(width * cells, 6), nn.Tanh(), nn.Linear(6, NUM_CLASSES)


HEADS = {"exact": pooling_head, "grad-cam": deep_head}
ALIGNED = {"attribution": "kl_cam_teacher_student", "feature": "kl_features_teacher_student"}
every_kind = pytest.mark.parametrize("kind", HEADS)
every_alignment = pytest.mark.parametrize("alignment", ALIGNED)


def networks_of(kind):
    """A wide teacher with maps of 6x6 cells, and a narrow student with 3x3."""
    return {"teacher": convolutional(1, 8, 1, HEADS[kind]), "student": convolutional(2, 4, 2, HEADS[kind])}


def box_of(kind, **options):
    return bound({"smaraad": block("SmaraADLoss", **options)}, double=True, **networks_of(kind))


def batch(count=6, seed=0):
    x, y = images(count, seed)
    return x.double(), y


# the formula, in plain floats


def ranks(logits, sharpness):
    spread = math.sqrt(mean((v - mean(logits)) ** 2 for v in logits))
    return [sum(1 / (1 + math.exp(-sharpness * (v - own) / spread)) for v in logits) for own in logits]


def first(logits, count):
    return sorted(range(len(logits)), key=lambda c: -logits[c])[:count]


def spearman(target, student, label, sharpness, top_k):
    chosen = first(target, top_k)
    if label not in chosen:
        chosen[-1] = label
    pairs = zip(*(ranks([logits[c] for c in chosen], sharpness) for logits in (student, target)), strict=True)
    n = len(chosen)
    return 1 - 6 * sum((a - b) ** 2 for a, b in pairs) / (n * (n * n - 1))


def evidence(net, features, label):
    """What each channel says for the class: a weight, or the mean slope of the logit by the chain rule."""
    if isinstance(net[3], nn.AdaptiveAvgPool2d):
        return net[5].weight[label].tolist()
    hidden, width = net[4](features.flatten()).tolist(), len(features)
    slopes = [w * (1 - math.tanh(a) ** 2) for w, a in zip(net[6].weight[label].tolist(), hidden, strict=True)]
    weights = net[4].weight.view(len(slopes), width, -1).tolist()
    return [sum(slope * mean(unit[c]) for slope, unit in zip(slopes, weights, strict=True)) for c in range(width)]


def heat_map(net, features, label, alignment):
    cells, channels = range(features.shape[1]), features.tolist()
    if alignment == "feature":
        return [[mean(channel[i][j] ** 2 for channel in channels) for j in cells] for i in cells]
    parts = list(zip(evidence(net, features, label), channels, strict=True))
    return [[max(0.0, sum(w * channel[i][j] for w, channel in parts)) for j in cells] for i in cells]


def coarse(grid, size):
    """Means of the blocks of ``grid`` that are one cell of ``size`` x ``size``, of unit length."""
    side = len(grid) // size
    corners = [(side * i, side * j) for i in range(size) for j in range(size)]
    cells = [mean(grid[i + a][j + b] for a in range(side) for b in range(side)) for i, j in corners]
    length = math.sqrt(sum(v * v for v in cells))
    return [v / length if length else 0.0 for v in cells]


def distance(*maps):
    size = min(len(grid) for grid in maps)
    return mean((a - b) ** 2 for a, b in zip(*(coarse(grid, size) for grid in maps), strict=True))


def seen_on(rows, labels, teacher, student, alignment="attribution", teacher_module=2, student_module=2, **options):
    """Of each row, the logits of teacher and student and the distance of their maps."""
    found = []
    with torch.no_grad():
        parts = [(net, int(end) + 1) for net, end in ((teacher, teacher_module), (student, student_module))]
        features = [net[:end](rows) for net, end in parts]
        logits = [net[end:](of).tolist() for (net, end), of in zip(parts, features, strict=True)]
        for t, s, t_map, s_map, label in zip(*logits, *features, labels, strict=True):
            maps = [heat_map(net, of, label, alignment) for net, of in ((teacher, t_map), (student, s_map))]
            found.append((t, s, 0.0 if alignment == "none" else distance(*maps)))
    return found


DEFAULTS = {"matching": "slack", "offset": 1, "alignment_weight": 1, "sharpness": 2, "top_k": NUM_CLASSES}
DEFAULTS |= {"plus_plus": False, "beta": 0.1}


def formula(seen, clean, index, labels, **options):
    """The loss, from what is seen on the examples and on the clean images."""
    o = {**DEFAULTS, **options}

    def match(target, student, label):
        if o["matching"] == "kl":
            return kl(target, student)
        return o["offset"] - spearman(target, student, label, o["sharpness"], o["top_k"])

    on_clean = mean(match(t, s, label) for (t, s, _), label in zip(clean, labels, strict=True))
    values = []
    for (t, s, _), i in zip(seen, index, strict=True):
        trust = softmax(t)[labels[i]] ** o["beta"] if o["plus_plus"] else 1
        values.append(trust * match(t, s, labels[i]) + (1 - trust) * match(clean[i][1], s, labels[i]))
    return mean(values) + on_clean + o["alignment_weight"] * (mean(d for *_, d in seen) + mean(d for *_, d in clean))


# values

CASES = [
    *({"matching": m, "alignment": a} for m in ("slack", "kl") for a in (*ALIGNED, "none")),
    {"offset": -2.5},
    {"alignment_weight": 0},
    {"alignment_weight": 7},
    {"sharpness": 10},
    {"top_k": 2},
    {"top_k": 3, "alignment": "none"},
    {"top_k": 99},
    {"plus_plus": True},
    {"plus_plus": True, "beta": 0},
    {"plus_plus": True, "beta": 1, "top_k": 3},
    {"plus_plus": True, "beta": 2, "matching": "kl", "alignment": "feature"},
    {"teacher_module": "0", "alignment": "feature"},
    {"student_module": "0", "alignment": "feature"},
    {"label_free": True},
    {"label_free": True, "plus_plus": True, "beta": 1, "top_k": 3},
]


def check_value(searches, kind, count=6, student_bn="train", adversary=TWO_STEPS, **options):
    x, y = batch(count)
    box = box_of(kind, **{**WIDE, "adversary": adversary}, student_bn=student_bn, **options)
    before = copy.deepcopy(box.org_student_model).train()
    value = box.forward_process(x, y).item()
    ((search, examples),) = searches
    index = examples.index.tolist()
    assert index == list(range(count)) * search.adversary.num_rows
    # once host and search are through, nothing moves the running statistics that eval mode reads
    teacher, student = box.org_teacher_model, copy.deepcopy(box.org_student_model).train(student_bn != "eval")
    labels = teacher(x).argmax(1).tolist() if options.get("label_free") else y.tolist()
    seen = seen_on(examples.rows, [labels[i] for i in index], teacher, student, **options)
    # on the clean images, what the host's own pass saw, in train mode
    clean = seen_on(x, labels, teacher, before, **options)
    assert abs(value - formula(seen, clean, index, labels, **options)) < 1e-10
    return seen, labels


@every_kind
@pytest.mark.parametrize("options", CASES, ids=str)
def test_value_is_the_formula(searches, kind, options):
    check_value(searches, kind, **options)


@every_kind
@pytest.mark.parametrize("student_bn", ["train", "batch", "eval"])
@pytest.mark.parametrize(
    "adversary, count", [(TWO_STEPS, 6), (TWO_STEPS, 1), (PARTICLES, 6)], ids=["one", "one image", "two"]
)
@pytest.mark.parametrize("alignment", [*ALIGNED, "none"])
def test_value_in_every_mode_is_the_formula(searches, kind, student_bn, adversary, count, alignment):
    options = {"plus_plus": True, "beta": 1, "top_k": 3, "alignment": alignment}
    check_value(searches, kind, count, student_bn, adversary, **options)


def test_classes_inside_and_outside_the_teachers_top_k_are_tried(searches):
    seen, labels = check_value(searches, "exact", top_k=3)
    assert {label in first(t, 3) for (t, *_), label in zip(seen, labels, strict=True)} == {True, False}


@every_kind
def test_no_evidence_in_the_student_is_the_whole_distance(searches, kind):
    """Weights that are nowhere positive, on features that are nowhere negative."""
    x, y = batch()
    box = box_of(kind, **WIDE)
    teacher, student = box.org_teacher_model, box.org_student_model
    for module in student[3:]:
        if isinstance(module, nn.Linear):
            module.weight.data.abs_()
    student[-1].weight.data.neg_()
    value = box.forward_process(x, y)
    ((_, examples),) = searches
    seen, clean = (seen_on(rows, y.tolist(), teacher, student) for rows in (examples.rows, x))
    assert [d for *_, d in seen + clean] == pytest.approx([1 / 9] * 12)
    assert abs(value.item() - formula(seen, clean, range(6), y.tolist())) < 1e-10
    value.backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters())


@pytest.mark.parametrize(
    "options",
    [
        *({"label_free": True, "plus_plus": True, "top_k": 2, "alignment": a} for a in (*ALIGNED, "none")),
        {"alignment": "feature"},
        {"alignment": "none"},
        {"alignment": "none", "matching": "kl", "top_k": 2},
    ],
    ids=str,
)
def test_labels_that_are_not_read_may_be_anything(options):
    x, y = batch()
    values = [box_of("exact", **WIDE, **options).forward_process(x, labels) for labels in (y, y.flip(0) - 99, None)]
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])


# searches

MEAN, STD = (torch.tensor(NORMALIZE[name], dtype=torch.float64).view(1, 2, 1, 1) for name in ("mean", "std"))


def limited(pixels, x):
    clean = x * STD + MEAN
    return pixels.clamp(clean - 8 / 255, clean + 8 / 255).clamp(0, 1)


def plain_search(box, x, y, alignment, weight=1.0):
    """Where the next search of ``box`` is to start, in pixels, and what it is to maximise there, in loops."""
    teacher, student = box.org_teacher_model, copy.deepcopy(box.org_student_model)
    student.train()(x)  # the host's own pass comes first
    student.eval()
    noise = box.adversarial_binding.noise_for(term(box, "smaraad").search, x).uniform(x.shape)

    def objective(pixels):
        seen = seen_on((pixels - MEAN) / STD, y.tolist(), teacher, student, alignment)
        return torch.tensor([kl(t, s) + weight * d for t, s, d in seen], dtype=torch.float64)

    return limited(x * STD + MEAN + 8 / 255 * noise, x), objective


@every_kind
@every_alignment
@pytest.mark.parametrize("weight", [0, 1, 1e4])
def test_a_step_of_the_search_follows_finite_differences_of_the_loops(searches, kind, alignment, weight):
    """Of the divergence alone, of both, and, at a large weight, of the distance."""
    x, y = batch(3)
    options = {"adversary": {"key": "PGD", "kwargs": {"num_steps": 1, "step_size": 0.01}}, "alignment": alignment}
    if weight != 1:
        options["objective"] = {"key": ALIGNED[alignment], "kwargs": {"alignment_weight": weight}}
    box = box_of(kind, **options)
    start, objective = plain_search(box, x, y, alignment, weight)
    box.forward_process(x, y)
    ((_, examples),) = searches
    found = examples.rows * STD + MEAN
    for c, i, j in [(0, 0, 0), (1, 2, 3), (0, 5, 4), (1, 4, 1), (0, 1, 5), (1, 3, 3), (0, 2, 2), (1, 0, 2)]:
        shift = torch.zeros_like(start)
        shift[:, c, i, j] = 1e-6
        signs = (objective(start + shift) - objective(start - shift)).sign()
        expected = limited(start + 1e4 * shift * signs.view(-1, 1, 1, 1), x)
        assert (found - expected)[:, c, i, j].abs().max() < 1e-10


@every_kind
@every_alignment
def test_the_papers_search_raises_its_objective(searches, kind, alignment):
    box = box_of(kind, alignment=alignment)
    for seed in range(4):
        x, y = batch(seed=seed)
        start, objective = plain_search(box, x, y, alignment)
        box.forward_process(x, y)
        search, examples = searches[seed]
        assert (objective(examples.rows * STD + MEAN) > objective(start)).all()
    settings = search.adversary.num_steps, search.adversary.step_size, search.adversary.start, search.threat.eps
    assert settings == (10, 2 / 255, "uniform", 8 / 255)


@every_alignment
def test_the_search_takes_the_named_modules(searches, alignment):
    names, objective = {"teacher_module": "0", "student_module": "1"}, ALIGNED[alignment]
    for options in (names, {}, {"objective": {"key": objective, "kwargs": names}}):
        box_of("grad-cam", alignment=alignment, **options).forward_process(*batch())
    (_, own), (_, default), (_, of_objective) = searches
    assert torch.equal(own.rows, of_objective.rows) and not torch.equal(own.rows, default.rows)


# gradients


@every_kind
@every_alignment
def test_gradient_is_that_of_finite_differences(searches, monkeypatch, kind, alignment):
    x, y = batch()
    options = {"plus_plus": True, "beta": 1, "alignment_weight": 3, "student_bn": "batch"}
    box = box_of(kind, **WIDE, **options, alignment=alignment)
    box.forward_process(x, y)
    ((_, examples),) = searches
    # the examples depend on the weights too, but a loss takes them as given
    monkeypatch.setattr(Step, "_run", lambda self, search, term: examples)
    student = box.org_student_model
    parameters = [student[0].weight, student[1].weight, student[-1].weight]
    gradients = torch.autograd.grad(box.forward_process(x, y), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        for k in gradient.flatten().abs().topk(3).indices.tolist():
            values = []
            for shift in (1e-6, -1e-6):
                with torch.no_grad():
                    parameter.view(-1)[k] += shift
                    values.append(float(box.forward_process(x, y)))
                    parameter.view(-1)[k] -= shift
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(float(gradient.flatten()[k]), rel=1e-6, abs=1e-7)


@every_kind
@pytest.mark.parametrize("alignment", [*ALIGNED, "none"])
def test_the_teacher_gets_no_gradient_even_if_it_could(kind, alignment):
    box = box_of(kind, **WIDE, alignment=alignment, plus_plus=True)
    box.org_teacher_model.requires_grad_()
    box.forward_process(*batch()).backward()
    assert all(p.grad is None for p in box.org_teacher_model.parameters())
    assert all(p.grad.abs().sum() > 0 for p in list(box.org_student_model.parameters())[-2:])


class Once(torch.autograd.Function):
    """The identity, as an operation without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient


class OnlyOnce(nn.Module):
    def forward(self, x):
        return Once.apply(x)


def test_exact_maps_need_first_derivatives_only():
    def run(kind):
        box = box_of(kind, **WIDE)
        for net in (box.org_student_model, box.org_teacher_model):
            for i in (0, 2, 3, -1):
                net[i] = nn.Sequential(net[i], OnlyOnce())
        box.forward_process(*batch()).backward()

    run("exact")
    with pytest.raises(RuntimeError, match="once_differentiable"):
        run("grad-cam")


# numbers


@every_kind
@every_alignment
def test_a_student_that_equals_the_teacher_has_nothing_to_learn(kind, alignment):
    teacher = networks_of(kind)["teacher"]
    student, term_block = copy.deepcopy(teacher), block("SmaraADLoss", **WIDE, alignment=alignment)
    box = bound({"smaraad": term_block}, teacher=teacher, student=student, double=True)
    student.eval()
    value = box.forward_process(*batch())
    value.backward()
    assert abs(value.item()) < 1e-10 and all(p.grad.abs().max() < 1e-10 for p in student.parameters())


@every_kind
def test_eight_times_one_image_is_that_image(kind):
    (x, y), values = batch(1), []
    for count in (1, 8):
        box = box_of(kind, adversary={"key": "PGD", "kwargs": {"num_steps": 2, "start": "none"}}, plus_plus=True)
        box.org_student_model.eval()
        values.append(box.forward_process(x.expand(count, -1, -1, -1), y.expand(count)).item())
    assert abs(values[0] - values[1]) < 1e-10


@every_kind
@every_alignment
def test_half_precision_is_close_to_single(searches, monkeypatch, kind, alignment):
    x, y = batch()
    box = box_of(kind, **WIDE, alignment=alignment, student_bn="batch")
    box.org_student_model.float(), box.org_teacher_model.float()
    exact = box.forward_process(x.float(), y).item()
    ((_, examples),) = searches
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert math.isfinite(box.forward_process(x.float(), y).item())
        # the same examples for the comparison: a search follows signs, which rounding turns
        monkeypatch.setattr(Step, "_run", lambda self, search, term: examples)
        value = box.forward_process(x.float(), y)
    value.backward()
    assert value.dtype == torch.float32 and abs(value.item() - exact) < 0.02
    assert all(torch.isfinite(p.grad).all() for p in box.org_student_model.parameters())

"""BSS against the official code written out in loops: the search, base samples and targets, schedules, the loss."""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter

import pytest
import torch
from tiny import NORMALIZE, images, sharp, term, tiny_box
from torch import nn

from torchdistill_adv.adversaries import BSS
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.losses.base import Cost
from torchdistill_adv.noise import Noise
from torchdistill_adv.objectives import Objective, View
from torchdistill_adv.threat import ThreatModel

TERM = "train.criterion.kwargs.sub_terms.bss.criterion.kwargs"
FREE = {**NORMALIZE, "norm": "l2", "eps": math.inf}
EPOCHS = 8


def view_of(teacher, x, seed=0):
    return View(x, None, teacher, teacher, Noise(seed, dtype=x.dtype))


def gap(view, toward="sampled"):
    return Objective.build({"key": "gap_teacher", "kwargs": {"toward": toward}}).bind(view)


# the search


def official(teacher, image, target, *, num_steps, step_size, power, low, high, mean=0.0, std=1.0):
    """The published loop on one image, in the units of (x * std + mean), with the number of steps that it made."""
    moved = image * std + mean
    base = int(teacher(image[None]).argmax())
    for count in range(num_steps):
        leaf = moved.clone().requires_grad_()
        logits = teacher(((leaf - mean) / std)[None])[0]
        if int(logits.argmax()) != base:
            return (moved - mean) / std, count
        (gradient,) = torch.autograd.grad(logits[target] - logits[base], leaf)
        norm = math.sqrt(sum(v * v for v in gradient.flatten().tolist()))
        length = step_size * ((logits[base] - logits[target]).item() + 1e-4)
        moved = (moved + length * gradient / norm**power).clamp(low, high)
    return (moved - mean) / std, num_steps


def targets_of(objective, teacher, x):
    """The classes that an objective leads to, from its values on the images."""
    values, logits = objective(x, torch.arange(len(x))), teacher(x)
    return (logits - logits.amax(1, keepdim=True) - values[:, None]).abs().argmin(1).tolist()


@pytest.mark.parametrize("power, step_size", [(1, 0.3), (1, 1.0), (2, 0.5), (2, 1.0)])
@pytest.mark.parametrize("space, bounds", [("input", [-2.5, 2.5]), ("input", [-1, 1.2]), ("pixel", "image")])
def test_search_is_the_official_loop(space, bounds, power, step_size):
    teacher, x = sharp(1, width=8).double().eval(), images(12)[0].double()
    if space == "pixel":
        mean, std = (torch.tensor(NORMALIZE[name], dtype=x.dtype).view(2, 1, 1) for name in ("mean", "std"))
        units = {"low": 0, "high": 1, "mean": mean, "std": std}
    else:
        x, units = x.clamp(*bounds), {"low": bounds[0], "high": bounds[1]}
    objective, options = gap(view_of(teacher, x)), {"num_steps": 5, "step_size": step_size}
    threat = ThreatModel(**FREE, space=space, bounds=bounds)
    found = BSS(**options, norm_power=power)(objective, x, threat, Noise(0))
    pairs = zip(x, targets_of(objective, teacher, x), strict=True)
    rows, counts = zip(*(official(teacher, *pair, **options, power=power, **units) for pair in pairs), strict=True)
    assert torch.allclose(found.rows, torch.stack(rows), atol=1e-9)
    assert min(counts) < 5 and found.index.tolist() == list(range(12))


@pytest.mark.parametrize("overshoot", [1e-4, 0.25])
def test_squared_norm_crosses_a_linear_boundary_in_one_step(overshoot):
    torch.manual_seed(0)
    teacher, x = nn.Sequential(nn.Flatten(), nn.Linear(72, 5)).double(), images()[0].double()
    objective, calls = gap(view_of(teacher, x), "runner_up"), 0

    def counted(rows, index):
        nonlocal calls
        calls += 1
        return objective(rows, index)

    search = BSS(num_steps=10, step_size=1, norm_power=2, overshoot=overshoot)
    threat = ThreatModel(**FREE, space="input", bounds="none")
    rows = search(counted, x, threat, Noise(0)).rows
    first, second = teacher(x).topk(2, dim=1).indices.T
    image = torch.arange(6)
    before, after = ((z[image, second] - z[image, first]) for z in (teacher(x), teacher(rows)))
    slope = (teacher[1].weight[second] - teacher[1].weight[first]).norm(dim=1)
    assert torch.allclose(after, torch.tensor(overshoot).double())
    assert torch.allclose((rows - x).flatten(1).norm(dim=1), (overshoot - before) / slope)
    # the second one finds that all have crossed
    assert calls == 2


# the objective


def test_gap_is_0_without_a_gradient_beyond_the_boundary():
    teacher, x = sharp(1, width=8).double().eval(), images(12)[0].double()
    rows = (x + 2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).requires_grad_()
    values = gap(view_of(teacher, x), "runner_up")(rows, torch.arange(12))
    (gradient,) = torch.autograd.grad(values.sum(), rows)
    before, after = teacher(x), teacher(rows)
    crossed = before.argmax(1) != after.argmax(1)
    assert 2 < crossed.sum() < 10
    for i in range(12):
        first, second = before[i].topk(2).indices
        assert float(values[i].detach()) == (0 if crossed[i] else float((after[i, second] - after[i, first]).detach()))
        assert bool(gradient[i].any()) != bool(crossed[i])


@pytest.mark.parametrize("logits", [[1.0, 0.5, 2.0, -1.0, 0.0], [0.0, 60.0, 1.0, 2.0, -1.0]])
def test_targets_are_drawn_by_the_teachers_probabilities(logits):
    count, teacher = 4000, nn.Identity()
    x = torch.tensor(logits, dtype=torch.float64).expand(count, -1)
    drawn = Counter(targets_of(gap(view_of(teacher, x)), teacher, x))
    base = logits.index(max(logits))
    total = sum(math.exp(v) for k, v in enumerate(logits) if k != base)
    assert drawn[base] == 0 and set(drawn) == set(range(5)) - {base}
    for k in drawn:
        share = math.exp(logits[k]) / total
        # four deviations of a binomial
        assert abs(drawn[k] - count * share) < 4 * math.sqrt(count * share * (1 - share))


def test_runner_up_is_the_second_best_class():
    x = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    found = targets_of(gap(view_of(nn.Identity(), x), "runner_up"), nn.Identity(), x)
    assert found == [sorted(range(5), key=row.__getitem__)[-2] for row in x.tolist()]


# base samples


class Reads(nn.Module):
    """A network whose logits stand in the first pixels of a channel."""

    def __init__(self, channel):
        super().__init__()
        self.channel, self.shift = channel, nn.Parameter(torch.zeros(5))

    def forward(self, x):
        return x[:, self.channel].flatten(1)[:, :5] + self.shift


def block(**options):
    options = {"adversary": {"key": "BSS", "kwargs": {"num_steps": 4, "step_size": 1.0}}, **options}
    return {"criterion": {"key": "BSSLoss", "kwargs": {"threat": {**FREE, "space": "input"}, **options}}, "weight": 1.0}


def box_of(student, teacher, epoch=1, **options):
    """A box in float64 with this term, whose epoch ``epoch`` = 1, ..., 8 has begun."""
    box = tiny_box({"bss": block(**options)}, student=student, teacher=teacher, double=True, num_epochs=EPOCHS)
    box.pre_epoch_process(epoch=epoch - 1)
    return box


def softmax(logits, temperature=1.0):
    total = sum(math.exp(v / temperature) for v in logits)
    return [math.exp(v / temperature) / total for v in logits]


def base_samples(student, teacher, labels, count):
    """Numbers of the base samples, from lists of logits; of equals the first comes first."""
    scores = {}
    for i, (s, t, y) in enumerate(zip(student, teacher, labels, strict=True)):
        if s.index(max(s)) == y == t.index(max(t)):
            p, q = softmax(t), softmax(s)
            scores[i] = sum((p[k] - q[k]) ** 2 for k in range(5) if k != y)
    return sorted(scores, key=lambda i: -scores[i])[:count]


@pytest.mark.parametrize("num_base", [1, 2, 3, 5, 64])
def test_base_samples_are_those_of_the_loop(searches, num_base):
    x = torch.randn(24, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = x[:, 1].flatten(1)[:, :5].argmax(1)
    y[::5] += 1
    y %= 5
    x[::2, 0] += x[::2, 1]  # the student agrees now and then
    still = {"key": "BSS", "kwargs": {"step_size": 0}}
    threat = {**FREE, "space": "input", "bounds": "none"}
    student, teacher = (x[:, channel].flatten(1)[:, :5] for channel in (0, 1))
    usable = base_samples(student.tolist(), teacher.tolist(), y.tolist(), 24)
    # two that differ as much as each other, in the middle of the order
    first, second = sorted(usable[2:4])
    x[second, :, 0] = x[first, :, 0]
    y[second] = y[first]
    expected = base_samples(student.tolist(), teacher.tolist(), y.tolist(), num_base)
    box = box_of(Reads(0), Reads(1), num_base=num_base, adversary=still, threat=threat)
    box.forward_process(x, y)
    assert 5 < len(usable) < 20 and len(expected) == min(num_base, len(usable))
    assert torch.equal(searches[0][1].rows, x[expected])


# the loss


def pair(bn=True):
    """A student that mostly agrees with its teacher."""
    teacher = sharp(1, bn=bn)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for p in student.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    # running statistics near those of a batch
    teacher.train()(images(64, seed=3)[0])
    return student, teacher.eval()


def batch():
    """Images in float64; the teacher is right about most of them."""
    x = images(10)[0].double()
    y = copy.deepcopy(pair()[1]).double()(x).argmax(1)
    y[:2] = (y[:2] + 1) % 5
    return x, y


def soft_cross_entropy(p, q, temperature):
    return -sum(a * math.log(b) for a, b in zip(softmax(p, temperature), softmax(q, temperature), strict=True))


def formula(clean, boundary, epoch, *, temperature=3.0, kd_weight=3.0, bss_weight=2.0):
    """The loss from (label, teacher's logits, student's) of every image and (teacher's, student's) of every sample."""
    total = 0.0
    for y, t, s in clean:
        r = max(kd_weight * (1 - epoch / EPOCHS), 0) + 1
        total += (-math.log(softmax(s)[y]) + r * soft_cross_entropy(t, s, temperature)) / len(clean)
    a = max(bss_weight * (1 - 4 / 3 * epoch / EPOCHS), 0)
    return total + a * sum(soft_cross_entropy(t, s, temperature) for t, s in boundary) / max(len(boundary), 1)


def run(searches, *, epoch=1, student_bn="train", y=None, num_base=64, **options):
    """One step, checked against the formula on the samples found: the box, the base samples' numbers, the samples."""
    x, labels = batch()
    y = labels if y is None else y
    box = box_of(*pair(), epoch=epoch, student_bn=student_bn, num_base=num_base, **options)
    student, teacher = copy.deepcopy(box.org_student_model), copy.deepcopy(box.org_teacher_model)
    loss = box.forward_process(x, y)
    ((_, examples),) = searches
    s, t = student.train()(x).tolist(), teacher(x).tolist()
    base = base_samples(s, t, y.tolist(), num_base) if epoch < 0.75 * EPOCHS else []
    boundary = []
    if len(examples.rows):
        on_rows = student.train(student_bn != "eval")(examples.rows).tolist()
        boundary = list(zip(teacher(examples.rows).tolist(), on_rows, strict=True))
    assert len(boundary) == len(base)
    mathematical = {name: v for name, v in options.items() if name in formula.__kwdefaults__}
    expected = formula(list(zip(y.tolist(), t, s, strict=True)), boundary, epoch, **mathematical)
    assert abs(float(loss.detach()) - expected) < 1e-9
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in box.org_student_model.parameters())
    return box, base, examples


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1},
        {"kd_weight": 0},
        {"kd_weight": 1.5, "bss_weight": 5},
        {"bss_weight": 0},
        {"num_base": 1},
        {"num_base": 3},
        {"student_bn": "batch"},
        {"student_bn": "eval"},
        {"objective": {"key": "gap_teacher", "kwargs": {"toward": "runner_up"}}},
        {"objective": "ce_teacher", "adversary": "FGSM", "threat": {**FREE, "eps": 0.1}},
    ],
    ids=str,
)
def test_value_is_the_formula(searches, options):
    _, base, _ = run(searches, **options)
    assert len(base) == options.get("num_base", len(base)) and 0 < len(base) < 8


@pytest.mark.parametrize("epoch", range(1, EPOCHS + 1))
def test_schedules_follow_the_epoch(searches, epoch):
    _, base, _ = run(searches, epoch=epoch)
    assert bool(base) == (epoch < 6)


def test_no_image_that_both_get_right_leaves_the_clean_terms(searches):
    _, base, examples = run(searches, y=(batch()[1] + 2) % 5)
    assert base == [] and examples.rows.shape == (0, 2, 6, 6)


def test_samples_start_from_the_right_images_with_their_own_classes(searches):
    """They are some of the batch in another order, so a wrong index would lead elsewhere."""
    x, _ = batch()
    options = {"num_base": 4, "objective": {"key": "gap_teacher", "kwargs": {"toward": "runner_up"}}}
    box, base, examples = run(searches, **options)
    assert base != sorted(base)
    mean, std = (torch.tensor(NORMALIZE[name], dtype=x.dtype).view(2, 1, 1) for name in ("mean", "std"))
    units = {"low": -mean / std, "high": (1 - mean) / std}
    teacher = box.org_teacher_model
    for row, i in zip(examples.rows, base, strict=True):
        target = int(teacher(x[i : i + 1])[0].argsort()[-2])
        expected, _ = official(teacher, x[i], target, num_steps=4, step_size=1.0, power=1, **units)
        assert torch.allclose(row, expected, atol=1e-9)


def test_other_searches_get_the_labels_of_the_base_samples(searches):
    x, y = batch()
    threat = {**FREE, "eps": 0.1, "norm": "linf", "space": "input"}
    box, base, examples = run(searches, num_base=4, objective="ce_teacher", adversary="FGSM", threat=threat)
    leaf = x[base].requires_grad_()
    losses = nn.functional.cross_entropy(box.org_teacher_model(leaf), y[base], reduction="sum")
    (gradient,) = torch.autograd.grad(losses, leaf)
    inside = ThreatModel(**threat).project(leaf + 0.1 * gradient.sign(), leaf)
    assert base != sorted(base) and torch.allclose(examples.rows, inside)


@pytest.mark.parametrize("epoch, more", [(5, True), (6, False), (8, False)])
def test_nothing_is_passed_after_three_quarters_of_the_epochs(epoch, more):
    box = box_of(*pair(), epoch=epoch)
    box.forward_process(*batch())  # the first step also tries the networks on one image
    seen = Counter()
    for name, net in [("student", box.org_student_model), ("teacher", box.org_teacher_model)]:
        net.register_forward_hook(lambda *_, name=name: seen.update([name]))
    box.forward_process(*batch())
    # the host's own passes
    assert (seen["student"] > 1, seen["teacher"] > 1) == (more, more)


def test_announced_cost_is_the_most(searches):
    """That of a step in which all images are base samples and none reaches the boundary."""
    student, teacher = (sharp(1, bn=False) for _ in range(2))
    box = box_of(student, teacher, adversary={"key": "BSS", "kwargs": {"num_steps": 4, "step_size": 1e-6}})
    x, _ = batch()
    y = student(x).argmax(1)
    box.forward_process(x, y)
    counts = Counter()

    def count(name, module, inputs, output):
        counts[f"{name}_forward"] += len(output)
        if output.requires_grad:
            output.register_hook(lambda gradient: counts.update({f"{name}_backward": len(gradient)}))

    for name, net in [("student", student), ("teacher", teacher)]:
        net[0].register_forward_hook(functools.partial(count, name))
    box.forward_process(x, y).backward()
    bss = term(box, "bss")
    declared = [bss.search.cost(10), *bss.outer_cost(10).values()]
    host = Cost(teacher_forward=10, student_forward=10, student_backward=10)
    assert Cost(**counts) == functools.reduce(Cost.plus, declared, host)


def test_defaults_are_the_official_code():
    options = {"threat": {**FREE, "space": "input"}}
    box = tiny_box({"bss": {"criterion": {"key": "BSSLoss", "kwargs": options}, "weight": 1.0}})
    box.pre_epoch_process(epoch=0)
    bss = term(box, "bss")
    assert bss.search.adversary == BSS(num_steps=10, step_size=0.3, overshoot=1e-4, norm_power=1)
    assert (bss.search.objective, bss.student_bn) == (Objective.build("gap_teacher"), "train")
    assert (bss.num_base, bss.temperature, bss.kd_weight, bss.bss_weight) == (64, 3, 3, 2)


# bad input


@pytest.mark.parametrize(
    "options, path, found",
    [
        ({"num_base": 0}, "num_base", ">= 1"),
        ({"temperature": 0}, "temperature", "> 0"),
        ({"kd_weight": -1}, "kd_weight", ">= 0"),
        ({"bss_weight": "two"}, "bss_weight", "found 'two'"),
        ({"num_bases": 3}, "num_bases", "did you mean 'num_base'"),
        ({"adversary": {"key": "BSS", "kwargs": {"norm_power": 3}}}, "adversary.kwargs.norm_power", "Known: 1, 2"),
        ({"adversary": {"key": "BSS", "kwargs": {"targeted": True}}}, "adversary.kwargs.targeted", "no such option"),
        ({"objective": {"key": "gap_teacher", "kwargs": {"toward": "last"}}}, "objective.kwargs.toward", "runner_up"),
        ({"threat": {"eps": math.inf, "norm": "l2"}}, "threat.mean", "normalize_kwargs"),
        ({"threat": {**FREE, "eps": math.nan}}, "threat.eps", "nan"),
    ],
)
def test_bad_options_name_their_yaml_path(options, path, found):
    with pytest.raises(ConfigError, match=found) as error:
        box_of(*pair(), **options)
    assert error.value.path == f"{TERM}.{path}"


@pytest.mark.parametrize("adversary", ["FGSM", "PGD", "SVGD", "VirtualSVGD"])
def test_search_that_needs_a_radius_refuses_an_infinite_one(adversary):
    """With the path of the radius, which is what is wrong."""
    with pytest.raises(ConfigError, match="finite") as error:
        box_of(*pair(), adversary=adversary).forward_process(*batch())
    assert error.value.path == f"{TERM}.threat.eps"


def test_search_from_a_start_of_its_own_needs_no_radius():
    adversary = {"key": "PGD", "kwargs": {"num_steps": 2, "start": "gaussian"}}
    assert torch.isfinite(box_of(*pair(), adversary=adversary).forward_process(*batch()))


def test_labels_are_needed():
    with pytest.raises(ConfigError, match="class numbers"):
        box_of(*pair()).forward_process(batch()[0], None)

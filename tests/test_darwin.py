"""DARWINLoss against its formula in slow loops, its paths against PGD written out, its pairs, DARWIN-LF, bad input."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from tiny import NORMALIZE, NUM_CLASSES, PIXEL_THREAT, images, sharp, tald, tiny_box
from torch import Tensor, nn
from torch.func import functional_call

from torchdistill_adv.adversaries import PGD
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.losses.darwin import Pairs
from torchdistill_adv.objectives import Objective
from torchdistill_adv.step import Step

# wide, so that predictions on clean images and on examples differ
THREAT = {**PIXEL_THREAT, "eps": 0.2}
PARTICLES = {"key": "SVGD", "kwargs": {"num_particles": 2, "num_steps": 3, "step_size": 0.5, "bandwidth": "median"}}
TERM = "train.criterion.kwargs.sub_terms.darwin.criterion.kwargs"


def steps(count, **options):
    return {"key": "PGD", "kwargs": {"num_steps": count, "step_size": 0.1, "start": "gaussian", **options}}


def block(weight=1.0, **options):
    options = {"adversary": steps(3), "threat": THREAT, **options}
    return {"criterion": {"key": "DARWINLoss", "kwargs": options}, "weight": weight}


def box_of(*, student=None, teacher=None, double=True, others=None, **options):
    """A box with this term, whose first epoch has begun."""
    student, teacher = student or sharp(2), teacher or sharp(1, width=8)
    box = tiny_box({**(others or {}), "darwin": block(**options)}, student=student, teacher=teacher, double=double)
    box.pre_epoch_process(epoch=0)
    return box


def batch(count=6):
    x, y = images(count)
    return x.double(), y


def pairs(count=6):
    """What the data set wrapper gives beside a batch: images of their own, of other classes."""
    return {"paired_image": images(count, seed=1)[0].double(), "paired_label": (images(count)[1] + 2) % NUM_CLASSES}


# the formula, one example and one step of the path at a time


class Row(NamedTuple):
    """One example after step i: the classes of x and x', and logits on both and on the two paths."""

    label: int
    paired_label: int
    teacher_clean: Tensor
    teacher_paired: Tensor
    teacher: Tensor
    student: Tensor
    student_paired: Tensor


def softmax(logits):
    return logits.exp() / logits.exp().sum()


def kl(p, q):
    return (softmax(p) * (softmax(p) / softmax(q)).log()).sum()


def squared(p, q):
    return ((softmax(p) - softmax(q)) ** 2).sum()


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def weights(position, gamma, triples):
    """w of every example, from the class, the teacher's clean logits and the student's on the example."""
    gaps = [float((softmax(teacher)[c] - softmax(student)[c]).detach().abs()) for c, teacher, student in triples]
    return [(1 - gamma) * position + gamma * gap / max(gaps) for gap in gaps]


def hinges(row, margin, distance):
    distance = {"kl": kl, "squared": squared}[distance]
    own = margin + distance(row.teacher_clean, row.student) - distance(row.teacher_clean, row.student_paired)
    other = margin + distance(row.teacher_paired, row.student_paired) - distance(row.teacher_paired, row.student)
    return own, other


def darwin(
    clean,
    path,
    *,
    beta=1.0,
    gamma=0.5,
    weighted=True,
    arkd_weight=1.0,
    iakd_weight=1.0,
    dbkd_weight=1.0,
    average=True,
    margin=1.0,
    distance="kl",
):
    """The loss; ``clean`` has the logits of teacher and student on each image, ``path`` the rows after each step."""
    n = len(path)
    total = arkd_weight * mean(kl(teacher, student) for teacher, student in clean)
    for i, rows in enumerate(path, 1):
        own = other = [1.0] * len(rows)
        if weighted:
            own = weights(i / n, gamma, [(r.label, r.teacher_clean, r.student) for r in rows])
        matching = [kl(r.teacher, r.student) for r in rows]
        if i == n:
            total = total + arkd_weight * beta * mean(matching)
        else:
            share = iakd_weight / (n - 1) if average else iakd_weight
            total = total + share * mean(w * v for w, v in zip(own, matching, strict=True))
        if dbkd_weight:
            if weighted:
                other = weights(i / n, gamma, [(r.paired_label, r.teacher_paired, r.student_paired) for r in rows])
            share = dbkd_weight / n if average else dbkd_weight
            triplets = [[v.clamp_min(0) for v in hinges(r, margin, distance)] for r in rows]
            total = total + share * mean(w * a + v * b for w, v, (a, b) in zip(own, other, triplets, strict=True))
    return total


def logits_of(net, rows, bn, statistics):
    """The student's logits, with the running statistics of a network; its own are moved by ``train`` alone."""
    net.train(bn != "eval")
    return functional_call(net, {} if bn == "train" else {k: v.clone() for k, v in statistics.named_buffers()}, (rows,))


def on_path(examples, i):
    return examples.rows if examples.path is None else examples.path[i]


def partners_of(paired, x):
    """Which image of the batch each x' is, from where its path begins."""
    return (on_path(paired, 0)[:, None] - x[None]).flatten(2).abs().amax(2).argmin(1)


class Outcome(NamedTuple):
    box: object
    loss: Tensor
    student: nn.Module  # a copy of the student from before the step, which the formula was computed with
    path: list[list[Row]]
    expected: Tensor


def run(searches, *, student_bn="train", search_bn="eval", count=6, supp_dict=None, **options):
    """One step of a box, and the formula on the examples that it found."""
    label_free = options.get("label_free", False)
    x, y = batch(count)
    box = box_of(student_bn=student_bn, search_bn=search_bn, **options)
    student = copy.deepcopy(box.org_student_model)
    loss = box.forward_process(x, None if label_free else y, supp_dict)
    examples, paired = [found for _, found in searches] if len(searches) == 2 else (searches[0][1], None)
    teacher = copy.deepcopy(box.org_teacher_model).eval()
    with torch.no_grad():
        teacher_clean = teacher(x)
        y = teacher_clean.argmax(1) if label_free else y
        others, paired_y = x, y
        if paired is not None and supp_dict is None:
            partners = partners_of(paired, x)
            others, paired_y = x[partners], y[partners]
            assert (paired_y != y).all()
        elif paired is not None:
            others, paired_y = supp_dict["paired_image"], supp_dict["paired_label"]
        teacher_paired = teacher(others)
    student_clean = student.train()(x)
    # a search that moves the running statistics is not made again here
    statistics = box.org_student_model if search_bn == "train" else student
    path = []
    for i in range(1 if examples.path is None else len(examples.path)):
        rows = on_path(examples, i)
        both = rows if paired is None else torch.cat([rows, on_path(paired, i)])
        logits = logits_of(student, both, student_bn, statistics)
        # without a second path nothing of x' counts
        on_rows, on_paired = logits[: len(rows)], logits[len(both) - count :]
        seen = teacher(rows).detach()
        known = (y.tolist(), paired_y.tolist(), teacher_clean, teacher_paired)
        path.append(
            [Row(*(v[j] for v in known), seen[k], on_rows[k], on_paired[j]) for k, j in enumerate(examples.index)]
        )
    mathematical = {name: v for name, v in options.items() if name in darwin.__kwdefaults__}
    expected = options.get("weight", 1) * darwin(
        list(zip(teacher_clean, student_clean, strict=True)), path, **mathematical
    )
    return Outcome(box, loss, student, path, expected)


def check(outcome):
    """Value and gradient are those of the formula in one graph."""
    assert abs(float(outcome.loss.detach()) - float(outcome.expected.detach())) < 1e-6
    outcome.loss.backward()
    outcome.expected.backward()
    for p, q in zip(outcome.box.org_student_model.parameters(), outcome.student.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in outcome.box.org_teacher_model.parameters())


PARTS = {
    f"parts={arkd:g},{iakd:g},{dbkd:g}": {"arkd_weight": arkd, "iakd_weight": iakd, "dbkd_weight": dbkd}
    for arkd, iakd, dbkd in itertools.product([0, 0.7], [0, 2], [0, 0.3])
    if arkd + iakd + dbkd
}
OPTIONS = {
    "defaults": {},
    **PARTS,
    "gamma=0": {"gamma": 0},
    "gamma=1": {"gamma": 1},
    "unweighted": {"weighted": False},
    "sums": {"average": False},
    "squared": {"distance": "squared"},
    "margin=0": {"margin": 0},
    "squared, margin=0.1": {"distance": "squared", "margin": 0.1},
    "beta=0": {"beta": 0},
    "beta=0, no triplets": {"beta": 0, "dbkd_weight": 0},
    "beta=5": {"beta": 5},
    "weight=0.3": {"weight": 0.3},
    "one step": {"adversary": steps(1)},
    "pairs of the data set": {"supp_dict": pairs(), "pairing": "dataset"},
    "pairs of the data set, unweighted": {"supp_dict": pairs(), "pairing": "dataset", "weighted": False},
    "label-free": {"label_free": True},
    "label-free, one path": {"label_free": True, "dbkd_weight": 0},
    "FGSM": {"adversary": "FGSM"},
    "SVGD": {"adversary": PARTICLES},
    "SVGD, one path": {"adversary": PARTICLES, "dbkd_weight": 0},
    "SVGD, pairs of the data set": {"adversary": PARTICLES, "supp_dict": pairs(), "pairing": "dataset"},
    "another second search": {"target_adversary": steps(3, step_size=0.05, start="none")},
    "another objective": {"objective": "kl_teacher_student"},
}


@pytest.mark.parametrize("options", list(OPTIONS.values()), ids=list(OPTIONS))
def test_value_and_gradient_are_those_of_the_formula(searches, options):
    outcome = run(searches, **options)
    assert len(searches) == (1 if options.get("dbkd_weight") == 0 else 2)
    check(outcome)


@pytest.mark.parametrize("student_bn, search_bn", list(itertools.product(["train", "batch", "eval"], repeat=2)))
def test_value_and_gradient_in_every_mode(searches, student_bn, search_bn):
    outcome = run(searches, student_bn=student_bn, search_bn=search_bn)
    check(outcome)
    if search_bn != "train":
        # both paths of a step were one batch, and the steps came in their order
        for name, buffer in outcome.box.org_student_model.named_buffers():
            assert torch.allclose(buffer, outcome.student.get_buffer(name)), name


@pytest.mark.parametrize("options", [{"dbkd_weight": 0}, {"supp_dict": pairs(1), "pairing": "dataset"}])
def test_one_image(searches, options):
    check(run(searches, count=1, **options))


def test_hinges_are_met_on_both_sides_and_weights_differ(searches):
    """Else the formula above would be compared on a part of its cases."""
    path = run(searches, margin=0.1).path
    found = torch.stack([torch.stack(hinges(row, 0.1, "kl")) for rows in path for row in rows])
    assert (found > 0).any(0).all() and (found < 0).any(0).all()
    gaps = [weights(0, 1, [(r.label, r.teacher_clean, r.student) for r in rows]) for rows in path]
    assert all(max(w) == 1 and min(w) < 0.7 for w in gaps)


def test_no_gap_anywhere_gives_a_finite_loss():
    """The weights' largest gap is 0 then."""
    teacher = sharp(1)
    student = copy.deepcopy(teacher)
    still = steps(2, step_size=0, start="none")
    box = box_of(student=student, teacher=teacher, student_bn="eval", gamma=1, adversary=still)
    student.eval()
    (loss := box.forward_process(*batch())).backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in student.parameters())


# the paths


def written_out(net, x, classes, sign, count, size, eps):
    """PGD in pixels from every image, with cross-entropy to ``classes``, in input space after each step."""
    center, std = (torch.tensor(NORMALIZE[name], dtype=torch.float64).view(2, 1, 1) for name in ("mean", "std"))
    clean = x * std + center
    pixels, found = clean, []
    for _ in range(count):
        leaf = pixels.clone().requires_grad_()
        losses = -net((leaf - center) / std).log_softmax(1)[range(len(x)), classes]
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        pixels = (pixels + sign * size * gradient.sign()).clamp(clean - eps, clean + eps).clamp(0, 1)
        found.append((pixels - center) / std)
    return torch.stack(found)


@pytest.mark.parametrize("pairing", ["batch", "dataset"])
def test_paths_are_pgd_from_x_and_from_x_prime_toward_the_class_of_x(searches, pairing):
    (x, y), supp_dict = batch(), pairs()
    second = steps(4, step_size=0.06, start="none")
    box = box_of(adversary=steps(4, step_size=0.06, start="none"), target_adversary=second, pairing=pairing)
    student = copy.deepcopy(box.org_student_model)
    box.forward_process(x, y, supp_dict)
    student.train()(x)
    (_, untargeted), (_, targeted) = searches
    others = x[partners_of(targeted, x)] if pairing == "batch" else supp_dict["paired_image"]
    for examples, start, sign in [(untargeted, x, 1), (targeted, others, -1)]:
        expected = written_out(student.eval(), start, y, sign, 4, 0.06, 0.2)
        assert torch.allclose(examples.path, expected, atol=1e-9)
        assert torch.equal(examples.rows, examples.path[-1]) and examples.index.tolist() == list(range(6))
        losses = [nn.functional.cross_entropy(student(rows), y) for rows in [start, *expected]]
        assert all(sign * (after - before) > 0 for before, after in itertools.pairwise(losses))


@pytest.mark.parametrize("adversary", [steps(3), PARTICLES, "FGSM"], ids=["PGD", "SVGD", "FGSM"])
def test_second_path_is_pgd_with_the_steps_of_the_first_one(searches, adversary):
    box = box_of(adversary=adversary, objective="kl_teacher_student")
    box.forward_process(*batch())
    (search, untargeted), (second, targeted) = searches
    expected = {"PGD": (3, 0.1), "SVGD": (3, 0.5), "FGSM": (1, 0.2)}[type(search.adversary).__name__]
    assert (second.adversary.num_steps, second.adversary.step_size) == expected
    assert isinstance(second.adversary, PGD) and second.adversary.targeted
    assert (second.threat, second.objective) == (search.threat, Objective.build("ce_student"))
    assert len(targeted.path) == expected[0] == (1 if untargeted.path is None else len(untargeted.path))


# pairs


def choose(binding, x, y, source, number=0):
    """Which image each is paired with in the step of that number."""
    binding.step_number = number
    made = Step(binding, x, y, None, {})
    chosen = made.choose(source)
    assert torch.equal(chosen.images, x[chosen.which])
    assert torch.equal(made.choose(source).which, chosen.which)
    assert torch.equal(source.own_classes(made), y[chosen.which])
    return chosen.which.tolist()


def test_pairs_are_of_another_class_any_alike_and_drawn_again_each_step():
    x, y = batch()[0], torch.tensor([0, 0, 0, 1, 1, 2])
    binding, source = box_of().adversarial_binding, Pairs("batch", False)
    drawn = [choose(binding, x, y, source, number) for number in range(600)]
    assert drawn[0] == choose(binding, x, y, source) != drawn[1]
    for i in range(6):
        counts = Counter(partners[i] for partners in drawn)
        candidates = [j for j in range(6) if y[j] != y[i]]
        assert sorted(counts) == candidates
        share = 1 / len(candidates)
        # four deviations of a binomial
        assert all(abs(c - 600 * share) < 4 * (600 * share * (1 - share)) ** 0.5 for c in counts.values())


# DARWIN-LF


def test_label_free_reads_no_label():
    x, y = batch()
    found = (None, y, y.roll(1), torch.full((6,), -7), "none", torch.rand(2, 3))
    losses = [box_of(label_free=True).forward_process(x, labels).detach() for labels in found]
    assert all(torch.equal(loss, losses[0]) for loss in losses)


def test_label_free_leaves_the_labels_to_the_terms_that_need_them():
    with pytest.raises(ConfigError, match=r"tald.criterion.kwargs needs int64 class numbers"):
        box_of(label_free=True, others={"tald": tald()}).forward_process(batch()[0], None)


def test_labels_are_checked_where_they_are_read():
    x, _ = batch()
    for options in [{}, {"dbkd_weight": 0}, {"dbkd_weight": 0, "iakd_weight": 0}]:
        with pytest.raises(ConfigError, match="class numbers"):
            box_of(**options).forward_process(x, None)
    free = {"dbkd_weight": 0, "weighted": False, "objective": "kl_teacher_student"}
    assert torch.isfinite(box_of(**free).forward_process(x, None))


# bad input

ALONE = {"arkd_weight": 0, "dbkd_weight": 0}
BOUNDARY = {"adversary": {"key": "BSS", "kwargs": {"num_steps": 3}}, "objective": "gap_teacher"}


@pytest.mark.parametrize(
    "options, path, found",
    [
        ({"gama": 1}, "gama", "did you mean 'gamma'"),
        ({"gamma": 1.5}, "gamma", "<= 1"),
        ({"beta": -1}, "beta", ">= 0"),
        ({"margin": -0.1}, "margin", ">= 0"),
        ({"dbkd_weight": "x"}, "dbkd_weight", "found 'x'"),
        ({"weighted": "no"}, "weighted", "true or false"),
        ({"average": 1}, "average", "true or false"),
        ({"label_free": "yes"}, "label_free", "true or false"),
        ({"distance": "l2"}, "distance", "kl, squared"),
        ({"pairing": "random"}, "pairing", "batch, dataset"),
        ({"label_free": True, "pairing": "dataset"}, "pairing", "pairs by labels"),
        ({**ALONE, "iakd_weight": 0}, "arkd_weight", "all three parts"),
        ({**ALONE, "adversary": steps(1)}, "adversary", "one step"),
        ({**ALONE, "adversary": "FGSM"}, "adversary", "one step"),
        ({"adversary": steps(3, targeted=True)}, "objective", "target class"),
        (BOUNDARY, "adversary", "path"),
        ({"adversary": {"key": "VirtualSVGD", "kwargs": {"num_steps": 3}}}, "adversary", "path"),
        ({"target_adversary": steps(2)}, "target_adversary.kwargs.num_steps", "num_steps: 3"),
        ({"target_adversary": {"key": "PGD", "kwargs": {"num_step": 3}}}, "target_adversary.kwargs.num_step", "steps"),
        ({"target_adversary": "FGSM"}, "target_adversary", "PGD block"),
        ({"target_adversary": PARTICLES}, "target_adversary", "one example an image"),
        ({"threat": {"eps": 0.1}}, "threat.mean", "normalize_kwargs"),
    ],
)
def test_bad_options_name_their_yaml_path(options, path, found):
    box = tiny_box({"darwin": block(**options)})
    with pytest.raises(ConfigError, match=found) as error:
        box.pre_epoch_process(epoch=0)
    assert error.value.path == f"{TERM}.{path}"


@pytest.mark.parametrize("label_free, found", [(False, "6 images of one class"), (True, "the teacher gives one class")])
def test_batch_of_one_class_has_no_pairs(label_free, found):
    x, y = batch()
    one_class = (x[:1].expand_as(x), y) if label_free else (x, torch.zeros_like(y))
    with pytest.raises(ConfigError, match=found) as error:
        box_of(label_free=label_free).forward_process(*one_class)
    assert error.value.path == f"{TERM}.pairing"
    assert torch.isfinite(box_of(label_free=label_free, dbkd_weight=0).forward_process(*one_class))


@pytest.mark.parametrize("missing", ["paired_image", "paired_label", "none", "last image"])
def test_missing_pairs_name_the_wrapper(missing):
    supp_dict = {name: v for name, v in pairs().items() if name != missing}
    supp_dict = {"none": None, "last image": {**pairs(), **pairs(5)}}.get(missing, supp_dict)
    with pytest.raises(ConfigError, match="PairWithOtherClass") as error:
        box_of(pairing="dataset").forward_process(*batch(), supp_dict)
    assert error.value.path == f"{TERM}.pairing"

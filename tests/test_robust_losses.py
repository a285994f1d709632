"""Values, gradients and searches of the robust-distillation losses against formulas in slow loops."""

from __future__ import annotations

import copy

import pytest
import torch
from robust import (
    EPOCHS,
    FORMULAS,
    PARTICLES,
    TWO_STEPS,
    WHOLE,
    WIDE,
    Row,
    TwoTeachers,
    batch,
    block,
    box_of,
    is_wrong,
    sharp,
)
from tiny import KD, NORMALIZE, images, term, tiny_box, train_config, with_side
from torch import nn
from torchdistill.core.distillation import get_distillation_box

from torchdistill_adv.step import Step

# what changes the mathematics; in epoch 2 introspection has begun if begin_epoch is 2, and has not if it is 3
OPTIONS = {
    "PGDATLoss": [{}],
    "TRADESLoss": [{}, {"beta": 0}, {"beta": 1.5}],
    "ARDLoss": [{}, {"alpha": 0}, {"alpha": 0.3, "temperature": 2}],
    "RSLADLoss": [{}, {"alpha": 0}, {"alpha": 1}, {"alpha": 0.3}],
    "AdaADLoss": [{}, {"alpha": 0, "temperature": 3}, {"alpha": 0.3, "temperature": 30}],
    "AdaIADLoss": [
        {"begin_epoch": begin, "weigh_teacher": weigh, **others}
        for begin in (2, 3)
        for weigh in (False, True)
        for others in ({}, {"temperature": 2, "beta": 1})
    ],
    "IADLoss": [
        {"variant": variant, "begin_epoch": begin, "weigh_teacher": weigh, **others}
        for variant in ("I", "II")
        for begin in (2, 3)
        for weigh in (False, True)
        for others in ({}, {"temperature": 2, "beta": 1})
    ],
    "AKDLoss": [{}, {"teacher_share": 0}, {"teacher_share": 1}, {"teacher_share": 0.2}],
    "AKD2Loss": [{}, {"standard_weight": 0}, {"robust_weight": 0.5, "standard_weight": 0.5, "temperature": 1}],
    "IGDMLoss": [{}, {"ramp": False}],
    "DGADLoss": [{}, {"beta": 0}, {"beta": 20}],
    "GACDLoss": [{}, {"temperature": 1, "ce_weight": 0}, {"ce_weight": 3}],
    "CRDNDLoss": [{}, {"relation_weight": 0}, {"relation_weight": 5, "temperature": 2}],
}

every_loss = pytest.mark.parametrize("key, options", WHOLE.values(), ids=WHOLE)


# values


def rows_of(box, before, x, y, examples, student_bn):
    """The rows of the step that ``box`` has made, from copies of its networks; ``before`` is the student before it."""
    teacher = copy.deepcopy(box.org_teacher_model).eval()
    # once host and searches are through, nothing moves the running statistics that eval mode reads
    student = copy.deepcopy(box.org_student_model).train(student_bn != "eval")
    index, mirrored = examples.index, 2 * x[examples.index] - examples.rows
    with torch.no_grad():
        logits = [teacher(x)[index], before.train()(x)[index], teacher(examples.rows), student(examples.rows)]
        logits += [teacher.standard(examples.rows), teacher(mirrored), student(mirrored)]
    columns = [index, y[index], *logits]
    return [Row(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def step_on(searches, *blocks, count=6, student_bn="batch", epoch=2):
    """Value and rows of the first step of a box with terms of one search."""
    x, y = batch(count)
    box = box_of(*blocks, epoch=epoch)
    before = copy.deepcopy(box.org_student_model)
    value = float(box.forward_process(x, y).detach())
    ((search, examples),) = searches
    assert examples.index.tolist() == list(range(count)) * search.adversary.num_rows
    return value, rows_of(box, before, x, y, examples, student_bn)


def check_value(searches, key, options, count=6, student_bn="batch", epoch=2, **common):
    term_block = block(key, **{**WIDE, **options, **common}, student_bn=student_bn)
    value, rows = step_on(searches, term_block, count=count, student_bn=student_bn, epoch=epoch)
    assert abs(value - FORMULAS[key](rows, epoch, EPOCHS, **options)) < 1e-10
    return rows


@pytest.mark.parametrize("key, options", [(key, options) for key in OPTIONS for options in OPTIONS[key]])
def test_value_is_the_formula(searches, key, options):
    check_value(searches, key, options)


@pytest.mark.parametrize(
    "student_bn, search_bn, adversary",
    [
        *((bn, "eval", adversary) for bn in ("train", "batch", "eval") for adversary in (TWO_STEPS, PARTICLES)),
        # only a student in eval mode reads the statistics that a search in train mode has moved
        ("eval", "batch", TWO_STEPS),
        ("eval", "train", TWO_STEPS),
    ],
    ids=lambda value: value["key"] if isinstance(value, dict) else value,
)
@every_loss
def test_value_in_every_mode_is_the_formula(searches, key, options, student_bn, search_bn, adversary):
    check_value(searches, key, options, student_bn=student_bn, search_bn=search_bn, adversary=adversary)


@pytest.mark.parametrize("epoch", range(EPOCHS))
@pytest.mark.parametrize(
    "key, options", [("IGDMLoss", {}), ("AdaIADLoss", {"begin_epoch": 1}), ("IADLoss", {"begin_epoch": 3})]
)
def test_schedules_follow_the_epoch(searches, key, options, epoch):
    check_value(searches, key, options, epoch=epoch)


@pytest.mark.parametrize("key, options", [("IGDMLoss", {}), ("AdaIADLoss", {"begin_epoch": 1})])
def test_schedules_count_the_epochs_of_the_stage(searches, key, options):
    first = {**train_config({"kd": KD}), "num_epochs": 3}
    second = {**train_config({"term": block(key, **WIDE, **options)}), "num_epochs": 2}
    networks, data = (TwoTeachers().double(), sharp(2).double()), tiny_box({"kd": KD}).dataset_dict
    config = {"stage1": first, "stage2": second}
    box = get_distillation_box(*networks, data, config, torch.device("cpu"), None, False, 1)
    x, y = batch()
    for epoch in range(5):
        box.pre_epoch_process(epoch=epoch)
        if epoch >= 3:
            before = copy.deepcopy(box.org_student_model)
            value = float(box.forward_process(x, y).detach())
            rows = rows_of(box, before, x, y, searches[-1][1], "train")
            assert abs(value - FORMULAS[key](rows, epoch - 3, 2, **options)) < 1e-10
        box.post_epoch_process()


@every_loss
def test_value_for_one_image_is_the_formula(searches, key, options):
    check_value(searches, key, options, count=1)


def test_dgad_is_tried_on_every_kind_of_mistake(searches):
    rows = check_value(searches, "DGADLoss", {})
    mistakes = {(is_wrong(r.teacher_clean, r.label), is_wrong(r.teacher, r.label)) for r in rows}
    assert mistakes >= {(False, False), (False, True), (True, True)}


@pytest.mark.parametrize("key", ["PGDATLoss", "TRADESLoss"])
def test_value_needs_no_teacher(key):
    values = [box_of(block(key), teacher=teacher).forward_process(*batch()) for teacher in (TwoTeachers, None)]
    assert torch.equal(*values)


def test_terms_with_one_search_add_up(searches):
    blocks = block("RSLADLoss", **WIDE), block("IGDMLoss", **WIDE, objective="kl_clean_teacher_student")
    value, rows = step_on(searches, *blocks, student_bn="train")
    assert abs(value - sum(FORMULAS[key](rows, 2, EPOCHS) for key in ("RSLADLoss", "IGDMLoss"))) < 1e-10


# gradients


@every_loss
def test_gradient_is_that_of_finite_differences(searches, monkeypatch, key, options):
    x, y = batch()
    box = box_of(block(key, **WIDE, **options, student_bn="eval"), bn=False)
    box.forward_process(x, y)
    ((_, examples),) = searches
    # the examples depend on the weights too, but a loss takes them as given
    monkeypatch.setattr(Step, "_run", lambda self, search, term: examples)
    weight = box.org_student_model[-1].weight
    (gradient,) = torch.autograd.grad(box.forward_process(x, y), weight)
    assert gradient.abs().max() > 1e-3
    for i, j in [(0, 0), (2, 5), (4, 1)]:
        values = []
        for shift in (1e-5, -1e-5):
            with torch.no_grad():
                weight[i, j] += shift
                values.append(float(box.forward_process(x, y)))
                weight[i, j] -= shift
        assert abs((values[0] - values[1]) / 2e-5 - float(gradient[i, j])) < 1e-7


@every_loss
def test_only_the_student_gets_a_gradient(key, options):
    networks = TwoTeachers(), sharp(2)
    box = with_side({"term": block(key, **WIDE, **options)}, networks, teacher={"requires_grad": True})
    box.forward_process(*images()).backward()
    assert all(p.requires_grad and p.grad is None for p in box.org_teacher_model.parameters())
    assert box.org_student_model[-1].weight.grad.abs().sum() > 0


@every_loss
def test_student_that_says_nothing_gets_a_sane_gradient(key, options):
    """A last layer that starts at zero is common, and its logits have no direction."""
    box = box_of(block(key, **WIDE, **options))
    student = box.org_student_model
    nn.init.zeros_(student[-1].weight), nn.init.zeros_(student[-1].bias)
    box.forward_process(*batch()).backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e3 for p in student.parameters())


# searches

MEAN, STD = (torch.tensor(NORMALIZE[name], dtype=torch.float64).view(1, 2, 1, 1) for name in ("mean", "std"))


def divergence(p, q):
    return (p * (p / q).log()).sum(1)


def entropy(target, p):
    return -(target * p.log()).sum(1)


# the start, and what is maximised: of the probabilities S(x'), T(x'), S(x), T(x), and of the label
SEARCHES = {
    "PGDATLoss": ("gaussian", lambda s, t, s0, t0, y: entropy(y, s)),
    "TRADESLoss": ("gaussian", lambda s, t, s0, t0, y: divergence(s0, s)),
    "ARDLoss": ("uniform", lambda s, t, s0, t0, y: entropy(y, s)),
    "RSLADLoss": ("gaussian", lambda s, t, s0, t0, y: divergence(t0, s)),
    "AdaADLoss": ("gaussian", lambda s, t, s0, t0, y: divergence(t, s)),
    "AdaIADLoss": ("gaussian", lambda s, t, s0, t0, y: divergence(t, s)),
    "IADLoss": ("uniform", lambda s, t, s0, t0, y: entropy(y, s)),
    "AKDLoss": ("gaussian", lambda s, t, s0, t0, y: entropy((y + t0) / 2, s)),
    "AKD2Loss": ("uniform", lambda s, t, s0, t0, y: entropy(y, s)),
    "IGDMLoss": ("gaussian", lambda s, t, s0, t0, y: divergence(t, s)),
    "DGADLoss": ("gaussian", lambda s, t, s0, t0, y: divergence(t, s)),
    "GACDLoss": ("gaussian", lambda s, t, s0, t0, y: entropy(y, s)),
    "CRDNDLoss": ("gaussian", lambda s, t, s0, t0, y: divergence(t0, s)),
}


def plain_objective(box, x, y, formula):
    """What the first search of ``box`` is to maximise, of rows in pixels, on copies of the networks."""
    teacher, student = copy.deepcopy(box.org_teacher_model).eval(), copy.deepcopy(box.org_student_model)
    student.train()(x)  # the host's own pass comes first
    student.eval()
    labels, clean = nn.functional.one_hot(y, 5).double(), x * STD + MEAN

    def objective(rows):
        logits = [net((v - MEAN) / STD) for v in (rows, clean) for net in (student, teacher)]
        return formula(*(z.exp() / z.exp().sum(1, keepdim=True) for z in logits), labels)

    return objective


def limited(rows, clean):
    return rows.clamp(clean - 8 / 255, clean + 8 / 255).clamp(0, 1)


def plain_start(box, x, kind):
    """Where the first search of ``box`` is to start, in pixels."""
    noise = box.adversarial_binding.noise_for(term(box, "term0").search, x)
    shift = 0.001 * noise.normal(x.shape) if kind == "gaussian" else 8 / 255 * noise.uniform(x.shape)
    return limited(x * STD + MEAN + shift, x * STD + MEAN)


def plain_search(objective, rows, clean):
    """The papers' search: ten steps of 2/255 along the sign in a ball of 8/255."""
    for _ in range(10):
        leaf = rows.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(leaf).sum(), leaf)
        rows = limited(rows + 2 / 255 * gradient.sign(), clean)
    return rows


@pytest.mark.parametrize("key", SEARCHES)
def test_search_of_the_papers_is_the_default(searches, key):
    kind, formula = SEARCHES[key]
    x, y = batch()
    begin = {"begin_epoch": 0} if key in ("IADLoss", "AdaIADLoss") else {}
    box = box_of(block(key, **begin))
    start, objective = plain_start(box, x, kind), plain_objective(box, x, y, formula)
    box.forward_process(x, y)
    ((_, examples),) = searches
    expected = (plain_search(objective, start, x * STD + MEAN) - MEAN) / STD
    assert (examples.rows - expected).abs().max() < 1e-10


@pytest.mark.parametrize("seed", range(8))
def test_search_of_adaad_raises_the_divergence(searches, seed):
    x, y = batch(seed=seed)
    box = box_of(block("AdaADLoss"))
    start, objective = plain_start(box, x, "gaussian"), plain_objective(box, x, y, SEARCHES["AdaADLoss"][1])
    box.forward_process(x, y)
    ((_, examples),) = searches
    assert objective(examples.rows * STD + MEAN).mean() > objective(start).mean()


def test_search_bn_says_which_statistics_the_search_reads_and_moves(searches):
    adversary = {"key": "PGD", "kwargs": {"num_steps": 3, "start": "none", "return_path": True}}
    x, y = batch()
    rows = {}
    for search_bn in ("train", "batch", "eval"):
        box = box_of(block("RSLADLoss", adversary=adversary, student_bn="eval", search_bn=search_bn))
        replayed = copy.deepcopy(box.org_student_model).train()
        box.forward_process(x, y)
        examples = searches[-1][1]
        rows[search_bn] = examples.rows
        # the host's pass, and then one on every iterate that a step starts from
        for inputs in [x, *((x, *examples.path[:-1]) if search_bn == "train" else ())]:
            replayed(inputs)
        for name, buffer in box.org_student_model.named_buffers():
            assert torch.equal(buffer, replayed.get_buffer(name)), (search_bn, name)
    assert torch.equal(rows["train"], rows["batch"]) and not torch.equal(rows["train"], rows["eval"])

"""Mixed precision, gradient accumulation, layout and compilation: every loss against the same one computed plainly."""

from __future__ import annotations

import copy
import math
from itertools import islice
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from contract import LOSSES, ROWS, TwoTeachers, batch_for, pairs
from support import CONFIGS, load_config, make_box
from test_contract import begin, block_of, gradient_of
from tiny import CE, KD, bound, images, matching, network, on_adversarial, step, tald, tiny_box, train_config
from torch import nn
from torch.utils._pytree import tree_flatten
from torchdistill.common.main_util import set_seed
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.interfaces.registry import register_post_forward_proc_func

from torchdistill_adv import attribution
from torchdistill_adv.adversaries import common
from torchdistill_adv.divergences import margin
from torchdistill_adv.errors import ConfigError, NonFiniteError
from torchdistill_adv.guards import eval_mode
from torchdistill_adv.losses import base, darwin
from torchdistill_adv.runner.precision import DTYPES, Passes, set_grad_accum_step
from torchdistill_adv.runner.processes import Place
from torchdistill_adv.step import Step
from torchdistill_adv.twins import SearchPasses

CPU = Place(torch.device("cpu"))
HOST = {"kd": KD, "ce": CE}

in_half = pytest.mark.parametrize("amp", list(DTYPES))


def passes(amp=None, channels_last=False, compile=False):
    return Passes(CPU, amp, channels_last, compile)


def losses_of(box, how, steps=3):
    """The loss of some steps, and the student's weights after them."""
    found = []
    for i in range(steps):
        x, y = images(6, seed=i)
        with how.forward(box):
            loss = box.forward_process(how.batch(x), y, pairs(y))
        found.append(float(loss.detach()))
        how.step(box, loss)
    student = getattr(box, "org_student_model", None) or box.org_model
    return found, [p.detach().clone() for p in student.parameters()]


class HalfInside(nn.Module):
    """A network that is passed in half precision by itself, among float32 everywhere else."""

    def __init__(self, network, dtype):
        super().__init__()
        self.network, self.dtype, self.enabled = network, dtype, True

    def forward(self, x):
        with torch.autocast("cpu", self.dtype, enabled=self.enabled):
            return self.network(x).float()


def networks_of(name):
    robust = network(2) if name == "BSSLoss" else network(1, width=8)
    return network(2), TwoTeachers(robust, network(3, width=8))


@pytest.mark.parametrize(("amp", "name"), [*(("bf16", name) for name in ROWS), *(("fp16", name) for name in LOSSES)])
def test_only_the_networks_are_in_half_precision(name, amp, monkeypatch):
    """Bit for bit, the loss is that of float32 around networks in half precision; so the examples are too.

    Of logits that several terms read, PyTorch adds the gradients in half precision, a few roundings of the result.
    """
    # that is a power of two, which would change nothing but what vanishes
    for module in (common, darwin):
        monkeypatch.setattr(module, "gradient_scale", lambda device_type: 1.0)
    x, y = batch_for(name, *reversed(networks_of(name)))

    def run(student, teacher, how):
        box = begin(name, others=HOST.items(), student=student, teacher=teacher)
        with how.forward(box):
            loss = box.forward_process(x, y, pairs(y))
        loss.backward()
        return loss.detach(), gradient_of(student)

    student, teacher = networks_of(name)
    with monkeypatch.context() as patch:
        # auto would search in float32 for TALD and TRADES
        precision = str(DTYPES[amp]).removeprefix("torch.")
        patch.setitem(base.COMMON, "search", SearchPasses(precision, False, False, False))
        loss, gradient = run(student, teacher, passes(amp))
    student, teacher = networks_of(name)
    parts = {"robust": teacher.robust, "standard": teacher.standard}
    halves = [HalfInside(net, DTYPES[amp]) for net in (student, *parts.values())]
    wrapped = halves[0], TwoTeachers(*halves[1:])
    for net in halves:
        net.enabled = False
    for net in wrapped:
        # found in float32, with or without autocast
        attribution.layout_of(net, x, None, "")
    for net in halves:
        net.enabled = True
    expected, expected_gradient = run(*wrapped, passes())
    assert loss.dtype == torch.float32 and gradient.abs().sum() > 0
    assert torch.equal(loss, expected)
    rounding = torch.finfo(DTYPES[amp]).eps / 2
    assert (gradient - expected_gradient).norm() <= 2 * rounding * expected_gradient.norm()


def rounded_at_random(network, eps, seed):
    """Every layer's output off by ``eps`` of itself, one way or the other; the gradients through it too."""
    generator = torch.Generator().manual_seed(seed)

    def off(module, inputs, output):
        if isinstance(output, torch.Tensor):
            signs = torch.randint(2, output.shape, generator=generator) * 2 - 1
            return output * (1 + eps * signs)
        return output

    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(off)


def distances(first, second):
    """Between two losses and between two gradients."""
    return abs(first[0] - second[0]), float((first[1] - second[1]).norm())


@pytest.mark.parametrize("name", LOSSES)
@in_half
def test_agrees_with_float32_as_far_as_the_passes_are_exact(name, amp, monkeypatch):
    """On the same examples: about as far off as with every layer's output rounded at random."""
    x, y = batch_for(name, *reversed(networks_of(name)))
    found, run_search = {}, Step._run
    monkeypatch.setattr(Step, "_run", lambda self, s, term: found.setdefault(s.identity, run_search(self, s, term)))

    def run(how, seed=None):
        student, teacher = networks_of(name)
        box = begin(name, others=HOST.items(), student=student, teacher=teacher)
        if seed is not None:
            for net in (student, teacher):
                rounded_at_random(net, torch.finfo(DTYPES[amp]).eps / 2, seed)
        with how.forward(box):
            loss = box.forward_process(x, y, pairs(y))
        loss.backward()
        return float(loss.detach()), gradient_of(student)

    exact = run(passes())
    off, gradient_off = map(max, zip(*(distances(run(passes(), seed), exact) for seed in range(3)), strict=True))
    half_off, half_gradient_off = distances(run(passes(amp)), exact)
    assert 0 < half_off <= 2 * off
    # a ReLU that flips is one rounding, and a gradient that is there or not
    assert half_gradient_off <= 4 * gradient_off < exact[1].norm() / 4


def test_examples_are_found_in_float32(monkeypatch):
    found, run_search = [], Step._run

    def spy(self, search, term):
        examples = run_search(self, search, term)
        found.append((search.threat, examples.rows, self.choose(search.source).images[examples.index]))
        return examples

    monkeypatch.setattr(Step, "_run", spy)
    adversary = {"key": "PGD", "kwargs": {"num_steps": 2, "step_size": "8/255"}}
    for box in (begin("PGDATLoss", adversary=adversary), begin("TALDLoss")):
        how = passes("bf16")
        with how.forward(box):
            box.forward_process(*images())
    assert len(found) == 2
    for threat, rows, clean in found:
        assert rows.dtype == torch.float32
        # to the edge of the ball, up to the rounding of float32 and not of bfloat16
        assert math.isclose(float(threat.distance(rows, clean).max()), threat.eps, rel_tol=1e-5)


def test_a_search_in_float16_sees_gradients_that_float16_cannot_hold():
    """Of a network that is sure: its gradient in the image is far below 6e-8."""
    net = network(2).eval()
    with torch.no_grad():
        net[-1].bias[0] = 16.0
    x, _ = images()
    y = torch.zeros(len(x), dtype=torch.int64)

    def objective(rows, index):
        return F.cross_entropy(net(rows).float(), y[index], reduction="none")

    expected = common.input_gradient(objective, x, torch.arange(len(x)))
    with torch.autocast("cpu", torch.float16):
        found = common.input_gradient(objective, x, torch.arange(len(x)))
    assert 0 < expected.abs().max() < 6e-8
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_a_margin_is_not_rounded_to_half_precision():
    """256 and 255 are numbers of bfloat16, and so is 0.5; their difference with it is none."""
    logits = torch.tensor([[0.5, 256.0], [0.5, 255.0]], dtype=torch.bfloat16)
    assert margin(logits, torch.zeros(2, dtype=torch.int64)).tolist() == [255.5, 254.5]


def test_torchdistill_s_losses_are_in_float32():
    terms = {"kd": {**KD, "criterion": {**KD["criterion"], "kwargs": {**KD["criterion"]["kwargs"], "alpha": 0.0}}}}
    terms["features"] = matching("2")
    box, x, y = bound(terms, teacher=network(1), hooks={"output": ["2"]}), *images()
    how = passes("bf16")
    with how.forward(box):
        loss = box.forward_process(x, y)
    half = {}
    for name, net in (("student", box.org_student_model.train()), ("teacher", box.org_teacher_model.train())):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            half[name] = net[:3](x).double(), net(x).double()
    (s_map, s), (t_map, t) = half["student"], half["teacher"]
    # at alpha 0 it is the divergence alone
    p, q = (t / 4).softmax(1), (s / 4).softmax(1)
    expected = (p * (p / q).log()).sum(1).mean() + (s_map - t_map).square().mean()
    assert loss.dtype == torch.float32 and torch.isclose(loss.double(), expected, rtol=1e-6)
    # the loss is itself again outside
    assert "forward" not in box.criterion.term_dict["kd"][0].__dict__


class Heads(NamedTuple):
    logits: torch.Tensor
    aux_logits: torch.Tensor


class SeveralOutputs(nn.Module):
    def __init__(self, pack):
        super().__init__()
        self.network, self.pack = network(2), pack

    def forward(self, x):
        return self.pack(self.network(x), self.network[:3](x))


class Looking(nn.Module):
    """A loss of the user's own, which keeps what it was given."""

    def forward(self, student_io_dict, teacher_io_dict, targets):
        self.seen = student_io_dict["."]["output"]
        return torch.zeros((), requires_grad=True)


@pytest.mark.parametrize(
    "pack",
    [Heads, lambda a, b: (a, b), lambda a, b: [a, (b,)], lambda a, b: {"logits": a, "features": [{"maps": b}]}],
    ids=["named tuple", "tuple", "list", "dictionary"],
)
def test_outputs_of_several_parts_are_in_float32_and_as_they_were(pack):
    found = []
    for how in (passes(), passes("bf16", channels_last=True)):
        student, looking = SeveralOutputs(pack), Looking()
        how.prepare(student)
        box = bound({"looking": {"criterion": looking, "weight": 1.0}}, student=student)
        losses_of(box, how, steps=1)
        leaves, structure = tree_flatten(looking.seen)
        assert {(leaf.dtype, leaf.is_contiguous()) for leaf in leaves} == {(torch.float32, True)}
        found.append((structure, [leaf.shape for leaf in leaves]))
    assert found[0] == found[1]


# the loss is scaled


def linear_box(**optimizer):
    """A student whose gradient is of the size of its images, and its optimizer."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(72, 5))
    options = {"key": "SGD", "kwargs": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}, **optimizer}
    box = tiny_box({"ce": CE}, student=student, teacher=None, optimizer=options)
    box.pre_epoch_process(epoch=0)
    return box


def train_step(box, how, scale=1.0):
    x, y = images()
    with how.forward(box):
        loss = box.forward_process(x, y)
    how.step(box, loss * scale)


@pytest.mark.parametrize("max_grad_norm", [None, 100.0, 0.5])
def test_a_step_has_the_true_gradient(max_grad_norm):
    weights = []
    for amp in (None, "fp16"):
        box = linear_box(max_grad_norm=max_grad_norm)
        before = gradientless(box)
        train_step(box, passes(amp))
        assert box.accelerator is None
        weights.append(gradientless(box) - before)
    assert (weights[0] - weights[1]).norm() < 2e-3 * weights[0].norm()


def gradientless(box):
    return torch.cat([p.detach().flatten().clone() for p in box.org_model.parameters()])


def test_small_gradients_do_not_vanish():
    """The same gradient, a millionth as large: float16 has none that small."""
    found = []
    for amp, scale in (("fp16", 1.0), ("fp16", 1e-6)):
        box = linear_box(kwargs={"lr": 1.0 / scale})
        before = gradientless(box)
        train_step(box, passes(amp), scale)
        found.append(gradientless(box) - before)
    assert (found[0] - found[1]).norm() < 1e-2 * found[0].norm()


def test_infinite_gradients_change_nothing_but_the_scale(caplog):
    box, how = linear_box(), passes("fp16")
    train_step(box, how)
    before = gradientless(box), copy.deepcopy(box.optimizer.state_dict())
    # 6e4 is the most that float16 has
    train_step(box, how, 1e4)
    assert how.scaler.get_scale() == 2**15
    assert torch.equal(gradientless(box), before[0])
    after = box.optimizer.state_dict()["state"]
    for key, state in before[1]["state"].items():
        assert torch.equal(state["momentum_buffer"], after[key]["momentum_buffer"])
    train_step(box, how)
    assert not torch.equal(gradientless(box), before[0])


def test_gradients_that_stay_infinite_end_training():
    box, how = linear_box(), passes("fp16")
    box.org_model[1].weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(NonFiniteError, match=r"loss scale of 1;.*bf16"):
        for _ in range(20):
            train_step(box, how)
    assert how.scaler.get_scale() == 0.5


def test_a_large_loss_trains_once_the_scale_fits():
    box, how = linear_box(), passes("fp16")
    before = gradientless(box)
    for _ in range(12):
        train_step(box, how, 1e3)
    assert how.scaler.get_scale() < 2**12 and not torch.equal(gradientless(box), before)


def test_infinite_batches_of_an_accumulated_step_are_left_out_with_it():
    box, how = linear_box(grad_accum_step=2), passes("fp16")
    before = gradientless(box)
    train_step(box, how, 1e4)
    assert how.scaler.get_scale() == 2**16
    train_step(box, how)
    assert how.scaler.get_scale() == 2**15 and torch.equal(gradientless(box), before)
    expected = linear_box(grad_accum_step=2)
    for trained, arithmetic in ((box, how), (expected, passes())):
        for _ in range(2):
            train_step(trained, arithmetic)
    assert torch.allclose(gradientless(box), gradientless(expected), atol=1e-3)


def test_the_scale_is_kept():
    box, how = linear_box(), passes("fp16")
    train_step(box, how, 1e4)
    again = passes("fp16")
    again.load_state_dict(how.state_dict())
    assert again.state_dict() == how.state_dict() and again.scaler.get_scale() == 2**15
    again.load_state_dict(passes("bf16").state_dict())
    assert again.scaler.get_scale() == 2**15


def test_step_wise_schedulers_step_without_a_warning(recwarn):
    scheduler = {"key": "StepLR", "kwargs": {"step_size": 1, "gamma": 0.5}, "scheduling_step": 1}
    box = tiny_box({"ce": CE}, teacher=None, scheduler=scheduler)
    box.pre_epoch_process(epoch=0)
    how = passes("fp16")
    train_step(box, how, 1e6)
    train_step(box, how)
    assert box.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 4)
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


@register_post_forward_proc_func
def own_backward_for_test(self, loss, **kwargs):
    loss.backward()
    self.optimizer.step()


@register_post_forward_proc_func
def accelerated_for_test(self, loss, **kwargs):
    self.accelerator.backward(loss)
    self.optimizer.step()
    self.optimizer.zero_grad()


def test_a_process_of_the_user_s_own():
    box = tiny_box({"ce": CE}, teacher=None, post_forward_process="own_backward_for_test")
    box.pre_epoch_process(epoch=0)
    train_step(box, passes("bf16"))
    with pytest.raises(ConfigError, match="accelerator") as error:
        train_step(box, passes("fp16"))
    assert error.value.path == "train.post_forward_process"
    box = tiny_box({"ce": CE}, teacher=None, post_forward_process="accelerated_for_test")
    box.pre_epoch_process(epoch=0)
    train_step(box, passes("fp16"))


# batches that are accumulated


# what these compute over the whole batch is not that of its parts: pairs of images of a batch, the largest weight in
# it, which images are used, similarities between the images, one kernel
OVER_THE_BATCH = {"DARWINLoss", "DARWINLoss-batch", "DARWINLoss-LF", "BSSLoss", "GACDLoss", "CRDNDLoss"}


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in OVER_THE_BATCH])
def test_accumulated_batches_are_one_large_batch(name):
    """Weights after the step of six batches of two and of one batch of twelve; nothing is drawn at random."""
    x, y = (values.double() if values.is_floating_point() else values for values in images(12))
    found = []
    for count in (1, 6):
        block = block_of(name)
        kwargs = block.get("criterion_wrapper", block["criterion"])["kwargs"]
        if name == "TALDLoss":
            kwargs["adversary"] = {"key": "SVGD", "kwargs": {"noise_factor": 0.0, "num_steps": 2}}
        else:
            kwargs["adversary"] = {"key": "PGD", "kwargs": {"num_steps": 2, "start": "none"}}
        config = {"grad_accum_step": 1, "key": "SGD", "kwargs": {"lr": 1.0}}
        changes = {"optimizer": config, "num_epochs": 4}
        set_grad_accum_step(changes, count)
        networks = TwoTeachers(network(1, bn=False), network(3, bn=False)), network(2, bn=False)
        sub_terms = {"kd": KD, "features": matching("2"), "term": block}
        hooks = {"teacher": ["robust.2"], "student": ["2"]}
        box = large_box(sub_terms, networks, hooks, **changes)
        for some, labels in zip(x.split(12 // count), y.split(12 // count), strict=True):
            step(box, some, labels, pairs(labels, torch.float64))
        found.append([p.detach().clone() for p in box.org_student_model.parameters()])
    start = network(2, bn=False).double()
    for one, several, before in zip(*found, start.parameters(), strict=True):
        assert torch.allclose(one, several, rtol=1e-9, atol=1e-12) and not torch.equal(one, before)


def large_box(sub_terms, networks, hooks, **changes):
    """A tiny box in float64 with hooks that differ between the sides."""
    teacher, student = networks
    terms = copy.deepcopy(sub_terms)
    for side, is_teacher in (("input", False), ("target", True)):
        terms["features"]["criterion_wrapper"]["kwargs"][side] = {
            "is_from_teacher": is_teacher,
            "module_path": hooks["teacher" if is_teacher else "student"][0],
            "io": "output",
        }
    data = tiny_box({"kd": KD}).dataset_dict
    config = train_config(terms, **changes)
    for side in ("teacher", "student"):
        config[side] |= {"forward_hook": {"output": hooks[side]}}
    common = (data, config, torch.device("cpu"), None, False, 1)
    box = get_distillation_box(teacher.double(), student.double(), *common)
    box.pre_epoch_process(epoch=0)
    return box


def test_grad_accum_step_of_every_stage_and_of_none():
    stages = {"stage1": {"optimizer": {"key": "SGD"}}, "stage2": {"optimizer": {}}, "stage3": {"optimizer": {"a": 1}}}
    set_grad_accum_step(stages, 3)
    assert [stage["optimizer"].get("grad_accum_step") for stage in stages.values()] == [3, None, 3]
    with pytest.raises(ConfigError, match="1 or more") as error:
        set_grad_accum_step(stages, 0)
    assert error.value.path == "--grad_accum_step"


# layout and compilation


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("digits/hosts/*.yaml")), ids=lambda path: path.stem)
def test_every_host_method(path):
    """The first loss is that of plain passes up to rounding, and the next one follows a step."""
    first = []
    for how in (passes(), passes(channels_last=True), passes("bf16", channels_last=True)):
        set_seed(0)
        config = load_config(path.relative_to(CONFIGS))
        box = make_box(config)
        how.prepare(box.org_teacher_model, box.org_student_model)
        box.pre_epoch_process(epoch=0)
        set_seed(0)
        losses = []
        for batch, targets, supp_dict in islice(box.train_data_loader, 2):
            with how.forward(box):
                loss = box.forward_process(how.batch(batch), targets, supp_dict)
            losses.append(float(loss.detach()))
            how.step(box, loss)
        assert all(math.isfinite(value) for value in losses)
        first.append(losses[0])
    plain, channels_last, half = first
    assert math.isclose(plain, channels_last, rel_tol=1e-5)
    assert plain != half and math.isclose(plain, half, rel_tol=2e-2)


class Flattening(nn.Module):
    """A host's loss that flattens a feature map by ``view``."""

    def forward(self, student_io_dict, teacher_io_dict, targets):
        return student_io_dict["2"]["output"].view(len(targets), -1).square().mean()


@pytest.mark.parametrize("name", LOSSES)
def test_channels_last(name):
    found = []
    for how in (passes(), passes(channels_last=True)):
        networks = networks_of(name)
        how.prepare(*networks)
        student, teacher = (net.double() for net in networks)
        assert student[0].weight.is_contiguous(memory_format=torch.channels_last) == how.channels_last
        x, y = batch_for(name, *reversed(networks_of(name)))
        box = tiny_box({**HOST, "term": block_of(name)}, student=student, teacher=teacher, num_epochs=4)
        box.pre_epoch_process(epoch=0)
        batch = how.batch(x.double())
        assert batch.is_contiguous(memory_format=torch.channels_last) == how.channels_last
        with how.forward(box):
            loss = box.forward_process(batch, y, pairs(y, torch.float64))
        loss.backward()
        found.append(torch.cat([loss.detach().view(1), gradient_of(student)]))
    assert torch.allclose(*found, rtol=1e-9, atol=1e-12)


def test_losses_that_flatten_by_view():
    found = []
    for how in (passes(), passes(channels_last=True)):
        student = network(2)
        how.prepare(student)
        box = bound(
            {"flattening": {"criterion": Flattening(), "weight": 1.0}}, student=student, hooks={"output": ["2"]}
        )
        losses, _ = losses_of(box, how)
        found.append(torch.tensor(losses))
    assert torch.allclose(*found, rtol=1e-5)


def test_batches_of_other_kinds_are_left_alone():
    views, tokens = torch.rand(2, 4, 3, 8, 8), {"ids": torch.ones(2, 3, dtype=torch.int64)}
    how = passes(channels_last=True)
    assert how.batch(views) is views and how.batch(tokens) is tokens


class InARow(nn.Sequential):
    """PyTorch 2.5 compiles no module whose forward is PyTorch's own."""

    def forward(self, x):
        for module in self:
            x = module(x)
        return x


@pytest.fixture
def eager_compiler(monkeypatch):
    """Everything of torch.compile but the machine code, which takes minutes."""
    compile = nn.Module.compile

    def compile_eagerly(self):
        self.__class__ = InARow
        compile(self, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    yield
    torch._dynamo.reset()


HOOKED = {"features": matching("2"), "ce": CE, "tald": tald(1.0), "adversarial": on_adversarial(matching("2"))}


@pytest.mark.parametrize(
    ("sub_terms", "how"),
    [
        (HOOKED, {}),
        ({"kd": KD, "smaraad": LOSSES["SmaraADLoss"]}, {}),
        ({"kd": KD, "darwin": LOSSES["DARWINLoss"]}, {"amp": "bf16", "channels_last": True}),
    ],
    ids=["hooks", "maps", "all_flags"],
)
def test_compiled_networks_train_like_others(sub_terms, how, eager_compiler):
    found = []
    for compile in (False, True):
        student, teacher = network(2), network(1)
        names = list(student.state_dict())
        arithmetic = passes(**how, compile=compile)
        arithmetic.prepare(teacher, student, None)
        box = bound(sub_terms, student=student, teacher=teacher, hooks={"output": ["2"]})
        losses, weights = losses_of(box, arithmetic, steps=2)
        # an epoch ends with validation, in eval mode and without gradients
        with torch.no_grad(), eval_mode(student):
            logits = student(images(4)[0])
        assert list(student.state_dict()) == names
        found.append([torch.tensor(losses), *weights, *(b.double() for b in student.buffers()), logits])
    counts = torch._dynamo.utils.counters["stats"]
    assert counts["unique_graphs"] >= 3
    assert all(map(torch.allclose, *found))


def test_hooks_of_the_next_stage_are_seen_by_a_compiled_network(eager_compiler):
    student = network(2)
    passes(compile=True).prepare(student)
    x, seen = images()[0], []
    student(x)
    with student[2].register_forward_hook(lambda module, inputs, output: seen.append(output.shape)):
        student(x)
    student(x)
    assert len(seen) == 1


def test_several_networks_are_compiled_in_every_mode(eager_compiler):
    """Beyond the eight graphs after which PyTorch by default compiles no more."""
    networks = [network(0, width=width) for width in (2, 3, 4)]
    passes(compile=True).prepare(*networks)
    counts, (x, _) = torch._dynamo.utils.counters["stats"], images()
    before = counts["unique_graphs"]
    for net in networks:
        for mode in (True, False):
            for with_graph in (True, False):
                with torch.set_grad_enabled(with_graph):
                    net.train(mode)(x)
    assert counts["unique_graphs"] - before == 12


def test_a_network_that_came_compiled_has_maps():
    net, (x, y) = network(2), images()
    expected = attribution.class_activation_maps(net, attribution.find_layout(net, x), x, y)
    compiled = torch.compile(net, backend="aot_eager")
    layout = attribution.layout_of(compiled, x, None, "")
    for a, b in zip(attribution.class_activation_maps(compiled, layout, x, y), expected, strict=True):
        assert torch.equal(a, b)
    layout = attribution.Layout("2")
    for a, b in zip(*(attribution.feature_maps(each, layout, x) for each in (compiled, net)), strict=True):
        assert torch.equal(a, b)


def test_a_loss_that_float16_cannot_hold_says_what_to_write():
    where = Place(torch.device("cpu"))
    box = tiny_box({"ce": CE}, teacher=None)
    for amp, hint in (("fp16", "write --amp bf16"), ("bf16", "")):
        with (
            pytest.raises(NonFiniteError, match=f"the loss is nan.*{hint}$"),
            Passes(where, amp, False, False).forward(box),
        ):
            raise NonFiniteError("the loss is nan")


def test_compile_without_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler") as error:
        Passes(Place(torch.device("cpu")), None, False, compile=True)
    assert error.value.path == "--compile"

"""What users do with boxes, batches, networks and settings, beyond the ordinary."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tiny import (
    CE,
    KD,
    L2_THREAT,
    bound,
    images,
    network,
    on_adversarial,
    step,
    tald,
    term,
    tiny_box,
    with_side,
)
from torch import nn
from torchdistill.core.interfaces.registry import register_forward_proc_func

from torchdistill_adv.adversaries import PGD
from torchdistill_adv.adversaries.svgd import svgd_direction
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.guards import on_cloned_buffers
from torchdistill_adv.losses import TALDLoss
from torchdistill_adv.objectives import OBJECTIVES, register_objective
from torchdistill_adv.registry import ADVERSARIES, register_adversary
from torchdistill_adv.threat import ThreatModel


def test_a_copied_box_trains_its_own_student():
    box = bound({"kd": KD, "tald": tald()})
    step(box, *images())
    twin = copy.deepcopy(box)
    twin.forward_process(*images()).backward()
    assert all(p.grad is not None for p in twin.org_student_model.parameters())
    # the optimizer has set the original's gradients to None
    assert all(p.grad is None for p in box.org_student_model.parameters())
    assert twin.adversarial_binding is not box.adversarial_binding
    for some in (box, twin):
        some.pre_epoch_process(epoch=1)
        step(some, *images())


def test_a_copied_or_pickled_loss_is_unbound(tmp_path):
    box = bound({"tald": tald()})
    torch.save(box.criterion, tmp_path / "criterion.pt")
    assert copy.deepcopy(box.criterion).term_dict["tald"][0].binding is None


def test_a_weight_may_change_between_epochs():
    box = bound({"kd": KD, "tald": tald(0.0)})
    x, y = images()
    step(box, x, y)
    assert box.org_teacher_model.training
    loss = term(box, "tald")
    box.criterion.term_dict["tald"] = (loss, 100.0)
    box.pre_epoch_process(epoch=1)
    seen = []
    loss.register_forward_hook(lambda module, inputs, output: seen.append(float(output.detach())))
    step(box, x, y)
    assert seen[0] > 0 and not box.org_teacher_model.training


@pytest.mark.parametrize("weight", ["1e-3", float("nan"), None, True])
def test_a_weight_that_is_no_number_is_refused(weight):
    box = tiny_box({"kd": KD, "tald": tald(weight)})
    with pytest.raises(ConfigError, match="finite number") as error:
        box.pre_epoch_process(epoch=0)
    assert error.value.path == "train.criterion.kwargs.sub_terms.tald.weight"


def test_one_loss_object_in_two_terms_is_refused():
    loss = TALDLoss(threat=L2_THREAT)
    terms = {name: {"criterion": loss, "weight": 1.0} for name in ("a", "b")}
    box = tiny_box(terms)
    with pytest.raises(ConfigError, match="one object in two places"):
        box.pre_epoch_process(epoch=0)


class Sum(nn.Module):
    """A user's high-level loss, with its terms as submodules or in a term_dict further down."""

    def __init__(self, terms, nested):
        super().__init__()
        if nested:
            self.inner = nn.Module()
            self.inner.term_dict = {name: (loss, 1.0) for name, loss in terms.items()}
        else:
            self.terms = nn.ModuleDict(terms)
        self.values = list(terms.values())

    def forward(self, io_dict, model_loss_dict, targets):
        return sum(loss(io_dict["student"], io_dict["teacher"], targets) for loss in self.values)


@pytest.mark.parametrize("nested", [False, True])
def test_terms_of_a_users_own_criterion_are_found(nested):
    box = tiny_box({"kd": KD})
    box.criterion = Sum({"tald": TALDLoss(threat=L2_THREAT)}, nested)
    box.pre_epoch_process(epoch=0)
    assert torch.isfinite(step(box, *images()))


@pytest.mark.parametrize("shared", ["all", "part"])
def test_what_teacher_and_student_share_stays_in_the_students_mode(shared, caplog):
    student = network(2)
    teacher = student if shared == "all" else nn.Sequential(*student[:6], nn.Dropout(), nn.Linear(16, 5))
    box = with_side({"kd": KD, "tald": tald()}, (teacher, student), teacher={"requires_grad": True})
    before = student[1].running_mean.clone()
    step(box, *images())
    assert student[1].training and not torch.equal(before, student[1].running_mean)
    assert "shares with the student" in caplog.text or shared == "all"
    if shared == "part":
        assert not teacher[6].training and not teacher.training


def test_modes_are_given_back_however_often_they_were_set():
    box = bound({"tald": tald()})
    teacher = box.org_teacher_model
    teacher[1].train()
    step(box, *images())
    assert not teacher[1].training
    box.adversarial_binding.release(box)
    assert all(m.training for m in teacher.modules())


class Counter(nn.Module):
    """Counts its passes, in any mode; and makes a buffer when it first sees data."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("size", None)

    def forward(self, x):
        self.count += 1
        if self.size is None:
            self.size = torch.tensor(len(x))
            self.register_buffer("late", torch.tensor(len(x)))
        return x


def test_buffers_that_move_in_any_mode_count_the_hosts_passes_alone():
    nets = {"student": nn.Sequential(Counter(), network(2)), "teacher": nn.Sequential(Counter(), network(1))}
    box = bound({"kd": KD, "tald": tald(), "adv": on_adversarial(KD)}, **nets)
    for _ in range(2):
        step(box, *images())
    assert [float(net[0].count) for net in nets.values()] == [2, 2]
    assert [int(net[0].size) for net in nets.values()] == [int(net[0].late) for net in nets.values()] == [6, 6]


def test_buffers_made_inside_the_guard_are_gone_after_it():
    module = Counter()
    with on_cloned_buffers(module):
        module(torch.ones(3))
        assert int(module.late) == 3
    assert set(module._buffers) == {"count", "size"} and module.size is None and module.count == 0


def test_every_epoch_counts_its_steps_from_zero():
    box = bound({"tald": tald()})
    step(box, *images())
    assert box.adversarial_binding.when() == "epoch 0, step 1"
    box.pre_epoch_process(epoch=4)
    assert box.adversarial_binding.when() == "epoch 4, step 0"


@pytest.mark.parametrize("which", ["batch", "networks"])
def test_channels_last(which):
    nets = {"student": network(2), "teacher": network(1)}
    x, y = images()
    if which == "batch":
        x = x.to(memory_format=torch.channels_last)
    else:
        nets = {name: net.to(memory_format=torch.channels_last) for name, net in nets.items()}
    box = bound({"kd": KD, "tald": tald(), "adv": on_adversarial(KD)}, **nets)
    assert torch.isfinite(step(box, x, y))


def test_first_step_under_autocast_trains_every_parameter():
    """A pass without gradients must not leave its casts of the weights to the host."""
    box = bound({"kd": KD, "tald": tald(1.0)})
    with torch.autocast("cpu", torch.bfloat16):
        loss = box.forward_process(*images())
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in box.org_student_model.parameters())


def test_kernel_is_not_computed_in_half_precision_under_autocast():
    particles, scores = torch.randn(2, 3, 4, 100)
    expected = svgd_direction(particles, scores, "median")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(svgd_direction(particles, scores, "median"), expected)


@register_forward_proc_func
def scaled_proc_for_test(model, sample_batch, targets=None, supp_dict=None, scale=1.0):
    return model(sample_batch * scale)


def test_keywords_of_the_forward_process_reach_the_adversarial_passes():
    nothing = {"key": "PGD", "kwargs": {"num_steps": 1, "step_size": 0, "start": "none"}}
    terms = {"clean": KD, "adv": on_adversarial(KD, adversary=nothing)}
    sides = {"forward_proc": "scaled_proc_for_test"}
    box = with_side(terms, teacher=sides, student=sides)
    found = {}
    for name in terms:
        term(box, name).register_forward_hook(lambda m, i, out, name=name: found.__setitem__(name, float(out.detach())))
    x, y = images()
    box.forward_process(x, y, scale=0.5)
    assert found["adv"] == pytest.approx(found["clean"])


def test_images_slightly_outside_the_range_keep_their_ball():
    threat = ThreatModel(eps=5e-4, norm="l2", mean=[0], std=[1])
    x = 1 + 9e-4 * torch.rand(4, 2, 6, 6)
    threat.check_inputs(x)
    rows = threat.project(x + torch.randn(x.shape), x)
    assert (threat.distance(rows, x) <= 5e-4 + 1e-6).all()


def test_include_clean_keeps_the_graph_of_the_hosts_pass():
    def gradient(include_clean):
        box = bound({"tald": tald(1.0, include_clean=include_clean, student_bn="eval", num_attacked=1)}, double=True)
        x, y = images()
        box.forward_process(x.double(), y).backward()
        return box.org_student_model[-1].weight.grad

    # with one image attacked, six of eight rows are clean: without their graph the gradient would be that of two rows
    with_clean, without = gradient(True), gradient(False)
    assert torch.nn.functional.cosine_similarity(with_clean.flatten(), without.flatten(), dim=0) < 0.95


def test_include_clean_needs_logits_that_are_known_to_be_such():
    box = with_side({"tald": tald(include_clean=True)}, student={"forward_proc": "probabilities_for_test"})
    with pytest.raises(ConfigError, match="forward: 'joint'") as error:
        box.forward_process(*images())
    assert error.value.path == "train.criterion.kwargs.sub_terms.tald.criterion.kwargs"


def test_adversaries_and_objectives_of_a_user_are_used_by_key(monkeypatch):
    for registry in (ADVERSARIES, OBJECTIVES):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    sharpnesses = []

    @register_adversary(key="TwoSteps")
    @dataclass(frozen=True)
    class Search(PGD):
        num_steps: int = 2

    @register_objective(attacks=("student",), clean=("teacher",), key="sharp")
    def objective(view, sharpness=1.0):
        sharpnesses.append(sharpness)
        return lambda rows, index: (view.student(rows) - sharpness * view.teacher_clean[index]).square().sum(1)

    options = {"adversary": "TwoSteps", "objective": {"key": "sharp", "kwargs": {"sharpness": 3.0}}}
    box = bound({"adv": on_adversarial(KD, **options)})
    assert torch.isfinite(step(box, *images()))
    assert sharpnesses == [3.0]


SIMPLE = CE["criterion_wrapper"]


@pytest.mark.parametrize(
    "sub_term, path, found",
    [
        (on_adversarial(tald()), "criterion_wrapper.kwargs", "finds its own examples"),
        ({**tald(), "criterion_wrapper": SIMPLE}, "criterion_wrapper", "drop it"),
        (
            on_adversarial({"criterion": CE["criterion"]}),
            "criterion_wrapper.kwargs.criterion_wrapper",
            "SimpleLossWrapper",
        ),
        (
            on_adversarial({**CE, "criterion_wrapper": {"key": "SimpleLossWraper"}}),
            "criterion_wrapper.kwargs.criterion_wrapper.key",
            "did you mean 'SimpleLossWrapper'",
        ),
        (
            on_adversarial({**CE, "criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": {"input": {}}}}),
            "criterion_wrapper.kwargs.criterion_wrapper.kwargs",
            "cannot be built",
        ),
        (tald(adversary=PGD), "criterion.kwargs.adversary", "write {key"),
        (tald(adversary={"key": ["SVGD"]}), "criterion.kwargs.adversary.key", "SVGD"),
        (tald(objective={"key": {}}), "criterion.kwargs.objective.key", "found objective"),
        (
            tald(adversary={"key": "SVGD", "kwargs": {"chunk_size": 0}}),
            "criterion.kwargs.adversary.kwargs.chunk_size",
            "1",
        ),
    ],
)
def test_more_bad_blocks_name_their_yaml_path(sub_term, path, found):
    box = tiny_box({"kd": KD, "term": sub_term})
    with pytest.raises(ConfigError, match=found) as error:
        box.pre_epoch_process(epoch=0)
    assert error.value.path == f"train.criterion.kwargs.sub_terms.term.{path}"


class TupleInTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network(2)

    def forward(self, x):
        return (self.net(x), None) if self.training else self.net(x)


def test_a_network_that_returns_a_tuple_in_training_is_refused():
    box = bound({"tald": tald()}, student=TupleInTraining())
    with pytest.raises(ConfigError, match="returns a tuple"):
        box.forward_process(*images())


def test_numbers_of_other_libraries_are_numbers():
    threat = ThreatModel.build(
        {"eps": np.float32(0.5), "mean": np.array([0.4, 0.5]), "std": torch.tensor([0.3, 0.2]), "inplace": True}
    )
    assert threat.mean == (0.4, 0.5) and threat.std == pytest.approx((0.3, 0.2))
    assert ThreatModel(eps=1, space="input", bounds=np.array([-2.5, 2.5])).bounds == (-2.5, 2.5)

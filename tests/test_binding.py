"""Binding to torchdistill's boxes: what is found, what is left as it was, and what is refused."""

from __future__ import annotations

import copy
import gc
import logging
import random
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from tiny import (
    CE,
    KD,
    L2_THREAT,
    NUM_CLASSES,
    PIXEL_THREAT,
    bound,
    images,
    network,
    on_adversarial,
    step,
    tald,
    term,
    tiny_box,
    train_config,
)
from torch import nn

from torchdistill_adv.binding import bind
from torchdistill_adv.errors import ConfigError, NonFiniteError
from torchdistill_adv.losses.base import Cost
from torchdistill_adv.step import Step

TERM = "train.criterion.kwargs.sub_terms"


# what is bound


def test_unbound_loss_says_what_to_write():
    box = tiny_box({"kd": KD, "tald": tald()}, pre_epoch_process="default_pre_epoch_process_with_teacher")
    box.pre_epoch_process(epoch=0)
    with pytest.raises(ConfigError, match=r"bind_adversarial_losses.*autobind"):
        box.forward_process(*images())


def test_box_without_adversarial_terms_is_left_alone():
    box = bound({"kd": KD})
    assert "forward_process" not in box.__dict__ and "adversarial_binding" not in box.__dict__
    assert box.org_teacher_model.training


def test_second_box_resets_the_first_ones_process_but_not_its_binding():
    first = bound({"tald": tald()})
    second = tiny_box({"kd": KD}, pre_epoch_process="default_pre_epoch_process_with_teacher")
    for box in (first, second):
        box.pre_epoch_process(epoch=1)
        step(box, *images())


def test_binding_does_not_keep_the_box_alive():
    box = bound({"tald": tald()})
    step(box, *images())
    reference = weakref.ref(box)
    del box
    gc.collect()
    assert reference() is None


def test_models_can_be_saved_and_copied(tmp_path):
    box = bound({"tald": tald()})
    step(box, *images())
    torch.save(box.org_student_model, tmp_path / "student.pt")
    copy.deepcopy(box.org_teacher_model)


def stages(second):
    config = train_config({"kd": KD, "tald": tald()})
    return {"stage1": config, "stage2": {**train_config(second[0]), **second[1]}}


@pytest.mark.parametrize(
    "second, evaluated",
    [
        (({"tald": tald()}, {}), True),
        (({"kd": KD}, {}), False),
        (({"kd": KD}, {"pre_epoch_process": "default_pre_epoch_process_with_teacher"}), False),
    ],
)
def test_stages_are_bound_again_or_let_go(second, evaluated, searches):
    from torchdistill.core.distillation import get_distillation_box

    data = tiny_box({"kd": KD}).dataset_dict
    teacher, student = network(1, width=8), network(2)
    box = get_distillation_box(teacher, student, data, stages(second), torch.device("cpu"), None, False, 1)
    box.pre_epoch_process(epoch=0)
    first = box.adversarial_binding
    assert first.terms[0].path == "train.stage1.criterion.kwargs.sub_terms.tald.criterion.kwargs"
    step(box, *images())
    assert not teacher.training
    box.post_epoch_process()
    box.pre_epoch_process(epoch=1)
    step(box, *images())
    assert len(searches) == 1 + evaluated
    assert ("forward_process" in box.__dict__) == evaluated
    assert teacher.training != evaluated
    assert first.terms[0].binding is None
    if evaluated:
        assert box.adversarial_binding.terms[0].path.startswith("train.stage2.")


def test_stage_left_unbound_is_refused():
    from torchdistill.core.distillation import get_distillation_box

    second = ({"tald": tald()}, {"pre_epoch_process": "default_pre_epoch_process_with_teacher"})
    data = tiny_box({"kd": KD}).dataset_dict
    box = get_distillation_box(network(1), network(2), data, stages(second), torch.device("cpu"), None, False, 1)
    box.pre_epoch_process(epoch=0)
    step(box, *images())
    box.post_epoch_process()
    box.pre_epoch_process(epoch=1)
    with pytest.raises(ConfigError, match="not bound"):
        box.forward_process(*images())


AUTOBIND = """
import torch, torchdistill_adv.autobind
from tiny import KD, images, step, tald, tiny_box, CE, on_adversarial
process = "default_pre_epoch_process_{}_teacher"
box = tiny_box({"kd": KD, "tald": tald()}, pre_epoch_process=process.format("with"))
other = tiny_box({"adv": on_adversarial(CE, objective="ce_student")}, teacher=None,
                 pre_epoch_process=process.format("without"))
for epoch in (0, 3):
    for some in (box, other):
        some.pre_epoch_process(epoch=epoch)
        step(some, *images())
        assert some.adversarial_binding.epoch == epoch
        # a runner may wrap the model after setup: bound again, the epoch is still followed
        name = "student_model" if some is box else "model"
        setattr(some, name, torch.nn.Sequential(getattr(some, name)))
assert not box.org_teacher_model.training
plain = tiny_box({"kd": KD})
assert "forward_process" not in plain.__dict__
"""


def test_autobind_needs_no_process():
    from pathlib import Path

    subprocess.run([sys.executable, "-c", AUTOBIND], check=True, cwd=Path(__file__).parent)


def test_training_box_without_teacher():
    box = bound({"ce": CE, "adv": on_adversarial(CE, objective="ce_student")}, teacher=None)
    before = copy.deepcopy(box.org_model.state_dict())
    assert torch.isfinite(step(box, *images()))
    assert any(not torch.equal(v, before[k]) for k, v in box.org_model.state_dict().items())


@pytest.mark.parametrize("sub_term", [on_adversarial(CE), tald()])
def test_what_needs_a_teacher_is_refused_without_one(sub_term):
    box = tiny_box({"ce": CE, "adv": sub_term}, teacher=None)
    with pytest.raises(ConfigError, match="needs a teacher") as error:
        box.pre_epoch_process(epoch=0)
    assert error.value.path.startswith(f"{TERM}.adv.")


# weight 0


def test_term_of_weight_zero_is_not_evaluated_and_the_log_says_so(searches, caplog):
    with caplog.at_level(logging.INFO):
        box = bound({"kd": KD, "tald": tald(0.0)})
    assert "weight 0 and is not evaluated" in caplog.text
    step(box, *images())
    assert not searches


# sharing and order


def test_equal_searches_are_shared_and_their_noise_with_them(searches):
    box = bound({"a": on_adversarial(KD), "b": on_adversarial(CE), "c": on_adversarial(KD, share=False)})
    x, y = images()
    box.forward_process(x, y)
    assert len(searches) == 2
    other = {"adversary": {"key": "PGD", "kwargs": {"num_steps": 3}}}
    box = bound({"a": on_adversarial(KD), "b": on_adversarial(KD, **other)})
    box.forward_process(x, y)
    assert len(searches) == 4


def test_examples_of_a_term_do_not_depend_on_the_others(searches):
    """Searches come before outer passes, which move running statistics; and noise depends on the settings alone."""
    moving = on_adversarial(KD, student_bn="train", adversary="FGSM")
    x, y = images()
    for others in ({}, {"moving": moving}):
        box = bound({"kd": KD, **others, "a": on_adversarial(KD)})
        box.forward_process(x, y)
    found = [examples.rows for search, examples in searches if search == term(box, "a").search]
    assert len(found) == 2 and torch.equal(*found)


def test_noise_differs_by_step_and_epoch_and_repeats():
    x, y = images()

    def rows(epoch, steps):
        box = tiny_box({"a": tald()})
        box.pre_epoch_process(epoch=epoch)
        binding = box.adversarial_binding
        for _ in range(steps):
            box.forward_process(x, y)
        return binding.noise_for(binding.terms[0].search, x).uniform((4,))

    assert torch.equal(rows(0, 1), rows(0, 1))
    assert not torch.equal(rows(0, 1), rows(0, 2))
    assert not torch.equal(rows(0, 1), rows(1, 1))


def test_training_repeats_with_its_seed():
    def trained():
        box = bound({"kd": KD, "tald": tald(1.0)}, student=network(2, dropout=0.5))
        for _ in range(3):
            step(box, *images())
        return box.org_student_model.state_dict()

    first, second = trained(), trained()
    assert all(torch.equal(first[k], second[k]) for k in first)


# teacher mode


def test_teacher_network_is_put_in_eval_and_this_is_said_once(caplog):
    box = tiny_box({"kd": KD, "tald": tald()})
    with caplog.at_level(logging.INFO):
        for epoch in range(2):
            box.pre_epoch_process(epoch=epoch)
    assert not box.org_teacher_model.training
    assert caplog.text.count("put in eval mode") == 1


def test_teacher_kept_in_train_mode_moves_no_statistics():
    box = bound({"tald": tald(teacher_mode="keep")})
    assert box.org_teacher_model.training
    reference = copy.deepcopy(box.org_teacher_model)
    x, y = images()
    step(box, x, y)
    reference(x)  # the host's own pass, in train mode, is the only one that counts
    for name, value in reference.state_dict().items():
        assert torch.equal(value, box.org_teacher_model.state_dict()[name])


def test_terms_of_one_stage_agree_on_the_teacher():
    box = tiny_box({"a": tald(), "b": tald(teacher_mode="keep")})
    with pytest.raises(ConfigError, match="write the same for all") as error:
        box.pre_epoch_process(epoch=0)
    assert error.value.path == f"{TERM}.b.criterion.kwargs.teacher_mode"


# no trace


def state_of(box):
    student, teacher = box.org_student_model, box.org_teacher_model
    return {
        "tensors": [t.clone() for m in (student, teacher) for t in m.state_dict().values()],
        "modes": [m.training for net in (student, teacher) for m in net.modules()],
        "grads": [p.grad for net in (student, teacher) for p in net.parameters()],
        "requires_grad": [p.requires_grad for net in (student, teacher) for p in net.parameters()],
        "hooks": {path: dict(inner) for path, inner in box.student_io_dict.items()},
        "streams": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
    }


def assert_same_state(before, after):
    assert all(torch.equal(a, b) for a, b in zip(before.pop("tensors"), after.pop("tensors"), strict=True))
    assert before == after


@pytest.mark.parametrize("where", ["search", "loss"])
def test_exception_leaves_everything_as_it_was(where, monkeypatch):
    box = bound(
        {"tald": tald(), "adv": on_adversarial(KD, student_bn="eval")},
        student=network(2, dropout=0.3),
    )
    box.org_student_model[1].eval()  # a frozen layer must stay frozen
    step(box, *images())
    x, y = images()

    def fail(*args, **kwargs):
        torch.rand(3), random.random(), np.random.rand()
        box.org_student_model(x[:2])
        raise RuntimeError("in the middle")

    target = term(box, "adv").search.adversary if where == "search" else term(box, "adv").criterion
    monkeypatch.setattr(type(target), "__call__" if where == "search" else "forward", fail)
    binding = box.adversarial_binding
    binding.step = Step(binding, x, y, None, {})
    before = state_of(box)
    with torch.no_grad(), pytest.raises(RuntimeError, match="in the middle"):
        if where == "loss":
            binding.step.search_all()
        before = state_of(box)
        binding.evaluate(term(box, "adv"), {".": {"output": None}}, {".": {"output": None}}, y)
    assert_same_state(before, state_of(box))


def test_step_is_forgotten_after_an_exception():
    box = bound({"tald": tald()})
    with pytest.raises(ConfigError):
        box.forward_process({"x": 1}, None)
    assert box.adversarial_binding.step is None


def test_no_graph_is_alive_after_a_step():
    def graphs():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) and o.grad_fn is not None for o in gc.get_objects())

    box = bound(
        {"kd": KD, "tald": tald(), "joint": tald(forward="joint", include_clean=True), "adv": on_adversarial(KD)}
    )
    before = graphs()
    step(box, *images())
    assert graphs() == before


def test_hook_dictionaries_are_emptied_of_our_passes():
    hooks = {"input": ["1"], "output": ["0", "2"]}
    box = bound({"kd": KD, "tald": tald(), "adv": on_adversarial(KD)}, hooks=hooks)
    step(box, *images())
    for io_dict in (box.student_io_dict, box.teacher_io_dict):
        assert set(io_dict) == {"0", "1", "2"} and not any(io_dict.values())


def test_eval_term_has_the_same_gradient_with_a_train_term_after_it():
    """Batch normalisation in eval keeps a reference to its buffers, which a later train-mode pass rewrites in place."""

    def gradient(*extra):
        terms = {"kd": KD, "eval": tald(1.0, student_bn="eval")}
        for i, sub_term in enumerate(extra):
            terms[f"extra{i}"] = sub_term
        box = bound(terms, student=network(2))
        box.forward_process(*images()).backward()
        return torch.cat([p.grad.flatten() for p in box.org_student_model.parameters()])

    train_term = tald(1e-30, student_bn="train", adversary={"key": "SVGD", "kwargs": {"num_particles": 3}})
    assert torch.equal(gradient(), gradient(train_term))


def test_student_bn_says_which_statistics_move():
    for student_bn, moves in [("batch", False), ("eval", False), ("train", True)]:
        box = bound({"tald": tald(student_bn=student_bn)})
        clean = copy.deepcopy(box.org_student_model)
        x, y = images()
        box.forward_process(x, y)
        clean(x)
        same = torch.equal(clean[1].running_mean, box.org_student_model[1].running_mean)
        assert same != moves


# cost


@pytest.mark.parametrize(
    "sub_terms",
    [
        {"tald": tald()},
        {"tald": tald(forward="joint", num_attacked=3)},
        {"tald": tald(adversary={"key": "SVGD", "kwargs": {"num_particles": 3, "num_steps": 2, "chunk_size": 2}})},
        {"adv": on_adversarial(KD)},
        {"adv": on_adversarial(KD, teacher_on="clean", objective="kl_clean_teacher_student")},
        {"adv": on_adversarial(KD, student_on="clean", objective="ce_student")},
        {"a": on_adversarial(KD), "b": on_adversarial(CE), "tald": tald()},
        {"trades": on_adversarial(KD, objective="kl_clean_student_student")},
    ],
)
def test_announced_cost_is_the_measured_one(sub_terms, caplog):
    with caplog.at_level(logging.INFO):
        box = bound({"kd": KD, **sub_terms}, teacher=network(1), student=network(2))
    x, y = images()
    box.forward_process(x, y)  # the first step also tries the networks on one image
    counts = {"teacher": [0, 0], "student": [0, 0]}
    for name, net in [("teacher", box.org_teacher_model), ("student", box.org_student_model)]:

        def forward(module, inputs, output, name=name):
            counts[name][0] += len(inputs[0])
            if output.requires_grad:
                output.register_hook(lambda gradient: counts[name].__setitem__(1, counts[name][1] + len(gradient)))

        net[0].register_forward_hook(forward)
    box.forward_process(x, y).backward()
    # without what the host does on clean images
    counts["teacher"][0] -= 6
    counts["student"][0] -= 6
    counts["student"][1] -= 6
    measured = Cost(*counts["teacher"], *counts["student"])
    announced = caplog.text.rsplit("passes of a batch of 6: ", 1)[1].splitlines()[0]
    # a term that reads the clean student adds nothing to the clean backward pass
    assert announced == measured.describe(6)


def test_log_has_the_radius_in_pixels(caplog):
    with caplog.at_level(logging.INFO):
        bound({"adv": on_adversarial(KD)})
    assert "8/255 in pixels" in caplog.text and f"{TERM}.adv.criterion_wrapper.kwargs" in caplog.text


# bad input, before the first step

GOOD_X, GOOD_Y = images()


@pytest.mark.parametrize(
    "x, y, options, found",
    [
        ({"image": GOOD_X}, GOOD_Y, {}, "a batch that is a dict"),
        ([GOOD_X], GOOD_Y, {}, "a batch that is a list"),
        ((GOOD_X * 10).long(), GOOD_Y, {}, "torch.int64"),
        (GOOD_X, GOOD_Y + NUM_CLASSES, {}, "labels from 6 to 9"),
        (GOOD_X, GOOD_Y - int(GOOD_Y.min()) - 1, {}, "labels from -1 to"),
        (GOOD_X, GOOD_Y[:3], {}, "labels \\(3,\\)"),
        (GOOD_X, torch.rand(6, NUM_CLASSES), {}, "torch.float32"),
        (GOOD_X, GOOD_Y, {"student": network(2, num_classes=7)}, "5 classes .teacher. with 7"),
        (GOOD_X, GOOD_Y, {"student": network(2)[:3]}, "logits"),
        (GOOD_X * 100, GOOD_Y, {}, "pixels from"),
        (GOOD_X[:, :1].expand(-1, 2, -1, -1) * 0 + 9, GOOD_Y, {}, "outside \\[0, 1\\]"),
    ],
)
def test_bad_batches_and_networks_are_refused_before_the_first_step(x, y, options, found):
    box = bound({"tald": tald()}, **options)
    before = copy.deepcopy(box.org_student_model.state_dict())
    with pytest.raises(ConfigError, match=found) as error:
        box.forward_process(x, y)
    assert error.value.path.startswith(("train.", "models."))
    assert all(torch.equal(v, before[k]) for k, v in box.org_student_model.state_dict().items())


def test_pixel_threat_on_data_outside_its_range_is_refused():
    adv = on_adversarial(KD, threat={"mean": [0], "std": [1], "eps": "8/255"})
    box = bound({"adv": adv})
    with pytest.raises(ConfigError, match="outside") as error:
        box.forward_process(*images())
    assert error.value.path == f"{TERM}.adv.criterion_wrapper.kwargs.threat.mean"


def test_wrong_number_of_channels_is_refused():
    threat = {**L2_THREAT, "mean": [0.1] * 3, "std": [0.5] * 3}
    box = bound({"tald": tald(threat=threat)})
    with pytest.raises(ConfigError, match="3 values, but the images have 2 channels"):
        box.forward_process(*images())


class Blunder(nn.Module):
    """Logits of which one is not finite, for some images, once ``broken``."""

    def __init__(self, net, value):
        super().__init__()
        self.net, self.value, self.broken = net, value, False

    def forward(self, x):
        logits = self.net(x)
        return logits + (x.flatten(1).sum(1, keepdim=True) * 0 + self.value) if self.broken else logits


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_nan_stops_with_step_term_and_statistics(value, which):
    nets = {"student": network(2), "teacher": network(1)}
    nets[which] = Blunder(nets[which], value)
    box = bound({"tald": tald()}, **nets)
    step(box, *images())
    nets[which].broken = True
    with pytest.raises(NonFiniteError) as error:
        box.forward_process(*images())
    message = str(error.value)
    assert f"{TERM}.tald" in message and "epoch 0, step 1" in message and "% finite" in message


def test_adversarial_term_outside_a_step_is_refused():
    box = bound({"tald": tald()})
    with pytest.raises(RuntimeError, match="only inside"):
        term(box, "tald")({}, {}, None)


def test_bind_twice_is_one_binding():
    box = bound({"tald": tald()})
    assert bind(box) is bind(box) is box.adversarial_binding


def test_half_the_terms_may_share_a_pixel_threat():
    box = bound({"tald": tald(threat=PIXEL_THREAT), "adv": on_adversarial(KD)})
    assert torch.isfinite(step(box, *images()))

"""The wrapper that evaluates any torchdistill loss on adversarial examples."""

from __future__ import annotations

import pytest
import torch
from tiny import CE, KD, bound, images, matching, network, on_adversarial, term, tiny_box
from torch.nn import functional as F

from torchdistill_adv.errors import ConfigError

AT = {
    "criterion": {
        "key": "ATLoss",
        "kwargs": {
            "at_pairs": {
                "layer": {
                    "teacher": {"io": "output", "path": "2"},
                    "student": {"io": "output", "path": "2"},
                    "weight": 1,
                }
            },
            "mode": "code",
        },
    },
    "weight": 1.0,
}

HOOKS = {"input": [], "output": ["0", "2"]}


def at_loss(student, teacher):
    def attention(features):
        return F.normalize(features.pow(2).mean(1).flatten(1))

    return (attention(student) - attention(teacher)).pow(2).mean()


@pytest.mark.parametrize(
    "student_on, teacher_on", [("adversarial",) * 2, ("clean", "adversarial"), ("adversarial", "clean")]
)
def test_features_are_those_of_the_chosen_side(searches, student_on, teacher_on):
    """Against features computed by hand, with every layer's hooks out of play."""
    sides = {"student_on": student_on, "teacher_on": teacher_on, "student_bn": "eval"}
    box = bound(
        {"mse": on_adversarial(matching("0", reduction="sum"), **sides), "at": on_adversarial(AT, **sides)},
        student=network(2, 8, False),
        hooks=HOOKS,
    )
    x, y = images()
    loss = box.forward_process(x, y)
    inputs = {"clean": x, "adversarial": searches[0][1].rows}
    student = box.org_student_model[:3](inputs[student_on])
    teacher = box.org_teacher_model[:3](inputs[teacher_on])
    first = F.mse_loss(
        box.org_student_model[0](inputs[student_on]), box.org_teacher_model[0](inputs[teacher_on]), reduction="sum"
    )
    assert torch.allclose(loss, first + at_loss(student, teacher), rtol=1e-5)
    assert not torch.equal(inputs["clean"], inputs["adversarial"])


def test_several_particles_come_in_batches_of_their_own(searches):
    """A loss that compares the images of a batch must not see two particles of one image together."""
    rkd = {
        "criterion": {
            "key": "RKDLoss",
            "kwargs": {
                "student_output_path": "2",
                "teacher_output_path": "2",
                "dist_factor": 1.0,
                "angle_factor": 2.0,
                "reduction": "mean",
            },
        },
        "weight": 1.0,
    }
    adversary = {"key": "SVGD", "kwargs": {"num_particles": 3}}
    box = bound(
        {"rkd": on_adversarial(rkd, adversary=adversary, student_bn="eval")}, student=network(2, 8, False), hooks=HOOKS
    )
    loss = box.forward_process(*images())
    criterion = term(box, "rkd").criterion
    values = []
    for rows in searches[0][1].rows.split(6):
        student, teacher = ({"2": {"output": n[:3](rows)}} for n in (box.org_student_model, box.org_teacher_model))
        values.append(criterion(student, teacher))
    assert torch.allclose(loss, torch.stack(values).mean(), rtol=1e-5)


def test_gradient_reaches_the_student_alone():
    box = bound({"at": on_adversarial(AT)}, hooks=HOOKS)
    box.forward_process(*images()).backward()
    assert box.org_student_model[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in box.org_teacher_model.parameters())


def test_low_level_loss_keeps_its_own_wrapper(searches):
    box = bound({"ce": on_adversarial(CE, student_bn="eval")}, hooks=HOOKS)
    x, y = images()
    loss = box.forward_process(x, y)
    box.org_student_model.eval()
    assert torch.allclose(loss, F.cross_entropy(box.org_student_model(searches[0][1].rows), y), rtol=1e-5)


@pytest.mark.parametrize(
    "options, path, found",
    [
        ({"student_on": "clean", "teacher_on": "clean"}, "student_on", "both sides"),
        ({"teacher_on": "attacked"}, "teacher_on", "adversarial"),
        ({"objective": "kl_teacher_studnet"}, "objective.key", "did you mean 'kl_"),
        ({"adversary": {"key": "PGD", "kwargs": {"step_size": -1}}}, "adversary.kwargs.step_size", "-1"),
        ({"objective": {"key": "ce_student", "kwargs": {"target_class": 1}}}, "adversary.kwargs.targeted", "true"),
    ],
)
def test_bad_options_name_their_yaml_path(options, path, found):
    box = tiny_box({"adv": on_adversarial(KD, **options)})
    with pytest.raises(ConfigError, match=found) as error:
        box.pre_epoch_process(epoch=0)
    assert error.value.path == f"train.criterion.kwargs.sub_terms.adv.criterion_wrapper.kwargs.{path}"


@pytest.mark.parametrize("missing", ["adversary", "threat", "objective"])
def test_what_has_no_default_must_be_given(missing):
    sub_term = on_adversarial(KD)
    del sub_term["criterion_wrapper"]["kwargs"][missing]
    box = tiny_box({"adv": sub_term})
    with pytest.raises(ConfigError, match="is missing") as error:
        box.pre_epoch_process(epoch=0)
    assert error.value.path.endswith(missing)

"""TALDLoss against Eq. 3 in slow loops, for every option that changes the mathematics."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny import KD, L2_THREAT, images, network, step, tald, term, tiny_box

from torchdistill_adv.binding import bind
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.losses.base import AdversarialTerm


def logits_of(net, rows, bn):
    """Logits in float64 from a copy of ``net``, batch normalisation included, row by row where it is fixed."""
    net = copy.deepcopy(net)
    net.train(bn != "eval")
    return net(rows)


def cross_entropy(logits, y):
    shifted = [v - max(logits) for v in logits]
    return math.log(sum(math.exp(v) for v in shifted)) - shifted[y]


@pytest.mark.parametrize("student_bn", ["batch", "train", "eval"])
@pytest.mark.parametrize("forward", ["separate", "joint"])
@pytest.mark.parametrize("include_clean", [False, True])
@pytest.mark.parametrize("num_attacked", [None, 2, 99])
def test_loss_is_equation_3(searches, student_bn, forward, include_clean, num_attacked):
    options = {"student_bn": student_bn, "forward": forward, "include_clean": include_clean}
    box = tiny_box({"tald": tald(1.0, num_attacked=num_attacked, **options)}, double=True)
    x, y = images()
    x = x.double()
    box.pre_epoch_process(epoch=0)
    before = copy.deepcopy(box.org_student_model)
    loss = box.forward_process(x, y)

    ((_, examples),) = searches
    attacked = min(num_attacked or 6, 6)
    assert examples.index.tolist() == list(range(attacked)) * 2
    # the clean pass of the box comes first, and moves the running statistics
    student = copy.deepcopy(before)
    clean_logits = student.train()(x)
    if forward == "joint":
        joined = logits_of(student, torch.cat([examples.rows, x]), student_bn)
        adversarial, clean_logits = joined[: 2 * attacked], joined[2 * attacked :]
    else:
        adversarial = logits_of(student, examples.rows, student_bn)
    teacher = box.org_teacher_model.eval()
    rows = [
        (teacher(r[None])[0], s, int(y[i])) for r, s, i in zip(examples.rows, adversarial, examples.index, strict=True)
    ]
    if include_clean:
        rows += [(teacher(x[i : i + 1])[0], clean_logits[i], int(y[i])) for i in range(6)]
    gaps = [(cross_entropy(t.tolist(), label) - cross_entropy(s.tolist(), label)) ** 2 for t, s, label in rows]
    assert abs(float(loss) - sum(gaps) / len(gaps)) < 1e-10


def test_only_the_student_gets_a_gradient():
    box = tiny_box({"tald": tald(1.0)})
    box.pre_epoch_process(epoch=0)
    box.forward_process(*images()).backward()
    assert all(p.grad is None for p in box.org_teacher_model.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in list(box.org_student_model.parameters())[-2:])


def test_gradient_is_that_of_finite_differences():
    box = tiny_box({"tald": tald(1.0, student_bn="eval")}, double=True, student=network(2, bn=False))
    x, y = images()
    weight = box.org_student_model[-1].weight
    box.pre_epoch_process(epoch=0)

    def loss():
        box.adversarial_binding.step_number = 0
        return box.forward_process(x.double(), y)

    (gradient,) = torch.autograd.grad(loss(), weight)
    for i, j in [(0, 0), (2, 5), (4, 1)]:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[i, j] += sign * 1e-6
            values.append(float(loss()))
            with torch.no_grad():
                weight[i, j] -= sign * 1e-6
        assert abs((values[0] - values[1]) / 2e-6 - float(gradient[i, j])) < 1e-6


def test_particles_raise_the_divergence_of_the_teacher(searches):
    adversary = {"key": "SVGD", "kwargs": {"num_steps": 5, "noise_factor": 0.1}}
    box = tiny_box({"tald": tald(adversary=adversary)})
    x, y = images()
    box.pre_epoch_process(epoch=0)
    box.forward_process(x, y)
    ((_, examples),) = searches
    teacher = box.org_teacher_model

    def divergence(rows):
        log_p, log_q = teacher(rows).log_softmax(1), teacher(x[examples.index]).log_softmax(1)
        return (log_p.exp() * (log_p - log_q)).sum(1)

    noise = x[examples.index] + 0.3 * torch.nn.functional.normalize(torch.randn_like(examples.rows).flatten(1)).view_as(
        examples.rows
    )
    assert divergence(examples.rows).mean() > 2 * divergence(noise).mean()


@pytest.mark.parametrize("target_class", ["runner_up", "random", 3])
def test_targeted_particles_approach_the_class(searches, target_class):
    adversary = {"key": "SVGD", "kwargs": {"num_steps": 4, "step_size": 0.1, "noise_factor": 0.1}}
    box = tiny_box({"tald": tald(adversary=adversary, target_class=target_class)})
    x, y = images()
    box.pre_epoch_process(epoch=0)
    box.forward_process(x, y)
    ((_, examples),) = searches
    with torch.no_grad():
        before = box.org_teacher_model(x[examples.index]).softmax(1)
        after = box.org_teacher_model(examples.rows).softmax(1)
    if target_class == "runner_up":
        chosen = before.argsort(1)[:, -2:-1]
    elif target_class == "random":
        # any class but the predicted one: the prediction loses
        assert (after.gather(1, before.argmax(1, keepdim=True)) < before.amax(1, keepdim=True)).all()
        return
    else:
        chosen = torch.full((len(before), 1), 3)
    assert (after.gather(1, chosen) > before.gather(1, chosen)).all()


@pytest.mark.parametrize("key", ["mse_teacher_clean_teacher", "ce_teacher"])
def test_other_objectives_of_the_teacher(key):
    box = tiny_box({"tald": tald(objective=key)})
    box.pre_epoch_process(epoch=0)
    assert torch.isfinite(box.forward_process(*images()))


def test_defaults_are_the_paper():
    box = tiny_box({"tald": {"criterion": {"key": "TALDLoss", "kwargs": {"threat": L2_THREAT}}, "weight": 0.01}})
    search = bind(box).terms[0].search
    paper = {"num_particles": 4, "num_steps": 1, "step_size": 0.1, "noise_factor": 10.0, "bandwidth": 1e-3}
    assert {name: getattr(search.adversary, name) for name in paper} == paper
    assert search.objective.key == "kl_teacher_clean_teacher"
    assert (search.threat.eps, search.threat.norm, search.threat.space) == (0.3, "l2", "input")


@pytest.mark.parametrize(
    "options, path, found",
    [
        ({"adversary": "SVDG"}, "adversary.key", "did you mean 'SVGD'"),
        ({"adversary": {"key": "SVGD", "kwargs": {"num_particles": 0}}}, "adversary.kwargs.num_particles", ">= 1"),
        ({"threat": {**L2_THREAT, "eps": -0.3}}, "threat.eps", "-0.3"),
        ({"threat": {"eps": 0.3}}, "threat.mean", "normalize_kwargs"),
        ({"num_attacked": 0}, "num_attacked", ">= 1"),
        ({"student_bn": "frozen"}, "student_bn", "train"),
        ({"objectiv": "ce_teacher"}, "objectiv", "did you mean 'objective'"),
        ({"objective": "kl_teacher_student"}, "objective", "teacher alone"),
        ({"objective": "ce_teacher", "target_class": 1}, "objective", "drop one"),
        ({"target_class": "best"}, "target_class", "runner_up"),
        ({"adversary": {"key": "SVGD", "kwargs": {"targeted": True}}}, "objective", "target_class"),
        ({"include_clean": "yes"}, "include_clean", "true or false"),
    ],
)
def test_bad_options_name_their_yaml_path(options, path, found):
    box = tiny_box({"kd": KD, "tald": tald(**options)})
    with pytest.raises(ConfigError, match=found) as error:
        box.pre_epoch_process(epoch=0)
    assert error.value.path == f"train.criterion.kwargs.sub_terms.tald.criterion.kwargs.{path}"


def test_one_image_and_equal_images():
    for x, y in [(images(1)), (images(1)[0].expand(6, -1, -1, -1), images(6)[1])]:
        box = tiny_box({"tald": tald()})
        box.pre_epoch_process(epoch=0)
        assert torch.isfinite(step(box, x, y))


def test_student_equal_to_the_teacher_has_no_gap():
    student = network(1, width=8)
    box = tiny_box({"tald": tald(1.0, student_bn="eval")}, student=student, teacher=copy.deepcopy(student))
    box.pre_epoch_process(epoch=0)
    box.org_student_model.eval()
    loss = box.forward_process(*images())
    assert float(loss) < 1e-10
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters())


def test_chunk_size_bounds_the_teacher_and_changes_nothing():
    def loss(chunk_size):
        box = tiny_box({"tald": tald(adversary={"key": "SVGD", "kwargs": {"chunk_size": chunk_size}})}, double=True)
        box.pre_epoch_process(epoch=0)
        x, y = images()
        value = box.forward_process(x.double(), y)
        sizes = []
        box.org_teacher_model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
        box.forward_process(x.double(), y)
        return value, max(sizes)

    (whole, most), (chunked, at_once) = loss(None), loss(5)
    assert torch.allclose(whole, chunked, rtol=1e-12)
    assert (most, at_once) == (24, 6)  # 6 is the host's own clean pass


def test_term_prints_its_options():
    box = tiny_box({"tald": tald()})
    assert isinstance(term(box, "tald"), AdversarialTerm)
    assert "num_particles" in str(box.criterion)

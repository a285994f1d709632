"""What every registered loss, adversary and objective must hold to: the same tests for all of them."""

from __future__ import annotations

import copy

import pytest
import torch
import yaml
from contract import NEEDS_TWO_CLASSES, ROWS, WITHOUT_TEACHER, TwoTeachers, batch_for, pairs, unregistered
from tiny import CE, images, network, step, tiny_box

from torchdistill_adv.errors import ConfigError
from torchdistill_adv.step import Step

every = pytest.mark.parametrize("name", ROWS)


def block_of(name, **options):
    """The row's block, from YAML and with other options."""
    block = yaml.safe_load(yaml.safe_dump(ROWS[name]))
    block.get("criterion_wrapper", block["criterion"])["kwargs"].update(options)
    return block


def make(name, *, others=(), student=None, teacher=None, double=False, **options):
    # a teacher that says the same as the student for some images
    robust = network(2) if name == "BSSLoss" else network(1, width=8)
    teacher = teacher or TwoTeachers(robust, network(3, width=8))
    sub_terms = {**dict(others), "term": block_of(name, **options)}
    # BSS has no samples in the last quarter of the epochs
    return tiny_box(sub_terms, student=student or network(2), teacher=teacher, double=double, num_epochs=4)


def begin(name, **options):
    box = make(name, **options)
    box.pre_epoch_process(epoch=0)
    return box


def batch(name, box):
    return batch_for(name, box.org_teacher_model, box.org_student_model)


def forward(box, x, y):
    return box.forward_process(x, y, pairs(y, x.dtype))


def gradient_of(net):
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def test_everything_registered_has_a_row():
    assert not unregistered()


@every
def test_trains_the_student_and_not_the_teacher(name):
    box = begin(name)
    before = copy.deepcopy(box.org_teacher_model.state_dict())
    loss = forward(box, *batch(name, box))
    loss.backward()
    gradient = gradient_of(box.org_student_model)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all() and gradient.abs().sum() > 0
    assert all(p.grad is None for p in box.org_teacher_model.parameters())
    assert all(torch.equal(before[key], value) for key, value in box.org_teacher_model.state_dict().items())


@every
def test_examples_are_in_the_ball_and_the_range(name, monkeypatch):
    found = []
    run = Step._run

    def spy(self, search, term):
        examples = run(self, search, term)
        clean = self.choose(search.source).images[examples.index]
        path = [] if examples.path is None else list(examples.path)
        found.extend((search.threat, rows, clean) for rows in [examples.rows, *path])
        return examples

    monkeypatch.setattr(Step, "_run", spy)
    box = begin(name)
    forward(box, *batch(name, box))
    assert found
    for threat, rows, clean in found:
        assert len(rows) and not torch.equal(rows, clean)
        assert (threat.distance(rows, clean) <= threat.eps * (1 + 1e-5)).all()
        low, high = threat.limits(clean)
        assert (rows >= low - 1e-5).all() and (rows <= high + 1e-5).all()


def left_behind(box, x, y):
    """What a step leaves in the networks, the hooks and the random streams."""
    torch.manual_seed(3)
    box.forward_process(x, y, pairs(y))
    networks = [box.org_student_model, box.org_teacher_model]
    return {
        "buffers": [b.clone() for net in networks for b in net.buffers()],
        "modes": [m.training for m in box.org_student_model.modules()],
        "gradients": [p.grad for net in networks for p in net.parameters()],
        "hooks": [len(inner) for d in (box.student_io_dict, box.teacher_io_dict) for inner in d.values()],
        "forward hooks": [len(m._forward_hooks) for net in networks for m in net.modules()],
        "stream": torch.get_rng_state(),
    }


@every
def test_leaves_no_trace(name):
    """Against the host alone: a student with dropout and batch normalisation."""
    found = []
    for weight in (1.0, 0.0):
        box = make(name, others={"ce": CE}.items(), student=network(2, dropout=0.3), student_bn="batch")
        block = box.criterion.term_dict["term"]
        box.criterion.term_dict["term"] = (block[0], weight)
        box.pre_epoch_process(epoch=0)
        # the host alone leaves the teacher in train mode
        box.org_teacher_model.eval()
        found.append(left_behind(box, *batch(name, box)))
    for what, values in found[0].items():
        assert all(map(equal, values, found[1][what])), what


def equal(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@every
def test_repeats_under_a_seed(name):
    def losses():
        torch.manual_seed(11)
        box = begin(name, student=network(2, dropout=0.3))
        x, y = batch(name, box)
        return [float(step(box, x, y, pairs(y))) for _ in range(2)]

    assert losses() == losses()


@every
def test_autocast(name):
    box = begin(name)
    x, y = batch(name, box)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = forward(box, x, y)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    gradient = gradient_of(box.org_student_model)
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0


@every
def test_channels_last(name):
    box = begin(name, double=True)
    x, y = batch(name, box)
    expected = forward(box, x.double(), y)
    found = forward(begin(name, double=True), x.double().contiguous(memory_format=torch.channels_last), y)
    assert torch.allclose(found, expected, rtol=1e-9)


@every
@pytest.mark.parametrize("count", [1, 8])
def test_one_image_and_identical_ones(name, count):
    x, y = images(1)
    box = begin(name)
    x, y = x.expand(count, -1, -1, -1), y.expand(count)
    if name in NEEDS_TWO_CLASSES:
        with pytest.raises(ConfigError, match="partner"):
            forward(box, x, y)
        return
    loss = forward(box, x, y)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(gradient_of(box.org_student_model)).all()


@every
def test_student_that_equals_the_teacher(name):
    student = network(1, width=8)
    teacher = TwoTeachers(copy.deepcopy(student), copy.deepcopy(student))
    box = begin(name, student=student, teacher=teacher, student_bn="eval", search_bn="eval")
    box.org_student_model.eval()
    loss = forward(box, *batch(name, box))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(gradient_of(student)).all()


@pytest.mark.parametrize("name", sorted(WITHOUT_TEACHER))
def test_without_a_teacher(name):
    box = tiny_box({"term": block_of(name)}, teacher=None)
    box.pre_epoch_process(epoch=0)
    forward(box, *images()).backward()
    assert gradient_of(box.org_model).abs().sum() > 0


@pytest.mark.parametrize("name", [name for name in ROWS if name not in WITHOUT_TEACHER])
def test_without_a_teacher_is_refused(name):
    box = tiny_box({"term": block_of(name)}, teacher=None)
    with pytest.raises(ConfigError, match="teacher") as error:
        box.pre_epoch_process(epoch=0)
    assert "sub_terms.term." in error.value.path

"""SmaraAD beside others and under wrong settings: maps that cannot be had, no trace, costs, shared searches."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
import torch.distributed as dist
from robust import PARTICLES, TWO_STEPS, WIDE, batch, block, sharp
from timm.models.vision_transformer import VisionTransformer
from tiny import NUM_CLASSES, bound, images, leave_process_group, network, term, tiny_box, with_side
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel

from torchdistill_adv.attribution import layout_of
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.losses.base import Cost

SMARAAD = functools.partial(block, "SmaraADLoss")
TERM = "train.criterion.kwargs.sub_terms.smaraad.criterion.kwargs"


def pooling(seed, width=4):
    """A network whose maps are exact, of its module 2; those of the other tiny ones are Grad-CAM."""
    torch.manual_seed(seed)
    features = nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, NUM_CLASSES))


every_kind = pytest.mark.parametrize("make", [pooling, sharp])


def box_of(make, hooks=None, **options):
    """A box in float64."""
    return bound({"smaraad": SMARAAD(**options)}, teacher=make(1, width=8), student=make(2), double=True, hooks=hooks)


def passes(net):
    """Rows of every forward pass of the network from now on."""
    seen = []
    net.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    return seen


# what is refused, and where


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.ReLU(), nn.Linear(8, NUM_CLASSES))


def vit():
    return VisionTransformer(6, 2, in_chans=2, embed_dim=8, depth=1, num_heads=2, num_classes=NUM_CLASSES)


def one_class():
    return network(1, num_classes=1)


@pytest.mark.parametrize(
    "networks, options, path, found",
    [
        ({"student": mlp}, {}, "student_module", r"no module with an output \(N, C, h, w\)"),
        ({"teacher": mlp}, {"alignment": "feature"}, "teacher_module", "none would do at images"),
        ({}, {"student_module": "backbone.3"}, "student_module", r"no module 'backbone.3'; Known: 0, 1, 2, 3"),
        ({}, {"teacher_module": "6"}, "teacher_module", r"'6', .* output \(1, 5\).*would do: .*3 \(8, 2, 2\)"),
        ({"teacher": vit}, {}, "teacher_module", r"tokens.*name the module.*patch_embed.proj \(8, 3, 3\)"),
        ({"teacher": one_class, "student": one_class}, {"alignment": "none"}, "top_k", "at least 2 classes"),
    ],
)
def test_networks_that_do_not_fit_are_refused_at_the_first_step(networks, options, path, found):
    box = bound({"smaraad": SMARAAD(**options)}, **{who: make() for who, make in networks.items()})
    with pytest.raises(ConfigError, match=found) as error:
        box.forward_process(*images())
    assert error.value.path == f"{TERM}.{path}"
    assert not any(m._forward_hooks for m in box.org_student_model.modules())


def test_a_module_of_the_objective_is_told_as_such():
    objective = {"key": "kl_cam_teacher_student", "kwargs": {"student_module": "9"}}
    box = bound({"adaad": block("AdaADLoss", objective=objective)})
    with pytest.raises(ConfigError, match="no module '9'") as error:
        box.forward_process(*images())
    assert error.value.path == f"{TERM}.objective.kwargs.student_module".replace("smaraad", "adaad")


class WithAuxiliaryLogits(nn.Module):
    """In train mode, as Inception."""

    def __init__(self):
        super().__init__()
        self.net = network(2)

    def forward(self, x):
        return (self.net(x), self.net(x)) if self.training else self.net(x)


def test_a_student_that_gives_no_logits_in_train_mode_is_refused():
    box = bound({"smaraad": SMARAAD()}, student=WithAuxiliaryLogits())
    with pytest.raises(ConfigError, match="returns a tuple"):
        box.forward_process(*images())


def test_a_transformer_trains_with_a_named_module():
    box = bound({"smaraad": SMARAAD(teacher_module="patch_embed.proj")}, teacher=vit(), student=vit())
    with pytest.raises(ConfigError, match="tokens") as error:
        box.forward_process(*images())
    assert error.value.path == f"{TERM}.student_module"
    names = {"teacher_module": "patch_embed.proj", "student_module": "patch_embed.proj"}
    box = bound({"smaraad": SMARAAD(**names)}, teacher=vit(), student=vit())
    box.forward_process(*images()).backward()
    assert all(torch.isfinite(p.grad).all() for p in box.org_student_model.parameters())


@pytest.mark.parametrize(
    "options, path, found",
    [
        ({"matching": "slak"}, "matching", "did you mean 'slack'"),
        ({"alignment": "features"}, "alignment", "did you mean 'feature'"),
        ({"top_k": 1}, "top_k", ">= 2"),
        ({"sharpness": 0}, "sharpness", "> 0"),
        ({"alignment_weight": -1}, "alignment_weight", ">= 0"),
        ({"plus_plus": 1}, "plus_plus", "true or false"),
        ({"student_modul": "2"}, "student_modul", "did you mean 'student_module'"),
    ],
)
def test_bad_options_name_their_yaml_path(options, path, found):
    box = tiny_box({"smaraad": SMARAAD(**options)})
    with pytest.raises(ConfigError, match=found) as error:
        box.pre_epoch_process(epoch=0)
    assert error.value.path == f"{TERM}.{path}"


@pytest.mark.parametrize("options", [{}, {"alignment": "none", "plus_plus": True}, {"alignment": "none", "top_k": 2}])
def test_missing_labels_are_refused_where_they_are_needed(options):
    with pytest.raises(ConfigError, match=r"found labels NoneType; .*smaraad.* needs int64"):
        bound({"smaraad": SMARAAD(**options)}).forward_process(images()[0], None)


# no trace, and no pass too many


@pytest.mark.parametrize("make, path", [(pooling, "2"), (sharp, "3")])
def test_the_hosts_own_hooks_keep_the_clean_features(make, path):
    """torchdistill's hooks, on the very modules that the maps are from."""
    box, (x, y) = box_of(make, hooks={"input": [], "output": [path]}, **WIDE), batch()
    seen = []
    box.criterion.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    for _ in range(2):
        networks = {"student": box.org_student_model, "teacher": box.org_teacher_model}
        expected = {who: copy.deepcopy(net)[: int(path) + 1](x) for who, net in networks.items()}
        box.forward_process(x, y)
        assert all(torch.equal(seen[-1][who][path]["output"], features) for who, features in expected.items())
        assert not box.student_io_dict[path] and not box.teacher_io_dict[path]


@pytest.mark.parametrize("who", ["org_student_model", "org_teacher_model"])
@pytest.mark.parametrize(
    "make, fails_at",
    [*((make, at) for make in (pooling, sharp) for at in (1, 2, 4)), (sharp, 5)],
    ids=[*(f"{name}-{at}" for name in ("exact", "grad-cam") for at in ("host", "search", "examples")), "clean images"],
)
def test_nothing_stays_after_an_exception(make, who, fails_at):
    box = box_of(make, **WIDE, student_bn="eval")
    box.forward_process(*batch())
    calls = []

    def fail(module, inputs):
        calls.append(inputs)
        if len(calls) == fails_at:
            raise RuntimeError("half way")

    def state():
        modules = [m for net in (box.org_student_model, box.org_teacher_model) for m in net.modules()]
        return [(len(m._forward_hooks), m.training, [id(b) for b in m._buffers.values()]) for m in modules]

    getattr(box, who)[-1].register_forward_pre_hook(fail)
    before = state()
    with pytest.raises(RuntimeError, match="half way"):
        box.forward_process(*batch())
    assert state() == before and math.isfinite(box.forward_process(*batch()).item())


MAPS = [(pooling, "attribution", 0), (pooling, "feature", 0), (sharp, "feature", 0), (sharp, "attribution", 6)]


@pytest.mark.parametrize("make, alignment, clean", MAPS)
def test_clean_images_pass_once_more_for_grad_cam_alone(make, alignment, clean):
    box = box_of(make, **WIDE, alignment=alignment)
    for net in (box.org_teacher_model, box.org_student_model):
        layout_of(net, batch()[0], None, "")
    seen = [passes(net) for net in (box.org_teacher_model, box.org_student_model)]
    for number in range(2):
        box.forward_process(*batch())
        # the first step tries the networks, and the teacher's logits of the host, on one image
        counted = [[rows for rows in of if rows > 1] for of in seen]
        assert counted == [[6, 6, 6, 6] + [6] * (clean > 0)] * 2 and (number == 0 or all(1 not in of for of in seen))
        for of in seen:
            of.clear()


@pytest.mark.parametrize("make, alignment, clean", MAPS)
@pytest.mark.parametrize("student_bn", ["train", "batch", "eval"])
def test_clean_images_move_the_running_statistics_once(searches, make, alignment, clean, student_bn):
    box, (x, y) = box_of(make, **WIDE, alignment=alignment, student_bn=student_bn), batch()
    student = copy.deepcopy(box.org_student_model)
    box.forward_process(x, y)
    for rows in [x, *([searches[0][1].rows] if student_bn == "train" else [])]:
        student(rows)
    for name, buffer in student.named_buffers():
        assert torch.equal(buffer, box.org_student_model.get_buffer(name)), name


class Drawing(nn.Module):
    """Draws a number in every pass, in eval mode too."""

    def forward(self, x):
        self.drawn = {**getattr(self, "drawn", {}), len(x): torch.rand(())}
        return x


def test_the_host_draws_what_it_would_without_maps():
    """Finding the maps comes before its own pass, and passes one image."""
    draws = []
    for alignment in ("attribution", "none"):
        box = box_of(pooling, alignment=alignment, adversary="FGSM")
        box.org_student_model.append(drawing := Drawing())
        box.criterion.register_forward_pre_hook(lambda module, inputs, of=drawing: draws.append(of.drawn[6]))
        torch.manual_seed(7)
        box.forward_process(*batch())
    assert draws[0] == draws[1]


def hooks_of_the_host(box):
    """How many hooks the networks have after the host's own passes, in every step from now on; none is left then."""
    found = []
    networks = box.org_teacher_model, box.org_student_model
    box.criterion.register_forward_pre_hook(
        lambda module, inputs: found.append([sum(len(m._forward_hooks) for m in net.modules()) for net in networks])
    )
    return found


def value_of(box, x, y, supp_dict=None):
    """The value of a step, and the student's gradient."""
    value = box.forward_process(x, y, supp_dict)
    return value.detach(), torch.autograd.grad(value, list(box.org_student_model.parameters()))


def assert_same(found, expected):
    assert torch.allclose(found[0], expected[0], rtol=1e-12)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(found[1], expected[1], strict=True))


@pytest.mark.parametrize("alignment", ["attribution", "feature"])
def test_compiled_networks_are_not_hooked_and_stay_compiled(alignment):
    plain = box_of(pooling, **WIDE, alignment=alignment)
    hooks = hooks_of_the_host(plain)
    expected = value_of(plain, *batch())
    assert hooks == [[1, 1]]
    box, counter = box_of(pooling, **WIDE, alignment=alignment), CompileCounter()
    for net in (box.org_teacher_model, box.org_student_model):
        net.compile(backend=counter)
    hooks = hooks_of_the_host(box)
    assert_same(value_of(box, *batch()), expected)
    assert hooks == [[0, 0]] and counter.frame_count > 0


PROBABILITIES = {"forward_proc": "probabilities_for_test"}


@pytest.mark.parametrize("alignment", ["attribution", "feature"])
@pytest.mark.parametrize("sides", [{"student": PROBABILITIES}, {"teacher": PROBABILITIES}], ids=str)
def test_a_pass_of_the_host_without_logits_is_not_taken(alignment, sides):
    options = {**WIDE, "alignment": alignment, "plus_plus": True}
    make = lambda: (pooling(1, width=8).double(), pooling(2).double())  # noqa: E731
    boxes = [with_side({"smaraad": SMARAAD(**options)}, make(), **of) for of in (sides, {})]
    assert_same(*(value_of(box, *batch()) for box in boxes))


def test_of_several_views_the_first_is_taken():
    make = lambda: (pooling(1, width=8).double(), pooling(2).double().eval())  # noqa: E731
    sskd = {"forward_proc": "forward_batch4sskd"}
    box = with_side({"smaraad": SMARAAD(**WIDE)}, make(), teacher=sskd, student=sskd)
    (x, _), (_, y) = images(24), batch()
    views = x.double().view(6, 4, *x.shape[1:])
    box.org_student_model.eval()
    seen = passes(box.org_student_model)
    found = value_of(box, views, y)
    assert [rows for rows in seen if rows > 1] == [24, 6, 6, 6]
    plain = with_side({"smaraad": SMARAAD(**WIDE)}, make())
    plain.org_student_model.eval()
    assert_same(found, value_of(plain, views[:, 0], y))


def test_a_module_of_both_networks_is_not_taken_for_the_other_ones():
    """Its last output in the host's passes is the student's."""

    def run(make_student_part):
        part = pooling(3)[:3].double().eval()
        heads = [nn.Sequential(nn.Conv2d(2, 2, 3), of, *pooling(seed)[3:]) for seed, of in ((1, part), (2, part))]
        teacher, student = (net.double().eval() for net in heads)
        student[1] = make_student_part(part)
        box = bound({"smaraad": SMARAAD(**WIDE)}, teacher=teacher, student=student)
        student.eval()
        return box.forward_process(*batch()).item()

    assert abs(run(lambda part: part) - run(copy.deepcopy)) < 1e-10


def test_a_distributed_student_has_the_same_gradient(tmp_path):
    def run(wrap):
        box = box_of(pooling, **WIDE)
        box.student_model = wrap(box.student_model)
        box.pre_epoch_process(epoch=0)
        seen = passes(box.org_student_model)
        box.forward_process(*batch()).backward()
        assert [rows for rows in seen if rows > 1] == [6, 6, 6, 6]
        return [p.grad for p in box.org_student_model.parameters()]

    expected = run(lambda net: net)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        found = run(DistributedDataParallel)
    finally:
        leave_process_group()
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(found, expected, strict=True))


def test_a_layout_is_found_once_for_each_network_and_name():
    (x, _), net, other = images(), network(1), pooling(1)
    seen = passes(net)
    layouts = [layout_of(net, x, path, "student_module") for path in (None, None, "1", "1")]
    assert [layout.feature for layout in layouts] == ["3", "3", "1", "1"] and seen == [1, 1]
    assert layout_of(other, x, None, "student_module").feature == "2"


@pytest.mark.parametrize("adversary", [TWO_STEPS, PARTICLES], ids=["one", "two"])
@pytest.mark.parametrize("options", [{}, {"label_free": True}, {"alignment": "feature"}, {"alignment": "none"}])
def test_cost_is_the_number_of_passes(options, adversary):
    box = box_of(pooling, adversary=adversary, plus_plus=True, **options)
    box.forward_process(*batch())  # with passes of its own, to try networks and find maps
    seen = [passes(net) for net in (box.org_teacher_model, box.org_student_model)]
    box.forward_process(*batch())
    loss, host = term(box, "smaraad"), 6
    cost = functools.reduce(Cost.plus, [loss.search.cost(6), *loss.outer_cost(6).values()])
    assert [sum(rows) for rows in seen] == [cost.teacher_forward + host, cost.student_forward + host]


@pytest.mark.parametrize(
    "blocks, num_searches",
    [
        ([SMARAAD(**WIDE), SMARAAD(**WIDE, matching="kl", plus_plus=True)], 1),
        ([SMARAAD(**WIDE), SMARAAD(**WIDE, alignment="feature")], 2),
        ([SMARAAD(**WIDE), block("AdaADLoss", **WIDE)], 2),
        ([SMARAAD(**WIDE), block("AdaADLoss", **WIDE, objective="kl_cam_teacher_student")], 1),
        ([SMARAAD(**WIDE, alignment="none"), block("AdaADLoss", **WIDE)], 1),
    ],
)
def test_terms_add_up_and_share_equal_searches(searches, blocks, num_searches):
    def value(*terms):
        box = bound(dict(enumerate(terms)), teacher=sharp(1, width=8), student=sharp(2), double=True)
        return box.forward_process(*batch()).item()

    together = value(*blocks)
    assert len(searches) == num_searches
    assert abs(together - sum(value(block) for block in blocks)) < 1e-10

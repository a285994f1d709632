"""Twins compute what their networks compute, with the gradient to the images, and leave no trace in them."""

from __future__ import annotations

import copy
import logging
import shutil
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm
from torchdistill.core.forward_hook import ForwardHookManager
from torchdistill.models.registry import get_model

from tests import tiny
from torchdistill_adv import twins
from torchdistill_adv.adversaries import PGD
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.noise import Noise
from torchdistill_adv.objectives import OBJECTIVES, Objective, View
from torchdistill_adv.threat import ThreatModel
from torchdistill_adv.twins import SearchPasses, Twin, Twins

CPU = torch.device("cpu")
EXACT = SearchPasses("float32", channels_last=True, fold=True, compile=False).pick(CPU)
HALF = SearchPasses("bfloat16", channels_last=True, fold=True, compile=False).pick(CPU)


@pytest.fixture(autouse=True)
def seed():
    """Networks and rows are the same in every run: a gradient at a kink may be another one after rounding."""
    torch.manual_seed(0)


def used(network):
    """``network`` as training leaves it: statistics and scales that are not those of a new one."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return network.eval()


def both(function, rows):
    leaf = rows.clone().requires_grad_()
    logits = function(leaf)
    (gradient,) = torch.autograd.grad(logits.float().logsumexp(1).sum(), leaf)
    return logits.detach(), gradient


def assert_same(twin, network, rows):
    with twin.how.autocast(CPU):
        logits, gradients = both(twin, rows)
    wanted, directions = both(network, rows)
    assert (logits - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    # single values may differ: a rectifier turns at rounding
    assert torch.cosine_similarity(gradients.flatten(1), directions.flatten(1)).min() > 0.999
    assert torch.allclose(gradients.flatten(1).norm(dim=1), directions.flatten(1).norm(dim=1), rtol=1e-2)


MODELS = {
    "resnet20": ({"num_classes": 10}, 21),
    "cifar_resnet18": ({"num_classes": 10}, 20),
    # a pre-activation network: one of two normalisations in each block has a convolution before it, one its sum
    "cifar_wide_resnet": ({"num_classes": 10, "depth": 10, "widen_factor": 1}, 3),
    "cifar_mobilenet_v2": ({"num_classes": 10}, None),
    "small_cnn": ({"num_classes": 10, "in_channels": 3}, 3),
    "cifar_vgg8": ({"num_classes": 10}, None),
}


@pytest.mark.parametrize("key", MODELS)
def test_a_twin_computes_what_its_network_computes(key):
    kwargs, folds = MODELS[key]
    network, rows = used(get_model(key, **kwargs)), torch.randn(5, 3, 32, 32)
    twin = Twin(network, EXACT, rows)
    assert len(twin.folded) == (folds or len(twin.folded)) > 0
    assert_same(twin, network, rows)
    with torch.no_grad():
        for tensor in [*network.parameters(), *(b for b in network.buffers() if b.is_floating_point())]:
            tensor.mul_(1.25)
    twin.update()
    assert_same(twin, network, rows)


class Odd(nn.Module):
    """A network whose normalisation looks as if it could be folded."""

    def __init__(self, case):
        super().__init__()
        self.case = case
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.other = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        y = self.conv(x)
        if self.case == "also skipped":
            z = self.norm(y) + y
        elif self.case == "changed in place":
            z = self.norm(y.relu_())
        elif self.case == "two normalisations":
            z = self.norm(y) + self.other(y * y)
        elif self.case == "called twice":
            z = self.norm(y) + self.norm(self.conv(x.flip(3)))
        elif self.case == "after a sum":
            z = self.norm(y + 1)
        elif self.case == "two for one":
            z = self.norm(y) + self.other(y)
        return self.fc(F.relu(z).mean((2, 3)))


@pytest.mark.parametrize(
    "case", ["also skipped", "changed in place", "two normalisations", "called twice", "after a sum", "two for one"]
)
def test_what_cannot_be_folded_is_not_also_in_a_new_network(case):
    """In a new network normalisation is nearly nothing, so a wrong twin would be noticed after training only."""
    network, rows = Odd(case).eval(), torch.randn(5, 3, 8, 8)
    twin = Twin(network, EXACT, rows)
    assert not twin.folded
    used(network)
    twin.update()
    assert_same(twin, network, rows)


class Standardised(nn.Conv2d):
    """Its output does not scale with its weight."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


@pytest.mark.parametrize(
    ("layers", "folds"),
    [
        ([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)], 1),
        ([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)], 0),
        ([nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4)], 1),
        ([nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)], 0),
        ([Standardised(3, 4, 3), nn.BatchNorm2d(4)], 0),
        ([nn.Conv2d(3, 4, 3, groups=1, padding=2, padding_mode="reflect"), nn.BatchNorm2d(4)], 1),
        ([parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)], 0),
    ],
)
def test_which_layers_are_folded(layers, folds):
    network = used(nn.Sequential(*layers, nn.LeakyReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(5)))
    rows = torch.randn(5, 3, 8, 8)
    network(rows)
    twin = Twin(network, EXACT, rows)
    assert len(twin.folded) == folds
    assert_same(twin, network, rows)
    assert Twin(network, SearchPasses("float32", True, False, False).pick(CPU), rows).folded == {}


def test_a_linear_layer_is_folded():
    network = used(nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5)))
    twin = Twin(network, EXACT, torch.randn(5, 3, 2, 2))
    assert list(twin.folded) == ["2"]
    assert_same(twin, network, torch.randn(5, 3, 2, 2))


def test_half_precision_is_near_and_its_weights_are_cast_once():
    network, rows = used(get_model("resnet20", num_classes=10)), torch.randn(8, 3, 32, 32)
    twin = Twin(network, HALF, rows)
    assert {p.dtype for p in twin.module.parameters()} == {torch.bfloat16}
    with twin.how.autocast(CPU):
        assert not torch.equal(twin(rows), network(rows))
        logits, gradient = both(twin, rows)
    wanted, direction = both(network, rows)
    # bfloat16 has 8 bits
    assert 0 < (logits - wanted).abs().max() < 0.05 * wanted.abs().max()
    assert gradient.dtype == torch.float32
    assert torch.cosine_similarity(gradient.flatten(1), direction.flatten(1)).min() > 0.95
    assert twin.describe() == "bfloat16, channels last, 21 normalisations folded"


def test_depthwise_convolutions_stay_in_float32_on_a_cpu():
    network, rows = used(get_model("cifar_mobilenet_v2", num_classes=10)), torch.randn(2, 3, 32, 32)
    twin = Twin(network, HALF, rows)
    seen = {module.groups > 1: module.weight.dtype for module in twin.module.modules() if hasattr(module, "groups")}
    assert seen == {True: torch.float32, False: torch.bfloat16}
    with twin.how.autocast(CPU):
        logits, _ = both(twin, rows)
    wanted, _ = both(network, rows)
    assert 0 < (logits - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_no_trace_in_the_network():
    network, rows = used(tiny.network(0, dropout=0.5)), tiny.images()[0]
    network[0].weight.grad = torch.ones_like(network[0].weight)
    before, streams = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    attributes = [set(vars(m)) for m in network.modules()]
    calls = []
    manager = ForwardHookManager(CPU)
    manager.add_hook(network, "1", requires_input=True, requires_output=True)
    twin = Twin(network, HALF, rows)
    manager.io_dict["1"].clear()
    with twin.how.autocast(CPU):
        both(twin, rows)
    assert manager.io_dict["1"] == {} and not calls
    manager.clear()
    assert torch.equal(streams, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), network.state_dict().values(), strict=True))
    assert torch.equal(network[0].weight.grad, torch.ones_like(network[0].weight))
    assert [set(vars(m)) for m in network.modules()] == attributes
    assert all(p.requires_grad for p in network.parameters())
    assert not any(p.requires_grad for p in twin.module.parameters())
    shared = {p.data_ptr() for p in network.state_dict().values()} & {
        p.data_ptr() for p in twin.module.state_dict().values()
    }
    assert not shared


def refused(network, rows, caplog):
    with caplog.at_level(logging.INFO):
        assert Twins().of(network, "student", EXACT, rows) is None
    return caplog.records[-1].getMessage()


def test_networks_without_a_twin(caplog):
    rows = tiny.images()[0]
    network = tiny.network(0)
    assert "in train mode" in refused(network, rows, caplog)
    assert "torch.float64" in refused(copy.deepcopy(network).double().eval(), rows, caplog)
    hooked = copy.deepcopy(network).eval()
    hooked[1].register_forward_hook(lambda module, args, output: 2 * output)
    assert "'1' has a hook" in refused(hooked, rows, caplog)
    assert "hook" in refused(nn.Sequential(spectral_norm(network[0]), *network[1:]).eval(), rows, caplog)
    steered = tiny.network(0).eval()
    steered[2].register_full_backward_hook(lambda module, inputs, outputs: None)
    assert "'2' has a hook" in refused(steered, rows, caplog)
    patched = tiny.network(0).eval()
    patched[2].forward = lambda x: -x
    assert "'2' has a forward of its own" in refused(patched, rows, caplog)

    class Drawing(nn.Sequential):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    assert "returns other" in refused(Drawing(*tiny.network(0)).eval(), rows, caplog)

    class Holder(nn.Sequential):
        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    holder = Holder(*tiny.network(0)).eval()
    holder(rows)
    assert "cannot be copied" in refused(holder, rows, caplog)


class Viewing(nn.Sequential):
    """Needs its map in one order of memory."""

    def forward(self, x):
        return self[1](self[0](x).view(len(x), -1))


class Clamped(nn.Sequential):
    """Changes the gradient where the twin would have another one."""

    def forward(self, x):
        y = self[0](x)
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
        return nn.Sequential(*list(self)[1:])(y)


class AsNumbers(nn.Sequential):
    """Reads its weights in a way that half precision does not have."""

    def forward(self, x):
        return super().forward(x) + float(self[-1].weight.detach().numpy().sum())


class Itself(nn.Conv2d):
    """Is never copied."""

    def __deepcopy__(self, memo):
        return self


class Stubborn(nn.Conv2d):
    def __deepcopy__(self, memo):
        raise ValueError("not me")


@pytest.mark.parametrize(
    ("network", "how", "reason"),
    [
        (Viewing(nn.Conv2d(2, 4, 3), nn.Linear(64, 5)), EXACT, "cannot be passed"),
        (used(Clamped(*tiny.sharp(0))), EXACT, "other gradients"),
        (AsNumbers(*tiny.network(0)), HALF, "cannot be passed"),
        (nn.Sequential(Itself(2, 4, 3, padding=1), *tiny.network(0)[1:]), EXACT, "modules of its own"),
        (nn.Sequential(Stubborn(2, 4, 3, padding=1), *tiny.network(0)[1:]), EXACT, "cannot be copied"),
        (torch.jit.trace(tiny.network(0).eval(), tiny.images()[0]), EXACT, "TorchScript"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_finished_twin_is_held_against_its_network(network, how, reason, caplog):
    rows = tiny.images()[0]
    network = network.eval()
    with torch.no_grad():
        wanted = network(rows)
    with caplog.at_level(logging.INFO):
        assert Twins().of(network, "student", how, rows) is None
    assert reason in caplog.records[-1].getMessage()
    with torch.no_grad():
        assert torch.equal(network(rows), wanted)


class Scaled(nn.Sequential):
    """Has a plain attribute that its output depends on."""

    scale = 1.0

    def forward(self, x):
        return self.scale * super().forward(x)


def test_a_twin_is_made_anew_when_attributes_change(caplog):
    network, rows = Scaled(*tiny.network(0)).eval(), tiny.images()[0]
    made = Twins()
    with caplog.at_level(logging.INFO):
        first = made.of(network, "student", EXACT, rows)
        assert made.of(network, "student", EXACT, rows) is first
        network.scale = 3.0
        second = made.of(network, "student", EXACT, rows)
        assert_same(second, network, rows)
        assert made.of(network, "student", EXACT, rows) is second is not first
        network.train()
        assert made.of(network, "student", EXACT, rows) is None
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 2 and "1 normalisations folded" in texts[0] and "in train mode" in texts[1]


CHANGES = {
    "a list": lambda network: network.gains.append(2.0),
    "an activation": lambda network: setattr(network, "act", torch.sigmoid),
    "the class": lambda network: setattr(network, "__class__", Negative),
    "a tensor by its data": lambda network: network.shift.data.add_(1),
    "a tensor": lambda network: setattr(network, "shift", torch.full((5,), 3.0)),
    "a bias": lambda network: network[-1].register_parameter("bias", nn.Parameter(torch.ones(5))),
    "no bias": lambda network: network[0].register_parameter("bias", None),
    "a submodule": lambda network: network.__setitem__(2, nn.Sigmoid()),
    "a buffer": lambda network: setattr(network, "offset", torch.ones(())),
    "assigned weights": lambda network: network.load_state_dict(
        {name: value * 2 for name, value in network.state_dict().items()}, assign=True
    ),
}


class Changing(nn.Sequential):
    """Depends on a list, a function and a tensor that are no parameters; keeps a tuple of tensors."""

    def __init__(self):
        super().__init__(*tiny.network(0))
        self[-1] = nn.Linear(16, 5, bias=False)
        self.gains, self.act, self.shift, self.offset = [1.0], torch.tanh, torch.zeros(5), None

    def forward(self, x):
        logits = super().forward(x) * sum(self.gains)
        self.last = (logits.detach(),)
        return self.act(logits) + self.shift + (0 if self.offset is None else self.offset)


class Negative(Changing):
    def forward(self, x):
        return -super().forward(x)


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_in_a_network_changes_in_its_twin(change):
    network, rows = Changing().eval(), tiny.images()[0]
    del network.offset
    network.register_buffer("offset", None)
    made = Twins()
    assert_same(made.of(network, "student", EXACT, rows), network, rows)
    before = network(rows).detach()
    CHANGES[change](network)
    network.eval()
    assert not torch.allclose(network(rows), before)
    assert_same(made.of(network, "student", EXACT, rows), network, rows)


def test_a_hook_in_the_place_of_torchdistills_is_seen(caplog):
    network, rows = tiny.network(0).eval(), tiny.images()[0]
    manager, made = ForwardHookManager(CPU), Twins()
    manager.add_hook(network, "1", requires_input=False, requires_output=True)
    assert made.of(network, "student", EXACT, rows) is not None
    manager.clear()
    network[1].register_forward_hook(lambda module, args, output: 2 * output)
    with caplog.at_level(logging.INFO):
        assert made.of(network, "student", EXACT, rows) is None
    assert "'1' has a hook" in caplog.text


class StartsAtZero(nn.Module):
    """The convolution has a second reader, of which a new network shows nothing."""

    def __init__(self, case):
        super().__init__()
        self.case, self.conv, self.norm = case, nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.last, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(4, 5)
        self.gate = nn.Parameter(torch.zeros(()))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        if case == "linear layer":
            nn.init.zeros_(self.fc.weight)

    def forward(self, x):
        y = self.conv(x)
        if self.case == "gate":
            y = self.norm(y) + self.gate * y.tanh()
        elif self.case == "gate first":
            y = self.gate * y.tanh() + self.norm(y)
        elif self.case == "branch":
            y = self.norm(y) + self.last(y.relu())
        elif self.case == "linear layer":
            y = self.norm(y).relu() + y
        else:
            y = self.norm(y.mul_(1 + self.gate))
        return self.fc(y.relu().mean((2, 3)))


@pytest.mark.parametrize("case", ["gate", "gate first", "branch", "linear layer", "in place"])
def test_a_second_reader_is_seen_where_it_starts_at_zero(case):
    network, rows = StartsAtZero(case).eval(), torch.randn(5, 2, 8, 8)
    made = Twins()
    twin = made.of(network, "student", EXACT, rows)
    assert twin is not None and not twin.folded
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
        used(network)
    assert_same(made.of(network, "student", EXACT, rows), network, rows)


@pytest.mark.parametrize(
    ("layers", "shape", "folds"),
    [
        ([nn.AdaptiveAvgPool2d(1), nn.Flatten()], (5, 3, 4, 4), 0),
        ([nn.Conv2d(3, 5, 4), nn.BatchNorm2d(5), nn.Flatten()], (5, 3, 4, 4), 1),
        ([nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 2, 3), nn.Flatten()], (5, 3, 4, 4), 0),
        ([nn.Flatten(2), nn.Linear(16, 6), nn.BatchNorm1d(3), nn.Flatten()], (5, 3, 4, 4), 0),
        ([nn.Flatten(2), nn.Linear(16, 3), nn.BatchNorm1d(3), nn.Flatten()], (5, 3, 4, 4), 0),
    ],
    ids=["without weights", "all is folded", "three dimensions", "along tokens", "along as many tokens"],
)
def test_unusual_networks(layers, shape, folds):
    network, rows = used(nn.Sequential(*layers)), torch.randn(shape)
    twin = Twin(network, EXACT, rows)
    assert len(twin.folded) == folds
    assert_same(twin, network, rows)


def test_a_copied_box_has_twins_of_its_own_networks():
    box = tiny.bound({"tald": tiny.tald(search={"fold": True})})
    tiny.step(box, *tiny.images())
    other = copy.deepcopy(box)
    assert not other.__dict__["adversarial_binding"].twins._twins
    assert torch.equal(tiny.step(box, *tiny.images()), tiny.step(other, *tiny.images()))
    (twin,) = other.__dict__["adversarial_binding"].twins._twins.values()
    assert twin.network is other.org_teacher_model


@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles with a C++ compiler")
def test_a_compiled_twin():
    network, rows = used(tiny.network(0)), tiny.images()[0]
    twin = Twin(network, SearchPasses("float32", False, True, True).pick(CPU), rows)
    assert "compiled" in twin.describe()
    for some in (rows, rows[:4], rows):
        assert_same(twin, network, some)
    with torch.no_grad():
        network[0].weight.mul_(2)
    twin.update()
    assert_same(twin, network, rows)


def test_auto(monkeypatch):
    monkeypatch.undo()
    picked = SearchPasses().pick(CPU)
    units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert picked.dtype == (torch.bfloat16 if units else torch.float32)
    assert picked.channels_last and picked.fold
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        for unit in ("avx512_bf16", "amx_tile"):
            monkeypatch.setattr(torch.cpu, f"_is_{unit}_supported", lambda has=has: has)
        assert SearchPasses().pick(CPU).dtype == dtype
    with torch.autocast("cpu", torch.float16):
        assert SearchPasses().pick(CPU).dtype == torch.float16
        assert SearchPasses().pick(CPU, compares_itself=True).dtype == torch.float32
        assert SearchPasses("bfloat16").pick(CPU, compares_itself=True).dtype == torch.bfloat16
        assert SearchPasses("float32").pick(CPU).dtype == torch.float32
    network = tiny.network(0)
    assert not picked.compiles(network)
    assert SearchPasses(compile=True).pick(CPU).compiles(network)
    assert picked.compiles(torch.compile(network))
    network.compile()
    assert picked.compiles(network)


@pytest.mark.parametrize(
    ("block", "path", "text"),
    [
        ({"precision": "half"}, "search.precision", "bfloat16"),
        ({"channels_last": "yes"}, "search.channels_last", "true, false or 'auto'"),
        ({"fold": 1}, "search.fold", "true, false or 'auto'"),
        ({"precison": "float32"}, "search.precison", "precision"),
        ("bfloat16", "search", "{precision"),
    ],
)
def test_wrong_blocks(block, path, text):
    with pytest.raises(ConfigError, match=rf"tald.criterion.kwargs.{path}.*{text}"):
        tiny.bound({"kd": tiny.KD, "tald": tiny.tald(search=block)})


def view(student, teacher, rows):
    labels = torch.arange(len(rows)) % 5
    return View(rows, labels, student, teacher, Noise(0))


# attacks that look inside the networks find their maps by name here, where a fold would change what they see
NAMED = {"kl_cam_teacher_student": "0", "kl_features_teacher_student": "0"}


@pytest.mark.parametrize(("key", "named"), [*((key, False) for key in OBJECTIVES), *((key, True) for key in NAMED)])
def test_every_objective_has_the_same_value_and_gradient(key, named):
    student, teacher = used(tiny.sharp(2)), used(tiny.sharp(3, width=8))
    rows = tiny.images()[0]
    index = torch.arange(len(rows))
    modules = {f"{who}_module": NAMED[key] for who in ("student", "teacher")} if named else {}
    objective = Objective.build({"key": key, "kwargs": modules})
    kept = frozenset(modules.values())
    passed = [Twin(network, EXACT, rows, kept) for network in (student, teacher)]
    assert all(len(twin.folded) == (not named) for twin in passed)
    nearby = rows + 0.05 * torch.randn_like(rows)
    values = []
    for networks in ((student, teacher), passed):
        leaf = nearby.clone().requires_grad_()
        value = objective.bind(view(*networks, rows))(leaf, index)
        values.append((value.detach(), torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0]))
    for found, wanted in zip(values[1], values[0], strict=True):
        assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-2 * float(wanted.abs().max()))


ON_TEACHER_AND_STUDENT = {"num_steps": 5, "step_size": "2/255", "start": "gaussian"}


def adaad(**options):
    kwargs = {"threat": tiny.PIXEL_THREAT, "adversary": {"key": "PGD", "kwargs": ON_TEACHER_AND_STUDENT}, **options}
    return {"criterion": {"key": "AdaADLoss", "kwargs": kwargs}, "weight": 1.0}


def run_step(searches, search, **options):
    searches.clear()
    box = tiny.bound({"ad": adaad(search=search, **options)}, student=tiny.sharp(2), teacher=tiny.sharp(1, width=8))
    loss = tiny.step(box, *tiny.images())
    return box, loss, searches[0][1].rows


def test_a_search_with_twins_finds_what_one_without_finds(searches):
    x = tiny.images()[0]
    exact = {"precision": "float32", "channels_last": True, "fold": True, "compile": False}
    _, wanted_loss, wanted = run_step(searches, {"precision": "float32", "channels_last": False, "fold": False})
    box, loss, rows = run_step(searches, exact)
    assert len(box.__dict__["adversarial_binding"].twins._twins) == 2
    # a sign may differ where a gradient is at rounding
    assert ((rows - wanted).abs() < 1e-5).float().mean() > 0.99
    assert torch.allclose(loss, wanted_loss, rtol=1e-3)
    half = run_step(searches, {**exact, "precision": "bfloat16"})[2]
    assert half.dtype == torch.float32 and not torch.equal(half, wanted)
    threat = ThreatModel.build(tiny.PIXEL_THREAT)
    assert threat.distance(half, x).max() <= 8 / 255 * (1 + 1e-5)
    moved = [(r - x).flatten(1) for r in (half, wanted)]
    assert torch.cosine_similarity(*moved).min() > 0.9


def test_the_students_weights_are_taken_anew_in_every_step(searches):
    block = {"precision": "float32", "channels_last": True, "fold": True, "compile": False}
    box, *_ = run_step(searches, block)
    student = box.org_student_model
    with torch.no_grad():
        student[-1].weight.neg_()
        student[1].running_mean.add_(1)
    tiny.step(box, *tiny.images())
    (twin,) = [t for t in box.__dict__["adversarial_binding"].twins._twins.values() if t.network is student]
    searched = copy.deepcopy(twin)
    before = searches[-1][1].rows
    fresh = Twin(copy.deepcopy(student).eval(), EXACT, before)
    # the step itself moved the weights after the search
    assert not torch.allclose(searched(before), fresh(before))
    searched.network = student
    searched.update()
    assert_same(searched, student.eval(), before)


def test_a_student_in_train_mode_is_passed_as_it_is(searches, caplog):
    with caplog.at_level(logging.INFO):
        _, wanted, _ = run_step(
            searches, {"precision": "auto", "channels_last": False, "fold": False}, search_bn="batch"
        )
        _, loss, _ = run_step(searches, {}, search_bn="batch")
    assert "the student is passed as it is" in caplog.text
    assert torch.equal(loss, wanted)


def test_float16_keeps_gradients_that_vanish_below_its_range(searches):
    network = tiny.network(2)
    with torch.no_grad():
        network[-1].weight.mul_(1e-4)
    rows, index = tiny.images()[0], torch.arange(6)
    threat, noise = ThreatModel.build(tiny.PIXEL_THREAT), Noise(0)
    how = SearchPasses("float16", True, True, False).pick(CPU)
    twin = Twin(network.eval(), how, rows)
    passed = view(twin, None, rows)
    with how.autocast(CPU):
        found = PGD(3, 2 / 255, "none")(Objective.build("ce_student").bind(passed), rows, threat, noise)
    assert ((found.rows - rows[index]).abs() > 1e-3).float().mean() > 0.9


# every m-th step


def test_every_m_th_step_counts_m_times():
    x, y = tiny.images()
    values = {}
    for every in (1, 3):
        box = tiny.bound(
            {"tald": tiny.tald(1.0, every=every), "zero": {**tiny.CE, "weight": 0.0}},
            student=tiny.sharp(2),
            teacher=tiny.sharp(1),
        )
        values[every] = []
        for epoch in range(4):
            box.pre_epoch_process(epoch=epoch)
            values[every].append([box.forward_process(x, y, {}).item() for _ in range(7)])
    for once, thrice in zip(values[1], values[3], strict=True):
        due = [step for step, value in enumerate(thrice) if value]
        assert len(due) in (2, 3) and all(b - a == 3 for a, b in pairwise(due))
        assert [thrice[step] for step in due] == pytest.approx([3 * once[step] for step in due], rel=1e-5)
    # a short epoch is not always begun with a step that counts
    starts = {next(step for step, value in enumerate(row) if value) for row in values[3]}
    assert len(starts) > 1


def test_steps_without_a_search_have_none(searches):
    box = tiny.bound({"kd": tiny.KD, "tald": tiny.tald(every=2)})
    for _ in range(6):
        tiny.step(box, *tiny.images())
    assert len(searches) == 3
    binding = box.__dict__["adversarial_binding"]
    full = tiny.bound({"kd": tiny.KD, "tald": tiny.tald()}).__dict__["adversarial_binding"]
    assert binding.cost(6) == full.cost(6).times(0.5)
    shared = tiny.bound({"a": tiny.tald(every=2), "b": tiny.tald()}).__dict__["adversarial_binding"]
    assert shared.cost(6) == full.cost(6)


def test_every_needs_another_loss():
    with pytest.raises(ConfigError, match=r"tald.criterion.kwargs.every: found 3, but no other loss"):
        tiny.bound({"tald": tiny.tald(every=3), "other": tiny.tald(0.0)})
    tiny.bound({"tald": tiny.tald(every=3), "other": tiny.tald()})
    tiny.bound({"tald": tiny.tald(every=3), "ce": tiny.CE})


def test_early_stop_is_not_compiled():
    adversary = {"key": "PGD", "kwargs": {"early_stop": "stalled"}}
    with pytest.raises(ConfigError, match=r"kwargs.search.compile: found true, with an early_stop"):
        tiny.bound({"ad": adaad(adversary=adversary, search={"compile": True})})


def test_empty_entries_mean_the_defaults():
    tald = tiny.term(tiny.bound({"tald": tiny.tald(every=None, search=None)}), "tald")
    assert (tald.every, tald.search_passes) == (1, SearchPasses("auto", False, False, False))


def test_one_network_without_a_twin_keeps_auto_from_half_precision(searches, monkeypatch):
    monkeypatch.setattr(twins, "fast_dtype", lambda device: torch.bfloat16)
    found = {}
    for name, block in {"plain": {"precision": "float32", "channels_last": False, "fold": False}, "auto": {}}.items():
        found[name] = run_step(searches, {**block, "compile": False}, search_bn="batch")[2]
    assert torch.equal(found["auto"], found["plain"])
    assert not torch.equal(run_step(searches, {"precision": "bfloat16"}, search_bn="batch")[2], found["plain"])


def test_every_is_checked():
    with pytest.raises(ConfigError, match=r"kwargs.every: found 0; write an integer >= 1"):
        tiny.bound({"tald": tiny.tald(every=0)})


def test_default_block_is_the_devices_choice(monkeypatch, searches):
    monkeypatch.undo()
    box = tiny.bound({"tald": tiny.tald(), "ad": adaad()})
    assert tiny.term(box, "tald").search.passes == SearchPasses()
    tiny.step(box, *tiny.images())
    found = [twin.how.dtype for twin in box.__dict__["adversarial_binding"].twins._twins.values()]
    assert found == [torch.float32, twins.fast_dtype(CPU), twins.fast_dtype(CPU)]


def test_what_half_precision_rounds_away():
    """Near an image TALD's objective is a difference of nearly equal predictions: its gradient may even turn round."""
    teacher, rows = used(get_model("resnet20", num_classes=10)), torch.randn(16, 3, 32, 32)
    index, nearby = torch.arange(16), rows + 1e-3 * torch.randn_like(rows)
    turned = {}
    for how in (EXACT, HALF):
        gradients = []
        for passed in (teacher, Twin(teacher, how, rows)):
            with how.autocast(CPU) if passed is not teacher else EXACT.autocast(CPU):
                objective = Objective.build("kl_teacher_clean_teacher").bind(view(teacher, passed, rows))
                leaf = nearby.clone().requires_grad_()
                gradients.append(torch.autograd.grad(objective(leaf, index).sum(), leaf)[0].flatten(1))
        turned[how.dtype] = torch.cosine_similarity(*gradients).min()
    assert turned[torch.float32] > 0.9 > 0.5 > turned[torch.bfloat16]

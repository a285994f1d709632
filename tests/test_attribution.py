"""Class-activation maps against slow loops and finite differences, where they are found, and that no trace stays."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.autograd import Function
from torchdistill.core.forward_hook import ForwardHookManager
from torchdistill.models.registry import get_model

import torchdistill_adv.models  # noqa: F401
from torchdistill_adv.attribution import (
    Layout,
    class_activation_maps,
    exact_maps,
    feature_maps,
    find_layout,
    map_distance,
    recorded_features,
    squared_maps,
)
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.guards import on_cloned_buffers

CLASSES = torch.tensor([0, 3, 1, 3])


class Pooled(nn.Module):
    """Global average pooling and one linear layer; the last ReLU may be a function, as in a wide residual network."""

    def __init__(self, functional_relu: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.MaxPool2d(2))
        self.last = nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5))
        self.act = nn.Identity() if functional_relu else nn.SiLU()
        self.functional_relu = functional_relu
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(5, 4)

    def forward(self, x):
        features = self.act(self.last(self.stem(x)))
        if self.functional_relu:
            features = F.relu(features)
        return self.fc(self.drop(features.mean((2, 3))))


def deep_head() -> nn.Sequential:
    """A head with a non-linear layer, so that the weights of Grad-CAM depend on image and parameters."""
    stem = [nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)]
    return nn.Sequential(*stem, nn.Flatten(), nn.Linear(48, 6), nn.Tanh(), nn.Linear(6, 4))


def vit() -> nn.Module:
    return VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=4)


def seeded(make, dtype=torch.float64, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = make(**kwargs).to(dtype).eval()
        for m in network.modules():
            if isinstance(m, nn.BatchNorm2d):
                # not the identity in eval mode, and mostly positive
                m.running_mean.uniform_(-0.3, 0.3)
                m.running_var.uniform_(0.5, 2)
                m.bias.data.fill_(1)
            elif isinstance(m, nn.Linear):
                # evidence for every class, so that no test passes on maps of zeros
                m.weight.data.abs_()
        return network


def images(count=4, size=8, channels=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, size, size, dtype=torch.float64, generator=generator)


def slow_map(weights, features):
    """One map in plain floats: channels weighted and summed, negative cells zero, unit length."""
    channels, height, width = len(features), len(features[0]), len(features[0][0])
    cells = [
        [max(0.0, sum(weights[c] * features[c][i][j] for c in range(channels))) for j in range(width)]
        for i in range(height)
    ]
    length = math.sqrt(sum(v * v for line in cells for v in line))
    return [[v / length if length else 0.0 for v in line] for line in cells]


def assert_equal(maps, expected, atol=1e-10):
    """Equal, and with something in every row to be equal."""
    assert (maps.flatten(1) > 0).sum(1).min() > 1
    assert torch.allclose(maps, torch.tensor(expected, dtype=maps.dtype), rtol=0, atol=atol)


# the maps themselves


@pytest.mark.parametrize("functional_relu", [False, True])
def test_exact_maps_are_weights_of_the_class_on_the_pooled_features(functional_relu):
    network, x = seeded(Pooled, functional_relu=functional_relu), images()
    layout = find_layout(network, x[:1])
    # with the ReLU as a function, "act" is an identity, which hands on the same map
    assert layout == Layout("act", functional_relu, "fc")
    logits, maps = class_activation_maps(network, layout, x, CLASSES)
    features = network.act(network.last(network.stem(x)))
    if functional_relu:
        features = features.clamp_min(0)
    rows = zip(features.tolist(), CLASSES.tolist(), strict=True)
    assert_equal(maps, [slow_map(network.fc.weight.tolist()[k], row) for row, k in rows])
    assert torch.equal(logits, network(x))


def test_grad_cam_weights_are_mean_finite_differences():
    network, x = seeded(deep_head), images()
    layout = find_layout(network, x[:1])
    assert layout == Layout("4", False, None)
    logits, maps = class_activation_maps(network, layout, x, CLASSES)
    assert torch.equal(logits, network(x))
    expected = []
    with torch.no_grad():
        for features, k in zip(network[:5](x), CLASSES.tolist(), strict=True):
            weights = []
            for c in range(3):
                differences = []
                for i in range(4):
                    for j in range(4):
                        values = []
                        for shift in (1e-6, -1e-6):
                            moved = features.clone()
                            moved[c, i, j] += shift
                            values.append(float(network[5:](moved[None])[0, k]))
                        differences.append((values[0] - values[1]) / 2e-6)
                weights.append(sum(differences) / 16)
            expected.append(slow_map(weights, features.tolist()))
    assert_equal(maps, expected, atol=1e-7)


def test_exact_and_grad_cam_agree_on_pooling_and_one_linear_layer():
    network, x = seeded(Pooled), images()
    exact = class_activation_maps(network, find_layout(network, x), x, CLASSES)[1]
    general = class_activation_maps(network, Layout("act"), x, CLASSES)[1]
    assert exact.any() and torch.allclose(exact, general, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [Pooled, deep_head])
def test_feature_maps_are_mean_squared_channels(make):
    network, x = seeded(make), images()
    layout = find_layout(network, x)
    logits, maps = feature_maps(network, layout, x)
    features = network.act(network.last(network.stem(x))) if make is Pooled else network[:5](x)
    assert_equal(maps, [slow_map([1 / len(row)] * len(row), row) for row in features.square().tolist()])
    assert torch.equal(logits, network(x))


def test_feature_maps_see_what_enters_the_pooling():
    network, x = seeded(Pooled, functional_relu=True), images()
    maps = feature_maps(network, find_layout(network, x), x)[1]
    squares = network.last(network.stem(x)).clamp_min(0).square()
    assert_equal(maps, [slow_map([1.0] * 5, row) for row in squares.tolist()])


KINDS = {
    "exact": (Pooled, {}, class_activation_maps),
    "exact after a functional relu": (Pooled, {"functional_relu": True}, class_activation_maps),
    "grad-cam": (deep_head, {}, class_activation_maps),
    "features": (Pooled, {}, lambda network, layout, rows, classes: feature_maps(network, layout, rows)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [False, True])
def test_gradients_are_those_of_finite_differences(kind, train):
    make, options, maps_of = KINDS[kind]
    network, x = seeded(make, **options).train(train), images(2).requires_grad_()
    layout = find_layout(network, x)
    parameters = [p for p in network.parameters() if p.numel() > 1]

    def both(*_):
        with on_cloned_buffers(network):
            return maps_of(network, layout, x, CLASSES[:2])

    assert torch.autograd.gradcheck(both, (x, *parameters), fast_mode=True)
    (gradient,) = torch.autograd.grad(both()[1][0, 0].sum(), x)
    assert gradient[0].any()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_independent_and_one_row_is_enough(kind):
    make, options, maps_of = KINDS[kind]
    network, x = seeded(make, **options), images()
    layout = find_layout(network, x)
    alone = [maps_of(network, layout, x[i : i + 1], CLASSES[i : i + 1])[1] for i in range(4)]
    assert torch.allclose(maps_of(network, layout, x, CLASSES)[1], torch.cat(alone), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e-14, 1e6])
def test_maps_have_unit_length_at_any_scale_of_the_features(scale):
    network, x = seeded(Pooled, torch.float32), images().float()
    layout = find_layout(network, x)
    expected = class_activation_maps(network, layout, x, CLASSES)[1]
    with torch.no_grad():
        network.fc.weight *= scale
    maps = class_activation_maps(network, layout, x, CLASSES)[1]
    lengths = maps.flatten(1).norm(dim=1)
    assert torch.allclose(lengths, torch.ones(4), atol=1e-6) and torch.allclose(maps, expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_no_evidence_gives_a_map_of_zeros_and_no_gradient(kind, weight):
    make, options, maps_of = KINDS[kind]
    network, x = seeded(make, **options), images().requires_grad_()
    layout = find_layout(network, x)

    class Positive(nn.Module):
        def forward(self, features):
            return features.sigmoid() if maps_of is class_activation_maps else 0 * features

    # weights that are nowhere positive on features that are nowhere negative; no features at all
    for name, module in list(network.named_children()):
        if name == layout.feature:
            network.add_module(name, nn.Sequential(module, Positive()))
        elif isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, weight if name in ("fc", "8") else 1.0)
    _, maps = maps_of(network, layout, x, CLASSES)
    assert not maps.any()
    gradients = torch.autograd.grad(maps.sum(), [x, *network.parameters()], allow_unused=True)
    assert all(g is None or not g.any() for g in gradients)  # a NaN would be any


# distance


def slow_pool(cells, size):
    def span(i, out, count):
        return range(i * count // out, -(-(i + 1) * count // out))

    height, width = len(cells), len(cells[0])
    pooled = []
    for i in range(size[0]):
        line = []
        for j in range(size[1]):
            window = [cells[a][b] for a in span(i, size[0], height) for b in span(j, size[1], width)]
            line.append(sum(window) / len(window))
        pooled.append(line)
    length = math.sqrt(sum(v * v for line in pooled for v in line))
    return [[v / length for v in line] for line in pooled]


@pytest.mark.parametrize("student_size, teacher_size", [((4, 4), (4, 4)), ((8, 8), (4, 4)), ((3, 5), (7, 4))])
def test_distance_is_the_mean_squared_error_on_the_coarser_grid(student_size, teacher_size):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.rand(3, *s, dtype=torch.float64, generator=generator) for s in (student_size, teacher_size)
    )
    size = [min(sides) for sides in zip(student_size, teacher_size, strict=True)]
    expected = []
    for rows in zip(student.tolist(), teacher.tolist(), strict=True):
        a, b = (slow_pool(cells, size) for cells in rows)
        errors = [(a[i][j] - b[i][j]) ** 2 for i in range(size[0]) for j in range(size[1])]
        expected.append(sum(errors) / len(errors))
    expected = torch.tensor(expected, dtype=torch.float64)
    assert torch.allclose(map_distance(student, teacher), expected, rtol=0, atol=1e-12)
    assert torch.allclose(map_distance(teacher, student), expected, rtol=0, atol=1e-12)


def test_one_pattern_on_two_grids_has_no_distance():
    coarse = images(channels=1, size=4).abs()[:, 0]
    fine = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert map_distance(fine, coarse).max() < 1e-15
    assert map_distance(fine.flip(1), coarse).min() > 1e-3


def test_distance_from_a_map_of_zeros_is_finite():
    zeros = torch.zeros(2, 4, 4, requires_grad=True)
    distance = map_distance(zeros, torch.ones(2, 2, 2))
    assert distance.tolist() == [0.25, 0.25]
    assert torch.isfinite(torch.autograd.grad(distance.sum(), zeros)[0]).all()


# where maps come from


def host(key, **kwargs):
    return lambda: get_model(key, num_classes=4, **kwargs)


def vision(name):
    return lambda: getattr(torchvision.models, name)(weights=None, num_classes=4)


def vgg():
    """torchvision's, with a narrow head: the real one has 100 million weights."""
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"], batch_norm=True)
    with torch.device("meta"):
        network = torchvision.models.VGG(features, init_weights=False)
    network.classifier = nn.Sequential(nn.Linear(512 * 49, 8), nn.ReLU(), nn.Linear(8, 4))
    return network


FOUND = {
    "resnet18": (vision("resnet18"), (3, 64), Layout("layer4", False, "fc"), 2),
    "mobilenet_v2": (vision("mobilenet_v2"), (3, 64), Layout("features", False, "classifier.1"), 2),
    "shufflenet_v2_x0_5": (vision("shufflenet_v2_x0_5"), (3, 64), Layout("conv5", False, "fc"), 2),
    "vgg11_bn": (vgg, (3, 64), Layout("avgpool"), 7),
    # its pooling blows a single cell up to 7x7 here, which is no map
    "vgg11_bn at 32x32": (vgg, (3, 32), Layout("features.27"), 2),
    "squeezenet1_1": (vision("squeezenet1_1"), (3, 64), Layout("classifier.2"), 3),
    "swin_t": (vision("swin_t"), (3, 64), Layout("permute", False, "head"), 2),
    "resnet20 of torchdistill": (host("resnet20"), (3, 32), Layout("layer3", False, "fc"), 8),
    "wide_resnet of torchdistill": (
        host("wide_resnet", depth=10, k=1, dropout_p=0.3, pretrained=False, progress=False),
        (3, 32),
        Layout("relu", False, "fc"),
        8,
    ),
    "densenet of torchdistill": (host("densenet_bc_k12_depth100"), (3, 32), Layout("features", False, "classifier"), 8),
    "small_cnn": (host("small_cnn", dropout=0.5), (1, 8), Layout("features", False, "fc"), 4),
    "timm resnet10t": (
        lambda: timm.create_model("resnet10t", num_classes=4, drop_rate=0.5),
        (3, 64),
        Layout("layer4", False, "fc"),
        2,
    ),
    "timm mobilenetv3": (
        lambda: timm.create_model("mobilenetv3_small_050", num_classes=4),
        (3, 64),
        Layout("blocks"),
        2,
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_layout_is_found(name):
    make, (channels, size), layout, grid = FOUND[name]
    network = seeded(make, torch.float32).train()
    x = images(2, size, channels).float()
    assert find_layout(network, x[:1]) == layout
    network.eval()
    _, maps = class_activation_maps(network, layout, x, CLASSES[:2])
    assert maps.shape == (2, grid, grid) and torch.isfinite(maps).all()
    if layout.linear is not None:
        # the identity that makes the maps exact, through the network's own modules
        seen = []
        with (
            torch.no_grad(),
            network.get_submodule(layout.feature).register_forward_hook(lambda *args: seen.append(args[-1])),
        ):
            logits = network(x)
        linear = network.get_submodule(layout.linear)
        features = seen[0].relu() if layout.relu else seen[0]
        evidence = torch.einsum("kc,nchw->nkhw", linear.weight, features)
        assert torch.allclose(
            evidence.mean((2, 3)) + linear.bias, logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max())
        )


def test_a_named_module_is_taken_and_exact_where_it_can_be():
    network, x = seeded(vision("resnet18"), torch.float32), images(1, 64, 3).float()
    assert find_layout(network, x, "layer3") == Layout("layer3")
    assert find_layout(network, x, "layer4.1") == Layout("layer4.1", False, "fc")
    assert class_activation_maps(network, Layout("layer3"), x, CLASSES[:1])[1].shape == (1, 4, 4)


class Scaled(Pooled):
    """Not linear in the pooled features, though pooling and a linear layer are all there is."""

    def forward(self, x):
        return 3 * super().forward(x).tanh()


class Keyword(Pooled):
    """Hands the pooled features over by name, where a forward hook does not see them."""

    def forward(self, x):
        return self.fc(input=self.act(self.last(self.stem(x))).mean((2, 3)))


@pytest.mark.parametrize("make", [Scaled, Keyword])
def test_other_heads_have_grad_cam(make):
    assert find_layout(seeded(make), images()) == Layout("act")


class Normed(nn.Linear):
    """A linear layer by type, not by what it computes."""

    def forward(self, x):
        return F.linear(F.normalize(x), self.weight, self.bias)


class Nearly(nn.Module):
    def forward(self, x):
        return 1.02 * x


def test_exactness_is_verified_not_assumed():
    x = images()
    network = seeded(Pooled)
    network.fc = Normed(5, 4).double()
    assert find_layout(network, x) == Layout("act")
    network = seeded(Pooled, torch.float32)
    network.drop = Nearly()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # in which 1 and 1.02 are hardly different
        assert find_layout(network, x.float()) == Layout("act")


def test_a_module_called_twice_gives_the_map_of_its_last_call():
    network, x = seeded(deep_head), images()
    network[4] = network[1]  # the activation after each convolution is one module
    layout = find_layout(network, x)
    assert layout == Layout("1")
    assert_equal(
        feature_maps(network, layout, x)[1], [slow_map([1.0] * 3, row) for row in network[:5](x).square().tolist()]
    )


# transformers


def test_tokens_are_no_map_and_the_patch_embedding_is_not_taken_unasked():
    with pytest.raises(ConfigError, match=r"tokens.*patch_embed.proj \(24, 4, 4\)\.$") as error:
        find_layout(seeded(vit), images(1, 16, 3))
    assert error.value.path == "module_path"


def test_a_named_map_of_a_transformer_has_gradients():
    network, x = seeded(vit), images(2, 16, 3).requires_grad_()
    layout = find_layout(network, x, "patch_embed.proj")
    assert layout == Layout("patch_embed.proj")
    _, maps = class_activation_maps(network, layout, x, CLASSES[:2])
    assert maps.shape == (2, 4, 4)
    gradients = torch.autograd.grad(maps[:, 0].sum(), [x, network.blocks[1].attn.qkv.weight])
    assert all(g.any() and torch.isfinite(g).all() for g in gradients)


# errors


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.parametrize(
    "make, size, module_path, found",
    [
        (mlp, (2, 8), None, r"no module with an output \(N, C, h, w\).*none would do"),
        (
            vgg,
            (3, 32),
            "avgpool",
            r"'avgpool'.*\(1, 512, 7, 7\).*cells that differ.*features.27 \(512, 2, 2\)",
        ),
        (Pooled, (2, 8), "lst", "no module 'lst'; did you mean 'last'"),
        (Pooled, (2, 8), "fc", r"'fc', which has an output \(1, 4\).*stem.2 \(4, 8, 8\), .*\(5, 4, 4\)"),
        (mlp, (2, 8), "1", r"'1', which has an output \(1, 8\).*none\."),
        (vit, (3, 16), "blocks.1", r"an output \(1, 17, 24\).*patch_embed.proj \(24, 4, 4\)\.$"),
        (lambda: nn.Sequential(deep_head(), nn.Identity()), (2, 8), "0.9", "no module '0.9'"),
    ],
)
def test_errors_say_which_modules_would_do(make, size, module_path, found):
    network = seeded(make)
    with pytest.raises(ConfigError, match=found) as error:
        find_layout(network, images(1, size[1], size[0]), module_path)
    assert error.value.path == "module_path"


def test_a_module_that_is_not_called_is_refused():
    network = seeded(Pooled)
    network.spare = nn.Conv2d(2, 2, 1)
    with pytest.raises(ConfigError, match="'spare', which has no output that is a tensor"):
        find_layout(network, images(), "spare")


# no trace


def state_of(network):
    """All that a pass could leave behind, buffers by identity and value."""
    return [
        (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), {k: id(v) for k, v in m._buffers.items()})
        for m in network.modules()
    ]


class Failing(nn.Module):
    def forward(self, x):
        raise RuntimeError("half way")


class Tally(nn.Module):
    """Counts its calls in any mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x


@pytest.mark.parametrize("make", [Pooled, deep_head])
def test_no_trace(make):
    network, x = seeded(make).train(), images()
    network.set_submodule("drop" if make is Pooled else "7", Tally())
    next(network.children()).eval()  # a frozen part stays frozen
    before, values = state_of(network), copy.deepcopy(network.state_dict())
    layout = find_layout(network, x)
    assert state_of(network) == before
    assert all(torch.equal(v, values[k]) for k, v in network.state_dict().items())
    class_activation_maps(network, layout, x.requires_grad_(), CLASSES)
    feature_maps(network, layout, x)
    assert state_of(network) == before
    assert x.grad is None and all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("make, path", [(Pooled, "fc"), (deep_head, "8")])
def test_no_trace_after_an_exception(make, path):
    network, x = seeded(make).train(), images()
    layout = find_layout(network, x)
    network.set_submodule(path, Failing())
    before, values = state_of(network), copy.deepcopy(network.state_dict())
    with pytest.raises(RuntimeError, match="half way"):
        find_layout(network, x)
    assert all(torch.equal(v, values[k]) for k, v in network.state_dict().items())
    if make is Pooled:
        layout = Layout(layout.feature)
    with pytest.raises(RuntimeError, match="half way"):
        class_activation_maps(network, layout, x, CLASSES)
    assert state_of(network) == before


@pytest.mark.parametrize("make", [Pooled, deep_head])
def test_train_mode_is_one_plain_pass(make):
    network, x = seeded(make).train(), images()
    plain = copy.deepcopy(network)
    layout = find_layout(network, x)
    logits, _ = class_activation_maps(network, layout, x, CLASSES)
    assert torch.equal(logits, plain(x))
    assert all(torch.equal(a, b) for a, b in zip(network.buffers(), plain.buffers(), strict=True))


def test_dropout_masks_the_logits_not_the_map():
    network, x = seeded(Pooled, dropout=0.5), images()
    layout = find_layout(network, x)
    expected = class_activation_maps(network, layout, x, CLASSES)[1]
    network.drop.train()
    logits, maps = class_activation_maps(network, layout, x, CLASSES)
    assert torch.equal(maps, expected) and not torch.equal(logits, network.eval()(x))


def test_hooks_of_torchdistill_keep_working():
    network, x = seeded(deep_head), images()
    for p in network.parameters():
        p.requires_grad_(False)
    manager = ForwardHookManager("cpu")
    manager.add_hook(network, "4")
    manager.add_hook(network, "8")
    expected = (network[:5](x), network(x))
    manager.pop_io_dict()
    layout = find_layout(network, x)
    manager.pop_io_dict()
    class_activation_maps(network, layout, x, CLASSES)
    io_dict = manager.pop_io_dict()
    assert torch.equal(io_dict["4"]["output"], expected[0]) and torch.equal(io_dict["8"]["output"], expected[1])


# cost and graphs


class Counted(nn.Module):
    """The identity, that counts how often it is passed forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = self.backwards = 0

    def forward(self, x):
        self.forwards += 1
        return Counting.apply(x, self)


class Counting(Function):
    @staticmethod
    def forward(ctx, x, counted):
        ctx.counted = counted
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.counted.backwards += 1
        return gradient, None


def graph_names(tensor):
    names, todo, seen = set(), [tensor.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            todo += [parent for parent, _ in node.next_functions]
    return names


@pytest.mark.parametrize("functional_relu", [False, True])
def test_exact_maps_need_one_pass_forward_and_one_backward(functional_relu):
    network, x = seeded(Pooled, functional_relu=functional_relu), images().requires_grad_()
    network.stem.append(below := Counted())
    network.drop = above = Counted()
    layout = find_layout(network, x)
    below.forwards = above.forwards = 0
    _, maps = class_activation_maps(network, layout, x, CLASSES)
    assert (below.forwards, above.forwards, below.backwards, above.backwards) == (1, 1, 0, 0)
    assert not [name for name in graph_names(maps) if "BackwardBackward" in name]
    maps[:, 0].sum().backward()
    assert (below.forwards, above.forwards, below.backwards, above.backwards) == (1, 1, 1, 0)


@pytest.mark.parametrize("functional_relu", [False, True])
def test_maps_of_a_recorded_pass_are_those_of_an_own_pass(functional_relu):
    network, x = seeded(Pooled, functional_relu=functional_relu), images()
    layout = find_layout(network, x)
    with recorded_features(network, layout) as seen:
        network(x)
    network(2 * x)
    (features,) = seen
    pairs = [
        (class_activation_maps(network, layout, x, CLASSES)[1], exact_maps(network, layout, features, CLASSES)),
        (feature_maps(network, layout, x)[1], squared_maps(layout, features)),
    ]
    for own, recorded in pairs:
        assert torch.equal(own, recorded)
        gradients = [
            torch.autograd.grad(maps[:, 0].sum(), network.parameters(), retain_graph=True, allow_unused=True)
            for maps in (own, recorded)
        ]
        for a, b in zip(*gradients, strict=True):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
        assert any(a is not None and a.any() for a in gradients[0])


def test_grad_cam_goes_back_to_the_feature_map_only():
    network, x = seeded(deep_head), images().requires_grad_()
    network[2] = nn.Sequential(network[2], below := Counted())
    network[7] = nn.Sequential(network[7], above := Counted())
    layout = find_layout(network, x)
    below.forwards = above.forwards = 0
    _, maps = class_activation_maps(network, layout, x, CLASSES)
    assert (below.forwards, above.forwards, below.backwards, above.backwards) == (1, 1, 0, 1)
    assert [name for name in graph_names(maps) if "BackwardBackward" in name]


@pytest.mark.parametrize("inplace", [False, True])
def test_a_frozen_network_without_gradients_gives_the_same_maps_without_a_graph(inplace):
    network, x = seeded(deep_head), images()
    network.insert(5, nn.ReLU(inplace=inplace))
    layout = Layout("4") if inplace else find_layout(network, x)
    expected_logits, expected = class_activation_maps(network, layout, x, CLASSES)
    assert expected.requires_grad and expected_logits.requires_grad
    with torch.no_grad():
        logits, maps = class_activation_maps(network, layout, x, CLASSES)
    assert torch.equal(maps, expected) and not maps.requires_grad and not logits.requires_grad
    for p in network.parameters():
        p.requires_grad_(False)
    logits, maps = class_activation_maps(network, layout, x, CLASSES)
    assert torch.equal(maps, expected) and not maps.requires_grad and not logits.requires_grad
    x.requires_grad_()
    _, maps = class_activation_maps(network, layout, x, CLASSES)
    assert torch.equal(maps, expected) and torch.autograd.grad(maps[:, 0].sum(), x)[0].any()


def test_logits_and_maps_share_one_graph():
    network, x = seeded(deep_head), images()
    logits, maps = class_activation_maps(network, find_layout(network, x), x, CLASSES)
    (logits.logsumexp(1).sum() + maps[:, 0].sum()).backward()
    assert all(p.grad is not None for p in network.parameters())


# numbers


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_channels_last(kind):
    make, options, maps_of = KINDS[kind]
    network, x = seeded(make, torch.float32, **options), images().float()
    layout = find_layout(network, x)
    expected = maps_of(network, layout, x, CLASSES)[1]
    last = maps_of(
        network.to(memory_format=torch.channels_last), layout, x.to(memory_format=torch.channels_last), CLASSES
    )
    assert torch.allclose(last[1], expected, atol=1e-5)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert find_layout(network, x) == layout
        logits, maps = maps_of(network, layout, x, CLASSES)
        distance = map_distance(maps, expected)
    assert logits.dtype == torch.bfloat16 and maps.dtype == distance.dtype == torch.float32
    assert torch.allclose(maps.flatten(1).norm(dim=1), torch.ones(4), atol=1e-6)
    assert torch.allclose(maps, expected, atol=0.1)
    assert torch.isfinite(torch.autograd.grad(distance.sum(), x)[0]).all()

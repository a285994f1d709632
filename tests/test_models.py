"""CIFAR networks against the official code's counts and outputs, and teachers from published checkpoints."""

from __future__ import annotations

import inspect
import logging
import math
import sys
import textwrap
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torchdistill.models.classification import densenet, resnet, wide_resnet
from torchdistill.models.registry import MODEL_DICT, get_model
from torchvision import models

import torchdistill_adv  # noqa: F401
from torchdistill_adv.errors import ConfigError

OURS = {key: model for key, model in MODEL_DICT.items() if model.__module__.startswith("torchdistill_adv.")}


class Row(NamedTuple):
    """A network of the official code: its parameters by number of classes, its map, and what it gives when filled."""

    key: str
    counts: dict[int, int]
    pooled: str
    shape: tuple[int, int, int]
    logits: tuple[float, float]
    kwargs: dict[str, int] = {}  # noqa: RUF012 (a NamedTuple's default)

    def build(self, num_classes: int = 10) -> nn.Module:
        return get_model(self.key, num_classes=num_classes, **self.kwargs)


# Counts and logits come from the official code, run beside ours: pytorch-cifar at 49b7aa97 for the first three rows,
# RepDistiller at b84f547c for the others.
ROWS = [
    Row("cifar_resnet18", {10: 11173962, 100: 11220132}, "layer4", (512, 4, 4), (1.31431178, 9.95138747)),
    Row("cifar_resnet50", {10: 23520842, 100: 23705252}, "layer4", (2048, 4, 4), (-3.17968371, 4.80539200)),
    Row("cifar_mobilenet_v2", {10: 2296922, 100: 2412212}, "features", (1280, 4, 4), (1.34322930, -2.45149711)),
    Row("cifar_mobilenet_v2_half", {10: 697546, 100: 812836}, "features", (1280, 2, 2), (2.85552255, -1.64754993)),
    Row("cifar_shufflenet_v1", {10: 862768, 100: 949258}, "layer3", (960, 4, 4), (-5.11933753, 14.78128630)),
    Row("cifar_shufflenet_v2", {10: 1263278, 100: 1355528}, "conv5", (1024, 4, 4), (-2.51839301, 0.39331235)),
    Row("cifar_resnet8x4", {10: 1210410, 100: 1233540}, "layer3", (256, 8, 8), (-1.41419217, 3.86947872)),
    Row("cifar_resnet32x4", {10: 7410730, 100: 7433860}, "layer3", (256, 8, 8), (4.89964221, 1.07648375)),
    Row("cifar_vgg8", {10: 3918858, 100: 3965028}, "features", (512, 4, 4), (0.94572719, 3.62998924)),
    Row("cifar_vgg13", {10: 9416010, 100: 9462180}, "features", (512, 4, 4), (0.89847558, 1.00762409)),
    Row(
        "cifar_wide_resnet",
        {10: 691674, 100: 703284},
        "relu",
        (128, 8, 8),
        (-2.58739480, 0.07066674),
        {"depth": 16, "widen_factor": 2},
    ),
]
every_network = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)


def fill(model: nn.Module) -> nn.Module:
    """Weights from a stream that is the same on every machine; activations exceed 6, so that ReLU6 is not ReLU."""
    stream = np.random.RandomState(0)
    for name, parameter in model.double().named_parameters():
        values = torch.from_numpy(stream.standard_normal(tuple(parameter.shape)))
        if parameter.dim() > 1:
            values *= (2 / parameter[0].numel()) ** 0.5
        elif name.endswith("weight"):
            values += 3
        parameter.data = values
    return model


def pixels(count: int = 2) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(1).uniform(size=(count, 3, 32, 32)))


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@every_network
def test_counts_are_those_of_the_official_code(row):
    with torch.device("meta"):
        assert {num_classes: num_parameters(row.build(num_classes)) for num_classes in row.counts} == row.counts


# of RepDistiller at b84f547c and, from 28 layers and factor 10 on, of RobustBench at 78fcc9e4
@pytest.mark.parametrize(
    "depth, widen_factor, num_classes, count",
    [
        (40, 2, 100, 2255156),
        (40, 1, 100, 569780),
        (16, 1, 100, 180916),
        (28, 10, 10, 36479194),
        (34, 10, 10, 46160474),
        (34, 10, 100, 46218164),
        (34, 20, 10, 184531674),
    ],
)
def test_counts_of_wide_resnets(depth, widen_factor, num_classes, count):
    with torch.device("meta"):
        model = get_model("cifar_wide_resnet", depth=depth, widen_factor=widen_factor, num_classes=num_classes)
    assert num_parameters(model) == count


@every_network
def test_outputs_are_those_of_the_official_code(row):
    logits = fill(row.build()).train()(pixels())
    assert logits.shape == (2, 10)
    assert logits[0, :2].tolist() == pytest.approx(row.logits, abs=1e-6)


@every_network
def test_a_map_is_pooled_and_then_only_a_linear_layer(row):
    """What class activation maps need."""
    model = row.build(7).double().eval()
    maps = []
    model.get_submodule(row.pooled).register_forward_hook(lambda module, inputs, output: maps.append(output))
    logits = model(pixels(1))
    assert maps[0].shape == (1, *row.shape)
    assert maps[0].min() >= 0
    linear = next(layer for layer in reversed(list(model.modules())) if isinstance(layer, nn.Linear))
    assert torch.allclose(logits, maps[0].mean((2, 3)) @ linear.weight.T + linear.bias, atol=1e-10)


@every_network
def test_gradients_reach_every_parameter_and_the_image(row):
    model, x = row.build(), pixels().float().requires_grad_()
    model(x)[:, 0].sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters() if parameter.dim() > 1)


@every_network
def test_start_is_the_documented_one(row):
    for layer in row.build().modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 1000:
            spread = math.sqrt(2 / (layer.kernel_size[0] ** 2 * layer.out_channels))
            if "shufflenet" in row.key:  # PyTorch's own
                spread = 1 / math.sqrt(3 * layer.weight[0].numel())
            assert layer.weight.std().item() == pytest.approx(spread, rel=0.1)
            assert layer.bias is None or not layer.bias.any()


def test_vgg_and_wide_resnet_start_with_no_preference():
    for key, kwargs in [("cifar_vgg8", {}), ("cifar_wide_resnet", {"depth": 10, "widen_factor": 1})]:
        *_, linear = (layer for layer in get_model(key, **kwargs).modules() if isinstance(layer, nn.Linear))
        assert not linear.bias.any()
    assert get_model("cifar_vgg8").classifier.weight.std().item() == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize(
    "kwargs, path, found",
    [
        ({"depth": 35, "widen_factor": 2}, "depth", r"found 35; write 6 n \+ 4"),
        ({"depth": 4, "widen_factor": 2}, "depth", ">= 10"),
        ({"depth": 16, "widen_factor": 0}, "widen_factor", ">= 1"),
    ],
)
def test_bad_wide_resnets(kwargs, path, found):
    with pytest.raises(ConfigError, match=found) as error:
        get_model("cifar_wide_resnet", **kwargs)
    assert error.value.path == path


# the registry


def test_no_key_of_others_is_taken():
    assert not OURS.keys() & models.__dict__.keys()
    assert {key for key in OURS if key.startswith("cifar_")} == {row.key for row in ROWS}
    for module in (densenet, resnet, wide_resnet):
        theirs = {name: model for name, model in vars(module).items() if name in MODEL_DICT}
        assert theirs and all(MODEL_DICT[name] is model for name, model in theirs.items())


@pytest.mark.parametrize("key", OURS)
def test_docstring_names_every_option(key):
    for name in inspect.signature(OURS[key]).parameters:
        assert f"{name}:" in inspect.getdoc(OURS[key]), name


@pytest.mark.parametrize("key", OURS)
def test_docstring_example_builds(key, tmp_path, monkeypatch, fake_robustbench):
    block = yaml.safe_load(textwrap.dedent(inspect.getdoc(OURS[key]).split(".. code-block:: yaml", 1)[1]))
    (model_block,) = block.values()
    assert model_block["key"] == key
    kwargs = model_block["kwargs"]
    if key == "from_checkpoint":
        monkeypatch.chdir(tmp_path)
        with torch.device("meta"):
            state = get_model(kwargs["model"]["key"], **kwargs["model"]["kwargs"]).state_dict()
        # one stored number a tensor
        save(
            {name: torch.zeros((), dtype=value.dtype).expand(value.shape) for name, value in state.items()},
            tmp_path / kwargs["checkpoint"],
        )
        assert num_parameters(get_model(key, **kwargs)) == 46160474
    else:
        with torch.device("meta"):
            assert isinstance(get_model(key, **kwargs), nn.Module)


# teachers from files


TINY = {"key": "cifar_wide_resnet", "kwargs": {"depth": 10, "widen_factor": 1}}


def save(value, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)
    return str(path)


def teacher(path, **options):
    return get_model("from_checkpoint", **{"model": TINY, "checkpoint": path, **options})


@pytest.fixture
def weights():
    """The names of TRADES's WRN, written out, with random tensors: a state dict that our code did not make."""
    shapes = {"conv1.weight": (16, 3, 3, 3), "fc.weight": (10, 64), "fc.bias": (10,)}
    normalised = {"bn1": 64}
    for i, (inputs, outputs) in enumerate([(16, 16), (16, 32), (32, 64)], start=1):
        layer = f"block{i}.layer.0"
        normalised |= {f"{layer}.bn1": inputs, f"{layer}.bn2": outputs}
        shapes |= {f"{layer}.conv1.weight": (outputs, inputs, 3, 3), f"{layer}.conv2.weight": (outputs, outputs, 3, 3)}
        if inputs != outputs:
            shapes[f"{layer}.convShortcut.weight"] = (outputs, inputs, 1, 1)
    for name, width in normalised.items():
        shapes |= {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("container", [None, "state_dict", "model", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
def test_published_state_dicts_load(container, prefix, weights, tmp_path):
    state = {prefix + name: value for name, value in weights.items()}
    path = save({container: state, "epoch": 76} if container else state, tmp_path / "teacher.pt")
    loaded = teacher(path).state_dict()
    counters = {name: value for name, value in loaded.items() if name.endswith("num_batches_tracked")}
    assert len(counters) == 7
    assert loaded.keys() - counters.keys() == weights.keys()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


def test_counters_of_newer_checkpoints_load(tmp_path):
    model = get_model(TINY["key"], **TINY["kwargs"])
    model(pixels().float())
    loaded = teacher(save(model.state_dict(), tmp_path / "teacher.pt"))
    assert int(loaded.bn1.num_batches_tracked) == 1


def test_unused_block_of_trades_is_left_out_and_said(weights, tmp_path, caplog):
    copied = {name.replace("block1", "sub_block1"): value for name, value in weights.items() if "block1" in name}
    state = {f"module.{name}": value for name, value in (weights | copied).items()}
    with caplog.at_level(logging.INFO, "torchdistill_adv"):
        loaded = teacher(save(state, tmp_path / "teacher.pt"))
    assert not [name for name in loaded.state_dict() if "sub_block1" in name]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'teacher.pt'}: left out 10 tensors of sub_block1.*, which no forward pass uses"
    ]


@pytest.mark.parametrize("name", ["model", "sub_block1"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_module_of_the_model_may_have_any_name(name, prefix, tmp_path, monkeypatch):
    monkeypatch.setitem(MODEL_DICT, "named_for_test", lambda: nn.Sequential(OrderedDict({name: nn.Linear(2, 3)})))
    state = {f"{prefix}{name}.weight": torch.ones(3, 2), f"{prefix}{name}.bias": torch.ones(3)}
    loaded = teacher(save(state, tmp_path / "teacher.pt"), model="named_for_test")
    assert (loaded[0].weight == 1).all()


@pytest.mark.parametrize("key, kwargs", [("resnet20", {}), ("squeezenet1_1", {"num_classes": 4})])
def test_any_registered_or_torchvision_model(key, kwargs, tmp_path):
    original = get_model(key, **kwargs) if key in MODEL_DICT else models.get_model(key, **kwargs)
    path = save({"model": original.state_dict()}, tmp_path / "teacher.pt")
    loaded = teacher(path, model={"key": key, "kwargs": kwargs})
    assert type(loaded) is type(original)
    assert torch.equal(loaded.eval()(pixels().float()), original.eval()(pixels().float()))


def test_normalisation_is_inside_the_network(weights, tmp_path):
    path = save(weights, tmp_path / "teacher.pt")
    mean, std = [0.1, 0.2, 0.3], ["1/2", 0.25, 2]
    network, loaded = teacher(path).double().eval(), teacher(path, mean=mean, std=std).double().eval()
    x = pixels()
    normalised = torch.stack([(x[:, i] - m) / s for i, (m, s) in enumerate([(0.1, 0.5), (0.2, 0.25), (0.3, 2)])], 1)
    assert torch.allclose(loaded(x), network(normalised), atol=1e-6)
    assert not torch.allclose(loaded(x), network(x), atol=1e-2)
    # settings are not saved, and modules are found below `network`
    assert {name.removeprefix("network.") for name in loaded.state_dict()} == set(network.state_dict())
    assert loaded.get_submodule("network.relu")


@pytest.mark.parametrize(
    "options, path, found",
    [
        ({"mean": [0.5]}, "std", "together"),
        ({"std": [0.5]}, "mean", "together"),
        ({"mean": 0.5, "std": 0.5}, "mean", "one a channel"),
        ({"mean": [], "std": []}, "mean", "one a channel"),
        ({"mean": [0.5, 0.5], "std": [1]}, "std", "mean has 2"),
        ({"mean": [0.5], "std": [0]}, "std", "> 0"),
        ({"mean": ["half"], "std": [1]}, "mean", "'half'"),
        ({"model": {"key": "cifar_wideresnet"}}, "model.key", "did you mean 'cifar_wide_resnet'"),
        ({"model": {"key": "cifar_wide_resnet", "kwargs": {"depth": 10}}}, "model.kwargs", "widen_factor"),
        (
            {"model": {"key": "cifar_wide_resnet", "kwargs": {"depth": 11, "widen_factor": 1}}},
            "model.kwargs.depth",
            "6 n",
        ),
        ({"model": {"key": "resnet18", "kwargs": {"classes": 10}}}, "model.kwargs", "'resnet18' cannot be built"),
        ({"model": {"name": "resnet18"}}, "model", "write {key"),
        ({"checkpoint": "no/such.pt"}, "checkpoint", "'no/such.pt', which is no file"),
        ({"checkpoint": None}, "checkpoint", "write the path"),
        ({"checkpoint": "."}, "checkpoint", "no file"),
    ],
)
def test_bad_options_of_a_teacher(options, path, found, weights, tmp_path):
    with pytest.raises(ConfigError, match=found) as error:
        teacher(**{"path": save(weights, tmp_path / "teacher.pt")} | options)
    assert error.value.path == path


class Program:
    """What an untrusted file may hold: it would run when it is unpickled."""

    def __reduce__(self):
        return exec, ("import sys; sys.program_of_test_ran = True",)


@pytest.mark.parametrize(
    "change, found",
    [
        (
            lambda w: w | {"fc.weight": torch.zeros(100, 64), "fc.bias": torch.zeros(100)},
            r"\(100, 64\) instead of \(10,",
        ),
        (lambda w: {name: value for name, value in w.items() if name != "bn1.running_var"}, "file: bn1.running_var;"),
        (lambda w: w | {"block1.layer.1.bn1.weight": torch.zeros(16)}, "not in the model: block1.layer.1.bn1.weight;"),
        (lambda w: w | {"model.fc.weight": torch.zeros(1)}, "not in the model: model.fc.weight;"),
        (
            lambda w: {f"encoder.{name}": value for name, value in w.items()},
            "not in the model: encoder.conv1.weight, encoder.*, .* and 36 more",
        ),
        (lambda w: {"epoch": 3, "weights": w}, "epoch, weights is no tensor"),
        (lambda w: w | {"lr": 0.1}, "lr is no tensor"),
        (lambda w: w | {7: torch.zeros(1)}, "7 is no tensor"),
        (lambda w: {}, "holds a dict"),
        (lambda w: list(w.values()), "holds a list"),
        (lambda w: {"state_dict": w, "args": Program()}, "cannot be read as tensors"),
    ],
)
def test_a_file_that_does_not_fit(change, found, weights, tmp_path):
    path = save(change(weights), tmp_path / "teacher.pt")
    with pytest.raises(ConfigError, match=found) as error:
        teacher(path)
    assert error.value.path == "checkpoint" and path in str(error.value)
    assert len(str(error.value)) < 700
    assert not hasattr(sys, "program_of_test_ran")


@pytest.mark.parametrize("part", [0, 1, 100, -1])
def test_a_truncated_file(part, weights, tmp_path):
    path = tmp_path / "teacher.pt"
    save(weights, path)
    path.write_bytes(path.read_bytes()[:part])
    with pytest.raises(ConfigError, match=r"cannot be read as tensors.*state dict") as error:
        teacher(str(path))
    assert error.value.path == "checkpoint"


def test_a_file_of_text(tmp_path):
    path = tmp_path / "teacher.pt"
    path.write_text("<html>too many downloads</html>")
    with pytest.raises(ConfigError, match="cannot be read as tensors"):
        teacher(str(path))


# RobustBench is not installed with the tests and downloads hundreds of MiB: a stand-in shows that the options reach its
# function and that its model comes back untouched; its real code is not run here

FAKE = """
import torch

def load_model(model_name, model_dir="./models", dataset="cifar10", threat_model="Linf"):
    if model_name != "Chen2021LTD_WRN34_20":
        raise KeyError(model_name)
    model = torch.nn.Linear(1, 1).eval()
    model.arguments = (model_name, model_dir, dataset, threat_model)
    model.original = {name: value.clone() for name, value in model.state_dict().items()}
    return model
"""


@pytest.fixture
def fake_robustbench(tmp_path, monkeypatch):
    package = tmp_path / "fake" / "robustbench"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "utils.py").write_text(FAKE)
    monkeypatch.syspath_prepend(package.parent)
    # forgotten now and, by the next import, again at the end
    for name in ("robustbench", "robustbench.utils"):
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]


@pytest.mark.parametrize(
    "options, arrived",
    [
        ({}, ("./models", "cifar10", "Linf")),
        ({"dataset": "cifar100", "threat_model": "L2", "model_dir": "/zoo"}, ("/zoo", "cifar100", "L2")),
    ],
)
def test_options_reach_robustbench(options, arrived, fake_robustbench):
    model = get_model("robustbench", model_name="Chen2021LTD_WRN34_20", **options)
    assert model.arguments == ("Chen2021LTD_WRN34_20", *arrived)
    assert not model.training
    assert all(torch.equal(value, model.original[name]) for name, value in model.state_dict().items())


def test_a_model_that_robustbench_does_not_have(fake_robustbench):
    with pytest.raises(ConfigError, match=r"'Chen2021LTD'.*robustbench\.github\.io") as error:
        get_model("robustbench", model_name="Chen2021LTD")
    assert error.value.path == "model_name"


def test_without_robustbench_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "robustbench", None)
    with pytest.raises(ConfigError, match=r"pip install git\+https://github.com/RobustBench/robustbench.git"):
        get_model("robustbench", model_name="Chen2021LTD_WRN34_20")

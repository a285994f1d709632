"""Losses and modules of the host methods that torchdistill has in another form, against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_nst import io_dict, maps, pair
from test_package import example
from tiny import CE, images, network, step, tald, with_side
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d
from torch.nn.parallel import DistributedDataParallel
from torchdistill.losses.mid_level import ATLoss, SPKDLoss, VIDLoss
from torchdistill.losses.registry import get_mid_level_loss
from torchdistill.models.registry import get_adaptation_module
from torchdistill.models.wrapper import Regressor4VID
from torchvision.models.resnet import BasicBlock

from torchdistill_adv.errors import ConfigError
from torchdistill_adv.hosts import (
    Adapters,
    CCLoss,
    ConvRegressor,
    FactorMapLoss,
    PooledATLoss,
    PooledVIDLoss,
    SPLoss,
    ab_connector,
)


def energy(image):
    """Energy of one map (C, H, W) over its pixels, of unit norm."""
    total = sum(channel**2 for channel in image).ravel()
    return total / np.linalg.norm(total)


def test_sp_is_the_papers_formula():
    student, teacher = maps(0, 4, 2, 3, 3), maps(1, 4, 5, 2, 2)

    def similarities(batch):
        rows = [[float(a.flatten() @ b.flatten()) for b in batch] for a in batch]
        return np.array([row / np.linalg.norm(row) for row in rows])

    expected = ((similarities(teacher) - similarities(student)) ** 2).sum() / 16
    found = SPLoss("x", "y")(io_dict(x=student), io_dict(y=teacher))
    assert found.item() == pytest.approx(expected, rel=1e-12)
    # why it is ours: torchdistill's divides by the sum of absolute values
    theirs = SPKDLoss("x", "y", "batchmean")(io_dict(x=student), io_dict(y=teacher))
    assert theirs.item() != pytest.approx(expected, rel=0.01)


def test_cc_is_repdistillers_formula():
    student, teacher = maps(0, 5, 3), maps(1, 5, 3)
    delta = np.abs((student - teacher).numpy())
    expected = sum(delta[i, d] * delta[i + 1, d] for i in range(4) for d in range(3)) / 4
    found = CCLoss("a", "b")(io_dict(a=student), io_dict(b=teacher))
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [(3, 4), (6, 8)])
def test_ft_is_repdistillers_formula(size):
    student, teacher = maps(0, 2, 3, 3, 4), maps(1, 2, 5, *size)
    pooled = adaptive_avg_pool2d(teacher, (3, 4))
    gaps = [np.abs(energy(s) - energy(t)) for s, t in zip(student.numpy(), pooled.numpy(), strict=True)]
    found = FactorMapLoss()(io_dict(translator=student), io_dict(paraphraser=teacher))
    assert found.item() == pytest.approx(np.mean(gaps), rel=1e-12)


def test_at_is_torchdistills_where_sizes_agree_and_pools_where_not():
    student, teacher = maps(0, 2, 3, 4, 4), maps(1, 2, 5, 4, 4)
    pairs = {"only": pair("x", weight=2.0)}
    theirs = ATLoss(pairs, mode="code")(io_dict(x=student), io_dict(x=teacher))
    assert torch.equal(PooledATLoss(pairs)(io_dict(x=student), io_dict(x=teacher)), theirs)
    larger = maps(2, 2, 5, 8, 8)
    for s, t in ((student, larger), (larger, student)):
        found = PooledATLoss(pairs)(io_dict(x=s), io_dict(x=t))
        small = [adaptive_avg_pool2d(x, 4).numpy() for x in (s, t)]
        expected = 2 * np.mean([(energy(a) - energy(b)) ** 2 for a, b in zip(*small, strict=True)])
        assert found.item() == pytest.approx(expected, rel=1e-12)


def test_vid_is_torchdistills_where_sizes_agree_and_pools_where_not():
    torch.manual_seed(0)
    regressor = Regressor4VID(3, 5, 5, eps=1e-5, init_pred_var=5.0).double()
    with torch.no_grad():
        regressor.soft_plus_param.add_(torch.randn(5))
    student, teacher, larger = maps(0, 2, 3, 4, 4), maps(1, 2, 5, 4, 4), maps(2, 2, 5, 8, 8)
    pairs = {"only": pair("x", weight=2.0)}
    given = io_dict(x=regressor(student))
    theirs = VIDLoss(pairs)(given, io_dict(x=teacher))
    assert torch.allclose(PooledVIDLoss(pairs)(given, io_dict(x=teacher)), theirs, rtol=1e-12)
    mean, variance = (x.detach().numpy() for x in regressor(student))
    target = adaptive_avg_pool2d(larger, 4).numpy()
    densities = [
        (target[n, c, i, j] - mean[n, c, i, j]) ** 2 / variance[0, c, 0, 0] / 2 + np.log(variance[0, c, 0, 0]) / 2
        for n, c, i, j in np.ndindex(target.shape)
    ]
    found = PooledVIDLoss(pairs)(given, io_dict(x=larger))
    assert found.item() == pytest.approx(2 * np.mean(densities), rel=1e-9)
    wide_prediction = io_dict(x=regressor(maps(3, 2, 3, 8, 8)))
    pooled = io_dict(x=(adaptive_avg_pool2d(wide_prediction["x"]["output"][0], 4), wide_prediction["x"]["output"][1]))
    theirs = VIDLoss(pairs)(pooled, io_dict(x=teacher))
    assert torch.allclose(PooledVIDLoss(pairs)(wide_prediction, io_dict(x=teacher)), theirs, rtol=1e-12)


@pytest.mark.parametrize("key", ["SPLoss", "CCLoss", "FactorMapLoss", "PooledATLoss"])
def test_half_precision_and_dead_features_give_finite_values_and_gradients(key):
    kwargs = {
        "SPLoss": {"student_output_path": "x", "teacher_output_path": "x"},
        "CCLoss": {"student_linear_path": "x", "teacher_linear_path": "x"},
        "FactorMapLoss": {"translator_path": "x", "paraphraser_path": "x"},
        "PooledATLoss": {"at_pairs": {"only": pair("x")}},
    }[key]
    student = torch.zeros(3, 2, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    loss = get_mid_level_loss({"key": key, "kwargs": kwargs})
    value = loss(io_dict(x=student), io_dict(x=maps(0, 3, 2, 4, 4).bfloat16()))
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(student.grad).all()


SIZES = [(8, 4, "Conv2d"), (4, 8, "ConvTranspose2d"), (6, 6, "Conv2d"), (7, 5, "Conv2d")]


@pytest.mark.parametrize("in_size, out_size, kind", SIZES)
@pytest.mark.parametrize("key", ["ConvRegressor", "ABConnector"])
def test_regressors_give_the_teachers_shape(key, in_size, out_size, kind):
    module = get_adaptation_module(key, in_channels=3, out_channels=5, in_size=in_size, out_size=out_size)
    out = module(torch.randn(2, 3, in_size, in_size))
    assert out.shape == (2, 5, out_size, out_size) and type(module[0]).__name__ == kind
    assert (out.min() >= 0) == (key == "ConvRegressor")
    if in_size == out_size:
        assert module[0].kernel_size == (1, 1)


def test_connector_of_equal_shapes_is_nothing():
    same = get_adaptation_module("ABConnector", in_channels=3, out_channels=3, in_size=4, out_size=4)
    assert isinstance(same, nn.Identity)
    smaller = get_adaptation_module("ABConnector", in_channels=3, out_channels=3, in_size=4, out_size=2)
    assert smaller(torch.randn(2, 3, 4, 4)).shape == (2, 3, 2, 2)


REGRESSOR = {"in_channels": 4, "out_channels": 8, "in_size": 6, "out_size": 6}
HINT = {
    "criterion": {"key": "MSELoss", "kwargs": {}},
    "criterion_wrapper": {
        "key": "SimpleLossWrapper",
        "kwargs": {
            "input": {"is_from_teacher": False, "module_path": "adapters.regressor", "io": "output"},
            "target": {"is_from_teacher": True, "module_path": "2", "io": "output"},
        },
    },
    "weight": 100.0,
}


def fitnet(networks, terms=None, hooks=None, **changes):
    regressor = {"path": "model.2", "io": "output", "key": "ConvRegressor", "kwargs": REGRESSOR, **changes}
    student = {
        "auxiliary_model_wrapper": {"key": "Adapters", "kwargs": {"adapters": {"regressor": regressor}}},
        "forward_hook": hooks or {"output": ["model.2", "adapters.regressor"]},
    }
    teacher = {"forward_hook": {"output": ["2"]}}
    return with_side(terms or {"ce": CE, "hint": HINT}, networks, student=student, teacher=teacher)


def test_fitnet_in_one_stage():
    """The student is trained whole, with its regressor, on cross-entropy and hint."""
    teacher, student = network(1, width=8), network(2)
    box = fitnet((teacher, student))
    x, y = images()
    loss = box.forward_process(x, y)
    regressor = box.student_model.adapters["regressor"]
    hint = (teacher[:3](x) - regressor(student[:3](x))).square().mean()
    assert loss.item() == pytest.approx((nn.functional.cross_entropy(student(x), y) + 100 * hint).item(), rel=1e-5)
    trained = [*student.parameters(), *regressor.parameters()]
    before = [p.clone() for p in trained]
    box.post_forward_process(loss=loss)
    assert not any(torch.equal(old, new) for old, new in zip(before, trained, strict=True))


def test_tald_explores_the_network_without_its_adapters():
    box = fitnet((network(1, width=8), network(2)), {"hint": HINT, "tald": tald(1.0)})
    box.pre_epoch_process(epoch=0)
    assert torch.isfinite(step(box, *images()))


def test_ab_reads_what_the_last_activation_of_a_block_was_given():
    """torchvision's block calls one in-place ReLU twice, which leaves torchdistill's hook with the activated map."""
    torch.manual_seed(0)
    stem, block = nn.Conv2d(2, 4, 3, padding=1), BasicBlock(4, 4)
    student = nn.Sequential(stem, block, nn.Flatten(), nn.Linear(144, 5))
    box = fitnet(
        (network(1), student),
        {"ce": CE},
        {"input": ["model.1.relu"], "output": ["adapters.regressor"]},
        path="model.1.relu",
        io="input",
        key="Identity",
        kwargs={},
    )
    seen = []
    box.student_model.adapters["regressor"].register_forward_hook(lambda module, args, output: seen.append(output))
    x, y = images()
    box.forward_process(x, y)
    h = stem(x)
    expected = block.bn2(block.conv2(block.bn1(block.conv1(h)).relu())) + h
    assert torch.allclose(seen[0], expected, atol=1e-6) and (expected < -0.1).any()


def test_a_teacher_with_adapters_stays_in_eval_mode_and_gets_no_gradient():
    teacher = network(1, width=8)
    adapter = {"path": "model.2", "io": "output", "key": "AdaptiveAvgPool2d", "kwargs": {"output_size": 3}}
    side = {
        "auxiliary_model_wrapper": {"key": "Adapters", "kwargs": {"adapters": {"pool": adapter}}},
        "forward_hook": {"output": ["model.2", "adapters.pool"]},
        "requires_grad": True,
    }
    box = with_side({"ce": CE}, (teacher, network(2)), teacher=side)
    assert not teacher.training
    running = teacher[1].running_mean.clone()
    box.teacher_model.train()
    x, _ = images()
    logits, io_dict = box.get_teacher_output(x, None, None)
    assert torch.equal(teacher[1].running_mean, running) and not logits.requires_grad
    assert torch.equal(io_dict["adapters.pool"]["output"], nn.functional.avg_pool2d(teacher[:3](x), 2))


def test_a_path_that_is_not_hooked_is_named():
    box = fitnet((network(1, width=8), network(2)), hooks={"output": ["adapters.regressor"]})
    with pytest.raises(ConfigError, match=r"'model\.2', which Adapters reads") as error:
        box.forward_process(*images())
    assert error.value.path == "student.forward_hook.output"


@pytest.mark.parametrize(
    "changes, path, found",
    [
        ({"key": "ConvRegresor"}, "key", "did you mean 'ConvRegressor'"),
        ({"path": "model.layer9"}, "path", "model.layer9"),
        ({"kwargs": {**REGRESSOR, "out_size": 7}}, "kwargs.out_size", "found 7 for a map of 6"),
        ({"kwargs": {"in_channels": 4}}, "kwargs", "out_channels"),
    ],
)
def test_bad_adapters_are_refused(changes, path, found):
    with pytest.raises(ConfigError, match=found) as error:
        fitnet((network(1, width=8), network(2)), **changes)
    assert error.value.path == f"student.auxiliary_model_wrapper.kwargs.adapters.regressor.{path}"


@pytest.mark.parametrize(
    "loss", [SPLoss, CCLoss, FactorMapLoss, PooledATLoss, PooledVIDLoss], ids=lambda loss: loss.__name__
)
def test_examples_of_the_docstrings_are_built_by_torchdistill(loss):
    built = get_mid_level_loss(example(loss)["criterion"])
    assert type(built) is loss


@pytest.mark.parametrize("key", [ConvRegressor, ab_connector], ids=lambda key: key.__name__)
def test_examples_of_the_regressors_are_built_by_torchdistill(key):
    ((_, block),) = example(key).items()
    module = get_adaptation_module(block["key"], **block["kwargs"])
    size, channels = block["kwargs"]["in_size"], block["kwargs"]["in_channels"]
    assert module(torch.randn(2, channels, size, size)).shape == (2, channels, size, size)


def test_example_of_adapters_trains():
    block = example(Adapters)["student"]
    options = {**REGRESSOR, "in_size": 6, "out_size": 6}
    block["auxiliary_model_wrapper"]["kwargs"]["adapters"]["regressor"] |= {"path": "model.2", "kwargs": options}
    block["forward_hook"] = {"input": [], "output": ["model.2", "adapters.regressor"]}
    teacher = {"forward_hook": {"output": ["2"]}}
    box = with_side({"hint": HINT}, (network(1, width=8), network(2)), student=block, teacher=teacher)
    assert torch.isfinite(step(box, *images()))


def test_what_is_trained_is_shared_by_processes_on_cpus(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        regressor = {"path": "model.2", "io": "output", "key": "ConvRegressor", "kwargs": REGRESSOR}
        common = {"device": torch.device("cpu"), "device_ids": None, "distributed": True}
        wrapped = Adapters({"regressor": regressor}, student_model=network(2), **common)
        assert all(isinstance(m, DistributedDataParallel) for m in (wrapped.model, wrapped.adapters["regressor"]))
    finally:
        # a module in DistributedDataParallel must not outlive the group
        wrapped = None
        dist.destroy_process_group()

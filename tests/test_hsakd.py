"""HSAKD: rotations, heads, both losses against their formulas, and both stages in a box, with TALD beside them."""

from __future__ import annotations

import itertools
from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image
from test_nst import io_dict, maps
from test_package import example
from tiny import L2_THREAT, NUM_CLASSES, step, tald, term, train_config
from torch import nn
from torch.utils.data import Dataset, RandomSampler, TensorDataset
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.interfaces.forward_proc import forward_batch4sskd
from torchdistill.datasets.util import build_data_loader
from torchdistill.datasets.wrapper import SSKDDatasetWrapper
from torchdistill.losses.registry import get_mid_level_loss
from torchdistill.models.registry import get_model
from torchvision import transforms

from torchdistill_adv.datasets import FourRotations, SSKDRotations
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.hosts import HSAKDHeads, HSAKDHeadsLoss, HSAKDLoss
from torchdistill_adv.hosts.hsakd import joint_labels
from torchdistill_adv.step import Step

# rotations


class Pictures(Dataset):
    """Random pictures of 6 x 6, as torchvision's data sets give them."""

    def __init__(self, transform, count=4):
        self.pixels = np.random.RandomState(0).randint(256, size=(count, 6, 6, 3), dtype=np.uint8)
        self.transform = transform

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.pixels[index])), index % NUM_CLASSES


def test_rotations_are_those_of_one_augmented_image():
    augment = transforms.Compose(
        [transforms.RandomCrop(6, padding=2), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )
    wrapped = FourRotations(Pictures(augment))
    assert len(wrapped) == 4
    images = set()
    for seed in range(5):
        torch.manual_seed(seed)
        expected = Pictures(augment)[1][0]
        torch.manual_seed(seed)
        rotations, target, supp_dict = wrapped[1]
        assert (target, supp_dict) == (1, {})
        for turns in range(4):
            assert np.array_equal(rotations[turns], np.rot90(expected, turns, axes=(1, 2)))
        images.add(rotations[0].numpy().tobytes())
    assert len(images) > 1


def test_turning_is_pillows_and_torchdistills_wrapper_confuses_90_with_270():
    """Why SSKD's data set is none for labels of the rotation: it flips after the turn."""
    picture = Image.fromarray(Pictures(None).pixels[0])
    ours = FourRotations(Pictures(transforms.ToTensor()))[0][0]
    for turns in range(4):
        assert torch.equal(ours[turns], transforms.ToTensor()(picture.rotate(90 * turns)))
    flip = transforms.Compose([transforms.RandomHorizontalFlip(p=1), transforms.ToTensor()])
    theirs = SSKDDatasetWrapper(_untransformed(flip))[0][0]
    own = FourRotations(Pictures(flip))[0][0]
    assert torch.equal(theirs[1], own[3]) and torch.equal(theirs[3], own[1]) and torch.equal(theirs[0], own[0])


def _untransformed(transform):
    class Plain(Pictures):
        def __getitem__(self, index):
            picture = Image.fromarray(self.pixels[index])
            return self.transform(picture) if self.transform else picture, 0

    return Plain(transform)


def test_sskd_flips_an_image_then_turns_it_then_crops_each_rotation_apart():
    """The order of SSKD's official code."""
    picture = transforms.ToTensor()(Image.fromarray(Pictures(None).pixels[1]))
    torch.manual_seed(0)
    whole = SSKDRotations(Pictures(transforms.ToTensor()))
    assert len(whole) == 4
    flips = 0
    for _ in range(200):
        rotations, target, supp_dict = whole[1]
        assert (target, supp_dict) == (1, {})
        flipped = not torch.equal(rotations[0], picture)
        flips += flipped
        for turns in range(4):
            assert torch.equal(rotations[turns], torch.rot90(picture.flip(2) if flipped else picture, turns, (1, 2)))
    assert 70 < flips < 130
    crop = transforms.Compose([transforms.RandomCrop(4), transforms.ToTensor()])
    cropped = SSKDRotations(Pictures(crop))[1][0]
    upright = {torch.rot90(rotation, -turns, (1, 2)).numpy().tobytes() for turns, rotation in enumerate(cropped)}
    assert len(upright) > 1


def test_rows_of_a_batch_and_their_labels():
    config = {
        "sampler": {"class_or_func": RandomSampler},
        "dataset_wrapper": {"key": "FourRotations"},
        "kwargs": {"batch_size": 3},
        "requires_supp": True,
    }
    dataset = Pictures(transforms.ToTensor())
    batch, targets, _ = next(iter(build_data_loader(dataset, config, distributed=False)))
    rows = forward_batch4sskd(nn.Identity(), batch)
    labels = joint_labels(targets)
    assert rows.shape == (12, 3, 6, 6) and labels.shape == (12,)
    for row, label in zip(rows, labels.tolist(), strict=True):
        upright = torch.rot90(row, -(label % 4), (1, 2))
        assert torch.equal(upright, dataset[label // 4][0])


@pytest.mark.parametrize(
    "transform, found",
    [
        (lambda picture: picture, "a Image"),
        (transforms.Compose([transforms.Resize((6, 4)), transforms.ToTensor()]), r"\(3, 6, 4\)"),
        (lambda picture: torch.zeros(6, 6), r"\(6, 6\)"),
    ],
)
def test_images_that_cannot_be_turned_are_refused(transform, found):
    with pytest.raises(ConfigError, match=found) as error:
        FourRotations(Pictures(transform))[0]
    assert error.value.path == "dataset_wrapper"


@pytest.mark.parametrize("wrapper", [FourRotations, SSKDRotations], ids=lambda wrapper: wrapper.__name__)
def test_example_of_the_data_set(wrapper):
    text = example_text(wrapper)
    assert f"dataset_wrapper: {{key: '{wrapper.__name__}'}}" in text


def example_text(cls):
    return cls.__doc__.split(".. code-block:: yaml", 1)[1]


# losses


def log_softmax(row):
    return row - np.log(np.exp(row).sum())


def kl(teacher, student, temperature):
    p, q = log_softmax(teacher / temperature), log_softmax(student / temperature)
    return temperature**2 * (np.exp(p) * (p - q)).sum()


def test_loss_of_the_heads_is_the_formula():
    heads, targets = maps(0, 3, 8, 20), torch.tensor([4, 1])
    found = HSAKDHeadsLoss("h")({}, io_dict(h=heads), targets)
    losses = [
        -log_softmax(heads[head, 4 * image + turns].numpy())[4 * targets[image] + turns]
        for head, image, turns in itertools.product(range(3), range(2), range(4))
    ]
    assert found.item() == pytest.approx(sum(losses) / 8, rel=1e-12)


@pytest.mark.parametrize("temperature", [3.0, 1.5])
def test_loss_of_the_student_is_the_formula(temperature):
    targets = torch.tensor([4, 1])
    student, teacher = maps(0, 8, 5), maps(1, 8, 5)
    heads, teacher_heads = maps(2, 2, 8, 20), maps(3, 2, 8, 20)
    sides = [
        {".": {"output": logits}, **io_dict(heads=h)} for logits, h in ((student, heads), (teacher, teacher_heads))
    ]
    found = HSAKDLoss(temperature=temperature)(*sides, targets)
    ce = np.mean([-log_softmax(student[row].numpy())[targets[row // 4]] for row in (0, 4)])
    final = np.mean([kl(t, s, temperature) for t, s in zip(teacher.numpy(), student.numpy(), strict=True)])
    inner = [
        np.mean([kl(t, s, temperature) for t, s in zip(teacher_heads[head].numpy(), heads[head].numpy(), strict=True)])
        for head in range(2)
    ]
    assert found.item() == pytest.approx(ce + final + sum(inner), rel=1e-12)


def test_teacher_gets_no_gradient_and_equal_networks_have_cross_entropy_only():
    logits, heads = maps(0, 8, 5).requires_grad_(), maps(1, 2, 8, 20).requires_grad_()
    teacher_logits, teacher_heads = (x.detach().clone().requires_grad_() for x in (logits, heads))
    sides = [{".": {"output": a}, **io_dict(heads=b)} for a, b in ((logits, heads), (teacher_logits, teacher_heads))]
    targets = torch.tensor([0, 3])
    loss = HSAKDLoss()(*sides, targets)
    loss.backward()
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(logits[::4], targets).item(), rel=1e-12)
    assert teacher_logits.grad is None and teacher_heads.grad is None
    assert heads.grad.abs().max() < 1e-12 and logits.grad[::4].abs().max() > 0.01


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 8, 24)])
def test_other_heads_than_the_teachers_are_refused(shape):
    sides = [{".": {"output": maps(0, 8, 5)}, **io_dict(heads=maps(1, *s))} for s in ((2, 8, 20), shape)]
    with pytest.raises(ConfigError, match="found 2 heads of 20 classes"):
        HSAKDLoss()(*sides, torch.tensor([0, 1]))


@pytest.mark.parametrize("temperature", [0, -1, "warm"])
def test_bad_temperature(temperature):
    with pytest.raises(ConfigError, match="temperature"):
        HSAKDLoss(temperature=temperature)


@pytest.mark.parametrize("loss", [HSAKDHeadsLoss, HSAKDLoss])
def test_examples_of_the_losses_are_built_by_torchdistill(loss):
    assert isinstance(get_mid_level_loss(example(loss)["criterion"]), loss)


# heads


def stages(*rows):
    return [{"path": path, "channels": channels, "num_blocks": blocks} for path, channels, blocks in rows]


WRN = {"depth": 16, "widen_factor": 2}
NETWORKS = {
    "resnet20": ({}, "basic", stages(("layer1", 16, 3), ("layer2", 32, 3), ("layer3", 64, 3))),
    "cifar_resnet8x4": ({}, "basic", stages(("layer1", 64, 1), ("layer2", 128, 1), ("layer3", 256, 1))),
    "cifar_wide_resnet": (WRN, "preactivation", stages(("block1", 32, 2), ("block2", 64, 2), ("block3", 128, 2))),
    "cifar_resnet50": (
        {},
        "bottleneck",
        stages(("layer1", 256, 3), ("layer2", 512, 4), ("layer3", 1024, 6), ("layer4", 2048, 3)),
    ),
    "cifar_shufflenet_v1": ({}, "shuffle_v1", stages(("layer1", 240, 4), ("layer2", 480, 8), ("layer3", 960, 4))),
    "cifar_shufflenet_v2": ({}, "shuffle_v2", stages(("stage2", 116, 4), ("stage3", 232, 8), ("stage4", 464, 4))),
}


def shapes(module):
    return [tuple(p.shape) for p in module.parameters()]


@pytest.mark.parametrize("key", NETWORKS)
def test_a_head_has_the_stages_that_are_behind_it(key):
    """The official heads: blocks as in the network itself, and for the last stage once more its own, without stride."""
    kwargs, block, blocks = NETWORKS[key]
    with torch.device("meta"):
        network = get_model(key, num_classes=7, **kwargs)
        heads = HSAKDHeads(7, block, blocks).heads
    behind = [network.get_submodule(stage["path"]) for stage in blocks]
    for index, head in enumerate(heads):
        assert head[-1].weight.shape == (28, blocks[-1]["channels"])
        own = [shape for stage in head[: len(blocks) - 1 - index] for shape in sorted(shapes(stage))]
        if index < len(blocks) - 1:
            assert own == [shape for stage in behind[index + 1 :] for shape in sorted(shapes(stage))]
    last, depth = heads[-1][0], blocks[-1]["num_blocks"]
    assert len(last) == depth and len({tuple(shapes(b)) for b in last}) == 1
    if depth > 1:
        assert sorted(shapes(last[0])) == sorted(shapes([*behind[-1].children()][-1])) or block == "preactivation"


# the official code's at 28c8dc2d, run beside ours, for 100 classes
COUNTS = {
    "resnet20": 762992,
    "cifar_resnet8x4": 3557296,
    "cifar_wide_resnet": 1928304,
    "cifar_resnet50": 76976704,
    "cifar_shufflenet_v1": 3118740,
}


@pytest.mark.parametrize("key", COUNTS)
def test_counts_are_those_of_the_official_code(key):
    with torch.device("meta"):
        heads = HSAKDHeads(100, *NETWORKS[key][1:])
    assert sum(p.numel() for p in heads.parameters()) == COUNTS[key]


def test_convolutions_start_as_those_of_the_networks():
    torch.manual_seed(0)
    heads = HSAKDHeads(3, "basic", stages(("a", 32, 1), ("b", 64, 1)))
    weights = [m.weight for m in heads.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(weights) == 4
    assert all(w.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03) for w in weights)


@pytest.mark.parametrize(
    "block, blocks, head_channels",
    [
        ("basic", NETWORKS["resnet20"][2], None),
        ("preactivation", NETWORKS["cifar_wide_resnet"][2], None),
        ("bottleneck", stages(("a", 8, 1), ("b", 16, 2)), None),
        ("conv", stages(("a", 4, 1), ("b", 6, 1), ("c", 6, 2)), None),
        ("inverted", stages(("a", 12, 2), ("b", 16, 3)), 40),
        ("shuffle_v1", stages(("a", 24, 2), ("b", 48, 2)), None),
        ("shuffle_v2", stages(("a", 8, 2), ("b", 16, 2)), 24),
    ],
)
def test_every_head_gives_class_and_rotation_and_is_trained_whole(block, blocks, head_channels):
    torch.manual_seed(0)
    heads = HSAKDHeads(3, block, blocks, head_channels)
    sizes = [16 // 2**i for i in range(len(blocks))]
    features = [torch.randn(4, s["channels"], n, n, requires_grad=True) for s, n in zip(blocks, sizes, strict=True)]
    logits = heads(features)
    assert logits.shape == (len(blocks), 4, 12)
    for own, x in zip(logits, features, strict=True):
        (gradient,) = torch.autograd.grad(own.square().sum(), x, retain_graph=True)
        assert gradient.abs().amax((1, 2, 3)).min() > 0
    logits.square().sum().backward()
    assert all(p.grad is not None for p in heads.parameters())


@pytest.mark.parametrize(
    "changes, path, found",
    [
        ({"block": "basics"}, "block", "did you mean 'basic'"),
        ({"num_classes": 0}, "num_classes", "found 0"),
        ({"stages": stages(("0", 4, 0))}, "num_blocks", "found 0"),
        ({"stages": stages(("0", "four", 1))}, "channels", "four"),
        ({"freezes_heads": True}, "heads_ckpt", "found None, which is no file"),
        ({"freezes_heads": True, "heads_ckpt": "nowhere.pt"}, "heads_ckpt", "nowhere.pt"),
    ],
)
def test_bad_options_are_refused(changes, path, found):
    with pytest.raises(ConfigError, match=found) as error:
        two_stages(None, **changes)
    assert error.value.path == f"teacher.auxiliary_model_wrapper.kwargs.{path}"


# both stages


def staged(seed, width):
    """A network of two stages, of 6 x 6 and 3 x 3 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)

        def stage(in_channels, out_channels, stride):
            layers = [nn.Conv2d(in_channels, out_channels, 3, stride, 1), nn.BatchNorm2d(out_channels), nn.ReLU()]
            return nn.Sequential(*layers)

        return nn.Sequential(
            OrderedDict(
                stage1=stage(2, width, 1),
                stage2=stage(width, 2 * width, 2),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                fc=nn.Linear(2 * width, NUM_CLASSES),
            )
        )


def side(width, heads_ckpt, **changes):
    kwargs = {"num_classes": NUM_CLASSES, "block": "basic", "heads_ckpt": heads_ckpt, **changes}
    kwargs.setdefault("stages", stages(("model.stage1", width, 1), ("model.stage2", 2 * width, 1)))
    return {
        "forward_proc": "forward_batch4sskd",
        "auxiliary_model_wrapper": {"key": "HSAKDWrapper", "kwargs": kwargs},
        "forward_hook": {"input": [], "output": ["model.stage1", "model.stage2", "heads"]},
    }


def sub_term(key):
    return {"criterion": {"key": key, "kwargs": {}}, "weight": 1.0}


def two_stages(folder, terms=None, **changes):
    """A box of both stages, whose first epoch has begun."""
    ckpt = None if folder is None else str(folder / "new" / "heads.pt")
    first = train_config(
        {"heads": sub_term("HSAKDHeadsLoss")}, pre_epoch_process="default_pre_epoch_process_with_teacher"
    )
    first["teacher"] = {**side(8, ckpt), "requires_grad": True, "frozen_modules": ["model"]}
    first["teacher"]["auxiliary_model_wrapper"]["kwargs"] |= changes
    empty = {"auxiliary_model_wrapper": {"key": "EmptyModule"}, "requires_grad": False}
    first["student"] = {**empty, "forward_proc": "forward_batch_only"}
    first["train_data_loader"]["dataset_wrapper"] = {"key": "FourRotations"}
    first["train_data_loader"]["kwargs"] = {"batch_size": 3}
    second = train_config({"hsakd": sub_term("HSAKDLoss"), **(terms or {})})
    second["teacher"] = {**side(8, ckpt, freezes_heads=True), "requires_grad": False}
    second["student"] = {**side(4, None), "requires_grad": True}
    del second["train_data_loader"]
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.rand(6, 2, 6, 6, generator=generator), torch.arange(6) % NUM_CLASSES)
    torch.manual_seed(0)
    config = {"stage1": first, "stage2": second}
    box = get_distillation_box(staged(1, 8), staged(2, 4), {"data": data}, config, torch.device("cpu"), None, False, 1)
    box.pre_epoch_process(epoch=0)
    return box


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def epoch(box):
    for batch, targets, supp_dict in box.train_data_loader:
        yield batch, targets, step(box, batch, targets, supp_dict)
    box.post_epoch_process()


def test_both_stages(tmp_path):
    box = two_stages(tmp_path)
    teacher, student = box.org_teacher_model, box.org_student_model
    heads = box.teacher_model.heads
    before, own = state(teacher), state(heads)
    assert len([*epoch(box)]) == 2
    # the backbone is as it was, running statistics too, and every tensor of the heads has moved
    assert same(state(teacher), before)
    assert all(not torch.equal(own[name], value) for name, value in heads.state_dict().items())
    trained = state(heads)

    box.pre_epoch_process(epoch=1)
    frozen = box.teacher_model.heads
    assert frozen is not heads and same(state(frozen), trained)
    assert not any(p.requires_grad for p in frozen.parameters())
    (tmp_path / "new" / "heads.pt").unlink()
    teacher_before, before, own = state(teacher), state(student), state(box.student_model.heads)
    for batch, targets, loss in epoch(box):
        assert batch.shape == (3, 4, 2, 6, 6) and targets.shape == (3,) and torch.isfinite(loss)
    assert same(state(teacher), teacher_before) and same(state(frozen), trained)
    # heads that are not trained are not written either
    assert not (tmp_path / "new" / "heads.pt").exists()
    for module, old in ((student, before), (box.student_model.heads, own)):
        assert all(not torch.equal(old[name], value) for name, value in module.state_dict().items())


def test_a_step_of_the_second_stage_is_the_formula(tmp_path):
    box = second_stage(tmp_path)
    batch, targets, _ = next(iter(box.train_data_loader))
    teacher, student = box.org_teacher_model, box.org_student_model
    x, logits, heads = batch.flatten(0, 1), {}, {}
    for name, network, model in (("t", teacher.eval(), box.teacher_model), ("s", student.train(), box.student_model)):
        with torch.no_grad():
            first = network.stage1(x)
            second = network.stage2(first)
            heads[name] = [head(m) for head, m in zip(model.heads.heads, (first, second), strict=True)]
            logits[name] = network.fc(second.mean((2, 3)))
    expected = nn.functional.cross_entropy(logits["s"][::4], targets)
    for t, s in zip((logits["t"], *heads["t"]), (logits["s"], *heads["s"]), strict=True):
        divergence = nn.functional.kl_div((s / 3).log_softmax(1), (t / 3).softmax(1), reduction="batchmean")
        expected = expected + 9 * divergence
    assert step(box, batch, targets, {}).item() == pytest.approx(expected.item(), rel=1e-5)


def second_stage(folder, terms=None):
    box = two_stages(folder, terms)
    [*epoch(box)]
    box.pre_epoch_process(epoch=1)
    return box


def test_frozen_heads_and_the_teacher_stay_in_eval_mode(tmp_path):
    box = second_stage(tmp_path)
    box.teacher_model.train()
    assert not any(m.training for m in (*box.org_teacher_model.modules(), *box.teacher_model.heads.modules()))
    box.student_model.train()
    assert box.org_student_model.training and box.student_model.heads.training


def test_tald_beside_it(tmp_path, monkeypatch):
    """The teacher is explored around every row of the batch's first view, with the label of its image."""
    options = {"threat": {**L2_THREAT, "mean": [0, 0], "std": [1, 1]}, "student_bn": "eval"}
    box = second_stage(tmp_path, {"tald": tald(1.0, **options)})
    searches = []
    found = Step.examples

    def watch(self, search):
        searches.append(found(self, search))
        return searches[-1]

    monkeypatch.setattr(Step, "examples", watch)
    batch, targets, _ = next(iter(box.train_data_loader))
    before = state(box.org_teacher_model), state(box.teacher_model.heads)
    host = state(box.org_student_model)
    value = term(box, "tald")
    own = []
    value.register_forward_hook(lambda module, args, output: own.append(output.item()))
    loss = box.forward_process(batch, targets, {})
    rows, index = searches[0].rows, searches[0].index
    distance = (rows - batch[:, 0][index]).flatten(1).norm(dim=1)
    assert distance.min() > 0 and distance.max() <= 0.3 + 1e-6 and index.max() == 2
    box.org_student_model.eval()
    gaps = [
        nn.functional.cross_entropy(net(rows), targets[index], reduction="none")
        for net in (box.org_teacher_model, box.org_student_model)
    ]
    assert own[0] == pytest.approx((gaps[0] - gaps[1]).square().mean().item(), rel=1e-4)
    box.org_student_model.train()
    box.post_forward_process(loss=loss)
    assert same(state(box.org_teacher_model), before[0]) and same(state(box.teacher_model.heads), before[1])
    assert not same(state(box.org_student_model), host)


def test_heads_that_do_not_fit_are_named(tmp_path):
    two_stages(tmp_path).post_epoch_process()
    with pytest.raises(ConfigError, match="does not fit") as error:
        two_stages(tmp_path, stages=stages(("model.stage1", 8, 1), ("model.stage2", 16, 2)))
    assert error.value.path == "teacher.auxiliary_model_wrapper.kwargs.heads_ckpt"
    (tmp_path / "new" / "heads.pt").write_bytes(b"PK")
    with pytest.raises(ConfigError, match="cannot be read") as error:
        two_stages(tmp_path)
    assert error.value.path == "teacher.auxiliary_model_wrapper.kwargs.heads_ckpt"


def test_a_stage_that_is_not_hooked_is_named(tmp_path):
    box = two_stages(tmp_path, stages=stages(("model.stage1", 8, 1), ("model.stage3", 16, 1)))
    batch, targets, supp_dict = next(iter(box.train_data_loader))
    with pytest.raises(ConfigError, match=r"'model\.stage3', which HSAKDWrapper reads") as error:
        box.forward_process(batch, targets, supp_dict)
    assert error.value.path == "teacher.forward_hook.output"

"""Robust accuracy during training: what is measured, what is kept, what is refused, and that it leaves no trace."""

from __future__ import annotations

import copy
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from test_distributed import in_two_processes
from tiny import CE, KD, NORMALIZE, PIXEL_THREAT, images, leave_process_group, network, sharp, tald, train_config
from torch import nn
from torch.utils.data import RandomSampler, SequentialSampler, Subset, TensorDataset
from torchdistill.common.main_util import load_ckpt
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.training import get_training_box
from torchdistill.datasets.wrapper import BaseDatasetWrapper
from torchvision.transforms import ToTensor

from torchdistill_adv.adversaries import Examples
from torchdistill_adv.datasets import Digits
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.noise import ImageNoise, derive_seed
from torchdistill_adv.robust_validation import (
    BLOCK,
    RobustValidation,
    check_held_out,
    check_no_test_data,
    validate_robustly,
    validator_of,
)
from torchdistill_adv.runner.check import check_robust_validation

THREAT = {**PIXEL_THREAT, "eps": 0.05}
SETTINGS = {"threat": THREAT, "ckpt": "student.pt", "num_images": 20}


class Labelled(TensorDataset):
    """Random images that a network can learn: one of 24 is of the class that is brightest somewhere."""

    def __init__(self, count=24, seed=0, **facts):
        x, _ = images(count, seed)
        super().__init__(x, (x[:, 0].flatten(1)[:, :5]).argmax(1))
        vars(self).update(facts)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stage(block=SETTINGS, *, terms=None, batch_size=7, **changes):
    loader = {
        "dataset_id": "val",
        "sampler": {"class_or_func": SequentialSampler},
        "kwargs": {"batch_size": batch_size},
    }
    validated = {} if block is None else {"post_epoch_process": "validate_robustly", BLOCK: block}
    train_loader = {
        "dataset_id": "data",
        "sampler": {"class_or_func": RandomSampler},
        "kwargs": {"batch_size": 8},
    }
    return train_config(
        {"ce": CE} if terms is None else terms,
        **{"num_epochs": 3, "train_data_loader": train_loader, "val_data_loader": loader, **validated, **changes},
    )


def make(config, *, with_teacher=True, student=None, val=None, seed=0):
    student = network(2, dropout=0.3) if student is None else student
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    data = {"data": Labelled(), "val": Labelled(seed=1) if val is None else val}
    common = (student, data, config, torch.device("cpu"), None, False, 1)
    return get_distillation_box(network(1), *common) if with_teacher else get_training_box(*common)


def student_of(box):
    return box.org_student_model if hasattr(box, "org_student_model") else box.org_model


def epochs(box, start=0, metrics=None):
    """Train, and give the record of every epoch when it is over: None where nothing was measured."""
    for epoch in range(start, box.num_epochs):
        box.pre_epoch_process(epoch=epoch)
        for x, y, *_ in box.train_data_loader:
            box.post_forward_process(loss=box.forward_process(x, y, {}))
        validator = validator_of(box)
        box.post_epoch_process(metrics=metrics)
        yield validator and validator.latest


def train(box, **options):
    return list(epochs(box, **options))


# what is measured


def slow_counts(net, data, chosen, eps, step_size, num_steps, seed):
    """Clean and robust images of ``chosen``, with PGD written again for one image at a time."""
    mean, std = (torch.tensor(NORMALIZE[name]).view(2, 1, 1) for name in ("mean", "std"))
    net = copy.deepcopy(net).eval()
    clean = robust = 0
    for i in chosen:
        x, y = data[i]
        pixels = x * std + mean
        start = ImageNoise(derive_seed(seed, "start"), [i], x[None]).uniform((1, *x.shape))[0]
        adv = (pixels + eps * start).clamp(0, 1)
        for _ in range(num_steps):
            adv = adv.detach().requires_grad_()
            logits = net(((adv - mean) / std)[None])[0]
            (torch.logsumexp(logits, 0) - logits[y]).backward()
            adv = (adv + step_size * adv.grad.sign()).clamp(pixels - eps, pixels + eps).clamp(0, 1)
        is_right = net(x[None]).argmax() == y
        clean += int(is_right)
        robust += int(is_right and net(((adv - mean) / std)[None]).argmax() == y)
    return clean, robust


def test_measures_what_slow_loops_measure():
    box = make(stage(num_epochs=12), student=network(2), val=Labelled(), with_teacher=False)
    [*_, record] = train(box)
    chosen = RobustValidation(**SETTINGS).draw(24)
    assert len(chosen) == 20
    clean, robust = slow_counts(student_of(box), box.val_data_loader.dataset, chosen, 0.05, 0.0125, 10, 0)
    assert 0 < robust < clean < 20, "the numbers tell something"
    assert record == {
        "clean": 5.0 * clean,
        "robust": 5.0 * robust,
        "num_images": 20,
        "attack": "PGD-10 on ce_student",
        "norm": "linf",
        "eps": 0.05,
        "threat": "linf eps=0.05 in pixel space = 12.8/255 in pixels of [0, 1]",
    }


class Replaces:
    """A search that has one example for all images."""

    targeted, num_rows, num_gradients = False, 1, 0

    def __init__(self, example):
        self.example = example

    def __call__(self, objective, x, threat, noise):
        return Examples(self.example.expand_as(x), torch.arange(len(x)))


def test_an_image_that_is_wrong_without_a_search_is_lost():
    net, data = sharp(2), Labelled(seed=1)
    predicted = net.eval()(data.tensors[0]).argmax(1)
    example = data.tensors[0][:1]
    right, is_of_its_class = predicted == data.tensors[1], data.tensors[1] == predicted[0]
    box = make(stage({**SETTINGS, "num_images": 24, "adversary": Replaces(example)}), student=net)
    validator_of(box).end_epoch(box, None)
    expected = int((right & is_of_its_class).sum())
    assert int(is_of_its_class.sum()) > expected
    assert validator_of(box).latest["robust"] == pytest.approx(100 * expected / 24)


@pytest.mark.parametrize("batch_size", [1, 5, 24])
def test_batch_size_changes_nothing(batch_size):
    settings = {**SETTINGS, "adversary": {"key": "PGD", "kwargs": {"num_steps": 3, "step_size": 0.01}}}
    first, second = (make(stage(settings, batch_size=size), student=sharp(2)) for size in (7, batch_size))
    for box in (first, second):
        validator_of(box).end_epoch(box, None)
    assert validator_of(first).latest == validator_of(second).latest


def test_no_radius_is_clean_accuracy_and_a_large_one_leaves_nothing():
    found = {}
    for eps in (0.0, 0.9):
        box = make(stage({**SETTINGS, "threat": {**THREAT, "eps": eps}}), student=network(2))
        [*_, found[eps]] = train(box)
    assert found[0.0]["robust"] == found[0.0]["clean"] > found[0.9]["robust"] == 0


@given(count=st.integers(1, 200), num_images=st.integers(1, 200), seed=st.integers(0, 5))
def test_draws_some_images_in_their_order(count, num_images, seed):
    settings = RobustValidation(**{**SETTINGS, "num_images": num_images, "seed": seed})
    drawn = settings.draw(count)
    assert drawn == sorted(set(drawn)) and len(drawn) == min(count, num_images)
    assert set(drawn) <= set(range(count)) and drawn == settings.draw(count)


def test_seed_draws_others():
    drawn = [RobustValidation(**SETTINGS, seed=seed).draw(1000) for seed in range(3)]
    assert drawn[0] != drawn[1] != drawn[2]


def test_teacher_takes_part_in_an_objective_that_needs_it():
    settings = {**SETTINGS, "objective": "kl_teacher_student"}
    found = []
    for seed in (1, 5):
        box = make(stage(settings), student=sharp(2))
        box.org_teacher_model.load_state_dict(sharp(seed).state_dict())
        seen = []
        box.org_teacher_model.register_forward_hook(lambda m, x, out, seen=seen: seen.append(m.training))
        validator_of(box).end_epoch(box, None)
        assert seen and not any(seen)
        found.append(validator_of(box).latest)
    assert all(record["attack"] == "PGD-10 on kl_teacher_student" for record in found)


# no trace


def everything(box):
    """All that training leaves behind, and what the host reads next."""
    modules = [m for m in vars(box).values() if isinstance(m, nn.Module)]
    dictionaries = [d for name, d in vars(box).items() if name.endswith("io_dict")]
    return {
        "weights": [v.clone() for m in modules for v in m.state_dict().values()],
        "gradients": [p.grad if p.grad is None else p.grad.clone() for m in modules for p in m.parameters()],
        "modes": [m.training for module in modules for m in module.modules()],
        "optimizer": [v for s in box.optimizer.state_dict()["state"].values() for v in s.values()],
        "lr": [group["lr"] for group in box.optimizer.param_groups],
        "hooks": [copy.copy(found) for d in dictionaries for inner in d.values() for found in inner.values()],
        "streams": [torch.get_rng_state(), random.getstate(), np.random.get_state()[1]],
    }


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, (torch.Tensor, np.ndarray)):
        return type(a) is type(b) and (a.shape == b.shape) and bool((a == b).all())
    return a == b


def staged(*configs):
    return {f"stage{i + 1}": config for i, config in enumerate(configs)}


NOISY = {"adversary": {"key": "PGD", "kwargs": {"num_steps": 2}}, **SETTINGS}
HOOKED = {"forward_proc": "forward_batch_only", "requires_grad": True, "forward_hook": {"input": [], "output": ["1"]}}
SCHEDULER = {"key": "StepLR", "kwargs": {"step_size": 1, "gamma": 0.5}}
HOSTS = {
    "training": (False, lambda block: stage(block, scheduler=SCHEDULER, model=HOOKED)),
    "distillation": (True, lambda block: stage(block, terms={"kd": KD, "tald": tald()}, student=HOOKED)),
    "stages": (True, lambda block: staged(stage(block), stage(block, num_epochs=2, scheduler=SCHEDULER))),
    "training in stages": (False, lambda block: staged(stage(block), stage(block, num_epochs=1))),
}


class RandomValidation(Labelled):
    """A validation set whose transform draws from every stream."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0 * (torch.rand(()) + random.random() + np.random.rand()), y


@pytest.mark.parametrize("name", HOSTS)
def test_training_is_bit_for_bit_that_without(name):
    with_teacher, config = HOSTS[name]
    found = []
    for block in (None, NOISY):
        box = make(config(block), with_teacher=with_teacher, val=RandomValidation(seed=1))
        found.append([everything(box) for _ in epochs(box)])
    assert load("last")["args"][BLOCK]["num_images"] == 20
    for plain, validated in zip(*found, strict=True):
        for what in plain:
            assert equal(plain[what], validated[what]), what


def test_a_measurement_leaves_everything_as_it_was():
    config = stage(NOISY, student=HOOKED, teacher={**HOOKED, "requires_grad": False})
    box = make(config, val=RandomValidation(seed=1))
    next(epochs(box))
    box.pre_epoch_process(epoch=1)
    x, y = Labelled()[:8]
    box.forward_process(x, y, {}).backward()
    box.student_model(x)
    before = everything(box)
    assert before["hooks"] and all(before["hooks"]) and any(before["modes"])
    assert any(gradient is not None for gradient in before["gradients"])
    validator_of(box).end_epoch(box, None)
    assert equal(before, everything(box))


# what is kept


def test_best_and_last_student_are_kept():
    box = make(stage(num_epochs=6, optimizer={"key": "SGD", "kwargs": {"lr": 0.6}}), student=network(2))
    states, measured = [], []
    for record in epochs(box, metrics=42.0):
        assert load("last")["args"]["epoch"] == len(measured)
        states.append(copy.deepcopy(student_of(box).state_dict()))
        measured.append(record["robust"])
    best = measured.index(max(measured))
    assert 0 < best < 5, "the best epoch is neither the first nor the last"
    for name, epoch in (("best_robust", best), ("last", 5)):
        saved = load(name)
        assert (saved["args"]["epoch"], saved["args"]["stage"], saved["best_value"]) == (epoch, 1, 42.0)
        assert saved["args"][BLOCK]["robust"] == measured[epoch]
        assert equal(dict(saved["model"]), dict(states[epoch]))
        other = network(9)
        load_ckpt(f"student-{name}.pt", model=other)
        assert equal(dict(other.state_dict()), dict(states[epoch]))
    assert sorted(path.name for path in Path().iterdir()) == ["student-best_robust.pt", "student-last.pt"]


def load(name):
    return torch.load(f"student-{name}.pt", weights_only=False)


def test_first_of_equal_epochs_is_kept():
    box = make(stage({**SETTINGS, "threat": {**THREAT, "eps": 0.9}}))
    assert [record["robust"] for record in train(box)] == [0, 0, 0]
    assert (load("best_robust")["args"]["epoch"], load("last")["args"]["epoch"]) == (0, 2)


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 1, 1, 1, 1]), (2, [0, 1, 0, 1, 1]), (9, [0, 0, 0, 0, 1])])
def test_every_n_epochs_and_after_the_last(every, expected):
    box = make(stage({**SETTINGS, "every": every}, num_epochs=5))
    assert [int(record is not None) for record in train(box)] == expected
    assert load("last")["args"]["epoch"] == 4


def test_clean_best_is_that_of_the_images_where_the_runner_tells_none():
    box = make(stage())
    assert max(record["clean"] for record in train(box)) == load("last")["best_value"] > 0


def test_an_interrupted_save_leaves_the_file_before(monkeypatch):
    box = make(stage())
    training = epochs(box)
    next(training)
    before = Path("student-last.pt").read_bytes()
    save = torch.save

    def stop(saved, path):
        save(saved, path)
        Path(path).write_bytes(Path(path).read_bytes()[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        next(training)
    assert Path("student-last.pt").read_bytes() == before


def test_a_best_student_that_could_not_be_saved_is_not_the_one_to_beat(caplog):
    box = make(stage())
    Path("student-best_robust.pt").mkdir()
    first = next(epochs(box))
    assert first is not None and validator_of(box).best_robust is None
    assert "'student-best_robust.pt' was not saved" in caplog.text and Path("student-last.pt").is_file()
    Path("student-best_robust.pt").rmdir()
    second = next(epochs(box, start=1))
    assert validator_of(box).best_robust == second["robust"] and Path("student-best_robust.pt").is_file()


def write_best(robust, clean=0.0, **changes):
    """A file that an earlier run left."""
    record = {"robust": robust, "clean": clean, **RobustValidation(**SETTINGS).describe(), **changes}
    saved = {"model": {}, "optimizer": {}, "lr_scheduler": None, "best_value": 77.0}
    torch.save({**saved, "args": {"epoch": 0, "stage": 1, BLOCK: record}}, "student-best_robust.pt")


def test_a_fresh_run_knows_no_earlier_best():
    write_best(100.0)
    train(make(stage()))
    assert load("best_robust")["model"]


def test_going_on_knows_the_best_so_far():
    write_best(100.0)
    train(make(stage()), start=1)
    assert not load("best_robust")["model"] and load("last")["best_value"] == 77.0
    write_best(-1.0)
    train(make(stage()), start=1)
    assert load("best_robust")["args"]["epoch"] >= 1
    # another attack has other numbers
    write_best(100.0, eps=0.3)
    train(make(stage()), start=1)
    assert load("best_robust")["model"]


# stages and boxes


def test_stages_go_on_with_the_best():
    settings = [{**SETTINGS, "threat": {**THREAT, "eps": eps}} for eps in (0.0, 0.9)]
    box = make(staged(*map(stage, settings)))
    found = train(box)
    assert [record["eps"] for record in found] == [0.0] * 3 + [0.9] * 3
    assert validator_of(box).stage == "train.stage2"
    assert validator_of(box).best_robust == max(record["robust"] for record in found[:3]) > 0
    assert load("best_robust")["args"]["stage"] == 1 and load("last")["args"]["stage"] == 2
    assert load("last")["args"]["epoch"] == 5


def test_later_stage_alone():
    write_best(100.0)
    box = make(staged(stage(None), stage({**SETTINGS, "every": 4})))
    assert [record is not None for record in train(box)] == [False, False, False, True, False, True]
    assert load("best_robust")["args"]["stage"] == 2 and load("last")["args"]["epoch"] == 5


def test_first_stage_alone():
    box = make(staged(stage(), stage(None)))
    assert [record is not None for record in train(box)] == [True] * 3 + [False] * 3
    assert validator_of(box) is None and load("last")["args"]["epoch"] == 2


def test_error_in_a_later_stage_has_its_path():
    box = make(staged(stage(None), stage({**SETTINGS, "every": 0})))
    with pytest.raises(ConfigError, match=r"^train\.stage2\.robust_validation\.every: found 0"):
        train(box)


def test_two_boxes_in_one_process():
    first = make(stage({**SETTINGS, "ckpt": "first.pt"}))
    second = make(stage({**SETTINGS, "ckpt": "second.pt", "every": 2}))
    assert all(train(first))
    assert [r is not None for r in train(second)] == [False, True, True]
    assert Path("first-last.pt").exists() and Path("second-last.pt").exists()
    # a box without it is not measured by the process of another one's class
    plain = make(stage(None))
    validated = make(stage())
    assert train(plain) == [None] * 3
    make(stage(None))
    with pytest.raises(ConfigError, match=r"^train\.post_epoch_process: is no longer 'validate_robustly'"):
        train(validated)


def test_a_copied_box_measures_its_own_student():
    box = make(stage())
    copied = copy.deepcopy(box)
    student_of(copied)[-1].bias.data += torch.tensor([1e4, 0, 0, 0, 0])
    share = 100 * (Labelled(seed=1).tensors[1][RobustValidation(**SETTINGS).draw(24)] == 0).float().mean()
    copied.pre_epoch_process(epoch=0)
    copied.post_epoch_process()
    assert validator_of(copied).latest["robust"] == pytest.approx(float(share))
    assert validator_of(box).latest is None and validator_of(box).epoch == -1


# processes


class ManyImages(Labelled):
    """An odd number of images, so that the shares differ, of the classes that a network gives them."""

    def __init__(self):
        x, _ = images(23, seed=1)
        TensorDataset.__init__(self, x, sharp(2).eval()(x).argmax(1))


def measure(folder, rank):
    torch.manual_seed(0)
    net = sharp(2)
    # running statistics of the process's own, as training without synchronised batch normalisation leaves them
    net[1].running_mean += rank
    settings = {**SETTINGS, "ckpt": f"{folder}/student.pt", "num_images": 23, "threat": {**THREAT, "eps": 0.02}}
    box = make(stage(settings), student=net, val=ManyImages(), with_teacher=False)
    before = everything(box)
    box.pre_epoch_process(epoch=0)
    validator_of(box).end_epoch(box, None)
    del before["modes"]
    after = everything(box)
    return validator_of(box).latest, all(equal(before[what], after[what]) for what in before)


def work(rank, folder, names):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    torch.save(measure(folder, rank), f"{folder}/{rank}.pt")
    leave_process_group()


def test_two_processes_find_what_one_finds(tmp_path):
    in_two_processes(work, tmp_path, [])
    alone, is_as_before = measure(tmp_path / "alone", 0)
    assert is_as_before and 0 < alone["robust"] < alone["clean"]
    assert measure(tmp_path / "alone", 1)[0] != alone
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)] == [(alone, True)] * 2
    assert (tmp_path / "student-best_robust.pt").exists()


# what is refused


class Facts(Labelled):
    pass


REFUSED = {
    "digits": (lambda: {"val": Digits("test", ToTensor())}, {}, "val_data_loader", "test data (Digits)"),
    "no block": (dict, {"block": "none"}, "robust_validation", "is missing"),
    "a block that is none": (dict, {"block": 3}, "robust_validation", "found 3"),
    "an unknown option": (dict, {"num_image": 3}, "robust_validation.num_image", "did you mean 'num_images'"),
    "no threat": (dict, {"threat": None}, "robust_validation.threat", "found None"),
    "an option of the threat": (dict, {"threat": {**THREAT, "epss": 1}}, "robust_validation.threat.epss", "'eps'"),
    "no end": (dict, {"threat": {**THREAT, "eps": float("inf")}}, "robust_validation.threat.eps", "finite"),
    "another normalisation": (
        dict,
        {"threat": {**THREAT, "mean": [0.0], "std": [1.0]}},
        "robust_validation.threat.mean",
        "outside [0, 1]",
    ),
    "no extension": (dict, {"ckpt": "student"}, "robust_validation.ckpt", "extension"),
    "an epoch and a half": (dict, {"every": 1.5}, "robust_validation.every", "integer >= 1"),
    "no images": (dict, {"num_images": 0}, "robust_validation.num_images", "integer >= 1"),
    "a seed": (dict, {"seed": "x"}, "robust_validation.seed", "integer"),
    "an adversary": (dict, {"adversary": "PDG"}, "robust_validation.adversary.key", "did you mean 'PGD'"),
    "an option of an adversary": (
        dict,
        {"adversary": {"key": "PGD", "kwargs": {"num_step": 3}}},
        "robust_validation.adversary.kwargs.num_step",
        "'num_steps'",
    ),
    "particles": (dict, {"adversary": "SVGD"}, "robust_validation.adversary", "one example an image"),
    "a targeted search": (
        dict,
        {"adversary": {"key": "PGD", "kwargs": {"targeted": True}}},
        "robust_validation.adversary",
        "untargeted",
    ),
    "an objective": (dict, {"objective": "ce_studnet"}, "robust_validation.objective.key", "'ce_student'"),
    "an attack on the teacher": (dict, {"objective": "ce_teacher"}, "robust_validation.objective", "student"),
    "a target": (
        dict,
        {"objective": {"key": "ce_student", "kwargs": {"target_class": "runner_up"}}},
        "robust_validation.objective",
        "untargeted",
    ),
    "no teacher": (dict, {"objective": "kl_teacher_student"}, "robust_validation.objective", "without one"),
    "the test set of torchvision": (
        lambda: {"val": Facts(train=False)},
        {},
        "val_data_loader",
        "found test data (Facts)",
    ),
    "a split for testing": (lambda: {"val": Facts(split="test")}, {}, "val_data_loader", "found test data (Facts)"),
    "a part of a test set": (
        lambda: {"val": Subset(Facts(split="test"), range(5))},
        {},
        "val_data_loader",
        "found test data (Facts)",
    ),
    "an empty set": (lambda: {"val": Subset(Labelled(), [])}, {}, "val_data_loader", "no images"),
    "images of another kind": (
        lambda: {"val": TensorDataset(torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4).long())},
        {},
        "val_data_loader",
        "float tensor",
    ),
    "labels of another kind": (
        lambda: {"val": TensorDataset(images(4)[0], torch.zeros(4, 5))},
        {},
        "val_data_loader",
        "one class number",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_first_step(name):
    data, changes, path, hint = REFUSED[name]
    block = {"none": None, 3: 3}[changes["block"]] if "block" in changes else {**SETTINGS, **changes}
    config = stage()
    config[BLOCK] = block
    with pytest.raises(ConfigError) as caught:
        make(config, with_teacher=False, **data())
    assert caught.value.path == f"train.{path}" and hint in caught.value.message
    assert not list(Path().iterdir())


def test_validation_set_is_needed_unless_it_is_turned_off():
    config = stage(val_data_loader={})
    with pytest.raises(ConfigError, match=r"^train\.val_data_loader: is missing"):
        make(config)
    config[BLOCK] = {}
    box = make(config)
    assert train(box) == [None] * 3 and not list(Path().iterdir())


def test_network_without_logits():
    class Odd(nn.Sequential):
        def forward(self, x):
            out = super().forward(x)
            return out if self.training else {"out": out}

    box = make(stage(), student=Odd(*network(2)))
    with pytest.raises(ConfigError, match="robust validation needs logits"):
        train(box)


DATA = Facts(root="a", train=True)
OVERLAPS = {
    "the same": (lambda: (DATA, DATA), True),
    "parts that meet": (lambda: (Subset(DATA, range(10)), Subset(DATA, range(9, 20))), True),
    "parts that do not": (lambda: (Subset(DATA, range(10)), Subset(DATA, range(10, 20))), False),
    "parts of parts that meet": (lambda: (Subset(Subset(DATA, range(10, 20)), [3]), Subset(DATA, [13])), True),
    "parts of parts that do not": (lambda: (Subset(Subset(DATA, range(10, 20)), [3]), Subset(DATA, [3])), False),
    "built twice": (lambda: (DATA, Subset(Facts(root="a", train=True), [4])), True),
    "built twice, in a wrapper": (lambda: (BaseDatasetWrapper(DATA), Facts(root="a", train=True)), True),
    "other files": (lambda: (DATA, Facts(root="b", train=True)), False),
    "another split": (lambda: (DATA, Facts(root="a", train=False)), False),
    "another class": (lambda: (DATA, Labelled(root="a", train=True)), False),
    "nothing is known": (lambda: (Facts(), Facts()), False),
}


@pytest.mark.parametrize("name", OVERLAPS)
def test_images_of_the_test_set(name):
    make_data, is_refused = OVERLAPS[name]
    validation, test = make_data()
    if is_refused:
        with pytest.raises(ConfigError, match="of the test set"):
            check_held_out(validation, test)
    else:
        check_held_out(validation, test)


@pytest.mark.parametrize("name", OVERLAPS)
def test_validation_images_that_are_trained_on_are_said(name, caplog):
    make_data, is_said = OVERLAPS[name]
    validation, training = make_data()
    config = stage()
    config["val_data_loader"] = {**config["val_data_loader"], "dataset_id": "val"}
    config["train_data_loader"] = {**config["train_data_loader"], "dataset_id": "data"}
    data = {"data": training, "val": validation, "test": Facts(root="test")}
    check_robust_validation(config, "test", data, False)
    assert ("images are trained on" in caplog.text) == is_said


def test_data_for_training_is_no_test_data():
    for facts in ({}, {"train": True}, {"split": "train"}, {"split": "val"}):
        check_no_test_data(Facts(**facts))


def test_it_is_registered():
    from torchdistill.core.interfaces.registry import get_post_epoch_proc_func

    assert get_post_epoch_proc_func("validate_robustly") is validate_robustly
    assert "torchdistill_adv" in sys.modules

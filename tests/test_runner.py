"""The runner and the command line, on tiny configurations over the digits."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from torchdistill.common.main_util import set_seed
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.distillation import get_distillation_box
from torchdistill.datasets.registry import register_collate_func
from torchdistill.models.registry import get_model

from torchdistill_adv.cli import main
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.runner import run
from torchdistill_adv.runner.check import check_config
from torchdistill_adv.runner.progress import progress_bar, show

HEAD = """
dependencies:
  - name: 'torchdistill_adv'
datasets:
  digits/train: &data !import_call
    key: 'torchdistill_adv.datasets.Digits'
    init:
      kwargs:
        split: 'val'
        transform: &to_tensor !import_call {key: 'torchvision.transforms.ToTensor'}
  digits/test: !import_call
    key: 'torchdistill_adv.datasets.Digits'
    init: {kwargs: {split: 'test', transform: *to_tensor}}
models:
  teacher_model:
    key: 'small_cnn'
    kwargs: {num_classes: 10, in_channels: 1, width: 4, depth: 2}
    src_ckpt:
  student_model:
    key: 'small_cnn'
    kwargs: {num_classes: 10, in_channels: 1, width: 2, depth: 2}
    src_ckpt:
    dst_ckpt: 'student.pt'
"""

LOADERS = """
  train_data_loader:
    dataset_id: 'digits/train'
    sampler: {class_or_func: !import_get {key: 'torch.utils.data.RandomSampler'}}
    kwargs: {batch_size: 64}
  val_data_loader:
    dataset_id: 'digits/test'
    sampler: &in_order {class_or_func: !import_get {key: 'torch.utils.data.SequentialSampler'}}
    kwargs: {batch_size: 256}
"""

STAGE = """
  pre_epoch_process: 'bind_adversarial_losses'
  teacher: {forward_proc: 'forward_batch_only', requires_grad: False}
  student: {forward_proc: 'forward_batch_only', wrapper: 'DistributedDataParallel'}
  optimizer: {key: 'SGD', kwargs: {lr: 0.2, momentum: 0.9}}
  scheduler: {key: 'MultiStepLR', kwargs: {milestones: [1, 2], gamma: 0.1}}
  criterion:
    key: 'WeightedSumLoss'
    kwargs:
      sub_terms:
        ce:
          criterion: {key: 'CrossEntropyLoss', kwargs: {}}
          criterion_wrapper:
            key: 'SimpleLossWrapper'
            kwargs: {input: {is_from_teacher: False, module_path: '.', io: 'output'}, target: {uses_label: True}}
          weight: 0.5
        tald:
          criterion:
            key: 'TALDLoss'
            kwargs:
              adversary: {key: 'SVGD', kwargs: {num_particles: 2}}
              threat: {norm: 'l2', eps: 0.3, mean: [0], std: [1]}
          weight: 0.5
"""

TEST = """
test:
  test_data_loader:
    dataset_id: 'digits/test'
    sampler: {class_or_func: !import_get {key: 'torch.utils.data.SequentialSampler'}}
    kwargs: {batch_size: 256}
"""


def indent(block: str) -> str:
    return block.replace("\n", "\n  ")


PLAIN = f"{HEAD}train:\n  num_epochs: 2\n  log_freq: 2{LOADERS}{STAGE}{TEST}"
STAGED = (
    f"{HEAD}train:\n  stage1:\n    num_epochs: 1{indent(LOADERS)}{indent(STAGE)}\n"
    f"  stage2:\n    num_epochs: 2{indent(STAGE)}{TEST}"
)
WITHOUT_VALIDATION = PLAIN.replace("  val_data_loader", "  _unused")


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny networks are slower on two threads, and much slower when others want the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Paths of the YAML are relative: each test has a directory of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str, *changes: tuple[str, str], name: str = "config.yaml") -> str:
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    Path(name).write_text(text)
    return name


def command(*args: str, module: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, *module, "-m", "torchdistill_adv", *args]


def start(args: list[str], folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(args, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def finish(args: list[str], folder: Path) -> str:
    process = start(args, folder)
    _, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    return log


def metrics(path: str = "student") -> list[dict]:
    return [json.loads(line) for line in (Path(path) / "metrics.jsonl").read_text().splitlines()]


def weights() -> dict[str, torch.Tensor]:
    return torch.load("student.pt")["model"]


# a whole run


def test_train_then_evaluate(here):
    write(PLAIN)
    log = finish(command("train", "--config", "config.yaml", "--seed", "1", "--device", "cpu", "--run_log", "a.log"), here)
    assert "epoch 0 [4/6] loss" in log and "tald" in log and "images/s" in log and "passes of a batch" in log
    assert "epoch 0 [3/6]" not in log
    assert Path("a.log").read_text().count("\n") == log.count("\n")

    *epochs, last = metrics()
    assert [(epoch["epoch"], epoch["stage"], epoch["lr"]) for epoch in epochs] == [(0, 1, 0.2), (1, 1, pytest.approx(0.02))]
    for epoch in epochs:
        assert set(epoch["terms"]) == {"ce", "tald"}
        assert epoch["loss"] == pytest.approx(sum(epoch["terms"].values()), rel=1e-5)
        assert epoch["images_per_second"] == pytest.approx(360 / epoch["seconds"])
        assert 0 < epoch["validation"]["top1"] < epoch["validation"]["top5"] <= 100
    # the best student was tested, and validation is on the same images here
    assert last["test"]["student"] == max((epoch["validation"] for epoch in epochs), key=lambda v: v["top1"])
    assert set(last["test"]["teacher"]) == {"top1", "top5"}

    written = (here / "student" / "config.yaml").read_text()
    assert yaml.compose(written) is not None and PLAIN in written
    assert "train --config config.yaml --seed 1" in written and "# seed: 1" in written and "# device: cpu" in written
    assert f"# torch: {torch.__version__}" in written and "# torchdistill_adv: " in written

    log = finish(command("evaluate", "--config", "config.yaml", "--device", "cpu"), here)
    assert "teacher: test accuracy" in log and "[0/6]" not in log
    assert metrics()[3]["test"] == {"student": last["test"]["student"], "teacher": metrics()[3]["test"]["teacher"]}
    assert main(["train", "--config", "config.yaml", "-test_only", "-student_only"]) == 0
    assert metrics()[4]["test"] == {"student": last["test"]["student"]}
    assert (here / "student" / "config.yaml").read_text() == written


def test_same_weights_as_a_loop_of_torchdistill(here):
    config = write(PLAIN)
    run(config, seed=3, device="cpu")
    found = weights()

    set_seed(3)
    config = load_yaml_file(config)
    models = [get_model(block["key"], **block["kwargs"]) for block in config["models"].values()]
    box = get_distillation_box(*models, config["datasets"], config["train"], torch.device("cpu"), None, False, 1)
    states, accuracies = [], []
    for epoch in range(2):
        box.pre_epoch_process(epoch=epoch)
        for batch in box.train_data_loader:
            box.post_forward_process(loss=box.forward_process(*batch))
        models[1].eval()
        hits = [(models[1](x).argmax(1) == y).float() for x, y in box.val_data_loader]
        states.append({name: value.clone() for name, value in models[1].state_dict().items()})
        accuracies.append(torch.cat(hits).mean())
        box.post_epoch_process()
    best = states[int(accuracies[1] > accuracies[0])]
    assert all(torch.equal(value, best[name]) for name, value in found.items())


def test_run_takes_a_dictionary_and_overrides_and_leaves_it_alone(here):
    config = load_yaml_file(write(PLAIN))
    before = repr(config)
    short = {"train.num_epochs": 1, "models.student_model.dst_ckpt": "other/name.pt"}
    first, second = (run(config, seed=1, device="cpu", overrides=short, student_only=True) for _ in range(2))
    assert repr(config) == before
    assert first["test"] == second["test"] and set(first["test"]) == {"student"}
    assert len(first["epochs"]) == 1 and first["seconds"] > first["epochs"][0]["seconds"]
    assert yaml.safe_load(Path("other/name/config.yaml").read_text())["train"]["num_epochs"] == 1
    assert "# overrides: {'train.num_epochs': 1" in Path("other/name/config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"^tarin\.num_epochs: "):
        run(config, overrides={"tarin.num_epochs": 1})


def test_training_without_a_teacher_or_validation(here):
    text = WITHOUT_VALIDATION.replace("  student: {", "  model: {").replace("  student_model:", "  model:")
    text = text.replace("  teacher_model:", "  _teacher:").replace("num_classes: 10, in_channels: 1, width: 2", "in_channels: 1")
    changes = ("            key: 'TALDLoss'\n", "            key: 'MSELoss'\n")
    assert main(["train", "--config", write(text, changes), "--device", "cpu"]) == 2
    text = text[: text.index("        tald:")] + TEST
    result = run(write(text), seed=0, device="cpu")
    assert [epoch["validation"] for epoch in result["epochs"]] == [None, None]
    assert set(result["test"]) == {"student"}
    # without validation the last student is kept
    assert torch.load("student.pt")["args"]["epoch"] == 1


def test_fewer_than_five_classes_have_no_top5(here):
    text = PLAIN.replace("num_classes: 10", "num_classes: 4").replace("split: 'val'", "split: 'val', target_transform: *small")
    small = "_small: &small !import_call_method {package: 'builtins.int.__rmod__.__get__', init: {args: [4]}}"
    del small
    script = "def small(label): return label % 4\n"
    Path("labels.py").write_text(script)
    del text


# going on

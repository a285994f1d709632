"""The runner and the command line, on tiny configurations over the digits."""

from __future__ import annotations

import gc
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torchdistill.common.main_util import set_seed
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.interfaces.post_epoch_proc import default_post_epoch_process_with_teacher
from torchdistill.core.interfaces.registry import register_post_epoch_proc_func
from torchdistill.datasets.registry import register_collate_func
from torchdistill.models.registry import get_model

from torchdistill_adv.cli import main
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.runner import run
from torchdistill_adv.runner.evaluation import accuracy
from torchdistill_adv.runner.loading import load_experiment
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

HELD_OUT = """
  digits/val: !import_call
    key: 'torch.utils.data.Subset'
    init:
      kwargs:
        dataset: &train_split !import_call
          key: 'torchdistill_adv.datasets.Digits'
          init: {kwargs: {split: 'train', transform: *to_tensor}}
        indices: !import_call {key: 'builtins.range', init: {args: [100]}}
models:
"""
BLOCK = """
  post_epoch_process: 'validate_robustly'
  robust_validation:
    num_images: 40
    adversary: {key: 'PGD', kwargs: {num_steps: 2, step_size: 0.05}}
    threat: {norm: 'linf', eps: 0.1, mean: [0], std: [1]}
    ckpt: 'student.pt'
"""


def robustly(text: str) -> str:
    """A configuration with robust validation on images held out, in its last stage."""
    text = text.replace("\nmodels:\n", HELD_OUT)
    for shift in (str, indent):
        text = text.replace(shift("val_data_loader:\n    dataset_id: 'digits/test'"), shift(VALIDATED))
    head, mark, tail = text.rpartition("teacher: {forward_proc")
    shift = indent if "stage2" in text else str
    return f"{head.rstrip()}{shift(BLOCK)}  {mark}{tail}"


VALIDATED = "val_data_loader:\n    dataset_id: 'digits/val'"
DST = "models.student_model.dst_ckpt"
ROBUST, ROBUST_STAGED = robustly(PLAIN), robustly(STAGED)


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


def test_train_then_test(here):
    write(PLAIN)
    log = finish(
        command("train", "--config", "config.yaml", "--seed", "1", "--device", "cpu", "--run_log", "a.log"), here
    )
    assert "epoch 0 [4/6] loss" in log and "tald" in log and "images/s" in log and "passes of a batch" in log
    assert "epoch 0 [3/6]" not in log
    assert Path("a.log").read_text().count("\n") == log.count("\n")

    *epochs, last = metrics()
    assert [(epoch["epoch"], epoch["stage"], epoch["lr"]) for epoch in epochs] == [
        (0, 1, 0.2),
        (1, 1, pytest.approx(0.02)),
    ]
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

    log = finish(command("train", "-test_only", "--config", "config.yaml", "--device", "cpu"), here)
    assert "teacher: test accuracy: top1 " in log and "[0/6]" not in log
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
    text = PLAIN.replace("  val_data_loader", "  _unused").replace("  student: {", "  model: {")
    text = text.replace("  student_model:", "  model:").replace("  teacher_model:", "  _teacher:")
    text = text[: text.index("        tald:")] + TEST
    result = run(write(text), seed=0, device="cpu")
    assert [epoch["validation"] for epoch in result["epochs"]] == [None, None]
    assert set(result["test"]) == {"student"}
    # without validation the last student is kept
    assert torch.load("student.pt")["args"]["epoch"] == 1


@pytest.mark.parametrize(("classes", "keys"), [(4, {"top1"}), (5, {"top1", "top5"})])
def test_top5_needs_five_classes(classes, keys):
    data = TensorDataset(torch.eye(classes), torch.arange(classes))
    model = nn.Sequential(nn.Dropout(0.9), nn.Identity())
    found = accuracy(model, DataLoader(data, batch_size=3), torch.device("cpu"))
    assert found == dict.fromkeys(keys, 100.0)
    assert model.training and model[0].training


def test_bar_shows_the_terms(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(range(3), "epoch 0") as bar:
        for step in bar:
            show(bar, "epoch 0", step, 1, {"loss": 1.5, "tald": 0.25})
    assert "loss=1.5, tald=0.25" in terminal.getvalue()


# going on from a checkpoint


def test_resume_is_the_same_as_no_interruption(here):
    config = write(PLAIN, ("data.RandomSampler", "data.SequentialSampler"))
    whole = run(config, seed=1, device="cpu", overrides={"train.num_epochs": 3})["epochs"]
    run(config, seed=1, device="cpu", overrides={"train.num_epochs": 1})
    resumed = {"train.num_epochs": 3, "models.student_model.src_ckpt": "student.pt"}
    result = run(config, seed=1, device="cpu", start_epoch=1, overrides=resumed)
    for before, after in zip(whole[1:], result["epochs"], strict=True):
        assert [after[key] for key in ("epoch", "lr", "terms")] == [before[key] for key in ("epoch", "lr", "terms")]
    assert [record.get("epoch", "test") for record in metrics()] == [0, "test", 1, 2, "test"]


def test_resume_in_the_second_stage(here):
    config = write(STAGED)
    whole = run(config, seed=1, device="cpu")
    assert [(epoch["epoch"], epoch["stage"]) for epoch in whole["epochs"]] == [(0, 1), (1, 2), (2, 2)]
    # a later stage keeps the validation set of the one before
    assert all(epoch["validation"] for epoch in whole["epochs"])
    again = {"models.student_model.src_ckpt": "student.pt"}
    result = run(config, seed=1, device="cpu", start_epoch=2, overrides=again)
    assert [(e["epoch"], e["stage"], e["lr"]) for e in result["epochs"]] == [(2, 2, whole["epochs"][2]["lr"])]


def test_killed_run_leaves_whole_lines(here):
    write(PLAIN, ("num_epochs: 2", "num_epochs: 500"))
    process = start(command("train", "--config", "config.yaml", "--device", "cpu"), here)
    file = here / "student" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (file.exists() and file.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert [record["epoch"] for record in metrics()] == list(range(len(metrics()))) and len(metrics()) > 2
    assert weights()


def test_training_again_removes_what_was_measured_of_the_weights_before(here):
    config = write(PLAIN)
    run(config, device="cpu", overrides={"train.num_epochs": 1})
    for name in ("evaluation.json", "similarity.json", "evaluation.journal.jsonl"):
        (here / "student" / name).write_text("{}")
    run(config, device="cpu", test_only=True)
    assert (here / "student" / "evaluation.json").exists()
    run(config, device="cpu", overrides={"train.num_epochs": 1})
    left = sorted(file.name for file in (here / "student").iterdir())
    assert left == ["config.yaml", "evaluation.journal.jsonl", "last.pt", "metrics.jsonl", "run.json", "run.lock"]


def test_folder_that_is_removed_while_training_is_made_again(here):
    epochs = iter(range(3))

    @register_post_epoch_proc_func
    def removes_its_folder(self, metrics=None, **kwargs):
        if next(epochs) == 1:
            shutil.rmtree("student")
        default_post_epoch_process_with_teacher(self, metrics=metrics, **kwargs)

    staged = ("pre_epoch_process:", "post_epoch_process: 'removes_its_folder'\n  pre_epoch_process:")
    result = run(write(PLAIN, staged), device="cpu", overrides={"train.num_epochs": 3})
    assert [record["epoch"] for record in result["epochs"]] == [0, 1, 2]
    assert [record["epoch"] for record in metrics()[:-1]] == [1, 2] and "test" in metrics()[-1]


def test_what_cannot_be_written_while_training_is_said_and_training_goes_on(here, caplog):
    epochs = iter(range(3))

    @register_post_epoch_proc_func
    def takes_its_places(self, metrics=None, **kwargs):
        if next(epochs) == 0:
            os.remove("student.pt")
            os.mkdir("student.pt")
            shutil.rmtree("student")
            Path("student").write_text("")
        elif Path("student.pt").is_dir():
            os.rmdir("student.pt")
            os.remove("student")
        default_post_epoch_process_with_teacher(self, metrics=metrics, **kwargs)

    staged = ("pre_epoch_process:", "post_epoch_process: 'takes_its_places'\n  pre_epoch_process:")
    # without validation every epoch is saved
    result = run(write(PLAIN, staged), device="cpu", overrides={"train.num_epochs": 3, "train.val_data_loader": {}})
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 3 and '"epoch": 0' in errors[0] and "'student/last.pt' was not saved" in errors[1]
    assert "'student.pt' was not saved" in errors[2]
    assert [record["epoch"] for record in metrics()[:-1]] == [1, 2]
    assert result["test"] and torch.load("student.pt")["args"]["epoch"] == 2


def test_a_place_where_nothing_can_be_written_is_refused(here):
    (here / "file").write_text("")
    with pytest.raises(ConfigError, match="nothing can be written") as error:
        run(write(PLAIN), device="cpu", overrides={DST: "file/student.pt"})
    assert error.value.path == DST


# robust validation


def robust(path: str = "student") -> list[dict | None]:
    return [record["robust_validation"] for record in metrics(path) if "epoch" in record]


def load(name: str) -> dict:
    return torch.load(f"student-{name}.pt", weights_only=False)


def test_robust_validation_in_a_run(here):
    config = write(ROBUST)
    result = run(config, seed=1, device="cpu", overrides={"train.num_epochs": 3})
    found = robust()
    assert found == [epoch["robust_validation"] for epoch in result["epochs"]]
    for record in found:
        assert record == {
            "clean": pytest.approx(2.5 * round(record["clean"] / 2.5)),
            "robust": pytest.approx(2.5 * round(record["robust"] / 2.5)),
            "num_images": 40,
            "attack": "PGD-2 on ce_student",
            "norm": "linf",
            "eps": 0.1,
            "threat": "linf eps=0.1 in pixel space = 25.5/255 in pixels of [0, 1]",
        }
    measured = [record["robust"] for record in found]
    assert load("best_robust")["args"]["epoch"] == measured.index(max(measured))
    # the clean best is the runner's, on all validation images
    tops = [epoch["validation"]["top1"] for epoch in result["epochs"]]
    assert load("last")["best_value"] == max(tops) == torch.load("student.pt")["best_value"]
    # either file is a student's checkpoint
    for name in ("best_robust", "last"):
        experiment = load_experiment(config, ckpt=f"student-{name}.pt", networks=("student",), device="cpu")
        weights = experiment.networks["student"].state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in load(name)["model"].items())
    # and without it the run is the same
    run(config, seed=1, device="cpu", overrides={"train.num_epochs": 3, "train.robust_validation": {}, DST: "plain.pt"})
    assert robust("plain") == [None] * 3
    for before, after in zip(metrics("plain")[:3], metrics()[:3], strict=True):
        assert all(before[key] == after[key] for key in ("loss", "terms", "lr", "validation"))
    plain = torch.load("plain.pt")["model"]
    assert all(torch.equal(value, plain[key]) for key, value in torch.load("student.pt")["model"].items())


def test_going_on_from_the_last_student_is_no_interruption(here):
    config = write(ROBUST, ("data.RandomSampler", "data.SequentialSampler"))
    run(config, seed=1, device="cpu", overrides={"train.num_epochs": 4})
    whole, best = metrics()[:4], load("best_robust")["args"]
    # a shorter run has its last epoch's measurement anyway
    run(config, seed=1, device="cpu", overrides={"train.num_epochs": 2})
    again = {"train.num_epochs": 4, "models.student_model.src_ckpt": "student-last.pt"}
    run(config, seed=1, device="cpu", start_epoch=2, overrides=again)
    resumed = [record for record in metrics() if "epoch" in record]
    for before, after in zip(whole, resumed, strict=True):
        assert all(before[key] == after[key] for key in ("epoch", "lr", "terms", "validation", "robust_validation"))
    assert load("best_robust")["args"] == best


def test_robust_validation_in_the_second_stage(here):
    config = write(ROBUST_STAGED)
    run(config, seed=1, device="cpu")
    assert [record is not None for record in robust()] == [False, True, True]
    assert load("last")["args"]["stage"] == 2 and load("best_robust")["args"]["epoch"] in (1, 2)
    # the best is known again at the beginning of a stage, too
    saved = load("best_robust")
    saved["args"]["robust_validation"]["robust"] = 100.0
    torch.save(saved, "student-best_robust.pt")
    again = {"models.student_model.src_ckpt": "student.pt"}
    run(config, seed=1, device="cpu", start_epoch=1, overrides=again)
    assert load("best_robust")["args"]["robust_validation"]["robust"] == 100.0


def test_robust_validation_follows_overrides(here):
    moved = {"train.num_epochs": 1, DST: "other/name.pt"}
    run(write(ROBUST), seed=1, device="cpu", overrides=moved | {"train.robust_validation.num_images": 7})
    assert sorted(path.name for path in Path("other").glob("*.pt")) == [
        "name-best_robust.pt",
        "name-last.pt",
        "name.pt",
    ]
    assert robust("other/name")[0]["num_images"] == 7
    elsewhere = {"train.robust_validation.ckpt": "elsewhere.pt"}
    run("config.yaml", seed=1, device="cpu", overrides=moved | elsewhere)
    assert Path("elsewhere-last.pt").exists()
    off = {"train.robust_validation": {}, "train.val_data_loader": {}, "train.num_epochs": 1}
    run("config.yaml", seed=1, device="cpu", overrides=off)
    assert robust() == [None] and not list(Path().glob("student-*"))


@register_post_epoch_proc_func
def fails_for_test(self, *args, **kwargs):
    raise RuntimeError("after the epoch")


def test_epoch_is_recorded_when_its_end_fails(here):
    config = write(PLAIN, ("  pre_epoch_process:", "  post_epoch_process: 'fails_for_test'\n  pre_epoch_process:"))
    with pytest.raises(RuntimeError, match="after the epoch"):
        run(config, seed=1, device="cpu")
    assert [(record["epoch"], record["robust_validation"]) for record in metrics()] == [(0, None)]


def test_how_a_run_was_started(here):
    config = write(PLAIN)
    data = {"train.num_epochs": 1, "train.log_freq": 7, "train.note": Path("a")}
    run(config, seed=3, device="cpu", overrides=data)
    started = json.loads(Path("student/run.json").read_text())
    versions = started.pop("versions")
    assert started == {
        "command": shlex.join(sys.argv),
        "seed": 3,
        "device": "cpu",
        "overrides": {**data, "train.note": "PosixPath('a')"},
        **{"processes": 1, "amp": None, "grad_accum_step": None, "channels_last": False, "compile": False},
    }
    assert versions["torch"] == torch.__version__ and set(versions) == {"torch", "torchdistill", "torchdistill_adv"}
    run(config, device="cpu", student_only=True)
    again = json.loads(Path("student/run.json").read_text())
    # without a seed one is drawn, so that the run can be repeated
    assert isinstance(again["seed"], int) and again["seed"] != 3 and again["overrides"] == {}
    assert "# overrides" not in Path("student/config.yaml").read_text()


def test_the_config_of_a_run_is_the_one_that_ran(here):
    """It is what other commands are given later, without the command line that the run had."""
    config = write(ROBUST.replace("dst_ckpt: 'student.pt'", "dst_ckpt: &ckpt 'student.pt' # here"))
    config = write(Path(config).read_text().replace("ckpt: 'student.pt'", "ckpt: *ckpt"))
    lr = "train.optimizer.kwargs.lr"
    run(config, seed=3, device="cpu", overrides={"train.num_epochs": 1, lr: 0.05, DST: "other.pt"})
    ran = load_yaml_file("other/config.yaml")
    assert (ran["train"]["num_epochs"], ran["train"]["optimizer"]["kwargs"]["lr"]) == (1, 0.05)
    assert ran["models"]["student_model"]["dst_ckpt"] == ran["train"]["robust_validation"]["ckpt"] == "other.pt"
    assert "&ckpt 'other.pt' # here" in Path("other/config.yaml").read_text()
    # what cannot be set in the text stands in its header
    run(config, seed=3, device="cpu", overrides={"train.num_epochs": 1, "train.note": Path("a"), DST: "third.pt"})
    text = Path("third/config.yaml").read_text()
    assert text.startswith("# command: ") and "third.pt" in text.split("\n\n")[0]


# processes


def test_two_processes_write_once(here):
    write(PLAIN)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    finish(command("train", "--config", "config.yaml", "--seed", "1", "--device", "cpu", module=torchrun), here)
    *epochs, last = metrics()
    assert [epoch["epoch"] for epoch in epochs] == [0, 1]
    assert last["test"]["student"] == max((epoch["validation"] for epoch in epochs), key=lambda v: v["top1"])
    # 359 test images: the one that fills up the share of the second process is not counted
    assert main(["train", "-test_only", "--config", "config.yaml", "--seed", "1", "--device", "cpu"]) == 0
    assert metrics()[-1]["test"] == last["test"]


@pytest.mark.parametrize("text", [PLAIN, STAGED])
def test_nothing_uses_the_processes_when_they_part(here, monkeypatch, text):
    """What still holds a process group while the interpreter ends may abort it."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    alive = []
    destroy = dist.destroy_process_group

    def spy():
        alive.extend(o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel))
        destroy()

    monkeypatch.setattr(dist, "destroy_process_group", spy)
    config = write(text)
    assert run(config, seed=1, device="cpu", dist_url=f"file://{here}/init")["epochs"]
    assert not alive


# what is refused

SUB_TERMS = "train.criterion.kwargs.sub_terms"
STUDENT = "models.student_model"
TEACHER = "'small_cnn'\n    kwargs: {num_classes: 10, in_channels: 1, width: 4, depth: 2}"
CE_WRAPPER = STAGE[STAGE.index("          criterion_wrapper:") : STAGE.index("          weight: 0.5\n        tald")]

REFUSED = {
    "a missing section": (("models:", "modles:"), "models", "is missing"),
    "no training": (("train:\n", "_train:\n"), "train", "is missing"),
    "no test": (("test:\n", "_test:\n"), "test", "is missing"),
    "no epochs": (("  num_epochs: 2\n", ""), "train.num_epochs", "is missing"),
    "half an epoch": (("num_epochs: 2", "num_epochs: 0.5"), "train.num_epochs", "found 0.5"),
    "no criterion": (("  criterion:\n    key", "  _criterion:\n    key"), "train.criterion", "is missing"),
    "no optimizer": (("  optimizer:", "  _optimizer:"), "train.optimizer", "is missing"),
    "no loader": (("  train_data_loader", "  _loader"), "train.train_data_loader", "is missing"),
    "no forward process": (
        ("teacher: {forward_proc: 'forward_batch_only', ", "teacher: {"),
        "train.teacher.forward_proc",
        "missing",
    ),
    "no student": (("  student_model:", "  _student:"), STUDENT, "is missing"),
    "no checkpoint to write": (("dst_ckpt:", "_dst_ckpt:"), f"{STUDENT}.dst_ckpt", "is missing"),
    "a checkpoint without extension": (("'student.pt'", "'student'"), f"{STUDENT}.dst_ckpt", "extension"),
    "a teacher that was not trained": (
        ("depth: 2}\n    src_ckpt:", "depth: 2}\n    src_ckpt: 'no.pt'"),
        "models.teacher_model.src_ckpt",
        "'no.pt'",
    ),
    "a student's checkpoint": (("src_ckpt:\n    dst", "src_ckpt: 'no.pt'\n    dst"), f"{STUDENT}.src_ckpt", "'no.pt'"),
    "a model": (("key: 'small_cnn'", "key: 'smal_cnn'"), "models.student_model.key", "did you mean 'small_cnn'"),
    "an option of a model": (("width: 2", "widht: 2"), f"{STUDENT}.kwargs.widht", "did you mean 'width'"),
    "a high-level loss": (("WeightedSumLoss", "WeightedSum"), "train.criterion.key", "did you mean 'WeightedSumLoss'"),
    "a mid-level loss": (("TALDLoss", "TALDlos"), f"{SUB_TERMS}.tald.criterion.key", "did you mean 'TALDLoss'"),
    "a low-level loss": (
        ("CrossEntropyLoss", "CrosEntropyLoss"),
        f"{SUB_TERMS}.ce.criterion.key",
        "'CrossEntropyLoss'",
    ),
    "an option of a loss": (
        ("Loss', kwargs: {}", "Loss', kwargs: {redction: 'sum'}"),
        f"{SUB_TERMS}.ce.criterion.kwargs.redction",
        "'reduction'",
    ),
    "an option of ours": (
        ("{num_particles", "{particles"),
        f"{SUB_TERMS}.tald.criterion.kwargs.adversary.kwargs.particles",
        "'num_particles'",
    ),
    "a schedule longer than the training": (
        ("TALDLoss", "AdaIADLoss"),
        f"{SUB_TERMS}.tald.criterion.kwargs.begin_epoch",
        "found 60, but the stage has 2 epochs",
    ),
    "a published teacher that is not there": (
        (TEACHER, "'from_checkpoint'\n    kwargs: {model: {key: 'small_cnn'}, checkpoint: 'no.pt'}"),
        "models.teacher_model.kwargs.checkpoint",
        "found 'no.pt'",
    ),
    "a loss wrapper": (
        ("SimpleLossWrapper", "SimpleWrapper"),
        f"{SUB_TERMS}.ce.criterion_wrapper.key",
        "did you mean 'SimpleLossWrapper'",
    ),
    "no loss wrapper": ((CE_WRAPPER, ""), f"{SUB_TERMS}.ce.criterion_wrapper", "is missing"),
    "a weight as text": (("weight: 0.5", "weight: 5e-1"), f"{SUB_TERMS}.ce.weight", "write 0.5"),
    "an optimizer": (("'SGD'", "'SDG'"), "train.optimizer.key", "did you mean 'SGD'"),
    "an option of the optimizer": (
        ("momentum", "momentun"),
        "train.optimizer.kwargs.momentun",
        "did you mean 'momentum'",
    ),
    "a rate as text": (("lr: 0.2", "lr: 2e-1"), "train.optimizer.kwargs.lr", "write 0.2"),
    "a scheduler": (("MultiStepLR", "MultistepLR"), "train.scheduler.key", "did you mean 'MultiStepLR'"),
    "a data set": (
        ("dataset_id: 'digits/train'", "dataset_id: 'digit/train'"),
        "train.train_data_loader.dataset_id",
        "did you mean 'digits/train'",
    ),
    "a process": (
        ("bind_adversarial_losses", "bind_adversarial_loss"),
        "train.pre_epoch_process",
        "did you mean 'bind_adversarial_losses'",
    ),
    "no binding": (("  pre_epoch_process: 'bind_adversarial_losses'\n", ""), "train.pre_epoch_process", "autobind"),
    "a data set's option": (("split: 'test'", "split: 'tset'"), "datasets.digits/test", "split: found 'tset'"),
    "a module": (("name: 'torchdistill_adv'", "name: 'torchdistill_advv'"), "dependencies", "torchdistill_advv"),
    "what torchdistill refuses": (("lr: 0.2", "lr: -0.2"), "train", "Invalid learning rate"),
    "a batch larger than the data": (
        ("batch_size: 64", "batch_size: 999, drop_last: True"),
        "train.train_data_loader",
        "no batch",
    ),
}


SUBSET = "dataset: *train_split, indices: !import_call {key: 'builtins.range', init: {args: [99, 120]}}"
TEST_PART = f"!import_call {{key: 'torch.utils.data.Subset', init: {{kwargs: {{{SUBSET}}}}}}}"
REFUSED_ROBUST = {
    "the test set": (
        (VALIDATED, VALIDATED.replace("/val", "/test")),
        "train.val_data_loader.dataset_id",
        "found 'digits/test', the test set",
    ),
    "some of its images": (
        ("\nmodels:\n", f"\n  digits/part: {TEST_PART}\nmodels:\n"),
        "train.val_data_loader.dataset_id",
        "has 1 images of the test set",
    ),
    "no validation set": (("  val_data_loader", "  _unused"), "train.val_data_loader", "is missing"),
    "no process": (("  post_epoch_process:", "  _process:"), "train.post_epoch_process", "write 'validate_robustly'"),
    "no block": (("  robust_validation:", "  robust_validatoin:"), "train.robust_validation", "is missing"),
    "no threat": (
        ("    threat: {norm: 'linf'", "    thraet: {norm: 'linf'"),
        "train.robust_validation.thraet",
        "'threat'",
    ),
    "a radius": (("eps: 0.1", "eps: 1o"), "train.robust_validation.threat.eps", "found '1o'"),
}


@pytest.mark.parametrize("name", REFUSED_ROBUST)
def test_robust_validation_refused_with_its_path(here, capsys, name):
    change, path, hint = REFUSED_ROBUST[name]
    text = ROBUST
    if name == "some of its images":
        head, test = text.split("\ntest:")
        text = f"{head}\ntest:{test.replace('digits/test', 'digits/part')}"
    write(text, change)
    error = refused(capsys)
    assert f"error: {path}: " in error and hint in error, error
    assert not list(Path().glob("student*"))


def test_robust_validation_refused_in_a_stage(here, capsys):
    # the second stage keeps the loader of the first
    write(ROBUST_STAGED, ("dataset_id: 'digits/val'", "dataset_id: 'digits/test'"))
    assert "error: train.stage1.val_data_loader.dataset_id: found 'digits/test', the test set" in refused(capsys)
    write(ROBUST_STAGED, ("num_images: 40", "num_image: 40"))
    assert "error: train.stage2.robust_validation.num_image: " in refused(capsys)
    assert not list(Path().glob("student*"))


def refused(capsys, *args: str) -> str:
    """The one line that a command with wrong input writes."""
    assert main(["train", "--config", "config.yaml", "--device", "cpu", *args]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("torchdistill-adv: error: ")
    return error


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_path(here, capsys, monkeypatch, name):
    # imported by other tests, it binds by itself
    monkeypatch.delitem(sys.modules, "torchdistill_adv.autobind", raising=False)
    change, path, hint = REFUSED[name]
    write(PLAIN, change)
    error = refused(capsys)
    assert f"error: {path}: " in error and hint in error, error
    assert not Path("student.pt").exists() and not Path("student/metrics.jsonl").exists()


def test_refused_in_a_stage(here, capsys):
    write(STAGED.replace("  stage2:", "  stage3:"))
    assert "error: train.stage2: is missing" in refused(capsys)
    last = STAGED.rindex("CrossEntropyLoss")
    write(STAGED[:last] + "CrossLoss" + STAGED[last + len("CrossEntropyLoss") :])
    assert f"error: train.stage2{SUB_TERMS.removeprefix('train')}.ce.criterion.key: " in refused(capsys)
    # before the first stage has trained
    last = STAGED.rindex("eps: 0.3")
    write(STAGED[:last] + "eps: -1" + STAGED[last + len("eps: 0.3") :])
    assert "error: train.stage2.criterion.kwargs.sub_terms.tald.criterion.kwargs.threat.eps: " in refused(capsys)
    assert not Path("student").exists()


def test_refused_files_and_flags(here, capsys):
    assert "error: --config: found 'config.yaml'" in refused(capsys)
    write("models: [")
    assert "error: config.yaml: is no YAML: " in refused(capsys)
    write("")
    assert "write the sections" in refused(capsys)
    write(PLAIN, ("torchvision.transforms.ToTensor", "torchvision.transforms.ToTensr"))
    assert "error: datasets.digits/train.init.kwargs.transform: cannot be made: " in refused(capsys)
    write(PLAIN)
    assert "error: --device: found 'cuda:99'" in refused(capsys, "--device", "cuda:99")
    assert "error: --device: found 'gpu'" in refused(capsys, "--device", "gpu")
    assert "error: --start_epoch: found 2; training has the epochs 0 to 1" in refused(capsys, "--start_epoch", "2")
    assert "error: --start_epoch: found 1, with src_ckpt None" in refused(capsys, "--start_epoch", "1")
    # an untrained student would have the accuracy of chance
    assert f"error: {STUDENT}.dst_ckpt: found 'student.pt', which does not exist" in refused(capsys, "-test_only")


def test_other_commands_under_torchrun(here, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as end:
        main(["list"])
    assert end.value.code == 2
    assert "rank 1: error: ConfigError: list: runs in one process; start it without" in capsys.readouterr().err


def test_src_ckpt_may_be_what_training_writes(here):
    write(PLAIN, ("src_ckpt:\n    dst", "src_ckpt: 'student.pt'\n    dst"))
    assert main(["train", "--config", "config.yaml", "--device", "cpu"]) == 0


@register_collate_func
def as_dictionary(samples):
    return (
        {"image": torch.stack([sample[0] for sample in samples])},
        torch.tensor([sample[1] for sample in samples]),
        {},
    )


@register_collate_func
def as_list(samples):
    return [torch.stack([sample[0] for sample in samples])], torch.tensor([sample[1] for sample in samples]), {}


@pytest.mark.parametrize(("collate", "found"), [("as_dictionary", "a dict"), ("as_list", "a list")])
def test_batches_that_are_no_tensor(here, capsys, collate, found):
    write(PLAIN, ("kwargs: {batch_size: 64}", f"kwargs: {{batch_size: 64}}\n    collate_fn: '{collate}'"))
    assert f"error: train.train_data_loader: found a batch that is {found}" in refused(capsys)


def test_loss_that_is_not_finite(here, capsys):
    write(PLAIN, ("weight: 0.5\n        tald", "weight: .nan\n        tald"))
    assert main(["train", "--config", "config.yaml", "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the loss is nan at epoch 0, step 0; its terms: {'ce': nan, 'tald': 0." in error

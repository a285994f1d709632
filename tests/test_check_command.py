"""``torchdistill-adv check``: what it tells of a configuration, what it warns of, and that it leaves nothing behind."""

from __future__ import annotations

import logging
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support import CONFIGS, load_config
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import Normalize, ToTensor

from torchdistill_adv.cli import main
from torchdistill_adv.datasets import Digits
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.models import SmallCNN
from torchdistill_adv.runner import mistakes
from torchdistill_adv.runner.config import parse_overrides
from torchdistill_adv.runner.mistakes import Mistake
from torchdistill_adv.runner.trial import StageTrial, TermTrial, Trial, try_out
from torchdistill_adv.threat import ThreatModel

# every block is one line or more at its own depth, so that a test can change it by its text
HEAD = """
dependencies:
  - name: 'torchdistill_adv'
datasets:
  digits/train: &train !import_call
    key: 'torchdistill_adv.datasets.Digits'
    init:
      kwargs: {split: 'train', transform: &to_tensor !import_call {key: 'torchvision.transforms.ToTensor'}}
  digits/val: !import_call
    key: 'torchdistill_adv.datasets.Digits'
    init: {kwargs: {split: 'val', transform: *to_tensor}}
  digits/test: !import_call
    key: 'torchdistill_adv.datasets.Digits'
    init: {kwargs: {split: 'test', transform: *to_tensor}}
models:
  teacher_model:
    key: 'small_cnn'
    kwargs: {num_classes: 10, in_channels: 1, width: 8, depth: 2}
    src_ckpt: 'teacher.pt'
  student_model:
    key: 'small_cnn'
    kwargs: {num_classes: 10, in_channels: 1, width: 4, depth: 2}
    src_ckpt: 'start.pt'
    dst_ckpt: 'made/student.pt'
"""

LOADERS = """
  train_data_loader:
    dataset_id: 'digits/train'
    sampler: &in_order {class_or_func: !import_get {key: 'torch.utils.data.SequentialSampler'}}
    kwargs: {batch_size: 64, drop_last: True}
  val_data_loader:
    dataset_id: 'digits/val'
    sampler: *in_order
    kwargs: {batch_size: 256}
"""

STAGE = """
  pre_epoch_process: 'bind_adversarial_losses'
  teacher: {forward_proc: 'forward_batch_only', requires_grad: False}
  student: {forward_proc: 'forward_batch_only', requires_grad: True}
  optimizer: {key: 'SGD', kwargs: {lr: 0.2, momentum: 0.9}}
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
        rslad:
          criterion:
            key: 'RSLADLoss'
            kwargs:
              adversary: {key: 'PGD', kwargs: {num_steps: 2, step_size: 4/255, start: 'uniform'}}
              threat: {norm: 'linf', eps: 8/255, mean: [0], std: [1]}
          weight: 2.0
"""

TEST = """
test:
  test_data_loader:
    dataset_id: 'digits/test'
    sampler: *in_order
    kwargs: {batch_size: 256}
"""

ADVERSARIAL = STAGE[STAGE.index("        rslad:") :]
BIND = "  pre_epoch_process: 'bind_adversarial_losses'\n"
PLAIN = f"{HEAD}train:\n  num_epochs: 3{LOADERS}{STAGE}{TEST}"


ON_EXAMPLES = """        adversarial:
          criterion: {key: 'CrossEntropyLoss', kwargs: {}}
          criterion_wrapper:
            key: 'OnAdversarialExamples'
            kwargs:
              adversary: {key: 'PGD', kwargs: {num_steps: 2, step_size: 4/255, start: 'uniform'}}
              objective: 'ce_student'
              threat: {norm: 'linf', eps: 8/255, mean: [0], std: [1]}
              criterion_wrapper:
                key: 'SimpleLossWrapper'
                kwargs: {input: {is_from_teacher: False, module_path: '.', io: 'output'}, target: {uses_label: True}}
          weight: 1.0
"""


def indent(block: str) -> str:
    return block.replace("\n", "\n  ")


STAGED = (
    f"{HEAD}train:\n  student: {{dst_ckpt: 'made/between.pt'}}\n"
    f"  stage1:\n    num_epochs: 1{indent(LOADERS)}{indent(STAGE)}\n"
    # without adversarial terms a stage need not bind any
    f"  stage2:\n    num_epochs: 2{indent(STAGE.replace(ADVERSARIAL, '').replace(BIND, ''))}{TEST}"
)


@pytest.fixture(scope="session")
def teacher():
    """A teacher that a few epochs on the digits have taught something."""
    torch.manual_seed(0)
    network = SmallCNN(10, 1, 8, 2)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    data = Digits("train", ToTensor())
    for _ in range(3):
        for images, labels in DataLoader(data, 64):
            optimizer.zero_grad()
            cross_entropy(network(images), labels).backward()
            optimizer.step()
    return network.state_dict()


@pytest.fixture
def folder(tmp_path, monkeypatch, teacher):
    """The working directory, with the weights that the configurations start from."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    torch.save(teacher, "teacher.pt")
    torch.save(SmallCNN(10, 1, 4, 2).state_dict(), "start.pt")
    return tmp_path


def write(text: str = PLAIN) -> str:
    Path("config.yaml").write_text(text)
    return "config.yaml"


def changed(*pairs: tuple[str, str]) -> str:
    """The YAML file with pieces of its text replaced."""
    text = PLAIN
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    return write(text)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def first_batch() -> tuple[torch.Tensor, torch.Tensor]:
    return next(iter(DataLoader(Digits("train", ToTensor()), 64)))


# what it tells


def test_tells_the_terms_of_the_first_step(folder):
    """Value, weight and gradient of cross-entropy are those of the network of start.pt on the first 64 images."""
    student = SmallCNN(10, 1, 4, 2).train()
    student.load_state_dict(torch.load("start.pt"))
    images, labels = first_batch()
    loss = cross_entropy(student(images), labels)
    gradients = torch.autograd.grad(0.5 * loss, list(student.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm()

    (stage,) = try_out(write(), device="cpu").stages

    ce, rslad = stage.terms
    assert (ce.name, ce.loss, ce.weight) == ("ce", "CrossEntropyLoss", 0.5)
    assert ce.path == "train.criterion.kwargs.sub_terms.ce"
    assert ce.value == pytest.approx(loss.item(), rel=1e-5)
    assert ce.gradient == pytest.approx(norm.item(), rel=1e-4)
    assert (rslad.name, rslad.loss, rslad.weight) == ("rslad", "RSLADLoss", 2.0)
    assert stage.loss == pytest.approx(0.5 * ce.value + 2 * rslad.value, rel=1e-5)


def test_tells_epochs_steps_and_images(folder):
    count = len(Digits("train"))
    (stage,) = try_out(write(), device="cpu").stages
    assert (stage.path, stage.num_epochs, stage.batch_size) == ("train", 3, 64)
    assert stage.num_steps == count // 64 and stage.num_images == count // 64 * 64
    (whole,) = try_out(changed(("drop_last: True", "drop_last: False")), device="cpu").stages
    assert whole.num_steps == math.ceil(count / 64) and whole.num_images == count


def test_tells_what_the_teacher_knows(folder, teacher):
    network = SmallCNN(10, 1, 8, 2).eval()
    network.load_state_dict(teacher)
    images, labels = first_batch()
    right = int((network(images).argmax(1) == labels).sum())
    student, line = try_out(write(), device="cpu").models
    assert f"right on {right} of the 64 images" in line
    assert f"{sum(p.numel() for p in network.parameters()):,} parameters" in line
    assert "student small_cnn" in student


def test_tells_cost_and_search(folder, caplog):
    """The passes are those that binding logs; the radius is in pixels; the examples are within it."""
    with caplog.at_level(logging.INFO, logger="torchdistill_adv.binding"):
        (stage,) = try_out(write(), device="cpu").stages
    logged = next(r.getMessage() for r in caplog.records if "adversarial cost" in r.getMessage())
    assert stage.cost and logged.endswith(stage.cost)
    (search,) = stage.searches
    assert "search of rslad: PGD ascends kl_clean_teacher_student from " in search
    assert "1 example an image, 2 gradients each" in search and "= 8/255 in pixels" in search
    assert 0 < float(search.rpartition("example is ")[2].split()[0]) <= 8 / 255 + 1e-4


def test_tells_time_and_memory(folder, searches):
    (stage,) = try_out(write(), device="cpu").stages
    # of the first pass and of the step that is timed: none of the step without adversarial terms
    assert len(searches) == 2
    assert 0 < stage.host_seconds < stage.seconds < 60
    assert stage.epoch_seconds == pytest.approx(stage.num_steps * (stage.seconds + stage.reading_seconds))
    assert 1e8 < stage.memory < 1e11
    workers = changed(("drop_last: True", "drop_last: True, num_workers: 1"))
    assert try_out(workers, device="cpu").stages[0].reading_seconds is None


def test_cost_without_a_teacher_has_no_passes_of_one(folder, caplog):
    """Though its loss, on examples of its own, would show them to a teacher too."""
    text = PLAIN.replace(ADVERSARIAL, ON_EXAMPLES).replace("  student: {forward", "  model: {forward")
    text = re.sub(r"  teacher_model:\n(    .*\n)+|  teacher: .*\n", "", text)
    with caplog.at_level(logging.INFO, logger="torchdistill_adv.binding"):
        found = try_out(write(text), device="cpu")
    assert len(found.models) == 1
    assert found.stages[0].cost == "teacher 0 forward + 0 backward, student 3 forward + 3 backward"
    assert any(record.getMessage().endswith(found.stages[0].cost) for record in caplog.records)


def test_a_step_without_others_has_no_host(folder):
    """With nothing but adversarial terms there is no host to compare with, and with none no search."""
    ce = STAGE[STAGE.index("        ce:") : STAGE.index("        rslad:")]
    (stage,) = try_out(changed((ce, "")), device="cpu").stages
    assert [term.name for term in stage.terms] == ["rslad"] and stage.host_seconds is None
    (stage,) = try_out(changed((ADVERSARIAL, "")), device="cpu").stages
    assert [term.name for term in stage.terms] == ["ce"]
    assert not stage.searches and not stage.cost and stage.host_seconds is None


def test_a_term_of_weight_0_is_not_evaluated(folder):
    (stage,) = try_out(changed(("weight: 2.0", "weight: 0")), device="cpu").stages
    assert stage.terms[1].gradient is None and not stage.searches
    assert "weight is 0" in str(stage)


def test_every_stage_takes_a_step(folder):
    first, second = try_out(write(STAGED), device="cpu").stages
    assert (first.path, first.num_epochs, len(first.terms)) == ("train.stage1", 1, 2)
    assert (second.path, second.num_epochs, len(second.terms)) == ("train.stage2", 2, 1)
    assert first.searches and not second.searches and not second.cost
    assert second.terms[0].path == "train.stage2.criterion.kwargs.sub_terms.ce"
    # the second stage goes on with the student that the first one trained
    assert second.terms[0].value != first.terms[0].value


# one of every kind of term: hosts of one and two stages, own gradients, sources of images, no labels of its own
HOSTS = sorted(path.stem for path in (CONFIGS / "digits/hosts").glob("*.yaml"))
ROBUST = ["adaad_igdm", "bss", "darwin", "iad_ii", "pgd_at", "smaraad_pp"]


@pytest.mark.parametrize("name", [*(f"hosts/{name}" for name in HOSTS), *(f"robust/{name}" for name in ROBUST)])
def test_every_kind_of_training_can_be_tried(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(f"digits/{name}.yaml", images=8, batch_size=8)
    found = try_out(config, device="cpu")
    stages = [f"train.{key}" for key in config["train"] if key.startswith("stage")]
    assert [stage.path for stage in found.stages] == (stages or ["train"])
    for stage in found.stages:
        total = sum(term.weight * term.value for term in stage.terms)
        assert stage.loss == pytest.approx(total, rel=1e-4) and stage.seconds > 0
        assert all(0 <= term.gradient < math.inf for term in stage.terms)
    assert len(found.models) == 1 or "of the 8 images of a batch" in found.models[1]
    assert not list(tmp_path.iterdir())


def test_a_stage_gets_the_checkpoints_of_the_one_before(tmp_path, monkeypatch):
    """HSAKD's second stage refuses to start without the heads that the first one writes."""
    monkeypatch.chdir(tmp_path)
    config = load_config("cifar100/hsakd-resnet20_from_resnet56.yaml")
    assert len(try_out(config, device="cpu").stages) == 2
    assert not list(tmp_path.iterdir())


def test_checkpoints_between_stages_are_those_that_exist(folder):
    """One that an earlier run left is what a stage starts from; it is read, and written, in the temporary folder."""
    weights = {name: value * 2 if name == "fc.weight" else value for name, value in torch.load("start.pt").items()}
    torch.save(weights, "earlier.pt")
    text = STAGED.replace("  student: {forward", "  student: {src_ckpt: 'earlier.pt', forward", 1)
    values = [try_out(write(each), device="cpu").stages[0].terms[0].value for each in (STAGED, text)]
    assert values[0] != values[1]
    assert torch.equal(torch.load("earlier.pt")["fc.weight"], weights["fc.weight"])


# nothing is left behind


@pytest.mark.parametrize("text", [PLAIN, STAGED], ids=["one stage", "two stages"])
def test_leaves_nothing_behind(folder, text, capsys):
    write(text)
    before = files(folder)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert main(["check", "config.yaml", "--device", "cpu"]) == 0
    assert files(folder) == before and sorted(p.name for p in folder.iterdir()) == sorted(before)
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == streams[1:]
    assert logging.getLogger("torchdistill_adv").level == logging.NOTSET


def test_seed_decides(folder):
    path = changed(("src_ckpt: 'start.pt'", "src_ckpt:"))
    values = [try_out(path, device="cpu", seed=seed).stages[0].loss for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


# the command


def test_command_prints_a_table(folder, capsys):
    assert main(["check", write(), "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["ce", "rslad", "sum"]
    assert out.startswith("config.yaml on cpu\n") and out.endswith("no warnings\n")
    assert "train: 3 epochs of 16 steps" in out
    assert not err


def test_command_takes_overrides(folder, capsys):
    arguments = ["check", write(), "--device", "cpu", "--set", "train.num_epochs=7"]
    arguments += ["--set", "train.criterion.kwargs.sub_terms.ce.weight=0.25"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "train: 7 epochs" in out and "| 0.25 " in out


def test_loss_that_is_not_finite_is_exit_code_1(folder, capsys):
    weights = torch.load("start.pt")
    weights["fc.bias"].fill_(math.nan)
    torch.save(weights, "start.pt")
    assert main(["check", changed((ADVERSARIAL, "")), "--device", "cpu"]) == 1
    assert "train: the loss is nan in the first step; its terms: {'ce': nan}" in capsys.readouterr().err


WRONG = {
    "binding": ("pre_epoch_process: 'bind_adversarial_losses'", "", "train.pre_epoch_process: found None"),
    "option": ("num_steps: 2", "num_step: 2", "rslad.criterion.kwargs.adversary.kwargs.num_step: adversary PGD has no"),
    "range": (
        "mean: [0], std: [1]",
        "mean: [5], std: [1]",
        "rslad.criterion.kwargs.threat.mean: the images have pixels",
    ),
    "module": (
        "module_path: '.', io: 'output'",
        "module_path: 'fc', io: 'output'",
        "train.criterion.kwargs.sub_terms.ce: a step cannot be taken: KeyError: 'fc'",
    ),
    "channels": (
        "in_channels: 1, width: 4",
        "in_channels: 3, width: 4",
        "models.student_model.src_ckpt: found 'start.pt'",
    ),
    "checkpoint": (
        "'teacher.pt'",
        "'other.pt'",
        "models.teacher_model.src_ckpt: found 'other.pt', which does not exist",
    ),
    "no batch": ("batch_size: 64", "batch_size: 5000", "train.train_data_loader: gives no batch"),
    "data": (
        "key: 'torchdistill_adv.datasets.Digits'\n    init:\n      kwargs: {split: 'train', ",
        "key: 'torchvision.datasets.ImageFolder'\n    init:\n      kwargs: {root: './nowhere', ",
        "datasets.digits/train: cannot be made: FileNotFoundError: [Errno 2] No such file or directory: './nowhere'; "
        "write the folder that has the data as its root",
    ),
    "no download": (
        "key: 'torchdistill_adv.datasets.Digits'\n    init: {kwargs: {split: 'val', ",
        "key: 'torchvision.datasets.CIFAR10'\n    init: {kwargs: {root: './nowhere', ",
        "datasets.digits/val: cannot be made: RuntimeError: Dataset not found or corrupted.",
    ),
    "transform": (
        "{key: 'torchvision.transforms.ToTensor'}",
        "{key: 'torchvision.transforms.ToTensors'}",
        "datasets.digits/train.init.kwargs.transform: cannot be made: AttributeError",
    ),
}


@pytest.mark.parametrize("old, new, message", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_exit_code_2_with_its_path(folder, capsys, old, new, message):
    path = changed((old, new))
    before = files(folder)
    assert main(["check", path, "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert not out and message in err and len(err.splitlines()) == 1
    assert files(folder) == before


def test_images_that_a_network_cannot_take(folder, capsys):
    """Where no term of the loss was running, the path is that of the stage."""
    path = changed(("in_channels: 1, width: 4", "in_channels: 3, width: 4"), ("'start.pt'", ""), (ADVERSARIAL, ""))
    assert main(["check", path, "--device", "cpu"]) == 2
    assert "error: train: a step cannot be taken: RuntimeError" in capsys.readouterr().err


def test_data_that_cannot_be_read(folder):
    config = load_config("digits/kd.yaml")

    def explode(image):
        raise OSError("broken file")

    config["datasets"]["digits/train"].transform = explode
    with pytest.raises(ConfigError, match=r"^train\.train_data_loader: a batch cannot be read: OSError: broken file"):
        try_out(config, device="cpu")


def test_an_override_that_cannot_be_made_is_no_line_of_the_file(folder):
    """A value of --set has lines and columns of its own."""
    key = "datasets.digits/val.init.kwargs.transform"
    overrides = parse_overrides([f"{key}=!import_call {{key: 'torchvision.transforms.ToTensors'}}"])
    with pytest.raises(ConfigError, match="ToTensors") as error:
        try_out(write(), device="cpu", overrides=overrides)
    assert error.value.path == "datasets.digits/val.init.kwargs"


# likely mistakes, end to end

FLAT = "transform: &to_tensor !import_call {key: 'torchvision.transforms.ToTensor'}"
NORMALIZED = """transform: &to_tensor !import_call
          key: 'torchvision.transforms.Compose'
          init:
            kwargs:
              transforms:
                - !import_call {key: 'torchvision.transforms.ToTensor'}
                - !import_call {key: 'torchvision.transforms.Normalize', init: {kwargs: {mean: [0.3], std: [0.4]}}}"""
OPEN_TRAIN = "kwargs: {split: 'train', transform: &to_tensor !import_call {key: 'torchvision.transforms.ToTensor'}}"
NORMALIZED_TRAIN = f"kwargs:\n        split: 'train'\n        {NORMALIZED}"
TERM = "train.criterion.kwargs.sub_terms"

LIKELY = {
    "normalization": (
        [(OPEN_TRAIN, NORMALIZED_TRAIN), ("mean: [0], std: [1]", "mean: [0.1], std: [0.9], bounds: 'none'")],
        f"{TERM}.rslad.criterion.kwargs.threat.mean",
        "found [0.1], and the training images have a Normalize with mean [0.3]; write mean: [0.3]",
    ),
    "radius": ([("eps: 8/255", "eps: 0.8")], f"{TERM}.rslad.criterion.kwargs.threat.eps", "more than half the range"),
    "tiny radius": (
        [("eps: 8/255", "eps: 0.0001")],
        f"{TERM}.rslad.criterion.kwargs.threat.eps",
        "less than any image shows",
    ),
    "idle search": (
        [("step_size: 4/255, start: 'uniform'", "step_size: 0, start: 'none'")],
        f"{TERM}.rslad.criterion.kwargs.adversary",
        "PGD left its objective at",
    ),
    "test images": (
        [("dataset_id: 'digits/val'", "dataset_id: 'digits/test'")],
        "train.val_data_loader.dataset_id",
        "images of the test set",
    ),
    "untrained teacher": (
        [("'teacher.pt'", "")],
        "models.teacher_model.src_ckpt",
        "found no checkpoint, and the teacher is right on",
    ),
    "single image": (
        [
            ("drop_last: True", "drop_last: False"),
            ("batch_size: 64", "batch_size: 359"),  # 1,078 images
        ],
        "train.train_data_loader.kwargs.drop_last",
        "is a batch by itself",
    ),
    "large weight": ([("weight: 0.5", "weight: 500000.0")], f"{TERM}.ce.weight", "write a smaller weight"),
    "small weight": ([("weight: 2.0", "weight: 1.0e-9")], f"{TERM}.rslad.weight", "write a larger weight"),
    "train mode": (
        [("start: 'uniform'}}", "start: 'uniform'}}\n              teacher_mode: 'keep'")],
        f"{TERM}.rslad.criterion.kwargs.teacher_mode",
        "found 'keep', and the teacher is in train mode",
    ),
    "no gradient": (
        [
            ("is_from_teacher: False", "is_from_teacher: True"),
        ],
        f"{TERM}.ce",
        "has no gradient",
    ),
}


@pytest.mark.parametrize("pairs, path, message", LIKELY.values(), ids=LIKELY)
def test_likely_mistake_is_a_warning(folder, capsys, pairs, path, message):
    assert main(["check", changed(*pairs), "--device", "cpu"]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert any(line.startswith(f"WARNING {path}: ") and message in line for line in warnings), warnings


def test_other_classes_are_a_warning(folder):
    """Where no adversarial term compares predictions, which would be an error."""
    pairs = [("num_classes: 10, in_channels: 1, width: 4", "num_classes: 12, in_channels: 1, width: 4")]
    found = try_out(changed(*pairs, ("'start.pt'", ""), (ADVERSARIAL, "")), device="cpu").all_mistakes
    assert Mistake("models.student_model.kwargs", mistakes.different_classes(12, 10).message) in found


def test_normalized_right_has_no_warning(folder):
    pairs = [(OPEN_TRAIN, NORMALIZED_TRAIN), ("mean: [0], std: [1]", "mean: [0.3], std: [0.4]")]
    found = try_out(changed(*pairs), device="cpu").all_mistakes
    assert not [m for m in found if "threat" in m.path]


def test_several_normalizations_are_not_judged(folder):
    """Of two data sets in one, say, with values of their own."""
    config = load_config("digits/kd_tald.yaml", images=12)
    for others, expected in [([Normalize([0.1], [0.5])], 1), ([Normalize([0.1], [0.5]), Normalize([0.3], [0.5])], 0)]:
        # what is found of the transforms; the images stay as they are
        config["datasets"]["digits/train"].transforms = others
        found = [m for m in try_out(config, device="cpu").all_mistakes if "threat.mean" in m.path]
        assert len(found) == expected


def test_images_normalized_elsewhere_are_not_judged(folder):
    """Images outside [0, 1] without a Normalize in their transforms are normalised by something else."""
    config = load_config("digits/kd_tald.yaml", images=12)
    data = config["datasets"]["digits/train"]
    inner = data.transform
    data.transform = lambda image: inner(image)
    assert not [m for m in try_out(config, device="cpu").all_mistakes if "threat.mean" in m.path]


# likely mistakes, one by one

PIXELS = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


@pytest.mark.parametrize(
    "threat, normalization, path",
    [
        ({"mean": [0], "std": [1]}, ((0.0,), (1.0,)), None),
        ({"mean": [0, 0, 0], "std": [1, 1, 1]}, ((0.0,), (1.0,)), None),
        ({"mean": [0.491], "std": [0.2]}, ((0.4914, 0.4914), (0.2, 0.2)), None),
        ({"mean": [0], "std": [1]}, ((0.5,), (0.25,)), "x.mean"),
        ({"mean": [0.5], "std": [1]}, ((0.5,), (0.25,)), "x.std"),
        ({"mean": [0.5, 0.5, 0.4], "std": [0.2] * 3}, ((0.5, 0.5, 0.45), (0.2,) * 3), "x.mean"),
        ({"space": "input", "bounds": "none"}, ((0.5,), (0.25,)), None),
    ],
)
def test_wrong_normalization(threat, normalization, path):
    found = mistakes.wrong_normalization(ThreatModel.build({"eps": 0.03, **threat}), normalization, "x")
    assert (found and found.path) == path


@pytest.mark.parametrize(
    "threat, is_odd",
    [
        ({"eps": "8/255"}, False),
        ({"eps": 8}, True),
        ({"eps": 0.51}, True),
        ({"eps": 0.49}, False),
        ({"eps": 0.0003}, True),
        ({"eps": 0}, True),
        ({"eps": math.inf}, False),
        ({"eps": 0.51, "space": "input"}, False),  # times std of 0.25
        ({"eps": 2.1, "space": "input"}, True),
        ({"eps": 3.0, "norm": "l2"}, False),
        ({"eps": 128, "norm": "l2"}, True),  # 3072 values: at most 27.7
    ],
)
def test_odd_radius(threat, is_odd):
    found = mistakes.odd_radius(ThreatModel.build({**PIXELS, **threat}), 3072, "x")
    assert (found is not None) == is_odd


@pytest.mark.parametrize(
    "right, images, classes, is_weak",
    [
        (13, 128, 10, True),  # as guessed
        (22, 128, 10, True),
        (23, 128, 10, False),  # three standard deviations above are 22.98
        (0, 64, 1000, True),
        (1, 64, 1000, False),
        (1, 2, 10, True),
        (2, 2, 10, False),
        (0, 1, 10, False),  # one image tells nothing
    ],
)
def test_weak_teacher(right, images, classes, is_weak):
    assert (mistakes.weak_teacher(right, images, classes, "t.pt") is not None) == is_weak


@pytest.mark.parametrize(
    "gradients, is_odd",
    [
        ({"own": 1.0, "a": 1.0}, False),
        ({"own": 999.0, "a": 0.5, "b": 0.5}, False),
        ({"own": 1001.0, "a": 0.5, "b": 0.5}, True),
        ({"own": 0.9e-6, "a": 1.0}, True),
        ({"own": 1.1e-6, "a": 1.0}, False),
        ({"own": 5.0}, False),
        ({"own": 0.0, "a": 1.0}, False),
        ({"own": math.nan, "a": 1.0}, False),
    ],
)
def test_odd_weight(gradients, is_odd):
    assert (mistakes.odd_weight("own", gradients, "x") is not None) == is_odd


@pytest.mark.parametrize("gradient, text", [(0.0, "no gradient"), (math.nan, "norm nan"), (math.inf, "norm inf")])
def test_useless_gradient(gradient, text):
    assert text in mistakes.useless_gradient(gradient, "x").message
    assert mistakes.useless_gradient(1e-9, "x") is None


@pytest.mark.parametrize(
    "mode, in_train_mode, is_odd", [("keep", True, True), ("keep", False, False), ("eval", False, False)]
)
def test_teacher_in_train_mode(mode, in_train_mode, is_odd):
    assert (mistakes.teacher_in_train_mode(mode, in_train_mode, "x") is not None) == is_odd


@pytest.mark.parametrize("count, size, is_single", [(129, 64, True), (128, 64, False), (130, 64, False), (5, 1, False)])
def test_single_last_batch(count, size, is_single):
    assert (mistakes.single_last_batch(count, size, "x") is not None) == is_single


def test_a_last_image_that_is_dropped_is_none(folder):
    found = try_out(changed(("batch_size: 64", "batch_size: 359")), device="cpu").all_mistakes
    assert not [m for m in found if "drop_last" in m.path]


def test_selects_on_test():
    first, second = (TensorDataset(torch.zeros(4)) for _ in range(2))
    datasets = {"a": first, "b": second}
    assert mistakes.selects_on_test(datasets, "a", "b", "x") is None
    assert "4 images" in mistakes.selects_on_test(datasets, "a", "a", "x").message


# text


def test_report_of_several_stages_adds_their_times():
    def stage(path: str, epochs: int) -> StageTrial:
        terms = [TermTrial("ce", path, "CrossEntropyLoss", 1.0, 2.0, 0.5)]
        mistake = Mistake("models", "odd")
        return StageTrial(path, epochs, 100, 6400, 64, 2.0, terms, [], "", 0.5, None, None, None, [mistake])

    text = str(Trial("x.yaml", torch.device("cpu"), [], [stage("train.stage1", 72), stage("train.stage2", 144)], []))
    assert "about 50 s an epoch, 1 h 0 min in all" in text and "all stages: about 3 h 0 min" in text
    assert text.count("WARNING models: odd") == 1 and "no warnings" not in text

"""Every configuration under ``configs/`` trains, and says what the papers say."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from support import CONFIGS, adversarial_terms, load_config, make_box, read_config, stages, train

from torchdistill_adv.losses import AdversarialTerm

ALL = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
TALD = [path for path in ALL if "_tald" in Path(path).name]


def student_of(config):
    models = config["models"]
    return models["student_model"] if "student_model" in models else models["model"]


# every configuration trains


@pytest.mark.parametrize("path", ALL)
def test_every_stage_trains(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # auxiliary modules are saved at the end of an epoch
    config = load_config(path)
    values = {}
    forward = AdversarialTerm.forward

    def spy(self, *args, **kwargs):
        value = forward(self, *args, **kwargs)
        values.setdefault(self.path, []).append(value)
        return value

    monkeypatch.setattr(AdversarialTerm, "forward", spy)
    box = make_box(config)
    student = box.org_student_model if "teacher_model" in config["models"] else box.org_model
    before = [parameter.detach().clone() for parameter in student.parameters()]
    losses = list(train(box, max_steps=2))

    assert len(losses) == 2 * len(stages(config))
    assert all(torch.isfinite(loss).all() for loss in losses)
    assert any(not torch.equal(old, new) for old, new in zip(before, student.parameters(), strict=True))
    expected = [
        f"{stage_path}.criterion.kwargs.sub_terms.{name}"
        for stage_path, stage in stages(config).items()
        for name in adversarial_terms(stage)
    ]
    assert sorted(path.rsplit(".", 2)[0] for path in values) == sorted(expected)
    for found in values.values():
        assert len(found) == 2 and all(value.requires_grad and value > 0 for value in found)


# a method's configuration is its host's and the method's own lines, nothing else


def significant_lines(path):
    """The lines of a configuration but for comments and blank ones."""
    lines = [re.sub(r"\s+#.*", "", line) for line in (CONFIGS / path).read_text().splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def without_tald(lines):
    """The lines without the term, what binds it, the dependency, and the name of the student's checkpoint."""
    kept, inside = [], None
    for line in lines:
        depth = len(line) - len(line.lstrip())
        if inside is not None and depth > inside:
            continue
        inside = depth if line.strip() in ("tald:", "dependencies:") else None
        if inside is None and not line.strip().startswith(("pre_epoch_process:", "dst_ckpt:")):
            kept.append(line)
    return kept


@pytest.mark.parametrize("path", TALD)
def test_a_tald_config_is_its_host_and_tald(path):
    host = re.sub(r"_tald\w*?(?=-|\.yaml)", "", path)
    lines, host_lines = significant_lines(path), significant_lines(host)
    assert without_tald(lines) == without_tald(host_lines)
    assert "tald:" in map(str.strip, lines) and "tald:" not in map(str.strip, host_lines)


# the papers' numbers, from the papers and their repositories and not from the configurations

TALD_CIFAR100 = {
    "num_particles": 4,
    "num_steps": 1,
    "step_size": 0.1,
    "noise_factor": 10.0,
    "bandwidth": 1e-3,
    "norm": "l2",
    "eps": 0.3,
    "space": "input",
    "objective": "kl_teacher_clean_teacher",
    "weight": 0.01,
}
TALD_IMAGENET = TALD_CIFAR100 | {"step_size": 0.2, "noise_factor": 5.0, "weight": 0.001}
TALD_CODE = {
    "num_particles": 4,
    "num_steps": 1,
    "probe_radius": 10.0,
    "bandwidth": 1e-3,
    "norm": "l2",
    "eps": 0.0005,
    "space": "input",
    "bounds": [-2.5, 2.5],
    "objective": "mse_teacher_clean_teacher",
    "num_attacked": 10,
    "include_clean": True,
    "forward": "joint",
    "student_bn": "train",
    "weight": 0.01,
}
PRESETS = {
    "digits/kd_tald.yaml": TALD_CIFAR100 | {"bandwidth": "median"},
    "digits/kd_tald_paper.yaml": TALD_CIFAR100,
    "cifar100/kd_tald_paper-resnet20_from_resnet56.yaml": TALD_CIFAR100,
    "cifar100/kd_tald_paper_linf-resnet20_from_resnet56.yaml": TALD_CIFAR100 | {"norm": "linf", "step norm": "l2"},
    "cifar100/kd_tald_median-resnet20_from_resnet56.yaml": TALD_CIFAR100 | {"bandwidth": "median"},
    "cifar100/kd_tald_code_exact-resnet20_from_resnet56.yaml": TALD_CODE,
    **{f"imagenet/{h}_tald-resnet18_from_resnet34.yaml": TALD_IMAGENET for h in ("kd", "at", "ft", "crd", "sskd")},
}
DEFAULTS = {"student_bn": "batch"}

REPDISTILLER = {
    "lr": 0.05,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "batch_size": 64,
    "num_epochs": 240,
    "milestones": [150, 180, 210],
    "gamma": 0.1,
}
TORCHDISTILL = {
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "batch_size": 256,
    "num_epochs": 100,
    "milestones": [30, 60, 90],
    "gamma": 0.1,
}
SSKD_WEIGHTS = {
    "loss_weights": [1.0, 0.9, 10.0, 2.7],
    "kl_temp": 4.0,
    "ss_temp": 0.5,
    "tf_temp": 4.0,
    "ss_ratio": 0.75,
    "tf_ratio": 1.0,
}
# a stage each: its schedule and its host terms; a batch size is written in the first stage alone
HOSTS = {
    "cifar100/ce-resnet56.yaml": [REPDISTILLER],
    "cifar100/kd-resnet20_from_resnet56.yaml": [REPDISTILLER | {"kd.temperature": 4.0, "kd.alpha": 0.1}],
    "imagenet/kd-resnet18_from_resnet34.yaml": [TORCHDISTILL | {"kd.temperature": 1.0, "kd.alpha": 0.5}],
    "imagenet/at-resnet18_from_resnet34.yaml": [TORCHDISTILL | {"ce.weight": 1.0, "at.weight": 1000.0}],
    "imagenet/crd-resnet18_from_resnet34.yaml": [
        TORCHDISTILL
        | {"batch_size": 85, "ce.weight": 1.0, "crd.weight": 0.8, "crd.temperature": 0.07, "crd.momentum": 0.5}
        | {"crd.input_size": 128, "crd.num_negative_samples": 16384, "crd.num_samples": 1281167}
    ],
    "imagenet/ft-resnet18_from_resnet34.yaml": [
        {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4, "batch_size": 256, "num_epochs": 1},
        TORCHDISTILL | {"batch_size": None, "num_epochs": 90, "factor_transfer.weight": 1000.0, "factor_transfer.p": 1},
    ],
    "imagenet/sskd-resnet18_from_resnet34.yaml": [
        TORCHDISTILL | {"weight_decay": 5e-4, "batch_size": 85, "num_epochs": 30, "milestones": [10, 20]},
        TORCHDISTILL
        | {"weight_decay": 5e-4, "batch_size": None}
        | {f"sskd.{name}": value for name, value in SSKD_WEIGHTS.items()},
    ],
}


@pytest.mark.parametrize("path", TALD)
def test_preset_has_the_papers_values(path):
    [term] = [block for stage in stages(read_config(path)).values() for block in adversarial_terms(stage).values()]
    kwargs = dict(term["criterion"]["kwargs"])
    adversary, threat = kwargs.pop("adversary"), kwargs.pop("threat")
    options = adversary["kwargs"]
    if "norm" in options:
        options["step norm"] = options.pop("norm")
    mean, std = threat.pop("mean"), threat.pop("std")
    assert {**options, **threat, **kwargs, "weight": term["weight"]} == DEFAULTS | PRESETS[path]
    assert adversary["key"] == ("VirtualSVGD" if "probe_radius" in PRESETS[path] else "SVGD")
    assert (CONFIGS / path).read_text().count(f"{{mean: {mean}, std: {std}}}") == 1, "the threat has Normalize's values"


@pytest.mark.parametrize("path", HOSTS)
def test_host_has_the_published_values(path):
    for stage, expected in zip(stages(read_config(path)).values(), HOSTS[path], strict=True):
        found = stage["optimizer"]["kwargs"] | stage.get("scheduler", {}).get("kwargs", {})
        found |= {"num_epochs": stage["num_epochs"]}
        found |= {"batch_size": stage.get("train_data_loader", {}).get("kwargs", {}).get("batch_size")}
        for name, block in stage["criterion"]["kwargs"]["sub_terms"].items():
            values = block["criterion"]["kwargs"] | {"weight": block["weight"]}
            found |= {f"{name}.{key}": value for key, value in values.items()}
        assert expected == {key: found.get(key) for key in expected}


# files


@pytest.mark.parametrize("path", ALL)
def test_header_has_the_command(path):
    assert f"#   torchdistill-adv train --config configs/{path}\n" in (CONFIGS / path).read_text()


@pytest.mark.parametrize("path", [path for path in ALL if re.match(r"(digits|cifar100)/[^/]*kd", path)])
def test_teacher_is_what_another_config_trains(path):
    teacher = read_config(path)["models"]["teacher_model"]
    trained = {student_of(config)["dst_ckpt"]: student_of(config) for config in map(read_config, ALL)}
    source = trained[teacher["src_ckpt"]]
    assert (source["key"], source["kwargs"]) == (teacher["key"], teacher["kwargs"])


def written_files(node, key=""):
    if isinstance(node, dict):
        return {file for name, value in node.items() for file in written_files(value, name)}
    return {node} if key.endswith("_ckpt") and key != "src_ckpt" else set()


def test_no_two_configs_write_the_same_file():
    counts = Counter(file for path in ALL for file in written_files(read_config(path)))
    assert counts and set(counts.values()) == {1}
    assert all(file.startswith("./resource/ckpt/") and file.endswith(".pt") for file in counts)

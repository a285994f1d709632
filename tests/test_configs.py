"""Every configuration under ``configs/`` trains, and says what the papers say."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from support import CONFIGS, adversarial_terms, load_config, make_box, read_config, stages, train
from torch import nn
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT

from torchdistill_adv.losses import AdversarialTerm
from torchdistill_adv.robust_validation import Validator, validator_of

ALL = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
TALD = [path for path in ALL if "_tald" in Path(path).name]
ROBUST = [path for path in ALL if "Written by configs/make.py" in (CONFIGS / path).read_text()]
CIFAR_ROBUST = [path for path in ROBUST if path.startswith("cifar")]
DIGITS_ROBUST = [path for path in ROBUST if path.startswith("digits/robust/")]


read = functools.cache(read_config)


def student_of(config):
    models = config["models"]
    return models["student_model"] if "student_model" in models else models["model"]


def is_label_free(block):
    return block["criterion"]["kwargs"].get("label_free", False)


def give_several_classes(network, images):
    """An untrained network gives all images one class: take what its logits have in common away."""
    [*_, last] = (module for module in network.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        last.bias -= network.eval()(images).mean(0)


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
    kept = []  # not written: two files of up to 100 MB for every configuration
    monkeypatch.setattr(Validator, "_save", lambda self, box, name: kept.append((name, self.latest)))
    box = make_box(config)
    if any(is_label_free(block) for stage in stages(config).values() for block in adversarial_terms(stage).values()):
        give_several_classes(box.org_teacher_model, next(iter(box.train_data_loader))[0])
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
    is_robust = path in ROBUST and bool(expected)
    assert [name for name, _ in kept] == (["best_robust", "last"] if is_robust else [])
    assert (validator_of(box) is not None) is is_robust
    for _, record in kept:
        assert record["num_images"] == 8 and 0 <= record["robust"] <= record["clean"] <= 100


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
# at this bandwidth one particle in every fourth step has the loss of four in every step, in expectation
TALD_FAST = TALD_CIFAR100 | {"num_particles": 1, "every": 4}
PRESETS = {
    "digits/kd_tald.yaml": TALD_CIFAR100 | {"bandwidth": "median"},
    "digits/kd_tald_paper.yaml": TALD_CIFAR100,
    "digits/kd_tald_fast.yaml": TALD_FAST,
    "cifar100/kd_tald_fast-resnet20_from_resnet56.yaml": TALD_FAST,
    "cifar100/kd_tald_paper-resnet20_from_resnet56.yaml": TALD_CIFAR100,
    "cifar100/kd_tald_paper_linf-resnet20_from_resnet56.yaml": TALD_CIFAR100 | {"norm": "linf", "step norm": "l2"},
    "cifar100/kd_tald_median-resnet20_from_resnet56.yaml": TALD_CIFAR100 | {"bandwidth": "median"},
    "cifar100/kd_tald_code_exact-resnet20_from_resnet56.yaml": TALD_CODE,
    **{
        f"cifar100/{host}_tald-resnet20_from_resnet56.yaml": TALD_CIFAR100
        for host in ("fitnet", "at", "sp", "cc", "vid", "rkd", "pkt", "ab", "ft", "nst", "crd", "sskd", "hsakd", "bss")
    },
    **{f"imagenet/{h}_tald-resnet18_from_resnet34.yaml": TALD_IMAGENET for h in ("kd", "at", "ft", "crd", "sskd")},
    "cifar10/trades/adaad_tald-resnet18.yaml": TALD_CIFAR100 | {"bandwidth": "median"},
    "digits/robust/adaad_tald.yaml": TALD_CIFAR100 | {"bandwidth": "median"},
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
WITHOUT_KD = {"ce.weight": 1.0, "kd.weight": 0.0, "kd.temperature": 4.0}
# a stage each: its schedule and its host terms; a batch size is written in the first stage alone
HOSTS = {
    "cifar100/ce-resnet56.yaml": [REPDISTILLER],
    "cifar100/kd-resnet20_from_resnet56.yaml": [REPDISTILLER | {"kd.temperature": 4.0, "kd.alpha": 0.1}],
    **{
        f"cifar100/{host}-resnet20_from_resnet56.yaml": [REPDISTILLER | WITHOUT_KD | own]
        for host, own in {
            "fitnet": {"hint.weight": 100.0},
            "at": {"at.weight": 1000.0},
            "sp": {"sp.weight": 3000.0},
            "cc": {"cc.weight": 0.02},
            "vid": {"vid.weight": 1.0},
            "rkd": {"rkd.weight": 1.0, "rkd.dist_factor": 25.0, "rkd.angle_factor": 50.0},
            "pkt": {"pkt.weight": 30000.0},
            "nst": {"nst.weight": 50.0},
            "crd": {"crd.weight": 0.8, "crd.temperature": 0.07, "crd.momentum": 0.5, "crd.input_size": 128}
            | {"crd.num_negative_samples": 16384, "crd.num_samples": 50000},
        }.items()
    },
    "cifar100/bss-resnet20_from_resnet56.yaml": [REPDISTILLER | {"bss.weight": 1.0, "bss.num_base": 64}],
    # two stages: what the student learns from is trained first, or its own stages are
    "cifar100/ab-resnet20_from_resnet56.yaml": [
        REPDISTILLER | {"num_epochs": 30, "milestones": None, "gamma": None, "ab.weight": 1.0, "ab.margin": 1.0},
        REPDISTILLER | WITHOUT_KD | {"batch_size": None},
    ],
    "cifar100/ft-resnet20_from_resnet56.yaml": [
        REPDISTILLER | {"lr": 0.01, "num_epochs": 30, "milestones": None, "gamma": None},
        REPDISTILLER | WITHOUT_KD | {"batch_size": None, "ft.weight": 200.0},
    ],
    "cifar100/sskd-resnet20_from_resnet56.yaml": [
        REPDISTILLER | {"num_epochs": 60, "milestones": [30, 45]},
        REPDISTILLER
        | {f"sskd.{name}": value for name, value in SSKD_WEIGHTS.items()}
        | {"batch_size": None, "sskd.loss_weights": [0.1, 0.9, 10.0, 2.7]},
    ],
    "cifar100/hsakd-resnet20_from_resnet56.yaml": [
        REPDISTILLER | {"num_epochs": 100, "milestones": [30, 60, 90], "nesterov": True},
        REPDISTILLER | {"batch_size": None, "nesterov": True, "hsakd.temperature": 3.0, "hsakd.weight": 1.0},
    ],
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
    [*_, stage] = stages(read_config(path)).values()
    term = stage["criterion"]["kwargs"]["sub_terms"]["tald"]
    kwargs = dict(term["criterion"]["kwargs"])
    adversary, threat = kwargs.pop("adversary"), kwargs.pop("threat")
    options = adversary["kwargs"]
    if "norm" in options:
        options["step norm"] = options.pop("norm")
    mean, std = threat.pop("mean"), threat.pop("std")
    assert {**options, **threat, **kwargs, "weight": term["weight"]} == DEFAULTS | PRESETS[path]
    assert adversary["key"] == ("VirtualSVGD" if "probe_radius" in PRESETS[path] else "SVGD")
    text = (CONFIGS / path).read_text()
    if "Normalize" in text:
        assert text.count(f"{{mean: {mean}, std: {std}}}") == 1, "the threat has Normalize's values"
    else:
        assert (mean, std) == ([0], [1])


def settings(stage):
    """Schedule and terms of a stage by short names."""
    found = stage["optimizer"]["kwargs"] | stage.get("scheduler", {}).get("kwargs", {})
    found |= {"num_epochs": stage["num_epochs"], "max_grad_norm": stage["optimizer"].get("max_grad_norm")}
    found |= {"batch_size": stage.get("train_data_loader", {}).get("kwargs", {}).get("batch_size")}
    for name, block in stage["criterion"]["kwargs"]["sub_terms"].items():
        kwargs = block["criterion"]["kwargs"] | {"weight": block["weight"]}
        adversary, threat = kwargs.pop("adversary", {}), kwargs.pop("threat", {})
        found |= {f"{name}.{key}": value for key, value in {**kwargs, **adversary.get("kwargs", {}), **threat}.items()}
    return found


@pytest.mark.parametrize("path", HOSTS)
def test_host_has_the_published_values(path):
    for stage, expected in zip(stages(read_config(path)).values(), HOSTS[path], strict=True):
        found = settings(stage)
        assert expected == {key: found.get(key) for key in expected}


ADAAD_RECIPE = {
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "batch_size": 128,
    "num_epochs": 200,
    "milestones": [100, 150],
    "gamma": 0.1,
    "max_grad_norm": None,
}
PIXELS = {"norm": "linf", "eps": "8/255", "space": "pixel", "mean": [0], "std": [1]}
SEARCH = {"num_steps": 10, "step_size": "2/255", "start": "gaussian", "weight": 1.0, **PIXELS}
SVGD = {"num_particles": 4, "noise_factor": 1.0, "bandwidth": "median", "norm": "linf", "start": None}
TRADES = {"num_epochs": 76, "milestones": [74], "weight_decay": 2e-4, "trades.beta": 6.0}
IAD = {"iad.temperature": 1.0, "iad.beta": 0.1, "iad.start": "uniform"}
RSLAD = {"rslad.alpha": "5/6", "rslad.objective": "kl_clean_teacher_student"}
ADAAD = {"adaad.alpha": 1.0, "adaad.temperature": 1.0, "adaad.objective": "kl_teacher_student"}
PARTS = {f"darwin.{part}_weight": 1.0 for part in ("arkd", "iakd", "dbkd")}
DARWIN = {"darwin.beta": 1.0, "darwin.gamma": 0.5, **PARTS, "darwin.pairing": "dataset", "darwin.label_free": None}
NO_PAIRS = {"darwin.dbkd_weight": 0.0, "darwin.pairing": None}
SMARAAD = {"matching": "slack", "alignment": "attribution", "start": "uniform", "plus_plus": None}
SMARAAD = {f"smaraad.{key}": value for key, value in SMARAAD.items()}
BSS = {"batch_size": 256, "num_epochs": 80, "milestones": [39, 59], "weight_decay": 1e-4}
BOUNDARY = {"num_base": 64, "temperature": 3.0, "kd_weight": 3.0, "bss_weight": 2.0, "num_steps": 10, "step_size": 0.3}
BOUNDARY |= {"norm": "l2", "eps": float("inf"), "space": "input", "start": None}
BOUNDARY |= {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010]}


def fast(term):
    """Five steps that go as far as ten of half the length."""
    return {f"{term}.num_steps": 5, f"{term}.first_num_steps": 2, f"{term}.step_size": "4/255"}


# by the beginning of the file's name; what is not named here is the recipe of AdaAD, and SEARCH for every term
LONG = {"num_epochs": 400, "milestones": [200, 300]}
METHODS = {
    "pgd_at": {"num_epochs": 110, "milestones": [100, 105]},
    "trades": TRADES,
    "trades_teacher": TRADES,
    "ce_teacher": {},
    "pgd_at_teacher": {
        "num_epochs": 40,
        "milestones": [35, 38],
        "batch_size": 64,
        "weight_decay": 1e-4,
        "max_grad_norm": 1.0,
    },
    "ard": {"ard.alpha": 1.0, "ard.temperature": 30.0, "ard.start": "uniform"},
    "iad": IAD | {"iad.variant": "I", "iad.begin_epoch": 60, "iad.weigh_teacher": False},
    "iad_ii": IAD | {"iad.variant": "II", "iad.begin_epoch": 40},
    "rslad": RSLAD,
    "rslad_igdm": RSLAD | {"igdm.objective": "kl_clean_teacher_student"},
    "akd": {"akd.teacher_share": 0.5},
    "akd2": {
        "akd2.robust_weight": 0.6,
        "akd2.standard_weight": 0.1,
        "akd2.temperature": 2.0,
        "akd2.start": "uniform",
    },
    "adaad": ADAAD,
    "adaad_igdm": ADAAD | {"igdm.objective": "kl_teacher_student"},
    "adaad_tald": ADAAD,
    "adaad_eps16": ADAAD | {"adaad.eps": "16/255", "adaad.step_size": "4/255"},
    "adaad_fast": ADAAD | fast("adaad"),
    "pgd_at_fast": fast("pgd_at"),
    "rslad_fast": RSLAD | fast("rslad"),
    "akd_fast": {"akd.teacher_share": 0.5} | fast("akd"),
    "akd_fast_long": LONG | {"akd.teacher_share": 0.5} | fast("akd"),
    "akd_kd_fast_long": LONG | {"akd.teacher_share": 0.5, "kd.temperature": 1.0, "kd.alpha": 0.0} | fast("akd"),
    "adaiad": {"adaiad.temperature": 30.0, "adaiad.beta": 0.1, "adaiad.begin_epoch": 60, "adaiad.weigh_teacher": False},
    "dgad": {"dgad.beta": 1.0},
    "gacd": {"max_grad_norm": 1.0},
    "crdnd": {},
    "kd": {"kd.temperature": 4.0, "kd.alpha": 0.1},
    "arkd": DARWIN | NO_PAIRS | {"darwin.iakd_weight": 0.0},
    "arkd_iakd": DARWIN | NO_PAIRS,
    "arkd_dbkd": DARWIN | {"darwin.iakd_weight": 0.0},
    "darwin": DARWIN,
    "darwin_lf": DARWIN | {"darwin.pairing": "batch", "darwin.label_free": True},
    "darwin_svgd": DARWIN | {f"darwin.{key}": value for key, value in SVGD.items()},
    "smaraad": SMARAAD,
    "smaraad_pp": SMARAAD | {"smaraad.plus_plus": True, "smaraad.beta": 0.1},
    "smaraad_kl": SMARAAD | {"smaraad.matching": "kl"},
    "smaraad_feature": SMARAAD | {"smaraad.alignment": "feature"},
    "bss": BSS | {f"bss.{key}": value for key, value in BOUNDARY.items()},
}


@pytest.mark.parametrize("path", CIFAR_ROBUST)
def test_method_has_the_published_values(path):
    found = settings(read_config(path)["train"])
    terms = {key.split(".")[0] for key in found if "." in key} - {
        "ce",
        "kd",
        "tald",
    }  # which have no search, or tests of their own
    expected = ADAAD_RECIPE | {f"{term}.{key}": value for term in terms for key, value in SEARCH.items()}
    expected |= METHODS[Path(path).name.split("-")[0]]
    if path.startswith("cifar10/bss"):
        expected |= BSS
    if "igdm" in terms:
        expected["igdm.weight"] = 1.0 if path.startswith("cifar10/") else 10.0
    assert expected == {key: found.get(key) for key in expected}


WRN = ("cifar_wide_resnet", {"depth": 34, "widen_factor": 10})
TRANSFORMER = {"img_size": 32, "patch_size": 4, "pretrained": False}
TEACHERS = {
    "cifar10/robustbench": ("robustbench", {"model_name": "Chen2021LTD_WRN34_20", "dataset": "cifar10"}),
    "cifar100/robustbench": ("robustbench", {"model_name": "Chen2021LTD_WRN34_10", "dataset": "cifar100"}),
    "cifar10/trades": WRN,
    "cifar100/trades": WRN,
    "cifar10/vit": ("timm", TRANSFORMER),
    "cifar10/generated": ("cifar_resnet18", {}),
    "cifar100/generated": ("cifar_resnet18", {}),
    "cifar10/bss": ("resnet56", {}),
}
NETWORKS = {"resnet18": "cifar_resnet18", "mobilenetv2": "cifar_mobilenet_v2", "resnet20": "resnet20"}


@pytest.mark.parametrize("path", [path for path in CIFAR_ROBUST if path.count("/") == 2 and "_teacher" not in path])
def test_networks_are_those_of_folder_and_name(path):
    models = read(path)["models"]
    folder, name = path.rsplit("/", 1)
    num_classes = int(re.match(r"cifar(\d+)", path)[1])
    student = re.fullmatch(r"\w+?-([a-z0-9]+)(_from_\w+)?\.yaml", name)[1]
    assert models["student_model"]["key"] == NETWORKS[student]
    assert models["student_model"]["kwargs"]["num_classes"] == num_classes
    teacher = models["teacher_model"]
    if teacher["key"] == "teacher_pair":
        teacher = teacher["kwargs"]["robust"]["kwargs"]["model"]
    key, kwargs = TEACHERS[folder]
    classes = {} if key == "robustbench" else {"num_classes": num_classes}
    assert teacher["key"] == key and (kwargs | classes).items() <= teacher["kwargs"].items()


@pytest.mark.parametrize(
    ("path", "numbers"),
    [
        ("cifar10/pgd_at-mobilenetv2", "77.54 % clean, 49.90 % PGD-10, 44.56 % AutoAttack (in AdaAD's paper"),
        ("cifar10/robustbench/adaad-resnet18", "85.58 % clean, 56.40 % PGD-10, 51.37 % AutoAttack (in AdaAD's"),
        ("cifar10/robustbench/adaiad-mobilenetv2", "84.63 % clean, 54.97 % PGD-10, 49.29 % AutoAttack"),
        ("cifar10/trades/rslad-resnet18", "83.12 % clean, 53.91 % PGD-20, 51.19 % AutoAttack (in DARWIN's paper"),
        ("cifar10/trades/darwin-mobilenetv2", "84.06 % clean, 53.94 % PGD-20, 51.28 % AutoAttack"),
        ("cifar100/trades/darwin_lf-mobilenetv2", "58.41 % clean, 31.44 % PGD-20, 26.58 % AutoAttack"),
        ("cifar100/trades/arkd_dbkd-resnet18", "59.23 % clean, 31.53 % PGD-20 (in DARWIN's ablation"),
        ("cifar10/vit/darwin_lf-mobilenetv2_from_deit_s", "51.13 % AutoAttack (in DARWIN's paper"),
        ("cifar10/generated/iad-resnet18", "82.95 % clean, 53.47 % robust (in DARWIN's paper"),
    ],
)
def test_header_has_the_published_numbers(path, numbers):
    text = (CONFIGS / f"{path}.yaml").read_text()
    assert f"Published, not reproduced: {numbers}" in text.replace("\n# ", " ")


# the robust family: nothing is selected on the test set, and students of one folder compare


@pytest.mark.parametrize("path", CIFAR_ROBUST)
def test_validation_images_are_held_out(path):
    config = read(path)
    folder = path.split("/")[0]
    parts = {name: config["datasets"].get(f"{folder}/{name}") for name in ("original", "train", "val", "test")}
    train = parts["train"] if parts["original"] is None else parts["original"]

    def images(part):
        return set(range(*part["init"]["kwargs"]["indices"]["init"]["args"]))

    assert not images(train) & images(parts["val"]) and len(images(train) | images(parts["val"])) == 50_000
    sources = [part["init"]["kwargs"]["dataset"]["init"]["kwargs"] for part in (train, parts["val"])]
    assert [source["train"] for source in sources] == [True, True]
    assert "RandomCrop" in str(sources[0]["transform"]) and "Random" not in str(sources[1]["transform"])
    assert parts["test"]["init"]["kwargs"]["train"] is False
    assert "Random" not in str(parts["test"]["init"]["kwargs"]["transform"])
    loaders = config["train"] | config["test"]
    for name in ("train", "val", "test"):
        assert loaders[f"{name}_data_loader"]["dataset_id"] == f"{folder}/{name}"
    assert config["train"]["train_data_loader"]["kwargs"]["drop_last"] is True


@pytest.mark.parametrize("path", ROBUST)
def test_robust_selection_is_by_pgd_10_on_held_out_images(path):
    config = read(path)
    train_config = config["train"]
    if not adversarial_terms(train_config):
        assert "post_epoch_process" not in train_config and "robust_validation" not in train_config
        return
    assert train_config["post_epoch_process"] == "validate_robustly"
    block = dict(train_config["robust_validation"])
    threat = block.pop("threat")
    is_digits = path.startswith("digits")
    assert block == {
        "every": 1,
        "num_images": 1000,
        "adversary": {
            "key": "PGD",
            "kwargs": {"num_steps": 10, "step_size": 0.0375 if is_digits else "2/255", "start": "uniform"},
        },
        "objective": "ce_student",
        "ckpt": student_of(config)["dst_ckpt"],
        "seed": 0,
    }
    assert (threat["norm"], threat["eps"]) == ("linf", 0.15 if is_digits else "8/255")
    for term in adversarial_terms(train_config).values():
        trained = term["criterion"]["kwargs"]["threat"]
        assert (threat["mean"], threat["std"]) == (trained["mean"], trained["std"])
    assert train_config["val_data_loader"]["dataset_id"] != config["test"]["test_data_loader"]["dataset_id"]


def robust_teacher_of(config):
    """Checkpoint and model of the teacher, the robust one of two."""
    return next(trained_teachers(config["models"].get("teacher_model")), (None, None))


def test_digits_students_have_one_teacher_and_one_radius():
    students = [path for path in DIGITS_ROBUST if "teacher" not in path]
    alone = {"ce", "pgd_at", "trades"}
    teachers = {robust_teacher_of(read(path))[0] for path in students if Path(path).stem not in alone}
    assert teachers == {read("digits/robust/trades_teacher.yaml")["models"]["model"]["dst_ckpt"]}
    found = [settings(read(path)["train"]) for path in DIGITS_ROBUST]
    other_balls = ("tald.eps", "bss.eps")
    radii = {one[key] for one in found for key in one if key.endswith(".eps") and key not in other_balls}
    assert radii == {0.15}
    assert {(one["num_epochs"], *one["milestones"]) for one in found} == {(30, 20, 27)}


def test_every_loss_has_a_digits_config():
    terms = [read(path)["train"]["criterion"]["kwargs"]["sub_terms"].values() for path in DIGITS_ROBUST]
    used = {block["criterion"]["key"] for blocks in terms for block in blocks}
    ours = {key for key, loss in MIDDLE_LEVEL_LOSS_DICT.items() if issubclass(loss, AdversarialTerm)}
    ours = {key for key in ours if MIDDLE_LEVEL_LOSS_DICT[key].__module__.startswith("torchdistill_adv")}
    assert ours and ours <= used


def make(folder, *options):
    command = [sys.executable, str(folder / "make.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_make_would_write_what_is_there():
    result = make(CONFIGS, "--check")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_make_finds_and_mends_what_differs(tmp_path):
    folder = tmp_path / "configs"
    shutil.copytree(CONFIGS, folder)
    changed, missing, extra = (folder / "digits" / "robust" / f"{name}.yaml" for name in ("ard", "iad", "other"))
    extra.write_text(changed.read_text())
    changed.write_text(changed.read_text().replace("alpha: 1.0", "alpha: 0.9"))
    missing.unlink()
    result = make(folder, "--check")
    expected = "digits/robust/ard.yaml\ndigits/robust/iad.yaml\ndigits/robust/other.yaml\n"
    assert (result.returncode, result.stdout) == (1, expected)
    assert not missing.exists()
    assert make(folder).returncode == 0
    assert missing.exists() and not extra.exists() and "alpha: 1.0" in changed.read_text()
    assert make(folder, "--check").returncode == 0


# files


@pytest.mark.parametrize("path", ALL)
def test_header_has_the_command(path):
    assert f"#   torchdistill-adv train --config configs/{path}\n" in (CONFIGS / path).read_text()


def trained_teachers(block):
    """Checkpoint and model of every part of a teacher that another configuration trains."""
    if block is not None and block["key"] == "teacher_pair":
        for part in block["kwargs"].values():
            yield part["kwargs"]["checkpoint"], part["kwargs"]["model"]
    elif block is not None and block.get("src_ckpt"):
        yield block["src_ckpt"], block


@functools.cache
def configs_by_checkpoint():
    return {student_of(config)["dst_ckpt"]: config for config in map(read, ALL)}


def without_download(kwargs):
    return {name: value for name, value in kwargs.items() if name != "pretrained"}


@pytest.mark.parametrize(
    "path", [path for path in ALL if re.search("(src_ckpt|point): '", (CONFIGS / path).read_text())]
)
def test_teacher_is_what_another_config_trains(path):
    config = read(path)
    teachers = list(trained_teachers(config["models"]["teacher_model"]))
    assert len(teachers) == (2 if config["models"]["teacher_model"]["key"] == "teacher_pair" else 1)
    for checkpoint, block in teachers:
        trained = configs_by_checkpoint()[checkpoint]
        source = student_of(trained)
        assert source["key"] == block["key"]
        assert without_download(source["kwargs"]) == without_download(block["kwargs"])
        # and it sees images as it did in its training
        test_set = config["test"]["test_data_loader"]["dataset_id"]
        assert trained["datasets"][test_set] == config["datasets"][test_set]


def written_files(node, key=""):
    if isinstance(node, dict):
        return {file for name, value in node.items() for file in written_files(value, name)}
    return {node} if key.endswith("_ckpt") and key != "src_ckpt" else set()


def test_no_two_configs_write_the_same_file():
    counts = Counter(file for path in ALL for file in written_files(read(path)))
    assert counts and set(counts.values()) == {1}
    assert all(file.startswith("./resource/ckpt/") and file.endswith(".pt") for file in counts)

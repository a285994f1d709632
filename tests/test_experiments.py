"""The studies: declared without mistakes, run in pieces, invalidated by what matters, and shown as they were found."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from experiments import commands, data, fingerprint, pages, timing
from experiments.__main__ import main
from experiments.findings import Findings, value_of
from experiments.intervals import Estimate, estimate, estimate_with_images
from experiments.measure import load_network, measure_all, pack, unpack
from experiments.networks import StridedCNN
from experiments.particles import search_and_measure
from experiments.runs import Place, runs_of
from experiments.schedule import with_teachers
from experiments.study import HERE, ROOT, load_study, study_names
from experiments.work import perform
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.evaluation.similarity import boundary_similarity, describe_similarity
from torchdistill_adv.runner import run as train
from torchdistill_adv.runner.config import plain_config
from torchdistill_adv.threat import ThreatModel

SETTING = {
    "data": "cifar10",
    "is_normalized": False,
    "measures": {"robustness": {"attacks": "clean,pgd3", "eps": "8/255", "num_images": 20}},
    "teachers": {"robust teacher": {"config": "cifar10/pgd_at-resnet18"}},
    "sizes": {
        "small": {
            "description": "Tiny.",
            "images": {"num_train": 32, "num_val": 16},
            "teacher": {"key": "strided_cnn", "kwargs": {"num_classes": 10, "widths": [4, 6]}},
            "student": {"key": "strided_cnn", "kwargs": {"num_classes": 10, "widths": [4]}},
            "overrides": {
                "train.num_epochs": 2,
                "train.scheduler.kwargs.milestones": [1],
                "train.train_data_loader.kwargs": {"batch_size": 16, "num_workers": 0, "drop_last": True},
                "train.val_data_loader.kwargs": {"batch_size": 16, "num_workers": 0},
                "test.test_data_loader.kwargs": {"batch_size": 16, "num_workers": 0},
            },
        }
    },
}
STUDY = {
    "title": "A tiny study",
    "question": "Does it run?",
    "setting": "tiny",
    "variants": {
        "PGD-AT": {"config": "cifar10/pgd_at-resnet18", "seeds": 2},
        "RSLAD": {"config": "cifar10/trades/rslad-resnet18", "teacher": "robust teacher", "seeds": 2},
    },
    "columns": {"last.clean": "clean, %", "last.pgd3": "PGD-3, %", "seconds": "seconds"},
    "reference": {"variant": "PGD-AT", "measure": "last.pgd3"},
    "comparisons": [{"says": "A teacher?", "variant": "RSLAD", "reference": "PGD-AT", "measure": "last.pgd3"}],
    "chart": {"kind": "dots", "measures": {"last.clean": "clean, %"}},
    "readme": {"columns": ["last.clean"], "variants": ["RSLAD"]},
}


def write_pack(file: Path, count: int, seed: int) -> None:
    """Random images as JPEG, of ten classes."""
    generator = np.random.default_rng(seed)
    jpeg = []
    for _ in range(count):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "JPEG")
        jpeg.append(np.frombuffer(buffer.getvalue(), dtype=np.uint8))
    offsets = np.cumsum([0, *map(len, jpeg)])
    np.savez(file, jpeg=np.concatenate(jpeg), offsets=offsets, labels=np.arange(count) % 10)


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packs")
    for number, name in enumerate(name for names in data.PACKS.values() for name in names):
        write_pack(folder / f"{name}.npz", 60, number)
    return folder


@pytest.fixture
def with_packs(packs, monkeypatch):
    monkeypatch.setenv(data.PACKS_VARIABLE, str(packs))


def write_study(folder: Path, study=STUDY, setting=SETTING) -> Path:
    for kind, name, block in (("studies", "one", study), ("settings", "tiny", setting)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        (folder / kind / f"{name}.yaml").write_text(yaml.safe_dump(block, sort_keys=False))
    return folder


# declarations


@pytest.mark.parametrize("name", study_names())
def test_every_study_can_be_built_at_every_size(name):
    study = load_study(name)
    assert study.variants and study.columns and study.chart
    for size in study.setting.sizes:
        found = runs_of(study, Place(size, "torchvision"))
        assert len({run.result_file for run in found}) == len(found)
        for run in found:
            if run.seed:
                continue
            assert run.fingerprint()["measures"]["code"]
            if run.variant.search is None:
                # an override of a block that is not there is refused, so this finds every misspelt one
                config = plain_config(run.config_file, run.overrides())
                assert config["datasets"][f"{study.setting.data}/train"]["init"]["kwargs"]["source"] == "torchvision"
                student = config["models"]["student_model" if run.teacher else "model"]
                assert student["dst_ckpt"] == str(run.checkpoint)


def test_settings_select_on_validation_images_only():
    for name in study_names():
        for run in runs_of(load_study(name), Place("full", "torchvision")):
            if run.variant.search is None:
                train = plain_config(run.config_file, run.overrides())["train"]
                chosen = train["val_data_loader"].get("dataset_id", f"{run.setting.data}/val")
                assert chosen == f"{run.setting.data}/val"


@pytest.mark.parametrize("size", ["small", "full"])
def test_students_of_a_setting_have_one_schedule_one_network_and_a_teacher_in_eval_mode(size):
    blocks = ("num_epochs", "train_data_loader", "optimizer", "scheduler", "robust_validation")
    schedules, networks = {}, {}
    for name in study_names():
        for run in runs_of(load_study(name), Place(size, "torchvision")):
            if run.variant.search is not None or run.seed:
                continue
            config = plain_config(run.config_file, run.overrides())
            train = {block: config["train"].get(block) for block in blocks}
            # partners of another class, a name, and the clipping of GACD's configuration, which its row tells
            for block, key in (
                ("train_data_loader", "dataset_wrapper"),
                ("robust_validation", "ckpt"),
                ("optimizer", "max_grad_norm"),
            ):
                train[block] = {**(train[block] or {}), key: None}
            epochs = [train.pop("num_epochs"), *train["scheduler"]["kwargs"].pop("milestones")]
            train["epochs"] = [epoch / run.variant.duration for epoch in epochs]
            assert schedules.setdefault(run.setting.name, train) == train, run.variant.name
            assert networks.setdefault(run.setting.name, run.network()) == run.network()
            if run.teacher:
                assert config["train"]["pre_epoch_process"] in ("bind_adversarial_losses", "eval_teacher")
                block = config["models"]["teacher_model"]
                assert {key: block[key] for key in ("key", "kwargs")} == run.teacher.network()


def test_variants_of_a_name_are_the_same_in_every_study():
    seen = {}
    for name in study_names():
        study = load_study(name)
        for variant in study.variants:
            assert seen.setdefault((study.setting.name, variant.slug), variant) == variant


MISTAKES = {
    "variants.RSLAD.confg": ({"variants": {"RSLAD": {"confg": "x"}}}, "did you mean 'config'"),
    "variants.RSLAD.teacher": (
        {"variants": {"RSLAD": {"config": "x", "teacher": "robust techer"}}},
        "did you mean 'robust teacher'",
    ),
    "variants.RSLAD": ({"variants": {"RSLAD": {"teacher": "robust teacher"}}}, "either config or search"),
    "setting": ({"setting": "tinny"}, "did you mean 'tiny'"),
    "comparisons.0": (
        {"comparisons": [{"says": "?", "variant": "RSLAAD", "reference": "PGD-AT", "measure": "seconds"}]},
        "did you mean 'RSLAD'",
    ),
    "colums": ({"colums": {}}, "did you mean 'columns'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_study_is_told(tmp_path, mistake):
    change, hint = MISTAKES[mistake]
    with pytest.raises(ConfigError) as error:
        load_study("one", write_study(tmp_path, {**STUDY, **change}))
    assert hint in str(error.value)


# images


def test_splits_do_not_overlap_and_are_always_the_same(with_packs):
    def of(split, **options):
        return data.Images("cifar10", split, "packs", num_train=30, num_val=20, **options)

    train, val, test = of("train"), of("val"), of("test")
    assert (len(train), len(val), len(test)) == (30, 20, 60)
    margin = data.PADDING
    pixels = [image[:, margin:-margin, margin:-margin].tobytes() for image in train.pixels.numpy()]
    assert not {image.tobytes() for image in val.pixels.numpy()} & set(pixels)
    assert of("train").digest == train.digest != of("val").digest
    again = data.Images("cifar10", "val", "packs", num_train=10, num_val=20)
    assert again.digest == val.digest
    # evaluation is without augmentation, and training's comes from torch's random stream
    torch.testing.assert_close(val[3][0], val.pixels[3].float() / 255)
    torch.manual_seed(0)
    first = train[0][0]
    torch.manual_seed(0)
    torch.testing.assert_close(train[0][0], first)
    assert any(not torch.equal(train[0][0], first) for _ in range(10))


def test_an_augmented_image_is_a_crop_of_the_padded_one_or_its_mirror(with_packs):
    images = data.Images("cifar10", "train", "packs", num_train=10, num_val=10)
    padded = images.pixels[4].float() / 255
    crops = {
        crop.numpy().tobytes()
        for top in range(9)
        for left in range(9)
        for crop in (padded[:, top : top + 32, left : left + 32], padded[:, top : top + 32, left : left + 32].flip(2))
    }
    found = {images[4][0].numpy().tobytes() for _ in range(200)}
    assert found <= crops and len(found) > 50


def test_normalized_images_are_those_of_the_configurations(with_packs):
    plain, normalized = (
        data.Images("cifar100", "test", "packs", is_normalized=normalized)[5][0] for normalized in (False, True)
    )
    mean, std = (torch.tensor(data.NORMALIZATION[name]).view(3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(normalized * std + mean, plain)
    text = (ROOT / "configs" / "cifar100" / "ce-resnet56.yaml").read_text()
    assert f"mean: {data.NORMALIZATION['mean']}, std: {data.NORMALIZATION['std']}" in text


def test_torchvision_is_the_other_source(monkeypatch):
    class Fake:
        def __init__(self, root, train, download):
            assert download
            self.data = np.full((50, 32, 32, 3), 1 if train else 2, dtype=np.uint8)
            self.targets = list(range(50))

    monkeypatch.setitem(data.TORCHVISION, "cifar100", Fake)
    train = data.Images("cifar100", "train", "torchvision", num_val=10)
    test = data.Images("cifar100", "test", "torchvision")
    assert (len(train), len(test), len(train.classes)) == (40, 50, 50)
    assert set(test.pixels.unique().tolist()) == {2} and set(train.pixels.unique().tolist()) == {0, 1}


def test_images_that_are_not_there_are_told(with_packs, monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="num_train: found 55 beside 10 of 60"):
        data.Images("cifar10", "train", "packs", num_train=55, num_val=10)
    with pytest.raises(ConfigError, match="split: found 'valid'; did you mean 'val'"):
        data.Images("cifar10", "valid", "packs")
    monkeypatch.setenv(data.PACKS_VARIABLE, str(tmp_path))
    with pytest.raises(ConfigError, match="put the pack there, or write torchvision"):
        data.Images("cifar10", "train", "packs")
    monkeypatch.delenv(data.PACKS_VARIABLE)
    with pytest.raises(ConfigError, match="set it to the folder of the packs"):
        data.Images("cifar10", "train", "packs")


# fingerprints


def test_comments_and_docstrings_are_no_code():
    before = '"""Module."""\nimport os  # why\n\n\ndef f(x):\n    """Doc."""\n    # note\n    return x + 1\n'
    same = '"""Other\n\nwords."""\nimport os\n\ndef f(x):\n    """Doc of\n    two lines."""\n\n    return x + 1  # as\n'
    assert fingerprint.code_of(before) == fingerprint.code_of(same)
    for changed in (before.replace("+ 1", "+ 2"), before.replace("import os", "import re"), before + "y = '# no'\n"):
        assert fingerprint.code_of(changed) != fingerprint.code_of(before)
    assert fingerprint.code_of("x = '# no comment'\n") == "x = '# no comment'"


CHANGES = {
    "torchdistill_adv/losses/rslad.py": {"RSLAD"},
    "torchdistill_adv/losses/adaad.py": {"AdaAD"},
    "torchdistill_adv/step.py": {"RSLAD", "AdaAD", "PGD-AT"},
    "torchdistill_adv/adversaries/pgd.py": {"RSLAD", "AdaAD", "PGD-AT"},
    "experiments/networks.py": {"RSLAD", "AdaAD", "PGD-AT"},
    "torchdistill_adv/report/page.py": set(),
    "torchdistill_adv/losses/tald.py": set(),
}
DIGESTS = """
import json
from experiments.runs import Place, runs_of
from experiments.study import load_study
found = runs_of(load_study("robust"), Place(), ["RSLAD", "AdaAD", "PGD-AT"])
print(json.dumps({run.variant.name: run.fingerprint()["training"]["code"] for run in found if not run.seed}))
"""


def test_a_changed_file_invalidates_the_methods_that_use_it(tmp_path):
    for name in ("torchdistill_adv", "experiments", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))

    def digests():
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", DIGESTS], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout)

    before = digests()
    # all at once, and then told apart by the files that differ
    for name in CHANGES:
        with (tmp_path / name).open("a") as stream:
            stream.write("\nCHANGED = True\n")
    after = digests()
    for name, methods in CHANGES.items():
        assert {method for method in after if after[method].get(name) != before[method].get(name)} == methods, name


WATCHED = {
    "RSLAD": "cifar10/trades/rslad-resnet18",
    "KD": "cifar10/trades/kd-resnet18",
    "DARWIN": "cifar10/trades/darwin-resnet18",
    "AdaAD + IGDM": "cifar10/trades/adaad_igdm-resnet18",
}


def test_whatever_code_a_run_executes_is_in_its_fingerprint(tmp_path, with_packs):
    variants = {name: {"config": config, "teacher": "robust teacher"} for name, config in WATCHED.items()}
    unused = {"reference": {}, "comparisons": []}
    study = load_study("one", write_study(tmp_path, {**STUDY, **unused, "variants": variants}))
    place = Place(results=tmp_path / "results", state=tmp_path / "state", studies=tmp_path)
    students = [run for run in runs_of(study, place) if run.seed == 0]
    executed = set()

    def watch(frame, event, _):
        if event == "call" and frame.f_code.co_name != "<module>":
            executed.add(frame.f_code.co_filename)

    for run in (students[0].teacher, *students):
        executed.clear()
        threading.setprofile(watch)
        sys.setprofile(watch)
        try:
            train(run.config_file, seed=0, student_only=True, overrides=run.overrides())
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
        if run.is_teacher:
            run.weights_file.parent.mkdir(parents=True)
            shutil.copy(run.checkpoint, run.weights_file)
        files = {str(Path(file).relative_to(ROOT)) for file in executed if file.startswith(str(ROOT))}
        ours = {file for file in files if file.startswith(("torchdistill_adv/", "experiments/"))}
        known = run.fingerprint()["training"]["code"].keys()
        unknown = {file for file in ours - known if not file.replace("/", ".").startswith(fingerprint.LEFT_OUT)}
        assert unknown == set(), run.name
        assert len(ours & known) > 5


# intervals


@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_outcomes_survive_packing(outcomes):
    assert unpack(pack(outcomes)) == outcomes


def test_the_interval_of_a_mean_is_students():
    # t of 0.975 with 2 and 4 degrees of freedom, from the tables
    for values, quantile in (([1.0, 2.0, 4.0], 4.302653), ([1.0, 2.0, 4.0, 3.0, 0.0], 2.776445)):
        found = estimate(values)
        assert found.mean == pytest.approx(np.mean(values))
        assert found.half_width == pytest.approx(quantile * np.std(values, ddof=1) / math.sqrt(len(values)), rel=1e-5)
    assert estimate([3.0]) == Estimate(3.0, None, 1)


def test_the_interval_over_seeds_and_images_covers_what_it_should():
    generator = np.random.default_rng(0)
    covered, widths = 0, []
    for _ in range(400):
        seeds, images = generator.normal(0, 1.0, (3, 1)), generator.normal(0, 20.0, (1, 200))
        values = 0.7 + seeds + images + generator.normal(0, 30.0, (3, 200))
        found = estimate_with_images(values)
        covered += abs(found.mean - 0.7) <= found.half_width
        widths.append(found.half_width)
    # at least what it says, and not for being far too wide: the true deviation of the mean is 2.2
    assert covered / 400 > 0.93
    assert np.median(widths) < 3.2 * 2.2


def test_a_difference_below_its_interval_is_none():
    assert Estimate(0.4, 0.5, 3).verdict == "no difference"
    assert Estimate(-0.6, 0.5, 3).verdict == "lower"
    assert Estimate(0.6, 0.5, 3).verdict == "higher"
    assert Estimate(9.0, None, 1).verdict == "one seed: unknown"


# running


def command(folder: Path, packs: Path, *arguments: str, **options):
    """``python -m experiments`` with folders of its own."""
    places = ["--results", folder / "results", "--state", folder / "state", "--studies", folder]
    return subprocess.Popen(
        [sys.executable, "-m", "experiments", *arguments, *map(str, places)],
        cwd=ROOT,
        env={**os.environ, data.PACKS_VARIABLE: str(packs), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


@pytest.fixture(scope="module")
def done(tmp_path_factory, packs):
    """The folder of a tiny study that was run, without its last seed."""
    folder = write_study(tmp_path_factory.mktemp("done"))
    code, output = finish(command(folder, packs, "run", "one", "--seeds", "1"))
    assert code == 0, output
    return folder


def results_in(folder: Path):
    return {file.stem: json.loads(file.read_text()) for file in (folder / "results").rglob("*.json")}


def test_a_result_has_all_that_repeats_it(done):
    found = results_in(done)
    assert set(found) == {"robust_teacher-0", "pgd_at-0", "rslad-0"}
    rslad = found["rslad-0"]
    assert rslad["config"] == "configs/cifar10/trades/rslad-resnet18.yaml" and rslad["seed"] == 0
    assert rslad["overrides"]["train.num_epochs"] == 2
    assert rslad["teacher"]["weights"] == found["robust_teacher-0"]["weights"]["taught"]
    assert len(rslad["commit"]) == 40 and rslad["machine"]["torch"] == version("torch")
    assert rslad["images"]["sha256"]["test"] == found["pgd_at-0"]["images"]["sha256"]["test"]
    last = rslad["measured"]["last"]
    assert last["clean"] == pytest.approx(100 * np.mean(unpack(last["outcomes"]["clean"])))
    assert len(unpack(last["outcomes"]["clean"])) == 60 and len(unpack(last["outcomes"]["pgd3"])) == 20
    assert set(rslad["measured"]) == {"last", "best"} and len(rslad["epochs"]) == 2
    assert value_of(rslad, "validation.robust") == rslad["epochs"][1]["robust_validation"]["robust"]
    assert str(done) not in json.dumps(rslad)


def test_what_is_done_is_not_done_again_and_the_rest_is(done, packs):
    before = {file: file.stat().st_mtime_ns for file in (done / "results").rglob("*.json")}
    code, output = finish(command(done, packs, "run", "one", "--seeds", "1"))
    assert code == 0 and "0 runs to do" in output
    code, output = finish(command(done, packs, "run", "one", "--only", "PGD-AT"))
    assert code == 0 and "1 runs to do" in output, output
    after = {file: file.stat().st_mtime_ns for file in (done / "results").rglob("*.json")}
    assert after.items() > before.items() and len(after) == 4
    code, output = finish(command(done, packs, "list"))
    assert "2/2 PGD-AT" in output and "1/2 RSLAD" in output


def test_a_killed_run_goes_on_to_the_same_result(tmp_path, done, packs):
    setting = json.loads(json.dumps(SETTING))
    folder = write_study(tmp_path, setting=setting)
    arguments = ("run", "one", "--only", "PGD-AT", "--seeds", "1")
    process = command(folder, packs, *arguments, start_new_session=True)
    metrics = folder / "state" / "tiny" / "small-packs" / "pgd_at-0" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    assert results_in(folder) == {}
    assert len(metrics.read_text().splitlines()) == 1, "it was to be killed in its second epoch"
    code, output = finish(command(folder, packs, *arguments))
    assert code == 0, output
    assert "going on" in metrics.parent.with_suffix(".log").read_text()
    again, before = results_in(folder)["pgd_at-0"], results_in(done)["pgd_at-0"]
    assert again["weights"] == before["weights"]
    assert again["measured"]["last"]["outcomes"] == before["measured"]["last"]["outcomes"]
    assert again["fingerprint"] == before["fingerprint"]


def test_a_budget_is_that_of_the_command_or_of_the_studies(tmp_path, monkeypatch):
    folder = write_study(tmp_path, {**STUDY, "budget": {"small": 20}})
    (folder / "studies" / "two.yaml").write_text(yaml.safe_dump({**STUDY, "budget": {"small": 7}}))
    (folder / "studies" / "open.yaml").write_text(yaml.safe_dump(STUDY))
    asked = []
    monkeypatch.setattr(commands, "run_all", lambda runs, jobs, budget, device: asked.append(budget) or 0)
    for arguments in (["one"], ["one", "two"], ["all"], ["all", "--budget", "3"]):
        main(["run", *arguments, "--studies", str(folder)])
    assert asked == [20, 27, None, 3]


def test_a_variant_may_train_longer_than_its_setting(tmp_path):
    study = json.loads(json.dumps(STUDY))
    study["variants"]["RSLAD"]["duration"] = 2.5
    folder = write_study(tmp_path, study)
    place = Place(studies=folder)
    [run] = runs_of(load_study("one", folder), place, ["RSLAD"])[:1]
    train = plain_config(run.config_file, run.overrides())["train"]
    assert (train["num_epochs"], train["scheduler"]["kwargs"]["milestones"]) == (5, [2])
    # where the setting leaves the schedule to the configuration, that is what is longer
    setting = json.loads(json.dumps(SETTING))
    del setting["sizes"]["small"]["overrides"]["train.num_epochs"]
    del setting["sizes"]["small"]["overrides"]["train.scheduler.kwargs.milestones"]
    write_study(tmp_path, study, setting)
    [run] = runs_of(load_study("one", folder), place, ["RSLAD"])[:1]
    train = plain_config(run.config_file, run.overrides())["train"]
    assert (train["num_epochs"], train["scheduler"]["kwargs"]["milestones"]) == (500, [250, 375])


def test_a_budget_stops_the_runs_and_their_processes(tmp_path, packs):
    setting = json.loads(json.dumps(SETTING))
    setting["sizes"]["small"]["overrides"]["train.num_epochs"] = 5000
    folder = write_study(tmp_path, setting=setting)
    code, output = finish(command(folder, packs, "run", "one", "--budget", "0.2"))
    assert code == 0 and "the budget of 0.2 minutes is over: 5 runs are left" in output
    log = folder / "state" / "tiny" / "small-packs" / "robust_teacher-0.log"
    size = log.stat().st_size
    time.sleep(2)
    assert log.stat().st_size == size


def test_outcomes_of_other_attack_code_are_not_used_again(tmp_path, with_packs):
    folder = write_study(tmp_path)
    place = Place(results=folder / "results", state=folder / "state", studies=folder)
    run = runs_of(load_study("one", folder), place, ["PGD-AT"])[0]
    assert perform(run)
    directory = run.checkpoint.with_suffix("")
    journal, measures = directory / "evaluation.jsonl", directory / "measures.json"
    lines = journal.read_text().splitlines()
    kept = json.loads(measures.read_text())
    assert lines and kept == run.fingerprint()["measures"]
    journal.write_text("\n".join([*lines, *lines, ""]))
    run.result_file.unlink()
    assert perform(run) and len(journal.read_text().splitlines()) == 2 * len(lines)
    kept["code"]["torchdistill_adv/evaluation/engine.py"] = "another"
    measures.write_text(json.dumps(kept, indent=1))
    run.result_file.unlink()
    assert perform(run) and len(journal.read_text().splitlines()) == len(lines)


def test_teachers_can_be_run_first(tmp_path, packs):
    folder = write_study(tmp_path)
    code, output = finish(command(folder, packs, "run", "one", "--seeds", "0"))
    assert code == 0 and "1 runs to do" in output
    assert set(results_in(folder)) == {"robust_teacher-0"}


def test_a_run_that_fails_is_told_and_the_others_are_done(tmp_path, packs):
    study = json.loads(json.dumps(STUDY))
    study["variants"]["broken"] = {
        "config": "cifar10/trades/rslad-resnet18",
        "options": {"rslad.alpha": 7.0},
        "teacher": "robust teacher",
    }
    folder = write_study(tmp_path, study)
    code, output = finish(command(folder, packs, "run", "one", "--seeds", "1", "--only", "broken", "PGD-AT"))
    assert code == 1 and "broken-0: failed, see" in output
    assert set(results_in(folder)) == {"robust_teacher-0", "pgd_at-0"}
    assert "alpha" in (folder / "state" / "tiny" / "small-packs" / "broken-0.log").read_text()


def test_parts_are_everything_once(tmp_path, monkeypatch):
    folder = write_study(tmp_path)
    (folder / "studies" / "two.yaml").write_text(yaml.safe_dump(STUDY))
    asked = []
    monkeypatch.setattr(commands, "run_all", lambda runs, *_: asked.append([run.result_file for _, run in runs]) or 0)
    for part in ("1/3", "2/3", "3/3"):
        main(["run", "one", "two", "--part", part, "--studies", str(folder)])
    everything = [file for part in asked for file in part]
    assert len(set(everything)) == len(everything) == 4 and min(map(len, asked)) >= 1


def test_a_wrong_argument_is_one_line(packs, tmp_path):
    code, output = finish(command(write_study(tmp_path), packs, "run", "oone"))
    assert code == 2 and output.strip() == "error: studies: found 'oone'; did you mean 'one'? Known: one."
    code, output = finish(command(tmp_path, packs, "run", "one", "--only", "RSLAAD"))
    assert code == 2 and output.startswith("error: --only: found 'RSLAAD'; did you mean 'RSLAD'?")
    code, output = finish(command(tmp_path, packs, "run", "one", "--part", "4/3"))
    assert code == 2 and output.startswith("error: --part: found '4/3'")


def test_two_schedulers_share_the_work(tmp_path, packs):
    folder = write_study(tmp_path)
    arguments = ("run", "one", "--seeds", "1", "--jobs", "1")
    processes = [command(folder, packs, *arguments) for _ in range(2)]
    outputs = [finish(process) for process in processes]
    assert [code for code, _ in outputs] == [0, 0], outputs
    assert set(results_in(folder)) == {"robust_teacher-0", "pgd_at-0", "rslad-0"}
    logs = {
        name: (folder / "state" / "tiny" / "small-packs" / f"{name}.log").read_text() for name in results_in(folder)
    }
    for name, log in logs.items():
        assert log.count("epoch 1: saving the student") <= 1, name


def test_a_student_of_a_teacher_that_is_gone_waits_for_another(done, tmp_path, packs):
    folder = tmp_path / "copy"
    shutil.copytree(done, folder)
    [weights] = (folder / "results").rglob("robust_teacher-0.pt")
    weights.unlink()
    study = load_study("one", folder)
    place = Place(results=folder / "results", state=folder / "state", studies=folder)
    [teacher] = {run.teacher.result_file: run.teacher for run in runs_of(study, place) if run.teacher}.values()
    assert not teacher.is_done
    jobs = with_teachers([("one", run) for run in runs_of(study, place, ["RSLAD"])])
    assert jobs[0].run.name == "robust_teacher-0"


def test_times_are_of_trainings_in_turn(done, tmp_path, monkeypatch, with_packs):
    monkeypatch.setattr(timing, "NUM_TRAIN", 32)
    folder = tmp_path / "copy"
    shutil.copytree(done, folder)
    columns = {**STUDY["columns"], "time": "time"}
    write_study(folder, {**STUDY, "timed": "PGD-AT", "columns": columns})
    before = set(folder.rglob("*"))
    study = load_study("one", folder)
    place = Place(results=folder / "results", state=folder / "state", studies=folder)
    file = timing.time_study(study, place, 2)
    assert set(folder.rglob("*")) - before == {file, file.parent}
    times = json.loads(file.read_text())
    assert {name: len(found) for name, found in times["seconds"].items()} == {"PGD-AT": 2, "RSLAD": 2}
    findings = findings_of(folder)
    assert findings.values("PGD-AT", "time") == {0: 1.0, 1: 1.0}
    own, other = times["seconds"]["RSLAD"], times["seconds"]["PGD-AT"]
    assert findings.values("RSLAD", "time") == {i: own[i] / other[i] for i in (0, 1)}
    assert "2 rounds, on 32 images" in pages.page(findings) and "| 1.00 ± 0.00 |" in pages.page(findings)
    # they tell with what they were taken, as results do
    training = times["fingerprint"]["RSLAD"]
    assert training == next(iter(runs_of(study, place, ["RSLAD"]))).fingerprint()["training"]
    training["code"]["torchdistill_adv/losses/rslad.py"] = "another"
    file.write_text(json.dumps(times))
    text = pages.page(findings_of(folder))
    assert text.count("| 1.00 ± 0.00 |") == 1 and "timed before these changed: torchdistill_adv/losses/rslad.py" in text
    [line] = [line for line in text.splitlines() if line.startswith("| [RSLAD]")]
    assert " † |" in line
    training["config"] = "another"
    file.write_text(json.dumps(times))
    findings = findings_of(folder)
    assert findings.values("RSLAD", "time") == {} and len(findings.values("PGD-AT", "time")) == 2
    times["fingerprint"]["PGD-AT"]["config"] = "another"
    file.write_text(json.dumps(times))
    assert findings_of(folder).values("PGD-AT", "time") == {}


# other measures

CLEAN_SETTING = {
    **SETTING,
    "data": "cifar100",
    "is_normalized": True,
    "measures": {
        "similarity": {"num_images": 60},
        "diversity": {
            "num_images": 6,
            "threat": {"norm": "l2", "eps": 0.3, "space": "input"},
            "search": {"num_steps": 5, "step_size": 0.05, "noise_factor": 1.0},
        },
    },
    "teachers": {"standard teacher": {"config": "cifar100/ce-resnet56"}},
}
SEARCHES = {
    "start": {"num_particles": 4, "step_size": 0.0},
    "SVGD": {"num_particles": 4, "bandwidth": 1.0e-3},
    "median": {"num_particles": 4, "bandwidth": "median"},
    "median without repulsion": {"num_particles": 4, "bandwidth": "median", "repulsion": False},
    "PGD": {"num_particles": 4, "method": "PGD"},
}
CLEAN_STUDY = {
    **STUDY,
    "variants": {
        **{name: {"teacher": "standard teacher", "search": search} for name, search in SEARCHES.items()},
        "KD": {"config": "cifar100/kd-resnet20_from_resnet56", "teacher": "standard teacher"},
    },
    "reference": {},
    "comparisons": [],
}


@pytest.fixture
def clean_runs(tmp_path, with_packs):
    """The runs of a study with a teacher that has learnt nothing."""
    folder = write_study(tmp_path, CLEAN_STUDY, CLEAN_SETTING)
    place = Place(results=tmp_path / "results", state=tmp_path / "state", studies=folder)
    runs = {run.variant.name: run for run in runs_of(load_study("one", folder), place) if run.seed == 0}
    teacher = runs["KD"].teacher
    torch.manual_seed(3)
    teacher.weights_file.parent.mkdir(parents=True)
    network = StridedCNN(**teacher.network()["kwargs"])
    network.fc.weight.data *= 300  # its predictions change within the ball
    torch.save({"model": network.state_dict()}, teacher.weights_file)
    return runs


def test_particles_are_those_of_the_searches(clean_runs):
    found = {name: search_and_measure(clean_runs[name])["measured"] for name in SEARCHES}
    for name, values in found.items():
        # the largest distance of four points of the ball is that of a regular tetrahedron
        assert 0 < values["sse"] <= 2 * 0.3**2 * 4 / 3 + 1e-6, name
        assert 0 < values["length"] <= 0.3 + 1e-6 and values["num_images"] == found["start"]["num_images"] > 0
    # a kernel that is the identity makes SVGD as many searches of their own
    assert found["SVGD"]["divergence"] == pytest.approx(found["PGD"]["divergence"], rel=1e-3)
    assert found["SVGD"]["divergence"] > found["start"]["divergence"] >= 0
    assert found["median"]["sse"] > found["median without repulsion"]["sse"]


def test_similarity_is_that_of_the_metrics(clean_runs):
    run = clean_runs["KD"]
    torch.manual_seed(0)
    student = StridedCNN(**run.network()["kwargs"])
    run.checkpoint.parent.mkdir(parents=True)
    torch.save({"model": student.state_dict()}, run.checkpoint)
    found = measure_all(run, {"last": run.checkpoint})["measured"]["last"]
    images = data.Images(split="test", **run.images())
    pixels, labels = zip(*images, strict=True)
    teacher = load_network(run.teacher, run.teacher.weights_file)
    threat = ThreatModel(math.inf, "l2", "input", **data.NORMALIZATION)
    student = student.eval().requires_grad_(False)
    compared = boundary_similarity(
        teacher.requires_grad_(False), student, torch.stack(pixels), torch.tensor(labels), threat
    )
    assert found["num_compared"] == describe_similarity(compared)["num_compared"]
    assert found["magsim"] == describe_similarity(compared)["magsim"]
    with torch.no_grad():
        right = student(torch.stack(pixels)).argmax(1) == torch.tensor(labels)
    assert unpack(found["outcomes"]["clean"]) == right.tolist()


# pages


def findings_of(folder: Path) -> Findings:
    place = Place(results=folder / "results", state=folder / "state", studies=folder)
    return Findings.read(load_study("one", folder), place)


def test_a_page_has_the_numbers_of_the_results(done, tmp_path):
    (tmp_path / "README.md").write_text("before\n" + "\n".join(m.format(name="one") for m in pages.MARKS) + "after\n")
    study = load_study("one", done)
    place = Place(results=done / "results", state=done / "state", studies=done)
    pages.write_pages([study], place, tmp_path / "docs", tmp_path / "README.md")
    text = (tmp_path / "docs" / "one.md").read_text()
    result = results_in(done)["rslad-0"]
    [line] = [line for line in text.splitlines() if line.startswith("| [RSLAD]") and "seed" not in line][:1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2] == f"{result['measured']['last']['clean']:.1f}"
    assert cells[3] == f"{result['measured']['last']['pgd3']:.1f}"
    assert "RSLAD: 1 of 2 seeds" in text and "one seed: unknown" in text
    assert (tmp_path / "docs" / "one.png").read_bytes().startswith(b"\x89PNG")
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("after\n") and "| [RSLAD](./configs" in readme
    assert "[PGD-AT]" in text and "[PGD-AT]" not in readme
    again = pages.with_table(readme, findings_of(done))
    assert again == readme


def test_pages_of_other_studies_stay_beside_their_results(done, packs, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(done, folder)
    before = {file: file.stat().st_mtime_ns for file in [*pages.PAGES.iterdir(), pages.README]}
    code, output = finish(command(folder, packs, "table", "all"))
    assert code == 0 and {Path(line).parent for line in output.split()} == {folder / "results" / "pages"}
    assert before == {file: file.stat().st_mtime_ns for file in [*pages.PAGES.iterdir(), pages.README]}


def test_a_variant_that_gains_a_teacher_is_to_be_run_again(done, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(done, folder)
    variants = {**STUDY["variants"], "PGD-AT": {**STUDY["variants"]["RSLAD"], "seeds": 2}}
    write_study(folder, {**STUDY, "variants": variants})
    assert "PGD-AT" not in findings_of(folder).results and "RSLAD" in findings_of(folder).results


def test_results_of_other_code_are_marked_and_of_another_configuration_not_shown(done, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(done, folder)
    [file] = (folder / "results").rglob("rslad-0.json")
    before = file.read_text()
    result = json.loads(before)
    result["fingerprint"]["training"]["code"]["torchdistill_adv/losses/rslad.py"] = "another"
    file.write_text(json.dumps(result))
    text = pages.page(findings_of(folder))
    assert (
        "rslad-resnet18.yaml) †" in text and "since these (seed in brackets) `torchdistill_adv/losses/rslad.py`" in text
    )
    # code that the teacher ran too
    result["fingerprint"]["training"]["teacher"]["code"]["torchdistill_adv/step.py"] = "another"
    file.write_text(json.dumps(result))
    assert "`torchdistill_adv/step.py` changed" in pages.page(findings_of(folder))
    result["teacher"]["weights"] = "of another teacher"
    file.write_text(json.dumps(result))
    assert "rslad-resnet18.yaml)" not in pages.page(findings_of(folder))
    result = json.loads(before)
    result["fingerprint"]["training"]["config"] = "another"
    file.write_text(json.dumps(result))
    text = pages.page(findings_of(folder))
    assert "rslad-resnet18.yaml)" not in text and "RSLAD: 2 of 2 seeds" in text


@pytest.mark.parametrize("name", study_names())
def test_the_committed_page_is_that_of_the_committed_results(name):
    findings = Findings.read(load_study(name), Place())
    assert (pages.PAGES / f"{name}.md").read_text() == pages.page(findings), f"python -m experiments table {name}"
    readme = pages.README.read_text()
    if findings.study.readme:
        assert pages.with_table(readme, findings) == readme


def test_the_committed_overview_is_that_of_the_committed_results():
    everything = [Findings.read(load_study(name), Place()) for name in study_names()]
    assert (pages.PAGES / "README.md").read_text() == pages.overview(everything), "python -m experiments table all"


def test_the_studies_of_the_repository_are_those_of_this_folder():
    assert HERE == ROOT / "experiments"

"""``torchdistill-adv evaluate`` on checkpoints, and the errors of its options."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixed_networks import digits, network
from support import CONFIGS
from torch import nn

from torchdistill_adv.cli import main
from torchdistill_adv.evaluation import evaluate
from torchdistill_adv.evaluation.blocks import weights_digest
from torchdistill_adv.models.small_cnn import SmallCNN
from torchdistill_adv.runner.loading import load_experiment


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The weights of a trained network as torchdistill's runner saves them."""
    path = tmp_path / "student.pt"
    torch.save({"model": network("robust").state_dict(), "args": argparse.Namespace(epoch=3), "best_value": 9.5}, path)
    return path


CONFIG = """
dependencies:
  - name: 'fixed_networks'
datasets:
  digits/test: !import_call
    key: 'torchdistill_adv.datasets.Digits'
    init:
      kwargs:
        split: 'test'
        transform: !import_call
          key: 'torchvision.transforms.Compose'
          init: {kwargs: {transforms: [!import_call {key: 'torchvision.transforms.ToTensor'}, NORMALIZE]}}
  empty: !import_call
    key: 'torch.utils.data.Subset'
    init: {args: [[], []]}
models:
  teacher_model:
    key: 'small_cnn'
    kwargs: {num_classes: 10, in_channels: 1, width: 4, depth: 2}
    src_ckpt: 'FOLDER/teacher.pt'
  student_model:
    key: 'digits_cnn'
    dst_ckpt: 'FOLDER/untrained.pt'
test:
  test_data_loader:
    dataset_id: 'digits/test'
    sampler: {class_or_func: !import_get {key: 'torch.utils.data.SequentialSampler'}}
    kwargs: {batch_size: 100, num_workers: 0}
"""


def make_config(tmp_path: Path, normalize: bool = False, dataset: str = "digits/test") -> Path:
    """A configuration whose student is the network of ``tests.fixed_networks``."""
    kind, options = ("Normalize", "{mean: [0.3], std: [0.2]}") if normalize else ("CenterCrop", "{size: 8}")
    transform = f"!import_call {{key: 'torchvision.transforms.{kind}', init: {{kwargs: {options}}}}}"
    text = CONFIG.replace("NORMALIZE", transform).replace("FOLDER", str(tmp_path))
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("dataset_id: 'digits/test'", f"dataset_id: '{dataset}'"))
    return path


def test_the_command_writes_what_the_function_finds(tmp_path: Path, checkpoint: Path) -> None:
    config = make_config(tmp_path)
    command = [sys.executable, "-m", "torchdistill_adv", "evaluate", "--config", str(config), "--ckpt", str(checkpoint)]
    options = ["--attacks", "clean,fgsm,pgd5", "--eps", "0.1,0.15", "--num_images", "100", "--seed", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "student" / "evaluation.json").read_text())
    expected = evaluate(network("robust"), digits(359), attacks="fgsm,pgd5", eps=[0.1, 0.15], num_images=100, seed=2)
    assert [r["outcomes"] for r in written["results"]] == [
        "".join("01"[outcome] for outcome in r.outcomes) for r in expected.results
    ]
    assert [(r["attack"], r["eps"]) for r in written["results"]] == [
        ("clean", 0.0),
        ("fgsm", 0.1),
        ("pgd5", 0.1),
        ("fgsm", 0.15),
        ("pgd5", 0.15),
    ]
    pgd = written["results"][-1]
    assert pgd["correct"] == pgd["outcomes"].count("1") == round(pgd["accuracy"])
    assert pgd["interval"][0] < pgd["accuracy"] < pgd["interval"][1]
    assert pgd["settings"]["num_steps"] == 5
    assert written["model"]["checkpoint"] == str(checkpoint)
    assert written["model"]["parameters"] == sum(p.numel() for p in network("robust").parameters())
    assert written["data"]["dataset"] == "digits/test"
    assert written["data"]["indices"] == expected.facts["data"]["indices"]
    assert set(written["versions"]) == {"python", "torch", "torchvision", "torchdistill_adv"}
    assert written["flags"] == []
    assert f"| pgd5 | 0.15 | {pgd['accuracy']:.2f} |" in done.stdout
    # one progress line for each block of 100 images, and no traceback
    assert "100 images: clean" in done.stderr


def test_the_radius_stays_in_pixels_under_the_normalisation_of_the_yaml(tmp_path: Path, checkpoint: Path) -> None:
    config = make_config(tmp_path, normalize=True)
    experiment = load_experiment(config, ckpt=str(checkpoint), networks=("student",))
    assert experiment.normalization == ((0.3,), (0.2,))
    out = tmp_path / "out.json"
    common = ["--config", str(config), "--ckpt", str(checkpoint), "--attacks", "pgd5", "--eps", "0.1"]
    assert main(["evaluate", *common, "--out", str(out)]) == 0
    found = json.loads(out.read_text())["results"]

    class Normalized(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return network("robust")((x - 0.3) / 0.2)

    expected = evaluate(Normalized().eval(), digits(359), attacks="pgd5", eps=0.1)
    assert found[0]["outcomes"] == "".join("01"[outcome] for outcome in expected.result("clean").outcomes)
    # rounding of (x - mean) / std can turn a sign in the search, but not many outcomes
    assert abs(found[1]["correct"] - expected.result("pgd5").correct) <= 1
    assert main(["evaluate", *common, "--out", str(out), "--mean", "0", "--std", "1"]) == 0
    assert "inputs out of range" in {flag["name"] for flag in json.loads(out.read_text())["flags"]}


def test_the_teacher_is_measured_too(tmp_path: Path) -> None:
    torch.save(SmallCNN(num_classes=10, in_channels=1, width=4, depth=2).state_dict(), tmp_path / "teacher.pt")
    common = ["--config", str(make_config(tmp_path)), "--model", "teacher", "--attacks", "clean"]
    assert main(["evaluate", *common, "--num_images", "20"]) == 0
    found = json.loads((tmp_path / "teacher" / "evaluation.json").read_text())
    assert found["model"]["who"] == "teacher"
    assert found["data"]["num_images"] == 20


def test_results_of_weights_that_came_with_a_model_do_not_go_over_those_of_the_student(tmp_path: Path) -> None:
    experiment = load_experiment(make_config(tmp_path), networks=(), normalization=((0.0,), (1.0,)))
    for source in (None, "https://example.org/teacher.pt"):
        found = dataclasses.replace(experiment, checkpoints={"teacher": source, "student": "runs/student.pt"})
        assert found.folder("teacher") == tmp_path / "untrained" / "teacher"
        assert found.folder("student") == Path("runs/student")


def test_every_option_reaches_the_evaluation(tmp_path: Path, checkpoint: Path) -> None:
    common = ["--config", str(make_config(tmp_path)), "--ckpt", str(checkpoint), "--num_images", "50"]
    options = ["--attacks", "pgd3", "--norm", "l2", "--step_size", "0.1", "--restarts", "2", "--batch_size", "30"]
    assert main(["evaluate", *common, *options]) == 0
    found = json.loads((tmp_path / "student" / "evaluation.json").read_text())
    assert (found["norm"], found["batch_size"], found["results"][1]["eps"]) == ("l2", 30, 0.5)
    assert found["results"][1]["settings"] == {
        "name": "pgd3", "kind": "pgd", "num_steps": 3, "step_size": 0.1, "restarts": 2
    }  # fmt: skip
    assert found["model"]["sha256"] == weights_digest(network("robust"))
    # two blocks, without an attack and with one
    assert len((tmp_path / "student" / "evaluation.journal.jsonl").read_text().splitlines()) == 4


def error_of(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["evaluate", *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("torchdistill-adv: error: ")
    return error


def test_bad_options_are_one_line_that_says_what_to_write(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(make_config(tmp_path))
    common = ("--config", config, "--ckpt", str(checkpoint))
    assert "did you mean 'autoattack'" in error_of(capsys, *common, "--attacks", "clean,autoatack")
    assert "so write 8/255" in error_of(capsys, *common, "--eps", "8")
    assert "eps: found 'large'" in error_of(capsys, *common, "--eps", "large")
    assert "--mean, --std: found one without the other" in error_of(capsys, *common, "--mean", "0.5")
    assert "num_images: found '0'" in error_of(capsys, *common, "--num_images", "0")

    other = error_of(capsys, "--config", str(CONFIGS / "digits/kd_tald.yaml"), "--ckpt", str(checkpoint))
    assert "--ckpt: found" in other and "0.weight" in other and "small_cnn" in other
    assert "which is no file" in error_of(capsys, "--config", config, "--ckpt", str(tmp_path / "no.pt"))
    (tmp_path / "text.pt").write_text("no checkpoint")
    assert "cannot be read as tensors" in error_of(capsys, "--config", config, "--ckpt", str(tmp_path / "text.pt"))
    missing = error_of(capsys, "--config", config)
    assert "models.student_model: found" in missing and "train first" in missing
    assert "--config: found" in error_of(capsys, "--config", str(tmp_path / "no.yaml"))
    assert "is not there" in error_of(capsys, *common, "--device", "cuda:7")


def test_results_that_cannot_be_written_are_refused_before_anything_is_measured(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("--config", str(make_config(tmp_path)), "--ckpt", str(checkpoint), "--attacks", "clean")
    refused = error_of(capsys, *common, "--out", str(tmp_path))
    assert f"--out: found the folder {tmp_path}; write a file, such as {tmp_path}/evaluation.json" in refused
    assert "which cannot be used" in error_of(capsys, *common, "--out", str(checkpoint / "out.json"))
    assert not list(tmp_path.parent.glob("*.journal.jsonl"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["evaluate", *common, "--num_images", "5", "--out", "~/new/results"]) == 0
    assert json.loads((tmp_path / "new" / "results").read_text())["data"]["num_images"] == 5


def test_an_interrupt_is_one_line(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: nn.Module, images: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(nn.Flatten, "forward", interrupt)
    assert main(["evaluate", "--config", str(make_config(tmp_path)), "--ckpt", str(checkpoint)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "torchdistill-adv: interrupted"


def test_a_data_set_without_images_is_refused(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(make_config(tmp_path, dataset="empty"))
    assert "found a data set without images" in error_of(capsys, "--config", config, "--ckpt", str(checkpoint))

"""Configurations under torchdistill's own example runner, which its wheel does not ship: hosts, robust validation.

``TORCHDISTILL_RUNNER=<torchdistill>/examples/torchvision/image_classification.py make test`` runs them, with the
library of that repository. The newest runner (July 2026) fails on hosts with auxiliary modules, with and without this
plugin; name the hosts that it can do with ``TORCHDISTILL_RUNNER_HOSTS=kd,at``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import CONFIGS

RUNNER = os.environ.get("TORCHDISTILL_RUNNER")
HOSTS = os.environ.get("TORCHDISTILL_RUNNER_HOSTS", "kd,at,crd,sskd,ft,vid,pad,kr,srd").split(",")

pytestmark = pytest.mark.skipif(
    RUNNER is None, reason="TORCHDISTILL_RUNNER does not name torchdistill's example runner"
)


@pytest.mark.parametrize("host", HOSTS)
def test_host_with_tald_trains(host, tmp_path):
    log = train(CONFIGS / "digits" / "hosts" / f"{host}.yaml", tmp_path)
    assert "bound TALDLoss" in log
    assert "[Student: " in log


def train(config, folder, *options):
    """Train with torchdistill's runner; the log."""
    runner = Path(RUNNER).resolve()
    environment = {**os.environ, "PYTHONPATH": f"{runner.parents[2]}:{CONFIGS.parent}"}
    command = [sys.executable, str(runner), "--config", str(config), "--device", "cpu", "--run_log", "run.log"]
    subprocess.run([*command, *options], check=True, cwd=folder, env=environment)
    return (folder / "run.log").read_text()


def test_robust_validation_keeps_the_best_and_the_last_student(tmp_path):
    text = (CONFIGS / "digits" / "robust" / "trades_teacher.yaml").read_text().replace("./resource/ckpt", str(tmp_path))
    config = tmp_path / "config.yaml"
    config.write_text(text.replace("num_epochs: 30", "num_epochs: 3"))
    log = train(config, tmp_path)
    found = [float(value) for value in re.findall(r"clean [\d.]+ %, robust ([\d.]+) %", log)]
    assert len(found) == 3 and "[Student: " in log
    folder = tmp_path / "digits" / "robust"
    saved = {n: torch.load(folder / f"trades_teacher-{n}.pt", weights_only=False) for n in ("best_robust", "last")}
    assert saved["best_robust"]["args"]["epoch"] == found.index(max(found))
    assert saved["last"]["args"]["epoch"] == 2 and saved["last"]["model"].keys() == saved["best_robust"]["model"].keys()
    # the runner goes on from one of these files, and the best is known again
    config.write_text(config.read_text().replace("src_ckpt:", f"src_ckpt: '{folder}/trades_teacher-last.pt'"))
    log = train(config, tmp_path, "--start_epoch", "2")
    assert f"best robust validation accuracy so far: {max(found):.2f} %" in log

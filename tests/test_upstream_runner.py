"""The host configurations under torchdistill's own example runner, which its wheel does not ship.

``TORCHDISTILL_RUNNER=<torchdistill>/examples/torchvision/image_classification.py make test`` runs them, with the
library of that repository. The newest runner (July 2026) fails on hosts with auxiliary modules, with and without this
plugin; name the hosts that it can do with ``TORCHDISTILL_RUNNER_HOSTS=kd,at``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import CONFIGS

RUNNER = os.environ.get("TORCHDISTILL_RUNNER")
HOSTS = os.environ.get("TORCHDISTILL_RUNNER_HOSTS", "kd,at,crd,sskd,ft,vid,pad,kr,srd").split(",")

pytestmark = pytest.mark.skipif(
    RUNNER is None, reason="TORCHDISTILL_RUNNER does not name torchdistill's example runner"
)


@pytest.mark.parametrize("host", HOSTS)
def test_host_with_tald_trains(host, tmp_path):
    runner = Path(RUNNER).resolve()
    config = CONFIGS / "digits" / "hosts" / f"{host}.yaml"
    environment = {**os.environ, "PYTHONPATH": f"{runner.parents[2]}:{CONFIGS.parent}"}
    command = [sys.executable, str(runner), "--config", str(config), "--device", "cpu", "--run_log", "run.log"]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    log = (tmp_path / "run.log").read_text()
    assert "bound TALDLoss" in log
    assert "[Student: " in log

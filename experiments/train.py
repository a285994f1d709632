"""Train one variant with one seed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from experiments.fingerprint import digest
from experiments.runs import Run
from torchdistill_adv.runner import run as run_config
from torchdistill_adv.runner.records import run_directory

KEPT = ("epoch", "loss", "terms", "seconds", "validation", "robust_validation")


def train(run: Run, device: str | None = None) -> dict[str, Any]:
    """The seconds of training, and what is worth keeping of the record of each epoch.

    A run that was interrupted goes on. One whose code or configuration has changed begins anew.
    """
    _forget_others(run)
    overrides = run.overrides()
    trained = run_config(
        run.config_file, seed=run.seed, device=device, student_only=True, overrides=overrides, resume=True
    )
    epochs = [{name: epoch[name] for name in KEPT if epoch.get(name) is not None} for epoch in trained["epochs"]]
    return {"seconds": sum(epoch["seconds"] for epoch in epochs), "epochs": epochs}


def checkpoints(run: Run) -> dict[str, Path]:
    """What is measured: the last epoch, and the epoch that was best under attack on the validation images."""
    return (
        {"last": run.beside("last"), "best": run.beside("best_robust")} if run.is_robust else {"last": run.checkpoint}
    )


def _forget_others(run: Run) -> None:
    """Remove what an earlier run of other code or another configuration has left, which cannot go on."""
    directory = run_directory(str(run.checkpoint))
    identity = digest([run.config_file.read_text(encoding="utf-8"), {k: str(v) for k, v in run.overrides().items()}])
    now = json.dumps({**run.fingerprint()["training"], "identity": identity}, indent=1)
    kept = directory / "fingerprint.json"
    if directory.exists() and not (kept.exists() and kept.read_text(encoding="utf-8") == now):
        shutil.rmtree(directory)
        for name in (run.checkpoint, run.beside("last"), run.beside("best_robust")):
            name.unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    kept.write_text(now, encoding="utf-8")

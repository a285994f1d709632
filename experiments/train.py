"""Train one variant with one seed, and measure its student."""

from __future__ import annotations

import json
import shutil
from typing import Any

from experiments.measure import load_network, measure
from experiments.runs import Run
from torchdistill_adv.evaluation.blocks import weights_digest
from torchdistill_adv.runner import run as train_config
from torchdistill_adv.runner.records import run_directory

KEPT = ("epoch", "loss", "terms", "seconds", "validation", "robust_validation")


def train_and_measure(run: Run, device: str | None = None) -> dict[str, Any]:
    """What a run finds: seconds, validation, and the test of its last and its best checkpoint.

    A run that was interrupted goes on. One whose code or configuration has changed begins anew.
    """
    _forget_others(run)
    overrides = run.overrides()
    trained = train_config(
        run.config_file, seed=run.seed, device=device, student_only=True, overrides=overrides, resume=True
    )
    epochs = trained["epochs"]
    checkpoints = (
        {"last": run.beside("last"), "best": run.best_checkpoint} if run.is_robust else {"last": run.checkpoint}
    )
    measured: dict[str, Any] = {}
    weights: dict[str, str] = {}
    for which, checkpoint in checkpoints.items():
        network = load_network(run, checkpoint)
        weights[which] = weights_digest(network)
        same = next((other for other in measured if weights[other] == weights[which]), None)
        measured[which] = measured[same] if same else measure(run, network, device)
    return {
        "seconds": sum(epoch["seconds"] for epoch in epochs),
        "epochs": [_kept(epoch) for epoch in epochs],
        "weights": weights,
        "measured": measured,
    }


def _forget_others(run: Run) -> None:
    """Remove what an earlier run of other code or another configuration has left."""
    directory, now = run_directory(str(run.checkpoint)), json.dumps(run.fingerprint()["training"], indent=1)
    kept = directory / "fingerprint.json"
    if directory.exists() and not (kept.exists() and kept.read_text(encoding="utf-8") == now):
        shutil.rmtree(directory)
        for name in (run.checkpoint, run.beside("last"), run.beside("best_robust")):
            name.unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    kept.write_text(now, encoding="utf-8")


def _kept(epoch: dict[str, Any]) -> dict[str, Any]:
    """What is worth keeping of an epoch's record."""
    return {name: epoch[name] for name in KEPT if epoch.get(name) is not None}

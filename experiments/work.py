"""Perform a run, and write its result with everything that is needed to repeat it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from experiments.data import Images
from experiments.measure import measure_all
from experiments.particles import search_and_measure
from experiments.runs import Run
from experiments.study import ROOT
from experiments.train import checkpoints, train
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.evaluation.autoattack import LIBRARIES
from torchdistill_adv.evaluation.results import write_json
from torchdistill_adv.runner.records import run_directory

PACKAGES = ("torch", "torchvision", "torchdistill", "timm", *LIBRARIES)


def perform(run: Run, device: str | None = None) -> bool:
    """Do a run, unless its result is there or another process is at it.

    Returns:
        Whether the result is there now.
    """
    lock = run.checkpoint.with_suffix(".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            if not run.is_done:
                _perform(run, device)
            return True
    except Timeout:
        return False


def _perform(run: Run, device: str | None) -> None:
    teacher = run.teacher and run.teacher.result()
    if run.teacher is not None and not run.teacher.is_done:
        raise ConfigError("has no result of the code and configuration of now; run it first", run.teacher.name)
    fingerprint = run.fingerprint()
    commit = git_state(run, fingerprint)
    started = time.time()
    if run.variant.search is not None:
        found = search_and_measure(run, device)
    else:
        found = train(run, device)
        _forget_other_outcomes(run, fingerprint)
        found |= measure_all(run, checkpoints(run), device)
    result = {
        "setting": run.setting.name,
        "variant": run.variant.name,
        "seed": run.seed,
        "size": run.place.size,
        "config": f"configs/{run.variant.config}.yaml" if run.variant.config else None,
        "overrides": _shown(run),
        "images": {**run.images(), "sha256": {s: Images(split=s, **run.images()).digest for s in ("train", "test")}},
        "teacher": {"name": run.variant.teacher, "weights": teacher["weights"]["taught"]} if teacher else None,
        **commit,
        "machine": machine(device),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "wall_seconds": time.time() - started,
        "fingerprint": fingerprint,
        **found,
    }
    write_json(result, run.result_file)


def _forget_other_outcomes(run: Run, fingerprint: Mapping[str, Any]) -> None:
    """Remove the journal of an evaluation that was interrupted and had other code or other measures."""
    directory = run_directory(str(run.checkpoint))
    now = json.dumps(fingerprint["measures"], indent=1)
    kept = directory / "measures.json"
    if not (kept.exists() and kept.read_text(encoding="utf-8") == now):
        (directory / "evaluation.jsonl").unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    kept.write_text(now, encoding="utf-8")


def _shown(run: Run) -> dict[str, Any]:
    """The overrides, without the folders of this machine."""
    if run.variant.search is not None:
        return {"search": dict(run.variant.search)}
    found = run.overrides()
    folders = str(run.place.state), str(run.place.results)
    return {
        path: Path(value).name if isinstance(value, str) and value.startswith(folders) else value
        for path, value in found.items()
        if path != "train.robust_validation"
    }


def git_state(run: Run, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """The commit, and whether the files that the result depends on differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    files = [file for part in fingerprint.values() for file in part.get("code", ())]
    files += [str(run.config_file)] if run.variant.config else []
    return {"commit": git("rev-parse", "HEAD") or None, "changed": bool(git("status", "--porcelain", "--", *files))}


def machine(device: str | None) -> dict[str, Any]:
    """What the run ran on."""
    is_cuda = torch.cuda.is_available() if device is None else device.startswith("cuda")
    cpu = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
        if cpu.exists()
        else []
    )
    return {
        "device": torch.cuda.get_device_name() if is_cuda else "cpu",
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES if find_spec(name)},
    }

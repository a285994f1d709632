"""How long the variants of a study train, in proportion to one another."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.fingerprint import differing
from experiments.runs import Place, Run, runs_of
from experiments.study import Study
from experiments.work import git_state, machine
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.evaluation.results import write_json
from torchdistill_adv.runner import run as run_config

NUM_TRAIN = 640


def times_file(study: Study, place: Place) -> Path:
    """Where the times of a study are."""
    return place.results / "times" / f"{study.name}-{place.size}-{place.source}.json"


def read_times(study: Study, place: Place) -> dict[str, Any]:
    """What :func:`time_study` has written; nothing if it has not."""
    file = times_file(study, place)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def outdated_times(times: Mapping[str, Any], study: Study, place: Place) -> dict[str, list[str]]:
    """What has changed since the variants were timed, by variant; nothing of those that would train as they did."""
    then = times.get("fingerprint", {})
    runs = {run.variant.name: run for run in first_runs(study, place) if run.variant.name in then}
    found = {name: differing(then[name], run.fingerprint()["training"]) for name, run in runs.items()}
    return {name: differs for name, differs in found.items() if differs}


def relative_times(times: Mapping[str, Any], name: str, reference: str) -> dict[int, float]:
    """The time of a variant in that of another one, by round."""
    seconds = times.get("seconds", {})
    if name not in seconds or reference not in seconds:
        return {}
    return {i: own / other for i, (own, other) in enumerate(zip(seconds[name], seconds[reference], strict=True))}


def time_study(study: Study, place: Place, rounds: int, device: str | None = None) -> Path:
    """Train all variants in turn, several rounds, on few images and without validation; write the seconds of each.

    All epochs of the schedule are run, as a search may have fewer steps in the first ones. The machine should have
    nothing else to do, and even so only ratios within a round mean anything.

    Args:
        study: the study.
        place: of its teachers, and of the file that is written.
        rounds: how often each is trained; a training of the first variant before them does not count.
        device: of training.

    Raises:
        ConfigError: a teacher that was not trained yet.
    """
    runs = first_runs(study, place)
    fingerprints = [run.fingerprint() for run in runs]
    for run in runs:
        if run.teacher is not None and not run.teacher.is_done:
            raise ConfigError("was not trained yet; run the study first", run.teacher.name)
    seconds: dict[str, list[float]] = {run.variant.name: [] for run in runs}
    for number, run in enumerate([runs[0], *rounds * runs]):
        taken = _train_briefly(run, device)
        if number:
            seconds[run.variant.name].append(taken)
            print(f"{run.variant.name}: {taken:.1f} s", flush=True)
    state = [git_state(*each) for each in zip(runs, fingerprints, strict=True)]
    found = {
        "study": study.name,
        "num_train": NUM_TRAIN,
        "seconds": seconds,
        "commit": state[0]["commit"],
        "changed": any(each["changed"] for each in state),
        "machine": machine(device),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "fingerprint": {run.variant.name: each["training"] for run, each in zip(runs, fingerprints, strict=True)},
    }
    file = times_file(study, place)
    write_json(found, file)
    return file


def first_runs(study: Study, place: Place) -> list[Run]:
    """Those of the first seed."""
    return [run for run in runs_of(study, place) if run.seed == 0]


def _train_briefly(run: Run, device: str | None) -> float:
    """Seconds of training."""
    size = replace(run.size, images={**run.size.images, "num_train": NUM_TRAIN})
    setting = replace(run.setting, sizes={**run.setting.sizes, run.place.size: size})
    with tempfile.TemporaryDirectory() as folder:
        brief = Run(setting, run.variant, run.seed, replace(run.place, state=Path(folder)))
        overrides = {**brief.overrides(), "train.val_data_loader": {}}
        if brief.is_robust:
            overrides["train.robust_validation"] = {}
        trained = run_config(run.config_file, seed=run.seed, device=device, student_only=True, overrides=overrides)
    return sum(epoch["seconds"] for epoch in trained["epochs"])

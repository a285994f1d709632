"""Run directories, read back: what a run was, how its training went, and what was measured on it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torchdistill_adv
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.runner.check import student_name
from torchdistill_adv.runner.config import plain_config
from torchdistill_adv.runner.records import MEASURED, METRICS, RUN

Json = Mapping[str, Any]

# a directory with one of them is a run
RECORDS = (METRICS, RUN, *MEASURED)


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        directory: where its records are.
        name: of the directory, with as many of those above it as tell it from the other runs.
        config: its YAML with the overrides, as plain mappings; None where it is not known.
        config_file: where that YAML is; of a folder that training did not write, the one that was evaluated.
        checkpoint: the student's weights, which stand beside the directory, or else where they were evaluated.
        facts: ``command``, ``seed``, ``device``, ``overrides`` and ``versions``, as far as they were recorded.
        epochs: the record of every epoch; where a run went on from an earlier one, the later record.
        test: accuracies on the test set; None for a run that has not ended.
        evaluation: ``evaluation.json``, if there is one.
        similarity: ``similarity.json``, if there is one.
    """

    directory: Path
    name: str
    config: Json | None
    config_file: Path | None
    checkpoint: Path | None
    facts: Json
    epochs: Sequence[Json]
    test: Json | None
    evaluation: Json | None
    similarity: Json | None

    @property
    def was_trained(self) -> bool:
        """Whether training wrote its configuration; others have the records of ``evaluate`` and ``metrics`` alone."""
        return self.config_file is not None and self.config_file.parent == self.directory


@dataclass(frozen=True)
class Method:
    """Runs of one configuration, which differ in their seed only."""

    name: str
    runs: Sequence[Run]


def read_runs(directories: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """The runs of some directories, with names apart.

    Raises:
        ConfigError: one is no directory of a run, or holds a file that cannot be read.
    """
    paths = list({Path(directory).resolve(): Path(directory) for directory in directories}.values())
    if not paths:
        raise ConfigError("found none; write the directory of at least one run", "RUN")
    return [_read_run(path, name) for path, name in zip(paths, names_apart(paths), strict=True)]


def names_apart(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many parts as all of them need to differ."""
    parts = [path.resolve().parts[1:] or ("/",) for path in paths]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(each) for each in parts]


def _read_run(directory: Path, name: str) -> Run:
    if not directory.is_dir():
        sibling = directory.with_suffix("")
        hint = f"write the run's directory '{sibling}'" if sibling.is_dir() else "write the directory of a run"
        raise ConfigError(f"found {'a file' if directory.exists() else 'nothing'} there; {hint}", str(directory))
    if not _is_run(directory):
        inside = sorted(child.name for child in directory.iterdir())
        runs = [child for child in inside if _is_run(directory / child)]
        there = f"runs are in it: {', '.join(runs)}" if runs else f"in it: {', '.join(inside[:10]) or 'nothing'}"
        raise ConfigError(f"has none of {', '.join(RECORDS)}; {there}. Write the directory of a run", str(directory))
    records = list(_read_lines(directory / METRICS)) if (directory / METRICS).is_file() else []
    facts = _read_json(directory / RUN) or {}
    epochs = {record["epoch"]: record for record in records if "epoch" in record}
    for record in epochs.values():
        _check_entries(record, EPOCH, directory / METRICS, "train")
    evaluation = _checked(directory / "evaluation.json", EVALUATION, "evaluate")
    return Run(
        directory,
        name,
        *_trained(directory, facts.get("overrides") or {}, (evaluation or {}).get("model") or {}),
        facts,
        [epochs[number] for number in sorted(epochs)],
        next((record["test"] for record in reversed(records) if "test" in record), None),
        evaluation,
        _checked(directory / "similarity.json", SIMILARITY, "metrics"),
    )


def _trained(directory: Path, overrides: Json, evaluated: Json) -> tuple[Json | None, Path | None, Path | None]:
    """Configuration, its file and the student's checkpoint, of the run itself or of the model that was evaluated."""
    file = directory / "config.yaml"
    if file.is_file():
        config = _read_config(file, overrides)
        trained = str((config["models"].get(student_name(config["models"])) or {}).get("dst_ckpt", ""))
        return config, file, directory.with_name(directory.name + Path(trained).suffix)
    config_file, checkpoint = (evaluated.get(entry) and Path(evaluated[entry]) for entry in ("config", "checkpoint"))
    if evaluated.get("who") != "student" or config_file is None or not config_file.is_file():
        return None, None, checkpoint
    return _read_config(config_file, evaluated.get("overrides") or {}), config_file, checkpoint


def _is_run(directory: Path) -> bool:
    return any((directory / name).is_file() for name in RECORDS)


def _read_lines(path: Path) -> Iterator[Json]:
    """Every record of a file with a record a line; the last line may be cut off, as a killed run leaves it."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        record = _parsed(line)
        if isinstance(record, Mapping):
            yield record
        elif number < len(lines):
            raise ConfigError(f"line {number} is no record: {line[:60]!r}; remove it", str(path))


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _read_json(path: Path) -> Json | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"is no JSON: {error}; remove it, or write it again", str(path)) from error
    if not isinstance(found, Mapping):
        raise ConfigError(f"found {type(found).__name__}, not an object; remove it, or write it again", str(path))
    return found


# entries that the report reads, and those of a block or of every item of a list
EPOCH: Mapping[str, Sequence[str]] = {"stage": (), "loss": (), "terms": ()}
EVALUATION: Mapping[str, Sequence[str]] = {
    "data": (),
    "norm": (),
    "results": ("attack", "settings", "eps", "num_images", "accuracy", "interval", "seconds", "gradient_evaluations"),
    "worst_case": ("eps", "accuracy", "interval"),
    "flags": ("name", "message"),
}
SIMILARITY: Mapping[str, Sequence[str]] = {
    "data": ("num_images", "of", "dataset"),
    "similarity": ("num_right", "flipped", "num_compared", "magsim", "angsim", "definition"),
    "diversity": ("definition", "settings", "num_images", "results"),
    "agreement": ("definition", "settings", "clean", "student", "teacher"),
}


def _checked(path: Path, entries: Mapping[str, Sequence[str]], command: str) -> Json | None:
    """A file that a command wrote, if it is there, with all ``entries``: one of another version may lack some.

    Raises:
        ConfigError: it lacks one.
    """
    found = _read_json(path)
    if found is not None:
        _check_entries(found, entries, path, command)
    return found


def _check_entries(found: Json, entries: Mapping[str, Sequence[str]], path: Path, command: str) -> None:
    for name, inner in entries.items():
        value = found.get(name)
        blocks = value if isinstance(value, list) else [value or {}]
        lacking = [f"{name}.{entry}" for block in blocks for entry in inner if entry not in block]
        if name not in found or lacking:
            theirs = (found.get("versions") or {}).get("torchdistill_adv", "unknown")
            raise ConfigError(
                f"has no entry '{(lacking or [name])[0]}': it is of version {theirs} of torchdistill_adv, and this is "
                f"{torchdistill_adv.__version__}; run torchdistill-adv {command} again",
                str(path),
            )


def _read_config(path: Path, overrides: Json) -> Json:
    config = plain_config(path, overrides)
    if not isinstance(config, dict) or not isinstance(config.get("models"), dict):
        raise ConfigError("is no configuration of a run: it has no section models", str(path))
    plain: Json = json.loads(json.dumps(config, default=str))
    return plain


def without(value: Any, *names: str) -> Any:
    """A copy of plain YAML without the entries of some names, at any depth."""
    if isinstance(value, Mapping):
        return {key: without(item, *names) for key, item in value.items() if key not in names}
    return [without(item, *names) for item in value] if isinstance(value, list) else value


def group(runs: Sequence[Run]) -> list[Method]:
    """Runs by configuration, in the order of the first of each; where a run writes its checkpoint does not count."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        # weights that training did not leave under the run's own name stand for themselves
        plain = json.dumps(without(run.config, "dst_ckpt", "ckpt"), sort_keys=True)
        same = plain if run.was_trained else str(run.directory)
        found.setdefault(same, []).append(run)
    names = [_method_name(group) for group in found.values()]
    return [
        Method(name if names.count(name) == 1 else f"{name} ({group[0].name})", group)
        for name, group in zip(names, found.values(), strict=True)
    ]


def _method_name(runs: Sequence[Run]) -> str:
    """``adaad`` for the runs adaad-0 and adaad-1, or for adaad/seed0 and adaad/seed1."""
    first = runs[0].name
    return first if len(runs) == 1 else re.sub(r"[-_./ ]*(seed)?[-_./ ]*\d*$", "", first) or first

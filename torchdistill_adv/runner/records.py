"""What a run leaves next to its checkpoint: the configuration, how it was run, one line of JSON for every epoch."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torchdistill
import yaml
from torchdistill.common.main_util import is_main_process

import torchdistill_adv
from torchdistill_adv.errors import ConfigError

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
RUN = "run.json"
MEASURED = ("evaluation.json", "similarity.json")


def run_directory(dst_ckpt: str) -> Path:
    """The directory of a run: the path of its checkpoint without the extension."""
    return Path(dst_ckpt).with_suffix("")


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], place: str) -> Iterator[None]:
    """An error of the disk inside is told of ``path``, which the YAML has at ``place``.

    Raises:
        ConfigError: nothing can be written.
    """
    try:
        yield
    except OSError as error:
        found = f"found '{path}', where nothing can be written: {error.strerror or error}"
        raise ConfigError(found, place) from error


def start_records(directory: Path, text: str, keep: bool, **facts: Any) -> None:
    """Write how the run was started: ``run.json``, and ``config.yaml`` with the same as comments before its YAML.

    What was measured of the checkpoint that the run is about to replace is removed.

    Args:
        directory: of the run.
        text: the YAML.
        keep: whether ``metrics.jsonl`` goes on, or begins anew.
        facts: more of how it was started; None where it was not given.
    """
    if not keep:
        (directory / METRICS).unlink(missing_ok=True)
    for name in MEASURED:
        (directory / name).unlink(missing_ok=True)
    versions = {module.__name__: module.__version__ for module in (torch, torchdistill, torchdistill_adv)}
    started = {"command": shlex.join(sys.argv), **facts}
    comments = {name: value for name, value in {**started, **versions}.items() if value not in (None, False, {})}
    header = [f"# {name}: {value}" for name, value in comments.items()]
    (directory / "config.yaml").write_text("\n".join([*header, "", text]), encoding="utf-8")
    run = json.dumps({**started, "versions": versions}, default=repr, indent=1)
    (directory / RUN).write_text(run, encoding="utf-8")


def keep_records(directory: Path, epoch: int) -> list[dict[str, Any]]:
    """Leave in ``metrics.jsonl`` the epochs before ``epoch``, and return their records.

    A run that goes on writes the others again.
    """
    file = directory / METRICS
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        # the last line of a run that was killed may be cut
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and record.get("epoch", epoch) < epoch:
                kept.append(record)
    if is_main_process():
        part = file.with_name(f"{METRICS}.part")
        part.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        part.replace(file)
    return kept


def append_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Add a line to ``metrics.jsonl``; the file is closed again, so a killed run leaves whole lines.

    Where nothing can be written, the log has the line, and training is not lost for it.
    """
    line = json.dumps(record)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / METRICS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        logger.error("%s; not written: %s", error, line)


def as_yaml(config: Mapping[str, Any]) -> str:
    """A configuration that came as a dictionary; objects stand as their names, so it cannot be run again."""
    text: str = yaml.safe_dump(without_objects(config), sort_keys=False)
    return text


def without_objects(value: Any) -> Any:
    """``value`` with every object in it as its name."""
    if isinstance(value, Mapping):
        return {key: without_objects(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_objects(item) for item in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    # the address of an object is another one in every run
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))

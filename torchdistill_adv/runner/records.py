"""What a run leaves next to its checkpoint: the configuration, how it was run, one line of JSON for every epoch."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchdistill
import yaml

import torchdistill_adv

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
RUN = "run.json"
MEASURED = ("evaluation.json", "similarity.json")


def run_directory(dst_ckpt: str) -> Path:
    """The directory of a run: the path of its checkpoint without the extension."""
    return Path(dst_ckpt).with_suffix("")


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
    comments = {name: value for name, value in {**started, **versions}.items() if value not in (None, {})}
    header = [f"# {name}: {value}" for name, value in comments.items()]
    (directory / "config.yaml").write_text("\n".join([*header, "", text]), encoding="utf-8")
    run = json.dumps({**started, "versions": versions}, default=repr, indent=1)
    (directory / RUN).write_text(run, encoding="utf-8")


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
    text: str = yaml.safe_dump(_plain(config), sort_keys=False)
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float)) else repr(value)

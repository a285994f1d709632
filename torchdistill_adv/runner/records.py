"""What a run leaves next to its checkpoint: the configuration that ran, and one line of JSON for every epoch."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchdistill
import yaml

import torchdistill_adv

METRICS = "metrics.jsonl"


def run_directory(dst_ckpt: str) -> Path:
    """The directory of a run: the path of its checkpoint without the extension."""
    return Path(dst_ckpt).with_suffix("")


def start_records(directory: Path, text: str, keep: bool, **facts: Any) -> None:
    """Write ``config.yaml``: how the run was started, as comments, and its YAML.

    Args:
        directory: of the run.
        text: the YAML.
        keep: whether ``metrics.jsonl`` goes on, or begins anew.
        facts: more for the comments.
    """
    if not keep:
        (directory / METRICS).unlink(missing_ok=True)
    versions = {module.__name__: module.__version__ for module in (torch, torchdistill, torchdistill_adv)}
    given = {name: value for name, value in facts.items() if value is not None}
    comments = {"command": shlex.join(sys.argv), **given, **versions}
    header = [f"# {name}: {value}" for name, value in comments.items()]
    (directory / "config.yaml").write_text("\n".join([*header, "", text]), encoding="utf-8")


def append_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Add a line to ``metrics.jsonl``; the file is closed again, so a killed run leaves whole lines."""
    with (directory / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


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

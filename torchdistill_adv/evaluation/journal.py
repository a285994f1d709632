"""What an evaluation has done already, one line of JSON for each block of images and attack."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchdistill_adv.errors import ConfigError
from torchdistill_adv.evaluation.results import usable

Record = dict[str, Any]

# of every line
START = b'{"key": "'


class Journal:
    """Records by key, in a file that a killed process leaves usable.

    Args:
        path: the file; None keeps the records in memory only.

    Raises:
        ConfigError: the file is of something else, or cannot be read or written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        if path is None:
            return
        with usable(path, "journal"):
            if not path.exists():
                return
            *lines, last = path.read_bytes().split(b"\n")
            for number, line in enumerate(lines, 1):
                record = _read(line)
                if record is None:
                    raise _other(path, number)
                self.records[record["key"]] = record
            if not (last.startswith(START) or START.startswith(last)):
                raise _other(path, len(lines) + 1)
            if last:
                # the line that was being written when the process was killed
                os.truncate(path, path.stat().st_size - len(last))

    def get(self, key: str) -> Record | None:
        return self.records.get(key)

    def add(self, key: str, record: Mapping[str, Any]) -> Record:
        """Keep a record, on disk before this returns."""
        kept = self.records[key] = {"key": key, **record}
        if self.path is not None:
            with usable(self.path, "journal"):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                line = json.dumps(kept).encode() + b"\n"
                # in one piece, so that two processes with one journal do not mix their lines
                with self.path.open("ab", buffering=len(line) + 1) as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
        return kept


def _read(line: bytes) -> Record | None:
    """The record of a line; None where it has none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "key" in record else None


def _other(path: Path, line: int) -> ConfigError:
    found = f"found {path}, whose line {line} is no record of an evaluation"
    return ConfigError(f"{found}; write another path, or remove the file", "journal")

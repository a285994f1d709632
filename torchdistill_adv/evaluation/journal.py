"""What an evaluation has done already, one line of JSON for each block of images and attack."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Journal:
    """Records by key, in a file that a killed process leaves usable.

    Args:
        path: the file; None keeps the records in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        if path is not None and path.exists():
            whole = 0
            for line in path.read_bytes().splitlines(keepends=True):
                record = _read(line)
                if record is None:
                    break
                whole += len(line)
                self.records[record["key"]] = record
            # the line that was being written when the process was killed
            os.truncate(path, whole)

    def get(self, key: str) -> Record | None:
        return self.records.get(key)

    def add(self, key: str, record: Mapping[str, Any]) -> Record:
        """Keep a record, on disk before this returns."""
        kept = self.records[key] = {"key": key, **record}
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(kept) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return kept


def _read(line: bytes) -> Record | None:
    """The record of a line; None for one that was not written to its end."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if line.endswith(b"\n") and isinstance(record, dict) and "key" in record else None

"""Where in a YAML file an object stands that could not be made."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from torchdistill_adv.errors import ConfigError

MISSING_DATA = (
    "; write the folder that has the data as its root, or, where there is a network, download: True if this data set "
    "has that option"
)


def locate(error: ConfigError, file: str | os.PathLike[str]) -> ConfigError:
    """The error of a YAML file that could not be loaded, with the path of the block that raised it.

    Args:
        error: of :func:`~torchdistill_adv.runner.config.load_config`.
        file: the YAML file.

    Returns:
        ``error`` itself, where it is of something else than an object of the YAML.
    """
    cause = error.__cause__
    mark = None if cause is None or isinstance(cause, yaml.YAMLError) else _mark(cause.__traceback__, file)
    if mark is None:
        return error
    document = yaml.compose(Path(file).expanduser().read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    assert document is not None
    path = next(path for path, node in _nodes(document, "") if _place(node.start_mark) == mark)
    section, _, inner = path.partition(".")
    is_dataset = section == "datasets" and "." not in inner
    advice = MISSING_DATA if is_dataset and isinstance(cause, (OSError, RuntimeError)) else ""
    if isinstance(cause, ConfigError):
        return ConfigError(str(cause), path)
    return ConfigError(f"cannot be made: {type(cause).__name__}: {cause}{advice}", path)


def _mark(trace: TracebackType | None, file: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Line and column of the innermost node of the file that was being made; overrides are of no file."""
    nodes = [frame.f_locals.get("node") for frame, _ in traceback.walk_tb(trace)]
    marks = [node.start_mark for node in nodes if isinstance(node, yaml.Node) and node.start_mark is not None]
    own = [_place(mark) for mark in marks if mark.name == str(Path(file).expanduser())]
    return own[-1] if own else None


def _place(mark: Any) -> tuple[int, int]:
    return mark.line, mark.column


def _nodes(node: yaml.Node, path: str) -> Iterator[tuple[str, yaml.Node]]:
    """Every node of a document with its dotted path."""
    yield path, node
    children: list[tuple[str, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(str(key.value), value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(str(number), item) for number, item in enumerate(node.value)]
    for name, child in children:
        yield from _nodes(child, f"{path}.{name}".removeprefix("."))

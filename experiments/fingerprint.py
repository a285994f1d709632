"""What the result of a run depends on, as digests: a result of other code or another configuration is told apart."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import io
import json
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torchvision  # noqa: F401  (the registries of torchdistill look for it)
from torchdistill.core.interfaces import registry as processes
from torchdistill.datasets import registry as datasets
from torchdistill.losses import registry as losses
from torchdistill.models import registry as models

import experiments.networks  # noqa: F401
import torchdistill_adv  # noqa: F401  (they register what configurations name)
from torchdistill_adv.objectives import OBJECTIVES
from torchdistill_adv.registry import ADVERSARIES

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torchdistill_adv", "experiments")
# they decide how a run is kept, resumed and shown, not what it computes, which the tests hold them to
LEFT_OUT = (
    *("torchdistill_adv.runner", "torchdistill_adv.yaml"),
    *("experiments.runs", "experiments.study", "experiments.fingerprint"),
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
REGISTRIES: tuple[Mapping[str, Any], ...] = (
    losses.MIDDLE_LEVEL_LOSS_DICT,
    losses.LOW_LEVEL_LOSS_DICT,
    losses.LOSS_WRAPPER_DICT,
    models.MODEL_DICT,
    models.AUXILIARY_MODEL_WRAPPER_DICT,
    datasets.DATASET_WRAPPER_DICT,
    processes.PRE_EPOCH_PROC_FUNC_DICT,
    processes.POST_EPOCH_PROC_FUNC_DICT,
    processes.FORWARD_PROC_FUNC_DICT,
)


def digest(value: Any) -> str:
    """Of anything that JSON has, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()[:16]


def code_digests(modules: Iterable[str]) -> dict[str, str]:
    """Digest of every module of ours that ``modules`` are or import, by file; comments and docstrings do not count."""
    found: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        file = _file(name)
        if file not in found:
            found[file] = _source_digest(name)
            waiting += [other for other in imports(name) if not other.startswith(LEFT_OUT)]
    return dict(sorted(found.items()))


def modules_of(config: Any) -> Iterator[str]:
    """Modules of ours that define what a configuration names."""
    for text in _texts(config):
        entries = [registry[text] for registry in REGISTRIES if text in registry]
        entries += [registry[text] for registry in (ADVERSARIES, OBJECTIVES) if text in set(registry)]
        for entry in entries:
            yield from _module_of(entry)
            yield from modules_of(dict(getattr(entry, "defaults", {})))
        module, _, attribute = text.rpartition(".")
        if attribute and module.startswith(PACKAGES):
            yield from _module_of(getattr(importlib.import_module(module), attribute, None))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _module_of(entry: Any) -> list[str]:
    name = getattr(entry, "__module__", None) or ""
    return [name] if name.startswith(PACKAGES) else []


@functools.cache
def imports(name: str) -> tuple[str, ...]:
    """Modules of ours that a module imports, those that define the names where it imports from a package."""
    found: list[str] = []
    for node in _imports_of(_tree(name)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
            continue
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            if _is_module(inner):
                found.append(inner)
            elif (node.module or "").startswith(PACKAGES):
                entry = getattr(importlib.import_module(node.module or ""), alias.name, None)
                found += _module_of(entry) or [node.module or ""]
    # the package itself is imported to register everything
    return tuple(dict.fromkeys(each for each in found if each.startswith(PACKAGES) and each not in PACKAGES))


def _imports_of(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        yield from _imports_of(child)


@functools.cache
def _is_module(name: str) -> bool:
    if not name.startswith(PACKAGES):
        return False
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@functools.cache
def _path(name: str) -> Path:
    module = sys.modules.get(name) or importlib.import_module(name)
    return Path(str(module.__file__))


def _file(name: str) -> str:
    """Path from the package's parent: the same wherever it is installed."""
    path = _path(name)
    return str(Path(*path.parts[-1 - len(name.split(".")) + (path.name != "__init__.py") :]))


@functools.cache
def _tree(name: str) -> ast.Module:
    return ast.parse(_path(name).read_text(encoding="utf-8"))


@functools.cache
def _source_digest(name: str) -> str:
    return hashlib.sha256(code_of(_path(name).read_text(encoding="utf-8")).encode()).hexdigest()[:12]


def code_of(source: str) -> str:
    """A module's text without comments, docstrings and blank lines."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            statement = node.body[0]
            for row in range(statement.lineno - 1, statement.end_lineno or statement.lineno):
                lines[row] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


def differing(old: Any, new: Any, name: str = "") -> list[str]:
    """What two fingerprints differ in: names of their parts, and files of the code."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return [] if old == new else [name]
    found = [part for key in sorted(old.keys() | new.keys()) for part in differing(old.get(key), new.get(key), key)]
    return list(dict.fromkeys(found))


def is_code(differs: Iterable[str]) -> bool:
    """Whether what fingerprints differ in is code alone: the configuration that was asked for is the same."""
    return all(name.endswith(".py") for name in differs)

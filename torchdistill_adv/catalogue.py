"""What this package offers to a YAML, by name: losses, adversaries, objectives, models and configurations."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from torchdistill.losses.registry import LOSS_WRAPPER_DICT, MIDDLE_LEVEL_LOSS_DICT
from torchdistill.models.registry import MODEL_DICT

import torchdistill_adv
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.objectives import OBJECTIVES
from torchdistill_adv.registry import ADVERSARIES

# below the folder that holds share/ wherever pip installs
INSTALLED = "share/torchdistill-adv/configs/"

Entries = Mapping[str, str]


def losses() -> Entries:
    """The losses and wrappers of this package by their YAML key, each with the first sentence of its docstring."""
    return _described(_ours({**MIDDLE_LEVEL_LOSS_DICT, **LOSS_WRAPPER_DICT}))


def adversaries() -> Entries:
    """The registered searches, likewise."""
    return _described({name: ADVERSARIES[name] for name in ADVERSARIES})


def objectives() -> Entries:
    """The registered objectives, likewise."""
    return _described({name: OBJECTIVES[name].function for name in OBJECTIVES})


def models() -> Entries:
    """The models of this package, likewise."""
    return _described(_ours(MODEL_DICT))


def configs() -> Entries:
    """The configurations that come with this package, by path, each with its first line of comment."""
    found = {_shown(file): _first_comment(file) for file in config_files()}
    return dict(sorted(found.items()))


def config_files() -> list[Path]:
    """The YAML files of this package: those of the checkout that it runs from, or those that pip installed.

    Raises:
        ConfigError: there are none.
    """
    checkout = Path(torchdistill_adv.__file__).resolve().parents[1]
    if (checkout / "setup.cfg").is_file():
        return sorted((checkout / "configs").rglob("*.yaml"))
    installed = metadata.files("torchdistill-adv") or []
    found = [Path(str(file.locate())).resolve() for file in installed if INSTALLED in file.as_posix()]
    if not found:
        raise ConfigError("no configurations are installed; install torchdistill-adv again, with pip", "configs")
    return sorted(file for file in found if file.suffix == ".yaml")


KINDS: Mapping[str, Callable[[], Entries]] = {
    "losses": losses,
    "adversaries": adversaries,
    "objectives": objectives,
    "models": models,
    "configs": configs,
}


def listing(kinds: Sequence[str], width: int | None = None) -> str:
    """Names and descriptions in two columns, with a heading for each of several kinds.

    Args:
        kinds: of :data:`KINDS`.
        width: characters that a line is cut to, though no name is; None leaves it whole.
    """
    blocks = []
    for kind in kinds:
        entries = KINDS[kind]()
        longest = max(map(len, entries))
        room = None if width is None else width - longest - 2
        lines = [f"{name.ljust(longest)}  {_cut(text, room)}".rstrip() for name, text in entries.items()]
        blocks.append("\n".join([f"{kind}:", *lines] if len(kinds) > 1 else lines))
    return "\n\n".join(blocks)


def _cut(text: str, room: int | None) -> str:
    return text if room is None or len(text) <= room else f"{text[: room - 1]}…" if room > 1 else ""


def _ours(registry: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entries that this package registered."""
    package = torchdistill_adv.__name__
    return {name: entry for name, entry in registry.items() if entry.__module__.split(".")[0] == package}


def _described(entries: Mapping[str, Any]) -> Entries:
    # a class without a docstring of its own would have that of its base
    return {name: first_sentence(inspect.cleandoc(entries[name].__doc__ or "")) for name in sorted(entries)}


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring, without the marks of reStructuredText."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    plain = re.sub(r":\w+:`~?(?:[^`]*\.)?([^`]*)`|``(.*?)``|\*\*(.*?)\*\*", lambda m: m[1] or m[2] or m[3], paragraph)
    # no sentence begins with a digit: Eq. 3
    return re.split(r"(?<=\.) (?=[A-Z])", plain)[0]


def _shown(file: Path) -> str:
    """The path as it is typed: from the working directory where the file is below it."""
    here = Path.cwd()
    return str(file.relative_to(here)) if file.is_relative_to(here) else str(file)


def _first_comment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ") for line in lines if line.startswith("#") and line.strip("# ")), "")

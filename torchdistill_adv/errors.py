"""The one error of a wrong configuration: what was found, where in the YAML, and what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """A setting that cannot be used.

    Args:
        message: what was found and what to write instead.
        path: where it stands, as a dotted YAML path; enclosing blocks are put in front by :func:`inside`.
    """

    def __init__(self, message: str, path: str = "") -> None:
        self.message = message
        self.path = path
        super().__init__(f"{path}: {message}" if path else message)


class NonFiniteError(FloatingPointError):
    """An adversarial term became NaN or infinite; the message has the step, the term and its statistics."""


@contextmanager
def inside(path: str) -> Iterator[None]:
    """Put ``path`` in front of the path of every :class:`ConfigError` raised within."""
    try:
        yield
    except ConfigError as error:
        full = ".".join(part for part in (path, error.path) if part)
        raise ConfigError(error.message, full) from error.__cause__


def nearest(name: object, known: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest known one, then all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}Known: {', '.join(names) if names else 'none'}."

"""Registries of adversaries and objectives, open to users.

A new adversary or objective is one decorated definition::

    @register_adversary
    @dataclass(frozen=True)
    class MySearch: ...

    @register_objective(attacks=("student",), labels=True)
    def my_objective(view, sharpness=1.0): ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from torchdistill_adv.errors import ConfigError, inside, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Named definitions of one kind; a taken key is refused."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def add(self, key: str, entry: T) -> None:
        if key in self._entries:
            raise ValueError(f"{self.kind} '{key}' is registered already: {self._entries[key]!r}; choose another key")
        self._entries[key] = entry

    def __getitem__(self, key: str) -> T:
        if not isinstance(key, str) or key not in self._entries:
            raise ConfigError(f"found {self.kind} {key!r}; {nearest(key, self._entries)}", "key")
        return self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)


def split_spec(spec: Any, kind: str) -> tuple[str, dict[str, Any]]:
    """Key and kwargs of a YAML block: ``'FGSM'`` or ``{key: 'PGD', kwargs: {num_steps: 5}}``."""
    if isinstance(spec, str):
        return spec, {}
    if not isinstance(spec, Mapping) or "key" not in spec or not set(spec) <= {"key", "kwargs"}:
        raise ConfigError(f"found {spec!r}; write {{key: '<{kind}>', kwargs: {{...}}}} or just the key")
    kwargs = spec.get("kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise ConfigError(f"found {kwargs!r}; write a mapping of options", "kwargs")
    return spec["key"], dict(kwargs)


def check_options(
    function: Callable[..., Any], kwargs: Mapping[str, Any], owner: str, skip: int = 0, also: Sequence[str] = ()
) -> None:
    """Refuse a name that ``function`` does not take, and the lack of one that it must have.

    The first ``skip`` parameters of ``function`` are not options; ``also`` are options that it does not take itself.
    """
    parameters = dict(list(inspect.signature(function).parameters.items())[skip:])
    kinds = {parameter.kind for parameter in parameters.values()}
    variable = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    parameters = {name: parameter for name, parameter in parameters.items() if parameter.kind not in variable}
    for name in kwargs:
        if name not in parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise ConfigError(f"{owner} has no such option; {nearest(name, [*parameters, *also])}", str(name))
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in kwargs:
            raise ConfigError(f"is missing; {owner} has no default for it", name)


ADVERSARIES: Registry[Callable[..., Any]] = Registry("adversary")


def register_adversary(cls: T | None = None, *, key: str | None = None) -> Any:
    """Register an adversary (a frozen dataclass that can be called, see :mod:`torchdistill_adv.adversaries`).

    Args:
        cls: the class; its fields are the YAML options.
        key: YAML key, the class's name unless given.

    Raises:
        ValueError: the key is taken.
    """

    def register(cls: Any) -> Any:
        ADVERSARIES.add(key or cls.__name__, cls)
        return cls

    return register if cls is None else register(cls)


def build_adversary(spec: Any) -> Any:
    """The adversary of a YAML block; an object that can be called is taken as it is.

    Raises:
        ConfigError: unknown key or option, or a value out of range.
    """
    if callable(spec):
        missing = [name for name in ("targeted", "num_rows", "num_gradients") if not hasattr(spec, name)]
        if missing or isinstance(spec, type):
            needs = "an object with targeted, num_rows and num_gradients"
            raise ConfigError(f"found {spec!r}; write {{key: ..., kwargs: {{...}}}}, or give {needs}")
        return spec
    key, kwargs = split_spec(spec, "adversary")
    cls = ADVERSARIES[key]
    with inside("kwargs"):
        check_options(cls, kwargs, f"adversary {key}")
        return cls(**kwargs)

"""Parsing and range checks of single settings, and of what a network returns.

YAML 1.1 reads ``8/255`` and ``1e-3`` as strings, so every numeric option goes through :func:`number`.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Real
from typing import Any

from torch import Tensor

from torchdistill_adv.errors import ConfigError, nearest


def number(
    value: Any,
    name: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    finite: bool = True,
) -> float:
    """A float from a number, ``'1e-3'`` or a fraction such as ``'8/255'``.

    Args:
        value: what the YAML holds.
        name: the option, for the error.
        minimum: smallest value allowed.
        above: the value must be greater than this.
        maximum: largest value allowed.
        finite: refuse infinity too.

    Raises:
        ConfigError: ``value`` is no number, or out of range.
    """
    bound = f" >= {minimum:g}" if minimum is not None else f" > {above:g}" if above is not None else ""
    bound += f" and <= {maximum:g}" if maximum is not None else ""
    wanted = f"write a number{bound}, such as 0.1, '1e-3' or '8/255'"
    try:
        if isinstance(value, bool) or not isinstance(value, (Real, str)):
            raise TypeError
        if isinstance(value, str):
            numerator, _, denominator = value.partition("/")
            result = float(numerator) / float(denominator or 1)
        else:
            result = float(value)
        if math.isnan(result) or (finite and math.isinf(result)):
            raise ValueError
    except (TypeError, ValueError, ZeroDivisionError):
        raise ConfigError(f"found {value!r}; {wanted}", name) from None
    too_small = (minimum is not None and result < minimum) or (above is not None and result <= above)
    if too_small or (maximum is not None and result > maximum):
        raise ConfigError(f"found {value!r}; {wanted}", name)
    return result


def integer(value: Any, name: str, *, minimum: int) -> int:
    """An integer of at least ``minimum``; a whole-numbered float or string is taken too."""
    try:
        result = number(value, name, minimum=minimum)
        whole = result == int(result)
    except ConfigError:
        whole = False
    if not whole:
        raise ConfigError(f"found {value!r}; write an integer >= {minimum}", name)
    return int(result)


def optional_integer(value: Any, name: str, *, minimum: int) -> int | None:
    """None, or an integer of at least ``minimum``."""
    return None if value is None else integer(value, name, minimum=minimum)


def flag(value: Any, name: str) -> bool:
    """A YAML boolean."""
    if not isinstance(value, bool):
        raise ConfigError(f"found {value!r}; write true or false", name)
    return value


def choice(value: Any, name: str, known: Collection[str]) -> str:
    """One of ``known``."""
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"found {value!r}; {nearest(value, known)}", name)
    return str(value)


def put(self: Any, **values: Any) -> None:
    """Set checked values on a frozen dataclass in ``__post_init__``."""
    for name, value in values.items():
        object.__setattr__(self, name, value)


def check_logits(logits: Any, path: str, who: str = "adversarial terms need") -> Tensor:
    """What a network returned, if that is logits (R, num_classes).

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(logits, Tensor) and logits.dim() == 2:
        return logits
    found = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    raise ConfigError(f"returns {found}; {who} logits (N, num_classes)", path)

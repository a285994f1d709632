"""What stays in float32 where networks are passed in half precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchdistill_adv.divergences import wide

T = TypeVar("T")


def plain(data: Any) -> Any:
    """``data`` with its tensors in float32 at least and contiguous; dictionaries, lists and tuples are gone into.

    torchdistill's losses are written for such tensors: some mix what networks return with float32, or flatten it by
    ``view``.
    """
    if isinstance(data, Tensor):
        return wide(data).contiguous()
    if isinstance(data, Mapping):
        return {key: plain(item) for key, item in data.items()}
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        # a named tuple, as torchvision's networks with several heads return
        return type(data)(*map(plain, data))
    if type(data) in (list, tuple):
        return type(data)(plain(item) for item in data)
    return data


def in_full_precision(device_type: str, loss: Callable[..., T], *args: Any) -> T:
    """``loss(*args)`` without autocast, of :func:`plain` arguments."""
    with torch.autocast(device_type, enabled=False):
        return loss(*plain(args))


def gradient_scale(device_type: str) -> float:
    """What a value is multiplied by before its gradient is taken on the spot, and the gradient divided by.

    Gradients in float16 vanish below 6e-8, and a scaler of the loss acts later. A power of two, so nothing is rounded.
    """
    in_float16 = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.float16
    return 1024.0 if in_float16 else 1.0

"""What all searches share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from torchdistill_adv.half import gradient_scale
from torchdistill_adv.noise import Noise
from torchdistill_adv.threat import ThreatModel

RowObjective = Callable[[Tensor, Tensor], Tensor]


@runtime_checkable
class PredictingObjective(Protocol):
    """An objective that also tells what the networks predict."""

    def __call__(self, rows: Tensor, index: Tensor) -> Tensor: ...
    def predictions(self) -> Tensor:
        """The class that each of the A attacked networks gave each row of the last call, (R, A)."""


@dataclass(frozen=True)
class Examples:
    """The result of a search.

    Args:
        rows: examples in model-input space, (R, ...). Several per image come particle by particle: row ``k * N + i``
            is the k-th example of image i.
        index: the clean image of each row, (R,).
        path: the iterates after each step, (num_steps, R, ...), where they were asked for.
    """

    rows: Tensor
    index: Tensor
    path: Tensor | None = None


class Adversary(Protocol):
    """The form of a search; see :mod:`torchdistill_adv.adversaries`."""

    @property
    def targeted(self) -> bool: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def num_gradients(self) -> int: ...
    def __call__(self, objective: RowObjective, x: Tensor, threat: ThreatModel, noise: Noise) -> Examples: ...


def value_and_gradient(
    objective: RowObjective, rows: Tensor, index: Tensor, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Each row's objective, (R,), and its gradient with respect to that row, (R, ...).

    ``chunk_size`` bounds how many rows go through the networks at once; where rows are independent, as they are in eval
    mode, it changes nothing but the memory. Parameters get no gradient.
    """
    values, gradients = [], []
    scale = gradient_scale(rows.device.type)
    with torch.enable_grad():
        for some, which in zip(rows.split(chunk_size or len(rows)), index.split(chunk_size or len(rows)), strict=True):
            leaf = some.detach().requires_grad_()
            values.append(objective(leaf, which))
            gradients.append(torch.autograd.grad(values[-1].sum() * scale, leaf)[0] / scale)
    return torch.cat(values).detach(), gradients[0] if len(gradients) == 1 else torch.cat(gradients)


def input_gradient(objective: RowObjective, rows: Tensor, index: Tensor, chunk_size: int | None = None) -> Tensor:
    """The gradient alone of :func:`value_and_gradient`, (R, ...)."""
    return value_and_gradient(objective, rows, index, chunk_size)[1]

"""Passes through a network: counted, and in batches that fit into memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from torchdistill_adv.checks import check_logits

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Counted(nn.Module):
    """A network that counts its passes, in images, and refuses to return anything but logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forward_evaluations = self.gradient_evaluations = 0

    def forward(self, images: Tensor) -> Tensor:
        self.forward_evaluations += len(images)
        followed = images.requires_grad and torch.is_grad_enabled()
        if followed:
            images = images.view_as(images)
            # a library may go backward several times from one pass
            images.register_hook(self._count)
        logits = check_logits(self.model(images), "model", "an evaluation needs")
        # a network that detaches its input has the gradient zero, which the flags tell, rather than none
        return logits + 0 * images.flatten(1)[:, :1].to(logits) if followed else logits

    def _count(self, gradient: Tensor) -> None:
        self.gradient_evaluations += len(gradient)

    def take(self) -> dict[str, int]:
        """The counts since the last call."""
        counts = {"forward_evaluations": self.forward_evaluations, "gradient_evaluations": self.gradient_evaluations}
        self.forward_evaluations = self.gradient_evaluations = 0
        return counts


class Batches:
    """Goes through images in batches, and in smaller ones once memory has run out."""

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self, work: Callable[[slice], T], count: int) -> list[T]:
        """``work`` on every slice of ``count`` images; all over again with half the size where one does not fit."""
        while True:
            try:
                return [work(slice(start, start + self.size)) for start in range(0, count, self.size)]
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.size == 1:
                    raise
            # outside of the except clause, which keeps what the failed pass held
            self.size = (self.size + 1) // 2
            logger.warning("out of memory: going on with %d images at once", self.size)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the host, had no more memory for a tensor."""
    return any(words in str(error).lower() for words in ("out of memory", "can't allocate memory", "not enough memory"))

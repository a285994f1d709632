"""Passes through a network: counted, gradients by a faster twin, and in batches that fit into memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from torchdistill_adv.checks import check_logits
from torchdistill_adv.guards import is_compiled
from torchdistill_adv.twins import NoTwinError, Picked, Twin

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Counted(nn.Module):
    """A network that counts its passes, in images, and refuses to return anything but logits.

    Passes that are differentiated go through ``twin`` where one is set: a gradient is a direction to search in, and
    may come from whatever computes the same function. All others go through the network itself, whose word on an
    example is the outcome. While an attack has changed the network, its hooks or modes, it is the network that is
    differentiated too.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.twin: Twin | None = None
        self.forward_evaluations = self.gradient_evaluations = 0

    def forward(self, images: Tensor) -> Tensor:
        self.forward_evaluations += len(images)
        followed = images.requires_grad and torch.is_grad_enabled()
        if followed:
            images = images.view_as(images)
            # a library may go backward several times from one pass
            images.register_hook(self._count)
        network = self.twin if followed and self.twin is not None and self.twin.is_current else self.model
        logits = check_logits(network(images), "model", "an evaluation needs")
        # a network that detaches its input has the gradient zero, which the flags tell, rather than none
        return logits + 0 * images.flatten(1)[:, :1].to(logits) if followed else logits

    def _count(self, gradient: Tensor) -> None:
        self.gradient_evaluations += len(gradient)

    def take(self) -> dict[str, int]:
        """The counts since the last call."""
        counts = {"forward_evaluations": self.forward_evaluations, "gradient_evaluations": self.gradient_evaluations}
        self.forward_evaluations = self.gradient_evaluations = 0
        return counts


def twin_for_attacks(model: nn.Module, images: Tensor) -> Twin | None:
    """What differentiates ``model`` (in eval mode, pixels to logits) faster; None where nothing does it faithfully.

    Batch normalisation is folded, convolutions on the CPU have their channels last, weights have no gradients. In
    float32 always: a robust accuracy is compared with other papers', whose attacks follow float32 gradients, and one in
    half precision has zeros and rounded signs that would leave more images right. Networks in another precision,
    compiled ones and those in ``DistributedDataParallel`` are attacked as they are.

    Args:
        model: an image comes out the same in any batch.
        images: some that it may see, (N, C, ...).
    """
    how = Picked(torch.float32, channels_last=images.device.type == "cpu", fold=True, compile=False)
    try:
        if is_compiled(model):
            raise NoTwinError("it is compiled")
        twin = Twin(model, how, images)
    except NoTwinError as reason:
        logger.info("attacks differentiate the network as it is: %s", reason)
        return None
    logger.info("attacks differentiate a copy of the network: %s", twin.describe())
    return twin


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

"""In what arithmetic and layout the passes of training are computed."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchdistill_adv.binding import host_losses
from torchdistill_adv.boxes import Box, stage_path
from torchdistill_adv.errors import ConfigError, NonFiniteError
from torchdistill_adv.half import in_full_precision
from torchdistill_adv.runner.check import stages
from torchdistill_adv.runner.processes import Place

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Passes:
    """How a run computes its passes.

    With ``amp``, the networks are passed in half precision wherever PyTorch's autocast does so: the host's passes,
    those on the examples, and the searches, unless their own ``precision`` says otherwise. Images, steps of a search,
    every loss and the weights stay in float32. In float16 the loss is scaled before its gradient is taken, the
    gradients are scaled back before torchdistill clips them, and a step whose gradients are infinite changes nothing
    but the scale (`Mixed Precision Training <https://arxiv.org/abs/1710.03740>`_, Micikevicius et al., ICLR 2018).

    Validation and tests are in float32: they measure what the checkpoint holds.

    Args:
        where: device and processes.
        amp: ``bf16``, ``fp16``, or None for full precision.
        channels_last: whether images and convolutions are laid out with the channels last.
        compile: whether the networks are compiled.

    Raises:
        ConfigError: the device has no such precision, or there is no compiler to compile with.
    """

    def __init__(self, where: Place, amp: str | None, channels_last: bool, compile: bool) -> None:
        self.where, self.amp, self.channels_last, self.compile = where, amp, channels_last, compile
        self.scaler = torch.amp.GradScaler(where.device.type) if amp == "fp16" else None
        if compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
            raise ConfigError(
                "needs a C++ compiler, and found none; install one, such as g++, or leave it out", "--compile"
            )
        if amp:
            try:
                self._autocast()
            except RuntimeError as error:
                raise ConfigError(f"found '{amp}', which this device does not have: {error}", "--amp") from error

    def prepare(self, *networks: nn.Module | None) -> None:
        """Lay out and compile the networks, in place, before the box has them."""
        if self.compile:
            from torch._dynamo import config

            # torchdistill's hooks come and go with the stages
            config.skip_nnmodule_hook_guards = False
            # of all networks together: in train and eval mode, with and without gradients, in batches of several sizes
            config.cache_size_limit = 64
        for network in networks:
            if network is not None and self.channels_last:
                network.to(memory_format=torch.channels_last)
            if network is not None and self.compile:
                network.compile()

    def batch(self, sample_batch: Any) -> Any:
        """A batch on the device, laid out as the networks are."""
        if self.channels_last and isinstance(sample_batch, Tensor) and sample_batch.dim() == 4:
            return sample_batch.contiguous(memory_format=torch.channels_last)
        return sample_batch

    @contextmanager
    def forward(self, box: Box) -> Iterator[None]:
        """What the forward pass runs in: autocast, but not the losses of torchdistill."""
        with ExitStack() as stack:
            if self.amp or self.channels_last:
                stack.enter_context(_full_precision(list(host_losses(box.criterion)), self.where.device.type))
            if self.amp:
                stack.enter_context(self._autocast())
            try:
                yield
            except NonFiniteError as error:
                if self.amp != "fp16":
                    raise
                raise NonFiniteError(f"{error}; float16 ends at 65504, write --amp bf16") from error

    def _autocast(self) -> torch.autocast:
        # a cast that is kept would have no gradient where a pass without one came first, as of what networks share;
        # and gradients of several passes would be added in half precision
        return torch.autocast(self.where.device.type, DTYPES[str(self.amp)], cache_enabled=False)

    def step(self, box: Box, loss: Tensor) -> None:
        """``box.post_forward_process``, with the loss scaled where that is needed.

        Raises:
            ConfigError: a ``post_forward_process`` that takes the gradient without ``box.accelerator``.
            NonFiniteError: gradients are infinite whatever the scale.
        """
        if self.scaler is None:
            box.post_forward_process(loss=loss)
            return
        # where torchdistill lets another library take the gradient
        box.accelerator = scaled = _Scaled(self.scaler, box)
        try:
            box.post_forward_process(loss=loss)
        finally:
            box.accelerator = None
        if not scaled.was_called:
            raise ConfigError(
                "takes the gradient of the loss by itself, which float16 would round to zero; call "
                "self.accelerator.backward(loss) in it where self.accelerator is not None, as torchdistill's default "
                "does, or write --amp bf16",
                f"{stage_path(box)}.post_forward_process",
            )

    def state_dict(self) -> dict[str, Any]:
        """What has to be kept to go on exactly: the scale of the loss."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)


class _Scaled:
    """Takes gradients of a scaled loss, in the place of a box's ``accelerator``."""

    def __init__(self, scaler: torch.amp.GradScaler, box: Box) -> None:
        self.scaler, self.box, self.was_called = scaler, box, False

    def backward(self, loss: Tensor) -> None:
        """The gradient of ``loss``, scaled until the box is about to step, and then the true one, or none if infinite.

        Raises:
            NonFiniteError: it is infinite without a scale too.
        """
        self.was_called = True
        scaler, box = self.scaler, self.box
        scaler.scale(loss).backward()
        if box.stage_grad_count % box.grad_accum_step:
            return
        scale = scaler.get_scale()
        scaler.unscale_(box.optimizer)
        scaler.update()
        if scaler.get_scale() >= scale:
            return
        if scale <= 1:
            raise NonFiniteError(
                f"{stage_path(box)}: gradients are infinite or NaN in float16 at a loss scale of {scale:g}; write "
                "--amp bf16, or none"
            )
        # an optimizer does nothing to a parameter without a gradient: no decay, no momentum
        box.optimizer.zero_grad(set_to_none=True)
        logger.info("a step is left out: its gradients are infinite at a loss scale of %g, which is halved", scale)


@contextmanager
def _full_precision(losses: list[nn.Module], device_type: str) -> Iterator[None]:
    """``losses`` are computed in float32 while the context lasts."""
    try:
        for loss in losses:
            loss.__dict__["forward"] = partial(in_full_precision, device_type, type(loss).forward.__get__(loss))
        yield
    finally:
        for loss in losses:
            loss.__dict__.pop("forward", None)


def set_grad_accum_step(train_config: Mapping[str, Any], grad_accum_step: int) -> None:
    """Let every stage's optimizer step once in so many batches.

    torchdistill divides the loss by that number, so the gradient is that of the mean over the batches: of one large
    batch, but for what a network or a loss computes over the rows of a batch, such as batch normalisation.

    Raises:
        ConfigError: no number above 0.
    """
    if grad_accum_step < 1:
        raise ConfigError(f"found {grad_accum_step}; write 1 or more", "--grad_accum_step")
    for _, stage in stages(train_config):
        if stage.get("optimizer"):
            stage["optimizer"]["grad_accum_step"] = grad_accum_step

"""Context managers that leave no trace: modes, buffers, hook dictionaries and random streams as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode; on leaving, each has its own former mode again."""
    training = [m for module in modules for m in module.modules() if m.training]
    try:
        for m in training:
            m.training = False
        yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def on_cloned_buffers(*modules: nn.Module, read_only_in_eval: bool = False) -> Iterator[None]:
    """Forward passes inside read and write copies of the buffers; the originals are neither changed nor referred to.

    A train-mode pass inside normalises by its batch and moves no running statistics. A graph built inside stays right
    when a later train-mode pass rewrites the originals in place, which autograd does not notice for batch
    normalisation. Nothing is copied back: the references are restored.

    Args:
        modules: with all their submodules.
        read_only_in_eval: do not clone what a normalisation layer in eval mode only reads; for passes whose graph does
            not outlive the guard.
    """
    originals: list[tuple[dict[str, Tensor | None], dict[str, Tensor | None]]] = []
    try:
        for m in {id(m): m for module in modules for m in module.modules()}.values():
            originals.append((m._buffers, dict(m._buffers)))
            if read_only_in_eval and isinstance(m, _NormBase) and not m.training:
                continue
            for name, buffer in m._buffers.items():
                if buffer is not None:
                    m._buffers[name] = buffer.clone()
        yield
    finally:
        for buffers, before in originals:
            buffers.clear()
            buffers.update(before)


@contextmanager
def restored_hooks(*io_dicts: dict[str, dict[str, Any]]) -> Iterator[None]:
    """torchdistill's hook dictionaries, which every forward pass fills, are on leaving as they were."""
    saved = [
        {path: {io: dict(by_device) for io, by_device in inner.items()} for path, inner in d.items()} for d in io_dicts
    ]
    try:
        yield
    finally:
        for io_dict, before in zip(io_dicts, saved, strict=True):
            for path, inner in io_dict.items():
                inner.clear()
                inner.update(before.get(path, {}))


@contextmanager
def own_random_stream(seed: int, device: torch.device) -> Iterator[None]:
    """The global random streams start from ``seed`` inside, and go on afterwards as if nothing had happened.

    A network with dropout draws its masks from the global stream, so a generator of our own is not enough.
    """
    python, numpy = random.getstate(), np.random.get_state()
    on_cuda = device.type == "cuda"
    try:
        with torch.random.fork_rng([device] if on_cuda else []):
            torch.default_generator.manual_seed(seed)
            if on_cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def around_ddp(*modules: nn.Module) -> Iterator[None]:
    """Calls of a DistributedDataParallel inside ``modules`` go straight to the network it wraps.

    A second pass through DDP in one step resets its reducer; one through the network itself is reduced with the first.
    """
    wrapped = [m for module in modules for m in module.modules() if isinstance(m, DistributedDataParallel)]
    try:
        for ddp in wrapped:
            ddp.__dict__["forward"] = ddp.module.__call__
        yield
    finally:
        for ddp in wrapped:
            ddp.__dict__.pop("forward", None)


def original(network: nn.Module) -> nn.Module:
    """The network that ``torch.compile(network)`` wraps, or the network itself."""
    wrapped: nn.Module = getattr(network, "_orig_mod", network)
    return wrapped


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of ``module``, or of a part of it, are compiled."""
    return any(m._compiled_call_impl is not None or original(m) is not m for m in module.modules())


@contextmanager
def uncompiled(*modules: nn.Module) -> Iterator[None]:
    """Calls inside are not compiled: hooks that come and go are seen, and derivatives can be differentiated."""
    compiled = [m for module in modules for m in module.modules() if m._compiled_call_impl is not None]
    calls = [m._compiled_call_impl for m in compiled]
    try:
        for m in compiled:
            m._compiled_call_impl = None
        yield
    finally:
        for m, call in zip(compiled, calls, strict=True):
            m._compiled_call_impl = call


def share_buffers(*modules: nn.Module) -> None:
    """Give every process the running statistics of the first, whose are in the checkpoint."""
    if dist.is_initialized():
        for module in modules:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)


def over_ranks_max(value: Tensor) -> Tensor:
    """The largest of ``value`` over all processes, without a graph; every process has to call it."""
    value = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value

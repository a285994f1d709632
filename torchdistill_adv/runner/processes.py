"""Devices, and the processes of one run."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.rendezvous import rendezvous
from torch.utils.data.distributed import DistributedSampler
from torchdistill.datasets import util as datasets_util

from torchdistill_adv.errors import ConfigError, NonFiniteError


@dataclass(frozen=True)
class Place:
    """Where a run computes.

    Args:
        device: of this process.
        device_ids: for ``DistributedDataParallel``; None where there is one process, :class:`CPUDeviceIds` on CPUs.
        distributed: whether there is a process group.
        world_size: number of processes.
    """

    device: torch.device
    device_ids: list[int] | None = None
    distributed: bool = False
    world_size: int = 1


def check_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: it is not there.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"found '{name}', which is not there ({reason}); leave --device out to have one picked, or write 'cpu'",
            "--device",
        ) from error
    return device


def default_device() -> torch.device:
    """A GPU where there is one."""
    has_mps = torch.backends.mps.is_available()
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")


class CPUDeviceIds(list[int]):
    """``device_ids`` on CPUs: empty for DistributedDataParallel, which takes none there.

    torchdistill's auxiliary modules read the first one where they load their own checkpoints.
    """

    def __getitem__(self, index: Any) -> Any:
        return 0


class DistributedRandomSampler(DistributedSampler[Any]):
    """A ``DistributedSampler`` that knows ``num_samples`` of ``RandomSampler``: so many images an epoch in all.

    torchdistill hands the options of a configuration's sampler to a ``DistributedSampler`` where there are several
    processes.
    """

    def __init__(self, dataset: Any, num_samples: int | None = None, **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        if num_samples is not None:
            self.num_samples = -(-num_samples // self.num_replicas)
            self.total_size = self.num_samples * self.num_replicas
            # the base class then cuts its permutation to total_size, or repeats it
            self.drop_last = self.total_size <= len(dataset)


@contextmanager
def place(device_name: str | None, world_size: int = 1, dist_url: str = "env://") -> Iterator[Place]:
    """The device, by default a GPU where there is one; under torchrun also the process group.

    Every process has the GPU of its ``LOCAL_RANK``. torchdistill's own set-up of processes takes NCCL only; here
    processes on CPUs use Gloo. A process group that is there already is used and left. After an exception in one of
    several processes the group is left too: the others may be waiting for this process, and leaving for them.

    Raises:
        ConfigError: there is no such device, or the environment does not tell how to find the other processes.
    """
    if "RANK" not in os.environ:
        yield Place(check_device(device_name or str(default_device())))
        return
    rank = int(os.environ["RANK"])
    world_size = int(os.environ.get("WORLD_SIZE", world_size))
    device = _device_of_process(device_name, rank, world_size)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    begins = not dist.is_initialized()
    if begins:
        _init_process_group("nccl" if on_gpu else "gloo", dist_url, rank, world_size)
    sampler = datasets_util.DistributedSampler
    datasets_util.DistributedSampler = DistributedRandomSampler
    failed = True
    try:
        yield Place(device, [device.index] if on_gpu else CPUDeviceIds(), True, world_size)
        failed = False
    finally:
        datasets_util.DistributedSampler = sampler
        # a box is in reference cycles, and its DistributedDataParallel must not outlive the processes' group
        gc.collect()
        if begins and not (failed and world_size > 1):
            dist.destroy_process_group()


def _device_of_process(name: str | None, rank: int, world_size: int) -> torch.device:
    """The device of one of several processes."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if not name.startswith("cuda") or (name != "cuda" and world_size == 1):
        return check_device(name)
    if name != "cuda":
        raise ConfigError(
            f"found '{name}' with {world_size} processes, each of which needs a GPU of its own; write 'cuda', or leave "
            "it out",
            "--device",
        )
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    # where torchrun tells how many processes this machine has, all of them find out
    needed, there = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1)), torch.cuda.device_count()
    if needed > there:
        raise ConfigError(
            f"found {there} GPUs for {needed} processes on this machine; start at most {there} of them "
            "(torchrun --nproc_per_node), or write 'cpu'",
            "--device",
        )
    return check_device(f"cuda:{local_rank}")


# by the address at which the processes meet; and how often they have
_stores: dict[str, Store] = {}
_meetings = itertools.count()


def _init_process_group(backend: str, dist_url: str, rank: int, world_size: int) -> None:
    """A process group with a part of the store of its own: in another one's it would find the processes of that one."""
    if dist_url not in _stores:
        try:
            _stores[dist_url], _, _ = next(rendezvous(dist_url, rank, world_size))
        except (ValueError, RuntimeError) as error:
            hint = "start the processes with torchrun, or set what it sets"
            raise ConfigError(f"{error}; {hint}", "--dist_url") from error
    store = PrefixStore(f"run{next(_meetings)}", _stores[dist_url])
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


# seconds in which a launcher notices the process that failed first, and ends this one
GRACE = 5.0


@contextmanager
def ends_all_together() -> Iterator[None]:
    """One of several processes that fails inside says why, with its rank, and ends; its launcher ends the others.

    An exception that goes on to the interpreter can wait for ever: destroying the process group, as the interpreter
    does when it ends, waits for what the others wait for in turn. A single process raises as usual. The exit code is 2
    for a wrong configuration, 130 for Ctrl-C, and 1 for everything else.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise
        who = f"torchdistill-adv: rank {os.environ.get('RANK')}"
        lost = isinstance(error, dist.DistError) or "gloo/transport" in str(error)
        if isinstance(error, KeyboardInterrupt):
            print(f"{who}: interrupted", file=sys.stderr)
        elif lost:
            print(f"{who}: lost another process, which failed or was killed: {error}", file=sys.stderr)
        else:
            if not isinstance(error, (ConfigError, NonFiniteError)):
                traceback.print_exc()
            print(f"{who}: error: {type(error).__name__}:", *str(error).split(), file=sys.stderr)
            # torchrun's own summary then has the message too
            get_error_handler().record_exception(error)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        if lost:
            time.sleep(GRACE)
        os._exit(2 if isinstance(error, ConfigError) else 130 if isinstance(error, KeyboardInterrupt) else 1)


def to_device(data: Any, device: torch.device) -> Any:
    """``data`` with its tensors on ``device``; dictionaries, lists and tuples are gone into."""
    if isinstance(data, Tensor):
        return data.to(device, non_blocking=True)
    if isinstance(data, Mapping):
        return {key: to_device(item, device) for key, item in data.items()}
    if isinstance(data, (list, tuple)):
        items = [to_device(item, device) for item in data]
        return items if isinstance(data, list) else tuple(items)
    return data

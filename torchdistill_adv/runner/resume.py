"""The state of a run in a file, from which it goes on exactly: networks, optimizer, position, every random stream.

``last.pt`` in the run's directory is written at its beginning, after every epoch, and every ``save_steps`` steps;
``previous.pt`` is the one before, which is read where ``last.pt`` cannot be, and goes when the run ends. Both are
written whole or not at all.

A run that was killed and goes on has, on a CPU, bit for bit the weights of one that was not. In the middle of an epoch
its batches are drawn again from the state that the random streams had at its beginning, and those that were trained on
are skipped: samplers and worker processes have no state that could be kept. A data set with a random stream of its own,
other than Python's, NumPy's and PyTorch's, begins that anew.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader
from torchdistill.common.main_util import is_main_process

from torchdistill_adv.binding import BINDING
from torchdistill_adv.boxes import Box, unwrapped
from torchdistill_adv.checkpoints import read_checkpoint, write_checkpoint
from torchdistill_adv.errors import ConfigError, inside
from torchdistill_adv.robust_validation import BLOCK
from torchdistill_adv.runner.precision import Passes
from torchdistill_adv.runner.processes import Place
from torchdistill_adv.runner.progress import Meter

logger = logging.getLogger(__name__)

LAST = "last.pt"
PREVIOUS = "previous.pt"
# of what capture() gives; another one for every change of it
FORMAT = 1

# seconds; the workers of a data loader outlive a run that was killed by 5, and may hold its lock
PATIENCE = 6.0

State = dict[str, Any]


# random streams


def random_streams(device: torch.device, loader: DataLoader[Any] | None = None) -> State:
    """The states of the random streams of Python, NumPy and PyTorch, and of the generators that a data loader has."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        # as a tensor, which needs no code to be read
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "loader": [generator.get_state() for generator in _generators(loader)],
    }


def set_random_streams(streams: State, device: torch.device, loader: DataLoader[Any] | None = None) -> None:
    """Put the random streams into the states of :func:`random_streams`."""
    random.setstate(streams["python"])
    kind, keys, *rest = streams["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(streams["torch"])
    if device.type == "cuda" and streams["cuda"] is not None:
        torch.cuda.set_rng_state(streams["cuda"], device)
    for generator, state in zip(_generators(loader), streams["loader"], strict=False):
        generator.set_state(state)


def _generators(loader: DataLoader[Any] | None) -> list[torch.Generator]:
    """The generators that the YAML gave to a data loader or its samplers."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = {id(g): g for g in (getattr(holder, "generator", None) for holder in holders) if g is not None}
    return list(found.values())


def check_same_state(state: State | None, where: Place) -> None:
    """Refuse to go on where the processes found other states: on machines that do not share the run's directory.

    Raises:
        ConfigError: they did.
    """
    if not where.distributed:
        return
    found: list[Any] = [None] * where.world_size
    dist.all_gather_object(found, None if state is None else (state["epoch"], steps_done(state)))
    if any(position != found[0] for position in found):
        texts = ("none" if p is None else f"epoch {p[0]}, step {p[1]}" for p in found)
        raise ConfigError(
            f"found different states in the processes ({'; '.join(texts)}); write a dst_ckpt in a folder that all "
            "machines share",
            "--resume",
        )


def common_seed(seed: int | None, where: Place) -> int:
    """``seed``, or one that is drawn, the same in every process: a run can only go on from what it can repeat."""
    found = [int.from_bytes(os.urandom(4), "big") if seed is None else seed]
    if where.distributed:
        dist.broadcast_object_list(found)
    return found[0]


def batches(loader: DataLoader[Any], position: Position, device: torch.device) -> Iterator[Any]:
    """The batches of an epoch from ``position`` on, with the random streams as they were there.

    Raises:
        ConfigError: there are fewer than were trained on.
    """
    if getattr(loader, "persistent_workers", False):
        # workers that live on would go on with random streams that nothing can restore
        loader._iterator = None
    iterator = iter(loader)
    if position.meter.steps:
        logger.info("drawing again the %d batches that were trained on", position.meter.steps)
    for step in range(position.meter.steps):
        if next(iterator, None) is None:
            raise ConfigError(
                f"found the state after {position.meter.steps} steps of an epoch, and {step} batches in it now: the "
                "data set has changed; go on with the same",
                "--resume",
            )
    if position.streams_now is not None:
        set_random_streams(position.streams_now, device)
        position.streams_now = None
    yield from iterator


# the state of a run


@dataclass
class Position:
    """Where a run is.

    Args:
        epoch: counted over all stages.
        meter: of the epoch; its ``steps`` are done.
        best: validation accuracy so far.
        lr: learning rate at the epoch's beginning.
        steps_before: steps of the run before the epoch.
        streams: the random streams at the epoch's beginning; None where they are as they are.
        streams_now: the random streams after those steps, likewise.
    """

    epoch: int
    meter: Meter = field(default_factory=Meter)
    best: float | None = None
    lr: float | None = None
    streams: State | None = None
    streams_now: State | None = None
    steps_before: int = 0


def capture(box: Box, position: Position, passes: Passes, where: Place) -> State:
    """What has to be kept to go on from ``position`` exactly; call it in every process."""
    modules = _modules(box)
    now = random_streams(where.device, box.train_data_loader)
    own = {
        "buffers": {name: dict(module.named_buffers()) for name, module in modules.items()},
        "streams": position.streams or now,
        "streams_now": now if position.meter.steps else None,
        "meter": asdict(position.meter),
    }
    parameters = [p for group in box.optimizer.param_groups for p in group["params"]]
    validator = box.__dict__.get(BLOCK)
    return {
        "format": FORMAT,
        "epoch": position.epoch,
        "best": position.best,
        "lr": position.lr,
        "steps_before": position.steps_before,
        "stage": getattr(box, "stage_number", 1),
        "stage_grad_count": box.stage_grad_count,
        "modules": {name: module.state_dict() for name, module in modules.items()},
        "optimizer": box.optimizer.state_dict(),
        # of batches that the optimizer has not seen yet
        "gradients": {i: p.grad for i, p in enumerate(parameters) if p.grad is not None},
        "scheduler": None if box.lr_scheduler is None else box.lr_scheduler.state_dict(),
        "passes": passes.state_dict(),
        BLOCK: None if validator is None else [validator.best_clean, validator.best_robust],
        "processes": _gather(own, where),
    }


def restore(box: Box, state: State, passes: Passes, where: Place) -> Position:
    """Put a box that was built anew, and is in the stage of ``state``, into that state.

    Raises:
        ConfigError: it is of other networks.
    """
    own = state["processes"][dist.get_rank() if where.distributed else 0]
    modules = _modules(box)
    try:
        for name, module in modules.items():
            module.load_state_dict(state["modules"][name])
            buffers = dict(module.named_buffers())
            for path, buffer in own["buffers"][name].items():
                buffers[path].copy_(buffer)
        box.optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise ConfigError(f"found the state of other networks: {error}", "--resume") from error
    parameters = [p for group in box.optimizer.param_groups for p in group["params"]]
    for i, gradient in state["gradients"].items():
        parameters[i].grad = gradient.to(parameters[i])
    # its steps were made before; PyTorch warns of a scheduler that steps first
    box.optimizer._opt_called = True
    if box.lr_scheduler is not None:
        box.lr_scheduler.load_state_dict(state["scheduler"])
    box.stage_grad_count = state["stage_grad_count"]
    passes.load_state_dict(state["passes"])
    validator = box.__dict__.get(BLOCK)
    if validator is not None and state[BLOCK] is not None:
        validator.best_clean, validator.best_robust = state[BLOCK]
        validator.goes_on = False
    return Position(
        state["epoch"],
        Meter(**own["meter"]),
        state["best"],
        state["lr"],
        own["streams"],
        own["streams_now"],
        state["steps_before"],
    )


def set_step(box: Box, step: int) -> None:
    """Let the noise of the adversarial terms go on at a step of the epoch."""
    if BINDING in box.__dict__:
        box.__dict__[BINDING].step_number = step


def _modules(box: Box) -> dict[str, nn.Module]:
    """Everything with weights: what is called, what it was built from, and the loss."""
    names = ("org_teacher_model", "org_student_model", "org_model", "teacher_model", "student_model", "model")
    found = {name: getattr(box, name, None) for name in names}
    found |= _losses("criterion", box.criterion)
    return {name: unwrapped(module) for name, module in found.items() if module is not None}


def _losses(name: str, criterion: nn.Module) -> dict[str, nn.Module]:
    """A loss and its terms, which torchdistill keeps in a dictionary that no state dict goes into."""
    found = {name: criterion}
    for holder in criterion.modules():
        for key, (term, _) in getattr(holder, "term_dict", {}).items():
            found |= _losses(f"{name}.{key}", term)
    return found


def _gather(own: State, where: Place) -> list[State]:
    """What each process has of its own, in the first one; the others get an empty list."""
    if not where.distributed:
        return [own]
    found: list[Any] = [None] * where.world_size
    dist.gather_object(_on_cpu(own), found if is_main_process() else None)
    return found if is_main_process() else []


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    return {key: _on_cpu(item) for key, item in value.items()} if isinstance(value, dict) else value


class Keeper:
    """Keeps the state of a run in its directory.

    Args:
        directory: of the run.
        identity: the configuration and the options that it was started with; another run cannot go on from its state.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self.directory, self.identity = directory, dict(identity)
        self.warned = self.was_read = False

    def save(self, box: Box, position: Position, passes: Passes, where: Place) -> None:
        """Keep the state in every process; where nothing can be written, the one before stays and training goes on.

        Raises:
            ConfigError: the first one cannot be read again, so no checkpoint of this training could.
        """
        if any(isinstance(m, FullyShardedDataParallel) for module in _modules(box).values() for m in module.modules()):
            if not self.warned:
                logger.warning("the state of networks under FullyShardedDataParallel is not kept: no --resume")
            self.warned = True
            return
        state = capture(box, position, passes, where)
        if not is_main_process():
            return
        state |= {"identity": self.identity, "finished": position.epoch >= box.num_epochs}
        path = self.directory / LAST
        try:
            write_checkpoint(state, path, self.directory / PREVIOUS)
            if not self.was_read:
                # what a scheduler of the user's own keeps may need code to be read
                with inside("train"):
                    self.was_read = bool(read_checkpoint(path))
            if state["finished"]:
                (self.directory / PREVIOUS).unlink(missing_ok=True)
        except OSError as error:
            logger.error("'%s' was not saved, and training goes on: %s", path, error)


def read_state(directory: Path) -> State | None:
    """The state that a run in ``directory`` left: the last one, or the one before; None where there is none.

    Raises:
        ConfigError: there are files, and none can be read.
    """
    files = [directory / name for name in (LAST, PREVIOUS)]
    errors = []
    for file in files:
        if not file.exists():
            continue
        try:
            state = read_checkpoint(file)
        except ConfigError as error:
            errors.append(str(error))
            logger.warning("%s", error)
            continue
        if isinstance(state, dict) and state.get("format") == FORMAT and {"identity", "processes"} <= state.keys():
            return {**state, "file": str(file)}
        errors.append(f"found '{file}', which is not the state of a run of this version")
        logger.warning("%s", errors[-1])
    if errors:
        raise ConfigError(f"{'; '.join(errors)}. Remove it to begin anew", "--resume")
    return None


def tell_position(state: State) -> None:
    """Say where a run goes on."""
    logger.info("going on from '%s': epoch %d, step %d", state["file"], state["epoch"], steps_done(state))


def steps_done(state: State) -> int:
    """Steps of the epoch that are done."""
    return int(state["processes"][0]["meter"]["steps"])


def check_identity(state: State, identity: Mapping[str, Any]) -> None:
    """Refuse to go on with another run's state.

    Raises:
        ConfigError: with what differs first.
    """
    for name, value in identity.items():
        before = state["identity"].get(name)
        if before == value:
            continue
        if name == "config":
            before, value = _first_difference(str(before).splitlines(), str(value).splitlines())
        raise ConfigError(
            f"found the state of a run with another {name}: {before!r} instead of {value!r}; go on with the same, or "
            "remove the state to begin anew",
            "--resume",
        )


def _first_difference(before: list[str], now: list[str]) -> tuple[str, str]:
    changes = difflib.SequenceMatcher(None, before, now, autojunk=False).get_opcodes()
    _, i, i_end, j, j_end = next(change for change in changes if change[0] != "equal")
    return before[i].strip() if i < i_end else "nothing", now[j].strip() if j < j_end else "nothing"


def refuse_unfinished(directory: Path) -> None:
    """Refuse to begin anew over a run that could go on.

    Raises:
        ConfigError: there is one.
    """
    if not (directory / LAST).exists() and not (directory / PREVIOUS).exists():
        return
    state = read_state(directory)
    if state is None or state["finished"] or not (state["epoch"] or steps_done(state)):
        return
    raise ConfigError(
        f"found a run that was interrupted at epoch {state['epoch']}, step {steps_done(state)}; write --resume to go "
        f"on with it, or remove its {LAST} and {PREVIOUS} to begin anew",
        str(directory),
    )


@contextlib.contextmanager
def only_run(directory: Path) -> Iterator[None]:
    """Refuse a second run in a directory that one is in; the system lets go of a run that was killed.

    Raises:
        ConfigError: there is one.
    """
    if not is_main_process():
        yield
        return
    lock = FileLock(directory / "run.lock", timeout=PATIENCE)
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigError(
            "found another run that is being trained here; wait for it, or give this one another dst_ckpt",
            str(directory),
        ) from error
    try:
        yield
    finally:
        lock.release()

"""The training loop: epochs, validation, the best checkpoint."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping
from operator import length_hint
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from torchdistill_adv.binding import BINDING
from torchdistill_adv.boxes import Box, sides, stage_path
from torchdistill_adv.checkpoints import read_checkpoint
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.guards import restored_hooks
from torchdistill_adv.robust_validation import save_student, validator_of
from torchdistill_adv.runner.building import wrap_student
from torchdistill_adv.runner.check import stages
from torchdistill_adv.runner.evaluation import accuracy, describe
from torchdistill_adv.runner.memory import memory_advice
from torchdistill_adv.runner.precision import Passes
from torchdistill_adv.runner.processes import Place, to_device
from torchdistill_adv.runner.progress import Monitor, WriteScalars, epoch_record
from torchdistill_adv.runner.resume import Position, batches, random_streams, set_random_streams, set_step
from torchdistill_adv.runner.tensorboard import epoch_scalars

logger = logging.getLogger(__name__)

Record = dict[str, Any]


def train(
    box: Box,
    student: nn.Module,
    student_block: Mapping[str, Any],
    train_config: Mapping[str, Any],
    where: Place,
    *,
    passes: Passes,
    position: Position,
    keep: Callable[[Position], None],
    save_steps: int | None,
    options: Mapping[str, Any],
    write: Callable[[Record], None],
    board: WriteScalars,
) -> None:
    """Train, and keep the student of the best epoch at ``dst_ckpt``: of the last one where there is no validation.

    Args:
        box: what :func:`~torchdistill_adv.runner.building.build_box` built, in the stage of ``position``.
        student: the network itself, which is validated and saved.
        student_block: its block of ``models``.
        train_config: the section ``train``.
        where: device and processes.
        passes: how they are computed.
        position: where to begin.
        keep: keeps the state of the run at a position: at the beginning, and after every epoch.
        save_steps: keep it every so many steps, too.
        options: what the run was started with, kept in the student's checkpoint.
        write: called with the record of every epoch.
        board: called with the values of a step, which is counted over the run.

    Raises:
        NonFiniteError: the loss became NaN or infinite.
    """
    log_freq = train_config.get("log_freq", 100)
    if position.streams is None:
        keep(position)
    while position.epoch < box.num_epochs:
        epoch, best = position.epoch, position.best
        if position.streams is not None:
            set_random_streams(position.streams, where.device, box.train_data_loader)
        position.streams = random_streams(where.device, box.train_data_loader)
        box.pre_epoch_process(epoch=epoch)
        set_step(box, position.meter.steps)
        stage = stage_number(box)
        if position.lr is None:
            position.lr = box.optimizer.param_groups[0]["lr"]
        later = box.num_epochs - epoch - 1
        monitor = Monitor(
            box.criterion,
            epoch,
            position.meter,
            log_freq,
            binding=box.__dict__.get(BINDING),
            steps_left=later * length_hint(box.train_data_loader),
            write_scalars=over_the_run(board, position.steps_before, box),
        )
        train_one_epoch(box, where, passes, monitor, position, keep, save_steps)
        clock = time.perf_counter()
        means = epoch_record(position.meter)
        validation = validate(box, student, where)
        top1 = None if validation is None else validation["top1"]
        if top1 is None or best is None or top1 > best:
            better = best if top1 is None else top1
            logger.info("epoch %d: saving the student; validation accuracy: %s", epoch, describe(validation))
            saved = {**options, "epoch": epoch, "stage": stage}
            if save_student(box, student, better or 0.0, saved, student_block["dst_ckpt"]):
                best = better
        record = {"epoch": epoch, "stage": stage, **means, "lr": position.lr, "validation": validation}
        # a process that begins the next stage puts another one in its place
        validator = validator_of(box)
        try:
            box.post_epoch_process(metrics=top1)
        finally:
            seconds = means["seconds"] + time.perf_counter() - clock
            record |= {
                "robust_validation": None if validator is None else validator.latest,
                "eta_seconds": seconds * later,
            }
            write(record)
            steps = position.steps_before + position.meter.steps
            board(steps - 1, epoch_scalars(record))
        if stage_number(box) != stage:
            wrap_student(box, where)
        position = Position(epoch + 1, best=best, steps_before=steps)
        keep(position)
    if where.distributed:
        dist.barrier()
    box.clean_modules()


def stage_number(box: Box) -> int:
    """The stage that ``box`` is in, from 1; also where there is only one."""
    return getattr(box, "stage_number", 1)


def over_the_run(board: WriteScalars, steps_before: int, box: Box) -> WriteScalars:
    """``board`` for the steps of an epoch, with the learning rate."""
    return lambda step, values: board(steps_before + step, {**values, "lr": box.optimizer.param_groups[0]["lr"]})


def train_one_epoch(
    box: Box,
    where: Place,
    passes: Passes,
    monitor: Monitor,
    position: Position,
    keep: Callable[[Position], None],
    save_steps: int | None,
) -> None:
    """An epoch from ``position`` to its end.

    Raises:
        ConfigError: there is no batch.
        NonFiniteError: the loss became NaN or infinite.
    """
    loader = box.train_data_loader
    watched = monitor.watch(batches(loader, position, where.device), length_hint(loader) or None)
    with memory_advice(box, passes.amp), watched as every_batch:
        for sample_batch, targets, *rest in every_batch:
            sample_batch = passes.batch(to_device(sample_batch, where.device))
            targets = to_device(targets, where.device)
            with passes.forward(box):
                loss: Tensor = box.forward_process(sample_batch, targets, rest[0] if rest else {})
                monitor.end_step(loss, len(targets))
            passes.step(box, loss)
            if save_steps and position.meter.steps % save_steps == 0:
                keep(position)
    if not position.meter.steps:
        path = f"{stage_path(box)}.train_data_loader"
        raise ConfigError("gives no batch; write a smaller batch_size, or drop_last: False", path)


def validate(box: Box, student: nn.Module, where: Place) -> dict[str, float] | None:
    """The accuracy of the network itself on the stage's validation set; None where there is none."""
    if box.val_data_loader is None:
        return None
    with restored_hooks(*(side.io_dict for side in sides(box) if side is not None)):
        return accuracy(student, box.val_data_loader, where.device)


# going on from a checkpoint


def skip_to(box: Box, epoch: int, where: Place) -> None:
    """Bring a box of several stages to the one that has ``epoch``."""
    if not hasattr(box, "stage_end_epoch"):
        return
    # the stages that are skipped wrote their checkpoints when they were trained
    box.save_stage_ckpt = lambda *_: None
    while epoch >= box.stage_end_epoch:
        box.advance_to_next_stage()
        wrap_student(box, where)
    del box.save_stage_ckpt
    box.current_epoch = epoch


def start_from(box: Box, src_ckpt: str | None) -> float | None:
    """Put optimizer and scheduler into the state that the student's ``src_ckpt`` has, if it has one.

    Returns:
        Its best validation accuracy.

    Raises:
        ConfigError: it is the optimizer of another model.
    """
    if src_ckpt is None or not Path(src_ckpt).exists():
        return None
    checkpoint = read_checkpoint(src_ckpt)
    if "optimizer" not in checkpoint:
        return None
    best: float | None = checkpoint.get("best_value")
    saved = checkpoint.get("args")
    if isinstance(saved, Mapping) and saved.get("stage", 1) != stage_number(box):
        logger.info("%s is of stage %s; this stage starts with a new optimizer", src_ckpt, saved["stage"])
        return best
    try:
        box.optimizer.load_state_dict(checkpoint["optimizer"])
    except ValueError as error:
        raise ConfigError(
            f"found '{src_ckpt}', whose optimizer does not fit this training: {error}", "models.student_model.src_ckpt"
        ) from error
    if box.lr_scheduler is not None and checkpoint.get("lr_scheduler") is not None:
        box.lr_scheduler.load_state_dict(checkpoint["lr_scheduler"])
    logger.info("optimizer, scheduler and best validation accuracy (%s) are those of %s", best, src_ckpt)
    return best


def catch_up(box: Box, epoch: int, train_config: Mapping[str, Any]) -> None:
    """Step a scheduler that counts epochs to ``epoch``: a checkpoint has it as it was during its own."""
    scheduler = box.lr_scheduler
    if scheduler is None or box.scheduling_step > 0 or isinstance(scheduler, ReduceLROnPlateau):
        return
    before = sum(stage["num_epochs"] for _, stage in stages(train_config)[: stage_number(box) - 1])
    with warnings.catch_warnings():
        # PyTorch expects a step of the optimizer before; the epochs before had theirs
        warnings.simplefilter("ignore")
        while scheduler.last_epoch < epoch - before:
            scheduler.step()

"""The training loop: epochs, validation, the best checkpoint."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from torchdistill_adv.boxes import Box, sides, stage_path
from torchdistill_adv.errors import ConfigError, NonFiniteError
from torchdistill_adv.guards import restored_hooks
from torchdistill_adv.robust_validation import save_student, validator_of
from torchdistill_adv.runner.check import stages
from torchdistill_adv.runner.evaluation import accuracy, describe
from torchdistill_adv.runner.progress import progress_bar, show, weighted_terms
from torchdistill_adv.runner.setup import Place, to_device, wrap_student

logger = logging.getLogger(__name__)

Record = dict[str, Any]


def train(
    box: Box,
    student: nn.Module,
    student_block: Mapping[str, Any],
    train_config: Mapping[str, Any],
    where: Place,
    *,
    start_epoch: int,
    options: Mapping[str, Any],
    write: Callable[[Record], None],
) -> list[Record]:
    """Train, and keep the student of the best epoch at ``dst_ckpt``: of the last one where there is no validation.

    Args:
        box: what :func:`~torchdistill_adv.runner.setup.build_box` built.
        student: the network itself, which is validated and saved.
        student_block: its block of ``models``.
        train_config: the section ``train``.
        where: device and processes.
        start_epoch: first epoch, counted over all stages.
        options: what the run was started with, kept in the checkpoint.
        write: called with the record of every epoch.

    Returns:
        The record of every epoch.

    Raises:
        ConfigError: ``src_ckpt`` has the optimizer of another model.
        NonFiniteError: the loss became NaN or infinite.
    """
    skip_to(box, start_epoch, train_config, where)
    best = restore(box, student_block.get("src_ckpt"))
    if start_epoch:
        catch_up(box, start_epoch, train_config)
    log_freq = train_config.get("log_freq", 100)
    records = []
    for epoch in range(start_epoch, box.num_epochs):
        box.pre_epoch_process(epoch=epoch)
        stage, lr = stage_number(box), box.optimizer.param_groups[0]["lr"]
        means = train_one_epoch(box, where, epoch, log_freq)
        validation = validate(box, student, where)
        top1 = None if validation is None else validation["top1"]
        if top1 is None or best is None or top1 > best:
            better = best if top1 is None else top1
            logger.info("epoch %d: saving the student; validation accuracy: %s", epoch, describe(validation))
            saved = {**options, "epoch": epoch, "stage": stage}
            if save_student(box, student, better or 0.0, saved, student_block["dst_ckpt"]):
                best = better
        records.append({"epoch": epoch, "stage": stage, **means, "lr": lr, "validation": validation})
        # a process that begins the next stage puts another one in its place
        validator = validator_of(box)
        try:
            box.post_epoch_process(metrics=top1)
        finally:
            records[-1]["robust_validation"] = None if validator is None else validator.latest
            write(records[-1])
        if stage_number(box) != stage:
            wrap_student(box, train_config, where)
    if where.distributed:
        dist.barrier()
    box.clean_modules()
    return records


def stage_number(box: Box) -> int:
    """The stage that ``box`` is in, from 1; also where there is only one."""
    return getattr(box, "stage_number", 1)


def train_one_epoch(box: Box, where: Place, epoch: int, log_freq: int) -> Record:
    """One epoch: means over its steps of the loss and of its weighted terms, the time, and images per second.

    Raises:
        ConfigError: there is no batch.
        NonFiniteError: the loss became NaN or infinite.
    """
    loss_sum, term_sums = 0.0, dict[str, float]()
    steps = images = 0
    title, start = f"epoch {epoch}", time.perf_counter()
    with weighted_terms(box.criterion) as terms, progress_bar(box.train_data_loader, title) as bar:
        for sample_batch, targets, *rest in bar:
            sample_batch, targets = to_device(sample_batch, where.device), to_device(targets, where.device)
            loss: Tensor = box.forward_process(sample_batch, targets, rest[0] if rest else {})
            value, values = float(loss.detach()), {name: float(term) for name, term in terms.items()}
            if not math.isfinite(value):
                raise NonFiniteError(f"train: the loss is {value} at epoch {epoch}, step {steps}; its terms: {values}")
            box.post_forward_process(loss=loss)
            loss_sum += value
            term_sums = {name: term_sums.get(name, 0.0) + term for name, term in values.items()}
            images += len(targets)
            speed = images / (time.perf_counter() - start)
            show(bar, title, steps, log_freq, {"loss": value, **values, "images/s": speed})
            steps += 1
    if not steps:
        path = f"{stage_path(box)}.train_data_loader"
        raise ConfigError("gives no batch; write a smaller batch_size, or drop_last: False", path)
    seconds = time.perf_counter() - start
    total_loss, *totals, all_steps, all_images = over_processes([loss_sum, *term_sums.values(), steps, images], where)
    return {
        "loss": total_loss / all_steps,
        "terms": {name: total / all_steps for name, total in zip(term_sums, totals, strict=True)},
        "seconds": seconds,
        "images_per_second": all_images / seconds,
    }


def over_processes(values: list[float], where: Place) -> list[float]:
    """The sum of each value over all processes."""
    if not where.distributed:
        return values
    totals = torch.tensor(values, dtype=torch.float64, device=where.device)
    dist.all_reduce(totals)
    return totals.tolist()


def validate(box: Box, student: nn.Module, where: Place) -> dict[str, float] | None:
    """The accuracy of the network itself on the stage's validation set; None where there is none."""
    if box.val_data_loader is None:
        return None
    with restored_hooks(*(side.io_dict for side in sides(box) if side is not None)):
        return accuracy(student, box.val_data_loader, where.device)


# going on from a checkpoint


def skip_to(box: Box, epoch: int, train_config: Mapping[str, Any], where: Place) -> None:
    """Bring a box of several stages to the one that has ``epoch``."""
    if not hasattr(box, "stage_end_epoch"):
        return
    # the stages that are skipped wrote their checkpoints when they were trained
    box.save_stage_ckpt = lambda *_: None
    while epoch >= box.stage_end_epoch:
        box.advance_to_next_stage()
        wrap_student(box, train_config, where)
    del box.save_stage_ckpt
    box.current_epoch = epoch


def restore(box: Box, src_ckpt: str | None) -> float | None:
    """Put optimizer and scheduler into the state that the student's ``src_ckpt`` has, if it has one.

    Returns:
        Its best validation accuracy.

    Raises:
        ConfigError: it is the optimizer of another model.
    """
    if src_ckpt is None or not Path(src_ckpt).exists():
        return None
    checkpoint = torch.load(src_ckpt, map_location="cpu", weights_only=False)
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

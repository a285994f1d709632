"""The curves of a run for TensorBoard."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torchdistill.common.main_util import is_main_process

from torchdistill_adv.errors import ConfigError
from torchdistill_adv.runner.progress import WriteScalars

logger = logging.getLogger(__name__)

INSTALL = "pip install 'torchdistill-adv[tensorboard]'"


@contextmanager
def scalar_writer(directory: Path | None) -> Iterator[WriteScalars]:
    """A function that writes the values of a step, counted over the whole run, for TensorBoard.

    What an earlier writer left there of the first step that is written, and of later ones, is no longer shown: a run
    that goes on does not show a step twice, and one that begins anew shows nothing old. Only the first process writes.
    Where nothing can be written, the log says so once, and training goes on.

    Args:
        directory: of the event files; None writes nothing.

    Raises:
        ConfigError: TensorBoard is not installed.
    """
    if directory is None:
        yield lambda step, values: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(f"needs the package tensorboard ({error}); {INSTALL}", "--tensorboard") from error
    writer: Any = None
    failed = not is_main_process()

    def write(step: int, values: Mapping[str, float]) -> None:
        nonlocal writer, failed
        if failed:
            return
        try:
            writer = writer or SummaryWriter(str(directory), purge_step=step)
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            # a run that is killed leaves what its state is of
            writer.flush()
        except OSError as error:
            failed = True
            logger.error("%s; from step %d on nothing is written for TensorBoard", error, step)

    try:
        yield write
    finally:
        if writer is not None:
            with suppress(OSError):
                writer.close()


def epoch_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """What TensorBoard is shown of the record of an epoch: the accuracies on validation images that were measured."""
    wanted = {"validation": ("top1",), "robust_validation": ("clean", "robust")}
    return {
        f"{block}/{entry}": record[block][entry]
        for block, entries in wanted.items()
        for entry in entries
        if record.get(block)
    }

"""Checkpoint files: written whole or not at all, read as tensors and plain values only."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torchdistill.common.main_util import is_main_process
from torchdistill.core import distillation, training
from torchdistill.models import util

from torchdistill_adv.errors import ConfigError


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """What ``torch.save`` wrote into a file or to an address, on the CPU; no code of the file is run.

    Raises:
        ConfigError: it is missing, damaged, or holds other objects than tensors and plain values.
    """
    name = os.fspath(path)
    try:
        # torchdistill's runner saves its command line with the weights
        with torch.serialization.safe_globals([argparse.Namespace]):
            if name.startswith(("https://", "http://")):
                return torch.hub.load_state_dict_from_url(name, map_location="cpu", progress=True, weights_only=True)
            return torch.load(Path(name).expanduser(), map_location="cpu", weights_only=True)
    # the bytes of a file can lead to any exception
    except Exception as error:
        raise ConfigError(
            f"found '{name}', which cannot be read as tensors ({type(error).__name__}): it is missing, damaged, no "
            "checkpoint, or holds other objects as well; write one that torch.save made of tensors and plain values, "
            "such as a state dict"
        ) from error


def write_checkpoint(state: Any, path: str | os.PathLike[str], previous: str | os.PathLike[str] | None = None) -> None:
    """Write a file, all of it or nothing; whoever reads it meanwhile, or after a crash, finds the one before.

    Args:
        state: what ``torch.save`` takes.
        path: of the file.
        previous: gets the file that was there before.

    Raises:
        OSError: nothing could be written.
    """
    file = Path(path)
    part = file.with_name(f"{file.name}.part")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with part.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        if previous is not None and file.exists():
            os.replace(file, previous)
        os.replace(part, file)
    except (OSError, RuntimeError) as error:  # PyTorch's own writer has the second
        with contextlib.suppress(OSError):
            part.unlink()
        raise error if isinstance(error, OSError) else OSError(str(error)) from error


def _write_on_first(state: Any, path: str | os.PathLike[str]) -> None:
    if is_main_process():
        write_checkpoint(state, path)


@contextlib.contextmanager
def whole_files() -> Iterator[None]:
    """torchdistill's own checkpoints of stages and auxiliary modules are written whole or not at all, too.

    The next start reads them, and one that was cut by a crash would end it.
    """
    writers = [(module, module.save_on_master) for module in (util, distillation, training)]
    try:
        for module, _ in writers:
            module.save_on_master = _write_on_first
        yield
    finally:
        for module, writer in writers:
            module.save_on_master = writer

"""From blocks of the YAML to models and a box."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from functools import partial
from operator import length_hint
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torchdistill.common.main_util import set_seed
from torchdistill.common.module_util import check_if_wrapped
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.training import TrainingBox, get_training_box
from torchdistill.models.official import get_image_classification_model
from torchdistill.models.registry import get_model
from torchdistill.models.wrapper import AuxiliaryModelWrapper

from torchdistill_adv.binding import BINDING, bind
from torchdistill_adv.boxes import Box, stage_path
from torchdistill_adv.checkpoints import read_checkpoint
from torchdistill_adv.errors import ConfigError, inside
from torchdistill_adv.noise import derive_seed
from torchdistill_adv.runner.processes import Place

logger = logging.getLogger(__name__)


def build_model(block: Mapping[str, Any], name: str, where: Place) -> nn.Module:
    """The model of a block of ``models``, with the weights of its ``src_ckpt``.

    Raises:
        ConfigError: it cannot be built, or the weights do not fit.
    """
    kwargs = block.get("kwargs") or {}
    try:
        with inside(f"models.{name}.kwargs"):
            model = get_image_classification_model({**block, "kwargs": kwargs}, where.distributed)
            if model is None:
                model = get_model(block["key"], block.get("repo_or_dir"), **kwargs)
    except ConfigError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"'{block['key']}' cannot be built: {error}", f"models.{name}.kwargs") from error
    load_weights(model, block.get("src_ckpt"), f"models.{name}.src_ckpt")
    return model.to(where.device)


def load_weights(model: nn.Module, checkpoint: str | None, path: str) -> None:
    """Load a checkpoint's weights; nothing for None, or for a file that does not exist.

    Raises:
        ConfigError: it cannot be read, or its weights do not fit.
    """
    is_address = str(checkpoint).startswith(("https://", "http://"))
    if checkpoint is None or not (is_address or Path(checkpoint).exists()):
        logger.info("%s: no checkpoint is loaded", path)
        return
    with inside(path):
        saved = read_checkpoint(checkpoint)
        try:
            model.load_state_dict(saved.get("model", saved))
        except (AttributeError, TypeError, RuntimeError) as error:
            raise ConfigError(f"found '{checkpoint}', whose weights do not fit the model: {error!s:.400}") from error


def build_box(
    teacher: nn.Module | None, student: nn.Module, config: Mapping[str, Any], where: Place, lr_factor: int
) -> Box:
    """The box that trains ``student``, ready for the first epoch.

    Several processes build the same and share the gradients of what they train; afterwards each has random streams of
    its own.

    Raises:
        ConfigError: torchdistill cannot build it.
    """
    common = (config["datasets"], config["train"], where.device, where.device_ids, where.distributed, lr_factor)
    make_box = get_training_box if teacher is None else partial(get_distillation_box, teacher)
    try:
        box: Box = make_box(student, *common)
    except ConfigError:
        raise
    # what the checks do not know of, such as the options of auxiliary wrappers
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        where_raised = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({where_raised.filename}:{where_raised.lineno})"
        raise ConfigError(f"torchdistill cannot build this training: {reason}", "train") from error
    wrap_student(box, where)
    if where.distributed:
        # from here on dropout and augmentation should not repeat those of another process
        set_seed(derive_seed(torch.initial_seed(), dist.get_rank()) % 2**32)
    return box


def wrap_student(box: Box, where: Place) -> None:
    """Let several processes share the gradients of all that they train: of the student, and of a trained teacher.

    torchdistill itself does so on GPUs only, and where the YAML asks for it. Call it whenever a stage begins.

    Raises:
        ConfigError: each process would train a part of its own, or one would make more steps than another.
    """
    if not where.distributed:
        return
    if isinstance(box, TrainingBox):
        networks = [("model", "model", box.model_any_frozen)]
    else:
        networks = [("student_model", "student", box.student_any_frozen)]
        networks += [("teacher_model", "teacher", box.teacher_any_frozen)]
    for attribute, key, any_frozen in networks:
        network = getattr(box, attribute)
        alone = _trained_alone(network)
        if not alone:
            continue
        path = f"{stage_path(box)}.{key}"
        if isinstance(network, AuxiliaryModelWrapper):
            raise ConfigError(
                f"found '{type(network).__name__}', of which each of {where.world_size} processes would train "
                f"{alone[0]} for itself; its __init__ should pass what it trains through "
                "torchdistill.models.util.wrap_if_distributed",
                f"{path}.auxiliary_model_wrapper",
            )
        if isinstance(network, DataParallel):
            raise ConfigError(
                f"found 'DataParallel' with {where.world_size} processes, which would train a network each; write "
                "'DistributedDataParallel'",
                f"{path}.wrapper",
            )
        ids = where.device_ids
        setattr(box, attribute, DistributedDataParallel(network, device_ids=ids, find_unused_parameters=any_frozen))
    _check_steps(box, where)
    if BINDING in box.__dict__:
        bind(box)


def _check_steps(box: Box, where: Place) -> None:
    """Refuse an epoch of unequal lengths: who has more batches would wait for the others' gradients for ever."""
    lengths: list[Any] = [None] * where.world_size
    dist.all_gather_object(lengths, length_hint(box.train_data_loader))
    if len(set(lengths)) > 1:
        found = ", ".join(map(str, lengths))
        raise ConfigError(
            f"found {found} batches an epoch in the {where.world_size} processes, which make every step together; "
            "write a batch_sampler that gives each process as many, or leave it out",
            f"{stage_path(box)}.train_data_loader",
        )


def _trained_alone(network: nn.Module) -> list[str]:
    """The names of the trained parameters whose gradients no wrapper shares."""
    wrappers = [m for m in network.modules() if check_if_wrapped(m) and not isinstance(m, DataParallel)]
    shared = {id(p) for wrapper in wrappers for p in wrapper.parameters()}
    return [name for name, p in network.named_parameters() if p.requires_grad and id(p) not in shared]

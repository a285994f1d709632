"""torchdistill's boxes, read in one form: their networks, hooks and stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torchdistill.common.constant import SELF_MODULE_PATH
from torchdistill.core.distillation import DistillationBox, MultiStagesDistillationBox
from torchdistill.core.interfaces.forward_proc import forward_batch4sskd
from torchdistill.core.training import MultiStagesTrainingBox, TrainingBox
from torchdistill.core.util import extract_io_dict, update_io_dict
from torchdistill.models.wrapper import AuxiliaryModelWrapper

from torchdistill_adv.guards import around_ddp

Box: TypeAlias = DistillationBox | TrainingBox
IODict: TypeAlias = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Side:
    """One network of a box.

    Args:
        network: what searches and losses call: the network itself, outside torchdistill's wrappers, some of which run
            it under ``no_grad``.
        outermost: what the box calls, auxiliary modules included.
        forward_proc: how the box calls it.
        io_dict: the dictionary that torchdistill's forward hooks fill.
        updatable: whether the box lets gradients through it.
    """

    network: nn.Module
    outermost: nn.Module
    forward_proc: Any
    io_dict: IODict
    updatable: bool

    @property
    def num_views(self) -> int:
        """Views of an image in a batch: SSKD's data set gives four rotations."""
        return 4 if self.forward_proc is forward_batch4sskd else 1

    @property
    def in_train_mode(self) -> bool:
        """Whether any part of the network is."""
        return any(m.training for m in self.network.modules())

    def collect(
        self, batch: Tensor, targets: Any, supp_dict: Any, kwargs: Mapping[str, Any], device: torch.device
    ) -> IODict:
        """Outputs and hooked features for ``batch``, gathered as the box gathers them."""
        network = unwrapped(self.outermost)
        with torch.set_grad_enabled(self.updatable and torch.is_grad_enabled()), around_ddp(network):
            outputs = self.forward_proc(network, batch, targets, supp_dict, **kwargs)
            io_dict: IODict = extract_io_dict(self.io_dict, device)
            io_dict[SELF_MODULE_PATH]["output"] = outputs
            if isinstance(network, AuxiliaryModelWrapper):
                network.secondary_forward(io_dict)
            update_io_dict(io_dict, extract_io_dict(self.io_dict, device))
        return io_dict


def unwrapped(module: nn.Module) -> nn.Module:
    """What is inside the wrappers that spread a module over devices."""
    while isinstance(module, (DataParallel, DistributedDataParallel)):
        module = module.module
    return module


def _raw(model: nn.Module, outermost: nn.Module) -> nn.Module:
    """The network to call: unwrapped, but an FSDP root must be called itself to gather its parameters."""
    if isinstance(outermost, FullyShardedDataParallel):
        return outermost
    return unwrapped(model)


def sides(box: Box) -> tuple[Side, Side | None]:
    """Student and teacher of a box."""
    if isinstance(box, TrainingBox):
        network = _raw(box.org_model, box.model)
        return Side(network, box.model, box.model_forward_proc, box.model_io_dict, True), None
    student = Side(
        _raw(box.org_student_model, box.student_model),
        box.student_model,
        box.student_forward_proc,
        box.student_io_dict,
        True,
    )
    teacher = Side(
        _raw(box.org_teacher_model, box.teacher_model),
        box.teacher_model,
        box.teacher_forward_proc,
        box.teacher_io_dict,
        bool(box.teacher_updatable),
    )
    return student, teacher


def stage_path(box: Box) -> str:
    """YAML path of the stage that ``box`` is in."""
    staged = isinstance(box, (MultiStagesDistillationBox, MultiStagesTrainingBox))
    return f"train.stage{getattr(box, 'stage_number', 1)}" if staged else "train"


def stage_epochs(box: Box) -> range:
    """The epochs of the stage that ``box`` is in, counted over all stages; none while a box is being built."""
    if not hasattr(box, "stage_end_epoch"):
        return range(getattr(box, "num_epochs", 0))
    length = box.train_config[stage_path(box).removeprefix("train.")]["num_epochs"]
    return range(box.stage_end_epoch - length, box.stage_end_epoch)

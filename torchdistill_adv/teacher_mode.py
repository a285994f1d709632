"""A teacher in eval mode, for stages without an adversarial term; where there is one, its binding sees to that."""

from __future__ import annotations

from typing import Any

from torchdistill.core.distillation import DistillationBox
from torchdistill.core.interfaces.pre_epoch_proc import default_pre_epoch_process_with_teacher
from torchdistill.core.interfaces.registry import register_pre_epoch_proc_func

from torchdistill_adv.boxes import sides


@register_pre_epoch_proc_func
def eval_teacher(self: DistillationBox, epoch: int | None = None, **kwargs: Any) -> None:
    """torchdistill's default pre-epoch process; then the teacher's network is put in eval mode.

    torchdistill leaves it in train mode, so it normalises by the batch and drops units out. The papers' teachers are in
    eval mode, and so is that of a stage with ``bind_adversarial_losses``: with this, a method with and without an
    adversarial term has the same teacher. Auxiliary modules around the network, which are trained, stay as they are.

    Example:
        .. code-block:: yaml

            train:
              pre_epoch_process: 'eval_teacher'
    """
    default_pre_epoch_process_with_teacher(self, epoch=epoch, **kwargs)
    _, teacher = sides(self)
    assert teacher is not None
    teacher.network.eval()

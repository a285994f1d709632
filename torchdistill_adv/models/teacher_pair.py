"""Two teachers in one model, for the methods that have a robust and a standard one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchdistill.models.registry import register_model

from torchdistill_adv.errors import inside
from torchdistill_adv.models.checkpoint import build_model


@register_model(key="teacher_pair")
class TeacherPair(nn.Module):
    """A robust teacher, and a standard one beside it for :class:`~torchdistill_adv.losses.AKD2Loss` and IAD II.

    (N, C, H, W) to the robust teacher's (N, num_classes). The standard one is the submodule ``standard``, which those
    losses call. Ours.

    Args:
        robust: block of a model, such as ``from_checkpoint`` or ``robustbench``.
        standard: block of the other model.

    Raises:
        ConfigError: one of them cannot be built.

    Example:
        .. code-block:: yaml

            teacher_model:
              key: 'teacher_pair'
              kwargs:
                robust: {key: 'cifar_wide_resnet', kwargs: {depth: 10, widen_factor: 1, num_classes: 10}}
                standard: {key: 'cifar_resnet18', kwargs: {num_classes: 10}}
    """

    def __init__(self, robust: Any, standard: Any) -> None:
        super().__init__()
        with inside("robust"):
            self.robust = build_model(robust)[1]
        with inside("standard"):
            self.standard = build_model(standard)[1]

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.robust(x)
        return logits

"""Hierarchical self-supervised augmented knowledge distillation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.losses.registry import register_mid_level_loss

from torchdistill_adv.boxes import IODict
from torchdistill_adv.checks import number
from torchdistill_adv.divergences import cross_entropy, kl_divergence
from torchdistill_adv.errors import ConfigError

NUM_ROTATIONS = 4


def joint_labels(labels: Tensor) -> Tensor:
    """Class and rotation as one label, 4 y + r: labels (N,) to (4 N,), the four rotations of an image in a row."""
    rotations = torch.arange(NUM_ROTATIONS, device=labels.device)
    return (NUM_ROTATIONS * labels[:, None] + rotations).flatten()


@register_mid_level_loss
class HSAKDHeadsLoss(nn.Module):
    r"""HSAKD, first stage: the teacher's heads learn class and rotation together.

    .. math::
        \ell = \sum_l \frac{1}{4 N} \sum_{i, r} \mathrm{CE}(h_l(x_i^r),\, 4 y_i + r)

    for the logits (L, 4 N, 4 C) of L heads of :class:`~torchdistill_adv.hosts.HSAKDWrapper` and labels (N,), where
    row 4 i + r of a head is image i turned r times by 90 degrees.

    Paper: `Hierarchical Self-supervised Augmented Knowledge Distillation <https://arxiv.org/abs/2107.13715>`_ (Yang et
    al., IJCAI 2021). **The official code's** (`repository <https://github.com/winycg/HSAKD>`_): the sum over heads and
    the numbering of the joint labels; with a frozen backbone it adds the backbone's own cross-entropy, a constant.

    Args:
        heads_path: the teacher's heads.

    Example:
        .. code-block:: yaml

            criterion:
              key: 'HSAKDHeadsLoss'
              kwargs: {heads_path: 'heads'}
            weight: 1.0
    """

    def __init__(self, heads_path: str = "heads") -> None:
        super().__init__()
        self.heads_path = heads_path

    def forward(
        self, student_io_dict: IODict, teacher_io_dict: IODict, targets: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        heads = teacher_io_dict[self.heads_path]["output"]
        labels = joint_labels(targets)
        return torch.stack([cross_entropy(logits, labels).mean() for logits in heads]).sum()


@register_mid_level_loss
class HSAKDLoss(nn.Module):
    r"""HSAKD, second stage: the student learns the class, the teacher's logits, and those of every head.

    .. math::
        \ell = \frac{1}{N} \sum_i \mathrm{CE}(S(x_i^0), y_i)
        + \frac{\tau^2}{4 N} \sum_{i, r} \Big( KL(T^\tau(x_i^r) \| S^\tau(x_i^r))
        + \sum_l KL(h_l^{T, \tau}(x_i^r) \| h_l^{S, \tau}(x_i^r)) \Big)

    for logits (4 N, C), logits of heads (L, 4 N, 4 C) of :class:`~torchdistill_adv.hosts.HSAKDWrapper` on both sides,
    and labels (N,); row 4 i + r is image i turned r times by 90 degrees, and r = 0 is the image itself. The teacher
    gets no gradient.

    Paper: `Hierarchical Self-supervised Augmented Knowledge Distillation <https://arxiv.org/abs/2107.13715>`_ (Yang et
    al., IJCAI 2021). **The official code's** (`repository <https://github.com/winycg/HSAKD>`_): the temperature of 3,
    the factors of 1, no label but that of the image that is not turned, and the divergence of the last logits over all
    rotations.

    Args:
        temperature: divides all logits in the divergences.
        student_module_path: the student's logits.
        teacher_module_path: the teacher's logits.
        student_heads_path: the student's heads.
        teacher_heads_path: the teacher's heads.

    Raises:
        ConfigError: the two networks have other numbers of heads or classes.

    Example:
        .. code-block:: yaml

            criterion:
              key: 'HSAKDLoss'
              kwargs: {temperature: 3.0}
            weight: 1.0
    """

    def __init__(
        self,
        temperature: float = 3.0,
        student_module_path: str = ".",
        teacher_module_path: str = ".",
        student_heads_path: str = "heads",
        teacher_heads_path: str = "heads",
    ) -> None:
        super().__init__()
        self.temperature = number(temperature, "temperature", above=0)
        self.student_paths = student_module_path, student_heads_path
        self.teacher_paths = teacher_module_path, teacher_heads_path

    def forward(
        self, student_io_dict: IODict, teacher_io_dict: IODict, targets: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        logits, heads = (student_io_dict[path]["output"] for path in self.student_paths)
        teacher_logits, teacher_heads = (teacher_io_dict[path]["output"].detach() for path in self.teacher_paths)
        if heads.shape != teacher_heads.shape:
            (found, _, classes), (wanted, _, teacher_classes) = heads.shape, teacher_heads.shape
            raise ConfigError(
                f"found {found} heads of {classes} classes beside the teacher's {wanted} of {teacher_classes}; give "
                "both as many stages, and the same num_classes",
                "student.auxiliary_model_wrapper.kwargs.stages",
            )
        divergences = [
            kl_divergence(of_teacher, of_student, self.temperature).mean()
            for of_teacher, of_student in zip((teacher_logits, *teacher_heads), (logits, *heads), strict=True)
        ]
        return cross_entropy(logits[::NUM_ROTATIONS], targets).mean() + torch.stack(divergences).sum()

"""Similarity-preserving distillation."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import normalize
from torchdistill.losses.registry import register_mid_level_loss

from torchdistill_adv.boxes import IODict
from torchdistill_adv.divergences import wide


@register_mid_level_loss
class SPLoss(nn.Module):
    r"""SP: images that the teacher finds similar are similar for the student.

    .. math::
        \ell = \frac{1}{N^2} \| G(t) - G(s) \|_F^2, \qquad
        G(x)_{i, \cdot} = \frac{(x x^\top)_{i, \cdot}}{\| (x x^\top)_{i, \cdot} \|_2}

    for the outputs of one module of each network, (N, ...) each, flattened to (N, D).

    Paper: `Similarity-Preserving Knowledge Distillation <https://arxiv.org/abs/1907.09682>`_ (Tung and Mori, ICCV
    2019). **The paper's**: all of it. **RepDistiller's** (`repository <https://github.com/HobbitLong/RepDistiller>`_):
    the map of the last stage, and a weight of 3000. torchdistill's ``SPKDLoss`` divides rows by their l1 norm, where
    the paper has the l2 norm, so this weight is none for it.

    Args:
        student_output_path: module of the student.
        teacher_output_path: module of the teacher.

    Example:
        .. code-block:: yaml

            criterion:
              key: 'SPLoss'
              kwargs: {student_output_path: 'layer3', teacher_output_path: 'layer3'}
            weight: 3000.0
    """

    def __init__(self, student_output_path: str, teacher_output_path: str) -> None:
        super().__init__()
        self.student_output_path, self.teacher_output_path = student_output_path, teacher_output_path

    def forward(self, student_io_dict: IODict, teacher_io_dict: IODict, *args: Any, **kwargs: Any) -> Tensor:
        modules = student_io_dict[self.student_output_path], teacher_io_dict[self.teacher_output_path]
        flat = (wide(module["output"]).flatten(1) for module in modules)
        student, teacher = (normalize(x @ x.T) for x in flat)
        return (teacher - student).square().mean()

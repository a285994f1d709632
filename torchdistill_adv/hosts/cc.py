"""Correlation congruence in the form of RepDistiller."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchdistill.losses.registry import register_mid_level_loss

from torchdistill_adv.boxes import IODict
from torchdistill_adv.divergences import wide


@register_mid_level_loss
class CCLoss(nn.Module):
    r"""CC: the student errs on an image in other features than on the next one.

    .. math::
        \ell = \frac{1}{N - 1} \sum_{i=1}^{N-1} \sum_d | \Delta_{id} |\, | \Delta_{i+1, d} |, \qquad \Delta = s - t

    for linear embeddings (N, D) of both networks, such as those of torchdistill's ``Linear4CCKD``, which are both
    trained.

    Paper: `Correlation Congruence for Knowledge Distillation <https://arxiv.org/abs/1904.01802>`_ (Peng et al., ICCV
    2019). **RepDistiller's** (`repository <https://github.com/HobbitLong/RepDistiller>`_, from the authors): this loss,
    128 features, and a weight of 0.02. The paper's equation, the squared distance of two kernel matrices, is another;
    torchdistill's ``CCKDLoss`` has that one without the square, and its weights have nothing to do with these.

    Args:
        student_linear_path: embedding of the student.
        teacher_linear_path: embedding of the teacher.

    Example:
        .. code-block:: yaml

            criterion:
              key: 'CCLoss'
              kwargs: {student_linear_path: 'linear', teacher_linear_path: 'linear'}
            weight: 0.02
    """

    def __init__(self, student_linear_path: str = "linear", teacher_linear_path: str = "linear") -> None:
        super().__init__()
        self.student_linear_path, self.teacher_linear_path = student_linear_path, teacher_linear_path

    def forward(self, student_io_dict: IODict, teacher_io_dict: IODict, *args: Any, **kwargs: Any) -> Tensor:
        student, teacher = student_io_dict[self.student_linear_path], teacher_io_dict[self.teacher_linear_path]
        delta = (wide(student["output"]) - wide(teacher["output"])).abs()
        return (delta[:-1] * delta[1:]).sum(1).mean()

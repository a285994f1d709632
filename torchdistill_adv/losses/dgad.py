"""Dynamic guidance adversarial distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torchdistill.losses.registry import register_mid_level_loss

from torchdistill_adv.boxes import IODict
from torchdistill_adv.checks import number
from torchdistill_adv.divergences import kl_divergence, softmax_mse
from torchdistill_adv.losses.base import GAUSSIAN_START, AdversarialTerm

if TYPE_CHECKING:
    from torchdistill_adv.step import Step


def corrected(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (R, C) in which the label has the largest: where another class has, the two are exchanged."""
    largest, top = logits.max(1, keepdim=True)
    own = logits.gather(1, labels[:, None])
    return logits.scatter(1, top, own).scatter(1, labels[:, None], largest)


@register_mid_level_loss
class DGADLoss(AdversarialTerm):
    r"""DGAD: AdaAD with the teacher's mistakes corrected, on clean images where the teacher errs even there.

    .. math::
        \ell = \frac{1}{N} \sum_i m_i\, KL(\tilde T(x_i) \| S(x_i)) + (1 - m_i)\, KL(\tilde T(x'_i) \| S(x'_i))
        + \frac{\beta}{N C} \sum_i \|p_S(x'_i) - p_S(x_i)\|^2,
        \qquad x'_i = \arg\max_{x' \in C_\epsilon(x_i)} KL(T(x') \| S(x'))

    where :math:`m_i = 1` if the teacher misclassifies :math:`x_i`, else 0, and :math:`\tilde T` are the teacher's
    logits with those of the label and of the wrongly predicted class exchanged; for images (N, C, H, W) and logits (N,
    num_classes). The options of every loss are those of :class:`~torchdistill_adv.losses.base.AdversarialTerm`.

    Paper:
    `Dynamic Guidance Adversarial Distillation with Enhanced Teacher Knowledge <https://arxiv.org/abs/2409.01627>`_
    (Park and Min, ECCV 2024).

    **The official code's**: all of the above, beta = 1; the search is AdaAD's. Its branch for MobileNetV2 has other
    weights, through the order of its operators; they are not followed here.

    Args:
        beta: weight of the consistency of the student's own predictions.

    Raises:
        ConfigError: at binding, with the YAML path.

    Example:
        .. code-block:: yaml

            criterion:
              key: 'DGADLoss'
              kwargs:
                beta: 1.0
                adversary: {key: 'PGD', kwargs: {num_steps: 10, step_size: 2/255, start: 'gaussian'}}
                threat: {norm: 'linf', eps: 8/255, space: 'pixel', mean: [0], std: [1]}
            weight: 1.0
    """

    defaults: ClassVar[Mapping[str, Any]] = {**GAUSSIAN_START, "objective": "kl_teacher_student"}
    teacher_sees_examples = True
    distils = True
    needs_labels = True

    def configure(self, beta: float = 1.0) -> None:
        self.beta = number(beta, "beta", minimum=0)

    def loss(self, step: Step, student_io_dict: IODict, teacher_io_dict: IODict, targets: Any) -> Tensor:
        index = step.examples(self.search).index
        labels = step.labels[index]
        clean, adversarial = step.student_clean()[index], step.student_on(self.search, self.student_bn)
        teacher_clean = step.teacher_clean()[index]
        values = torch.where(
            teacher_clean.argmax(1) != labels,
            kl_divergence(corrected(teacher_clean, labels), clean),
            kl_divergence(corrected(step.teacher_on(self.search), labels), adversarial),
        )
        return (values + self.beta * softmax_mse(adversarial, clean)).mean()

"""Robust soft-label adversarial distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torchdistill.losses.registry import register_mid_level_loss

from torchdistill_adv.boxes import IODict
from torchdistill_adv.checks import number
from torchdistill_adv.divergences import kl_divergence
from torchdistill_adv.losses.base import GAUSSIAN_START, AdversarialTerm

if TYPE_CHECKING:
    from torchdistill_adv.step import Step


@register_mid_level_loss
class RSLADLoss(AdversarialTerm):
    r"""RSLAD: the teacher's clean prediction replaces the label everywhere, in the search too.

    .. math::
        \ell = \frac{1}{N} \sum_i \alpha\, KL(T(x_i) \| S(x'_i)) + (1 - \alpha)\, KL(T(x_i) \| S(x_i)),
        \qquad x'_i = \arg\max_{x' \in C_\epsilon(x_i)} KL(T(x_i) \| S(x'))

    for images (N, C, H, W) and logits (N, num_classes). No label is read. The teacher sees clean images only. The
    options of every loss are those of :class:`~torchdistill_adv.losses.base.AdversarialTerm`.

    Paper: `Revisiting Adversarial Robustness Distillation: Robust Soft Labels Make Student Better
    <https://arxiv.org/abs/2108.07969>`_ (Zi et al., ICCV 2021).

    **The paper's**: the equation, alpha = 5/6. **The official code's**: a Gaussian start of deviation 0.001, the
    student in eval mode during the search, and on CIFAR-10 divergences averaged over the classes too, which a
    ``weight`` of 1 / num_classes gives.

    Args:
        alpha: share of the adversarial divergence, in [0, 1].

    Raises:
        ConfigError: at binding, with the YAML path.

    Example:
        .. code-block:: yaml

            criterion:
              key: 'RSLADLoss'
              kwargs:
                alpha: 5/6
                adversary: {key: 'PGD', kwargs: {num_steps: 10, step_size: 2/255, start: 'gaussian'}}
                threat: {norm: 'linf', eps: 8/255, space: 'pixel', mean: [0], std: [1]}
            weight: 1.0
    """

    defaults: ClassVar[Mapping[str, Any]] = {**GAUSSIAN_START, "objective": "kl_clean_teacher_student"}
    distils = True

    def configure(self, alpha: float = 5 / 6) -> None:
        self.alpha = number(alpha, "alpha", minimum=0, maximum=1)

    def loss(self, step: Step, student_io_dict: IODict, teacher_io_dict: IODict, targets: Any) -> Tensor:
        teacher = step.teacher_clean()
        adversarial = step.student_on(self.search, self.student_bn)
        value = self.alpha * kl_divergence(teacher[step.examples(self.search).index], adversarial).mean()
        if self.alpha < 1:
            value = value + (1 - self.alpha) * kl_divergence(teacher, step.student_clean()).mean()
        return value

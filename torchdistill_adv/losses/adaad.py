"""Adaptive adversarial distillation."""

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
class AdaADLoss(AdversarialTerm):
    r"""AdaAD: the student matches the teacher where the two disagree most.

    .. math::
        \ell = \frac{1}{N} \sum_i \alpha\, \tau^2 KL(T^\tau(x'_i) \| S^\tau(x'_i))
        + (1 - \alpha)\, \tau^2 KL(T^\tau(x_i) \| S^\tau(x_i)),
        \qquad x'_i = \arg\max_{x' \in C_\epsilon(x_i)} KL(T(x') \| S(x'))

    for images (N, C, H, W) and logits (N, num_classes). Both networks see the examples, and the gradient of the search
    goes through both. No label is read. The options of every loss are those of
    :class:`~torchdistill_adv.losses.base.AdversarialTerm`.

    Paper: `Boosting Accuracy and Robustness of Student Models via Adaptive Adversarial Distillation
    <https://openaccess.thecvf.com/content/CVPR2023/html/Huang_Boosting_Accuracy_and_Robustness_of_Student_Models_via_Adaptive_Adversarial_CVPR_2023_paper.html>`_
    (Huang et al., CVPR 2023).

    **The paper's**: the equation at temperature 1, the ball of 8/255, and a ball of 16/255 with steps of 4/255 (its
    larger search radius). **The official code's**: this direction of the divergence, where the authors' slides write
    KL(S || T); alpha = 1, so that clean images train nothing but the student's running statistics (the host's own clean
    pass does that here); a Gaussian start of deviation 0.001; both networks in eval mode during the search; and on
    CIFAR-10 divergences averaged over the classes too, which a ``weight`` of 1 / num_classes gives. **Ours**: the
    temperature, to compare with AdaIAD, whose code has 30.

    Args:
        alpha: share of the adversarial divergence, in [0, 1].
        temperature: divides the logits of both networks in the loss, not in the search.

    Raises:
        ConfigError: at binding, with the YAML path.

    Example:
        .. code-block:: yaml

            criterion:
              key: 'AdaADLoss'
              kwargs:
                alpha: 1.0
                adversary: {key: 'PGD', kwargs: {num_steps: 10, step_size: 2/255, start: 'gaussian'}}
                threat: {norm: 'linf', eps: 8/255, space: 'pixel', mean: [0], std: [1]}
            weight: 1.0
    """

    defaults: ClassVar[Mapping[str, Any]] = {**GAUSSIAN_START, "objective": "kl_teacher_student"}
    teacher_sees_examples = True
    distils = True

    def configure(self, alpha: float = 1.0, temperature: float = 1.0) -> None:
        self.alpha = number(alpha, "alpha", minimum=0, maximum=1)
        self.temperature = number(temperature, "temperature", above=0)

    def loss(self, step: Step, student_io_dict: IODict, teacher_io_dict: IODict, targets: Any) -> Tensor:
        teacher, student = step.teacher_on(self.search), step.student_on(self.search, self.student_bn)
        value = self.alpha * kl_divergence(teacher, student, self.temperature).mean()
        if self.alpha < 1:
            clean = kl_divergence(step.teacher_clean(), step.student_clean(), self.temperature)
            value = value + (1 - self.alpha) * clean.mean()
        return value

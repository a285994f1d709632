"""AdaAD with introspection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torchdistill.losses.registry import register_mid_level_loss

from torchdistill_adv.boxes import IODict
from torchdistill_adv.checks import flag, integer, number
from torchdistill_adv.divergences import kl_divergence
from torchdistill_adv.losses.base import GAUSSIAN_START, AdversarialTerm
from torchdistill_adv.losses.iad import check_begin, trust

if TYPE_CHECKING:
    from torchdistill_adv.step import Step


@register_mid_level_loss
class AdaIADLoss(AdversarialTerm):
    r"""AdaIAD: AdaAD, and where the teacher is unsure the student relies on its own clean prediction.

    .. math::
        \ell = \frac{1}{N} \sum_i \tau^2 KL(T^\tau(x'_i) \| S^\tau(x'_i)) + (1 - w_i)\, KL(S(x_i) \| S(x'_i)),
        \qquad w_i = p_T(y_i | x'_i)^\beta, \quad x'_i = \arg\max_{x' \in C_\epsilon(x_i)} KL(T(x') \| S(x'))

    for images (N, C, H, W) and logits (N, num_classes); without the second term before ``begin_epoch``. The gradient of
    the search goes through both networks, that of the second term through both of its arguments. The options of every
    loss are those of :class:`~torchdistill_adv.losses.base.AdversarialTerm`.

    Paper: `Boosting Accuracy and Robustness of Student Models via Adaptive Adversarial Distillation
    <https://openaccess.thecvf.com/content/CVPR2023/html/Huang_Boosting_Accuracy_and_Robustness_of_Student_Models_via_Adaptive_Adversarial_CVPR_2023_paper.html>`_
    (Huang et al., CVPR 2023), after `IAD <https://arxiv.org/abs/2106.04928>`_ (Zhu et al., ICLR 2022).

    **The official code's**: everything above, with beta = 0.1, begin_epoch = 60 of 200 and temperature 30, which is its
    default where the README's command names none; the first term is not multiplied by the weight. **The idea's**: a
    teacher that is trusted only in part counts only in part, which is ``weigh_teacher: true``.

    Args:
        temperature: of the first term.
        beta: exponent of the weight.
        begin_epoch: epochs of the stage before the second term joins.
        weigh_teacher: multiply the first term by the weight, once the second has joined.

    Raises:
        ConfigError: at binding, with the YAML path; also a ``begin_epoch`` beyond the training.

    Example:
        .. code-block:: yaml

            criterion:
              key: 'AdaIADLoss'
              kwargs:
                temperature: 30.0
                begin_epoch: 0
                adversary: {key: 'PGD', kwargs: {num_steps: 10, step_size: 2/255, start: 'gaussian'}}
                threat: {norm: 'linf', eps: 8/255, space: 'pixel', mean: [0], std: [1]}
            weight: 1.0
    """

    defaults: ClassVar[Mapping[str, Any]] = {**GAUSSIAN_START, "objective": "kl_teacher_student"}
    teacher_sees_examples = True
    distils = True
    needs_labels = True

    def configure(
        self, temperature: float = 30.0, beta: float = 0.1, begin_epoch: int = 60, weigh_teacher: bool = False
    ) -> None:
        self.temperature = number(temperature, "temperature", above=0)
        self.beta = number(beta, "beta", minimum=0)
        self.begin_epoch = integer(begin_epoch, "begin_epoch", minimum=0)
        self.weigh_teacher = flag(weigh_teacher, "weigh_teacher")

    def check_epochs(self, num_epochs: int) -> None:
        check_begin(self.begin_epoch, num_epochs)

    def loss(self, step: Step, student_io_dict: IODict, teacher_io_dict: IODict, targets: Any) -> Tensor:
        index = step.examples(self.search).index
        teacher, student = step.teacher_on(self.search), step.student_on(self.search, self.student_bn)
        values = kl_divergence(teacher, student, self.temperature)
        if step.epoch >= self.begin_epoch:
            weight = trust(teacher, step.labels[index], self.beta)
            introspection = (1 - weight) * kl_divergence(step.student_clean()[index], student)
            values = (weight * values if self.weigh_teacher else values) + introspection
        return values.mean()

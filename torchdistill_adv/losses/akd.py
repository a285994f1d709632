"""Adversarial training on a mixture of label and teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torchdistill.losses.registry import register_mid_level_loss

from torchdistill_adv.boxes import IODict
from torchdistill_adv.checks import number
from torchdistill_adv.divergences import cross_entropy, mixed_target
from torchdistill_adv.losses.base import GAUSSIAN_START, AdversarialTerm
from torchdistill_adv.objectives import Objective

if TYPE_CHECKING:
    from torchdistill_adv.step import Step


@register_mid_level_loss
class AKDLoss(AdversarialTerm):
    r"""AKD: adversarial training of the student on a mixture of the label and the teacher's prediction.

    .. math::
        \ell = \frac{1}{N} \sum_i \mathrm{CE}(S(x'_i), q_i), \qquad
        q_i = (1 - a)\, \mathrm{onehot}(y_i) + a\, p_T(x_i), \quad
        x'_i = \arg\max_{x' \in C_\epsilon(x_i)} \mathrm{CE}(S(x'), q_i)

    for images (N, C, H, W) and logits (N, num_classes). The options of every loss are those of
    :class:`~torchdistill_adv.losses.base.AdversarialTerm`.

    Paper: `On the benefits of knowledge distillation for adversarial robustness <https://arxiv.org/abs/2203.07159>`_
    (Maroto et al., 2022). The tables of AdaAD have an AKD without naming it: it may be this one, or
    :class:`~torchdistill_adv.losses.akd2.AKD2Loss`.

    **The paper's**, from its abstract: the student is adversarially trained on a mixture of labels and teacher outputs.
    **Our reading**: a share of one half, a teacher that sees clean images, and a search on the same mixture.

    Args:
        teacher_share: share a of the teacher in the mixture, in [0, 1].

    Raises:
        ConfigError: at binding, with the YAML path.

    Example:
        .. code-block:: yaml

            criterion:
              key: 'AKDLoss'
              kwargs:
                teacher_share: 0.5
                adversary: {key: 'PGD', kwargs: {num_steps: 10, step_size: 2/255, start: 'gaussian'}}
                threat: {norm: 'linf', eps: 8/255, space: 'pixel', mean: [0], std: [1]}
            weight: 1.0
    """

    defaults: ClassVar[Mapping[str, Any]] = {**GAUSSIAN_START, "objective": "ce_student_mixed"}
    distils = True
    needs_labels = True

    def configure(self, teacher_share: float = 0.5) -> None:
        self.teacher_share = number(teacher_share, "teacher_share", minimum=0, maximum=1)
        if "objective" not in self.options:
            self.objective = Objective.build(
                {"key": "ce_student_mixed", "kwargs": {"teacher_share": self.teacher_share}}
            )

    def loss(self, step: Step, student_io_dict: IODict, teacher_io_dict: IODict, targets: Any) -> Tensor:
        index = step.examples(self.search).index
        target = mixed_target(step.labels, step.teacher_clean(), self.teacher_share)
        return cross_entropy(step.student_on(self.search, self.student_bn), target[index]).mean()

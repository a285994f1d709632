"""Adversarial training with PGD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torchdistill.losses.registry import register_mid_level_loss

from torchdistill_adv.boxes import IODict
from torchdistill_adv.divergences import cross_entropy
from torchdistill_adv.losses.base import GAUSSIAN_START, AdversarialTerm

if TYPE_CHECKING:
    from torchdistill_adv.step import Step


@register_mid_level_loss
class PGDATLoss(AdversarialTerm):
    r"""PGD-AT: cross-entropy on adversarial examples, with no teacher.

    .. math::
        \ell = \frac{1}{N} \sum_i \mathrm{CE}(S(x'_i), y_i),
        \qquad x'_i = \arg\max_{x' \in C_\epsilon(x_i)} \mathrm{CE}(S(x'), y_i)

    for images (N, C, H, W) and logits (N, num_classes). It is the whole loss of a training, with torchdistill's
    TrainingBox or beside a teacher. The options of every loss are those of
    :class:`~torchdistill_adv.losses.base.AdversarialTerm`.

    Paper: `Towards Deep Learning Models Resistant to Adversarial Attacks <https://arxiv.org/abs/1706.06083>`_
    (Madry et al., ICLR 2018).

    **The paper's**: the equation. **Of the distillation papers' code**: 10 steps of 2/255 in a ball of 8/255 from a
    Gaussian start of deviation 0.001, with the student in eval mode during the search (AdaAD's repository).

    Raises:
        ConfigError: at binding, with the YAML path.

    Example:
        .. code-block:: yaml

            criterion:
              key: 'PGDATLoss'
              kwargs:
                adversary: {key: 'PGD', kwargs: {num_steps: 10, step_size: 2/255, start: 'gaussian'}}
                threat: {norm: 'linf', eps: 8/255, space: 'pixel', mean: [0], std: [1]}
            weight: 1.0
    """

    defaults: ClassVar[Mapping[str, Any]] = {**GAUSSIAN_START, "objective": "ce_student"}
    needs_labels = True

    def configure(self) -> None:
        """No options of its own."""

    def loss(self, step: Step, student_io_dict: IODict, teacher_io_dict: IODict, targets: Any) -> Tensor:
        labels = step.labels[step.examples(self.search).index]
        return cross_entropy(step.student_on(self.search, self.student_bn), labels).mean()

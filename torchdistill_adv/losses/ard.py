"""Adversarially robust distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torchdistill.losses.registry import register_mid_level_loss

from torchdistill_adv.boxes import IODict
from torchdistill_adv.checks import number
from torchdistill_adv.divergences import cross_entropy, kl_divergence
from torchdistill_adv.losses.base import UNIFORM_START, AdversarialTerm

if TYPE_CHECKING:
    from torchdistill_adv.step import Step


@register_mid_level_loss
class ARDLoss(AdversarialTerm):
    r"""ARD: the student on adversarial examples follows the teacher on clean images.

    .. math::
        \ell = \frac{1}{N} \sum_i \alpha\, \tau^2 KL(T^\tau(x_i) \| S^\tau(x'_i))
        + (1 - \alpha)\, \mathrm{CE}(S(x_i), y_i),
        \qquad x'_i = \arg\max_{x' \in C_\epsilon(x_i)} \mathrm{CE}(S(x'), y_i)

    for images (N, C, H, W), logits (N, num_classes) divided by the temperature. The options of every loss are those of
    :class:`~torchdistill_adv.losses.base.AdversarialTerm`.

    Paper: `Adversarially Robust Distillation <https://arxiv.org/abs/1905.09747>`_ (Goldblum et al., AAAI 2020).

    **The paper's**: the equation. **The official code's**: alpha = 1, temperature 30, a uniform start, the student in
    train mode during the search (``search_bn: 'train'``), and a divergence averaged over the classes too, which a
    ``weight`` of 1 / num_classes gives. **Our reading**: the student is in eval mode during the search.

    Args:
        alpha: share of distillation, in [0, 1]; the rest is clean cross-entropy.
        temperature: divides the logits of both networks.

    Raises:
        ConfigError: at binding, with the YAML path.

    Example:
        .. code-block:: yaml

            criterion:
              key: 'ARDLoss'
              kwargs:
                alpha: 1.0
                temperature: 30.0
                adversary: {key: 'PGD', kwargs: {num_steps: 10, step_size: 2/255, start: 'uniform'}}
                threat: {norm: 'linf', eps: 8/255, space: 'pixel', mean: [0], std: [1]}
            weight: 1.0
    """

    defaults: ClassVar[Mapping[str, Any]] = {**UNIFORM_START, "objective": "ce_student"}
    distils = True

    def configure(self, alpha: float = 1.0, temperature: float = 30.0) -> None:
        self.alpha = number(alpha, "alpha", minimum=0, maximum=1)
        self.temperature = number(temperature, "temperature", above=0)

    @property
    def needs_labels(self) -> bool:
        return self.alpha < 1 or super().needs_labels

    def loss(self, step: Step, student_io_dict: IODict, teacher_io_dict: IODict, targets: Any) -> Tensor:
        adversarial = step.student_on(self.search, self.student_bn)
        teacher = step.teacher_clean()[step.examples(self.search).index]
        value = self.alpha * kl_divergence(teacher, adversarial, self.temperature).mean()
        if self.alpha < 1:
            value = value + (1 - self.alpha) * cross_entropy(step.student_clean(), step.labels).mean()
        return value

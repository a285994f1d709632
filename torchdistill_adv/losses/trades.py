"""TRADES."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torchdistill.losses.registry import register_mid_level_loss

from torchdistill_adv.boxes import IODict
from torchdistill_adv.checks import number
from torchdistill_adv.divergences import cross_entropy, kl_divergence
from torchdistill_adv.losses.base import GAUSSIAN_START, AdversarialTerm

if TYPE_CHECKING:
    from torchdistill_adv.step import Step


@register_mid_level_loss
class TRADESLoss(AdversarialTerm):
    r"""TRADES: clean cross-entropy, and smoothness of the student's own predictions; no teacher.

    .. math::
        \ell = \frac{1}{N} \sum_i \mathrm{CE}(S(x_i), y_i) + \beta\, KL(S(x_i) \| S(x'_i)),
        \qquad x'_i = \arg\max_{x' \in C_\epsilon(x_i)} KL(S(x_i) \| S(x'))

    for images (N, C, H, W) and logits (N, num_classes). It is the whole loss of a training, with torchdistill's
    TrainingBox or beside a teacher. The gradient goes through both arguments of the divergence. The options of every
    loss are those of :class:`~torchdistill_adv.losses.base.AdversarialTerm`.

    Paper: `Theoretically Principled Trade-off between Robustness and Accuracy <https://arxiv.org/abs/1901.08573>`_
    (Zhang et al., ICML 2019).

    **The paper's**: the equation, beta = 6. **The official code's**: a Gaussian start of deviation 0.001, the student
    in eval mode during the search, the divergence summed over classes and averaged over images; radius 0.031 and step
    0.007, for which ours are 8/255 and 2/255 as in the distillation papers.

    Args:
        beta: weight of the divergence.

    Raises:
        ConfigError: at binding, with the YAML path.

    Example:
        .. code-block:: yaml

            criterion:
              key: 'TRADESLoss'
              kwargs:
                beta: 6.0
                adversary: {key: 'PGD', kwargs: {num_steps: 10, step_size: 2/255, start: 'gaussian'}}
                threat: {norm: 'linf', eps: 8/255, space: 'pixel', mean: [0], std: [1]}
            weight: 1.0
    """

    defaults: ClassVar[Mapping[str, Any]] = {**GAUSSIAN_START, "objective": "kl_clean_student_student"}
    needs_labels = True

    def configure(self, beta: float = 6.0) -> None:
        self.beta = number(beta, "beta", minimum=0)

    def loss(self, step: Step, student_io_dict: IODict, teacher_io_dict: IODict, targets: Any) -> Tensor:
        clean = step.student_clean()
        adversarial = step.student_on(self.search, self.student_bn)
        divergence = kl_divergence(clean[step.examples(self.search).index], adversarial)
        return cross_entropy(clean, step.labels).mean() + self.beta * divergence.mean()

"""Adversarial training with a robust and a standard teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torchdistill.losses.registry import register_mid_level_loss

from torchdistill_adv.boxes import IODict
from torchdistill_adv.checks import number
from torchdistill_adv.divergences import cross_entropy, kl_divergence
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.losses.base import UNIFORM_START, AdversarialTerm, Cost

if TYPE_CHECKING:
    from torchdistill_adv.step import Step


@register_mid_level_loss
class AKD2Loss(AdversarialTerm):
    r"""AKD2: adversarial training smoothed by a robust teacher and by a standard one.

    .. math::
        \ell = \frac{1}{N} \sum_i (1 - a - b)\, \mathrm{CE}(S(x'_i), y_i) + a\, \tau^2 KL(T^\tau(x'_i) \| S^\tau(x'_i))
        + b\, \tau^2 KL(T_0^\tau(x'_i) \| S^\tau(x'_i)),
        \qquad x'_i = \arg\max_{x' \in C_\epsilon(x_i)} \mathrm{CE}(S(x'), y_i)

    with the robust teacher T and the standard one :math:`T_0`, for images (N, C, H, W) and logits (N, num_classes).
    The options of every loss are those of :class:`~torchdistill_adv.losses.base.AdversarialTerm`.

    Paper: `Robust Overfitting may be mitigated by properly learned smoothening
    <https://openreview.net/forum?id=qZzy5urZw9>`_ (Chen et al., ICLR 2021).

    **The official code's**: a = 0.6, b = 0.1, temperature 2, both teachers on the examples. IAD's repository has
    0.5, 0.25 and temperature 1 for the same baseline. Averaging of weights, which the paper adds, is not part of the
    loss.

    Args:
        robust_weight: a.
        standard_weight: b; 0 needs no standard teacher.
        temperature: divides all logits of the two divergences.
        standard_teacher: the submodule of ``teacher_model`` that is the standard teacher; the model ``teacher_pair``
            has it under this name.

    Raises:
        ConfigError: at binding, with the YAML path; also weights above 1 in sum.

    Example:
        .. code-block:: yaml

            criterion:
              key: 'AKD2Loss'
              kwargs:
                robust_weight: 0.6
                standard_weight: 0.0
                adversary: {key: 'PGD', kwargs: {num_steps: 10, step_size: 2/255, start: 'uniform'}}
                threat: {norm: 'linf', eps: 8/255, space: 'pixel', mean: [0], std: [1]}
            weight: 1.0
    """

    defaults: ClassVar[Mapping[str, Any]] = {**UNIFORM_START, "objective": "ce_student"}
    teacher_sees_examples = True
    distils = True
    needs_labels = True

    def configure(
        self,
        robust_weight: float = 0.6,
        standard_weight: float = 0.1,
        temperature: float = 2.0,
        standard_teacher: str = "standard",
    ) -> None:
        self.robust_weight = number(robust_weight, "robust_weight", minimum=0, maximum=1)
        self.standard_weight = number(standard_weight, "standard_weight", minimum=0, maximum=1)
        if self.robust_weight + self.standard_weight > 1:
            rest = 1 - self.robust_weight
            raise ConfigError(
                f"found {self.standard_weight:g}; write at most {rest:g}, or a smaller robust_weight", "standard_weight"
            )
        self.temperature = number(temperature, "temperature", above=0)
        self.standard_teacher = standard_teacher

    @property
    def teacher_parts(self) -> Mapping[str, str]:
        return {"standard_teacher": self.standard_teacher} if self.standard_weight else {}

    def loss(self, step: Step, student_io_dict: IODict, teacher_io_dict: IODict, targets: Any) -> Tensor:
        student = step.student_on(self.search, self.student_bn)
        labels = step.labels[step.examples(self.search).index]
        values = (1 - self.robust_weight - self.standard_weight) * cross_entropy(student, labels)
        values = values + self.robust_weight * kl_divergence(step.teacher_on(self.search), student, self.temperature)
        if self.standard_weight:
            standard = step.teacher_on(self.search, self.standard_teacher)
            values = values + self.standard_weight * kl_divergence(standard, student, self.temperature)
        return values.mean()

    def outer_cost(self, images: int, num_views: int = 1) -> dict[object, Cost]:
        passes = super().outer_cost(images, num_views)
        if self.standard_weight:
            passes["teacher", self.search, self.standard_teacher] = Cost(self.search.num_rows(images, num_views))
        return passes

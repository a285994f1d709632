"""Indirect gradient distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torchdistill.losses.registry import register_mid_level_loss

from torchdistill_adv.boxes import IODict
from torchdistill_adv.checks import flag
from torchdistill_adv.divergences import kl_divergence, wide
from torchdistill_adv.losses.base import GAUSSIAN_START, AdversarialTerm, Cost

if TYPE_CHECKING:
    from torchdistill_adv.step import Step


@register_mid_level_loss
class IGDMLoss(AdversarialTerm):
    r"""IGDM: an addition to any method, which matches the input gradients of the networks without computing them.

    .. math::
        \ell = \frac{e}{E} \cdot \frac{1}{N} \sum_i KL\big( T(x_i + \delta_i) - T(x_i - \delta_i) \,\big\|\,
        S(x_i + \delta_i) - S(x_i - \delta_i) \big), \qquad \delta_i = x'_i - x_i

    where the differences of logits go through a softmax, for images (N, C, H, W) and logits (N, num_classes), in epoch
    e = 1, ..., E of the stage. Give it the adversary, threat and objective of the method that it is added to: the
    search and the passes on the examples are then shared (with DARWIN, which makes passes of its own, the search). The
    options of every loss are those of :class:`~torchdistill_adv.losses.base.AdversarialTerm`.

    Paper: `Indirect Gradient Matching for Adversarial Robust Distillation <https://arxiv.org/abs/2312.03286>`_ (Lee,
    Cho, Kim, ICLR 2025).

    **The paper's**: the equation, which wants a teacher that is nearly linear around the images, as robust ones are;
    its weight is the term's ``weight``. **Code of the same group** (SAAD's repository has it): a weight of 1 on
    CIFAR-10 and 10 on CIFAR-100, epochs from 1, a mirrored example that is not clipped to the range of images.

    Args:
        ramp: the factor e / E; ``false`` is 1 in every epoch.

    Raises:
        ConfigError: at binding, with the YAML path.

    Example:
        .. code-block:: yaml

            criterion:
              key: 'IGDMLoss'
              kwargs:
                adversary: {key: 'PGD', kwargs: {num_steps: 10, step_size: 2/255, start: 'gaussian'}}
                objective: 'kl_teacher_student'
                threat: {norm: 'linf', eps: 8/255, space: 'pixel', mean: [0], std: [1]}
            weight: 1.0
    """

    defaults: ClassVar[Mapping[str, Any]] = {**GAUSSIAN_START, "objective": "kl_teacher_student"}
    teacher_sees_examples = True
    distils = True

    def configure(self, ramp: bool = True) -> None:
        self.ramp = flag(ramp, "ramp")

    def loss(self, step: Step, student_io_dict: IODict, teacher_io_dict: IODict, targets: Any) -> Tensor:
        examples = step.examples(self.search)
        mirrored = 2 * step.images[examples.index] - examples.rows
        teacher = wide(step.teacher_on(self.search)) - wide(step.teacher(mirrored, self.search.chunk_size))
        student = wide(step.student_on(self.search, self.student_bn)) - wide(step.student(mirrored, self.student_bn))
        return (step.progress if self.ramp else 1.0) * kl_divergence(teacher, student).mean()

    def outer_cost(self, images: int, num_views: int = 1) -> dict[object, Cost]:
        rows = self.search.num_rows(images, num_views)
        return super().outer_cost(images, num_views) | {self.path: Cost(rows, 0, rows, rows)}

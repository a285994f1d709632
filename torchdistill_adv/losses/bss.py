"""Distillation on samples that support the teacher's decision boundary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torchdistill.losses.registry import register_mid_level_loss

from torchdistill_adv.boxes import IODict
from torchdistill_adv.checks import integer, number
from torchdistill_adv.divergences import cross_entropy, wide
from torchdistill_adv.guards import over_ranks_max
from torchdistill_adv.losses.base import AdversarialTerm, Search
from torchdistill_adv.sources import Chosen

if TYPE_CHECKING:
    from torchdistill_adv.step import Step

# the share of the epochs in which the samples are used
USED = 0.75


@dataclass(frozen=True)
class BaseSamples:
    """At most ``count`` images that both networks classify correctly: those on which they differ most.

    The difference is :math:`\\sum_{k \\ne y} (p_T(k) - p_S(k))^2`. At least two images, or none; none in the epochs
    after :data:`USED` of them.
    """

    count: int

    @property
    def label_free(self) -> bool:
        return False

    def choose(self, step: Step) -> Chosen:
        student, teacher, labels = wide(step.student_clean().detach()), wide(step.teacher_clean()), step.labels
        usable = (student.argmax(1) == labels) & (teacher.argmax(1) == labels)
        if step.progress >= USED:
            usable = usable & False
        squares = (teacher.softmax(1) - student.softmax(1)).square().scatter(1, labels[:, None], 0)
        if int(usable.sum()) < 2:
            usable = usable & False  # batch normalisation cannot normalise one row by itself
        order = squares.sum(1).masked_fill(~usable, -1).argsort(descending=True, stable=True)
        which = order[: min(self.count, int(usable.sum()))]
        return Chosen(step.images[which], which)

    def classes(self, step: Step) -> Tensor:
        which = step.choose(self).which
        assert which is not None
        return step.labels[which]

    def size(self, images: int, num_views: int) -> int:
        return min(self.count, images)


@register_mid_level_loss
class BSSLoss(AdversarialTerm):
    r"""BSS: distillation on images, and on samples at the teacher's decision boundary.

    .. math::
        \ell = \frac{1}{N} \sum_i \big[ \mathrm{CE}(S(x_i), y_i) + r(e)\, H(p_T^\tau(x_i), p_S^\tau(x_i)) \big]
        + a(e)\, \frac{1}{M} \sum_{j} H(p_T^\tau(x'_j), p_S^\tau(x'_j))

    .. math:: r(e) = 1 + r_0 (1 - e / E), \qquad a(e) = a_0 \max(1 - 4 e / 3 E, 0)

    in epoch e = 1, ..., E of the stage, with the cross-entropy :math:`H(p, q) = -\sum_c p_c \log q_c`, for images
    (N, C, H, W) and logits (N, num_classes). The M samples :math:`x'_j` start from *base samples*: images that both
    networks classify correctly; if there are more than ``num_base``, those with the largest
    :math:`\sum_{k \ne y} (p_T(k) - p_S(k))^2`. They go to the boundary between the predicted class and one drawn by the
    teacher's probabilities. Meant to raise clean accuracy with an ordinary teacher. The options of every loss are those
    of :class:`~torchdistill_adv.losses.base.AdversarialTerm`.

    Paper: `Knowledge Distillation with Adversarial Samples Supporting Decision Boundary
    <https://arxiv.org/abs/1805.05532>`_ (Heo et al., AAAI 2019).

    A process without base samples, in a step in which another process has some, passes two images of its batch through
    the student for no value: all processes make the same passes.

    **The official code's**: all of the above, with num_base 64, temperature 3 without a factor of its square, r_0 = 3,
    a_0 = 2; images normalised and clipped to [-2.5, 2.5] (``bounds: [-2.5, 2.5]``); a pass of their own of the student
    in train mode for the samples. **Our reading**: samples stay in the range of real images.

    Args:
        num_base: at most so many base samples a batch.
        temperature: divides the logits of both networks in H.
        kd_weight: r_0.
        bss_weight: a_0.

    Raises:
        ConfigError: at binding, with the YAML path.

    Example:
        .. code-block:: yaml

            criterion:
              key: 'BSSLoss'
              kwargs:
                num_base: 64
                adversary: {key: 'BSS', kwargs: {num_steps: 10, step_size: 0.3}}
                threat: {norm: 'l2', eps: .inf, space: 'input', mean: [0.491, 0.482, 0.447], std: [0.202, 0.199, 0.201]}
            weight: 1.0
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        "adversary": "BSS",
        "threat": {"norm": "l2", "eps": math.inf, "space": "input"},
        "objective": "gap_teacher",
    }
    teacher_sees_examples = True
    distils = True
    needs_labels = True

    def configure(
        self, num_base: int = 64, temperature: float = 3.0, kd_weight: float = 3.0, bss_weight: float = 2.0
    ) -> None:
        self.num_base = integer(num_base, "num_base", minimum=1)
        self.temperature = number(temperature, "temperature", above=0)
        self.kd_weight = number(kd_weight, "kd_weight", minimum=0)
        self.bss_weight = number(bss_weight, "bss_weight", minimum=0)

    def plan(self) -> tuple[Search, ...]:
        return (self.make_search(BaseSamples(self.num_base)),)

    def loss(self, step: Step, student_io_dict: IODict, teacher_io_dict: IODict, targets: Any) -> Tensor:
        clean = step.student_clean()
        value = cross_entropy(clean, step.labels).mean()
        value = value + (1 + self.kd_weight * (1 - step.progress)) * self._distil(step.teacher_clean(), clean)
        found = len(step.examples(self.search).rows) > 0
        if over_ranks_max(step.labels.new_tensor(found)):
            if found:
                student = step.student_on(self.search, self.student_bn)
                share = self.bss_weight * (1 - step.progress / USED)
                value = value + share * self._distil(step.teacher_on(self.search), student)
            else:
                # SyncBatchNorm of the processes with samples waits for a pass of this one, forward and backward
                value = value + 0 * step.student(step.images[:2], self.student_bn).sum()
        return value

    def _distil(self, teacher: Tensor, student: Tensor) -> Tensor:
        target = (wide(teacher) / self.temperature).softmax(1)
        return cross_entropy(wide(student) / self.temperature, target).mean()

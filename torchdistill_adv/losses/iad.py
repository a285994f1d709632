"""Introspective adversarial distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torchdistill.losses.registry import register_mid_level_loss

from torchdistill_adv.boxes import IODict
from torchdistill_adv.checks import choice, flag, integer, number
from torchdistill_adv.divergences import cross_entropy, kl_divergence, probability_of
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.losses.base import UNIFORM_START, AdversarialTerm, Cost

if TYPE_CHECKING:
    from torchdistill_adv.step import Step


def trust(teacher_logits: Tensor, labels: Tensor, beta: float) -> Tensor:
    r""":math:`p_T(y | x')^\beta`: how far the teacher is to be trusted on each row, (R,)."""
    return probability_of(labels, teacher_logits) ** beta


def check_begin(begin_epoch: int, num_epochs: int) -> None:
    """Refuse a second phase that never begins.

    Raises:
        ConfigError: it begins after the last epoch.
    """
    if begin_epoch >= num_epochs:
        raise ConfigError(
            f"found {begin_epoch}, but the stage has {num_epochs} epochs, so the introspective term would never join; "
            f"write a number below {num_epochs}",
            "begin_epoch",
        )


@register_mid_level_loss
class IADLoss(AdversarialTerm):
    r"""IAD: the student trusts the teacher in part, and its own clean prediction for the rest.

    With :math:`w_i = p_T(y_i | x'_i)^\beta`, and :math:`w_i = 1` before ``begin_epoch``, variant ``I`` is

    .. math:: \ell = \frac{1}{N} \sum_i \tau^2 KL(T^\tau(x_i) \| S^\tau(x'_i)) + (1 - w_i)\, KL(S(x_i) \| S(x'_i))

    and variant ``II``, with a standard teacher :math:`T_0` beside the robust one,

    .. math::
        \ell = \frac{1}{N} \sum_i \tfrac14\, \mathrm{CE}(S(x'_i), y_i)
        + \tfrac12 \tau^2 \big[ w_i KL(T^\tau(x'_i) \| S^\tau(x'_i)) + (1 - w_i) KL(S(x_i) \| S(x'_i)) \big]
        + \tfrac14 \tau^2 KL(T_0^\tau(x'_i) \| S^\tau(x'_i))

    both at :math:`x'_i = \arg\max_{x' \in C_\epsilon(x_i)} \mathrm{CE}(S(x'), y_i)`, for images (N, C, H, W) and logits
    (N, num_classes). The gradient goes through both arguments of the introspective term. The options of every loss are
    those of :class:`~torchdistill_adv.losses.base.AdversarialTerm`.

    Paper: `Reliable Adversarial Distillation with Unreliable Teachers <https://arxiv.org/abs/2106.04928>`_ (Zhu et al.,
    ICLR 2022).

    **The official code's**: all of the above; beta = 0.1, temperature 1, begin_epoch 60 for I and 40 for II, a uniform
    start; the student in train mode during the search (``search_bn: 'train'``); in I the teacher's term is not
    multiplied by the weight. **The idea's**: it is, with ``weigh_teacher: true``. **Our reading**: the student is in
    eval mode during the search.

    Args:
        variant: ``I`` or ``II``.
        temperature: of the teachers' terms.
        beta: exponent of the weight.
        begin_epoch: epochs of the stage before introspection begins; default 60 for I, 40 for II.
        weigh_teacher: in I, multiply the teacher's term by the weight too, as II does.
        standard_teacher: for II, the submodule of ``teacher_model`` that is the standard teacher; the model
            ``teacher_pair`` has it under this name.

    Raises:
        ConfigError: at binding, with the YAML path; also a ``begin_epoch`` beyond the training.

    Example:
        .. code-block:: yaml

            criterion:
              key: 'IADLoss'
              kwargs:
                variant: 'I'
                begin_epoch: 0
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
        variant: str = "I",
        temperature: float = 1.0,
        beta: float = 0.1,
        begin_epoch: int | None = None,
        weigh_teacher: bool = False,
        standard_teacher: str = "standard",
    ) -> None:
        self.is_second = choice(variant, "variant", ("I", "II")) == "II"
        self.temperature = number(temperature, "temperature", above=0)
        self.beta = number(beta, "beta", minimum=0)
        default_begin = 40 if self.is_second else 60
        self.begin_epoch = default_begin if begin_epoch is None else integer(begin_epoch, "begin_epoch", minimum=0)
        self.weigh_teacher = flag(weigh_teacher, "weigh_teacher") or self.is_second
        self.standard_teacher = standard_teacher

    def check_epochs(self, num_epochs: int) -> None:
        check_begin(self.begin_epoch, num_epochs)

    @property
    def teacher_parts(self) -> Mapping[str, str]:
        return {"standard_teacher": self.standard_teacher} if self.is_second else {}

    def loss(self, step: Step, student_io_dict: IODict, teacher_io_dict: IODict, targets: Any) -> Tensor:
        index = step.examples(self.search).index
        labels = step.labels[index]
        student = step.student_on(self.search, self.student_bn)
        teacher = step.teacher_on(self.search) if self.is_second else step.teacher_clean()[index]
        values = kl_divergence(teacher, student, self.temperature)
        if step.epoch >= self.begin_epoch:
            weight = trust(step.teacher_on(self.search), labels, self.beta)
            introspection = (1 - weight) * kl_divergence(step.student_clean()[index], student)
            scale = self.temperature**2 if self.is_second else 1.0
            values = (weight * values if self.weigh_teacher else values) + scale * introspection
        if self.is_second:
            standard = step.teacher_on(self.search, self.standard_teacher)
            guided = kl_divergence(standard, student, self.temperature)
            values = cross_entropy(student, labels) / 4 + values / 2 + guided / 4
        return values.mean()

    def outer_cost(self, images: int, num_views: int = 1) -> dict[object, Cost]:
        passes = super().outer_cost(images, num_views)
        if self.is_second:
            passes["teacher", self.search, self.standard_teacher] = Cost(self.search.num_rows(images, num_views))
        return passes

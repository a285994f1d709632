"""Guided adversarial contrastive distillation, as we read its abstract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torchdistill.losses.registry import register_mid_level_loss

from torchdistill_adv.boxes import IODict
from torchdistill_adv.checks import number
from torchdistill_adv.divergences import cross_entropy, probability_of, wide
from torchdistill_adv.losses.base import GAUSSIAN_START, AdversarialTerm

if TYPE_CHECKING:
    from torchdistill_adv.step import Step


def representation(logits: Tensor) -> Tensor:
    """Centred logits of length 1, (R, C): their products are correlations; shorter where they are nearly equal."""
    logits = wide(logits)
    # a network that says nothing yet would get a gradient of the order of 1 / eps
    return F.normalize(logits - logits.mean(1, keepdim=True), dim=1, eps=1e-2)


@register_mid_level_loss
class GACDLoss(AdversarialTerm):
    r"""GACD, **our reading of the abstract**: the teacher on clean images anchors the student on adversarial ones.

    .. math::
        \ell = \lambda \frac{1}{N} \sum_i \mathrm{CE}(S(x'_i), y_i)
        - \frac{\sum_i w_i \log \frac{\exp(s_i \cdot t_i / \tau)}{\sum_j \exp(s_i \cdot t_j / \tau)}}{\sum_i w_i},
        \qquad w_i = p_T(y_i | x_i)

    with the representations :math:`s_i` of :math:`S(x'_i)` and :math:`t_i` of :math:`T(x_i)`, which are centred logits
    of length 1, (N, num_classes), and :math:`x'_i = \arg\max_{x' \in C_\epsilon(x_i)} \mathrm{CE}(S(x'), y_i)`. The
    options of every loss are those of :class:`~torchdistill_adv.losses.base.AdversarialTerm`.

    Paper: `Feature Distillation With Guided Adversarial Contrastive Learning <https://arxiv.org/abs/2009.09922>`_ (Bai
    et al., 2020).

    **The paper's**, from its abstract: contrastive learning with the teacher as anchor, and samples weighted against
    the teacher's errors. **Our reading**: everything else; above all logits in the place of features (which would need
    trained projections), negatives from the batch, the weights, the temperature and the cross-entropy. Numbers of this
    loss are not those of the paper.

    Args:
        temperature: of the contrast.
        ce_weight: lambda.

    Raises:
        ConfigError: at binding, with the YAML path.

    Example:
        .. code-block:: yaml

            criterion:
              key: 'GACDLoss'
              kwargs:
                temperature: 0.1
                adversary: {key: 'PGD', kwargs: {num_steps: 10, step_size: 2/255, start: 'gaussian'}}
                threat: {norm: 'linf', eps: 8/255, space: 'pixel', mean: [0], std: [1]}
            weight: 1.0
    """

    defaults: ClassVar[Mapping[str, Any]] = {**GAUSSIAN_START, "objective": "ce_student"}
    distils = True
    needs_labels = True

    def configure(self, temperature: float = 0.1, ce_weight: float = 1.0) -> None:
        self.temperature = number(temperature, "temperature", above=0)
        self.ce_weight = number(ce_weight, "ce_weight", minimum=0)

    def loss(self, step: Step, student_io_dict: IODict, teacher_io_dict: IODict, targets: Any) -> Tensor:
        index = step.examples(self.search).index
        adversarial = step.student_on(self.search, self.student_bn)
        teacher = step.teacher_clean()
        with torch.autocast(teacher.device.type, enabled=False):
            similarity = representation(adversarial) @ representation(teacher).mT / self.temperature
        weight = probability_of(step.labels, teacher)[index]
        contrast = (weight * F.cross_entropy(similarity, index, reduction="none")).sum() / weight.sum().clamp_min(1e-8)
        return self.ce_weight * cross_entropy(adversarial, step.labels[index]).mean() + contrast

"""Contrastive relationship denoise distillation, as we read its abstract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torchdistill.losses.registry import register_mid_level_loss

from torchdistill_adv.boxes import IODict
from torchdistill_adv.checks import number
from torchdistill_adv.divergences import cross_entropy, kl_divergence, mixed_target, probability_of
from torchdistill_adv.losses.base import GAUSSIAN_START, AdversarialTerm
from torchdistill_adv.losses.gacd import representation

if TYPE_CHECKING:
    from torchdistill_adv.step import Step


def relations(logits: Tensor, temperature: float) -> Tensor:
    """Similarity of each row to the other ones, (N, N - 1), from logits (N, C)."""
    vectors = representation(logits)
    count = len(vectors)
    others = ~torch.eye(count, dtype=torch.bool, device=vectors.device)
    return (vectors @ vectors.mT / temperature)[others].view(count, count - 1)


@register_mid_level_loss
class CRDNDLoss(AdversarialTerm):
    r"""CRDND, **our reading of the abstract**: a teacher corrected by the label, and relations between the images.

    .. math::
        \ell = \frac{1}{N} \sum_i \mathrm{CE}(S(x'_i), q_i) + \lambda\, KL(r^T_i \| r^S_i), \qquad
        q_i = (1 - c_i)\, \mathrm{onehot}(y_i) + c_i\, p_T(x_i), \quad c_i = p_T(y_i | x_i)

    where :math:`r_i`, a softmax over the other images of the batch, (N - 1,), is of the products of representations
    divided by the temperature: those of :math:`T(x)` for the teacher, of :math:`S(x')` for the student; a
    representation is the centred logits of length 1. The search is
    :math:`x'_i = \arg\max_{x' \in C_\epsilon(x_i)} KL(T(x_i) \| S(x'))`. The options of every loss are those of
    :class:`~torchdistill_adv.losses.base.AdversarialTerm`.

    Paper: `Adversarial Contrastive Distillation with Adaptive Denoising <https://arxiv.org/abs/2302.08764>`_ (Wang et
    al., ICASSP 2023).

    **The paper's**, from its abstract: an adaptive compensation of the teacher's instability, and contrastive
    relationships among examples. **Our reading**: everything else. Numbers of this loss are not those of the paper.

    Args:
        relation_weight: lambda.
        temperature: of the relations.

    Raises:
        ConfigError: at binding, with the YAML path.

    Example:
        .. code-block:: yaml

            criterion:
              key: 'CRDNDLoss'
              kwargs:
                relation_weight: 1.0
                adversary: {key: 'PGD', kwargs: {num_steps: 10, step_size: 2/255, start: 'gaussian'}}
                threat: {norm: 'linf', eps: 8/255, space: 'pixel', mean: [0], std: [1]}
            weight: 1.0
    """

    defaults: ClassVar[Mapping[str, Any]] = {**GAUSSIAN_START, "objective": "kl_clean_teacher_student"}
    distils = True
    needs_labels = True

    def configure(self, relation_weight: float = 1.0, temperature: float = 0.5) -> None:
        self.relation_weight = number(relation_weight, "relation_weight", minimum=0)
        self.temperature = number(temperature, "temperature", above=0)

    def loss(self, step: Step, student_io_dict: IODict, teacher_io_dict: IODict, targets: Any) -> Tensor:
        adversarial, teacher = step.student_on(self.search, self.student_bn), step.teacher_clean()
        target = mixed_target(step.labels, teacher, probability_of(step.labels, teacher)[:, None])
        values = cross_entropy(adversarial, target[step.examples(self.search).index]).mean()
        with torch.autocast(teacher.device.type, enabled=False):
            # several examples of an image are set in relation group by group, as the images are
            groups = [relations(rows, self.temperature) for rows in adversarial.split(len(teacher))]
            relation = kl_divergence(relations(teacher, self.temperature).repeat(len(groups), 1), torch.cat(groups))
        return values + self.relation_weight * relation.mean()

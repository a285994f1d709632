"""How far two networks predict the same: classes, divergence, and the order of the classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchdistill_adv.divergences import kl_divergence
from torchdistill_adv.ranking import soft_spearman

SHARPNESS = (0.5, 1.0, 2.0, 5.0, 10.0)

DEFINITION = (
    "Same class is the share of images on which both networks predict the same class; KL(T || S) and Spearman's rank "
    "correlation of the logits are means over images. Soft Spearman ranks the logits, divided by their standard "
    "deviation, by sigmoids of the sharpness given; hard Spearman ranks them exactly, equal ones alike."
)


def average_ranks(values: Tensor) -> Tensor:
    """Ranks 1, ..., n within each row of (R, n), the smallest first; equal values share the mean of theirs."""
    ordered = values.sort(1).values
    below, up_to = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (below + up_to + 1).double() / 2


def spearman(first: Tensor, second: Tensor) -> Tensor:
    r"""Spearman's rank correlation of each pair of rows (R, n), (R,), in float64.

    .. math:: \rho = \frac{\sum_c (r_c - \bar r)(s_c - \bar s)}{\sqrt{\sum_c (r_c - \bar r)^2 \sum_c (s_c - \bar s)^2}}

    Equal values share the mean of their ranks r, s. NaN where all values of a row are equal.
    """
    a, b = (ranks - ranks.mean(1, keepdim=True) for ranks in (average_ranks(first), average_ranks(second)))
    return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()


def compare_logits(teacher: Tensor, student: Tensor, sharpness: Sequence[float] = SHARPNESS) -> dict[str, Tensor]:
    r"""Measures of agreement of each row, all (R,), from logits (R, num_classes).

    ``same`` is whether the largest logit is that of the same class; ``kl`` is :math:`KL(T \| S)`; ``hard`` is
    :func:`spearman`, NaN where a network has equal logits only; ``soft 2`` is
    :func:`~torchdistill_adv.ranking.soft_spearman` at sharpness 2, and likewise for each ``sharpness``.

    Fig. 3 of the supplement of `SmaraAD
    <https://openaccess.thecvf.com/content/CVPR2024/html/Yin_Adversarial_Distillation_Based_on_Slack_Matching_and_Attribution_Region_Alignment_CVPR_2024_paper.html>`_
    (Yin et al., CVPR 2024) compares soft and hard correlations. **Our reading**: that of logits.

    Raises:
        ConfigError: fewer than two classes.
    """
    # soft ranks take memory for R C^2
    rows = max(1, 2**22 // teacher.shape[1] ** 2)
    pairs = list(zip(student.split(rows), teacher.split(rows), strict=True))
    return {
        "same": (teacher.argmax(1) == student.argmax(1)).double(),
        "kl": kl_divergence(teacher, student).double(),
        "hard": spearman(teacher, student),
        **{f"soft {beta:g}": torch.cat([soft_spearman(s, t, beta) for s, t in pairs]).double() for beta in sharpness},
    }

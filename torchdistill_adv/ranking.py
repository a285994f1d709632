"""Rank correlation of predictions that gradients flow through."""

from __future__ import annotations

import torch
from torch import Tensor

from torchdistill_adv.divergences import wide
from torchdistill_adv.errors import ConfigError


def soft_rank(values: Tensor, sharpness: float) -> Tensor:
    r"""Differentiable ranks within each row, the largest value first.

    .. math:: r_i = \sum_{j=1}^{n} \sigma\big(\beta\, (x_j - x_i)\big)

    The sum has the term j = i, as in the paper, so the ranks tend to 1/2, 3/2, ..., n - 1/2 as the sharpness
    :math:`\beta` grows, not to 1, ..., n; the offset cancels in a difference of ranks. Their sum is :math:`n^2 / 2` at
    any sharpness, and equal values have equal ranks.

    Paper: `Adversarial Distillation Based on Slack Matching and Attribution Region Alignment
    <https://openaccess.thecvf.com/content/CVPR2024/html/Yin_Adversarial_Distillation_Based_on_Slack_Matching_and_Attribution_Region_Alignment_CVPR_2024_paper.html>`_
    (Yin et al., CVPR 2024), Algorithm 1 of the supplement.

    Args:
        values: (R, n); takes memory for R n^2.
        sharpness: slope of the sigmoid, beta in Algorithm 1 and gamma in the paper's text.

    Returns:
        Ranks (R, n).
    """
    scaled = sharpness * values
    return torch.sigmoid(scaled[:, None, :] - scaled[:, :, None]).sum(2)


def soft_spearman(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sharpness: float = 2.0,
    top_k: int | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    r"""Spearman's rank correlation of student and teacher for each row, from soft ranks.

    .. math:: \rho = 1 - \frac{6 \sum_i (r_i^S - r_i^T)^2}{n\, (n^2 - 1)}

    It lies in [-1, 1] at any sharpness: soft ranks are averages of permutations. The formula is exact for ranks without
    ties; a network with equal logits has 1/2 with a sharply ranked one, not 0. Computed in float32 or wider.

    Paper: as for :func:`soft_rank`, Algorithm 2, which returns :math:`-\rho`.

    **Our reading** (the paper says neither what is ranked nor how sharply): logits, those of each network divided by
    their standard deviation over the ranked classes, so that one sharpness fits any network; sharpness 2; ``top_k``
    and ``labels``. A row whose logits are equal up to rounding is not divided.

    Args:
        student_logits: (R, C).
        teacher_logits: (R, C); gradients flow through both, so the caller detaches what is to stay.
        sharpness: slope of the sigmoid, for logits of unit standard deviation.
        top_k: rank only the classes that the teacher puts first; None is all, in memory for R C^2.
        labels: (R,), classes that are ranked in any case; one that is not among the ``top_k`` takes the last place.

    Returns:
        Correlations (R,).

    Raises:
        ConfigError: fewer than two classes to rank.
    """
    student, teacher = wide(student_logits), wide(teacher_logits)
    if top_k is not None and top_k < student.shape[1]:
        scores = teacher.detach()
        if labels is not None:
            scores = scores.scatter(1, labels[:, None], torch.inf)
        chosen = scores.topk(top_k, dim=1).indices
        student, teacher = student.gather(1, chosen), teacher.gather(1, chosen)
    n = student.shape[1]
    if n < 2:
        raise ConfigError(f"found {n} to rank; a correlation needs at least 2 classes", "top_k")
    difference = soft_rank(_unit_spread(student), sharpness) - soft_rank(_unit_spread(teacher), sharpness)
    return 1 - 6 * difference.square().sum(1) / (n * (n**2 - 1))


def _unit_spread(logits: Tensor) -> Tensor:
    """Rows of unit standard deviation; their mean stays, which no rank sees."""
    spread = logits.std(1, correction=0, keepdim=True)
    rounding = torch.finfo(logits.dtype).eps * logits.abs().amax(1, keepdim=True)
    return logits / spread.where(spread > rounding, 1)

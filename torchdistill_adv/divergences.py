"""Row-wise divergences between predictions, always computed in float32 or wider.

All take logits of shape (R, C) and return (R,).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(logits: Tensor) -> Tensor:
    """Logits in float32 at least: half precision is too coarse for a softmax."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def kl_divergence(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r""":math:`\tau^2\, KL(P \| Q) = \tau^2 \sum_c p_c (\log p_c - \log q_c)`, of logits divided by the temperature.

    Gradients flow through both arguments.
    """
    log_p, log_q = (F.log_softmax(wide(logits) / temperature, 1) for logits in (p_logits, q_logits))
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(1)


def softmax_mse(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    r""":math:`\frac{1}{C} \sum_c (p_c - q_c)^2`."""
    return (F.softmax(wide(p_logits), 1) - F.softmax(wide(q_logits), 1)).square().mean(1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    r""":math:`-\log p_y`, or :math:`-\sum_c q_c \log p_c` where ``labels`` are probabilities q (R, C)."""
    return F.cross_entropy(wide(logits), labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    r""":math:`\max_{j \ne y} z_j - z_y`, (R,): positive where another class is predicted."""
    logits = wide(logits)
    own = logits.gather(1, labels[:, None])[:, 0]
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1) - own


def probability_of(labels: Tensor, logits: Tensor) -> Tensor:
    """:math:`p_y`, the probability of each row's label, (R,)."""
    return F.softmax(wide(logits), 1).gather(1, labels[:, None])[:, 0]


def mixed_target(labels: Tensor, teacher_logits: Tensor, teacher_share: float | Tensor) -> Tensor:
    r""":math:`(1 - a)\, \mathrm{onehot}(y) + a\, p_T`, (R, C), for a share ``a`` of the teacher, one or (R, 1)."""
    probabilities = F.softmax(wide(teacher_logits), 1)
    one_hot = F.one_hot(labels, probabilities.shape[1]).to(probabilities)
    return (1 - teacher_share) * one_hot + teacher_share * probabilities

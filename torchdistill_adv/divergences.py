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


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    r""":math:`KL(P \| Q) = \sum_c p_c (\log p_c - \log q_c)`; gradients flow through both arguments."""
    log_p, log_q = F.log_softmax(wide(p_logits), 1), F.log_softmax(wide(q_logits), 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def softmax_mse(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    r""":math:`\frac{1}{C} \sum_c (p_c - q_c)^2`."""
    return (F.softmax(wide(p_logits), 1) - F.softmax(wide(q_logits), 1)).square().mean(1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    r""":math:`-\log p_y`."""
    return F.cross_entropy(wide(logits), labels, reduction="none")

"""Neuron selectivity transfer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchdistill.losses.registry import register_mid_level_loss

from torchdistill_adv.boxes import IODict
from torchdistill_adv.divergences import wide
from torchdistill_adv.hosts.maps import of_same_size, pairs_of


def polynomial_mmd(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared MMD of two sets of channels with the kernel :math:`(a^\top b)^2`, of maps of one size; a scalar.

    Maps are (N, C_S, H, W) and (N, C_T, H, W); each channel is divided by its l2 norm over the pixels.
    """
    s, t = (normalize(wide(x).flatten(2), dim=2) for x in (student, teacher))

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b.transpose(1, 2)).square().mean()

    return mean_kernel(t, t) + mean_kernel(s, s) - 2 * mean_kernel(s, t)


@register_mid_level_loss
class NSTLoss(nn.Module):
    r"""NST: the student's channels are distributed as the teacher's, which says to which regions neurons respond.

    .. math::
        \ell = \sum_l w_l \frac{1}{N} \sum_i \Big( \frac{1}{C_T^2} \sum_{j, k} (t_{ij}^\top t_{ik})^2
        + \frac{1}{C_S^2} \sum_{j, k} (s_{ij}^\top s_{ik})^2
        - \frac{2}{C_S C_T} \sum_{j, k} (s_{ij}^\top t_{ik})^2 \Big)

    for pairs l of maps (N, C_S, H_S, W_S) and (N, C_T, H_T, W_T), and :math:`s_{ij}, t_{ik} \in R^{HW}` their
    channels, flattened and of unit l2 norm. The numbers of channels may differ; the larger map is averaged down to the
    size of the smaller one. The teacher gets no gradient.

    Paper: `Like What You Like: Knowledge Distill via Neuron Selectivity Transfer <https://arxiv.org/abs/1707.01219>`_
    (Huang and Wang, 2017).

    **The paper's**: squared MMD between normalised channels, of which this is the polynomial kernel with d = 2 and
    c = 0. **RepDistiller's** (`repository <https://github.com/HobbitLong/RepDistiller>`_): the sum over the
    outputs of all stages, average pooling to the smaller map, and the first term, which is constant; the weight there
    is 50 beside a cross-entropy of weight 1.

    Args:
        nst_pairs: modules to compare, in the form of torchdistill's ``ATLoss``.

    Example:
        .. code-block:: yaml

            criterion:
              key: 'NSTLoss'
              kwargs:
                nst_pairs:
                  pair1:
                    teacher: {io: 'output', path: 'layer1'}
                    student: {io: 'output', path: 'layer1'}
                    weight: 1
            weight: 50.0
    """

    def __init__(self, nst_pairs: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        self.nst_pairs = nst_pairs

    def forward(self, student_io_dict: IODict, teacher_io_dict: IODict, *args: Any, **kwargs: Any) -> Tensor:
        pairs = pairs_of(self.nst_pairs, student_io_dict, teacher_io_dict)
        values = [weight * polynomial_mmd(*of_same_size(s, t.detach())) for s, t, weight in pairs]
        return torch.stack(values).sum()

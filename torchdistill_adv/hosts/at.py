"""Attention transfer between maps of different sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torchdistill.losses.mid_level import ATLoss
from torchdistill.losses.registry import register_mid_level_loss

from torchdistill_adv.hosts.maps import of_same_size


@register_mid_level_loss
class PooledATLoss(ATLoss):
    r"""AT, as torchdistill's ``ATLoss`` in mode ``code``, also where the two maps have different sizes.

    .. math::
        \ell = \sum_l w_l \frac{1}{N H W} \sum_i \| a(s_{il}) - a(t_{il}) \|_2^2, \qquad
        a(x) = \frac{\sum_c x_c^2}{\| \sum_c x_c^2 \|_2}

    for maps (N, C, H, W), the larger one averaged down to the size of the smaller one; where sizes agree the two
    losses are equal.

    Paper: `Paying More Attention to Attention <https://openreview.net/forum?id=Sks9_ajex>`_ (Zagoruyko and Komodakis,
    ICLR 2017). **The official code's**: the squared distance, averaged over the pixels too. **RepDistiller's**
    (`repository <https://github.com/HobbitLong/RepDistiller>`_): average pooling to the smaller map, without which
    pairs of different style cannot be compared; its weight is 1000.

    Args:
        at_pairs: modules to compare.

    Example:
        .. code-block:: yaml

            criterion:
              key: 'PooledATLoss'
              kwargs:
                at_pairs:
                  pair1:
                    teacher: {io: 'output', path: 'layer1'}
                    student: {io: 'output', path: 'layer1'}
                    weight: 1
            weight: 1000.0
    """

    def __init__(self, at_pairs: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(at_pairs, mode="code")

    def compute_at_loss(self, student_feature_map: Tensor, teacher_feature_map: Tensor) -> Tensor:
        value: Tensor = super().compute_at_loss(*of_same_size(student_feature_map, teacher_feature_map))
        return value

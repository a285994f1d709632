"""Variational information distillation between maps of different sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.losses.registry import register_mid_level_loss

from torchdistill_adv.boxes import IODict
from torchdistill_adv.hosts.maps import of_same_size, pairs_of


@register_mid_level_loss
class PooledVIDLoss(nn.Module):
    r"""VID, as torchdistill's ``VIDLoss``, also where the two maps have different sizes.

    .. math::
        \ell = \sum_l w_l \frac{1}{N C H W} \sum_{i, c, u}
        \frac{(t_{icu} - \mu_{cu}(s_i))^2}{2 \sigma_c^2} + \frac{1}{2} \log \sigma_c^2

    for the teacher's map t (N, C, H, W), and the mean and variance that a regressor of torchdistill's
    ``VariationalDistributor4VID`` gives for the student's. The larger of t and mean is averaged down to the size of
    the smaller one; where sizes agree the two losses are equal.

    Paper: `Variational Information Distillation for Knowledge Transfer <https://arxiv.org/abs/1904.05835>`_ (Ahn et
    al., CVPR 2019). **RepDistiller's** (`repository <https://github.com/HobbitLong/RepDistiller>`_): all stages,
    regressors as wide as the teacher, a variance that starts at 5, a weight of 1, and pooling. **Our reading**: where
    the *student's* map is the larger one, its prediction is pooled, where RepDistiller pools what it is made from.

    Args:
        feature_pairs: pairs of a regressor and the module of the teacher that it predicts.

    Example:
        .. code-block:: yaml

            criterion:
              key: 'PooledVIDLoss'
              kwargs:
                feature_pairs:
                  pair1:
                    teacher: {io: 'output', path: 'layer1'}
                    student: {io: 'output', path: 'regressor_dict.regressor1'}
                    weight: 1
            weight: 1.0
    """

    def __init__(self, feature_pairs: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        self.feature_pairs = feature_pairs

    def forward(self, student_io_dict: IODict, teacher_io_dict: IODict, *args: Any, **kwargs: Any) -> Tensor:
        values = []
        for (mean, variance), target, weight in pairs_of(self.feature_pairs, student_io_dict, teacher_io_dict):
            mean, target = of_same_size(mean, target)
            values.append(weight * ((target - mean).square() / (2 * variance) + variance.log() / 2).mean())
        return torch.stack(values).sum()

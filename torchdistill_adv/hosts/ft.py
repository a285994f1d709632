"""Factor transfer in the form of RepDistiller."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import l1_loss, normalize
from torchdistill.losses.registry import register_mid_level_loss

from torchdistill_adv.boxes import IODict
from torchdistill_adv.divergences import wide
from torchdistill_adv.hosts.maps import of_same_size


@register_mid_level_loss
class FactorMapLoss(nn.Module):
    r"""FT: the student's translated map has its energy where the teacher's paraphrased one has it.

    .. math::
        \ell = \frac{1}{N H W} \sum_i \| a(s_i) - a(t_i) \|_1, \qquad
        a(x) = \frac{\sum_c x_c^2}{\| \sum_c x_c^2 \|_2}

    for the student's translator and the teacher's paraphraser, (N, C, H, W) each, of torchdistill's
    ``Student4FactorTransfer`` and ``Teacher4FactorTransfer``. The larger map is averaged down to the size of the
    smaller one.

    Paper: `Paraphrasing Complex Network: Network Compression via Factor Transfer <https://arxiv.org/abs/1802.04977>`_
    (Kim et al., NeurIPS 2018). **RepDistiller's** (`repository <https://github.com/HobbitLong/RepDistiller>`_): the
    map a, to which its weight of 200 belongs. The paper, and torchdistill's ``FTLoss``, normalise the whole factor
    (all channels), which gives another scale.

    Args:
        paraphraser_path: module of the teacher.
        translator_path: module of the student.

    Example:
        .. code-block:: yaml

            criterion:
              key: 'FactorMapLoss'
              kwargs: {paraphraser_path: 'paraphraser', translator_path: 'translator'}
            weight: 200.0
    """

    def __init__(self, paraphraser_path: str = "paraphraser", translator_path: str = "translator") -> None:
        super().__init__()
        self.paraphraser_path, self.translator_path = paraphraser_path, translator_path

    def forward(self, student_io_dict: IODict, teacher_io_dict: IODict, *args: Any, **kwargs: Any) -> Tensor:
        factors = student_io_dict[self.translator_path]["output"], teacher_io_dict[self.paraphraser_path]["output"]
        student, teacher = (normalize(wide(x).square().mean(1).flatten(1)) for x in of_same_size(*factors))
        return l1_loss(student, teacher)

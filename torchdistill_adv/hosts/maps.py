"""Feature maps of two networks, made comparable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from torchdistill_adv.boxes import IODict


def of_same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps (N, C, H, W), averaged over cells down to the smaller height and width of the two."""
    height, width = (min(sizes) for sizes in zip(a.shape[2:], b.shape[2:], strict=True))
    small_a, small_b = (
        x if x.shape[2:] == (height, width) else adaptive_avg_pool2d(x, (height, width)) for x in (a, b)
    )
    return small_a, small_b


def pairs_of(
    pairs: Mapping[str, Mapping[str, Any]], student_io_dict: IODict, teacher_io_dict: IODict
) -> Iterator[tuple[Any, Any, float]]:
    """What the modules of each pair gave, the student's first, and the weight of the pair, 1 if it has none."""
    for pair in pairs.values():
        student, teacher = (
            io_dict[pair[side]["path"]][pair[side]["io"]]
            for side, io_dict in (("student", student_io_dict), ("teacher", teacher_io_dict))
        )
        yield student, teacher, pair.get("weight", 1)

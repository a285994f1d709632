"""How alike the decision boundaries of two networks are around the same images: MagSim and AngSim."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchdistill_adv.adversaries import BSS
from torchdistill_adv.objectives import Network, boundary_gap
from torchdistill_adv.threat import ThreatModel

DEFAULT_SEARCH = BSS()


class BoundarySimilarity(NamedTuple):
    """What :func:`boundary_similarity` finds, for each of N images.

    Args:
        right: whether both networks classify it rightly, (N,); nothing is searched for the others.
        teacher_flipped: whether the search left the label's region of the teacher, (N,).
        student_flipped: the same of the student, (N,).
        magnitude: ratio of the shorter of both moves to the longer one, (N,); NaN unless both flipped.
        angle: cosine between the moves, (N,); NaN unless both flipped.
    """

    right: Tensor
    teacher_flipped: Tensor
    student_flipped: Tensor
    magnitude: Tensor
    angle: Tensor


def boundary_similarity(
    teacher: Network,
    student: Network,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    search: BSS = DEFAULT_SEARCH,
) -> BoundarySimilarity:
    r"""Moves of the same images over the boundaries of two networks, compared in length and direction.

    .. math::
        \mathrm{MagSim} = \frac{1}{M} \sum_x \frac{\min(\|v^T\|_2, \|v^S\|_2)}{\max(\|v^T\|_2, \|v^S\|_2)}, \qquad
        \mathrm{AngSim} = \frac{1}{M} \sum_x \frac{\langle v^T, v^S \rangle}{\|v^T\|_2\, \|v^S\|_2}, \qquad
        v = x_\mathrm{adv} - x

    For each image that both networks classify rightly, :class:`~torchdistill_adv.adversaries.BSS` starts from the image
    itself and goes from the label to one other class, the teacher's second, which is the same for both networks. The M
    images of the means are those whose prediction left the label in both; a move of length zero counts as one that did
    not. MagSim lies in (0, 1], AngSim in [-1, 1]; two equal networks have 1 and 1, and their order changes nothing but
    the class that both searches go to.

    Papers: `Knowledge Distillation with Adversarial Samples Supporting Decision Boundary
    <https://arxiv.org/abs/1805.05532>`_ (Heo et al., AAAI 2019); TALD (WACV 2023), Fig. 6. **Our reading**: all of the
    above. The sources at hand have these measures in words only (distances and directions to the boundary), and say
    neither which images count nor which class the search goes to.

    Args:
        teacher: images to logits (N, num_classes), in eval mode.
        student: the same.
        images: (N, C, ...), in model-input space, where v is measured.
        labels: their classes, (N,).
        threat: bounds of the search; with ``eps`` ``.inf`` those of real images alone.
        search: the search for both.
    """
    with torch.no_grad():
        teacher_logits = teacher(images)
        right = (teacher_logits.argmax(1) == labels) & (student(images).argmax(1) == labels)
    flipped = [torch.zeros_like(right), torch.zeros_like(right)]
    magnitude = torch.full(labels.shape, torch.nan, dtype=torch.float64, device=images.device)
    angle = magnitude.clone()
    if bool(right.any()):
        x, base = images[right], labels[right]
        target = teacher_logits[right].scatter(1, base[:, None], -torch.inf).argmax(1)
        moves = []
        for network, found in zip((teacher, student), flipped, strict=True):
            rows = search.search_from(x, boundary_gap(network, base, target), x, threat).rows
            moves.append(rows - x)
            with torch.no_grad():
                found[right] = (network(rows).argmax(1) != base) & (moves[-1].flatten(1) != 0).any(1)
        both = (flipped[0] & flipped[1])[right]
        magnitude[right], angle[right] = (v.where(both, torch.nan) for v in compare_moves(*moves))
    return BoundarySimilarity(right, flipped[0], flipped[1], magnitude, angle)


def compare_moves(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The shorter length over the longer one, and the cosine, of each pair of rows (R, ...); both (R,), in float64."""
    first, second = (v.flatten(1).double() for v in (first, second))
    lengths = torch.stack([first.norm(dim=1), second.norm(dim=1)])
    # rounding may carry the cosine of parallel moves beyond 1
    cosine = ((first * second).sum(1) / lengths.prod(0)).clamp(-1, 1)
    return lengths.amin(0) / lengths.amax(0), cosine


def describe_similarity(found: BoundarySimilarity, search: BSS = DEFAULT_SEARCH) -> dict[str, Any]:
    """Means and rates over all images, for the record; the rates are shares of those that both classify rightly, in %.

    ``magsim``, ``angsim`` and the rates are None where they have no image, and ``note`` says so.
    """
    both = found.teacher_flipped & found.student_flipped
    num_right, num_compared = int(found.right.sum()), int(both.sum())
    flips = {"teacher": found.teacher_flipped, "student": found.student_flipped, "both": both}
    note = None
    if not num_right:
        note = "no image is classified rightly by both networks, so there is nothing to compare"
    elif not num_compared:
        note = f"no image left the label in both networks within {search.num_steps} steps: MagSim and AngSim undefined"
    return {
        "definition": definition(search),
        "settings": dataclasses.asdict(search),
        "num_right": num_right,
        "flipped": {who: 100 * int(which.sum()) / num_right if num_right else None for who, which in flips.items()},
        "num_compared": num_compared,
        "magsim": float(found.magnitude[both].mean()) if num_compared else None,
        "angsim": float(found.angle[both].mean()) if num_compared else None,
        "note": note,
    }


def definition(search: BSS) -> str:
    """What MagSim and AngSim are, for wherever the numbers are shown."""
    return (
        "v = x_adv - x, in model-input space, is the move of BSS "
        f"({search.num_steps} steps, alpha {search.step_size:g}) from a test image x that both networks classify "
        "rightly, from its label toward the teacher's second class, for the teacher (v_T) and for the student (v_S). "
        "MagSim is the mean over images of min(|v_T|, |v_S|) / max(|v_T|, |v_S|), AngSim the mean cosine between v_T "
        "and v_S. Images whose prediction did not leave the label in both networks are left out. This is our reading: "
        "the papers give words only."
    )

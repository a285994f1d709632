"""How far apart the adversarial particles of one image are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchdistill_adv.adversaries import BSS, PGD, SVGD
from torchdistill_adv.noise import ImageNoise
from torchdistill_adv.objectives import Network, View, gap_teacher, kl_teacher_clean_teacher
from torchdistill_adv.threat import ThreatModel

# searches for several particles an image, and the bandwidth of those that are SVGD
SEARCHES: dict[str, float | str | None] = {"SVGD, paper": 1e-3, "SVGD, median": "median", "BSS": None, "PGD": None}

DEFINITION = (
    "SSE is the mean over the K(K-1)/2 pairs of particles of an image of their squared l2 distance, |x_i - x_j|^2, in "
    "the space of the threat model; shown are its mean and standard deviation over the images. All searches attack the "
    "teacher from the same random starts, in the same ball, in as many steps; their length is eta, for BSS eta times "
    "the gap between two logits. BSS and PGD run K times, BSS toward a class drawn anew each time. Images: those that "
    "the teacher classifies rightly; a particle fools it where it no longer does. The pairs, the averages, and eta for "
    "BSS are our reading: the paper does not give them."
)


def sse(particles: Tensor) -> Tensor:
    r"""The mean squared distance between the K particles of each image, (N,), from (N, K, D) with K > 1.

    .. math:: \frac{2}{K (K - 1)} \sum_{i < j} \|x_i - x_j\|_2^2

    In a ball of radius :math:`\epsilon` in l2 it is at most :math:`2 \epsilon^2 K / (K - 1)`.
    """
    # the pairs' distances add up to K times those from the mean, which keeps small ones exact
    centred = particles - particles.mean(1, keepdim=True)
    return 2 * centred.square().sum((1, 2)) / (particles.shape[1] - 1)


def find_particles(
    search: str,
    teacher: Network,
    images: Tensor,
    logits: Tensor,
    threat: ThreatModel,
    settings: SVGD,
    noise: ImageNoise,
) -> Tensor:
    r"""Particles of each image by one of :data:`SEARCHES`, (K, N, ...), in model-input space.

    SVGD and PGD ascend :math:`KL(T(x') \| T(x))`; BSS goes toward a class that is drawn by the teacher's probabilities,
    from a random start and with projection onto the ball, as in the experiment of Fig. 1 of `TALD
    <https://openaccess.thecvf.com/content/WACV2023/html/Nguyen-Duc_Adversarial_Local_Distribution_Regularization_for_Knowledge_Distillation_WACV_2023_paper.html>`_
    (Nguyen-Duc et al., WACV 2023). **The paper's**: eps, eta and tau are the same for BSS. **Our reading**: eta is then
    BSS's alpha, with as many steps; PGD takes part, with steps of eta that follow the unit gradient (the sign in an
    l-infinity ball).

    Args:
        search: its name.
        teacher: rows to logits, in eval mode.
        images: clean images, (N, ...), in model-input space.
        logits: the teacher's on them, (N, num_classes).
        threat: the ball.
        settings: K, L, eta and tau of all searches, and the direction's norm of SVGD. At most N rows go through the
            network at once.
        noise: of the K N rows, particle by particle.
    """
    count = settings.num_particles
    repeated = images.repeat(count, *[1] * (images.dim() - 1))
    # the classes that BSS goes to are not drawn from the numbers of the starts
    classes = noise.some(torch.arange(len(repeated)), "classes")
    view = View(repeated, None, teacher, teacher, classes, logits.repeat(count, 1))
    settings = dataclasses.replace(settings, chunk_size=len(images))
    options: dict[str, Any] = {name: getattr(settings, name) for name in ("num_steps", "step_size", "chunk_size")}
    bandwidth = SEARCHES[search]
    if bandwidth is not None:
        svgd = dataclasses.replace(settings, bandwidth=bandwidth)
        rows = svgd(kl_teacher_clean_teacher(view), images, threat, noise).rows
    elif search == "PGD":
        pgd = PGD(**options, noise_factor=settings.noise_factor)
        rows = pgd(kl_teacher_clean_teacher(view), repeated, threat, noise).rows
    else:
        start = threat.random_start(repeated, noise.uniform(repeated.shape), settings.noise_factor)
        rows = BSS(**options).search_from(start, gap_teacher(view), repeated, threat).rows
    return rows.view(count, *images.shape)


def search_name(row: Mapping[str, Any]) -> str:
    """The search of a row of results, with the bandwidth that tells one SVGD from the other."""
    return row["search"] if row["bandwidth"] is None else f"{row['search']}, bandwidth {row['bandwidth']}"

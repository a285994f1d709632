"""Picture: the adversarial loss when the weights move along one random direction."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from torchdistill_adv.divergences import cross_entropy
from torchdistill_adv.report.pictures import Array, pgd_examples
from torchdistill_adv.threat import ThreatModel, unit_l2

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALPHAS = tuple(round(0.1 * i, 1) for i in range(-10, 11))


@dataclass(frozen=True)
class Landscape:
    """Losses of M networks at A places on a line through their weights.

    Attributes:
        alphas: the places, (A,); 0 is the network itself.
        names: M names.
        clean: mean cross-entropy on clean images, (M, A).
        adversarial: the same on adversarial ones, (M, A).
        num_images: how many each mean is over.
        attack: in one line.
    """

    alphas: Array
    names: tuple[str, ...]
    clean: Array
    adversarial: Array
    num_images: int
    attack: str


def filter_normalized_direction(network: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    r"""A Gaussian direction in weight space whose filters are as long as those of the network.

    .. math:: d_f \leftarrow \frac{d_f}{\|d_f\|_2} \|w_f\|_2

    for every filter f, which is an entry along the first dimension of a weight; of a linear layer it is a row. Biases,
    and the vectors of normalisation layers, do not move: their direction is zero.

    Paper: `Visualizing the Loss Landscape of Neural Nets <https://arxiv.org/abs/1712.09913>`_ (Li et al., NeurIPS
    2018). **The official code's**: vectors do not move.

    Args:
        network: any.
        seed: networks with the same shapes have the same Gaussian numbers.

    Returns:
        A tensor for each of ``network.named_parameters()``.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = {}
    for name, parameter in network.named_parameters():
        weight = parameter.detach()
        if weight.dim() < 2:
            direction[name] = torch.zeros_like(weight)
            continue
        gaussian = torch.randn(weight.shape, generator=generator).to(weight)
        lengths = weight.flatten(1).norm(dim=1, keepdim=True)
        direction[name] = (unit_l2(gaussian).flatten(1) * lengths).view_as(weight)
    return direction


def collect_landscape(
    networks: Mapping[str, nn.Module],
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    alphas: Sequence[float] = ALPHAS,
    num_steps: int = 10,
    seed: int = 0,
) -> Landscape:
    r"""The loss of each network along its filter-normalised direction.

    .. math:: g(\alpha) = \frac{1}{N} \sum_i \max_{x' \in C_\epsilon(x_i)} \mathrm{CE}(f_{w + \alpha d}(x'), y_i)

    with the maximum by PGD, run afresh at every place as in `Adversarial Weight Perturbation
    <https://arxiv.org/abs/2004.05884>`_ (Wu et al., NeurIPS 2020), and d of :func:`filter_normalized_direction`. The
    search has the same start at every place. The networks stay as they are, bit for bit: copies are moved, in eval
    mode, with the running statistics of the network itself (our reading; SmaraAD's figure does not say).

    Args:
        networks: by name, on pixels.
        images: (N, C, H, W), in pixels.
        labels: (N,).
        threat: around the images, in pixels.
        alphas: places on the line.
        num_steps: of PGD.
        seed: of direction and start.
    """
    clean, adversarial = [], []
    for network in networks.values():
        direction, moved = filter_normalized_direction(network, seed), copy.deepcopy(network).eval()
        for alpha in alphas:
            with torch.no_grad():
                pairs = zip(network.parameters(), moved.named_parameters(), strict=True)
                for weight, (name, parameter) in pairs:
                    parameter.copy_(weight + alpha * direction[name])
            rows = pgd_examples(moved, images, labels, threat, num_steps, seed)
            with torch.no_grad():
                clean.append(float(cross_entropy(moved(images), labels).mean()))
                adversarial.append(float(cross_entropy(moved(rows), labels).mean()))
    shape = len(networks), len(alphas)
    return Landscape(
        alphas=torch.tensor(alphas, dtype=torch.float64).numpy(),
        names=tuple(networks),
        clean=torch.tensor(clean, dtype=torch.float64).view(shape).numpy(),
        adversarial=torch.tensor(adversarial, dtype=torch.float64).view(shape).numpy(),
        num_images=len(images),
        attack=f"PGD-{num_steps}, {threat.describe()}",
    )


def draw_landscape(landscape: Landscape) -> Figure:
    """One line a network: adversarial loss, and clean loss dashed."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, MaxNLocator

    figure = Figure(figsize=(4.8, 3.4), layout="constrained")
    axis = figure.subplots()
    lines = []
    for name, clean, adversarial in zip(landscape.names, landscape.clean, landscape.adversarial, strict=True):
        lines += axis.plot(landscape.alphas, adversarial, label=name)
        axis.plot(landscape.alphas, clean, color=lines[-1].get_color(), linestyle="--", linewidth=1)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.set_xlabel(r"$\alpha$, along the filter-normalised direction")
    axis.set_ylabel("mean cross-entropy")
    axis.grid(alpha=0.25)
    grey = rcParams["text.color"]
    kinds = [Line2D([], [], color=grey, label="adversarial"), Line2D([], [], color=grey, linestyle="--", label="clean")]
    figure.legend(handles=[*lines, *kinds], loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure

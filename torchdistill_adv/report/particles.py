"""Picture: the particles of SVGD around some images, and what the teacher says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchdistill_adv.evaluation.pixels import Normalization, PixelModel
from torchdistill_adv.guards import eval_mode
from torchdistill_adv.losses.base import Search
from torchdistill_adv.noise import Noise
from torchdistill_adv.objectives import View
from torchdistill_adv.report.pictures import Array, show, to_array
from torchdistill_adv.runner.loading import tald_terms

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ParticleGrid:
    """Particles of N images, K each.

    Attributes:
        images: (N, H, W) or (N, H, W, 3), in pixels of [0, 1].
        particles: (N, K, H, W) or (N, K, H, W, 3).
        differences: mean over the channels of particle - clean, (N, K, H, W), in pixels.
        distances: l2 norm of particle - clean, (N, K), in pixels.
        predictions: the teacher's class for the clean image and then for each particle, (N, 1 + K).
        confidences: its probability of that class, likewise.
        labels: (N,).
        search: adversary, objective and threat model, in one line.
    """

    images: Array
    particles: Array
    differences: Array
    distances: Array
    predictions: Array
    confidences: Array
    labels: Array
    search: str


def find_search(config: Mapping[str, Any], normalization: Normalization) -> Search:
    """The search of the first TALD term of a configuration; in one without, TALD's defaults (the paper's CIFAR-100).

    Args:
        config: as torchdistill loads it.
        normalization: mean and std of the data, for the defaults.

    Raises:
        ConfigError: an option of the term is wrong; with its YAML path.
    """
    _, term = next(tald_terms(config, normalization))
    return term.search


def collect_particles(
    teacher: PixelModel, images: Tensor, labels: Tensor, search: Search, seed: int = 0
) -> ParticleGrid:
    """Run ``search`` on the teacher alone, as TALD does, and ask it about what was found.

    Args:
        teacher: on pixels; the search sees the network inside, as its threat model is one of model-input space.
        images: (N, C, H, W), in pixels.
        labels: (N,).
        search: of :func:`find_search`.
        seed: of the particles' start.
    """
    inputs = teacher.normalized(images)
    noise = Noise(seed, images.device, images.dtype)
    with eval_mode(teacher):
        # TALD refuses objectives that attack a student, so the second network is never called
        view = View(inputs, labels, teacher.network, teacher.network, noise)
        found = search.adversary(search.objective.bind(view), inputs, search.threat, noise).rows
        # particle by particle to image by image
        particles = teacher.to_pixels(found).view(-1, *images.shape).transpose(0, 1)
        with torch.no_grad():
            every = torch.cat([images[:, None], particles], 1)
            confidences, predictions = teacher(every.flatten(0, 1)).softmax(1).view(*every.shape[:2], -1).max(2)
    differences = particles - images[:, None]
    return ParticleGrid(
        images=to_array(images),
        particles=to_array(particles),
        differences=differences.mean(2).cpu().numpy(),
        distances=differences.flatten(2).norm(dim=2).cpu().numpy(),
        predictions=predictions.cpu().numpy(),
        confidences=confidences.cpu().numpy(),
        labels=labels.cpu().numpy(),
        search=f"{search.adversary}; {search.objective.key}; {search.threat.describe()}",
    )


MAX_COLUMNS = 4


def draw_particles(grid: ParticleGrid) -> Figure:
    """Two rows an image: it and its first particles, with the teacher's prediction; below, particle - clean.

    A prediction that is another than on the clean image is bold.
    """
    from matplotlib import rcParams
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shown = min(grid.particles.shape[1], MAX_COLUMNS)
    count = len(grid.images)
    figure = Figure(figsize=(1.0 * (1 + shown) + 0.2, 2.3 * count + 0.8), layout="constrained")
    axes = figure.subplots(2 * count, 1 + shown, squeeze=False)
    limit = float(abs(grid.differences).max()) or 1.0
    for i in range(count):
        said = [f"{p}: {100 * c:.0f} %" for p, c in zip(grid.predictions[i], grid.confidences[i], strict=True)]
        above, below = axes[2 * i], axes[2 * i + 1]
        show(above[0], grid.images[i], said[0])
        below[0].set_axis_off()
        below[0].text(
            0.5, 0.5, f"class {grid.labels[i]}", ha="center", va="center", fontsize=9, transform=below[0].transAxes
        )
        for k in range(shown):
            flipped = grid.predictions[i, 1 + k] != grid.predictions[i, 0]
            show(above[1 + k], grid.particles[i, k], said[1 + k], bold=flipped)
            distance = f"$\\ell_2$ {grid.distances[i, k]:.2f}"
            last = show(below[1 + k], grid.differences[i, k], distance, cmap="coolwarm", vmin=-limit, vmax=limit)
    bar = figure.colorbar(last, ax=axes.ravel().tolist(), orientation="horizontal", shrink=0.7, aspect=40, pad=0.01)
    bar.set_label("particle - clean, in pixels of [0, 1]", fontsize=9, color=rcParams["text.color"])
    bar.ax.tick_params(labelsize=9)
    bar.ax.xaxis.set_major_locator(MaxNLocator(4))
    return figure

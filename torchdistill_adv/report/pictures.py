"""What the pictures of networks share: test images, the attack, and how an image is shown.

Networks take pixels of [0, 1] here (:class:`~torchdistill_adv.evaluation.pixels.PixelModel`), images are in pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from torchdistill_adv.adversaries import PGD
from torchdistill_adv.noise import Noise
from torchdistill_adv.objectives import Objective, View
from torchdistill_adv.threat import ThreatModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from torchdistill_adv.runner.loading import Experiment

Array: TypeAlias = npt.NDArray[Any]


def some_images(
    experiment: Experiment, count: int, *, one_a_class: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Test images drawn with a seed, (N, C, H, W) in pixels of [0, 1], and their classes (N,).

    Args:
        experiment: whose test set.
        count: N, if there are as many.
        one_a_class: at most one image of each class.
        seed: of the draw.
    """
    images, labels = list[Tensor](), list[int]()
    for i in np.random.default_rng(seed).permutation(len(experiment.data)).tolist():
        if len(images) == count:
            break
        image, label, *_ = experiment.data[i]
        if not one_a_class or int(label) not in labels:
            images.append(image)
            labels.append(int(label))
    pixels = experiment.on_pixels("student").to_pixels(torch.stack(images).to(experiment.device))
    return pixels, torch.tensor(labels, device=experiment.device)


def pgd_examples(
    network: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, num_steps: int, seed: int = 0
) -> Tensor:
    """PGD on the cross-entropy from a uniform start, in steps of a quarter of the radius; (N, C, H, W) like images."""
    noise = Noise(seed, images.device, images.dtype)
    objective = Objective.build("ce_student").bind(View(images, labels, network, None, noise))
    return PGD(num_steps, threat.finite_eps / 4, start="uniform")(objective, images, threat, noise).rows


def to_array(images: Tensor) -> Array:
    """Images (..., C, H, W) as matplotlib shows them: (..., H, W, 3), and anything but RGB as the grey (..., H, W)."""
    images = images.detach().float().cpu()
    if images.shape[-3] == 3:
        return images.movedim(-3, -1).numpy()
    return images.mean(-3).numpy()


def show(axis: Axes, image: Array, title: str, bold: bool = False, **options: Any) -> Any:
    """One image without ticks; greys run from 0 to 1 unless the options of ``imshow`` say otherwise."""
    shown = axis.imshow(image, **{"cmap": "gray", "vmin": 0, "vmax": 1, **options})
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=9, pad=3, fontweight="bold" if bold else "normal")
    return shown

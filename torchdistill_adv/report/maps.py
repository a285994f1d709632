"""Picture: where teacher and student find the evidence for the class, on clean and on adversarial images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchdistill_adv.attribution import class_activation_maps, layout_of, map_distance
from torchdistill_adv.guards import eval_mode
from torchdistill_adv.report.pictures import Array, pgd_examples, show, to_array
from torchdistill_adv.threat import ThreatModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("clean", "adversarial")
NETWORKS = ("teacher", "student")


@dataclass(frozen=True)
class ActivationMaps:
    """Class-activation maps of N images; the kinds are clean and adversarial, the networks teacher and student.

    Attributes:
        images: by kind, (2, N, H, W) or (2, N, H, W, 3), in pixels of [0, 1].
        maps: by kind and network, (2, 2, N, H, W), each from 0 to 1: blown up, and divided by its largest value.
        distances: by kind, :func:`~torchdistill_adv.attribution.map_distance` of the two networks' maps, (2, N).
        predictions: by kind and network, (2, 2, N).
        labels: the classes whose evidence is shown, (N,).
        exact: by network, whether its maps are exact or Grad-CAM.
        attack: in one line.
    """

    images: Array
    maps: Array
    distances: Array
    predictions: Array
    labels: Array
    exact: tuple[bool, bool]
    attack: str


def collect_maps(
    teacher: nn.Module,
    student: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    num_steps: int = 20,
    teacher_module: str | None = None,
    student_module: str | None = None,
    seed: int = 0,
) -> ActivationMaps:
    """Maps of the class y from both networks, on clean images and on those that PGD finds against the student.

    So do the figures of DARWIN and SmaraAD. The maps are those of :mod:`torchdistill_adv.attribution`.

    Args:
        teacher: on pixels.
        student: on pixels.
        images: (N, C, H, W), in pixels.
        labels: (N,).
        threat: around the images, in pixels.
        num_steps: of PGD.
        teacher_module: the module whose output is the feature map; found where it is not given.
        student_module: the same of the student.
        seed: of the attack's start.

    Raises:
        ConfigError: a network has no feature map, in one sentence; the path is ``teacher_module`` or
            ``student_module``.
    """
    networks = {"teacher": (teacher, teacher_module), "student": (student, student_module)}
    with eval_mode(teacher, student):
        layouts = {who: layout_of(net, images, path, f"{who}_module") for who, (net, path) in networks.items()}
        kinds = (images, pgd_examples(student, images, labels, threat, num_steps, seed))
        logits, maps = {}, {}
        with torch.no_grad():
            for who, (network, _) in networks.items():
                for kind, rows in zip(KINDS, kinds, strict=True):
                    logits[kind, who], maps[kind, who] = class_activation_maps(network, layouts[who], rows, labels)
    pairs = [[(kind, who) for who in NETWORKS] for kind in KINDS]
    return ActivationMaps(
        images=to_array(torch.stack(kinds)),
        maps=torch.stack([torch.stack([_blow_up(maps[key], images) for key in row]) for row in pairs]).cpu().numpy(),
        distances=torch.stack([map_distance(maps[k, "student"], maps[k, "teacher"]) for k in KINDS]).cpu().numpy(),
        predictions=torch.stack([torch.stack([logits[key].argmax(1) for key in row]) for row in pairs]).cpu().numpy(),
        labels=labels.cpu().numpy(),
        exact=(layouts["teacher"].linear is not None, layouts["student"].linear is not None),
        attack=f"PGD-{num_steps} on the student, {threat.describe()}",
    )


def _blow_up(maps: Tensor, images: Tensor) -> Tensor:
    """Maps (N, h, w) at the size of the images, their largest values 1; a map without evidence stays zero."""
    large = F.interpolate(maps[:, None], images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    largest = large.amax((1, 2), keepdim=True)
    return large / largest.where(largest > 0, 1)


def draw_maps(found: ActivationMaps) -> Figure:
    """Two rows an image, clean and adversarial: the image, the teacher's map over it, the student's.

    Above each map stands the network's prediction, bold where it is wrong.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    count = found.images.shape[1]
    figure = Figure(figsize=(4.2, 2.75 * count + 0.2), layout="constrained")
    axes = figure.subplots(2 * count, 3, squeeze=False)
    heat = colormaps["inferno"]
    for i in range(count):
        for kind, name in enumerate(KINDS):
            row, image = axes[2 * i + kind], found.images[kind, i]
            grey = image if image.ndim == 2 else image.mean(2)
            show(row[0], image, name if kind else f"class {found.labels[i]}, clean")
            for who, network in enumerate(NETWORKS):
                strength = found.maps[kind, who, i][..., None]
                overlay = (1 - 0.7 * strength) * grey[..., None] + 0.7 * strength * heat(strength[..., 0])[..., :3]
                evidence = "" if strength.any() else ", no evidence"
                prediction = found.predictions[kind, who, i]
                title = f"{network}: {prediction}{evidence}"
                show(row[1 + who], overlay, title, bold=prediction != found.labels[i])
            row[2].set_xlabel(f"distance {found.distances[kind, i]:.2g}", fontsize=9, labelpad=2)
    return figure

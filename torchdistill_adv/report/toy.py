"""Picture: a problem in two dimensions, where boundaries and boxes can be seen.

Points of a few classes, so far apart that their l-infinity boxes do not meet; a TRADES teacher and students that are
distilled from it, each trained in seconds by torchdistill's own boxes with this package's own losses. No student reads
a label. After Fig. 5 of SmaraAD (Yin et al., CVPR 2024), which does not give its points, networks or settings: those
are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler, TensorDataset
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.training import get_training_box

import torchdistill_adv  # noqa: F401  (torchdistill knows the losses then)
from torchdistill_adv.guards import own_random_stream
from torchdistill_adv.report.boundaries import colours_of, draw_regions, legend_patches, predict_grid
from torchdistill_adv.report.pictures import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# points lie in [-SIDE, SIDE]^2
SIDE, EPS = 3.0, 0.36
NUM_POINTS, NUM_CLASSES = 20, 3
NUM_EPOCHS, STEPS_PER_EPOCH = 30, 15
TEACHER_WIDTH, STUDENT_WIDTH = 64, 32

SEARCH: Mapping[str, Any] = {
    "adversary": {"key": "PGD", "kwargs": {"num_steps": 3, "step_size": EPS / 2, "start": "uniform"}},
    "threat": {"norm": "linf", "eps": EPS, "space": "input", "bounds": "none"},
}
OUTPUT: Mapping[str, Any] = {
    "student_module_path": ".",
    "student_module_io": "output",
    "teacher_module_path": ".",
    "teacher_module_io": "output",
}
TEACHER = "TRADES teacher"
METHODS: Mapping[str, Mapping[str, Any]] = {
    TEACHER: {"key": "TRADESLoss", "kwargs": {"beta": 2.0, **SEARCH}},
    "KD": {"key": "KDLoss", "kwargs": {**OUTPUT, "temperature": 1.0, "alpha": 0.0, "reduction": "batchmean"}},
    "RSLAD": {"key": "RSLADLoss", "kwargs": SEARCH},
    "AdaAD": {"key": "AdaADLoss", "kwargs": SEARCH},
    # points have no feature map, so nothing is aligned: slack matching alone
    "SmaraAD, matching": {"key": "SmaraADLoss", "kwargs": {"alignment": "none", **SEARCH}},
}


@dataclass(frozen=True)
class Toy:
    """What M networks learned from P points of a square.

    Attributes:
        points: (P, 2).
        labels: (P,).
        eps: half the side of the boxes.
        names: M names, the teacher's first.
        classes: predicted class at each point of a grid over the square, (M, G, G).
        right: whether the points are classified rightly, (M, P).
        crossed: whether a boundary crosses the box of each point, (M, P); the mean is the share of crossed boxes.
    """

    points: Array
    labels: Array
    eps: float
    names: tuple[str, ...]
    classes: Array
    right: Array
    crossed: Array


def sample_points(count: int, eps: float, seed: int) -> tuple[Tensor, Tensor]:
    """Points (count, 2) whose boxes lie apart, and their classes (count,), in stripes that bend."""
    generator = np.random.default_rng(seed)
    points = list[Any]()
    while len(points) < count:
        point = generator.uniform(1.1 * eps - SIDE, SIDE - 1.1 * eps, 2)
        if all(np.abs(point - other).max() > 2.2 * eps for other in points):
            points.append(point)
    found = np.stack(points)
    stripes = found[:, 0] + np.sin(found[:, 1] * np.pi / SIDE)
    labels = np.argsort(np.argsort(stripes)) * NUM_CLASSES // count
    return torch.tensor(found, dtype=torch.float32), torch.tensor(labels)


def mlp(width: int) -> nn.Sequential:
    """Three hidden layers, (N, 2) to (N, NUM_CLASSES)."""
    layers: list[nn.Module] = [nn.Linear(2, width), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, NUM_CLASSES))


def train_network(
    criterion: Mapping[str, Any], points: Tensor, labels: Tensor, teacher: nn.Module | None, num_epochs: int
) -> nn.Module:
    """Train a network with one mid-level loss in torchdistill's own box."""
    network = mlp(TEACHER_WIDTH if teacher is None else STUDENT_WIDTH)
    side = {"forward_proc": "forward_batch_only"}
    config = {
        "num_epochs": num_epochs,
        "pre_epoch_process": "bind_adversarial_losses",
        "train_data_loader": {
            "dataset_id": "points",
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": {"batch_size": len(points)},
        },
        "model": {**side, "requires_grad": True},
        "student": {**side, "requires_grad": True},
        "teacher": {**side, "requires_grad": False},
        "optimizer": {"key": "Adam", "kwargs": {"lr": 0.005}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"term": {"criterion": criterion, "weight": 1.0}}},
        },
    }
    data = TensorDataset(points.repeat(STEPS_PER_EPOCH, 1), labels.repeat(STEPS_PER_EPOCH))
    common = ({"points": data}, config, torch.device("cpu"), None, False, 1)
    box = get_distillation_box(teacher, network, *common) if teacher else get_training_box(network, *common)
    for epoch in range(num_epochs):
        box.pre_epoch_process(epoch=epoch)
        # a distillation box's batches have a third part
        for batch, targets, *_ in box.train_data_loader:
            box.post_forward_process(loss=box.forward_process(batch, targets, {}))
        box.post_epoch_process()
    return network.eval()


def crossed_boxes(network: nn.Module, points: Tensor, eps: float, resolution: int = 41) -> Array:
    """Whether the prediction changes within the l-infinity box of each point, (P,), on a grid over it."""
    ticks = torch.linspace(-eps, eps, resolution)
    boxes = [predict_grid(network, x + ticks, y + ticks, lambda rows: rows, resolution**2) for x, y in points]
    return np.array([box.min() != box.max() for box in boxes])


def collect_toy(seed: int = 0, num_epochs: int = NUM_EPOCHS, resolution: int = 201) -> Toy:
    """Train the teacher and a student with each method, and look at the whole square; some ten seconds on a CPU.

    Args:
        seed: of points and training, in which the global random streams take no part.
        num_epochs: of each training.
        resolution: points along each side of the grid.
    """
    points, labels = sample_points(NUM_POINTS, EPS, seed)
    networks: dict[str, nn.Module] = {}
    for name, criterion in METHODS.items():
        with own_random_stream(seed, points.device):
            networks[name] = train_network(criterion, points, labels, networks.get(TEACHER), num_epochs)
    ticks = torch.linspace(-SIDE, SIDE, resolution)
    with torch.no_grad():
        right = [(network(points).argmax(1) == labels).numpy() for network in networks.values()]
    return Toy(
        points=points.numpy(),
        labels=labels.numpy(),
        eps=EPS,
        names=tuple(networks),
        classes=np.stack([predict_grid(n, ticks, ticks, lambda rows: rows, resolution**2) for n in networks.values()]),
        right=np.stack(right),
        crossed=np.stack([crossed_boxes(network, points, EPS) for network in networks.values()]),
    )


def draw_toy(toy: Toy) -> Figure:
    """One panel a network: regions, points, and their boxes, those that a boundary crosses in bold lines.

    A point that is classified wrongly is a cross.
    """
    from matplotlib import rcParams
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows = -(-len(toy.names) // 2)
    figure = Figure(figsize=(5, 2.6 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).ravel()
    colours = colours_of(range(NUM_CLASSES))
    ink = rcParams["text.color"]
    for axis, name, classes, right, crossed in zip(axes, toy.names, toy.classes, toy.right, toy.crossed, strict=False):
        draw_regions(axis, classes, (-SIDE, SIDE, -SIDE, SIDE), colours)
        for point, label, is_right, is_crossed in zip(toy.points, toy.labels, right, crossed, strict=True):
            corner, side = point - toy.eps, 2 * toy.eps
            width = 1.8 if is_crossed else 0.5
            axis.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=ink, linewidth=width))
            axis.plot(
                *point,
                "o" if is_right else "X",
                color=colours[label],
                markeredgecolor=ink,
                markeredgewidth=0.4,
                markersize=4,
            )
        axis.set_title(f"{name}: {crossed.sum()} of {len(crossed)} crossed", fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    for axis in axes[len(toy.names) :]:
        axis.set_axis_off()
    figure.legend(handles=legend_patches(colours), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure

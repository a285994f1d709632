"""Picture: the decision boundaries in a plane through an image, and the outline of the ball around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from torchdistill_adv.errors import ConfigError, nearest
from torchdistill_adv.guards import eval_mode
from torchdistill_adv.noise import Noise
from torchdistill_adv.report.pictures import Array, pgd_examples
from torchdistill_adv.threat import Norm, ThreatModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

CHUNK_SIZE = 256

Colours: TypeAlias = Mapping[int, tuple[float, float, float]]


@dataclass(frozen=True)
class BoundaryPlane:
    """What M networks predict in a plane; coordinates are l2 distances from the image, in pixels of [0, 1].

    Attributes:
        names: M names.
        classes: predicted class at each point of a grid, (M, G, G); rows go along the second direction.
        half_width: the grid goes from minus this to plus this in both directions.
        outline: corners of the ball's section with the plane, (P, 2).
        example: where the adversarial example lies, on the first axis.
        label: class of the image.
        attack: in one line.
    """

    names: tuple[str, ...]
    classes: Array
    half_width: float
    outline: Array
    example: float
    label: int
    attack: str


def ball_outline(first: Tensor, second: Tensor, eps: float, norm: Norm, num_angles: int = 720) -> Array:
    r"""Where a plane leaves the ball around its origin, (num_angles, 2).

    .. math:: r(\theta) = \frac{\epsilon}{\|\cos\theta\, u + \sin\theta\, v\|_p}

    Args:
        first: u, of any shape.
        second: v, of the same shape.
        eps: the radius.
        norm: its norm.
        num_angles: equal steps from 0 to 2 pi.
    """
    angles = torch.arange(num_angles, dtype=torch.float64) * (2 * torch.pi / num_angles)
    turns = torch.stack([angles.cos(), angles.sin()], 1)
    points = turns @ torch.stack([first.flatten(), second.flatten()]).double().cpu()
    lengths = points.abs().amax(1, keepdim=True) if norm == "linf" else points.norm(dim=1, keepdim=True)
    return (eps * turns / lengths).numpy()


def predict_grid(
    network: nn.Module, xs: Tensor, ys: Tensor, place: Callable[[Tensor], Tensor], chunk_size: int = CHUNK_SIZE
) -> Array:
    """The class at each point of a grid, (len(ys), len(xs)).

    Args:
        network: rows to logits.
        xs: first coordinates.
        ys: second coordinates.
        place: points (R, 2) to rows that the network takes.
        chunk_size: rows at once.
    """
    with torch.no_grad(), eval_mode(network):
        points = torch.cartesian_prod(ys, xs).flip(1)
        classes = torch.cat([network(place(some)).argmax(1) for some in points.split(chunk_size)])
    return classes.view(len(ys), len(xs)).cpu().numpy()


def collect_plane(
    networks: Mapping[str, nn.Module],
    image: Tensor,
    label: int,
    threat: ThreatModel,
    *,
    attacked: str = "student",
    resolution: int = 81,
    num_steps: int = 20,
    seed: int = 0,
) -> BoundaryPlane:
    """What networks predict in the plane of an adversarial direction and a random one.

    The first axis points from the image to the example that PGD finds against one of the networks; the second to a
    random corner of the l-infinity ball, made orthogonal to the first. Each point of the plane is clipped to [0, 1], as
    an attack would, so that only images are classified; within the outline they are in the ball. Our reading of
    SmaraAD's Fig. 5 for images.

    Args:
        networks: by name, on pixels.
        image: (C, H, W), in pixels.
        label: its class.
        threat: around the image, in pixels.
        attacked: name of the network that PGD attacks.
        resolution: points along each side of the grid.
        num_steps: of PGD.
        seed: of the attack's start and of the random direction.

    Raises:
        ConfigError: ``attacked`` is none of the networks, or the radius is 0.
    """
    if attacked not in networks:
        raise ConfigError(f"found {attacked!r}; {nearest(attacked, networks)}", "attacked")
    if threat.eps == 0:
        raise ConfigError("found 0; a ball without a radius has no outline, write one such as '8/255'", "eps")
    images, labels = image[None], torch.tensor([label], device=image.device)
    with eval_mode(networks[attacked]):
        example = pgd_examples(networks[attacked], images, labels, threat, num_steps, seed)[0]
    away = example - image
    first = away / away.norm()
    corner = Noise(seed + 1, image.device, image.dtype).uniform(image.shape).sign()
    corner = corner - (corner * first).sum() * first
    second = corner / corner.norm()
    outline = ball_outline(first, second, threat.finite_eps, threat.norm)
    half_width = 1.3 * float(np.abs(outline).max())
    ticks = torch.linspace(-half_width, half_width, resolution, device=image.device, dtype=image.dtype)
    directions = torch.stack([first, second])

    def place(points: Tensor) -> Tensor:
        return (image + torch.tensordot(points, directions, 1)).clamp(0, 1)

    return BoundaryPlane(
        names=tuple(networks),
        classes=np.stack([predict_grid(network, ticks, ticks, place) for network in networks.values()]),
        half_width=half_width,
        outline=outline,
        example=float(away.norm()),
        label=label,
        attack=f"PGD-{num_steps} on the {attacked}, {threat.describe()}",
    )


def colours_of(classes: Sequence[int]) -> Colours:
    """A colour for each class, in the order given; after ten they repeat."""
    from matplotlib import colormaps

    return {c: colormaps["tab10"](i % 10)[:3] for i, c in enumerate(classes)}


def draw_regions(axis: Axes, classes: Array, extent: tuple[float, float, float, float], colours: Colours) -> None:
    """Predicted classes (G, G) as tinted regions, with the lines between them."""
    from matplotlib import rcParams

    tints = np.zeros((*classes.shape, 4))
    for c, colour in colours.items():
        tints[classes == c] = (*colour, 0.4)
    axis.grid(False)
    axis.imshow(tints, origin="lower", extent=extent, interpolation="nearest", aspect="equal")
    left, right, bottom, top = extent
    xs, ys = np.linspace(left, right, classes.shape[1]), np.linspace(bottom, top, classes.shape[0])
    for c in np.unique(classes)[:-1]:
        axis.contour(xs, ys, classes == c, levels=[0.5], colors=[rcParams["text.color"]], linewidths=0.6)


def legend_patches(colours: Colours, label: int | None = None) -> list[Patch]:
    """A patch a class, the true one marked."""
    from matplotlib.patches import Patch

    return [
        Patch(facecolor=(*colour, 0.6), label=f"class {c}" + (" (true)" if c == label else ""))
        for c, colour in colours.items()
    ]


def draw_plane(plane: BoundaryPlane) -> Figure:
    """One panel a network: predicted classes, the ball's outline, the image and the adversarial example."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    columns = min(len(plane.names), 2)
    rows = -(-len(plane.names) // columns)
    figure = Figure(figsize=(2.5 * columns, 2.5 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    found, areas = np.unique(plane.classes, return_counts=True)
    colours = colours_of(found[np.argsort(-areas, kind="stable")].tolist())
    extent = (-plane.half_width, plane.half_width, -plane.half_width, plane.half_width)
    ink = rcParams["text.color"]
    for axis, name, classes in zip(axes, plane.names, plane.classes, strict=False):
        draw_regions(axis, classes, extent, colours)
        axis.plot(*np.vstack([plane.outline, plane.outline[:1]]).T, color=ink, linewidth=1.5)
        axis.plot(0, 0, "o", color=ink, markersize=4)
        axis.plot(plane.example, 0, "x", color=ink, markersize=6)
        axis.set_title(name, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.set_xlabel("adversarial direction", fontsize=9)
    for axis in axes[::columns]:
        axis.set_ylabel("random direction", fontsize=9)
    for axis in axes[len(plane.names) :]:
        axis.set_axis_off()
    patches = legend_patches(colours, plane.label)
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure

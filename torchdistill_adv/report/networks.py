"""The sections that need the networks: particles, class-activation maps, loss landscape, decision boundaries."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from torchdistill_adv.errors import ConfigError, inside
from torchdistill_adv.evaluation.blocks import weights_digest
from torchdistill_adv.evaluation.pixels import pixel_threat
from torchdistill_adv.report import boundaries, landscape, maps, particles, toy
from torchdistill_adv.report.page import Figures, Section, grid, missing, paragraph
from torchdistill_adv.report.pictures import some_images
from torchdistill_adv.report.records import Method, Run
from torchdistill_adv.report.style import label
from torchdistill_adv.runner.loading import Experiment, load_experiment
from torchdistill_adv.threat import ThreatModel

logger = logging.getLogger(__name__)

T = TypeVar("T")

PARTICLE_IMAGES, MAP_IMAGES, PLANES, LANDSCAPE_IMAGES = 2, 3, 2, 64
# lines that can be told apart in one figure
LANDSCAPE_STUDENTS = 5


@dataclass(frozen=True)
class Loaded:
    """The networks of the first run of a method, and the ball that its pictures are made in."""

    name: str
    experiment: Experiment
    threat: ThreatModel

    @property
    def has_teacher(self) -> bool:
        return "teacher" in self.experiment.networks


def network_sections(methods: Sequence[Method], figures: Figures, device: str | None) -> list[Section]:
    """The pictures of the first run of each method; a run that cannot be loaded is named with the reason."""
    attacked = (ball(run) for method in methods for run in method.runs)
    other = next((threat for threat in attacked if threat), None)
    tried = [(method.name, _or_error(partial(load, method, device, other))) for method in methods]
    loaded = [one for _, one in tried if isinstance(one, Loaded)]
    notes = "".join(
        missing(f"No pictures of {name}: {error}. {AGAIN}") for name, error in tried if isinstance(error, ConfigError)
    )
    found = []
    for anchor, title, intro, body in (
        ("particles", "Adversarial particles", PARTICLES, _particles),
        ("maps", "Class-activation maps", MAPS, _maps),
        ("landscape", "Loss landscape in weight space", LANDSCAPE, _landscape),
        ("boundaries", "Decision boundaries", BOUNDARIES, _boundaries),
    ):
        logger.info("report: %s", title.lower())
        found.append(Section(anchor, title, (paragraph(intro) + body(loaded, figures) if loaded else "") + notes))
    logger.info("report: toy problem")
    return [*found, Section("toy", "Boundaries of a toy problem", paragraph(TOY) + _toy(figures))]


AGAIN = (
    "Run `torchdistill-adv report` in the folder where it was trained, which the paths in its configuration start from."
)
PARTICLES = (
    "Test images, the particles that SVGD finds around them on the teacher, and their differences in pixels of [0, 1]. "
    "Above each stands the teacher's class with its probability, bold where it is another than on the image. TALD's "
    "idea is that particles that differ from each other explore more of the teacher's boundary."
)
MAPS = (
    "Where each network sees evidence for the true class, laid over test images, clean and adversarial; brighter is "
    "more. Above each map stands the prediction, bold where it is wrong; below the student's, its distance from the "
    "teacher's map, the mean squared difference of both at unit norm: small under attack too where the student looks "
    "where its teacher looks. As in DARWIN and SmaraAD."
)
LANDSCAPE = (
    "Mean cross-entropy when all weights move by alpha along one Gaussian direction, whose filters are as long as the "
    "network's own (Li et al., 2018). Solid: adversarial examples, made afresh at every place; dashed: clean images. A "
    "wide valley is a flat minimum. After Fig. 4 of SmaraAD."
)
BOUNDARIES = (
    "Classes predicted in a plane through a test image (dot), toward an adversarial example of the student (cross) and "
    "toward a random corner of the ball. The outline is the ball in this plane: another colour inside it is an "
    "adversarial region. Axes are l2 distances, in pixels of [0, 1]."
)
TOY = (
    f"Points in a square of side {2 * toy.SIDE:g}, a TRADES teacher, and students distilled from it with this "
    "package's own losses; bold l-infinity boxes are crossed by a boundary. It is the same in every report: it shows "
    "what the methods are after, not how the runs above did. SmaraAD aligns feature maps, which points do not have: "
    "its matching alone is shown. After Fig. 5 of SmaraAD."
)


def load(method: Method, device: str | None, other: ThreatModel | None) -> Loaded:
    """The networks of a method's first run, with the weights beside its directory.

    Args:
        method: whose.
        device: where they go.
        other: the ball for a run that was not evaluated; without one, that of its ``robust_validation``, or 8/255.

    Raises:
        ConfigError: they cannot be loaded.
    """
    run = method.runs[0]
    if run.config_file is None or run.checkpoint is None:
        raise ConfigError("has no config.yaml, and no evaluation.json of a student with one", str(run.directory))
    if not run.checkpoint.is_file():
        raise ConfigError("is missing", str(run.checkpoint))
    with inside(str(run.config_file)):
        experiment = load_experiment(
            run.config_file,
            ckpt=str(run.checkpoint),
            device=device,
            overrides=run.facts.get("overrides") or None,
        )
    return Loaded(method.name, experiment, ball(run) or other or pixel_threat(experiment.radius("linf") or "8/255"))


def ball(run: Run) -> ThreatModel | None:
    """The first ball that a run was attacked in; None where it was not."""
    radii = [result["eps"] for result in run.evaluation["results"] if result["eps"]] if run.evaluation else []
    return pixel_threat(radii[0], run.evaluation["norm"]) if run.evaluation and radii else None


def _each(loaded: Sequence[Loaded], draw: Callable[[Loaded], str]) -> str:
    """A figure for each method, and a sentence for those that have none."""
    tried = [(one.name, _or_error(partial(draw, one))) for one in loaded]
    notes = [missing(f"Not drawn for {name}: {error}.") for name, error in tried if isinstance(error, ConfigError)]
    return grid([drawn for _, drawn in tried if isinstance(drawn, str) and drawn]) + "".join(notes)


def _or_error(make: Callable[[], T]) -> T | ConfigError:
    try:
        return make()
    except ConfigError as error:
        return error


def _particles(loaded: Sequence[Loaded], figures: Figures) -> str:
    seen: set[tuple[str, str]] = set()

    def draw(one: Loaded) -> str:
        if not one.has_teacher:
            raise ConfigError("the particles are the teacher's, and its configuration has none")
        images, labels = some_images(one.experiment, PARTICLE_IMAGES)
        search = particles.find_search(one.experiment.config, one.experiment.normalization)
        data = particles.collect_particles(one.experiment.on_pixels("teacher"), images, labels, search)
        same = (weights_digest(one.experiment.networks["teacher"]), data.search)
        if same in seen:
            return ""
        seen.add(same)
        return figures.add(
            f"particles-of-{one.name}",
            partial(particles.draw_particles, data),
            f"Two test images and the SVGD particles around them, for the teacher of {one.name}, with its predictions.",
            f"Teacher of {one.name}. {data.search}.",
        )

    return _each(loaded, draw)


def _maps(loaded: Sequence[Loaded], figures: Figures) -> str:
    def draw(one: Loaded) -> str:
        if not one.has_teacher:
            raise ConfigError("its configuration has no teacher to compare with")
        images, labels = some_images(one.experiment, MAP_IMAGES, one_a_class=True)
        teacher, student = (one.experiment.on_pixels(who) for who in ("teacher", "student"))
        data = maps.collect_maps(teacher, student, images, labels, one.threat)
        kinds = ["exact" if exact else "by Grad-CAM" for exact in data.exact]
        return figures.add(
            f"maps-{one.name}",
            partial(maps.draw_maps, data),
            f"Class-activation maps of the teacher and the student of {one.name}, on clean and adversarial images.",
            f"{one.name}. Teacher: {kinds[0]}; student: {kinds[1]}. Adversarial: {data.attack}.",
        )

    return _each(loaded, draw)


def _landscape(loaded: Sequence[Loaded], figures: Figures) -> str:
    groups: dict[tuple[str, ThreatModel, str], list[Loaded]] = {}
    for one in loaded:
        # losses on other data, or in another ball, do not compare
        teacher = weights_digest(one.experiment.networks["teacher"]) if one.has_teacher else ""
        groups.setdefault((one.experiment.dataset_id, one.threat, teacher), []).append(one)
    drawn: list[str] = []
    for group in groups.values():
        for start in range(0, len(group), LANDSCAPE_STUDENTS):
            some = group[start : start + LANDSCAPE_STUDENTS]
            images, labels = some_images(some[0].experiment, LANDSCAPE_IMAGES)
            networks: dict[str, nn.Module] = {label(one.name): one.experiment.on_pixels("student") for one in some}
            if some[0].has_teacher:
                networks["their teacher"] = some[0].experiment.on_pixels("teacher")
            data = landscape.collect_landscape(networks, images, labels, some[0].threat)
            drawn.append(
                figures.add(
                    f"landscape-{len(drawn) + 1}",
                    partial(landscape.draw_landscape, data),
                    f"Clean and adversarial loss of {', '.join(data.names)} along a random direction of their weights.",
                    f"{data.num_images} test images; {data.attack}.",
                )
            )
    return grid(drawn)


def _boundaries(loaded: Sequence[Loaded], figures: Figures) -> str:
    def draw(one: Loaded) -> str:
        networks = {
            who: one.experiment.on_pixels(who) for who in ("teacher", "student") if who in one.experiment.networks
        }
        images, labels = some_images(one.experiment, 20)
        with torch.no_grad():
            right = torch.stack([network(images).argmax(1) == labels for network in networks.values()]).all(0)
        if not bool(right.any()):
            raise ConfigError("no image was found that its networks classify rightly")
        drawn = []
        for i, place in enumerate(right.nonzero()[:PLANES, 0].tolist()):
            data = boundaries.collect_plane(networks, images[place], int(labels[place]), one.threat)
            drawn.append(
                figures.add(
                    f"plane-{one.name}-{i + 1}",
                    partial(boundaries.draw_plane, data),
                    f"Classes that {' and '.join(networks)} of {one.name} predict in a plane through a test image.",
                    f"{one.name}. {data.attack}.",
                )
            )
        return "".join(drawn)

    return _each(loaded, draw)


def _toy(figures: Figures) -> str:
    data = toy.collect_toy()
    crossed = zip(data.names, data.crossed, strict=True)
    return figures.add(
        "toy",
        partial(toy.draw_toy, data),
        "Decision regions of a teacher and its students in two dimensions, with a box around each point. "
        + "; ".join(f"{name} crosses {each.sum()} of {len(each)} boxes" for name, each in crossed),
        f"{len(data.points)} points, l-infinity boxes of eps = {data.eps:g}.",
    )

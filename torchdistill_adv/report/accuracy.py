"""Accuracies from ``evaluation.json``: methods side by side, against the radius, against the number of particles."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchdistill_adv.evaluation.results import describe_eps
from torchdistill_adv.report.records import Json, Method, Run, without
from torchdistill_adv.report.style import add_legend, label, look

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLEAN, WORST_CASE = "clean", "worst case"


@dataclass(frozen=True)
class Attack:
    """What an accuracy is measured under: a name, a radius in pixels (0 for clean images), and a norm."""

    name: str
    eps: float
    norm: str

    @property
    def radius(self) -> str:
        """As papers write it; empty for clean images."""
        return describe_eps(self.eps, self.norm) if self.eps else ""

    @property
    def title(self) -> str:
        return f"{self.name}, {self.radius}" if self.eps else self.name


@dataclass(frozen=True)
class Point:
    """Accuracy of a run with its 95 % interval, all in percent."""

    run: str
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Accuracies:
    """Methods side by side.

    Args:
        methods: their names.
        places: the place of each in the list of all methods, which its colour is for.
        attacks: clean first, then by radius.
        points: of a method under an attack, one for each of its runs that was evaluated.
    """

    methods: Sequence[str]
    places: Sequence[int]
    attacks: Sequence[Attack]
    points: Mapping[tuple[str, Attack], Sequence[Point]]

    def mean(self, method: str, attack: Attack) -> float | None:
        """Mean accuracy over the runs of a method, in percent; None where none was attacked so."""
        points = self.points.get((method, attack))
        return statistics.mean(point.accuracy for point in points) if points else None


def measured(evaluation: Json) -> Iterator[tuple[Attack, Json]]:
    """Every result of an evaluation; the worst case where a radius has several attacks."""
    norm = evaluation["norm"]
    for result in evaluation["results"]:
        eps = float(result["eps"])
        # clean images have no norm
        yield Attack(result["attack"], eps, norm if eps else ""), result
    for worst in evaluation["worst_case"]:
        if sum(result["eps"] == worst["eps"] for result in evaluation["results"]) > 1:
            yield Attack(WORST_CASE, float(worst["eps"]), norm), worst


def collect_accuracies(methods: Sequence[Method]) -> Accuracies | None:
    """The accuracies of all runs that were evaluated; None if none was."""
    points: dict[tuple[str, Attack], list[Point]] = {}
    for method in methods:
        for run in method.runs:
            for attack, result in measured(run.evaluation) if run.evaluation else ():
                point = Point(run.name, result["accuracy"], *result["interval"])
                points.setdefault((method.name, attack), []).append(point)
    if not points:
        return None
    evaluated = {name for name, _ in points}
    attacks = dict.fromkeys(attack for _, attack in points)
    found = [(place, method.name) for place, method in enumerate(methods) if method.name in evaluated]
    return Accuracies(
        [name for _, name in found],
        [place for place, _ in found],
        sorted(attacks, key=lambda attack: (attack.eps > 0, attack.norm, attack.eps, attack.name == WORST_CASE)),
        points,
    )


def differences(runs: Sequence[Run]) -> list[str]:
    """What was not equal in the evaluations of some runs, so that their accuracies cannot be compared; in words."""
    facts: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        if run.evaluation:
            data = run.evaluation["data"]
            attacked = [r for r in run.evaluation["results"] if r["eps"]]
            settings = {f"settings of {r['attack']}": r["settings"] for r in attacked}
            worst: dict[str, list[str]] = {}
            for r in sorted(attacked, key=lambda r: r["attack"]):
                worst.setdefault(f"attacks of the worst case at {r['eps']:.4g}", []).append(r["attack"])
            images = {"data set": data.get("dataset"), "images": data.get("indices", data.get("num_images"))}
            for name, value in {**images, "norm": run.evaluation["norm"], **settings, **worst}.items():
                facts.setdefault(name, {}).setdefault(json.dumps(value, sort_keys=True), []).append(run.name)
    return [
        f"{name}: {' / '.join(', '.join(names) for names in groups.values())}"
        for name, groups in facts.items()
        if len(groups) > 1
    ]


def by_radius(data: Accuracies) -> list[Accuracies]:
    """One for each radius; clean images stand with the first."""
    radii: dict[tuple[str, float], list[Attack]] = {}
    for attack in data.attacks:
        radii.setdefault((attack.norm, attack.eps), []).append(attack)
    clean = radii.pop(("", 0.0), [])
    parts = list(radii.values()) or [[]]
    parts[0] = [*clean, *parts[0]]
    return [dataclasses.replace(data, attacks=part) for part in parts]


def draw_accuracies(data: Accuracies) -> Figure:
    """A block of rows for each attack, a row for each method: mean, single runs, and their intervals."""
    import matplotlib
    from matplotlib.figure import Figure

    ink = matplotlib.rcParams["text.color"]
    count = len(data.methods)
    figure = Figure(figsize=(5.2, 0.7 + 0.25 * len(data.attacks) * (count + 1.2)))
    axes = figure.add_subplot()
    ticks: dict[float, str] = {}
    for block, attack in enumerate(data.attacks):
        top = block * (count + 1.2)
        axes.text(0, top, label(attack.title), weight="bold", va="center", transform=axes.get_yaxis_transform())
        for row, (method, place) in enumerate(zip(data.methods, data.places, strict=True), 1):
            ticks[top + row] = label(method)
            points = data.points.get((method, attack), ())
            for point in points:
                strength = 1 if len(points) == 1 else 0.45
                axes.plot([point.low, point.high], [top + row] * 2, color=look(place)["color"], alpha=strength)
                if len(points) > 1:
                    axes.plot(point.accuracy, top + row, **look(place), markersize=3.5, alpha=0.6, linestyle="none")
            mean = data.mean(method, attack)
            if mean is None:
                axes.text(0, top + row, "  not measured", va="center", size=9, transform=axes.get_yaxis_transform())
            else:
                axes.plot(mean, top + row, **look(place), markersize=7, linestyle="none", clip_on=False, zorder=3)
                # beside the interval, on the side that has room
                low, high = min(point.low for point in points), max(point.high for point in points)
                at, align, shown = (low, "right", f"{mean:.1f}  ") if high > 88 else (high, "left", f"  {mean:.1f}")
                axes.text(at, top + row, shown, va="center", ha=align, size=9.5, color=ink)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylim(len(data.attacks) * (count + 1.2) - 0.6, -0.8)
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy, % of the test images")
    # marks at 0 need room
    axes.tick_params(axis="y", length=0, pad=8)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    return figure


@dataclass(frozen=True)
class RadiusCurves:
    """Accuracy of every method under one kind of attack, against the radius."""

    attack: str
    norm: str
    methods: Sequence[str]
    places: Sequence[int]
    points: Mapping[str, Mapping[float, Sequence[Point]]]


def collect_radius_curves(data: Accuracies) -> list[RadiusCurves]:
    """One for each attack that was made at several radii; clean images are radius 0."""
    found = []
    for name, norm in dict.fromkeys((attack.name, attack.norm) for attack in data.attacks if attack.eps):
        attacks = [attack for attack in data.attacks if (attack.name, attack.norm) == (name, norm)]
        clean = [attack for attack in data.attacks if not attack.eps]
        if len(attacks) > 1:
            points = {
                method: {a.eps: data.points[method, a] for a in [*clean, *attacks] if (method, a) in data.points}
                for method in data.methods
            }
            found.append(RadiusCurves(name, norm, data.methods, data.places, points))
    return found


def draw_radius_curves(data: RadiusCurves) -> Figure:
    """A line through the means of each method; the band is the interval of its single run, dots are several runs."""
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.add_subplot()
    handles = {}
    radii = {eps for points in data.points.values() for eps in points if eps}
    in_steps = all(describe_eps(eps, data.norm).endswith("/255") for eps in radii)
    scale = 255 if in_steps else 1
    for method, place in zip(data.methods, data.places, strict=True):
        by_eps = {scale * eps: points for eps, points in sorted(data.points[method].items())}
        if not by_eps:
            continue
        eps, style = list(by_eps), look(place)
        means = [statistics.mean(point.accuracy for point in points) for points in by_eps.values()]
        (handles[method],) = axes.plot(eps, means, **style, markersize=5)
        if all(len(points) == 1 for points in by_eps.values()):
            low, high = ([getattr(points[0], end) for points in by_eps.values()] for end in ("low", "high"))
            axes.fill_between(eps, low, high, color=style["color"], alpha=0.18, linewidth=0)
        else:
            dots = [(at, point.accuracy) for at, points in by_eps.items() for point in points]
            axes.plot(*zip(*dots, strict=True), **style, linestyle="none", markersize=3, alpha=0.6)
    norm = "l-infinity" if data.norm == "linf" else data.norm
    axes.set_xlabel(f"radius eps in {norm}, {'1/255 of the pixel range' if in_steps else 'pixels of [0, 1]'}")
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 101)
    axes.set_xlim(left=0)
    axes.set_title(label(data.attack))
    add_legend(figure, handles)
    return figure


@dataclass(frozen=True)
class Ablation:
    """Accuracy of one method against the number of particles K.

    Args:
        method: its name at the largest K.
        quantity: the attack, or ``test accuracy`` for the one after training, which has no interval.
        points: the runs of each K.
    """

    method: str
    quantity: str
    points: Mapping[int, Sequence[Point]]


TEST_ACCURACY = "test accuracy"


def collect_ablations(methods: Sequence[Method]) -> list[Ablation]:
    """One for each attack, and each set of methods whose configurations differ in ``num_particles`` alone.

    A method whose configuration is theirs without the terms that have particles is K = 0.
    """
    families: dict[str, dict[int, Method]] = {}
    bases: dict[str, str] = {}
    plain: dict[str, Method] = {}
    for method in methods:
        config = method.runs[0].config
        if config is None or not method.runs[0].was_trained:
            continue
        counts = set(_values(config, "num_particles"))
        base = _key(_without_particles(config))
        if not counts:
            plain[base] = method
        elif len(counts) == 1:
            family = _key(without(config, "num_particles"))
            families.setdefault(family, {})[int(counts.pop())] = method
            bases[family] = base
    found = []
    for family, by_count in families.items():
        if len(by_count) == 1:
            continue
        if bases[family] in plain:
            by_count[0] = plain[bases[family]]
        points: dict[str, dict[int, list[Point]]] = {}
        for count, method in sorted(by_count.items()):
            for run in method.runs:
                for quantity, point in _points(run):
                    points.setdefault(quantity, {}).setdefault(count, []).append(point)
        if len(points.get(CLEAN, ())) == len(by_count):
            # the same images, with intervals
            points.pop(TEST_ACCURACY, None)
        name = by_count[max(by_count)].name
        found += [Ablation(name, quantity, values) for quantity, values in points.items() if len(values) > 1]
    return found


def _points(run: Run) -> Iterator[tuple[str, Point]]:
    """The accuracies of a run by attack, and the one after its training."""
    for attack, result in measured(run.evaluation) if run.evaluation else ():
        yield attack.title, Point(run.name, result["accuracy"], *result["interval"])
    if run.test and "student" in run.test:
        top1 = run.test["student"]["top1"]
        yield TEST_ACCURACY, Point(run.name, top1, top1, top1)


def _key(config: Any) -> str:
    return json.dumps(without(config, "dst_ckpt", "ckpt"), sort_keys=True)


def _values(block: Any, name: str) -> Iterator[Any]:
    """Every entry of a name, at any depth."""
    if isinstance(block, Mapping):
        for key, value in block.items():
            yield from [value] if key == name else _values(value, name)
    elif isinstance(block, list):
        for item in block:
            yield from _values(item, name)


def _without_particles(block: Any, parent: str = "") -> Any:
    """A copy of a configuration without the terms of losses that have particles, and without what binds them."""
    if isinstance(block, list):
        return [_without_particles(item) for item in block]
    if not isinstance(block, Mapping):
        return block
    return {
        key: _without_particles(value, key)
        for key, value in block.items()
        if key != "pre_epoch_process" and not (parent == "sub_terms" and any(_values(value, "num_particles")))
    }


def draw_ablation(data: Ablation) -> Figure:
    """A line through the means, and every run with its interval."""
    import matplotlib
    from matplotlib.figure import Figure

    ink = matplotlib.rcParams["text.color"]
    style = look(0)
    figure = Figure(figsize=(5.2, 2.9))
    axes = figure.add_subplot()
    # places, not numbers: K doubles from one to the next
    places = range(len(data.points))
    means = [statistics.mean(point.accuracy for point in points) for points in data.points.values()]
    axes.plot(places, means, **style, markersize=6)
    for place, points in zip(places, data.points.values(), strict=True):
        for i, point in enumerate(points):
            at = place + 0.08 * (i - (len(points) - 1) / 2)
            axes.plot([at, at], [point.low, point.high], color=style["color"], alpha=0.5)
            if len(points) > 1:
                axes.plot(at, point.accuracy, **style, markersize=3, linestyle="none", alpha=0.6)
        top = max(point.high for point in points)
        axes.annotate(
            f"{means[place]:.1f}", (place, top), (0, 4), textcoords="offset points", ha="center", color=ink, size=10
        )
    axes.set_xticks(places, [str(count) for count in data.points])
    axes.margins(x=0.12, y=0.14)
    axes.set_xlabel("number of particles K")
    axes.set_ylabel("accuracy, %")
    axes.set_title(label(data.quantity))
    return figure

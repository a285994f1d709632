"""``similarity.json`` drawn: diversity of particles against their number, rank correlation against sharpness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchdistill_adv.evaluation.diversity import search_name
from torchdistill_adv.report.records import Json, Method
from torchdistill_adv.report.style import add_legend, label, look

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INPUTS: Mapping[str, str] = {
    "clean": "clean images",
    "student": "examples that attack the student",
    "teacher": "examples that attack the teacher",
}


@dataclass(frozen=True)
class Diversity:
    """SSE of the particles of some searches.

    Args:
        searches: by name, (K, mean SSE, standard deviation over the images).
    """

    searches: Mapping[str, Sequence[tuple[int, float, float]]]


def collect_diversity(diversity: Json) -> Diversity | None:
    """From the section ``diversity``; None where no K has pairs of particles."""
    searches: dict[str, list[tuple[int, float, float]]] = {}
    for row in diversity["results"]:
        if row["sse"] is not None:
            point = (row["num_particles"], row["sse"], row["sse_std"])
            searches.setdefault(search_name(row), []).append(point)
    return Diversity(searches) if searches else None


def draw_diversity(data: Diversity) -> Figure:
    """A line for each search through the means, with bars of one standard deviation."""
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.add_subplot()
    counts = sorted({count for points in data.searches.values() for count, _, _ in points})
    handles = {}
    for i, (name, points) in enumerate(data.searches.items()):
        # apart, so that the bars of one do not hide those of another
        places = [counts.index(count) + 0.06 * (i - (len(data.searches) - 1) / 2) for count, _, _ in points]
        style = look(i)
        means, deviations = [mean for _, mean, _ in points], [deviation for _, _, deviation in points]
        (handles[name],) = axes.plot(places, means, **style, markersize=5)
        axes.errorbar(places, means, deviations, fmt="none", ecolor=style["color"], elinewidth=1, alpha=0.6)
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("number of particles K")
    axes.set_ylabel("SSE between particles")
    add_legend(figure, handles)
    return figure


@dataclass(frozen=True)
class Correlation:
    """Rank correlation of teacher and student on one kind of input.

    Args:
        inputs: which.
        methods: by name, (sharpness, mean soft Spearman correlation) of its first run that has it.
        hard: by name, mean hard Spearman correlation.
        places: the place of each in the list of all methods, which its colour is for.
    """

    inputs: str
    methods: Mapping[str, Sequence[tuple[float, float]]]
    hard: Mapping[str, float | None]
    places: Mapping[str, int]


def collect_correlations(methods: Sequence[Method]) -> list[Correlation]:
    """One for each kind of input."""
    found = []
    for inputs, words in INPUTS.items():
        soft: dict[str, list[tuple[float, float]]] = {}
        hard: dict[str, float | None] = {}
        for method in methods:
            measured = next((run.similarity for run in method.runs if run.similarity), None)
            if measured is not None:
                spearman = measured["agreement"][inputs]["spearman"]
                soft[method.name] = [(float(b), value) for b, value in spearman["soft"].items() if value is not None]
                hard[method.name] = spearman["hard"]
        if any(soft.values()):
            places = {method.name: place for place, method in enumerate(methods)}
            found.append(Correlation(words, soft, hard, places))
    return found


def draw_correlation(data: Correlation) -> Figure:
    """A line for each method; its hard correlation is the dotted level."""
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.add_subplot()
    handles = {}
    for name, points in data.methods.items():
        style = look(data.places[name])
        (handles[name],) = axes.plot(*zip(*points, strict=True), **style, markersize=5)
        hard = data.hard[name]
        if hard is not None:
            axes.axhline(hard, color=style["color"], linestyle=":", linewidth=1.2)
    sharpness = sorted({at for points in data.methods.values() for at, _ in points})
    axes.set_xscale("log")
    axes.set_xticks(sharpness, [f"{at:g}" for at in sharpness])
    axes.minorticks_off()
    axes.set_xlabel("sharpness of the soft ranks")
    axes.set_ylabel("rank correlation")
    axes.set_title(label(data.inputs))
    add_legend(figure, handles)
    return figure

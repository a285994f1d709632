"""The picture of a study."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.findings import Findings
from experiments.intervals import Estimate
from torchdistill_adv.report.style import look

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = tuple[str, Estimate]


def draw(findings: Findings) -> Figure:
    """The chart that a study asks for: ``kind`` is one of :data:`CHARTS`, and the rest are its options."""
    options = dict(findings.study.chart)
    return CHARTS[options.pop("kind")](findings, **options)


def dots(findings: Findings, measures: Mapping[str, str]) -> Figure:
    """A line for every variant, a panel for every measure: means and 95 % intervals over the seeds."""
    names = [variant.name for variant in findings.variants]
    panels = {}
    for measure, heading in measures.items():
        found = [(name, findings.estimate(name, measure)) for name in names]
        panels[heading] = [(name, value) for name, value in found if value is not None]
    return _rows(panels, names)


def differences(findings: Findings, heading: str) -> Figure:
    """A line for every comparison: the difference and its 95 % interval."""
    rows = []
    for comparison in findings.study.comparisons:
        found = findings.difference(comparison.variant, comparison.reference, comparison.measure)
        if found is not None:
            rows.append((f"{comparison.variant} against {comparison.reference}", found))
    return _rows({heading: rows}, [name for name, _ in rows], zero=True)


def lines(findings: Findings, y: str, headings: Sequence[str]) -> Figure:
    """A line for all variants of one name before ``, K =``, over the number of particles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2))
    axes = figure.subplots()
    groups: dict[str, list[tuple[int, Estimate]]] = {}
    for variant in findings.variants:
        found = findings.estimate(variant.name, y)
        name, _, count = variant.name.partition(", K = ")
        if found is not None:
            groups.setdefault(name, []).append((int(count), found))
    for number, (name, points) in enumerate(groups.items()):
        # side by side, as equal values would hide each other
        places = [count + 0.08 * (number - (len(groups) - 1) / 2) for count, _ in points]
        errors = [value.half_width or 0 for _, value in points]
        axes.errorbar(places, [value.mean for _, value in points], errors, label=name, capsize=3, **look(number))
    axes.set(
        xlabel=headings[0],
        ylabel=headings[1],
        xticks=sorted({count for points in groups.values() for count, _ in points}),
    )
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


CHARTS: Mapping[str, Callable[..., Any]] = {
    "dots": dots,
    "differences": differences,
    "lines": lines,
}


def _rows(panels: Mapping[str, Sequence[Row]], names: Sequence[str], zero: bool = False) -> Figure:
    """Means with their intervals, a name a line from above, a panel beside the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 + 3.0 * len(panels), 1.1 + 0.27 * len(names)))
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (heading, rows) in zip(all_axes, panels.items(), strict=True):
        for name, value in rows:
            options = {**look(0), "linestyle": "none", "capsize": 3}
            axes.errorbar(value.mean, names.index(name), xerr=value.half_width or 0, **options)
        axes.set_title(heading)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
        if zero:
            axes.axvline(0, linewidth=1, color="gray")
    return figure

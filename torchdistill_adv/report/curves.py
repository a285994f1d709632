"""Training curves from ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchdistill_adv.report.records import Json, Method
from torchdistill_adv.report.style import add_legend, label, look

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Series = tuple[list[int], list[float]]

TOTAL = "sum of all terms"


@dataclass(frozen=True)
class Curves:
    """One quantity over the epochs.

    Args:
        title: what it is of.
        quantity: its name and unit.
        lines: by name, one (epochs, values) for each run.
        places: the place of each name in the list of all methods, which its colour is for.
        stages: epochs at which a later training stage begins.
    """

    title: str
    quantity: str
    lines: Mapping[str, Sequence[Series]]
    places: Mapping[str, int]
    stages: Sequence[int] = ()

    @property
    def log(self) -> bool:
        """Whether the values span so much that a logarithmic axis shows more."""
        values = [value for runs in self.lines.values() for _, run in runs for value in run]
        return min(values) > 0 and max(values) > 30 * min(values)


def collect_losses(method: Method) -> Curves | None:
    """Every term of a method's loss, times its weight, and their sum where there are several."""
    epochs = [epoch for run in method.runs for epoch in run.epochs]
    terms = list(dict.fromkeys(name for epoch in epochs for name in epoch["terms"]))
    lines = {name: [_series(run.epochs, "terms", name) for run in method.runs] for name in terms}
    if len(terms) != 1:
        lines[TOTAL] = [_series(run.epochs, "loss") for run in method.runs]
    stages = {min(e["epoch"] for e in epochs if e["stage"] == stage) for stage in {e["stage"] for e in epochs}}
    return _curves(method.name, "loss, weighted", lines, sorted(stages)[1:])


# what is drawn of a search: the figure, its quantity, the entries of a record with a word for each, and their factor
SEARCH: Sequence[tuple[str, str, Mapping[str, str], float]] = (
    ("objective", "objective", {"objective_clean": "clean", "objective_adversarial": "adversarial"}, 1),
    ("changed", "changed, %", {"changed_student": "student", "changed_teacher": "teacher"}, 100),
    ("distance", "distance", {"distance_mean": "mean", "distance_max": "largest", "eps": "eps"}, 1),
)


def collect_searches(method: Method) -> dict[str, Curves]:
    """What the searches of a method did, by figure; without what its records do not have."""
    names = dict.fromkeys(name for run in method.runs for epoch in run.epochs for name in epoch.get("search") or {})
    found = {}
    for figure, quantity, entries, factor in SEARCH:
        lines = {
            f"{name}, {word}": [_series(run.epochs, "search", name, entry, factor=factor) for run in method.runs]
            for name in names
            for entry, word in entries.items()
        }
        data = _curves(method.name, quantity, lines)
        if data is not None:
            found[figure] = data
    return found


def collect_times(method: Method) -> Curves | None:
    """What the time of a method's training was spent on."""
    lines = {
        word: [_series(run.epochs, "time", word, factor=100) for run in method.runs]
        for word in ("search", "training", "data")
    }
    return _curves(method.name, "share of the time, %", lines)


def collect_validation(methods: Sequence[Method], block: str, entry: str, title: str) -> Curves | None:
    """An accuracy on the validation set by method: ``validation``, ``top1`` or ``robust_validation``, ``robust``."""
    lines = {method.name: [_series(run.epochs, block, entry) for run in method.runs] for method in methods}
    return _curves(title, "accuracy, %", lines)


def collect_learning_rates(methods: Sequence[Method]) -> Curves | None:
    """The learning rate of each method."""
    lines = {method.name: [_series(run.epochs, "lr") for run in method.runs] for method in methods}
    return _curves("learning rate", "learning rate", lines)


def _curves(
    title: str, quantity: str, lines: Mapping[str, Sequence[Series]], stages: Sequence[int] = ()
) -> Curves | None:
    """Without what was never measured; None if nothing was."""
    kept = {name: [run for run in runs if run[0]] for name, runs in lines.items() if any(run[0] for run in runs)}
    places = {name: i for i, name in enumerate(lines) if name in kept}
    return Curves(title, quantity, kept, places, stages) if kept else None


def _series(epochs: Sequence[Json], *path: str, factor: float = 1) -> Series:
    """An entry of every record that has it, times ``factor``."""
    found: Series = ([], [])
    for epoch in epochs:
        value: Any = epoch
        for name in path:
            value = (value or {}).get(name)
        if value is not None:
            found[0].append(epoch["epoch"])
            found[1].append(factor * value)
    return found


def draw_curves(data: Curves) -> Figure:
    """A line for each run, in the colour of its name."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure()
    axes = figure.add_subplot()
    handles = {}
    for name, runs in data.lines.items():
        style = look(data.places[name])
        if name == TOTAL:
            # over the terms, of which one may be nearly all of it
            ink = matplotlib.rcParams["text.color"]
            style = {"color": ink, "marker": "none", "linestyle": (0, (1, 4)), "linewidth": 1.3, "zorder": 3}
        for epochs, values in runs:
            # marks where there are so few that they can be told apart
            size = 3.5 if len(epochs) <= 12 else 0
            (handles[name],) = axes.plot(epochs, values, **style, markersize=size, alpha=0.6 if len(runs) > 1 else 1)
    for epoch in data.stages:
        axes.axvline(epoch - 0.5, color=matplotlib.rcParams["axes.edgecolor"], linestyle=":", linewidth=1)
    if data.log:
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel(data.quantity)
    axes.set_title(label(data.title))
    add_legend(figure, handles)
    return figure

"""How figures look on a light and on a dark page, and how one is drawn for both."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIGHT, DARK = "light", "dark"

# colours of the page, which the figures stand on
PALETTES: Mapping[str, Mapping[str, str]] = {
    LIGHT: {"paper": "#fcfcfa", "ink": "#1d1f21", "quiet": "#63676b", "rule": "#dcdcd6", "accent": "#1f5f8b"},
    DARK: {"paper": "#15171a", "ink": "#e3e3df", "quiet": "#9aa0a6", "rule": "#34383d", "accent": "#82b9de"},
}

# after Okabe and Ito, darker or lighter until each stands out from the page
CYCLES: Mapping[str, tuple[str, ...]] = {
    LIGHT: ("#0a6aa8", "#c9540b", "#0b8560", "#9a4f86", "#a27400", "#4b9cd3", "#6d6f73"),
    DARK: ("#6cb3ec", "#f2935f", "#4fc8a0", "#d79dc6", "#e3b64c", "#a9d5f2", "#a5a8ac"),
}
MARKERS = "osD^v"
DPI = 200


def _theme(name: str) -> dict[str, Any]:
    colours = PALETTES[name]
    return {
        "axes.edgecolor": colours["quiet"],
        "axes.facecolor": colours["paper"],
        "axes.grid": True,
        "axes.labelcolor": colours["ink"],
        "axes.labelsize": 11,
        "axes.prop_cycle": f"cycler('color', {list(CYCLES[name])})",
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "figure.constrained_layout.use": True,
        "figure.edgecolor": colours["paper"],
        "figure.facecolor": colours["paper"],
        "figure.figsize": [5.2, 3.4],
        "font.size": 11,
        "grid.color": colours["rule"],
        "grid.linewidth": 0.7,
        "legend.fontsize": 10.5,
        "legend.frameon": False,
        "legend.labelcolor": colours["ink"],
        "lines.linewidth": 1.7,
        "savefig.dpi": DPI,
        "text.color": colours["ink"],
        "xtick.color": colours["quiet"],
        "xtick.labelcolor": colours["ink"],
        "xtick.labelsize": 10.5,
        "ytick.color": colours["quiet"],
        "ytick.labelcolor": colours["ink"],
        "ytick.labelsize": 10.5,
    }


THEMES: Mapping[str, Any] = {name: _theme(name) for name in PALETTES}


def render(draw: Callable[[], Figure]) -> dict[str, bytes]:
    """A figure as PNG, drawn once in each of :data:`THEMES`, whatever settings the user has for matplotlib.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    import matplotlib

    images = {}
    for name, theme in THEMES.items():
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(theme)
            file = io.BytesIO()
            draw().savefig(file, format="png")
        images[name] = file.getvalue()
    return images


def look(index: int) -> dict[str, Any]:
    """Colour and marker of the method at a place in the list, the same in every figure."""
    import matplotlib

    colours = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
    return {"color": colours[index % len(colours)], "marker": MARKERS[index // len(colours) % len(MARKERS)]}


def label(name: str) -> str:
    """A name as matplotlib shows it literally: a dollar would begin a formula, an underscore hide it from legends."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def add_legend(figure: Figure, handles: Mapping[str, Any]) -> None:
    """A legend below the axes, in as many columns as its names leave room for."""
    columns = max(1, 52 // (max(map(len, handles)) + 6))
    figure.legend(handles.values(), map(label, handles), loc="outside lower center", ncols=min(columns, len(handles)))

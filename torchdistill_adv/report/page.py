"""The page: HTML that needs no script, no font and no network, from text, tables and figures.

What these functions are given is shown literally; only ```code``` between backticks is set as code.
"""

from __future__ import annotations

import base64
import html
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torchdistill_adv.report.style import DARK, DPI, LIGHT, PALETTES, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# a value, or a value and what stands small below it
Cell = str | tuple[str, str]


@dataclass(frozen=True)
class Section:
    """A heading, the anchor that the table of contents leads to, and HTML."""

    anchor: str
    title: str
    body: str


def text(value: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(value))


def paragraph(value: str) -> str:
    return f"<p>{text(value)}</p>"


def missing(value: str) -> str:
    """The sentence in the place of what cannot be shown: what is missing, and which command makes it."""
    return f'<p class="missing">{text(value)}</p>'


def heading(value: str) -> str:
    return f"<h3>{text(value)}</h3>"


def items(values: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{text(value)}</li>" for value in values) + "</ul>"


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[Cell]], parts: Sequence[int] = ()) -> str:
    """A table that scrolls inside its own container; the first cell of a row is its heading.

    Args:
        caption: what it shows.
        header: of the columns.
        rows: their cells.
        parts: places of the rows that are a part of the row above them.
    """
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in header)
    body = []
    for place, (first, *cells) in enumerate(rows):
        kind = ' class="part"' if place in parts else ""
        content = f'<th scope="row">{_cell(first)}</th>' + "".join(f"<td>{_cell(cell)}</td>" for cell in cells)
        body.append(f"<tr{kind}>{content}</tr>")
    # a caption of the table itself would scroll with it
    return (
        f'<figure class="table"><figcaption>{text(caption)}</figcaption>'
        f'<div class="scroll" role="region" tabindex="0" aria-label="{html.escape(caption)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div></figure>"
    )


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return text(cell)
    value, small = cell
    return f"{text(value)}<small>{text(small)}</small>" if small else text(value)


class Figures:
    """Draws figures for both themes, and keeps the PNGs in a folder beside the page, without those of an earlier one.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stems: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)
        for theme in PALETTES:
            for old in folder.glob(f"*-{theme}.png"):
                old.unlink()

    def add(self, name: str, draw: Callable[[], Figure], alt: str, caption: str) -> str:
        """A figure with its caption, as HTML with the images in it.

        Args:
            name: of its files, made fit for a file name.
            draw: called once for each theme.
            alt: what the picture shows, for who cannot see it.
            caption: how the picture was made, and what to see.
        """
        stem = re.sub(r"[^\w.-]+", "_", name)
        while stem in self.stems:
            stem += "_"
        self.stems.add(stem)
        images = render(draw)
        uris = {}
        for theme, image in images.items():
            (self.folder / f"{stem}-{theme}.png").write_bytes(image)
            uris[theme] = f"data:image/png;base64,{base64.b64encode(image).decode('ascii')}"
        # both stand at a fixed place of a PNG
        width, height = struct.unpack(">II", images[LIGHT][16:24])
        return (
            f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{uris[DARK]}">'
            f'<img src="{uris[LIGHT]}" alt="{html.escape(alt)}" width="{_shown(width)}" '
            f'height="{_shown(height)}"></picture>'
            f"<figcaption>{text(caption)}</figcaption></figure>"
        )


def _shown(pixels: int) -> int:
    """CSS pixels of a figure: 110 to the inch, at which its text is as large as a caption."""
    return round(pixels * 110 / DPI)


def grid(figures: Sequence[str]) -> str:
    """Figures side by side where there is room."""
    return f'<div class="figures">{"".join(figures)}</div>' if figures else ""


def document(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole file."""
    contents = "".join(f'<li><a href="#{s.anchor}">{text(s.title)}</a></li>' for s in sections)
    body = "".join(
        f'<section id="{s.anchor}" aria-labelledby="{s.anchor}-title"><h2 id="{s.anchor}-title">{text(s.title)}</h2>'
        f"{s.body}</section>"
        for s in sections
    )
    # the policy makes sure that nothing is ever loaded
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{text(title)}</h1><p class="subtitle">{text(subtitle)}</p></header>
<nav aria-label="Contents"><ol>{contents}</ol></nav>
<main>{body}</main>
</body>
</html>
"""


def _variables(theme: str) -> str:
    return "".join(f"--{name}:{value};" for name, value in PALETTES[theme].items())


STYLE = (
    f":root{{color-scheme:light dark;{_variables(LIGHT)}}}"
    f"@media (prefers-color-scheme: dark){{:root{{{_variables(DARK)}}}}}"
    """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0 auto;max-width:66rem;padding:3.5rem 1.25rem 6rem;background:var(--paper);color:var(--ink);
font:1.0625rem/1.6 Charter,"Bitstream Charter","Sitka Text",Cambria,Georgia,serif;overflow-wrap:break-word}
h1,h2,h3,nav,table,figcaption,.subtitle,.missing{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",
"Noto Sans","DejaVu Sans",Arial,sans-serif}
h1{font-size:1.85rem;line-height:1.2;font-weight:650;letter-spacing:-.015em;margin:0 0 .4rem}
h2{font-size:1.25rem;line-height:1.3;font-weight:650;margin:4rem 0 1rem;padding-top:1rem;
border-top:1px solid var(--rule)}
h3{font-size:1rem;font-weight:600;margin:2.25rem 0 .5rem}
p,ul{max-width:42rem;margin:.75rem 0}
ul{padding-left:1.2rem}
.subtitle{color:var(--quiet);font-size:.9rem;margin:0}
nav{margin:2rem 0 2.5rem;font-size:.9rem}
nav ol{margin:0;padding:0;list-style:none;columns:16rem;column-gap:2rem;counter-reset:n}
nav li{counter-increment:n;padding:.15rem 0;break-inside:avoid}
nav li::before{content:counter(n);display:inline-block;width:1.7rem;color:var(--quiet);
font-variant-numeric:tabular-nums}
a{color:var(--accent);text-decoration:none}
a:hover{text-decoration:underline}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
code{font:.86em ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
.missing{color:var(--quiet);font-size:.92rem;border-left:2px solid var(--rule);padding-left:.9rem}
.table{margin:1.25rem 0 1.75rem}
.table figcaption{margin:0 0 .6rem;max-width:42rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.875rem;line-height:1.4;font-variant-numeric:tabular-nums;min-width:100%}
th,td{padding:.5rem .9rem .5rem 0;text-align:left;vertical-align:top;white-space:nowrap}
thead th{font-weight:600;border-bottom:1px solid var(--ink);vertical-align:bottom}
th:first-child{position:sticky;left:0;background:var(--paper)}
tbody th{font-weight:550}
tbody tr+tr:not(.part)>*{border-top:1px solid var(--rule)}
.part>*{padding-top:0;color:var(--quiet);font-weight:400}
.part th{padding-left:1rem}
small{display:block;color:var(--quiet);font-size:.8rem;font-weight:400;white-space:normal}
th small{white-space:nowrap}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,27rem),1fr));gap:2rem 2.25rem;
align-items:start}
figure{margin:1.25rem 0 0;min-width:0}
img{display:block;max-width:100%;height:auto}
figcaption{color:var(--quiet);font-size:.84rem;line-height:1.5;margin-top:.6rem;max-width:36rem}
@media (max-width:30rem){body{padding-top:2rem}h2{margin-top:3rem}h1{font-size:1.5rem}}
@media print{nav{display:none}body{max-width:none;padding:0}figure,tr{break-inside:avoid}}
"""
)

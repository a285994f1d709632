"""One page of HTML from the directories of runs: tables, training curves, robustness, and pictures of the networks."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from pathlib import Path

from torchdistill_adv.errors import ConfigError
from torchdistill_adv.evaluation.blocks import versions
from torchdistill_adv.report import sections
from torchdistill_adv.report.page import Figures, Section, document, missing
from torchdistill_adv.report.records import group, read_runs

__all__ = ["write_report"]


def write_report(
    runs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    pictures: bool = True,
    device: str | None = None,
) -> Path:
    """Write a report of some runs: one HTML file that needs no network, and its figures as PNGs in a folder beside it.

    Accuracies, curves and metrics come from the files that training, ``evaluate`` and ``metrics`` leave in a run's
    directory. Runs whose configurations differ in nothing but where they write are one method, with several seeds.
    What cannot be shown is replaced by a sentence that says what is missing, and which command makes it.

    Args:
        runs: their directories: the path of ``dst_ckpt`` without its extension.
        out: the HTML file; figures go into the folder ``<out>_files``.
        pictures: load the networks of the first run of each method, and draw particles, class-activation maps, loss
            landscape and decision boundaries; minutes for large networks on a CPU.
        device: of the networks, such as ``cpu`` or ``cuda:1``; by default a GPU where there is one.

    Returns:
        The path of the HTML file.

    Raises:
        ConfigError: a directory that is no run, a file in it that cannot be read, an ``out`` that does not end in
            .html or cannot be written, or no matplotlib.
    """
    path = Path(out)
    if path.suffix not in (".html", ".htm") or path.is_dir():
        raise ConfigError(f"found '{path}'; write a file that ends in .html", "--out")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"a report needs matplotlib; {INSTALL}") from error
    methods = group(read_runs(runs))
    try:
        figures = Figures(path.with_name(f"{path.stem}_files"))
    except OSError as error:
        raise ConfigError(f"found '{path}', where nothing can be written: {error.strerror}", "--out") from error
    found = [
        *sections.accuracy_sections(methods, figures),
        sections.curves_section(methods, figures),
        sections.ablation_section(methods, figures),
        sections.similarity_section(methods, figures),
    ]
    if pictures:
        from torchdistill_adv.report.networks import network_sections

        found += network_sections(methods, figures, device)
    else:
        sentence = (
            "Pictures of the networks were left out; `torchdistill-adv report` without `--no_pictures` draws them."
        )
        found.append(Section("networks", "Pictures of the networks", missing(sentence)))
    count = sum(len(method.runs) for method in methods)
    now = datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z")
    text = document(
        "Adversarial distillation: report",
        f"{count} run{'s' * (count > 1)} of {len(methods)} method{'s' * (len(methods) > 1)}. Written {now} with "
        + ", ".join(f"{name} {version}" for name, version in versions().items()),
        [sections.runs_section(methods), *found],
    )
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


INSTALL = "pip install 'torchdistill-adv[report]'"

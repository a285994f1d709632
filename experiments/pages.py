"""The page of a study: what was asked, how it was measured, what was found, what was not run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.charts import draw
from experiments.findings import Findings, seconds_of
from experiments.intervals import Estimate
from experiments.runs import Place, Run, runs_of
from experiments.study import ROOT, Study, load_study, study_names
from torchdistill_adv.report.style import LIGHT, render

PAGES = ROOT / "docs" / "results"
README = ROOT / "README.md"
OUTDATED = " †"
REFERENCE = (
    "The last column is the difference to {variant} in `{measure}`, with its 95 % interval: **+** is higher, **-** "
    "lower, = no difference, and one seed has no interval."
)
MARKS = "<!-- python -m experiments table {name} writes what follows -->\n", "<!-- until here: {name} -->\n"
SOURCES = {
    "packs": {
        "cifar10": "CIFAR-10, stored as JPEG of quality 75",
        "cifar100": "100 classes of Tiny-ImageNet at 32 x 32, stored as JPEG",
    },
    "torchvision": {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"},
}

OVERVIEW = """\
# Results

One code base, equal teachers, schedules and evaluation; every number from a file in [results](../../results) that has
its configuration, seed, commit and machine. `python -m experiments table all` writes all of this.

```sh
pip install '.[experiments]'
python -m experiments list                                          # studies, what is done, what is out of date
EXPERIMENTS_PACKS=FOLDER python -m experiments run robust           # an hour at most; the next time it goes on
EXPERIMENTS_PACKS=FOLDER python -m experiments run all --budget 30  # all of them, for half an hour
python -m experiments run robust --source torchvision               # downloads CIFAR, and has results of its own
python -m experiments run robust --size full --source torchvision --jobs 1  # ResNet-18 for 200 epochs, on a GPU
python -m experiments table all                                     # pages, pictures, the tables of the README
```

`--part 1/3` to `3/3` share the runs between machines: run the teachers on one, which `--seeds 0` does, copy its results
to the others, and all results together at the end. A result whose configuration
has changed counts as missing; one with other code is shown with †, until it is run again. A study is a
[YAML file](../../experiments/studies), and `--studies FOLDER` takes your own.

Accuracies are in percent. **No difference** is one within its 95 % interval, whatever it may be with more seeds."""


def write_pages(
    studies: Sequence[Study], place: Place, folder: Path = PAGES, readme: Path | None = README
) -> list[Path]:
    """Write the pages and pictures of studies into ``folder``, and their tables into ``readme``.

    Returns:
        The files that were written.
    """
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [study.name for study in studies]
    everything = [Findings.read(load_study(name, place.studies), place) for name in study_names(place.studies)]
    if place.is_default:
        written.append(folder / "README.md")
        written[0].write_text(overview(everything), encoding="utf-8")
    for findings in everything:
        study = findings.study
        if study.name not in wanted:
            continue
        picture = folder / f"{file_stem(study, place)}.png"
        if findings.results:
            picture.write_bytes(render(lambda findings=findings: draw(findings))[LIGHT])  # type: ignore[misc]
            written.append(picture)
        path = folder / f"{file_stem(study, place)}.md"
        path.write_text(page(findings), encoding="utf-8")
        written.append(path)
        if study.readme and place.is_default and readme is not None:
            readme.write_text(with_table(readme.read_text(encoding="utf-8"), findings), encoding="utf-8")
            written.append(readme)
    return written


def file_stem(study: Study, place: Place) -> str:
    """Of a study's page and picture."""
    return study.name if place.is_default else f"{study.name}-{place.size}-{place.source}"


def page(findings: Findings) -> str:
    """Markdown of a study."""
    study, place = findings.study, findings.place
    flags = "" if place.is_default else f" --size {place.size} --source {place.source}"
    parts = [
        f"# {study.title}",
        study.question.strip(),
        f"`python -m experiments run {study.name}{flags}` and then `python -m experiments table {study.name}{flags}` "
        f"write this page.\n[{study.name}.yaml](../../experiments/studies/{study.name}.yaml) is the study, "
        f"[{study.setting.name}.yaml](../../experiments/settings/{study.setting.name}.yaml) what its variants share.",
        *(f"![{study.title}]({file_stem(study, place)}.png)" for _ in range(bool(findings.results))),
        "## Results",
        *([table(findings, study.columns)] if findings.results else ["Nothing has been run yet."]),
        *([REFERENCE.format(**study.reference)] if study.reference and findings.results else []),
        *_comparisons(findings),
        *_notes(findings),
        "## How it was measured",
        *_setup(findings),
        "## Not run",
        *_not_run(findings),
    ]
    return "\n\n".join(parts) + "\n"


def overview(everything: Sequence[Findings]) -> str:
    """Markdown of all studies: what each asks, and what its differences say in words."""
    parts = [OVERVIEW]
    for findings in everything:
        study = findings.study
        runs = sum(map(len, findings.results.values()))
        total = runs + len(findings.missing)
        marked = f", {len(findings.outdated)} of them with older code{OUTDATED}" if findings.outdated else ""
        parts.append(f"## [{study.title}]({study.name}.md)")
        seconds = sum(seconds_of(result) for of_variant in findings.results.values() for result in of_variant.values())
        hours = f" in about {seconds / 3600:.1f} hours of one process" if runs else ""
        parts.append(f"{study.question.strip()} {runs} of {total} runs{hours}{marked}.")
        lines = [*_against_reference(findings)]
        for comparison in study.comparisons:
            found = findings.difference(comparison.variant, comparison.reference, comparison.measure)
            if found is not None and found.half_width is not None:
                names = f"{comparison.variant} against {comparison.reference}"
                digits = 1 + digits_of(study.columns.get(comparison.measure, "%"))
                lines.append(f"{comparison.says}: {names}, {found.text(digits, sign=True)}, **{found.verdict}**")
        parts += ["\n".join(f"* {line}" for line in lines)] if lines else []
    return "\n\n".join(parts) + "\n"


def _against_reference(findings: Findings) -> Iterable[str]:
    """The variants that exceed the reference of a study, those that do not, and those that fall below."""
    reference = findings.study.reference
    if not reference:
        return
    name, measure = reference["variant"], reference["measure"]
    heading = findings.study.columns[measure]
    groups: dict[str, list[str]] = {}
    for variant in findings.variants:
        found = findings.difference(variant.name, name, measure)
        if found is not None and found.half_width is not None:
            groups.setdefault(found.verdict, []).append(variant.name)
    for verdict in ("higher", "no difference", "lower"):
        if verdict in groups:
            yield f"{heading}, against {name}: **{verdict}** {'; '.join(groups[verdict])}"


def table(
    findings: Findings, columns: Mapping[str, str], links: str = "../..", only: Sequence[str] | None = None
) -> str:
    """Markdown: a line for every variant, or those in ``only``, with means and 95 % intervals over its seeds."""
    reference = findings.study.reference
    heads = ["", "seeds", *columns.values()]
    heads += [f"{columns.get(reference['measure'], 'difference')} - {reference['variant']}"] if reference else []
    lines = [heads, ["---"] * len(heads)]
    for variant in findings.variants:
        if only is not None and variant.name not in only:
            continue
        label = f"[{variant.name}]({links}/configs/{variant.config}.yaml)" if variant.config else variant.name
        label += OUTDATED if variant.name in findings.marked else ""
        cells = [f"{label}: {variant.note}" if variant.note else label, str(len(findings.results[variant.name]))]
        for measure, heading in columns.items():
            found = findings.estimate(variant.name, measure)
            is_old = measure == "time" and findings.outdated_times.keys() & {variant.name, findings.study.timed}
            cells.append(_cell(found, heading) + OUTDATED * bool(found and is_old))
        if reference:
            found = findings.difference(variant.name, reference["variant"], reference["measure"])
            cells.append("" if found is None else f"{found.text(1, sign=True)}{_mark(found)}")
        lines.append(cells)
    is_marked = any(OUTDATED in cell for cells in lines for cell in cells)
    return _markdown(lines) + f"\n\n{OUTDATED.strip()} of older code, until it is run again" * is_marked


def with_table(text: str, findings: Findings) -> str:
    """The README with the study's table between its marks."""
    study = findings.study
    begin, end = (mark.format(name=study.name) for mark in MARKS)
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        return text
    columns = {measure: study.columns[measure] for measure in study.readme["columns"]}
    shown = "\n\n".join([table(findings, columns, ".", study.readme["variants"]), *_caption(findings)])
    return f"{before}{begin}\n{shown}\n\n{end}{after}"


def digits_of(heading: str) -> int:
    """Decimals of a column: percent and counts of images have one, times two, other measures three."""
    return 1 if "%" in heading or heading.startswith("images") else 2 if "time" in heading else 3


def _cell(found: Estimate | None, heading: str) -> str:
    if found is None:
        return ""
    # how much one run's time differs from another's is the machine's doing
    return f"{found.mean:.0f}" if "seconds" in heading else found.text(digits_of(heading))


def _mark(found: Estimate) -> str:
    return {"higher": " **+**", "lower": " **-**", "no difference": " ="}.get(found.verdict, "")


def _comparisons(findings: Findings) -> Iterable[str]:
    rows = [["question", "difference", "95 % interval", ""], ["---"] * 4]
    for comparison in findings.study.comparisons:
        found = findings.difference(comparison.variant, comparison.reference, comparison.measure)
        names = f"{comparison.variant} against {comparison.reference}, `{comparison.measure}`"
        names += OUTDATED if findings.marked & {comparison.variant, comparison.reference} else ""
        if found is None:
            rows.append([f"{comparison.says}<br>{names}", "", "", "not run"])
            continue
        width = found.half_width
        digits = 1 + digits_of(findings.study.columns.get(comparison.measure, "%"))
        ends = "" if width is None else f"{found.mean - width:+.{digits}f} to {found.mean + width:+.{digits}f}"
        rows.append([f"{comparison.says}<br>{names}", f"{found.mean:+.{digits}f}", ends, found.verdict])
    if len(rows) > 2:
        yield "## Differences"
        yield _markdown(rows)


def _notes(findings: Findings) -> Iterable[str]:
    notes = list(findings.study.notes)
    flags: Counter[tuple[str, str]] = Counter()
    for name, results in findings.results.items():
        for result in results.values():
            flags.update({(name, flag["name"]) for flag in result["measured"].get("last", {}).get("flags", ())})
    notes += [f"Flagged by the evaluation: {name}, {flag} ({count} runs)." for (name, flag), count in flags.items()]
    if "robustness" in findings.study.setting.measures and findings.results and not flags:
        notes.append("The evaluation flagged no run; [what it looks for](../evaluation.md), masked gradients among it.")
    if notes:
        yield "\n".join(f"* {note.strip()}" for note in notes)


def _attack_measures(findings: Findings) -> list[Mapping[str, Any]]:
    setting = findings.study.setting
    measures = {**setting.measures, **setting.sizes[findings.place.size].measures}
    return [measures[name] for name in ("robustness", "autoattack") if name in measures]


def _caption(findings: Findings) -> Iterable[str]:
    """What the attacks were, in short."""
    blocks = _attack_measures(findings)
    if blocks:
        sets = " and ".join(f"`{block['attacks']}` on {block.get('num_images', 'all')}" for block in blocks)
        yield f"Attacks within {blocks[0]['eps']} in l-infinity, each from one start: {sets} test images."


def _attacks(findings: Findings) -> Iterable[str]:
    """What the attacks were, and on how many images."""
    blocks = _attack_measures(findings)
    for block in blocks:
        yield (
            f"Attacks `{block['attacks']}` within {block['eps']} in l-infinity, each from one start, on "
            f"{block.get('num_images', 'all')} test images, of {' and '.join(block.get('of', ('last', 'best')))}."
        )
    if len({block.get("num_images") for block in blocks}) > 1:
        yield "Columns of attacks on other images, which may be easier ones, do not compare with each other."


def _setup(findings: Findings) -> Iterable[str]:
    study, place = findings.study, findings.place
    size = study.setting.sizes[place.size]
    images = f"{SOURCES[place.source][study.setting.data]}."
    yield f"{images} {size.description.strip()}"
    yield from _attacks(findings)
    if "robustness" in study.setting.measures:
        yield (
            "*last* is the checkpoint of the last epoch, *best* the one that withstood PGD-10 best on the validation "
            "images: checkpoints are selected without the test images. Clean accuracy is on all of these."
        )
    trained = any(variant.config for variant in study.variants)
    pairing = "; students with a teacher then began with equal weights and saw equal batches" if trained else ""
    yield (
        f"Means over the seeds, with 95 % intervals of Student's t. A difference is taken seed by seed{pairing}. Its "
        "interval is for other seeds and, where the outcome of every image is known, other images too. Where it "
        "contains zero there is *no difference*; of twenty such comparisons without any difference, one is expected to "
        "look like one."
    )
    results = [result for of_variant in findings.results.values() for result in of_variant.values()]
    if results:
        machines = Counter(_machine(result["machine"]) for result in results)
        commits = Counter(_commit(result) for result in results)
        teachers = Counter(
            f"{result['teacher']['name']} {result['teacher']['weights'][:8]}" for result in results if result["teacher"]
        )
        hours = sum(map(seconds_of, results)) / 3600
        facts = [
            f"{len(results)} runs, {hours:.1f} hours of one process or a little more; seconds are of training, several "
            "at a time on a busy machine",
            *(f"{machine} ({count} runs)" for machine, count in machines.items()),
            "commits " + ", ".join(f"{commit} ({count})" for commit, count in commits.items()),
            *_teachers(findings),
            *_times(findings),
            "teachers, by their weights: " + ", ".join(f"{who} ({count})" for who, count in teachers.items()),
        ]
        yield "\n".join(f"* {fact}" for fact in facts if not fact.endswith(": "))


def _teachers(findings: Findings) -> Iterable[str]:
    """The accuracies of the teachers, of the checkpoint that teaches."""
    setting = findings.study.setting
    for variant in setting.teachers.values():
        result = Run(setting, variant, 0, findings.place).result()
        if result is not None:
            found = result["measured"].get("best", result["measured"]["last"])
            values = ", ".join(f"{name} {value:.1f} %" for name, value in found.items() if isinstance(value, float))
            yield f"{variant.name}, as it teaches: {values}"


def _times(findings: Findings) -> Iterable[str]:
    """How the variants were timed."""
    times, study = findings.times, findings.study
    if times and study.timed:
        rounds = len(times["seconds"][study.timed])
        yield (
            f"times are those of {study.timed}, in training alone: all variants in turn, {rounds} rounds, on "
            f"{times['num_train']} images, {_machine(times['machine'])}, commit {_commit(times)}: "
            f"`python -m experiments time {study.name}`"
        )
    if findings.outdated_times:
        changed = ", ".join(sorted({name for differs in findings.outdated_times.values() for name in differs}))
        yield f"{OUTDATED.strip()} timed before these changed: {changed}; without a time, if it was not code"


def _commit(result: Mapping[str, Any]) -> str:
    return (result["commit"] or "unknown")[:7] + (" with changes" if result["changed"] else "")


def _machine(facts: Mapping[str, Any]) -> str:
    where = facts["device"] if facts["device"] != "cpu" else f"{facts['processor']}, {facts['threads']} thread a run"
    return f"{where}; torch {facts['torch'].partition('+')[0]}, torchdistill {facts['torchdistill']}"


def _not_run(findings: Findings) -> Iterable[str]:
    study, place = findings.study, findings.place
    lines = []
    missing = Counter(run.variant.name for run in findings.missing)
    for name, count in missing.items():
        lines.append(f"{name}: {count} of {study.variant(name).seeds} seeds")
    if findings.outdated:
        names = ", ".join(f"{run.variant.name} ({run.seed})" for run, _ in findings.outdated)
        files = ", ".join(f"`{file}`" for file in sorted({file for _, files in findings.outdated for file in files}))
        lines.append(
            f"{OUTDATED.strip()} with the code of today: since these (seed in brackets) {files} changed: {names}"
        )
    for other in study.setting.sizes:
        if other != place.size:
            done = sum(run.result_file.exists() for run in runs_of(study, Place(other, "torchvision", place.results)))
            lines.append(
                f"the size *{other}*: {study.setting.sizes[other].description.strip()} {done} runs are done. "
                f"`python -m experiments run {study.name} --size {other} --source torchvision --jobs 1`"
            )
    yield "\n".join(f"* {line}" for line in lines) if lines else "Everything was run."


def _markdown(lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

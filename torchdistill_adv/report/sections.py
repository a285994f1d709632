"""The sections that are made from the records alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torchdistill_adv.evaluation.diversity import search_name
from torchdistill_adv.evaluation.results import describe_eps
from torchdistill_adv.report import accuracy, curves, similarity
from torchdistill_adv.report.page import Cell, Figures, Section, grid, heading, items, missing, paragraph, table
from torchdistill_adv.report.records import Method, Run

EVALUATE = "`torchdistill-adv evaluate --config RUN/config.yaml` writes it"
METRICS = "`torchdistill-adv metrics --config RUN/config.yaml` writes it"

UNKNOWN, UNMEASURED = "not recorded", "\N{EN DASH}"


def listed(runs: Sequence[Run]) -> str:
    return ", ".join(run.name for run in runs)


def shown(value: float | None, form: str = ".1f") -> str:
    return UNMEASURED if value is None else format(value, form)


def runs_section(methods: Sequence[Method]) -> Section:
    """What the report is about: every run, and how it was made."""
    rows: list[list[Cell]] = []
    for method in methods:
        for run in method.runs:
            test = (run.test or {}).get("student", {}).get("top1")
            rows.append(
                [
                    (run.name, method.name if method.name != run.name else ""),
                    _fact(run, "seed"),
                    _fact(run, "device"),
                    f"{len(run.epochs)}",
                    "run has not ended" if run.test is None and run.was_trained else shown(test, ".2f"),
                    str(run.checkpoint or UNKNOWN),
                    (str(run.config_file or UNKNOWN), _overrides(run)),
                    ", ".join(f"{name} {v}" for name, v in (run.facts.get("versions") or {}).items()) or UNKNOWN,
                ]
            )
    header = [
        "run",
        "seed",
        "device",
        "epochs",
        "test accuracy, %",
        "checkpoint of the student",
        "configuration",
        "trained with",
    ]
    body = table("Runs. Those that differ in the seed alone are one method, whose name stands below.", header, rows)
    return Section("runs", "Runs", body)


def _fact(run: Run, name: str) -> str:
    value = run.facts.get(name)
    return UNKNOWN if value is None else str(value)


def _overrides(run: Run) -> str:
    """Entries that were set from outside; where the checkpoint goes has a column of its own."""
    given = {path: value for path, value in (run.facts.get("overrides") or {}).items() if "dst_ckpt" not in path}
    return "; ".join(f"{path}: {value}" for path, value in given.items())


def accuracy_sections(methods: Sequence[Method], figures: Figures) -> list[Section]:
    """Methods side by side, and against the radius."""
    data = accuracy.collect_accuracies(methods)
    titles = ("accuracy", "Accuracy, clean and under attack"), ("radius", "Accuracy against the radius")
    if data is None:
        body = missing(f"No run has an `evaluation.json`; {EVALUATE}.")
        return [Section(*title, body) for title in titles]
    return [Section(*titles[0], _side_by_side(methods, data, figures)), Section(*titles[1], _radius(data, figures))]


def _side_by_side(methods: Sequence[Method], data: accuracy.Accuracies, figures: Figures) -> str:
    runs = [run for method in methods for run in method.runs]
    evaluated = [run for run in runs if run.evaluation]
    parts = [_what_was_attacked(evaluated)]
    if len(evaluated) < len(runs):
        lacking = [run for run in runs if not run.evaluation]
        parts.append(missing(f"Without an `evaluation.json`, and so left out: {listed(lacking)}. {EVALUATE}."))
    unequal = accuracy.differences(evaluated)
    if unequal:
        parts.append(paragraph("The runs were not evaluated alike, so compare with care. Unequal:") + items(unequal))
    parts.append(_accuracy_table(data))
    parts.append(
        paragraph(
            "Marks are the share of test images that are classified rightly; higher is better. Bars are Wilson 95 % "
            "intervals: what the number of images leaves open, not what another training seed would change. A method "
            "of several seeds has a small mark and a bar for each run, and a large mark at the mean."
        )
    )
    drawn = []
    for i, part in enumerate(accuracy.by_radius(data)):
        names = ", ".join(attack.name for attack in part.attacks)
        radius = part.attacks[-1].radius
        drawn.append(
            figures.add(
                f"accuracy-{i + 1}",
                partial(accuracy.draw_accuracies, part),
                f"Accuracy of {', '.join(part.methods)} in percent. {_in_words(part)}",
                f"Methods side by side{radius and f' at eps = {radius}'}: {names}.",
            )
        )
    parts += [grid(drawn), heading("Reasons to doubt the numbers"), _flags(evaluated)]
    return "".join([*parts, heading("Attacks"), _attacks(evaluated)])


def _in_words(data: accuracy.Accuracies) -> str:
    means = [(method, attack, data.mean(method, attack)) for attack in data.attacks for method in data.methods]
    return (
        "; ".join(f"{method}, {attack.title}: {mean:.1f}" for method, attack, mean in means if mean is not None) + "."
    )


def _what_was_attacked(runs: Sequence[Run]) -> str:
    data = [run.evaluation["data"] for run in runs if run.evaluation]
    counts = {
        f"{d.get('num_images')} of the {d.get('of')} images of {d.get('dataset') or 'the data set'}" for d in data
    }
    return paragraph(
        f"Measured on {' / '.join(sorted(counts))}; radii are in pixels of [0, 1]. An image counts where it is "
        "classified rightly both clean and under the attack; in the worst case, under every attack of that radius."
    )


def _accuracy_table(data: accuracy.Accuracies) -> str:
    header = ["method", *(f"{attack.name} {attack.radius}".strip() for attack in data.attacks)]
    rows: list[list[Cell]] = []
    parts: list[int] = []
    for method in data.methods:
        by_run: dict[str, dict[accuracy.Attack, accuracy.Point]] = {}
        for attack in data.attacks:
            for point in data.points.get((method, attack), ()):
                by_run.setdefault(point.run, {})[attack] = point
        if len(by_run) == 1:
            (points,) = by_run.values()
            rows.append([method, *(_with_interval(points.get(attack)) for attack in data.attacks)])
        else:
            rows.append([(method, f"mean of {len(by_run)} runs"), *(_mean(data, method, a) for a in data.attacks)])
            for name, points in by_run.items():
                parts.append(len(rows))
                rows.append([name, *(_with_interval(points.get(attack)) for attack in data.attacks)])
    caption = (
        "Accuracy in %, with the Wilson 95 % interval of each run below it; a mean of several runs has their standard "
        "deviation."
    )
    return table(caption, header, rows, parts)


def _mean(data: accuracy.Accuracies, method: str, attack: accuracy.Attack) -> Cell:
    points = [point.accuracy for point in data.points.get((method, attack), ())]
    spread = f"± {statistics.stdev(points):.2f}" if len(points) > 1 else ""
    return shown(data.mean(method, attack), ".2f"), spread


def _with_interval(point: accuracy.Point | None) -> Cell:
    return UNMEASURED if point is None else (f"{point.accuracy:.2f}", f"{point.low:.1f}\u00a0to\u00a0{point.high:.1f}")


def _flags(runs: Sequence[Run]) -> str:
    found = [f"{run.name}: {flag['message']}" for run in runs if run.evaluation for flag in run.evaluation["flags"]]
    if found:
        return items(found)
    return paragraph(
        "None of the checks of an evaluation found a reason: gradients, modes, ranges, order of the attacks."
    )


def _attacks(runs: Sequence[Run]) -> str:
    """The settings of every attack and what it cost."""
    found: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        for result in run.evaluation["results"] if run.evaluation else ():
            radius = describe_eps(result["eps"], run.evaluation["norm"]) if run.evaluation and result["eps"] else ""
            given = {name: value for name, value in result["settings"].items() if name not in ("name", "kind")}
            settings = ", ".join(f"{name} {'by default' if value is None else value}" for name, value in given.items())
            found.setdefault((result["attack"], radius, settings), []).append(result)
    rows = [
        [
            attack,
            radius,
            settings,
            f"{statistics.mean(r['seconds'] for r in results):.1f}",
            f"{statistics.mean(r['gradient_evaluations'] / r['num_images'] for r in results):.1f}",
        ]
        for (attack, radius, settings), results in found.items()
    ]
    header = ["attack", "eps", "settings", "seconds a run", "gradients an image"]
    devices = sorted({run.evaluation.get("device", UNKNOWN) for run in runs if run.evaluation})
    caption = "How the attacks were run, and what each cost. A step size by default is a quarter of eps. Device: "
    return table(f"{caption}{', '.join(devices)}.", header, rows)


def _radius(data: accuracy.Accuracies, figures: Figures) -> str:
    found = accuracy.collect_radius_curves(data)
    if not found:
        return missing(
            "Every attack was made at one radius; `torchdistill-adv evaluate --eps 2/255,4/255,8/255` measures more."
        )
    drawn = [
        figures.add(
            f"radius-{curve.attack}-{curve.norm}",
            partial(accuracy.draw_radius_curves, curve),
            f"Accuracy of {', '.join(curve.methods)} under {curve.attack} against the {curve.norm} radius.",
            f"{curve.attack} against its radius.",
        )
        for curve in found
    ]
    intro = (
        "At radius 0 stands the clean accuracy. Bands are Wilson 95 % intervals; where a method has several seeds, the "
        "line goes through their mean and dots are runs. Accuracy should fall to 0 as the radius grows: where it does "
        "not, doubt the attack."
    )
    return paragraph(intro) + grid(drawn)


def curves_section(methods: Sequence[Method], figures: Figures) -> Section:
    """Losses, validation accuracy and learning rate over the epochs."""
    name = ("training", "Training")
    if not any(run.epochs for method in methods for run in method.runs):
        return Section(*name, missing("No run has trained; `torchdistill-adv train --config X` records every epoch."))
    overview, notes = [], []
    robust = sorted(
        {
            f"{found['attack']}, {found.get('threat') or 'eps {:.4g}'.format(found['eps'])}"
            for method in methods
            for run in method.runs
            for epoch in run.epochs
            if (found := epoch.get("robust_validation"))
        }
    )
    for stem, data, caption, lacking in (
        (
            "validation",
            curves.collect_validation(methods, "validation", "top1", "clean validation accuracy"),
            "Accuracy on clean validation images after every epoch. The best epoch is the checkpoint that is kept.",
            "No run was validated; write a `val_data_loader` in its configuration and run `torchdistill-adv train`.",
        ),
        (
            "robust-validation",
            curves.collect_validation(methods, "robust_validation", "robust", "robust validation accuracy"),
            f"Accuracy on validation images under attack ({'; '.join(robust)}). The best epoch is kept beside the "
            "checkpoint. A fall while the clean accuracy still rises is robust overfitting.",
            "Robust accuracy was not measured during training; write a `robust_validation` block in the configuration "
            "and run `torchdistill-adv train`.",
        ),
        (
            "learning-rate",
            curves.collect_learning_rates(methods),
            "Learning rate of the first group of parameters in each epoch.",
            "No learning rate was recorded; `torchdistill-adv train` does.",
        ),
    ):
        if data is None:
            notes.append(missing(lacking))
        else:
            alt = f"{data.title} over the epochs, one line a run of {', '.join(data.lines)}."
            overview.append(figures.add(stem, partial(curves.draw_curves, data), alt, caption))
    losses = []
    for method in methods:
        data = curves.collect_losses(method)
        if data is not None:
            several = f" A line for each of {len(method.runs)} runs." if len(method.runs) > 1 else ""
            stages = " Dotted lines divide the stages of the training." if data.stages else ""
            losses.append(
                figures.add(
                    f"loss-{method.name}",
                    partial(curves.draw_curves, data),
                    f"Loss of {method.name} over the epochs: {', '.join(data.lines)}.",
                    f"Training loss of {method.name}. Terms: {', '.join(data.lines)}.{several}{stages}",
                )
            )
    intro = (
        "Mean of every term over each epoch, times its weight in the loss. Terms of one method show which of them "
        "trains; losses of different methods do not compare."
    )
    parts = [grid(overview), *notes, heading("Loss terms"), paragraph(intro), grid(losses)]
    return Section(*name, "".join(parts) + _searches(methods, figures))


SEARCH_CAPTIONS = {
    "objective": "What the searches of {name} maximise (minimise, toward a target class), on the clean images and on "
    "the examples.",
    "changed": "Share of the examples that change the prediction of each network that the search of {name} attacks.",
    "distance": "Norm of the perturbation in the training of {name}, in the units of the threat model: mean over the "
    "examples, the largest of a batch, and the bound.",
}


def _searches(methods: Sequence[Method], figures: Figures) -> str:
    """What the searches did in training, and the time they took; nothing for runs that did not record it."""
    drawn = []
    for method in methods:
        found = {
            figure: (data, SEARCH_CAPTIONS[figure].format(name=method.name))
            for figure, data in curves.collect_searches(method).items()
        }
        times = curves.collect_times(method)
        if times is not None:
            caption = f"Time of {method.name}: searches, the rest of the training, and waiting for batches."
            found["time"] = (times, caption)
        for figure, (data, caption) in found.items():
            alt = f"{data.quantity} of {method.name} over the epochs: {', '.join(data.lines)}."
            drawn.append(figures.add(f"{figure}-{method.name}", partial(curves.draw_curves, data), alt, caption))
    if not drawn:
        return ""
    intro = (
        "Mean over the steps of each epoch in which the searches were watched, one in `log_freq`. A search whose "
        "objective rises little, or whose examples change no prediction, is too weak, or the network robust."
    )
    return heading("Search and time") + paragraph(intro) + grid(drawn)


def ablation_section(methods: Sequence[Method], figures: Figures) -> Section:
    """Accuracy against the number of particles."""
    found = accuracy.collect_ablations(methods)
    title = ("ablation", "Number of particles")
    if not found:
        sentence = (
            "No two configurations differ in `num_particles` alone; train the same one with several values by "
            "`torchdistill-adv train`, and give their runs to `torchdistill-adv report`."
        )
        return Section(*title, missing(sentence))
    intro = (
        "Accuracy of runs whose configurations differ in the number of particles K alone; K = 0 has no term with "
        "particles. Bars are Wilson 95 % intervals of single runs, which the test accuracy after training lacks; the "
        "line joins the means. Mind the axes, which do not begin at 0. After Fig. 7 of TALD."
    )
    drawn = []
    for i, data in enumerate(found):
        means = {count: statistics.mean(point.accuracy for point in points) for count, points in data.points.items()}
        words = "; ".join(f"K = {count}: {mean:.1f} %" for count, mean in means.items())
        drawn.append(
            figures.add(
                f"ablation-{i + 1}",
                partial(accuracy.draw_ablation, data),
                f"Accuracy of {data.method}, {data.quantity}, against the number of particles. {words}.",
                f"{data.method}: {data.quantity}.",
            )
        )
    return Section(*title, paragraph(intro) + grid(drawn))


def similarity_section(methods: Sequence[Method], figures: Figures) -> Section:
    """What ``similarity.json`` has."""
    title = ("similarity", "Teacher and student compared")
    runs = [run for method in methods for run in method.runs]
    measured = [run for run in runs if run.similarity]
    if not measured:
        return Section(*title, missing(f"No run has a `similarity.json`; {METRICS}."))
    lacking = [run for run in runs if not run.similarity]
    note = missing(f"Without a `similarity.json`, and so left out: {listed(lacking)}. {METRICS}.") if lacking else ""
    parts = (
        _what_was_compared(measured),
        _boundaries(measured),
        _agreement(measured),
        _correlations(methods, figures),
        _diversity(measured, figures),
    )
    return Section(*title, note + "".join(parts))


def _what_was_compared(runs: Sequence[Run]) -> str:
    words: dict[str, list[str]] = {}
    for run in runs:
        data = (run.similarity or {})["data"]
        drawn = f", seed {data['subset_seed']}" if data["num_images"] < data["of"] else ""
        images = f"{data['num_images']} of the {data['of']} images of {data['dataset'] or 'the data set'}{drawn}"
        words.setdefault(images, []).append(run.name)
    if len(words) == 1:
        return paragraph(f"Measured on {next(iter(words))}.")
    return paragraph("The runs were not measured on the same images, so compare with care:") + items(
        [f"{images}: {', '.join(names)}" for images, names in words.items()]
    )


def _found(runs: Sequence[Run], section: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for run in runs:
        if run.similarity:
            yield run.name, run.similarity[section]


def _definitions(runs: Sequence[Run], section: str) -> str:
    return "".join(
        paragraph(words) for words in dict.fromkeys(found["definition"] for _, found in _found(runs, section))
    )


def _boundaries(runs: Sequence[Run]) -> str:
    header = ["run", "both right, images", "left the label: teacher, %", "student, %", "both, %", "MagSim", "AngSim"]
    rows: list[list[Cell]] = [
        [
            (name, found.get("note") or ""),
            str(found["num_right"]),
            *(shown(found["flipped"].get(who)) for who in ("teacher", "student", "both")),
            shown(found["magsim"], ".3f"),
            shown(found["angsim"], ".3f"),
        ]
        for name, found in _found(runs, "similarity")
    ]
    caption = (
        "Similarity of the decision boundaries; 1 is equal. Images that left the label in both networks are compared."
    )
    return (
        heading("Decision boundaries: MagSim and AngSim")
        + table(caption, header, rows)
        + _definitions(runs, "similarity")
    )


def _agreement(runs: Sequence[Run]) -> str:
    rows: list[list[Cell]] = []
    parts: list[int] = []
    for name, found in _found(runs, "agreement"):
        settings = found["settings"]
        attack = f"{settings['name']}, eps {describe_eps(settings['eps'], settings['norm'])}"
        for inputs, words in similarity.INPUTS.items():
            measured = found[inputs]
            if inputs != "clean":
                parts.append(len(rows))
            rows.append(
                [
                    name if inputs == "clean" else "",
                    words if inputs == "clean" else f"{words} ({attack})",
                    shown(measured["same"]),
                    shown(measured["kl"], ".4g"),
                    shown(measured["spearman"]["hard"], ".3f"),
                ]
            )
    header = ["run", "images", "same class, %", "KL(T ‖ S), nats", "Spearman, hard"]
    caption = "How far teacher and student agree."
    return heading("Agreement") + table(caption, header, rows, parts) + _definitions(runs, "agreement")


def _correlations(methods: Sequence[Method], figures: Figures) -> str:
    drawn = [
        figures.add(
            f"spearman-{i + 1}",
            partial(similarity.draw_correlation, data),
            f"Spearman correlation of teacher and student against sharpness, {data.inputs}: {', '.join(data.methods)}.",
            f"Rank correlation of the logits of teacher and student, {data.inputs}.",
        )
        for i, data in enumerate(similarity.collect_correlations(methods))
    ]
    intro = (
        "Solid lines: soft ranks of growing sharpness; dotted levels: hard ranks. 1 is the same order of all classes "
        "in both networks. The first run of each method. After Fig. 3 of SmaraAD."
    )
    return heading("Rank correlation") + paragraph(intro) + grid(drawn)


def _diversity(runs: Sequence[Run], figures: Figures) -> str:
    distinct: dict[str, tuple[list[str], Mapping[str, Any]]] = {}
    for name, found in _found(runs, "diversity"):
        # runs with one teacher have the same numbers
        distinct.setdefault(json.dumps(found, sort_keys=True), ([], found))[0].append(name)
    drawn = [
        figures.add(
            f"diversity-{i + 1}",
            partial(similarity.draw_diversity, data),
            f"SSE between particles on the teacher of {', '.join(names)} against their number, by search.",
            f"Teacher of {', '.join(names)}; {found['num_images']} images; {_settings(found['settings'])}. Bars are "
            "one standard deviation over the images. Higher is more diverse. After Fig. 1 of TALD.",
        )
        for i, (names, found) in enumerate(distinct.values())
        if (data := similarity.collect_diversity(found)) is not None
    ]
    body = grid(drawn) or missing(
        "One particle has no pairs; `torchdistill-adv metrics --particles 2,4,8` measures more."
    )
    rows: list[list[Cell]] = [
        [
            ", ".join(names) if place == 0 else "",
            search_name(row),
            str(row["num_particles"]),
            shown(row["sse"], ".4g"),
            shown(row["sse_std"], ".2g"),
            shown(row["fooled"]),
        ]
        for names, found in distinct.values()
        for place, row in enumerate(found["results"])
    ]
    parts = [place for place, row in enumerate(rows) if not row[0]]
    header = ["teacher of", "search", "K", "SSE", "deviation", "fool the teacher, %"]
    numbers = table("The same in numbers, and how many particles fool the teacher.", header, rows, parts)
    return heading("Diversity of particles") + body + numbers + _definitions(runs, "diversity")


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())

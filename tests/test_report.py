"""The report: what it reads, what it draws, and the page in a real browser."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import shutil
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
import torch
from browser import chromium, open_page, requests, screenshot
from hypothesis import given, settings
from hypothesis import strategies as st

from torchdistill_adv.errors import ConfigError
from torchdistill_adv.evaluation.pixels import pixel_threat
from torchdistill_adv.evaluation.statistics import wilson_interval
from torchdistill_adv.report import accuracy, curves, networks, page, similarity, toy, write_report
from torchdistill_adv.report.records import group, read_runs
from torchdistill_adv.report.style import CYCLES, PALETTES, THEMES, label, render
from torchdistill_adv.runner import run

ROOT = Path(__file__).resolve().parent.parent

CONFIG = """
dependencies: [{name: 'no_such_module'}]
datasets:
  &train_set train: !import_call {key: 'no.such.thing', init: {kwargs: {split: 'train'}}}
models:
  teacher_model: {key: 'small_cnn', kwargs: {width: 8}, src_ckpt: './teacher.pt'}
  student_model: {key: 'small_cnn', kwargs: {width: 4}, dst_ckpt: './student.pt'}
train:
  num_epochs: 3
  train_data_loader: {dataset_id: *train_set, sampler: !import_get {key: 'torch.utils.data.RandomSampler'}}
  criterion:
    key: 'WeightedSumLoss'
    kwargs:
      sub_terms:
        kd: {criterion: {key: 'KDLoss', kwargs: {temperature: 4.0}}, weight: 1.0}
"""
TALD = """
        tald:
          criterion: {key: 'TALDLoss', kwargs: {adversary: {key: 'SVGD', kwargs: {num_particles: K, bandwidth: H}}}}
          weight: 0.01
  pre_epoch_process: 'bind_adversarial_losses'
"""


def config(method="kd", num_particles=None, bandwidth="median"):
    """The YAML of a method, with TALD if it has particles; what its tags name does not exist."""
    tald = "" if num_particles is None else TALD.replace(": K", f": {num_particles}").replace(": H", f": {bandwidth}")
    return CONFIG.replace("small_cnn", method) + tald.lstrip("\n")


def epoch(number, stage=1, **more):
    """A line of ``metrics.jsonl``."""
    terms = {"kd": 2.0 / (number + 1), "tald": 0.01 / (number + 1)}
    return {
        **{"epoch": number, "stage": stage, "loss": sum(terms.values()), "terms": terms, "seconds": 1.0},
        **{"images_per_second": 900.0, "lr": 0.1 / (number + 1), "validation": {"top1": 50.0 + 10 * number}},
        "robust_validation": None,
        **more,
    }


def result(attack, eps, correct, num_images=200, **settings):
    return {
        **{"attack": attack, "settings": settings, "eps": eps, "correct": correct, "num_images": num_images},
        **{"accuracy": 100 * correct / num_images, "interval": wilson_interval(correct, num_images), "seconds": 2.0},
        **{"gradient_evaluations": 20 * num_images, "forward_evaluations": 21 * num_images},
        "outcomes": "1" * correct + "0" * (num_images - correct),
    }


def evaluation(clean=180, by_eps=None, seed=0, flags=(), norm="linf", num_steps=20):
    """``evaluation.json``: counts of right images under FGSM and PGD, out of 200, by radius."""
    by_eps = {8 / 255: (120, 100)} if by_eps is None else by_eps
    results, worst = [result("clean", 0, clean)], []
    for eps, (fgsm, pgd) in by_eps.items():
        results += [result("fgsm", eps, fgsm), result("pgd20", eps, pgd, num_steps=num_steps)]
        worst.append({name: results[-1][name] for name in ("eps", "correct", "accuracy", "interval")})
    return {
        "model": {"who": "student", "config": None, "checkpoint": None, "sha256": "0", "parameters": 9},
        "data": {"dataset": "test", "num_images": 200, "of": 359, "subset_seed": seed, "indices": [seed, seed + 1]},
        **{"seed": seed, "device": "cpu", "versions": {"torchdistill_adv": "0.0.7"}, "norm": norm},
        **{"results": results, "worst_case": worst, "flags": [{"name": "masking", "message": m} for m in flags]},
    }


def metrics():
    """``similarity.json``."""
    soft = {"0.5": 0.98, "1": 0.9, "10": 0.7}
    agreement = {who: {"same": 90.0, "kl": 0.1, "spearman": {"hard": 0.65, "soft": soft}} for who in similarity.INPUTS}
    diversity = [("SVGD", "median", 2, 0.5), ("SVGD", "median", 4, 0.7), ("PGD", None, 2, 0.2), ("PGD", None, 1, None)]
    return {
        "data": {"dataset": "test", "num_images": 100, "of": 359, "subset_seed": 0},
        "versions": {"torchdistill_adv": "0.0.7"},
        "similarity": {
            **{"definition": "MagSim is ...", "num_right": 80, "num_compared": 70, "magsim": 0.6, "angsim": 0.5},
            **{"flipped": {"teacher": 95.0, "student": 97.0, "both": 87.5}, "note": None, "settings": {}},
        },
        "diversity": {
            **{"definition": "SSE is ...", "settings": {"threat": "l2 eps=0.3"}, "num_images": 90},
            "results": [
                {"search": s, "bandwidth": b, "num_particles": k, "sse": sse, "sse_std": sse and 0.1, "fooled": 50.0}
                for s, b, k, sse in diversity
            ],
        },
        "agreement": {
            "definition": "KL is ...",
            "settings": {"name": "pgd10", "eps": 0.1, "norm": "linf"},
            **agreement,
        },
    }


def make_run(directory, *, text=None, epochs=None, test=95.0, seed=0, overrides=None, evaluated=None, compared=None):
    """A run directory as training, ``evaluate`` and ``metrics`` leave it."""
    directory.mkdir(parents=True)
    records = [epoch(i) for i in range(3)] if epochs is None else list(epochs)
    records += [] if test is None else [{"test": {"student": {"top1": test}}, "seconds": 9.0}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (directory / "config.yaml").write_text(config() if text is None else text)
    facts = {
        "command": "train",
        "seed": seed,
        "device": "cpu",
        "overrides": overrides or {},
        "versions": {"torch": "2"},
    }
    (directory / "run.json").write_text(json.dumps(facts))
    for name, content in (("evaluation.json", evaluated), ("similarity.json", compared)):
        if content is not None:
            (directory / name).write_text(json.dumps(content))
    return directory


class Html(HTMLParser):
    """Text and elements of a page, which must be well-formed."""

    VOID = ("meta", "link", "img", "source", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


class TestRecords:
    def test_a_run_is_what_its_files_say(self, tmp_path):
        (found,) = read_runs([make_run(tmp_path / "adaad", seed=3, overrides={"train.num_epochs": 5}, test=91.5)])
        assert found.name == "adaad" and found.facts["seed"] == 3
        assert found.config["train"]["num_epochs"] == 5
        assert [e["epoch"] for e in found.epochs] == [0, 1, 2]
        assert found.test == {"student": {"top1": 91.5}}
        assert found.checkpoint == tmp_path / "adaad.pt"
        assert found.evaluation is None and found.similarity is None

    def test_killed_run_may_end_within_a_line(self, tmp_path):
        directory = make_run(tmp_path / "run", test=None)
        with (directory / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(epoch(3))[:40])
        (found,) = read_runs([directory])
        assert len(found.epochs) == 3 and found.test is None

    def test_broken_line_elsewhere_is_refused(self, tmp_path):
        directory = make_run(tmp_path / "run")
        text = (directory / "metrics.jsonl").read_text()
        (directory / "metrics.jsonl").write_text(text.replace('"epoch": 2,', '"epoch": ,'))
        with pytest.raises(ConfigError, match="line 3") as error:
            read_runs([directory])
        assert error.value.path == str(directory / "metrics.jsonl")

    def test_epochs_that_were_trained_again_count_once(self, tmp_path):
        repeated = [epoch(0), epoch(1, lr=9.0), epoch(1, lr=5.0), epoch(2)]
        (found,) = read_runs([make_run(tmp_path / "run", epochs=repeated)])
        assert [(e["epoch"], e["lr"]) for e in found.epochs] == [(0, 0.1), (1, 5.0), (2, pytest.approx(0.1 / 3))]

    def test_bad_directories_are_refused_with_what_is_there(self, tmp_path):
        run_directory = make_run(tmp_path / "runs" / "adaad")
        checkpoint = run_directory.with_suffix(".pt")
        checkpoint.write_bytes(b"")
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "notes.txt").write_text("")
        for bad, found in (
            (tmp_path / "nowhere", "nothing there"),
            (checkpoint, f"a file there; write the run's directory '{run_directory}'"),
            (tmp_path / "runs", "runs are in it: adaad"),
            (tmp_path / "other", "in it: notes.txt"),
        ):
            with pytest.raises(ConfigError, match=re.escape(found)) as error:
                read_runs([bad])
            assert error.value.path == str(bad)
        with pytest.raises(ConfigError, match="at least one run"):
            read_runs([])

    @pytest.mark.parametrize("name", ["evaluation.json", "similarity.json"])
    def test_file_of_another_version_is_refused(self, name, tmp_path):
        content = evaluation() if name == "evaluation.json" else metrics()
        files = {"evaluated" if name == "evaluation.json" else "compared": content}
        if name == "evaluation.json":
            content["results"][1]["acc"] = content["results"][1].pop("accuracy")
        else:
            del content["similarity"]["magsim"]
        directory = make_run(tmp_path / "run", **files)
        with pytest.raises(
            ConfigError, match=r"has no entry '(results.accuracy|similarity.magsim)'.* 0\.0\.7 "
        ) as error:
            read_runs([directory])
        assert error.value.path == str(directory / name)
        (directory / name).write_text("[1, 2")
        with pytest.raises(ConfigError, match="is no JSON"):
            read_runs([directory])

    def test_epoch_without_its_entries_is_refused(self, tmp_path):
        directory = make_run(tmp_path / "run", epochs=[{"epoch": 0, "loss": 1.0, "stage": 1}])
        with pytest.raises(ConfigError, match="has no entry 'terms'") as error:
            read_runs([directory])
        assert error.value.path == str(directory / "metrics.jsonl")

    def test_a_run_that_has_just_begun(self, tmp_path):
        directory = make_run(tmp_path / "run")
        (directory / "metrics.jsonl").unlink()
        (found,) = read_runs([directory])
        assert found.was_trained and found.epochs == [] and found.test is None

    def test_weights_that_were_evaluated_alone_stand_for_themselves(self, tmp_path):
        trained = make_run(tmp_path / "kd", text=config("s", 4), evaluated=evaluation())
        other = make_run(tmp_path / "k2", text=config("s", 2), evaluated=evaluation())
        (tmp_path / "kd-best_robust").mkdir()
        content = evaluation()
        content["model"] |= {
            "config": str(trained / "config.yaml"),
            "checkpoint": str(tmp_path / "x/kd-best_robust.pt"),
        }
        (tmp_path / "kd-best_robust" / "evaluation.json").write_text(json.dumps(content))
        runs = read_runs([trained, other, tmp_path / "kd-best_robust"])
        assert runs[2].config == runs[0].config and runs[2].checkpoint == tmp_path / "x/kd-best_robust.pt"
        assert [run.was_trained for run in runs] == [True, True, False]
        methods = group(runs)
        assert [method.name for method in methods] == ["kd", "k2", "kd-best_robust"]
        # it has no place among the runs that were trained with K particles
        points = accuracy.collect_ablations(methods)[0].points
        assert [point.run for k in points for point in points[k]] == ["k2", "kd"]
        path = write_report([tmp_path / "kd-best_robust"], tmp_path / "out.html", pictures=False)
        bodies = by_section(path.read_text())
        assert "kd-best_robust.pt" in bodies["runs"] and "not ended" not in bodies["runs"]
        assert "<img" in bodies["accuracy"]

    def test_an_evaluated_teacher_has_no_student_to_draw(self, tmp_path):
        (tmp_path / "kd" / "teacher").mkdir(parents=True)
        content = evaluation()
        (tmp_path / "config.yaml").write_text(config())
        content["model"] |= {"who": "teacher", "config": str(tmp_path / "config.yaml")}
        (tmp_path / "kd" / "teacher" / "evaluation.json").write_text(json.dumps(content))
        (found,) = read_runs([tmp_path / "kd" / "teacher"])
        assert found.config is None and found.evaluation == json.loads(json.dumps(content))

    def test_names_have_what_tells_the_runs_apart(self, tmp_path):
        directories = [make_run(tmp_path / method / f"seed{seed}") for method in ("a", "b") for seed in (0, 1)]
        found = read_runs([*directories, directories[0], f"{directories[1]}/"])
        assert [each.name for each in found] == ["a/seed0", "a/seed1", "b/seed0", "b/seed1"]

    def test_seeds_of_one_configuration_are_one_method(self, tmp_path):
        text = config("adaad")
        runs = read_runs(
            [
                make_run(tmp_path / "adaad-0", text=text),
                make_run(tmp_path / "kd", text=text, overrides={"train.num_epochs": 9}),
                make_run(
                    tmp_path / "adaad-1",
                    text=f"# other comments\n{text}",
                    seed=1,
                    overrides={
                        "models.student_model.dst_ckpt": "elsewhere.pt",
                    },
                ),
            ]
        )
        methods = group(runs)
        assert [(m.name, [r.name for r in m.runs]) for m in methods] == [
            ("adaad", ["adaad-0", "adaad-1"]),
            ("kd", ["kd"]),
        ]

    def test_a_checkpoint_that_the_yaml_joins_is_found(self, tmp_path):
        joined = config().replace("dst_ckpt: './student.pt'", "dst_ckpt: !join ['./ckpt/', 'student', '.pth']")
        (run,) = read_runs([make_run(tmp_path / "kd", text=joined)])
        assert run.checkpoint == tmp_path / "kd.pth"

    def test_methods_have_names_apart(self, tmp_path):
        directories = [
            make_run(tmp_path / "kd-0"),
            make_run(tmp_path / "kd-1"),
            make_run(tmp_path / "kd-2", overrides={"train.num_epochs": 9}),
            make_run(tmp_path / "kd-3", overrides={"train.num_epochs": 9}),
        ]
        names = [method.name for method in group(read_runs(directories))]
        assert len(names) == 2 == len(set(names))


class TestAccuracies:
    def collect(self, tmp_path, **runs):
        directories = [make_run(tmp_path / name, text=config(name), evaluated=each) for name, each in runs.items()]
        methods = group(read_runs(directories))
        return methods, accuracy.collect_accuracies(methods)

    def test_points_are_what_was_measured(self, tmp_path):
        _, data = self.collect(tmp_path, a=evaluation(by_eps={0.1: (90, 70), 0.05: (120, 100)}))
        assert [(a.name, a.eps) for a in data.attacks] == [
            ("clean", 0),
            *[(name, eps) for eps in (0.05, 0.1) for name in ("fgsm", "pgd20", "worst case")],
        ]
        (point,) = data.points["a", accuracy.Attack("pgd20", 0.1, "linf")]
        assert (point.accuracy, point.low, point.high) == (35.0, *wilson_interval(70, 200))

    def test_worst_case_of_a_single_attack_is_not_said_twice(self, tmp_path):
        content = evaluation()
        content["results"].pop(1)
        _, data = self.collect(tmp_path, a=content)
        assert [a.name for a in data.attacks] == ["clean", "pgd20"]

    def test_seeds_are_averaged_and_methods_keep_their_place(self, tmp_path):
        directories = [
            make_run(tmp_path / "first"),
            make_run(tmp_path / "adaad-0", text=config("x", 4), evaluated=evaluation(clean=180)),
            make_run(tmp_path / "adaad-1", text=config("x", 4), evaluated=evaluation(clean=190)),
        ]
        data = accuracy.collect_accuracies(group(read_runs(directories)))
        assert data.methods == ["adaad"] and data.places == [1]
        assert data.mean("adaad", data.attacks[0]) == 92.5
        assert data.mean("adaad", accuracy.Attack("cw30", 0.1, "linf")) is None

    def test_drawing_shows_means_and_intervals_at_their_values(self, tmp_path):
        _, data = self.collect(tmp_path, a=evaluation(), b=evaluation(clean=20))
        (axes,) = accuracy.draw_accuracies(data).axes
        marks = [line.get_xdata()[0] for line in axes.lines if line.get_marker() not in ("None", None)]
        bars = [tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2]
        expected = [point for attack in data.attacks for m in "ab" for point in data.points[m, attack]]
        assert marks == [point.accuracy for point in expected]
        assert bars == [(point.low, point.high) for point in expected]
        rows = dict(zip(axes.get_yticks(), (t.get_text() for t in axes.get_yticklabels()), strict=True))
        marked = [rows[line.get_ydata()[0]] for line in axes.lines if line.get_marker() not in ("None", None)]
        assert marked == ["a", "b"] * len(data.attacks)

    def test_figures_by_radius_have_every_attack_once(self, tmp_path):
        _, data = self.collect(tmp_path, a=evaluation(by_eps={0.1: (90, 70), 0.05: (120, 100)}))
        parts = accuracy.by_radius(data)
        assert [a for part in parts for a in part.attacks] == list(data.attacks)
        assert [{a.eps for a in part.attacks} for part in parts] == [{0, 0.05}, {0.1}]
        _, only_clean = self.collect(tmp_path / "clean", a=evaluation(by_eps={}))
        assert [[a.name for a in part.attacks] for part in accuracy.by_radius(only_clean)] == [["clean"]]

    def test_unlike_evaluations_are_named(self, tmp_path):
        methods, _ = self.collect(tmp_path, a=evaluation(), b=evaluation(seed=1), c=evaluation(num_steps=10))
        found = accuracy.differences([each for method in methods for each in method.runs])
        assert found == ["images: a, c / b", "settings of pgd20: a, b / c"]
        assert accuracy.differences(methods[0].runs) == []

    def test_worst_cases_over_other_attacks_are_named(self, tmp_path):
        fewer, turned = evaluation(), evaluation()
        fewer["results"] = [r for r in fewer["results"] if r["attack"] != "fgsm"]
        turned["results"] = turned["results"][:1] + turned["results"][:0:-1]
        methods, _ = self.collect(tmp_path, a=evaluation(), b=fewer, c=turned)
        eps = turned["results"][-1]["eps"]
        found = accuracy.differences([each for method in methods for each in method.runs])
        assert found == [f"attacks of the worst case at {eps:.4g}: a, c / b"]

    def test_radius_curves_begin_with_clean_images(self, tmp_path):
        _, data = self.collect(tmp_path, a=evaluation(by_eps={0.1: (90, 70), 0.05: (120, 100)}), b=evaluation())
        curves_found = accuracy.collect_radius_curves(data)
        assert [curve.attack for curve in curves_found] == ["fgsm", "pgd20", "worst case"]
        pgd = curves_found[1]
        assert {eps: p[0].accuracy for eps, p in pgd.points["a"].items()} == {0: 90.0, 0.05: 50.0, 0.1: 35.0}
        (axes,) = accuracy.draw_radius_curves(pgd).axes
        line = axes.lines[0]
        assert list(line.get_xdata()) == [0, 0.05, 0.1] and list(line.get_ydata()) == [90.0, 50.0, 35.0]
        assert "pixels of [0, 1]" in axes.get_xlabel()

    def test_radii_in_255ths_are_drawn_as_such(self, tmp_path):
        by_eps = {2 / 255: (120, 100), 8 / 255: (90, 70)}
        for norm, radii in (("linf", [0, 2, 8]), ("l2", [0, 2 / 255, 8 / 255])):
            _, data = self.collect(tmp_path / norm, a=evaluation(by_eps=by_eps, norm=norm))
            (axes,) = accuracy.draw_radius_curves(accuracy.collect_radius_curves(data)[0]).axes
            assert list(axes.lines[0].get_xdata()) == pytest.approx(radii)
            assert ("1/255" in axes.get_xlabel()) == (norm == "linf")

    def test_one_radius_gives_no_curve(self, tmp_path):
        _, data = self.collect(tmp_path, a=evaluation())
        assert accuracy.collect_radius_curves(data) == []


class TestAblations:
    def collect(self, tmp_path, runs):
        directories = [
            make_run(tmp_path / name, text=text, test=test, evaluated=each) for name, text, test, each in runs
        ]
        return accuracy.collect_ablations(group(read_runs(directories)))

    def test_runs_that_differ_in_particles_alone(self, tmp_path):
        (found,) = self.collect(
            tmp_path,
            [
                ("k4", config("s", 4), 94.0, None),
                ("k1-0", config("s", 1), 91.0, None),
                ("k1-1", config("s", 1), 93.0, None),
                ("kd", config("s"), 90.0, None),
                ("other bandwidth", config("s", 4, bandwidth="1.0"), 10.0, None),
            ],
        )
        assert {k: [p.accuracy for p in points] for k, points in found.points.items()} == {
            0: [90.0],
            1: [91.0, 93.0],
            4: [94.0],
        }
        (axes,) = accuracy.draw_ablation(found).axes
        assert list(axes.lines[0].get_ydata()) == [90.0, 92.0, 94.0]
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "1", "4"]

    def test_a_plain_run_with_other_settings_is_not_its_base(self, tmp_path):
        other = config("s").replace("temperature: 4.0", "temperature: 2.0")
        runs = [("k4", config("s", 4), 94.0, None), ("kd", other, 90.0, None)]
        assert self.collect(tmp_path / "one", runs) == []
        (found,) = self.collect(tmp_path / "two", [*runs, ("k1", config("s", 1), 91.0, None)])
        assert list(found.points) == [1, 4]

    def test_attacks_where_they_were_measured(self, tmp_path):
        runs = [(f"k{k}", config("s", k), 94.0, evaluation(clean=180 + k)) for k in (1, 2)]
        found = self.collect(tmp_path, runs)
        assert [ablation.quantity for ablation in found] == [
            "clean",
            *(f"{a}, 8/255" for a in ("fgsm", "pgd20", "worst case")),
        ]
        assert [p[0].accuracy for p in found[0].points.values()] == [90.5, 91.0]


class TestCurves:
    def test_losses_have_every_term_of_every_run(self, tmp_path):
        directories = [make_run(tmp_path / f"kd-{seed}", text=config("s"), seed=seed) for seed in (0, 1)]
        (method,) = group(read_runs(directories))
        data = curves.collect_losses(method)
        assert list(data.lines) == ["kd", "tald", curves.TOTAL]
        assert data.lines["tald"] == [([0, 1, 2], [0.01, 0.005, 0.01 / 3])] * 2
        (axes,) = curves.draw_curves(data).axes
        assert axes.get_yscale() == "log"
        drawn = sorted(tuple(line.get_ydata()) for line in axes.lines)
        assert drawn == sorted(tuple(values) for runs in data.lines.values() for _, values in runs)

    def test_what_was_not_measured_is_left_out(self, tmp_path):
        robust = {"clean": 70.0, "robust": 30.0, "num_images": 10, "eps": 0.1, "attack": "PGD-10"}
        epochs = [epoch(0, validation=None), epoch(1, robust_validation=robust), epoch(2, validation=None)]
        methods = group(
            read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", text=config("b", 4), epochs=epochs)])
        )
        clean = curves.collect_validation(methods, "validation", "top1", "clean")
        assert clean.lines == {"a": [([0, 1, 2], [50.0, 60.0, 70.0])], "b": [([1], [60.0])]}
        found = curves.collect_validation(methods, "robust_validation", "robust", "robust")
        assert found.lines == {"b": [([1], [30.0])]} and found.places == {"b": 1}
        assert curves.collect_validation(methods[:1], "robust_validation", "robust", "robust") is None

    def test_stages_are_divided(self, tmp_path):
        epochs = [epoch(i, stage=1 + (i > 0) + (i > 2)) for i in range(5)]
        (method,) = group(read_runs([make_run(tmp_path / "run", epochs=epochs)]))
        assert curves.collect_losses(method).stages == [1, 3]

    def test_a_method_has_one_colour_in_all_figures(self, tmp_path):
        robust = {"clean": 70.0, "robust": 30.0, "num_images": 10, "eps": 0.1, "attack": "PGD-10"}
        directories = [
            make_run(tmp_path / "a"),
            make_run(
                tmp_path / "b", text=config("b", 4), epochs=[epoch(0, robust_validation=robust)], evaluated=evaluation()
            ),
        ]
        methods = group(read_runs(directories))
        accuracies = accuracy.draw_accuracies(accuracy.collect_accuracies(methods))
        validation = curves.draw_curves(curves.collect_validation(methods, "robust_validation", "robust", "robust"))
        rates = curves.draw_curves(curves.collect_learning_rates(methods))
        assert rates.axes[0].lines[0].get_color() != rates.axes[0].lines[1].get_color()
        colours = {f.axes[0].lines[i].get_color() for f, i in ((accuracies, 0), (validation, 0), (rates, 1))}
        assert len(colours) == 1


class TestSimilarity:
    def test_drawings_have_the_numbers(self, tmp_path):
        methods = group(
            read_runs([make_run(tmp_path / "a", compared=metrics()), make_run(tmp_path / "b", text=config("b", 2))])
        )
        data = similarity.collect_diversity(methods[0].runs[0].similarity["diversity"])
        assert data.searches == {"SVGD, bandwidth median": [(2, 0.5, 0.1), (4, 0.7, 0.1)], "PGD": [(2, 0.2, 0.1)]}
        (axes,) = similarity.draw_diversity(data).axes
        assert [list(line.get_ydata()) for line in axes.lines] == [[0.5, 0.7], [0.2]]
        correlations = similarity.collect_correlations(methods)
        assert [c.inputs for c in correlations] == list(similarity.INPUTS.values())
        (axes,) = similarity.draw_correlation(correlations[0]).axes
        assert list(axes.lines[0].get_xdata()) == [0.5, 1, 10] and list(axes.lines[0].get_ydata()) == [0.98, 0.9, 0.7]
        assert list(axes.lines[1].get_ydata()) == [0.65, 0.65]


def contrast(first, second):
    """Contrast of two colours by WCAG 2, https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio ."""

    def luminance(colour):
        values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


class TestStyle:
    @pytest.mark.parametrize("theme", THEMES)
    def test_everything_stands_out_from_the_page(self, theme):
        colours = PALETTES[theme]
        for text in ("ink", "quiet", "accent"):
            assert contrast(colours[text], colours["paper"]) >= 4.5
        for line in CYCLES[theme]:
            assert contrast(line, colours["paper"]) >= 2.9

    def test_settings_of_the_user_are_neither_used_nor_changed(self):
        from matplotlib.figure import Figure

        def draw():
            figure = Figure()
            figure.add_subplot().plot([1, 2], [3, 4])
            return figure

        expected = render(draw)
        assert expected["light"] != expected["dark"]
        with matplotlib.rc_context({"xtick.major.size": 9, "font.family": "serif", "axes.titlesize": 30}):
            before = dict(matplotlib.rcParams)
            assert render(draw) == expected
            assert dict(matplotlib.rcParams) == before

    @pytest.mark.parametrize("name", ["_hidden", "a$b$c", "$", "plain"])
    def test_names_are_shown_literally(self, name):
        from matplotlib.figure import Figure

        figure = Figure()
        axes = figure.add_subplot()
        axes.plot([0], [0], label=label(name))
        (text,) = axes.legend().get_texts()
        # mathtext is used where matplotlib finds an even number of dollars that are not escaped
        assert text.get_text().replace(r"\$", "$").strip() == name
        assert text._preprocess_math(text.get_text())[1] is False
        figure.savefig(Path("/dev/null"), format="png")


class TestPage:
    @settings(max_examples=50, deadline=None)
    @given(st.text(), st.text(), st.text())
    def test_text_is_shown_literally(self, first, second, third):
        parts = [
            page.paragraph(first),
            page.items([second]),
            page.table(first, [second], [[(third, first)]]),
            page.heading(third),
        ]
        found = Html("".join(parts))
        allowed = {
            "p",
            "ul",
            "li",
            "figure",
            "figcaption",
            "div",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "small",
            "h3",
            "code",
        }
        assert {tag for tag, _ in found.elements} <= allowed
        plain = Html(page.paragraph(first.replace("`", "")))
        # a parser reads every kind of line end as one
        assert plain.text.replace("\r\n", "\n").replace("\r", "\n") == first.replace("`", "").replace(
            "\r\n", "\n"
        ).replace("\r", "\n")
        assert not plain.all("code")

    def test_code(self):
        assert page.paragraph("run `a < b` now") == "<p>run <code>a &lt; b</code> now</p>"


HOSTILE = "<script>alert(1)<" + chr(0x2215) + "script>$x_&"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report with every section: of two seeds that were really trained, and of a killed run with a hostile name."""
    folder = tmp_path_factory.mktemp("report")
    torch.set_num_threads(1)
    digits = ROOT / "configs/digits"
    short = {"train.num_epochs": 1}
    run(digits / "ce_teacher.yaml", seed=0, overrides={**short, "models.model.dst_ckpt": f"{folder}/teacher.pt"})
    short |= {
        "models.teacher_model.src_ckpt": f"{folder}/teacher.pt",
        "train.criterion.kwargs.sub_terms.tald.criterion.kwargs.adversary.kwargs.num_particles": 2,
    }
    directories = []
    for seed in (0, 1):
        overrides = {**short, "models.student_model.dst_ckpt": f"{folder}/tald-{seed}.pt"}
        run(digits / "kd_tald.yaml", seed=seed, student_only=True, overrides=overrides)
        directories.append(folder / f"tald-{seed}")
        facts = {"seed": seed, "device": "cpu", "overrides": overrides, "versions": {"torch": torch.__version__}}
        (directories[-1] / "run.json").write_text(json.dumps(facts))
        content = evaluation(clean=150 + seed, by_eps={0.05: (100, 90), 0.1: (60, 50)}, flags=["doubt <this>"] * seed)
        (directories[-1] / "evaluation.json").write_text(json.dumps(content))
        (directories[-1] / "similarity.json").write_text(json.dumps(metrics()))
    robust = {"clean": 70.0, "robust": 30.0, "num_images": 10, "eps": 0.1, "attack": "PGD-10"}
    other = {**short, "train.criterion.kwargs.sub_terms.tald.criterion.kwargs.adversary.kwargs.num_particles": 3}
    epochs = [epoch(i, robust_validation=robust) for i in range(3)]
    text = (digits / "kd_tald.yaml").read_text()
    directories.append(make_run(folder / HOSTILE, text=text, epochs=epochs, overrides=other))
    with pytest.MonkeyPatch.context() as patch:
        # trained for less than a second, and so to no good
        patch.setattr(toy, "collect_toy", partial(toy.collect_toy, num_epochs=1, resolution=41))
        return write_report(directories, folder / "out" / "report.html", device="cpu")


SECTIONS = (
    "runs",
    "accuracy",
    "radius",
    "training",
    "ablation",
    "similarity",
    "particles",
    "maps",
    "landscape",
    "boundaries",
    "toy",
)


def by_section(text):
    """HTML of each section."""
    return dict(re.findall(r'<section id="([\w-]+)"(.*?)</section>', text, re.S))


class TestReport:
    def test_page_is_whole_and_loads_nothing(self, report):
        text = report.read_text(encoding="utf-8")
        found = Html(text)
        ids = [attrs["id"] for _, attrs in found.elements if "id" in attrs]
        assert len(ids) == len(set(ids))
        assert [a["href"] for a in found.all("a")] == [f"#{name}" for name in SECTIONS]
        assert set(SECTIONS) < set(ids)
        assert all(attrs["alt"] for attrs in found.all("img"))
        loaded = [v for _, attrs in found.elements for k, v in attrs.items() if k in ("src", "srcset", "href")]
        assert all(address.startswith(("data:", "#")) for address in loaded)
        assert not found.all("script") and "url(" not in text and "@import" not in text

    def test_every_section_has_its_figures(self, report):
        text = report.read_text(encoding="utf-8")
        counts = {name: body.count("<img") for name, body in by_section(text).items()}
        # two radii; FGSM, PGD and the worst case; three curves, two losses, what a search did and the time; the test
        # accuracy; three inputs and SSE
        assert counts.pop("boundaries") in (1, 2)
        assert counts == {
            **{"runs": 0, "accuracy": 2, "radius": 3, "training": 9, "ablation": 1, "similarity": 4},
            **{"particles": 1, "maps": 1, "landscape": 1, "toy": 1},
        }

    def test_figures_lie_beside_the_page_too(self, report):
        path = report
        files = sorted(file.read_bytes() for file in (path.parent / "report_files").glob("*.png"))
        text = path.read_text(encoding="utf-8")
        embedded = sorted(base64.b64decode(code) for code in re.findall(r"data:image/png;base64,([\w+/=]+)", text))
        assert embedded == files and len(files) == 2 * text.count("<img")

    def test_what_is_missing_is_said(self, report):
        path = report
        found = {name: Html(f"<section{body}</section>").text for name, body in by_section(path.read_text()).items()}
        assert f"left out: {HOSTILE}. torchdistill-adv evaluate" in found["accuracy"]
        assert f"left out: {HOSTILE}. torchdistill-adv metrics" in found["similarity"]
        for name in ("particles", "maps", "landscape", "boundaries"):
            assert f"No pictures of {HOSTILE}: " in found[name]

    def test_numbers_and_flags_are_there(self, report):
        found = {name: Html(f"<section{body}</section>").text for name, body in by_section(report.read_text()).items()}
        low, high = wilson_interval(150, 200)
        assert f"75.00{low:.1f}\u00a0to\u00a0{high:.1f}" in found["accuracy"]
        # seconds a run, gradients an image
        assert "num_steps 202.020.0" in found["accuracy"] and "Device: cpu." in found["accuracy"]
        # of 75 and 75.5
        assert "75.25± 0.35" in found["accuracy"] and "mean of 2 runs" in found["accuracy"]
        assert "Measured on 100 of the 359 images of test, seed 0." in found["similarity"]
        diversity = "tald-0, tald-1SVGD, bandwidth median20.50.150.0"
        assert diversity in found["similarity"].replace("\n", "") and "threat l2 eps=0.3" in found["similarity"]
        assert "tald-1: doubt <this>" in found["accuracy"]
        assert "MagSim is ..." in found["similarity"] and "0.600" in found["similarity"]
        assert "num_particles: 3" in found["runs"]

    def test_particles_of_one_teacher_are_drawn_once(self, report, tmp_path):
        (method,) = group(read_runs([report.parent.parent / "tald-0"]))
        one = networks.load(method, "cpu", pixel_threat("8/255"))
        drawn = networks._particles([one, dataclasses.replace(one, name="other")], page.Figures(tmp_path))
        assert drawn.count("<img") == 1 and "missing" not in drawn

    def test_pictures_are_of_the_weights_beside_the_directory_in_the_ball_evaluated(self, report, tmp_path):
        folder = report.parent.parent
        shutil.copytree(folder / "tald-0", tmp_path / "moved")
        shutil.copy(folder / "tald-1.pt", tmp_path / "moved.pt")
        (method,) = group(read_runs([tmp_path / "moved"]))
        one = networks.load(method, "cpu", pixel_threat("8/255"))
        weights, expected = one.experiment.networks["student"].state_dict(), torch.load(folder / "tald-1.pt")["model"]
        assert all(torch.equal(weights[name], value) for name, value in expected.items())
        assert one.threat == pixel_threat(0.05)

    def test_nothing_measured_is_said_in_every_section(self, tmp_path):
        path = write_report([make_run(tmp_path / "run", epochs=[], test=None)], tmp_path / "out.html", pictures=False)
        bodies = by_section(path.read_text())
        for name, command in (
            *(("accuracy", "evaluate"), ("radius", "evaluate"), ("training", "train"), ("ablation", "train")),
            *(("similarity", "metrics"), ("networks", "report")),
        ):
            assert "<img" not in bodies[name]
            assert re.search(rf'class="missing">(?:(?!</p>).)*<code>torchdistill-adv {command}\b', bodies[name]), name

    def test_unlike_evaluations_are_said(self, tmp_path):
        runs = [make_run(tmp_path / f"kd-{i}", evaluated=evaluation(seed=i)) for i in (0, 1)]
        path = write_report(runs, tmp_path / "out.html", pictures=False)
        assert "<li>images: kd-0 / kd-1</li>" in by_section(path.read_text())["accuracy"]

    def test_figures_of_like_names_have_files_of_their_own(self, tmp_path):
        runs = [make_run(tmp_path / name, text=config(name)) for name in ("a b", "a?b")]
        write_report(runs, tmp_path / "out.html", pictures=False)
        assert len(list((tmp_path / "out_files").glob("loss-*-light.png"))) == 2

    def test_unlike_images_of_metrics_are_said(self, tmp_path):
        runs = []
        for seed in (0, 1):
            content = metrics()
            content["data"]["subset_seed"] = seed
            runs.append(make_run(tmp_path / f"kd-{seed}", compared=content))
        body = by_section(write_report(runs, tmp_path / "out.html", pictures=False).read_text())["similarity"]
        assert "not measured on the same images" in body
        assert "<li>100 of the 359 images of test, seed 1: kd-1</li>" in body

    def test_the_attack_of_robust_validation_is_named_in_its_own_units(self, tmp_path):
        robust = {"clean": 70.0, "robust": 30.0, "num_images": 10, "eps": 0.1, "attack": "PGD-10"}
        epochs = [epoch(0, robust_validation={**robust, "threat": "l2 eps=0.1 in input space"})]
        path = write_report([make_run(tmp_path / "run", epochs=epochs)], tmp_path / "out.html", pictures=False)
        assert "under attack (PGD-10, l2 eps=0.1 in input space)" in path.read_text()

    def test_figures_of_an_earlier_report_are_removed(self, tmp_path):
        folder = tmp_path / "out_files"
        folder.mkdir()
        for name in ("accuracy-9-light.png", "accuracy-9-dark.png", "mine.png"):
            (folder / name).write_bytes(b"")
        write_report([make_run(tmp_path / "run")], tmp_path / "out.html", pictures=False)
        assert (folder / "mine.png").exists() and not list(folder.glob("accuracy-9-*"))

    def test_what_cannot_be_written_is_said_before_anything_is_drawn(self, tmp_path):
        directory = make_run(tmp_path / "run")
        (tmp_path / "file").write_text("")
        (tmp_path / "folder.html").mkdir()
        for out in (tmp_path / "file" / "out.html", tmp_path / "folder.html"):
            with pytest.raises(ConfigError) as error:
                write_report([directory], out, pictures=False)
            assert error.value.path == "--out" and str(out) in error.value.message

    def test_out_must_be_html(self, tmp_path):
        with pytest.raises(ConfigError, match=r"ends in \.html") as error:
            write_report([make_run(tmp_path / "run")], tmp_path / "report.pdf")
        assert error.value.path == "--out"
        assert not list(tmp_path.glob("report*"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


class TestBrowser:
    def test_page_is_right_in_light_and_dark_and_on_a_phone(self, report, browser, tmp_path):
        path = report
        shown, pictures = {}, []
        for width in (390, 1280):
            for scheme in ("light", "dark"):
                open_page(browser, path, width, scheme)
                script = "return [innerWidth, document.documentElement.scrollWidth]"
                assert browser.execute_script(script) == [width, width]
                pictures = browser.execute_script(
                    "return [...document.images].map(i => [i.currentSrc, i.naturalWidth, i.width])"
                )
                assert pictures and all(natural > 0 and 0 < drawn < width for _, natural, drawn in pictures)
                shown.setdefault(scheme, [source for source, _, _ in pictures])
                colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
                paper = PALETTES[scheme]["paper"]
                assert colour == f"rgb({', '.join(str(int(paper[i : i + 2], 16)) for i in (1, 3, 5))})"
                assert requests(browser) == [path.resolve().as_uri()]
                assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
                screenshot(browser, tmp_path / f"{width}-{scheme}.png")
        assert len(set(shown["light"])) == len(pictures)
        assert not set(shown["light"]) & set(shown["dark"])
        title = browser.execute_script("return document.querySelector('#runs tbody tr:last-child th').innerText")
        assert HOSTILE in title

    def test_wide_tables_scroll_in_their_own_container(self, report, browser):
        open_page(browser, report, 390, "light")
        script = "return [...document.querySelectorAll('.scroll')].map(d => [d.clientWidth, d.scrollWidth])"
        sizes = browser.execute_script(script)
        assert all(visible <= 390 for visible, _ in sizes) and any(whole > visible for visible, whole in sizes)

    def test_contents_lead_to_their_sections(self, report, browser):
        open_page(browser, report, 1280, "light")
        browser.execute_script("document.documentElement.style.scrollBehavior = 'auto'")
        for name in SECTIONS[1:-1]:
            browser.execute_script(f"document.querySelector('nav a[href=\"#{name}\"]').click()")
            top = browser.execute_script(f"return document.getElementById('{name}').getBoundingClientRect().top")
            assert abs(top) < 2, name

"""Watching a run: what the searches did, where the time went, and that looking changes nothing."""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from contract import ROWS, TwoTeachers, batch_for, pairs, row
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_report import epoch, make_run
from test_runner import PLAIN, ROBUST, metrics, weights, write
from tiny import (
    CE,
    KD,
    L2_THREAT,
    PIXEL_THREAT,
    bound,
    images,
    matching,
    network,
    on_adversarial,
    sharp,
    tald,
    tiny_box,
    with_side,
)
from torch import nn

from torchdistill_adv.adversaries import Examples
from torchdistill_adv.boxes import sides
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.losses import AdaADLoss
from torchdistill_adv.report import curves, sections
from torchdistill_adv.report.page import Figures
from torchdistill_adv.report.records import group, read_runs
from torchdistill_adv.runner import run
from torchdistill_adv.runner.progress import Meter, Monitor, duration, epoch_record
from torchdistill_adv.runner.tensorboard import scalar_writer
from torchdistill_adv.statistics import Watch, search_statistics
from torchdistill_adv.threat import ThreatModel

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# the statistics of a search


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_statistics_are_those_of_slow_loops(norm, chunk_size):
    x, y = images(5)
    threat = ThreatModel(eps=3, norm=norm, mean=(0.4, 0.5), std=(0.3, 0.25), bounds="none")
    nets = {"student": sharp(2).eval(), "teacher": sharp(1, width=8).eval()}
    generator = torch.Generator().manual_seed(1)
    examples = Examples(x.repeat(3, 1, 1, 1) + torch.randn(15, *x.shape[1:], generator=generator), torch.arange(15) % 5)

    graphs = []

    def objective(rows, index):
        graphs.append(torch.is_grad_enabled())
        return nn.functional.cross_entropy(nets["student"](rows), y[index], reduction="none")

    found = search_statistics(objective, nets, x, examples, threat, chunk_size)
    assert graphs == [False] * (8 if chunk_size else 2)

    def value(image, i):
        return objective(image[None], torch.tensor([i])).item()

    def says(who, image):
        return int(nets[who](image[None]).argmax())

    rows = [(examples.rows[k], int(examples.index[k])) for k in range(15)]
    # both channels in pixels of [0, 1]
    moves = [(row - x[i]) * torch.tensor([0.3, 0.25]).view(2, 1, 1) for row, i in rows]
    lengths = [float(m.abs().max() if norm == "linf" else m.square().sum().sqrt()) for m in moves]
    expected = {
        "objective_clean": sum(value(x[i], i) for i in range(5)) / 5,
        "objective_adversarial": sum(value(row, i) for row, i in rows) / 15,
        **{f"changed_{who}": sum(says(who, row) != says(who, x[i]) for row, i in rows) / 15 for who in nets},
        "distance_mean": sum(lengths) / 15,
        "distance_max": max(lengths),
        "eps": 3,
    }
    assert found == pytest.approx(expected, rel=1e-5)
    assert 0 < found["changed_student"] < 1 and found["changed_student"] != found["changed_teacher"]


def test_no_bound_and_no_finite_objective():
    x, _ = images(2)
    threat = ThreatModel(eps=math.inf, norm="l2", space="input", bounds="none")
    found = search_statistics(
        lambda rows, _: rows.sum((1, 2, 3)) * torch.nan, {}, x, Examples(x, torch.arange(2)), threat
    )
    assert "eps" not in found and found["distance_max"] == 0 and math.isnan(found["objective_adversarial"])


# looking changes nothing


def everything(box, losses):
    networks = [box.org_student_model, box.org_teacher_model]
    return {
        "losses": losses,
        "weights": [v.clone() for net in networks for v in net.state_dict().values()],
        "gradients": [p.grad for net in networks for p in net.parameters()],
        "modes": [m.training for net in networks for m in net.modules()],
        "hooks": [len(inner) for d in (box.student_io_dict, box.teacher_io_dict) for inner in d.values()],
        "forward hooks": [len(m._forward_hooks) for net in networks for m in net.modules()],
        "stream": torch.get_rng_state(),
    }


def equal(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def two_steps(name, block, is_watched, autocast=False):
    teacher = TwoTeachers(network(2) if name == "BSSLoss" else network(1, width=8), network(3, width=8))
    # one network within another, as the teachers are, so that one hook is for both sides
    student = TwoTeachers(network(2, dropout=0.3), nn.Identity())
    terms = {"ce": CE, "term": block}
    box = tiny_box(terms, student=student, teacher=teacher, num_epochs=4, hooks={"input": [], "output": ["robust.0"]})
    box.pre_epoch_process(epoch=0)
    x, y = batch_for(name, teacher, student)
    losses, seen = [], []
    for _ in range(2):
        if is_watched:
            box.adversarial_binding.watch = Watch(CPU)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = box.forward_process(x, y, pairs(y))
        losses.append(loss.detach())
        box.post_forward_process(loss=loss)
        seen.append(box.adversarial_binding.watch)
    return everything(box, losses), seen


def assert_looking_changes_nothing(name, block, **options):
    plain, _ = two_steps(name, block, False, **options)
    watched, seen = two_steps(name, block, True, **options)
    for what, values in plain.items():
        assert all(map(equal, values, watched[what])), what
    # BSS may have no samples in the second step
    assert seen[0].searches and seen[0].searches.keys() <= {"term", "term.2"}
    for found in [found for watch in seen for found in watch.searches.values()]:
        assert all(map(math.isfinite, found.values()))
        assert found["distance_mean"] <= found["distance_max"] <= found.get("eps", math.inf) * (1 + 1e-5)
    assert 0 < seen[0].seconds["statistics"] < seen[0].seconds["search"]


@pytest.mark.parametrize("name", ROWS)
def test_looking_changes_nothing(name):
    assert_looking_changes_nothing(name, ROWS[name])


@pytest.mark.parametrize("search_bn", ["batch", "train"])
def test_looking_changes_nothing_in_train_mode(search_bn):
    """The search itself moves the student's running statistics with ``train``."""
    block = row("TRADESLoss", search_bn=search_bn, student_bn="train", teacher_mode="keep")
    assert_looking_changes_nothing("TRADESLoss", block)


@pytest.mark.parametrize("name", ["AdaADLoss", "TRADESLoss", "TALDLoss"])
def test_looking_changes_nothing_under_autocast(name):
    assert_looking_changes_nothing(name, ROWS[name], autocast=True)


# which searches are seen, and their names


def seen_in(box, x, y, supp_dict=None):
    """What a watched step shows."""
    box.adversarial_binding.watch = watch = Watch(CPU)
    box.forward_process(x, y, supp_dict)
    return watch.searches


def test_a_search_is_seen_in_the_terms_own_mode_of_the_networks():
    box = bound({"a": row("AdaADLoss", student_bn="batch")})
    x, y = images()
    found = seen_in(box, x, y)["a"]
    assert set(found) == {
        *("objective_clean", "objective_adversarial", "changed_student", "changed_teacher"),
        *("distance_mean", "distance_max", "eps"),
    }
    student, teacher = (side.network.eval() for side in sides(box))
    with torch.no_grad():
        logits = [net(x).log_softmax(1) for net in (teacher, student)]
    divergence = (logits[0].exp() * (logits[0] - logits[1])).sum(1).mean()
    assert found["objective_clean"] == pytest.approx(float(divergence), rel=1e-5)
    assert found["objective_adversarial"] > found["objective_clean"]
    assert found["eps"] == pytest.approx(8 / 255) and 0 < found["distance_max"] <= 8 / 255 * (1 + 1e-5)


def test_two_searches_of_a_term_have_two_names():
    x, y = images()
    found = seen_in(bound({"darwin": row("DARWINLoss")}), x, y)
    assert list(found) == ["darwin", "darwin.2"]
    # one ascends the cross-entropy of a class, the other descends it
    rises = [v["objective_adversarial"] - v["objective_clean"] for v in found.values()]
    assert rises[0] > 0 > rises[1]


def test_a_shared_search_is_seen_once():
    calls = []
    x, y = images()
    terms = {"a": row("AdaADLoss"), "b": row("AdaADLoss", alpha=0.5), "c": row("AdaADLoss", share=False)}
    box = bound(terms)
    teacher = box.org_teacher_model
    teacher.register_forward_hook(lambda *_: calls.append(1))
    # the first step of all tries the networks
    for _ in range(2):
        calls.clear()
        box.forward_process(x, y)
    before = len(calls)
    assert list(seen_in(box, x, y)) == ["a", "c"]
    # two passes for the objective and two for the predictions, of two searches
    assert len(calls) == 2 * before + 2 * 4


def test_a_term_of_weight_zero_is_not_seen_and_one_alone_has_the_name_of_its_class():
    x, y = images()
    off = {**tald(), "weight": 0.0}
    assert list(seen_in(bound({"off": off, "adv.1": on_adversarial(KD)}), x, y)) == ["adv.1"]
    # a high-level loss of the user's own
    box = tiny_box({"kd": KD})
    box.criterion = AdaADLoss(**row("AdaADLoss")["criterion"]["kwargs"])
    box.pre_epoch_process(epoch=0)
    assert list(seen_in(box, x, y)) == ["AdaADLoss"]


def test_a_search_without_images_is_not_seen():
    x, _ = images()
    box = bound({"bss": row("BSSLoss", adversary="BSS", threat={**L2_THREAT, "eps": math.inf})}, num_epochs=4)
    with torch.no_grad():
        wrong = box.org_teacher_model(x).argmax(1) + 1
    assert seen_in(box, x, wrong % 5) == {}


def test_every_view_is_seen():
    views = {"forward_proc": "forward_batch4sskd"}
    threat = {**PIXEL_THREAT, "bounds": "none"}
    box = with_side({"adv": on_adversarial(matching("."), threat=threat)}, teacher=views, student=views)
    x, y = images(24)
    found = seen_in(box, x.view(6, 4, *x.shape[1:]), y[:6])["adv"]
    student, teacher = (side.network.eval() for side in sides(box))
    with torch.no_grad():
        logits = [net(x).log_softmax(1) for net in (teacher, student)]
    divergence = (logits[0].exp() * (logits[0] - logits[1])).sum(1).mean()
    assert found["objective_clean"] == pytest.approx(float(divergence), rel=1e-5)


# sums, means and times


numbers = st.floats(-1e6, 1e6)
dictionaries = st.dictionaries(st.sampled_from("abc"), numbers)


@given(st.lists(st.tuples(numbers, dictionaries, dictionaries), min_size=1, max_size=4))
def test_meters_add_up(steps):
    """Steps counted in one meter, and in one for each."""
    together, apart = Meter(), []
    terms = {"t": 1.0}
    for loss, first, second in steps:
        searches = {"x": first, "x.2/y": second}
        together.add(loss, terms, 8, 0.5, searches)
        apart.append(Meter())
        apart[-1].add(loss, terms, 8, 0.5, searches)
    total = Meter()
    for meter in apart:
        total = total.plus(meter)
    assert total == together
    assert together.watched == {"x": len(steps), "x.2/y": len(steps)}
    assert set(together.searches) == {
        f"{n}/{k}" for _, *both in steps for n, d in zip(("x", "x.2/y"), both, strict=True) for k in d
    }


def test_a_meter_goes_through_a_state_file(tmp_path):
    meter = Meter()
    meter.add(1.0, {"a": 2.0}, 8, 0.5, {"a": {"changed_student": 0.25}})
    meter.add_times(SimpleNamespace(seconds={"search": 3.0, "statistics": 1.0}), 5.0)
    torch.save(asdict(meter), tmp_path / "meter.pt")
    assert Meter(**torch.load(tmp_path / "meter.pt", weights_only=True)) == meter


def test_record_has_means_over_watched_steps_and_none_for_what_is_not_finite():
    meter = Meter()
    for value in (1.0, 4.0):
        meter.add(value, {"a": value}, 8, 0.5, {"a": {"objective_clean": value, "objective_adversarial": math.nan}})
    meter.add(1.0, {"a": 1.0}, 8, 0.5)
    record = epoch_record(meter)
    assert record["search"] == {"a": {"objective_clean": 2.5, "objective_adversarial": None}}
    assert record["loss"] == 2.0 and record["images_per_second"] == 16
    json.dumps(record, allow_nan=False)


def record_of(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    meter = Meter()
    # BSS on one process may have no base samples
    searches = {"both": {"eps": 1.0 + 2 * rank}, **({"second": {"eps": 7.0}} if rank else {})}
    meter.add(float(rank), {"t": float(rank)}, 8, 1.0, searches)
    torch.save(epoch_record(meter), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_need_not_see_the_same_searches(tmp_path):
    # forked, they need not import everything again
    processes = mp.start_processes(record_of, (str(tmp_path),), nprocs=2, join=False, start_method="fork")
    try:
        # one after the other
        assert processes.join(timeout=60) or processes.join(timeout=60), "the processes hang"
    finally:
        for process in processes.processes:
            process.kill()
    for rank in (0, 1):
        record = torch.load(tmp_path / f"{rank}.pt")
        assert record["search"] == {"both": {"eps": 2.0}, "second": {"eps": 7.0}}
        assert record["loss"] == record["terms"]["t"] == 0.5 and record["images_per_second"] == 16


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self, monkeypatch):
        self.time = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.time)


def test_where_the_time_goes(monkeypatch, caplog):
    clock = Clock(monkeypatch)
    binding = SimpleNamespace(device=CPU, watch=None)
    written = []
    meter = Meter()
    monitor = Monitor(
        nn.Module(), 0, meter, 2, binding=binding, steps_left=600, write_scalars=lambda *values: written.append(values)
    )

    def loader():
        for _ in range(4):
            clock.time += 1
            yield None

    watched = []
    with caplog.at_level(logging.INFO), monitor.watch(loader(), 4) as batches:
        for _ in batches:
            watched.append(binding.watch is not None)
            for watch in [binding.watch] if binding.watch else []:
                with watch.timing("search"):
                    clock.time += 6
                    with watch.timing("statistics"):
                        clock.time += 5
                watch.searches["a"] = {"eps": 1.0}
            monitor.end_step(torch.tensor(0.5), 8)
            clock.time += 3
    assert watched == [True, False, True, False] and binding.watch is None
    # a second of waiting, six of search and three of the rest; statistics do not count, but for the data's share
    assert (meter.data_seconds, meter.search_seconds, meter.training_seconds) == (4, 12, 6)
    assert meter.seconds == 2 * (1 + 6 + 5 + 3) + 2 * (1 + 3)
    data = 4 / meter.seconds
    assert meter.shares == pytest.approx({"data": data, "search": (1 - data) * 2 / 3, "training": (1 - data) / 3})
    assert sum(meter.shares.values()) == pytest.approx(1)
    assert meter.watched == {"a": 2}
    lines = [record.getMessage() for record in caplog.records]
    # after three steps of 15, 4 and 15 seconds are left 601 of a third of that
    assert len(lines) == 2 and f"ETA {duration(601 * 34 / 3)}" in lines[1] and "search " in lines[1]
    assert f"images/s {3 * 8 / 34:.4g}" in lines[1]
    assert [step for step, _ in written] == [0, 2]
    assert written[1][1]["images_per_second"] == pytest.approx(24 / 34) and written[1][1]["search/a/eps"] == 1


def test_without_a_binding_all_time_is_training_and_data(monkeypatch):
    clock = Clock(monkeypatch)
    meter = Meter()
    monitor = Monitor(nn.Module(), 0, meter, 1)
    with monitor.watch([None, None], None) as batches:
        for _ in batches:
            clock.time += 2
            monitor.end_step(torch.tensor(0.5), 8)
    assert meter.shares == {"search": 0, "training": 1, "data": 0} and not epoch_record(meter)["search"]


@pytest.mark.parametrize(
    "seconds, text",
    [(0.04, "0.04 s"), (59.4, "59 s"), (90, "2 min"), (3600, "1 h 0 min"), (5000, "1 h 23 min"), (200_000, "2 d 8 h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


# a run, its records, and TensorBoard

LOG_FREQ = ("log_freq: 2", "log_freq: 4")


def events(folder="student/tensorboard"):
    """The (step, value) pairs of every curve."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def steps_of(found, tag):
    return [step for step, _ in found[tag]]


def test_a_run_and_its_curves(here, caplog):
    with caplog.at_level(logging.INFO):
        run(write(ROBUST), seed=1, device="cpu", tensorboard=True)
    first, second, _ = metrics()
    statistics = {"objective_clean", "objective_adversarial", "changed_teacher", "distance_mean", "distance_max", "eps"}
    for record in (first, second):
        assert set(record["search"]) == {"tald"} and set(record["search"]["tald"]) == statistics
        assert set(record["time"]) == {"search", "training", "data"}
        assert sum(record["time"].values()) == pytest.approx(1) and min(record["time"].values()) > 0
    assert first["eta_seconds"] > first["seconds"] and second["eta_seconds"] == 0
    lines = [m for m in caplog.messages if m.startswith("epoch 0 [2/")]
    assert len(lines) == 1 and "% ETA" in lines[0].replace(",", "")

    found = events()
    assert steps_of(found, "loss") == [0, 2, 4, 6, 8, 10]
    assert found["validation/top1"] == [
        (5, pytest.approx(first["validation"]["top1"])),
        (11, pytest.approx(second["validation"]["top1"])),
    ]
    for entry in ("clean", "robust"):
        values = [(step, pytest.approx(r["robust_validation"][entry])) for step, r in ((5, first), (11, second))]
        assert found[f"robust_validation/{entry}"] == values
    assert found["lr"] == [(step, pytest.approx(0.2 if step < 6 else 0.02)) for step in (0, 2, 4, 6, 8, 10)]
    for entry in statistics:
        values = [value for step, value in found[f"search/tald/{entry}"]]
        assert sum(values[:3]) / 3 == pytest.approx(first["search"]["tald"][entry], abs=1e-6)
        assert sum(values[3:]) / 3 == pytest.approx(second["search"]["tald"][entry], abs=1e-6)
    for name in ("terms/ce", "terms/tald", "images_per_second", "time/search", "time/training", "time/data"):
        assert steps_of(found, name) == steps_of(found, "loss"), name
    for (_, loss), (_, ce), (_, value) in zip(found["loss"], found["terms/ce"], found["terms/tald"], strict=True):
        assert loss == pytest.approx(ce + value, rel=1e-5)

    # how often one looks does not change the run; a run that begins anew leaves nothing of the one before
    before = weights()
    run(write(ROBUST, LOG_FREQ), seed=1, device="cpu", tensorboard=True)
    assert all(torch.equal(value, before[name]) for name, value in weights().items())
    assert steps_of(events(), "loss") == [0, 4, 6, 10] and steps_of(events(), "validation/top1") == [5, 11]
    assert metrics()[0]["loss"] == first["loss"]


def test_without_the_flag_nothing_is_written(here):
    run(write(PLAIN), seed=1, device="cpu", overrides={"train.num_epochs": 1})
    assert "search" in metrics()[0] and not Path("student/tensorboard").exists()


@pytest.mark.parametrize("stop", [3, 8])
def test_a_run_that_goes_on_shows_no_step_twice(here, monkeypatch, stop):
    text = write(PLAIN)
    run(text, seed=1, device="cpu", tensorboard=True)
    expected, records = events(), metrics()
    end_step, count = Monitor.end_step, iter(range(100))

    def interrupted(self, *args):
        if next(count) == stop:
            raise KeyboardInterrupt
        end_step(self, *args)

    write(PLAIN, ("student.pt", "again.pt"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Monitor, "end_step", interrupted)
        run(text, seed=1, device="cpu", tensorboard=True, save_steps=3)
    run(text, seed=1, device="cpu", tensorboard=True, save_steps=3, resume=True)
    found = events("again/tensorboard")
    assert len(list(Path("again/tensorboard").iterdir())) == 2
    timed = ("time/", "images_per_second")
    for tag, values in expected.items():
        assert (steps_of(found, tag) if tag.startswith(timed) else found[tag]) == (
            steps_of(expected, tag) if tag.startswith(timed) else values
        ), tag
    assert [r.get("search") for r in metrics("again")] == [r.get("search") for r in records]


def test_curves_need_the_package(here, monkeypatch):
    text = write(PLAIN)
    run(text, seed=1, device="cpu", overrides={"train.num_epochs": 1})
    before = Path("student/metrics.jsonl").read_bytes()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'torchdistill-adv\[tensorboard\]'"):
        run(text, seed=1, device="cpu", tensorboard=True)
    assert Path("student/metrics.jsonl").read_bytes() == before


@pytest.fixture
def small_files():
    """A disk that is full after 2000 bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_stops_the_curves_and_nothing_else(tmp_path, small_files, caplog, monkeypatch):
    # the thread that writes says so too
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with scalar_writer(tmp_path) as board:
        for step in range(100):
            board(step, {"loss": 1.0})
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "on nothing is written for TensorBoard" in caplog.text
    found = events(tmp_path)["loss"]
    assert 0 < len(found) < 100 and found == [(step, 1.0) for step in range(len(found))]


def test_what_was_written_is_there_when_the_run_is_killed(tmp_path):
    with scalar_writer(tmp_path) as board:
        board(0, {"loss": 1.0})
        assert events(tmp_path)["loss"] == [(0, 1.0)]


def test_a_place_where_no_curve_can_be_written(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with scalar_writer(tmp_path / "file") as board:
        for step in range(2):
            board(step, {"loss": 1.0})
    assert len(caplog.records) == 1 and str(tmp_path / "file") in caplog.text


# the report

SEARCHES = {
    "tald": {
        "objective_clean": 0.0,
        "objective_adversarial": 0.5,
        "changed_teacher": 0.25,
        "distance_max": 0.3,
        "eps": 0.3,
    },
    "adv": {"objective_clean": 0.5, "objective_adversarial": None, "changed_student": 0.75, "distance_max": 0.1},
}
TIME = {"search": 0.5, "training": 0.375, "data": 0.125}


def method_of(folder, epochs):
    (method,) = group(read_runs([make_run(folder, epochs=epochs)]))
    return method


def test_the_report_has_curves_of_what_was_seen(tmp_path):
    epochs = [epoch(0), epoch(1, search=SEARCHES, time=TIME), epoch(2, search={"tald": SEARCHES["tald"]}, time=TIME)]
    method = method_of(tmp_path / "run", epochs)
    found = {figure: data.lines for figure, data in curves.collect_searches(method).items()}
    assert found == {
        "objective": {
            "tald, clean": [([1, 2], [0.0, 0.0])],
            "tald, adversarial": [([1, 2], [0.5, 0.5])],
            "adv, clean": [([1], [0.5])],
        },
        "changed": {"tald, teacher": [([1, 2], [25.0, 25.0])], "adv, student": [([1], [75.0])]},
        "distance": {
            "tald, largest": [([1, 2], [0.3, 0.3])],
            "tald, eps": [([1, 2], [0.3, 0.3])],
            "adv, largest": [([1], [0.1])],
        },
    }
    times = curves.collect_times(method)
    assert {name: runs[0][1][0] for name, runs in times.lines.items()} == {"search": 50, "training": 37.5, "data": 12.5}
    (axes,) = curves.draw_curves(times).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[50, 50], [37.5, 37.5], [12.5, 12.5]]
    body = sections.curves_section([method], Figures(tmp_path / "figures")).body
    names = {file.name for file in (tmp_path / "figures").iterdir()}
    assert {f"{figure}-run-light.png" for figure in ("objective", "changed", "distance", "time")} <= names
    assert "Search and time" in body and body.index("Loss terms") < body.index("Search and time")


def test_the_report_of_older_records_has_none(tmp_path):
    method = method_of(tmp_path / "run", [epoch(0), epoch(1)])
    assert curves.collect_searches(method) == {} and curves.collect_times(method) is None

"""What is measured of a teacher and a student: particles, agreement, and all of it on an experiment."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import L2_THREAT, NORMALIZE, images, network, sharp, tald
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from torchdistill_adv.adversaries import BSS, SVGD
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.evaluation.agreement import average_ranks, compare_logits, spearman
from torchdistill_adv.evaluation.attacks import GradientAttack
from torchdistill_adv.evaluation.diversity import SEARCHES, find_particles, sse
from torchdistill_adv.evaluation.pixels import PixelModel, pixel_threat
from torchdistill_adv.noise import ImageNoise, derive_seed
from torchdistill_adv.ranking import soft_spearman
from torchdistill_adv.runner.loading import Experiment
from torchdistill_adv.runner.measures import as_table, measure
from torchdistill_adv.threat import ThreatModel

# particles


@pytest.mark.parametrize("count", [2, 3, 8])
def test_sse_is_the_mean_over_all_pairs(count):
    particles = np.random.default_rng(0).normal(size=(5, count, 7))
    pairs = [(i, j) for i in range(count) for j in range(i)]
    expected = [sum(((image[i] - image[j]) ** 2).sum() for i, j in pairs) / len(pairs) for image in particles]
    assert len(pairs) == count * (count - 1) / 2
    assert np.allclose(sse(torch.tensor(particles)), expected, rtol=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 9), st.integers(0, 10**6))
def test_sse_has_the_bound_of_its_ball(count, seed):
    points = nn.functional.normalize(torch.randn(3, count, 4, generator=torch.Generator().manual_seed(seed)), dim=2)
    assert (sse(0.3 * points) <= 2 * 0.09 * count / (count - 1) + 1e-6).all()


def test_sse_reaches_its_bound_at_opposite_points_and_is_0_where_all_coincide():
    point = torch.tensor([0.3, 0.0])
    assert float(sse(torch.stack([point, -point])[None])) == pytest.approx(4 * 0.09)
    assert float(sse(point.expand(1, 5, 2))) == 0


def test_sse_of_close_particles_far_from_the_origin_keeps_its_digits():
    particles = 100 + 1e-2 * torch.randn(2, 4, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(sse(particles).double(), sse(particles.double()), rtol=1e-3)


BALL = ThreatModel(**L2_THREAT)
SETTINGS = SVGD(num_particles=3, num_steps=4, step_size=0.05, noise_factor=2.0)


def particle_noise(count, x):
    streams = [derive_seed(i, k) for k in range(count) for i in range(len(x))]
    return ImageNoise(3, streams, x)


def particles(search, count=3, threat=BALL, **changes):
    teacher, x = sharp(1, width=8).double().eval(), images(5)[0].double()
    with torch.no_grad():
        logits = teacher(x)
    options = dataclasses.replace(SETTINGS, num_particles=count, **changes)
    return x, find_particles(search, teacher, x, logits, threat, options, particle_noise(count, x))


@pytest.mark.parametrize("search", SEARCHES)
def test_particles_are_in_the_ball_and_valid(search):
    x, rows = particles(search)
    assert rows.shape == (3, *x.shape)
    for some in rows:
        assert (BALL.distance(some, x) <= 0.3 + 1e-9).all()
        BALL.check_inputs(some)


@pytest.mark.parametrize("search", SEARCHES)
def test_all_searches_begin_at_the_same_random_starts(search):
    x, rows = particles(search, step_size=0.0)
    expected = [BALL.random_start(x, u, 2.0) for u in particle_noise(3, x).uniform((15, *x.shape[1:])).split(5)]
    # projecting again rounds again
    assert torch.allclose(rows, torch.stack(expected), atol=1e-12)


@pytest.mark.parametrize("search", ["SVGD, paper", "BSS", "PGD"])
def test_more_particles_begin_with_the_same_ones(search):
    """Where they do not repel each other."""
    assert torch.allclose(particles(search, count=3)[1][:2], particles(search, count=2)[1], atol=1e-12)


def test_svgd_at_the_papers_bandwidth_is_pgd():
    """Its kernel is the identity, so its l2 steps are those of independent attacks."""
    assert torch.allclose(particles("SVGD, paper")[1], particles("PGD")[1], atol=1e-12)


def test_particles_that_repel_each_other_are_further_apart():
    spread = {name: sse(particles(name)[1].flatten(2).transpose(0, 1)) for name in ("SVGD, median", "SVGD, paper")}
    assert (spread["SVGD, median"] > spread["SVGD, paper"]).all()


@pytest.mark.parametrize("search", SEARCHES)
def test_no_more_rows_than_images_go_through_the_network_at_once(search):
    teacher, (x, _) = sharp(1, width=8).eval(), images(5)
    logits, rows = teacher(x).detach(), []
    teacher.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    find_particles(search, teacher, x, logits, BALL, SETTINGS, particle_noise(3, x))
    assert max(rows) == 5 and sum(rows) == 3 * 4 * 5


@pytest.mark.parametrize("change", [{"num_steps": 1}, {"step_size": 0.01}, {"noise_factor": 0.1}])
@pytest.mark.parametrize("search", SEARCHES)
def test_all_searches_have_the_same_settings(search, change):
    assert not torch.allclose(particles(search)[1], particles(search, **change)[1], atol=1e-6)


def test_bss_draws_a_class_for_every_run():
    """From one start for all, the direction of the first step is that of the class."""
    x, rows = particles("BSS", count=8, noise_factor=0.0, num_steps=1)
    classes = [len({tuple(v) for v in (rows[:, i] - x[i]).flatten(1).round(decimals=9).tolist()}) for i in range(5)]
    assert max(classes) > 1 and max(classes) < 5


def test_bss_from_other_starts_moves_by_the_formula_and_stays_in_the_ball():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(72, 2)).double(), images()[0].double()
    threat = ThreatModel(0.3, "l2", "input", bounds="none")
    normal = net[1].weight[1] - net[1].weight[0]
    normal = (normal / normal.norm()).detach().view(x.shape[1:])

    def objective(rows, index):
        """The distance to a plane that is 0.2 away from every image, and flat beyond it."""
        return ((rows - x[index]) * normal).flatten(1).sum(1).sub(0.2).clamp_max(0)

    aside = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    aside = 0.1 * nn.functional.normalize((aside - (aside * normal).sum((1, 2, 3), keepdim=True) * normal).flatten(1))
    start = x + aside.view_as(x)
    start[0] = x[0] + 0.25 * normal
    found = BSS(num_steps=3, step_size=1.0, overshoot=0.01).search_from(start, objective, x, threat)
    assert torch.allclose(found.rows[0], start[0])
    assert torch.allclose(found.rows[1:], start[1:] + 0.21 * normal, atol=1e-12)
    beyond = BSS(num_steps=3, step_size=1.0, overshoot=0.2).search_from(start, objective, x, threat).rows
    moved = aside.view_as(x)[1:] + 0.4 * normal
    assert torch.allclose(beyond[1:], x[1:] + 0.3 / math.hypot(0.1, 0.4) * moved, atol=1e-12)


# agreement


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 12), st.integers(1, 6), st.integers(0, 10**6))
def test_spearman_and_ranks_are_scipys(size, num_values, seed):
    """With as many ties as values that are few bring."""
    first, second = np.random.default_rng(seed).integers(num_values, size=(2, 4, size)).astype(float)
    assert np.array_equal(average_ranks(torch.tensor(first)), scipy.stats.rankdata(first, axis=1))
    for found, a, b in zip(spearman(torch.tensor(first), torch.tensor(second)).tolist(), first, second, strict=True):
        if len(set(a)) == 1 or len(set(b)) == 1:
            assert math.isnan(found)
        else:
            assert found == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)


def softmax(logits):
    total = sum(math.exp(v) for v in logits)
    return [math.exp(v) / total for v in logits]


def logits_pair(rows=6, classes=5):
    return torch.randn(2, rows, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_logits_are_compared_row_by_row():
    teacher, student = logits_pair()
    found = compare_logits(teacher, student, sharpness=(0.5, 3))
    assert set(found) == {"same", "kl", "hard", "soft 0.5", "soft 3"}
    for i, (t, s) in enumerate(zip(teacher.tolist(), student.tolist(), strict=True)):
        assert float(found["same"][i]) == (t.index(max(t)) == s.index(max(s)))
        kl = sum(p * math.log(p / q) for p, q in zip(softmax(t), softmax(s), strict=True))
        assert float(found["kl"][i]) == pytest.approx(kl)
        assert float(found["hard"][i]) == pytest.approx(scipy.stats.spearmanr(t, s).statistic)
    assert 0 < found["same"].mean() < 1


def test_soft_correlations_of_many_classes_are_those_of_one_pass_in_less_memory():
    teacher, student = logits_pair(20, 1000)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, *(t.numel() for t in out) if isinstance(out, (tuple, list)) else [out.numel()])
            return out

    with Watch():
        found = compare_logits(teacher, student, sharpness=(2.0,))["soft 2"]
    assert torch.allclose(found, soft_spearman(student, teacher, 2.0), atol=1e-12)
    # 4 rows of 20, in pairs of classes
    assert largest == 4 * 1000**2


def test_soft_correlation_tends_to_the_hard_one():
    found = compare_logits(*logits_pair(50), sharpness=(0.5, 2, 10, 1e4))
    gaps = [float((found[f"soft {b}"] - found["hard"]).abs().mean()) for b in ("0.5", "2", "10", "10000")]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-3 < gaps[0]


def test_half_precision_logits_are_widened():
    teacher, student = logits_pair()
    found = compare_logits(teacher.half(), student.half())
    expected = compare_logits(teacher.half().float(), student.half().float())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# the experiment


def data(count=30, wrong=6, teacher=None):
    """Images whose labels are what the teacher says, but for the first ``wrong``."""
    x = images(count)[0]
    with torch.no_grad():
        labels = (teacher or networks()["teacher"])(x).argmax(1)
    labels[:wrong] = (labels[:wrong] + 1) % 5
    return TensorDataset(x, labels)


def networks():
    """A student that mostly agrees with its teacher."""
    teacher = sharp(1, width=8).eval()
    with torch.no_grad():
        # every class for some images
        teacher[-1].weight *= 5
        teacher[-1].bias -= teacher(images(30)[0]).mean(0)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for p in student.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    return {"student": student, "teacher": teacher}


def experiment(config=None, **changes):
    fields = {
        "config": config or {},
        "networks": networks(),
        "checkpoints": {"student": "student.pt", "teacher": None},
        "data": None,
        "dataset_id": "test set",
        "normalization": (tuple(NORMALIZE["mean"]), tuple(NORMALIZE["std"])),
        "device": torch.device("cpu"),
        "num_workers": 0,
        **changes,
    }
    return Experiment(**{**fields, "data": data() if fields["data"] is None else fields["data"]})


def run(config=None, changes=None, **options):
    return measure(experiment(config, **(changes or {})), **{"particles": (2, 3), "num_images": None, **options})


@pytest.fixture(scope="module")
def found():
    return run()


def rows_of(found, **wanted):
    return [r for r in found["diversity"]["results"] if all(r[name] == value for name, value in wanted.items())]


def test_record_is_json_and_complete(found):
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["data"] == {
        "dataset": "test set",
        "num_images": 30,
        "of": 30,
        "subset_seed": 0,
        "indices": list(range(30)),
    }
    assert found["models"]["student"]["checkpoint"] == "student.pt"
    assert found["models"]["student"]["sha256"] != found["models"]["teacher"]["sha256"]
    assert found["similarity"]["num_right"] < found["diversity"]["num_images"] == 24
    searches = [(r["search"], r["bandwidth"], r["num_particles"]) for r in found["diversity"]["results"]]
    kinds = [("SVGD", 1e-3), ("SVGD", "median"), ("BSS", None), ("PGD", None)]
    assert searches == [(*kind, count) for kind in kinds for count in (2, 3)]
    for inputs in ("clean", "student", "teacher"):
        assert set(found["agreement"][inputs]["spearman"]["soft"]) == {"0.5", "1", "2", "5", "10"}
    assert found["agreement"]["settings"]["eps"] == 8 / 255


def test_agreement_is_that_of_the_networks_on_each_kind_of_image(found):
    made = experiment()
    x, labels = made.data.tensors
    models = {who: made.on_pixels(who) for who in ("teacher", "student")}
    pixels = models["teacher"].to_pixels(x)
    for inputs in ("clean", "student", "teacher"):
        rows = pixels
        if inputs != "clean":
            noise = ImageNoise(derive_seed(0, "pgd10"), range(30), pixels)
            attack = GradientAttack("pgd", 10, 2 / 255)
            rows = attack(models[inputs], pixels, labels, pixel_threat("8/255"), noise).rows
        with torch.no_grad():
            t, s = models["teacher"](rows), models["student"](rows)
        here = found["agreement"][inputs]
        assert here["same"] == pytest.approx(100 * (t.argmax(1) == s.argmax(1)).float().mean().item())
        kl = np.mean([scipy.stats.entropy(softmax(a), softmax(b)) for a, b in zip(t.tolist(), s.tolist(), strict=True)])
        assert here["kl"] == pytest.approx(kl, rel=1e-4)
        hard = np.mean([scipy.stats.spearmanr(a, b).statistic for a, b in zip(t, s, strict=True)])
        assert here["spearman"]["hard"] == pytest.approx(hard)
    assert len({found["agreement"][inputs]["kl"] for inputs in ("clean", "student", "teacher")}) == 3


def test_diversity_is_the_mean_and_deviation_over_images(found):
    """Of SVGD with a random start and no more than TALD's defaults say, made again image by image."""
    made = experiment()
    teacher, (x, labels) = made.networks["teacher"], made.data.tensors
    threat = ThreatModel(0.3, "l2", "input", *made.normalization)
    distances, fooled = [], []
    for i in range(6, 30):
        streams = [derive_seed(i, k) for k in range(3)]
        noise = ImageNoise(derive_seed(0, "particles"), streams, x)
        image = x[i : i + 1]
        with torch.no_grad():
            logits = teacher(image)
        rows = find_particles("SVGD, median", teacher, image, logits, threat, SVGD(num_particles=3), noise)[:, 0]
        distances.append(np.mean([float((rows[a] - rows[b]).square().sum()) for a, b in ((0, 1), (0, 2), (1, 2))]))
        fooled += (teacher(rows).argmax(1) != labels[i]).tolist()
    (row,) = rows_of(found, bandwidth="median", num_particles=3)
    assert row["sse"] == pytest.approx(np.mean(distances), rel=1e-4)
    assert row["sse_std"] == pytest.approx(np.std(distances), rel=1e-3)
    assert row["fooled"] == pytest.approx(100 * np.mean(fooled)) and 0 < row["fooled"] < 100


def test_distances_have_the_units_of_the_threat_model():
    """In the space of pixels every deviation of 1/4 and more makes them smaller."""
    options = {"threat": {**NORMALIZE, "norm": "l2", "eps": 0.05, "space": "pixel"}}
    for row in run(config_of(tald(**options)))["diversity"]["results"]:
        assert 0 < row["sse"] <= 0.05**2 * 2 * row["num_particles"] / (row["num_particles"] - 1)


def test_equal_networks_agree_in_everything():
    teacher = networks()["teacher"]
    found = run(changes={"networks": {"student": copy.deepcopy(teacher), "teacher": teacher}}, eps=0.2)
    for inputs in ("clean", "student", "teacher"):
        here = found["agreement"][inputs]
        assert (here["same"], here["kl"], here["spearman"]["hard"]) == (
            100,
            pytest.approx(0, abs=1e-6),
            pytest.approx(1),
        )
        assert list(here["spearman"]["soft"].values()) == pytest.approx([1] * 5)
    assert (found["similarity"]["magsim"], found["similarity"]["angsim"]) == (pytest.approx(1), pytest.approx(1))
    assert found["similarity"]["num_right"] == 24


def test_radius_0_leaves_the_images(found):
    here = run(eps=0)["agreement"]
    assert here["student"] == here["teacher"] == here["clean"] == found["agreement"]["clean"]


def close(first, second):
    """Equal up to rounding."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(close(first[name], second[name]) for name in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(close, first, second))
    return first == (pytest.approx(second, rel=1e-3) if isinstance(second, float) else second)


def test_batches_change_nothing(found):
    assert close(run(batch_size=7), found)


class Small(nn.Module):
    """Runs out of memory."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        if len(x) > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.net(x)


def test_batches_that_do_not_fit_into_memory_are_halved(found):
    here = run(changes={"networks": {who: Small(net) for who, net in networks().items()}}, batch_size=16)
    assert close({**here, "models": None}, {**found, "models": None})


def test_a_seed_repeats_and_another_draws_other_images_and_starts(found):
    first, again, other = (run(num_images=12, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first["data"]["indices"] != other["data"]["indices"] and len(set(first["data"]["indices"])) == 12
    assert run(seed=1)["diversity"]["results"] != found["diversity"]["results"]


def config_of(*terms):
    sub_terms = {f"term{i}": term for i, term in enumerate(terms)}
    return {"train": {"criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": sub_terms}}}}


def test_search_is_that_of_the_first_tald_term_with_svgd(found):
    adversary = {"key": "SVGD", "kwargs": {"num_steps": 2, "step_size": 0.02, "noise_factor": 0.5, "bandwidth": 3.0}}
    virtual = tald(adversary="VirtualSVGD", threat={**L2_THREAT, "eps": 5e-4})
    kd = {"criterion": {"key": "KDLoss", "kwargs": {}}, "weight": 1.0}
    config = config_of(kd, virtual, tald(adversary=adversary, threat={**L2_THREAT, "eps": 0.1}), tald())
    here = run(config)["diversity"]
    assert here["settings"]["source"] == "train.criterion.kwargs.sub_terms.term2"
    numbers = {name: here["settings"][name] for name in ("num_steps", "step_size", "noise_factor")}
    assert numbers == {"num_steps": 2, "step_size": 0.02, "noise_factor": 0.5}
    assert "eps=0.1" in here["settings"]["threat"]
    assert all(0 < row["sse"] <= 0.04 for row in here["results"])
    assert {row["bandwidth"] for row in here["results"]} == {1e-3, "median", None}
    default = found["diversity"]["settings"]
    assert (default["source"], default["num_steps"], default["noise_factor"]) == ("TALD's defaults", 1, 10)
    assert "eps=0.3" in default["threat"] and "l2" in default["threat"]
    assert run(config_of(virtual))["diversity"] == found["diversity"]


def test_targeted_term_gives_its_ball_and_steps_alone(found):
    options = {"target_class": "runner_up", "adversary": "SVGD", "threat": L2_THREAT}
    here = run(config_of(tald(**options)))["diversity"]
    assert here["results"] == found["diversity"]["results"]


def test_one_particle_has_no_distance():
    for row in run(particles=[1, 1])["diversity"]["results"]:
        assert row["sse"] is None and row["sse_std"] is None and 0 <= row["fooled"] <= 100
        assert row["num_particles"] == 1
    assert len(run(particles=[1, 1])["diversity"]["results"]) == 4


def test_nothing_right_is_none_and_said():
    made = experiment()
    x, _ = made.data.tensors
    wrong = (made.networks["teacher"](x).argmax(1) + 1) % 5
    found = run(changes={"data": TensorDataset(x, wrong)})
    assert found["diversity"]["num_images"] == found["similarity"]["num_right"] == 0
    assert all(r["sse"] is None and r["fooled"] is None for r in found["diversity"]["results"])
    json.dumps(found, allow_nan=False)
    table = as_table(found)
    assert "no image is classified rightly" in table and "nan" not in table.lower().replace("none", "")


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(5))

    def forward(self, x):
        return self.logits + 0 * x.flatten(1)[:, :5]


def test_rank_correlation_with_equal_logits_is_none():
    found = run(changes={"networks": {"student": Constant(), "teacher": networks()["teacher"]}})
    assert found["agreement"]["clean"]["spearman"]["hard"] is None
    json.dumps(found, allow_nan=False)


def test_table_has_every_number_and_definition(found):
    table = as_table(found)
    for section in ("similarity", "diversity", "agreement"):
        assert found[section]["definition"] in table
    similarity = found["similarity"]
    for value in (similarity["magsim"], similarity["angsim"], *(r["sse"] for r in found["diversity"]["results"])):
        assert f"| {value:.4g} |" in table
    for inputs in ("clean", "student", "teacher"):
        here = found["agreement"][inputs]
        cells = [f"{here['same']:.1f}", f"{here['kl']:.4g}", f"{here['spearman']['hard']:.4g}"]
        assert f"| {' | '.join(cells)} |" in table
    assert f"| {similarity['flipped']['both']:.1f} | {similarity['num_compared']} |" in table
    assert "pgd10 at 8/255" in table and "SVGD, bandwidth median | 3 |" in table
    tables = [line.count("|") for line in table.splitlines() if line.startswith("|")]
    assert [tables.count(n) for n in (8, 6, 10)] == [3, 10, 5]


def test_no_trace_is_left():
    made = experiment(networks={"student": network(2, dropout=0.5).train(), "teacher": networks()["teacher"].train()})
    made.networks["student"][1].eval()
    before = {who: copy.deepcopy(net.state_dict()) for who, net in made.networks.items()}
    modes = [m.training for net in made.networks.values() for m in net.modules()]
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    measure(made, num_images=8, particles=(2,))
    assert [m.training for net in made.networks.values() for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == streams[1:]
    for who, net in made.networks.items():
        assert all(p.grad is None and p.requires_grad for p in net.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
        assert all(torch.equal(value, before[who][name]) for name, value in net.state_dict().items())


# bad input


class NotFinite(Constant):
    def forward(self, x):
        return super().forward(x) / 0


@pytest.mark.parametrize(
    "changes, path, message",
    [
        ({"networks": {"student": network(2)}}, "models.teacher_model", "no teacher"),
        (
            {"networks": {"student": network(2, num_classes=4), "teacher": network(1)}},
            "models.student_model",
            "4 classes",
        ),
        ({"networks": {"student": network(2), "teacher": NotFinite()}}, "models.teacher_model", "NaN or infinite"),
        ({"networks": {"student": nn.Flatten(0), "teacher": network(1)}}, "models.student_model", "logits"),
        ({"data": TensorDataset(*(t[:0] for t in images()))}, "data", "without images"),
        ({"data": TensorDataset(images()[0], torch.full((6,), 5))}, "data", "label 5"),
        ({"data": TensorDataset(images()[0] + 3, images()[1])}, "mean", "outside"),
    ],
)
def test_experiments_that_cannot_be_measured_are_refused(changes, path, message):
    with pytest.raises(ConfigError, match=message) as error:
        measure(experiment(**changes))
    assert error.value.path == path


@pytest.mark.parametrize(
    "options, path, message",
    [
        ({"eps": 8}, "eps", "8/255"),
        ({"eps": "eight"}, "eps", "eight"),
        ({"particles": (2, 0)}, "particles", "found 0"),
        ({"num_images": 0}, "num_images", ">= 1"),
        ({"batch_size": 0}, "batch_size", ">= 1"),
    ],
)
def test_bad_options_are_refused(options, path, message):
    with pytest.raises(ConfigError, match=message) as error:
        run(**options)
    assert error.value.path == path


def test_wrong_search_in_the_config_names_its_path():
    with pytest.raises(ConfigError) as error:
        run(config_of(tald(threat={**L2_THREAT, "eps": -1})))
    assert error.value.path == "train.criterion.kwargs.sub_terms.term0.criterion.kwargs.threat.eps"


def test_images_may_be_in_pixels():
    """Data without a Normalize."""
    teacher = sharp(1, width=8).eval()
    x = torch.rand(8, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    model = PixelModel(teacher, NORMALIZE["mean"], NORMALIZE["std"]).eval()
    labels = model(x).argmax(1)
    made = experiment(
        networks={"student": model, "teacher": model}, data=TensorDataset(x, labels), normalization=((0.0,), (1.0,))
    )
    assert measure(made, particles=(2,))["agreement"]["clean"]["same"] == 100

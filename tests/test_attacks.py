"""Attacks against an independent library, against closed forms, and what an evaluation relies on."""

from __future__ import annotations

import functools
import runpy
import sys
import types
from pathlib import Path

import eagerpy as ep
import foolbox
import numpy as np
import pytest
import torch
from fixed_networks import EPS, digits, digits_cnn, linear_problem, network, right
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchdistill.models.registry import MODEL_DICT

from torchdistill_adv.errors import ConfigError
from torchdistill_adv.evaluation import GradientAttack, evaluate, parse_attacks, pixel_threat
from torchdistill_adv.evaluation.attacks import describe
from torchdistill_adv.evaluation.carlini_wagner import CarliniWagnerL2
from torchdistill_adv.noise import ImageNoise

NORMS = ("linf", "l2")
NAMES = ("fgsm", "pgd20", "cw30")
NETWORKS = ("plain", "robust", "sharp")
HALF_A_POINT = 0.005
COUNT = 600
BENCHMARK = Path(__file__).resolve().parent.parent / "benchmarks" / "attack_speed.py"


def noise(x, seed=0):
    return ImageNoise(seed, range(len(x)), x)


@functools.cache
def ours(which, name, norm):
    """Our examples."""
    x, y = digits(COUNT)
    (attack,) = parse_attacks(name)
    return attack(network(which), x, y, pixel_threat(EPS[norm], norm), noise(x)).rows


def theirs(which, name, norm, start):
    """foolbox's examples, from our start."""
    x, y = digits(COUNT)
    if name == "fgsm":
        attack = {"linf": foolbox.attacks.FGSM, "l2": foolbox.attacks.L2FastGradientAttack}[norm]()
    else:
        build = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
        attack = build(abs_stepsize=EPS[norm] / 4, steps=int(name.lstrip("pgdcw")))
        attack.get_random_start = lambda images, eps: ep.astensor(start)
    if name.startswith("cw"):
        attack.get_loss_fn = margin_loss
    return attack(foolbox.PyTorchModel(network(which), bounds=(0, 1)), x, y, epsilons=EPS[norm])[1]


def margin_loss(model, labels):
    def loss(inputs):
        z = model(inputs)
        others = z - 1e6 * ep.onehot_like(z, labels)
        return (others.max(axis=1) - z[range(len(z)), labels]).sum()

    return loss


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("which", "name"), [(which, name) for which in ("plain", "robust") for name in NAMES] + [("sharp", "pgd20")]
)
def test_from_the_same_start_the_outcomes_are_those_of_foolbox(which, name, norm):
    x, y = digits(COUNT)
    threat = pixel_threat(EPS[norm], norm)
    start = threat.random_start(x, noise(x).some(torch.arange(len(x)), 0).uniform(x.shape))
    clean = right(network(which), x, y)
    mine = clean & right(network(which), ours(which, name, norm), y)
    other = clean & right(network(which), theirs(which, name, norm, start), y)
    assert (mine != other).float().mean() <= HALF_A_POINT
    assert mine.float().mean() < clean.float().mean() - 0.2


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NAMES)
def test_examples_are_in_the_ball_and_are_images(name, norm):
    x, _ = digits(COUNT)
    rows = ours("robust", name, norm)
    moved = (rows - x).flatten(1)
    assert (moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)).max() <= EPS[norm] * (1 + 1e-5)
    assert rows.min() >= 0 and rows.max() <= 1


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NAMES)
def test_two_classes_of_a_linear_network_fall_exactly_where_they_can(name, norm):
    net, x, y, distance, radius = linear_problem(2, norm)
    (attack,) = parse_attacks(name)
    rows = attack(net, x, y, pixel_threat(radius, norm), noise(x)).rows
    assert right(net, rows, y).tolist() == (distance > radius).tolist()


@pytest.mark.parametrize("norm", NORMS)
def test_robust_images_are_right_both_clean_and_under_attack(norm):
    net, x, y, distance, radius = linear_problem(2, norm)
    y = y.clone()
    y[::3] = 1 - y[::3]
    mislabelled = torch.arange(len(y)) % 3 == 0
    found = {result.attack: result for result in evaluate(net, (x, y), attacks="pgd20", norm=norm, eps=radius).results}
    assert found["clean"].outcomes == (~mislabelled).tolist()
    assert found["pgd20"].outcomes == (~mislabelled & (distance > radius)).tolist()


class Calls(nn.Module):
    """A network that keeps what it is asked."""

    def __init__(self, network):
        super().__init__()
        self.network, self.asked = network, []

    def forward(self, x):
        self.asked.append(x.detach())
        return self.network(x)


def test_a_restart_attacks_only_what_is_still_right():
    x, y = digits(200)
    threat = pixel_threat(0.05)
    net = Calls(network("plain"))
    kept = right(net, x, y)
    x, y = x[kept], y[kept]
    previous, previous_rows = torch.ones(len(x), dtype=torch.bool), None
    for restarts in (1, 2, 4, 8):
        net.asked.clear()
        rows = GradientAttack("pgd", 2, restarts=restarts)(net, x, y, threat, noise(x)).rows
        still = right(network("plain"), rows, y)
        assert (still <= previous).all()
        if previous_rows is not None:
            assert torch.equal(rows[~previous], previous_rows[~previous])
        previous, previous_rows = still, rows
        # gradients of all, then of those that the check before each restart left
        sizes = [len(asked) for asked in net.asked]
        assert sizes[:2] == [len(x)] * 2
        assert len(sizes) == 2 + 3 * (restarts - 1)
        assert all(check >= first == second for check, first, second in zip(*[iter(sizes[2:])] * 3, strict=True))
        assert sizes == sorted(sizes, reverse=True)
    assert 0 < len(net.asked[-1]) < len(x)
    first = GradientAttack("pgd", 2)(network("plain"), x, y, threat, noise(x)).rows
    assert still.sum() < right(network("plain"), first, y).sum()


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(0, 2**63 - 1), st.sampled_from(["uniform", "normal"]))
def test_the_noise_of_an_image_is_its_own(data, seed, kind):
    ids = data.draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=8, unique=True))
    like = torch.empty(0, dtype=data.draw(st.sampled_from([torch.float32, torch.float64])))
    places = torch.tensor(data.draw(st.lists(st.integers(0, len(ids) - 1), min_size=1, max_size=8, unique=True)))
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))

    def drawn(noise, count):
        return torch.stack([getattr(noise, kind)((count, *shape)) for _ in range(2)])

    together = drawn(ImageNoise(seed, ids, like), len(ids))
    assert together.dtype == like.dtype
    alone = [drawn(ImageNoise(seed, [ids[place]], like), 1) for place in places]
    assert torch.equal(together[:, places], torch.cat(alone, 1))
    whole = ImageNoise(seed, ids, like)
    some = drawn(whole.some(places, "here"), len(places))
    assert torch.equal(some, drawn(whole.some(torch.arange(len(ids)), "here"), len(ids))[:, places])
    assert not torch.equal(some, drawn(whole.some(places, "there"), len(places)))
    assert not torch.equal(together[0], together[1])


def test_the_noise_fills_its_distribution():
    noise = ImageNoise(0, range(200), torch.empty(0))
    uniform, normal = noise.uniform((200, 50)), noise.normal((200, 50))
    assert -1 <= uniform.min() < -0.99 and 0.99 < uniform.max() < 1
    assert uniform.mean().abs() < 0.03 and (uniform.std() - 3**-0.5).abs() < 0.02
    assert normal.mean().abs() < 0.05 and (normal.std() - 1).abs() < 0.03
    assert torch.corrcoef(uniform[:20]).fill_diagonal_(0).abs().max() < 0.6


def test_an_image_is_attacked_alike_in_any_company():
    x, y = digits(60)
    (attack,) = parse_attacks("pgd20")
    threat, net = pixel_threat(EPS["linf"]), network("robust")
    together = attack(net, x, y, threat, ImageNoise(3, range(60), x)).rows
    for some in torch.randperm(60, generator=torch.Generator().manual_seed(0)).split(23):
        apart = attack(net, x[some], y[some], threat, ImageNoise(3, some.tolist(), x)).rows
        assert torch.equal(right(net, apart, y[some]), right(net, together[some], y[some]))
        # an iterate may leave at a gradient of nearly zero, whose sign is the batch's rounding
        assert ((apart - together[some]).abs() < 1e-5).float().mean() > 0.99


def test_names_are_parsed():
    assert parse_attacks(" clean, fgsm,pgd20 ,cw30,pgd20", step_size="1/255", restarts=3) == [
        GradientAttack("fgsm"),
        GradientAttack("pgd", 20, 1 / 255, 3),
        GradientAttack("cw", 30, 1 / 255, 3),
    ]
    assert parse_attacks(["clean"]) == []
    mine = GradientAttack("pgd", 7)
    assert parse_attacks([mine, "pgd7", "cwl2", "autoattack"])[0] is mine
    assert [attack.name for attack in parse_attacks([mine, "cwl2", "autoattack"])] == ["pgd7", "cwl2", "autoattack"]
    assert describe(mine) == {"name": "pgd7", "kind": "pgd", "num_steps": 7, "step_size": None, "restarts": 1}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("clean,pdg20", "did you mean 'pgd20'"),
        ("auto_attack", "did you mean 'autoattack'"),
        ("pgd0", "did you mean 'pgd20'"),
        ("pgd", "did you mean 'pgd20'"),
        ("fgsm7", "did you mean 'fgsm'"),
        ("", "Known: autoattack, clean, cw30, cwl2, fgsm, pgd20"),
        (["pgd20", GradientAttack("pgd", 20, restarts=2)], "found pgd20 with several settings"),
    ],
)
def test_other_names_are_refused(names, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_attacks(names)
    assert caught.value.path == "attacks"


@pytest.mark.parametrize(
    ("attack", "option", "value"),
    [
        (GradientAttack, "num_steps", 0),
        (GradientAttack, "step_size", 0),
        (GradientAttack, "restarts", 0),
        (CarliniWagnerL2, "num_steps", 0),
        (CarliniWagnerL2, "search_steps", 0.5),
        (CarliniWagnerL2, "step_size", 0),
        (CarliniWagnerL2, "confidence", -1),
        (CarliniWagnerL2, "initial_const", "0"),
    ],
)
def test_settings_out_of_range_are_refused(attack, option, value):
    with pytest.raises(ConfigError) as caught:
        attack(**({"kind": "pgd"} if attack is GradientAttack else {}), **{option: value})
    assert caught.value.path == option


CW = {"num_steps": 100, "search_steps": 4, "step_size": 0.04, "initial_const": 0.5}


def cwl2(net, x, y, **changes):
    """Examples of CW-l2 and how far they are."""
    rows = CarliniWagnerL2(**CW | changes)(net, x, y, pixel_threat(EPS["l2"], "l2"), noise(x)).rows
    return rows, (rows - x).flatten(1).norm(dim=1)


@functools.cache
def carlini_wagner(which, confidence=0.0):
    x, y = rightly_classified(which)
    return cwl2(network(which), x, y, confidence=confidence)


def rightly_classified(which):
    x, y = digits(40)
    kept = right(network(which), x, y)
    return x[kept], y[kept]


@pytest.mark.parametrize(("which", "confidence"), [("plain", 0.0), ("plain", 2.0), ("robust", 0.0)])
def test_cwl2_goes_as_far_as_that_of_foolbox(which, confidence):
    x, y = rightly_classified(which)
    rows, distance = carlini_wagner(which, confidence)
    attack = foolbox.attacks.L2CarliniWagnerAttack(
        CW["search_steps"], CW["num_steps"], CW["step_size"], confidence, CW["initial_const"]
    )
    other, _, success = attack(foolbox.PyTorchModel(network(which), bounds=(0, 1)), x, y, epsilons=None)
    other_distance = (other - x).flatten(1).norm(dim=1)
    assert success.all() and not right(network(which), rows, y).any()
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    torch.testing.assert_close(distance.quantile(quantiles), other_distance.quantile(quantiles), rtol=0.005, atol=0)
    for eps in (0.3, 0.5, EPS["l2"], 1.2):
        assert ((distance > eps) != (other_distance > eps)).float().mean() <= HALF_A_POINT


def test_cwl2_finds_the_nearest_point_of_a_linear_boundary():
    net, x, y, distance, _ = linear_problem(3, "l2")
    rows, found = cwl2(net, x, y, num_steps=150, step_size=0.001, search_steps=8, initial_const=0.001)
    assert not right(net, rows, y).any()
    assert (found >= distance * (1 - 1e-4)).all()
    assert (found / distance).quantile(0.9) < 1.02


def test_cwl2_is_never_farther_with_more_searches():
    x, y = rightly_classified("plain")
    lengths = [cwl2(network("plain"), x[:20], y[:20], search_steps=k)[1] for k in (2, 4)]
    found = lengths[0] > 0
    assert found.any() and (lengths[1] <= lengths[0])[found].all() and (lengths[1] < lengths[0]).any()


def test_cwl2_treats_an_image_alike_in_any_company():
    x, y = rightly_classified("plain")
    _, together = carlini_wagner("plain")
    for some in (slice(0, 1), slice(1, 6)):
        _, apart = cwl2(network("plain"), x[some], y[some])
        torch.testing.assert_close(apart, together[some], rtol=1e-3, atol=0)


def test_cwl2_examples_are_images_and_their_margin_exceeds_the_confidence():
    _, y = rightly_classified("plain")
    for confidence in (0.0, 2.0):
        rows, _ = carlini_wagner("plain", confidence)
        assert rows.min() >= 0 and rows.max() <= 1
        z = network("plain")(rows).detach()
        own = z[range(len(z)), y].clone()
        z[range(len(z)), y] = -torch.inf
        assert (z.amax(1) - own > confidence - 1e-4).all()
        assert (z.amax(1) - own).median() < confidence + 0.5


def test_cwl2_gives_back_what_it_cannot_fool_and_draws_nothing():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.tensor([1.0, 0.0, 0.0]) + 0 * x.flatten(1)[:, :3]

    x = digits(3)[0]
    state = torch.get_rng_state()
    rows, _ = cwl2(Constant(), x, torch.zeros(3, dtype=torch.long))
    assert torch.equal(rows, x)
    assert torch.equal(torch.get_rng_state(), state)


def test_cwl2_stops_early_where_nothing_is_left_to_gain():
    net = Calls(network("plain"))
    x, y = rightly_classified("plain")
    cwl2(net, x[:10], y[:10], num_steps=1000, search_steps=1, initial_const=1e-6)
    assert sum(map(len, net.asked)) < 10 * 500


class PlainPGD:
    """PGD as another library has it: all images, weights with gradients, the last iterate."""

    def __init__(self, model, eps, alpha, steps, random_start):
        self.model, self.eps, self.alpha, self.steps = model, eps, alpha, steps
        assert random_start

    def __call__(self, x, y):
        rows = (x + torch.empty_like(x).uniform_(-self.eps, self.eps)).clamp(0, 1)
        for _ in range(self.steps):
            leaf = rows.detach().requires_grad_()
            gradient = torch.autograd.grad(nn.functional.cross_entropy(self.model(leaf), y), leaf)[0]
            rows = x + (leaf.detach() + self.alpha * gradient.sign() - x).clamp(-self.eps, self.eps)
            rows = rows.clamp(0, 1)
        return rows


def test_the_benchmark_counts_the_same_for_both(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchattacks", types.SimpleNamespace(PGD=PlainPGD))
    monkeypatch.setitem(MODEL_DICT, "benchmarked", lambda num_classes: digits_cnn())
    weights, (x, y) = tmp_path / "weights.pt", digits(60)
    torch.save(network("robust").state_dict(), weights)
    y = torch.where(torch.arange(60) % 3 == 0, (y + 1) % 10, y)
    np.savez(tmp_path / "data.npz", image=(x.permute(0, 2, 3, 1) * 255).round().byte().numpy(), label=y.numpy())
    options = f"--model benchmarked --ckpt {weights} --images {tmp_path / 'data.npz'} --mean 0 --std 1 --batch-size 25"
    runpy.run_path(str(BENCHMARK))["main"]([*options.split(), "--repeats", "1", "--device", "cpu"])
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in table] == ["| predictions: all are right", "| of the data: 63.3 % are right"]
    for row in table:
        theirs, mine = float(row[4]), float(row[5].rstrip(" |"))
        assert abs(theirs - mine) <= 100 / 60 + 0.1
        assert float(row[3]) > 0
    assert 50 < float(table[1][4]) < 63.4 < float(table[0][4]) < 100


def test_the_benchmark_says_how_to_get_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(SystemExit, match="pip install torchattacks"):
        runpy.run_path(str(BENCHMARK))["main"](["--num-images", "1", "--device", "cpu"])

"""AutoAttack's adapter: the library's own outcomes, known answers, and no trace left behind."""

from __future__ import annotations

import functools
import logging
import random
import sys
import types

import numpy as np
import pyautoattack
import pytest
import torch
from fixed_networks import EPS, Sharpened, digits, linear_problem, network, right
from torch import nn

from torchdistill_adv.errors import ConfigError
from torchdistill_adv.evaluation import autoattack as adapter
from torchdistill_adv.evaluation import parse_attacks, pixel_threat
from torchdistill_adv.evaluation.autoattack import AutoAttack
from torchdistill_adv.evaluation.carlini_wagner import CarliniWagnerL2
from torchdistill_adv.noise import ImageNoise

PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")
SEED = 3


def attack(net, x, y, norm, eps, which=None):
    return (which or AutoAttack())(net, x, y, pixel_threat(eps, norm), ImageNoise(SEED, range(len(x)), x))


def problem(which):
    """Digits that the network classifies rightly."""
    x, y = (part[:50] for part in digits(80))
    kept = right(network(which), x, y)
    return network(which), x[kept], y[kept]


@pytest.fixture(autouse=True)
def shortened(monkeypatch, request):
    """A fifth of FAB's steps and 200 of Square Attack's 5,000 queries, in the library's runs as in ours."""
    if "full_length" in request.node.name:
        return
    original = pyautoattack.AutoAttack._set_version

    def quick(self, version="standard"):
        original(self, version)
        self.square.n_queries, self.fab.n_iter = 200, 20

    monkeypatch.setattr(pyautoattack.AutoAttack, "_set_version", quick)


@functools.cache
def ours(which, norm):
    net, x, y = problem(which)
    return attack(net, x, y, norm, EPS[norm])


def library(net, norm, eps, **options):
    return pyautoattack.AutoAttack(net, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=SEED, **options)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_outcomes_are_those_of_the_librarys_standard_run(norm):
    net, x, y = problem("robust")
    rows, classes = library(net, norm, EPS[norm]).run_standard_evaluation(x, y)
    assert torch.equal(right(net, ours("robust", norm).rows, y), classes == y)
    torch.testing.assert_close(ours("robust", norm).rows, rows, rtol=0, atol=1e-6)
    assert 0 < (classes == y).sum() < len(y)


def test_the_parts_are_at_full_length():
    """At most: 5,000 queries, 100 steps of APGD or FAB for each target, and the few passes between them."""
    net, x, y, distance, radius = linear_problem(12, "linf", count=10)
    place = int((distance > radius).nonzero()[0])
    asked = []
    net.register_forward_pre_hook(lambda module, inputs: asked.append(torch.is_grad_enabled()))
    assert right(net, attack(net, x[place : place + 1], y[place : place + 1], "linf", radius).rows, y[place]).all()
    assert sum(asked) == 101 + 9 * 101 + 9 * 100
    assert 5000 <= asked.count(False) - 9 * 100 <= 5100


def test_every_example_is_put_down_to_the_part_that_found_it():
    net, x, y = problem("robust")
    found = ours("robust", "linf")
    fooled = ~right(net, found.rows, y)
    assert fooled.tolist() == [part != "" for part in found.found_by]
    # the first part alone, with the standard version's one start
    alone = library(net, "linf", EPS["linf"], version="custom", attacks=["apgd-ce"])
    alone.apgd.n_restarts = 1
    _, classes = alone.run_standard_evaluation(x, y)
    assert [part == "apgd-ce" for part in found.found_by] == (classes != y).tolist()
    assert {"", "apgd-ce", "apgd-t"} <= {*found.found_by} <= {"", *PARTS}


@pytest.mark.parametrize(("which", "norm"), [("plain", "linf"), ("plain", "l2"), ("robust", "linf"), ("robust", "l2")])
def test_no_other_attack_finds_more(which, norm):
    net, x, y = problem(which)
    least = right(net, ours(which, norm).rows, y).sum()
    others = parse_attacks("fgsm,pgd20,cw30")
    if norm == "l2":
        others.append(CarliniWagnerL2(num_steps=100, search_steps=4, step_size=0.04, initial_const=0.5))
    for other in others:
        rows = attack(net, x, y, norm, EPS[norm], other).rows
        inside = pixel_threat(EPS[norm], norm).distance(rows, x) <= EPS[norm] * (1 + 1e-4)
        assert least <= (right(net, rows, y) | ~inside).sum()


@pytest.mark.parametrize(("num_classes", "norm"), [(2, "l2"), (3, "linf"), (4, "linf"), (10, "l2")])
def test_a_linear_network_falls_exactly_where_it_can(num_classes, norm):
    net, x, y, distance, radius = linear_problem(num_classes, norm, count=10)
    found = attack(net, x, y, norm, radius)
    assert right(net, found.rows, y).tolist() == (distance > radius).tolist()
    assert pixel_threat(radius, norm).distance(found.rows, x).max() <= radius * (1 + 1e-5)
    assert 0 < sum(part == "" for part in found.found_by) < len(x)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_with_few_classes_pgd_on_the_margin_stands_in_and_the_log_says_so_once(num_classes, caplog):
    net, x, y, distance, radius = linear_problem(num_classes, "linf", count=10)
    x, y = x[distance < radius], y[distance < radius]
    adapter._tell.cache_clear()
    with caplog.at_level(logging.INFO):
        # a softmax so saturated that the cross-entropy has no gradient
        found = [attack(Sharpened(net, 1e6), x, y, "linf", radius) for _ in range(2)]
    assert set(found[0].found_by) <= {"apgd-ce", "cw100"} and "cw100" in found[0].found_by
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"with {num_classes} classes" in message and "replaced by cw100" in message


def test_four_classes_need_no_stand_in(caplog):
    net, x, y, distance, radius = linear_problem(4, "linf", count=10)
    x, y = x[distance < radius], y[distance < radius]
    found = attack(Sharpened(net, 1e6), x, y, "linf", radius)
    assert set(found.found_by) <= {"apgd-ce", "apgd-t"} and "apgd-t" in found.found_by
    assert not caplog.records


def test_no_trace_is_left(caplog, capsys):
    net, x, y, _, radius = linear_problem(4, "linf", count=6)
    net.insert(1, nn.Dropout(0.5)).eval()
    net[2].bias.requires_grad_(False)
    net[2].weight.grad = torch.ones_like(net[2].weight)
    logging.getLogger("auto-attack").setLevel(logging.DEBUG)
    images, labels = x.clone(), y.clone()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with caplog.at_level(logging.DEBUG):
        attack(net, x, y, "linf", radius)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert torch.equal(net[2].weight.grad, torch.ones_like(net[2].weight)) and net[2].bias.grad is None
    assert [p.requires_grad for p in net.parameters()] == [True, False]
    assert not any(module.training for module in net.modules())
    assert torch.equal(x, images) and torch.equal(y, labels)
    assert not caplog.records and capsys.readouterr() == ("", "")
    assert not logging.getLogger("auto-attack").disabled


def test_no_trace_is_left_by_a_network_that_fails():
    class Broken(nn.Linear):
        def forward(self, x):
            if torch.is_grad_enabled():
                raise RuntimeError("broken")
            return super().forward(x.flatten(1))

    net, x = Broken(36, 4), torch.rand(2, 1, 6, 6)
    with torch.no_grad():
        y, state = net(x).argmax(1), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken"):
        attack(net, x, y, "linf", 0.1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad for p in net.parameters())
    assert not logging.getLogger("auto-attack").disabled


@pytest.mark.parametrize(
    ("shape", "norm"), [((3, 6, 6), "linf"), ((2, 5, 8), "linf"), ((1, 5, 5), "l2"), ((2, 8, 5), "l2")]
)
def test_images_of_any_shape_layout_and_number(shape, norm):
    net, x, y, distance, radius = linear_problem(4, norm, count=8, shape=shape)
    x, y = x.contiguous(memory_format=torch.channels_last), y.repeat_interleave(2)[::2]
    expected = (distance > radius).tolist()
    assert right(net, attack(net, x, y, norm, radius).rows, y).tolist() == expected
    place = expected.index(False)
    alone = attack(net, x[place : place + 1], y[place : place + 1], norm, radius)
    assert alone.rows.shape == (1, *shape) and not right(net, alone.rows, y[place : place + 1]).any()


def test_float64_and_a_radius_of_zero():
    net, x, y, distance, radius = linear_problem(4, "linf", count=8)
    net, x = net.double(), x.double()
    found = attack(net, x, y, "linf", radius)
    assert found.rows.dtype == torch.float64
    assert right(net, found.rows, y).tolist() == (distance > radius).tolist()
    assert (found.rows - x).abs().max() <= radius
    assert torch.equal(attack(net, x[:1], y[:1], "linf", 0).rows, x[:1])


@pytest.mark.parametrize(("shape", "norm"), [((4,), "linf"), ((1, 4, 6), "l2")])
def test_images_that_square_attack_cannot_take_are_refused(shape, norm):
    x = torch.rand(2, *shape)
    net = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 4))
    with pytest.raises(ConfigError, match=r"pgd20,cw30") as caught:
        attack(net, x, torch.tensor([0, 1]), norm, 0.1)
    assert caught.value.path == "attacks"


def test_without_a_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(adapter, "LIBRARIES", ("no_such_package", "nor_this"))
    # before any other attack is run
    with pytest.raises(ConfigError, match=r"pip install 'torchdistill-adv\[eval\]'"):
        parse_attacks("pgd20,autoattack")


def test_the_authors_library_serves_as_well(monkeypatch, capsys):
    class Authors(pyautoattack.AutoAttack):
        """With the signature of github.com/fra31/auto-attack, and as talkative."""

        def __init__(
            self, model, norm="Linf", eps=0.3, seed=None, verbose=True, attacks_to_run=(), version="standard",
            is_tf_model=False, device="cuda", log_path=None,
        ):  # fmt: skip
            print("setting parameters for standard version")
            super().__init__(model, norm=norm, eps=eps, seed=seed, version=version, device=device)

    net, x, y, _, radius = linear_problem(4, "linf", count=6)
    expected = attack(net, x, y, "linf", radius)
    module = types.ModuleType("autoattack")
    module.AutoAttack = Authors
    monkeypatch.setitem(sys.modules, "autoattack", module)
    found = attack(net, x, y, "linf", radius, AutoAttack("autoattack 0.1"))
    assert found.found_by == expected.found_by and torch.equal(found.rows, expected.rows)
    assert capsys.readouterr().out == ""

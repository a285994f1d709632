"""DARWINLoss takes its gradient step by step along the path: whether it is right, and what that costs."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import time
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
from test_darwin import PARTICLES, THREAT, batch, block, box_of, pairs, sharp, steps
from tiny import NUM_CLASSES, leave_process_group, network, term, tiny_box

from torchdistill_adv.losses.base import Cost
from torchdistill_adv.losses.darwin import accumulated


def small(frozen=False):
    """A network in float64 with a parameter that nothing uses."""
    net = network(2).double()
    net[0].requires_grad_(not frozen)
    net.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    return net


def parts_of(net):
    """Three values with different gradients, of which one does not reach the first layers."""
    x, features = batch()[0], torch.ones(1, 16, dtype=torch.float64)
    return [lambda: net(x).square().mean(), lambda: net[-1](features).mean(), lambda: net(2 * x).logsumexp(1).mean()]


@pytest.mark.parametrize("frozen", [False, True])
def test_accumulated_gradient_is_that_of_the_sum(frozen):
    net, other = small(frozen), small(frozen)
    value = accumulated(parts_of(net), net)
    expected = sum(part() for part in parts_of(other))
    assert torch.allclose(value, expected, rtol=1e-12)
    for factor in (0.3, 2):
        (factor * value).backward(retain_graph=True)
        (factor * expected).backward(retain_graph=True)
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        if name != "unused":
            assert (p.grad is None) == (q.grad is None) and (q.grad is None or q.grad.abs().sum() > 0)
            assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-10)


def test_gradients_that_autograd_shares_are_summed_apart():
    """It gives both parameters of a sum one tensor."""
    net = nn.ParameterList([torch.ones(3), torch.ones(3)])
    parts = [lambda: (net[0] + net[1]).sum(), lambda: 2 * (net[0] + net[1]).sum(), lambda: 3 * net[0].sum()]
    accumulated(parts, net).backward()
    assert net[0].grad.tolist() == [6.0] * 3 and net[1].grad.tolist() == [3.0] * 3


def test_what_no_part_uses_gets_no_gradient():
    """An optimiser would shrink it by weight decay if it were zero."""
    net = small()
    accumulated(parts_of(net), net).backward()
    assert net.unused.grad is None


def test_accumulated_without_gradients_is_the_sum():
    net = small()
    expected = sum(part() for part in parts_of(net)).detach()
    with torch.no_grad():
        value = accumulated(parts_of(net), net)
    assert not value.requires_grad and torch.allclose(value, expected)
    value = accumulated(parts_of(net.requires_grad_(False)), net)
    assert not value.requires_grad and torch.allclose(value, expected)


def test_loss_without_gradients_is_the_same():
    x, y = batch()
    with torch.no_grad():
        loss = box_of().forward_process(x, y)
    assert not loss.requires_grad and torch.allclose(loss, box_of().forward_process(x, y))


class Saved:
    """What a graph keeps for its backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor


def saved_tensors(**options):
    """How many tensors graphs kept: the most in one step, after it, and after its backward pass."""
    alive, most = weakref.WeakSet(), 0

    def pack(tensor):
        nonlocal most
        alive.add(saved := Saved(tensor))
        most = max(most, len(alive))
        return saved

    box = box_of(**options)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = box.forward_process(*batch())
    after = len(alive)
    loss.backward()
    return most, after, len(alive)


def test_one_graph_at_a_time_is_alive():
    few, many = (saved_tensors(adversary=steps(count)) for count in (2, 10))
    assert few == many and many[2] == 0
    most, after, _ = many
    # the host's own pass is all that the step leaves
    assert 0 < after == saved_tensors(adversary=steps(2), iakd_weight=0, dbkd_weight=0)[1] < most


def resident(name):
    """MiB of this process: ``VmRSS`` now, ``VmHWM`` at most since the peak was reset."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def print_peaks():
    """MiB that a step takes on top of what was there before, with paths of 1 and of 10 examples."""
    torch.set_num_threads(1)
    x, y = torch.rand(16, 2, 64, 64), torch.arange(16) % NUM_CLASSES
    threat = {**THREAT, "mean": [0], "std": [1]}
    boxes = [
        box_of(student=network(2, width=40), double=False, adversary=steps(count), threat=threat) for count in (1, 10)
    ]
    for box in boxes:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak, which imports may have set
        before = resident("VmRSS")
        box.forward_process(x, y).backward()
        print(resident("VmHWM") - before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads and resets the peak in Linux's /proc")
def test_memory_hardly_grows_with_the_path():
    """The largest resident size in a step, less that before it; a graph of one step keeps 60 MiB."""
    command = [sys.executable, "-W", "ignore", "-c", f"import {__name__}; {__name__}.print_peaks()"]
    # what is freed goes back to the system, so that only what is kept counts
    options = {"cwd": Path(__file__).parent, "env": {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}}
    out = subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout
    one, ten = (float(word) for word in out.split())
    assert one > 60 and ten <= 1.5 * one


def of_rank(rank, world_size):
    """Value and gradient on this process's share of six images."""
    term_block = block(adversary=steps(3, start="none"), pairing="dataset", gamma=0.9)
    # without batch normalisation, whose statistics are those of a process's own images
    box = tiny_box({"darwin": term_block}, student=sharp(2, bn=False), teacher=sharp(1, bn=False), double=True)
    if world_size > 1:
        box.student_model = DistributedDataParallel(box.student_model)
    box.pre_epoch_process(epoch=0)
    some = slice(rank * 6 // world_size, (rank + 1) * 6 // world_size)
    loss = box.forward_process(*(v[some] for v in batch()), {name: v[some] for name, v in pairs().items()})
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in box.org_student_model.parameters()])


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    torch.save(of_rank(rank, 2), f"{folder}/{rank}.pt")
    leave_process_group()


def test_two_processes_are_one_on_the_joined_batch(tmp_path):
    """So the largest gap in the weights is that of all processes."""
    processes = mp.spawn(work, (str(tmp_path),), nprocs=2, join=False)
    deadline = time.monotonic() + 180
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < deadline, "the processes hang"
    finally:
        for process in processes.processes:
            process.kill()
    loss, gradient = of_rank(0, 1)
    losses, gradients = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True)
    assert torch.allclose(sum(losses) / 2, loss, rtol=1e-9)
    assert all(torch.allclose(g, gradient, atol=1e-9) for g in gradients) and gradient.abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_nearly_the_gradient_of_full(dtype):
    found = []
    for enabled in (False, True):
        box = box_of(double=False)
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            loss = box.forward_process(batch()[0].float(), batch()[1])
        loss.backward()
        found.append((loss.detach(), torch.cat([p.grad.flatten() for p in box.org_student_model.parameters()])))
    (loss, gradient), (half_loss, half_gradient) = found
    assert half_loss.dtype == torch.float32 and torch.allclose(loss, half_loss, rtol=0.05)
    assert torch.cosine_similarity(gradient, half_gradient, 0) > 0.95
    assert 0.9 < half_gradient.norm() / gradient.norm() < 1.1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dbkd_weight": 0},
        {"iakd_weight": 0, "dbkd_weight": 0},
        {"arkd_weight": 0},
        {"beta": 0},
        {"beta": 0, "dbkd_weight": 0},
        {"pairing": "dataset"},
        {"adversary": PARTICLES},
        {"adversary": "FGSM"},
        {"label_free": True},
    ],
    ids=str,
)
def test_announced_cost_is_the_measured_one(options):
    box = box_of(**options)
    counts = Counter()

    def count(name, module, inputs, output):
        counts[f"{name}_forward"] += len(output)
        if output.requires_grad:
            output.register_hook(lambda gradient: counts.update({f"{name}_backward": len(gradient)}))

    box.forward_process(*batch(), pairs())  # the first step also tries the networks on one image
    for name, net in [("student", box.org_student_model), ("teacher", box.org_teacher_model)]:
        net[0].register_forward_hook(functools.partial(count, name))
    box.forward_process(*batch(), pairs()).backward()
    darwin_term = term(box, "darwin")
    declared = [search.cost(6) for search in darwin_term.searches] + list(darwin_term.outer_cost(6).values())
    reads_clean = options.get("arkd_weight", 1) != 0
    host = Cost(teacher_forward=6, student_forward=6, student_backward=6 if reads_clean else 0)
    assert Cost(**counts) == functools.reduce(Cost.plus, declared, host)

"""Two gloo processes with DDP give the gradient of one process on the joined batch, and ranks agree on it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
from contract import ROWS, TwoTeachers, pairs
from tiny import KD, images, leave_process_group, network, on_adversarial, tald, tiny_box

import torchdistill_adv.binding
from torchdistill_adv.binding import Binding
from torchdistill_adv.noise import Noise

TERMS = {
    "kd": KD,
    "tald": tald(1.0),
    "joint": tald(1.0, forward="joint", include_clean=True),
    "adv": on_adversarial(KD, adversary={"key": "SVGD", "kwargs": {"num_particles": 3}}),
}


class SliceOfNoise(Noise):
    """The noise of the joined batch, of which each process takes that of its own images."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(0, dtype=torch.float64)
        self.rank, self.world_size = rank, world_size

    def uniform(self, shape):
        particles, local = shape[0] // (6 // self.world_size), 6 // self.world_size
        joined = super().uniform((particles, 6, *shape[1:]))
        return joined[:, self.rank * local : (self.rank + 1) * local].reshape(shape)


def gradient(rank: int, world_size: int, terms):
    # without batch normalisation, whose statistics are those of a process's own images
    box = tiny_box(terms, teacher=network(1, bn=False), student=network(2, bn=False), double=True)
    if world_size > 1:
        box.student_model = DistributedDataParallel(box.student_model)
    Binding.noise_for = lambda self, search, like: SliceOfNoise(rank, world_size)
    box.pre_epoch_process(epoch=0)
    x, y = images()
    some = slice(rank * 6 // world_size, (rank + 1) * 6 // world_size)
    box.forward_process(x[some].double(), y[some]).backward()
    return torch.cat([p.grad.flatten() for p in box.org_student_model.parameters()])


def work(rank: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    for name in names:
        torch.save(gradient(rank, 2, {name: TERMS[name]}), f"{folder}/{name}-{rank}.pt")
    leave_process_group()


def in_two_processes(worker, folder, names, seconds=180) -> None:
    processes = mp.spawn(worker, (str(folder), names), nprocs=2, join=False)
    # DDP that is called twice in a step does not fail, it hangs
    deadline = time.monotonic() + seconds
    try:
        while not processes.join(timeout=5):
            assert time.monotonic() < deadline, "the processes hang"
    finally:
        for process in processes.processes:
            process.kill()


def test_gradient_of_two_processes_is_that_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(Binding, "noise_for", Binding.noise_for)
    in_two_processes(work, tmp_path, list(TERMS))
    for name, sub_term in TERMS.items():
        expected = gradient(0, 1, {name: sub_term})
        for rank in range(2):
            assert torch.allclose(torch.load(tmp_path / f"{name}-{rank}.pt"), expected, atol=1e-5), name
        assert expected.abs().max() > 1e-4


def contract_gradients(folder: str, rank: int, name: str) -> None:
    """The gradient of this process's images alone, and that with DDP, for a row of the contract."""
    x, y = images(8, seed=1)
    x, y = x[4 * rank : 4 * rank + 4].double(), y[4 * rank : 4 * rank + 4]
    # every process has two classes, and one that no other has
    y = torch.tensor([0, 1, 0, 1]) if rank == 0 else torch.tensor([2, 3, 4, 2])
    for kind in ("alone", "ddp"):
        teacher = TwoTeachers(network(1, width=8, bn=False), network(3, width=8, bn=False))
        box = tiny_box({"term": ROWS[name]}, teacher=teacher, student=network(2, bn=False), double=True)
        if kind == "ddp":
            box.student_model = DistributedDataParallel(box.student_model)
        box.pre_epoch_process(epoch=0)
        box.forward_process(x, y, pairs(y, x.dtype)).backward()
        gradient = torch.cat([p.grad.flatten() for p in box.org_student_model.parameters()])
        torch.save(gradient, f"{folder}/{name}-{kind}-{rank}.pt")


def contract_work(rank: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    for name in names:
        contract_gradients(folder, rank, name)
    leave_process_group()


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """Both gradients of every row and process, from one pair of processes for all rows."""
    folder = tmp_path_factory.mktemp("ddp")
    in_two_processes(contract_work, folder, CONTRACT)
    return lambda name, kind, rank: torch.load(folder / f"{name}-{kind}-{rank}.pt")


# label-free DARWIN needs two predicted classes in each process, which four images of an untrained teacher need not have
CONTRACT = [name for name in ROWS if name != "DARWINLoss-LF"]


@pytest.mark.parametrize("name", CONTRACT)
def test_ddp_gives_every_rank_the_mean_of_the_gradients(name, gradients):
    first, second = (gradients(name, "ddp", rank) for rank in range(2))
    assert torch.equal(first, second)
    alone = [gradients(name, "alone", rank) for rank in range(2)]
    assert torch.allclose(first, (alone[0] + alone[1]) / 2, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(*alone, rtol=1e-3)


def test_noise_differs_by_rank(monkeypatch):
    box = tiny_box({"tald": tald()})
    box.pre_epoch_process(epoch=0)
    binding = box.adversarial_binding
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(torchdistill_adv.binding, "_rank", lambda rank=rank: rank)
        found.append(binding.noise_for(binding.terms[0].search, images()[0]).uniform((8,)))
    assert not torch.equal(*found)

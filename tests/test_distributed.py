"""Two gloo processes with DDP give the gradient of one process on the joined batch."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
from tiny import KD, images, network, on_adversarial, tald, tiny_box

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
    dist.destroy_process_group()


def test_gradient_of_two_processes_is_that_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(Binding, "noise_for", Binding.noise_for)
    processes = mp.spawn(work, (str(tmp_path), list(TERMS)), nprocs=2, join=False)
    # DDP that is called twice in a step does not fail, it hangs
    deadline = time.monotonic() + 180
    try:
        while not processes.join(timeout=5):
            assert time.monotonic() < deadline, "the processes hang"
    finally:
        for process in processes.processes:
            process.kill()
    for name, sub_term in TERMS.items():
        expected = gradient(0, 1, {name: sub_term})
        for rank in range(2):
            assert torch.allclose(torch.load(tmp_path / f"{name}-{rank}.pt"), expected, atol=1e-5), name
        assert expected.abs().max() > 1e-4


def test_noise_differs_by_rank(monkeypatch):
    box = tiny_box({"tald": tald()})
    box.pre_epoch_process(epoch=0)
    binding = box.adversarial_binding
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(torchdistill_adv.binding, "_rank", lambda rank=rank: rank)
        found.append(binding.noise_for(binding.terms[0].search, images()[0]).uniform((8,)))
    assert not torch.equal(*found)

"""What a second process brings on CPUs: a step of two Gloo processes, each with a batch, against a step of one.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py                              # ResNet-56 -> ResNet-20, batch 64 each
    OMP_NUM_THREADS=1 python benchmarks/scaling.py --batch-size 16 --repeats 7

The methods are those of ``steps.py``, KD and KD + TALD with the median bandwidth, with one thread a process. Both kinds
of step are timed in turn, the one process while the other waits, so that the machine's drift hits both alike. The
speed-up is the median over the turns of twice the time of one process over that of two, which have twice the images: 2
would be ideal. What the processes take from each other, such as memory bandwidth, is in it too, so run it on an idle
machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
from steps import Method, Step, Task, build_box, draw_batch, step_of
from torch.multiprocessing.spawn import spawn

from torchdistill_adv.runner.building import wrap_student
from torchdistill_adv.runner.processes import CPUDeviceIds, Place


def seconds(step: Step | None) -> float:
    """From where all processes are ready to where all are done; None waits."""
    dist.barrier()
    start = time.perf_counter()
    if step is not None:
        step()
    dist.barrier()
    return time.perf_counter() - start


def measure(rank: int, args: argparse.Namespace, folder: str) -> None:
    """Time both kinds of step in one of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    where = Place(torch.device("cpu"), CPUDeviceIds(), distributed=True, world_size=2)
    task = Task(args.teacher, args.student, args.batch_size, args.image_size, torch.device("cpu"))
    tald = Method.read("kd_tald_median")
    for num_particles in args.particles:
        method = tald.but(num_particles=num_particles) if num_particles else tald.host()
        alone, together = build_box(method, task), build_box(method, task)
        wrap_student(together, where)
        batch = draw_batch(method, task)
        one, both = step_of(alone, batch), step_of(together, batch)
        turns = [(seconds(one if rank == 0 else None), seconds(both)) for _ in range(args.repeats + 2)][2:]
        if rank == 0:
            name = f"KD + TALD, K = {num_particles}" if num_particles else "KD"
            one_ms, both_ms = (1000 * statistics.median(times) for times in zip(*turns, strict=True))
            ratios = [2 * single / double for single, double in turns]
            low, _, high = statistics.quantiles(ratios, n=4)
            speed_up = f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"
            print(f"| {name} | {one_ms:.1f} | {both_ms:.1f} | {speed_up} |", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="resnet56", help="a model registered with torchdistill")
    parser.add_argument("--student", default="resnet20", help="a model registered with torchdistill")
    parser.add_argument("--batch-size", type=int, default=64, help="of each process")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--particles", type=int, nargs="+", default=[0, 1, 2, 4], help="0 is KD alone")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    print(f"{args.teacher} -> {args.student}, batch {args.batch_size} a process, ", end="")
    print(f"{args.image_size} x {args.image_size}, torch {torch.__version__}, one thread a process")
    print(
        "| step | one process, ms | two processes, ms | speed-up, median (quartiles) |\n|---|---|---|---|", flush=True
    )
    with tempfile.TemporaryDirectory() as folder:
        spawn(measure, (args, folder), nprocs=2)


if __name__ == "__main__":
    main()

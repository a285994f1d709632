"""What TALD costs: milliseconds of a KD and of a KD + TALD step, against the bare passes that it cannot avoid.

    python benchmarks/tald_cost.py                                        # ResNet-56 -> ResNet-20, 32 x 32, batch 64
    python benchmarks/tald_cost.py --teacher small_cnn --student small_cnn --image-size 8 --channels 1

The *bare passes* of a step, written out plainly: KD's own; one forward and one backward pass to the input of the
teacher for the search step; one forward pass of the teacher and one forward and backward pass of the student on the
particles. The three are timed in turn within one process, step by step, so that the machine's drift hits all of them
alike; the ratio is the median over those turns. Peak memory is that of a process of its own (CPU) or of the allocator
(CUDA).
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import RandomSampler, TensorDataset
from torchdistill.core.distillation import DistillationBox, get_distillation_box
from torchdistill.models.registry import get_model

import torchdistill_adv  # noqa: F401

MEAN, STD = 0.5, 0.25
Step = Callable[[], None]


def networks(args: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """Teacher and student with random weights, which take as long as trained ones."""
    torch.manual_seed(0)

    def build(key: str) -> nn.Module:
        own = {"in_channels": args.channels} if key == "small_cnn" else {}
        model: nn.Module = get_model(key, num_classes=args.num_classes, **own)
        return model.to(args.device)

    return build(args.teacher), build(args.student)


def batch(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    pixels = torch.rand(args.batch_size, args.channels, args.image_size, args.image_size, device=args.device)
    return (pixels - MEAN) / STD, torch.randint(args.num_classes, (args.batch_size,), device=args.device)


def kd_box(args: argparse.Namespace, num_particles: int) -> DistillationBox:
    """torchdistill's box; 0 particles is KD alone."""
    sub_terms: dict[str, Any] = {
        "kd": {
            "criterion": {
                "key": "KDLoss",
                "kwargs": {
                    **{f"{who}_module_path": "." for who in ("student", "teacher")},
                    **{f"{who}_module_io": "output" for who in ("student", "teacher")},
                    "temperature": 4.0,
                    "alpha": 0.1,
                    "reduction": "batchmean",
                },
            },
            "weight": 1.0,
        }
    }
    if num_particles:
        kwargs = {
            "adversary": {"key": "SVGD", "kwargs": {"num_particles": num_particles, "bandwidth": "median"}},
            "threat": {"norm": "l2", "eps": 0.3, "space": "input", "mean": MEAN, "std": STD},
        }
        sub_terms["tald"] = {"criterion": {"key": "TALDLoss", "kwargs": kwargs}, "weight": 0.01}
    config = {
        "num_epochs": 1,
        "pre_epoch_process": "bind_adversarial_losses",
        "train_data_loader": {
            "dataset_id": "data",
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": {"batch_size": args.batch_size},
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 1e-3, "momentum": 0.9}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": sub_terms}},
    }
    data = {"data": TensorDataset(*(tensor.cpu() for tensor in batch(args)))}
    box: DistillationBox = get_distillation_box(*networks(args), data, config, args.device, None, False, 1)
    return box


def box_step(args: argparse.Namespace, num_particles: int) -> Step:
    """A step of :func:`kd_box`."""
    return step_of(kd_box(args, num_particles), args)


def step_of(box: DistillationBox, args: argparse.Namespace) -> Step:
    """A training step of a box, on one batch again and again."""
    box.pre_epoch_process(epoch=0)
    box.org_teacher_model.eval()
    x, y = batch(args)

    def step() -> None:
        box.post_forward_process(loss=box.forward_process(x, y, {}))

    return step


def bare_step(args: argparse.Namespace, num_particles: int) -> Step:
    """The passes that KD + TALD with one search step cannot avoid, and nothing else."""
    teacher, student = networks(args)
    teacher.requires_grad_(False).eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)
    x, y = batch(args)
    rows = x.repeat(num_particles, 1, 1, 1)

    def step() -> None:
        with torch.no_grad():
            soft = F.softmax(teacher(x) / 4, 1)
        loss = F.kl_div(F.log_softmax(student(x) / 4, 1), soft, reduction="batchmean")
        leaf = rows.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(teacher(leaf).square().sum(), leaf)
        with torch.no_grad():
            teacher(rows)
        loss = loss + 0 * gradient.sum() + F.cross_entropy(student(rows), y.repeat(num_particles))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def milliseconds(step: Step, device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)


def peak_memory(args: argparse.Namespace, num_particles: int) -> float:
    """MiB at the highest point of a few steps."""
    if args.device.type == "cuda":
        step = box_step(args, num_particles)
        torch.cuda.reset_peak_memory_stats(args.device)
        step()
        return torch.cuda.max_memory_allocated(args.device) / 2**20
    command = [sys.executable, *sys.argv, "--memory-of", str(num_particles)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="resnet56", help="a model registered with torchdistill")
    parser.add_argument("--student", default="resnet20", help="a model registered with torchdistill")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--num-classes", type=int, default=100)
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of is not None:
        step = box_step(args, args.memory_of)
        for _ in range(3):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    print(f"{args.teacher} -> {args.student}, batch {args.batch_size}, {args.image_size} x {args.image_size}, ", end="")
    print(f"{args.device}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| step | ms, median | / KD | / bare passes | peak memory, MiB |\n|---|---|---|---|---|")
    kd = box_step(args, 0)
    for num_particles in args.particles:
        tald, bare = box_step(args, num_particles), bare_step(args, num_particles)
        turns = [[milliseconds(step, args.device) for step in (kd, tald, bare)] for _ in range(args.repeats + 2)][2:]
        if num_particles == args.particles[0]:
            print(f"| KD | {statistics.median(t[0] for t in turns):.1f} | 1 | | {peak_memory(args, 0):.0f} |")
        of_kd, of_bare = (statistics.median(t[1] / t[i] for t in turns) for i in (0, 2))
        ms, memory = statistics.median(t[1] for t in turns), peak_memory(args, num_particles)
        print(f"| KD + TALD, K = {num_particles} | {ms:.1f} | {of_kd:.2f} | {of_bare:.3f} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()

"""PGD-20 on a test set: `evaluate` against torchattacks, on the same network and images.

    python benchmarks/attack_speed.py                                     # ResNet-20, random weights and images
    python benchmarks/attack_speed.py --model cifar_resnet18 --ckpt FILE.pt --images FILE.npz

Both make 20 steps of 2/255 on the cross-entropy inside 8/255, from one uniform start, and count by the last iterate;
torchattacks as its page shows it (attack a batch, ask the network), `evaluate` with all that it does besides: clean
accuracy, flags, its copy of the network. They take turns within one process, so that the machine's drift hits both
alike; ratios are medians over the turns. Accuracies are shares of the images that are classified rightly both without
and under the attack.

`evaluate` attacks only what is classified rightly. With *predictions* as the labels that is every image, so the ratio
is of the passes alone; with the *labels* of the data it is what a test set gives. Random images have no labels.

``FILE.npz`` has ``image`` (N, C, H, W) or (N, H, W, C), as bytes or as floats in [0, 1], and ``label`` (N,).
torchattacks (MIT) is needed here alone: ``pip install torchattacks requests``.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchdistill.models.registry import get_model

import torchdistill_adv  # noqa: F401
from torchdistill_adv.evaluation import PixelModel, evaluate

EPS, STEP_SIZE, NUM_STEPS = 8 / 255, 2 / 255, 20

# from images and labels to which of them are right
Attack = Callable[[Tensor, Tensor], Tensor]


def network(args: argparse.Namespace) -> nn.Module:
    """The network in eval mode, from pixels of [0, 1] to logits."""
    torch.manual_seed(0)
    block = {"key": args.model, "kwargs": {"num_classes": args.num_classes}}
    if args.ckpt:
        model = get_model("from_checkpoint", model=block, checkpoint=str(args.ckpt))
    else:
        model = get_model(args.model, num_classes=args.num_classes)
    # bare, it would be a network that data of its own normalisation belong to
    return nn.Sequential(PixelModel(model, args.mean, args.std)).to(args.device).eval()


def data(args: argparse.Namespace) -> tuple[Tensor, Tensor | None]:
    """Images (N, C, H, W) in pixels of [0, 1] and, where they are known, labels (N,)."""
    if args.images == "random":
        pixels = torch.rand(args.num_images, 3, args.image_size, args.image_size)
        return pixels.to(args.device), None
    with np.load(args.images) as pack:
        images, labels = (torch.from_numpy(pack[name][: args.num_images]) for name in ("image", "label"))
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    if pixels.shape[1] not in (1, 3):
        pixels = pixels.permute(0, 3, 1, 2).contiguous()
    return pixels.to(args.device), labels.long().to(args.device)


def ours(model: nn.Module, args: argparse.Namespace) -> Attack:
    name = f"pgd{NUM_STEPS}"

    def right(images: Tensor, labels: Tensor) -> Tensor:
        data, size = (images.cpu(), labels.cpu()), args.batch_size
        found = evaluate(model, data, attacks=name, eps=EPS, step_size=STEP_SIZE, batch_size=size)
        return torch.tensor(found.result(name).outcomes, device=args.device)

    return right


def theirs(model: nn.Module, args: argparse.Namespace) -> Attack:
    try:
        library = importlib.import_module("torchattacks")
    except ImportError as error:
        raise SystemExit(f"{error}; this benchmark needs it: pip install torchattacks requests") from error
    attack = library.PGD(model, eps=EPS, alpha=STEP_SIZE, steps=NUM_STEPS, random_start=True)

    def right(images: Tensor, labels: Tensor) -> Tensor:
        found = []
        for x, y in zip(images.split(args.batch_size), labels.split(args.batch_size), strict=True):
            examples = attack(x, y)
            with torch.no_grad():
                found.append(model(examples).argmax(1) == y)
        return torch.cat(found)

    return right


def seconds(attack: Attack, images: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """What it takes, and its outcomes."""
    start = time.perf_counter()
    right = attack(images, labels)
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - start, right


def row(model: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace, which: str) -> str:
    """A line of the table."""
    attacks = [build(model, args) for build in (theirs, ours)]
    with torch.no_grad():
        clean = torch.cat([model(x).argmax(1) for x in images.split(args.batch_size)]) == labels
    turns, accuracy = [], [0.0, 0.0]
    for turn in range(args.repeats):
        times = [0.0, 0.0]
        # whoever comes second finds warm caches
        for i in (0, 1) if turn % 2 == 0 else (1, 0):
            times[i], right = seconds(attacks[i], images, labels)
            accuracy[i] += 100 * float((right & clean).float().mean()) / args.repeats
        turns.append(times)
    ratio = statistics.median(their / our for their, our in turns)
    ms = [1000 * statistics.median(times[i] for times in turns) / len(images) for i in (0, 1)]
    cells = [which, f"{ms[0]:.1f}", f"{ms[1]:.1f}", f"{ratio:.2f}", f"{accuracy[0]:.1f}", f"{accuracy[1]:.1f}"]
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20", help="a model registered with torchdistill")
    parser.add_argument("--ckpt", type=Path, help="its weights; random ones without")
    parser.add_argument("--images", default="random", help="FILE.npz, or random")
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=32, help="of random images")
    parser.add_argument("--num-classes", type=int, default=10)
    parser.add_argument("--mean", type=float, nargs="+", default=[0.4914, 0.4822, 0.4465])
    parser.add_argument("--std", type=float, nargs="+", default=[0.2470, 0.2435, 0.2616])
    parser.add_argument(
        "--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    args = parser.parse_args(argv)
    model = network(args)
    images, labels = data(args)
    with torch.no_grad():
        predictions = torch.cat([model(part).argmax(1) for part in images.split(args.batch_size)])
    weights = args.ckpt.name if args.ckpt else "random weights"
    on = f"{args.device}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    shape = " x ".join(map(str, images.shape[1:]))
    print(f"{args.model}, {weights}, {len(images)} images {shape}, batches of {args.batch_size}, {on}\n")
    print("| labels | torchattacks, ms an image | ours, ms an image | ratio | torchattacks, % right | ours, % right |")
    print("|---|---|---|---|---|---|")
    print(row(model, images, predictions, args, "predictions: all are right"), flush=True)
    if labels is not None:
        share = 100 * float((predictions == labels).float().mean())
        print(row(model, images, labels, args, f"of the data: {share:.1f} % are right"), flush=True)


if __name__ == "__main__":
    main()

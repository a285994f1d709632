"""Accuracy of published CIFAR-10 weights, robust and not: does the evaluation tell them apart as published?

    OMP_NUM_THREADS=1 python benchmarks/published_weights.py --data FOLDER --num_images 500

``FOLDER`` holds ``realdata.py``, with ``JpegPack(name)`` for images and ``pretrained(name)`` for networks that take
pixels of [0, 1], and what they read; it is no part of this project. The table goes to ``docs/published_weights.md``.
Results are kept in ``results/published_weights``; an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from torchvision.transforms import ToTensor

from torchdistill_adv.evaluation import Evaluation, evaluate
from torchdistill_adv.evaluation.results import describe_eps

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "published_weights.md"
# PGD-10 in percent at 2/255 and 8/255, measured on the same JPEG images by whoever collected the weights
KNOWN: Mapping[str, Mapping[str, float]] = {
    "c10_resnet20_akamaster": {"clean": 81.0, "8/255": 0.0},
    "c10_resnet56_akamaster": {"clean": 83.7, "8/255": 0.0},
    "c10_resnet26_bss": {"clean": 84.0, "8/255": 0.0},
    "c10_resnet4b_abcrown": {"clean": 76.5, "2/255": 62.3, "8/255": 18.6},
    "c10_oval_wide_abcrown": {"clean": 61.1, "2/255": 54.1, "8/255": 28.2},
}
RADII = ["2/255", "8/255"]
INTRODUCTION = """# Published weights, robust and not

`{command}`
writes this page: {images} images of the CIFAR-10 test set, stored as JPEG of quality 75 (which costs networks trained
on the lossless images about ten points), l-infinity, steps of a quarter of the radius. The first three networks are by
plain training ([akamaster](https://github.com/akamaster/pytorch_resnet_cifar10),
[BSS](https://github.com/bhheo/BSS_distillation)), the last two by adversarial training
([alpha-beta-CROWN](https://github.com/Verified-Intelligence/alpha-beta-CROWN)). *Known* are figures measured before on
the same images, for clean accuracy and PGD-10; seconds are of a busy machine.
"""


def table(found: Mapping[str, Evaluation]) -> str:
    """Markdown: a row for every network, attack and radius, beside the figure that is known."""
    lines = [
        "| network | attack | eps | accuracy, % | 95 % interval | known | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, evaluation in found.items():
        for r in evaluation.results:
            radius = describe_eps(r.eps, "linf") if r.eps else ""
            known = KNOWN[name].get("clean" if r.attack == "clean" else radius if r.attack == "pgd10" else "")
            low, high = r.interval
            lines.append(
                f"| {name} | {r.attack} | {radius} | {r.accuracy:.1f} | {low:.1f} to {high:.1f} "
                f"| {'' if known is None else known} | {r.seconds:.0f} |"
            )
    return "\n".join(lines)


def write_page(found: Mapping[str, Evaluation], command: str) -> None:
    flags = [f"* {name}: {flag.name}: {flag.message}" for name, e in found.items() for flag in e.flags]
    images = {len(e.results[0].outcomes) for e in found.values()}
    head = INTRODUCTION.format(command=command, images=" or ".join(map(str, sorted(images))))
    PAGE.write_text(f"{head}\n{table(found)}\n\nFlags:\n\n{chr(10).join(flags) or 'none'}\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with realdata.py")
    parser.add_argument("--num_images", type=int, default=500)
    parser.add_argument("--attacks", default="clean,fgsm,pgd10,autoattack")
    parser.add_argument("--networks", nargs="+", default=list(KNOWN), choices=list(KNOWN))
    parser.add_argument("--folder", type=Path, default=Path("results/published_weights"))
    args = parser.parse_args(argv)
    sys.path.insert(0, str(args.data))
    real = importlib.import_module("realdata")
    data = real.JpegPack("cifar10_jpeg_test", transform=ToTensor())
    found = {}
    for name in args.networks:
        journal = args.folder / f"{name}.journal.jsonl"
        options = {"eps": RADII, "num_images": args.num_images, "journal": journal}
        found[name] = evaluate(real.pretrained(name), data, attacks=args.attacks, **options)
        found[name].write(args.folder / f"{name}.json")
        print(name, found[name].table(), sep="\n", flush=True)
        given = f"--num_images {args.num_images} --attacks {args.attacks}"
        write_page(found, f"OMP_NUM_THREADS=1 python benchmarks/published_weights.py --data FOLDER {given}")


if __name__ == "__main__":
    main()

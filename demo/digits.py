"""The main job: distil a small network on handwritten digits, with and without TALD, and look at the particles.

    make demo

trains a teacher, then students with KD and with KD + TALD over three seeds; prints a table of test accuracy, loss terms
and seconds; and draws the adversarial particles of a few images. Everything is written to ``results/demo``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.models.registry import get_model

from torchdistill_adv.noise import Noise
from torchdistill_adv.objectives import Objective, View
from torchdistill_adv.registry import build_adversary
from torchdistill_adv.runner import run
from torchdistill_adv.threat import ThreatModel

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "digits"
METHODS = {"KD": "kd.yaml", "KD + TALD": "kd_tald.yaml"}


def train_all(folder: Path, seeds: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """The teacher once and every method with every seed; results by method."""
    teacher_ckpt = str(folder / "teacher.pt")
    print("teacher ...", end=" ", flush=True)
    teacher = run(CONFIGS / "ce_teacher.yaml", seed=0, overrides={"models.model.dst_ckpt": teacher_ckpt})
    print(f"{teacher['test']['student']['top1']:.1f} % on the test set, {teacher['seconds']:.0f} s")
    results: dict[str, list[dict[str, Any]]] = {"teacher": [teacher]}
    for seed in seeds:
        for method, config in METHODS.items():
            print(f"seed {seed}, {method} ...", end=" ", flush=True)
            overrides = {
                "models.teacher_model.src_ckpt": teacher_ckpt,
                "models.student_model.dst_ckpt": str(folder / f"{Path(config).stem}-{seed}.pt"),
            }
            result = run(CONFIGS / config, seed=seed, student_only=True, overrides=overrides)
            print(f"{result['test']['student']['top1']:.1f} %, {result['seconds']:.0f} s")
            results.setdefault(method, []).append(result)
    return results


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f}"


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: test accuracy, mean weighted loss terms of the last epoch, seconds a run."""
    lines = [
        "| method | runs | test accuracy, % | loss terms in the last epoch (weighted) | seconds |",
        "|---|---|---|---|---|",
    ]
    for method, runs in results.items():
        accuracy = spread([r["test"]["student"]["top1"] for r in runs])
        names = runs[0]["epochs"][-1]["terms"]
        terms = ", ".join(f"{n} {statistics.mean(r['epochs'][-1]['terms'][n] for r in runs):.3g}" for n in names)
        seconds = spread([r["seconds"] for r in runs])
        lines.append(f"| {method} | {len(runs)} | {accuracy} | {terms} | {seconds} |")
    return "\n".join(lines)


def particles(teacher: nn.Module, images: Tensor, options: dict[str, Any]) -> Tensor:
    """The particles that TALD finds for ``images`` (N, 1, H, W), as (K, N, 1, H, W)."""
    threat = ThreatModel.build(options["threat"])
    noise = Noise(0)
    view = View(images, None, teacher, teacher, noise)
    objective = Objective.build(options["objective"]).bind(view)
    examples = build_adversary(options["adversary"])(objective, images, threat, noise)
    return examples.rows.view(-1, *images.shape)


def draw(folder: Path, num_images: int = 4) -> Path:
    """A picture of the particles of the first test images, with their differences from the clean image."""
    from matplotlib import pyplot as plt

    config = load_yaml_file(str(CONFIGS / "kd_tald.yaml"))
    model = config["models"]["teacher_model"]
    teacher = get_model(model["key"], **model["kwargs"])
    teacher.load_state_dict(torch.load(folder / "teacher.pt", weights_only=False)["model"])
    teacher.eval()
    data = config["datasets"]["digits/test"]
    images = torch.stack([data[i][0] for i in range(num_images)])
    options = config["train"]["criterion"]["kwargs"]["sub_terms"]["tald"]["criterion"]["kwargs"]
    found = particles(teacher, images, options)
    mean, std = options["threat"]["mean"][0], options["threat"]["std"][0]

    def label(rows: Tensor) -> list[str]:
        with torch.no_grad():
            confidence, prediction = teacher(rows).softmax(1).max(1)
        return [f"{p}: {100 * c:.0f} %" for p, c in zip(prediction.tolist(), confidence.tolist(), strict=True)]

    count = len(found)
    figure, axes = plt.subplots(
        num_images, 1 + 2 * count, figsize=(1.25 * (1 + 2 * count), 1.45 * num_images + 0.8), layout="constrained"
    )
    differences = (found - images) * std
    limit = float(differences.abs().max())
    for i, row in enumerate(axes):
        shown = [images[i], *found[:, i]]
        for axis, image, title in zip(row[: 1 + count], shown, label(torch.stack(shown)), strict=True):
            axis.imshow(image[0] * std + mean, cmap="gray", vmin=0, vmax=1)
            axis.set_title(title, fontsize=8)
        for axis, difference in zip(row[1 + count :], differences[:, i], strict=True):
            last = axis.imshow(difference[0], cmap="RdBu_r", vmin=-limit, vmax=limit)
            axis.set_title(f"l2 {float(difference.norm()):.3f}", fontsize=8)
        for axis in row:
            axis.set_axis_off()
    figure.suptitle(
        f"clean image | {count} SVGD particles, with the teacher's prediction | particle - clean, in pixels of [0, 1]",
        fontsize=10,
    )
    figure.colorbar(last, ax=axes[:, 1 + count :].ravel().tolist(), shrink=0.8)
    path = folder / "particles.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("results/demo"))
    args = parser.parse_args()
    start = time.perf_counter()
    torch.set_num_threads(1)  # images of 8 x 8 are too small to share between threads
    args.folder.mkdir(parents=True, exist_ok=True)
    results = train_all(args.folder, args.seeds)
    text = table(results)
    (args.folder / "table.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\npicture: {draw(args.folder)}\ntotal: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()

"""Robust accuracy of every method's student on the handwritten digits, all from one TRADES teacher.

    OMP_NUM_THREADS=1 python benchmarks/robust_digits.py --jobs 2

trains the teachers of ``configs/digits/robust``, then every other config there with every seed, attacks the students
of the last epoch with PGD-20 on the test set, and writes the table to ``docs/robust_digits.md`` as it goes. Each
finished run is a file in ``results/robust_digits``, and is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.models.registry import get_model

from torchdistill_adv.adversaries import PGD
from torchdistill_adv.noise import Noise
from torchdistill_adv.objectives import Objective, View
from torchdistill_adv.runner import run
from torchdistill_adv.threat import ThreatModel

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "digits" / "robust"
ROBUST_TEACHER = CONFIGS / "trades_teacher.yaml"
TEACHERS = sorted(CONFIGS.glob("*_teacher.yaml"))
STUDENTS = sorted(set(CONFIGS.glob("*.yaml")) - set(TEACHERS))
PAGE = ROOT / "docs" / "robust_digits.md"
COMMAND = "OMP_NUM_THREADS=1 python benchmarks/robust_digits.py --jobs 2"


def test_set(config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """All test images (N, 1, 8, 8) and labels (N,)."""
    data = config["datasets"][config["test"]["test_data_loader"]["dataset_id"]]
    images, labels = zip(*data, strict=True)
    return torch.stack(images), torch.tensor(labels)


def accuracies(network: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel) -> dict[str, float]:
    """Clean accuracy, and that under PGD-20 from one uniform start with steps of a quarter of the radius; percent."""
    network.eval()
    noise = Noise(0)
    objective = Objective.build("ce_student").bind(View(images, labels, network, None, noise))
    attacked = PGD(20, threat.eps / 4)(objective, images, threat, noise).rows
    with torch.no_grad():
        hits = {name: network(rows).argmax(1) == labels for name, rows in (("clean", images), ("pgd20", attacked))}
    return {name: 100 * float(hit.float().mean()) for name, hit in hits.items()}


def threat_of(config: Mapping[str, Any]) -> ThreatModel:
    """The threat model of the teacher's training, under which everything is attacked."""
    [term] = config["train"]["criterion"]["kwargs"]["sub_terms"].values()
    return ThreatModel.build(term["criterion"]["kwargs"]["threat"])


def one_run(path: Path, seed: int, folder: Path) -> Path:
    """Train and attack one config with one seed; the file with the result."""
    torch.set_num_threads(1)  # images of 8 x 8 are too small to share between threads
    file = folder / f"{path.stem}-{seed}.json"
    if file.exists():
        return file
    config = load_yaml_file(str(path))
    name = "model" if "model" in config["models"] else "student_model"
    checkpoint = folder / f"{path.stem}-{seed}.pt"
    # without validation the runner saves every epoch's student, so the last one is left
    overrides = {f"models.{name}.dst_ckpt": str(checkpoint), "train.val_data_loader": {}, "train.robust_validation": {}}
    if "teacher_model" in config["models"]:
        overrides |= teacher_overrides(config["models"]["teacher_model"], folder)
    start = time.perf_counter()
    run(path, seed=seed, student_only=True, overrides=overrides)
    seconds = time.perf_counter() - start
    network = get_model(config["models"][name]["key"], **config["models"][name]["kwargs"])
    network.load_state_dict(torch.load(checkpoint, map_location="cpu")["model"])
    found = accuracies(network, *test_set(config), threat_of(load_yaml_file(str(ROBUST_TEACHER))))
    result = {"config": path.stem, "seed": seed, "seconds": seconds, **found}
    file.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return file


def teacher_overrides(block: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The teachers' checkpoints of this study in the place of those that the config names."""

    def places(node: Any, path: str) -> Iterator[tuple[str, str]]:
        for key, value in node.items() if isinstance(node, Mapping) else ():
            if key in ("src_ckpt", "checkpoint") and isinstance(value, str):
                yield f"{path}.{key}", str(folder / f"{Path(value).stem}-0.pt")
            else:
                yield from places(value, f"{path}.{key}")

    return dict(places(block, "models.teacher_model"))


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, the most robust method first."""
    rows = {}
    for name in dict.fromkeys(r["config"] for r in results):
        runs = [r for r in results if r["config"] == name]
        clean, robust, seconds = ([r[key] for r in runs] for key in ("clean", "pgd20", "seconds"))
        label = f"[{name}](../configs/digits/robust/{name}.yaml)"
        rows[name] = (
            statistics.mean(robust),
            f"| {label} | {len(runs)} | {spread(clean)} | {spread(robust)} | {statistics.median(seconds):.0f} |",
        )
    ordered = [line for _, line in sorted(rows.values(), reverse=True)]
    return "\n".join(["| config | seeds | clean, % | PGD-20, % | seconds, median |", "|---|---|---|---|---|", *ordered])


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def write_page(results: Sequence[Mapping[str, Any]]) -> None:
    config = load_yaml_file(str(ROBUST_TEACHER))
    images, _ = test_set(config)
    # of one accuracy of about one half, as the images of a test set are drawn at random too
    interval = 196 * math.sqrt(0.25 / len(images))
    PAGE.write_text(
        "# Robust students on the handwritten digits\n\n"
        f"`{COMMAND}` writes this page:\n"
        f"mean and standard deviation over the seeds, on {len(images)} test images, of the last epoch, within\n"
        f"{threat_of(config).describe()}. PGD-20 has one uniform start and steps of a quarter of the radius.\n\n"
        f"One accuracy near 50 % has a 95 % interval of ± {interval:.1f} from the images alone, so neighbours in this\n"
        "table do not differ: it shows that every method works, not which one is best. The networks are small and\n"
        "trained for a few epochs, and nothing here is a number of a paper. Seconds are of training, two runs at a\n"
        "time on a busy machine.\n\n"
        f"{table(results)}\n",
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--folder", type=Path, default=Path("results/robust_digits"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    files = [one_run(path, 0, args.folder) for path in TEACHERS]
    with ProcessPoolExecutor(args.jobs) as pool:
        waiting = [pool.submit(one_run, path, seed, args.folder) for seed in args.seeds for path in STUDENTS]
        for number, done in enumerate(as_completed(waiting), 1):
            files.append(done.result())
            print(f"{number}/{len(waiting)} {files[-1].stem}", flush=True)
            # a study that is stopped leaves the table of what it has done
            write_page([json.loads(file.read_text(encoding="utf-8")) for file in files])
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

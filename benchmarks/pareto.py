"""Accuracy against seconds: searches in ``auto`` against plain float32 ones, and ``fast`` against full.

    OMP_NUM_THREADS=1 python benchmarks/pareto.py --jobs 2                      # on the digits
    OMP_NUM_THREADS=1 python benchmarks/pareto.py --jobs 2 --images FILE.npz    # and on colour images

Each study trains its teacher, then every variant with every seed, and attacks the students of the last epoch with
PGD-20 where the method is a robust one. Each finished run is a file in ``results/pareto``, and is not run again; one
that was interrupted goes on.

Runs go side by side, so they are not timed. The clock runs when they are done: the trained students go on for a few
steps in each epoch of the schedule, all variants in turn, so that the machine's drift hits all of them alike. The
results are in ``docs/speed_accuracy.md`` and its picture.

FILE.npz has the arrays ``image`` (N, 32, 32, 3) of type uint8 and ``label`` (N,), 10 classes, such as CIFAR-10: the
first 3,000 images are trained on, the last 2,000 are the test set.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from robust_digits import accuracies, spread, test_set
from torch import Tensor
from torch.utils.data import Dataset
from torchdistill.core.distillation import DistillationBox, get_distillation_box
from torchdistill.models.registry import get_model
from torchvision import transforms

from torchdistill_adv.binding import bind
from torchdistill_adv.report.style import LIGHT, look, render
from torchdistill_adv.runner import run
from torchdistill_adv.runner.config import TaggedYAML, plain_config, prepare_config
from torchdistill_adv.threat import ThreatModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "speed_accuracy.md"
PICTURE = PAGE.with_suffix(".png")
COMMAND = "OMP_NUM_THREADS=1 python benchmarks/pareto.py --jobs 2"
NUM_TRAIN, NUM_TEST = 3000, 2000
CLOCKED_STEPS = 4  # of each epoch; a multiple of every ``every``
TURNS = 3  # of which the median counts

SUB_TERMS = "train.criterion.kwargs.sub_terms"
PLAIN_SEARCH = {"precision": "float32", "channels_last": False, "fold": False, "compile": False}


# what is compared


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Args:
        name: in the table.
        config: of ``configs/``, without the extension.
        overrides: of that configuration.
        reference: the variant that it should equal in accuracy.
    """

    name: str
    config: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    reference: str = ""

    @property
    def slug(self) -> str:
        return "".join(letter if letter.isalnum() else "_" for letter in self.name)


@dataclass(frozen=True)
class Study:
    """Variants with one teacher and the same images.

    Args:
        name: of its files.
        title: on the page.
        teacher: configuration of the teacher.
        variants: what is compared.
        threat: what the students are attacked within; None for methods of clean accuracy.
        shared: overrides of every configuration that has the block.
    """

    name: str
    title: str
    teacher: str
    variants: tuple[Variant, ...]
    threat: ThreatModel | None = None
    shared: Mapping[str, Any] = field(default_factory=dict)

    @property
    def measure(self) -> str:
        """The accuracy that counts."""
        return "clean" if self.threat is None else "pgd20"


def options(term: str, **values: Any) -> dict[str, Any]:
    """Overrides of a term's options."""
    return {f"{SUB_TERMS}.{term}.criterion.kwargs.{name}": value for name, value in values.items()}


def robust_variants(folder: str, suffix: str, step_size: Any) -> tuple[Variant, ...]:
    """AdaAD and RSLAD in ten steps, each in float32 and in ``auto``, and AdaAD ``fast``."""
    found = []
    for name, label in (("adaad", "AdaAD"), ("rslad", "RSLAD")):
        kwargs = {"num_steps": 10, "step_size": step_size, "start": "gaussian"}
        ten = options(name, adversary={"key": "PGD", "kwargs": kwargs})
        plain = Variant(f"{label}-10, float32", f"{folder}/{name}{suffix}", ten | options(name, search=PLAIN_SEARCH))
        found += [plain, Variant(f"{label}-10", plain.config, ten, plain.name)]
    return (*found, Variant("AdaAD fast", f"{folder}/adaad_fast{suffix}", reference=found[0].name))


def clean_variants(folder: str, suffix: str, batch_size: int) -> tuple[Variant, ...]:
    """KD alone and with TALD: in full, ``fast``, and with a part of every batch in place of a part of the steps."""
    full, fast = (f"{folder}/kd_tald_{form}{suffix}" for form in ("paper", "fast"))
    subset = options("tald", every=1, num_attacked=batch_size // 4)
    return (
        Variant("KD", f"{folder}/kd{suffix}"),
        Variant("KD + TALD", full),
        Variant("KD + TALD fast", fast, reference="KD + TALD"),
        Variant("KD + TALD, a quarter of the batch", fast, subset, "KD + TALD"),
    )


def digits_studies() -> Iterator[Study]:
    threat = ThreatModel(0.15, mean=(0.0,), std=(1.0,))
    robust = robust_variants("digits/robust", "", 0.0375)
    yield Study("digits_robust", "Robust students, digits", "digits/robust/trades_teacher", robust, threat)
    clean = clean_variants("digits", "", 32)
    yield Study("digits_clean", "TALD, digits", "digits/ce_teacher", clean)


def image_studies(file: Path) -> Iterator[Study]:
    """The configurations of CIFAR with a small network, few images and few epochs."""
    threat = ThreatModel(8 / 255, mean=(0.0,), std=(1.0,))
    network = {"key": "small_cnn", "kwargs": {"num_classes": 10, "in_channels": 3, "width": 16, "depth": 6}}
    models = ("model", "teacher_model", "student_model")
    shared = {f"models.{name}.{key}": value for name in models for key, value in network.items()}
    schedule: dict[str, Any] = {
        "train.num_epochs": 6,
        "train.scheduler.kwargs.milestones": [4, 5],
        "train.optimizer.kwargs.lr": 0.05,
        "train.train_data_loader.kwargs": {"batch_size": 64, "num_workers": 0, "drop_last": True},
        "test.test_data_loader.kwargs": {"batch_size": 500, "num_workers": 0},
    }

    def images(split: str, is_normalised: bool) -> TaggedYAML:
        kwargs = f"{{file: '{file}', split: '{split}', is_normalised: {is_normalised}}}"
        return TaggedYAML(f"!import_call {{key: 'pareto.Pixels', init: {{kwargs: {kwargs}}}}}")

    robust = robust_variants("cifar10/trades", "-resnet18", "2/255")
    plain = {f"datasets.cifar10/{split}": images(split, False) for split in ("train", "val", "test")}
    teacher = "cifar10/trades_teacher-wrn34_10"
    yield Study("images_robust", "Robust students, images", teacher, robust, threat, {**shared, **schedule, **plain})
    normalised = {f"datasets.cifar100/{split}": images(split, True) for split in ("train", "test")}
    clean = clean_variants("cifar100", "-resnet20_from_resnet56", 64)
    yield Study(
        "images_clean", "TALD, images", "cifar100/ce-resnet56", clean, None, {**shared, **schedule, **normalised}
    )


# images


class Pixels(Dataset[tuple[Tensor, int]]):
    """A part of the images of a file, cropped and flipped at random for training.

    Args:
        file: .npz file.
        split: ``train``, or ``val`` and ``test``, which are the same: nothing is chosen by either.
        is_normalised: by the mean and standard deviation of the CIFAR-100 configurations.
    """

    def __init__(self, file: str, split: str, is_normalised: bool) -> None:
        part = slice(NUM_TRAIN) if split == "train" else slice(-NUM_TEST, None)
        with np.load(file) as arrays:
            self.images, self.targets = arrays["image"][part], arrays["label"][part].tolist()
        self.classes = list(map(str, range(10)))
        steps: list[Any] = [transforms.ToTensor()]
        if is_normalised:
            steps.append(transforms.Normalize([0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]))
        if split == "train":
            steps = [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), *steps]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.targets[index]


# runs


def overrides_of(study: Study, config: str, checkpoint: Path, folder: Path) -> dict[str, Any]:
    """What a configuration has of its own in this study: images, networks, schedule, files."""
    plain = plain_config(path_of(config))

    def has_block(path: str) -> bool:
        part, block = path.split(".")[:2]
        return block in plain[part]

    files = {"models.model.dst_ckpt": str(checkpoint), "models.student_model.dst_ckpt": str(checkpoint)}
    files["models.teacher_model.src_ckpt"] = str(folder / f"{study.name}-teacher.pt")
    # without validation the runner saves every epoch's student, so the last one is left
    unused: dict[str, Any] = {"train.val_data_loader": {}, "train.robust_validation": {}}
    return {path: value for path, value in {**study.shared, **files, **unused}.items() if has_block(path)}


def path_of(config: str) -> Path:
    return ROOT / "configs" / f"{config}.yaml"


def train_teacher(study: Study, folder: Path) -> None:
    checkpoint = folder / f"{study.name}-teacher.pt"
    if not checkpoint.with_suffix(".json").exists():
        overrides = overrides_of(study, study.teacher, checkpoint, folder)
        result = run(path_of(study.teacher), seed=0, overrides=overrides, resume=True)
        checkpoint.with_suffix(".json").write_text(json.dumps(result["test"]), encoding="utf-8")


def one_run(study: Study, variant: Variant, seed: int, folder: Path) -> Path:
    """Train and attack one variant with one seed; the file with the result."""
    file = folder / f"{study.name}-{variant.slug}-{seed}.json"
    if file.exists():
        return file
    checkpoint = file.with_suffix(".pt")
    overrides = overrides_of(study, variant.config, checkpoint, folder) | dict(variant.overrides)
    result = run(path_of(variant.config), seed=seed, student_only=True, overrides=overrides, resume=True)
    found = {"clean": result["test"]["student"]["top1"]}
    if study.threat is not None:
        config = prepare_config(path_of(variant.config), overrides)
        block = config["models"]["student_model"]
        network = get_model(block["key"], **block["kwargs"])
        network.load_state_dict(torch.load(checkpoint, map_location="cpu")["model"])
        found = accuracies(network, *test_set(config), study.threat)
    file.write_text(json.dumps({"variant": variant.name, "seed": seed, **found}, indent=1), encoding="utf-8")
    return file


# the clock


def box_of(study: Study, variant: Variant, seed: int, folder: Path) -> DistillationBox:
    """The box of a variant, with its student of one seed, which stays as it is."""
    checkpoint = folder / f"{study.name}-{variant.slug}-{seed}.pt"
    overrides = overrides_of(study, variant.config, checkpoint, folder) | dict(variant.overrides)
    config = prepare_config(path_of(variant.config), overrides | {"train.optimizer.kwargs.lr": 0.0})
    networks = []
    for name, key in (("teacher_model", "src_ckpt"), ("student_model", "dst_ckpt")):
        block = config["models"][name]
        network = get_model(block["key"], **block["kwargs"])
        network.load_state_dict(torch.load(block[key], map_location="cpu")["model"])
        networks.append(network.train(name == "student_model"))
    device = torch.device("cpu")
    box: DistillationBox = get_distillation_box(*networks, config["datasets"], config["train"], device, None, False, 1)
    return box


def clock(study: Study, seed: int, folder: Path) -> dict[str, float]:
    """Seconds of training, by variant: of a few steps in each epoch, times the number of steps."""
    file = folder / f"{study.name}-seconds.json"
    if file.exists():
        found: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
        return found
    boxes = {variant.name: box_of(study, variant, seed, folder) for variant in study.variants}
    first = next(iter(boxes.values()))
    batches = list(islice(first.train_data_loader, CLOCKED_STEPS))

    def turn(epoch: int) -> dict[str, float]:
        """Seconds of a few steps of every variant."""
        seconds = dict.fromkeys(boxes, 0.0)
        for box in boxes.values():
            bind(box, epoch)
        for images, labels, supp_dict in batches:
            for name, box in boxes.items():
                start = time.perf_counter()
                box.post_forward_process(loss=box.forward_process(images, labels, supp_dict))
                seconds[name] += time.perf_counter() - start
        return seconds

    turn(0)  # warms up
    epochs = [[turn(epoch) for _ in range(TURNS)] for epoch in range(first.num_epochs)]
    factor = len(first.train_data_loader) / CLOCKED_STEPS
    result = {name: factor * sum(statistics.median(t[name] for t in turns) for turns in epochs) for name in boxes}
    file.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


# the page


@dataclass(frozen=True)
class Found:
    """What a study found.

    Args:
        study: what was compared.
        results: by variant, a run of each seed.
        seconds: of training, by variant.
    """

    study: Study
    results: Mapping[str, Sequence[Mapping[str, Any]]]
    seconds: Mapping[str, float]

    def values(self, name: str) -> list[float]:
        """The accuracy that counts, of a variant with every seed."""
        return [result[self.study.measure] for result in self.results[name]]

    def difference(self, variant: Variant) -> str:
        """What a variant gains on its reference, each seed with itself."""
        pairs = zip(self.values(variant.name), self.values(variant.reference), strict=True)
        return f"{spread([own - other for own, other in pairs])} to {variant.reference}"


def table(found: Found) -> str:
    """Markdown, a variant a line."""
    study, seconds = found.study, found.seconds
    first = study.variants[0].name
    columns = {"clean": "clean, %"} | ({} if study.threat is None else {"pgd20": "PGD-20, %"})
    lines = [["variant", "seeds", *columns.values(), "difference", "seconds", f"times {first}", "times faster"]]
    lines.append(["---"] * len(lines[0]))
    for variant in study.variants:
        runs, time_of = found.results[variant.name], seconds[variant.name]
        accuracy = [spread([run[column] for run in runs]) for column in columns]
        difference, faster = "", ""
        if variant.reference:
            difference, faster = found.difference(variant), f"{seconds[variant.reference] / time_of:.2f}"
        times = [f"{time_of:.0f}", f"{time_of / seconds[first]:.2f}", faster]
        label = f"[{variant.name}](../configs/{variant.config}.yaml)"
        lines.append([label, str(len(runs)), *accuracy, difference, *times])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw(all_found: Sequence[Found]) -> Figure:
    """A panel a study: seconds of training to the right, accuracy upwards, bars of one deviation."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(all_found) / 2)
    figure = Figure(figsize=(10.4, 3.6 * rows))
    panels = figure.subplots(rows, 2, squeeze=False).flat
    for found, axes in zip(all_found, panels, strict=False):
        for number, variant in enumerate(found.study.variants):
            values = found.values(variant.name)
            error = statistics.stdev(values) if len(values) > 1 else 0
            place = found.seconds[variant.name], statistics.mean(values)
            axes.errorbar(*place, error, label=variant.name, linestyle="none", capsize=3, **look(number))
        axes.set(title=found.study.title, xlabel="seconds of training")
        axes.set_xlim(left=0)
        axes.set_ylabel("clean accuracy, %" if found.study.threat is None else "PGD-20 accuracy, %")
        axes.legend(fontsize="small")
    for axes in panels:
        axes.axis("off")
    return figure


TEXT = Template(
    """\
# Accuracy against seconds

`$command` writes this page, with `--images FILE.npz` for the
studies on images. Mean and standard deviation over the seeds, of the last epoch; a difference is that of two students
of one seed, and *times faster* is against the same variant. PGD-20 has one uniform start and steps of a quarter of the
radius.

![Accuracy against seconds of training]($picture)

*float32* is a search with the networks as they are; all others have the default `search`, in which everything is
`auto`. *fast* is the configuration of that name. Seconds are those of all steps of a training on one thread, from
the median over $turns turns of $steps steps in each epoch of the schedule, which trained students take, all variants
in turn (torch $torch). Loading data and testing are not in them.

The digits are 8 x 8 and their networks tiny, so Python's own time is a large part of a step. The images are $train to
train on and $test to test, for six epochs, and teacher and student are one network of six convolutions and 73,000
parameters: nothing here is a number of a paper.
"""
)


def write_page(all_found: Sequence[Found]) -> None:
    """Text and tables."""
    text = TEXT.substitute(
        command=COMMAND,
        picture=PICTURE.name,
        torch=torch.__version__.partition("+")[0],
        turns=TURNS,
        steps=CLOCKED_STEPS,
        train=f"{NUM_TRAIN:,}",
        test=f"{NUM_TEST:,}",
    )
    sections = (f"\n## {found.study.title}\n\n{table(found)}\n" for found in all_found)
    PAGE.write_text("".join([text, *sections]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help=".npz file of images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--studies", nargs="+", help="only those with these names")
    parser.add_argument("--folder", type=Path, default=Path("results/pareto"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    studies = [*digits_studies(), *(image_studies(args.images.resolve()) if args.images else ())]
    studies = [study for study in studies if args.studies is None or study.name in args.studies]
    # the networks are too small to share between threads
    torch.set_num_threads(1)
    with ProcessPoolExecutor(args.jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for teacher in [pool.submit(train_teacher, study, args.folder) for study in studies]:
            teacher.result()
        waiting = [
            pool.submit(one_run, study, variant, seed, args.folder)
            for study in studies
            for seed in args.seeds
            for variant in study.variants
        ]
        for number, done in enumerate(as_completed(waiting), 1):
            print(f"{number}/{len(waiting)} {done.result().stem}", flush=True)
    found = []
    for study in studies:
        results = {
            variant.name: [json.loads(one_run(study, variant, seed, args.folder).read_text()) for seed in args.seeds]
            for variant in study.variants
        }
        found.append(Found(study, results, clock(study, args.seeds[0], args.folder)))
    write_page(found)
    PICTURE.write_bytes(render(lambda: draw(found))[LIGHT])
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

"""What a training step costs: every method against the passes it cannot avoid, and against a plain implementation.

    python benchmarks/steps.py                             # ResNet-56 -> ResNet-20, batch 64, 32 x 32; `make bench`
    python benchmarks/steps.py --only methods --methods adaad darwin --repeats 9
    python benchmarks/steps.py --device cuda --teacher cifar_resnet18 --student cifar_resnet18 --batch-size 128
    python benchmarks/steps.py --write                     # the tables into docs/speed.md

A step is that of torchdistill's box, loss and optimizer included, with the settings of a file under ``configs/``. The
sides of a row are timed in turn within one process, step by step, so that the machine's drift hits all of them alike;
ratios are medians over the turns. Networks have random weights, which take as long as trained ones.

* ``float32``: searches in float32, images laid out channels first, nothing folded or compiled.
* ``bare passes``: the passes that the package says a step has (``Binding.cost`` and the host's own), written as a loop
  over them in the same arithmetic: to the images with eval mode in a search, to the weights in train mode outside.
* ``auto``: the default of the package.
* ``auto, --amp``: the same with ``--amp bf16 --channels_last`` of the runner.
* ``plain``: ``benchmarks/plain.py``.

On a CPU freed memory is kept on all sides, as ``torchdistill-adv train`` does (``keep_freed_memory``). Peak memory is
that of a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from plain import PLAIN, Plain, kd_tald
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import RandomSampler, TensorDataset
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.training import get_training_box
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT
from torchdistill.models.registry import get_model

from torchdistill_adv.binding import BINDING, Binding
from torchdistill_adv.boxes import Box, sides
from torchdistill_adv.losses import AdversarialTerm, Cost
from torchdistill_adv.noise import Noise
from torchdistill_adv.runner.config import plain_config
from torchdistill_adv.runner.memory import keep_freed_memory, peak_memory
from torchdistill_adv.runner.precision import Passes
from torchdistill_adv.runner.processes import Place
from torchdistill_adv.threat import ThreatModel
from torchdistill_adv.twins import SearchPasses

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "speed.md"
PATTERNS = (
    "cifar10/pgd_at-resnet18.yaml",
    "cifar10/trades-resnet18.yaml",
    "cifar10/trades/*-resnet18.yaml",
    "cifar100/kd_tald*-resnet20_from_resnet56.yaml",
)
FILES = {
    path.stem.split("-")[0]: path
    for pattern in PATTERNS
    for path in sorted((ROOT / "configs").glob(pattern))
    if "adversary" in path.read_text(encoding="utf-8")
}
TALD, FAST_TALD, ADAAD = "kd_tald_paper", "kd_tald_fast", "adaad"

FLOAT32 = {"precision": "float32", "channels_last": False, "fold": False, "compile": False}
NUM_CLASSES = 100
# small, as one batch is learnt again and again
OPTIMIZER: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
PARTICLES = (1, 2, 4, 8)
AXES: Mapping[str, tuple[int, ...]] = {
    "num_steps": (1, 5, 10, 20),
    "batch_size": (16, 32, 64, 128),
    "image_size": (16, 32, 64),
}

Step = Callable[[], object]


@dataclass(frozen=True)
class Task:
    """What is trained: models registered with torchdistill, on ``batch_size`` images of ``image_size`` squared."""

    teacher: str
    student: str
    batch_size: int
    image_size: int
    device: torch.device

    @classmethod
    def of(cls, args: argparse.Namespace, device: torch.device) -> Task:
        return cls(args.teacher, args.student, args.batch_size, args.image_size, device)


@dataclass(frozen=True)
class Method:
    """A training as one of the configurations has it."""

    name: str
    criterion: Mapping[str, Any]
    num_epochs: int
    has_teacher: bool = True
    two_teachers: bool = False

    @classmethod
    def read(cls, name: str) -> Method:
        """That of ``FILES[name]``; no data set or model is built."""
        config = plain_config(FILES[name])
        teacher = config["models"].get("teacher_model")
        pair = teacher is not None and teacher["key"] == "teacher_pair"
        return cls(name, config["train"]["criterion"], config["train"]["num_epochs"], teacher is not None, pair)

    @cached_property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """The adversarial terms' blocks of the criterion, by name."""
        terms = self.criterion["kwargs"]["sub_terms"]
        return {name: term["criterion"] for name, term in terms.items() if term["criterion"]["key"] in losses()}

    def but(self, search: Mapping[str, Any] | None = None, **adversary: Any) -> Method:
        """The method with another ``search`` block, or other options of its adversaries."""
        other = replace(self, criterion=copy.deepcopy(self.criterion))
        for block in other.blocks.values():
            if search is not None:
                block["kwargs"]["search"] = dict(search)
            block["kwargs"]["adversary"]["kwargs"].update(adversary)
        return other

    def host(self) -> Method:
        """The host alone."""
        other = replace(self, criterion=copy.deepcopy(self.criterion))
        for name in self.blocks:
            del other.criterion["kwargs"]["sub_terms"][name]
        return other


def losses() -> dict[str, type[AdversarialTerm]]:
    """Every adversarial loss of this package, by its key."""
    found = {key: loss for key, loss in MIDDLE_LEVEL_LOSS_DICT.items() if isinstance(loss, type)}
    return {key: loss for key, loss in found.items() if issubclass(loss, AdversarialTerm)}


def one_for_each_loss() -> list[str]:
    """For every loss the configuration of its own name, else that with the fewest terms and the shortest name.

    The fast presets come last.
    """
    fast = [name for name in FILES if name.endswith("_fast")]
    keys = {name: [block["key"] for block in Method.read(name).blocks.values()] for name in FILES}

    def rank(loss: str, name: str) -> tuple[Any, ...]:
        is_own = loss.lower().removesuffix("loss") == name.replace("_", "")
        return not is_own, len(keys[name]), len(name), name

    chosen = set()
    for loss in losses():
        names = [name for name in FILES if loss in keys[name] and name not in fast]
        chosen |= {min(names, key=partial(rank, loss))} if names else set()
    return [*(name for name in FILES if name in chosen), *fast]


class Batch(NamedTuple):
    """Images (N, 3, H, W) as the method's threat model has them, labels (N,), and what DARWIN's data set adds."""

    images: Tensor
    labels: Tensor
    supp_dict: dict[str, Tensor]


def draw_batch(method: Method, task: Task) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(task.batch_size, 3, task.image_size, task.image_size, generator=generator)
    labels = torch.arange(task.batch_size) % NUM_CLASSES
    for block in list(method.blocks.values())[:1]:
        threat = ThreatModel.build(block["kwargs"]["threat"])
        mean, std = (images.new_tensor(values).view(1, -1, 1, 1) for values in (threat.mean, threat.std))
        images = (images - mean) / std
    images, labels = images.to(task.device), labels.to(task.device)
    return Batch(images, labels, {"paired_image": images.flip(0), "paired_label": (labels + 1) % NUM_CLASSES})


def build_networks(method: Method, task: Task) -> tuple[nn.Module, nn.Module]:
    """Teacher and student."""
    torch.manual_seed(0)
    blocks: list[dict[str, Any]] = [
        {"key": key, "kwargs": {"num_classes": NUM_CLASSES, **({"in_channels": 3} if key == "small_cnn" else {})}}
        for key in (task.teacher, task.student)
    ]
    if method.two_teachers:
        blocks[0] = {"key": "teacher_pair", "kwargs": {"robust": blocks[0], "standard": blocks[0]}}
    images = draw_batch(method, task).images[:16]
    teacher, student = (
        as_if_trained(get_model(block["key"], **block["kwargs"]).to(task.device), images) for block in blocks
    )
    return teacher, student


def as_if_trained(network: nn.Module, images: Tensor) -> nn.Module:
    """Running statistics of ``images``, or the features of deep networks explode; several classes are predicted."""
    for module in network.modules():
        for name, child in module.named_children():
            # torchdistill's CIFAR networks pool 8 x 8 maps, those of images of 32 x 32
            if isinstance(child, nn.AvgPool2d) and child.kernel_size == 8:
                setattr(module, name, nn.AdaptiveAvgPool2d(1))
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    parts = [part for name, part in network.named_children() if name == "standard"]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
        for part in (network, *parts):
            part(images)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        *_, last = (m for m in network.modules() if isinstance(m, nn.Linear))
        last.bias.sub_(network.eval()(images).mean(0))
    return network.train()


def build_box(
    method: Method, task: Task, passes: Passes | None = None, networks: tuple[nn.Module, nn.Module] | None = None
) -> Box:
    """torchdistill's box, in the middle of the training, where every part of a loss counts."""
    teacher, student = networks or build_networks(method, task)
    if passes is not None:
        passes.prepare(teacher, student)
    batch = draw_batch(method, task)
    side = {"forward_proc": "forward_batch_only", "requires_grad": True}
    config = {
        "num_epochs": method.num_epochs,
        "pre_epoch_process": "bind_adversarial_losses",
        "train_data_loader": {
            "dataset_id": "data",
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": {"batch_size": task.batch_size},
        },
        "teacher": {**side, "requires_grad": False},
        "student": side,
        "model": side,
        "optimizer": {"key": "SGD", "kwargs": OPTIMIZER},
        "criterion": copy.deepcopy(method.criterion),
    }
    common = ({"data": TensorDataset(batch.images.cpu(), batch.labels.cpu())}, config, task.device, None, False, 1)
    if method.has_teacher:
        return get_distillation_box(teacher, student, *common)
    return get_training_box(student, *common)


def step_of(box: Box, batch: Batch, passes: Passes | None = None) -> Step:
    """A training step of a box, on one batch again and again."""
    box.pre_epoch_process(epoch=box.num_epochs // 2)
    _, teacher = sides(box)
    if teacher is not None:
        teacher.network.eval()
    images, labels, supp_dict = batch
    if passes is not None:
        images = passes.batch(images)

    def step() -> None:
        with nullcontext() if passes is None else passes.forward(box):
            loss = box.forward_process(images, labels, supp_dict)
        if passes is None:
            box.post_forward_process(loss=loss)
        else:
            passes.step(box, loss)

    return step


# what a step cannot avoid


def terms_of(box: Box) -> list[AdversarialTerm]:
    """The adversarial terms of a box whose epoch has begun, the most frequent one last."""
    binding: Binding | None = box.__dict__.get(BINDING)
    return [] if binding is None else sorted(binding.evaluated, key=lambda term: -term.every)


def period_of(box: Box) -> int:
    """After how many steps all that is due has been evaluated."""
    return math.lcm(*(term.every for term in terms_of(box)))


class Share(NamedTuple):
    """Passes of a step, at most ``rows`` images at once, in every m-th step.

    ``in_search`` says that gradients go to the images.
    """

    cost: Cost
    rows: int
    every: int
    in_search: bool


def bare_passes(box: Box, images: int) -> list[Share]:
    """The passes that :meth:`Binding.cost` adds up, with as many steps of a search as this epoch has."""
    shares: dict[object, Share] = {}
    binding: Binding | None = box.__dict__.get(BINDING)
    progress = 1.0 if binding is None else (binding.epoch + 1) / len(binding.epochs)
    for term in terms_of(box):
        rows, every = term.search.num_rows(images), term.every
        for search in term.searches:
            here = replace(search, adversary=search.adversary_at(progress))
            shares[search] = Share(here.cost(images), here.num_rows(images), every, True)
        for key, cost in term.outer_cost(images).items():
            shares[key] = Share(cost, rows, every, False)
    return list(shares.values())


def trains_on_clean(box: Box, batch: Batch, step: Step) -> bool:
    """Whether the clean images of the host's pass train the student, which they do not in AdaAD with alpha = 1."""
    watched: list[Tensor] = []
    gradients: list[Tensor] = []

    def see(module: nn.Module, _: Any, logits: Tensor) -> None:
        # before it there are passes on single images, which are checks
        if not watched and module.training and logits.requires_grad and len(logits) == len(batch.images):
            watched.append(logits)
            logits.register_hook(gradients.append)

    with sides(box)[0].network.register_forward_hook(see):
        step()
    assert watched, "the host has no pass of the student"
    return bool(gradients)


def bare_step(
    networks: tuple[nn.Module, nn.Module], batch: Batch, shares: Iterable[Share], has_teacher: bool, on_clean: bool
) -> Callable[[int], Step]:
    """``period -> step``: the passes of so many training steps, and nothing else but the optimizer's."""
    teacher, student = networks
    teacher.requires_grad_(False).eval()
    optimizer = torch.optim.SGD(student.parameters(), **OPTIMIZER)
    x = batch.images
    shares = list(shares)
    longest = max([share.rows for share in shares], default=len(x))
    rows = x.repeat(math.ceil(longest / len(x)), 1, 1, 1)

    def pieces(total: float, size: int) -> Iterator[Tensor]:
        for start in range(0, round(total), size):
            yield rows[: min(size, round(total) - start)]

    def run(network: nn.Module, forward: float, backward: float, size: int, in_search: bool) -> None:
        for some in pieces(backward, size):
            leaf = some.detach().requires_grad_(in_search)
            value = network(leaf).square().mean()
            if in_search:
                torch.autograd.grad(value, leaf)
            else:
                value.backward()
        with torch.no_grad():
            for some in pieces(forward - backward, size):
                network(some)

    def host() -> None:
        if has_teacher:
            with torch.no_grad():
                teacher(x)
        logits = student(x)
        if on_clean:
            logits.square().mean().backward()

    def finish() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def steps(period: int) -> Step:
        def step() -> None:
            for number in range(period):
                host()
                for cost, size, every, in_search in shares:
                    if number % every:
                        continue
                    student.train(not in_search)
                    if has_teacher:
                        run(teacher, cost.teacher_forward, cost.teacher_backward, size, in_search)
                    run(student, cost.student_forward, cost.student_backward, size, in_search)
                student.train()
                finish()

        return step

    return steps


def plain_step(plain: Plain, networks: tuple[nn.Module, nn.Module], batch: Batch) -> Step:
    """A training step of a plain implementation."""
    teacher, student = networks
    teacher.requires_grad_(False).eval()
    optimizer = torch.optim.SGD(student.parameters(), **OPTIMIZER)
    noise = Noise(0, batch.images.device)

    def step() -> None:
        plain(teacher, student, batch.images, batch.labels, noise).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# timing


class Timed(NamedTuple):
    """What is timed: ``step`` makes ``num_steps`` training steps."""

    step: Step
    num_steps: int = 1


def milliseconds(timed: Timed, device: torch.device) -> float:
    """Of one training step."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    timed.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start) / timed.num_steps


class Times:
    """Milliseconds of several sides, timed in turn ``repeats`` times after one turn that does not count.

    Every second turn goes the other way round, so that no side always comes after the same one.
    """

    def __init__(self, sides: Mapping[str, Timed], repeats: int, device: torch.device) -> None:
        orders = [list(sides), list(sides)[::-1]]
        turns = [{name: milliseconds(sides[name], device) for name in orders[k % 2]} for k in range(repeats + 1)]
        self.turns = turns[1:]

    def ms(self, name: str) -> str:
        return f"{statistics.median(turn[name] for turn in self.turns):.1f}"

    def ratio(self, over: str, under: str) -> str:
        """The median over the turns; empty where a side is missing."""
        if not {over, under} <= set(self.turns[0]):
            return ""
        return f"{statistics.median(turn[over] / turn[under] for turn in self.turns):.2f}"

    def overhead(self, over: str, under: str) -> str:
        """Median and quartiles of the ratio."""
        ratios = torch.tensor([turn[over] / turn[under] for turn in self.turns])
        low, median, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        return f"{median:.3f} ({low:.3f} to {high:.3f})"


def repeated(step: Step, count: int) -> Timed:
    """``step``, so many times."""

    def steps() -> None:
        for _ in range(count):
            step()

    return Timed(steps, count)


def sides_of(method: Method, task: Task, plain: Plain | None, with_amp: bool = False) -> dict[str, Timed]:
    """The sides of a row; each makes as many steps as it takes until all terms have been due."""
    batch = draw_batch(method, task)
    box = build_box(method.but(FLOAT32), task)
    float32 = step_of(box, batch)
    on_clean = trains_on_clean(box, batch, float32)
    shares, period = bare_passes(box, task.batch_size), period_of(box)
    bare = bare_step(build_networks(method, task), batch, shares, method.has_teacher, on_clean)
    found = {
        "float32": repeated(float32, period),
        "bare": Timed(bare(period), period),
        "auto": repeated(step_of(build_box(method, task), batch), period),
    }
    if with_amp:
        passes = Passes(Place(task.device), "bf16", channels_last=True, compile=False)
        found["amp"] = repeated(step_of(build_box(method, task, passes), batch, passes), period)
    if plain is not None:
        found["plain"] = repeated(plain_step(plain, build_networks(method, task), batch), period)
    return found


# tables


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def head(*cells: str) -> Iterator[str]:
    yield row(*cells)
    yield row(*["---"] * len(cells))


def linked(name: str) -> str:
    return f"[{name}](../{FILES[name].relative_to(ROOT).as_posix()})"


def plain_of(name: str) -> Plain | None:
    """The plain implementation, of the full method where ``name`` is its fast preset."""
    return PLAIN.get(name.replace("_fast", "_paper")) or PLAIN.get(name.removesuffix("_fast"))


def methods_table(task: Task, args: argparse.Namespace) -> Iterator[str]:
    yield from head(
        *("method", "float32, ms", "/ bare passes", "auto, ms", "faster than float32", "than plain"),
        *("auto and --amp, ms", "faster than float32", "than plain"),
    )
    for name in args.methods:
        t = Times(sides_of(Method.read(name), task, plain_of(name), with_amp=True), args.repeats, task.device)
        yield row(
            *(linked(name), t.ms("float32"), t.overhead("float32", "bare")),
            *(t.ms("auto"), t.ratio("float32", "auto"), t.ratio("plain", "auto")),
            *(t.ms("amp"), t.ratio("float32", "amp"), t.ratio("plain", "amp")),
        )


def particles_table(task: Task, args: argparse.Namespace) -> Iterator[str]:
    """KD, and KD + TALD by the number of particles and as the fast preset."""
    yield from head("step", "float32, ms", "/ KD", "/ bare passes", "auto, ms", "/ KD", "faster than plain")
    tald = Method.read(TALD)
    kd = Timed(step_of(build_box(tald.host(), task), draw_batch(tald, task)))
    t = Times({"KD": kd}, args.repeats, task.device)
    yield row("KD", t.ms("KD"), 1, "", t.ms("KD"), 1, "")
    rows: list[tuple[str, Method, Plain]] = [
        (f"K = {k}", tald.but(num_particles=k), partial(kd_tald, num_particles=k)) for k in args.particles
    ]
    rows += [("fast", Method.read(FAST_TALD), kd_tald)]
    for label, method, plain in rows:
        t = Times({"KD": kd, **sides_of(method, task, plain)}, args.repeats, task.device)
        yield row(
            *(f"KD + TALD, {label}", t.ms("float32"), t.ratio("float32", "KD"), t.overhead("float32", "bare")),
            *(t.ms("auto"), t.ratio("auto", "KD"), t.ratio("plain", "auto")),
        )


def growth_table(axis: str, task: Task, args: argparse.Namespace) -> Iterator[str]:
    """KD + TALD with one particle and AdaAD, with the default search, along one axis."""
    names, first = {"KD + TALD": TALD, "AdaAD": ADAAD}, args.axes[axis][0]
    yield from head(axis, *(f"{name}, {unit}" for name in names for unit in ("ms", f"/ {axis} of {first}")))
    steps: dict[str, Timed] = {}
    for value in args.axes[axis]:
        here = task if axis == "num_steps" else replace(task, **{axis: value})
        for key, name in names.items():
            options: dict[str, Any] = {"num_particles": 1} if name == TALD else {}
            options |= {axis: value} if axis == "num_steps" else {}
            method = Method.read(name).but(**options)
            steps[f"{key} {value}"] = Timed(step_of(build_box(method, here), draw_batch(method, here)))
    t = Times(steps, args.repeats, task.device)
    for value in args.axes[axis]:
        cells = []
        for key in names:
            cells += [t.ms(f"{key} {value}"), t.ratio(f"{key} {value}", f"{key} {first}")]
        yield row(value, *cells)


# memory


def held_memory(device: torch.device) -> int | None:
    """In bytes: what this process holds at present, where the system tells, else its peak."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if file.exists() else peak_memory(device)


def measure_memory(task: Task, method: Method) -> tuple[float, float]:
    """MiB of the process before its first step, and at the highest point of steps in which every term was due."""
    box = build_box(method, task)
    step = step_of(box, draw_batch(method, task))
    before = held_memory(task.device)
    for _ in range(1 + period_of(box)):
        step()
    after = peak_memory(task.device)
    assert before is not None and after is not None, "this system does not tell how much memory a process has"
    return before / 2**20, after / 2**20


def memory_of(name: str, argv: Sequence[str], device: torch.device, **adversary: Any) -> tuple[float, float]:
    """:func:`measure_memory` of a process of its own."""
    wanted = json.dumps({"name": name, "adversary": adversary})
    command = [sys.executable, __file__, *argv, "--device", str(device), "--memory-of", wanted]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    before, after = json.loads(found.splitlines()[-1])
    return before, after


def memory_table(task: Task, args: argparse.Namespace) -> Iterator[str]:
    yield from head("step", "peak of the process, MiB", "of it the step's", "peak / AdaAD", "the step's / AdaAD")
    before, highest = memory_of(ADAAD, args.argv, task.device)
    rows: list[tuple[str, str, dict[str, Any]]] = [(linked(name), name, {}) for name in args.methods]
    if TALD in args.methods:  # whose configuration has four particles
        rows += [(f"{TALD}, K = {k}", TALD, {"num_particles": k}) for k in args.particles if k != 4]
    for label, name, adversary in rows:
        start, peak = memory_of(name, args.argv, task.device, **adversary)
        yield row(
            *(label, f"{peak:.0f}", f"{peak - start:.0f}"),
            *(f"{peak / highest:.2f}", f"{(peak - start) / (highest - before):.2f}"),
        )


# the page


def facts(task: Task, args: argparse.Namespace) -> str:
    """What the numbers depend on, in a line."""
    units = "with" if SearchPasses().pick(task.device).dtype == torch.bfloat16 else "without"
    where = f"CPU, {torch.get_num_threads()} threads"
    if task.device.type == "cuda":
        where = torch.cuda.get_device_name(task.device)
    return (
        f"{task.teacher} -> {task.student}, batch {task.batch_size}, {task.image_size} x {task.image_size}; {where}, "
        f"{units} bfloat16 units; torch {torch.__version__.split('+')[0]}; medians of {args.repeats} turns"
    )


def write(marker: str, text: str) -> None:
    """Put ``text`` between the marks of its name on the page."""
    page = PAGE.read_text(encoding="utf-8")
    marked = re.compile(f"(<!-- begin {marker} -->\n).*?(<!-- end {marker} -->)", re.DOTALL)
    if not marked.search(page):
        raise SystemExit(f"{PAGE} has no '<!-- begin {marker} -->'; add it where the table should be")
    PAGE.write_text(marked.sub(lambda m: f"{m[1]}{text}\n{m[2]}", page), encoding="utf-8")


def tables(task: Task, args: argparse.Namespace) -> Iterator[tuple[str, Iterator[str]]]:
    """The tables that are wanted, by name."""
    kinds: dict[str, dict[str, Callable[[], Iterator[str]]]] = {
        "methods": {"methods": partial(methods_table, task, args)},
        "growth": {
            "particles": partial(particles_table, task, args),
            **{axis: partial(growth_table, axis, task, args) for axis in args.axes},
        },
        "memory": {"memory": partial(memory_table, task, args)},
    }
    for kind in [args.only] if args.only else kinds:
        for name, table in kinds[kind].items():
            yield name, table()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=FILES, metavar="NAME", help="default: one for every loss")
    parser.add_argument("--teacher", default="resnet56", help="a model registered with torchdistill")
    parser.add_argument("--student", default="resnet20", help="a model registered with torchdistill")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["methods", "growth", "memory"])
    parser.add_argument("--device", type=torch.device, help="default: the CPU, then a GPU if there is one")
    parser.add_argument("--quick", action="store_true", help="tiny networks: whether it runs, not how fast")
    parser.add_argument("--write", action="store_true", help="the tables into docs/speed.md")
    parser.add_argument("--memory-of", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.argv = list(argv)
    args.methods = args.methods or one_for_each_loss()
    args.particles, args.axes = PARTICLES, AXES
    if args.quick:
        args.teacher = args.student = "small_cnn"
        args.batch_size = args.image_size = 8
        args.repeats, args.particles = 1, (1, 2)
        args.axes = {"num_steps": (1, 2), "batch_size": (4, 8), "image_size": (8, 16)}
    return args


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    keep_freed_memory()
    if args.memory_of:
        task = Task.of(args, args.device)
        print(json.dumps(measure_memory(task, Method.read(args.memory_of["name"]).but(**args.memory_of["adversary"]))))
        return
    gpus = ["cuda"] if torch.cuda.is_available() else []
    for device in [args.device] if args.device else map(torch.device, ["cpu", *gpus]):
        task = Task.of(args, device)
        print(facts(task, args))
        for name, table in tables(task, args):
            print(f"\n{name}\n")
            lines = []
            for line in table:
                print(line, flush=True)
                lines.append(line)
            if args.write:
                command = f"python benchmarks/steps.py {' '.join(argv)}"
                write(f"{name} {device.type}", f"`{command}`: {facts(task, args)}\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()

"""A configuration tried out: everything is built, every stage takes a step, and nothing is written."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torchdistill.models.wrapper import AuxiliaryModelWrapper

from torchdistill_adv.binding import BINDING, Binding
from torchdistill_adv.boxes import Box, Side, sides, stage_epochs
from torchdistill_adv.errors import ConfigError, NonFiniteError
from torchdistill_adv.evaluation.pixels import Normalization, find_normalization
from torchdistill_adv.guards import eval_mode, on_cloned_buffers, own_random_stream, restored_hooks
from torchdistill_adv.losses.base import AdversarialTerm
from torchdistill_adv.runner.building import build_box, build_model
from torchdistill_adv.runner.check import check_config, stages, student_name
from torchdistill_adv.runner.config import prepare_config
from torchdistill_adv.runner.memory import peak_memory
from torchdistill_adv.runner.mistakes import (
    NO_NORMALIZE,
    Mistake,
    different_classes,
    idle_search,
    odd_radius,
    odd_weight,
    selects_on_test,
    single_last_batch,
    teacher_in_train_mode,
    useless_gradient,
    weak_teacher,
    wrong_normalization,
)
from torchdistill_adv.runner.processes import Place, check_device, default_device, to_device
from torchdistill_adv.runner.progress import duration
from torchdistill_adv.statistics import Watch

Batch = tuple[Any, Any, Any]


@dataclass(frozen=True)
class TermTrial:
    """A term of the loss in the first step.

    Args:
        name: in the YAML.
        path: in the YAML.
        loss: name of its class.
        weight: its factor.
        value: before the weight, summed where it is no scalar.
        gradient: l2 norm of the gradient of weight times value, with respect to all that the optimizer trains; None for
            a term of weight 0.
    """

    name: str
    path: str
    loss: str
    weight: float
    value: float
    gradient: float | None


@dataclass(frozen=True)
class StageTrial:
    """What a stage showed.

    Args:
        path: in the YAML.
        num_epochs: of the stage.
        num_steps: of an epoch.
        num_images: of an epoch.
        batch_size: images of the batch that was read.
        loss: total of the first step.
        terms: of the loss; empty for a high-level loss that has none.
        searches: a line for each.
        cost: passes of the networks beyond the host's; empty without adversarial terms.
        seconds: of a step.
        host_seconds: of a step without the adversarial terms; None where there are none, or no others.
        reading_seconds: of a batch; None where other processes read it.
        memory: peak, in bytes: of the tensors on a GPU, else of the process; None where the system does not tell.
        mistakes: likely ones.
    """

    path: str
    num_epochs: int
    num_steps: int
    num_images: int
    batch_size: int
    loss: float
    terms: Sequence[TermTrial]
    searches: Sequence[str]
    cost: str
    seconds: float
    host_seconds: float | None
    reading_seconds: float | None
    memory: int | None
    mistakes: Sequence[Mistake]

    @property
    def epoch_seconds(self) -> float:
        """Of an epoch of training, as the one step tells it."""
        return self.num_steps * (self.seconds + (self.reading_seconds or 0))

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {_count(self.num_epochs, 'epoch')} of {_count(self.num_steps, 'step')}; "
            f"{self.num_images:,} images an epoch, {self.batch_size} a step",
            "",
        ]
        rows = [_row(term) for term in self.terms]
        rows.append(["sum", "", "", "", f"{self.loss:.4g}", ""])
        lines += [*_table(["term", "loss", "weight", "value", "weight x value", "gradient"], rows), "", *self.searches]
        if self.cost:
            lines.append(f"adversarial passes of a step, in batches: {self.cost}")
        alone = "" if self.host_seconds is None else f", {self.host_seconds:.3g} s without the adversarial terms"
        reading = "" if self.reading_seconds is None else f"; reading a batch took {self.reading_seconds:.3g} s"
        lines.append(f"a step took {self.seconds:.3g} s{alone}{reading}")
        total = duration(self.num_epochs * self.epoch_seconds)
        lines.append(f"training takes about {duration(self.epoch_seconds)} an epoch, {total} in all, validation apart")
        if self.memory is not None:
            lines.append(f"peak memory: {self.memory / 1e9:.2f} GB")
        return "\n".join(lines)


@dataclass(frozen=True)
class Trial:
    """What a configuration showed.

    Args:
        name: of the configuration.
        device: where the steps were taken.
        models: a line for each.
        stages: in order.
        mistakes: likely ones that are of no stage.
    """

    name: str
    device: torch.device
    models: Sequence[str]
    stages: Sequence[StageTrial]
    mistakes: Sequence[Mistake]

    @property
    def all_mistakes(self) -> list[Mistake]:
        """Each once, in order."""
        return list(dict.fromkeys([*self.mistakes, *(m for stage in self.stages for m in stage.mistakes)]))

    def __str__(self) -> str:
        where = str(self.device)
        memory = "tensors on the GPU" if self.device.type == "cuda" else "the process, libraries included"
        parts = [
            "\n".join([f"{self.name} on {where}", *self.models]),
            *map(str, self.stages),
            "Value: of the term in the first step. Gradient: its l2 norm, times the weight, with respect to all that "
            f"the optimizer trains.\nTimes are those of one step. Memory is that of {memory}.",
        ]
        if len(self.stages) > 1:
            total = sum(stage.num_epochs * stage.epoch_seconds for stage in self.stages)
            parts.append(f"all stages: about {duration(total)}")
        parts.append("\n".join(map(str, self.all_mistakes)) or "no warnings")
        return "\n\n".join(parts)


def try_out(
    config: str | os.PathLike[str] | Mapping[str, Any],
    *,
    device: str | None = None,
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
) -> Trial:
    """Build what a configuration describes, and let every stage take a step on one batch.

    The weights are trained by that step and then dropped: no checkpoint, no directory and no record is left, and the
    random streams go on as if nothing had happened. A stage starts from what one step of the stage before it left; the
    checkpoints between them are in a temporary folder.

    Args:
        config: YAML file, or a configuration as torchdistill loads one.
        device: such as ``cpu`` or ``cuda:1``; by default a GPU where there is one.
        seed: of the weights, the batch and the search.
        overrides: other values for entries, by dotted YAML path.

    Raises:
        ConfigError: the configuration cannot be run; with the YAML path.
        NonFiniteError: a loss is NaN or infinite.
    """
    where = Place(check_device(device) if device else default_device())
    with own_random_stream(seed, where.device):
        loaded = prepare_config(config, overrides)
        check_config(loaded, binds_by_itself="torchdistill_adv.autobind" in sys.modules)
        name = "the configuration" if isinstance(config, Mapping) else str(config)
        with TemporaryDirectory() as folder:
            _redirect(loaded["train"], Path(folder))
            return _try(loaded, name, where)


def _try(config: Mapping[str, Any], name: str, where: Place) -> Trial:
    models, train = config["models"], config["train"]
    block = models.get("teacher_model")
    teacher = None if block is None else build_model(block, "teacher_model", where)
    student = build_model(models[student_name(models)], student_name(models), where)
    lines = [f"student {models[student_name(models)]['key']}: {_size(student)}"]
    box = build_box(teacher, student, config, where, 1)
    found, mistakes = [], list[Mistake]()
    for number, (path, _) in enumerate(stages(train)):
        if number:
            _end_stage(box)
        batch, reading = _read_batch(box, f"{path}.train_data_loader", where)
        if not number and teacher is not None:
            line, mistakes = _look_at_teacher(box, batch, block)
            lines.append(f"teacher {block['key']}: {_size(teacher)}{line}")
        found.append(_try_stage(box, batch, reading, path, config, where))
    return Trial(name, where.device, lines, found, mistakes)


def _redirect(node: Any, folder: Path) -> None:
    """Let the checkpoints that stages hand on be written to a folder, and read there; those that exist are in it."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if isinstance(value, str) and str(key).endswith("ckpt") and not value.startswith(("https://", "http://")):
            node[key] = str(folder / Path(value).resolve().relative_to(Path(value).resolve().anchor))
            Path(node[key]).parent.mkdir(parents=True, exist_ok=True)
            if Path(value).is_file():
                shutil.copyfile(value, node[key])
        else:
            _redirect(value, folder)


def _end_stage(box: Box) -> None:
    """What torchdistill does at the end of a stage, but for schedulers and validation."""
    for side in sides(box):
        if side is not None and isinstance(side.outermost, AuxiliaryModelWrapper):
            side.outermost.post_epoch_process()
    box.advance_to_next_stage()


def _read_batch(box: Box, path: str, where: Place) -> tuple[Batch, float | None]:
    """A batch on the device, and the seconds that reading it took: None where processes of the loader read it."""
    loader = box.train_data_loader
    start = time.perf_counter()
    try:
        batch = next(iter(loader))
        sample_batch, targets, *rest = batch
    except StopIteration as error:
        raise ConfigError("gives no batch; write a smaller batch_size, or drop_last: False", path) from error
    # a data set, its transforms and a collate function of a user's own can raise anything
    except Exception as error:
        raise ConfigError(f"a batch cannot be read: {type(error).__name__}: {error}", path) from error
    seconds = None if loader.num_workers else time.perf_counter() - start
    moved = (to_device(data, where.device) for data in (sample_batch, targets))
    return (*moved, rest[0] if rest else {}), seconds


def _look_at_teacher(box: Box, batch: Batch, block: Mapping[str, Any]) -> tuple[str, list[Mistake]]:
    """What the teacher predicts on a batch, and what is odd about it."""
    student, teacher = sides(box)
    assert teacher is not None
    if not isinstance(batch[0], Tensor):
        return "", []
    logits = own = None
    # where either network cannot take the batch, the step tells
    with restored_hooks(student.io_dict, teacher.io_dict), contextlib.suppress(RuntimeError, TypeError):
        logits, own = (_logits(side.network, batch[0], student, teacher) for side in (teacher, student))
    if logits is None:
        return "", []
    found = [] if own is None else [different_classes(own.shape[1], logits.shape[1])]
    labels, text = batch[1], f", {logits.shape[1]} classes"
    if isinstance(labels, Tensor) and labels.shape == logits.shape[:1] and not labels.is_floating_point():
        right = int((logits.argmax(1) == labels).sum())
        text += f"; right on {right} of the {len(labels)} images of a batch"
        found.append(weak_teacher(right, len(labels), logits.shape[1], block.get("src_ckpt")))
    return text, [mistake for mistake in found if mistake is not None]


def _logits(network: nn.Module, batch: Tensor, *all_sides: Side) -> Tensor | None:
    """The logits of a network in eval mode; None for one that gives something else."""
    has_views = batch.dim() == 5 and max(side.num_views for side in all_sides) > 1
    with torch.no_grad(), eval_mode(network), on_cloned_buffers(network):
        logits = network(batch[:, 0] if has_views else batch)
    return logits if isinstance(logits, Tensor) and logits.dim() == 2 else None


def _try_stage(
    box: Box, batch: Batch, reading: float | None, path: str, config: Mapping[str, Any], where: Place
) -> StageTrial:
    with _located(box, path):
        box.pre_epoch_process(epoch=stage_epochs(box).start)
        binding: Binding | None = box.__dict__.get(BINDING)
        # a stage that binds nothing keeps that of the stage before until its first step
        if binding is not None and not binding.is_current(box):
            binding = None
        loss, terms, found = _examine(box, binding, batch, path)
        if where.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(where.device)
        seconds = _timed(partial(_step, box, batch), where)
        memory = peak_memory(where.device)
        host_seconds = None
        if binding is not None and binding.evaluated and _has_host(binding, terms):
            with _switched_off(binding.evaluated):
                host_seconds = _timed(partial(_step, box, batch), where)
    loader, size = box.train_data_loader, len(batch[0])
    num_images = len(loader.sampler) if loader.batch_size else len(loader) * size
    return StageTrial(
        path=path,
        num_epochs=len(stage_epochs(box)),
        num_steps=len(loader),
        num_images=min(num_images, len(loader) * size),
        batch_size=size,
        loss=loss,
        terms=terms,
        searches=[] if binding is None else [*_describe_searches(binding, found)],
        cost="" if binding is None or not binding.evaluated else binding.cost(size).describe(size),
        seconds=seconds,
        host_seconds=host_seconds,
        reading_seconds=reading,
        memory=memory,
        mistakes=[m for m in _mistakes(box, binding, batch[0], terms, found, path, config) if m is not None],
    )


def _examine(
    box: Box, binding: Binding | None, batch: Batch, path: str
) -> tuple[float, list[TermTrial], dict[str, dict[str, float]]]:
    """The first forward pass: the loss, its terms with their gradients, and the statistics of every search by name."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        outputs[name] = output.sum()

    parts: Mapping[str, tuple[nn.Module, Any]] = getattr(box.criterion, "term_dict", {})
    handles = [term.register_forward_hook(partial(keep, name)) for name, (term, _) in parts.items()]
    watch = Watch(box.device)
    if binding is not None:
        binding.watch = watch
    try:
        loss = box.forward_process(*batch)
    finally:
        if binding is not None:
            binding.watch = None
        for handle in handles:
            handle.remove()
    total, values = float(loss.detach()), {name: float(output.detach()) for name, output in outputs.items()}
    if not math.isfinite(total):
        raise NonFiniteError(f"{path}: the loss is {total} in the first step; its terms: {values}")
    trained = [p for group in box.optimizer.param_groups for p in group["params"] if p.requires_grad]
    terms = []
    for name, output in outputs.items():
        module, weight = parts[name]
        gradient = _gradient_norm(output * weight, trained) if float(weight) else None
        where = f"{path}.criterion.kwargs.sub_terms.{name}"
        terms.append(TermTrial(name, where, _name(module), float(weight), values[name], gradient))
    return total, terms, watch.searches


def _gradient_norm(value: Tensor, parameters: Sequence[Tensor]) -> float:
    if not value.requires_grad:
        return 0.0
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return math.hypot(*(float(gradient.float().norm()) for gradient in found if gradient is not None))


def _has_host(binding: Binding, terms: Sequence[TermTrial]) -> bool:
    """Whether something is trained without the adversarial terms."""
    own = [term.path for term in binding.terms]
    return any(term.gradient and not any(path.startswith(f"{term.path}.") for path in own) for term in terms)


def _step(box: Box, batch: Batch) -> None:
    box.post_forward_process(loss=box.forward_process(*batch))


@contextmanager
def _switched_off(terms: Sequence[AdversarialTerm]) -> Iterator[None]:
    """Terms that are not evaluated for the moment, as if their weights were 0."""
    for term in terms:
        term.evaluated = False
    try:
        yield
    finally:
        for term in terms:
            term.evaluated = True


@contextmanager
def _located(box: Box, path: str) -> Iterator[None]:
    """What a step raises, with the path of the stage, or of the term that was being computed."""
    try:
        yield
    except (ConfigError, NonFiniteError):
        raise
    # networks, losses and processes of a user's own can raise anything
    except Exception as error:
        running = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        for name, (term, _) in getattr(box.criterion, "term_dict", {}).items():
            if any(module is term for module in running):
                path = f"{path}.criterion.kwargs.sub_terms.{name}"
        raise ConfigError(f"a step cannot be taken: {type(error).__name__}: {error}", path) from error


def _describe_searches(binding: Binding, found: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """A line for every search: what it did to its objective, its radius in pixels, how far it went."""
    for search, name in binding.search_names().items():
        adversary, statistics = search.adversary, found.get(name)
        if statistics is None:
            went, far = "", "no examples in this step"
        else:
            went = " from {objective_clean:.4g} to {objective_adversarial:.4g}".format(**statistics)
            far = "the furthest example is {distance_max:.4g} away".format(**statistics)
        rows, gradients = _count(adversary.num_rows, "example"), _count(adversary.num_gradients, "gradient")
        yield (
            f"search of {name}: {_name(adversary)} {'descends' if adversary.targeted else 'ascends'} "
            f"{search.objective.key}{went}; {rows} an image, {gradients} each; {search.threat.describe()}; {far}"
        )


def _mistakes(
    box: Box,
    binding: Binding | None,
    images: Tensor,
    terms: Sequence[TermTrial],
    found: Mapping[str, Mapping[str, float]],
    path: str,
    config: Mapping[str, Any],
) -> Iterator[Mistake | None]:
    """Likely mistakes of a stage that took a step."""
    loader: Any = box.train_data_loader
    student, teacher = sides(box)
    names = {} if binding is None else binding.search_names()
    for term in binding.evaluated if binding is not None else ():
        normalization = _normalization(loader.dataset, images)
        for search in term.searches:
            if normalization is not None:
                yield wrong_normalization(search.threat, normalization, f"{term.path}.threat")
            yield odd_radius(search.threat, images[0].numel(), f"{term.path}.threat")
            if names[search] in found:
                yield idle_search(found[names[search]], _name(search.adversary), term.path)
    if binding is not None and teacher is not None and binding.evaluated:
        yield teacher_in_train_mode(binding.teacher_mode, teacher.in_train_mode, binding.evaluated[0].path)
    gradients = {term.name: term.gradient for term in terms if term.gradient is not None}
    for term_trial in terms:
        if term_trial.gradient is not None:
            yield useless_gradient(term_trial.gradient, term_trial.path)
            yield odd_weight(term_trial.name, gradients, term_trial.path)
    if box.val_data_loader is not None:
        yield from _validation_mistakes(path, config)
    has_batch_norm = any(isinstance(module, _NormBase) for module in student.network.modules())
    if has_batch_norm and loader.batch_size and not loader.drop_last:
        yield single_last_batch(len(loader.sampler), loader.batch_size, f"{path}.train_data_loader")


def _normalization(dataset: Any, images: Tensor) -> Normalization | None:
    """Mean and std that the images of a data set have; None where its transforms do not tell."""
    try:
        found = find_normalization(dataset)
    except ConfigError:  # several with different values
        return None
    # normalised elsewhere, such as by a collate function
    is_elsewhere = found == NO_NORMALIZE and (float(images.min()) < 0 or float(images.max()) > 1)
    return None if is_elsewhere else found


def _validation_mistakes(path: str, config: Mapping[str, Any]) -> Iterator[Mistake | None]:
    block = dict(stages(config["train"]))[path].get("val_data_loader")
    # a stage without one of its own keeps the one before
    if block:
        test_id = config["test"]["test_data_loader"]["dataset_id"]
        yield selects_on_test(config["datasets"], block["dataset_id"], test_id, f"{path}.val_data_loader")


# measuring


def _timed(function: Callable[[], None], where: Place) -> float:
    """The seconds until the device was done."""
    _synchronize(where.device)
    start = time.perf_counter()
    function()
    _synchronize(where.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# text


def _name(thing: object) -> str:
    """What the YAML calls it: torchdistill's wrapper around a loss goes by the loss."""
    return type(getattr(thing, "low_level_loss", thing)).__name__


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _size(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()):,} parameters"


def _row(term: TermTrial) -> list[str]:
    gradient = "weight is 0" if term.gradient is None else f"{term.gradient:.3g}"
    return [term.name, term.loss, f"{term.weight:g}", f"{term.value:.4g}", f"{term.weight * term.value:.4g}", gradient]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown whose columns are aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))} |"

    return [line(header), f"|{'|'.join('-' * (width + 2) for width in widths)}|", *map(line, rows)]

"""What a box hands to the adversarial terms, checked before the first step: batch, labels, networks."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchdistill_adv.boxes import Side
from torchdistill_adv.checks import check_logits
from torchdistill_adv.errors import ConfigError, inside, nearest
from torchdistill_adv.guards import eval_mode, on_cloned_buffers

if TYPE_CHECKING:
    from torchdistill_adv.binding import Binding


def check_batch(batch: Any, path: str) -> None:
    """A batch that can be perturbed: a float tensor (N, ...).

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(batch, Tensor) and batch.is_floating_point() and batch.dim() >= 2:
        return
    found = f"a {type(batch).__name__}"
    if isinstance(batch, Tensor):
        found = f"a tensor {tuple(batch.shape)} of {batch.dtype}"
    raise ConfigError(
        f"found a batch that is {found}; adversarial terms perturb a float tensor (N, C, H, W)",
        f"{path}.train_data_loader",
    )


def check_labels(labels: Any, count: int, num_classes: int, path: str, who: str) -> None:
    """Class numbers (count,), each below ``num_classes``, which ``who`` needs.

    Raises:
        ConfigError: they are something else.
    """
    expected = f"int64 class numbers of shape ({count},) from 0 to {num_classes - 1}"
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != (count,):
        found = f"{tuple(labels.shape)} of {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ConfigError(
            f"found labels {found}; {who} needs {expected}. Without labels: losses that read none (docs/methods.md), "
            "or label_free: true in DARWINLoss and SmaraADLoss",
            f"{path}.train_data_loader",
        )
    low, high = (int(v) for v in labels.aminmax())
    if low < 0 or high >= num_classes:
        raise ConfigError(
            f"found labels from {low} to {high}; the networks need {expected}", f"{path}.train_data_loader"
        )


def check_networks(binding: Binding, images: Tensor) -> int:
    """Try the networks on one image, without a trace, and the images against every threat model.

    Returns:
        The student's number of classes.

    Raises:
        ConfigError: images out of range, a network that returns no logits, or networks with different classes.
    """
    for term in binding.evaluated:
        with inside(term.path), inside("threat"):
            for search in term.searches:
                search.threat.check_inputs(images)
    names = {"student": "student_model" if binding.teacher is not None else "model", "teacher": "teacher_model"}
    classes = {"student": _num_classes(binding, binding.student, images, names["student"])}
    if binding.teacher is not None and any(term.needs_teacher for term in binding.evaluated):
        classes["teacher"] = _num_classes(binding, binding.teacher, images, names["teacher"])
    for term in binding.evaluated:
        if term.compares_predictions and classes["student"] != classes["teacher"]:
            raise ConfigError(
                f"{type(term).__name__} compares predictions of {classes['teacher']} classes (teacher) with "
                f"{classes['student']} (student); give both models the same num_classes",
                term.path,
            )
        for option, part in term.teacher_parts.items():
            assert binding.teacher is not None
            with inside(term.path):
                _check_part(binding, binding.teacher, part, images, classes["student"], option)
    return classes["student"]


def _check_part(binding: Binding, teacher: Side, part: str, images: Tensor, num_classes: int, option: str) -> None:
    """Refuse a submodule of the teacher that is not there, or no network of the same classes."""
    try:
        network = teacher.network.get_submodule(part)
    except AttributeError as error:
        parts = [name for name, _ in teacher.network.named_children()]
        raise ConfigError(f"found {part!r}; the teacher has no such part. {nearest(part, parts)}", option) from error
    found = _num_classes(binding, dataclasses.replace(teacher, network=network), images, f"teacher_model.{part}")
    if found != num_classes:
        raise ConfigError(f"found {part!r}, which has {found} classes; the student has {num_classes}", option)


def _num_classes(binding: Binding, side: Side, images: Tensor, name: str) -> int:
    try:
        with binding.no_trace("check"), torch.no_grad(), eval_mode(side.network), on_cloned_buffers(side.network):
            logits = side.network(images[:1])
    except TypeError as error:
        raise ConfigError(f"cannot be called with images alone: {error}", f"models.{name}") from error
    finally:
        # under autocast the pass above leaves casts of the weights without a gradient, which the host would use
        torch.clear_autocast_cache()
    return check_logits(logits, f"models.{name}").shape[1]

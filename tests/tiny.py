"""A box of two tiny networks on random images, for the tests of binding and of single losses."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler, TensorDataset
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.interfaces.registry import register_forward_proc_func
from torchdistill.core.training import get_training_box

import torchdistill_adv  # noqa: F401
from torchdistill_adv.boxes import Box

NUM_CLASSES = 5
NORMALIZE = {"mean": [0.4, 0.5], "std": [0.3, 0.25]}
PIXEL_THREAT = {**NORMALIZE, "norm": "linf", "eps": "8/255"}
L2_THREAT = {**NORMALIZE, "norm": "l2", "eps": 0.3, "space": "input"}

KD = {
    "criterion": {
        "key": "KDLoss",
        "kwargs": {
            "student_module_path": ".",
            "student_module_io": "output",
            "teacher_module_path": ".",
            "teacher_module_io": "output",
            "temperature": 4.0,
            "alpha": 0.1,
            "reduction": "batchmean",
        },
    },
    "weight": 1.0,
}

CE = {
    "criterion": {"key": "CrossEntropyLoss", "kwargs": {"reduction": "mean"}},
    "criterion_wrapper": {
        "key": "SimpleLossWrapper",
        "kwargs": {
            "input": {"is_from_teacher": False, "module_path": ".", "io": "output"},
            "target": {"uses_label": True},
        },
    },
    "weight": 1.0,
}


def matching(module_path: str, **kwargs: Any) -> dict[str, Any]:
    """Mean squared error between what student and teacher have at ``module_path``."""
    sides = {"input": False, "target": True}
    io = {name: {"is_from_teacher": t, "module_path": module_path, "io": "output"} for name, t in sides.items()}
    wrapper = {"key": "SimpleLossWrapper", "kwargs": io}
    return {"criterion": {"key": "MSELoss", "kwargs": kwargs}, "criterion_wrapper": wrapper, "weight": 1.0}


def tald(weight: float = 0.01, **options: Any) -> dict[str, Any]:
    kwargs = {
        "adversary": {"key": "SVGD", "kwargs": {"num_particles": 2, "bandwidth": "median"}},
        "threat": L2_THREAT,
        **options,
    }
    return {"criterion": {"key": "TALDLoss", "kwargs": kwargs}, "weight": weight}


def on_adversarial(term: dict[str, Any], weight: float = 1.0, **options: Any) -> dict[str, Any]:
    """``term`` on adversarial examples."""
    kwargs = {
        "adversary": {"key": "PGD", "kwargs": {"num_steps": 2}},
        "objective": "kl_teacher_student",
        "threat": PIXEL_THREAT,
        **options,
    }
    if "criterion_wrapper" in term:
        kwargs["criterion_wrapper"] = term["criterion_wrapper"]
    wrapper = {"key": "OnAdversarialExamples", "kwargs": kwargs}
    return {"criterion": term["criterion"], "criterion_wrapper": wrapper, "weight": weight}


def network(
    seed: int, width: int = 4, bn: bool = True, dropout: float = 0.0, num_classes: int = NUM_CLASSES
) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width) if bn else nn.Identity(), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(dropout), nn.Linear(4 * width, num_classes)]
        return nn.Sequential(*layers)


def sharp(seed: int, **options: Any) -> nn.Sequential:
    """A network as sure of itself as a trained one."""
    net = network(seed, **options)
    with torch.no_grad():
        net[-1].weight *= 10
    return net


def images(count: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, 2, 6, 6, generator=generator)
    mean, std = (torch.tensor(NORMALIZE[name]).view(1, 2, 1, 1) for name in ("mean", "std"))
    return (pixels - mean) / std, torch.randint(NUM_CLASSES, (count,), generator=generator)


def train_config(sub_terms: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "num_epochs": 1,
        "pre_epoch_process": "bind_adversarial_losses",
        "train_data_loader": {
            "dataset_id": "data",
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": {"batch_size": 6},
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "model": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": sub_terms}},
        **changes,
    }


def tiny_box(
    sub_terms: dict[str, Any],
    *,
    teacher: nn.Module | Callable[[], nn.Module] | None = lambda: network(1, width=8),
    student: nn.Module | None = None,
    double: bool = False,
    hooks: dict[str, list[str]] | None = None,
    **changes: Any,
) -> Box:
    """A box on the CPU; ``teacher=None`` gives a training box, ``hooks`` are torchdistill's forward hooks."""
    student = network(2) if student is None else student
    if teacher is not None and not isinstance(teacher, nn.Module):
        teacher = teacher()
    if double:
        student, teacher = student.double(), teacher and teacher.double()
    torch.manual_seed(0)
    config = train_config(sub_terms, **changes)
    for side in ("teacher", "student"):
        config[side]["forward_hook"] = hooks or {}
    common = ({"data": TensorDataset(*images())}, config, torch.device("cpu"), None, False, 1)
    if teacher is None:
        return get_training_box(student, *common)
    return get_distillation_box(teacher, student, *common)


def bound(sub_terms: dict[str, Any], **options: Any) -> Box:
    """A tiny box whose first epoch has begun."""
    box = tiny_box(sub_terms, **options)
    box.pre_epoch_process(epoch=0)
    return box


def with_side(
    sub_terms: dict[str, Any], networks: tuple[nn.Module, nn.Module] | None = None, **sides: dict[str, Any]
) -> Box:
    """A tiny distillation box with other settings of its sides, whose first epoch has begun."""
    data = tiny_box({"kd": KD}).dataset_dict
    config = train_config(sub_terms)
    for side, changes in sides.items():
        config[side] |= changes
    networks = networks or (network(1), network(2))
    box = get_distillation_box(*networks, data, config, torch.device("cpu"), None, False, 1)
    box.pre_epoch_process(epoch=0)
    return box


def term(box: Box, name: str) -> Any:
    return box.criterion.term_dict[name][0]


def step(box: Box, x: Tensor, y: Any, supp_dict: Any = None) -> Tensor:
    """One training step."""
    loss = box.forward_process(x, y, supp_dict)
    box.post_forward_process(loss=loss)
    return loss.detach()


@register_forward_proc_func
def probabilities_for_test(model: nn.Module, sample_batch: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A user's forward process whose result has the shape of logits."""
    return model(sample_batch).softmax(1)


def leave_process_group() -> None:
    """A DistributedDataParallel that outlives the group can abort the process, and boxes are in reference cycles."""
    gc.collect()
    torch.distributed.destroy_process_group()

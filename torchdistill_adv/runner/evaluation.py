"""Accuracy on clean images."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sized
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from torchdistill_adv.checks import check_logits
from torchdistill_adv.guards import eval_mode, share_buffers
from torchdistill_adv.runner.processes import to_device


@torch.no_grad()
def accuracy(
    model: nn.Module, loader: DataLoader[Any], device: torch.device, name: str = "student_model"
) -> dict[str, float]:
    """Top-1 and, where there are five classes, top-5 accuracy in percent, the same in every process.

    Args:
        model: the network itself, outside torchdistill's wrappers; its modes are left as they were.
        loader: gives images and labels.
        device: where the model is.
        name: the model's key in the YAML, for the error.

    Raises:
        ConfigError: the model returns no logits.
    """
    share_buffers(model)
    remaining = _share(loader)
    # correct among the first, correct among the first five, all
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    num_classes = 0
    with eval_mode(model):
        for images, targets, *_ in loader:
            logits = check_logits(model(to_device(images, device)), f"models.{name}", "accuracy needs")
            num_classes = logits.shape[1]
            best = logits[:remaining].topk(min(5, num_classes)).indices
            hits = best == targets[:remaining].to(device)[:, None]
            counts += torch.stack([hits[:, 0].sum(), hits.sum(), hits.new_tensor(len(hits), dtype=torch.int64)])
            remaining -= len(hits)
    if dist.is_initialized():
        dist.all_reduce(counts)
    first, any_of_five, total = counts.tolist()
    result = {"top1": 100 * first / total}
    return {**result, "top5": 100 * any_of_five / total} if num_classes >= 5 else result


def describe(found: Mapping[str, float] | None) -> str:
    """Accuracies as they are logged."""
    return ", ".join(f"{name} {value:.2f} %" for name, value in (found or {}).items()) or "not measured"


def _share(loader: DataLoader[Any]) -> int:
    """How many images this process counts: a distributed sampler repeats some to make all shares equal."""
    sampler = getattr(loader.batch_sampler, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        return len(range(sampler.rank, len(cast(Sized, sampler.dataset)), sampler.num_replicas))
    return sys.maxsize

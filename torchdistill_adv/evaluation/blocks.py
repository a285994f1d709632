"""What is evaluated, in blocks of images, and fingerprints of all that the outcomes depend on."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader

import torchdistill_adv
from torchdistill_adv.checks import integer
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.evaluation.pixels import PixelModel


def subset(total: int, count: Any, seed: int) -> list[int]:
    """The places of ``count`` of ``total`` images, drawn with ``seed``, in their order; all of them for None.

    Raises:
        ConfigError: there are none.
    """
    if total == 0:
        raise ConfigError("found a data set without images; there is nothing to evaluate", "data")
    if count is None or integer(count, "num_images", minimum=1) >= total:
        return list(range(total))
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: int(count)]
    return sorted(chosen.tolist())


@dataclass(frozen=True)
class Block:
    """Some images of the subset: their places in the data set, pixels (N, C, ...) and labels (N,)."""

    ids: list[int]
    pixels: Tensor
    labels: Tensor

    def check_labels(self, num_classes: int) -> None:
        """Refuse labels that are no class numbers of the network.

        Raises:
            ConfigError: with what was found.
        """
        labels = self.labels
        if labels.dim() != 1 or labels.is_floating_point():
            found = f"labels {tuple(labels.shape)} of {labels.dtype}"
            raise ConfigError(f"found {found}; an evaluation needs a class number for every image", "data")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            wrong = low if low < 0 else high
            raise ConfigError(f"found label {wrong}; the model has the classes 0 to {num_classes - 1}", "data")

    def digest(self) -> str:
        """Of all that the outcomes depend on."""
        hasher = hashlib.blake2b(repr((self.ids, self.labels.tolist())).encode(), digest_size=8)
        hasher.update(self.pixels.cpu().contiguous().numpy().tobytes())
        return hasher.hexdigest()


def blocks(loader: DataLoader[Any], indices: list[int], model: PixelModel, device: torch.device) -> Iterator[Block]:
    """The images at ``indices``, in their order."""
    left = iter(indices)
    for images, labels, *_ in loader:
        if not isinstance(images, Tensor) or not images.is_floating_point():
            found = f"a tensor of {images.dtype}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
            raise ConfigError(f"gives {found}; an evaluation needs images of floats, such as ToTensor makes", "data")
        ids = list(islice(left, len(images)))
        yield Block(ids, model.to_pixels(images.to(device)), torch.as_tensor(labels).to(device))


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    modules = (torch, torchvision, torchdistill_adv)
    return {"python": sys.version.split()[0], **{module.__name__: module.__version__ for module in modules}}


def fingerprint(model: nn.Module, *settings: object) -> str:
    """Of a network's structure, weights and buffers, of the versions, and of more settings."""
    hasher = hashlib.blake2b(repr((str(model), versions(), settings)).encode(), digest_size=8)
    hasher.update(weights_digest(model).encode())
    return hasher.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a network's weights and buffers."""
    hasher = hashlib.sha256()
    for name, value in model.state_dict().items():
        hasher.update(repr((name, value.dtype, tuple(value.shape))).encode())
        hasher.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()

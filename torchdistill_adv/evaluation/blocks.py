"""What is evaluated, in blocks of images, and fingerprints of all that the outcomes depend on."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from numbers import Number
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import torchdistill_adv
from torchdistill_adv.checks import integer
from torchdistill_adv.divergences import wide
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.evaluation.pixels import PixelModel


def as_dataset(data: Any) -> Any:
    """What is evaluated, as a data set that has a length and an item (image, label, ...) at every place.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(data, tuple):
        if not all(isinstance(part, Tensor) for part in data) or len({len(part) for part in data}) > 1:
            raise ConfigError("found a tuple that is no (images, labels): two tensors of one length", "data")
        return TensorDataset(*data)
    if isinstance(data, IterableDataset) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        found = type(data).__name__
        raise ConfigError(f"found a {found}; an evaluation needs a data set, such as loader.dataset", "data")
    return data


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
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= num_classes:
            wrong = low if low < 0 else high
            raise ConfigError(f"found label {wrong}; the model has the classes 0 to {num_classes - 1}", "data")

    def digest(self) -> str:
        """Of all that the outcomes depend on."""
        hasher = hashlib.blake2b(repr((self.ids, self.labels.tolist())).encode(), digest_size=8)
        hasher.update(_bytes(self.pixels))
        return hasher.hexdigest()


def blocks(loader: DataLoader[Any], indices: list[int], model: PixelModel, device: torch.device) -> Iterator[Block]:
    """The images at ``indices``, in their order.

    Raises:
        ConfigError: the data set gives something else than images and labels.
    """
    _check_item(loader.dataset[0])
    left = iter(indices)
    for images, labels, *_ in loader:
        if labels.dim() != 1 or labels.is_floating_point():
            found = f"labels {tuple(labels.shape)} of {labels.dtype}"
            raise ConfigError(f"found {found}; an evaluation needs a class number for every image", "data")
        ids = list(islice(left, len(images)))
        # in half precision rounding alone would put examples outside their ball
        yield Block(ids, model.to_pixels(wide(images.to(device))), labels.long().to(device))


def _check_item(item: Any) -> None:
    """Refuse what a data loader could not put together, or would take apart along the wrong dimension."""
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        raise ConfigError(f"gives a {type(item).__name__}; an evaluation needs (image, label, ...)", "data")
    image, label = (torch.as_tensor(part) if isinstance(part, np.ndarray) else part for part in item[:2])
    if not isinstance(image, Tensor) or not image.is_floating_point():
        found = f"a tensor of {image.dtype}" if isinstance(image, Tensor) else f"a {type(image).__name__}"
        raise ConfigError(f"gives {found}; an evaluation needs images of floats, such as ToTensor makes", "data")
    if not isinstance(label, (Tensor, Number)):
        found = type(label).__name__
        raise ConfigError(f"gives a label that is a {found}; an evaluation needs a class number", "data")


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    modules = (torch, torchvision, torchdistill_adv)
    return {"python": sys.version.split()[0], **{module.__name__: module.__version__ for module in modules}}


def fingerprint(model: nn.Module, *settings: object) -> str:
    """Of a network's structure, plain attributes, weights and buffers, of the versions, and of more settings."""
    plain = [sorted((k, v) for k, v in vars(m).items() if isinstance(v, (Number, str))) for m in model.modules()]
    hasher = hashlib.blake2b(repr((str(model), plain, versions(), settings)).encode(), digest_size=8)
    hasher.update(weights_digest(model).encode())
    return hasher.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a network's weights and buffers."""
    hasher = hashlib.sha256()
    for name, value in model.state_dict().items():
        hasher.update(repr((name, value.dtype, tuple(value.shape))).encode())
        hasher.update(_bytes(value))
    return hasher.hexdigest()


def _bytes(values: Tensor) -> bytes:
    """Of any type: numpy has no bfloat16."""
    return values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

"""Networks and data in pixels of [0, 1], the one space that attacks, their radii and every attack library agree on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from torchdistill_adv.errors import ConfigError
from torchdistill_adv.threat import ThreatModel

Normalization = tuple[tuple[float, ...], tuple[float, ...]]


class PixelModel(nn.Module):
    r"""A network that takes pixels of [0, 1]: :math:`f((x - \mu) / \sigma)`.

    Args:
        network: takes normalised images (N, C, ...), gives logits (N, num_classes).
        mean: per-channel mean of the data's Normalize, or one for all channels.
        std: per-channel standard deviation, likewise.

    Raises:
        ConfigError: ``mean`` and ``std`` are no such numbers.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)) -> None:
        super().__init__()
        self.network = network
        first = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
        checked = ThreatModel.build({"eps": 0, "mean": mean, "std": std})
        for name in ("mean", "std"):
            self.register_buffer(name, first.new_tensor(getattr(checked, name)))

    def forward(self, pixels: Tensor) -> Any:
        return self.network(self.normalized(pixels))

    def normalized(self, pixels: Tensor) -> Tensor:
        """Pixels as the network takes them."""
        shape = (1, -1, *[1] * (pixels.dim() - 2))
        # the network's own type: examples are searched in float32 for one in half precision too
        return (pixels.to(self.mean.dtype) - self.mean.view(shape)) / self.std.view(shape)

    def to_pixels(self, images: Tensor) -> Tensor:
        """Normalised images (N, C, ...) as pixels; what rounding put outside [0, 1] is put back.

        Raises:
            ConfigError: they have another number of channels than ``mean``.
        """
        if len(self.mean) not in (1, images.shape[1]):
            raise ConfigError(f"found {len(self.mean)} values, but the images have {images.shape[1]} channels", "mean")
        shape = (1, -1, *[1] * (images.dim() - 2))
        pixels = images * self.std.view(shape).to(images) + self.mean.view(shape).to(images)
        # a value further outside is no rounding, and is for the flags to tell
        outside = (pixels < -ROUNDING) | (pixels > 1 + ROUNDING)
        return torch.where(outside, pixels, pixels.clamp(0, 1))


ROUNDING = 1e-5


def pixel_threat(eps: Any, norm: Any = "linf") -> ThreatModel:
    """The threat model of an evaluation: a ball of ``eps`` pixels around images in [0, 1].

    Raises:
        ConfigError: ``eps`` is no radius in pixels of [0, 1], such as one of 0..255.
    """
    threat = ThreatModel(eps=eps, norm=norm, space="pixel", mean=(0.0,), std=(1.0,))
    if threat.norm == "linf" and 1 < threat.eps < float("inf"):
        raise ConfigError(f"found {eps}; eps is in pixels of [0, 1], so write {threat.eps:g}/255", "eps")
    return threat


def find_normalization(dataset: Any) -> Normalization:
    """Mean and std of the Normalize in the transforms of ``dataset``; 0 and 1 where there is none.

    Wrappers are gone into: ``Subset``, and whatever holds a data set under ``dataset``, ``original`` or
    ``org_dataset``.

    Raises:
        ConfigError: there are several, with different values.
    """
    found = dict.fromkeys((_numbers(t.mean), _numbers(t.std)) for t in _normalizers(dataset))
    if len(found) > 1:
        raise ConfigError(
            f"found {len(found)} different Normalize in the transforms of {type(dataset).__name__}; write --mean and "
            "--std",
            "mean",
        )
    return next(iter(found), ((0.0,), (1.0,)))


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(map(float, values if isinstance(values, Sequence) else torch.as_tensor(values).reshape(-1).tolist()))


def _normalizers(node: Any) -> Iterator[Any]:
    """Every transform with a mean and a std below a data set or a transform."""
    # torchvision's two versions and timm's have no common class
    if hasattr(node, "mean") and hasattr(node, "std") and callable(node):
        yield node
    elif isinstance(node, (list, tuple)):
        for item in node:
            yield from _normalizers(item)
    elif node is not None:
        names = ("dataset",) if isinstance(node, Subset) else ("transform", "transforms", "original", "org_dataset")
        for name in names:
            yield from _normalizers(getattr(node, name, None))

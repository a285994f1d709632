"""Random numbers of one search, apart from the global streams, so that runs repeat and processes can be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from anything with a stable ``repr``."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Noise:
    """Uniform and normal numbers from a generator of its own."""

    def __init__(self, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.dtype = dtype

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """U[-1, 1)."""
        options = {"generator": self.generator, "device": self.generator.device}
        return torch.rand(tuple(shape), dtype=self.dtype, **options).mul_(2).sub_(1)  # type: ignore[call-overload]

    def normal(self, shape: Sequence[int]) -> Tensor:
        """N(0, 1)."""
        options = {"generator": self.generator, "device": self.generator.device}
        return torch.randn(tuple(shape), dtype=self.dtype, **options)  # type: ignore[call-overload]


class ImageNoise(Noise):
    """Random numbers of each image from a stream of its own, so that they do not depend on the batch it comes in."""

    def __init__(self, seed: int, ids: Sequence[int], like: Tensor) -> None:
        self.seed, self.ids, self.like = seed, list(ids), like
        # on the CPU, so that they are the same on every device
        self.generators = [torch.Generator().manual_seed(derive_seed(seed, image)) for image in self.ids]

    def some(self, places: Tensor, purpose: object) -> ImageNoise:
        """The noise of some of the images, a stream of its own for each purpose."""
        return ImageNoise(derive_seed(self.seed, purpose), [self.ids[i] for i in places.tolist()], self.like)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """U[-1, 1), for a shape whose first number is that of the images."""
        return self._draw(torch.rand, shape) * 2 - 1

    def normal(self, shape: Sequence[int]) -> Tensor:
        """N(0, 1), likewise."""
        return self._draw(torch.randn, shape)

    def _draw(self, distribution: Any, shape: Sequence[int]) -> Tensor:
        each = [distribution(tuple(shape[1:]), generator=g, dtype=self.like.dtype) for g in self.generators]
        return torch.stack(each).to(self.like.device)

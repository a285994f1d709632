"""Random numbers of one search, apart from the global streams, so that runs repeat and processes can be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

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

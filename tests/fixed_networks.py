"""Small fixed networks to attack: trained on digits, robustly trained, sharpened; and linear ones."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchdistill.models.registry import register_model

from torchdistill_adv.datasets import Digits

EPS = {"linf": 0.15, "l2": 0.8}


@cache
def all_digits() -> tuple[Tensor, Tensor]:
    """1,797 images, (N, 1, 8, 8) in [0, 1], and their labels."""
    splits = [Digits(split) for split in ("train", "val", "test")]
    pixels = torch.cat([torch.from_numpy(split.images) for split in splits])[:, None] / 255
    return pixels, torch.tensor([label for split in splits for label in split.targets])


def digits(count: int = 1000) -> tuple[Tensor, Tensor]:
    """The last of them; the networks have not seen the last 597, and the last 359 are the test set."""
    x, y = all_digits()
    return x[-count:], y[-count:]


class Sharpened(nn.Module):
    """A network as sure of itself as one trained for long."""

    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.network(x)


@register_model
def digits_cnn() -> nn.Sequential:
    """Two convolutions and a linear layer, without normalisation."""
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))


@cache
def network(name: str) -> nn.Module:
    """``plain`` and ``robust`` were trained on two digits of three; ``sharp`` is ``plain`` with twice the logits."""
    if name == "sharp":
        return Sharpened(network("plain"), 2).eval()
    x, y = (part[:1200] for part in all_digits())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = digits_cnn()
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        for _ in range(8 if name == "plain" else 12):
            for batch in torch.randperm(len(x)).split(100):
                images = x[batch]
                for _ in range(0 if name == "plain" else 4):
                    leaf = images.clone().requires_grad_()
                    gradient = torch.autograd.grad(F.cross_entropy(net(leaf), y[batch]), leaf)[0]
                    images = (images + 0.06 * gradient.sign()).clamp(x[batch] - 0.15, x[batch] + 0.15).clamp(0, 1)
                optimizer.zero_grad()
                F.cross_entropy(net(images), y[batch]).backward()
                optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return net.eval()


def right(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x).argmax(1) == y


def linear_problem(
    num_classes: int, norm: str, count: int = 40, shape: tuple[int, int, int] = (1, 6, 6)
) -> tuple[nn.Sequential, Tensor, Tensor, Tensor, float]:
    r"""A linear network, images around 0.5 that it classifies rightly, how far their nearest other class is, a radius.

    The distance is :math:`\min_j (z_y - z_j) / \|w_y - w_j\|_q`, with q dual to the norm, as no change reaches 0 or 1.
    The radius is the median of the distances, and no image is so near it that rounding decides.
    """
    generator = torch.Generator().manual_seed(num_classes)
    net = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), num_classes)).eval()
    x = 0.4 + 0.2 * torch.rand(2 * count, *shape, generator=generator)
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(net[1].weight.shape, generator=generator))
        net[1].bias.copy_(-net[1].weight.sum(1) / 2)
        z = net(x)
    y = z.argmax(1)
    difference = net[1].weight.detach()[y][:, None] - net[1].weight.detach()
    gaps = z.gather(1, y[:, None]) - z
    distance = (gaps / difference.norm(p=1 if norm == "linf" else 2, dim=2)).scatter(1, y[:, None], torch.inf).amin(1)
    radius = float(distance.median())
    kept = ((distance / radius - 1).abs() > 0.02).nonzero()[:count, 0]
    return net, x[kept], y[kept], distance[kept], radius

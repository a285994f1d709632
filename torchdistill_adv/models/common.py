"""What several networks share."""

from __future__ import annotations

from torch import nn


def he_init(module: nn.Module) -> None:
    """Start every convolution at N(0, 2 / (k^2 out_channels)) and bias zero, as the networks' official code does."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

"""A network that is small enough for studies on two CPU cores."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchdistill.models.registry import register_model


@register_model(key="strided_cnn")
class StridedCNN(nn.Module):
    """Convolutions of stride 2 with batch normalisation and ReLU, pooling, then a linear layer.

    (N, 3, H, W) to (N, num_classes). Halving the resolution from the first layer on makes a pass several times cheaper
    than one of a network of the papers, at the price of accuracy.

    Args:
        num_classes: number of classes.
        widths: channels of each convolution.
    """

    def __init__(self, num_classes: int = 10, widths: Sequence[int] = (16, 32, 64)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((3, *widths), widths, strict=False):
            layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.pool(self.features(x)))
        return logits

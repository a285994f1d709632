"""A small convolutional network for small images."""

from __future__ import annotations

from torch import Tensor, nn
from torchdistill.models.registry import register_model


@register_model(key="small_cnn")
class SmallCNN(nn.Module):
    """Convolution, batch normalisation and ReLU, ``depth`` times at growing width, then a linear layer.

    The resolution halves after every second convolution. (N, in_channels, H, W) to (N, num_classes). Ours.

    Args:
        num_classes: number of classes.
        in_channels: channels of the images.
        width: channels of the first convolution.
        depth: number of convolutions.
        dropout: dropout before the linear layer.

    Example:
        .. code-block:: yaml

            student_model:
              key: 'small_cnn'
              kwargs: {num_classes: 10, in_channels: 1, width: 8, depth: 3}
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 1, width: int = 16, depth: int = 3, dropout: float = 0.0
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(depth):
            out_channels = width * 2 ** (i // 2)
            stride = 2 if i % 2 == 1 else 1
            layers += [
                nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(),
            ]
            in_channels = out_channels
        self.features = nn.Sequential(*layers)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.dropout(self.pool(self.features(x))))
        return logits

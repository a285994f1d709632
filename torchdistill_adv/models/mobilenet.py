"""The two MobileNetV2 of the distillation papers for images of 32 x 32 pixels, on torchvision's class."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torchdistill.models.registry import register_model
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.ops import Conv2dNormActivation

# expansion, channels, blocks, stride: the paper's, but stride 1 in the second stage
STAGES = [
    [1, 16, 1, 1],
    [6, 24, 2, 1],
    [6, 32, 3, 2],
    [6, 64, 4, 2],
    [6, 96, 3, 1],
    [6, 160, 3, 2],
    [6, 320, 1, 1],
]


class _InvertedResidual(nn.Module):
    """Expand, filter each channel, project; torchvision's has ReLU6 and no convolution that expands by 1.

    A block of stride 1 that changes the width has a shortcut, a 1 x 1 convolution, if ``projects``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        expand_ratio: int,
        norm_layer: Callable[..., nn.Module],
        *,
        projects: bool,
    ) -> None:
        super().__init__()
        width = in_channels * expand_ratio
        layer = partial(Conv2dNormActivation, norm_layer=norm_layer)
        self.conv = nn.Sequential(
            layer(in_channels, width, 1),
            layer(width, width, 3, stride, groups=width),
            layer(width, out_channels, 1, activation_layer=None),
        )
        self.shortcut: nn.Module | None = None
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif stride == 1 and projects:
            self.shortcut = layer(in_channels, out_channels, 1, activation_layer=None)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out if self.shortcut is None else out + self.shortcut(x)


def _mobilenet_v2(num_classes: int, *, width_mult: float, stem_stride: int, projects: bool) -> nn.Module:
    block = partial(_InvertedResidual, projects=projects)
    # widths are multiples of 8 at full width, and not rounded at half of it
    model = MobileNetV2(num_classes, width_mult, STAGES, round_nearest=1, block=block, dropout=0.0)
    stem, head = model.features[0], model.features[-1]
    stem[0].stride = (stem_stride, stem_stride)
    stem[2], head[2] = nn.ReLU(), nn.ReLU()
    return model


@register_model
def cifar_mobilenet_v2(num_classes: int = 10) -> nn.Module:
    """MobileNetV2 for 32 x 32 images: the small student of robust distillation (ARD, RSLAD, AdaAD).

    (N, 3, 32, 32) to (N, num_classes); the map that is pooled is ``features``, (N, 1280, 4, 4). 2,296,922 parameters
    at 10 classes.

    Paper: `MobileNetV2: Inverted Residuals and Linear Bottlenecks <https://arxiv.org/abs/1801.04381>`_ (Sandler et al.,
    CVPR 2018). **The official code's** (`pytorch-cifar <https://github.com/kuangliu/pytorch-cifar>`_): stride 1 in stem
    and second stage, ReLU for ReLU6, a shortcut with a convolution where a block of stride 1 changes the width, no
    dropout. Built on torchvision's class, with its names of tensors and its start, where pytorch-cifar keeps PyTorch's
    default.

    Args:
        num_classes: number of classes.

    Example:
        .. code-block:: yaml

            student_model:
              key: 'cifar_mobilenet_v2'
              kwargs: {num_classes: 10}
    """
    return _mobilenet_v2(num_classes, width_mult=1.0, stem_stride=1, projects=True)


@register_model
def cifar_mobilenet_v2_half(num_classes: int = 10) -> nn.Module:
    """MobileNetV2 of half the width for 32 x 32 images: the student of RepDistiller's pairs of different styles.

    (N, 3, 32, 32) to (N, num_classes); the map that is pooled is ``features``, (N, 1280, 2, 2). 812,836 parameters at
    100 classes.

    Paper: `MobileNetV2: Inverted Residuals and Linear Bottlenecks <https://arxiv.org/abs/1801.04381>`_ (Sandler et al.,
    CVPR 2018). **The official code's** (`RepDistiller <https://github.com/HobbitLong/RepDistiller>`_): stride 1 in the
    second stage, ReLU for ReLU6, no dropout, and the start. Built on torchvision's class, with its names of tensors.

    Args:
        num_classes: number of classes.

    Example:
        .. code-block:: yaml

            student_model:
              key: 'cifar_mobilenet_v2_half'
              kwargs: {num_classes: 100}
    """
    return _mobilenet_v2(num_classes, width_mult=0.5, stem_stride=2, projects=False)

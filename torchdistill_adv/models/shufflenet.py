"""ShuffleNetV1 and ShuffleNetV2 for images of 32 x 32 pixels."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchdistill.models.registry import register_model
from torchvision.models.shufflenetv2 import ShuffleNetV2, channel_shuffle
from torchvision.ops import Conv2dNormActivation

GROUPS = 3


class _Unit(nn.Module):
    """A bottleneck of grouped convolutions; at stride 2 its output is concatenated with the pooled input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int) -> None:
        super().__init__()
        added = out_channels - in_channels if stride == 2 else out_channels
        width = added // 4
        self.groups = groups
        self.compress = Conv2dNormActivation(in_channels, width, 1, groups=groups)
        self.depthwise = Conv2dNormActivation(width, width, 3, stride, groups=width)
        self.expand = Conv2dNormActivation(width, added, 1, groups=GROUPS, activation_layer=None)
        self.pool = nn.AvgPool2d(3, 2, 1) if stride == 2 else None
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.expand(self.depthwise(channel_shuffle(self.compress(x), self.groups)))
        result: Tensor = self.relu(out + x if self.pool is None else torch.cat([out, self.pool(x)], 1))
        return result


@register_model
def cifar_shufflenet_v1(num_classes: int = 10) -> nn.Module:
    """ShuffleNetV1 of three groups for 32 x 32 images: a student of RepDistiller's pairs of different styles.

    (N, 3, 32, 32) to (N, num_classes); the map that is pooled is ``layer3``, (N, 960, 4, 4). 949,258 parameters at 100
    classes.

    Paper: `ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices
    <https://arxiv.org/abs/1707.01083>`_ (Zhang et al., CVPR 2018). **The official code's** (`RepDistiller
    <https://github.com/HobbitLong/RepDistiller>`_): network and start. Its stem is a 1 x 1 convolution without pooling,
    and a ReLU follows the depthwise convolutions, where the paper has none.

    Args:
        num_classes: number of classes.

    Example:
        .. code-block:: yaml

            student_model:
              key: 'cifar_shufflenet_v1'
              kwargs: {num_classes: 100}
    """

    def stage(in_channels: int, out_channels: int, num_units: int) -> nn.Module:
        # 24 channels, the stem's, are too few to be compressed in groups
        first = _Unit(in_channels, out_channels, 2, groups=1 if in_channels == 24 else GROUPS)
        return nn.Sequential(first, *(_Unit(out_channels, out_channels, 1, GROUPS) for _ in range(num_units - 1)))

    return nn.Sequential(
        OrderedDict(
            conv1=Conv2dNormActivation(3, 24, 1),
            layer1=stage(24, 240, 4),
            layer2=stage(240, 480, 8),
            layer3=stage(480, 960, 4),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(1),
            fc=nn.Linear(960, num_classes),
        )
    )


class _ShuffleNetV2(ShuffleNetV2):
    """torchvision's for 32 x 32 images, with the pooling as a module, which hooks can read."""

    def __init__(self, num_classes: int) -> None:
        super().__init__([4, 8, 4], [24, 116, 232, 464, 1024], num_classes)
        self.conv1[0] = nn.Conv2d(3, 24, 1, bias=False)
        self.maxpool = nn.Identity()
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage4(self.stage3(self.stage2(self.conv1(x))))
        logits: Tensor = self.fc(self.avgpool(self.conv5(x)).flatten(1))
        return logits


@register_model
def cifar_shufflenet_v2(num_classes: int = 10) -> nn.Module:
    """ShuffleNetV2 for 32 x 32 images: a student of RepDistiller's pairs of different styles.

    (N, 3, 32, 32) to (N, num_classes); the map that is pooled is ``conv5``, (N, 1024, 4, 4). 1,355,528 parameters at
    100 classes.

    Paper: `ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design
    <https://arxiv.org/abs/1807.11164>`_ (Ma et al., ECCV 2018). **The official code's** (`RepDistiller
    <https://github.com/HobbitLong/RepDistiller>`_): network and start; the stem is a 1 x 1 convolution without pooling.
    It is torchvision's at width 1 with that stem, so tensors have torchvision's names.

    Args:
        num_classes: number of classes.

    Example:
        .. code-block:: yaml

            student_model:
              key: 'cifar_shufflenet_v2'
              kwargs: {num_classes: 100}
    """
    return _ShuffleNetV2(num_classes)

"""ResNets for images of 32 x 32 pixels, from torchvision's blocks."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn
from torchdistill.models.registry import register_model
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet, conv1x1, conv3x3

from torchdistill_adv.models.common import he_init


def _with_small_stem(model: nn.Module) -> nn.Module:
    """torchvision's ResNet that sees every pixel: 3 x 3 instead of 7 x 7, stride 1, no max pooling."""
    stem = conv3x3(3, 64)
    he_init(stem)
    model.conv1 = stem
    model.maxpool = nn.Identity()
    return model


@register_model
def cifar_resnet18(num_classes: int = 10) -> nn.Module:
    """ResNet-18 for 32 x 32 images: the usual student of robust distillation (RSLAD, IAD, AdaAD).

    (N, 3, 32, 32) to (N, num_classes); the map that is pooled is ``layer4``, (N, 512, 4, 4). 11,173,962 parameters at
    10 classes.

    Paper: `Deep Residual Learning for Image Recognition <https://arxiv.org/abs/1512.03385>`_ (He et al., CVPR 2016).
    **The official code's** (`pytorch-cifar <https://github.com/kuangliu/pytorch-cifar>`_): the network. It is
    torchvision's with the stem replaced, so tensors have torchvision's names, and convolutions start as torchvision's
    do, where pytorch-cifar keeps PyTorch's default.

    Args:
        num_classes: number of classes.

    Example:
        .. code-block:: yaml

            student_model:
              key: 'cifar_resnet18'
              kwargs: {num_classes: 100}
    """
    return _with_small_stem(ResNet(BasicBlock, [2, 2, 2, 2], num_classes))


@register_model
def cifar_resnet50(num_classes: int = 10) -> nn.Module:
    """ResNet-50 for 32 x 32 images: a teacher of RepDistiller's MobileNetV2 and VGG-8.

    (N, 3, 32, 32) to (N, num_classes); the map that is pooled is ``layer4``, (N, 2048, 4, 4). 23,705,252 parameters at
    100 classes.

    Paper: `Deep Residual Learning for Image Recognition <https://arxiv.org/abs/1512.03385>`_ (He et al., CVPR 2016).
    **The official code's** (`RepDistiller <https://github.com/HobbitLong/RepDistiller>`_; the network of pytorch-cifar
    too): network and start. It is torchvision's with the stem replaced, so tensors have torchvision's names.

    Args:
        num_classes: number of classes.

    Example:
        .. code-block:: yaml

            teacher_model:
              key: 'cifar_resnet50'
              kwargs: {num_classes: 100}
    """
    return _with_small_stem(ResNet(Bottleneck, [3, 4, 6, 3], num_classes))


def _resnet_x4(num_blocks: int, num_classes: int) -> nn.Module:
    def stage(in_channels: int, out_channels: int, stride: int) -> nn.Module:
        shortcut = nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))
        first = BasicBlock(in_channels, out_channels, stride, shortcut)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels) for _ in range(num_blocks - 1)))

    model = nn.Sequential(
        OrderedDict(
            conv1=conv3x3(3, 32),
            bn1=nn.BatchNorm2d(32),
            relu=nn.ReLU(),
            layer1=stage(32, 64, 1),
            layer2=stage(64, 128, 2),
            layer3=stage(128, 256, 2),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(1),
            fc=nn.Linear(256, num_classes),
        )
    )
    he_init(model)
    return model


@register_model
def cifar_resnet8x4(num_classes: int = 10) -> nn.Module:
    """ResNet-8 of four times the width: the student of :func:`cifar_resnet32x4`.

    (N, 3, 32, 32) to (N, num_classes); the map that is pooled is ``layer3``, (N, 256, 8, 8). 1,233,540 parameters at
    100 classes.

    Paper: `Contrastive Representation Distillation <https://arxiv.org/abs/1910.10699>`_ (Tian et al., ICLR 2020).
    **The official code's** (`RepDistiller <https://github.com/HobbitLong/RepDistiller>`_): network, start and names of
    tensors, so that its checkpoints load. The stem has twice the width of ResNet-20's, the stages four times.

    Args:
        num_classes: number of classes.

    Example:
        .. code-block:: yaml

            student_model:
              key: 'cifar_resnet8x4'
              kwargs: {num_classes: 100}
    """
    return _resnet_x4(1, num_classes)


@register_model
def cifar_resnet32x4(num_classes: int = 10) -> nn.Module:
    """ResNet-32 of four times the width: a teacher of RepDistiller's pairs.

    (N, 3, 32, 32) to (N, num_classes); the map that is pooled is ``layer3``, (N, 256, 8, 8). 7,433,860 parameters at
    100 classes.

    Paper: `Contrastive Representation Distillation <https://arxiv.org/abs/1910.10699>`_ (Tian et al., ICLR 2020).
    **The official code's** (`RepDistiller <https://github.com/HobbitLong/RepDistiller>`_): network, start and names of
    tensors, so that its checkpoints load. The stem has twice the width of ResNet-20's, the stages four times.

    Args:
        num_classes: number of classes.

    Example:
        .. code-block:: yaml

            teacher_model:
              key: 'cifar_resnet32x4'
              kwargs: {num_classes: 100}
    """
    return _resnet_x4(5, num_classes)

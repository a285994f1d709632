"""VGGs for images of 32 x 32 pixels, from torchvision's layers."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn
from torchdistill.models.registry import register_model
from torchvision.models.vgg import make_layers

from torchdistill_adv.models.common import he_init


def _vgg(convolutions: int, num_classes: int) -> nn.Module:
    """``convolutions`` a stage; the last two stages are one, as pooling between them is left out."""
    widths = [layer for width in (64, 128, 256) for layer in (*[width] * convolutions, "M")]
    classifier = nn.Linear(512, num_classes)
    nn.init.normal_(classifier.weight, 0, 0.01)
    nn.init.zeros_(classifier.bias)
    model = nn.Sequential(
        OrderedDict(
            features=make_layers([*widths, *[512] * 2 * convolutions], batch_norm=True),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(1),
            classifier=classifier,
        )
    )
    he_init(model)
    return model


@register_model
def cifar_vgg8(num_classes: int = 10) -> nn.Module:
    """VGG-8 with batch normalisation for 32 x 32 images: the student of :func:`cifar_vgg13` and of ResNet-50.

    (N, 3, 32, 32) to (N, num_classes); the map that is pooled is ``features``, (N, 512, 4, 4). 3,965,028 parameters at
    100 classes.

    Paper: `Very Deep Convolutional Networks for Large-Scale Image Recognition <https://arxiv.org/abs/1409.1556>`_
    (Simonyan and Zisserman, ICLR 2015). **The official code's** (`RepDistiller
    <https://github.com/HobbitLong/RepDistiller>`_): network and start: one convolution a stage but two in the last,
    three poolings, the mean of the map and one linear layer.

    Args:
        num_classes: number of classes.

    Example:
        .. code-block:: yaml

            student_model:
              key: 'cifar_vgg8'
              kwargs: {num_classes: 100}
    """
    return _vgg(1, num_classes)


@register_model
def cifar_vgg13(num_classes: int = 10) -> nn.Module:
    """VGG-13 with batch normalisation for 32 x 32 images: a teacher of RepDistiller's VGG-8 and MobileNetV2.

    (N, 3, 32, 32) to (N, num_classes); the map that is pooled is ``features``, (N, 512, 4, 4). 9,462,180 parameters at
    100 classes.

    Paper: `Very Deep Convolutional Networks for Large-Scale Image Recognition <https://arxiv.org/abs/1409.1556>`_
    (Simonyan and Zisserman, ICLR 2015). **The official code's** (`RepDistiller
    <https://github.com/HobbitLong/RepDistiller>`_): network and start: two convolutions a stage but four in the last,
    three poolings, the mean of the map and one linear layer.

    Args:
        num_classes: number of classes.

    Example:
        .. code-block:: yaml

            teacher_model:
              key: 'cifar_vgg13'
              kwargs: {num_classes: 100}
    """
    return _vgg(2, num_classes)

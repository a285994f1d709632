"""Wide ResNets whose tensors have the names of the published robust teachers."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torchdistill.models.registry import register_model
from torchvision.models.resnet import conv1x1, conv3x3

from torchdistill_adv.checks import integer
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.models.common import he_init


class _Block(nn.Module):
    """Two convolutions, each after BN and ReLU, (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride).

    Where the width changes, the shortcut is a convolution of what the first one is given.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = conv3x3(out_channels, out_channels)
        # the name that the checkpoints have
        self.convShortcut = None if in_channels == out_channels else conv1x1(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        out: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return out + (x if self.convShortcut is None else self.convShortcut(activated))


@register_model
def cifar_wide_resnet(depth: int, widen_factor: int, num_classes: int = 10) -> nn.Module:
    """WRN-depth-widen_factor: the pairs of RepDistiller (40-2, 40-1, 16-2) and the robust teachers (34-10, 34-20).

    (N, 3, 32, 32) to (N, num_classes); the map that is pooled is ``relu``, (N, 64 widen_factor, 8, 8). WRN-40-2 has
    2,255,156 parameters at 100 classes, WRN-34-10 46,160,474 at 10.

    Paper: `Wide Residual Networks <https://arxiv.org/abs/1605.07146>`_ (Zagoruyko and Komodakis, BMVC 2016).
    **The official code's** (`TRADES <https://github.com/yaodongyu/TRADES>`_, `RobustBench
    <https://github.com/RobustBench/robustbench>`_, `RepDistiller <https://github.com/HobbitLong/RepDistiller>`_, all
    without dropout): network, start and names of tensors, so that their checkpoints load (:func:`from_checkpoint`). In
    torchdistill's ``wide_resnet`` the shortcut that widens starts before BN and ReLU; here, as there, after them.

    Args:
        depth: number of layers, 6 n + 4.
        widen_factor: width of the stages, in multiples of 16, 32 and 64.
        num_classes: number of classes.

    Raises:
        ConfigError: there is no Wide ResNet of that depth, or a value out of range.

    Example:
        .. code-block:: yaml

            teacher_model:
              key: 'cifar_wide_resnet'
              kwargs: {depth: 40, widen_factor: 2, num_classes: 100}
    """
    num_blocks, rest = divmod(integer(depth, "depth", minimum=10) - 4, 6)
    if rest:
        raise ConfigError(f"found {depth}; write 6 n + 4, such as 16, 28, 34 or 40", "depth")
    width = 16 * integer(widen_factor, "widen_factor", minimum=1)

    def stage(in_channels: int, out_channels: int, stride: int) -> nn.Module:
        blocks = [_Block(out_channels, out_channels, 1) for _ in range(num_blocks - 1)]
        return nn.Sequential(OrderedDict(layer=nn.Sequential(_Block(in_channels, out_channels, stride), *blocks)))

    fc = nn.Linear(4 * width, num_classes)
    nn.init.zeros_(fc.bias)
    model = nn.Sequential(
        OrderedDict(
            conv1=conv3x3(3, 16),
            block1=stage(16, width, 1),
            block2=stage(width, 2 * width, 2),
            block3=stage(2 * width, 4 * width, 2),
            bn1=nn.BatchNorm2d(4 * width),
            relu=nn.ReLU(),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(1),
            fc=fc,
        )
    )
    he_init(model)
    return model

"""The classifiers of HSAKD behind every stage of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.models.registry import register_auxiliary_model_wrapper
from torchdistill.models.util import save_module_ckpt
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1
from torchvision.models.shufflenetv2 import InvertedResidual as ShuffleV2Unit
from torchvision.ops import Conv2dNormActivation

from torchdistill_adv.boxes import IODict
from torchdistill_adv.checkpoints import read_checkpoint
from torchdistill_adv.checks import choice, integer
from torchdistill_adv.errors import ConfigError, inside
from torchdistill_adv.hosts.auxiliary import NetworkWithModules
from torchdistill_adv.models.common import he_init
from torchdistill_adv.models.mobilenet import _InvertedResidual
from torchdistill_adv.models.shufflenet import GROUPS, _Unit
from torchdistill_adv.models.wide_resnet import _Block


def _residual(block: type[BasicBlock | Bottleneck], in_channels: int, out_channels: int, stride: int) -> nn.Module:
    shortcut = None
    if stride != 1 or in_channels != out_channels:
        shortcut = nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))
    return block(in_channels, out_channels // block.expansion, stride, shortcut)


def _convolution(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    layer = Conv2dNormActivation(in_channels, out_channels, 3)
    return layer if stride == 1 else nn.Sequential(nn.MaxPool2d(stride), layer)


# (in_channels, out_channels, stride) to a block; those of the networks in this package and in torchdistill
BLOCKS: Mapping[str, Callable[[int, int, int], nn.Module]] = {
    "basic": partial(_residual, BasicBlock),
    "bottleneck": partial(_residual, Bottleneck),
    "preactivation": _Block,
    "conv": _convolution,
    "inverted": partial(_InvertedResidual, expand_ratio=6, norm_layer=nn.BatchNorm2d, projects=False),
    "shuffle_v1": partial(_Unit, groups=GROUPS),
    "shuffle_v2": ShuffleV2Unit,
}


class HSAKDHeads(nn.Module):
    """One classifier for each stage: blocks like those of the stages behind it, mean over the pixels, linear layer.

    Maps (R, C_l, H_l, W_l) of all stages to (L, R, 4 num_classes); options as of :class:`HSAKDWrapper`.
    """

    def __init__(
        self, num_classes: int, block: str, stages: Sequence[Mapping[str, Any]], head_channels: int | None = None
    ) -> None:
        super().__init__()
        make_block = BLOCKS[choice(block, "block", BLOCKS)]
        num_outputs = 4 * integer(num_classes, "num_classes", minimum=1)
        widths = [integer(stage["channels"], "channels", minimum=1) for stage in stages]
        depths = [integer(stage["num_blocks"], "num_blocks", minimum=1) for stage in stages]

        def make_stage(in_channels: int, out_channels: int, num_blocks: int, stride: int) -> nn.Module:
            blocks = [make_block(out_channels, out_channels, 1) for _ in range(num_blocks - 1)]
            return nn.Sequential(make_block(in_channels, out_channels, stride), *blocks)

        def make_head(index: int) -> nn.Module:
            last = widths[-1]
            behind = [
                make_stage(widths[i - 1], widths[i], depths[i], stride=2) for i in range(index + 1, len(widths))
            ] or [make_stage(last, last, depths[-1], stride=1)]
            if block == "preactivation":
                behind += [nn.BatchNorm2d(last), nn.ReLU()]
            if head_channels is not None:
                behind.append(Conv2dNormActivation(last, head_channels, 1))
            pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(head_channels or last, num_outputs)]
            return nn.Sequential(*behind, *pooled)

        self.heads = nn.ModuleList(make_head(index) for index in range(len(stages)))
        he_init(self)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return torch.stack([head(x) for head, x in zip(self.heads, maps, strict=True)])


@register_auxiliary_model_wrapper
class HSAKDWrapper(NetworkWithModules):
    r"""A teacher or student with a classifier of class and rotation behind every stage, for HSAKD.

    The network is ``model``, and the output of ``heads`` are the logits (L, 4 N, 4 num_classes) of all heads. The head
    of stage l has blocks like the stages behind l, each stage starting with stride 2, then the mean over the pixels and
    a linear layer; that of the last stage has the last stage's blocks once more, with stride 1. All the paths of
    ``stages`` and ``heads`` must be among the ``forward_hook: output`` of its side. A teacher's network runs in eval
    mode without a graph, and so do its heads if ``freezes_heads``.

    Stage 1 trains the heads of the teacher (``requires_grad: True``, ``frozen_modules: ['model']``) with
    :class:`~torchdistill_adv.hosts.HSAKDHeadsLoss`, and writes them to ``heads_ckpt`` after every epoch; stage 2 reads
    them there (``freezes_heads: True``, ``requires_grad: False``) and trains the student, with heads of its own, with
    :class:`~torchdistill_adv.hosts.HSAKDLoss`. In both, both data loader and forward process are those of rotations:
    :class:`~torchdistill_adv.datasets.FourRotations` and ``forward_batch4sskd``.

    Paper: `Hierarchical Self-supervised Augmented Knowledge Distillation <https://arxiv.org/abs/2107.13715>`_ (Yang et
    al., IJCAI 2021). **The official code's** (`repository <https://github.com/winycg/HSAKD>`_): these heads, tensor by
    tensor for ResNets (``basic``, ``bottleneck``), Wide ResNets (``preactivation``), ShuffleNetV1 (``shuffle_v1``) and,
    but for biases before BN, VGGs (``conv``, which pools first); the backbone in eval mode while heads are trained.
    **Our reading**: all blocks of a stage have one width, which those of MobileNetV2 (``inverted`` with
    ``head_channels: 1280``) do not have there, and all blocks of the last head of ShuffleNetV2 (``shuffle_v2`` with
    ``head_channels: 1024``) are plain ones.

    Args:
        num_classes: number of classes of the network.
        block: kind of the blocks, one of ``basic``, ``bottleneck``, ``preactivation``, ``conv``, ``inverted``,
            ``shuffle_v1`` and ``shuffle_v2``.
        stages: ``path``, ``channels`` and ``num_blocks`` of each stage of the network, from input to output. No head
            has blocks like those of the first stage.
        head_channels: width of a 1 x 1 convolution before the mean; none if None.
        heads_ckpt: file of the heads, read if there is one and written after every epoch; none if None.
        freezes_heads: keep the heads as they are, in eval mode; they must be in ``heads_ckpt``.

    Raises:
        ConfigError: an option is wrong, the file does not fit, or heads to freeze are not there.

    Example:
        .. code-block:: yaml

            teacher:
              forward_proc: 'forward_batch4sskd'
              auxiliary_model_wrapper:
                key: 'HSAKDWrapper'
                kwargs:
                  num_classes: 100
                  block: 'basic'
                  stages:
                    - {path: 'model.layer1', channels: 16, num_blocks: 9}
                    - {path: 'model.layer2', channels: 32, num_blocks: 9}
                    - {path: 'model.layer3', channels: 64, num_blocks: 9}
                  heads_ckpt: './resource/ckpt/cifar100/hsakd-resnet56_heads.pt'
              forward_hook: {input: [], output: ['model.layer1', 'model.layer2', 'model.layer3', 'heads']}
              requires_grad: True
              frozen_modules: ['model']
    """

    def __init__(
        self,
        num_classes: int,
        block: str,
        stages: Sequence[Mapping[str, Any]],
        head_channels: int | None = None,
        heads_ckpt: str | None = None,
        freezes_heads: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.paths = [stage["path"] for stage in stages]
        self.heads_ckpt, self.freezes_heads = heads_ckpt, freezes_heads
        with inside(self.path):
            heads = HSAKDHeads(num_classes, block, stages, head_channels)
            self._load(heads)
        self.heads = heads.to(self.where[0]).eval() if freezes_heads else self.shared(heads)

    def _load(self, heads: nn.Module) -> None:
        if self.heads_ckpt is not None and Path(self.heads_ckpt).is_file():
            try:
                with inside("heads_ckpt"):
                    heads.load_state_dict(read_checkpoint(self.heads_ckpt))
            except RuntimeError as error:
                raise ConfigError(f"found '{self.heads_ckpt}', which does not fit: {error}", "heads_ckpt") from error
        elif self.freezes_heads:
            raise ConfigError(
                f"found {self.heads_ckpt!r}, which is no file; write that of heads that a stage with freezes_heads: "
                "False has trained, or train them first",
                "heads_ckpt",
            )

    def train(self, mode: bool = True) -> NetworkWithModules:
        super().train(mode)
        if self.freezes_heads:
            self.heads.eval()
        return self

    def secondary_forward(self, io_dict: IODict) -> None:
        self.heads([self.read(io_dict, path) for path in self.paths])

    def post_epoch_process(self, *args: Any, **kwargs: Any) -> None:
        if self.heads_ckpt is not None and not self.freezes_heads:
            save_module_ckpt(self.heads, self.heads_ckpt)

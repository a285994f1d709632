"""Every image in its four rotations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchdistill.datasets.registry import register_dataset_wrapper
from torchdistill.datasets.wrapper import BaseDatasetWrapper, SSKDDatasetWrapper
from torchvision.transforms import RandomHorizontalFlip

from torchdistill_adv.errors import ConfigError


@register_dataset_wrapper
class FourRotations(BaseDatasetWrapper):
    """Every image turned by 0, 90, 180 and 270 degrees (counter-clockwise), for HSAKD.

    An item is ``(rotations, target, supp_dict)`` with rotations (4, C, H, W) of the image (C, H, W) that the data set's
    own transform gives. torchdistill's ``forward_batch4sskd`` makes (4 N, C, H, W) of a batch, row 4 i + r being image
    i turned r times.

    Paper: `Hierarchical Self-supervised Augmented Knowledge Distillation <https://arxiv.org/abs/2107.13715>`_ (Yang et
    al., IJCAI 2021). **The official code's** (`repository <https://github.com/winycg/HSAKD>`_): one augmentation an
    image, turned afterwards. torchdistill's ``SSKDDatasetWrapper`` augments each rotation apart, and flips it after the
    turn; an image turned by 90 degrees and flipped is a flipped image turned by 270, so rotations could not be told
    apart by a classifier, which SSKD has none of.

    Args:
        org_dataset: data set of tensors, as tall as wide.

    Raises:
        ConfigError: an image is no tensor, or not as tall as wide.

    Example:
        .. code-block:: yaml

            train_data_loader:
              dataset_id: 'cifar100/train'
              dataset_wrapper: {key: 'FourRotations'}
              sampler: {class_or_func: !import_get {key: 'torch.utils.data.RandomSampler'}}
              kwargs: {batch_size: 64, num_workers: 2}
    """

    def __getitem__(self, index: int) -> tuple[Tensor, Any, dict[str, Any]]:
        image, target, supp_dict = super().__getitem__(index)
        if not isinstance(image, Tensor) or image.dim() != 3 or image.shape[1] != image.shape[2]:
            found = f"a tensor {tuple(image.shape)}" if isinstance(image, Tensor) else f"a {type(image).__name__}"
            raise ConfigError(
                f"found {found} as an image; FourRotations needs tensors (C, H, W) with H = W, so end the data set's "
                "transform in ToTensor, and crop or resize before it",
                "dataset_wrapper",
            )
        return torch.stack([torch.rot90(image, turns, (1, 2)) for turns in range(4)]), target, supp_dict


@register_dataset_wrapper
class SSKDRotations(SSKDDatasetWrapper):
    """Every image flipped or not, then turned by 0, 90, 180 and 270 degrees, then augmented, for SSKD.

    An item is ``(rotations, target, supp_dict)`` with rotations (4, C, H, W), in the order of ``forward_batch4sskd``.
    The data set's own transform is applied to each rotation apart, so it crops but does not flip; the flip, with a
    probability of one half, is the same for the four rotations of an image.

    Paper: `Knowledge Distillation Meets Self-Supervision <https://arxiv.org/abs/2006.07114>`_ (Xu et al., ECCV 2020).
    **The official code's** (`repository <https://github.com/xuguodong03/SSKD>`_): this order. torchdistill's
    ``SSKDDatasetWrapper``, which this is otherwise, has no place for a flip before the turn.

    Args:
        org_dataset: data set of PIL images, with a ``transform``.

    Example:
        .. code-block:: yaml

            train_data_loader:
              dataset_id: 'cifar100/train'
              dataset_wrapper: {key: 'SSKDRotations'}
              sampler: {class_or_func: !import_get {key: 'torch.utils.data.RandomSampler'}}
              kwargs: {batch_size: 64, num_workers: 2}
    """

    def __init__(self, org_dataset: Any) -> None:
        super().__init__(org_dataset)
        # in place of the transform that torchdistill's wrapper has taken away to apply it after the turn
        org_dataset.transform = RandomHorizontalFlip()

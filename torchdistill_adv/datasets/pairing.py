"""Pairs of images of different classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from torchdistill.datasets.registry import register_dataset_wrapper
from torchdistill.datasets.wrapper import BaseDatasetWrapper

from torchdistill_adv.datasets.common import draw, labels_of
from torchdistill_adv.datasets.generated import MixedWithGenerated
from torchdistill_adv.errors import ConfigError, inside


@register_dataset_wrapper
class PairWithOtherClass(BaseDatasetWrapper):
    """Every image x with an image x' of another class, for DARWIN.

    The class of x' is uniform among the others that have images, and x' uniform among the images of that class; it is
    a sample of its own, with an augmentation of its own. An item is ``(image, target, supp_dict)`` with ``supp_dict =
    {'paired_image': image', 'paired_label': target'}``; torch's default collation makes tensors (N, C, H, W) and (N,)
    of them. Random numbers are those of torch's global stream, so pairs differ between epochs and between workers.

    Paper: `Robust Distillation via Untargeted and Targeted Intermediate Adversarial Samples
    <https://openaccess.thecvf.com/content/CVPR2024/html/Dong_Robust_Distillation_via_Untargeted_and_Targeted_Intermediate_Adversarial_Samples_CVPR_2024_paper.html>`_
    (Dong et al., CVPR 2024).

    **The paper's**: x' is of another class. **Code of the authors' group**: how class and image are drawn; there is no
    official code of the paper. **Our reading**: classes are those after ``target_transform``; in
    :class:`~torchdistill_adv.datasets.MixedWithGenerated`, x' is an original image, of another class than the label
    that was drawn for x.

    Args:
        org_dataset: data set with ``targets`` (SVHN: ``labels``) as a list, tensor or array; or a ``Subset`` of one.

    Raises:
        ConfigError: the data set does not say its labels, or has one class only.

    Example:
        .. code-block:: yaml

            train_data_loader:
              dataset_id: 'cifar10/train'
              dataset_wrapper: {key: 'PairWithOtherClass'}
              sampler: {class_or_func: !import_get {key: 'torch.utils.data.RandomSampler'}}
              kwargs: {batch_size: 128, num_workers: 2}
    """

    def __init__(self, org_dataset: Any) -> None:
        super().__init__(org_dataset)
        self.partners = org_dataset.original if isinstance(org_dataset, MixedWithGenerated) else org_dataset
        with inside("dataset_wrapper"):
            labels = labels_of(self.partners)
        classes, counts = np.unique(labels, return_counts=True)
        if len(classes) < 2:
            raise ConfigError(
                f"found images of {len(classes)} class; PairWithOtherClass needs two or more", "dataset_wrapper"
            )
        members = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
        self.members = dict(zip(classes.tolist(), members, strict=True))

    def __getitem__(self, index: int) -> tuple[Any, Any, dict[str, Any]]:
        image, target, supp_dict = super().__getitem__(index)
        others = [label for label in self.members if label != int(target)]
        candidates = self.members[others[draw(len(others), index)]]
        paired_image, paired_label = self.partners[int(candidates[draw(len(candidates), index)])]
        return image, target, {**supp_dict, "paired_image": paired_image, "paired_label": paired_label}

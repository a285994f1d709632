"""What a data set says of its labels, and random choices that stay apart in every process."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Subset

from torchdistill_adv.errors import ConfigError

Labels: TypeAlias = NDArray[np.integer[Any]]


def base_of(dataset: Any) -> Any:
    """The data set that ``dataset`` is a ``Subset`` of, however often; else itself."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def stored_labels(dataset: Any) -> Labels:
    """The class numbers (N,) in ``targets``, before ``target_transform``; torchvision's SVHN calls them ``labels``.

    Raises:
        ConfigError: there are none, or they are no class numbers.
    """
    found = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if found is None:
        raise ConfigError(
            f"found {type(dataset).__name__}, which does not say its labels; write a data set with an attribute "
            "'targets', the class number of every image, or a Subset of one"
        )
    return _class_numbers(found, dataset, len(dataset))


def labels_of(dataset: Any) -> Labels:
    """The labels (N,) that the items of ``dataset`` have, ``target_transform`` and ``Subset`` included.

    Raises:
        ConfigError: the data set does not say them, or they are no class numbers.
    """
    if isinstance(dataset, Subset):
        return labels_of(dataset.dataset)[np.asarray(dataset.indices, dtype=np.int64)]
    labels = stored_labels(dataset)
    transform = getattr(dataset, "target_transform", None)
    if transform is None:
        return labels
    distinct, places = np.unique(labels, return_inverse=True)
    return _class_numbers([transform(label) for label in distinct.tolist()], dataset, len(distinct))[places]


def draw(count: int, index: int) -> int:
    """A uniform number below ``count`` for item ``index``, from torch's global stream."""
    # processes with one seed have one stream, but never one index: without it they would all draw the same
    return (int(torch.randint(count, ())) + index) % count


def _class_numbers(found: Any, dataset: Any, count: int) -> Labels:
    labels = np.asarray(found)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ConfigError(
            f"found labels of {type(dataset).__name__} of shape {labels.shape} and type {labels.dtype}; they must be "
            f"{count} class numbers"
        )
    return labels

"""scikit-learn's handwritten digits: real images without a download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from torchdistill_adv.checks import choice

SPLITS = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}


class Digits(Dataset[tuple[Any, int]]):
    """1,797 handwritten digits of 8 x 8 pixels, split 60 / 20 / 20 within every class; always the same split.

    The images ship inside scikit-learn (the test set of `Optical Recognition of Handwritten Digits
    <https://archive.ics.uci.edu/dataset/80>`_, UCI, CC BY 4.0). Like torchvision's data sets it gives PIL images, of
    mode ``L``, and has ``classes`` and ``targets``.

    Args:
        split: ``train``, ``val`` or ``test``.
        transform: from PIL image to what is returned.
        target_transform: the same for labels.

    Raises:
        ConfigError: an unknown split.

    Example:
        .. code-block:: yaml

            digits/train: !import_call
              key: 'torchdistill_adv.datasets.Digits'
              init:
                kwargs: {split: 'train', transform: !import_call {key: 'torchvision.transforms.ToTensor', init: }}
    """

    def __init__(
        self,
        split: str = "train",
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[int], int] | None = None,
    ) -> None:
        # scikit-learn takes about a second to import
        from sklearn.datasets import load_digits

        first, last = SPLITS[choice(split, "split", SPLITS)]
        pixels, labels = load_digits(return_X_y=True)
        chosen = []
        for label in range(10):
            members = np.random.RandomState(label).permutation(np.flatnonzero(labels == label))
            chosen.append(members[round(first * len(members)) : round(last * len(members))])
        indices = np.sort(np.concatenate(chosen))
        self.split = split
        self.images = np.round(pixels[indices].reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
        self.targets: list[int] = labels[indices].tolist()
        self.classes = [str(label) for label in range(10)]
        self.transform = transform
        self.target_transform = target_transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = Image.fromarray(self.images[index]), self.targets[index]
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target

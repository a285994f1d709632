"""The images of the studies: packs of JPEG files, or torchvision's CIFAR."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets

from torchdistill_adv.errors import ConfigError, nearest

PACKS_VARIABLE = "EXPERIMENTS_PACKS"
SIZE, PADDING = 32, 4
NORMALIZATION = {"mean": [0.5071, 0.4867, 0.4408], "std": [0.2675, 0.2565, 0.2761]}
# files of the training images and of the test images
PACKS = {
    "cifar10": ("cifar10_jpeg_train", "cifar10_jpeg_test"),
    "cifar100": ("tiny100_jpeg_train", "tiny100_jpeg_val"),
}
TORCHVISION = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
SOURCES = ("packs", "torchvision")
SPLITS = ("train", "val", "test")

Pixels = npt.NDArray[np.uint8]
# from the numbers of images to their pixels (N, 32, 32, 3) and labels
Read = Callable[[Sequence[int]], tuple[Pixels, list[int]]]


class Images(Dataset[tuple[Tensor, int]]):
    """A part of a data set, (3, 32, 32) each, cropped and flipped at random for training.

    Training and validation images are drawn from the training set once and for all; the test set is left as it is.

    Args:
        name: ``cifar10`` or ``cifar100``.
        split: ``train``, ``val`` or ``test``.
        source: ``torchvision`` downloads CIFAR. ``packs`` reads .npz files of JPEG images in the folder that the
            environment variable ``EXPERIMENTS_PACKS`` names: arrays ``jpeg`` (all bytes), ``offsets`` (N + 1) and
            ``labels`` (N); CIFAR-10, and 100 classes of Tiny-ImageNet in the place of CIFAR-100.
        num_train: training images; by default all that are not for validation.
        num_val: validation images.
        is_normalized: by the mean and standard deviation of the CIFAR-100 configurations; else pixels of [0, 1].

    Raises:
        ConfigError: an unknown name, split or source, a file that is not there, or too few images.
    """

    def __init__(
        self,
        name: str,
        split: str,
        source: str,
        num_train: int | None = None,
        num_val: int = 1000,
        is_normalized: bool = False,
    ) -> None:
        for value, known, path in ((name, PACKS, "name"), (split, SPLITS, "split"), (source, SOURCES, "source")):
            if value not in known:
                raise ConfigError(f"found {value!r}; {nearest(value, known)}", path)
        pixels, self.targets = load(name, source, split, num_train, num_val)
        self.is_augmented = split == "train"
        width = PADDING if self.is_augmented else 0
        padded = np.pad(pixels, ((0, 0), (width, width), (width, width), (0, 0)))
        self.pixels = torch.from_numpy(np.ascontiguousarray(padded.transpose(0, 3, 1, 2)))
        self.digest = hashlib.sha256(pixels.tobytes() + bytes(str(self.targets), "ascii")).hexdigest()[:16]
        self.classes = [str(label) for label in range(max(self.targets) + 1)]
        mean, std = NORMALIZATION.values() if is_normalized else ([0.0] * 3, [1.0] * 3)
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.pixels[index]
        if self.is_augmented:
            top, left = torch.randint(2 * PADDING + 1, (2,)).tolist()
            image = image[:, top : top + SIZE, left : left + SIZE]
            if torch.rand(()) < 0.5:
                image = image.flip(2)
        return (image.float() / 255 - self.mean) / self.std, self.targets[index]


def load(name: str, source: str, split: str, num_train: int | None, num_val: int) -> tuple[Pixels, list[int]]:
    """Pixels (N, 32, 32, 3) of a split, and labels."""
    is_test = split == "test"
    total, read = open_pack(PACKS[name][is_test]) if source == "packs" else open_torchvision(name, not is_test)
    if is_test:
        chosen = list(range(total))
    else:
        order = torch.randperm(total, generator=torch.Generator().manual_seed(0)).tolist()
        num_train = total - num_val if num_train is None else num_train
        if num_train + num_val > total:
            raise ConfigError(f"found {num_train} beside {num_val} of {total} images; write fewer", "num_train")
        chosen = order[:num_train] if split == "train" else order[total - num_val :]
    return read(chosen)


def packs_folder() -> Path:
    """Where the packs are.

    Raises:
        ConfigError: the environment does not say.
    """
    if not os.environ.get(PACKS_VARIABLE):
        raise ConfigError(
            f"found no {PACKS_VARIABLE} in the environment; set it to the folder of the packs, or write torchvision",
            "--source",
        )
    return Path(os.environ[PACKS_VARIABLE]).expanduser()


def open_pack(name: str) -> tuple[int, Read]:
    """How many images a pack has, and what reads some of them.

    Raises:
        ConfigError: it is not there.
    """
    file = packs_folder() / f"{name}.npz"
    if not file.is_file():
        raise ConfigError(f"found no '{file}'; put the pack there, or write torchvision", "--source")
    with np.load(file) as arrays:
        jpeg, offsets, labels = (arrays[key] for key in ("jpeg", "offsets", "labels"))

    def pixels(number: int) -> Pixels:
        image = Image.open(io.BytesIO(jpeg[offsets[number] : offsets[number + 1]].tobytes())).convert("RGB")
        # averages whole blocks of pixels where the size is a multiple
        return np.asarray(image if image.size == (SIZE, SIZE) else image.resize((SIZE, SIZE), Image.Resampling.BOX))

    def read(chosen: Sequence[int]) -> tuple[Pixels, list[int]]:
        return np.stack([pixels(number) for number in chosen]), labels[list(chosen)].tolist()

    return len(labels), read


def open_torchvision(name: str, train: bool) -> tuple[int, Read]:
    """How many images torchvision's CIFAR has, and what takes some of them."""
    found = TORCHVISION[name](f"~/datasets/{name}", train=train, download=True)

    def read(chosen: Sequence[int]) -> tuple[Pixels, list[int]]:
        return found.data[list(chosen)], [found.targets[number] for number in chosen]

    return len(found.targets), read

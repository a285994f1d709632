"""Generated images and labels of an .npz file mixed into a data set."""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from torchdistill_adv.checks import number
from torchdistill_adv.datasets.common import base_of, draw, stored_labels
from torchdistill_adv.errors import ConfigError, inside


class MixedWithGenerated(Dataset[tuple[Any, Any]]):
    """A data set in which an item may be a generated image instead of its own.

    Item i is the original's item i with probability ``1 - generated_fraction``, else a generated image and its label,
    drawn uniformly with replacement. So an epoch stays as long as the original's, and a batch has the fraction in
    expectation. The original's ``transform`` and ``target_transform`` are applied to generated samples too. Random
    numbers are those of torch's global stream, as in torchvision's transforms.

    The file has the arrays ``image`` (M, H, W, 3), or (M, H, W) for grey images, of type uint8, and ``label`` (M,). So
    have the published ones: DDPM, of `Fixing Data Augmentation to Improve Adversarial Robustness
    <https://arxiv.org/abs/2103.01946>`_ (Rebuffi et al., 2021) and `Improving Robustness using Generated Data
    <https://arxiv.org/abs/2110.09468>`_ (Gowal et al., NeurIPS 2021), and EDM, of `Better Diffusion Models Further
    Improve Adversarial Training <https://arxiv.org/abs/2302.04638>`_ (Wang et al., ICML 2023). A file written by
    ``numpy.savez`` stays on disk and is shared by all processes; one by ``numpy.savez_compressed`` is read into memory.

    **The official code's** (Wang et al.): epochs of the original's length, and 0.7 in its command. Every batch has
    the same number of generated images there; **our reading** draws for each image, so that any sampler can be used.

    There is no ``targets``: the label of an item changes from draw to draw. So torchdistill's ``CRDDatasetWrapper``,
    which keeps one feature an item, refuses this data set.

    Args:
        original: data set of PIL images of one size with ``transform`` and ``targets`` (SVHN: ``labels``), such as
            torchvision's; or a ``Subset`` of one.
        path: the .npz file.
        generated_fraction: probability of a generated image, from 0 to 1.

    Raises:
        ConfigError: a file that is missing or no .npz file; no such array; images of another size, number of channels
            or type than the original's; another number of labels than images; labels that the original does not have;
            a fraction out of range; an original that cannot be mixed.

    Example:
        .. code-block:: yaml

            cifar10/train: !import_call
              key: 'torchdistill_adv.datasets.MixedWithGenerated'
              init:
                kwargs:
                  original: !import_call
                    key: 'torchvision.datasets.CIFAR10'
                    init: {kwargs: {root: './resource/dataset/cifar10', train: True, transform: *train_transform}}
                  path: './resource/dataset/cifar10_ddpm.npz'
                  generated_fraction: 0.7
    """

    def __init__(self, original: Any, path: str | os.PathLike[str], generated_fraction: float = 0.7) -> None:
        self.generated_fraction = number(generated_fraction, "generated_fraction", minimum=0)
        if self.generated_fraction > 1:
            raise ConfigError(f"found {generated_fraction!r}; write a number from 0 to 1", "generated_fraction")
        self.original = original
        self.path = Path(path).expanduser().absolute()
        with inside("original"):
            known, pixels = stored_labels(self.base), _pixels_of_first(self.base)
        with inside("path"):
            self.generated_images, self.generated_labels = _open_arrays(self.path)
            _check_generated(self.generated_images, self.generated_labels, pixels, known)

    def __len__(self) -> int:
        return len(self.original)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        index = range(len(self))[index]  # beyond the end an IndexError, which ends an iteration
        if float(torch.rand(())) >= self.generated_fraction:
            return self.original[index]
        chosen = draw(len(self.generated_images), index)
        image, target = Image.fromarray(self.generated_images[chosen]), int(self.generated_labels[chosen])
        if self.transform is not None:
            image = self.transform(image)
        target_transform = getattr(self.base, "target_transform", None)
        return image, target if target_transform is None else target_transform(target)

    def __reduce__(self) -> tuple[Any, ...]:
        # a mapped array would be pickled with all that it maps; a worker opens the file itself
        return type(self), (self.original, self.path, self.generated_fraction)

    # what torchdistill reads, and SSKDDatasetWrapper replaces

    @property
    def base(self) -> Any:
        """The original, without its ``Subset``."""
        return base_of(self.original)

    @property
    def classes(self) -> Any:
        """The original's class names."""
        return self.base.classes

    @property
    def transform(self) -> Any:
        """The original's, for generated images too."""
        return self.base.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.base.transform = transform


def _open_arrays(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """``image`` and ``label`` of an .npz file."""
    if not path.is_file():
        raise ConfigError(f"found '{path}', which is no file; write an .npz file with the arrays 'image' and 'label'")
    try:
        return _open_array(path, "image"), _open_array(path, "label")
    except KeyError as error:
        with np.load(path) as arrays:
            raise ConfigError(
                f"found '{path}' with the arrays {arrays.files}; it must have 'image' and 'label'"
            ) from error
    except (zipfile.BadZipFile, ValueError) as error:
        raise ConfigError(f"found '{path}', which is no .npz file of plain arrays: {error}") from error


def _open_array(path: Path, name: str) -> NDArray[Any]:
    """One array of an .npz file: mapped from the disk, which NumPy itself does for .npy only; read if compressed."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{name}.npy")
        with archive.open(member) as stream:
            if member.compress_type != zipfile.ZIP_STORED:
                return np.lib.format.read_array(stream, allow_pickle=False)
            np.lib.format.read_magic(stream)
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
            if dtype.hasobject:
                raise ValueError(f"'{name}' holds Python objects")
            header_size = stream.tell()
    with path.open("rb") as file:
        # the local header of a zip member: 26 bytes, the lengths of name and extra field, these two, then the content
        file.seek(member.header_offset + 26)
        start = member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    return np.memmap(path, dtype, "r", start + header_size, shape, "F" if fortran_order else "C")


def _pixels_of_first(dataset: Any) -> NDArray[Any]:
    """The first image before its transform, (H, W, 3) or (H, W)."""
    if not hasattr(dataset, "transform"):
        raise ConfigError(
            f"found {type(dataset).__name__}, which has no attribute 'transform' for generated images; write a data "
            "set that has it"
        )
    before, dataset.transform = dataset.transform, None
    try:
        image = dataset[0][0]
    finally:
        dataset.transform = before
    if not isinstance(image, Image.Image):
        raise ConfigError(
            f"found {type(dataset).__name__}, whose images are of type {type(image).__name__} before the transform; "
            "write a data set of PIL images"
        )
    return np.asarray(image)


def _check_generated(images: NDArray[Any], labels: NDArray[Any], pixels: NDArray[Any], known: NDArray[Any]) -> None:
    """Refuse generated data that is not like the original's ``pixels`` of one image and its ``known`` labels."""
    if images.shape[1:] != pixels.shape or images.dtype != pixels.dtype or not len(images):
        wanted = ", ".join(map(str, ("M", *pixels.shape)))
        raise ConfigError(
            f"found an array 'image' of shape {images.shape} and type {images.dtype}; the original's images need "
            f"({wanted}) and {pixels.dtype}"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ConfigError(
            f"found an array 'label' of shape {labels.shape} and type {labels.dtype}; the {len(images)} images need as "
            "many class numbers"
        )
    unknown = np.setdiff1d(labels, known)
    if len(unknown):
        raise ConfigError(
            f"found the labels {unknown[:5].tolist()}, which the original does not have; use images generated for it"
        )

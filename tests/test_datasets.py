"""Generated images mixed into a data set, and pairs of images of different classes."""

from __future__ import annotations

import copy
import inspect
import pickle
import textwrap
from collections import Counter

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.datasets.util import build_data_loader
from torchdistill.datasets.wrapper import CRDDatasetWrapper, SSKDDatasetWrapper

from torchdistill_adv.datasets import Digits, MixedWithGenerated, PairWithOtherClass
from torchdistill_adv.datasets.common import labels_of
from torchdistill_adv.datasets.generated import _open_array
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.runner.check import check_loader

GENERATED = 255


def pixels(number, kind=0):
    """A picture that tells its number, and with the third channel whether it was generated."""
    return np.full((4, 2, 3), (number % 256, number // 256, kind), dtype=np.uint8)


def read(picture):
    """Number and kind of a picture."""
    low, high, kind = np.asarray(picture)[0, 0].tolist()
    return low + 256 * high, kind


def to_tensor(picture):
    return torch.from_numpy(np.array(picture))


class Pictures(Dataset):
    """Like torchvision's data sets; picture i shows the number i."""

    def __init__(self, targets, transform=None, target_transform=None):
        self.targets = targets
        self.transform = transform
        self.target_transform = target_transform
        self.classes = ["a", "b", "c"]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        image, target = Image.fromarray(pixels(range(len(self))[index])), int(self.targets[index])
        if self.transform is not None:
            image = self.transform(image)
        return image, target if self.target_transform is None else self.target_transform(target)


def labels(count):
    return [i % 3 for i in range(count)]


@pytest.fixture
def npz(tmp_path):
    """Writes an .npz file and gives its path; generated picture j has label j % 3."""

    def write(count=30, save=np.savez, **arrays):
        images = [pixels(j, GENERATED) for j in range(count)]
        save(tmp_path / "generated.npz", **{"image": images, "label": np.array(labels(count)), **arrays})
        return tmp_path / "generated.npz"

    return write


def assert_probability(counts, draws, probability):
    """Counts of independent draws are within five standard deviations."""
    deviation = (draws * probability * (1 - probability)) ** 0.5
    assert np.abs(np.asarray(counts) - draws * probability).max() <= 5 * deviation


# generated images


@pytest.mark.parametrize("fraction", [0, "3/10", 0.7, 1.0])
def test_fraction_of_generated_images(npz, fraction):
    mixed = MixedWithGenerated(Pictures(labels(4000)), npz(), fraction)
    torch.manual_seed(0)
    items = [(*read(image), target) for image, target in mixed]
    assert len(items) == len(mixed) == 4000
    generated = [(number, target) for number, kind, target in items if kind == GENERATED]
    probability = 0.3 if fraction == "3/10" else fraction
    assert_probability(len(generated), 4000, probability)
    # originals stay in their places, and every picture has its own label
    assert all(number == i for i, (number, kind, _) in enumerate(items) if kind != GENERATED)
    assert all(target == number % 3 for number, _, target in items)
    if generated:
        counts = Counter(number for number, _ in generated)
        assert_probability([counts[j] for j in range(30)], len(generated), 1 / 30)


def test_default_is_the_fraction_of_the_field(npz):
    assert MixedWithGenerated(Pictures(labels(6)), npz()).generated_fraction == 0.7


def test_generated_samples_get_the_transforms_of_the_original(npz):
    original = Pictures(labels(9), transform=torchvision.transforms.ToTensor(), target_transform=lambda y: 10 * y)
    mixed = MixedWithGenerated(Subset(original, [3, 4]), npz(), 1)
    image, target = mixed[1]
    number = round(float(image[0, 0, 0]) * 255)
    assert image.shape == (3, 4, 2) and image[2, 0, 0] == 1 and target == 10 * (number % 3)
    # looking at the original's first image has left its transform alone
    assert isinstance(original[0][0], torch.Tensor)


def test_items_end_where_those_of_the_original_do(npz):
    mixed = MixedWithGenerated(Pictures(labels(9)), npz(), 1)
    mixed[8], mixed[-9]
    for index in (9, -10):
        with pytest.raises(IndexError):
            mixed[index]


def test_what_torchdistill_reads(npz):
    square = torchvision.transforms.Resize((2, 2))
    original = Pictures(labels(9), transform=lambda image: to_tensor(square(image)))
    mixed = MixedWithGenerated(Subset(original, range(9)), npz(), 1)
    assert mixed.classes == ["a", "b", "c"]
    # SSKD takes the transform away, to rotate images before it
    views, target, _ = SSKDDatasetWrapper(mixed)[0]
    assert views.shape == (4, 2, 2, 3) and {read(view)[0] % 3 for view in views} == {target}
    with pytest.raises(AttributeError, match="targets"):
        CRDDatasetWrapper(mixed, num_negative_samples=2, mode="exact", ratio=1.0)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(0, 3), max_size=4),
    dtype=st.sampled_from(["uint8", "<i4", ">i8", "float32"]),
    order=st.sampled_from("CF"),
    compressed=st.booleans(),
)
def test_arrays_are_those_of_numpy(tmp_path_factory, shape, dtype, order, compressed):
    path = tmp_path_factory.mktemp("arrays") / "a.npz"
    array = np.arange(int(np.prod(shape))).astype(dtype).reshape(shape).copy(order)
    (np.savez_compressed if compressed else np.savez)(path, other=np.ones(3), image=array)
    found = _open_array(path, "image")
    assert found.dtype == array.dtype and np.array_equal(found, array) and found.shape == array.shape
    assert isinstance(found, np.memmap) is not compressed


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_copies_and_pickles_leave_the_file_where_it_is(npz, monkeypatch, save):
    path = npz(1000, save)
    monkeypatch.chdir(path.parent)
    mixed = MixedWithGenerated(Pictures(labels(9)), path.name, 1)
    assert len(pickle.dumps(mixed)) < 2000 < mixed.generated_images.nbytes
    # a worker may stand elsewhere
    monkeypatch.chdir("/")
    for twin in (pickle.loads(pickle.dumps(mixed)), copy.deepcopy(mixed)):
        torch.manual_seed(1)
        expected = [read(image) for image, _ in mixed]
        torch.manual_seed(1)
        assert [read(image) for image, _ in twin] == expected


def test_random_numbers_of_mixing(npz):
    """They repeat with the seed, and differ between epochs, workers, and processes with one seed."""
    mixed = MixedWithGenerated(Pictures(labels(9), transform=to_tensor), npz(500), 1)

    def epoch(index=4, workers=2):
        loader = DataLoader(mixed, sampler=[index] * 64, batch_size=32, num_workers=workers)
        return [[read(image)[0] for image in images] for images, _ in loader]

    torch.manual_seed(3)
    first, second = epoch(), epoch()
    assert first != second and first[0] != first[1]
    torch.manual_seed(3)
    assert epoch() == first
    torch.manual_seed(3)
    assert not any(a == b for a, b in zip(first[0], epoch(index=5)[0], strict=True))


@pytest.mark.parametrize(
    "arrays, found",
    [
        ({"image": np.zeros((5, 4, 3, 3), np.uint8)}, r"\(5, 4, 3, 3\).*need \(M, 4, 2, 3\)"),
        ({"image": np.zeros((5, 4, 2, 1), np.uint8)}, r"need \(M, 4, 2, 3\)"),
        ({"image": np.zeros((5, 3, 4, 2), np.uint8)}, r"need \(M, 4, 2, 3\)"),
        ({"image": np.zeros((5, 4, 2, 3), np.float32)}, "float32.*uint8"),
        ({"image": np.zeros((0, 4, 2, 3), np.uint8)}, r"shape \(0, 4, 2, 3\)"),
        ({"image": np.array([None])}, "Python objects"),
        ({"label": np.zeros(29, int)}, r"\(29,\).*30 images need as many"),
        ({"label": np.zeros((30, 1), int)}, r"\(30, 1\)"),
        ({"label": np.zeros(30)}, "float64"),
        ({"label": np.full(30, 3)}, r"labels \[3\]"),
        ({"label": np.full(30, -1)}, r"labels \[-1\]"),
    ],
)
def test_generated_data_that_does_not_fit_is_refused(npz, arrays, found):
    with pytest.raises(ConfigError, match=found) as error:
        MixedWithGenerated(Pictures(labels(9)), npz(**arrays))
    assert error.value.path == "path"


def test_files_that_are_no_npz_are_refused(tmp_path):
    def error():
        with pytest.raises(ConfigError) as error:
            MixedWithGenerated(Pictures(labels(9)), tmp_path / "a.npz")
        assert error.value.path == "path"
        return str(error.value)

    assert "no file" in error()
    (tmp_path / "a.npz").write_bytes(b"no zip")
    assert "no .npz file" in error()
    np.savez(tmp_path / "a.npz", images=[pixels(0)], label=[0])
    assert "with the arrays ['images', 'label']" in error()
    np.savez_compressed(tmp_path / "a.npz", image=np.array([None]), label=[0])
    assert "no .npz file of plain arrays" in error()


@pytest.mark.parametrize("fraction", [-0.1, 1.1, "70%", None, True])
def test_fractions_out_of_range_are_refused(npz, fraction):
    with pytest.raises(ConfigError, match="write a number") as error:
        MixedWithGenerated(Pictures(labels(9)), npz(), fraction)
    assert error.value.path == "generated_fraction"


class WithoutTransform(Pictures):
    def __init__(self, targets):
        super().__init__(targets)
        del self.transform


class Tensors(Pictures):
    def __getitem__(self, index):
        return torch.zeros(3, 4, 2), 0


@pytest.mark.parametrize(
    "original, found",
    [
        (TensorDataset(torch.zeros(2, 3, 4, 2), torch.arange(2)), "TensorDataset, which does not say its labels"),
        (WithoutTransform(labels(9)), "no attribute 'transform'"),
        (Tensors(labels(9)), "Tensor before the transform"),
        ({"key": "torchvision.datasets.CIFAR10"}, "dict"),
    ],
)
def test_originals_that_cannot_be_mixed_are_refused(npz, original, found):
    with pytest.raises(ConfigError, match=found) as error:
        MixedWithGenerated(original, npz())
    assert error.value.path == "original"


def test_mixing_twice_is_refused_and_leaves_the_transform(npz):
    mixed = MixedWithGenerated(Pictures(labels(9), transform=to_tensor), npz())
    with pytest.raises(ConfigError, match="original: found MixedWithGenerated"):
        MixedWithGenerated(mixed, npz(9))
    assert mixed.transform is to_tensor


# pairs


def test_pairs_are_uniform_over_other_classes_then_over_their_images():
    sizes = {0: 1, 3: 2, 7: 9}
    targets = [label for label, size in sizes.items() for _ in range(size)]
    paired = PairWithOtherClass(Pictures(targets))
    assert len(paired) == 12
    torch.manual_seed(0)
    draws = 3000
    for index in (0, 1, 11):
        found = Counter(read(paired[index][2]["paired_image"])[0] for _ in range(draws))
        for label, size in sizes.items():
            members = [found[i] for i, target in enumerate(targets) if target == label]
            assert_probability(members, draws, 0 if label == targets[index] else 1 / 2 / size)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_pair_is_of_another_class(data):
    targets = data.draw(st.lists(st.integers(-2, 4), min_size=1, max_size=12))
    kind = data.draw(st.sampled_from([list, np.array, torch.tensor]))
    merge = data.draw(st.sampled_from([None, lambda y: y // 2, lambda y: torch.tensor(y % 3)]))
    dataset = Pictures(kind(targets), to_tensor, merge)
    indices = np.arange(len(dataset))
    for _ in range(data.draw(st.integers(0, 2))):
        chosen = data.draw(st.lists(st.integers(0, len(dataset) - 1), min_size=1))
        dataset, indices = Subset(dataset, chosen), indices[chosen]
    true = [int(dataset[i][1]) for i in range(len(dataset))]
    assert labels_of(dataset).tolist() == true
    if len(set(true)) == 1:
        with pytest.raises(ConfigError, match="1 class; PairWithOtherClass needs two") as error:
            PairWithOtherClass(dataset)
        assert error.value.path == "dataset_wrapper"
        return
    for i, (image, target, supp_dict) in enumerate(PairWithOtherClass(dataset)):
        assert set(supp_dict) == {"paired_image", "paired_label"}
        assert (read(image)[0], int(target)) == (indices[i], true[i])
        partner = indices.tolist().index(read(supp_dict["paired_image"])[0])
        assert true[partner] == int(supp_dict["paired_label"]) != int(target)


def test_a_pair_has_an_augmentation_of_its_own():
    paired = PairWithOtherClass(Pictures([0, 1], transform=lambda image: to_tensor(image) + torch.rand(())))
    image, _, supp_dict = paired[0]
    assert float(image[0, 0, 0]) % 1 != float(supp_dict["paired_image"][0, 0, 0]) % 1
    assert not torch.equal(supp_dict["paired_image"], paired[0][2]["paired_image"])


def test_pairs_of_mixed_data_differ_from_the_label_that_was_drawn(npz):
    """Also where the original, a subset, lacks a class that the generated images have."""
    mixed = MixedWithGenerated(Subset(Pictures(labels(9)), [0, 1, 3, 4]), npz(), 0.5)
    torch.manual_seed(0)
    items = [PairWithOtherClass(mixed)[i % 4] for i in range(400)]
    assert {(target, supp_dict["paired_label"]) for _, target, supp_dict in items} == {(0, 1), (1, 0), (2, 0), (2, 1)}
    assert {read(supp_dict["paired_image"]) for *_, supp_dict in items} == {(0, 0), (1, 0), (3, 0), (4, 0)}
    assert {read(image)[1] for image, *_ in items} == {0, GENERATED}


def test_random_numbers_of_pairs():
    """They repeat with the seed, and differ between epochs, workers, and processes with one seed."""
    paired = PairWithOtherClass(Pictures([0, 0] + [1] * 500, transform=to_tensor))

    def epoch(index=0):
        loader = DataLoader(paired, sampler=[index] * 64, batch_size=32, num_workers=2)
        return [[read(image)[0] for image in supp_dict["paired_image"]] for *_, supp_dict in loader]

    torch.manual_seed(3)
    first, second = epoch(), epoch()
    assert first != second and first[0] != first[1]
    torch.manual_seed(3)
    assert epoch() == first
    torch.manual_seed(3)
    assert not any(a == b for a, b in zip(first[0], epoch(index=1)[0], strict=True))


def without_download(cls, **attributes):
    dataset = cls.__new__(cls)
    vars(dataset).update(attributes, transform=None, target_transform=None)
    return dataset


@pytest.mark.parametrize("name", ["CIFAR10", "SVHN", "MNIST", "ImageFolder"])
def test_torchvisions_data_sets(name, npz, tmp_path):
    cls, targets = getattr(torchvision.datasets, name), np.array(labels(9))
    images = np.stack([pixels(i) for i in range(9)])
    generated = images[..., 0] if name == "MNIST" else images
    if name == "CIFAR10":
        dataset = without_download(cls, data=images, targets=targets.tolist())
    elif name == "SVHN":
        dataset = without_download(cls, data=images.transpose(0, 3, 1, 2), labels=targets)
    elif name == "MNIST":
        dataset = without_download(cls, data=torch.from_numpy(images[..., 0]), targets=torch.from_numpy(targets))
    else:
        for i, target in enumerate(targets):
            (tmp_path / "train" / str(target)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i]).save(tmp_path / "train" / str(target) / f"{i}.png")
        dataset = cls(tmp_path / "train")
    mixed = MixedWithGenerated(dataset, npz(image=255 - generated, label=targets), 0.5)
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        for image, target, supp_dict in PairWithOtherClass(mixed):
            value, partner = (int(np.asarray(picture).flat[0]) for picture in (image, supp_dict["paired_image"]))
            seen.add(value)
            assert target == min(value, 255 - value) % 3 != supp_dict["paired_label"] == partner % 3
    assert seen == {*range(9), *range(247, 256)}


@pytest.mark.parametrize(
    "dataset, found",
    [
        (TensorDataset(torch.zeros(2, 3), torch.arange(2)), "TensorDataset, which does not say its labels"),
        (Subset(TensorDataset(torch.zeros(2, 3)), [0]), "attribute 'targets'"),
        (Pictures([0.5, 1.5]), "float64"),
        (Pictures(np.eye(3, dtype=int)), r"shape \(3, 3\)"),
        (Pictures([0, 1], target_transform=lambda y: torch.eye(2)[y]), "shape"),
    ],
)
def test_data_sets_without_class_numbers_are_refused(dataset, found):
    with pytest.raises(ConfigError, match=found) as error:
        PairWithOtherClass(dataset)
    assert error.value.path == "dataset_wrapper"


# both, from the YAML of their docstrings

DIGITS = """
.transform: &train_transform !import_call {key: 'torchvision.transforms.ToTensor', init: }
"""


def example(cls):
    return textwrap.dedent(inspect.getdoc(cls).split(".. code-block:: yaml", 1)[1])


def test_examples_of_the_docstrings(tmp_path):
    digits = Digits("train")
    np.savez(tmp_path / "generated.npz", image=255 - digits.images, label=digits.targets)
    text = DIGITS + example(MixedWithGenerated) + example(PairWithOtherClass)
    for old, new in [
        ("torchvision.datasets.CIFAR10", "torchdistill_adv.datasets.Digits"),
        ("root: './resource/dataset/cifar10', train: True", "split: 'train'"),
        ("./resource/dataset/cifar10_ddpm.npz", str(tmp_path / "generated.npz")),
    ]:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "config.yaml").write_text(text)
    config = load_yaml_file(tmp_path / "config.yaml")
    check_loader(config, "train_data_loader", config)
    loader = build_data_loader(config["cifar10/train"], config["train_data_loader"], distributed=False)

    torch.manual_seed(0)
    count = generated = 0
    for images, targets, supp_dict in loader:
        assert images.shape == supp_dict["paired_image"].shape == (len(targets), 1, 8, 8)
        assert (targets != supp_dict["paired_label"]).all()
        assert not torch.equal(images, supp_dict["paired_image"])
        # the corner of a digit is black, and of its negative white
        count, generated = count + len(images), generated + int(images[:, 0, 0, 0].sum())
        assert not supp_dict["paired_image"][:, 0, 0, 0].any()
    assert count == len(digits)
    assert_probability(generated, count, 0.7)

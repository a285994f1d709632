"""Helpers of the tests: a configuration on a few random images, and the box that trains it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from torchdistill.common.main_util import import_dependencies
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.training import get_training_box
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT
from torchdistill.models.official import get_image_classification_model
from torchdistill.models.registry import get_model

from torchdistill_adv.boxes import Box
from torchdistill_adv.datasets import MixedWithGenerated
from torchdistill_adv.datasets.common import base_of
from torchdistill_adv.losses import AdversarialTerm, OnAdversarialExamples
from torchdistill_adv.runner.plain import PlainLoader

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

# the largest image that reaches a network: ImageNet's 224 x 224 would be slow, CIFAR's 32 x 32 in 150 files too
MAX_SIZE = 64
MAX_CIFAR_SIZE = 16
# at most so many steps of a search
MAX_STEPS = 2


class RandomImages(Dataset):
    """Stands for a torchvision data set: takes its arguments, gives random PIL images."""

    def __init__(self, *_: Any, count: int, size: int, mode: str, num_classes: int, transform: Any = None, **__: Any):
        channels = () if mode == "L" else (3,)
        self.images = np.random.RandomState(0).randint(256, size=(count, size, size, *channels), dtype=np.uint8)
        self.targets = [i % num_classes for i in range(count)]
        self.classes = [str(label) for label in range(num_classes)]
        self.max_size = MAX_SIZE
        self.transform = transform and (lambda image: transform(image)[..., : self.max_size, : self.max_size])

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index])
        return self.transform(image) if self.transform else image, self.targets[index]


def mixed_with_random_images(original: Any, path: str, **options: Any) -> MixedWithGenerated:
    """The data set of the configuration, on a file of a few random images."""
    generator = np.random.RandomState(1)
    with TemporaryDirectory() as folder:
        file = Path(folder) / Path(path).name
        images = generator.randint(256, size=(len(original), *base_of(original).images.shape[1:]), dtype=np.uint8)
        # compressed, it is read into memory
        np.savez_compressed(file, image=images, label=np.arange(len(images)))
        return MixedWithGenerated(original, file, **options)


def small_model(block: dict[str, Any]) -> dict[str, Any]:
    """The block of a model, and of what it stands for here: small networks for large ones and for downloads.

    Wide ResNets are of depth 10 and width 1, also those of RobustBench and of published checkpoints, and transformers
    have one layer; the students are as they are.
    """
    key, kwargs = block["key"], block["kwargs"]
    if key == "from_checkpoint":
        return small_model(kwargs["model"])
    if key == "teacher_pair":
        return {**block, "kwargs": {name: small_model(part) for name, part in kwargs.items()}}
    if key == "robustbench":
        key, kwargs = "cifar_wide_resnet", {"num_classes": int(kwargs["dataset"].removeprefix("cifar"))}
    if key == "cifar_wide_resnet":
        kwargs = {**kwargs, "depth": 10, "widen_factor": 1}
    if key == "timm":
        one_layer = {"embed_dim": 16, "depth": 1, "num_heads": 2}
        kwargs = {**kwargs, **one_layer, "img_size": MAX_CIFAR_SIZE, "pretrained": False}
    return {**block, "key": key, "kwargs": kwargs}


def load_config(path: str | Path, *, images: int = 8, **replacements: Any) -> dict[str, Any]:
    """A configuration as torchdistill loads it, cut down to what a test can afford.

    That is ``images`` random images in each data set, small batches, one epoch, two steps a search, every term in every
    step, and the networks of :func:`small_model`.

    Args:
        path: YAML file; a relative path starts in ``configs/``.
        images: length of every data set.
        replacements: new values, each for every entry whose path in the YAML ends in that name, with dots where one
            name is not enough: ``load_config("digits/kd_tald.yaml", batch_size=2, **{"tald.weight": 0.0})``.

    Raises:
        KeyError: a replacement that no entry of the YAML has.
    """
    fake = partial(RandomImages, count=images)
    with (
        mock.patch("torchvision.datasets.CIFAR10", partial(fake, size=32, mode="RGB", num_classes=10)),
        mock.patch("torchvision.datasets.CIFAR100", partial(fake, size=32, mode="RGB", num_classes=100)),
        mock.patch("torchvision.datasets.ImageFolder", partial(fake, size=MAX_SIZE, mode="RGB", num_classes=1000)),
        mock.patch("torchdistill_adv.datasets.Digits", partial(fake, size=8, mode="L", num_classes=10)),
        # a part of 50,000 images is all of these few
        mock.patch("torch.utils.data.Subset", lambda dataset, indices: Subset(dataset, range(len(dataset)))),
        mock.patch("torchdistill_adv.datasets.MixedWithGenerated", mixed_with_random_images),
    ):
        config: dict[str, Any] = load_yaml_file(str(CONFIGS / path))
    config["models"] = {name: small_model(block) for name, block in config["models"].items()}
    # torchdistill's ResNets pool a last map of 8 x 8, so they need the whole image
    if not any(block["key"].startswith("resnet") for block in config["models"].values()):
        for dataset in config["datasets"].values():
            base_of(getattr(dataset, "original", dataset)).max_size = MAX_CIFAR_SIZE
    small: dict[str, Any] = {"num_epochs": 1, "batch_size": 4, "num_workers": 0, "pin_memory": False, "src_ckpt": None}
    small |= {"teacher_model.kwargs.weights": None, "begin_epoch": 0, "num_steps": lambda steps: min(steps, MAX_STEPS)}
    small["every"] = 1  # terms of which two steps might see nothing
    # CRD's memory bank has a slot for every image
    small |= {"num_samples": images, "output_size": images, "num_negative_samples": 4}
    for name, value in small.items():
        _replace(config, name, value)
    for name, value in replacements.items():
        if not _replace(config, name, value):
            raise KeyError(f"{path} has no entry {name!r}")
    return config


def _replace(node: Any, name: str, value: Any, path: str = "") -> bool:
    """Set every entry below ``node`` whose dotted path ends in ``name``, or apply a function; whether there was one."""
    found = False
    if isinstance(node, dict):
        for key in node:
            entry = f"{path}.{key}"
            if entry.endswith(f".{name}"):
                node[key] = value(node[key]) if callable(value) else value
                found = True
            else:
                found |= _replace(node[key], name, value, entry)
    elif isinstance(node, list):
        for item in node:
            found |= _replace(item, name, value, path)
    return found


def read_config(path: str | Path) -> dict[str, Any]:
    """The values of a configuration, with no data set or model built; a relative path starts in ``configs/``."""
    config: dict[str, Any] = yaml.load((CONFIGS / path).read_text(), PlainLoader)
    return config


def stages(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The training stages of a configuration by their path in the YAML."""
    train_config = config["train"]
    numbered = {f"train.{key}": train_config[key] for key in sorted(train_config) if key.startswith("stage")}
    return numbered or {"train": train_config}


def adversarial_terms(stage: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The sub-terms of a stage that see adversarial examples, by name."""

    def is_adversarial(block: dict[str, Any]) -> bool:
        wrapper = block.get("criterion_wrapper") or {}
        loss = MIDDLE_LEVEL_LOSS_DICT.get(block["criterion"]["key"], object)
        return issubclass(loss, AdversarialTerm) or wrapper.get("key") == OnAdversarialExamples.__name__

    return {name: block for name, block in stage["criterion"]["kwargs"]["sub_terms"].items() if is_adversarial(block)}


def _build_model(block: dict[str, Any]) -> nn.Module:
    model = get_image_classification_model(block)
    return get_model(block["key"], **block["kwargs"]) if model is None else model


def as_if_trained(teacher: nn.Module, config: dict[str, Any]) -> nn.Module:
    """Running statistics of a batch: those of an untrained network let its features grow to 1e17 in eval mode."""
    dataset = config["datasets"][config["test"]["test_data_loader"]["dataset_id"]]
    norms = [m for m in teacher.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad(), torch.random.fork_rng():
        teacher(torch.stack([dataset[i][0] for i in range(min(8, len(dataset)))]))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return teacher


def make_box(config: dict[str, Any], seed: int = 0) -> Box:
    """The distillation or training box of a configuration, on the CPU, with models drawn from ``seed``.

    Train one box before making the next: torchdistill sets a stage's processes on the class.
    """
    import_dependencies(config.get("dependencies"))
    torch.manual_seed(seed)
    models = config["models"]
    student = _build_model(models["student_model"] if "student_model" in models else models["model"])
    common = (student, config["datasets"], config["train"], torch.device("cpu"), None, False, 1)
    if "teacher_model" in models:
        return get_distillation_box(as_if_trained(_build_model(models["teacher_model"]), config), *common)
    return get_training_box(*common)


def train(box: Box, max_steps: int = 2) -> Iterator[Tensor]:
    """Train as torchdistill's runner does, at most ``max_steps`` an epoch, and give the loss of every step."""
    for epoch in range(box.num_epochs):
        box.pre_epoch_process(epoch=epoch)
        for sample_batch, targets, supp_dict in islice(box.train_data_loader, max_steps):
            loss = box.forward_process(sample_batch, targets, supp_dict)
            box.post_forward_process(loss=loss)
            yield loss.detach()
        box.post_epoch_process()

"""Helpers of the tests: a configuration on a few random images, and the box that trains it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchdistill.common.main_util import import_dependencies
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.training import get_training_box
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT
from torchdistill.models.official import get_image_classification_model
from torchdistill.models.registry import get_model

from torchdistill_adv.boxes import Box
from torchdistill_adv.losses import AdversarialTerm, OnAdversarialExamples

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

# the largest image that reaches a network: ImageNet's 224 x 224 would be slow
MAX_SIZE = 64


class RandomImages(Dataset):
    """Stands for a torchvision data set: takes its arguments, gives random PIL images."""

    def __init__(self, *_: Any, count: int, size: int, mode: str, num_classes: int, transform: Any = None, **__: Any):
        channels = () if mode == "L" else (3,)
        self.images = np.random.RandomState(0).randint(256, size=(count, size, size, *channels), dtype=np.uint8)
        self.targets = [i % num_classes for i in range(count)]
        self.classes = [str(label) for label in range(num_classes)]
        self.transform = transform and (lambda image: transform(image)[..., :MAX_SIZE, :MAX_SIZE])

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index])
        return self.transform(image) if self.transform else image, self.targets[index]


def load_config(path: str | Path, *, images: int = 8, **replacements: Any) -> dict[str, Any]:
    """A configuration as torchdistill loads it, cut down to ``images`` random images, small batches and one epoch.

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
        mock.patch("torchvision.datasets.CIFAR100", partial(fake, size=32, mode="RGB", num_classes=100)),
        mock.patch("torchvision.datasets.ImageFolder", partial(fake, size=MAX_SIZE, mode="RGB", num_classes=1000)),
        mock.patch("torchdistill_adv.datasets.Digits", partial(fake, size=8, mode="L", num_classes=10)),
    ):
        config: dict[str, Any] = load_yaml_file(str(CONFIGS / path))
    small = {"num_epochs": 1, "batch_size": 4, "num_workers": 0, "pin_memory": False, "src_ckpt": None}
    small |= {"teacher_model.kwargs.weights": None}
    # CRD's memory bank has a slot for every image
    small |= {"num_samples": images, "output_size": images, "num_negative_samples": 4}
    for name, value in small.items():
        _replace(config, name, value)
    for name, value in replacements.items():
        if not _replace(config, name, value):
            raise KeyError(f"{path} has no entry {name!r}")
    return config


def _replace(node: Any, name: str, value: Any, path: str = "") -> bool:
    """Set every entry below ``node`` whose dotted path ends in ``name``; whether there was one."""
    found = False
    if isinstance(node, dict):
        for key in node:
            entry = f"{path}.{key}"
            if entry.endswith(f".{name}"):
                node[key] = value
                found = True
            else:
                found |= _replace(node[key], name, value, entry)
    elif isinstance(node, list):
        for item in node:
            found |= _replace(item, name, value, path)
    return found


class _Reader(yaml.SafeLoader):
    """YAML as it stands: nothing is imported or called, and only ``!join`` is carried out."""


def _read_tag(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    items = loader.construct_sequence(node, deep=True)
    return "".join(map(str, items)) if tag == "join" else items


_Reader.add_multi_constructor("!", _read_tag)


def read_config(path: str | Path) -> dict[str, Any]:
    """The values of a configuration, with no data set or model built; a relative path starts in ``configs/``."""
    config: dict[str, Any] = yaml.load((CONFIGS / path).read_text(), _Reader)
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
        return get_distillation_box(_build_model(models["teacher_model"]), *common)
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

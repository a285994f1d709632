"""Mean and std of a data set, found in the text of its YAML."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import yaml

from torchdistill_adv.errors import ConfigError
from torchdistill_adv.evaluation.pixels import find_normalization
from torchdistill_adv.runner.config import entries, yaml_loader
from torchdistill_adv.yaml.text import Composer, below, flow


def find_mean_and_std(text: str, dataset_id: str, stage: Sequence[str]) -> tuple[dict[str, Any], str | None] | None:
    """Mean and std in the Normalize of a data set, and an anchor that stands for them.

    A Normalize is found in whatever holds it, wrapped data sets too. Where none is written, the transforms are built,
    so that those of torchvision's weights are found.

    Args:
        text: the YAML.
        dataset_id: of the data set; in all data sets if there is none of that name.
        stage: keys of the training stage, above which the anchor must stand.

    Returns:
        ``{"mean": ..., "std": ...}``, with what else the anchor stands for, and its name or None; None if the images
        are not normalised.

    Raises:
        ConfigError: there are several, with different values.
    """
    composer: Any = Composer(text, keeps_aliases=False)
    root: Any = composer.get_single_node()
    arguments = [(node, composer.construct_mapping(node, deep=True)) for node in _arguments(_dataset(root, dataset_id))]
    written = [(node, kwargs) for node, kwargs in arguments if _is_numeric(kwargs["mean"], kwargs["std"])]
    found = [{name: kwargs[name] for name in ("mean", "std")} for _, kwargs in written] or _built(text, dataset_id)
    different = dict.fromkeys(map(flow, found))
    if len(different) > 1:
        raise ConfigError(
            f"found {len(different)} different Normalize in data set '{dataset_id}': {', '.join(different)}; write the "
            "term by hand, with mean and std of the images that the networks are given",
            "datasets",
        )
    begin = root
    for key in stage:
        begin = entries(begin)[key][1]
    for node, kwargs in written:
        is_above = node.start_mark.index < begin.start_mark.index
        if node in composer.names and is_above and kwargs.keys() <= {"mean", "std", "inplace"}:
            return kwargs, composer.names[node]
    return (found[0], None) if found else None


def _dataset(root: Any, dataset_id: str) -> Any:
    _, datasets = entries(root).get("datasets", (None, None))
    return entries(datasets).get(dataset_id, (None, datasets))[1]


def _arguments(dataset: Any) -> Iterator[Any]:
    """The nodes that hold mean and std of every Normalize below a data set."""
    for transform in below(dataset):
        block = entries(transform)
        key = block.get("key", (None, None))[1] if isinstance(transform, yaml.MappingNode) else None
        if isinstance(key, yaml.ScalarNode) and key.value.endswith("Normalize"):
            # torchdistill's tags have them under init
            kwargs = entries(block.get("init", (None, transform))[1]).get("kwargs", (None, None))[1]
            if {"mean", "std"} <= entries(kwargs).keys():
                yield kwargs


def _is_numeric(*values: Any) -> bool:
    items = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return all(isinstance(item, (int, float)) for item in items)


def _built(text: str, dataset_id: str) -> list[dict[str, Any]]:
    """Mean and std of the transforms of a data set, made as torchdistill makes them."""
    loader = yaml_loader(text)
    blocks = [entries(node) for node in below(_dataset(loader.get_single_node(), dataset_id))]
    found = []
    for node in [block[name][1] for block in blocks for name in ("transform", "transforms") if name in block]:
        # the YAML calls whatever it names, so anything can be raised
        with suppress(Exception):
            made = loader.construct_object(node, deep=True)
            mean, std = find_normalization(SimpleNamespace(transform=made))
            found.append({"mean": list(mean), "std": list(std)})
    return [values for values in found if values != {"mean": [0.0], "std": [1.0]}]

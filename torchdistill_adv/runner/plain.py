"""A YAML file as plain mappings, with nothing of it imported or built."""

from __future__ import annotations

import math
from typing import Any

import yaml


class PlainLoader(yaml.SafeLoader):
    """YAML as plain mappings: what a tag stands for is neither imported nor built, and only ``!join`` carried out."""


def _plain(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        items = loader.construct_sequence(node, deep=True)
        return "".join(map(str, items)) if tag == "join" else items
    assert isinstance(node, yaml.ScalarNode)
    return loader.construct_scalar(node)


PlainLoader.add_multi_constructor("!", _plain)


def normal_form(text: str) -> str:
    """YAML without its comments and its layout, for comparison: a value a line."""
    loader = PlainLoader(text)
    try:
        root = loader.get_single_node()
    finally:
        loader.dispose()
    _set_block_style(root)
    return yaml.serialize(root, width=math.inf)


def _set_block_style(node: yaml.Node | None) -> None:
    if isinstance(node, yaml.ScalarNode):
        node.style = None
    elif isinstance(node, yaml.CollectionNode):
        node.flow_style = False
        for item in node.value:
            for child in item if isinstance(item, tuple) else (item,):
                _set_block_style(child)

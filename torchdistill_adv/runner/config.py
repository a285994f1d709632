"""A configuration: loaded from its YAML file, with other values for some of its entries."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torchdistill.common.main_util import import_dependencies
from torchdistill.common.yaml_util import load_yaml_file

import torchdistill_adv  # noqa: F401  (its data sets, models and losses are known before the YAML is loaded)
from torchdistill_adv.errors import ConfigError, inside, nearest
from torchdistill_adv.runner.locating import locate
from torchdistill_adv.runner.plain import PlainLoader

MERGE_TAG = "tag:yaml.org,2002:merge"
GIVEN_TAG = "tag:torchdistill-adv:given"


class TaggedYAML(str):
    """YAML that has tags of torchdistill: what it stands for is made where the configuration is loaded."""


def load_config(path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The configuration of a YAML file, with the objects that its tags name.

    Overrides are set before any object is made, so they reach into the arguments of one, as in
    ``datasets.cifar100/train.init.kwargs.root``. What stands at several places, as an alias or by a merge key, is
    changed at the named one alone.

    Args:
        path: YAML file.
        overrides: other values for entries, by dotted YAML path, as :func:`parse_overrides` gives them.

    Raises:
        ConfigError: no such file, a YAML error, an object of the YAML that cannot be made, or a block that should hold
            an override is not there.
    """
    loader, root = _compose(path, overrides)
    try:
        config: dict[str, Any] = root and loader.construct_document(root)
    except yaml.YAMLError as error:
        raise ConfigError(f"is no YAML: {error}", str(path)) from error
    # the YAML calls whatever it names, so anything can be raised
    except Exception as error:
        found = ConfigError(f"something in it cannot be made: {type(error).__name__}: {error}", str(path))
        found.__cause__ = error
        raise locate(found, path) from error
    return config


def plain_config(
    config: str | os.PathLike[str] | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A configuration as plain mappings, with nothing of it imported or built.

    Raises:
        ConfigError: no such file, a YAML error, or a block that should hold an override is not there.
    """
    if isinstance(config, Mapping):
        return _overridden(config, overrides)
    _, root = _compose(config, overrides)
    loader: Any = PlainLoader("")
    loader.yaml_constructors = {**loader.yaml_constructors, GIVEN_TAG: lambda _, node: node.value}
    try:
        found: dict[str, Any] = root and loader.construct_document(root)
    except yaml.YAMLError as error:
        raise ConfigError(f"is no YAML: {error}", str(config)) from error
    return found


def _compose(path: str | os.PathLike[str], overrides: Mapping[str, Any] | None) -> tuple[Any, Any]:
    """The loader of a file, and its root node with the overrides."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"found '{path}', which is no file; write the path of a YAML file", "--config")
    try:
        # as torchdistill opens it
        with open(str(file)) as stream:
            loader = yaml_loader(stream)
            root = loader.get_single_node()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"is no YAML: {error}", str(path)) from error
    for entry, value in (overrides or {}).items():
        root = with_override(root, entry.split("."), _as_node(value), entry)
    return loader, root


def _overridden(config: Mapping[str, Any], overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of a loaded configuration with other values for some entries."""
    loaded: dict[str, Any] = copy_containers(dict(config))
    for path, value in (overrides or {}).items():
        override(loaded, path, _made(value) if isinstance(value, TaggedYAML) else value)
    return loaded


def import_config_dependencies(config: Any) -> None:
    """Import what the YAML names under ``dependencies``.

    Raises:
        ConfigError: a module that is not there.
    """
    try:
        import_dependencies(config.get("dependencies") if isinstance(config, Mapping) else None)
    except (ImportError, TypeError) as error:
        raise ConfigError(f"{error}; write a list of {{name: '<importable module>'}}", "dependencies") from error


def copy_containers(value: Any) -> Any:
    """Dictionaries and lists copied, what they hold not: torchdistill writes into its configuration."""
    if type(value) is dict:
        return {key: copy_containers(item) for key, item in value.items()}
    return [copy_containers(item) for item in value] if type(value) is list else value


def prepare_config(
    config: str | os.PathLike[str] | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> Any:
    """A configuration with its dependencies imported and its overrides set; what is given stays as it is.

    Args:
        config: YAML file, or a configuration as torchdistill loads one.
        overrides: other values for entries, by dotted YAML path.

    Raises:
        ConfigError: it cannot be loaded, or a block that should hold an override is not there.
    """
    if isinstance(config, Mapping):
        loaded = _overridden(config, overrides)
    else:
        loaded = copy_containers(load_config(config, overrides))
    import_config_dependencies(loaded)
    return loaded


# overrides


def parse_overrides(items: Sequence[str] | None) -> dict[str, Any]:
    """Overrides by dotted path, of texts such as ``train.num_epochs=2``.

    The value is YAML: ``2``, ``[1, 2]``, ``null``, ``'text'``. One with a tag, such as
    ``!import_get {key: 'torch.utils.data.RandomSampler'}``, stays a text, :class:`TaggedYAML`.

    Raises:
        ConfigError: a text without ``=`` or path, or a value that is no YAML.
    """
    found: dict[str, Any] = {}
    for item in items or ():
        path, text = split_override(item)
        found.pop(path, None)  # the order is that of the last ones
        try:
            has_tag = any(isinstance(token, yaml.TagToken) for token in yaml.scan(text, Loader=yaml.SafeLoader))
            found[path] = TaggedYAML(text) if has_tag else yaml.load(text, Loader=yaml.FullLoader)
        except yaml.YAMLError as error:
            raise ConfigError(f"found {item!r}, whose value is no YAML: {error}", "--set") from error
    return found


def split_override(item: str) -> tuple[str, str]:
    """Path and value of a text such as ``train.num_epochs=2``.

    Raises:
        ConfigError: there is no ``=``, or nothing before it.
    """
    path, equals, text = item.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"found {item!r}; write <path>=<value>, such as train.num_epochs=2", "--set")
    return path.strip(), text


def override(config: dict[str, Any], path: str, value: Any) -> None:
    """Set the entry at a dotted path of a configuration.

    Items of a list go by their number. Of keys with dots of their own the longest that is there counts; a new key has
    none.

    Raises:
        ConfigError: the block that should hold the entry is not there.
    """
    block: Any = config
    rest = path.split(".")
    while True:
        keys: dict[str, Any] = {}
        if isinstance(block, dict):
            keys = {str(key): key for key in block}
        elif isinstance(block, list):
            keys = {str(number): number for number in range(len(block))}
        count = leading_key(rest, keys, path, accepts_new=isinstance(block, dict))
        name = ".".join(rest[:count])
        key = keys.get(name, name)
        if count == len(rest):
            block[key] = value
            return
        block, rest = block[key], rest[count:]


def leading_key(parts: Sequence[str], keys: Collection[str], path: str, accepts_new: bool) -> int:
    """How many of the first ``parts`` of a dotted path are a key of a block: of the longest that is there.

    Raises:
        ConfigError: none is there, and a new one cannot be set.
    """
    for count in range(len(parts), 0, -1):
        if ".".join(parts[:count]) in keys:
            return count
    if len(parts) == 1 and accepts_new:
        return 1
    raise ConfigError(
        f"cannot be set; there is no such block in the YAML: found no '{parts[0]}'. {nearest(parts[0], keys)}", path
    )


def yaml_loader(stream: Any) -> Any:
    """PyYAML's loader with the tags of torchdistill, and one for a value that is there already."""
    load_yaml_file(os.devnull)  # torchdistill makes its tags known when it loads a file
    loader: Any = yaml.FullLoader(stream)
    loader.yaml_constructors = {**loader.yaml_constructors, GIVEN_TAG: lambda _, node: node.value}
    return loader


def _made(text: TaggedYAML) -> Any:
    """What a YAML text stands for."""
    with inside("--set"):
        try:
            return yaml_loader(text).get_single_data()
        except Exception as error:
            raise ConfigError(f"found {text!r}, which cannot be made: {error}") from error


def _as_node(value: Any) -> Any:
    if isinstance(value, TaggedYAML):
        return yaml.compose(value, Loader=yaml.FullLoader)
    if type(value) is dict:
        items = [(_as_node(key), _as_node(item)) for key, item in value.items()]
        return yaml.MappingNode("tag:yaml.org,2002:map", items)
    if type(value) is list:
        return yaml.SequenceNode("tag:yaml.org,2002:seq", [_as_node(item) for item in value])
    return yaml.ScalarNode(GIVEN_TAG, value)


def with_override(node: Any, parts: Sequence[str], value: yaml.Node, path: str) -> Any:
    """A copy of ``node`` with ``value`` at a path below it; nodes off the path are shared."""
    found = entries(node)
    count = leading_key(parts, found, path, accepts_new=isinstance(node, yaml.MappingNode))
    name, rest = ".".join(parts[:count]), parts[count:]
    key, old = found.get(name, (yaml.ScalarNode("tag:yaml.org,2002:str", name), None))
    new = with_override(old, rest, value, path) if rest else value
    if isinstance(node, yaml.SequenceNode):
        content: list[Any] = [new if str(number) == name else item for number, item in enumerate(node.value)]
    else:
        content = [(k, new if k is key else v) for k, v in node.value]
        if all(k is not key for k, _ in content):
            content.append((key, new))
    return type(node)(node.tag, content, node.start_mark, node.end_mark)


def entries(node: Any) -> dict[str, tuple[Any, Any]]:
    """Key and value node of every entry by the text of the key, or number of an item, as PyYAML reads them.

    Entries of merge keys are among them.
    """
    if isinstance(node, yaml.SequenceNode):
        return {str(number): (None, item) for number, item in enumerate(node.value)}
    own: dict[str, tuple[Any, Any]] = {}
    merged: dict[str, tuple[Any, Any]] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.tag == MERGE_TAG:
            for block in reversed(value.value if isinstance(value, yaml.SequenceNode) else [value]):
                merged |= entries(block)
        else:
            own[str(key.value)] = key, value
    return merged | own

"""Edits of a YAML text that leave every other byte as it is.

PyYAML tells where each node begins and ends; lines are put in there. Each function takes a text and returns one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from torchdistill_adv.errors import ConfigError
from torchdistill_adv.runner.config import entries, leading_key, with_override
from torchdistill_adv.runner.plain import PlainLoader

INDENTATION = 2


class Raw(str):
    """YAML that is written as it is, such as an alias."""


class Alias(yaml.ScalarNode):
    """An alias, where it stands, and the node that it stands for."""

    def __init__(self, event: Any, target: yaml.Node | None) -> None:
        super().__init__("!alias", event.anchor, event.start_mark, event.end_mark)
        self.target = target


class Composer(PlainLoader):
    """PyYAML's, which remembers the names of anchored nodes, and can keep aliases where they stand."""

    def __init__(self, text: str, *, keeps_aliases: bool = True) -> None:
        super().__init__(text)
        self.keeps_aliases = keeps_aliases
        self.names: dict[yaml.Node, str] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent):
            return Alias(event, node) if self.keeps_aliases else node
        if node is not None and event.anchor:
            self.names[node] = event.anchor
        return node


def parse(text: str) -> tuple[Any, dict[yaml.Node, str]]:
    """The nodes of a YAML text as they stand, and the names of the anchored ones."""
    composer = Composer(text)
    return composer.get_single_node(), composer.names


def config_of(text: str) -> dict[str, Any]:
    """A configuration as plain mappings, in which nothing is built.

    Raises:
        ConfigError: it is no YAML, or no configuration.
    """
    try:
        # bound to the SafeLoader
        config = yaml.load(text, Loader=PlainLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"is no YAML: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError("is no configuration: it has no sections datasets, models, train and test")
    return config


def flow(value: Any) -> str:
    """A plain value in YAML's flow style: ``{key: 'PGD', kwargs: {num_steps: 10}}``."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, str) and value.isprintable():
        # as torchdistill's files have it
        return "'" + value.replace("'", "''") + "'"
    return _scalar(value)


def block(key: str, value: Any, step: int = INDENTATION) -> list[str]:
    """The lines of an entry: what holds mappings is in block style, everything else in flow style."""
    if isinstance(value, Mapping) and any(isinstance(item, Mapping) for item in value.values()):
        lines = [line for name, item in value.items() for line in block(name, item, step)]
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) and item for item in value):
        lines = [line for item in value for line in _item(item)]
    else:
        return [f"{_key(key)}: {flow(value)}"]
    return [f"{_key(key)}:", *(" " * step + line for line in lines)]


def _item(value: Mapping[str, Any]) -> list[str]:
    """The lines of an item of a list."""
    lines = [line for name, item in value.items() for line in block(name, item)]
    return [f"- {lines[0]}", *(f"  {line}" for line in lines[1:])]


def _key(key: str) -> str:
    if isinstance(key, Raw):
        return key
    # PyYAML writes "?&" without quotes, and does not read it in flow style
    return flow(key) if isinstance(key, str) and "?" in key else _scalar(key)


def _scalar(value: Any) -> str:
    # escaped in double quotes, a text is on one line
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    text: str = yaml.safe_dump(value, width=float("inf"), default_style=style)
    return text.split("\n", 1)[0]


def put_entry(text: str, path: Sequence[str], key: str, value: Any, *, first: bool = False) -> str:
    """Put an entry into the mapping at a path of keys, as its last one or as its first.

    Raises:
        ConfigError: there is no such mapping, or it stands elsewhere, as an alias.
    """
    nodes = nodes_at(parse(text)[0], path)
    node, outer = nodes[-1], nodes[:-1]
    if outer and _is_empty(node) and not outer[-1].flow_style:
        step = _step(outer)
        return _insert_lines(text, node.end_mark.index, block(key, value, step), _column(outer[-1]) + step)
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"found {_found(text, node)}, into which no entry can be put as text", ".".join(path))
    if node.flow_style:
        return _insert_flow(text, node, f"{_key(key)}: {flow(value)}")
    lines = block(key, value, _step(nodes))
    mark = node.value[0][0].start_mark
    if first and not text[mark.index - mark.column : mark.index].strip(" "):
        # sections are set apart
        added = [" " * mark.column + line for line in lines] + [""] * (not outer)
        start = mark.index - mark.column
        return text[:start] + "".join(line + _newline(text) for line in added) + text[start:]
    return _insert_lines(text, _content_end(node), lines, _column(node))


def append_item(text: str, path: Sequence[str], value: Mapping[str, Any]) -> str:
    """Put a mapping at the end of the list at a path of keys.

    Raises:
        ConfigError: there is no such list, or it stands elsewhere, as an alias.
    """
    *outer, node = nodes_at(parse(text)[0], path)
    if outer and _is_empty(node) and not outer[-1].flow_style:
        return _insert_lines(text, node.end_mark.index, _item(value), _column(outer[-1]) + INDENTATION)
    if not isinstance(node, yaml.SequenceNode):
        raise ConfigError(f"found {_found(text, node)}, into which no item can be put as text", ".".join(path))
    if node.flow_style:
        return _insert_flow(text, node, flow(value))
    mark = node.value[-1].start_mark
    line = text[mark.index - mark.column : mark.index]
    return _insert_lines(text, _content_end(node), _item(value), len(line) - len(line.lstrip(" ")))


def set_value(text: str, path: str, value: str) -> str:
    """Replace the value at a dotted path by the YAML text ``value``, or put a new entry in.

    An anchor of the old value stays, so that its aliases have the new one too; an alias is replaced alone.

    Raises:
        ConfigError: the block that should hold it is not there, or stands elsewhere, as an alias or by a merge key; or
            the text would mean something else.
    """
    value = value.strip() or "null"
    try:
        root, names = parse(text)
        keys = _keys(root, path)
        new = _replaced(text, root, names, keys, value)
        if yaml.load(new, Loader=PlainLoader) in _meanings(text, keys, path, value):
            return new
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot be set to {value!r} in the text: {error}", path) from error
    raise ConfigError(f"cannot be set to {value!r} in the text without a change of something else; do so by hand", path)


def _keys(root: Any, path: str) -> list[str]:
    """The keys of a dotted path, of which the last may be new."""
    node, rest = root, path.split(".")
    keys: list[str] = []
    while rest:
        if isinstance(node, Alias):
            raise ConfigError(f"is '*{node.value}', so the block stands elsewhere; set it there", ".".join(keys))
        known = _own(node)
        count = leading_key(rest, known, path, accepts_new=isinstance(node, yaml.MappingNode))
        key, rest = ".".join(rest[:count]), rest[count:]
        keys.append(key)
        node = known.get(key)
    return keys


def _replaced(text: str, root: Any, names: Mapping[yaml.Node, str], keys: Sequence[str], value: str) -> str:
    *outer, key = keys
    node = _own(nodes_at(root, outer)[-1]).get(key)
    if node is None:
        return put_entry(text, outer, key, Raw(value))
    inner = [f"&{names[child]}" for child in below(node) if child in names and child is not node]
    if inner:
        raise ConfigError(
            f"holds {', '.join(inner)}, which others may refer to; set what is inside, by its key or number",
            ".".join(keys),
        )
    start, end = node.start_mark.index, _content_end(node)
    new = f"&{names[node]} {value}" if node in names else value
    space = " " if start == end and not text[start - 1].isspace() else ""
    return text[:start] + space + new + text[end:]


def _meanings(text: str, keys: Sequence[str], path: str, value: str) -> Iterator[Any]:
    """What a configuration with another value may be: with that at one place alone, or at all aliases of it too."""
    loader = PlainLoader(text)
    root: Any = loader.get_single_node()
    new: Any = yaml.compose(value, Loader=PlainLoader)
    yield loader.construct_document(with_override(root, path.split("."), new, path))
    old = root
    for key in keys:
        old = entries(old).get(key, (None, None))[1]
    if old is not None:
        yield loader.construct_document(_exchanged(root, old, new))


def _exchanged(node: Any, old: Any, new: Any) -> Any:
    """A copy of the nodes from ``node`` on, with ``new`` in every place of ``old``."""
    if node is old:
        return new
    if isinstance(node, yaml.MappingNode):
        content = [(_exchanged(key, old, new), _exchanged(item, old, new)) for key, item in node.value]
        return yaml.MappingNode(node.tag, content, node.start_mark, node.end_mark)
    if isinstance(node, yaml.SequenceNode):
        content = [_exchanged(item, old, new) for item in node.value]
        return yaml.SequenceNode(node.tag, content, node.start_mark, node.end_mark)
    return node


def nodes_at(root: Any, path: Sequence[str]) -> list[Any]:
    """The blocks on the way to a path, from the root on."""
    nodes = [root]
    for number, key in enumerate(path, 1):
        known = _own(nodes[-1])
        if key not in known:
            raise ConfigError(
                "has no text of its own: it is missing, or stands elsewhere and is here by an alias or a merge key",
                ".".join(path[:number]),
            )
        nodes.append(known[key])
    return nodes


def _own(node: Any) -> dict[Any, Any]:
    """What stands below a node itself, by key or number."""
    if isinstance(node, yaml.MappingNode):
        return {getattr(key, "target", key).value: value for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return {str(number): item for number, item in enumerate(node.value)}
    return {}


def below(node: Any) -> Iterator[yaml.Node]:
    """A node and all that stands below it, keys included."""
    yield node
    if isinstance(node, yaml.CollectionNode):
        for item in node.value:
            for child in item if isinstance(item, tuple) else [item]:
                yield from below(child)


def _is_empty(node: Any) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.start_mark.index == node.end_mark.index


def _found(text: str, node: Any) -> str:
    return "nothing" if _is_empty(node) else repr(text[node.start_mark.index : node.end_mark.index].split("\n")[0])


def _content_end(node: Any) -> int:
    """Where the text of a node ends; PyYAML's mark of a block is where the next one begins."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style:
        last = node.value[-1]
        return _content_end(last[1] if isinstance(last, tuple) else last)
    return node.end_mark.index


def _column(node: yaml.MappingNode) -> int:
    column: int = node.value[0][0].start_mark.column
    return column


def _step(nodes: Sequence[Any]) -> int:
    """By how many columns the file indents what is in the last of some nested blocks, or else that block itself."""
    inner = [(nodes[-1], value) for _, value in nodes[-1].value]
    for pair in [*inner, *zip(nodes[-2:], nodes[-1:], strict=False)]:
        if all(isinstance(node, yaml.MappingNode) and not node.flow_style for node in pair):
            return _column(pair[1]) - _column(pair[0])
    return INDENTATION


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _insert_lines(text: str, index: int, lines: Sequence[str], column: int) -> str:
    """Put lines below the one on which the text before ``index`` ends."""
    end = text.find("\n", len(text[:index].rstrip()))
    end = len(text) if end == -1 else end - text[:end].endswith("\r")
    return text[:end] + "".join(_newline(text) + " " * column + line for line in lines) + text[end:]


def _insert_flow(text: str, node: yaml.CollectionNode, added: str) -> str:
    if not node.value:
        end = node.end_mark.index - 1
        return text[:end] + added + text[end:]
    last = node.value[-1]
    end = _content_end(last[1] if isinstance(last, tuple) else last)
    return f"{text[:end]}, {added}{text[end:]}"

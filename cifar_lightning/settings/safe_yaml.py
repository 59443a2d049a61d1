"""YAML as users write it, read so that it can only fail in one way and never grows without end; imports no torch."""

import re
from collections.abc import Callable
from datetime import date
from typing import Any

import yaml

from cifar_lightning.files import expand_home

# Bytes of a file's name that are not UTF-8 are U+DC80 to U+DCFF in Python and `\\uDC80` in YAML, which libyaml refuses.
_ESCAPED_BYTE = re.compile(r"\\uDC([89A-F][0-9A-F])")
_BYTES = {0x10FF00 + byte: 0xDC00 + byte for byte in range(0x80, 0x100)}  # characters that nobody uses stand for them
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_OTHER_NUMBER = re.compile("[-+]?0[0_]*[1-7]_*[0-7][0-7_]*|[^:]+:.+")  # 064 is 52 in YAML 1.1, and 1:30 is 90
MAX_BYTES = 1 << 20  # of a file; our largest config has 3 kB
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is faster and refuses deep nesting by itself
MAX_DEPTH = 40  # lists and dicts within each other; the deepest of our own configs is 4
MAX_NODES = 100_000  # with every alias written out: some ten short lines of aliases can stand for 10^9 values


def read_yaml(text: str) -> Any:
    """Read YAML as plain data: dicts, lists, text, numbers of at most 64 bits, booleans and null.

    Raises:
        yaml.YAMLError: It is none, or holds something else, such as a date.
    """
    return checked(lambda text: yaml.load(text, Loader=_LOADER))(text)


class _Undated(_LOADER):  # type: ignore[misc, valid-type]  # with or without libyaml
    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own
        first: [(tag, pattern) for tag, pattern in each if tag != "tag:yaml.org,2002:timestamp"]
        for first, each in _LOADER.yaml_implicit_resolvers.items()
    }


def read_setting(text: str) -> Any:
    """Read the text of a setting as `read_yaml` does, but for dates, which are text as for jsonargparse."""
    return checked(lambda text: yaml.load(text, Loader=_Undated))(text)


def checked(load: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a reader of YAML that raises nothing but `yaml.YAMLError`.

    PyYAML's own raises nearly anything (`2024-99-99` is a ValueError, `!!timestamp x` an AttributeError, `!!bool x` a
    KeyError), and gives back endless data where an alias stands inside what it names. `load` makes plain types.
    """

    def read(text: str) -> Any:
        try:
            escaped = _ESCAPED_BYTE.sub(r"\\U0010FF\1", text)
            value = load(escaped)
            _refuse_misread(escaped)
        except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError) as error:
            raise yaml.YAMLError(str(error) or type(error).__name__) from error
        check_nesting(value)
        return _with_bytes(value)

    return read


def _refuse_misread(text: str) -> None:
    """Refuse a key that a mapping has twice, of which PyYAML silently takes the last, and numbers of base 8 and 60."""
    nodes = [yaml.compose(text, Loader=_LOADER)]
    seen = set[int]()  # an alias is the node it names
    while nodes:
        node = nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS and _OTHER_NUMBER.fullmatch(node.value):
            raise yaml.YAMLError(
                f"{node.value} on line {node.start_mark.line + 1} is another number in YAML, of base 8 or 60; write it "
                "without leading zeros and colons, or quote it if it is text"
            )
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            lines = dict[tuple[str, str], int]()
            for key, value in node.value:
                line, name = key.start_mark.line + 1, (key.tag, str(key.value))
                if name in lines:
                    raise yaml.YAMLError(f"{key.value} is given twice, on lines {lines[name]} and {line}")
                lines[name] = line
                nodes += (key, value)


def _with_bytes(value: Any) -> Any:
    if isinstance(value, str):
        if "\0" in value:
            raise yaml.YAMLError("text with a NUL character, which no name of a file has")
        return expand_home(value.translate(_BYTES))
    if isinstance(value, dict):
        return {_with_bytes(key): _with_bytes(item) for key, item in value.items()}
    return [_with_bytes(item) for item in value] if isinstance(value, list) else value


def check_nesting(value: Any, max_nodes: float = MAX_NODES) -> None:
    """Raise a `yaml.YAMLError` for data that is nested too deep or too large, or is not plain."""
    num_nodes, level = 0, [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                below += node
                below += node.values()
            elif isinstance(node, list):
                below += node
            else:
                _check_scalar(node)
            if num_nodes + len(below) > max_nodes:
                raise yaml.YAMLError(f"more than {max_nodes:,} values")
        if not below:
            return
        num_nodes, level = num_nodes + len(below), below
    raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH} levels, or an alias inside what it names")


def _check_scalar(value: Any) -> None:
    if isinstance(value, int) and value.bit_length() > 64:
        raise yaml.YAMLError("a whole number of more than 64 bits")
    if value is not None and not isinstance(value, str | int | float):
        text = f" ({value})" if isinstance(value, date) else ""
        raise yaml.YAMLError(f"a {type(value).__name__}{text}, which no setting is; quote it if it is text")

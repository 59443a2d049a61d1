"""YAML as users write it, read so that it can only fail in one way and never grows without end; imports no torch."""

import re
from collections.abc import Callable
from typing import Any

import yaml

# Bytes of a file's name that are not UTF-8 are U+DC80 to U+DCFF in Python and `\\uDC80` in YAML, which libyaml refuses.
_ESCAPED_BYTE = re.compile(r"\\uDC([89A-F][0-9A-F])")
_BYTES = {0x10FF00 + byte: 0xDC00 + byte for byte in range(0x80, 0x100)}  # characters that nobody uses stand for them
MAX_DEPTH = 40  # lists and dicts within each other; the deepest of our own recipes is 4
MAX_NODES = 100_000  # with every alias written out: some ten short lines of aliases can stand for 10^9 values


def read_yaml(text: str) -> Any:
    """Read YAML as plain data.

    Raises:
        yaml.YAMLError: It is none, or holds what a recipe has no use for.
    """
    # libyaml's loader, where there is one, is faster and refuses deep nesting by itself.
    return checked(lambda text: yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))(text)


def checked(load: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a reader of YAML that raises nothing but `yaml.YAMLError`.

    PyYAML's own raises nearly anything (`2024-99-99` is a ValueError, `!!timestamp x` an AttributeError, `!!bool x` a
    KeyError), and gives back endless data where an alias stands inside what it names. `load` makes plain types.
    """

    def read(text: str) -> Any:
        try:
            value = load(_ESCAPED_BYTE.sub(r"\\U0010FF\1", text))
        except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError) as error:
            raise yaml.YAMLError(str(error) or type(error).__name__) from error
        _refuse_endless(value)
        return _with_bytes(value)

    return read


def _with_bytes(value: Any) -> Any:
    if isinstance(value, str):
        return value.translate(_BYTES)
    if isinstance(value, dict):
        return {_with_bytes(key): _with_bytes(item) for key, item in value.items()}
    return [_with_bytes(item) for item in value] if isinstance(value, list) else value


def _refuse_endless(value: Any) -> None:
    num_nodes, level = 0, [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                below += node.values()
            elif isinstance(node, list | tuple | set):
                below += node
            if num_nodes + len(below) > MAX_NODES:
                raise yaml.YAMLError(f"more than {MAX_NODES:,} values")
        if not below:
            return
        num_nodes, level = num_nodes + len(below), below
    raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH} levels, or an alias inside what it names")

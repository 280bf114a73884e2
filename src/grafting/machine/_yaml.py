"""YAML as a person means it: JSON's kinds of values, no key twice, no old forms of numbers, bounded in depth, size and digits."""

import re
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml

if TYPE_CHECKING:
    from pydantic import JsonValue

    Json: TypeAlias = JsonValue
else:
    Json = Any  # a type that holds itself is none to those that check types as tests run

_DEPTH, _VALUES, _DIGITS = 64, 100_000, 100

# 1_000, 010 and 1:30 are other numbers in YAML 1.1 than they look, and texts in 1.2
_OLD = re.compile(r"[-+]?(?:[\d_.]*_[\d_.eE+-]*|0\d+|\d+(?::[0-5]?\d)+(?:\.\d*)?)")

_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")}
_MERGE = "tag:yaml.org,2002:merge"
_DATE = "tag:yaml.org,2002:timestamp"


def load_yaml(text: str) -> Json:
    """The value of a YAML document; keys may also be numbers.

    Raises:
        yaml.YAMLError, or what Python's conversions raise: it is not YAML of this kind.
    """
    value: Json = _Loader(text).get_single_data()
    return value


class _Loader(yaml.SafeLoader):
    # a date is text
    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in forms if tag != _DATE]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > _DEPTH:
            raise yaml.YAMLError(f"it is nested more than {_DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_document(self, node: yaml.Node) -> Json:
        _measure(node, {}, frozenset())
        value: Json = super().construct_document(node)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, Any]:
        seen: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in seen:
                raise yaml.YAMLError(f"{key.value[:60]} is given twice, in lines {seen[name]} and {line}")
            seen[name] = line
        return super().construct_mapping(node, deep=deep)


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]], above: frozenset[int]) -> tuple[int, int]:
    """How many values a node stands for, all aliases written out, and how deep they are nested."""
    if id(node) in above:
        raise yaml.YAMLError("a value holds itself")
    if id(node) not in known:
        _check(node)
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        inner = [part for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,))]
        sizes = [_measure(part, known, above | {id(node)}) for part in inner]
        known[id(node)] = 1 + sum(size for size, _ in sizes), 1 + max((deep for _, deep in sizes), default=0)
        _check_size(*known[id(node)])
    return known[id(node)]


def _check_size(values: int, depth: int) -> None:
    if values > _VALUES:
        raise yaml.YAMLError(f"its aliases stand for more than {_VALUES} values")
    if depth > _DEPTH:
        raise yaml.YAMLError(f"it is nested more than {_DEPTH} levels deep")


def _check(node: yaml.Node) -> None:
    """Refuses values that JSON has not got, and numbers that are not what they look like."""
    line, kind = node.start_mark.line + 1, node.tag.removeprefix("tag:yaml.org,2002:")
    if node.tag not in _TAGS | {_MERGE}:
        raise yaml.YAMLError(f"line {line} has a value of type {kind[:60]}; known are those of JSON")
    if kind not in ("int", "float"):
        return
    if len(node.value) > _DIGITS:
        raise yaml.YAMLError(f"line {line} has a number of {len(node.value)} characters")
    if _OLD.fullmatch(node.value):
        number = yaml.safe_load(node.value)
        raise yaml.YAMLError(
            f"line {line}: {node.value} means {number} in YAML 1.1; write {number}, or '{node.value}' in quotes for a text"
        )

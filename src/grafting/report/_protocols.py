"""Comparison of protocols as flat tables: whether figures were measured alike, and how.

The rule is that of `evaluation.Protocol.differences`, on the JSON that a run keeps.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..evaluation.protocol import CIRCUMSTANCES
from ..machine.files import flatten
from ..words import ABSENT

_CIRCUMSTANCES = frozenset(f"sampling.{name}" for name in CIRCUMSTANCES)


class ProtocolTable(NamedTuple):
    """One column for each distinct protocol: the models measured by it, and lines of (field, values, differ)."""

    columns: list[list[str]]
    lines: list[tuple[str, list[str], bool]]

    @property
    def differing(self) -> list[tuple[str, list[str]]]:
        return [(name, values) for name, values, differ in self.lines if differ]

    @property
    def table(self) -> list[list[str]]:
        return [["", *map(", ".join, self.columns)], *([name, *values] for name, values, _ in self.lines)]


def compared(row: Mapping[str, Any]) -> dict[str, object]:
    """The fields of a row's protocol that its figures depend on."""
    fields = flatten(row.get("protocol") or {})
    return {k: v for k, v in fields.items() if k not in _CIRCUMSTANCES and not k.startswith("recorded.")}


def alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """True if the figures of two rows may be compared."""
    return compared(a) == compared(b)


def protocol_table(rows: Sequence[Mapping[str, Any]]) -> ProtocolTable:
    """The protocols of all rows side by side."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(json.dumps(compared(row), sort_keys=True), []).append(row)
    columns = [[flatten(row.get("protocol") or {}) for row in group] for group in groups.values()]
    fields = dict.fromkeys(name for column in columns for protocol in column for name in protocol)
    kept = [compared(group[0]) for group in groups.values()]
    lines = [
        (
            name,
            [
                _written_once([protocol[name] for protocol in column if name in protocol])
                for column in columns
            ],
            len({json.dumps(group.get(name)) for group in kept}) > 1,
        )
        for name in fields
    ]
    return ProtocolTable([[str(row["name"]) for row in group] for group in groups.values()], lines)


def _written_once(values: Sequence[Any]) -> str:
    """Each distinct value; within one column they can differ only in what figures do not depend on."""
    written = [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
    return ", ".join(dict.fromkeys(written)) or ABSENT

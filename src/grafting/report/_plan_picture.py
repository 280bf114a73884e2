"""The plan as a picture: blocks from left to right, roles from top to bottom, a colour and a letter an operator."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from ._svg import element, picture
from ._words import operator_label

NUM_COLOURS = 7
_CELL, _GAP, _LEFT, _TOP = 34.0, 4.0, 78.0, 20.0


class OperatorKey(NamedTuple):
    """An operator's entry in the legend."""

    letter: str
    colour: int
    label: str
    num_sites: int


def operator_keys(sites: Sequence[Mapping[str, Any]]) -> dict[str, OperatorKey]:
    """The legend, by the operator as JSON, in the order in which operators appear."""
    operators = [site["operator"] for site in sites if site["operator"]]
    written = [json.dumps(operator, sort_keys=True) for operator in operators]
    distinct = dict(zip(written, operators, strict=True))
    return {
        text: OperatorKey(_letter(place), place % NUM_COLOURS, operator_label(operator), written.count(text))
        for place, (text, operator) in enumerate(distinct.items())
    }


def plan_picture(sites: Sequence[Mapping[str, Any]]) -> Markup:
    """A matrix of blocks by roles; operators of the host itself are pale and without a letter."""
    keys = operator_keys(sites)
    roles = list(dict.fromkeys(site["role"] for site in sites))
    num_blocks = 1 + max(site["block"] for site in sites)
    names = [
        element("text", role, x=_LEFT - 10, y=_TOP + row * (_CELL + _GAP) + _CELL / 2 + 4, text_anchor="end")
        for row, role in enumerate(roles)
    ]
    numbers = [
        element("text", block, x=_LEFT + block * (_CELL + _GAP) + _CELL / 2, y=_TOP - 7, text_anchor="middle")
        for block in range(num_blocks)
    ]
    cells = [_cell(site, roles.index(site["role"]), keys) for site in sites]
    legend = ", ".join(f"{key.letter} {key.label}" for key in keys.values())
    return picture(
        *names,
        *numbers,
        *cells,
        width=_LEFT + num_blocks * (_CELL + _GAP),
        height=_TOP + len(roles) * (_CELL + _GAP),
        label=f"Operators of {num_blocks} blocks by role. {legend or 'None replaced.'}",
        class_="plan",
    )


def plan_width(sites: Sequence[Mapping[str, Any]]) -> float:
    """The picture's natural width in pixels."""
    return _LEFT + (1 + max(site["block"] for site in sites)) * (_CELL + _GAP)


def _cell(site: Mapping[str, Any], row: int, keys: Mapping[str, OperatorKey]) -> Markup:
    x, y = _LEFT + site["block"] * (_CELL + _GAP), _TOP + row * (_CELL + _GAP)
    key = keys[json.dumps(site["operator"], sort_keys=True)] if site["operator"] else None
    colour = "own" if key is None else f"operator-{key.colour}"
    name = "unchanged" if key is None else key.label
    title = f"block {site['block']}, {site['role']}: {name} ({site['path']})"
    letter = element("text", "" if key is None else key.letter, x=x + _CELL / 2, y=y + _CELL / 2 + 5)
    return element(
        "g",
        element("title", title),
        element("rect", x=x, y=y, width=_CELL, height=_CELL, rx=4),
        letter,
        class_=colour,
    )


def _letter(place: int) -> str:
    """A to Z, then A1 to Z1 and so on."""
    round_, letter = divmod(place, 26)
    return chr(ord("A") + letter) + (str(round_) if round_ else "")

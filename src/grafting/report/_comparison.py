"""The page of a comparison: measured rows of runs side by side, each against the first by images of the same seeds."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..machine.files import flatten
from ..words import ABSENT, ROW_MEANINGS, Measured, Row, headline, is_number, verdict
from ._gallery import gallery
from ._page import asked_by, plan_part, rendered, sites_of
from ._protocols import protocol_table
from ._record import RunRecord
from ._results import figure_table, further, notes, results, trade_off


class ComparedRow(NamedTuple):
    """A measured row of a run, with its comparison to the first row as `paired`.

    Args:
        name: what it is called beside the others.
        title: what its run is called; rows of one run have the same.
    """

    name: str
    title: str
    run: RunRecord
    row: Row


def comparison_page(compared: Sequence[ComparedRow]) -> str:
    """A page of two rows or more, as HTML."""
    rows: list[dict[str, Any]] = [
        {**each.row, "name": each.name, "meaning": _meaning(each)} for each in compared
    ]
    base = rows[0]
    samples = {each.name: each.run.samples.get(each.row["name"]) for each in compared}
    runs = {each.title: each.run for each in compared}
    return rendered(
        "comparison.html.j2",
        names=[each.name for each in compared],
        verdicts=[verdict(row, base) or _no_verdict(row, base) for row in rows[1:]],
        results=results(rows, base),
        further=further(rows),
        trade_off=trade_off(rows),
        figure_table=figure_table(rows),
        notes=notes(rows, base),
        gallery=gallery(
            {name: found for name, found in samples.items() if found is not None},
            asked=asked_by(compared[0].run.recipe or {}),
        ),
        same_seeds=all("reason" not in (row.get("paired") or {"reason": ""}) for row in rows[1:]),
        plans={title: plan_part(sites_of(run)) for title, run in runs.items()},
        settings=_differing({title: flatten(run.recipe or {}) for title, run in runs.items()}),
        protocol=protocol_table(rows),
    )


def _no_verdict(row: Measured, base: Measured) -> str:
    figure = headline([row, base])
    if not any(is_number(each.get(figure.key)) for each in (row, base)):
        return f"No suite has measured {row['name']} and {base['name']}"
    return f"{row['name']} and {base['name']} are not compared by {figure.name([row, base])}"


def _meaning(each: ComparedRow) -> str:
    """What the row is, unless its name says so."""
    meaning = ROW_MEANINGS.get(each.row["name"], "")  # type: ignore[call-overload]  # rows of other versions
    return "" if each.name.endswith(meaning) else meaning


def _differing(recipes: Mapping[str, Mapping[str, object]]) -> list[list[str]]:
    """The settings that are not the same in all recipes, a line each, under a head of the runs' names."""
    keys = dict.fromkeys(key for recipe in recipes.values() for key in recipe)
    lines = [[key, *(_written(recipe.get(key)) for recipe in recipes.values())] for key in keys]
    return [["", *recipes], *(line for line in lines if len(set(line[1:])) > 1)]


def _written(value: object) -> str:
    if value is None:
        return ABSENT
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

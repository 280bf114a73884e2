"""The tables of results: the figures of every model beside their intervals, and what to know about them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from ..words import (
    FIGURES,
    FINETUNED,
    PRETRAINED,
    ROW_MEANINGS,
    Figure,
    change,
    headline,
    is_number,
    shown_in,
)
from ._charts import INTERVAL_WIDTH, interval_axis, interval_mark
from ._protocols import alike, protocol_table
from ._svg import Scale, spans_decade
from ._words import ratio


class Result(NamedTuple):
    """A line of the main table, as it is written."""

    name: str
    is_key: bool
    meaning: str
    value: str
    interval: str
    ratio: str
    plot: Markup | str
    cells: list[tuple[str, str | None]]
    """Of each column a figure and what stands under it."""


class Results(NamedTuple):
    """The main table: its first figure with the axis that intervals are drawn on, further columns, and its lines."""

    title: str
    figure: Figure
    is_measured: bool
    columns: list[Figure]
    axis: Markup
    logarithmic: bool
    rows: list[Result]
    is_paired: bool
    """True if a row's ratio to the pretrained one is by images of the same seeds."""
    protocols_differ: bool


class Further(NamedTuple):
    """A table of figures with their intervals; its heads have a text of help each."""

    heads: list[tuple[str, str]]
    lines: list[tuple[str, list[tuple[str, str]]]]


def results(rows: Sequence[Mapping[str, Any]]) -> Results | None:
    """The main table: a line for each model, with its interval drawn on an axis that all share; None without rows."""
    if not rows:
        return None
    figure, base = headline(rows), baseline(rows)
    values = [row[figure.key] for row in rows if is_number(row.get(figure.key))]
    # each suite has figures of its own; where none measures these images, what is left is costs
    columns = [c for c in shown_in("main") if c is not figure and any(c.key in row for row in rows)]
    limits = [limit for row in rows for limit in figure.limits(row) or ()]
    scale = Scale.around(
        [*values, *limits],
        start=10.0,
        end=INTERVAL_WIDTH - 10,
        log=figure.ratio and spans_decade(values),
    )
    return Results(
        title=figure.name(rows),
        figure=figure,
        is_measured=bool(values),
        columns=columns,
        axis=interval_axis(scale),
        logarithmic=scale.log,
        rows=[_result(row, base, figure, columns, scale) for row in rows],
        is_paired=any("ratio" in (row.get("paired") or {}).get(figure.key, {}) for row in rows),
        protocols_differ=len(protocol_table(rows).columns) > 1,
    )


def _result(
    row: Mapping[str, Any],
    base: Mapping[str, Any] | None,
    figure: Figure,
    columns: Sequence[Figure],
    scale: Scale,
) -> Result:
    others = {} if row is base or base is None else base
    return Result(
        name=str(row["name"]),
        is_key=row["name"] in (PRETRAINED, FINETUNED),
        meaning=ROW_MEANINGS.get(row["name"], ""),
        value=figure.write(row.get(figure.key)),
        interval=figure.interval(row),
        ratio=figure.paired(row) or (ratio(figure, row, others) if others and alike(row, others) else ""),
        plot=_interval_mark(row, base, figure, scale),
        cells=[_cell(column, row, others) for column in columns],
    )


def _cell(column: Figure, row: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[str, str | None]:
    """A figure, and what stands under it: its difference from the pretrained model's."""
    return column.write(row.get(column.key)), column.paired(row) or _change(column, row, base)


def _change(column: Figure, row: Mapping[str, Any], base: Mapping[str, Any]) -> str | None:
    """Difference in cost from the pretrained model; None where a figure is no cost."""
    return change(row.get(column.key), base.get(column.key)) if column.of == "model" else None


def _interval_mark(
    row: Mapping[str, Any], base: Mapping[str, Any] | None, figure: Figure, scale: Scale
) -> Markup | str:
    value = row.get(figure.key)
    if not is_number(value):
        return ""
    low, high = figure.limits(row) or (value, value)
    reference = base.get(figure.key) if base is not None else None
    return interval_mark(
        value,
        low,
        high,
        scale=scale,
        reference=reference if is_number(reference) else None,
        strong=row["name"] in (PRETRAINED, FINETUNED),
    )


def further(rows: Sequence[Mapping[str, Any]]) -> Further | None:
    """The figures that are not in the first table, those that any row has."""
    first = [headline(rows), *shown_in("main")]
    figures = [
        figure
        for figure in FIGURES.values()
        if figure not in first and any(is_number(row.get(figure.key)) for row in rows)
    ]
    if not figures:
        return None
    return Further(
        heads=[(figure.name(rows), figure.help) for figure in figures],
        lines=[
            (
                str(row["name"]),
                [(f.write(row.get(f.key)), f.paired(row) or f.interval(row)) for f in figures],
            )
            for row in rows
        ],
    )


def notes(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Each note once, with the rows that it is about."""
    about: dict[str, list[str]] = {}
    for row in rows:
        for note in [*(row.get("notes") or []), *_pairing_notes(row, baseline(rows))]:
            about.setdefault(str(note), []).append(str(row["name"]))
    return [("all" if len(names) == len(rows) else ", ".join(names), note) for note, names in about.items()]


def _pairing_notes(row: Mapping[str, Any], base: Mapping[str, Any] | None) -> list[str]:
    """Notes on a row's comparison with the pretrained one, or the reason that it was not compared."""
    if base is None or row is base or "protocol" not in row:
        return []
    paired = row.get("paired")
    if paired is None:
        return [
            "measured by a version that kept nothing of each image: intervals are of each row alone, "
            "and too wide to tell whether two rows differ"
        ]
    if reason := paired.get("reason"):
        return [f"not compared image by image: {reason}"]
    return list(paired.get("notes") or [])


def baseline(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row that others are compared with."""
    return next((row for row in rows if row["name"] == PRETRAINED), None)

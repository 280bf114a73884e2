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
from ._charts import INTERVAL_WIDTH, interval_axis, interval_mark, scatter
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


def results(rows: Sequence[Mapping[str, Any]], base: Mapping[str, Any] | None) -> Results | None:
    """The main table: a line for each model, with its interval drawn on an axis that all share; None without rows.

    Args:
        base: the row that the others are compared with.
    """
    if not rows:
        return None
    figure = headline(rows)
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
        is_key=row is base or row["name"] == FINETUNED,
        meaning=str(row.get("meaning", ROW_MEANINGS.get(row["name"], ""))),
        value=figure.write(row.get(figure.key)),
        interval=figure.interval(row),
        ratio=figure.paired(row) or (ratio(figure, row, others) if others and alike(row, others) else ""),
        plot=_interval_mark(row, base, figure, scale),
        cells=[_cell(column, row, others) for column in columns],
    )


def _cell(column: Figure, row: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[str, str | None]:
    """A figure, and what stands under it: its difference from the pretrained model's, if they are paired or it is a cost."""
    value = row.get(column.key)
    changed = change(value, base.get(column.key)) if column.of == "model" else None
    return column.write(value), column.paired(row) or changed


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
        strong=row is base or row["name"] == FINETUNED,
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


class TradeOff(NamedTuple):
    """The main figure against a cost, drawn."""

    cost: str
    picture: Markup


_COSTS = ("flops", "attention_flops", "mlp_flops", "attention_mixing_flops", "params", "ms_per_image")


def trade_off(rows: Sequence[Mapping[str, Any]]) -> TradeOff | None:
    """The main figure against the first cost that tells rows apart; None if none does."""
    figure = headline(rows)
    measured = [row for row in rows if is_number(row.get(figure.key))]
    costs = {key: [row.get(key) for row in measured] for key in _COSTS}
    key = next((k for k, found in costs.items() if all(map(is_number, found)) and len(set(found)) > 1), None)
    if key is None:
        return None
    values = [float(row[figure.key]) for row in measured]
    across = Scale.around([float(row[key]) for row in measured], start=52.0, end=420.0)
    up = Scale.around(values, start=216.0, end=12.0, log=figure.ratio and spans_decade(values))
    points = [
        (str(r["name"]), float(r[key]), float(r[figure.key]), r["name"] in (PRETRAINED, FINETUNED))
        for r in measured
    ]
    cost = FIGURES[key].inline
    return TradeOff(cost, scatter(points, across=across, up=up, label=f"{figure.name(rows)} against {cost}"))


def figure_table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Every number of every row, with all its digits."""
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if is_number(value))
    return [["name", *keys], *([str(row["name"]), *(str(row.get(k, "")) for k in keys)] for row in rows)]


def notes(rows: Sequence[Mapping[str, Any]], base: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Each note once, with the rows that it is about; those on comparisons are with `base`."""
    about: dict[str, list[str]] = {}
    for row in rows:
        for note in [*(row.get("notes") or []), *_pairing_notes(row, base)]:
            about.setdefault(str(note), []).append(str(row["name"]))
    return [("all" if len(names) == len(rows) else ", ".join(names), note) for note, names in about.items()]


def _pairing_notes(row: Mapping[str, Any], base: Mapping[str, Any] | None) -> list[str]:
    """Notes on a row's comparison, or the reason that it was not compared."""
    if base is None or row is base or "protocol" not in row:
        return []
    paired = row.get("paired")
    if paired is None:
        return [
            "measured by a version that kept nothing of each image: intervals are of each row alone, "
            "and too wide to tell whether two rows differ"
        ]
    if reason := paired.get("reason"):
        return [f"figures are not compared: {reason}"]
    return list(paired.get("notes") or [])


def baseline(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row that others are compared with."""
    return next((row for row in rows if row["name"] == PRETRAINED), None)

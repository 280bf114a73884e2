"""The tables of results: the figures of every model beside their intervals, and what to know about them."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ._charts import INTERVAL_WIDTH, interval_axis, interval_mark
from ._protocols import alike, protocol_table
from ._svg import Scale, spans_decade
from ._words import (
    ABSENT,
    MEANINGS,
    THIN_SPACE,
    amount,
    change,
    distance_title,
    figure,
    interval,
    is_number,
    percent,
    ratio,
)

# what metrics.json calls the further figures, and how they are headed and written
_FURTHER = {
    "spatial_frechet": ("Spatial Fréchet distance", figure),
    "kid": ("Kernel distance", figure),
    "precision": ("Precision", figure),
    "recall": ("Recall", figure),
    "density": ("Density", figure),
    "coverage": ("Coverage", figure),
    "inception_score": ("Inception score's formula", figure),
    "attention_mixing_flops": ("Mixing FLOPs", amount),
    "num_images": ("Images", lambda value: f"{value:,}".replace(",", THIN_SPACE)),
}


def results(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The main table: a line for each model, with its interval drawn on an axis that all share; None without rows."""
    if not rows:
        return None
    base = baseline(rows)
    values = [row["frechet"] for row in rows if is_number(row.get("frechet"))]
    limits = [row[key] for row in rows for key in ("frechet_low", "frechet_high") if is_number(row.get(key))]
    scale = Scale.around([*values, *limits], start=10.0, end=INTERVAL_WIDTH - 10, log=spans_decade(values))
    return {
        "title": distance_title(rows),
        "axis": interval_axis(scale),
        "logarithmic": scale.log,
        "rows": [_result(row, base, scale) for row in rows],
        "protocols_differ": len(protocol_table(rows).columns) > 1,
    }


def _result(row: Mapping[str, Any], base: Mapping[str, Any] | None, scale: Scale) -> dict[str, Any]:
    is_base = row is base
    others = {} if is_base or base is None else base
    comparable = (
        bool(others) and alike(row, others) and all(is_number(r.get("frechet")) for r in (row, others))
    )
    return {
        "name": str(row["name"]),
        "meaning": MEANINGS.get(row["name"], ""),
        "frechet": figure(row.get("frechet")),
        "interval": interval(row),
        "ratio": ratio(row["frechet"], others["frechet"]) if comparable and others["frechet"] > 0 else "",
        "plot": _interval_mark(row, base, scale),
        "agreement": percent(row.get("agreement")),
        "params": amount(row.get("params")),
        "params_change": change(row.get("params"), others.get("params")),
        "flops": amount(row.get("attention_flops")),
        "flops_change": change(row.get("attention_flops"), others.get("attention_flops")),
        "ms": figure(row.get("ms_per_image")),
        "ms_change": change(row.get("ms_per_image"), others.get("ms_per_image")),
    }


def _interval_mark(row: Mapping[str, Any], base: Mapping[str, Any] | None, scale: Scale) -> Markup | str:
    value = row.get("frechet")
    if not is_number(value):
        return ""
    low, high = (row[k] if is_number(row.get(k)) else value for k in ("frechet_low", "frechet_high"))
    reference = base.get("frechet") if base is not None else None
    return interval_mark(
        value,
        low,
        high,
        scale=scale,
        reference=reference if is_number(reference) else None,
        strong=row["name"] in ("pretrained", "finetuned"),
    )


def further(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The figures that are not in the first table, those that any row has."""
    keys = [key for key in _FURTHER if any(is_number(row.get(key)) for row in rows)]
    if not keys:
        return None
    lines = [
        [str(row["name"]), *(_FURTHER[k][1](row[k]) if is_number(row.get(k)) else ABSENT for k in keys)]
        for row in rows
    ]
    return {"heads": [_FURTHER[key][0] for key in keys], "lines": lines}


def notes(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Each note once, with the rows that it is about."""
    about: dict[str, list[str]] = {}
    for row in rows:
        for note in row.get("notes") or []:
            about.setdefault(str(note), []).append(str(row["name"]))
    return [("all" if len(names) == len(rows) else ", ".join(names), note) for note, names in about.items()]


def baseline(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row that others are compared with."""
    return next((row for row in rows if row["name"] == "pretrained"), None)

"""Histogram of a subset's items per class, beside those of the whole data set."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from markupsafe import Markup

from ._svg import Scale, element, write_picture

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 860.0, 280.0, 64.0, 20.0, 66.0, 44.0
# Okabe and Ito's blue, on a grey that is quieter
_STYLE = (
    "text{font:13px ui-sans-serif,system-ui,'Segoe UI',Roboto,Arial,sans-serif;fill:#63635f}"
    ".title{font-size:15px;fill:#1b1b1a}.grid{stroke:#ecece8}.axis{stroke:#63635f;fill:none}"
    ".all{fill:#d5d5cf}.chosen{fill:#0072b2}"
)


def write_class_histogram(path: Path, *, title: str, counts: Sequence[int], chosen: Sequence[int]) -> Path:
    """Write the picture of a subset's classes, as an SVG file that needs nothing else.

    Args:
        counts: items of every class of the whole data set.
        chosen: items of every class of the subset.
    """
    ground, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    most = max(float(max(counts)), 1.0)
    up = Scale(0.0, 1.04 * most, ground, _TOP)
    marks = [element("text", title, x=_LEFT, y=24, class_="title"), *_legend(counts, chosen)]
    for tick in up.ticks():
        marks.append(element("path", d=f"M{_LEFT} {up(tick):.1f}H{right}", class_="grid"))
        marks.append(element("text", f"{tick:,g}", x=_LEFT - 8, y=up(tick) + 4, text_anchor="end"))
    marks += [
        element("path", element("title", name), d=_bars(values, up), class_=name)
        for name, values in (("all", counts), ("chosen", chosen))
    ]
    marks.append(element("path", d=f"M{_LEFT} {ground}H{right}", class_="axis"))
    last = len(counts) - 1
    marks.append(element("text", "class 0", x=_LEFT, y=ground + 18))
    marks.append(element("text", f"{last}", x=right, y=ground + 18, text_anchor="end"))
    label = f"{title}: items of each of {len(counts)} classes"
    return write_picture(path, marks, width=_WIDTH, height=_HEIGHT, style=_STYLE, label=label)


def _bars(values: Sequence[int], up: Scale) -> str:
    """A bar for each class, all as one path; they touch where they are too narrow for a gap."""
    pitch = (_WIDTH - _RIGHT - _LEFT) / len(values)
    width = pitch - 2 if pitch > 6 else pitch
    starts = [_LEFT + pitch * number + (pitch - width) / 2 for number in range(len(values))]
    return "".join(
        f"M{x:.2f} {up.start:g}V{up(float(value)):.1f}h{width:.2f}V{up.start:g}Z"
        for x, value in zip(starts, values, strict=True)
    )


def _legend(counts: Sequence[int], chosen: Sequence[int]) -> list[Markup]:
    marks, x = [], _LEFT
    for name, words, values in (("chosen", "subset", chosen), ("all", "all", counts)):
        marks.append(element("rect", x=x, y=38.0, width=11.0, height=11.0, class_=name))
        marks.append(element("text", f"{words}: {in_words(values)}", x=x + 17, y=48.0))
        x += 390
    return marks


def in_words(counts: Sequence[int]) -> str:
    """The sum, and the least, the middle and the most of a class."""
    least, middle, most = class_range(counts)
    span = f"{least:,} a class" if least == most else f"{least:,} to {most:,} a class, median {middle:,g}"
    return f"{sum(counts):,} items, {span}"


def class_range(counts: Sequence[int]) -> tuple[int, float, int]:
    """The least, the median and the most items of a class."""
    return min(counts), median(counts), max(counts)

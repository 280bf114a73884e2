"""A sweep's table as one picture: a line for each design, a mark for each recipe, on one axis of their main figure."""

from collections.abc import Collection, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..words import DISTILLED, FINETUNED, PRETRAINED, Figure, headline, is_number
from ._svg import Scale, element, write_picture

# Okabe and Ito's palette, told apart by every kind of colour vision
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7")
_GREY = "#63635f"
_WIDTH, _LEFT, _RIGHT, _TOP, _ROW = 860.0, 210.0, 24.0, 74.0, 20.0
_STYLE = (
    "text{font:13px ui-sans-serif,system-ui,'Segoe UI',Roboto,Arial,sans-serif;fill:#1b1b1a}"
    ".quiet{fill:#63635f}.grid{stroke:#e2e2dd}.reference{stroke:#63635f;stroke-dasharray:4 3}.hollow{fill:#fff}"
)


def write_sweep_picture(path: str | Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    """Write the picture of a sweep's table, as an SVG file that needs nothing else.

    Of several columns of labels the first tells recipes apart by colour and the others name the lines; one column names the
    lines. A full mark is a model after stage 2, a hollow one after stage 1, both with their intervals; the dashed line is
    the pretrained model.
    """
    figure = headline(lines)
    *colours, last = _label_columns(lines)
    by_colour, by_line = colours[:1], [*colours[1:], last]
    grafted = [line for line in lines if line["stage"] != PRETRAINED]
    measured = [line for line in lines if is_number(line.get(figure.key))]
    drawn = [line for line in measured if line["stage"] in (DISTILLED, FINETUNED)]
    names = list(dict.fromkeys(_name(line, by_line) for line in grafted))
    colour_of = dict(
        zip(dict.fromkeys(_name(line, by_colour) for line in grafted), cycle(_COLOURS), strict=False)
    )
    pretrained = next((line[figure.key] for line in measured if line["stage"] == PRETRAINED), None)
    height = _TOP + _ROW * len(names) + 30
    values = [value for line in drawn for value in (line[figure.key], *(figure.limits(line) or ()))]
    values += [] if pretrained is None else [pretrained]
    across = Scale.around(values, start=_LEFT, end=_WIDTH - _RIGHT, log=figure.ratio)
    stages = {line["stage"] for line in drawn}
    better = "less is better" if figure.better == "low" else "more is better"
    title = f"{figure.name(lines)}{', logarithmic' if figure.ratio else ''}; {better}"
    marks = [
        *_axis(across, height),
        *_legend(title, colour_of if by_colour else {}, stages),
    ]
    for place, name in enumerate(names):
        y = _TOP + _ROW * (place + 0.5)
        marks.append(element("text", name, x=_LEFT - 14, y=y + 4, text_anchor="end"))
        marks += [
            _mark(line, figure, across, y, colour_of[_name(line, by_colour)])
            for line in drawn
            if _name(line, by_line) == name
        ]
    if pretrained is not None:
        x = across(pretrained)
        marks.append(element("path", d=f"M{x:.1f} {_TOP - 6}V{height - 26}", class_="reference"))
        label = f"pretrained {figure.write(pretrained)}"
        marks.append(element("text", label, x=x + 4, y=_TOP - 10, class_="quiet"))
    return write_picture(Path(path), marks, width=_WIDTH, height=height, style=_STYLE)


def _label_columns(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns before the stage; the stage itself where there is one recipe."""
    keys = list(lines[0])
    return keys[: keys.index("stage")] or ["stage"]


def _name(line: Mapping[str, Any], columns: Sequence[str]) -> str:
    return ", ".join(str(line[column]) for column in columns if column in line)


def _axis(across: Scale, height: float) -> list[Markup]:
    marks = []
    for tick in across.ticks(6):
        x = across(tick)
        marks.append(element("path", d=f"M{x:.1f} {_TOP}V{height - 26}", class_="grid"))
        marks.append(element("text", f"{tick:g}", x=x, y=height - 9, text_anchor="middle", class_="quiet"))
    return marks


def _legend(title: str, colour_of: Mapping[str, str], stages: Collection[str]) -> list[Markup]:
    """The axis' title, what colours mean, then what full and hollow marks mean."""
    marks = [element("text", title, x=_LEFT, y=20, class_="quiet")]
    keys = [(name, {"fill": colour}) for name, colour in colour_of.items()]
    keys += [("after stage 2", {"fill": _GREY})] if FINETUNED in stages else []
    keys += [("after stage 1", {"stroke": _GREY, "class_": "hollow"})] if DISTILLED in stages else []
    x = _LEFT
    for name, style in keys:
        marks.append(element("circle", cx=x + 5, cy=36.0, r=4, **style))
        marks.append(element("text", name, x=x + 14, y=40))
        x += 34 + 7.0 * len(name)
    return marks


def _mark(line: Mapping[str, Any], figure: Figure, across: Scale, y: float, colour: str) -> Markup:
    is_last, value = line["stage"] == FINETUNED, line[figure.key]
    low, high = figure.limits(line) or (value, value)
    bar = f"M{across(low):.1f} {y:.1f}H{across(high):.1f}"
    centre = {"cx": across(value), "cy": y}
    return element(
        "g",
        element("title", f"{figure.write(value)} ({line['stage']})"),
        element("path", d=bar, stroke=colour, stroke_width=2 if is_last else 1),
        element("circle", **centre, r=4.5, fill=colour)
        if is_last
        else element("circle", **centre, r=3.5, stroke=colour, class_="hollow"),
    )

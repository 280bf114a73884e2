"""A sweep's table as one picture: a line for each design, a mark for each recipe, on one axis of Frechet distance."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..files import write_bytes
from ._svg import Scale, element
from ._words import figure

# Okabe and Ito's palette, told apart by every kind of colour vision
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7")
_WIDTH, _LEFT, _RIGHT, _TOP, _ROW = 860.0, 210.0, 24.0, 74.0, 20.0
_STYLE = (
    "text{font:13px ui-sans-serif,system-ui,'Segoe UI',Roboto,Arial,sans-serif;fill:#1b1b1a}"
    ".quiet{fill:#63635f}.grid{stroke:#e2e2dd}.reference{stroke:#63635f;stroke-dasharray:4 3}.hollow{fill:#fff}"
)


def write_sweep_picture(path: str | Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    """Write the picture of a sweep's table, as an SVG file that needs nothing else.

    The first column of labels tells recipes apart by colour, the others name the lines. A full mark is a model after stage
    2, with its interval; a hollow mark one after stage 1; the dashed line is the pretrained model.
    """
    path = Path(path)
    write_bytes(path, str(sweep_picture(lines)).encode())
    return path


def sweep_picture(lines: Sequence[Mapping[str, Any]]) -> Markup:
    """The same as markup."""
    columns = _label_columns(lines)
    series = list(dict.fromkeys(str(line[columns[0]]) for line in lines))
    names = list(dict.fromkeys(_name(line, columns) for line in lines if line["stage"] != "pretrained"))
    height = _TOP + _ROW * len(names) + 30
    drawn = [line for line in lines if line["stage"] in ("pretrained", "distilled", "finetuned")]
    values = [line[key] for line in drawn for key in ("frechet", "frechet_low", "frechet_high")]
    across = Scale.around(values, start=_LEFT, end=_WIDTH - _RIGHT, log=True)
    pretrained = next((line["frechet"] for line in lines if line["stage"] == "pretrained"), None)
    is_hollow = any(line["stage"] == "distilled" for line in drawn)
    marks = [*_axis(across, height), *_legend(series, is_hollow=is_hollow)]
    for place, name in enumerate(names):
        y = _TOP + _ROW * (place + 0.5)
        marks.append(element("text", name, x=_LEFT - 14, y=y + 4, text_anchor="end"))
        marks += [
            _mark(line, across, y, _COLOURS[series.index(str(line[columns[0]])) % len(_COLOURS)])
            for line in drawn
            if _name(line, columns) == name and line["stage"] != "pretrained"
        ]
    if pretrained is not None:
        x = across(pretrained)
        marks.append(element("path", d=f"M{x:.1f} {_TOP - 6}V{height - 26}", class_="reference"))
        label = f"pretrained {figure(pretrained)}"
        marks.append(element("text", label, x=x + 4, y=_TOP - 10, class_="quiet"))
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w:g} {h:g}" width="{w:g}" height="{h:g}" role="img">'
        '<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>{marks}</svg>\n'
    ).format(w=_WIDTH, h=height, style=Markup(_STYLE), marks=Markup("").join(marks))


def _label_columns(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns before the stage."""
    keys = list(lines[0])
    return keys[: keys.index("stage")]


def _name(line: Mapping[str, Any], columns: Sequence[str]) -> str:
    return ", ".join(str(line[column]) for column in columns[1:] if column in line)


def _axis(across: Scale, height: float) -> list[Markup]:
    marks = []
    for tick in across.ticks(6):
        x = across(tick)
        marks.append(element("path", d=f"M{x:.1f} {_TOP}V{height - 26}", class_="grid"))
        marks.append(element("text", f"{tick:g}", x=x, y=height - 9, text_anchor="middle", class_="quiet"))
    return marks


def _legend(series: Sequence[str], *, is_hollow: bool) -> list[Markup]:
    marks = [element("text", "Frechet distance, logarithmic; less is better", x=_LEFT, y=20, class_="quiet")]
    x = _LEFT
    for place, name in enumerate(series):
        colour = _COLOURS[place % len(_COLOURS)]
        marks.append(element("circle", cx=x + 5, cy=36.0, r=4.5, fill=colour))
        marks.append(element("text", f"{name}, after stage 2", x=x + 14, y=40))
        x += 30 + 7.5 * len(f"{name}, after stage 2")
    if is_hollow:
        marks.append(element("circle", cx=x + 5, cy=36.0, r=4, class_="hollow", stroke="#63635f"))
        marks.append(element("text", "after stage 1", x=x + 14, y=40))
    return marks


def _mark(line: Mapping[str, Any], across: Scale, y: float, colour: str) -> Markup:
    x = across(line["frechet"])
    title = element("title", f"{figure(line['frechet'])} ({line['stage']})")
    if line["stage"] == "distilled":
        return element("circle", title, cx=x, cy=y, r=3.5, stroke=colour, class_="hollow")
    bar = f"M{across(line['frechet_low']):.1f} {y:.1f}H{across(line['frechet_high']):.1f}"
    return element(
        "g",
        title,
        element("path", d=bar, stroke=colour, stroke_width=2),
        element("circle", cx=x, cy=y, r=4.5, fill=colour),
    )

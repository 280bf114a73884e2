"""The report's charts as inline SVG: intervals beside a table's rows, changes from start to end, curves over steps."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float64
from markupsafe import Markup

from ..words import amount, number, short
from ._svg import Scale, element, picture

INTERVAL_WIDTH = 230.0
_AXIS_HEIGHT, _ROW_HEIGHT = 30.0, 58.0


class Curve(NamedTuple):
    """Values over steps, drawn as a faint line, a strong line, or points."""

    steps: Float64[np.ndarray, " n"]
    values: Float64[np.ndarray, " n"]
    style: Literal["raw", "smooth", "points"]


def interval_axis(scale: Scale) -> Markup:
    """The ticks above a column of `interval_mark`s."""
    labels = [
        element("text", short(tick), x=scale(tick), y=_AXIS_HEIGHT - 9, text_anchor="middle")
        for tick in scale.ticks(3)
    ]
    ends = [
        element("path", d=f"M{scale(tick):.1f} {_AXIS_HEIGHT - 5}V{_AXIS_HEIGHT}", class_="grid")
        for tick in scale.ticks(3)
    ]
    kind = "logarithmic" if scale.log else "linear"
    return picture(*labels, *ends, width=INTERVAL_WIDTH, height=_AXIS_HEIGHT, label=f"{kind} axis")


def interval_mark(
    value: float, low: float, high: float, *, scale: Scale, reference: float | None, strong: bool
) -> Markup:
    """A dot on a bar from `low` to `high`, over the axis' ticks and a line at `reference`."""
    middle = _ROW_HEIGHT / 2
    lines = [
        element("path", d=f"M{scale(tick):.1f} 0V{_ROW_HEIGHT}", class_="grid") for tick in scale.ticks(3)
    ]
    if reference is not None:
        lines.append(element("path", d=f"M{scale(reference):.1f} 0V{_ROW_HEIGHT}", class_="reference"))
    left, right = scale(low), scale(high)
    # an interval too narrow to see is drawn as a thin line, behind its dot
    width = max(right - left, 1.5)
    label = f"{number(value)}, interval {number(low)} to {number(high)}"
    return picture(
        element("title", label),
        *lines,
        element(
            "rect", x=(left + right - width) / 2, y=middle - 9, width=width, height=18.0, class_="interval"
        ),
        element("circle", cx=scale(value), cy=middle, r=4, class_="dot" if strong else "dot quiet"),
        width=INTERVAL_WIDTH,
        height=_ROW_HEIGHT,
        label=label,
    )


def change_mark(start: float, end: float, *, scale: Scale, label: str) -> Markup:
    """A hollow dot at the start, a full one at the end and a line between, from the scale's lowest tick to its highest."""
    height, middle = 22.0, 11.0
    grid = [element("path", d=f"M{scale(tick):.1f} 0V{height}", class_="grid") for tick in scale.ticks(2)]
    return picture(
        element("title", label),
        *grid,
        element("path", d=f"M{scale(start):.1f} {middle}H{scale(end):.1f}", class_="whisker"),
        element("circle", cx=scale(start), cy=middle, r=4, class_="hollow"),
        element("circle", cx=scale(end), cy=middle, r=4.5, class_="dot"),
        width=max(scale.start, scale.end) + 10,
        height=height,
        label=label,
    )


def step_chart(
    curves: Sequence[Curve],
    *,
    label: str,
    log: bool,
    values: Sequence[float],
    size: tuple[float, float],
    ends: Sequence[float] = (),
) -> Markup:
    """Curves over training steps, with a y axis that holds `values` (so that charts side by side can share it).

    Args:
        ends: steps after which a phase ends and another begins.
    """
    width, height = size
    left, right, top, bottom = 46.0, 8.0, 8.0, 22.0
    last = max((float(curve.steps[-1]) for curve in curves if len(curve.steps)), default=1.0)
    across = Scale(0.0, max(last, 1.0), left, width - right)
    up = Scale.around(values, start=height - bottom, end=top, log=log)
    drawn = [_draw(curve, across, up) for curve in curves]
    marks = [
        element("path", d=f"M{across(end):.1f} {top}V{height - bottom}", class_="reference") for end in ends
    ]
    read = [mark for curve in curves[-1:] for mark in _readings(curve, across, (top, height - bottom))]
    parts = (*_axes(across, up, width - right), *marks, *read, *drawn)
    return picture(*parts, width=width, height=height, label=label)


def _readings(curve: Curve, across: Scale, limits: tuple[float, float]) -> list[Markup]:
    """Unseen lines over a chart, that say a curve's value to who points at them."""
    if curve.style == "points" or not len(curve.steps):
        return []
    places = np.unique(np.linspace(0, len(curve.steps) - 1, 40).round().astype(int)).tolist()
    return [
        element(
            "path",
            element("title", f"step {curve.steps[i]:g}: {number(float(curve.values[i]))}"),
            d=f"M{across(curve.steps[i]):.1f} {limits[0]}V{limits[1]}",
            class_="hit",
        )
        for i in places
    ]


def scatter(
    points: Sequence[tuple[str, float, float, bool]], *, across: Scale, up: Scale, label: str
) -> Markup:
    """Named points (name, x, y, strong) and where each lies against the pretrained model's, with both axes."""
    width, height, marks, below = across.end + 130, up.start + 24, [], up.end - 13
    for name, x, y, strong in sorted(points, key=lambda point: up(point[2])):
        # names of near points are moved apart
        below = max(up(y) + 4, below + 13)
        title = element("title", f"{name}: {number(y)} at {amount(x)}")
        dot = element("circle", title, cx=across(x), cy=up(y), r=4.5, class_="dot" if strong else "dot quiet")
        marks += [dot, element("text", name, x=across(x) + 9, y=below)]
    axes = _axes(across, up, across.end, write=amount)
    return picture(*axes, *marks, width=width, height=height, label=label)


def _axes(
    across: Scale, up: Scale, end: float, *, write: Callable[[float], str] = "{:g}".format
) -> list[Markup]:
    ground = max(up.start, up.end)
    marks = []
    for tick in up.ticks():
        marks.append(element("path", d=f"M{across.start} {up(tick):.1f}H{end}", class_="grid"))
        marks.append(element("text", short(tick), x=across.start - 6, y=up(tick) + 4, text_anchor="end"))
    marks.append(element("path", d=f"M{across.start} {ground}H{end}", class_="axis"))
    steps = [tick for tick in across.ticks(4) if tick == int(tick)]
    for tick in steps:
        # the last label would be cut off by the picture's edge if it were centred there
        anchor = "end" if across(tick) > end - 14 else "middle"
        marks.append(element("text", write(tick), x=across(tick), y=ground + 16, text_anchor=anchor))
    return marks


def _draw(curve: Curve, across: Scale, up: Scale) -> Markup:
    if curve.style == "points":
        dots = [
            element(
                "circle",
                element("title", f"step {step:g}: {number(value)}"),
                cx=across(step),
                cy=up(value),
                r=3,
                class_="held-out",
            )
            for step, value in zip(curve.steps.tolist(), curve.values.tolist(), strict=True)
        ]
        return element("g", *dots)
    # more points than pixels are not seen, and make the file large
    kept = thin(curve.values, int(across.end - across.start))
    points = [
        f"{across(step):.1f} {up(value):.1f}"
        for step, value in zip(curve.steps[kept].tolist(), curve.values[kept].tolist(), strict=True)
    ]
    if len(points) == 1:  # no line has one point
        x, y = points[0].split()
        return element("circle", cx=float(x), cy=float(y), r=3, class_="dot")
    return element("path", d="M" + "L".join(points), class_=curve.style) if points else Markup("")


def thin(values: Float64[np.ndarray, " n"], limit: int) -> np.ndarray:
    """Indices of at most `limit` values that look like all of them: the least and the largest of each stretch."""
    if len(values) <= limit:
        return np.arange(len(values))
    stretches = np.array_split(np.arange(len(values)), limit // 2)
    kept = [index for s in stretches for index in (s[values[s].argmin()], s[values[s].argmax()])]
    return np.unique(kept)


def smooth(values: Float64[np.ndarray, " n"], share: float = 0.04) -> Float64[np.ndarray, " n"]:
    """A centred moving mean over `share` of all values; the window is cut at both ends, so that none is invented."""
    half = int(len(values) * share / 2)
    sums = np.concatenate([[0.0], values.cumsum()])
    places = np.arange(len(values))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)

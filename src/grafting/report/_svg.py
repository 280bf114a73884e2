"""The ground under the charts: SVG elements with everything escaped, and scales with round ticks.

Colours are classes and live in `report.css`, so that pictures follow the reader's light or dark theme.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from ..machine.files import write_bytes


def element(tag: str, *children: Any, **attributes: Any) -> Markup:
    """One SVG element: `class_` is written class, `stroke_width` stroke-width; text children are escaped."""
    written = Markup("").join(
        Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), _rounded(value))
        for name, value in attributes.items()
    )
    inside = Markup("").join(escape(child) for child in children)
    return Markup("<{tag}{written}>{inside}</{tag}>").format(tag=tag, written=written, inside=inside)


def picture(*children: Any, width: float, height: float, label: str, class_: str = "chart") -> Markup:
    """An SVG image of `width` by `height` units, described by `label` to those who cannot see it."""
    # viewBox is the one attribute of SVG written in camel case that is needed here
    box = {"viewBox": f"0 0 {width:g} {height:g}"}
    return element("svg", *children, class_=class_, role="img", aria_label=label, **box)


def write_picture(
    path: Path, marks: Iterable[Markup], *, width: float, height: float, style: str, label: str | None = None
) -> Path:
    """Write an SVG file that needs nothing else, on white; returns its path."""
    described = Markup("") if label is None else Markup(' aria-label="{}"').format(label)
    picture = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w:g} {h:g}" width="{w:g}" height="{h:g}" role="img"{described}>'
        '<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>{marks}</svg>\n'
    ).format(w=width, h=height, described=described, style=Markup(style), marks=Markup("").join(marks))
    write_bytes(path, picture.encode())
    return path


def _rounded(value: Any) -> Any:
    return f"{round(float(value), 2):g}" if isinstance(value, float | np.floating) else value


_FAR = 1e200  # arithmetic with larger numbers overflows


@dataclass(frozen=True)
class Scale:
    """Maps values in low..high, linear or logarithmic, onto start..end; values outside are clipped."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def around(cls, values: Iterable[float], *, start: float, end: float, log: bool = False) -> "Scale":
        """A scale that holds `values` (those above 0, if logarithmic) with a little room on both sides; none beyond 1e200."""
        inside = [v for v in values if abs(v) < _FAR and (v > 1 / _FAR or not log)] or [1.0]
        low, high = min(inside), max(inside)
        if log:
            room = max((high / low) ** 0.06, 1.05)
            return cls(low / room, high * room, start, end, log=True)
        room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(low - room, high + room, start, end)

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 4) -> list[float]:
        """About `count` round values inside the scale."""
        if not self.log:
            return self._linear_ticks(count)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        stride = max(1, len(decades) // (count + 1))
        for multiples in ((1,), (1, 3), (1, 2, 5)):
            ticks = [m * 10.0**decade for decade in decades[::stride] for m in multiples]
            ticks = [tick for tick in ticks if self.low <= tick <= self.high]
            if len(ticks) >= 3:
                return ticks
        return ticks if len(ticks) == 2 else self._linear_ticks(count)

    def _linear_ticks(self, count: int) -> list[float]:
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= 0.7 * rough)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        # rounded, so that 3 * 0.1 is written 0.3
        return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def spans_decade(values: Iterable[float]) -> bool:
    """True if values, all above 0, need a logarithmic axis: the largest is over ten times the smallest."""
    finite = [v for v in values if math.isfinite(v)]
    return bool(finite) and min(finite) > 0 and max(finite) > 10 * min(finite)

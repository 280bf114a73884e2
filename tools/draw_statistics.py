"""Draws the picture of docs/statistics.md: how a ratio's standard error falls with images, paired and unpaired.

    grafting run recipes/testbed/near_copy.yaml --out runs/near-copy
    python tools/draw_statistics.py runs/near-copy docs/statistics.svg

The run's last row against its pretrained one, by the features that it keeps of each image, for its first 256, 512 ... images.
Prints the numbers as well.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from grafting.data.bundled import bundled_reference_path
from grafting.evaluation import Reference
from grafting.metrics.frechet import FrechetInfluences
from grafting.report._svg import Scale, element
from grafting.runs.pairing import RunRow, read_row

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640.0, 300.0, 60.0, 150.0, 48.0, 46.0
_STYLE = (
    "text{font:13px ui-sans-serif,system-ui,'Segoe UI',Roboto,Arial,sans-serif;fill:#63635f}"
    ".title{font-size:15px;fill:#1b1b1a}.grid{stroke:#ecece8}.line{fill:none;stroke-width:2}"
)
_COLOURS = {"each row alone": "#d55e00", "paired by seed": "#0072b2"}


class Point(NamedTuple):
    """Relative standard errors of the ratio from so many images."""

    num_images: int
    alone: float
    paired: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run on the testbed")
    parser.add_argument("picture", type=Path, metavar="SVG")
    args = parser.parse_args()
    points = measured(read_row(args.run), read_row(args.run, "pretrained"))
    for point in points:
        print(
            f"{point.num_images:6} images: {100 * point.alone:.2f} % alone, {100 * point.paired:.2f} % paired, "
            f"worth {(point.alone / point.paired) ** 2:.0f} times the images"
        )
    args.picture.write_text(str(picture(points)))


def measured(a: RunRow, b: RunRow) -> list[Point]:
    """The standard errors for as many images as distances are compared of, and for twice as many each time."""
    reference = Reference.load(bundled_reference_path()).statistics
    images = [row.measured.per_image for row in (a, b)]
    features = [image.features for image in images if image is not None and image.features is not None]
    strata = images[0].labels
    count, points = 4 * features[0].shape[1], []
    while count <= len(features[0]):
        mine, its = (FrechetInfluences.of(f[:count], reference, strata=strata[:count]) for f in features)
        alone = sum((found.estimate().error / found.value) ** 2 for found in (mine, its)) ** 0.5
        points.append(Point(count, alone, mine.ratio(its).error))
        count *= 2
    return points


def picture(points: Sequence[Point]) -> Markup:
    across = Scale(points[0].num_images, points[-1].num_images, _LEFT + 12, _WIDTH - _RIGHT, log=True)
    errors = [100 * error for point in points for error in point[1:]]
    up = Scale.around(errors, start=_HEIGHT - _BOTTOM, end=_TOP, log=True)
    marks = [
        element("text", "Standard error of the ratio of two Fréchet distances", x=12, y=24, class_="title")
    ]
    for tick in up.ticks():
        marks.append(element("path", d=f"M{_LEFT} {up(tick):.1f}H{_WIDTH - _RIGHT}", class_="grid"))
        marks.append(element("text", f"{tick:g} %", x=_LEFT - 8, y=up(tick) + 4, text_anchor="end"))
    for point in points:
        label = f"{point.num_images:,}"
        marks.append(element("text", label, x=across(point.num_images), y=_HEIGHT - 26, text_anchor="middle"))
    marks.append(
        element(
            "text",
            "images of each model",
            x=(_LEFT + _WIDTH - _RIGHT) / 2,
            y=_HEIGHT - 8,
            text_anchor="middle",
        )
    )
    for (name, colour), place in zip(_COLOURS.items(), (1, 2), strict=True):
        marks += _curve([(across(p.num_images), up(100 * p[place])) for p in points], name, colour)
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w:g} {h:g}" width="{w:g}" height="{h:g}" role="img">'
        '<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>{marks}</svg>\n'
    ).format(w=_WIDTH, h=_HEIGHT, style=Markup(_STYLE), marks=Markup("").join(marks))


def _curve(places: Sequence[tuple[float, float]], name: str, colour: str) -> list[Markup]:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    x, y = places[-1]
    return [
        element("path", d=path, stroke=colour, class_="line"),
        *(element("circle", cx=x, cy=y, r=3.5, fill=colour) for x, y in places),
        element("text", name, x=x + 10, y=y + 4),
    ]


if __name__ == "__main__":
    main()

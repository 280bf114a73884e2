"""Draws the picture of docs/statistics.md: two models whose own intervals overlap, and the interval of their ratio.

    grafting run recipes/testbed/near_copy.yaml --set sample.num_images=256 --out runs/near-copy
    python tools/draw_statistics.py runs/near-copy docs/statistics.svg

Of a run on the testbed, its last row and the pretrained one. Prints as well how standard errors of the ratio fall with images, from
the first 256, 512 ... of those that there are.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from grafting.data.bundled import bundled_reference_path
from grafting.evaluation import Reference
from grafting.metrics.frechet import FrechetInfluences
from grafting.metrics.paired import Estimate
from grafting.report._svg import Scale, element
from grafting.runs.pairing import read_row

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _ROW = 640.0, 236.0, 190.0, 30.0, 34.0
_STYLE = (
    "text{font:13px ui-sans-serif,system-ui,'Segoe UI',Roboto,Arial,sans-serif;fill:#63635f}"
    ".title{font-size:15px;fill:#1b1b1a}.grid{stroke:#e2e2dd}.reference{stroke:#63635f;stroke-dasharray:4 3}"
)
_ALONE, _PAIRED = "#d55e00", "#0072b2"


class Pair(NamedTuple):
    """Both distances and their ratio, paired and not."""

    num_images: int
    copy: Estimate
    pretrained: Estimate
    ratio: Estimate

    @property
    def unpaired_error(self) -> float:
        """The relative standard error of the ratio if its rows were independent."""
        return sum((found.error / found.value) ** 2 for found in (self.copy, self.pretrained)) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run on the testbed")
    parser.add_argument("picture", type=Path, metavar="SVG")
    args = parser.parse_args()
    pairs = list(measured(args.run))
    for pair in pairs:
        print(
            f"{pair.num_images} images: ratio {pair.ratio.value:.3f} ({pair.ratio.low:.3f}-{pair.ratio.high:.3f}), "
            f"standard error {100 * pair.ratio.error:.2f} %, unpaired {100 * pair.unpaired_error:.1f} %: "
            f"worth {(pair.unpaired_error / pair.ratio.error) ** 2:.0f} times the images"
        )
    args.picture.write_text(str(picture(pairs[0])))


def measured(run: Path) -> Iterator[Pair]:
    """Of as many images as distances are compared of, and of twice as many each time."""
    reference = Reference.load(bundled_reference_path()).statistics
    images = [read_row(run, row).measured.per_image for row in (None, "pretrained")]
    features, labels = [image.features for image in images], images[0].labels
    count = 4 * features[0].shape[1]
    while count <= len(features[0]):
        copy, pretrained = (
            FrechetInfluences.of(f[:count], reference, strata=labels[:count]) for f in features
        )
        yield Pair(count, copy.estimate(), pretrained.estimate(), copy.ratio(pretrained))
        count *= 2


def picture(pair: Pair) -> Markup:
    title = f"The same {pair.num_images} images of each model, read in two ways"
    marks = [element("text", title, x=12, y=24, class_="title")]
    own = [("pretrained", pair.pretrained), ("the copy", pair.copy)]
    marks += _panel(own, top=62.0, colour=_ALONE, heading="Fréchet distance of each alone")
    marks += _panel(
        [("copy / pretrained", pair.ratio)], top=172.0, colour=_PAIRED, heading="their ratio, paired", one=1.0
    )
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w:g} {h:g}" width="{w:g}" height="{h:g}" role="img" '
        'aria-label="{label}"><style>{style}</style><rect width="100%" height="100%" fill="#fff"/>{marks}</svg>\n'
    ).format(w=_WIDTH, h=_HEIGHT, label=title, style=Markup(_STYLE), marks=Markup("").join(marks))


def _panel(
    rows: Sequence[tuple[str, Estimate]], *, top: float, colour: str, heading: str, one: float | None = None
) -> list[Markup]:
    """Intervals on an axis of relative width that all panels share, so that their widths compare."""
    middle = rows[0][1].value if one is None else one
    across = Scale(0.7 * middle, 1.4 * middle, _LEFT, _WIDTH - _RIGHT, log=True)
    bottom = top + _ROW * len(rows)
    marks = [element("text", heading, x=12, y=top - 8)]
    for share in (0.8, 0.9, 1.0, 1.1, 1.2, 1.3):
        x = across(share * middle)
        kind = "reference" if share == 1 else "grid"
        marks.append(element("path", d=f"M{x:.1f} {top}V{bottom}", class_=kind))
        label = f"{share * middle:.2f}" if one is None else f"{share:g}"
        marks.append(element("text", label, x=x, y=bottom + 15, text_anchor="middle"))
    for place, (name, found) in enumerate(rows):
        y = top + _ROW * (place + 0.5)
        marks.append(element("text", name, x=_LEFT - 12, y=y + 4, text_anchor="end"))
        bar = f"M{across(found.low):.1f} {y:.1f}H{across(found.high):.1f}"
        marks.append(element("path", d=bar, stroke=colour, stroke_width=3))
        marks.append(element("circle", cx=across(found.value), cy=y, r=5, fill=colour))
    return marks


if __name__ == "__main__":
    main()

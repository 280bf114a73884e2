"""The pictures of samples: one sheet a model, the same seeds in the same places."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..evaluation import Remark
from ._images import MAX_SIDE, sheet_uri, shrunk
from ._record import Samples

_SHEET_COLUMNS = 20
# larger images are fewer
_LARGE_SHEET_COLUMNS = 8
_LARGE_SIDE = 64
# all pixels of the second, longer sheets; more would make the file large
_MAX_BYTES = 1_500_000


class Cell(NamedTuple):
    """One image of a sheet, in pixels of it: its place, what is said of it, and the places in it that are wrong."""

    left: int
    top: int
    text: str
    marks: list[tuple[float, float, float, float]]


class Sheet(NamedTuple):
    """A model's first images as one picture; over it, where anything is said of them, their cells."""

    name: str
    uri: str
    alt: str
    size: tuple[int, int]  # of an image as it is shown
    viewbox: str
    cells: list[Cell]


class Gallery(NamedTuple):
    """The sheets of all models, the same seeds in the same places."""

    columns: int
    asked: str
    """What images are asked for by: class, or prompt."""
    remarked: bool
    labels: Sequence[object]
    sheets: list[Sheet]
    more: list[Sheet]
    """Longer sheets, of `num_more` images; empty where they would be too large."""
    num_more: int
    pixelated: bool
    shown_side: int | None
    """Side in pixels that images are shrunk to; None where they are shown as they are."""
    side: int
    totals: str
    labels_differ: bool


def gallery(samples: Mapping[str, Samples], *, asked: str = "class") -> Gallery | None:
    """A short sheet for each model and, where they are small enough, a longer one; None if there is no image."""
    samples = {name: s for name, s in samples.items() if len(s.images)}
    if not samples:
        return None
    side = max(max(s.images.shape[2:]) for s in samples.values())
    longest = max(samples.values(), key=lambda s: len(s.images))
    # captions need room
    columns = _LARGE_SHEET_COLUMNS if side > _LARGE_SIDE or longest.words else _SHEET_COLUMNS
    columns = min(columns, max(len(s.images) for s in samples.values()))
    labels = longest.labels[:columns].tolist()
    has_more = len(longest.images) > columns and sum(s.images.nbytes for s in samples.values()) <= _MAX_BYTES
    return Gallery(
        columns=columns,
        asked=asked,
        remarked=any(s.remarks for s in samples.values()),
        labels=longest.words[:columns] if longest.words else labels,
        sheets=[_sheet(name, s, asked, count=columns, columns=columns) for name, s in samples.items()],
        more=[_sheet(name, s, asked, count=len(s.images), columns=10) for name, s in samples.items()]
        if has_more
        else [],
        num_more=len(longest.images),
        pixelated=side <= _LARGE_SIDE,
        shown_side=MAX_SIDE if side > MAX_SIDE else None,
        side=side,
        totals=_totals(samples),
        labels_differ=any(s.labels[:columns].tolist() != labels[: len(s.labels)] for s in samples.values()),
    )


def _sheet(name: str, samples: Samples, asked: str, *, count: int, columns: int) -> Sheet:
    images, labels = samples.images[:count], samples.labels[:count].tolist()
    alt = f"The first {len(images)} images of {name}, by {asked}: {', '.join(map(str, labels))}"
    height, width = shrunk(images[:1]).shape[2:]
    rows = -(-max(len(images), columns) // columns)
    viewbox = f"0 0 {columns * (width + 1) - 1} {rows * (height + 1) - 1}"
    cells = [_cell(samples, place, (width, height), columns=columns) for place in range(len(images))]
    cells = [cell for cell in cells if cell.text]
    uri = sheet_uri(_filled(images, columns), columns=columns)
    return Sheet(name, uri, alt, (width, height), viewbox, cells)


def _cell(samples: Samples, place: int, size: tuple[int, int], *, columns: int) -> Cell:
    width, height = size
    left, top = place % columns * (width + 1), place // columns * (height + 1)
    words = samples.words[place] if samples.words else ""
    remark = samples.remarks[place] if samples.remarks else Remark("")
    marks = [(left + x * width, top + y * height, w * width, h * height) for x, y, w, h in remark.marks]
    return Cell(left, top, "\n".join(filter(None, (words, remark.text))), marks)


def _filled(images: np.ndarray, count: int) -> np.ndarray:
    """At least `count` images, black ones added, so that the columns of all sheets are equally wide."""
    lacking = max(0, count - len(images))
    return np.concatenate([images, np.zeros((lacking, *images.shape[1:]), np.uint8)])


def _totals(samples: Mapping[str, Samples]) -> str:
    counts = {s.num_images for s in samples.values()}
    if len(counts) == 1:
        return f"{counts.pop()} images of each model"
    return ", ".join(f"{s.num_images} of {name}" for name, s in samples.items())

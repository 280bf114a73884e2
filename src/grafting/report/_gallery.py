"""The pictures of samples: one sheet a model, the same seeds in the same places."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ._images import MAX_SIDE, sheet_uri
from ._record import Samples

_SHEET_COLUMNS = 20
# larger images are fewer
_LARGE_SHEET_COLUMNS = 8
_LARGE_SIDE = 64
# all pixels of the second, longer sheets; more would make the file large
_MAX_BYTES = 1_500_000


def gallery(samples: Mapping[str, Samples], *, asked: str = "class") -> dict[str, Any] | None:
    """A short sheet for each model and, where they are small enough, a longer one; None if there is no image."""
    samples = {name: s for name, s in samples.items() if len(s.images)}
    if not samples:
        return None
    side = max(max(s.images.shape[2:]) for s in samples.values())
    columns = _LARGE_SHEET_COLUMNS if side > _LARGE_SIDE else _SHEET_COLUMNS
    columns = min(columns, max(len(s.images) for s in samples.values()))
    longest = max(samples.values(), key=lambda s: len(s.images))
    labels = longest.labels[:columns].tolist()
    has_more = len(longest.images) > columns and sum(s.images.nbytes for s in samples.values()) <= _MAX_BYTES
    return {
        "columns": columns,
        "asked": asked,
        "labels": labels,
        "sheets": [_sheet(name, s, asked, count=columns, columns=columns) for name, s in samples.items()],
        "more": [_sheet(name, s, asked, count=len(s.images), columns=10) for name, s in samples.items()]
        if has_more
        else [],
        "num_more": len(longest.images),
        "pixelated": side <= _LARGE_SIDE,
        "shown_side": MAX_SIDE if side > MAX_SIDE else None,
        "side": side,
        "totals": _totals(samples),
        "labels_differ": any(
            s.labels[:columns].tolist() != labels[: len(s.labels)] for s in samples.values()
        ),
    }


class Sheet(NamedTuple):
    """A model's first images as one picture."""

    name: str
    uri: str
    alt: str


def _sheet(name: str, samples: Samples, asked: str, *, count: int, columns: int) -> Sheet:
    images, labels = samples.images[:count], samples.labels[:count].tolist()
    alt = f"The first {len(images)} images of {name}, by {asked}: {', '.join(map(str, labels))}"
    return Sheet(name, sheet_uri(_filled(images, columns), columns=columns), alt)


def _filled(images: np.ndarray, count: int) -> np.ndarray:
    """At least `count` images, black ones added, so that the columns of all sheets are equally wide."""
    lacking = max(0, count - len(images))
    return np.concatenate([images, np.zeros((lacking, *images.shape[1:]), np.uint8)])


def _totals(samples: Mapping[str, Samples]) -> str:
    counts = {s.num_images for s in samples.values()}
    if len(counts) == 1:
        return f"{counts.pop()} images of each model"
    return ", ".join(f"{s.num_images} of {name}" for name, s in samples.items())

"""Two measured rows compared image by image, where they were drawn from the same seeds and measured alike.

Frechet distances are compared by their ratio, with the difference of the distances without bias beside it; all other figures
by their difference. What cannot be compared so is refused with one reason.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ..errors import ProtocolError
from ..machine.reading import JsonObject
from ..metrics.paired import Estimate, mean_estimate, paired_change, paired_difference
from ..words import bounds_of
from .per_image import PerImage, dealt_in_turn
from .protocol import Protocol

KERNEL_NOTE = (
    "the kernel distance is degenerate where images are like the reference or like each other: "
    "its interval is rough there"
)
NO_RATIO = "no ratio of Fréchet distances"
"""What a note on distances that have none begins with."""
POINTS_NOTE = "recall and coverage are means over the reference, by groups of neighbours: their intervals are about right"


@dataclass(frozen=True)
class MeasuredRow:
    """One row's figures, and what each image adds to them.

    Args:
        name: how people call it: a row, or a run and its row.
        figures: as in metrics.json.
        per_image: None where the figures are of a version that did not keep it, or of a suite that does not.
    """

    name: str
    figures: Mapping[str, Any]
    per_image: PerImage | None

    @property
    def sampling(self) -> Mapping[str, Any]:
        return (self.figures.get("protocol") or {}).get("sampling") or {}


def comparison(a: MeasuredRow, b: MeasuredRow) -> JsonObject:
    """Row a against row b as JSON: of each figure's key its `ratio` or `difference`, and `notes`.

    Each is a value with its `error`, `low` and `high`.
    """
    mine, its = _check_paired(a, b)
    how = {"strata": mine.strata_in(a.sampling), "clusters": mine.clusters}
    found: dict[str, dict[str, Estimate]] = {}
    notes = []
    if mine.frechet is not None and its.frechet is not None:
        try:
            found["frechet"] = {
                "ratio": mine.frechet.ratio(its.frechet, clusters=mine.clusters),
                "difference": mine.frechet.difference(its.frechet, clusters=mine.clusters),
            }
        except ValueError as error:
            notes.append(f"{NO_RATIO}: {error}")
    for key, difference in _differences(a, b, how):
        found[key] = {"difference": difference.within(*bounds_of(f"{key}_difference"))}
    notes += [KERNEL_NOTE] if "kid" in found else []
    notes += [POINTS_NOTE] if {"recall", "coverage"} & found.keys() else []
    return {
        **{key: {kind: e._asdict() for kind, e in parts.items()} for key, parts in found.items()},
        "notes": [*notes],
    }


def turned(found: Mapping[str, Any]) -> JsonObject:
    """Of a `comparison` of a with b that of b with a: the intervals are symmetric, a ratio's in its logarithm."""

    def of(kind: str, found: Mapping[str, float]) -> JsonObject:
        value, low, high = (found[key] for key in ("value", "low", "high"))
        ends = (1 / value, 1 / high, 1 / low) if kind == "ratio" else (-value, -high, -low)
        return {"error": found["error"], **dict(zip(("value", "low", "high"), ends, strict=True))}

    return {
        key: {kind: of(kind, estimate) for kind, estimate in parts.items()}
        if isinstance(parts, Mapping)
        else parts
        for key, parts in found.items()
    }


def distances(rows: Tensor, others: Tensor) -> Tensor:
    """The root mean square difference of each image's numbers from those of the other of its number, [n]."""
    return (rows.double() - others.double()).flatten(1).square().mean(1).sqrt()


def distance_estimate(
    found: Tensor, row: MeasuredRow | None, sampling: Mapping[str, Any], labels: Tensor
) -> Estimate:
    """The mean of distances between images of the same seed, with its interval over other seeds."""
    per_image = row.per_image if row else None
    strata = per_image.strata_in(sampling) if per_image else dealt_in_turn(sampling, labels)
    return mean_estimate(found, strata=strata, clusters=per_image.clusters if per_image else None)


def _differences(a: MeasuredRow, b: MeasuredRow, how: Mapping[str, Any]) -> Iterator[tuple[str, Estimate]]:
    assert a.per_image is not None
    assert b.per_image is not None
    mine, its = a.per_image, b.per_image
    for key in [key for key in mine.scores if key in its.scores]:
        yield key, paired_difference(mine.scores[key], its.scores[key], **how)
    for key in [key for key in mine.influences if key in its.influences]:
        values = a.figures[key], b.figures[key]
        yield key, paired_change(*values, mine.influences[key], its.influences[key], **how)
    for key in [key for key in mine.points if key in its.points]:
        yield key, paired_difference(mine.points[key], its.points[key], clusters=mine.point_groups)


def _check_paired(a: MeasuredRow, b: MeasuredRow) -> tuple[PerImage, PerImage]:
    for row in (a, b):
        if not row.figures.get("protocol"):
            raise ProtocolError(f"no suite has measured {row.name}")
        if row.per_image is None:
            raise ProtocolError(
                f"{row.name} keeps nothing of each image: it was measured before that was kept, or by a suite that does "
                "not keep it"
            )
    assert a.per_image is not None
    assert b.per_image is not None
    if differing := _protocol(a).differences(_protocol(b)):
        raise ProtocolError(
            f"{a.name} and {b.name} were drawn or measured differently: {'; '.join(differing)}"
        )
    if not _same(a.per_image.labels, b.per_image.labels):
        raise ProtocolError(f"images of {a.name} and {b.name} were asked for by other conditions")
    return a.per_image, b.per_image


def _protocol(row: MeasuredRow) -> Protocol:
    try:
        return Protocol.model_validate(row.figures.get("protocol"))
    except ValidationError as error:
        raise ProtocolError(
            f"the protocol of {row.name} cannot be read: {error.errors()[0]['msg']}"
        ) from error


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)

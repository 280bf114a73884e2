"""Subsets of a data set as data: which items, by index or file name, with a hash that says that two are the same.

A subset file is JSON and small enough to publish; it holds no images.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import DataError
from ..files import write_json
from ..randomness import generator


@dataclass(frozen=True, kw_only=True)
class Subset:
    """Items of a data set: their indices, or their names where the set has no fixed order."""

    source: str  # the data set that the ids belong to
    num_classes: int
    ids: tuple[int, ...] | tuple[str, ...]

    @property
    def sha256(self) -> str:
        return subset_sha256(self.ids)


def stratified_subset(labels: Int[Tensor, "n"], *, per_class: int, seed: int) -> Int[Tensor, "m"]:
    """Sorted indices of `per_class` items of every class, drawn at random; a class's draw depends on (seed, class).

    Raises:
        DataError: a class has too few items, or `per_class` is not positive.
    """
    classes, counts = labels.unique(return_counts=True)
    if per_class < 1:
        raise DataError(f"per_class must be at least 1, found {per_class}")
    if not len(labels) or counts.min() < per_class:
        found = ", ".join(f"class {c}: {n}" for c, n in zip(classes.tolist(), counts.tolist(), strict=True))
        raise DataError(f"asked for {per_class} items of every class, found {found or 'no items'}")
    chosen = [_draw((labels == c).nonzero().flatten(), per_class, seed, c) for c in classes.tolist()]
    return torch.cat(chosen).sort().values


def subset_sha256(ids: tuple[int, ...] | tuple[str, ...]) -> str:
    """The SHA-256, in hex, of the ids sorted and written one a line; their order does not matter."""
    return hashlib.sha256("".join(f"{i}\n" for i in sorted(ids)).encode()).hexdigest()


def write_subset(path: Path, subset: Subset) -> None:
    """Write a subset file: source, sha256, num_classes, ids.

    Raises:
        RunError: it cannot be written.
    """
    fields = asdict(subset)
    write_json(path, {"source": fields.pop("source"), "sha256": subset.sha256, **fields})


def read_subset(path: Path) -> Subset:
    """The subset in a file that `write_subset` wrote.

    Raises:
        DataError: no such file, not a subset file, an id named twice, or the ids are not those of its hash.
    """
    if not path.is_file():
        raise DataError(f"no subset file {path}")
    try:
        fields = json.loads(path.read_text())
        subset = Subset(source=fields["source"], num_classes=fields["num_classes"], ids=tuple(fields["ids"]))
        claimed, found = fields["sha256"], subset.sha256
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a subset file (JSON with source, sha256, num_classes, ids): {error!r}"
        ) from error
    if len(set(subset.ids)) < len(subset.ids):
        raise DataError(f"{path} names {len(subset.ids) - len(set(subset.ids))} ids more than once")
    if claimed != found:
        raise DataError(
            f"{path} was changed: it says sha256 {claimed}, its {len(subset.ids)} ids have {found}"
        )
    return subset


def _draw(members: Tensor, count: int, *entropy: int) -> Tensor:
    return members[torch.randperm(len(members), generator=generator(*entropy))[:count]]

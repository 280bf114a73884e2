"""Fidelity and diversity apart, by nearest neighbours: precision and recall, density and coverage.

A set's manifold is the union of balls around its rows, each as wide as the distance to the row's k-th neighbour.
Distances are float64, and computed chunk_size rows at a time: memory is chunk_size x n, never n x n.

Source: arXiv:1904.06991 (precision, recall), arXiv:2002.09797 (density, coverage); a row on a ball's edge is outside.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from ..machine.randomness import generator


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: of generated rows in the real manifold, of real rows in the generated manifold; and which are."""

    precision: float
    recall: float
    precise: Bool[Tensor, " n"]
    recalled: Bool[Tensor, " m"]


class DensityCoverage(NamedTuple):
    """Number of real balls that hold a generated row, over k (1 is as real); the share of real balls that hold one.

    `dense` has the number of each generated row, over k; `covered` says which balls hold one.
    """

    density: float
    coverage: float
    dense: Float64[Tensor, " n"]
    covered: Bool[Tensor, " m"]


def precision_recall(
    real: Float[Tensor, "m f"], generated: Float[Tensor, "n f"], *, k: int = 3, chunk_size: int = 1024
) -> PrecisionRecall:
    """Precision and recall with k neighbours; both depend on m and n.

    Raises:
        ValueError: a set has k rows or fewer.
    """
    real, generated = real.double(), generated.double()
    real_radii = neighbour_radii(real, k, chunk_size=chunk_size)
    generated_radii = neighbour_radii(generated, k, chunk_size=chunk_size)
    precise = torch.zeros(len(generated), dtype=torch.bool, device=real.device)
    parts = []
    for rows, distances in _distances(real, generated, chunk_size):
        precise |= (distances < real_radii[rows, None]).any(0)
        parts.append((distances < generated_radii).any(1))
    recalled = torch.cat(parts)
    return PrecisionRecall(_share(precise), _share(recalled), precise, recalled)


def density_coverage(
    real: Float[Tensor, "m f"], generated: Float[Tensor, "n f"], *, k: int = 5, chunk_size: int = 1024
) -> DensityCoverage:
    """Density and coverage with k neighbours; coverage depends on n.

    Raises:
        ValueError: the real set has k rows or fewer.
    """
    real, generated = real.double(), generated.double()
    radii = neighbour_radii(real, k, chunk_size=chunk_size)
    num_around = torch.zeros(len(generated), dtype=torch.int64, device=real.device)
    parts = []
    for rows, distances in _distances(real, generated, chunk_size):
        inside = distances < radii[rows, None]
        num_around += inside.sum(0)
        parts.append(inside.any(1))
    covered = torch.cat(parts)
    density = int(num_around.sum()) / (k * len(generated))
    return DensityCoverage(density, _share(covered), num_around.double() / k, covered)


def neighbour_radii(x: Float[Tensor, "n f"], k: int, *, chunk_size: int = 1024) -> Float64[Tensor, " n"]:
    """The distance from each row to its k-th nearest other row.

    Raises:
        ValueError: k rows or fewer.
    """
    if len(x) <= k:
        raise ValueError(
            f"the k-th neighbour with k = {k} needs more than {k} feature rows; there are {len(x)}"
        )
    # one more, for a row is its own nearest
    chunks = (distances for _, distances in _distances(x.double(), x.double(), chunk_size))
    return torch.cat([distances.topk(k + 1, largest=False).values[:, -1] for distances in chunks])


def neighbourhoods(rows: Float[Tensor, "m f"], *, count: int = 20, seed: int = 0) -> Int[Tensor, " m"]:
    """The number of each row's group: the nearest of `count` rows drawn at random.

    Neighbours lie in the same balls, so an interval of recall or coverage takes a group, not a row, as independent.
    """
    order = torch.randperm(len(rows), generator=generator(seed))[:count].to(rows.device)
    return torch.cdist(rows.double(), rows[order].double()).argmin(1)


def _distances(
    x: Float64[Tensor, "n f"], y: Float64[Tensor, "m f"], chunk_size: int
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of x, some at a time, with their distances to all of y."""
    for start in range(0, len(x), chunk_size):
        rows = slice(start, min(start + chunk_size, len(x)))
        yield rows, torch.cdist(x[rows], y)


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())

"""Fidelity and diversity apart, by nearest neighbours: precision and recall, density and coverage.

A set's manifold is the union of balls around its rows, each as wide as the distance to the row's k-th neighbour.
Distances are computed chunk_size rows at a time, in float32 and, where that cannot tell on which side of an edge a row is, in
float64: memory is chunk_size x n, never n x n.

Source: arXiv:1904.06991 (precision, recall), arXiv:2002.09797 (density, coverage); a row on a ball's edge is outside.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int
from torch import Tensor

from ..machine.randomness import generator

_PAIRS_AT_ONCE = 2048


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
    real: Float[Tensor, "m f"],
    generated: Float[Tensor, "n f"],
    *,
    k: int = 3,
    radii: Float64[Tensor, " m"] | None = None,
    chunk_size: int = 1024,
) -> PrecisionRecall:
    """Precision and recall with k neighbours; both depend on m and n.

    Args:
        radii: `neighbour_radii` of the real rows, if they are known.

    Raises:
        ValueError: a set has k rows or fewer.
    """
    real_radii = neighbour_radii(real, k, chunk_size=chunk_size) if radii is None else radii
    generated_radii = neighbour_radii(generated, k, chunk_size=chunk_size)
    precise = torch.zeros(len(generated), dtype=torch.bool, device=real.device)
    parts = []
    for rows, pairs in _pairs(real, generated, chunk_size):
        precise |= pairs.closer_than(real_radii[rows, None]).any(0)
        parts.append(pairs.closer_than(generated_radii[None]).any(1))
    recalled = torch.cat(parts)
    return PrecisionRecall(_share(precise), _share(recalled), precise, recalled)


def density_coverage(
    real: Float[Tensor, "m f"],
    generated: Float[Tensor, "n f"],
    *,
    k: int = 5,
    radii: Float64[Tensor, " m"] | None = None,
    chunk_size: int = 1024,
) -> DensityCoverage:
    """Density and coverage with k neighbours; coverage depends on n. Args as `precision_recall`.

    Raises:
        ValueError: the real set has k rows or fewer.
    """
    radii = neighbour_radii(real, k, chunk_size=chunk_size) if radii is None else radii
    num_around = torch.zeros(len(generated), dtype=torch.int64, device=real.device)
    parts = []
    for rows, pairs in _pairs(real, generated, chunk_size):
        inside = pairs.closer_than(radii[rows, None])
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
    return torch.cat([pairs.nearest(k + 1)[:, -1] for _, pairs in _pairs(x, x, chunk_size)])


def neighbourhoods(rows: Float[Tensor, "m f"], *, count: int = 20, seed: int = 0) -> Int[Tensor, " m"]:
    """The number of each row's group: the nearest of `count` rows drawn at random.

    Neighbours lie in the same balls, so an interval of recall or coverage takes a group, not a row, as independent.
    """
    order = torch.randperm(len(rows), generator=generator(seed))[:count].to(rows.device)
    return torch.cdist(rows.double(), rows[order].double()).argmin(1)


# of a squared distance in float32, over the sum of both squared norms: several times what rounding was seen to make it
_SLACK = 1e-5


class _Pairs(NamedTuple):
    """Some rows with all others, and their squared distances in float32 with how far those may be off."""

    rows: Float[Tensor, "n f"]
    others: Float[Tensor, "m f"]
    squares: Float32[Tensor, "n m"]
    slack: Float32[Tensor, "n m"]

    def closer_than(self, radii: Float64[Tensor, "#n #m"]) -> Bool[Tensor, "n m"]:
        """Whether pairs are closer than radii; those of which float32 cannot say it are compared in float64."""
        limits = radii.square().float()
        closer = self.squares < limits
        i, j = ((self.squares - limits).abs() <= self.slack).nonzero(as_tuple=True)
        closer[i, j] = self._exact(i, j) < radii.expand(self.squares.shape)[i, j]
        return closer

    def nearest(self, count: int) -> Float64[Tensor, "n count"]:
        """The distances to the nearest, which are among some more that are nearest in float32."""
        num_candidates = min(count + 4, len(self.others))
        j = self.squares.topk(num_candidates, largest=False).indices
        i = torch.arange(len(self.rows), device=j.device)[:, None].expand_as(j)
        exact = self._exact(i.flatten(), j.flatten()).view(j.shape)
        return exact.sort().values[:, :count]

    def _exact(self, i: Int[Tensor, " p"], j: Int[Tensor, " p"]) -> Float64[Tensor, " p"]:
        parts = zip(i.split(_PAIRS_AT_ONCE), j.split(_PAIRS_AT_ONCE), strict=True)
        return torch.cat([(self.rows[a].double() - self.others[b].double()).norm(dim=1) for a, b in parts])


def _pairs(
    x: Float[Tensor, "n f"], y: Float[Tensor, "m f"], chunk_size: int
) -> Iterator[tuple[slice, _Pairs]]:
    """Rows of x, some at a time, with all of y."""
    # about their centre norms are smallest, and so is what their squares lose
    centre = y.double().mean(0)
    others = _about(y, centre)
    its_norms = others.square().sum(1)
    for start in range(0, len(x), chunk_size):
        rows = slice(start, min(start + chunk_size, len(x)))
        mine = _about(x[rows], centre)
        norms = mine.square().sum(1)[:, None] + its_norms
        yield rows, _Pairs(x[rows], y, torch.addmm(norms, mine, others.T, alpha=-2), norms * _SLACK)


def _about(x: Float[Tensor, "n f"], centre: Float64[Tensor, " f"]) -> Float32[Tensor, "n f"]:
    return torch.cat([(part.double() - centre).float() for part in x.split(_PAIRS_AT_ONCE)])


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())

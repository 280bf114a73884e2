"""Precision and recall by the rules of ADM's evaluation, which published tables of ImageNet follow.

They differ from this library's own (`manifold`): a row on the edge of a ball is inside; distances are squared, and rounded to
half precision.
FID and sFID by ADM's rules are `frechet.frechet_distance`, which is exact where ADM's root of a matrix is not.

Source: openai/guided-diffusion, evaluations/evaluator.py; arXiv:1904.06991 (precision, recall).
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Distances = Literal["float16", "float32"]

# ADM decides on the precision of this many rows and columns at a time
_BLOCK = 10_000
_ROWS_AT_ONCE = 1_000


class AdmPrecisionRecall(NamedTuple):
    """Shares in [0, 1]: of generated rows in the reference's manifold, of the reference's in the generated one's; which are."""

    precision: float
    recall: float
    precise: Bool[Tensor, " n"]
    recalled: Bool[Tensor, " m"]


def adm_precision_recall(
    reference: Float[Tensor, "m f"],
    generated: Float[Tensor, "n f"],
    *,
    k: int = 3,
    distances: Distances = "float16",
    block: int = _BLOCK,
) -> AdmPrecisionRecall:
    """Precision and recall of all rows with k neighbours, on the rows' device.

    Args:
        reference: features of the reference's images; ADM's files hold 10,000.
        generated: features of the measured images.
        k: neighbours whose distance is a ball's radius.
        distances: "float16" as ADM does it on a GPU: operands and results are rounded, sums are not; a block that
            overflows is done in float32.
        block: rows and columns at a time; memory is block x block, and float16's overflow is decided for each.

    Raises:
        ValueError: a set has k rows or fewer.
    """
    fewest = min(len(reference), len(generated))
    if fewest <= k:
        raise ValueError(
            f"the k-th neighbour with k = {k} needs more than {k} feature rows; there are {fewest}"
        )
    reference_radii = _radii(reference, k, distances, block)
    generated_radii = _radii(generated, k, distances, block)
    precise = torch.zeros(len(generated), dtype=torch.bool, device=generated.device)
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for i in range(0, len(reference), block):
        for j in range(0, len(generated), block):
            rows, columns = slice(i, i + block), slice(j, j + block)
            squared = _squared_distances(reference[rows], generated[columns], distances)
            precise[columns] |= (squared <= reference_radii[rows, None]).any(0)
            recalled[rows] |= (squared <= generated_radii[columns]).any(1)
    precision, recall = (float(hits.double().mean()) for hits in (precise, recalled))
    return AdmPrecisionRecall(precision, recall, precise.cpu(), recalled.cpu())


def _radii(x: Float[Tensor, "n f"], k: int, distances: Distances, block: int) -> Float[Tensor, " n"]:
    """The squared distance from each row to its k-th nearest other row; a row itself is the nearest of all."""
    radii = []
    for rows in x.split(block):
        nearest = torch.empty(len(rows), 0, device=x.device)
        for columns in x.split(block):
            found = torch.cat([nearest, _squared_distances(rows, columns, distances).float()], 1)
            nearest = found.topk(min(k + 1, found.shape[1]), largest=False).values
        radii.append(nearest[:, k])
    return torch.cat(radii)


def _squared_distances(u: Float[Tensor, "m f"], v: Float[Tensor, "n f"], distances: Distances) -> Tensor:
    """|u|^2 - 2 u.v + |v|^2, not below 0; in float16 if asked for and if nothing overflows there."""
    if distances == "float16":
        v16 = v.half().float()
        rounded = torch.cat([_half_distances(rows.half().float(), v16) for rows in u.split(_ROWS_AT_ONCE)])
        if rounded.isfinite().all():
            return rounded
    products = u @ v.T
    return (u.square().sum(1)[:, None] - 2 * products + v.square().sum(1)).clamp(min=0)


def _half_distances(u: Tensor, v: Tensor) -> Tensor:
    """Compute as a GPU does in float16, from values that float16 can hold: sums in float32, every result rounded."""
    u_norms, v_norms = (rows.square().half().float().sum(1).half() for rows in (u, v))
    products = (u @ v.T).half()
    return (u_norms[:, None] - 2 * products + v_norms).clamp(min=0)

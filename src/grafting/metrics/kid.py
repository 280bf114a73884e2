"""Kernel distance: the unbiased squared maximum mean discrepancy with a cubic kernel. On Inception features, KID.

Source: arXiv:1801.01401.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from ._interval import spread


class KernelDistance(NamedTuple):
    """An unbiased estimate (it may be below zero), its standard error over draws of the generated features, and their influences.

    Near a distance of 0 the influences vanish and noise of second order is left (the estimate is degenerate there): the
    standard error of a distance, or of a difference of two, is then too small.
    """

    value: float
    standard_error: float
    influence: Float64[Tensor, " n"]


def kernel_distance(
    real: Float[Tensor, "m f"],
    generated: Float[Tensor, "n f"],
    *,
    strata: Int[Tensor, " n"] | None = None,
    chunk_size: int = 1024,
) -> KernelDistance:
    """MMD^2 with kernel (x.y / f + 1)^3, from all pairs, and its delete-one jackknife standard error.

    Each row's influence is its pseudo-value: n times the value less n - 1 times that without the row.

    Its mean is that of the usual average over random subsets, its variance lower. The real features are taken as
    fixed. Memory is bounded by chunk_size x max(m, n) float64 values.

    Raises:
        ValueError: fewer than two real or three generated rows.
    """
    m, n = len(real), len(generated)
    if m < 2 or n < 3:
        raise ValueError(f"a kernel distance needs 2 real and 3 generated rows; there are {m} and {n}")
    real, generated = real.double(), generated.double()
    real_pairs = _row_sums(real, real, chunk_size) - _kernel_diagonal(real)
    pairs = _row_sums(generated, generated, chunk_size) - _kernel_diagonal(generated)
    crossed = _row_sums(generated, real, chunk_size)

    within_real = real_pairs.sum() / (m * (m - 1))
    value = within_real + pairs.sum() / (n * (n - 1)) - 2 * crossed.sum() / (n * m)
    # the same, without each generated row in turn
    within = (pairs.sum() - 2 * pairs) / ((n - 1) * (n - 2))
    across = (crossed.sum() - crossed) / ((n - 1) * m)
    left_out = within_real + within - 2 * across
    influence = n * value - (n - 1) * left_out
    return KernelDistance(float(value), spread(influence, strata=strata).error, influence)


def _row_sums(x: Float64[Tensor, "n f"], y: Float64[Tensor, "m f"], chunk_size: int) -> Float64[Tensor, " n"]:
    """Sum over y of the kernel, for each row of x."""
    chunks = x.split(chunk_size)
    return torch.cat([(chunk @ y.T / x.shape[1] + 1).pow(3).sum(1) for chunk in chunks])


def _kernel_diagonal(x: Float64[Tensor, "n f"]) -> Float64[Tensor, " n"]:
    return (x.square().sum(1) / x.shape[1] + 1).pow(3)

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
    within_real: float | None = None,
    chunk_size: int = 1024,
) -> KernelDistance:
    """MMD^2 with kernel (x.y / f + 1)^3, from all pairs, and its delete-one jackknife standard error.

    Each row's influence is its pseudo-value: n times the value less n - 1 times that without the row.

    Its mean is that of the usual average over random subsets, its variance lower. The real features are taken as
    fixed. Memory is bounded by chunk_size x max(m, n) float64 values.

    Args:
        strata: of the generated rows, where they were dealt in turn.
        within_real: the `mean_kernel` of the real rows, if it is known.

    Raises:
        ValueError: fewer than two real or three generated rows.
    """
    m, n = len(real), len(generated)
    if m < 2 or n < 3:
        raise ValueError(f"a kernel distance needs 2 real and 3 generated rows; there are {m} and {n}")
    real, generated = real.double(), generated.double()
    within_real = mean_kernel(real, chunk_size=chunk_size) if within_real is None else within_real
    pairs = _row_sums(generated, generated, chunk_size) - _kernel_diagonal(generated)
    crossed = _row_sums(generated, real, chunk_size)

    value = within_real + pairs.sum() / (n * (n - 1)) - 2 * crossed.sum() / (n * m)
    # the same, without each generated row in turn
    within = (pairs.sum() - 2 * pairs) / ((n - 1) * (n - 2))
    across = (crossed.sum() - crossed) / ((n - 1) * m)
    left_out = within_real + within - 2 * across
    influence = n * value - (n - 1) * left_out
    return KernelDistance(float(value), spread(influence, strata=strata).error, influence)


def mean_kernel(x: Float[Tensor, "n f"], *, chunk_size: int = 1024) -> float:
    """Mean of the kernel over all pairs of two rows."""
    x = x.double()
    pairs = _row_sums(x, x, chunk_size) - _kernel_diagonal(x)
    return float(pairs.sum() / (len(x) * (len(x) - 1)))


def _row_sums(x: Float64[Tensor, "n f"], y: Float64[Tensor, "m f"], chunk_size: int) -> Float64[Tensor, " n"]:
    """Sum over y of the kernel, for each row of x."""
    chunks = x.split(chunk_size)
    return torch.cat([(chunk @ y.T / x.shape[1] + 1).pow(3).sum(1) for chunk in chunks])


def _kernel_diagonal(x: Float64[Tensor, "n f"]) -> Float64[Tensor, " n"]:
    return (x.square().sum(1) / x.shape[1] + 1).pow(3)

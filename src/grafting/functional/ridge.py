"""Closed forms from second moments: a linear layer's best weights, and which neurons it can do without.

All of them read a Gram matrix [F+1, F+1]: the sum over tokens of (h, 1)^T (h, 1), h [F] being what the layer is given. It is
summed batch by batch, so no activation is kept. In float64 throughout.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float64, Int64, Shaped
from torch import Tensor

# added to a covariance before it is inverted, as a share of its mean diagonal
JITTER = 1e-6


def with_ones(h: Shaped[Tensor, "n f"]) -> Float64[Tensor, "n f1"]:
    """(h, 1), the rows that Gram matrices are made of."""
    return F.pad(h.double(), (0, 1), value=1.0)


def ridge_correction(
    gram: Float64[Tensor, "f1 f1"], cross: Float64[Tensor, "f1 d"], *, strength: float
) -> tuple[Float64[Tensor, "d f"], Float64[Tensor, " d"]]:
    """Solve for the change of a linear layer's weight and bias that minimises its squared error.

    The correction is pulled towards zero, so a layer without error stays as it is; the bias is free.

    Args:
        gram: sum of (h, 1)^T (h, 1).
        cross: sum of (h, 1)^T residual, the residual being what is wanted less what the layer gives.
        strength: weight of |correction|^2 against the mean squared error, as a share of a feature's mean variance.
    """
    covariance, mean = moments(gram)
    mean_residual = cross[-1] / gram[-1, -1]
    with_residual = cross[:-1] / gram[-1, -1] - mean.outer(mean_residual)
    weight = torch.cholesky_solve(with_residual, _cholesky(covariance, strength)).T
    return weight, mean_residual - weight @ mean


def ridge_correction_reference(
    h: Float64[Tensor, "n f"], residual: Float64[Tensor, "n d"], *, strength: float
) -> tuple[Float64[Tensor, "d f"], Float64[Tensor, " d"]]:
    """`ridge_correction` from the rows themselves: least squares, with a row for the pull on each feature's weights."""
    num_rows, num_features = h.shape
    scale = (num_rows * strength * h.var(dim=0, correction=0).mean()).sqrt()
    pull = scale * torch.eye(num_features, num_features + 1, dtype=h.dtype, device=h.device)
    rows = torch.cat([with_ones(h), pull])
    targets = F.pad(residual, (0, 0, 0, num_features))
    solution = torch.linalg.lstsq(rows, targets).solution
    return solution[:-1].T, solution[-1]


def error_removed(
    gram: Float64[Tensor, "f1 f1"],
    cross: Float64[Tensor, "f1 d"],
    correction: tuple[Float64[Tensor, "d f"], Float64[Tensor, " d"]],
) -> float:
    """By how much a correction lowers the sum of squared residuals."""
    weight, bias = correction
    stacked = torch.cat([weight.T, bias[None]])
    return (stacked * (2 * cross - gram @ stacked)).sum().item()


def moments(gram: Float64[Tensor, "f1 f1"]) -> tuple[Float64[Tensor, "f f"], Float64[Tensor, " f"]]:
    """Covariance and mean of the features."""
    mean = gram[-1, :-1] / gram[-1, -1]
    return gram[:-1, :-1] / gram[-1, -1] - mean.outer(mean), mean


def most_varying(
    covariance: Float64[Tensor, "f f"], down: Float64[Tensor, "d f"], *, num: int
) -> Int64[Tensor, " num"]:
    """Indices, ascending, of the `num` neurons with the largest variance * |column of down|^2.

    That is what each alone adds to the output's variance. Means do not count: a bias can stand for them.
    """
    return (covariance.diagonal() * down.square().sum(0)).topk(num).indices.sort().values


def hardest_to_replace(
    covariance: Float64[Tensor, "f f"], down: Float64[Tensor, "d f"], *, num: int
) -> Int64[Tensor, " num"]:
    """Indices, ascending, of the `num` neurons that are left when the most replaceable one is taken out again and again.

    Taking out neuron j, with the other columns of `down` refitted in its stead, costs |column|^2 / inverse_jj of the
    output's variance. Columns and inverse are brought up to date after each.

    Source:
        The saliency of Optimal Brain Surgeon (Hassibi & Stork 1993), for a neuron's whole column.
    """
    num_neurons = len(covariance)
    inverse = torch.cholesky_inverse(_cholesky(covariance, JITTER))
    columns = down.clone()
    left = torch.ones(num_neurons, dtype=torch.bool, device=down.device)
    for _ in range(num_neurons - num):
        costs = columns.square().sum(0) / inverse.diagonal()
        j = int(costs.where(left, torch.inf).argmin())
        row = inverse[j] / inverse[j, j]
        columns -= columns[:, j].outer(row)
        inverse -= inverse[:, j].outer(row)
        left[j] = False
    return left.nonzero().squeeze(1)


def error_without(
    covariance: Float64[Tensor, "f f"], down: Float64[Tensor, "d f"], kept: Int64[Tensor, " num"]
) -> float:
    """Mean squared error, summed over outputs, of the best linear layer that sees only the neurons `kept`."""
    left = torch.zeros(len(covariance), dtype=torch.bool, device=down.device)
    left[kept] = True
    between = covariance[left][:, ~left]
    explained = between.T @ torch.cholesky_solve(between, _cholesky(covariance[left][:, left], JITTER))
    unexplained = covariance[~left][:, ~left] - explained
    lost = down[:, ~left]
    return ((lost @ unexplained) * lost).sum().item()


def _cholesky(covariance: Tensor, strength: float) -> Tensor:
    """Lower factor of the covariance with `strength` times its mean diagonal added; features may all be constant."""
    scale = covariance.diagonal().mean().clamp(min=torch.finfo(covariance.dtype).tiny)
    return torch.linalg.cholesky(covariance + torch.diag_embed((strength * scale).expand(len(covariance))))

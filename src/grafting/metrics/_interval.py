"""Standard errors and intervals of means over images that were drawn evenly (strata) or in bunches (clusters)."""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Estimate(NamedTuple):
    """A figure, its standard error, and the limits of its interval."""

    value: float
    error: float
    low: float
    high: float

    def within(self, least: float, most: float) -> "Estimate":
        """The same, with limits that the figure can have."""
        return self._replace(low=max(self.low, least), high=min(self.high, most))


USUAL = 0.95
"""Confidence of an interval, where none is asked for."""


@dataclass(frozen=True)
class Spread:
    """The standard error of a mean, and the degrees of freedom that it was estimated with."""

    error: float
    degrees: int

    def reach(self, confidence: float = USUAL) -> float:
        """Half the width of the interval by Student's t."""
        return student_quantile((1 + confidence) / 2, self.degrees) * self.error if self.error else 0.0

    def less(self, variance: float) -> "Spread":
        """Without a part of its variance that is known to be too much: half of it at most."""
        return Spread(max(self.error**2 - variance, self.error**2 / 2) ** 0.5, self.degrees)

    def around(self, value: float, confidence: float = USUAL) -> Estimate:
        """The interval around a value that has this standard error."""
        reach = self.reach(confidence)
        return Estimate(value, self.error, value - reach, value + reach)

    def of_share(self, share: float) -> Estimate:
        """The interval around a share, within 0 to 1; of n images without a single hit it reaches to about 4 / n.

        Source:
            Wilson 1927, with the size of a plain sample that would have this standard error (Korn and Graubard 1998).
        """
        quantile = student_quantile((1 + USUAL) / 2, self.degrees)
        size = share * (1 - share) / self.error**2 if self.error else self.degrees + 1
        shrunk = 1 + quantile**2 / size
        middle = (share + quantile**2 / (2 * size)) / shrunk
        reach = quantile / shrunk * math.sqrt(share * (1 - share) / size + quantile**2 / (4 * size**2))
        # exact where rounding would leave dust
        low = max(middle - reach, 0.0) if share > 0 else 0.0
        high = min(middle + reach, 1.0) if share < 1 else 1.0
        return Estimate(share, self.error, low, high)

    def times(self, ratio: float) -> Estimate:
        """The interval of a ratio whose logarithm has this standard error."""
        factor = math.exp(self.reach())
        return Estimate(ratio, self.error, ratio / factor, ratio * factor)


def spread(
    values: Float[Tensor, " n"],
    *,
    strata: Int[Tensor, " n"] | None = None,
    clusters: Int[Tensor, " n"] | None = None,
) -> Spread:
    """The spread of the mean of values; what is NaN does not count.

    Args:
        strata: of which each got a fixed number of the values; left aside unless each has two units or more.
        clusters: whose values were drawn together and are one unit, as the images of one prompt; each lies in one stratum.

    Raises:
        ValueError: fewer than two units, or a cluster in two strata.

    Source:
        Cochran, Sampling Techniques (1977), eq. 5.11 (strata); 9A and Wolter 2007, ch. 6 (clusters: totals of residuals).
    """
    counted = ~values.isnan()
    values = values[counted].double()
    units = _numbered(None if clusters is None else clusters[counted], values, each_its_own=True)
    if _count(units) < 2:
        raise ValueError(f"an interval needs at least 2 independent values; there are {_count(units)}")
    groups = _numbered(None if strata is None else strata[counted], values)
    home = torch.zeros(_count(units), dtype=torch.int64, device=values.device).scatter(0, units, groups)
    if not torch.equal(home[units], groups):
        raise ValueError("a cluster has values of two strata: take clusters alone, or clusters within strata")
    if int(home.bincount().min()) < 2:
        groups, home = torch.zeros_like(groups), torch.zeros_like(home)
    sums = torch.zeros(_count(groups), dtype=values.dtype, device=values.device).index_add(0, groups, values)
    residuals = values - (sums / groups.bincount())[groups]
    totals = torch.zeros(len(home), dtype=values.dtype, device=values.device).index_add(0, units, residuals)
    sizes = home.bincount()[home]
    variance = (totals.square() * sizes / (sizes - 1)).sum() / len(values) ** 2
    return Spread(float(variance.sqrt()), len(home) - _count(groups))


def even_strata(strata: Int[Tensor, " n"] | None) -> Int[Tensor, " n"] | None:
    """Strata as 0, 1, 2 ...; None unless each has two values or more."""
    if strata is None or not len(strata):
        return None
    _, numbers, counts = strata.unique(return_inverse=True, return_counts=True)
    return numbers if int(counts.min()) >= 2 else None


def student_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t, for a probability above one half.

    Source:
        Abramowitz and Stegun 26.7.3-4 (its distribution for few degrees, solved by halving), 26.7.5 (for many).
    """
    z = NormalDist().inv_cdf(probability)
    if degrees > 40:
        terms = (
            z,
            (z**3 + z) / 4,
            (5 * z**5 + 16 * z**3 + 3 * z) / 96,
            (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        )
        return sum(term / degrees**power for power, term in enumerate(terms))
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _share_within(angle, degrees) < 2 * probability - 1 else (low, angle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _share_within(angle: float, degrees: int) -> float:
    """The probability that |t| is at most sqrt(degrees) tan(angle)."""
    sine, squared = math.sin(angle), math.cos(angle) ** 2
    is_odd = degrees % 2
    term, total = 1.0, 0.0
    for power in range(degrees // 2):
        total += term
        term *= squared * (2 * power + 1 + is_odd) / (2 * power + 2 + is_odd)
    if not is_odd:
        return sine * total
    return 2 / math.pi * (angle + sine * math.cos(angle) * total)


def _numbered(names: Tensor | None, values: Tensor, *, each_its_own: bool = False) -> Int[Tensor, " n"]:
    """Names as 0, 1, 2 ...; without names one for all, or each value its own."""
    if names is not None:
        return names.to(values.device).unique(return_inverse=True)[1]
    if each_its_own:
        return torch.arange(len(values), device=values.device)
    return torch.zeros(len(values), dtype=torch.int64, device=values.device)


def _count(numbered: Tensor) -> int:
    return int(numbered.max()) + 1 if len(numbered) else 0

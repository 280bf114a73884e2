"""Differences and ratios of two rows whose image i came from the same (seed, i): what both have in common cancels.

What is compared are numbers of each image: scores, for figures that are means of them, or influences, for others. The
influence of an image is the figure's first-order change with its weight, so a figure's error is that of the mean influence.

Source: Hampel 1974 (influence), Efron 1982 ch. 6 (the infinitesimal jackknife).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ._interval import Estimate as Estimate
from ._interval import even_strata as even_strata
from ._interval import spread

Scores = Float[Tensor, "n"]
Numbers = Int[Tensor, "n"] | None


def mean_estimate(
    scores: Scores, *, strata: Numbers = None, clusters: Numbers = None, confidence: float = 0.95
) -> Estimate:
    """The mean of the images' scores, with its interval over other draws of as many images.

    Args:
        scores: a number an image; NaN where an image does not count.
        strata: of each image, what was dealt in turn: classes, tasks. Left aside unless each has two images.
        clusters: of each image, what it was drawn together with, such as its prompt: then the claim is about new prompts.

    Raises:
        ValueError: fewer than two scores, or a cluster in two strata.
    """
    mean = float(scores.double().nanmean())
    return spread(scores, strata=strata, clusters=clusters).around(mean, confidence)


def share_estimate(
    scores: Scores, *, strata: Numbers = None, clusters: Numbers = None, confidence: float = 0.95
) -> Estimate:
    """The mean of scores within 0 to 1, such as whether an image is right, with an interval that stays within; as `mean_estimate`."""
    mean = float(scores.double().nanmean())
    return spread(scores, strata=strata, clusters=clusters).of_share(mean, confidence)


def paired_difference(
    a: Scores, b: Scores, *, strata: Numbers = None, clusters: Numbers = None, confidence: float = 0.95
) -> Estimate:
    """The mean of a's scores less that of b's, image by image; raises as `mean_estimate`, whose arguments it takes."""
    return mean_estimate(a.double() - b.double(), strata=strata, clusters=clusters, confidence=confidence)


def paired_change(
    a: float,
    b: float,
    influence_a: Scores,
    influence_b: Scores,
    *,
    strata: Numbers = None,
    clusters: Numbers = None,
    confidence: float = 0.95,
) -> Estimate:
    """Figure a less figure b, with an interval from the influences of their images; raises as `mean_estimate`."""
    between = influence_a.double() - influence_b.double()
    return spread(between, strata=strata, clusters=clusters).around(a - b, confidence)


def paired_ratio(
    a: float,
    b: float,
    influence_a: Scores,
    influence_b: Scores,
    *,
    strata: Numbers = None,
    clusters: Numbers = None,
    confidence: float = 0.95,
) -> Estimate:
    """Figure a over figure b; its `error` is relative: that of the ratio's logarithm, which the interval is made of.

    To first order the influence of image i on log(a / b) is influence_a(i) / a - influence_b(i) / b.

    Raises:
        ValueError: as `mean_estimate`, or a figure that is not positive.
    """
    if min(a, b) <= 0:
        raise ValueError(f"a ratio needs positive figures; found {a:.3g} and {b:.3g}")
    relative = spread(influence_a.double() / a - influence_b.double() / b, strata=strata, clusters=clusters)
    return relative.times(a / b, confidence)


def seeds_estimate(values: Sequence[float], *, confidence: float = 0.95) -> Estimate:
    """The mean over seeds with its t interval, which holds the noise of training and of sampling together.

    Raises:
        ValueError: fewer than two seeds.
    """
    return mean_estimate(torch.tensor(values, dtype=torch.float64), confidence=confidence)

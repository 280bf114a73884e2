"""Differences and ratios of two rows whose image i came from the same (seed, i): what both have in common cancels.

What is compared are numbers of each image: scores, for figures that are means of them, or influences, for others. The
influence of an image is the figure's first-order change with its weight, so a figure's error is that of the mean influence.

Source: Hampel 1974 (influence), Efron 1982 ch. 6 (the infinitesimal jackknife).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ._interval import USUAL, spread
from ._interval import Estimate as Estimate
from ._interval import even_strata as even_strata

Scores = Float[Tensor, "n"]
Numbers = Int[Tensor, "n"] | None


def mean_estimate(
    scores: Scores, *, strata: Numbers = None, clusters: Numbers = None, confidence: float = USUAL
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


def share_estimate(scores: Scores, *, strata: Numbers = None) -> Estimate:
    """The mean of scores within 0 to 1, such as whether an image is right, with an interval that stays within; as `mean_estimate`."""
    mean = float(scores.double().nanmean())
    return spread(scores, strata=strata).of_share(mean)


def paired_difference(
    a: Scores, b: Scores, *, strata: Numbers = None, clusters: Numbers = None, confidence: float = USUAL
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
) -> Estimate:
    """Figure a less figure b, with an interval from the influences of their images; raises as `mean_estimate`."""
    between = influence_a.double() - influence_b.double()
    return spread(between, strata=strata, clusters=clusters).around(a - b)


def seeds_estimate(values: Sequence[float]) -> Estimate:
    """The mean over seeds with its t interval, which holds the noise of training and of sampling together.

    Raises:
        ValueError: fewer than two seeds.
    """
    return mean_estimate(torch.tensor(values, dtype=torch.float64))

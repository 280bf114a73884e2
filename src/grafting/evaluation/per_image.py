"""What each image adds to a row's figures: two rows that have it are compared image by image (see `comparison.py`)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..metrics.frechet import FrechetInfluences


@dataclass(frozen=True, kw_only=True)
class PerImage:
    """What each image adds to the figures of one row, in the order of the images' numbers.

    Figures go by their keys in `words.py`. A suite of scores gives `labels`, `scores` and perhaps `strata`.

    Args:
        labels: the number of each image's condition; None where a suite is not told.
        scores: of figures that are means over images; NaN where an image does not count.
        strata: what was dealt in turn, such as a task; None where that is the condition, or where nothing was.
        clusters: what images were drawn together by, such as the prompt, where the claim is to be about new ones.
        influences: of figures that are no means: their first-order change with the weight of an image.
        frechet: of the Frechet distance.
        points: of figures that are means over the reference's rows, such as recall: what each of these adds.
        point_groups: of each of the reference's rows, the group of neighbours that it is in.
        features: rows by which images of two models are compared.
    """

    labels: Int[Tensor, " n"] | None
    scores: Mapping[str, Float[Tensor, " n"]] = field(default_factory=dict)
    strata: Int[Tensor, " n"] | None = None
    clusters: Int[Tensor, " n"] | None = None
    influences: Mapping[str, Float[Tensor, " n"]] = field(default_factory=dict)
    frechet: FrechetInfluences | None = None
    points: Mapping[str, Float[Tensor, " m"]] = field(default_factory=dict)
    point_groups: Int[Tensor, " m"] | None = None
    features: Float[Tensor, "n f"] | None = None

    def strata_in(self, sampling: Mapping[str, object]) -> Tensor | None:
        """What was dealt in turn: the strata that the suite names, else the conditions where sampling deals them."""
        return self.strata if self.strata is not None else dealt_in_turn(sampling, self.labels)


def dealt_in_turn(sampling: Mapping[str, object], labels: Tensor | None) -> Tensor | None:
    """The conditions, where a protocol's `sampling` says that they were dealt in turn."""
    return labels if sampling.get("labels", "random") != "random" else None


def spread_out(values: Tensor, places: Tensor, count: int) -> Float[Tensor, " n"]:
    """Values of the images at `places` among all, the others NaN."""
    all_images = torch.full((count,), torch.nan, dtype=torch.float64)
    all_images[places] = values.double().cpu()
    return all_images

"""What each image adds to a row's figures: two rows that have it are compared image by image (see `metrics/paired.py`)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PerImage:
    """What each image adds to the figures of one row, in the order of the images' numbers.

    Args:
        labels: the number of each image's condition.
        scores: of figures that are means over images, by their key in `words.py`; NaN where an image does not count.
        strata: what was dealt in turn, such as a task; None where that is the condition, or where nothing was.
        clusters: what images were drawn together by, such as the prompt, where the claim is to be about new ones.
    """

    labels: Int[Tensor, "n"]
    scores: Mapping[str, Float[Tensor, "n"]] = field(default_factory=dict)
    strata: Int[Tensor, "n"] | None = None
    clusters: Int[Tensor, "n"] | None = None

"""From a model's range to 8-bit pixels: the rounding that metrics on images depend on."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ..errors import GraftingError

UINT8_RULE = "clamp(127.5 x + 128, 0, 255), truncated"


def to_uint8(x: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Pixels of images x in [-1, 1], by `UINT8_RULE`, in float32 whatever the dtype of x.

    Undoes u / 127.5 - 1 exactly for every 8-bit u.

    Raises:
        GraftingError: x holds NaN or infinity, which would become pixels silently.

    Source:
        facebookresearch/DiT `sample_ddp.py`.
    """
    if not x.isfinite().all():
        raise GraftingError(
            f"images of shape {tuple(x.shape)} hold {int((~x.isfinite()).sum())} values that are not finite; "
            f"the model that made them has diverged"
        )
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)

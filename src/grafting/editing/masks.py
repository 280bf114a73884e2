"""Masks of `scaled_dot_product_attention`, read as key masks: which keys no query sees."""

import torch
from torch import Tensor

from ..contract import TokenLayout
from ..errors import HostError

# a score that is lowered by this much or more gives a weight of zero in every precision; models use -10,000 and less
_HIDDEN = -1000.0


def key_mask_of(mask: Tensor, layout: TokenLayout) -> Tensor | None:
    """The key mask [B, L] that a mask amounts to; None if it hides nothing.

    A mask may be one of bools (True is seen) or be added to the scores, and have a row for every query: all rows of queries
    that are keys themselves must then be the same. What padding sees is of no account.

    Args:
        mask: broadcast to [B, H, M, L].

    Raises:
        HostError: it amounts to no key mask, as a causal one.
    """
    seen = mask if mask.dtype == torch.bool else _seen_of_added(mask)
    seen = seen.reshape((1,) * (4 - seen.ndim) + tuple(seen.shape))
    # an image token is never padding: what it sees is what all see
    query = layout.of_queries.before if seen.shape[2] > 1 else 0
    key_mask = seen[:, 0, query]
    if torch.compiler.is_compiling():
        if seen.shape[1] > 1 or seen.shape[2] > 1:
            raise _refused(
                mask, "has a row for every query, which a compiled model cannot compare: compile blocks alone"
            )
        return key_mask
    unlike = seen != key_mask[:, None, None]
    if seen.shape[2] > 1 and not layout.image_queries:
        unlike = unlike & key_mask[:, None, :, None]
    if unlike.any():
        raise _refused(mask, "hides some keys from some queries alone, as a causal one does")
    return None if key_mask.all() else key_mask


def _seen_of_added(mask: Tensor) -> Tensor:
    """Which scores a mask that is added to them leaves as they are."""
    if not (torch.compiler.is_compiling() or ((mask == 0) | (mask <= _HIDDEN)).all()):
        raise _refused(
            mask,
            "adds other numbers than 0 and minus infinity to the scores: it is a bias, and hides nothing",
        )
    return mask > _HIDDEN


def _refused(mask: Tensor, why: str) -> HostError:
    return HostError(
        f"the host calls scaled_dot_product_attention with a mask {list(mask.shape)} of {mask.dtype}, and a kernel honours masks "
        f"of keys alone: it {why}"
    )

"""Masks of `scaled_dot_product_attention`, read as key masks: which keys no query sees."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..contract import TokenLayout
from ..errors import HostError
from ..functional.softmax import HIDDEN_SCORE


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


def with_images_last(
    layout: TokenLayout, key_mask: Bool[Tensor, "b l"]
) -> tuple[Int[Tensor, "b 1 l 1"], TokenLayout]:
    """Places that tokens are taken from so that all images stand at the end, and the layout that they then have.

    In each sample the image stands before that sample's padding, which is at the end.
    """
    num_tokens, num_image = layout.num_tokens, layout.grid.num_tokens
    place, num_others = torch.arange(num_tokens, device=key_mask.device), num_tokens - num_image
    start = key_mask.sum(1, keepdim=True) - num_image  # [B, 1], of the image
    others = torch.where(place < start, place, place + num_image)
    places = torch.where(place < num_others, others, start + place - num_others)
    mask = key_mask.gather(1, places)
    return places[:, None, :, None], TokenLayout(layout.grid, before=num_others, key_mask=mask)


def _seen_of_added(mask: Tensor) -> Tensor:
    """Which scores a mask that is added to them leaves as they are, or moves all alike."""
    is_hidden = mask <= HIDDEN_SCORE
    if not (torch.compiler.is_compiling() or (is_hidden | (mask == mask.amax())).all()):
        raise _refused(
            mask,
            "adds other numbers than 0 and minus infinity to the scores: it is a bias, and hides nothing",
        )
    return ~is_hidden


def _refused(mask: Tensor, why: str) -> HostError:
    return HostError(
        f"the host calls scaled_dot_product_attention with a mask {list(mask.shape)} of {mask.dtype}, and a kernel honours masks "
        f"of keys alone: it {why}"
    )

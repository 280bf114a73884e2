"""How a window's grid is cut into tiles, and the masks of what each place sees."""

from collections.abc import Callable
from functools import lru_cache
from math import ceil
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

Border = Literal["clipped", "shifted"]

# tokens up to which masks are kept: of at most 8 MB each
_KNOWN_UP_TO = 4096

# places along a tile's side, for one-row grids and for others: larger tiles waste more masked work, smaller ones
# copy more halo (fastest on a CPU at 4,096 tokens, head dim 64, of 16..128 and of 4..16)
_RUN = 32
_SIDE = 8


class Window(NamedTuple):
    """A window on image tokens, which are read as a grid."""

    size: tuple[int, int, int]  # frames, rows, cols
    reach: tuple[int, int]  # rows and cols seen to each side
    border: Border
    frames: int = 0  # seen before and after a token's own


class Axis(NamedTuple):
    """An axis of the grid cut into equal tiles; each sees `halo` places beyond its two ends."""

    size: int
    reach: int  # places a window extends to each side
    num_tiles: int
    tile: int
    halo: int
    front: int  # padding before the first place, so that the first and the last tile both hold real places
    back: int


def _cut(size: int, reach: int, target: int) -> Axis:
    """The axis in tiles of at most `target` places, or of more where a window needs them.

    A shifted window reaches 2 * reach places inwards from the border. It stays within the halo if more than
    `reach` places of the first and of the last tile are real.
    """
    for num_tiles in range(ceil(size / target), 1, -1):
        tile = ceil(size / num_tiles)
        padding = num_tiles * tile - size
        front, back = padding // 2, padding - padding // 2
        if tile - back > reach:
            return Axis(size, reach, num_tiles, tile, reach, front, back)
    return _whole(size, reach)


def _whole(size: int, reach: int) -> Axis:
    return Axis(size, reach, num_tiles=1, tile=size, halo=0, front=0, back=0)


def cut_grid(rows: int, cols: int, reach: tuple[int, int], num_others: int) -> tuple[Axis, Axis]:
    """Tiles for a grid; one tile, that is dense attention, where tiles would see half of the grid anyway.

    Each tile has its own copy of the others' keys, so the runs of a one-row grid are longer beside many of them.
    """
    side = _SIDE if rows > 1 else max(_RUN, num_others // 4)
    by_row = _cut(rows, reach[0], max(_SIDE, 2 * reach[0]))
    by_col = _cut(cols, reach[1], max(side, 2 * reach[1]))
    seen = (by_row.tile + 2 * by_row.halo) * (by_col.tile + 2 * by_col.halo)
    if 2 * seen > rows * cols:
        return _whole(rows, reach[0]), _whole(cols, reach[1])
    return by_row, by_col


def mask_at_once(
    window: Window, before: int, after: int, device: torch.device
) -> Bool[Tensor, "places tokens"]:
    """Which of all tokens each image token sees."""
    (frames, rows, cols), reaches = window.size, (window.frames, *window.reach)
    axes = [
        _axis_mask(_whole(size, reach), window.border, device)[0]
        for size, reach in zip((frames, rows, cols), reaches, strict=True)
    ]
    frame, row, col = (
        axes[0][:, None, None, :, None, None],
        axes[1][:, None, None, :, None],
        axes[2][:, None, None, :],
    )
    seen = (frame & row & col).flatten(3).flatten(0, 2)
    return F.pad(seen, (before, after), value=True)


def scores_at_once(
    window: Window, before: int, after: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "places tokens"]:
    """The same to add to scores, which SDPA would else make of it in every call."""
    seen = mask_at_once(window, before, after, device)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))


def known_mask(q: Tensor, make: Callable[..., Tensor], *settings: Any) -> Tensor:
    """A mask on q's device. Recent masks are kept; large ones, and those made under a trace, are made again."""
    if type(q) is not Tensor or torch.compiler.is_compiling() or q.shape[-2] > _KNOWN_UP_TO:
        return make(*settings, q.device)
    return _made(make, settings, q.device)


@lru_cache(maxsize=16)
def _made(make: Callable[..., Tensor], settings: tuple[Any, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is made there cannot be saved for a backward pass
        return make(*settings, device)


def tile_mask(by_row: Axis, by_col: Axis, border: Border, device: torch.device) -> Tensor:
    """Mask of the places seen by its tile that each query attends to: [tiles, places per tile, places seen]."""
    row = _axis_mask(by_row, border, device)[:, None, :, None, :, None]
    col = _axis_mask(by_col, border, device)[None, :, None, :, None, :]
    return (row & col).flatten(4, 5).flatten(2, 3).flatten(0, 1)


def _axis_mask(axis: Axis, border: Border, device: torch.device) -> Bool[Tensor, "tiles tile seen"]:
    start = torch.arange(axis.num_tiles, device=device)[:, None, None] * axis.tile - axis.front
    query = start + torch.arange(axis.tile, device=device)[:, None]
    key = start - axis.halo + torch.arange(axis.tile + 2 * axis.halo, device=device)
    if border == "clipped":
        first = query - axis.reach
    else:
        first = (query - axis.reach).clamp(0, axis.size - 2 * axis.reach - 1)
    seen = (key >= first) & (key <= first + 2 * axis.reach) & (key >= 0) & (key < axis.size)
    # a padded query must see something: a softmax over nothing is NaN, and so would be the gradient
    return seen | (query < 0) | (query >= axis.size)

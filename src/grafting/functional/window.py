"""Softmax attention in a window of the image, and the plain form that it must equal.

The fast form costs O(L): queries are cut into tiles, each tile sees its own keys and a halo around them, and one
masked SDPA does all tiles at once. It trains wherever SDPA does. On a GPU the kernels of `_triton/`
do without the copies. Tokens beside the image, if any, see and are seen by all.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ..contract import TokenLayout
from ._tiles import Axis, cut_grid, known_mask, mask_at_once, scores_at_once, tile_mask
from ._tiles import Border as Border
from ._tiles import Window as Window
from ._triton import can_fuse, in_autocast
from .softmax import softmax_attention

# tokens up to which nothing is faster than to look at all of them at once, on a CPU
_FEW = 256


# a GPU program cannot hold tiles of longer vectors
_MAX_FUSED_HEAD_DIM = 128


def window_1d(
    q: Float[Tensor, "b heads m k"],
    k: Float[Tensor, "b heads l k"],
    v: Float[Tensor, "b heads l v"],
    layout: TokenLayout,
    *,
    window: int,
    scale: float | None = None,
) -> Float[Tensor, "b heads m v"]:
    """Attention of each image token to those at most `window` places away in raster order, clipped at the ends.

    Args:
        window: tokens seen on each side, so 2 * window + 1 in all; rows, columns and frames play no part.
        scale: multiplies q k^T; 1/sqrt(K) when None.

    Raises:
        ValueError: the layout does not describe these tokens.

    Source:
        arXiv:2506.05340, sliding-window attention with window (4, 4) on the raster index.
    """
    line = Window((1, 1, layout.grid.num_tokens), (0, window), "clipped")
    return _windowed(q, k, v, layout, line, scale)


def window_2d(
    q: Float[Tensor, "b heads m k"],
    k: Float[Tensor, "b heads l k"],
    v: Float[Tensor, "b heads l v"],
    layout: TokenLayout,
    *,
    radius: int,
    border: Border = "clipped",
    scale: float | None = None,
) -> Float[Tensor, "b heads m v"]:
    """Attention of each image token to the square of side 2 * radius + 1 around it, in its own frame.

    Args:
        radius: rows and columns seen on each side.
        border: `clipped` cuts the square at the image's edge; `shifted` moves it inside, so that every token
            sees (2 * radius + 1)^2 others.
        scale: multiplies q k^T; 1/sqrt(K) when None.

    Raises:
        ValueError: the layout does not describe these tokens, or a shifted square is larger than the grid.

    Source:
        The shifted border is the rule of NATTEN (arXiv:2204.07143).
    """
    return window_3d(q, k, v, layout, radius=radius, frames=0, border=border, scale=scale)


def window_3d(
    q: Float[Tensor, "b heads m k"],
    k: Float[Tensor, "b heads l k"],
    v: Float[Tensor, "b heads l v"],
    layout: TokenLayout,
    *,
    radius: int,
    frames: int,
    border: Border = "clipped",
    scale: float | None = None,
) -> Float[Tensor, "b heads m v"]:
    """Attention of each image token to the square around it, as `window_2d`, in its own frame and in those near it.

    Args:
        radius: rows and columns seen on each side.
        frames: frames seen before and after its own.
        border: as of `window_2d`, for frames too.
        scale: multiplies q k^T; 1/sqrt(K) when None.

    Raises:
        ValueError: the layout does not describe these tokens, or a shifted window is larger than the grid.
    """
    grid = layout.grid
    _check_shifted(border, radius, {"rows": grid.rows, "columns": grid.cols})
    _check_shifted(border, frames, {"frames": grid.frames})
    window = Window((grid.frames, grid.rows, grid.cols), (radius, radius), border, frames)
    return _windowed(q, k, v, layout, window, scale)


def _check_shifted(border: Border, reach: int, sizes: dict[str, int]) -> None:
    side = 2 * reach + 1
    if border == "shifted" and side > min(sizes.values()):
        raise ValueError(
            f"a shifted window of radius {reach} needs {side} {' and '.join(sizes)}, "
            f"the grid is {' x '.join(map(str, sizes.values()))}: use border 'clipped' or a smaller radius"
        )


def window_1d_reference(
    q: Float[Tensor, "b heads m k"],
    k: Float[Tensor, "b heads l k"],
    v: Float[Tensor, "b heads l v"],
    layout: TokenLayout,
    *,
    window: int,
    scale: float | None = None,
) -> Float[Tensor, "b heads m v"]:
    """Reference for `window_1d` that computes all L x L scores."""
    place = torch.arange(layout.grid.num_tokens)
    seen = (place[:, None] - place[None, :]).abs() <= window
    return _masked_softmax(q, k, v, _with_others(seen, layout).to(q.device), scale)


def window_2d_reference(
    q: Float[Tensor, "b heads m k"],
    k: Float[Tensor, "b heads l k"],
    v: Float[Tensor, "b heads l v"],
    layout: TokenLayout,
    *,
    radius: int,
    border: Border = "clipped",
    scale: float | None = None,
) -> Float[Tensor, "b heads m v"]:
    """Reference for `window_2d` that computes all L x L scores."""
    return window_3d_reference(q, k, v, layout, radius=radius, frames=0, border=border, scale=scale)


def window_3d_reference(
    q: Float[Tensor, "b heads m k"],
    k: Float[Tensor, "b heads l k"],
    v: Float[Tensor, "b heads l v"],
    layout: TokenLayout,
    *,
    radius: int,
    frames: int,
    border: Border = "clipped",
    scale: float | None = None,
) -> Float[Tensor, "b heads m v"]:
    """Reference for `window_3d` that computes all L x L scores."""
    grid = layout.grid
    seen = torch.zeros(grid.frames, grid.rows, grid.cols, grid.frames, grid.rows, grid.cols, dtype=torch.bool)
    for frame in range(grid.frames):
        for row in range(grid.rows):
            for col in range(grid.cols):
                rows = _neighbours(row, grid.rows, radius, border)
                cols = _neighbours(col, grid.cols, radius, border)
                seen[frame, row, col, _neighbours(frame, grid.frames, frames, border), rows, cols] = True
    seen = seen.reshape(grid.num_tokens, grid.num_tokens)
    return _masked_softmax(q, k, v, _with_others(seen, layout).to(q.device), scale)


def _neighbours(place: int, size: int, radius: int, border: Border) -> slice:
    first, last = place - radius, place + radius
    if border == "clipped":
        return slice(max(first, 0), min(last, size - 1) + 1)
    if first < 0:
        return slice(0, 2 * radius + 1)
    if last > size - 1:
        return slice(size - 2 * radius - 1, size)
    return slice(first, last + 1)


def _with_others(seen: Bool[Tensor, "n n"], layout: TokenLayout) -> Bool[Tensor, "b 1 m l"]:
    """Which keys each query sees, by which image tokens each image token sees and by the key mask."""
    everything = torch.ones(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    everything[layout.image_slice, layout.image_slice] = seen
    everything = everything[layout.image_slice] if layout.image_queries else everything
    is_key = (
        torch.ones(1, layout.num_tokens, dtype=torch.bool) if layout.key_mask is None else layout.key_mask
    )
    return everything & is_key[:, None, None].cpu()


def _masked_softmax(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None) -> Tensor:
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)  # [B, H, M, L]
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v


def _windowed(
    q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, window: Window, scale: float | None
) -> Tensor:
    """Window attention of the image tokens, with the others global beside them."""
    if q.shape[2] != layout.num_queries or k.shape[2] != layout.num_tokens:
        raise ValueError(
            f"the layout has {layout.num_tokens} tokens ({layout.grid}, {layout.num_others} others), "
            f"q has {q.shape[2]} and k has {k.shape[2]}"
        )
    image_q, others_q = layout.of_queries.split(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if can_fuse(q, k, v) and max(q.shape[-1], v.shape[-1]) <= _MAX_FUSED_HEAD_DIM:
        mixed = _fused(image_q, k, v, layout, window, scale)
    else:
        mixed = in_tiles(image_q, k, v, layout, window, scale)
    if layout.num_others == 0 or layout.image_queries:
        return mixed
    return layout.join(mixed, softmax_attention(others_q, k, v, key_mask=layout.key_mask, scale=scale))


def _fused(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, window: Window, scale: float) -> Tensor:
    from ._triton.window import window_attention  # needs triton

    is_key = None if layout.key_mask is None else layout.key_mask.expand(len(k), -1)
    reach = [window.frames, *window.reach]
    q, k, v = map(in_autocast, (q, k, v))
    out, _ = window_attention(
        q, k, v, is_key, [layout.before, *window.size], reach, window.border == "shifted", scale
    )
    return out


def in_tiles(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, window: Window, scale: float) -> Tensor:
    # of a line tiles copy little, and many heads are worth it
    if layout.num_tokens <= _FEW and (window.size[1] > 1 or q.shape[1] * layout.num_tokens <= 4 * _FEW):
        return _at_once(q, k, v, layout, window, scale)
    (image_k, others_k), (image_v, others_v) = layout.split(k), layout.split(v)
    masks = None
    if layout.key_mask is not None:
        masks = layout.split(layout.key_mask[:, None, :, None])  # [B, 1, N, 1], [B, 1, T, 1]
    return _tiled_attention(q, image_k, image_v, others_k, others_v, window, scale, masks)


def _at_once(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, window: Window, scale: float) -> Tensor:
    """Window attention as one masked SDPA of all image tokens to all tokens, where there are too few to be worth copies."""
    if layout.key_mask is None:
        seen = known_mask(q, scores_at_once, window, layout.before, layout.after, q.dtype)
    else:
        seen = (
            known_mask(q, mask_at_once, window, layout.before, layout.after) & layout.key_mask[:, None, None]
        )
        # a query that sees nothing is hidden itself; see `_tiles._axis_mask`
        seen = seen | ~seen.any(-1, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)


def _tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    others_k: Tensor,
    others_v: Tensor,
    window: Window,
    scale: float,
    masks: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Window attention of image tokens [B, H, N, .], each also seeing all others [B, H, T, .]; `masks` are of both's keys."""
    batch, heads, _, _ = q.shape
    frames, rows, cols = window.size
    num_others = others_k.shape[2]
    cuts = cut_grid(rows, cols, window.reach, num_others)

    tiles_q = _query_tiles(_on_grid(q, window, *cuts), *cuts)
    seen = known_mask(q, tile_mask, *cuts, window.border)
    in_batch, near = (
        frames,
        None,
    )  # frames stand in the batch, unless they see each other: then they stand beside tiles
    if window.frames:
        in_batch, near = 1, _frames_seen(frames, window.frames, window.border, q.device)
        tiles_q = tiles_q.unflatten(0, (-1, frames)).flatten(1, 2)
        seen = (near.exist[:, None, None, :, None] & seen[:, :, None]).flatten(3).flatten(0, 1)

    def tiled(image: Tensor, others: Tensor) -> Tensor:
        tiles = _key_tiles(_on_grid(image, window, *cuts), *cuts)
        tiles = tiles if near is None else near.gather(tiles)
        return _append_others(tiles, others, in_batch) if num_others else tiles

    tiles_k, tiles_v = tiled(k, others_k), tiled(v, others_v)
    seen = F.pad(seen, (0, num_others), value=True)
    if masks is None:
        mixed = F.scaled_dot_product_attention(tiles_q, tiles_k, tiles_v, attn_mask=seen[None], scale=scale)
    else:
        mixed = _masked_tiles(tiles_q, tiles_k, tiles_v, seen, tiled(*masks)[..., 0], in_batch, scale)
    mixed = mixed if near is None else mixed.unflatten(1, (frames, -1)).flatten(0, 1)
    return _untile(mixed, *cuts).unflatten(0, (batch, heads, frames)).flatten(2, 4)


class _Frames(NamedTuple):
    """Frames that each frame sees: their numbers [F, seen], and whether there is one of that number."""

    numbers: Tensor
    exist: Bool[Tensor, "frames seen"]

    def gather(self, tiles: Tensor) -> Tensor:
        """Tiles [B * H * F, tiles, S, K], each with those at its place in the frames seen: [B * H, F * tiles, seen * S, K]."""
        count, seen = self.numbers.shape
        tiles = tiles.unflatten(0, (-1, count)).index_select(1, self.numbers.flatten())
        return tiles.unflatten(1, (count, seen)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _frames_seen(count: int, reach: int, border: Border, device: torch.device) -> _Frames:
    first = torch.arange(count, device=device) - reach
    if border == "shifted":
        first = first.clamp(0, count - 2 * reach - 1)
    numbers = first[:, None] + torch.arange(2 * reach + 1, device=device)
    exist = (numbers >= 0) & (numbers < count)
    return _Frames(numbers.clamp(0, count - 1), exist)


def _masked_tiles(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, is_key: Tensor, frames: int, scale: float
) -> Tensor:
    """Attention within tiles [B * H * F, tiles, places, K], whose keys are not all seen: `is_key` is [B * F, tiles, places].

    Heads share a mask, so they stand alone, and frames and tiles are put into the batch.
    """
    heads, num_tiles = q.shape[0] // is_key.shape[0], q.shape[1]

    def by_head(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, heads, frames)).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)

    mask = seen & is_key[:, :, None]
    # a query that sees nothing is one of padding; see `_tiles._axis_mask`
    mask = (mask | ~mask.any(-1, keepdim=True)).flatten(0, 1)[:, None]
    mixed = F.scaled_dot_product_attention(by_head(q), by_head(k), by_head(v), attn_mask=mask, scale=scale)
    return mixed.unflatten(0, (-1, frames, num_tiles)).permute(0, 3, 1, 2, 4, 5).flatten(0, 2)


def _on_grid(x: Tensor, window: Window, by_row: Axis, by_col: Axis) -> Tensor:
    """[B, H, N, K] -> [B * H * F, R, C, K], rows and columns padded to whole tiles."""
    x = x.unflatten(2, window.size).flatten(0, 2)
    return F.pad(x, (0, 0, by_col.front, by_col.back, by_row.front, by_row.back))


def _query_tiles(x: Tensor, by_row: Axis, by_col: Axis) -> Tensor:
    """[B, R, C, K] -> [B, tiles, places a tile, K]."""
    x = x.unflatten(2, (by_col.num_tiles, by_col.tile)).unflatten(1, (by_row.num_tiles, by_row.tile))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _untile(x: Tensor, by_row: Axis, by_col: Axis) -> Tensor:
    """[B, tiles, places a tile, K] -> [B, R, C, K] without the padding: undoes `_query_tiles`."""
    x = x.unflatten(2, (by_row.tile, by_col.tile)).unflatten(1, (by_row.num_tiles, by_col.num_tiles))
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, by_row.front : by_row.front + by_row.size, by_col.front : by_col.front + by_col.size]


def _key_tiles(x: Tensor, by_row: Axis, by_col: Axis) -> Tensor:
    """[B, R, C, K] -> [B, tiles, places that a tile sees, K]."""
    x = torch.cat(_pieces(x, by_row, 1), dim=2)  # [B, row tiles, rows seen, C, K]
    pieces = [piece.transpose(2, 3) for piece in _pieces(x, by_col, 3)]
    return torch.cat(pieces, dim=4).flatten(3, 4).flatten(1, 2)


def _pieces(x: Tensor, axis: Axis, dim: int) -> list[Tensor]:
    """Views of what each tile sees before, in and after itself, with `dim` split into (tiles, places).

    Joined pieces rather than `unfold`, which takes more than twice as long forward and backward on a CPU.
    """
    split = (axis.num_tiles, axis.tile)
    if axis.halo == 0:
        return [x.unflatten(dim, split)]
    length, halo = axis.num_tiles * axis.tile, axis.halo
    x = F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (halo, halo))
    before = x.narrow(dim, 0, length).unflatten(dim, split).narrow(dim + 1, 0, halo)
    within = x.narrow(dim, halo, length).unflatten(dim, split)
    after = x.narrow(dim, 2 * halo, length).unflatten(dim, split).narrow(dim + 1, axis.tile - halo, halo)
    return [before, within, after]


def _append_others(x: Tensor, others: Tensor, frames: int) -> Tensor:
    """The others' keys or values [B, H, T, K] after those of every tile [B * H * F, tiles, S, K]."""
    others = others[:, :, None, None].expand(-1, -1, frames, x.shape[1], -1, -1).flatten(0, 2)
    return torch.cat([x, others], dim=2)

"""Gated convolutions: q' * inner(k' * v'), where q', k', v' = short(qkv), of tokens with channels last.

The plain path is the definition; on a GPU the kernels of `_triton/` do the same, where they take the call.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..contract import TokenLayout
from ._triton import can_fuse, in_autocast
from .conv import depthwise_1d, depthwise_2d, depthwise_3d

MAX_FUSED_TAPS = 25
"""Filters of more taps go the plain way on a GPU too: the kernels hold a sum for each tap of their weight's gradient."""


class Filter(NamedTuple):
    """A depthwise filter over tokens: of K taps, K x K on a grid, or K x K x K on a video."""

    weight: Float[Tensor, "d 1 *taps"]
    bias: Float[Tensor, " d"]
    before: int
    """Taps before the token; along each axis of a grid K // 2."""


def gated_conv(
    qkv: Float[Tensor, "b l d3"], short: Filter | None, inner: Filter | None, layout: TokenLayout
) -> Float[Tensor, "b l d"]:
    """q' * inner(k' * v') with q', k', v' = short(qkv); a filter that is None passes on what it is given."""
    if kernels_take(qkv, short, inner):
        return _fused(qkv, short, inner, layout)
    return gated_conv_plain(qkv, short, inner, layout)


def kernels_take(qkv: Tensor, short: Filter | None, inner: Filter | None) -> bool:
    """Whether kernels do the whole of it."""
    filters = [x for x in (short, inner) if x is not None]
    return len(filters) > 0 and all(map(_can_fuse, filters)) and can_fuse(qkv, *(x.weight for x in filters))


def gated_conv_plain(qkv: Tensor, short: Filter | None, inner: Filter | None, layout: TokenLayout) -> Tensor:
    """The definition of `gated_conv`."""
    if short is not None:
        qkv = filtered(qkv, short, layout)
    q, k, v = qkv.chunk(3, dim=-1)
    kv = k * v
    return q * (kv if inner is None else filtered(kv, inner, layout))


def gated_channels(
    qkv: Float[Tensor, "b l d3"], weight: Float[Tensor, "filters 1 k"], bias: Float[Tensor, " filters"]
) -> Float[Tensor, "b l d"]:
    """q' k' v', where a causal filter runs along the channels of q, k and v joined: one for each token, or one for all."""
    if channel_kernels_take(qkv, weight):
        from ._triton.channels import gated_channels as fused  # needs triton

        return fused(in_autocast(qkv), torch.cat([weight[:, 0], bias[:, None]], dim=1))
    return gated_channels_plain(qkv, weight, bias)


def channel_kernels_take(qkv: Tensor, weight: Tensor) -> bool:
    """Whether kernels do the whole of `gated_channels`."""
    return weight.shape[-1] <= MAX_FUSED_TAPS and can_fuse(qkv, weight)


def gated_channels_plain(qkv: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The definition of `gated_channels`."""
    q, k, v = filtered_channels(qkv, weight, bias).chunk(3, dim=-1)
    return q * (k * v)


def silu_conv(
    x: Float[Tensor, "b l d"], weight: Float[Tensor, "d 1 k"], bias: Float[Tensor, " d"], *, before: int
) -> Float[Tensor, "b l d"]:
    """silu of x, filtered along its tokens."""
    if weight.shape[-1] <= MAX_FUSED_TAPS and can_fuse(x, weight):
        from ._triton.silu import silu_conv as fused  # needs triton

        return fused(in_autocast(x), _packed_matrix(weight, bias), before)
    return silu_conv_plain(x, weight, bias, before=before)


def silu_conv_plain(x: Tensor, weight: Tensor, bias: Tensor, *, before: int) -> Tensor:
    """The definition of `silu_conv`."""
    return F.silu(depthwise_1d(x, weight, bias, before=before))


def filtered_channels(x: Float[Tensor, "b l c"], weight: Tensor, bias: Tensor) -> Float[Tensor, "b l c"]:
    """A causal filter along each token's channels."""
    num_tokens = x.shape[1]
    # tokens take the place of channels; one filter for all is a view, so nothing is copied
    weight, bias = weight.expand(num_tokens, -1, -1), bias.expand(num_tokens)
    return depthwise_1d(x.mT, weight, bias, before=weight.shape[-1] - 1).mT


def filtered(x: Float[Tensor, "b l d"], own: Filter, layout: TokenLayout) -> Float[Tensor, "b l d"]:
    """Tokens filtered along their sequence, text included, or on the image's grid, where text sees the centre tap only."""
    weight, bias, before = own
    if weight.ndim == 3:
        return depthwise_1d(x, weight, bias, before=before)
    grid, image = layout.grid, layout.image_slice
    on_grid = x[:, image].unflatten(1, (grid.frames, grid.rows, grid.cols))
    if weight.ndim == 5:
        y = depthwise_3d(on_grid, weight, bias).flatten(1, 3)
    else:
        y = depthwise_2d(on_grid.flatten(0, 1), weight, bias).reshape(x.shape[0], -1, x.shape[-1])
    if layout.num_others == 0:
        return y
    text = x * own_tap(own).to(x.dtype) + bias.to(x.dtype)
    return torch.cat([text[:, : image.start], y, text[:, image.stop :]], dim=1)


def own_tap(own: Filter) -> Float[Tensor, " d"]:
    """A view of the weights of each token's own tap."""
    tap = own.weight[:, 0]
    for _ in range(tap.ndim - 1):
        tap = tap.select(1, own.before)
    return tap


def _can_fuse(own: Filter) -> bool:
    return own.weight.ndim < 5 and own.weight[0].numel() <= MAX_FUSED_TAPS


def _fused(qkv: Tensor, short: Filter | None, inner: Filter | None, layout: TokenLayout) -> Tensor:
    from ._triton.conv import gated_conv as fused  # needs triton

    grid = [0, 1, 1, qkv.shape[1]]
    if any(x is not None and x.weight.ndim == 4 for x in (short, inner)):
        grid = [layout.before, layout.grid.frames, layout.grid.rows, layout.grid.cols]
    out, _ = fused(in_autocast(qkv), _packed(short), _packed(inner), grid, _taps(short), _taps(inner))
    return out


def _packed(own: Filter | None) -> Tensor | None:
    """The matrix [taps + 1, D] that kernels take: a row for each tap, and the bias."""
    return None if own is None else _packed_matrix(own.weight, own.bias)


def _packed_matrix(weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([weight.flatten(1).mT, bias[None]])


def _taps(own: Filter | None) -> list[int]:
    """Taps along rows and columns, and how many of them are before the token."""
    if own is None:
        return [1, 1, 0, 0]
    size = own.weight.shape[-1]
    return [1, size, 0, own.before] if own.weight.ndim == 3 else [size, size, own.before, own.before]

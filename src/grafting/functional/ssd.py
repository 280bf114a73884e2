"""The scan of a state-space model with scalar decays (Mamba-2), in chunks: matrix products inside them, states between them.

Work and memory grow with the number of tokens. Sums and decays are kept in float32 whatever the inputs' dtype. All heads
read and write their states with the same B and C (one group), which makes those two steps single large products. The
reference is the recurrence itself, token by token. On a GPU the kernels of `_triton/` do the same, where they take the call.

Source: arXiv:2405.21060 (structured state space duality), section 6.
"""

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ._triton import can_fuse, is_transformed

MAX_FUSED_STATE, MAX_FUSED_HEAD = 128, 64
"""Larger states, N and P, go the plain way on a GPU too: kernels hold a whole one in registers."""

MAX_WIDE_STATE = 64
"""The same of N in float32: the next larger one takes more shared memory than GeForce cards have."""

# chunks that are worked on at once and recomputed in the backward pass, in memory that stays in the caches
_CHUNKS_AT_ONCE = 16


def ssd(
    x: Float[Tensor, "b l heads p"],
    dt: Float[Tensor, "b l heads"],
    A: Float[Tensor, " heads"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
    D: Float[Tensor, " heads"] | None = None,
    *,
    reverse: bool = False,
    chunk_size: int = 32,
) -> Float[Tensor, "b l heads p"]:
    """y[t] = C[t] h[t] + D x[t], where h[t] = exp(dt[t] A) h[t - 1] + dt[t] B[t] x[t] from h = 0, in the dtype of x.

    Args:
        x: what is written into each head's state, P channels.
        dt: step sizes, not negative.
        A: rates, negative; the state of a head decays by exp(dt A) at each token.
        B: the direction among the N of the state in which a token writes, for all heads.
        C: the direction in which it reads.
        D: what a head's tokens read of themselves; None is 0.
        reverse: go from the last token to the first.
        chunk_size: tokens in a chunk of the plain path; changes speed and memory only.
    """
    if x.dtype == B.dtype == C.dtype and _kernels_take(x, B):
        from ._triton.ssd import ssd as fused  # needs triton

        own = torch.zeros_like(A) if D is None else D
        return fused(x, dt.float(), A.float(), B, C, own.float(), reverse)
    return ssd_plain(x, dt, A, B, C, D, reverse=reverse, chunk_size=chunk_size)


def _kernels_take(x: Tensor, B: Tensor) -> bool:
    most = MAX_WIDE_STATE if x.dtype == torch.float32 else MAX_FUSED_STATE
    return B.shape[2] <= most and x.shape[3] <= MAX_FUSED_HEAD and can_fuse(x, B)


def ssd_plain(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    reverse: bool = False,
    chunk_size: int = 32,
) -> Tensor:
    """`ssd` without kernels."""
    if reverse:
        x, dt, B, C = (t.flip(1) for t in (x, dt, B, C))
        return ssd_plain(x, dt, A, B, C, D, chunk_size=chunk_size).flip(1)
    state = x.new_zeros(x.shape[0], x.shape[2], B.shape[2], x.shape[3], dtype=_at_least_float32(x.dtype))
    parts = [t.split(_CHUNKS_AT_ONCE * chunk_size, dim=1) for t in (x, dt, B, C)]
    # what a transform has wrapped cannot be computed again after it
    scan = _scan_part if is_transformed() else partial(_checkpointed, _scan_part)
    outputs = []
    for part_x, part_dt, part_B, part_C in zip(*parts, strict=True):
        y, state = scan(part_x, part_dt, A, part_B, part_C, state, chunk_size)
        outputs.append(y)
    y = torch.cat(outputs, dim=1)
    return y if D is None else y + D.to(x.dtype)[:, None] * x


_checkpointed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def ssd_reference(
    x: Float[Tensor, "b l heads p"],
    dt: Float[Tensor, "b l heads"],
    A: Float[Tensor, " heads"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
) -> Float[Tensor, "b l heads p"]:
    """The definition of `ssd`, one token after another."""
    dtype = x.dtype
    x, dt, A, B, C = _in_float32(x, dt, A, B, C)
    state = x.new_zeros(x.shape[0], x.shape[2], B.shape[2], x.shape[3])  # [B, H, N, P]
    tokens = []
    for t in range(x.shape[1]):
        decay = (dt[:, t] * A).exp()[..., None, None]
        state = decay * state + torch.einsum("bh,bn,bhp->bhnp", dt[:, t], B[:, t], x[:, t])
        tokens.append(torch.einsum("bn,bhnp->bhp", C[:, t], state))
    return torch.stack(tokens, dim=1).to(dtype)


def _scan_part(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """`ssd` of some tokens from the state [B, H, N, P] before them, and the state after them."""
    length, dtype, heads = x.shape[1], x.dtype, x.shape[2:]
    chunk_size = min(chunk_size, length)
    # autocast would round the states to the inputs' dtype
    with torch.autocast(x.device.type, enabled=False):
        x, dt, A, B, C = _in_float32(x, dt, A, B, C)
        x = _chunked(x * dt[..., None], chunk_size)  # [B, chunks, Q, H, P]
        B, C = _chunked(B, chunk_size), _chunked(C, chunk_size)  # [B, chunks, Q, N]
        log_decay = _chunked(dt * A, chunk_size).transpose(2, 3).cumsum(-1)  # [B, chunks, H, Q]

        weights = (C @ B.mT)[:, :, None] * _decays(log_decay)  # [B, chunks, H, Q, Q]
        inside = (weights @ x.transpose(2, 3)).transpose(2, 3)

        to_end = (log_decay[..., -1:] - log_decay).exp().transpose(2, 3)[..., None]  # [B, chunks, Q, H, 1]
        written = (B.mT @ (x * to_end).flatten(3)).unflatten(3, heads).permute(0, 3, 1, 2, 4)
        written = torch.cat([state[:, :, None], written], dim=2)  # [B, H, 1 + chunks, N, P]
        over_chunks = F.pad(log_decay[..., -1].transpose(1, 2).cumsum(-1), (1, 0))
        states = (_decays(over_chunks) @ written.flatten(3)).unflatten(3, written.shape[3:])

        read = C @ states[:, :, :-1].permute(0, 2, 3, 1, 4).flatten(3)  # [B, chunks, Q, H * P]
        before = read.unflatten(3, heads) * log_decay.exp().transpose(2, 3)[..., None]
        return (inside + before).flatten(1, 2)[:, :length].to(dtype), states[:, :, -1]


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _in_float32(*tensors: Tensor) -> list[Tensor]:
    return [t.to(_at_least_float32(t.dtype)) for t in tensors]


def _chunked(x: Tensor, size: int) -> Tensor:
    """Tokens in chunks, the last one filled up with zeros: such tokens write nothing and decay nothing."""
    missing = -x.shape[1] % size
    padded = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing)) if missing else x
    return padded.unflatten(1, (-1, size))


def _decays(log_decay: Float[Tensor, "*dims q"]) -> Float[Tensor, "*dims q q"]:
    """Entry (i, j): what is left at token i of what token j wrote, exp of the log decays after j up to i; 0 for j > i.

    The sums are differences of running sums from the chunk's start, so that what cancels is one chunk's decay at most. They
    are masked before the exponential: above the diagonal it could overflow, and its gradient would not be a number.
    """
    size = log_decay.shape[-1]
    future = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).triu(1)
    sums = log_decay[..., :, None] - log_decay[..., None, :]
    return sums.masked_fill_(future, -torch.inf).exp_()

"""The scan of a state-space model with scalar decays (Mamba-2), in chunks: matrix products inside them, states between them.

Work and memory grow with the number of tokens. Sums and decays are kept in float32 whatever the inputs' dtype. All heads
read and write their states with the same B and C (one group), which makes those two steps single large products. The
reference is the recurrence itself, token by token. No fast path of another package is used here.

Source: arXiv:2405.21060 (structured state space duality), section 6.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# chunks whose states are carried on by one matrix product; more of them are taken in groups of this many
_GROUP = 16


def ssd(
    x: Float[Tensor, "b l heads p"],
    dt: Float[Tensor, "b l heads"],
    A: Float[Tensor, "heads"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
    *,
    chunk_size: int = 32,
) -> Float[Tensor, "b l heads p"]:
    """y[t] = C[t] h[t], where h[t] = exp(dt[t] A) h[t - 1] + dt[t] B[t] x[t] from h = 0, in the dtype of x.

    Args:
        x: what is written into each head's state, P channels.
        dt: step sizes, not negative.
        A: rates, negative; the state of a head decays by exp(dt A) at each token.
        B: the direction among the N of the state in which a token writes, for all heads.
        C: the direction in which it reads.
        chunk_size: tokens in a chunk; changes speed and memory only.
    """
    length, dtype = x.shape[1], x.dtype
    chunk_size = min(chunk_size, length)
    # autocast would round the states to the inputs' dtype
    with torch.autocast(x.device.type, enabled=False):
        written, dt, A, B, C = _in_float32(x, dt, A, B, C)
        written = _chunked(written * dt[..., None], chunk_size)  # [B, chunks, Q, H, P]
        B, C = _chunked(B, chunk_size), _chunked(C, chunk_size)  # [B, chunks, Q, N]
        log_decay = _chunked(dt * A, chunk_size).transpose(2, 3).cumsum(-1)  # [B, chunks, H, Q]

        weights = (C @ B.mT)[:, :, None] * _decays(log_decay)  # [B, chunks, H, Q, Q]
        inside = (weights @ written.transpose(2, 3)).transpose(2, 3)

        to_end = (log_decay[..., -1:] - log_decay).exp().transpose(2, 3)[..., None]  # [B, chunks, Q, H, 1]
        states = (B.mT @ (written * to_end).flatten(3)).unflatten(3, x.shape[2:])  # [B, chunks, N, H, P]
        states = _carried(states.permute(0, 3, 1, 2, 4), log_decay[..., -1].transpose(1, 2))
        read = C @ states.permute(0, 2, 3, 1, 4).flatten(3)  # [B, chunks, Q, H * P]
        before = read.unflatten(3, x.shape[2:]) * log_decay.exp().transpose(2, 3)[..., None]
        return (inside + before).flatten(1, 2)[:, :length].to(dtype)


def ssd_reference(
    x: Float[Tensor, "b l heads p"],
    dt: Float[Tensor, "b l heads"],
    A: Float[Tensor, "heads"],
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


def _in_float32(*tensors: Tensor) -> list[Tensor]:
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _chunked(x: Tensor, size: int, dim: int = 1) -> Tensor:
    """`dim` split into chunks, the last one filled up with zeros: such tokens write nothing and decay nothing."""
    missing = -x.shape[dim] % size
    padded = F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing)) if missing else x
    return padded.unflatten(dim, (-1, size))


def _decays(log_decay: Float[Tensor, "*dims q"]) -> Float[Tensor, "*dims q q"]:
    """Entry (i, j): what is left at token i of what token j wrote, exp of the log decays after j up to i; 0 for j > i.

    The sums are differences of running sums from the chunk's start, so that what cancels is one chunk's decay at most. They
    are masked before the exponential: above the diagonal it could overflow, and its gradient would not be a number.
    """
    size = log_decay.shape[-1]
    future = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).triu(1)
    sums = log_decay[..., :, None] - log_decay[..., None, :]
    return sums.masked_fill_(future, -torch.inf).exp_()


def _carried(
    states: Float[Tensor, "b heads c n p"], log_decay: Float[Tensor, "b heads c"]
) -> Float[Tensor, "b heads c n p"]:
    """The state before each chunk, from what each adds to it and by how much each lets it decay.

    Many chunks are gathered in groups and carried on in the same way from group to group: linear work, few steps.
    """
    num_chunks = states.shape[2]
    if num_chunks > _GROUP:
        return _carried_in_groups(states, log_decay)
    running = log_decay.cumsum(-1)
    decays = _decays(running)[..., :-1, :-1]  # of chunk j before chunk i + 1
    carried = (decays @ states[:, :, :-1].flatten(3)).unflatten(3, states.shape[3:])
    return F.pad(carried, (0, 0, 0, 0, 1, 0))


def _carried_in_groups(states: Tensor, log_decay: Tensor) -> Tensor:
    num_chunks, (num_channels) = states.shape[2], states.shape[3:]
    states = _chunked(states, _GROUP, dim=2).flatten(4)  # [B, H, groups, 16, N * P]
    running = _chunked(log_decay, _GROUP, dim=2).cumsum(-1)
    sums = _decays(running) @ states  # of a group's chunks up to each, itself included
    before_group = _carried(sums[..., -1, :].unflatten(3, num_channels), running[..., -1]).flatten(3)[
        ..., None, :
    ]
    after = sums + running.exp()[..., None] * before_group
    carried = torch.cat([before_group, after[..., :-1, :]], dim=3)
    return carried.flatten(2, 3)[:, :, :num_chunks].unflatten(3, num_channels)

"""Triton kernels of the scan of a state-space model; `ssd.py` beside this launches them.

A chunk is BLOCK_T tokens in the order of the scan, which with REVERSE goes from the last token to the first. A program takes a chunk of an
item and GROUP heads after each other, which share B and C. Within a chunk log decays are running sums from its start, so that what
cancels is one chunk's decay at most, and they are masked before the exponential. States [items, chunks, heads, N, P], decays and all
that is added up are held in float32; operands of products are of the inputs' precision.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _tokens(length, REVERSE: tl.constexpr, BLOCK_T: tl.constexpr):
    """Where a chunk's tokens are, and whether they are any."""
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    exists = t < length
    if REVERSE:
        t = length - 1 - t
    return t.to(tl.int64), exists


@triton.jit
@no_type_check
def _load(x, stride, t, exists, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Vectors of these tokens [tokens, BLOCK], zero beyond SIZE and for tokens that are not there."""
    d = tl.arange(0, BLOCK)
    return tl.load(
        x + t[:, None] * stride + d[None, :], mask=exists[:, None] & (d < SIZE)[None, :], other=0.0
    )


@triton.jit
@no_type_check
def _store(x, y, stride, t, exists, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    mask = exists[:, None] & (d < SIZE)[None, :]
    tl.store(x + t[:, None] * stride + d[None, :], y.to(x.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def _load_state(
    states, place, N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr
):
    """A state [BLOCK_N, BLOCK_P]."""
    n = tl.arange(0, BLOCK_N)
    return _load(states + place * N * P, P, n, n < N, P, BLOCK_P)


@triton.jit
@no_type_check
def _steps(dt, A, heads, head, t, exists):
    """A head's steps, its rate, and its running sum of log decays."""
    step = tl.load(dt + t * heads + head, mask=exists, other=0.0)
    rate = tl.load(A + head)
    return step, rate, tl.cumsum(step * rate, axis=0)


@triton.jit
@no_type_check
def _decays(log_decay, BLOCK_T: tl.constexpr):
    """Entry (i, j): what is left at token i of what token j wrote; 0 for j > i."""
    i = tl.arange(0, BLOCK_T)
    past = i[:, None] >= i[None, :]
    return tl.exp(tl.where(past, log_decay[:, None] - log_decay[None, :], float("-inf")))


@triton.jit(do_not_specialize=["length"])
@no_type_check
def chunk_kernel(
    x,
    rows,
    dt,
    A,
    states,
    totals,
    x_item,
    x_token,
    rows_item,
    rows_token,
    length,
    heads,
    OF_GRADIENT: tl.constexpr,
    REVERSE: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
):
    """What a chunk adds to the state after it, from x and B (`rows`), and its log decay.

    With OF_GRADIENT, what it adds to the gradient of the state before it, from that of y in the place of x, and C.
    """
    item = tl.program_id(2).to(tl.int64)
    t, exists = _tokens(length, REVERSE, BLOCK_T)
    x += item * x_item
    dt += item * length * heads
    directions = _load(rows + item * rows_item, rows_token, t, exists, N, BLOCK_N)
    first = tl.program_id(0) * GROUP
    n = tl.arange(0, BLOCK_N)
    for head in range(first, tl.minimum(first + GROUP, heads)):
        step, rate, log_decay = _steps(dt, A, heads, head, t, exists)
        total = tl.sum(step * rate, axis=0)
        if OF_GRADIENT:
            factor = tl.exp(log_decay)
        else:
            factor = step * tl.exp(total - log_decay)
        values = _load(x + head * P, x_token, t, exists, P, BLOCK_P)
        values = (values.to(tl.float32) * factor[:, None]).to(directions.dtype)
        state = tl.dot(tl.trans(directions), values, input_precision="ieee")
        place = (item * tl.num_programs(1) + tl.program_id(1)) * heads + head
        _store(states + place * N * P, state, P, n, n < N, P, BLOCK_P)
        tl.store(totals + place, total)


@triton.jit(do_not_specialize=["num_chunks"])
@no_type_check
def pass_kernel(
    states, totals, passed, num_chunks, heads, BACK: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """From what each chunk adds to a state, the state before it, rounded for products; with BACK, from the last chunk to the first."""
    head = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < SIZE
    chunk = num_chunks - 1 if BACK else 0
    place = (tl.program_id(2).to(tl.int64) * num_chunks + chunk) * heads + head
    ahead = -heads if BACK else heads
    state = tl.zeros([BLOCK], tl.float32)
    added = tl.load(states + place * SIZE + d, mask=inside, other=0.0)
    for n in range(num_chunks):
        following = tl.load(
            states + (place + ahead) * SIZE + d,
            mask=inside & (tl.zeros_like(d) + n + 1 < num_chunks),
            other=0.0,
        )
        total = tl.load(totals + place)
        tl.store(passed + place * SIZE + d, state.to(passed.dtype.element_ty), mask=inside)
        state = state * tl.exp(total) + added
        added = following
        place += ahead


@triton.jit(do_not_specialize=["length"])
@no_type_check
def output_kernel(
    x,
    dt,
    A,
    B,
    C,
    D,
    states,
    y,
    x_item,
    x_token,
    B_item,
    B_token,
    C_item,
    C_token,
    length,
    heads,
    REVERSE: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
):
    """What tokens read of their chunk and of the state before it, and their own share."""
    item = tl.program_id(2).to(tl.int64)
    t, exists = _tokens(length, REVERSE, BLOCK_T)
    x += item * x_item
    y += item * length * heads * P
    dt += item * length * heads
    write = _load(B + item * B_item, B_token, t, exists, N, BLOCK_N)
    read = _load(C + item * C_item, C_token, t, exists, N, BLOCK_N)
    scores = tl.dot(read, tl.trans(write), input_precision="ieee")
    first = tl.program_id(0) * GROUP
    for head in range(first, tl.minimum(first + GROUP, heads)):
        step, _, log_decay = _steps(dt, A, heads, head, t, exists)
        values = _load(x + head * P, x_token, t, exists, P, BLOCK_P)
        place = (item * tl.num_programs(1) + tl.program_id(1)) * heads + head
        state = _load_state(states, place, N, P, BLOCK_N, BLOCK_P)
        mixed = tl.dot(read, state, input_precision="ieee") * tl.exp(log_decay)[:, None]
        weights = scores * _decays(log_decay, BLOCK_T) * step[None, :]
        mixed += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        mixed += tl.load(D + head) * values.to(tl.float32)
        _store(y + head * P, mixed, heads * P, t, exists, P, BLOCK_P)


@triton.jit(do_not_specialize=["length"])
@no_type_check
def backward_kernel(
    x,
    dt,
    A,
    B,
    C,
    D,
    states,
    dstates,
    grad,
    dx,
    ddt,
    of_heads,
    of_states,
    x_item,
    x_token,
    B_item,
    B_token,
    C_item,
    C_token,
    grad_item,
    grad_token,
    length,
    heads,
    REVERSE: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Gradients of x and dt; a sum for each chunk of those of A and D, `of_heads` [2, items, chunks, heads]; and for each group of
    heads of those of B and C, `of_states` [2, groups, items, L, N].

    The decay from token j to token i is exp of a difference of running sums. So the gradient of token t's running sum is what it
    read, times its gradient, less what is read of what it wrote, times theirs; that of its log decay sums those of t and after.
    """
    item = tl.program_id(2).to(tl.int64)
    t, exists = _tokens(length, REVERSE, BLOCK_T)
    x += item * x_item
    grad += item * grad_item
    dx += item * length * heads * P
    dt += item * length * heads
    ddt += item * length * heads
    write = _load(B + item * B_item, B_token, t, exists, N, BLOCK_N)
    read = _load(C + item * C_item, C_token, t, exists, N, BLOCK_N)
    scores = tl.dot(read, tl.trans(write), input_precision="ieee")
    d_scores = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    d_write = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    d_read = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    first = tl.program_id(0) * GROUP
    num_sums = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * heads
    for head in range(first, tl.minimum(first + GROUP, heads)):
        step, rate, log_decay = _steps(dt, A, heads, head, t, exists)
        total = tl.sum(step * rate, axis=0)
        values = _load(x + head * P, x_token, t, exists, P, BLOCK_P)
        dy = _load(grad + head * P, grad_token, t, exists, P, BLOCK_P)
        exact_values, exact_dy = values.to(tl.float32), dy.to(tl.float32)
        place = (item * tl.num_programs(1) + tl.program_id(1)) * heads + head
        before = _load_state(states, place, N, P, BLOCK_N, BLOCK_P)
        d_after = _load_state(dstates, place, N, P, BLOCK_N, BLOCK_P)
        of_total = tl.exp(total) * tl.sum(
            tl.sum(before.to(tl.float32) * d_after.to(tl.float32), axis=1), axis=0
        )
        from_start, to_end = tl.exp(log_decay), tl.exp(total - log_decay)
        decays = _decays(log_decay, BLOCK_T)

        d_weights = tl.dot(dy, tl.trans(values), input_precision="ieee") * decays * step[None, :]
        d_scores += d_weights
        d_read += tl.dot(
            (exact_dy * from_start[:, None]).to(read.dtype), tl.trans(before), input_precision="ieee"
        )
        written = exact_values * (step * to_end)[:, None]
        d_write += tl.dot(written.to(read.dtype), tl.trans(d_after), input_precision="ieee")

        later = tl.dot(write, d_after, input_precision="ieee") * to_end[:, None]
        d_steps = tl.dot(tl.trans((scores * decays).to(read.dtype)), dy, input_precision="ieee") + later
        d_values = d_steps * step[:, None] + tl.load(D + head) * exact_dy
        _store(dx + head * P, d_values, heads * P, t, exists, P, BLOCK_P)

        within = d_weights * scores
        earlier = tl.dot(read, before, input_precision="ieee") * from_start[:, None]
        kept = tl.sum(exact_values * later, axis=1) * step
        d_sums = tl.sum(within, axis=1) - tl.sum(within, axis=0) + tl.sum(exact_dy * earlier, axis=1) - kept
        d_log = tl.cumsum(d_sums, axis=0, reverse=True) + of_total + tl.sum(kept, axis=0)
        d_step = d_log * rate + tl.sum(exact_values * d_steps, axis=1)
        tl.store(ddt + t * heads + head, d_step, mask=exists)
        tl.store(of_heads + place, tl.sum(d_log * step, axis=0))
        tl.store(of_heads + num_sums + place, tl.sum(tl.sum(exact_dy * exact_values, axis=1), axis=0))
    d_write += tl.dot(tl.trans(d_scores.to(read.dtype)), read, input_precision="ieee")
    d_read += tl.dot(d_scores.to(read.dtype), write, input_precision="ieee")
    num_rows = tl.num_programs(2).to(tl.int64) * length
    of_states += (tl.program_id(0) * num_rows + item * length) * N
    _store(of_states, d_write, N, t, exists, N, BLOCK_N)
    _store(of_states + tl.num_programs(0) * num_rows * N, d_read, N, t, exists, N, BLOCK_N)

"""Triton kernels of window attention; `window.py` beside this launches them.

A program takes, of a head, a tile of TILE_R x TILE_C image tokens of a frame, and goes through what the tile sees: the box of image tokens around it
in raster order, then the other tokens. Queries are the image's, [B, H, N, K]; keys and values are of all tokens, the image's after
`before` others. Scores are in powers of two, and held in float32 as all that is added up.
"""

from typing import no_type_check

import triton
import triton.language as tl

from .heads import load_tokens, store_tokens, stride_names


@triton.jit
@no_type_check
def _first(place, size, reach, SHIFTED: tl.constexpr):
    """First place that the window of a query at `place` holds, along an axis; the last is 2 * reach further."""
    first = place - reach
    if SHIFTED:
        first = tl.minimum(tl.maximum(first, 0), size - 2 * reach - 1)
    return first


@triton.jit
@no_type_check
def _near(place, first, reach):
    return (place >= first) & (place <= first + 2 * reach)


@triton.jit
@no_type_check
def _keys_of(start, stop, size, reach, SHIFTED: tl.constexpr):
    """Start and number of the places that queries from `start` up to `stop` see."""
    stop = tl.minimum(stop, size)
    first = tl.maximum(_first(start, size, reach, SHIFTED), 0)
    last = tl.minimum(_first(stop - 1, size, reach, SHIFTED) + 2 * reach, size - 1)
    return first, last - first + 1


@triton.jit
@no_type_check
def _queries_of(start, stop, size, reach, SHIFTED: tl.constexpr):
    """Start and number of the places that see keys from `start` up to `stop`."""
    stop = tl.minimum(stop, size)
    first = tl.maximum(start - reach, 0)
    last = tl.minimum(stop - 1 + reach, size - 1)
    if SHIFTED:
        first = tl.where(start <= 2 * reach, 0, first)
        last = tl.where(stop - 1 >= size - 1 - 2 * reach, size - 1, last)
    return first, last - first + 1


@triton.jit
@no_type_check
def _tile(tile, rows, cols, TILE_R: tl.constexpr, TILE_C: tl.constexpr):
    """Frame, first row and first column of a tile."""
    across = tl.cdiv(cols, TILE_C)
    down = tl.cdiv(rows, TILE_R)
    return tile // (across * down), (tile // across) % down * TILE_R, tile % across * TILE_C


@triton.jit
@no_type_check
def _seen_keys(
    n,
    frame,
    row,
    col,
    frame0,
    num_frames,
    row0,
    num_rows,
    col0,
    num_cols,
    is_key,
    num_keys,
    before,
    frames,
    rows,
    cols,
    reach_frames,
    reach_rows,
    reach_cols,
    SHIFTED: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Tokens of the n-th keys of a box and of the others after it, whether they exist, and which queries see them [queries, keys]."""
    num_image = frames * rows * cols
    in_box = n < num_frames * num_rows * num_cols
    key_frame = frame0 + n // (num_rows * num_cols)
    key_row = row0 + (n // num_cols) % num_rows
    key_col = col0 + n % num_cols
    other = n - num_frames * num_rows * num_cols
    other = tl.where(other < before, other, other + num_image)
    token = tl.where(in_box, before + (key_frame * rows + key_row) * cols + key_col, other)
    exists = token < num_keys
    is_seen = exists
    if HAS_MASK:
        is_seen = is_seen & (tl.load(is_key + token, mask=exists, other=0) != 0)
    near = _near(key_frame, _first(frame, frames, reach_frames, SHIFTED), reach_frames)[None, :]
    near = near & _near(key_row[None, :], _first(row, rows, reach_rows, SHIFTED)[:, None], reach_rows)
    near = near & _near(key_col[None, :], _first(col, cols, reach_cols, SHIFTED)[:, None], reach_cols)
    return token, exists, is_seen[None, :] & (near | (~in_box)[None, :])


def _numbers(*tensors: str) -> list[str]:
    """Arguments whose values do not trigger a recompile: strides and sizes."""
    reach = ["reach_frames", "reach_rows", "reach_cols"]
    return [*stride_names(*tensors), "heads", "num_keys", "before", "frames", "rows", "cols", *reach]


@triton.jit(do_not_specialize=_numbers("q", "k", "v", "out"))
@no_type_check
def forward_kernel(
    q,
    k,
    v,
    is_key,
    out,
    lse,
    q_item,
    q_head,
    q_token,
    k_item,
    k_head,
    k_token,
    v_item,
    v_head,
    v_token,
    out_item,
    out_head,
    out_token,
    heads,
    num_keys,
    before,
    frames,
    rows,
    cols,
    reach_frames,
    reach_rows,
    reach_cols,
    scale,
    SHIFTED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Attention of a tile of queries, and the logarithm (of base 2) of what its weights are divided by."""
    frame, row0, col0 = _tile(tl.program_id(1), rows, cols, TILE_R, TILE_C)
    head, item = tl.program_id(0), tl.program_id(2).to(tl.int64)
    q += (item * q_item + head * q_head) * UNIT
    k += (item * k_item + head * k_head) * UNIT
    v += (item * v_item + head * v_head) * UNIT
    out += (item * out_item + head * out_head) * UNIT
    if HAS_MASK:
        is_key += item * num_keys
    m = tl.arange(0, TILE_R * TILE_C)
    row, col = row0 + m // TILE_C, col0 + m % TILE_C
    exists = (row < rows) & (col < cols)
    token = (frame * rows + row) * cols + col
    queries = load_tokens(q, q_token, token, exists, K, BLOCK_K, UNIT)
    frame0, num_frames = _keys_of(frame, frame + 1, frames, reach_frames, SHIFTED)
    key_row0, num_rows = _keys_of(row0, row0 + TILE_R, rows, reach_rows, SHIFTED)
    key_col0, num_cols = _keys_of(col0, col0 + TILE_C, cols, reach_cols, SHIFTED)
    num_seen = num_frames * num_rows * num_cols + num_keys - frames * rows * cols

    top = tl.full([TILE_R * TILE_C], float("-inf"), tl.float32)
    total = tl.zeros([TILE_R * TILE_C], tl.float32)
    mixed = tl.zeros([TILE_R * TILE_C, BLOCK_V], tl.float32)
    for start in range(0, num_seen, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        key_token, key_exists, seen = _seen_keys(
            n, frame, row, col, frame0, num_frames, key_row0, num_rows, key_col0, num_cols, is_key, num_keys, before,
            frames, rows, cols, reach_frames, reach_rows, reach_cols, SHIFTED, HAS_MASK,
        )  # fmt: skip
        keys = load_tokens(k, k_token, key_token, key_exists, K, BLOCK_K, UNIT)
        values = load_tokens(v, v_token, key_token, key_exists, V, BLOCK_V, UNIT)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        # a query that has seen nothing yet has no top to subtract
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(weights, axis=1)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(weights.to(values.dtype), values, mixed, input_precision="ieee")
        top = new_top
    sees_any = total > 0
    total = tl.where(sees_any, total, 1.0)
    store_tokens(out, mixed / total[:, None], out_token, token, exists, V, BLOCK_V, UNIT)
    lse += (item * heads + head) * frames * rows * cols
    tl.store(lse + token, tl.where(sees_any, top + tl.log2(total), 0.0), mask=exists)


@triton.jit(do_not_specialize=_numbers("q", "k", "v", "out", "grad", "dq"))
@no_type_check
def query_backward_kernel(
    q,
    k,
    v,
    is_key,
    out,
    grad,
    lse,
    delta,
    dq,
    q_item,
    q_head,
    q_token,
    k_item,
    k_head,
    k_token,
    v_item,
    v_head,
    v_token,
    out_item,
    out_head,
    out_token,
    grad_item,
    grad_head,
    grad_token,
    dq_item,
    dq_head,
    dq_token,
    heads,
    num_keys,
    before,
    frames,
    rows,
    cols,
    reach_frames,
    reach_rows,
    reach_cols,
    scale,
    grad_scale,
    SHIFTED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Gradient of a tile of queries, and `delta`, the product of its output and the output's gradient."""
    frame, row0, col0 = _tile(tl.program_id(1), rows, cols, TILE_R, TILE_C)
    head, item = tl.program_id(0), tl.program_id(2).to(tl.int64)
    q += (item * q_item + head * q_head) * UNIT
    k += (item * k_item + head * k_head) * UNIT
    v += (item * v_item + head * v_head) * UNIT
    out += (item * out_item + head * out_head) * UNIT
    grad += (item * grad_item + head * grad_head) * UNIT
    dq += (item * dq_item + head * dq_head) * UNIT
    if HAS_MASK:
        is_key += item * num_keys
    lse += (item * heads + head) * frames * rows * cols
    delta += (item * heads + head) * frames * rows * cols
    m = tl.arange(0, TILE_R * TILE_C)
    row, col = row0 + m // TILE_C, col0 + m % TILE_C
    exists = (row < rows) & (col < cols)
    token = (frame * rows + row) * cols + col
    queries = load_tokens(q, q_token, token, exists, K, BLOCK_K, UNIT)
    d_out = load_tokens(grad, grad_token, token, exists, V, BLOCK_V, UNIT)
    output = load_tokens(out, out_token, token, exists, V, BLOCK_V, UNIT)
    log_total = tl.load(lse + token, mask=exists, other=0.0)
    own_delta = tl.sum(output.to(tl.float32) * d_out.to(tl.float32), axis=1)
    tl.store(delta + token, own_delta, mask=exists)
    frame0, num_frames = _keys_of(frame, frame + 1, frames, reach_frames, SHIFTED)
    key_row0, num_rows = _keys_of(row0, row0 + TILE_R, rows, reach_rows, SHIFTED)
    key_col0, num_cols = _keys_of(col0, col0 + TILE_C, cols, reach_cols, SHIFTED)
    num_seen = num_frames * num_rows * num_cols + num_keys - frames * rows * cols

    d_queries = tl.zeros([TILE_R * TILE_C, BLOCK_K], tl.float32)
    for start in range(0, num_seen, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        key_token, key_exists, seen = _seen_keys(
            n, frame, row, col, frame0, num_frames, key_row0, num_rows, key_col0, num_cols, is_key, num_keys, before,
            frames, rows, cols, reach_frames, reach_rows, reach_cols, SHIFTED, HAS_MASK,
        )  # fmt: skip
        keys = load_tokens(k, k_token, key_token, key_exists, K, BLOCK_K, UNIT)
        values = load_tokens(v, v_token, key_token, key_exists, V, BLOCK_V, UNIT)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        weights = tl.where(seen, tl.exp2(scores - log_total[:, None]), 0.0)
        d_weights = tl.dot(d_out, tl.trans(values), input_precision="ieee")
        d_scores = weights * (d_weights - own_delta[:, None])
        d_queries = tl.dot(d_scores.to(keys.dtype), keys, d_queries, input_precision="ieee")
    store_tokens(dq, d_queries * grad_scale, dq_token, token, exists, K, BLOCK_K, UNIT)


@triton.jit(do_not_specialize=_numbers("q", "k", "v", "grad", "dk", "dv"))
@no_type_check
def key_backward_kernel(
    q,
    k,
    v,
    is_key,
    grad,
    lse,
    delta,
    dk,
    dv,
    q_item,
    q_head,
    q_token,
    k_item,
    k_head,
    k_token,
    v_item,
    v_head,
    v_token,
    grad_item,
    grad_head,
    grad_token,
    dk_item,
    dk_head,
    dk_token,
    dv_item,
    dv_head,
    dv_token,
    heads,
    num_keys,
    before,
    frames,
    rows,
    cols,
    reach_frames,
    reach_rows,
    reach_cols,
    scale,
    grad_scale,
    OF_OTHERS: tl.constexpr,
    SHIFTED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Gradients of a tile of keys and their values, from the queries that see it; or of a run of others, which all queries see."""
    head, item = tl.program_id(0), tl.program_id(2).to(tl.int64)
    q += (item * q_item + head * q_head) * UNIT
    k += (item * k_item + head * k_head) * UNIT
    v += (item * v_item + head * v_head) * UNIT
    grad += (item * grad_item + head * grad_head) * UNIT
    dk += (item * dk_item + head * dk_head) * UNIT
    dv += (item * dv_item + head * dv_head) * UNIT
    if HAS_MASK:
        is_key += item * num_keys
    lse += (item * heads + head) * frames * rows * cols
    delta += (item * heads + head) * frames * rows * cols
    n = tl.arange(0, TILE_R * TILE_C)
    if OF_OTHERS:
        other = tl.program_id(1) * TILE_R * TILE_C + n
        key_token = tl.where(other < before, other, other + frames * rows * cols)
        exists = key_token < num_keys
        frame, row, col = 0, n, n
        frame0, num_frames, row0, num_rows, col0, num_cols = 0, frames, 0, rows, 0, cols
    else:
        frame, tile_row, tile_col = _tile(tl.program_id(1), rows, cols, TILE_R, TILE_C)
        row, col = tile_row + n // TILE_C, tile_col + n % TILE_C
        key_token = before + (frame * rows + row) * cols + col
        exists = (row < rows) & (col < cols)
        frame0, num_frames = _queries_of(frame, frame + 1, frames, reach_frames, SHIFTED)
        row0, num_rows = _queries_of(tile_row, tile_row + TILE_R, rows, reach_rows, SHIFTED)
        col0, num_cols = _queries_of(tile_col, tile_col + TILE_C, cols, reach_cols, SHIFTED)
    keys = load_tokens(k, k_token, key_token, exists, K, BLOCK_K, UNIT)
    values = load_tokens(v, v_token, key_token, exists, V, BLOCK_V, UNIT)
    is_seen = exists
    if HAS_MASK:
        is_seen = is_seen & (tl.load(is_key + key_token, mask=exists, other=0) != 0)

    d_keys = tl.zeros([TILE_R * TILE_C, BLOCK_K], tl.float32)
    d_values = tl.zeros([TILE_R * TILE_C, BLOCK_V], tl.float32)
    for start in range(0, num_frames * num_rows * num_cols, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        q_exists = m < num_frames * num_rows * num_cols
        q_frame = frame0 + m // (num_rows * num_cols)
        q_row = row0 + (m // num_cols) % num_rows
        q_col = col0 + m % num_cols
        token = (q_frame * rows + q_row) * cols + q_col
        seen = is_seen[:, None] & q_exists[None, :]
        if not OF_OTHERS:
            seen = seen & _near(frame, _first(q_frame, frames, reach_frames, SHIFTED), reach_frames)[None, :]
            seen = seen & _near(row[:, None], _first(q_row, rows, reach_rows, SHIFTED)[None, :], reach_rows)
            seen = seen & _near(col[:, None], _first(q_col, cols, reach_cols, SHIFTED)[None, :], reach_cols)
        queries = load_tokens(q, q_token, token, q_exists, K, BLOCK_K, UNIT)
        d_out = load_tokens(grad, grad_token, token, q_exists, V, BLOCK_V, UNIT)
        log_total = tl.load(lse + token, mask=q_exists, other=0.0)
        q_delta = tl.load(delta + token, mask=q_exists, other=0.0)
        scores = tl.dot(keys, tl.trans(queries), input_precision="ieee") * scale
        weights = tl.where(seen, tl.exp2(scores - log_total[None, :]), 0.0)
        d_values = tl.dot(weights.to(d_out.dtype), d_out, d_values, input_precision="ieee")
        d_weights = tl.dot(values, tl.trans(d_out), input_precision="ieee")
        d_scores = weights * (d_weights - q_delta[None, :])
        d_keys = tl.dot(d_scores.to(queries.dtype), queries, d_keys, input_precision="ieee")
    store_tokens(dk, d_keys * grad_scale, dk_token, key_token, exists, K, BLOCK_K, UNIT)
    store_tokens(dv, d_values, dv_token, key_token, exists, V, BLOCK_V, UNIT)

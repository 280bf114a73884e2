"""Triton kernels of linear attention; `linear.py` beside this launches them.

A program takes, of a head, a run of `run` tokens, BLOCK_N at a time. What it makes of keys, or of queries' gradients, is one matrix
[V + 1, K]: sums of values weighted by each feature, and in the last row the sums of the features. It is held in float32, divided by
the number of keys, so that it is as large in long sequences as in short ones. Operands of products are of v's precision.
"""

from typing import no_type_check

import triton
import triton.language as tl

from .heads import load_tokens, store_tokens, stride_names


@triton.jit
@no_type_check
def _features(x, seen, root, FEATURE_MAP: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """phi of vectors times `root`, in float32; zero beyond K and for tokens that are not seen."""
    x = x.to(tl.float32) * root
    is_channel = tl.arange(0, BLOCK_K) < K
    if FEATURE_MAP == "elu":
        y = tl.where(x > 0, x + 1, tl.exp(x))
    elif FEATURE_MAP == "relu":
        y = tl.where(x < 0, 0.0, x)
    else:
        x = tl.where(is_channel[None, :], x, float("-inf"))
        y = tl.exp(x - tl.max(x, axis=1)[:, None])
        y *= (1 / tl.sum(y, axis=1))[:, None]
    return tl.where(seen[:, None] & is_channel[None, :], y, 0.0)


@triton.jit
@no_type_check
def _d_features(dy, x, y, root, FEATURE_MAP: tl.constexpr):
    """Gradient of vectors x from that of their features y."""
    x = x.to(tl.float32)
    if FEATURE_MAP == "elu":
        dx = tl.where(x > 0, dy, dy * y)
    elif FEATURE_MAP == "relu":
        dx = tl.where(x > 0, dy, 0.0)
    else:
        dx = y * (dy - tl.sum(y * dy, axis=1)[:, None])
    return dx * root


@triton.jit
@no_type_check
def _within(x, dtype: tl.constexpr):
    """x in another precision; what no key shares a feature with has weights that can be larger than fp16 holds."""
    if dtype == tl.float16:
        x = tl.clamp(x, -6e4, 6e4)
    return x.to(dtype)


@triton.jit
@no_type_check
def _seen_keys(is_key, token, num_keys, HAS_MASK: tl.constexpr):
    seen = token < num_keys
    if HAS_MASK:
        seen = seen & (tl.load(is_key + token, mask=seen, other=0) != 0)
    return seen


@triton.jit
@no_type_check
def _load_sums(sums, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """The program's sums of values [BLOCK_V, BLOCK_K] and of features [BLOCK_K], zero beyond V and K."""
    sums += (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (V + 1) * K
    d, e = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    mixed = tl.load(sums + e[:, None] * K + d[None, :], mask=(e < V)[:, None] & (d < K)[None, :], other=0.0)
    return mixed, tl.load(sums + V * K + d, mask=d < K, other=0.0)


@triton.jit
@no_type_check
def _store_sums(
    sums, mixed, total, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Write a program's sums to its own place in [runs, B, H, V + 1, K]."""
    run = (tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)).to(tl.int64)
    sums += (run * tl.num_programs(0) + tl.program_id(0)) * (V + 1) * K
    d, e = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    tl.store(sums + e[:, None] * K + d[None, :], mixed, mask=(e < V)[:, None] & (d < K)[None, :])
    tl.store(sums + V * K + d, total, mask=d < K)


@triton.jit(do_not_specialize=[*stride_names("k", "v"), "num_keys", "run"])
@no_type_check
def key_kernel(
    k,
    v,
    is_key,
    sums,
    k_item,
    k_head,
    k_token,
    v_item,
    v_head,
    v_token,
    num_keys,
    run,
    share,
    root,
    HAS_MASK: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Sums over a run of keys; `share` is 1 / keys."""
    head, item = tl.program_id(0), tl.program_id(2).to(tl.int64)
    k += (item * k_item + head * k_head) * UNIT
    v += (item * v_item + head * v_head) * UNIT
    if HAS_MASK:
        is_key += item * num_keys
    mixed = tl.zeros([BLOCK_V, BLOCK_K], tl.float32)
    total = tl.zeros([BLOCK_K], tl.float32)
    first = tl.program_id(1) * run
    for start in range(first, tl.minimum(first + run, num_keys), BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        exists = token < num_keys
        keys = load_tokens(k, k_token, token, exists, K, BLOCK_K, UNIT)
        values = load_tokens(v, v_token, token, exists, V, BLOCK_V, UNIT)
        seen = _seen_keys(is_key, token, num_keys, HAS_MASK)
        weights = _features(keys, seen, root, FEATURE_MAP, K, BLOCK_K).to(values.dtype)
        mixed = tl.dot(tl.trans(values), weights, mixed, input_precision="ieee")
        total += tl.sum(weights.to(tl.float32), axis=0)
    _store_sums(sums, mixed * share, total * share, K, V, BLOCK_K, BLOCK_V)


@triton.jit(do_not_specialize=[*stride_names("q", "out"), "num_queries", "run"])
@no_type_check
def query_kernel(
    q,
    sums,
    out,
    q_item,
    q_head,
    q_token,
    out_item,
    out_head,
    out_token,
    num_queries,
    run,
    epsilon,
    root,
    FEATURE_MAP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Attention of a run of queries, from the sums over all keys."""
    head, item = tl.program_id(0), tl.program_id(2).to(tl.int64)
    q += (item * q_item + head * q_head) * UNIT
    out += (item * out_item + head * out_head) * UNIT
    summed, total = _load_sums(sums, K, V, BLOCK_K, BLOCK_V)
    summed = summed.to(out.dtype.element_ty)
    first = tl.program_id(1) * run
    for start in range(first, tl.minimum(first + run, num_queries), BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        exists = token < num_queries
        queries = load_tokens(q, q_token, token, exists, K, BLOCK_K, UNIT)
        features = _features(queries, exists, root, FEATURE_MAP, K, BLOCK_K).to(summed.dtype)
        inverse = 1 / (tl.sum(features.to(tl.float32) * total[None, :], axis=1) + epsilon)
        mixed = tl.dot(features, tl.trans(summed), input_precision="ieee")
        store_tokens(out, mixed * inverse[:, None], out_token, token, exists, V, BLOCK_V, UNIT)


@triton.jit(do_not_specialize=[*stride_names("q", "grad", "dq"), "num_queries", "run"])
@no_type_check
def query_backward_kernel(
    q,
    grad,
    sums,
    dq,
    d_sums,
    q_item,
    q_head,
    q_token,
    grad_item,
    grad_head,
    grad_token,
    dq_item,
    dq_head,
    dq_token,
    num_queries,
    run,
    epsilon,
    root,
    FEATURE_MAP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Gradients of a run of queries, and the run's sums of the gradients of `sums`.

    Values are taken from their mean `centre`, which changes nothing in the gradient of q but keeps what is left when nearly
    equal numbers are subtracted.
    """
    head, item = tl.program_id(0), tl.program_id(2).to(tl.int64)
    q += (item * q_item + head * q_head) * UNIT
    grad += (item * grad_item + head * grad_head) * UNIT
    dq += (item * dq_item + head * dq_head) * UNIT
    summed, total = _load_sums(sums, K, V, BLOCK_K, BLOCK_V)
    centre = tl.sum(summed, axis=1) / (tl.sum(total, axis=0) + 1e-30)
    summed = (summed - centre[:, None] * total[None, :]).to(grad.dtype.element_ty)
    d_summed = tl.zeros([BLOCK_V, BLOCK_K], tl.float32)
    d_total = tl.zeros([BLOCK_K], tl.float32)
    first = tl.program_id(1) * run
    for start in range(first, tl.minimum(first + run, num_queries), BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        exists = token < num_queries
        queries = load_tokens(q, q_token, token, exists, K, BLOCK_K, UNIT)
        d_out = load_tokens(grad, grad_token, token, exists, V, BLOCK_V, UNIT)
        exact = _features(queries, exists, root, FEATURE_MAP, K, BLOCK_K)
        features = exact.to(d_out.dtype).to(tl.float32)
        inverse = 1 / (tl.sum(features * total[None, :], axis=1) + epsilon)
        pulled = tl.dot(d_out, summed, input_precision="ieee")  # [queries, K]
        of_centre = tl.sum(d_out.to(tl.float32) * centre[None, :], axis=1)
        own = tl.sum(features * pulled, axis=1) * inverse
        lost = of_centre * epsilon * inverse
        d_exact = (pulled - (own - lost)[:, None] * total[None, :]) * inverse[:, None]
        d_queries = _d_features(d_exact, queries, exact, root, FEATURE_MAP)
        store_tokens(dq, d_queries, dq_token, token, exists, K, BLOCK_K, UNIT)
        shares = _within(features * inverse[:, None], d_out.dtype)
        d_summed = tl.dot(tl.trans(d_out), shares, d_summed, input_precision="ieee")
        delta = own + of_centre - lost  # product of output and gradient
        d_total -= tl.sum(shares.to(tl.float32) * delta[:, None], axis=0)
    _store_sums(d_sums, d_summed, d_total, K, V, BLOCK_K, BLOCK_V)


@triton.jit(do_not_specialize=[*stride_names("k", "v", "dk", "dv"), "num_keys", "run"])
@no_type_check
def key_backward_kernel(
    k,
    v,
    is_key,
    d_sums,
    dk,
    dv,
    k_item,
    k_head,
    k_token,
    v_item,
    v_head,
    v_token,
    dk_item,
    dk_head,
    dk_token,
    dv_item,
    dv_head,
    dv_token,
    num_keys,
    run,
    share,
    root,
    HAS_MASK: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Gradients of a run of keys and their values, from the gradients of the sums."""
    head, item = tl.program_id(0), tl.program_id(2).to(tl.int64)
    k += (item * k_item + head * k_head) * UNIT
    v += (item * v_item + head * v_head) * UNIT
    dk += (item * dk_item + head * dk_head) * UNIT
    dv += (item * dv_item + head * dv_head) * UNIT
    if HAS_MASK:
        is_key += item * num_keys
    d_summed, d_total = _load_sums(d_sums, K, V, BLOCK_K, BLOCK_V)
    d_summed = _within(d_summed, v.dtype.element_ty)
    first = tl.program_id(1) * run
    for start in range(first, tl.minimum(first + run, num_keys), BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        exists = token < num_keys
        keys = load_tokens(k, k_token, token, exists, K, BLOCK_K, UNIT)
        values = load_tokens(v, v_token, token, exists, V, BLOCK_V, UNIT)
        seen = _seen_keys(is_key, token, num_keys, HAS_MASK)
        exact = _features(keys, seen, root, FEATURE_MAP, K, BLOCK_K)
        d_values = tl.dot(exact.to(values.dtype), tl.trans(d_summed), input_precision="ieee") * share
        store_tokens(dv, d_values, dv_token, token, exists, V, BLOCK_V, UNIT)
        d_exact = tl.dot(values, d_summed, input_precision="ieee") + d_total[None, :]
        d_keys = _d_features(d_exact * share, keys, exact, root, FEATURE_MAP)
        d_keys = tl.where(seen[:, None], d_keys, 0.0)
        store_tokens(dk, d_keys, dk_token, token, exists, K, BLOCK_K, UNIT)

"""Triton kernels of the norm of gated tokens; `gated_norm.py` beside this launches them. What is added up is held in float32."""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _product(y, back, gate, place, gate_place, inside, HAS_BACK: tl.constexpr):
    """The gated token, and y, z and sigmoid(z) that it is made of, in float32."""
    value = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_BACK:
        value = (value + tl.load(back + place, mask=inside, other=0.0).to(tl.float32)) * 0.5
    z = tl.load(gate + gate_place, mask=inside, other=0.0).to(tl.float32)
    share = 1 / (1 + tl.exp(-z))
    return value * z * share, value, z, share


@triton.jit
@no_type_check
def norm_kernel(
    y,
    back,
    gate,
    weight,
    out,
    scale,
    gate_token,
    dim,
    eps,
    HAS_BACK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The normed token, and the inverse of its root mean square."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < dim
    u, _, _, _ = _product(y, back, gate, t * dim + d, t * gate_token + d, inside, HAS_BACK)
    inverse = 1 / tl.sqrt(tl.sum(u * u, axis=0) / dim + eps)
    factor = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + t * dim + d, (u * inverse * factor).to(out.dtype.element_ty), mask=inside)
    tl.store(scale + t, inverse)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
@no_type_check
def norm_backward_kernel(
    grad,
    y,
    back,
    gate,
    weight,
    scale,
    dy,
    dgate,
    partial,
    gate_token,
    num_tokens,
    num_rows,
    dim,
    HAS_BACK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of y, or of y and `back` each, and of the gate; and of the weight, one sum of a program's `num_rows` tokens."""
    d = tl.arange(0, BLOCK_D)
    inside = d < dim
    factor = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros([BLOCK_D], tl.float32)
    first = tl.program_id(0).to(tl.int64) * num_rows
    for row in range(num_rows):
        t = first + row
        seen = inside & (tl.zeros_like(d) + t < num_tokens)
        place = t * dim + d
        u, value, z, share = _product(y, back, gate, place, t * gate_token + d, seen, HAS_BACK)
        inverse = tl.load(scale + tl.minimum(t, num_tokens - 1))
        normed = u * inverse
        own = tl.load(grad + place, mask=seen, other=0.0).to(tl.float32)
        sums += own * normed
        own *= factor
        du = inverse * (own - normed * (tl.sum(own * normed, axis=0) / dim))
        of_value = du * z * share
        if HAS_BACK:
            of_value *= 0.5
        tl.store(dy + place, of_value.to(dy.dtype.element_ty), mask=seen)
        of_gate = du * value * share * (1 + z * (1 - share))
        tl.store(dgate + place, of_gate.to(dgate.dtype.element_ty), mask=seen)
    tl.store(partial + tl.program_id(0).to(tl.int64) * dim + d, sums, mask=inside)

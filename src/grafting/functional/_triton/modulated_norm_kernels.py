"""Triton kernels of the modulated norm; `modulated_norm.py` beside this launches them. What is added up is held in float32."""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _normed(x, dim, eps, inside):
    """A token less its mean, over its standard deviation, and the inverse of that; x is float32, and zero outside."""
    centred = tl.where(inside, x - tl.sum(x, axis=0) / dim, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / dim + eps)
    return centred * inverse, inverse


@triton.jit(do_not_specialize=["length"])
@no_type_check
def norm_kernel(x, shift, scale, out, shift_item, scale_item, length, dim, eps, BLOCK_D: tl.constexpr):
    """The normed token, scaled and shifted."""
    item = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < dim
    place = (item * length + tl.program_id(0)) * dim + d
    normed, _ = _normed(tl.load(x + place, mask=inside, other=0.0).to(tl.float32), dim, eps, inside)
    factor = 1 + tl.load(scale + item * scale_item + d, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(shift + item * shift_item + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (normed * factor + added).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "num_rows"])
@no_type_check
def norm_backward_kernel(
    grad, x, scale, dx, partial, scale_item, length, num_rows, dim, eps, BLOCK_D: tl.constexpr
):
    """The gradient of x; and of shift and scale, one sum each of a program's `num_rows` tokens, in `partial` [2, programs, dim]."""
    item = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < dim
    factor = 1 + tl.load(scale + item * scale_item + d, mask=inside, other=0.0).to(tl.float32)
    of_shift, of_scale = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    first = tl.program_id(0) * num_rows
    for row in range(num_rows):
        t = first + row
        seen = inside & (tl.zeros_like(d) + t < length)
        place = (item * length + t) * dim + d
        normed, inverse = _normed(tl.load(x + place, mask=seen, other=0.0).to(tl.float32), dim, eps, seen)
        own = tl.load(grad + place, mask=seen, other=0.0).to(tl.float32)
        of_shift += own
        of_scale += own * normed
        own *= factor
        rest = own - tl.sum(own, axis=0) / dim - normed * (tl.sum(own * normed, axis=0) / dim)
        tl.store(dx + place, (rest * inverse).to(dx.dtype.element_ty), mask=seen)
    program = item * tl.num_programs(0) + tl.program_id(0)
    num_programs = tl.num_programs(1).to(tl.int64) * tl.num_programs(0)
    tl.store(partial + program * dim + d, of_shift, mask=inside)
    tl.store(partial + (num_programs + program) * dim + d, of_scale, mask=inside)

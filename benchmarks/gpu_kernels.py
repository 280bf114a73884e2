"""How much faster the Triton kernels are than the plain path and than dense attention, and how near to what memory allows.

    python benchmarks/gpu_kernels.py [--quick] [--toy]

Each kernel is first compared with the plain path, outputs and gradients, and only then timed: medians by CUDA events, warmed up, over
inputs that are rotated so that none is left in a cache. A floor is the time that the inputs and outputs take to be read and
written once, at the measured speed of a copy. Prints a table, then the same as JSON. Takes a minute or so on an H100. Without CUDA,
or with --toy, small sizes run on the CPU, plain against plain, which only shows that this script works. Exit status 1 when a
kernel is wrong or a goal is missed.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from grafting.contract import Grid, TokenLayout
from grafting.functional import _triton
from grafting.functional.gated_conv import Filter, gated_channels, gated_conv, silu_conv
from grafting.functional.gated_norm import gated_norm
from grafting.functional.linear import linear_attention
from grafting.functional.modulated_norm import modulated_norm
from grafting.functional.ssd import ssd
from grafting.functional.window import window_1d, window_2d

NUM_INPUTS = 3
TOLERANCE = 2e-2  # relative RMS between two ways to compute in bf16
# times faster than the best dense attention, forward and backward
WINDOW_GOAL = 8.0
LINEAR_GOAL = 1.0
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
# so long the GPU waits before each timed call, so that Python is ahead of it: 2 ms or so
CYCLES_AHEAD = 4_000_000

Step = Callable[..., list[Tensor]]


@dataclass(frozen=True)
class Row:
    """One call timed: milliseconds of the kernels, of the plain path and of the best dense attention, and the floor."""

    name: str
    part: str
    fused_ms: float
    plain_ms: float
    dense_ms: float | None
    dense_backend: str
    floor_ms: float | None
    error: float
    goal: float | None

    @property
    def passed(self) -> bool:
        is_slow = self.part == "both" and self.goal is not None and self.dense_ms < self.goal * self.fused_ms
        return self.error <= TOLERANCE and not is_slow


@dataclass(frozen=True)
class Case:
    """A function of inputs, with `forward_bytes` and `backward_bytes` that it cannot but move.

    That of an attention has a goal: how many times faster than dense attention it is to be.
    """

    name: str
    inputs: list[list[Tensor]]
    call: Callable[..., Tensor]
    forward_bytes: int
    backward_bytes: int
    goal: float | None = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cases only")
    parser.add_argument("--toy", action="store_true", help="small sizes on the CPU, plain against plain")
    args = parser.parse_args()
    torch.manual_seed(0)
    toy = args.toy or not torch.cuda.is_available()
    device = torch.device("cpu" if toy else "cuda")
    if toy:
        print("toy sizes on the CPU, plain against plain: times mean nothing")
    elif not _triton.ENABLED:
        print(f"the kernels are off ({_triton.VARIABLE}=0, or there is no triton): plain against plain")
    speed = None if toy else copy_speed(device)
    makers = conv_cases, mixer_cases, window_cases, linear_cases
    cases = itertools.chain.from_iterable(make(device, toy, args.quick) for make in makers)
    rows = []
    for case in cases:
        rows += timed(case, speed, toy)
        print(table(rows[-len(PARTS) :], heading=len(rows) == len(PARTS)), flush=True)
        if not toy:
            torch.cuda.empty_cache()
    found = {
        "device": "cpu" if toy else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_gb_per_s": None if speed is None else round(speed / 1e9),
        "rows": [asdict(row) for row in rows],
    }
    print(json.dumps(found))
    return int(not toy and not all(row.passed for row in rows))


def conv_cases(device: torch.device, toy: bool, quick: bool) -> Iterator[Case]:
    """Hyena-X, -SE and -Y between their linears: width 1152, 256 tokens in 1-D and 4,096 in 2-D."""
    dim, many, few, side = (16, 2, 1, 8) if toy else (1152, 64, 4, 64)
    for axes, layout, batch in (
        (1, TokenLayout(Grid(side // 4, side // 4)), many),
        (2, TokenLayout(Grid(side, side)), few),
    ):
        taps = 4 if axes == 1 else 3
        for name in ("x",) if quick else ("x", "se", "y"):
            short = own_filter(3 * dim, taps, axes, device) if name != "y" else None
            inner = own_filter(dim, taps, axes, device) if name != "x" else None
            parameters = [t for f in (short, inner) if f is not None for t in f[:2]]
            shape = (batch, layout.num_tokens, 3 * dim)
            inputs = [[random(shape, device), *parameters] for _ in range(NUM_INPUTS)]
            unit = inputs[0][0].nbytes // 3
            call = conv_call(short is not None, inner is not None, taps // 2, layout)
            yield Case(
                f"hyena-{name} {axes}-D K={taps} [{batch}, {shape[1]}, {dim}]",
                inputs,
                call,
                4 * unit,
                7 * unit,
            )


def conv_call(has_short: bool, has_inner: bool, before: int, layout: TokenLayout) -> Callable[..., Tensor]:
    def call(qkv: Tensor, *parameters: Tensor) -> Tensor:
        short = Filter(*parameters[:2], before) if has_short else None
        inner = Filter(*parameters[-2:], before) if has_inner else None
        return gated_conv(qkv, short, inner, layout)

    return call


def own_filter(dim: int, taps: int, axes: int, device: torch.device) -> Filter:
    weight = torch.randn(dim, 1, *[taps] * axes, device=device) / taps
    return Filter(weight.requires_grad_(), torch.randn(dim, device=device).requires_grad_(), taps // 2)


def mixer_cases(device: torch.device, toy: bool, quick: bool) -> Iterator[Case]:
    """The middle of MLP Hyena-X, the parts of Mamba-2 and DiT's norm, at width 1152 with 16,384 tokens."""
    dim, length = (16, 64) if toy else (1152, 16384)
    inner, heads, state = 2 * dim, 2 * dim // 16, 64
    leaf = partial(torch.randn, device=device, requires_grad=True)

    def case(
        name: str, call: Callable[..., Tensor], shapes: list[tuple[int, ...]], own: list[Tensor]
    ) -> Case:
        inputs = [[*(random((1, length, *s), device) for s in shapes), *own] for _ in range(NUM_INPUTS)]
        read = sum(x.nbytes for x in inputs[0][: len(shapes)])
        written = length * inner * 2
        return Case(f"{name} [1, {length}, {inner}]", inputs, call, read + written, 2 * read + written)

    yield case("mlp-hyena-x K=4", gated_channels, [(3 * inner,)], [leaf(1, 1, 4), leaf(1)])
    steps = torch.rand(1, length, heads, device=device).requires_grad_()
    rates = (-torch.rand(heads, device=device)).requires_grad_()

    def scan(x: Tensor, B: Tensor, C: Tensor, dt: Tensor, A: Tensor, D: Tensor) -> Tensor:
        return ssd(x, dt, A, B, C, D)

    yield case("mamba2 scan", scan, [(heads, 16), (state,), (state,)], [steps, rates, leaf(heads)])
    if quick:
        return
    silu = partial(silu_conv, before=3)
    yield case("mamba2 filter K=4", silu, [(inner,)], [leaf(inner, 1, 4), leaf(inner)])
    norm = partial(gated_norm, eps=1e-5)
    yield case("mamba2 norm", norm, [(inner,)] * 3, [leaf(inner)])
    modulated = partial(modulated_norm, eps=1e-6)
    condition = [leaf(1, 1, inner, dtype=torch.bfloat16) for _ in range(2)]
    yield case("modulated norm", modulated, [(inner,)], condition)


def window_cases(device: torch.device, toy: bool, quick: bool) -> Iterator[Case]:
    """Windows on 128 x 128 tokens, of 16 heads."""
    side, heads = (16, 1) if toy else (128, 16)
    layout = TokenLayout(Grid(side, side))
    cases = [
        ("window-2d r=3", 72, lambda q, k, v: window_2d(q, k, v, layout, radius=3)),
        ("window-1d w=4", 72, lambda q, k, v: window_1d(q, k, v, layout, window=4)),
        ("window-2d r=8", 72, lambda q, k, v: window_2d(q, k, v, layout, radius=min(8, side // 2 - 1))),
        ("window-2d r=3", 64, lambda q, k, v: window_2d(q, k, v, layout, radius=3)),
        ("window-2d r=3", 128, lambda q, k, v: window_2d(q, k, v, layout, radius=3)),
    ]
    for name, head_dim, call in cases[:2] if quick else cases:
        shape = (1, side * side, heads, head_dim)
        inputs = [[random(shape, device).transpose(1, 2) for _ in "qkv"] for _ in range(NUM_INPUTS)]
        inputs = [[x.detach().requires_grad_() for x in qkv] for qkv in inputs]
        unit = inputs[0][0].nbytes
        yield Case(
            f"{name} {side * side} tokens, {heads} x {head_dim}",
            inputs,
            call,
            4 * unit,
            8 * unit,
            goal=WINDOW_GOAL,
        )


def linear_cases(device: torch.device, toy: bool, quick: bool) -> Iterator[Case]:
    """Linear attention of 65,536 tokens in images of 256, 1,024 and 16,384, of 16 heads."""
    total, heads = (512, 2) if toy else (2**16, 16)
    cases = [(1024, 72), (256, 72), (2**14, 72), (1024, 64), (1024, 128)]
    for tokens, head_dim in cases[:1] if quick else cases:
        tokens = min(tokens, total)
        shape = (total // tokens, tokens, heads, head_dim)
        inputs = [[random(shape, device).transpose(1, 2) for _ in "qkv"] for _ in range(NUM_INPUTS)]
        inputs = [[x.detach().requires_grad_() for x in qkv] for qkv in inputs]
        unit = inputs[0][0].nbytes
        name = f"linear {tokens} tokens, {heads} x {head_dim}"
        yield Case(name, inputs, linear_attention, 4 * unit, 7 * unit, goal=LINEAR_GOAL)


def random(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_()


PARTS = ("forward", "both")


def timed(case: Case, speed: float | None, toy: bool) -> list[Row]:
    """The case's rows: forward without gradients, and both passes."""
    grad = torch.randn_like(case.call(*case.inputs[0]))
    steps = {"forward": forward_of(case.call), "both": both_of(case.call, grad)}
    error = difference(steps["both"], case.inputs[0])
    sizes = {"forward": case.forward_bytes, "both": case.forward_bytes + case.backward_bytes}
    rows = []
    for part in PARTS:
        fused_ms = median_ms(steps[part], case.inputs, toy)
        with plain():
            plain_ms = median_ms(steps[part], case.inputs, toy)
        dense = best_dense(part, grad, case.inputs, toy) if case.goal else (None, "")
        floor_ms = None if speed is None else sizes[part] / speed * 1e3
        rows.append(Row(case.name, part, fused_ms, plain_ms, *dense, floor_ms, error, case.goal))
    return rows


def forward_of(call: Callable[..., Tensor]) -> Step:
    def step(*inputs: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [call(*inputs)]

    return step


def both_of(call: Callable[..., Tensor], grad: Tensor) -> Step:
    def step(*inputs: Tensor) -> list[Tensor]:
        y = call(*inputs)
        return [y, *torch.autograd.grad(y, inputs, grad)]

    return step


def difference(step: Step, inputs: list[Tensor]) -> float:
    """The largest relative RMS difference of an output or gradient from the plain path's."""
    got = [x.detach().float() for x in step(*inputs)]
    with plain():
        want = [x.detach().float() for x in step(*inputs)]
    return max(
        float((a - b).square().mean().sqrt() / b.square().mean().sqrt())
        for a, b in zip(got, want, strict=True)
    )


def best_dense(part: str, grad: Tensor, inputs: list[list[Tensor]], toy: bool) -> tuple[float, str]:
    """Milliseconds of the fastest backend of dense attention that takes these inputs, and its name."""
    steps = {
        "forward": forward_of(F.scaled_dot_product_attention),
        "both": both_of(F.scaled_dot_product_attention, grad),
    }
    found = []
    for backend in (SDPBackend.MATH,) if toy else BACKENDS:
        with sdpa_kernel(backend):
            try:
                steps[part](*inputs[0])
            except RuntimeError as refused:  # a backend that does not take this head dim says so
                print(f"{backend.name} takes no part: {str(refused).splitlines()[0]}")
                continue
            found.append((median_ms(steps[part], inputs, toy), backend.name))
    return min(found)


@contextmanager
def plain() -> Iterator[None]:
    """Without the kernels."""
    enabled, _triton.ENABLED = _triton.ENABLED, False
    try:
        yield
    finally:
        _triton.ENABLED = enabled


def median_ms(step: Step, inputs: list[list[Tensor]], toy: bool) -> float:
    elapsed = elapsed_on_cpu_ms if toy else elapsed_on_gpu_ms
    rotated = itertools.cycle(inputs)
    for _ in range(1 if toy else 3):
        step(*next(rotated))
    return statistics.median(elapsed(step, next(rotated)) for _ in range(3 if toy else 15))


def elapsed_on_gpu_ms(step: Step, inputs: list[Tensor]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(CYCLES_AHEAD)
    start.record()
    step(*inputs)
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def elapsed_on_cpu_ms(step: Step, inputs: list[Tensor]) -> float:
    start = time.perf_counter()
    step(*inputs)
    return (time.perf_counter() - start) * 1e3


def copy_speed(device: torch.device) -> float:
    """Bytes read and written a second by a copy of 1 GiB."""
    source = torch.ones(2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_ms(lambda: [target.copy_(source)], [[]], toy=False) / 1e3)


def table(rows: list[Row], *, heading: bool) -> str:
    lines = [
        f"{'':<42}{'part':<9}{'fused ms':>9}{'plain ms':>10}{'dense ms':>10}{'x plain':>9}{'x dense':>9}{'of floor':>10}"
    ]
    for row in rows:
        dense, times = (
            ("", "")
            if row.dense_ms is None
            else (f"{row.dense_ms:.3f}", f"{row.dense_ms / row.fused_ms:.1f}")
        )
        share = "" if row.floor_ms is None else f"{row.floor_ms / row.fused_ms:.0%}"
        lines.append(
            f"{row.name:<42}{row.part:<9}{row.fused_ms:>9.3f}{row.plain_ms:>10.3f}{dense:>10}"
            f"{row.plain_ms / row.fused_ms:>9.1f}{times:>9}{share:>10}  {row.dense_backend}"
            f"{'' if row.passed or row.floor_ms is None else f'  FAILED (error {row.error:.1e})'}"
        )
    return "\n".join(lines[0 if heading else 1 :])


if __name__ == "__main__":
    raise SystemExit(main())

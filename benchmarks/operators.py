"""How much faster the operators are than dense attention at 4,096 tokens, forward and backward, on one CPU thread.

    python benchmarks/operators.py [--json]

Kernels are compared with dense SDPA, mixers with the whole attention module of DiT. Each pair is timed in turn,
again and again, and medians are compared: a machine that slows down for a while slows both. Exit status 1 when a
goal is missed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from grafting.contract import Grid, Site, TokenLayout
from grafting.models.dit import Attention
from grafting.operators import parse_operator

LAYOUT = TokenLayout(Grid(64, 64))
NUM_HEADS, HEAD_DIM = 2, 64
SITE = Site(
    role="attention",
    block=0,
    path="attn",
    dim=NUM_HEADS * HEAD_DIM,
    num_heads=NUM_HEADS,
    grid=LAYOUT.grid,
)


@dataclass(frozen=True)
class Row:
    """One comparison: median times of a forward and a backward pass, and how many times faster ours is."""

    operator: str
    baseline: str
    operator_ms: float
    baseline_ms: float
    ratio: float
    goal: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows instead of a table")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each (default 9)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [
        compare_kernel("window-1d w=4", {"name": "window-1d", "window": 4}, goal=8, repeats=args.repeats),
        compare_kernel("window-2d r=3", {"name": "window-2d", "radius": 3}, goal=4, repeats=args.repeats),
        compare_mixer("hyena-x", {"name": "hyena-x"}, goal=15, repeats=args.repeats),
    ]
    print(json.dumps([asdict(row) for row in rows], indent=2) if args.json else table(rows))
    return int(any(row.ratio < row.goal for row in rows))


def compare_kernel(label: str, settings: dict, *, goal: float, repeats: int) -> Row:
    """A kernel against dense SDPA, on q, k, v laid out in memory as a host's projections leave them."""
    kernel = parse_operator(settings).build(SITE)
    shape = (1, LAYOUT.num_tokens, NUM_HEADS, HEAD_DIM)
    q, k, v = [torch.randn(shape).transpose(1, 2).requires_grad_() for _ in range(3)]
    operator_ms, baseline_ms = interleaved_ms(
        lambda: step(kernel(q, k, v, LAYOUT), [q, k, v]),
        lambda: step(F.scaled_dot_product_attention(q, k, v), [q, k, v]),
        repeats=repeats,
    )
    return Row(label, "dense SDPA", operator_ms, baseline_ms, baseline_ms / operator_ms, goal)


def compare_mixer(label: str, settings: dict, *, goal: float, repeats: int) -> Row:
    """A mixer against DiT's attention module, projections and their gradients included in both."""
    mixer, attention = parse_operator(settings).build(SITE), Attention(SITE.dim, NUM_HEADS)
    x = torch.randn(1, LAYOUT.num_tokens, SITE.dim, requires_grad=True)
    operator_ms, baseline_ms = interleaved_ms(
        lambda: step(mixer(x, LAYOUT), [x, *mixer.parameters()]),
        lambda: step(attention(x), [x, *attention.parameters()]),
        repeats=repeats,
    )
    return Row(label, "attention module", operator_ms, baseline_ms, baseline_ms / operator_ms, goal)


def step(y: Tensor, inputs: list[Tensor]) -> None:
    """The backward pass of y, whose forward pass the caller has just run; y serves as its own gradient."""
    torch.autograd.grad(y, inputs, y.detach())


def interleaved_ms(*runs: Callable[[], None], repeats: int) -> list[float]:
    """Median milliseconds of each function, timed in turn after one warm-up of each."""
    for run in runs:
        run()
    times = [[elapsed_ms(run) for run in runs] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def elapsed_ms(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def table(rows: list[Row]) -> str:
    lines = [f"{'operator':<16}{'ms':>8}   {'baseline':<18}{'ms':>8}{'ratio':>9}{'goal':>9}"]
    for row in rows:
        reached = "" if row.ratio >= row.goal else "   missed"
        lines.append(
            f"{row.operator:<16}{row.operator_ms:>8.1f}   {row.baseline:<18}{row.baseline_ms:>8.1f}"
            f"{row.ratio:>8.1f}x{f'>= {row.goal:.0f}x':>9}{reached}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())

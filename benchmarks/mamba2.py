"""How Mamba-2's plain path compares with attention at 1,024 tokens, and how its time grows up to 16,384, on one CPU thread.

    python benchmarks/mamba2.py [--json]

Forward and backward passes with all gradients, at the width of DiT-XL/2. Both are timed in turn, again and again, and
medians are compared: a machine that slows down for a while slows both. Freed memory is kept, as an accelerator's allocator
keeps it; `--release` leaves that to the C library, which gives large tensors back to the system and pays for fresh pages at
each of them. Exit status 1 when a goal is missed.
"""

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from grafting.contract import Grid, Site, TokenLayout
from grafting.operators import parse_operator

DIM, NUM_HEADS = 1152, 16
SHORT, LONG = TokenLayout(Grid(32, 32)), TokenLayout(Grid(128, 128))


@dataclass(frozen=True)
class Row:
    """One comparison: median times of a forward and a backward pass a token, and how many times as long ours takes."""

    operator: str
    baseline: str
    operator_us: float
    baseline_us: float
    ratio: float
    goal: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows instead of a table")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default 5)")
    parser.add_argument("--dim", type=int, default=DIM, help=f"channels (default {DIM})")
    parser.add_argument("--release", action="store_true", help="leave freed memory to the C library")
    args = parser.parse_args()
    if not args.release:
        keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [
        row for direction in ("causal", "bidirectional") for row in compare(direction, args.dim, args.repeats)
    ]
    print(json.dumps([asdict(row) for row in rows], indent=2) if args.json else table(rows))
    return int(any(row.ratio > row.goal for row in rows))


def keep_freed_memory() -> None:
    """Allocations of any size come from the heap, which never shrinks (glibc)."""
    mmap_max, trim_threshold = -4, -1  # names of malloc.h
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, 2**31 - 1)):
        raise SystemExit("this C library has no mallopt: give --release")


def compare(direction: str, dim: int, repeats: int) -> list[Row]:
    """Mamba-2 against attention at the short length, and against itself at the long one."""
    site = Site(role="attention", block=0, path="attn", dim=dim, num_heads=NUM_HEADS, grid=SHORT.grid)
    mixer = parse_operator({"name": "mamba2", "direction": direction}).build(site)
    attention = parse_operator("mha").build(site)
    attention_us, short_us, long_us = interleaved_us(
        (lambda: step(attention, SHORT, dim), SHORT.num_tokens),
        (lambda: step(mixer, SHORT, dim), SHORT.num_tokens),
        (lambda: step(mixer, LONG, dim), LONG.num_tokens),
        repeats=repeats,
    )
    return [
        Row(f"{direction}, 1,024", "attention, 1,024", short_us, attention_us, short_us / attention_us, 4),
        Row(f"{direction}, 16,384", "itself, 1,024", long_us, short_us, long_us / short_us, 1.3),
    ]


def step(mixer: nn.Module, layout: TokenLayout, dim: int) -> None:
    """A forward and a backward pass; the output serves as its own gradient."""
    x = torch.randn(1, layout.num_tokens, dim, requires_grad=True)
    y: Tensor = mixer(x, layout)
    torch.autograd.grad(y, [x, *mixer.parameters()], y.detach())


def interleaved_us(*runs: tuple[Callable[[], None], int], repeats: int) -> list[float]:
    """Median microseconds a token of each function, timed in turn after one warm-up of each."""
    for run, _ in runs:
        run()
    times = [[elapsed_us(run) / num_tokens for run, num_tokens in runs] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def elapsed_us(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return (time.process_time() - start) * 1e6


def table(rows: list[Row]) -> str:
    lines = [f"{'mamba2':<24}{'us/token':>10}   {'baseline':<18}{'us/token':>10}{'ratio':>9}{'goal':>9}"]
    for row in rows:
        reached = "" if row.ratio <= row.goal else "   missed"
        lines.append(
            f"{row.operator:<24}{row.operator_us:>10.1f}   {row.baseline:<18}{row.baseline_us:>10.1f}"
            f"{row.ratio:>8.2f}x{f'<= {row.goal}x':>9}{reached}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())

"""How much faster a forward pass is when each pair of sequential blocks runs side by side, at batch 1 on the CPU.

    python benchmarks/depth.py [--threads 2] [--json]

The model as it was, the same with all pairs merged, and merged with the branches run one after the other are timed in turn,
again and again, and medians are compared: a machine that slows down for a while slows all. Models: the bundled testbed
model, and DiT-XL/2 at a quarter of its width and depth on a grid of 16 x 16 tokens. A merged pair does the work of its
blocks and 1/12 more: on one thread there is only overhead to save, on two the branches also keep both busy. Exit status 1
when the goal is missed.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn

from grafting.data.bundled import testbed_model_folder
from grafting.editing.plan import Merge, Plan
from grafting.editing.surgery import MergedBlocks, graft
from grafting.hosts import host_of
from grafting.models.dit import DiT
from grafting.weights.folder import load_model

GOAL = 0.75


@dataclass(frozen=True)
class Row:
    """Median times of a model's forward pass, and the merged model's over the sequential one's."""

    model: str
    sequential_ms: float
    merged_ms: float
    one_by_one_ms: float  # merged, without the batched pass
    ratio: float


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows instead of a table")
    parser.add_argument("--threads", type=int, help="CPU threads (default torch's choice)")
    parser.add_argument("--repeats", type=int, default=51, help="timed passes of each (default 51)")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = [
        compare("testbed", load_model(testbed_model_folder())[0], repeats=args.repeats),
        compare("XL/2, 288 wide, 8 deep", DiT(hidden_size=288, num_heads=4, depth=8), repeats=args.repeats),
    ]
    print(json.dumps([asdict(row) for row in rows], indent=2) if args.json else table(rows))
    return int(rows[0].ratio > GOAL)


def compare(name: str, model: nn.Module, *, repeats: int) -> Row:
    """A model against itself with all pairs of blocks merged."""
    merged, one_by_one = copy.deepcopy(model.eval()), copy.deepcopy(model)
    for each in (merged, one_by_one):
        graft(each, Plan(edits=(Merge(),)))
    for pair in one_by_one.modules():
        if isinstance(pair, MergedBlocks):
            # a hook that a batched pass would not call
            pair.branches[0].register_forward_hook(lambda *_: None)
    host = host_of(model)
    side = host.sites(model)[0].grid.rows
    inputs = host.example(model, rows=side, cols=side, batch_size=1)
    with torch.no_grad():
        models = (model, merged, one_by_one)
        times = interleaved_ms(*(lambda m=m: m(**inputs) for m in models), repeats=repeats)
    return Row(name, *times, ratio=times[1] / times[0])


def interleaved_ms(*runs: Callable[[], object], repeats: int) -> list[float]:
    """Median milliseconds of each function, timed in turn after one warm-up of each."""
    for run in runs:
        run()
    times = [[elapsed_ms(run) for run in runs] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def elapsed_ms(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def table(rows: list[Row]) -> str:
    lines = [f"{'model':<26}{'sequential':>12}{'merged':>12}{'one by one':>12}{'ratio':>8}   goal {GOAL}x"]
    for row in rows:
        times = (row.sequential_ms, row.merged_ms, row.one_by_one_ms)
        lines.append(f"{row.model:<26}" + "".join(f"{t:>9.2f} ms" for t in times) + f"{row.ratio:>7.2f}x")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())

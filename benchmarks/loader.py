"""How many latents a second the loader reads from shards on disk, shuffled, in batches.

    python benchmarks/loader.py [--items 16384] [--workers 1 2]

Latents of 4 x 32 x 32 (DiT's at 256 pixels) in float16, as samples and as moments (mean and log variance, from which each
read draws), in shards of 2,048; and again in as many shards as ImageNet has, 626, since a batch opens each that it reads
from. What is read was just written, so it comes from the operating system's memory: a cold disk
or network adds its own time, which this does not measure. A CPU second counts the work of all threads; on a machine that
does other things it is the figure to trust, and what one core gives; the goal is for two. `in place` is the same without the
loader. The last line is JSON; exit status 1 when the goal is missed.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from grafting.data.latents import LatentsConfig, LatentSet, write_latents
from grafting.machine.randomness import batch_indices
from grafting.training.loader import Loader

GOAL = 20_000
IMAGENET_SHARDS = 626
SHAPE = (4, 32, 32)
BATCH_SIZE, SHARD_SIZE = 256, 2048


@dataclass(frozen=True)
class Row:
    """Latents a second, by the clock and by the CPU's time; the best of several passes."""

    stored: str
    shards: int
    workers: int  # 0: in place
    per_second: float
    per_cpu_second: float
    waited: float  # share of the clock's time in which nothing was ready


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=16_384, help="latents on disk (default 16,384)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="threads (default 1 2)")
    parser.add_argument("--passes", type=int, default=3, help="passes over all, the best counts (default 3)")
    parser.add_argument("--folder", type=Path, help="where shards are written (default: the system's)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for stored in ("samples", "moments"):
        for shard_size in (SHARD_SIZE, max(args.items // IMAGENET_SHARDS, 1)):
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                data = write(Path(folder), stored, args.items, shard_size)
                for workers in (0, *args.workers):
                    passes = [measure(data, workers, number) for number in range(args.passes)]
                    rows.append(max(passes, key=lambda row: row.per_cpu_second))
                    print(line(rows[-1]), flush=True)
    one_core = min(row.per_cpu_second for row in rows if row.workers)
    facts = {"goal_on_two_cores": GOAL, "one_core": one_core, "two_cores": 2 * one_core, "items": args.items}
    print(json.dumps(facts | {"rows": [asdict(row) for row in rows]}))
    return int(2 * one_core < GOAL)


def write(folder: Path, stored: str, count: int, shard_size: int) -> LatentSet:
    """Random latents in shards; their index says where they come from."""
    write_latents(
        folder,
        batches(stored, count),
        source="noise",
        vae="none",
        scale=0.18215,
        num_classes=1000,
        stored="samples" if stored == "samples" else "moments",
        shard_size=shard_size,
    )
    return LatentsConfig(folder=folder, verify=False).load()


def batches(stored: str, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    channels = SHAPE[0] * (1 if stored == "samples" else 2)
    for start in range(0, count, SHARD_SIZE):
        size = min(SHARD_SIZE, count - start)
        latents = torch.randn(size, channels, *SHAPE[1:], generator=draw)
        yield latents, torch.randint(0, 1000, (size,), generator=draw)


def measure(data: LatentSet, workers: int, seed: int) -> Row:
    """One pass over all items, in an order of its own."""
    steps = len(data) // BATCH_SIZE
    read = partial(through_loader, workers=workers) if workers else in_place
    clock, cpu = time.perf_counter(), time.process_time()
    waited = read(data, steps, seed)
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    count = steps * BATCH_SIZE
    return Row(
        data.index.stored,
        len(data.index.shards),
        workers,
        per_second=round(count / clock),
        per_cpu_second=round(count / cpu),
        waited=round(waited / clock, 3),
    )


def in_place(data: LatentSet, steps: int, seed: int) -> float:
    for step in range(steps):
        data.batch(batch_indices(len(data), BATCH_SIZE, step, seed))
    return 0.0


def through_loader(data: LatentSet, steps: int, seed: int, *, workers: int) -> float:
    with Loader(data, BATCH_SIZE, seed=seed, steps=steps, prefetch=2 * workers, workers=workers) as loader:
        for _ in map(loader.at, range(steps)):
            pass
        return loader.seconds_waited


def line(row: Row) -> str:
    how = f"{row.workers} thread{'s' if row.workers > 1 else ''}" if row.workers else "in place"
    return (
        f"{row.stored:8} {row.shards:4} shards {how:10} {row.per_second:9,.0f} latents/s {row.per_cpu_second:9,.0f} a CPU second"
        f"  waited {row.waited:.0%}"
    )


if __name__ == "__main__":
    raise SystemExit(main())

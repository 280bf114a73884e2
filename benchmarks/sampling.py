"""How much faster two processes draw a set of images than one, and how much memory a large samples file takes to write.

    python benchmarks/sampling.py [--images 384] [--file-images 50000]

The testbed's model, from `grafting sample`'s own stage: one process on one core, then two on a core each (pinned, one
thread each), in turn, again and again; medians of the time until the file is whole are compared. Imports and loading are
not counted: processes are forked when that is done. On a busy machine `cpu_speedup` says more: one process's CPU time over
that of the busier of two. Then a file of as many images as `--file-images`, of
64x64 pixels in colour, is written and read in batches in a process of its own, whose peak memory is compared with what
it had before. The last line is JSON. Exit status 1 when a goal is missed; run it while the machine does nothing else.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from grafting.hosts import host_of
from grafting.latents.decoding import Decoder
from grafting.machine.files import sha256_of
from grafting.sampling.chain import SamplingConfig
from grafting.sampling.drawing import Drawing, describe_model
from grafting.sampling.files import open_samples, origin_of, write_samples
from grafting.weights.folder import load

SPEEDUP_GOAL = 1.6
MEMORY_GOAL_MB = 100.0
BATCH = 8
FILE_SHAPE, FILE_BATCH = (3, 64, 64), 250


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=384, help="images a set (default 384)")
    parser.add_argument("--repeats", type=int, default=5, help="sets of each kind (default 5)")
    parser.add_argument(
        "--file-images", type=int, default=50_000, help="images of the file (default 50000, 0.6 GB)"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        parser.error(f"two cores are needed; this process may use {len(cores)}")
    model = load("testbed")
    config = SamplingConfig(
        sampler="dpm-solver++",
        steps=10,
        cfg_scale=1.0,
        clip=True,
        num_images=args.images,
        batch_size=BATCH,
        precision="fp32",
    )
    draws: dict[int, list[Times]] = {number: [] for number in (1, 2)}
    hashes = set()
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            for number, times in draws.items():
                path = Path(folder) / f"{repeat}-{number}.npz"
                times.append(time_set(model, config, path, cores[:number]))
                hashes.add(sha256_of(path))
        memory = in_a_process(lambda: file_memory(Path(folder) / "large.npz", args.file_images))
    one, two = (statistics.median(t.wall_s for t in times) for times in draws.values())
    one_cpu, two_cpu = (statistics.median(t.cpu_s for t in times) for times in draws.values())
    line = {
        "images": args.images,
        "one_process_s": round(one, 2),
        "two_processes_s": round(two, 2),
        "speedup": round(one / two, 3),
        "speedup_goal": SPEEDUP_GOAL,
        "cpu_speedup": round(one_cpu / two_cpu, 3),
        "same_file": len(hashes) == 1,
        **memory,
        "memory_goal_mb": MEMORY_GOAL_MB,
        "load_average": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(line))
    fits = max(memory["write_peak_mb"], memory["read_peak_mb"]) <= MEMORY_GOAL_MB
    return 0 if one / two >= SPEEDUP_GOAL and line["same_file"] and fits else 1


class Times(NamedTuple):
    """Seconds from the start of the processes to the whole file, and of CPU time in the busiest of them."""

    wall_s: float
    cpu_s: float


def time_set(model: nn.Module, config: SamplingConfig, path: Path, cores: list[int]) -> Times:
    """How long forked processes, one a core, take for a set."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    started = time.perf_counter()
    processes = [
        context.Process(target=draw_share, args=(queue, model, config, path, core, rank, len(cores)))
        for rank, core in enumerate(cores)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a process has failed; its error is above")
    return Times(time.perf_counter() - started, max(queue.get() for _ in processes))


def draw_share(
    queue: Any,
    model: nn.Module,
    config: SamplingConfig,
    path: Path,
    core: int,
    rank: int,
    world_size: int,
) -> None:
    os.sched_setaffinity(0, {core})
    host = host_of(model)
    drawing = Drawing(
        path.with_suffix(".shards"),
        config,
        denoiser=host.denoiser(model),
        shape=host.shape(model),
        decoder=Decoder(),
        identity=describe_model(model, settings={}),
    )
    for _ in drawing.draw(model, slice(rank, None, world_size)):
        pass
    if rank == 0:
        for _ in drawing.wait():
            pass
        drawing.write(path)
    queue.put(time.process_time())


def file_memory(path: Path, num_images: int) -> dict[str, float]:
    """Peak memory, beside what was there before, of writing and then reading a file; and the file's size."""
    labels = torch.arange(FILE_BATCH) % 10

    def batches() -> Any:
        for first in range(0, num_images, FILE_BATCH):
            size = min(FILE_BATCH, num_images - first)
            yield torch.randint(0, 256, (size, *FILE_SHAPE), dtype=torch.uint8), labels[:size]

    before = peak_mb()
    origin = origin_of(SamplingConfig())
    write_samples(path, batches(), num_images=num_images, shape=FILE_SHAPE, origin=origin)
    written = peak_mb()
    seen = sum(len(images) for images in open_samples(path).images(FILE_BATCH))
    assert seen == num_images
    return {
        "file_mb": round(path.stat().st_size / 1e6, 1),
        "write_peak_mb": round(written - before, 1),
        "read_peak_mb": round(peak_mb() - before, 1),
    }


def peak_mb() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def in_a_process(function: Callable[[], Any]) -> Any:
    """What a function returns in a process of its own, whose peak memory is not that of this one's past."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=lambda: queue.put(function()))
    process.start()
    result = queue.get()
    process.join()
    return result


if __name__ == "__main__":
    raise SystemExit(main())

"""What stage 1 costs beyond what it cannot do without, and how its memory grows with the number of sites.

    python benchmarks/distillation.py [--json]

Time: steps of streaming stage 1 of all attention sites, against the teacher's forward passes plus the operators' own
forward and backward passes on the same tensors; timed in turn, medians compared. Memory: peak resident memory of a process
that trains 8 sites over that of one that trains 1, less what the process held before the first step: libraries, models and
data. Dump: the same number of steps the published way, activations of fixed samples written once and then read (our own
`cache_samples`): writing, and steps with the files in the page cache and dropped from it. Exit status 1 when a goal is missed;
of the dump there is none. The last line is JSON.
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

import psutil
import torch
from torch import nn

from grafting.data.images import ImageSet
from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import build_operators
from grafting.models.dit import DiT
from grafting.training.distillation import DistillConfig, distill

TIME_GOAL, MEMORY_GOAL = 1.5, 1.3
BATCH_SIZE = 32
DUMP_BATCHES = 16
OPERATOR = {"name": "hyena-x", "kernel_size": 4}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--repeats", type=int, default=9, help="timed steps of each (default 9)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = {
            **measure_time(args.repeats),
            **measure_dump(args.repeats, Path(folder)),
            **measure_memory(),
        }
    if not args.json:
        print(
            "streaming step {streaming_ms:.0f} ms; teacher forward {teacher_ms:.0f} ms + operators {operators_ms:.0f} ms: "
            "{time_ratio:.2f}x (goal {time_goal:g}x)\n"
            "peak memory with 1 site {memory_1_mib:.0f} MiB, 8 sites {memory_8_mib:.0f} MiB: "
            "{memory_ratio:.2f}x (goal {memory_goal:g}x)\n"
            "the published way: {dump_write_ms_per_sample:.2f} ms a sample to write {dump_mib:.0f} MiB, then {dump_hot_ms:.0f} ms a "
            "step from the page cache, {dump_cold_ms:.0f} ms after the files were dropped from it ({dump_cold_how}); streaming "
            "{dump_streaming_ms:.0f} ms and 0 bytes. With {dump_samples} samples used {dump_epochs:g} times: dump and fit "
            "{dump_over_streaming:.2f}x streaming".format(**figures)
        )
    print(json.dumps(figures))
    return int(figures["time_ratio"] > TIME_GOAL or figures["memory_ratio"] > MEMORY_GOAL)


def measure_time(repeats: int) -> dict[str, float]:
    teacher, operators = _setup(blocks="all")
    steps = _distill(teacher, operators, steps=repeats + 2)
    calls = _recorded_calls(teacher, operators)
    next(steps)
    next(steps)
    times: dict[str, list[float]] = {"streaming": [], "teacher": [], "operators": []}
    for _ in range(repeats):
        times["streaming"].append(_milliseconds(lambda: next(steps)))
        times["teacher"].append(_milliseconds(lambda: _forward(teacher)))
        times["operators"].append(_milliseconds(lambda: _fit(operators, calls)))
    streaming, forward, own = (statistics.median(times[k]) for k in ("streaming", "teacher", "operators"))
    return {
        "streaming_ms": streaming,
        "teacher_ms": forward,
        "operators_ms": own,
        "time_ratio": streaming / (forward + own),
        "time_goal": TIME_GOAL,
    }


def measure_dump(repeats: int, folder: Path) -> dict[str, float | str]:
    """The published way and streaming, in turn: writing the dump is the step before the first one.

    As many epochs as the published run has (8,000 samples, 200 times).
    """
    (teacher, streamed), (other, fitted) = _setup(blocks="all"), _setup(blocks="all")
    samples = DUMP_BATCHES * BATCH_SIZE
    fitting = _distill(other, fitted, steps=2 * repeats + 1, cache_samples=samples, folder=folder)
    written = _milliseconds(lambda: next(fitting)) - _held_out_ms(teacher, streamed)
    streaming = _distill(teacher, streamed, steps=2 * repeats + 1)
    next(streaming)
    files = sorted(folder.rglob("*.bin"))
    times: dict[str, list[float]] = {"hot": [], "cold": [], "streaming": []}
    next(fitting)  # the first step also makes the optimizer's moments
    next(streaming)
    for _ in range(repeats):
        for path in files:
            path.read_bytes()
        times["hot"].append(_milliseconds(lambda: next(fitting)))
        how = _drop(files)
        times["cold"].append(_milliseconds(lambda: next(fitting)))
        times["streaming"].append(_milliseconds(lambda: next(streaming)))
    hot, cold, stream = (statistics.median(times[k]) for k in ("hot", "cold", "streaming"))
    epochs = 200.0
    steps = epochs * DUMP_BATCHES
    return {
        "dump_samples": samples,
        "dump_epochs": epochs,
        "dump_mib": sum(path.stat().st_size for path in files) / 2**20,
        "dump_write_ms_per_sample": written / samples,
        "dump_hot_ms": hot,
        "dump_cold_ms": cold,
        "dump_cold_how": how,
        "dump_streaming_ms": stream,
        "dump_over_streaming": (written + steps * hot) / (steps * stream),
        "dump_cold_over_streaming": (written + steps * cold) / (steps * stream),
    }


def _held_out_ms(teacher: nn.Module, operators: dict[str, nn.Module]) -> float:
    """What the first step takes beside writing: measuring on the held-out images."""
    steps = _distill(teacher, operators, steps=1)
    return _milliseconds(lambda: next(steps))


def _drop(files: list[Path]) -> str:
    """Write these files back and ask the system to forget their pages; says how far that is known to go."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1\n")
    except OSError:
        return "by advice: pages that are mapped stay"
    return "all page caches dropped: pages that are mapped stay"


def measure_memory() -> dict[str, float]:
    one, eight = (_in_process(_peak_memory, blocks) for blocks in ([0], "all"))
    return {
        "memory_1_mib": one,
        "memory_8_mib": eight,
        "memory_ratio": eight / one,
        "memory_goal": MEMORY_GOAL,
    }


def _setup(blocks: str | list[int]) -> tuple[nn.Module, dict[str, nn.Module]]:
    torch.manual_seed(0)
    teacher = DiT(
        input_size=32, patch_size=2, in_channels=1, hidden_size=128, depth=8, num_heads=4, num_classes=10
    ).eval()
    plan = Plan(edits=(Replace(role="attention", blocks=blocks, operator=OPERATOR),))
    return teacher, build_operators(teacher, plan)


def _distill(
    teacher: nn.Module,
    operators: dict[str, nn.Module],
    *,
    steps: int,
    cache_samples: int | None = None,
    folder: Path | None = None,
):
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2 * BATCH_SIZE, 1, 32, 32), generator=draw, dtype=torch.uint8)
    data = ImageSet(images, torch.arange(len(images)) % 10, num_classes=10, size=32)
    config = DistillConfig(
        steps=steps,
        batch_size=BATCH_SIZE,
        holdout=BATCH_SIZE,
        holdout_every=10 * steps,
        cache_samples=cache_samples,
        precision="fp32",
    )
    return distill(
        teacher,
        operators,
        data,
        config,
        cache_folder=folder,
    )


def _recorded_calls(teacher: nn.Module, operators: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """The tokens that each site of the teacher sees, from one forward pass."""
    calls = {}
    handles = [
        teacher.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: calls.update({path: args[0]})
        )
        for path in operators
    ]
    _forward(teacher)
    for handle in handles:
        handle.remove()
    return calls


@torch.no_grad()
def _forward(teacher: nn.Module) -> None:
    x = torch.randn(BATCH_SIZE, 1, 32, 32)
    teacher(x, torch.zeros(BATCH_SIZE), torch.zeros(BATCH_SIZE, dtype=torch.int64))


def _fit(operators: dict[str, nn.Module], calls: dict[str, torch.Tensor]) -> None:
    for path, operator in operators.items():
        operator(calls[path]).abs().mean().backward()


def _peak_memory(blocks: str | list[int]) -> float:
    """Peak resident memory, in MiB, that training adds to this process."""
    torch.set_num_threads(1)
    teacher, operators = _setup(blocks)
    before = psutil.Process().memory_info().rss / 2**20
    steps = _distill(teacher, operators, steps=4)
    for _ in range(4):
        next(steps)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def _in_process(function: Callable, *args) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def _milliseconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - started)


if __name__ == "__main__":
    raise SystemExit(main())

"""Speed of a stage: images and tokens per second, the share of the device's peak, waiting for data, memory.

Measured around a stage's own iterator, which knows nothing of it. FLOPs are those that `metrics/cost.py` counts; peaks are
makers' figures for dense matrix products, so a share of a peak (model FLOPs utilisation, MFU) is comparable with others'.
"""

import re
import resource
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

import torch

from ..contract import Step
from ..machine.precision import Precision


@dataclass(frozen=True)
class Device:
    """A kind of accelerator, with its maker's peaks of dense matrix products."""

    title: str
    pattern: str  # of the names that drivers give it
    bf16_tflops: float
    fp32_tflops: float  # without TF32, as is torch's default

    def tflops(self, precision: Precision) -> float:
        return self.bf16_tflops if precision == "bf16" else self.fp32_tflops


# Source: NVIDIA's data sheets of each product, tensor cores without sparsity: A100 80 GB, H100 (SXM5 and PCIe), H200, DGX
# B200 (an eighth of it), L40S, L4, A10; for the RTX 4090 the Ada white paper, with float32 accumulation.
DEVICES: Mapping[str, Device] = {
    "a100": Device("NVIDIA A100", r"\bA100\b", 312.0, 19.5),
    "h100": Device("NVIDIA H100 SXM", r"\bH100\b(?!.*(PCIe|NVL))", 989.0, 67.0),
    "h100-pcie": Device("NVIDIA H100 PCIe", r"\bH100 PCIe", 756.0, 51.0),
    "h200": Device("NVIDIA H200", r"\bH200\b(?!.*NVL)", 989.0, 67.0),
    "b200": Device("NVIDIA B200", r"\bB200\b", 2250.0, 75.0),
    "l40s": Device("NVIDIA L40S", r"\bL40S\b", 362.0, 91.6),
    "l4": Device("NVIDIA L4", r"\bL4\b", 121.0, 30.3),
    "a10": Device("NVIDIA A10", r"\bA10\b", 125.0, 31.2),
    "rtx-4090": Device("NVIDIA RTX 4090", r"\bRTX 4090\b(?! D)", 165.0, 82.6),
}


@dataclass(frozen=True)
class Launches:
    """Milliseconds in which one core launches the operations of a step, which no faster device makes shorter.

    Measured with DiT-XL's 28 blocks at a width of 16, where launching is all there is (PyTorch 2.13, eager; a faster core
    needs less, and so do compiled blocks).
    """

    forward: float = 0.4  # a block without gradients
    trained: float = 1.4  # a block forward and backward, with its share of the optimizer and the average
    fitted: float = 1.2  # an operator of stage 1 forward and backward, with its share of the optimizer


LAUNCHES = Launches()

_MATMUL_SIZE = 512


def device_called(name: str) -> Device | None:
    """The kind of accelerator that a driver calls `name`; None if its peak is not known here."""
    return next((device for device in DEVICES.values() if re.search(device.pattern, name)), None)


def device_at(device: torch.device) -> Device | None:
    """The kind of accelerator that this is; None on a CPU, and where its peak is not known."""
    return device_called(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


@cache
def matmul_tflops(dtype: torch.dtype, device: torch.device) -> float:
    """TFLOP/s of a square matrix product: the best of a few, measured once a process."""
    x = torch.ones(_MATMUL_SIZE, _MATMUL_SIZE, device=device, dtype=dtype)
    seconds = []
    for _ in range(4):  # the first is a warm-up
        started = time.perf_counter()
        (x @ x).sum().item()  # a number on the CPU: waits for the device
        seconds.append(time.perf_counter() - started)
    return 2 * _MATMUL_SIZE**3 / min(seconds[1:]) / 1e12


@dataclass(frozen=True, kw_only=True)
class Work:
    """Work of one step of a stage, or of a phase of one, over all processes."""

    steps: int  # of this work
    images: int
    tokens: int  # of an image
    flops: float  # as counted, of the step
    tflops: float | None = None  # the peak of all devices together; None: not known


def measured(steps: Iterator[Step], works: Sequence[Work], *, device: torch.device) -> Iterator[Step]:
    """The same steps, with how fast each was: the time between asking for it and having it.

    Args:
        works: of the stage's steps; those of the first, then those of the second, and so on.

    Adds to a step's values `images_per_s`, `tokens_per_s`, `memory_gib` (the most that this process held so far), `mfu`
    where the peak is known, and `data_wait`, the share of the time spent waiting for data, where the stage says how long
    that was. A step 0 only measures: it has no rate.
    """
    ends = list(accumulate(work.steps for work in works))
    started = time.perf_counter()
    for step in steps:
        seconds = time.perf_counter() - started
        rates = (
            _rates(step, works[min(bisect_left(ends, step.done), len(works) - 1)], seconds)
            if step.done
            else {}
        )
        yield replace(step, values=step.values | rates | {"memory_gib": round(peak_memory_gib(device), 3)})
        started = time.perf_counter()


def _rates(step: Step, work: Work, seconds: float) -> dict[str, float]:
    rates = {"images_per_s": work.images / seconds, "tokens_per_s": work.images * work.tokens / seconds}
    if work.tflops is not None:
        rates["mfu"] = work.flops / seconds / (1e12 * work.tflops)
    if step.seconds_waited is not None:
        rates["data_wait"] = min(step.seconds_waited / seconds, 1.0)
    return {name: float(f"{value:.4g}") for name, value in rates.items()}


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that this process held so far: on CUDA what torch's allocator gave out, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, bytes or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

"""Diagnosis of this machine: devices, dtypes, compilation, optional packages, and integrity of the bundled files.

Facts only; nothing is imported to find out whether a package is installed, and nothing is changed.
"""

import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch

from ..cost.speed import matmul_tflops
from ..data.bundled import (
    bundled_classifier,
    bundled_reference_path,
    bundled_subset,
    bundled_subset_file,
    scenes_pipeline_folder,
    testbed_model_folder,
)
from ..errors import GraftingError
from ..functional._triton import fused_kernels
from ..machine.devices import default_device
from ..machine.precision import resolve_precision, why

# large enough that starting the multiplication does not count, small enough for a slow core

_ASSETS: dict[str, Callable[[], object]] = {
    "testbed model": testbed_model_folder,
    "scenes model": scenes_pipeline_folder,
    "classifier": bundled_classifier,
    "reference": bundled_reference_path,
    "subset": bundled_subset,
    "subset list": bundled_subset_file,
}


@dataclass(frozen=True)
class Package:
    """An optional package that the library imports, and its purpose."""

    name: str  # on the package index
    module: str
    purpose: str
    version: str | None = None  # None: not installed


OPTIONAL_PACKAGES = (
    Package("datasets", "datasets", "images of the Hugging Face Hub"),
    Package("peft", "peft", "LoRA adapters in stage 2"),
    Package("transformers", "transformers", "text encoders of pipelines, GenEval"),
    Package("ray", "ray", "sweeps over a cluster"),
    Package("trackio", "trackio", "a local dashboard of training"),
    Package("wandb", "wandb", "Weights & Biases"),
    Package("tensorboard", "tensorboard", "TensorBoard"),
)


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Findings of `examine`."""

    system: str
    python: str
    versions: dict[str, str]
    processor: str
    cores: int  # that this process may use
    threads: int  # of torch
    memory_gib: float
    memory_free_gib: float
    disk_free_gib: float  # where the command runs
    device: str  # where models will run
    gpus: list[str]
    kernels: str  # `on`, or `off` and why
    gflops: dict[str, float]  # of a matrix product on `device`, by dtype
    precision: str  # what `auto` is here
    precision_why: str
    compiler: str | None
    compile: str  # whether torch.compile works, in words
    packages: list[Package] = field(default_factory=list)
    assets: dict[str, str] = field(default_factory=dict)  # "intact", or what is wrong

    @property
    def problems(self) -> list[str]:
        """Problems that keep the quickstart from running; empty if there are none."""
        return [f"{name}: {state}" for name, state in self.assets.items() if state != "intact"]

    def to_json(self) -> dict[str, object]:
        return asdict(self) | {"problems": self.problems}


def examine(*, full: bool = False) -> Diagnosis:
    """Examine this machine; takes a second or two. `full` also compiles a function, which can take a minute."""
    memory = psutil.virtual_memory()
    compiler = find_compiler()
    return Diagnosis(
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions={name: version(name) for name in ("grafting", "torch", "diffusers")},
        processor=platform.processor() or platform.machine(),
        cores=_usable_cores(),
        threads=torch.get_num_threads(),
        memory_gib=round(memory.total / 2**30, 1),
        memory_free_gib=round(memory.available / 2**30, 1),
        disk_free_gib=round(shutil.disk_usage(Path.cwd()).free / 2**30, 1),
        device=str(default_device()),
        gpus=_gpus(),
        kernels=fused_kernels(default_device()),
        gflops=measure_matmul(default_device()),
        precision=resolve_precision("auto", default_device()),
        precision_why=why(default_device()),
        compiler=compiler,
        compile=try_compile() if full else _compile_outlook(compiler),
        packages=[_look_for(package) for package in OPTIONAL_PACKAGES],
        assets={name: _state_of(load) for name, load in _ASSETS.items()},
    )


def measure_matmul(device: torch.device) -> dict[str, float]:
    """Measure GFLOP/s of a square matrix product in each dtype that training uses (best of a few)."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if device.type != "cpu":
        dtypes["float16"] = torch.float16
    return {name: round(1000 * matmul_tflops(dtype, device), 1) for name, dtype in dtypes.items()}


def find_compiler() -> str | None:
    """The C++ compiler that torch.compile would use on a CPU, or None."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))), None)


def try_compile() -> str:
    """Compile a small function and describe the outcome."""
    started = time.perf_counter()
    x = torch.randn(64, device=default_device())
    try:
        compiled = torch.compile(lambda x: (x.sin() + x).sum(), fullgraph=True)
        right = torch.allclose(compiled(x), (x.sin() + x).sum(), atol=1e-3)
    except Exception as error:  # a broken toolchain fails in any way; the first line of it is the finding
        return f"fails: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return f"works ({time.perf_counter() - started:.0f} s)" if right else "runs, but its result is wrong"


def _compile_outlook(compiler: str | None) -> str:
    if compiler is None:
        return "no C++ compiler (g++ or clang++) found: torch.compile will not work on the CPU"
    return "not tried (`grafting doctor --full` does)"


def _usable_cores() -> int:
    """Number of cores this process may use; in a container, fewer than the machine has."""
    if platform.system() == "Linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{p.name}, {p.total_memory / 2**30:.0f} GiB" for p in properties]


def _look_for(package: Package) -> Package:
    if find_spec(package.module) is None:
        return package
    try:
        found = version(package.name)
    except PackageNotFoundError:
        found = "of unknown version"
    return Package(**asdict(package) | {"version": found})


def _state_of(load: Callable[[], object]) -> str:
    try:
        load()
    except GraftingError as error:
        return str(error)
    return "intact"

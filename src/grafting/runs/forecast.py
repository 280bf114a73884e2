"""Forecast of a recipe's cost per stage, before anything runs: time, memory per process, disk.

Neither weights nor data are needed. FLOPs, parameters and the activations kept for a backward pass are counted on the
model's shapes; time is FLOPs over a device's peak at a stated share of it (MFU), which is an assumption, but no less than it
takes to launch every step's operations; or images over the rate that an earlier part of the same run has logged. A device of no known
peak, such as a CPU, has that of a matrix product, measured on the spot. Left out: starting up, reading data, measuring on
held-out images, decoding latents, workspaces of kernels and memory that the allocator holds back. Encoding words, evaluation and the
report are named, and not estimated.
"""

import math
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..cost.speed import DEVICES, LAUNCHES, device_at, matmul_tflops
from ..data import LatentsConfig
from ..errors import RecipeError, RunError
from ..latents.prompting import WordsConfig
from ..machine.devices import default_device
from ..machine.precision import FASTER, Precision, settled_run, settled_sections
from ..sampling.taught import TaughtConfig
from ..training.calibration import CalibrateConfig
from ..training.distillation import DistillConfig
from ..training.phases import FinetuneConfig
from .folder import read_log
from .manifest import read_manifest
from .memory import (
    activations,
    copies,
    distill_disk,
    distill_memory,
    kept_activations,
    phase_disk,
    phase_memory,
    weights,
)
from .recipe import Recipe
from .rows import ROWS, rows_in
from .shapes import BF16, FP32, Shapes
from .stages import STAGES, ends_in_pipeline, stage_flops
from .training import phase_flops, state_passes, teacher_passes

DEFAULT_MFU = 0.3

_VAE_FACTOR = 8  # pixels per latent in each direction, of the autoencoders of Stable Diffusion
NOT_ESTIMATED = "not estimated"
_DUMP_SAMPLES = 8000  # of the published stage 1


@dataclass(frozen=True, kw_only=True)
class StageForecast:
    """Forecast of one stage."""

    name: str
    work: str
    images: int = 0  # that go through the model, each pass counted
    flops: int = 0  # all processes together
    memory: dict[str, int] | None = (
        None  # bytes per process on its device, by what they hold; None: not known
    )
    disk: dict[str, int] | None = None  # bytes, by what they hold; None: not known
    activations: dict[str, int] = field(default_factory=dict)
    """Bytes with gradient checkpointing and without, of stages that have both."""
    hours: float | None = None  # by the clock; None: not known
    basis: str = ""  # what the hours come from

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory is None else sum(self.memory.values())

    @property
    def disk_bytes(self) -> int | None:
        return None if self.disk is None else sum(self.disk.values())


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Forecast of a recipe."""

    recipe: str
    device: str
    processes: int
    mfu: float
    params: int  # of the model after the plan
    stages: tuple[StageForecast, ...]
    data: dict[str, int | None]  # items and bytes of what stages train on; None: not known
    # bytes of activations that stage 1 would keep by the published way, for as many samples, and that it keeps here
    dump: dict[str, int]

    def to_json(self) -> dict[str, object]:
        stages = [
            asdict(stage) | {"memory_bytes": stage.memory_bytes, "disk_bytes": stage.disk_bytes}
            for stage in self.stages
        ]
        return asdict(self) | {"stages": stages}


def forecast(
    recipe: Recipe,
    *,
    device: str | None = None,
    peak_tflops: float | None = None,
    processes: int = 1,
    mfu: float = DEFAULT_MFU,
    folder: Path | None = None,
    until: str = "report",
) -> Forecast:
    """Forecast a recipe's time, memory and disk.

    Args:
        device: a key of `throughput.DEVICES`; by default this machine's, if it is a known one.
        peak_tflops: the peak of one device, in place of the known one.
        processes: one per device.
        mfu: the share of the peak that is reached.
        folder: the run's; where a stage has logged its rate there, on this device and with as many processes, its time is
            computed from that.
        until: the last stage.

    Raises:
        GraftingError: the recipe does not fit its model, or the device is not known.
    """
    if device is not None and device not in DEVICES:
        raise RecipeError(
            f"no device {device!r}; there are {', '.join(DEVICES)}. For others, set --peak-tflops"
        )
    known = DEVICES[device] if device else device_at(default_device())
    if device:
        faster = DEVICES[device].bf16_tflops >= FASTER * DEVICES[device].fp32_tflops
        recipe = settled_sections(recipe, lambda _: "bf16" if faster else "fp32")
    else:
        recipe, _ = settled_run(recipe, default_device(), folder=folder)
    is_here = peak_tflops is None and known == device_at(default_device())
    logs = folder if is_here and folder and _is_run_here(folder, processes) else None
    clock = _Clock(known, peak_tflops, processes, mfu, logs)
    shapes = Shapes.of(recipe)
    stages = [
        *_prompts(recipe),
        *_training(recipe, shapes, clock),
        *_pipeline(recipe),
        *_sampling(recipe, shapes, clock),
        StageForecast(name="report", work="a page of HTML", basis=NOT_ESTIMATED),
    ]
    order = ("prompts", *STAGES)
    last = order.index(until)
    stages = [stage for stage in stages if order.index(stage.name.split(" ")[0].rstrip(",")) <= last]
    return Forecast(
        recipe=recipe.name,
        device=known.title if known else str(default_device()),
        processes=processes,
        mfu=mfu,
        params=shapes.cost.after.params,
        stages=tuple(stages),
        data=_data(recipe, shapes),
        dump={
            "published": shapes.dump_bytes(_DUMP_SAMPLES),
            "published_samples": _DUMP_SAMPLES,
            "here": kept_activations(recipe.distill, shapes) if recipe.distill else 0,
        },
    )


@dataclass(frozen=True)
class _Clock:
    """Estimated time of work on the devices."""

    device: Any
    peak_tflops: float | None
    processes: int
    mfu: float
    logs: Path | None  # folder of a run whose logs say how fast these devices are

    def timed(
        self,
        stage: StageForecast,
        *,
        precision: Precision,
        launches_s: float,
        log: str | None = None,
        images: int | None = None,
        phase: int | None = None,
    ) -> StageForecast:
        """A stage with its hours, and what they come from.

        Args:
            launches_s: seconds that launching takes in each process, whatever the device.
            log: the stage's folder in a run; its name if left out.
            images: those that its log counts, if not all that go through the model.
        """
        rate = _logged_rate(self.logs / (log or stage.name) / "log.jsonl", phase) if self.logs else None
        if rate is not None:
            basis = f"measured, {rate:.4g} images/s in {self.logs}"
            return replace(stage, hours=(images or stage.images) / rate / 3600, basis=basis)
        peak = self.peak_tflops or (self.device.tflops(precision) if self.device else None)
        said, of = f"{peak:g}" if peak else "", ""
        if peak is None:
            if self.processes > 1:
                unknown = "unknown for several processes on this device: set --device or --peak-tflops"
                return replace(stage, basis=unknown)
            peak = matmul_tflops(torch.bfloat16 if precision == "bf16" else torch.float32, default_device())
            said, of = f"{peak:.3g}", ", a matrix product here"
        seconds = stage.flops / (peak * 1e12 * self.mfu * self.processes)
        basis = f"FLOPs at {self.mfu:.0%} of {said} TFLOP/s ({precision}{of})"
        if launches_s > seconds:
            basis = f"time to launch each step's operations; {basis} would take less"
        return replace(stage, hours=max(launches_s, seconds) / 3600, basis=f"computed, {basis}")


def _is_run_here(folder: Path, processes: int) -> bool:
    """True if a run was last carried out on this machine's device by as many processes."""
    try:
        machine = read_manifest(folder / "manifest.json").machine
    except RunError:
        return False
    found = [machine.get(key) for key in ("host", "device", "processes")]
    return found == [platform.node(), str(default_device()), processes]


def _logged_rate(log: Path, phase: int | None) -> float | None:
    """Median images per second that a stage has logged, or that phase of it."""
    if not log.is_file():
        return None
    said = [line.get("images_per_s") for line in read_log(log) if line.get("phase") == phase]
    rates = [rate for rate in said if isinstance(rate, int | float)]
    return median(rates) if rates else None


def _prompts(recipe: Recipe) -> Iterator[StageForecast]:
    """The words of a recipe, which its run encodes before all else."""
    config = recipe.conditions
    if isinstance(config, WordsConfig):
        many = f"{len(config.load()):,} prompts" if config.file.exists() else f"prompts of {config.file.name}"
        yield StageForecast(name="prompts", work=f"{many}, encoded", basis=NOT_ESTIMATED)


def _pipeline(recipe: Recipe) -> Iterator[StageForecast]:
    if ends_in_pipeline(recipe):
        work = "the model in the source's pipeline, of linked files"
        yield StageForecast(name="pipeline", work=work, memory={}, disk={}, basis=NOT_ESTIMATED)


def _training(recipe: Recipe, shapes: Shapes, clock: _Clock) -> Iterator[StageForecast]:
    flops = stage_flops(recipe, shapes.cost, shapes.chosen)
    if isinstance(recipe.data, TaughtConfig):
        yield _teaching(recipe.data, flops["teach"], shapes, clock)
    if recipe.calibrate and shapes.chosen:
        yield _calibrating(recipe, recipe.calibrate, flops["calibrate"], shapes, clock)
    if recipe.distill and shapes.chosen:
        launched = shapes.num_kinds if recipe.distill.stacked else shapes.num_fitted
        sites = launched / (clock.processes if recipe.distill.spread == "sites" else 1)
        passes = 1 + state_passes(recipe.data)
        yield _steps(
            "distill",
            recipe.distill,
            flops["distill"],
            clock,
            step_s=passes * _forward_s(shapes) + sites * LAUNCHES.fitted / 1000,
            memory=distill_memory(recipe.distill, shapes, clock.processes),
            disk=distill_disk(recipe.distill, shapes),
        )
    yield from _phases(recipe, shapes, clock)


def _teaching(config: TaughtConfig, flops: int, shapes: Shapes, clock: _Clock) -> StageForecast:
    """The latents that the source makes itself."""
    stage = StageForecast(
        name="teach",
        work=f"{config.num_images:,} latents, {config.passes:,} passes each",
        images=config.num_images,
        flops=flops,
        memory=weights(shapes),
        disk={"latents": BF16 * config.num_images * math.prod(shapes.shape)},
    )
    batches = math.ceil(config.num_images / config.batch_size)
    launches_s = batches * config.calls * _forward_s(shapes)
    return clock.timed(stage, precision=config.precision, launches_s=launches_s)


def _calibrating(
    recipe: Recipe, config: CalibrateConfig, flops: int, shapes: Shapes, clock: _Clock
) -> StageForecast:
    of = f" of {recipe.data.num_images:,} latents" if isinstance(recipe.data, TaughtConfig) else ""
    stage = StageForecast(
        name="calibrate",
        work=f"{config.samples:,} noised images{of}, in one or two passes",
        images=config.samples,
        flops=flops,
        memory=weights(shapes),
        disk={"operators": FP32 * shapes.new_params},
    )
    passes = math.ceil(config.samples / config.batch_size) * (1 + state_passes(recipe.data))
    return clock.timed(stage, precision=config.precision, launches_s=passes * _forward_s(shapes))


def _phases(recipe: Recipe, shapes: Shapes, clock: _Clock) -> Iterator[StageForecast]:
    """Stage 2, phase by phase."""
    for number, (config, phase) in enumerate(zip(recipe.phases, shapes.phases, strict=True), start=1):
        yield _steps(
            "finetune",
            config,
            phase_flops(config, shapes.cost, data=recipe.data),
            clock,
            step_s=shapes.num_blocks * LAUNCHES.trained / 1000
            + teacher_passes(config, recipe.data) * _forward_s(shapes),
            phase=number if len(recipe.phases) > 1 else None,
            memory=phase_memory(config, phase, shapes, clock.processes),
            disk=phase_disk(config, phase, shapes),
            activations={
                f"{word} gradient checkpointing": activations(
                    config, phase, shapes, clock.processes, checkpointed=word == "with"
                )
                for word in ("with", "without")
            },
        )


def _steps(
    stage: str,
    config: DistillConfig | FinetuneConfig,
    flops: int,
    clock: _Clock,
    *,
    step_s: float,
    memory: dict[str, int],
    disk: dict[str, int],
    activations: dict[str, int] | None = None,
    phase: int | None = None,
) -> StageForecast:
    """Forecast of a stage of steps, or of a phase of one.

    Args:
        step_s: seconds to launch a micro-batch.
    """
    trained = ""
    if isinstance(config, FinetuneConfig) and config.trainable != "all":
        trained = f", {config.trained_in_words}"
    found = StageForecast(
        name=stage if phase is None else f"{stage}, phase {phase}",
        work=f"{config.steps:,} steps of {config.batch_size} images{trained}",
        images=config.steps * config.batch_size,
        flops=flops,
        memory=memory,
        disk=disk,
        activations=activations or {},
    )
    launches_s = config.steps * config.accumulate * step_s
    return clock.timed(found, precision=config.precision, launches_s=launches_s, log=stage, phase=phase)


def _forward_s(shapes: Shapes) -> float:
    """Seconds to launch a forward pass of the pretrained model."""
    return shapes.num_blocks * LAUNCHES.forward / 1000


def _sampling(recipe: Recipe, shapes: Shapes, clock: _Clock) -> Iterator[StageForecast]:
    config = recipe.sample
    if config is None:
        return
    channels, *size = shapes.shape
    if channels not in (1, 3):
        channels, size = 3, [*size[:-2], *(_VAE_FACTOR * side for side in size[-2:])]
    guidance = config.guidance
    guided = sum(guidance.is_on(t / 999) for t in range(1000)) / 1000 if guidance else 0
    calls = config.num_images * config.calls * (1 + guided)
    batches = math.ceil(config.num_images / config.batch_size / clock.processes)
    rows = rows_in(recipe, shapes.chosen)
    for row in rows:
        is_edited = ROWS[row].is_edited
        cost = shapes.cost.after if is_edited else shapes.cost.before
        stage = StageForecast(
            name=f"sample {row}",
            work=f"{config.num_images:,} images, {config.steps} steps",
            images=round(calls),
            flops=round(calls * cost.flops),
            memory={"pretrained model": FP32 * shapes.cost.before.params}
            | ({"weights": FP32 * cost.params} if is_edited else {})
            | copies(config.precision, cost.params),
            disk={"images (in shards, then in one file)": 2 * config.num_images * channels * math.prod(size)},
        )
        yield clock.timed(
            stage,
            precision=config.precision,
            launches_s=batches * config.calls * _forward_s(shapes),
            log=f"samples/{row}",
            images=config.num_images,
        )
    yield StageForecast(name="evaluate", work=f"images of {len(rows)} models", basis=NOT_ESTIMATED)


def _data(recipe: Recipe, shapes: Shapes) -> dict[str, int | None]:
    """Items and bytes of the data; for missing latents, as many as the recipe names, as samples in 16 bits."""
    config = recipe.data
    if isinstance(config, TaughtConfig):
        return {"items": config.num_images, "bytes": config.num_images * math.prod(shapes.shape) * BF16}
    if not isinstance(config, LatentsConfig) or config.per_class is None or shapes.num_classes is None:
        return {"items": None, "bytes": None}
    items = config.per_class * shapes.num_classes
    return {"items": items, "bytes": items * math.prod(shapes.shape) * BF16}

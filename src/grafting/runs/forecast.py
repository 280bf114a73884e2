"""Forecast of a recipe's cost per stage, before anything runs: time, memory per process, disk.

Neither weights nor data are needed. FLOPs, parameters and the activations kept for a backward pass are counted on the
model's shapes; time is FLOPs over a device's peak at a stated share of it (MFU), which is an assumption, or images over the
rate that an earlier part of the same run has logged. Left out: starting up, reading data, measuring on held-out images,
decoding latents, evaluation, workspaces of kernels and memory that the allocator holds back.
"""

import fnmatch
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import nn

from ..contract import Grid
from ..cost.count import count_parameters, dry_run
from ..cost.plan import PlanCost, plan_cost
from ..cost.speed import DEVICES, device_at
from ..data import LatentsConfig
from ..editing.plan import Drop
from ..editing.surgery import build_operators, grafted, resolve
from ..errors import RecipeError
from ..hosts import host_of
from ..machine.devices import default_device, mixed_precision
from ..machine.precision import FASTER, Precision, settled_run, settled_sections
from ..training.distillation import DistillConfig
from ..training.finetuning import FinetuneConfig
from .job import know_host, skeleton
from .paths import naming_paths
from .recipe import Recipe
from .rows import ROWS, rows_in
from .stages import stage_flops
from .states import NUM_STATES

DEFAULT_MFU = 0.3

_FP32, _BF16, _ADAM = 4, 2, 8  # bytes: a float32, a bfloat16, both moments of a parameter
_VAE_FACTOR = 8  # pixels per latent in each direction, of the autoencoders of Stable Diffusion
_DUMP_SAMPLES = 8000  # of the published stage 1


@dataclass(frozen=True, kw_only=True)
class StageForecast:
    """Forecast of one stage."""

    name: str
    work: str
    images: int  # that go through the model, each pass counted
    flops: int  # all processes together
    hours: float | None  # by the clock; None: no peak is known
    basis: str  # what the hours come from
    memory: dict[str, int]  # bytes per process on its device, by what they hold
    disk: dict[str, int]  # bytes, by what they hold

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def disk_bytes(self) -> int:
        return sum(self.disk.values())


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Forecast of a recipe."""

    recipe: str
    device: str
    processes: int
    mfu: float
    stages: tuple[StageForecast, ...]
    data: dict[str, int | None]  # items and bytes of what stages train on; None: not known
    dump: dict[
        str, int
    ]  # bytes of activations that stage 1 would keep by the published way, and that it keeps here

    def to_json(self) -> dict[str, Any]:
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
) -> Forecast:
    """Forecast a recipe's time, memory and disk.

    Args:
        device: a key of `throughput.DEVICES`; by default this machine's, if it is a known one.
        peak_tflops: the peak of one device, in place of the known one.
        processes: one per device.
        mfu: the share of the peak that is reached.
        folder: the run's; where a stage has logged its rate there, its time is computed from that.

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
    clock = _Clock(known, peak_tflops, processes, mfu, folder)
    shapes = _Shapes.of(recipe)
    stages = [*_training(recipe, shapes, clock), *_sampling(recipe, shapes, clock)]
    return Forecast(
        recipe=recipe.name,
        device=known.title if known else str(default_device()),
        processes=processes,
        mfu=mfu,
        stages=tuple(stages),
        data=_data(recipe, shapes),
        dump={"published": shapes.dump_bytes(_DUMP_SAMPLES), "here": _cached(recipe, shapes)},
    )


@dataclass(frozen=True)
class _Shapes:
    """A recipe's model before and after its plan: all that is counted of it."""

    cost: PlanCost
    shape: tuple[int, ...]  # of an image or latent
    num_classes: int | None  # None for a text-conditioned model
    chosen: Mapping[Any, Any]
    new_params: int
    names: dict[str, int]  # parameters of the grafted model that train, by name
    new_names: frozenset[str]
    num_blocks: int
    saved: dict[Precision, int]  # bytes per image kept for the backward pass of the grafted model
    tokens: tuple[int, int]  # how many and how wide
    num_fitted: int  # sites that stage 1 fits

    @classmethod
    def of(cls, recipe: Recipe) -> "_Shapes":
        with naming_paths(recipe.written):
            know_host(recipe)
            model = skeleton(recipe.source)
        host, chosen = host_of(model), resolve(model, recipe.edits)
        conditions = host.conditions(model)
        shape = (recipe.sample and recipe.sample.shape) or host.shape(model)
        cost = plan_cost(model, recipe.edits, grid=host.grid_of(model, shape))
        # a host of packed tokens cannot read the grid from positions without values
        with torch.device("meta"):
            operators = build_operators(model, recipe.edits, host=host.at_grid(cost.grid))
        with grafted(model, operators):
            names = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
            saved = {
                precision: _saved_an_image(model, precision, cost.grid) for precision in _precisions(recipe)
            }
        return cls(
            cost=cost,
            shape=shape,
            num_classes=None if conditions is None else len(conditions),
            chosen=chosen,
            new_params=sum(count_parameters(operator) for operator in operators.values()),
            names=names,
            new_names=frozenset(name for name in names if name.startswith(tuple(f"{p}." for p in operators))),
            num_blocks=len(host.blocks(model)),
            saved=saved,
            tokens=(cost.grid.num_tokens, host.sites(model)[0].dim),
            num_fitted=sum(not isinstance(choice, Drop) for choice in chosen.values()),
        )

    @property
    def sequence_bytes(self) -> int:
        """One image's tokens between two blocks, in float32."""
        return math.prod(self.tokens) * _FP32

    def dump_bytes(self, samples: int) -> int:
        """Each site's input and output for this many samples, in 16 bits.

        Source: arXiv:2506.05340's released code stores both in fp16 (8,000 samples of DiT-XL/2: 264 GB).
        """
        return 2 * _BF16 * samples * math.prod(self.tokens) * self.num_fitted

    def trained(self, trainable: str | tuple[str, ...]) -> int:
        """Number of parameters that stage 2 trains."""
        if trainable == "all":
            return sum(self.names.values())
        if trainable == "new":
            return sum(self.names[name] for name in self.new_names)
        return sum(n for name, n in self.names.items() if any(fnmatch.fnmatch(name, p) for p in trainable))


def _precisions(recipe: Recipe) -> set[Precision]:
    return {config.precision for config in (recipe.distill, recipe.finetune) if config is not None}


def _saved_an_image(model: nn.Module, precision: Precision, grid: Grid) -> int:
    """Bytes kept for the backward pass per image; bf16 copies of weights, kept once, are not among them."""
    host = host_of(model)

    def saved(batch_size: int) -> int:
        with mixed_precision(torch.device("cpu"), precision), warnings.catch_warnings():
            # a norm in fp32 of activations in bf16 says that it will be slower here, where nothing is computed
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            size = {"rows": grid.rows, "cols": grid.cols, "frames": grid.frames}
            parts = dry_run(model, [], lambda: host.example(model, batch_size=batch_size, **size))
        return parts[""].saved_bytes

    return saved(2) - saved(1)


@dataclass(frozen=True)
class _Clock:
    """Estimated time of work on the devices."""

    device: Any
    peak_tflops: float | None
    processes: int
    mfu: float
    folder: Path | None

    def hours(self, stage: str, *, flops: int, images: int, precision: Precision) -> tuple[float | None, str]:
        """Hours, and what they come from."""
        rate = _logged_rate(self.folder / stage / "log.jsonl") if self.folder else None
        if rate is not None:
            return images / rate / 3600, f"measured, {rate:.4g} images/s in {self.folder}"
        peak = self.peak_tflops or (self.device.tflops(precision) if self.device else None)
        if peak is None:
            return None, "unknown for this device: set --device or --peak-tflops"
        seconds = flops / (peak * 1e12 * self.mfu * self.processes)
        return seconds / 3600, f"computed, FLOPs at {self.mfu:.0%} of {peak:g} TFLOP/s ({precision})"


def _logged_rate(log: Path) -> float | None:
    """Median images per second that a stage has logged."""
    if not log.is_file():
        return None
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    rates = [line["images_per_s"] for line in lines if "images_per_s" in line]
    return median(rates) if rates else None


def _training(recipe: Recipe, shapes: _Shapes, clock: _Clock) -> list[StageForecast]:
    flops, found = stage_flops(recipe, shapes.cost, shapes.chosen), []
    if recipe.calibrate and shapes.chosen:
        images = recipe.calibrate.samples
        hours, basis = clock.hours(
            "calibrate", flops=flops["calibrate"], images=images, precision=recipe.calibrate.precision
        )
        found.append(
            StageForecast(
                name="calibrate",
                work=f"{images:,} images, at most twice",
                images=images,
                flops=flops["calibrate"],
                hours=hours,
                basis=basis,
                memory=_weights(shapes),
                disk={"operators": _FP32 * shapes.new_params},
            )
        )
    stages: tuple[tuple[Literal["distill", "finetune"], Any, Any, Any], ...] = (
        ("distill", recipe.distill if shapes.chosen else None, _distill_memory, _distill_disk),
        ("finetune", recipe.finetune, _finetune_memory, _finetune_disk),
    )
    for name, config, memory, disk in stages:
        if config is None:
            continue
        images = config.steps * config.batch_size
        hours, basis = clock.hours(name, flops=flops[name], images=images, precision=config.precision)
        found.append(
            StageForecast(
                name=name,
                work=f"{config.steps:,} steps of {config.batch_size} images",
                images=images,
                flops=flops[name],
                hours=hours,
                basis=basis,
                memory=memory(config, shapes, clock.processes),
                disk=disk(config, shapes),
            )
        )
    return found


def _weights(shapes: _Shapes) -> dict[str, int]:
    return {"pretrained model": _FP32 * shapes.cost.before.params, "operators": _FP32 * shapes.new_params}


def _copies(precision: Precision, params: int) -> dict[str, int]:
    """Bytes of weight copies that autocast keeps during a pass."""
    return {"bf16 copies of weights": _BF16 * params} if precision == "bf16" else {}


def _distill_memory(config: DistillConfig, shapes: _Shapes, processes: int) -> dict[str, int]:
    """Memory of stage 1: the teacher keeps no graph, so one block's activations and the graph of the largest operator."""
    spreads_sites = config.spread == "sites"
    own = shapes.new_params // (processes if spreads_sites else 1)
    batch = config.batch_size // (1 if spreads_sites else processes) // config.accumulate
    block = shapes.saved[config.precision] // shapes.num_blocks
    largest = max((site.saved_bytes for site in shapes.cost.after.sites if site.operator), default=block)
    return {
        "pretrained model": _FP32 * shapes.cost.before.params,
        "operators": _FP32 * shapes.new_params,
        "gradients and moments": (_FP32 + _ADAM) * own,
        **_copies(config.precision, shapes.cost.before.params + shapes.new_params),
        f"activations of {batch} images": batch * (block + largest),
    }


def _distill_disk(config: DistillConfig, shapes: _Shapes) -> dict[str, int]:
    state = (_FP32 + _ADAM) * shapes.new_params
    return {
        f"states ({NUM_STATES} kept, one being written)": (NUM_STATES + 1) * state,
        "operators": _FP32 * shapes.new_params,
        "activations": _kept_activations(config, shapes),
    }


def _finetune_memory(config: FinetuneConfig, shapes: _Shapes, processes: int) -> dict[str, int]:
    params, trained = shapes.cost.after.params, shapes.trained(config.trainable)
    shards = processes if config.model_dump().get("shard") else 1
    batch = config.batch_size // processes // config.accumulate
    image = shapes.saved[config.precision]
    if config.gradient_checkpointing:
        # what stands between blocks, and one block at a time
        image = image // shapes.num_blocks + shapes.num_blocks * shapes.sequence_bytes
    average = {"moving average": _FP32 * trained // shards} if config.ema_device == "model" else {}
    return {
        "pretrained model": _FP32 * shapes.cost.before.params,
        "weights": _FP32 * params // shards,
        "gradients": _FP32 * trained // shards,
        "moments": _ADAM * trained // shards,
        **average,
        **_copies(config.precision, params // shards),
        f"activations of {batch} images": batch * image,
    }


def _finetune_disk(config: FinetuneConfig, shapes: _Shapes) -> dict[str, int]:
    params, trained = shapes.cost.after.params, shapes.trained(config.trainable)
    state = _FP32 * params + (_FP32 + _ADAM) * trained
    return {
        f"states ({NUM_STATES} kept, one being written)": (NUM_STATES + 1) * state,
        "model": _FP32 * params,
    }


def _kept_activations(config: DistillConfig, shapes: _Shapes) -> int:
    element = _BF16 if config.precision == "bf16" else _FP32
    return shapes.dump_bytes(config.cache_samples or 0) * element // _BF16


def _cached(recipe: Recipe, shapes: _Shapes) -> int:
    return _kept_activations(recipe.distill, shapes) if recipe.distill else 0


def _sampling(recipe: Recipe, shapes: _Shapes, clock: _Clock) -> list[StageForecast]:
    config = recipe.sample
    if config is None:
        return []
    channels, *size = shapes.shape
    if channels not in (1, 3):
        channels, size = 3, [*size[:-2], *(_VAE_FACTOR * side for side in size[-2:])]
    guidance = config.guidance
    guided = sum(guidance.is_on(t / 999) for t in range(1000)) / 1000 if guidance else 0
    calls = config.num_images * config.calls * (1 + guided)
    found = []
    for row in rows_in(recipe, shapes.chosen):
        is_edited = ROWS[row].is_edited
        cost = shapes.cost.after if is_edited else shapes.cost.before
        flops = round(calls * cost.flops)
        hours, basis = clock.hours(
            f"samples/{row}", flops=flops, images=config.num_images, precision=config.precision
        )
        found.append(
            StageForecast(
                name=f"sample {row}",
                work=f"{config.num_images:,} images, {config.steps} steps",
                images=round(calls),
                flops=flops,
                hours=hours,
                basis=basis,
                memory={"pretrained model": _FP32 * shapes.cost.before.params}
                | ({"weights": _FP32 * cost.params} if is_edited else {})
                | _copies(config.precision, cost.params),
                disk={
                    "images (in shards, then in one file)": 2 * config.num_images * channels * math.prod(size)
                },
            )
        )
    return found


def _data(recipe: Recipe, shapes: _Shapes) -> dict[str, int | None]:
    """Items and bytes of the data; for missing latents, as many as the recipe names, as samples in 16 bits."""
    config = recipe.data
    if not isinstance(config, LatentsConfig):
        return {"items": None, "bytes": None}
    if config.per_class is None or shapes.num_classes is None:
        return {"items": None, "bytes": None}
    items = config.per_class * shapes.num_classes
    return {"items": items, "bytes": items * math.prod(shapes.shape) * _BF16}

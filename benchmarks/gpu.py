"""Operators, forward passes, both training stages and sampling on one accelerator, at the geometries of published models.

    python benchmarks/gpu.py [--toy] [--only SECTION ...] [--out FILE]

Random weights and no network: DiT-XL/2 at 256 and 1,024 tokens, PixArt-Sigma at 1,024 and 2,048 pixels, FLUX.1 at 1,024 pixels,
Wan 2.1 1.3B at 480p. Each operator is compared with its own float64 pass on a CPU before anything is timed. Ours and the
alternative are timed in turn; medians are compared. Prints a table, and writes JSON. A row that fails says why, and the exit
status is then 1. `--toy` takes tiny geometries, on any device, to see that the script works.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from grafting.contract import Grid, Site, TokenLayout
from grafting.cost.plan import plan_cost
from grafting.cost.speed import device_at
from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import build_operators, graft, sharing_copy
from grafting.hosts import host_of
from grafting.models.dit import Attention as DiTAttention
from grafting.models.dit import DiT, Mlp
from grafting.operators import parse_operator
from grafting.sampling.chain import SamplingConfig, sample
from grafting.training.distillation import DistillConfig, distill
from grafting.training.finetuning import FinetuneConfig, finetune

KERNELS: dict[str, dict[str, Any]] = {
    "window-1d w=4": {"name": "window-1d", "window": 4},
    "window-2d r=3": {"name": "window-2d", "radius": 3},
    "window-2d r=8": {"name": "window-2d", "radius": 8},
    "linear": {"name": "linear"},
    "hybrid": {"name": "hybrid", "first": {"name": "window-2d", "radius": 1}, "second": "linear"},
    "ttt": {"name": "ttt"},
    "gated-conv-x": {"name": "gated-conv-x"},
}
MIXERS: dict[str, dict[str, Any]] = {
    "hyena-se": {"name": "hyena-se"},
    "hyena-x": {"name": "hyena-x"},
    "hyena-y": {"name": "hyena-y"},
    "hyena-x 2d": {"name": "hyena-x", "geometry": "2d", "kernel_size": 3},
    "mamba2": {"name": "mamba2"},
}
MLPS: dict[str, dict[str, Any]] = {
    "mlp r=3": {"name": "mlp", "ratio": 3},
    "mlp-hyena-x": {"name": "mlp-hyena-x"},
}
PAPER_LAYERS = (8, 10, 12, 14, 16, 18, *range(20, 28))
"""PixArt-Sigma's blocks that get Hyena-X in arXiv:2506.05340."""


@dataclass
class Row:
    """One comparison: median milliseconds of ours and of the alternative, in turn."""

    section: str
    name: str
    ours_ms: float | None = None
    alternative: str = ""
    alternative_ms: float | None = None
    spread: float | None = None
    """Half the middle half of ours, over its median."""
    more: dict[str, float] = field(default_factory=dict)
    fault: str = ""

    @property
    def ratio(self) -> float | None:
        return self.alternative_ms / self.ours_ms if self.ours_ms and self.alternative_ms else None


@dataclass(frozen=True)
class Bench:
    """Where and how large."""

    device: torch.device
    toy: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def seconds(self) -> float:
        """Timed for about so long, each."""
        return 0.02 if self.toy else 0.12

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def milliseconds(self, run: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            started = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - started)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def in_turn(self, *runs: Callable[[], Any], least: int = 5) -> list[list[float]]:
        """Times of each, taken in turn after a warm-up of two."""
        for run in runs:
            run()
            self.milliseconds(run)
        times: list[list[float]] = [[] for _ in runs]
        started = time.perf_counter()
        while len(times[0]) < least or time.perf_counter() - started < self.seconds * len(runs):
            for column, run in zip(times, runs, strict=True):
                column.append(self.milliseconds(run))
        return times

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def compared(self, row: Row, ours: Callable[[], Any], alternative: Callable[[], Any]) -> None:
        own, other = self.in_turn(ours, alternative)
        row.ours_ms, row.alternative_ms = statistics.median(own), statistics.median(other)
        first, _, third = statistics.quantiles(own, n=4)
        row.spread = (third - first) / 2 / row.ours_ms

    @contextmanager
    def measuring_memory(self, row: Row) -> Iterator[None]:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        yield
        if self.device.type == "cuda":
            row.more["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30


def ceilings(bench: Bench) -> Iterator[Row]:
    """What the device reaches: bytes copied, read and written, and a matrix product on random data."""
    n = 2**12 if bench.toy else 2**30
    source, target = (torch.empty(n, dtype=torch.uint8, device=bench.device) for _ in range(2))
    ms = statistics.median(bench.in_turn(lambda: target.copy_(source))[0])
    yield Row("ceilings", "copy", ms, more={"gb_per_s": 2 * n / ms / 1e6})
    n = 64 if bench.toy else 8192
    a, b = bench.randn(2, n, n)
    ms = statistics.median(bench.in_turn(lambda: a @ b)[0])
    yield Row(
        "ceilings",
        f"{bench.dtype} product of {n}".replace("torch.", ""),
        ms,
        more={"tflops": 2 * n**3 / ms / 1e9},
    )


def site_of(side: int, *, heads: int, head_dim: int, role: Any = "attention") -> Site:
    return Site(role=role, block=0, path="x", dim=heads * head_dim, num_heads=heads, grid=Grid(side, side))


def correctness(bench: Bench) -> Iterator[Row]:
    """Every operator's output and gradients on the device, against its own float64 pass on the CPU."""
    for name, settings in {**KERNELS, **MIXERS, **MLPS}.items():
        row = Row("correctness", name)
        yield attempted(row, lambda s=settings, r=row: _checked(bench, r, s))


def _checked(bench: Bench, row: Row, settings: dict[str, Any]) -> None:
    row.more = {
        f"{kind}_{precision}": error
        for precision in ("fp32", "bf16")
        for kind, error in _errors(bench, settings, precision).items()
    }
    limits = {"output_fp32": 1e-3, "gradient_fp32": 1e-2, "output_bf16": 3e-2, "gradient_bf16": 2e-1}
    wrong = [key for key, limit in limits.items() if not row.more[key] < limit]
    row.fault = f"errors above their limits: {', '.join(wrong)}" if wrong else ""


def _errors(bench: Bench, settings: dict[str, Any], precision: str) -> dict[str, float]:
    heads, head_dim, side = (2, 8, 6) if bench.toy else (4, 72, 24)
    role = "mlp" if settings["name"].startswith("mlp") else "attention"
    site = site_of(side, heads=heads, head_dim=head_dim, role=role)
    torch.manual_seed(0)
    operator = parse_operator(settings).build(site).double()
    with torch.no_grad():
        for parameter in operator.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    is_kernel = settings["name"] in {kernel["name"] for kernel in KERNELS.values()}
    shape = (2, heads, side * side, head_dim) if is_kernel else (2, side * side, heads * head_dim)
    inputs = [torch.randn(shape, dtype=torch.float64) for _ in range(3 if is_kernel else 1)]
    weight = torch.randn(shape, dtype=torch.float64)

    def outcome(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        own = copy.deepcopy(operator).to(device, dtype)
        given = [x.to(device, dtype).requires_grad_() for x in inputs]
        y = own(*given, TokenLayout(site.grid))
        parameters = [p for p in own.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(
            y, [*given, *parameters], weight.to(device, y.dtype), allow_unused=True
        )
        return [y.detach(), *(g for g in gradients if g is not None)]

    exact = outcome(torch.device("cpu"), torch.float64)
    found = outcome(bench.device, torch.float32 if precision == "fp32" else torch.bfloat16)
    errors = [_distance(a, b) for a, b in zip(found, exact, strict=True)]
    return {"output": errors[0], "gradient": max(errors[1:])}


def _distance(found: Tensor, exact: Tensor) -> float:
    return float((found.double().cpu() - exact).norm() / exact.norm())


@dataclass(frozen=True)
class Passes:
    """A module, or a function, on its inputs; and what gradients are taken of."""

    run: Callable[[], Tensor]
    leaves: list[Tensor]

    @classmethod
    def of(cls, module: nn.Module, inputs: list[Tensor], *others: Any) -> "Passes":
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return cls(lambda: module(*inputs, *others), [*inputs, *trained])

    def forward(self) -> None:
        with torch.no_grad():
            self.run()

    def both(self) -> None:
        y = self.run()
        torch.autograd.grad(y, self.leaves, y.detach(), allow_unused=True)


def operators(bench: Bench) -> Iterator[Row]:
    """Kernels against the fastest dense SDPA backend, mixers against DiT's attention, MLPs against DiT's MLP."""
    heads, head_dim = (2, 16) if bench.toy else (16, 72)
    for side in (4, 8) if bench.toy else (16, 64, 128):
        tokens, batch = side**2, 1 if bench.toy else max(1, 2**16 // side**2)
        layout = TokenLayout(Grid(side, side))

        def built(settings: dict[str, Any], role: Any = "attention", side: int = side) -> nn.Module:
            site = site_of(side, heads=heads, head_dim=head_dim, role=role)
            return parse_operator(settings).build(site).to(bench.device, bench.dtype)

        # laid out in memory as a host's projections leave them
        drawn = bench.randn(3, batch, tokens, heads, head_dim)
        inputs = [x.transpose(1, 2).requires_grad_() for x in drawn]
        backend, dense = fastest_sdpa(bench, inputs)
        for name, settings in KERNELS.items():
            ours = Passes.of(built(settings), inputs, layout)
            yield from _both(bench, f"{name}, {tokens:,} tokens", ours, f"SDPA, {backend}", dense)
        x = [bench.randn(batch, tokens, heads * head_dim).requires_grad_()]
        for alternative, module, role, group in (
            ("DiT's attention", DiTAttention(heads * head_dim, heads), "attention", MIXERS),
            ("DiT's MLP", Mlp(heads * head_dim, 4 * heads * head_dim), "mlp", MLPS),
        ):
            theirs = Passes.of(module.to(bench.device, bench.dtype), x)
            for name, settings in group.items():
                ours = Passes.of(built(settings, role), x, layout)
                yield from _both(bench, f"{name}, {tokens:,} tokens", ours, alternative, theirs)


def _both(bench: Bench, name: str, ours: Passes, alternative: str, theirs: Passes) -> Iterator[Row]:
    """A row without gradients, and one of a forward and a backward pass."""
    for passes, own, other in (
        ("forward", ours.forward, theirs.forward),
        ("forward + backward", ours.both, theirs.both),
    ):
        row = Row("operators", f"{name}, {passes}", alternative=alternative)
        yield attempted(row, lambda r=row, a=own, b=other: bench.compared(r, a, b))


def fastest_sdpa(bench: Bench, inputs: list[Tensor]) -> tuple[str, Passes]:
    """The dense backend that is fastest forward and backward, of those that take these inputs."""
    found: dict[str, tuple[float, Passes]] = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):

        def dense(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*inputs)

        passes = Passes(dense, inputs)
        try:
            times = bench.in_turn(passes.both)[0]
        except RuntimeError:
            continue
        found[backend.name.lower().removesuffix("_attention")] = statistics.median(times), passes
    name = min(found, key=lambda key: found[key][0])
    return name, found[name][1]


@dataclass(frozen=True)
class Geometry:
    """A published model and one of its inputs."""

    name: str
    build: Callable[[], nn.Module]
    grid: Grid
    batch: int
    num_text: int
    plans: dict[str, Plan]


def replacing(operator: str | dict[str, Any], blocks: Any = "all", role: Any = "attention") -> Plan:
    return Plan(edits=(Replace(role=role, blocks=blocks, operator=operator),))


def geometries(toy: bool) -> Iterator[Geometry]:
    import diffusers

    hyena = {"hyena-x, half": replacing("hyena-x", "odd"), "hyena-x, all": replacing("hyena-x")}
    window = {"window-2d r=3, all": replacing({"name": "window-2d", "radius": 1 if toy else 3})}
    dit = (
        {"hidden_size": 32, "depth": 2, "num_heads": 2}
        if toy
        else {"hidden_size": 1152, "depth": 28, "num_heads": 16}
    )
    for side, batch in ((4, 2), (8, 1)) if toy else ((16, 32), (32, 8)):
        merged = {"merged pairs": Plan.model_validate({"edits": [{"edit": "merge", "blocks": "all"}]})}
        yield Geometry(
            f"DiT-XL/2, {side * side:,} tokens",
            lambda side=side: DiT(input_size=2 * side, **dit),
            Grid(side, side),
            batch,
            0,
            {**hyena, **window, **merged},
        )
    pixart: dict[str, Any] = {
        "sample_size": 128,
        "use_additional_conditions": False,
        "interpolation_scale": 2,
        "caption_channels": 4096,
        "out_channels": 8,
    }
    if toy:
        pixart |= {
            "sample_size": 16,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 32,
        }
    for size in (16,) if toy else (128, 256):
        paper = {} if toy else {"hyena-x, the paper's 14": replacing("hyena-x", PAPER_LAYERS)}
        yield Geometry(
            f"PixArt-Sigma, {8 * size:,} px",
            lambda size=size: diffusers.PixArtTransformer2DModel(
                **{**pixart, "sample_size": size, "interpolation_scale": max(1, size // 64)}
            ),
            Grid(size // 2, size // 2),
            1,
            8 if toy else 300,
            {**paper, **hyena, **window, "linear, all": replacing("linear")},
        )
    flux = (
        {
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        }
        if toy
        else {"guidance_embeds": True}
    )
    side = 8 if toy else 64
    yield Geometry(
        "FLUX.1, 1,024 px",
        lambda: diffusers.FluxTransformer2DModel(**flux),
        Grid(side, side),
        1,
        8 if toy else 512,
        {**window, "gated-conv-x, all": replacing("gated-conv-x")},
    )
    wan: dict[str, Any] = (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "text_dim": 32,
            "ffn_dim": 64,
            "num_layers": 2,
            "freq_dim": 16,
        }
        if toy
        else {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
    )
    yield Geometry(
        "Wan 2.1 1.3B, 480p, 81 frames",
        lambda: diffusers.WanTransformer3DModel(**wan),
        Grid(4, 6, frames=3) if toy else Grid(30, 52, frames=21),
        1,
        8 if toy else 512,
        {
            "window-3d r=3 f=1, all": replacing(
                {"name": "window-3d", "radius": 3, "frames": 1}
                if not toy
                else {"name": "window-3d", "radius": 1, "frames": 1}
            ),
            "gated-conv-x, all": replacing("gated-conv-x"),
        },
    )


def forward(bench: Bench) -> Iterator[Row]:
    """Whole models before and after a plan, without gradients."""
    for geometry in geometries(bench.toy):
        name = f"{geometry.name}, batch {geometry.batch}"
        made: list[Any] = []
        row = attempted(
            Row("forward", name), lambda g=geometry, m=made: m.extend(_model_and_example(bench, g))
        )
        if row.fault:
            yield row
            continue
        model, inputs = made
        for plan_name, plan in geometry.plans.items():
            row = Row("forward", f"{name}: {plan_name}", alternative="the model as it was")
            yield attempted(row, lambda r=row, p=plan, m=model, i=inputs: _compared_plan(bench, r, m, p, i))
        del model, inputs
        made.clear()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def _model_and_example(bench: Bench, geometry: Geometry) -> tuple[nn.Module, dict[str, Any]]:
    model = materialised(geometry.build, bench)
    return model, example_of(model, geometry, bench)


def materialised(build: Callable[[], nn.Module], bench: Bench) -> nn.Module:
    """A model with random weights, made on the device at once; buffers have their values."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(bench.dtype)
    try:
        with bench.device:
            model = build().eval()
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for parameter in model.parameters():  # some are made in a dtype of their own
            parameter.data = torch.randn_like(parameter, dtype=bench.dtype) * 0.02
    return model.requires_grad_(False)


def example_of(model: nn.Module, geometry: Geometry, bench: Bench) -> dict[str, Any]:
    grid, text = geometry.grid, {"num_text": geometry.num_text} if geometry.num_text else {}
    made = host_of(model).example(
        model, rows=grid.rows, cols=grid.cols, frames=grid.frames, batch_size=geometry.batch, **text
    )
    return tree_map_only(
        Tensor, lambda t: t.to(bench.device, bench.dtype if t.is_floating_point() else None), made
    )


@torch.no_grad()
def _compared_plan(bench: Bench, row: Row, model: nn.Module, plan: Plan, inputs: dict[str, Any]) -> None:
    grafted_model = sharing_copy(model)
    graft(grafted_model, plan)
    bench.compared(row, lambda: grafted_model(**inputs), lambda: model(**inputs))
    with bench.measuring_memory(row):
        grafted_model(**inputs)


class Noise:
    """Latents and classes drawn at random: a data set of the published shape."""

    def __init__(self, bench: Bench):
        size, draw = 8 if bench.toy else 32, torch.Generator().manual_seed(0)
        self.x = torch.randn(512, 4, size, size, generator=draw)
        self.num_classes = 1000

    def __len__(self) -> int:
        return len(self.x)

    def __str__(self) -> str:
        return "noise"

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.x[indices], indices % self.num_classes


def dit_of(bench: Bench) -> DiT:
    sizes = (
        {"hidden_size": 32, "depth": 2, "num_heads": 2}
        if bench.toy
        else {"hidden_size": 1152, "depth": 28, "num_heads": 16}
    )
    torch.manual_seed(0)
    with bench.device:
        model = DiT(input_size=8 if bench.toy else 32, **sizes)
    return without_zeros(model)


@torch.no_grad()
def without_zeros(model: DiT) -> DiT:
    """The model, whose layers that start at zero would hide their work."""
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.normal_(std=0.02)
    return model


def attempted(row: Row, fill: Callable[[], Any]) -> Row:
    """The row, filled; or with the reason why not."""
    try:
        fill()
    except Exception as error:
        row.fault = _told(error)
    return row


def distillation(bench: Bench) -> Iterator[Row]:
    """Stage 1 of all attention sites of DiT-XL/2, against its parts alone: the teacher's pass, and the operators' passes."""
    teacher, batch = dit_of(bench).eval(), 4 if bench.toy else 64
    hyena, window = {"name": "hyena-x"}, {"name": "window-1d", "window": 2}
    for operator, is_compiled in [(hyena, False), (window, False)] + [(hyena, True)] * (not bench.toy):
        name = f"DiT-XL/2, all attention sites, {operator['name']}, batch {batch}{', compiled' if is_compiled else ''}, a step"
        row = Row("stage 1", name, alternative="teacher's pass + operators'")
        yield attempted(
            row,
            lambda o=operator, c=is_compiled, r=row: _distilled(
                bench, r, teacher, replacing(o), batch, is_compiled=c
            ),
        )


def _distilled(bench: Bench, row: Row, teacher: DiT, plan: Plan, batch: int, *, is_compiled: bool) -> None:
    built = build_operators(teacher, plan)
    other_teacher, other_built = copy.deepcopy((teacher, built))  # which are not compiled
    for operator in other_built.values():
        operator.to(bench.device)
    config = DistillConfig(
        steps=10_000,
        batch_size=batch,
        holdout=batch,
        holdout_every=100_000,
        precision="fp32" if bench.toy else "bf16",
        compile=is_compiled,
    )
    steps = distill(teacher, built, Noise(bench), config)
    next(steps)  # measures on the held-out images
    calls = calls_of(bench, other_teacher, other_built, batch)
    with bench.measuring_memory(row):
        bench.compared(
            row, lambda: next(steps), lambda: parts_of(bench, other_teacher, other_built, calls, batch)
        )
    steps.close()


def _teacher_pass(bench: Bench, teacher: nn.Module, batch: int) -> None:
    x = torch.randn(batch, 4, *(2 * (8 if bench.toy else 32,)), device=bench.device)
    zeros = torch.zeros(batch, device=bench.device)
    with torch.no_grad(), torch.autocast(bench.device.type, torch.bfloat16, enabled=not bench.toy):
        teacher(x, zeros, zeros.long())


def calls_of(bench: Bench, teacher: nn.Module, built: Any, batch: int) -> dict[str, Tensor]:
    """The tokens that each site sees, of one forward pass."""
    calls: dict[str, Tensor] = {}
    handles = [
        teacher.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: calls.update({path: args[0]})
        )
        for path in built
    ]
    _teacher_pass(bench, teacher, batch)
    for handle in handles:
        handle.remove()
    return calls


def parts_of(bench: Bench, teacher: nn.Module, built: Any, calls: dict[str, Tensor], batch: int) -> None:
    _teacher_pass(bench, teacher, batch)
    for path, operator in built.items():
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=not bench.toy):
            loss = operator(calls[path]).float().abs().mean()
        loss.backward()


def finetuning(bench: Bench) -> Iterator[Row]:
    """Stage 2 of DiT-XL/2 with half of its attention replaced, against a loop as one writes it by hand."""
    batch = 4 if bench.toy else 64
    for compiled in (False,) if bench.toy else (False, True):
        name = f"DiT-XL/2, hyena-x in half, batch {batch}{', compiled' if compiled else ''}, a step"
        row = Row("stage 2", name, alternative="a plain loop on the same model")
        yield attempted(row, lambda c=compiled, r=row: _finetuned(bench, r, batch, compiled=c))


def _finetuned(bench: Bench, row: Row, batch: int, *, compiled: bool) -> None:
    model, plan = dit_of(bench), replacing("hyena-x", "odd")
    flops = 3 * batch * plan_cost(model, plan).after.flops
    graft(model, plan)
    other = plain_loop(bench, copy.deepcopy(model), Noise(bench), batch)
    config = FinetuneConfig(
        steps=10_000, batch_size=batch, precision="fp32" if bench.toy else "bf16", compile=compiled
    )
    blocks = [site.path for site in host_of(model).blocks(model)]
    steps = finetune(model, Noise(bench), config, blocks=blocks)
    with bench.measuring_memory(row):
        bench.compared(row, lambda: next(steps), lambda: next(other))
    if (kind := device_at(bench.device)) and row.ours_ms:
        row.more["mfu"] = flops / row.ours_ms / 1e9 / kind.tflops("bf16")
    steps.close()


def plain_loop(bench: Bench, model: nn.Module, data: Noise, batch: int) -> Iterator[None]:
    """Noise, step, loss, AdamW and average, one after the other, with autocast."""
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    alpha_bars = torch.linspace(1e-4, 0.02, 1000, device=bench.device).neg().add(1).cumprod(0)
    orders = cycle(torch.randperm(len(data)).split(batch))
    model.train()
    while True:
        x, labels = (a.to(bench.device) for a in data.batch(next(orders)))
        t = torch.randint(1000, (len(x),), device=bench.device)
        noise = torch.randn_like(x)
        level = alpha_bars[t][:, None, None, None]
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=not bench.toy):
            prediction = model(level.sqrt() * x + (1 - level).sqrt() * noise, t, labels)
        loss = F.mse_loss(prediction[:, : x.shape[1]].float(), noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        with torch.no_grad():
            for own, trained in zip(average.parameters(), model.parameters(), strict=True):
                own.mul_(0.9999).add_(trained, alpha=1e-4)
        loss.item()
        yield


def sampling(bench: Bench) -> Iterator[Row]:
    """Guided ancestral sampling of DiT-XL/2: `sample` in bf16, against passes of the model in TF32, as the reference runs it."""
    batch, steps = (2, 2) if bench.toy else (16, 20)
    model = dit_of(bench).eval()
    size = 8 if bench.toy else 32

    @torch.no_grad()
    def passes() -> None:
        x, t = (
            torch.randn(2 * batch, 4, size, size, device=bench.device),
            torch.zeros(2 * batch, device=bench.device),
        )
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        for _ in range(steps):
            model(x, t, t.long())
        torch.backends.cuda.matmul.allow_tf32 = before

    for compiled in (False,) if bench.toy else (False, True):
        config = SamplingConfig(
            steps=steps,
            num_images=batch,
            batch_size=batch,
            guided_channels=3,
            precision="fp32" if bench.toy else "bf16",
            compile=compiled,
        )
        name = f"DiT-XL/2, {steps} steps of ddpm, guided, {batch} images{', compiled' if compiled else ''}"
        row = Row("sampling", name, alternative="the model's passes in TF32")
        yield attempted(
            row, lambda r=row, c=config: bench.compared(r, lambda: list(sample(model, c)), passes)
        )


SECTIONS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "ceilings": ceilings,
    "correctness": correctness,
    "operators": operators,
    "forward": forward,
    "distillation": distillation,
    "finetuning": finetuning,
    "sampling": sampling,
}


def _told(error: Exception) -> str:
    traceback.print_exc(limit=-6, file=sys.stderr)
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


def shown(row: Row) -> str:
    def number(value: float | None, unit: str = "") -> str:
        return "" if value is None else f"{value:,.2f}{unit}"

    more = "; ".join(f"{key} {value:.3g}" for key, value in row.more.items())
    return f"{row.name:<66}{number(row.ours_ms):>10}{number(row.alternative_ms):>10}{number(row.ratio, 'x'):>9}  {row.alternative:<28}{more}{row.fault}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="tiny geometries, to see that the script works")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--device", help="by default the accelerator, else the CPU")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda" and not args.toy:
        parser.error(
            f"these geometries are for an accelerator; {device.type} was found: --toy takes small ones"
        )
    bench = Bench(device, toy=args.toy)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    versions = {"torch": torch.__version__, "python": platform.python_version(), "cuda": torch.version.cuda}
    print(f"{name}; {versions}; milliseconds of ours, of the alternative, and how many times faster ours is")
    rows: list[Row] = []
    for section in args.only:
        started = time.perf_counter()
        print(f"\n== {section}", flush=True)
        for row in SECTIONS[section](bench):
            rows.append(row)
            print(shown(row), flush=True)
            if args.out:
                written = [asdict(row) | {"ratio": row.ratio} for row in rows]
                args.out.write_text(
                    json.dumps({"device": name, "versions": versions, "rows": written}, indent=1) + "\n"
                )
        print(f"   {time.perf_counter() - started:.0f} s", flush=True)
    return int(any(row.fault for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())

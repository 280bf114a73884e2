"""What the package costs on one CPU thread, beside what one would use in its place: `make bench`.

    python benchmarks/cpu.py [--only SECTION ...] [--out benchmarks/results/cpu.json]

Ours and the alternative are run in turn in one process, in CPU time, fp32; medians are compared. A floor is what the device
itself would take: the products at the speed of a large matrix product, or the inputs and outputs, read and written once, at that
of a copy, whichever is longer. Prints a table, writes it as JSON and, beside it, as
Markdown. About six minutes of a core.
"""

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grafting
from gpu import KERNELS, Bench, Noise, calls_of, parts_of, plain_loop, replacing, without_zeros
from grafting.contract import Grid, Site, TokenLayout
from grafting.cost.count import site_flops
from grafting.data.bundled import scenes_pipeline_folder
from grafting.data.scenes import Captions
from grafting.diffusion import FlowMatching
from grafting.editing.surgery import build_operators, graft
from grafting.hosts import host_of
from grafting.metrics.frechet import FeatureStatistics, frechet_distance
from grafting.metrics.manifold import density_coverage, precision_recall
from grafting.models.dit import Attention, DiT, Mlp
from grafting.operators import parse_operator
from grafting.sampling.chain import SamplingConfig, sample
from grafting.training.distillation import DistillConfig, distill
from grafting.training.finetuning import FinetuneConfig, finetune
from grafting.weights.folder import save_delta
from grafting.weights.portable import Base

RESULTS = Path(__file__).parent / "results" / "cpu.json"
DTYPE = "float32"
HYENAS = ("hyena-se", "hyena-x", "hyena-y")
Run = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One comparison: median milliseconds of CPU time of ours and of the alternative."""

    name: str
    ours_ms: float
    alternative: str
    alternative_ms: float
    ratio: float
    """How many times faster ours is."""
    floor_share: float | None
    """The floor's time over ours."""
    spread: float
    """Half the middle half of ours, over its median."""
    device: str
    dtype: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Device:
    """What one thread of this machine reaches."""

    name: str
    flops_per_ms: float
    bytes_per_ms: float

    def floor_ms(self, *, flops: float = 0, moved: float = 0) -> float:
        return max(flops / self.flops_per_ms, moved / self.bytes_per_ms)


@cache
def device() -> Device:
    a, b = torch.randn(2, 1024, 1024)
    source = torch.randn(2**25)
    target = torch.empty_like(source)
    product, copied = in_turn(lambda: a @ b, lambda: target.copy_(source))
    moved = 2 * source.nbytes
    return Device(processor(), 2 * 1024**3 / statistics.median(product), moved / statistics.median(copied))


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def in_turn(*runs: Run, seconds: float = 1.5, least: int = 5) -> list[list[float]]:
    """CPU milliseconds of each, taken in turn after a warm-up."""
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    started = time.process_time()
    while len(times[0]) < least or time.process_time() - started < seconds * len(runs):
        for column, run in zip(times, runs, strict=True):
            begun = time.process_time()
            run()
            column.append(1e3 * (time.process_time() - begun))
    return times


def compared(name: str, ours: Run, alternative: str, other: Run, *, floor_ms: float | None = None) -> Row:
    own, theirs = in_turn(ours, other)
    ours_ms, other_ms = statistics.median(own), statistics.median(theirs)
    first, _, third = statistics.quantiles(own, n=4)
    return Row(
        name=name,
        ours_ms=round(ours_ms, 4),
        alternative=alternative,
        alternative_ms=round(other_ms, 4),
        ratio=round(other_ms / ours_ms, 3),
        floor_share=None if floor_ms is None else round(floor_ms / ours_ms, 3),
        spread=round((third - first) / 2 / ours_ms, 3),
        device=device().name,
        dtype=DTYPE,
        versions=versions(),
    )


def site_of(grid: Grid, *, heads: int, head_dim: int, role: Any = "attention") -> Site:
    return Site(role=role, block=0, path="x", dim=heads * head_dim, num_heads=heads, grid=grid)


def both_passes(module: Callable[..., Tensor], inputs: list[Tensor], *others: Any) -> Run:
    """Forward and backward, gradients of inputs and parameters; the output is its own gradient."""
    parameters = module.parameters() if isinstance(module, nn.Module) else ()
    leaves = [*inputs, *(p for p in parameters if p.requires_grad)]

    def run() -> None:
        y = module(*inputs, *others)
        torch.autograd.grad(y, leaves, y.detach(), allow_unused=True)

    return run


def kernels() -> Iterator[Row]:
    """Kernels against dense attention, forward and backward, on what a host's projections leave."""
    for side, batch, heads in ((16, 4, 6), (64, 1, 2)):
        grid, head_dim = Grid(side, side), 64
        layout, site = TokenLayout(grid), site_of(grid, heads=heads, head_dim=head_dim)
        drawn = torch.randn(3, batch, side * side, heads, head_dim)
        inputs = [x.transpose(1, 2).requires_grad_() for x in drawn]
        dense = both_passes(F.scaled_dot_product_attention, inputs)
        unit = inputs[0].nbytes
        for name, settings in KERNELS.items():
            config = parse_operator(settings)
            # four tensors forward, eight backward
            floor = device().floor_ms(flops=3 * batch * config.mixing_flops(site), moved=12 * unit)
            ours = both_passes(config.build(site), inputs, layout)
            tokens = f"{name}, {side * side:,} tokens"
            yield compared(tokens, ours, "dense SDPA", dense, floor_ms=floor)
            if name == "window-2d r=3":
                banded = partial(F.scaled_dot_product_attention, attn_mask=_near(grid, radius=3))
                yield compared(tokens, ours, "SDPA with the window as a mask", both_passes(banded, inputs))


def _near(grid: Grid, *, radius: int) -> Tensor:
    """Which tokens of a grid lie within so many rows and columns of each other."""
    places = torch.arange(grid.rows * grid.cols)
    row, column = places // grid.cols, places % grid.cols
    return ((row[:, None] - row).abs() <= radius) & ((column[:, None] - column).abs() <= radius)


class PlainHyenaX(nn.Module):
    """Hyena-X as one writes it: a linear for q, k, v, a Conv1d of each, gates, a linear."""

    def __init__(self, dim: int, taps: int):
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.conv = nn.Conv1d(3 * dim, 3 * dim, taps, groups=3 * dim, padding=taps - 1)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.conv(self.qkv(x).transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        q, k, v = mixed.chunk(3, dim=-1)
        return self.out(q * (k * v))


def mixers() -> Iterator[Row]:
    """Mixers against attention modules, and against other code for the same operator, forward and backward."""
    dim, heads = 384, 6
    attention, mlp, plain = Attention(dim, heads), Mlp(dim, 4 * dim), PlainHyenaX(dim, 4)
    causal = {"name": "mamba2", "direction": "causal"}
    cases: list[tuple[str, dict[str, Any], str, nn.Module]] = [
        *((name, {"name": name}, "DiT's attention", attention) for name in (*HYENAS, "mamba2")),
        ("hyena-x", {"name": "hyena-x"}, "the same by nn.Conv1d", plain),
        ("mamba2, causal", causal, "transformers' Mamba2Mixer", _mamba2_of_transformers(dim)),
        ("mlp r=3", {"name": "mlp", "ratio": 3}, "DiT's MLP", mlp),
        ("mlp-hyena-x", {"name": "mlp-hyena-x"}, "DiT's MLP", mlp),
    ]
    for side, batch in ((16, 4), (64, 1)):
        x = torch.randn(batch, side * side, dim, requires_grad=True)
        for name, settings, alternative, module in cases:
            role = "mlp" if name.startswith("mlp") else "attention"
            site = site_of(Grid(side, side), heads=heads, head_dim=dim // heads, role=role)
            config = parse_operator(settings)
            floor = device().floor_ms(flops=3 * batch * site_flops(config, site).total)
            ours = both_passes(config.build(site), [x], TokenLayout(site.grid))
            row = f"{name}, {side * side:,} tokens"
            yield compared(row, ours, alternative, both_passes(module, [x]), floor_ms=floor)


def _mamba2_of_transformers(dim: int) -> nn.Module:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    settings = {"state_size": 64, "head_dim": 64, "num_heads": 2 * dim // 64, "n_groups": 1, "chunk_size": 64}
    return Mamba2Mixer(Mamba2Config(hidden_size=dim, expand=2, num_hidden_layers=1, **settings), layer_idx=0)


def linear_attention() -> Iterator[Row]:
    """A whole attention with linear attention in it, against Sana's of diffusers."""
    from diffusers.models.attention_processor import Attention as DiffusersAttention
    from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0

    dim, heads, side = 384, 6, 64
    site = site_of(Grid(side, side), heads=heads, head_dim=dim // heads)
    kernel = parse_operator({"name": "linear", "feature_map": "relu"}).build(site)
    x = torch.randn(1, side * side, dim, requires_grad=True)
    module = DiffusersAttention(
        dim, heads=heads, dim_head=dim // heads, processor=SanaLinearAttnProcessor2_0()
    )

    def ours(x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for layer in (module.to_q, module.to_k, module.to_v)
        )
        return module.to_out[0](kernel(q, k, v, TokenLayout(site.grid)).transpose(1, 2).flatten(2))

    floor = device().floor_ms(flops=3 * site_flops(parse_operator("linear"), site).total)
    yield compared(
        f"linear attention with its projections, {side * side:,} tokens",
        both_passes(ours, [x]), "Sana's of diffusers", both_passes(module, [x]), floor_ms=floor,
    )  # fmt: skip


def training() -> Iterator[Row]:
    """Steps of both stages on a deep, narrow DiT: 28 sites whose tensors are small, so that what is left is dispatch."""
    batch, bench = 4, Bench(torch.device("cpu"), toy=True)
    teacher = dit(hidden_size=32, depth=28, num_heads=2)
    config = DistillConfig(
        steps=10**6, batch_size=batch, holdout=batch, holdout_every=10**6, precision="fp32"
    )
    built, other = (build_operators(teacher, replacing("hyena-x")) for _ in range(2))
    steps = distill(teacher, built, Noise(bench), config)
    stacked = distill(teacher, other, Noise(bench), config.model_copy(update={"stacked": True}))
    next(steps), next(stacked)
    yield compared(
        "stage 1, 28 sites stacked, a step", partial(next, stacked), "one by one", partial(next, steps)
    )
    stacked.close()
    yield compared(
        "stage 1, 28 sites, a step",
        partial(next, steps),
        "teacher's pass and the operators'",
        partial(parts_of, bench, teacher, built, calls_of(bench, teacher, built, batch), batch),
    )
    steps.close()
    model = copy.deepcopy(teacher)
    graft(model, replacing("hyena-x", "odd"))
    other = plain_loop(bench, copy.deepcopy(model), Noise(bench), batch)
    blocks = [site.path for site in host_of(model).blocks(model)]
    steps = finetune(
        model, Noise(bench), FinetuneConfig(steps=10**6, batch_size=batch, precision="fp32"), blocks=blocks
    )
    yield compared(
        "stage 2, 28 blocks, a step", partial(next, steps), "a loop written by hand", partial(next, other)
    )
    steps.close()
    grafted = copy.deepcopy(teacher)
    graft(grafted, replacing("softmax"))
    x, t = torch.randn(batch, 4, 8, 8), torch.zeros(batch, dtype=torch.long)
    with torch.no_grad():
        yield compared(
            "28 sites intercepted and left as they are, forward",
            lambda: grafted(x, t, t),
            "the model",
            lambda: teacher(x, t, t),
        )


def dit(**sizes: int) -> DiT:
    torch.manual_seed(0)
    return without_zeros(DiT(input_size=8, **sizes).eval())


def loading() -> Iterator[Row]:
    """A model of some 170 million parameters from disk, whole and as a delta to its base."""
    sizes = {
        "num_attention_heads": 12,
        "attention_head_dim": 64,
        "cross_attention_dim": 768,
        "num_layers": 18,
    }
    with tempfile.TemporaryDirectory() as folder:
        whole, base, delta = (Path(folder, name) for name in ("whole", "base", "delta"))
        model = diffusers.PixArtTransformer2DModel(**sizes, sample_size=32, caption_channels=64)
        model.save_pretrained(base)
        plan = replacing("hyena-x", "odd")
        graft(model, plan)
        grafting.save(model, whole)
        save_delta(delta, model, plan, Base(id=str(base)))
        theirs = partial(diffusers.PixArtTransformer2DModel.from_pretrained, base)
        count = round(sum(p.numel() for p in model.parameters()) / 1e6)
        for name, path in (("whole", whole), ("as a delta", delta)):
            row = f"loading {count} M parameters, {name}"
            yield compared(
                row, partial(grafting.load, path), "diffusers' from_pretrained of the base", theirs
            )


def sampling() -> Iterator[Row]:
    """Images of the bundled text-to-image model, against diffusers' pipeline with the same weights."""
    pipeline = diffusers.PixArtSigmaPipeline.from_pretrained(
        scenes_pipeline_folder(), tokenizer=None, text_encoder=None, vae=None, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    model, captions, images, steps = pipeline.transformer, Captions(), 4, 4
    denoiser = host_of(model).denoiser(model, captions, FlowMatching(scale=1000.0, shift=1.5))
    config = SamplingConfig(
        sampler="dpm-solver++",
        steps=steps,
        cfg_scale=2.0,
        num_images=images,
        batch_size=images,
        precision="fp32",
    )
    numbers, as_tensors = (
        torch.arange(images),
        {"shape": (3, 32, 32), "device": torch.device("cpu"), "dtype": torch.float32},
    )
    asked, empty = captions.at(numbers, **as_tensors), captions.at(captions.nulls(numbers), **as_tensors)
    call = {
        "prompt_embeds": asked["encoder_hidden_states"],
        "prompt_attention_mask": asked["encoder_attention_mask"],
        "negative_prompt": None,
        "negative_prompt_embeds": empty["encoder_hidden_states"],
        "negative_prompt_attention_mask": empty["encoder_attention_mask"],
        "num_inference_steps": steps,
        "guidance_scale": 2.0,
        "use_resolution_binning": False,
        "output_type": "latent",
    }
    yield compared(
        f"{images} guided images in {steps} steps",
        lambda: list(sample(model, config, denoiser=denoiser)),
        "diffusers' PixArtSigmaPipeline",
        lambda: pipeline(**call),
    )


def evaluation() -> Iterator[Row]:
    """Figures of features, against the packages that one knows."""
    import scipy.linalg
    from prdc import compute_prdc

    real, made = torch.randn(2, 2000, 256)

    def manifold() -> None:
        precision_recall(real, made, k=3)
        density_coverage(real, made, k=3)

    yield compared(
        "precision, recall, density, coverage of 2,000 images",
        manifold,
        "prdc",
        lambda: compute_prdc(real.numpy(), made.numpy(), nearest_k=3),
    )
    a, b = (FeatureStatistics.of(x) for x in torch.randn(2, 3000, 1024))
    covariances = [x.covariance.numpy() for x in (a, b)]

    def by_scipy() -> float:
        return float(np.trace(scipy.linalg.sqrtm(covariances[0] @ covariances[1])).real)

    yield compared(
        "Frechet distance of 1,024 features", lambda: frechet_distance(a, b), "scipy's sqrtm", by_scipy
    )


SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {
    "kernels": kernels,
    "mixers": mixers,
    "linear attention": linear_attention,
    "training": training,
    "loading": loading,
    "sampling": sampling,
    "evaluation": evaluation,
}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| what | ours, ms | in its place | its ms | ours is faster by | share of the floor |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = "" if row["floor_share"] is None else f"{row['floor_share']:.0%}"
        lines.append(
            f"| {row['name']} | {row['ours_ms']:,.2f} | {row['alternative']} | {row['alternative_ms']:,.2f} "
            f"| {row['ratio']:.2f}x | {share} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="JSON file; rows of other sections stay in it"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kept = json.loads(args.out.read_text())["rows"] if args.out.is_file() else []
    for section in args.only:
        for row in SECTIONS[section]():
            print(
                f"{row.name:<64}{row.ours_ms:>10.2f}{row.alternative_ms:>10.2f}{row.ratio:>8.2f}x  {row.alternative}",
                flush=True,
            )
            same = [old for old in kept if (old["name"], old["alternative"]) == (row.name, row.alternative)]
            kept = [asdict(row) if old in same else old for old in kept] + ([] if same else [asdict(row)])
            args.out.write_text(json.dumps({"rows": kept}, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(kept) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

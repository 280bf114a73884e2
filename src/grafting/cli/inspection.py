"""Read-only commands that inspect models, and what plans cost."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError, HostError
from ._shared import (
    Json,
    Model,
    Process,
    PromptsFolder,
    RecipeFile,
    Settings,
    Spec,
    err,
    open_denoiser,
    open_model,
    open_recipe,
    out,
    print_json,
)
from .display import follow, plain_table, say, show_cost
from .options import Options, command

if TYPE_CHECKING:
    from torch import nn

    from ..analysis import Locality
    from ..contract import Denoiser, Grid, Site
    from ..editing.plan import Choice
    from ..sampling.chain import SamplingConfig

app = typer.Typer()


@app.command()
def cost(
    recipe: RecipeFile,
    grid: Annotated[
        str | None,
        typer.Option(
            "--grid",
            "--resolution",
            metavar="ROWSxCOLS",
            help="Token grid; FRAMESxROWSxCOLS for video. [dim]Default: from `sample.shape` or `data.shape`, else the model's native grid.[/]",
        ),
    ] = None,
    settings: Settings = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Also measure time and peak memory on this machine, with random weights."
        ),
    ] = False,
    as_json: Json = False,
    spec: Spec = None,
) -> None:
    """Show how a plan changes the cost of one forward pass.

    Needs no data, and no weights if the recipe describes its source by host and config.

    Shows FLOPs, parameters and activations kept for training (float32), per site and for the whole model. The first two
    lines of changes match Table 4 of the paper: they cover all operators of the edited roles.

    [dim]$ grafting cost my-recipe.yaml --grid 64x64[/]
    """
    from ..cost.plan import measure_plan, plan_cost
    from ..hosts import host_of
    from ..machine.devices import default_device
    from ..runs.job import asked_shape, know_host, load_source, skeleton
    from ..runs.paths import naming_paths

    loaded = open_recipe(recipe, settings)
    with naming_paths(loaded.written):
        know_host(loaded)
        bare = skeleton(loaded.source)
    tokens = _parse_grid(grid) if grid else None
    if tokens is None and (shape := asked_shape(loaded, bare)) is not None:
        tokens = host_of(bare).grid_of(bare, shape)
    if tokens is not None and tokens.frames > 1 and len(host_of(bare).shape(bare)) == 3:
        raise DataError(f"--grid {grid} has {tokens.frames} frames, and the model makes images")
    counted = plan_cost(bare, loaded.edits, grid=tokens)
    facts = {"recipe": loaded.name, **counted.to_json(), "measured": None}
    if measure:
        source = loaded.source
        if not isinstance(source, str):
            source = source.model_copy(update={"weights": None})
        model = load_source(source)[0].eval().to(default_device())
        facts["measured"] = measure_plan(model, loaded.edits, grid=tokens).to_json()
    if as_json:
        print_json(facts)
    else:
        show_cost(out, facts)


def _parse_grid(text: str) -> "Grid":
    from ..contract import Grid

    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise DataError(
            f"--grid is rows x columns of tokens, such as 64x64, or 16x64x64 of 16 frames; found {text!r}"
        )
    *frames, rows, cols = map(int, parts)
    return Grid(rows, cols, *frames)


@app.command()
def sites(
    model: Model,
    traced: Annotated[
        bool,
        typer.Option(
            "--trace",
            help="Propose the spec of a pipeline (or a model with --example) whose class grafting does not know.",
        ),
    ] = False,
    to: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the traced spec here (YAML).")
    ] = None,
    call: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="NAME=VALUE",
            help="What the traced pipeline is called with: [cyan]--with height=256[/]. Repeatable. [dim]Default: a prompt and a small size.[/]",
        ),
    ] = None,
    example: Annotated[
        Path | None,
        typer.Option(
            "--example",
            metavar="FILE",
            help="Tensors (safetensors) that the traced pipeline, or the model's forward, is called with.",
        ),
    ] = None,
    as_json: Json = False,
    spec: Spec = None,
) -> None:
    """List a model's sites: where operators can be replaced.

    [dim]$ grafting sites testbed[/]
    [dim]$ grafting sites owner/name --trace --out spec.yaml[/]
    """
    if traced:
        from .tracing import trace_sites

        trace_sites(model, to=to, call=call or [], example=example, as_json=as_json)
        return
    if to or call or example:
        raise DataError("--out, --with and --example go with --trace")
    from ..editing.surgery import resolve
    from ..hosts import host_of

    loaded, plan = open_model(model)
    host, chosen = host_of(loaded), resolve(loaded, plan)
    blocks = [site for site in host.blocks(loaded) if site in chosen]
    facts = [site_facts(site, chosen.get(site)) for site in (*host.sites(loaded), *blocks)]
    if as_json:
        print_json({"host": host.name, "sites": facts})
        return
    headings = ["block", "role", "path", "dim", "heads", "hidden", "tokens", "operator"]
    rows = [
        [
            *(f[key] for key in ("block", "role", "path", "dim", "num_heads", "hidden_dim", "num_tokens")),
            f["operator"]["name"] if f["operator"] else "the host's own",
        ]
        for f in facts
    ]
    out.print(plain_table(headings, rows))


def site_facts(site: "Site", choice: "Choice | None") -> dict[str, Any]:
    from ..editing.plan import describe_choice

    return {
        "block": site.block,
        "role": site.role,
        "path": site.path,
        "dim": site.dim,
        "num_heads": site.num_heads or None,
        "hidden_dim": site.hidden_dim or None,
        "num_tokens": site.num_tokens,
        "operator": describe_choice(choice),
    }


def _sampling() -> Options:
    from ..sampling.chain import SamplingConfig

    return Options(
        config=SamplingConfig,
        title="Sampling",
        own={
            "num_images": {
                "names": ("--images",),
                "default": 250,
                "help": "Number of images to measure on.",
            },
            "steps": {"default": 50},
            "shape": {"metavar": "C,H,W"},
            "guided_channels": {
                "help": "Number of leading channels to guide. [dim]Default: 3 for DiT's latents, else all.[/]"
            },
            "batch_size": {"default": 50},
        },
        without=frozenset({"sampler", "clip", "compile"}),
    )


@command(app, sampling=_sampling)
def locality(
    model: Model,
    sampling: "SamplingConfig",
    bands: Annotated[
        str | None,
        typer.Option(
            metavar="K,K,...",
            help="Band widths: tokens on each side. [dim]Default: 1/32, 1/16 and 1/8 of the tokens.[/]",
        ),
    ] = None,
    prompts: PromptsFolder = None,
    process: Process = None,
    noised: Annotated[
        bool,
        typer.Option(
            "--noised", help="Measure on noised images of the testbed's subset instead, one pass per image."
        ),
    ] = False,
    as_json: Json = False,
    spec: Spec = None,
) -> None:
    """Measure how local each attention is.

    Shown are its shares within bands of the raster order and within a 3 x 3 square. Follows the paper's protocol: measures while sampling with DDIM (Euler for flow models) and guidance. The blocks with
    the largest and smallest share in the widest band form the halves `top-local` and `low-local`.

    [dim]$ grafting locality testbed --bands 2,4,8[/]
    """
    from ..hosts import host_of
    from ..machine.devices import default_device

    wanted = None if bands is None else _parse_bands(bands)
    loaded = open_model(model)[0].eval().to(default_device())
    num_tokens = host_of(loaded).sites(loaded)[0].grid.num_tokens
    if wanted and max(wanted) >= num_tokens:
        raise DataError(f"--bands: {max(wanted)} is too wide for {num_tokens} tokens")
    if noised:
        found = _locality_of_noised(loaded, images=sampling.num_images, seed=sampling.seed)
        protocol = f"{sampling.num_images} noised images, steps evenly spread"
    else:
        denoiser = open_denoiser(model, loaded, prompts=prompts, process=process)
        found, drawn = _locality_of_samples(loaded, denoiser, sampling)
        protocol = (
            f"{drawn.num_images} images drawn by {drawn.sampler} with {drawn.steps} steps, "
            f"cfg scale {drawn.cfg_scale:g}, {drawn.precision}"
        )
    wanted, half = wanted or found.default_bands, len(found.sites) // 2
    lists = {
        "band": max(wanted),
        "top_local": found.top_local(half, band=max(wanted)),
        "low_local": found.low_local(half, band=max(wanted)),
    }
    facts = {**found.to_json(bands=wanted), "protocol": protocol, "lists": lists}
    if as_json:
        print_json(facts)
        return
    rows = [
        [name, *(f"{share:.3f}" for share in (*entry["bands"].values(), entry["windows"][1]))]
        for name, entry in (
            *((str(site["block"]), site) for site in facts["sites"]),
            ("uniform", facts["uniform"]),
        )
    ]
    out.print(plain_table(["block", *(f"L_{k}" for k in wanted), "3 x 3"], rows))
    say(out, f"{protocol}: {found.num_maps} maps per block, {found.grid.rows} x {found.grid.cols} tokens")
    say(
        out,
        f"Most local half: {lists['top_local']}, least local half: {lists['low_local']} (by L_{lists['band']})",
    )


def _parse_bands(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise DataError(f"--bands is numbers of tokens, such as 2,4,8; found {text!r}")
    return tuple(sorted({int(part) for part in parts}))


def _locality_of_samples(
    model: "nn.Module", denoiser: "Denoiser", config: "SamplingConfig"
) -> "tuple[Locality, SamplingConfig]":
    """Measure locality while sampling images, as in the paper; also return the settings that they are drawn with."""
    from ..analysis import watching_locality
    from ..contract import Step
    from ..diffusion import Diffusion
    from ..hosts import host_of
    from ..latents.decoding import makes_pixels
    from ..machine.devices import default_device
    from ..machine.precision import settled
    from ..sampling.chain import sample as draw

    host = host_of(model)
    shape = config.shape or host.shape(model)
    is_diffusion, is_of_pixels = isinstance(denoiser.process, Diffusion), makes_pixels(shape)
    chosen: dict[str, Any] = {
        "sampler": "ddim" if is_diffusion else "euler",
        "clip": is_diffusion and is_of_pixels,
    }
    if "guided_channels" not in config.model_fields_set and host.name == "dit" and not is_of_pixels:
        chosen["guided_channels"] = 3  # as DiT's published samples
    config = settled(config.model_copy(update=chosen), default_device())
    done = 0
    with watching_locality(model) as result, follow(err) as on_step:
        for batch in draw(model, config, denoiser=denoiser, shape=shape):
            done += len(batch.labels)
            on_step("sample", Step(done=done, total=config.num_images))
    return result(), config


def _locality_of_noised(model: "nn.Module", *, images: int, seed: int) -> "Locality":
    """Measure locality on noised images of the bundled subset."""
    from ..analysis import noised_locality
    from ..data.bundled import bundled_subset
    from ..hosts import host_of

    host = host_of(model)
    data = bundled_subset()
    if faults := host.shape_faults(model, (1, 32, 32)):
        raise HostError(f"--noised uses the testbed's images, of shape [1, 32, 32]: {faults[0]}")
    return noised_locality(model, data, denoiser=host.denoiser(model), samples=images, seed=seed)

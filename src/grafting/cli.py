"""The command line `grafting`: each command reads its arguments, calls the library once, and shows what came of it.

torch and diffusers take seconds to import, so commands import what they need themselves; `--help` waits for nothing.
What a user can cause ends in one message and exit code 1; wrong usage is 2, an interruption 130.
"""

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

from .display import follow, metrics_table, plain_table, say, show_cost, show_diagnosis, show_evaluation
from .errors import DataError, GraftingError, HostError, PlanError, RecipeError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .analysis import Locality
    from .contract import OperatorConfig, Site
    from .plan import Choice, Plan
    from .recipe import Job
    from .sweep import Point

# what a run can stop after; the keys of recipe.STAGES, which are not imported for `--help`
StageName = Literal["calibrate", "distill", "finetune", "sample", "evaluate", "report"]

_RESUMABLE = frozenset({"quickstart", "run", "distill", "finetune", "sweep"})

# lines that go to a file or another program are cut at no terminal's edge
out = Console(width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True)


class _Commands(TyperGroup):
    """The commands, whose errors become one message."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            goes_on = ctx.invoked_subcommand in _RESUMABLE
            again = " The same command goes on from what was saved." if goes_on else ""
            err.print(f"\nInterrupted.{again}")
            raise typer.Exit(130) from None
        except GraftingError as error:
            _fail(str(error), debug=ctx.params["debug"])
        except ValueError as error:
            from pydantic import ValidationError

            if not isinstance(error, ValidationError):
                raise
            _fail(_faults_of(error), debug=ctx.params["debug"])


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, as YAML.")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="[cyan]testbed[/], a folder of a model or run, or owner/name on the Hub."
    ),
]
Out = Annotated[Path | None, typer.Option("--out", help="The run's folder. [dim]By default runs/NAME.[/]")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def main() -> None:
    """The entry point `grafting`."""
    app()


def _print_version(asked: bool) -> bool:
    if asked:
        typer.echo(f"grafting {version('grafting')}")
        raise typer.Exit
    return asked


@app.callback()
def _global_options(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads. By default torch's choice.")
    ] = None,
) -> None:
    """Edit pretrained diffusion transformers: replace operators, distill, finetune, measure.

    Start with [bold]grafting quickstart[/]; [bold]grafting COMMAND --help[/] has an example of each.
    """
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


@app.command()
def quickstart(
    out_folder: Annotated[Path, typer.Option("--out", help="The run's folder.")] = Path("runs/quickstart"),
) -> None:
    """Graft the bundled diffusion transformer, from a pretrained model to a report, in some minutes.

    Half of its attention becomes gated convolution (Hyena-X), is fitted to what it replaced, finetuned, and measured.

    [dim]$ grafting quickstart[/]
    """
    _run(recipes_folder() / "testbed" / "quickstart.yaml", out_folder)


@app.command()
def run(
    recipe: RecipeFile,
    out_folder: Out = None,
    until: Annotated[StageName, typer.Option(help="The last stage to carry out.")] = "report",
) -> None:
    """Carry out a recipe; what is done already is not done again.

    [dim]$ grafting run my-recipe.yaml --until distill[/]
    """
    _run(recipe, out_folder, until)


@app.command()
def distill(recipe: RecipeFile, out_folder: Out = None) -> None:
    """Carry out a recipe's stage 1: fit the new operators to the old ones' activations.

    [dim]$ grafting distill my-recipe.yaml[/]
    """
    _run(recipe, out_folder, "distill")


@app.command()
def finetune(recipe: RecipeFile, out_folder: Out = None) -> None:
    """Carry out a recipe up to stage 2: train the grafted model end to end.

    [dim]$ grafting finetune my-recipe.yaml --out runs/second-try[/]
    """
    _run(recipe, out_folder, "finetune")


def _run(recipe_path: Path, folder: Path | None, until: StageName = "report") -> None:
    from .recipe import run as run_recipe
    from .recipefile import load_recipe

    recipe = load_recipe(recipe_path)
    folder = folder or Path("runs") / recipe.name
    say(out, f"Recipe {recipe.name}, in {folder}")
    with follow(out) as on_step:
        run_recipe(recipe, folder, until=until, on_step=on_step)
    if until in ("evaluate", "report") and (folder / "metrics.json").is_file():
        out.print(metrics_table(json.loads((folder / "metrics.json").read_text())))
    results = {"distill": "distill", "finetune": "model", "sample": "samples", "evaluate": "metrics.json"}
    result = folder / results.get(until, "report.html")
    say(out, f"{until.capitalize()}: {result if result.exists() else 'nothing to do'}")


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="A sweep, as YAML.")],
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="The runs' folder. [dim]By default runs/NAME.[/]")
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(help="The table, a path without ending. [dim]By default table, in the runs' folder.[/]"),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN=LABEL", help="Run a part; may be given again.")
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help="Measure these rows only, for now: such as finetuned,distilled.")
    ] = None,
    machines: Annotated[
        bool, typer.Option("--ray", help="Spread the runs over a Ray cluster that shares this file system.")
    ] = False,
) -> None:
    """Carry out many recipes and collect one table: JSON, CSV and Markdown. Lines that it has are not measured again.

    [dim]$ grafting sweep recipes/testbed/table4.yaml --only recipe=best --only ratio=100[/]
    """
    from .sweep import load_sweep, run_sweep, run_sweep_on_ray

    loaded = load_sweep(file)
    folder = out_folder or Path("runs") / loaded.name
    table = table or folder / "table"
    labels, chosen = dict(map(_parse_label, only or [])), rows.split(",") if rows else None

    @contextmanager
    def following(point: "Point") -> Iterator[Any]:
        say(out, point.name)
        with follow(out) as on_step:
            yield on_step

    say(out, f"Sweep {loaded.name}, in {folder}")
    if machines:
        for point in run_sweep_on_ray(loaded, folder, table=table, only=labels, rows=chosen):
            say(out, f"{point.name}: done")
    else:
        for _ in run_sweep(loaded, folder, table=table, only=labels, rows=chosen, following=following):
            pass
    say(out, f"Table: {table.with_suffix('.md')}")


def _parse_label(text: str) -> tuple[str, str]:
    column, found, label = text.partition("=")
    if not found:
        raise RecipeError(f"--only takes COLUMN=LABEL, found {text!r}")
    return column, label


def recipes_folder() -> Path:
    """The recipes that come with the package, or lie beside its source."""
    package = Path(__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parents[1] / "recipes"


@app.command()
def check(recipe: RecipeFile, as_json: Json = False) -> None:
    """Check a recipe against its model and data without writing anything, and say what it would do.

    [dim]$ grafting check my-recipe.yaml[/]
    """
    from .recipe import prepare
    from .recipefile import load_recipe

    summary = _summary(prepare(load_recipe(recipe)))
    if as_json:
        _print_json(summary)
        return
    edits = [[e["block"], e["role"], e["path"], e["operator"]["name"]] for e in summary["edits"]]
    if edits:
        out.print(plain_table(["block", "role", "path", "operator"], edits))
    say(out, f"{len(edits)} of {summary['num_sites']} sites are edited")
    for what in ("params", "attention_flops"):
        before, after = summary[what]["before"], summary[what]["after"]
        change = f" ({after / before - 1:+.1%})" if before else ""
        say(
            out,
            f"{what.replace('_', ' ').replace('flops', 'FLOPs an image')}: {before:,} to {after:,}{change}",
        )
    for stage, words in summary["stages"].items():
        say(out, f"{stage}: {words}")
    say(out, "The recipe is sound.")


def _summary(job: "Job") -> dict[str, Any]:
    """What a recipe does to its model, as data."""
    from .metrics.cost import count_parameters, role_flops
    from .plan import operators_of
    from .surgery import build_operators, grafted, paths_after

    sites = job.host.sites(job.model)
    standing = list(paths_after(sites, job.chosen))
    before = count_parameters(job.model)
    with grafted(job.model, build_operators(job.model, job.recipe.edits, seed=job.recipe.seed)) as model:
        after = count_parameters(model)
    return {
        "recipe": job.recipe.name,
        "host": job.host.name,
        "num_sites": len(sites),
        "edits": [_site_facts(site, choice) for site, choice in job.chosen.items()],
        "params": {"before": before, "after": after},
        "attention_flops": {
            "before": role_flops(sites, {}, "attention").total,
            "after": role_flops(standing, operators_of(job.chosen), "attention").total,
        },
        "stages": _stages_in_words(job),
    }


def _stages_in_words(job: "Job") -> dict[str, str]:
    recipe, words = job.recipe, {}
    if recipe.distill and job.chosen:
        held_out = recipe.distill.holdout
        words["distill"] = (
            f"{recipe.distill.steps} steps of {recipe.distill.batch_size} images, "
            f"{len(job.data) - held_out} to train on and {held_out} held out"
        )
    if recipe.finetune:
        words["finetune"] = (
            f"{recipe.finetune.steps} steps of {recipe.finetune.batch_size} of {len(job.data)} images"
        )
    if recipe.sample:
        config = recipe.sample
        words["sample"] = (
            f"{config.num_images} images of each model, {config.sampler} with {config.steps} steps, "
            f"cfg scale {config.cfg_scale:g}"
        )
    return words


@app.command()
def cost(
    recipe: RecipeFile,
    grid: Annotated[
        str | None,
        typer.Option(
            "--grid",
            "--resolution",
            metavar="ROWSxCOLS",
            help="Image tokens. [dim]By default the model's native grid.[/]",
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also measure time and peak memory here, with random weights.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what a recipe's plan changes in cost, an image and forward pass; neither weights nor data are needed.

    FLOPs, parameters and the activations kept for training (float32), of every site and of the whole model. The first two
    lines of changes are those of Table 4 of the paper, over all operators of the edited roles.

    [dim]$ grafting cost my-recipe.yaml --grid 64x64[/]
    """
    from .contract import Grid
    from .costing import measure_plan, plan_cost
    from .devices import default_device
    from .recipe import load_source, skeleton
    from .recipefile import load_recipe

    loaded = load_recipe(recipe)
    tokens = Grid(*_parse_grid(grid)) if grid else None
    counted = plan_cost(skeleton(loaded.source), loaded.edits, grid=tokens)
    facts = {"recipe": loaded.name, **counted.to_json(), "measured": None}
    if measure:
        source = loaded.source
        if not isinstance(source, str):
            source = source.model_copy(update={"weights": None})
        model = load_source(source)[0].eval().to(default_device())
        facts["measured"] = measure_plan(model, loaded.edits, grid=tokens).to_json()
    if as_json:
        _print_json(facts)
    else:
        show_cost(out, facts)


def _parse_grid(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise DataError(f"--grid is rows x columns of tokens, such as 64x64; found {text!r}")
    return int(parts[0]), int(parts[1])


@app.command()
def sites(model: Model, as_json: Json = False) -> None:
    """List a model's sites: the places where an operator can be replaced.

    [dim]$ grafting sites testbed[/]
    """
    from .hosts import host_of
    from .surgery import resolve

    loaded, plan = open_model(model)
    host, chosen = host_of(loaded), resolve(loaded, plan)
    blocks = [site for site in host.blocks(loaded) if site in chosen]
    facts = [_site_facts(site, chosen.get(site)) for site in (*host.sites(loaded), *blocks)]
    if as_json:
        _print_json({"host": host.name, "sites": facts})
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


def _site_facts(site: "Site", choice: "Choice | None") -> dict[str, Any]:
    from .plan import describe_choice

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


@app.command()
def locality(
    model: Model,
    bands: Annotated[
        str | None,
        typer.Option(
            metavar="K,K,...",
            help="Tokens on each side. [dim]By default a 32nd, a 16th and an eighth of the tokens.[/]",
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Images to measure on.")] = 250,
    steps: Annotated[int, typer.Option(help="Calls of the model an image.")] = 50,
    cfg_scale: Annotated[float, typer.Option(help="Guidance; 1 is none.")] = 1.5,
    seed: Annotated[int, typer.Option(help="Image i depends on (seed, i).")] = 0,
    noised: Annotated[
        bool,
        typer.Option("--noised", help="On noised images of the testbed's subset instead, one pass each."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Say how local each attention is: its share inside bands of the raster order, and inside a 3 x 3 square.

    By the paper's protocol: while images are drawn by DDIM with guidance. What the widest band holds most and least of are
    the halves `top-local` and `low-local` of the choice of layers.

    [dim]$ grafting locality testbed --bands 2,4,8[/]
    """
    from .devices import default_device

    wanted = None if bands is None else _parse_bands(bands)
    loaded = open_model(model)[0].eval().to(default_device())
    if noised:
        found = _locality_of_noised(loaded, images=images, seed=seed)
        protocol = f"{images} noised images, steps evenly spread"
    else:
        found = _locality_of_samples(loaded, images=images, steps=steps, cfg_scale=cfg_scale, seed=seed)
        protocol = f"{images} images drawn by ddim with {steps} steps, cfg scale {cfg_scale:g}"
    wanted, half = wanted or found.default_bands, len(found.sites) // 2
    lists = {
        "band": max(wanted),
        "top_local": found.top_local(half, band=max(wanted)),
        "low_local": found.low_local(half, band=max(wanted)),
    }
    facts = {**found.to_json(bands=wanted), "protocol": protocol, "lists": lists}
    if as_json:
        _print_json(facts)
        return
    rows = [
        [name, *(f"{share:.3f}" for share in (*entry["bands"].values(), entry["windows"][1]))]
        for name, entry in (
            *((str(site["block"]), site) for site in facts["sites"]),
            ("uniform", facts["uniform"]),
        )
    ]
    out.print(plain_table(["block", *(f"L_{k}" for k in wanted), "3 x 3"], rows))
    say(out, f"{protocol}: {found.num_maps} maps a block, {found.grid.rows} x {found.grid.cols} tokens")
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
    model: "nn.Module", *, images: int, steps: int, cfg_scale: float, seed: int
) -> "Locality":
    """Measured while images are drawn, as the paper does."""
    from .analysis import watching_locality
    from .contract import Step
    from .hosts import host_of
    from .sampling import SamplingConfig
    from .sampling import sample as draw

    host = host_of(model)
    facts = host.class_conditional(model)
    if facts is None:
        raise HostError(
            f"host {host.name!r} draws nothing from class labels: run its pipeline within grafting.watching_locality"
        )
    is_of_pixels = facts.shape[0] in (1, 3)
    config = SamplingConfig(
        sampler="ddim",
        steps=steps,
        cfg_scale=cfg_scale,
        guided_channels=None if is_of_pixels else 3,  # of latents, as DiT's published samples
        clip=is_of_pixels,
        num_images=images,
        batch_size=min(images, 50),
        seed=seed,
    )
    done = 0
    with watching_locality(model) as result, follow(err) as on_step:
        for batch in draw(model, config, predict=host.predict, **facts._asdict()):
            done += len(batch.labels)
            on_step("sample", Step(done=done, total=images))
    return result()


def _locality_of_noised(model: "nn.Module", *, images: int, seed: int) -> "Locality":
    """Measured on noised images of the bundled subset."""
    from .analysis import noised_locality
    from .data.bundled import bundled_subset
    from .diffusion import Diffusion
    from .hosts import host_of

    host = host_of(model)
    facts = host.class_conditional(model)
    if facts is None or facts.shape != (1, 32, 32):
        takes = "no class labels" if facts is None else f"images of {list(facts.shape)}"
        raise HostError(f"--noised has the testbed's images, of [1, 32, 32]; this model takes {takes}")
    return noised_locality(
        model, bundled_subset(), predict=host.predict, diffusion=Diffusion(), samples=images, seed=seed
    )


@app.command()
def operators(
    name: Annotated[str | None, typer.Argument(help="An operator, to see its settings.")] = None,
    as_json: Json = False,
) -> None:
    """List the operators, or one operator's settings; presets are names for an operator with some settings.

    [dim]$ grafting operators hyena-x[/]
    """
    from .operators import PRESETS, operator_configs

    configs = operator_configs()
    if name is None:
        listed = [
            {"name": n, "roles": sorted(c.roles), "summary": _summary_of(c)} for n, c in configs.items()
        ]
        if as_json:
            _print_json(listed)
        else:
            rows = [[entry["name"], ", ".join(entry["roles"]), entry["summary"]] for entry in listed]
            out.print(plain_table(["operator", "replaces", "what it is"], rows))
            presets = [[preset, _settings_in_words(settings)] for preset, settings in PRESETS.items()]
            out.print(plain_table(["preset", "stands for"], presets))
        return
    if name in PRESETS:
        if as_json:
            _print_json(PRESETS[name])
        else:
            say(out, f"{name}: {_settings_in_words(PRESETS[name])}")
        return
    if name not in configs:
        raise PlanError(
            f"no operator {name!r}; there are {', '.join(configs)}, and the presets {', '.join(PRESETS)}"
        )
    schema = configs[name].model_json_schema()
    if as_json:
        _print_json(schema)
        return
    say(out, f"{name}: {schema['description']}\nReplaces: {', '.join(sorted(configs[name].roles))}\n")
    settings = {key: value for key, value in schema["properties"].items() if key != "name"}
    rows = [
        [key, _type_of(s), s.get("default", "required"), s.get("description", "")]
        for key, s in settings.items()
    ]
    out.print(plain_table(["setting", "type", "default", "what it is"], rows))


def _settings_in_words(operator: dict[str, Any]) -> str:
    return ", ".join([operator["name"], *(f"{k}: {v}" for k, v in operator.items() if k != "name")])


def _summary_of(config: "type[OperatorConfig]") -> str:
    return (config.__doc__ or "").strip().partition("\n")[0]


def _type_of(setting: dict[str, Any]) -> str:
    """A setting's type and bounds in words, from its JSON Schema."""
    if "enum" in setting:
        return " | ".join(map(str, setting["enum"]))
    if "anyOf" in setting:
        return " | ".join(_type_of(choice) for choice in setting["anyOf"])
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {setting[key]:g}" for key, sign in signs.items() if key in setting]
    return " ".join([setting.get("type", "any"), *bounds])


@app.command()
def sample(
    model: Model,
    out_file: Annotated[
        Path, typer.Option("--out", help="An .npz file; a .png of all lies beside it.")
    ] = Path("samples.npz"),
    num: Annotated[int, typer.Option(help="Images to draw.")] = 16,
    sampler: Annotated[str, typer.Option(help="ddpm, ddim or dpm-solver++.")] = "dpm-solver++",
    steps: Annotated[int, typer.Option(help="Calls of the model an image.")] = 20,
    cfg_scale: Annotated[float, typer.Option(help="Guidance; 1 is none.")] = 1.0,
    clip: Annotated[bool, typer.Option(help="Clip the predicted clean image at each step.")] = True,
    seed: Annotated[int, typer.Option(help="Image i depends on (seed, i) and its label.")] = 0,
    labels: Annotated[str, typer.Option(help="balanced, random, or classes such as 3,5.")] = "balanced",
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 64,
) -> None:
    """Draw images from a model of pixels: arr_0 [N, H, W, C] of 8 bits and labels, in one .npz file.

    [dim]$ grafting sample runs/quickstart --num 40 --labels 7,9[/]
    """
    import torch

    from .devices import default_device
    from .hosts import host_of
    from .report import write_grid
    from .samples import write_samples
    from .sampling import SamplingConfig

    config = SamplingConfig.model_validate(
        {
            "sampler": sampler,
            "steps": steps,
            "cfg_scale": cfg_scale,
            "clip": clip,
            "num_images": num,
            "batch_size": batch_size,
            "seed": seed,
            "labels": _parse_labels(labels),
        }
    )
    if out_file.suffix != ".npz":
        raise DataError(f"--out names an .npz file, found {out_file}")
    loaded, _ = open_model(model)
    host = host_of(loaded)
    facts = host.class_conditional(loaded)
    if facts is None or facts.shape[0] not in (1, 3):
        made = "nothing from class labels" if facts is None else f"latents of {facts.shape[0]} channels"
        raise HostError(
            f"{model} makes {made}; `grafting sample` draws from class-conditional models of pixels"
        )
    batches = list(_draw(loaded.to(default_device()), config, host.predict, facts))
    images, labels_drawn = (torch.cat(part) for part in zip(*batches, strict=True))
    write_samples(out_file, images, labels_drawn, config)
    scale = 2 if images.shape[-1] <= 64 else 1
    sheet = write_grid(images.numpy(), out_file.with_suffix(".png"), scale=scale)
    say(out, f"{len(images)} images: {out_file}, {sheet}")


def _parse_labels(text: str) -> str | list[int]:
    if text in ("balanced", "random"):
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise DataError(f"--labels is balanced, random, or classes such as 3,5; found {text!r}") from None


def _draw(model: "nn.Module", config: Any, predict: Any, facts: Any) -> Iterator[tuple["Tensor", "Tensor"]]:
    """Images of 8 bits [B, C, H, W] and labels, with progress shown."""
    from .contract import Step
    from .sampling import sample as draw

    done = 0
    with follow(out) as on_step:
        for batch in draw(model, config, predict=predict, **facts._asdict()):
            done += len(batch.labels)
            on_step("sample", Step(done=done, total=config.num_images))
            yield batch.images(), batch.labels


@app.command()
def evaluate(
    samples: Annotated[
        Path, typer.Argument(help="An .npz (arr_0, labels), or a run's samples/ROW.safetensors.")
    ],
    as_json: Json = False,
) -> None:
    """Measure samples of the testbed with the bundled feature network and reference.

    [dim]$ grafting evaluate samples.npz[/]
    """
    from .data.bundled import CLASSIFIER_NAME, bundled_classifier, bundled_reference_path
    from .evaluation import Evaluator, Protocol, Reference
    from .evaluation import evaluate as measure
    from .metrics.features import ModuleNetwork
    from .samples import read_samples

    given = read_samples(samples)
    if given.images.shape[1:] != (1, 32, 32):
        raise DataError(
            f"{samples} holds {list(given.images.shape[1:])}; the bundled network measures [1, 32, 32]"
        )
    network = ModuleNetwork(bundled_classifier(), CLASSIFIER_NAME)
    reference = Reference.load(bundled_reference_path(), network)
    protocol = Protocol.of(network, reference, num_images=len(given.images), **given.origin)
    evaluator = Evaluator(network, reference, protocol)
    with follow(err) as on_step:
        for step in measure(zip(given.images.split(500), given.labels.split(500), strict=True), evaluator):
            on_step("evaluate", step)
    result = evaluator.result().model_dump(mode="json")
    if as_json:
        _print_json(result)
    else:
        show_evaluation(out, result)


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
) -> None:
    """Write a run's report anew, from what its folder holds: one HTML file that needs nothing else.

    [dim]$ grafting report runs/quickstart[/]
    """
    from .report import write_report

    say(out, f"Report: {write_report(run_folder)}")


@app.command()
def schema(
    out_file: Annotated[Path | None, typer.Option("--out", help="A file; by default it is printed.")] = None,
) -> None:
    """Write the JSON Schema of recipes, with which editors complete and check them.

    [dim]$ grafting schema --out recipe.schema.json[/]

    Then begin a recipe with [dim]# yaml-language-server: $schema=recipe.schema.json[/]
    """
    from .files import write_json

    if out_file is None:
        _print_json(recipe_schema())
        return
    write_json(out_file, recipe_schema())
    say(out, f"Schema: {out_file}")


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file, which may also name a `base` that has what it leaves out."""
    from .recipe import Recipe

    schema = Recipe.model_json_schema()
    required = schema.pop("required")
    schema["properties"]["base"] = {
        "type": "string",
        "description": "A recipe file whose settings this one changes.",
    }
    return schema | {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "anyOf": [{"required": required}, {"required": ["base"]}],
    }


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A weights file (.pt, .safetensors), a folder of diffusers' DiT, or owner/name on the Hub.",
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="Where the model folder is written.")],
    num_heads: Annotated[
        int | None, typer.Option(help="Attention heads. [dim]Known for published widths.[/]")
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Classes without the null label. [dim]Known for ImageNet.[/]")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens on each side, of window attention. [dim]4 as published.[/]")
    ] = None,
    mlp_ratio: Annotated[float, typer.Option(help="Hidden width over width of the base's MLP.")] = 4.0,
    base: Annotated[str | None, typer.Option(help="The model that was grafted, for the record.")] = None,
    licence: Annotated[str | None, typer.Option(help="Of the base's weights, for the record.")] = None,
    to: Annotated[Literal["grafting", "diffusers"], typer.Option(help="What is written.")] = "grafting",
) -> None:
    """Read published DiT weights, grafted or not, by what they hold, and write a model folder.

    [dim]$ grafting convert model.pt dit-hyena-x[/]
    """
    from .convert import PublishedFacts, convert_weights, read_published
    from .diffusersfolder import export_diffusers
    from .portable import Base

    made_from = None if base is None else Base(id=base, licence=licence)
    facts = PublishedFacts(
        num_heads=num_heads, num_classes=num_classes, window=window, mlp_ratio=mlp_ratio, base=made_from
    )
    if to == "diffusers":
        is_file = Path(source).is_file()
        loaded = read_published(Path(source), facts).model if is_file else open_model(source)[0]
        say(out, f"diffusers folder: {export_diffusers(loaded, folder)}")
        return
    converted = convert_weights(source, folder, facts)
    edits = [[edit.role, edit.operator.name, str(edit.blocks)] for edit in converted.plan.edits]
    if edits:
        out.print(plain_table(["role", "operator", "blocks"], edits))
    say(out, f"Read as {converted.origin['format']}, {'grafted' if edits else 'not grafted'}: {folder}")


@app.command()
def merge(
    delta: Annotated[
        str, typer.Argument(metavar="DELTA", help="A delta: a folder, or owner/name on the Hub.")
    ],
    folder: Annotated[Path, typer.Argument(help="Where the whole model is written.")],
    base: Annotated[str | None, typer.Option(help="Where its base is, if not where the delta says.")] = None,
) -> None:
    """Make a delta whole: write the model that it and its base are, which then needs no base.

    [dim]$ grafting merge my-delta my-model[/]
    """
    from .checkpoint import find_model, merge_delta

    merge_delta(find_model(delta), folder, base=base)
    say(out, f"Model: {folder}")


@app.command()
def push(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model folder, or the folder of a run.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the Hub.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
) -> None:
    """Check a grafted model's folder, write its card, and upload both to the Hugging Face Hub.

    [dim]$ grafting push runs/quickstart my-name/dit-hyena-x[/]
    """
    from .checkpoint import find_model
    from .hub import push_to_hub

    say(out, f"Uploaded: {push_to_hub(find_model(model), repo, private=not public)}")


@app.command()
def doctor(
    full: Annotated[bool, typer.Option("--full", help="Also try torch.compile; can take a minute.")] = False,
    as_json: Json = False,
) -> None:
    """Say what this machine can do, and what is missing with the line that installs it.

    [dim]$ grafting doctor[/]
    """
    from .doctor import examine

    found = examine(full=full)
    if as_json:
        _print_json(found.to_json())
    else:
        show_diagnosis(out, found)
    if found.problems:
        raise typer.Exit(1)


def open_model(name: str) -> "tuple[nn.Module, Plan]":
    """The model that a command line names, and the plan it was grafted with.

    Raises:
        CheckpointError, DataError: there is none, or it is damaged.
    """
    from .checkpoint import load

    return load(name)


def _faults_of(error: Any) -> str:
    """Every fault of pydantic's error, a line each."""
    lines = [
        f"{'.'.join(map(str, e['loc'])) or error.title}: {e['msg'].removeprefix('Value error, ')}, found {e['input']!r}"
        for e in error.errors()
    ]
    return "\n  ".join([f"these settings cannot be used ({error.title}):", *lines])


def _fail(message: str, *, debug: bool) -> NoReturn:
    """Ends the command with one message, while an error is handled."""
    if debug:
        traceback.print_exc()
    # not through rich: it would wrap lines and read brackets as markup
    print(f"Error: {message}", file=sys.stderr)
    raise typer.Exit(1) from None


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))

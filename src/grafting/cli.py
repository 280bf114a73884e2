"""The command line `grafting`: each command reads its arguments, calls the library once, and shows what came of it.

torch and diffusers take seconds to import, so commands import what they need themselves; `--help` waits for nothing.
What a user can cause ends in one message and exit code 1; wrong usage is 2, an interruption 130.
"""

import json
import sys
import traceback
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

from .display import follow, metrics_table, plain_table, say, show_diagnosis, show_evaluation
from .errors import DataError, GraftingError, HostError, PlanError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .contract import OperatorConfig, Site
    from .plan import Plan
    from .recipe import Job

# what a run can stop after; the keys of recipe.STAGES, which are not imported for `--help`
StageName = Literal["distill", "finetune", "sample", "evaluate", "report"]

_RESUMABLE = frozenset({"quickstart", "run", "distill", "finetune"})

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
    str, typer.Argument(metavar="MODEL", help="[cyan]testbed[/], a model folder, or the folder of a run.")
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
    from .surgery import build_operators, grafted

    sites = job.host.sites(job.model)
    before = count_parameters(job.model)
    with grafted(job.model, build_operators(job.model, job.recipe.edits, seed=job.recipe.seed)) as model:
        after = count_parameters(model)
    return {
        "recipe": job.recipe.name,
        "host": job.host.name,
        "num_sites": len(sites),
        "edits": [_site_facts(site, operator) for site, operator in job.chosen.items()],
        "params": {"before": before, "after": after},
        "attention_flops": {
            "before": role_flops(sites, {}, "attention").total,
            "after": role_flops(sites, job.chosen, "attention").total,
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
def sites(model: Model, as_json: Json = False) -> None:
    """List a model's sites: the places where an operator can be replaced.

    [dim]$ grafting sites testbed[/]
    """
    from .hosts import host_of

    loaded, plan = open_model(model)
    host = host_of(loaded)
    found = host.sites(loaded)
    chosen = plan.resolve(found)
    facts = [_site_facts(site, chosen.get(site)) for site in found]
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


def _site_facts(site: "Site", operator: "OperatorConfig | None") -> dict[str, Any]:
    return {
        "block": site.block,
        "role": site.role,
        "path": site.path,
        "dim": site.dim,
        "num_heads": site.num_heads or None,
        "hidden_dim": site.hidden_dim or None,
        "num_tokens": site.num_tokens,
        "operator": operator.model_dump(mode="json") if operator else None,
    }


@app.command()
def operators(
    name: Annotated[str | None, typer.Argument(help="An operator, to see its settings.")] = None,
    as_json: Json = False,
) -> None:
    """List the operators, or one operator's settings.

    [dim]$ grafting operators hyena-x[/]
    """
    from .operators import operator_configs

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
        return
    if name not in configs:
        raise PlanError(f"no operator {name!r}; there are {', '.join(configs)}")
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
    from .checkpoint import load_model
    from .data.bundled import testbed_model_folder

    folder = testbed_model_folder() if name == "testbed" else Path(name)
    return load_model(folder / "model" if (folder / "manifest.json").is_file() else folder)


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

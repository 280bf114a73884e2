"""Commands that run recipes: one run, a part of it, or a sweep of many."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import RecipeError
from ..runs.paths import recipes_folder
from ._shared import Json, Out, RecipeFile, Settings, Spec, err, open_recipe, out, print_json
from .display import follow, in_turn, metrics_table, say, show_forecast, show_forecasts

if TYPE_CHECKING:
    from ..runs.recipe import Recipe
    from ..runs.sweep import Point, Sweep

# what a run can stop after; the keys of recipe.STAGES, which are not imported for `--help`
StageName = Literal["teach", "calibrate", "distill", "finetune", "pipeline", "sample", "evaluate", "report"]

Track = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TRACKER",
        help="Also log to tensorboard, wandb or trackio; repeatable. [dim]Logs stay local unless WANDB_MODE is online.[/]",
    ),
]
PeakTflops = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        help="Peak TFLOP/s of the device, to compute MFU on devices that are not built in.",
    ),
]

Seeds = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Repeat training and sampling with this many seeds; a table has means and t intervals over them.",
    ),
]

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Estimate time, memory and disk, then stop. Needs no data.")
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Device to estimate for: h100, a100, ... [dim]Default: this machine's.[/]", metavar="NAME"
    ),
]
Processes = Annotated[int, typer.Option(min=1, help="Processes to estimate for, one per device.")]
Mfu = Annotated[
    float, typer.Option(min=0.001, max=1, help="MFU to assume: share of the device's peak, from 0 to 1.")
]

app = typer.Typer()


@app.command()
def quickstart(
    out_folder: Annotated[Path, typer.Option("--out", help="Run folder.")] = Path("runs/quickstart"),
) -> None:
    """Graft the bundled model in minutes and write a report.

    In half of its blocks attention becomes 3 x 3 windows, which are calibrated, distilled, finetuned, and evaluated.

    [dim]$ grafting quickstart[/]
    """
    _run(recipes_folder() / "testbed" / "quickstart.yaml", out_folder)


@app.command()
def init(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="File to write (.yaml).")],
    source: Annotated[
        str | None,
        typer.Option(
            help="[cyan]testbed[/], [cyan]scenes[/], or the folder of a model or a pipeline. [dim]Asked for on a terminal.[/]"
        ),
    ] = None,
    operator: Annotated[
        str | None,
        typer.Option(
            help="Operator or preset; [cyan]mlp[/] alone is 3/4 as wide as the host's. [dim]Default: one that the host takes.[/]"
        ),
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(help="Blocks to edit: odd, all, 8-18:2, ... [dim]Default: odd, of the testbed 4-7.[/]"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Latents, or images for a model of pixels. [dim]Default: latents; none for a model asked by prompts, which makes its own.[/]",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="For a model asked by them: a file (.txt, .jsonl), or a folder of encoded ones. [dim]Default: prompts.txt of a pipeline, else prompts.[/]"
        ),
    ] = None,
) -> None:
    """Write a first recipe for a model, and a short trial of it.

    [dim]$ grafting init my-recipe.yaml --source testbed
    $ grafting init mine.yaml --source models/pixart --prompts prompts.txt[/]
    """
    from ..runs.starter import Start, missing_parts, write_recipes

    if source is None:
        source = (
            typer.prompt("Model: testbed, scenes, or a folder", default="testbed")
            if sys.stdin.isatty()
            else "testbed"
        )
    start = Start(source=source, operator=operator, blocks=blocks, data=data, prompts=prompts)
    written, smoke = write_recipes(recipe, start)
    say(out, f"Recipe: {written}")
    say(out, f"A trial of a minute: {smoke}")
    for part in missing_parts(written):
        say(out, f"To be made: {part}")
    say(out, f"Next: grafting check {written}, grafting run {smoke}")


@app.command()
def run(
    recipe: RecipeFile,
    out_folder: Out = None,
    until: Annotated[StageName, typer.Option(help="Last stage to run.")] = "report",
    track: Track = None,
    peak_tflops: PeakTflops = None,
    settings: Settings = None,
    seeds: Seeds = None,
    dry_run: DryRun = False,
    device: Device = None,
    processes: Processes = 1,
    mfu: Mfu = 0.3,
    as_json: Json = False,
    spec: Spec = None,
) -> None:
    """Run a recipe; finished stages are skipped.

    [dim]$ grafting run my-recipe.yaml --until distill
    $ grafting run my-recipe.yaml --dry-run --device h100 --processes 8
    $ grafting run my-recipe.yaml --seeds 3[/]
    """
    how = _estimating(dry_run, device=device, processes=processes, mfu=mfu) | {"peak_tflops": peak_tflops}
    if seeds is not None:
        given_peak = None if dry_run else peak_tflops
        _check_repeatable(until=until, track=track, peak_tflops=given_peak, json=as_json)
        from ..runs.sweep import seeds_sweep

        many = seeds_sweep(open_recipe(recipe, settings), seeds)
        _forecast_sweep(many, out_folder, **how) if dry_run else _sweep(many, out_folder)
        return
    if dry_run:
        _forecast(open_recipe(recipe, settings), out_folder, as_json=as_json, until=until, **how)
        return
    _run(
        recipe,
        out_folder,
        until,
        settings=settings,
        track=track,
        peak_tflops=peak_tflops,
        as_json=as_json,
    )


@app.command()
def distill(
    recipe: RecipeFile,
    out_folder: Out = None,
    settings: Settings = None,
    track: Track = None,
    peak_tflops: PeakTflops = None,
    spec: Spec = None,
) -> None:
    """Run stage 1: distill the old operators into the new ones.

    [dim]$ grafting distill my-recipe.yaml[/]
    """
    _run(recipe, out_folder, "distill", settings=settings, track=track, peak_tflops=peak_tflops)


@app.command()
def finetune(
    recipe: RecipeFile,
    out_folder: Out = None,
    settings: Settings = None,
    track: Track = None,
    peak_tflops: PeakTflops = None,
    spec: Spec = None,
) -> None:
    """Run up to stage 2: train the grafted model end to end.

    [dim]$ grafting finetune my-recipe.yaml --out runs/second-try[/]
    """
    _run(recipe, out_folder, "finetune", settings=settings, track=track, peak_tflops=peak_tflops)


def _run(
    recipe_path: Path,
    folder: Path | None,
    until: StageName = "report",
    *,
    settings: list[str] | None = None,
    track: list[str] | None = None,
    peak_tflops: float | None = None,
    as_json: bool = False,
) -> None:
    from ..machine.processes import together

    # a fault in the recipe, which all processes find, is told once
    with together():
        recipe = open_recipe(recipe_path, settings)
        _carry_out(recipe, folder, until, track=track, peak_tflops=peak_tflops, as_json=as_json)


def _carry_out(
    recipe: "Recipe",
    folder: Path | None,
    until: StageName,
    *,
    track: list[str] | None,
    peak_tflops: float | None,
    as_json: bool = False,
) -> None:
    from ..runs.trackers import check_trackers, tracking

    check_trackers(track or ())

    from ..machine.devices import default_device
    from ..machine.precision import precisions_of, settled_run
    from ..runs.folder import done_stages
    from ..runs.run import run as run_recipe
    from ..weights.card import rows_of

    folder = folder or Path("runs") / recipe.name
    told = err if as_json else out
    settled = settled_run(recipe, default_device(), folder=folder)[0]
    settings = settled.model_dump(mode="json", exclude_none=True)
    precisions = " and ".join(sorted(set(precisions_of(settled))))
    say(told, f"Recipe {recipe.name}, in {folder}" + (f", computed in {precisions}" if precisions else ""))
    if done := done_stages(folder):
        say(told, f"Done before: {', '.join(done)}")
    with (
        tracking(track or (), folder, name=recipe.name, settings=settings) as note,
        follow(told) as show,
    ):
        run_recipe(recipe, folder, until=until, on_step=in_turn(show, note), peak_tflops=peak_tflops)
    metrics = folder / "metrics.json"
    has_figures = until in ("evaluate", "report") and metrics.is_file()
    rows = list(rows_of(folder)) if has_figures else []
    results = {
        "teach": "teach/latents",
        "finetune": "model",
        "sample": "samples",
        "evaluate": "metrics.json",
        "report": "report.html",
    }
    result = folder / results.get(until, until)
    if as_json:
        found = str(result) if result.exists() else None
        _print_result(
            {"recipe": recipe.name, "folder": str(folder), "until": until, "result": found, "rows": rows}
        )
        return
    if rows:
        out.print(metrics_table(rows, trial=recipe.trial))
    if until == "report" and (folder / "pipeline").is_dir():
        say(out, f"Pipeline: {folder / 'pipeline'}; `import grafting` before you load it")
    say(out, f"{until.capitalize()}: {result if result.exists() else 'the recipe has no such stage'}")


def _print_result(found: object) -> None:
    from ..machine.processes import is_main

    if is_main():
        print_json(found)


def _forecast(recipe: "Recipe", folder: Path | None, *, as_json: bool, **how: Any) -> None:
    from ..runs.forecast import forecast

    found = forecast(recipe, folder=folder or Path("runs") / recipe.name, **how).to_json()
    if as_json:
        print_json(found)
    else:
        show_forecast(out, found)


def _estimating(dry_run: bool, **how: Any) -> dict[str, Any]:
    """What a forecast assumes. Raises a RecipeError if that is said of what is no forecast."""
    if not dry_run and (given := _given(how, {"processes": 1, "mfu": 0.3})):
        raise RecipeError(
            f"{', '.join(given)} only applies to --dry-run; a run uses the devices that torch sees"
        )
    return how


def _given(options: dict[str, Any], usual: dict[str, Any]) -> list[str]:
    """The options that say something else than they usually do, as they are typed."""
    return [
        f"--{key.replace('_', '-')}" for key, value in options.items() if value and value != usual.get(key)
    ]


def _forecast_sweep(loaded: "Sweep", folder: Path | None, **how: Any) -> None:
    from ..runs.sweep import forecasts

    found = forecasts(loaded, folder or Path("runs") / loaded.name, **how)
    show_forecasts(out, loaded.name, [(point.labels, each.to_json()) for point, each in found])


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="Sweep file (YAML).")],
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Folder of the runs. [dim]Default: runs/NAME.[/]")
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            help="Path of the table, without suffix. [dim]Default: table, in the folder of the runs.[/]"
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN=LABEL", help="Run matching recipes only; repeatable.")
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help="Measure only these rows for now, such as finetuned,distilled.")
    ] = None,
    machines: Annotated[
        bool, typer.Option("--ray", help="Distribute the runs over a Ray cluster with a shared file system.")
    ] = False,
    seeds: Seeds = None,
    dry_run: DryRun = False,
    device: Device = None,
    peak_tflops: PeakTflops = None,
    processes: Processes = 1,
    mfu: Mfu = 0.3,
    spec: Spec = None,
) -> None:
    """Run many recipes into one table; finished rows are skipped.

    The table is written as JSON, CSV and Markdown.

    [dim]$ grafting sweep recipes/testbed/table4.yaml --only recipe=best
    $ grafting sweep recipes/testbed/table4.yaml --dry-run --device h100[/]
    """
    from ..runs.sweep import load_sweep

    loaded = load_sweep(file)
    if seeds is not None:
        loaded = loaded.model_copy(update={"seeds": seeds})
    part: dict[str, Any] = {
        "only": dict(map(_parse_label, only or [])),
        "rows": rows.split(",") if rows else None,
    }
    how = _estimating(dry_run, device=device, processes=processes, mfu=mfu, peak_tflops=peak_tflops)
    if dry_run:
        _forecast_sweep(loaded, out_folder, **part, **how)
    else:
        _sweep(loaded, out_folder, table=table, machines=machines, **part)


def _check_repeatable(**options: Any) -> None:
    """Raise a RecipeError if options of one run are given for many."""
    if given := _given(options, {"until": "report"}):
        raise RecipeError(f"--seeds makes whole runs and takes no {' and no '.join(given)}")


def _sweep(
    loaded: "Sweep",
    folder: Path | None,
    *,
    table: Path | None = None,
    only: dict[str, str] | None = None,
    rows: list[str] | None = None,
    machines: bool = False,
) -> None:
    from ..machine.processes import together
    from ..runs.seeds import TWO_SEEDS
    from ..runs.sweep import run_sweep, run_sweep_on_ray

    folder = folder or Path("runs") / loaded.name
    table = table or folder / "table"

    @contextmanager
    def following(point: "Point") -> Iterator[Any]:
        say(out, point.name)
        with follow(out) as on_step:
            yield on_step

    say(out, f"Sweep {loaded.name}, in {folder}")
    if machines:
        for point in run_sweep_on_ray(loaded, folder, table=table, only=only, rows=rows):
            say(out, f"{point.name}: done")
    else:
        with together():
            for _ in run_sweep(loaded, folder, table=table, only=only, rows=rows, following=following):
                pass
    say(out, f"Table: {table.with_suffix('.md')}")
    if loaded.seeds > 1:
        say(out, f"Means over seeds: {table.with_name(table.name + '-over-seeds').with_suffix('.md')}")
    if loaded.seeds == 2:
        say(out, TWO_SEEDS)


def _parse_label(text: str) -> tuple[str, str]:
    column, found, label = text.partition("=")
    if not found:
        raise RecipeError(f"--only takes COLUMN=LABEL, found {text!r}")
    return column, label


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
) -> None:
    """Rewrite a run's report: one self-contained HTML file.

    [dim]$ grafting report runs/quickstart[/]
    """
    from ..runs.record import write_report

    say(out, f"Report: {write_report(run_folder)}")

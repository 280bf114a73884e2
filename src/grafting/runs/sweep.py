"""A sweep: many recipes that differ in a few settings, as one file; carried out one by one into one table.

A sweep is a recipe's settings (or a `base:`) and grids of changes to them. Runs share what they have in common: fitted
operators of equal sites, and lines of the table that were measured before. The table is kept up to date as lines come, so a
killed sweep resumes where it stopped, and lines measured on another machine need not be measured again.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, PositiveInt, ValidationError

from ..editing.plan import fault_list
from ..errors import GraftingError, MissingBackend, RecipeError, RunError
from ..machine import processes
from ..machine.devices import default_device
from ..machine.files import clear_abandoned
from ..machine.packages import install_line
from ..machine.precision import Precision, settled_run, settled_sections
from ..machine.reading import read_json
from ..machine.settings import Settings
from ..words import FINETUNED, PRETRAINED, ROW_TITLES, Row
from .file import Changes, changed, faults_of, parse_recipe, read_settings
from .forecast import Forecast, forecast
from .identity import row_fingerprint
from .job import Job, prepare
from .operator_cache import OperatorStore
from .pairing import columns_against, pretrained_rows
from .recipe import Name, Recipe
from .rows import ROWS, rows_of
from .run import run
from .seeds import SEED, TWO_SEEDS, over_seeds, with_seeds_moved
from .stage import OnStep
from .stages import training_flops
from .table import TableLine, read_table, swept, swept_pairs, table_locked, write_table

Label = str | int | float
_MOST_POINTS = 10_000

T = TypeVar("T")


class SweepGrid(Settings):
    """All combinations of some axes; each value of an axis is a label of the table and changes to the settings."""

    labels: dict[str, Label] = {}
    """Columns of the table that are the same for the whole grid."""
    changes: Changes = {}
    """Changes to the sweep's settings, made first. Keys may be paths: `plan.0.blocks: odd`."""
    axes: dict[str, dict[Label, Changes]] = {}
    """Column -> label -> changes; the first axis varies slowest, and its changes are made first."""


class Sweep(Settings):
    """Many recipes as data."""

    name: Name
    description: str = ""
    settings: dict[str, Any]
    """Settings shared by all recipes, as in a recipe file; `base:` is already merged in."""
    grids: Annotated[tuple[SweepGrid, ...], Field(min_length=1)]
    seeds: PositiveInt = 1
    """Repetitions of each recipe with all its seeds moved; a second table has their means with intervals."""
    pretraining_images: PositiveInt | None = None
    """Images that the source was pretrained on, counted with repetition: the unit of `compute_share`."""


@dataclass(frozen=True)
class Point:
    """One recipe of a sweep, and what the table calls it."""

    labels: dict[str, Label]
    recipe: Recipe

    @property
    def name(self) -> str:
        return "-".join(str(label) for label in self.labels.values())


def load_sweep(path: str | Path) -> Sweep:
    """The sweep in a YAML file: `name`, `grids`, and the settings of a recipe or a `base:` that has them.

    Raises:
        RecipeError: the file cannot be read, or has faults (all are listed).
    """
    path = Path(path)
    settings = read_settings(path)
    own = {key: settings.pop(key) for key in set(Sweep.model_fields) - {"settings"} if key in settings}
    try:
        sweep = Sweep.model_validate(own | {"settings": settings})
    except ValidationError as error:
        raise RecipeError(fault_list(faults_of(error), str(path))) from error
    points(sweep)
    return sweep


def points(sweep: Sweep) -> list[Point]:
    """Every recipe of a sweep, in its order.

    Raises:
        RecipeError: lists the faults of all recipes, or labels that name two of them.
    """
    number = sweep.seeds * sum(math.prod(map(len, grid.axes.values())) for grid in sweep.grids)
    if number > _MOST_POINTS:
        raise RecipeError(f"sweep {sweep.name} has {number} recipes; at most {_MOST_POINTS} are carried out")
    found, faults = [], []
    for grid in sweep.grids:
        for labels, changes in _combinations(grid):
            settings: dict[str, Any] = dict(sweep.settings)
            try:
                for change in changes:
                    settings = changed(settings, change)
                name = "-".join(map(str, labels.values()))
                if name and not set(name) - {"."}:
                    raise RecipeError(f"{name}: no name of a folder")
                recipe = parse_recipe(settings | {"name": f"{sweep.name}-{name}"}, source=name)
            except RecipeError as error:
                faults.append(str(error))
            else:
                found += _repeated(Point(labels, recipe), sweep.seeds)
    names = [point.name for point in found]
    faults += [f"{name}: two recipes have these labels" for name in set(names) if names.count(name) > 1]
    if faults:
        raise RecipeError(fault_list(faults, f"sweep {sweep.name}"))
    return found


def _repeated(point: Point, seeds: int) -> list[Point]:
    """A recipe once, or as many times with all seeds moved."""
    if seeds == 1:
        return [point]
    repeated = []
    for number in range(seeds):
        label, recipe = f"seed-{number + 1}", with_seeds_moved(point.recipe, number)
        name = f"{recipe.name.removesuffix('-')}-{label}"
        repeated.append(Point(point.labels | {SEED: label}, recipe.model_copy(update={"name": name})))
    return repeated


def seeds_sweep(recipe: Recipe, seeds: int) -> Sweep:
    """One recipe as a sweep over seeds."""
    settings = recipe.model_dump(mode="json", exclude_none=True, exclude={"name"})
    return Sweep(name=recipe.name, settings=settings, grids=(SweepGrid(),), seeds=seeds)


def run_sweep(
    sweep: Sweep,
    folder: str | Path,
    *,
    table: str | Path,
    only: Mapping[str, str] | None = None,
    rows: Sequence[str] | None = None,
    following: Callable[[Point], AbstractContextManager[OnStep | None]] | None = None,
) -> Iterator[Point]:
    """Carry out the recipes of a sweep one by one, and yield each when its lines are in the table.

    Args:
        folder: of the runs, each in a folder of its own, and of the operators that they share.
        table: a path without ending; `.json` (which is read first), `.csv`, `.md` and `.svg` are kept up to date.
        only: labels that a recipe must have, to run a part of the sweep.
        rows: measure these rows only, for now.
        following: opened around each run; gives what is called with its steps.

    Raises:
        RecipeError: no recipe has those labels, no such row, or some recipes have faults; all are checked before the
            first is carried out. GraftingError: as `recipe.run`.
    """
    folder, table = Path(folder), Path(table)
    chosen = _chosen(sweep, only or {}, rows)
    each(chosen, _check)
    if processes.is_main():
        clear_abandoned(folder)  # of runs that are finished too, whose folders are not opened again
    for point in chosen:
        with following(point) if following else nullcontext() as on_step:
            lines = measure(sweep, point, folder, known=_known(table), rows=rows, on_step=on_step)
        if processes.is_main():
            _add(sweep, table, lines, folder)
        processes.barrier()
        yield point


def forecasts(
    sweep: Sweep,
    folder: Path,
    *,
    only: Mapping[str, str] | None = None,
    rows: Sequence[str] | None = None,
    **how: Any,
) -> list[tuple[Point, Forecast]]:
    """What each recipe of a sweep will take alone, all checked as far as they can be without weights and data.

    Args:
        only, rows: as `run_sweep`.
        how: as `forecast`.

    Raises:
        RecipeError: as `run_sweep`.
    """

    def of(point: Point) -> Forecast:
        recipe = point.recipe if rows is None else _with_rows(point.recipe, rows)
        return forecast(recipe, folder=folder / point.name, **how)

    return each(_chosen(sweep, only or {}, rows), of)


def run_sweep_on_ray(
    sweep: Sweep,
    folder: Path,
    *,
    table: Path,
    only: Mapping[str, str] | None = None,
    rows: Sequence[str] | None = None,
    cpus: float = 1,
    gpus: float = 0,
) -> Iterator[Point]:
    """The same on all machines of a Ray cluster, which must share the file system; a recipe takes `cpus` and `gpus`.

    Raises:
        MissingBackend: Ray is not installed. RecipeError, GraftingError: as `run_sweep`.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingBackend(f"a sweep over machines needs Ray: {install_line('ray')}") from error
    chosen = _chosen(sweep, only or {}, rows)
    each(chosen, _check)
    known = _known(table)

    def task(point: Point) -> list[TableLine]:
        return measure(sweep, point, folder.absolute(), known=known, rows=rows)

    ray.init(ignore_reinit_error=True)
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus)(task)
    waiting = {remote.remote(point): point for point in chosen}
    while waiting:
        (finished,), _ = ray.wait(list(waiting), num_returns=1)
        _add(sweep, table, ray.get(finished), folder)
        yield waiting.pop(finished)


def measure(
    sweep: Sweep,
    point: Point,
    folder: Path,
    *,
    known: frozenset[str] = frozenset(),
    rows: Sequence[str] | None = None,
    on_step: OnStep | None = None,
) -> list[TableLine]:
    """Carry out one recipe of a sweep, unless the fingerprints of its lines are all `known`; returns its lines.

    Where the recipe leaves the precision to the device, lines of either precision are those that it asks for.
    A recipe that samples no images has none.
    """
    recipe = point.recipe if rows is None else _with_rows(point.recipe, rows)
    asked, (recipe, _) = recipe, settled_run(recipe, default_device(), folder=folder / point.name)
    job = prepare(recipe)
    if _is_known(job, known) or any(_is_known(prepare(r), known) for r in _either(asked) if known):
        return []
    others = sorted(path.parent for path in folder.glob("*/manifest.json") if path.parent.name != point.name)
    run(asked, folder / point.name, on_step=on_step, store=OperatorStore(folder / "operators"), others=others)
    if recipe.sample is None:
        return []
    measured = read_json(folder / point.name / "metrics.json", list[Row], error=RunError)
    return [_line(sweep, point, job, row) for row in measured]


def _is_known(job: Job, known: frozenset[str]) -> bool:
    return known.issuperset(row_fingerprint(job, row) for row in rows_of(job))


def _either(recipe: Recipe) -> list[Recipe]:
    """The recipe in each precision, where it leaves that to the device."""
    settled = [_all_in("fp32", recipe), _all_in("bf16", recipe)]
    return settled if settled[0] != settled[1] else []


def _all_in(precision: Precision, recipe: Recipe) -> Recipe:
    return settled_sections(recipe, lambda _: precision)


def _with_rows(recipe: Recipe, rows: Sequence[str]) -> Recipe:
    """A recipe with those of its rows, up to the last stage that they need."""
    kept = tuple(row for row in recipe.rows if row in rows)
    needed = {stage for row in kept for stage in ROWS[row].after}
    dropped = [stage for stage in ROWS[FINETUNED].after if stage not in needed]
    return recipe.model_copy(update={"rows": kept} | dict.fromkeys(dropped))


def _combinations(grid: SweepGrid) -> Iterator[tuple[dict[str, Label], list[Changes]]]:
    for values in product(*(axis.items() for axis in grid.axes.values())):
        labels = dict(zip(grid.axes, (label for label, _ in values), strict=True))
        yield grid.labels | labels, [grid.changes, *(changes for _, changes in values)]


def _chosen(sweep: Sweep, only: Mapping[str, str], rows: Sequence[str] | None) -> list[Point]:
    unknown = [row for row in rows or () if row not in tuple(ROW_TITLES)]
    if unknown:
        raise RecipeError(f"no rows {', '.join(unknown)}; there are {', '.join(tuple(ROW_TITLES))}")
    everything = points(sweep)
    chosen = [
        point
        for point in everything
        if all(str(point.labels.get(column)) == label for column, label in only.items())
    ]
    if not chosen:
        asked = ", ".join(f"{column}={label}" for column, label in only.items())
        names = "\n  ".join(f"{point.name}: {point.labels}" for point in everything)
        raise RecipeError(f"no recipe of sweep {sweep.name} has {asked}; there are\n  {names}")
    return chosen


def each(chosen: Sequence[Point], find: Callable[[Point], T]) -> list[tuple[Point, T]]:
    """What is found of each recipe.

    Raises:
        RecipeError: lists the faults of all recipes.
    """
    found, faults = [], []
    for point in chosen:
        try:
            found.append((point, find(point)))
        except GraftingError as error:
            faults.append(f"{point.name}: {error}")
    if faults:
        raise RecipeError(fault_list(faults, f"recipes of {len(chosen)}"))
    return found


def _check(point: Point) -> None:
    prepare(point.recipe)


def _known(table: Path) -> frozenset[str]:
    return frozenset(str(line["fingerprint"]) for line in read_table(table))


def _add(sweep: Sweep, table: Path, lines: Sequence[TableLine], folder: Path) -> None:
    with table_locked(table):
        # read again: another process may have added lines of another part of the sweep
        lines = _compared(sweep, _in_order(sweep, [*read_table(table), *lines]), folder)
        write_table(table, lines)
        if sweep.seeds > 1 and (means := over_seeds(lines)):
            note = TWO_SEEDS if sweep.seeds == 2 else ""
            write_table(table.with_name(f"{table.name}-over-seeds"), means, note=note)


def _compared(sweep: Sweep, lines: Sequence[TableLine], folder: Path) -> list[TableLine]:
    """Lines with their comparison to the pretrained row that another run of the sweep has measured, where theirs has none."""
    runs = {frozenset(map(str, point.labels.items())): folder / point.name for point in points(sweep)}
    bases = list(pretrained_rows(runs.values()))
    return [
        line
        if line["stage"] == PRETRAINED or any(key.endswith(("_ratio", "_difference")) for key in line)
        else _with_columns(line, columns_against(bases, runs.get(_labels(line)), str(line["stage"])))
        for line in lines
    ]


def _labels(line: Mapping[str, Any]) -> frozenset[str]:
    """The labels of a line, which stand before its stage."""
    keys = list(line)
    return frozenset(map(str, [(key, line[key]) for key in keys[: keys.index("stage")]]))


def _with_columns(line: TableLine, columns: Mapping[str, float]) -> TableLine:
    """A line with more figures, before its costs."""
    first = {key: line[key] for key in list(line)[: list(line).index("params")]}
    return {**first, **columns, **{key: value for key, value in line.items() if key not in first}}


def _line(sweep: Sweep, point: Point, job: Job, measured: Mapping[str, Any]) -> TableLine:
    """A line of the table: labels, row, figures, costs, and the protocol."""
    row = measured["name"]
    flops = training_flops(job, row)
    return {
        **point.labels,
        "stage": row,
        **{key: measured[key] for key in swept(measured)},
        **swept_pairs(measured.get("paired") or {}),
        "params": measured["params"],
        "compute_share": sweep.pretraining_images
        and round(flops.training / (sweep.pretraining_images * 3 * flops.base), 5),
        "model_flops": flops.model,
        "num_images": measured["num_images"],
        "fingerprint": row_fingerprint(job, row),
        "protocol": measured.get("protocol"),
    }


def _in_order(sweep: Sweep, lines: Sequence[TableLine]) -> list[TableLine]:
    """Lines in the sweep's order, the later of two with the same labels and stage; strangers come last."""
    columns = {column for point in points(sweep) for column in point.labels}

    def labels(line: Mapping[str, Any]) -> frozenset[tuple[str, str]]:
        return frozenset((column, str(line[column])) for column in columns & line.keys())

    places = {labels(point.labels): place for place, point in enumerate(points(sweep))}
    stages = tuple(ROW_TITLES)
    latest = {(labels(line), line["stage"]): line for line in lines}
    order = sorted(latest, key=lambda key: (places.get(key[0], len(places)), stages.index(key[1])))
    return [latest[key] for key in order]

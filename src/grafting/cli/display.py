"""Terminal output: progress of stages, and tables. Computes no figures."""

import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ..machine.packages import install_line
from ..words import (
    ABSENT,
    FIGURES,
    ROW_TITLES,
    TRIAL,
    amount,
    duration,
    headline,
    name_of,
    number,
    shown_in,
    verdict,
)

if TYPE_CHECKING:
    from ..contract import Step
    from .doctor import Diagnosis

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def follow(console: Console) -> Iterator[Callable[[str, "Step"], None]]:
    """Show progress per stage: a bar on a terminal, otherwise a line every ten seconds."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[values]}", style="dim"),
    )
    with Progress(*columns, console=console) as progress:
        yield _Bars(progress)


def fills(name: str, steps: Iterable["Step"], *, index: Path) -> bool:
    """Take this process's steps of filling a folder, of which the main process shows progress.

    Returns:
        Whether the folder is whole, as its index then says. If not, the others' part is still to come, and that is said.
    """
    from ._shared import out

    take(name, steps)
    if not index.is_file():
        say(out, "This process is done; other processes are still running or must be started again")
    return index.is_file()


def take(name: str, steps: Iterable["Step"]) -> None:
    """Take this process's steps, of which the main process shows progress."""
    from ..machine.processes import is_main
    from ._shared import out

    with follow(out) if is_main() else nullcontext() as on_step:
        for step in steps:
            if on_step is not None:
                on_step(name, step)


def in_turn(*followers: Callable[[str, "Step"], None]) -> Callable[[str, "Step"], None]:
    """Combine followers into one that passes each step to all of them."""

    def on_step(stage: str, step: "Step") -> None:
        for follower in followers:
            follower(stage, step)

    return on_step


def describe_values(values: Mapping[str, float]) -> str:
    """Format a step's losses, R^2 and rates, each averaged over its sites: `loss 0.0312, R² 0.871, images/s 812`."""
    groups: dict[str, list[float]] = defaultdict(list)
    for name, value in values.items():
        groups[name.partition("/")[0]].append(value)
    return ", ".join(
        f"{figure.inline} {figure.write(sum(groups[figure.key]) / len(groups[figure.key]))}"
        for figure in shown_in("progress")
        if figure.key in groups
    )


class _Bars:
    def __init__(self, progress: Progress):
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._values: dict[str, dict[str, float]] = defaultdict(dict)

    def __call__(self, stage: str, step: "Step") -> None:
        if stage not in self._tasks:
            # a resumed stage starts at its step, so that the steps of before do not count as fast
            self._tasks[stage] = self._progress.add_task(
                stage, total=step.total, completed=step.done, values=""
            )
        # what is measured now and then stays in sight
        self._values[stage] |= step.values
        self._progress.update(
            self._tasks[stage], completed=step.done, values=describe_values(self._values[stage])
        )


class _Lines:
    def __init__(self, console: Console):
        self._console = console
        self._started: dict[str, tuple[float, int]] = {}
        self._last: dict[str, int] = {}
        self._printed = 0.0

    def __call__(self, stage: str, step: "Step") -> None:
        now = time.monotonic()
        is_new = stage not in self._started
        started, first = self._started.setdefault(stage, (now, step.done))
        is_last = step.done >= step.total and step.done != self._last.get(stage)
        if not (is_new or is_last or now - self._printed >= _SECONDS_BETWEEN_LINES):
            return
        self._printed = now
        self._last[stage] = step.done
        rate = (step.done - first) / (now - started) if now > started else 0.0
        parts = [f"{stage} {step.done}/{step.total}", describe_values(step.values)]
        if rate:
            parts += [f"{rate:.3g} it/s", f"{clock((step.total - step.done) / rate)} left"]
        say(self._console, ", ".join(filter(None, parts)))


class _RateColumn(ProgressColumn):
    """Steps (or images) per second over the last half minute."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.3g} it/s" if speed else "", style="cyan")


def metrics_table(rows: Sequence[Mapping[str, Any]], *, trial: bool = False) -> Table:
    """Build a table of a run's metrics.json that fits 80 columns, under the verdict on its last row; a trial's has none."""
    figure = headline(rows)
    protocol = rows[0].get("protocol")
    columns = [c for c in shown_in("main") if c is not figure and any(c.key in row for row in rows)]
    if not protocol and any("image_distance" in row for row in rows):
        columns = [FIGURES["image_distance"], *columns]
    if "mlp_flops" in rows[0] and len({row.get("attention_flops") for row in rows}) == 1:
        columns = [c for c in columns if c.key != "attention_flops"]
    caption = f"{rows[0]['num_images']} images per model"
    if protocol:
        caption += f", features of {protocol['feature_network']['name']}, 95 % intervals"
        if written := next(filter(None, map(figure.paired, rows)), ""):
            mark = "\u00d7" if "\u00d7" in written else "points" if "points" in written else "+, \u2212"
            caption += f"\n{mark}: to the pretrained model, by images of the same seeds"
        elif reason := next(filter(None, (why_no_ratio(row.get("paired") or {}) for row in rows)), ""):
            caption += f"\n{reason}"
    else:
        caption += ", not evaluated: no suite is named, or none takes them"
    titled = [{**row, "name": ROW_TITLES.get(row["name"], row["name"])} for row in rows]
    said = TRIAL if trial else verdict(titled[-1], titled[0])
    table = Table(
        title=f"{said[:1].upper()}{said[1:]}" or None,
        title_style="bold",
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption=caption,
    )
    table.add_column("model", no_wrap=True)
    if protocol:
        table.add_column(figure.name(rows), justify="right", no_wrap=True)
    for column in columns:
        table.add_column(column.inline, justify="right", overflow="fold")
    for row in titled:
        interval = figure.interval(row)
        value = f"[bold]{figure.write(row.get(figure.key))}[/]" + (f" ({interval})" if interval else "")
        value += f"\n{paired}" if (paired := figure.paired(row)) else ""
        table.add_row(
            row["name"],
            *([value] if protocol else []),
            *(column.write(row.get(column.key)) for column in columns),
        )
    return table


def why_no_ratio(found: Mapping[str, Any]) -> str:
    """Why a row's comparison (as JSON) has no ratio of Fréchet distances; empty if it has one, or nothing is said of it."""
    from ..evaluation.comparison import NO_RATIO

    if reason := found.get("reason"):
        return f"figures are not compared: {reason}"
    return next((note for note in found.get("notes", ()) if note.startswith(NO_RATIO)), "")


def plain_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """Build a table of texts; numeric columns are right-aligned and None is left blank."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, heading in enumerate(headings):
        is_number = all(isinstance(row[i], int | float | None) for row in rows)
        table.add_column(heading, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*("" if cell is None else Text(str(cell)) for cell in row))
    return table


def show_evaluation(console: Console, result: Mapping[str, Any]) -> None:
    """Print an evaluation (as JSON): its figures, protocol and notes."""
    figures = {key: v for key, v in result.items() if key not in ("notes", "protocol", "num_images")}
    protocol = result["protocol"]
    network, reference = protocol["feature_network"]["name"], protocol["reference"]["name"]
    rows = [[name_of(key, [result]), ABSENT if v is None else f"{v:.4g}"] for key, v in figures.items()]
    console.print(plain_table(["figure", "value"], rows))
    say(console, f"{result['num_images']} images, features of {network}, reference {reference}")
    say(console, f"sampling: {json.dumps(protocol['sampling'])}")
    for note in result["notes"]:
        say(console, f"Note: {note}")


def show_cost(console: Console, facts: Mapping[str, Any]) -> None:
    """Print how a plan changes a model's cost (as JSON): per site, in total, and as measured."""

    def arrow(pair: Mapping[str, Any]) -> str:
        before, after = amount(pair["before"]), amount(pair["after"])
        return before if before == after else f"{before} → {after}"

    rows = [
        [
            site["block"],
            site["role"],
            site["operator"] or "",
            *(arrow(site[name]) for name in ("flops", "params", "saved_bytes")),
        ]
        for site in facts["sites"]
    ]
    heads = [FIGURES[key].inline for key in ("flops", "params", "saved_bytes")]
    console.print(plain_table(["block", "role", "operator", *heads], rows))
    say(console, f"An image of {facts['grid'][0]} x {facts['grid'][1]} tokens, one forward pass in float32")
    for key in ("flops", "params", "saved_bytes"):
        delta = f"{facts[f'model_{key}_delta_pct']:+.2f} %"
        say(console, f"Model, {FIGURES[key].inline}: {arrow(facts['model'][key])} ({delta})")
    for key in ("flops_op", "flops_ft", "flops", "params", "saved_bytes"):
        delta = f"{facts[f'{key}_delta_pct']:+.2f} %"
        say(console, f"All operators of the edited roles, {FIGURES[key].inline}: {delta}")
    if facts["num_merged"]:
        say(
            console,
            f"{facts['num_merged']} blocks are merged; their contents count only towards the model's lines",
        )
    if measured := facts["measured"]:
        ms = measured["ms"]
        say(
            console,
            f"Measured: {ms['before']:.4g} → {ms['after']:.4g} ms, {measured['speedup']:.2f}x as fast, "
            f"peak {arrow(measured['peak_bytes'])}B excluding weights",
        )


def show_forecast(console: Console, found: Mapping[str, Any]) -> None:
    """Print a forecast (as JSON): one line per stage, the contents of memory and disk, and the basis of the times."""

    stages = found["stages"]
    rows = [
        [
            stage["name"],
            stage["work"],
            f"{number(stage['flops'] / 1e15)} P" if stage["flops"] else ABSENT,
            _hours(stage["hours"]),
            _size(stage["memory_bytes"]),
            _size(stage["disk_bytes"]),
        ]
        for stage in stages
    ]
    say(console, f"Recipe {found['recipe']}, {found['processes']} x {found['device']}")
    rows.append(["total", "", *_takes(stages)])
    console.print(plain_table(["stage", "work", "FLOPs", "time", "memory per process", "disk"], rows))
    for stage in stages:
        for what in ("memory", "disk"):
            if stage[what]:
                parts = ", ".join(f"{name} {_size(num_bytes)}" for name, num_bytes in stage[what].items())
                say(console, f"{stage['name']}, {what}: {parts}")
        if stage["activations"]:
            parts = ", ".join(f"{_size(num_bytes)} {how}" for how, num_bytes in stage["activations"].items())
            say(console, f"{stage['name']}, activations: {parts}")
        if stage["hours"] is not None:
            say(console, f"{stage['name']}, time: {stage['basis']}")
    _say_left_out(console, stages)
    if found["device"] == "cpu":
        say(
            console, "On a CPU a small model takes several times as long: its work is no large matrix product"
        )
    if found["data"]["items"] is not None:
        say(console, f"Data: {found['data']['items']:,} items, {_size(found['data']['bytes'])}")
    dump = found["dump"]
    if dump["published"]:
        here = _size(dump["here"]) if dump["here"] else "nothing"
        say(
            console,
            f"Activations on disk: {here}; the published method for stage 1 stores {_size(dump['published'])} for its "
            f"{dump['published_samples']:,} samples",
        )


def show_forecasts(
    console: Console, name: str, found: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> None:
    """Print what a sweep's recipes take, of each its labels and its forecast (as JSON): a line each, and their sum."""
    columns = list(dict.fromkeys(column for labels, _ in found for column in labels))
    every = [stage for _, forecast in found for stage in forecast["stages"]]
    rows = [
        [*map(labels.get, columns), amount(forecast["params"]), *_takes(forecast["stages"])]
        for labels, forecast in found
    ]
    rows.append([*[None] * len(columns), "total", *_takes(every)])
    first = found[0][1]
    say(console, f"Sweep {name}, {len(found)} recipes, {first['processes']} x {first['device']}")
    heads = ["params", "FLOPs", "time", "memory per process", "disk"]
    console.print(plain_table([*columns, *heads], rows))
    # each run has logged a rate of its own
    bases = [
        re.sub("^measured, .*", "measured, by what runs of the sweep have logged", stage["basis"])
        for stage in every
        if stage["hours"] is not None
    ]
    for basis in dict.fromkeys(bases):
        say(console, f"Time: {basis}")
    _say_left_out(console, every)
    say(
        console,
        "Each as if it ran alone: sites that several recipes fit alike are fitted once, and a recipe whose lines are in the table is skipped",
    )


_ESTIMATED = {"time": "hours", "memory": "memory_bytes", "disk": "disk_bytes"}


def _takes(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """FLOPs, time and disk of stages together, and the memory of the one that takes most, as far as they are known."""
    hours, memory, disk = (
        [stage[key] for stage in stages if stage[key] is not None] for key in _ESTIMATED.values()
    )
    return [
        f"{number(sum(stage['flops'] for stage in stages) / 1e15)} P",
        _hours(sum(hours) if hours else None),
        _size(max(memory, default=0)),
        _size(sum(disk)),
    ]


def _say_left_out(console: Console, stages: Sequence[Mapping[str, Any]]) -> None:
    """Say which stages a sum of them leaves out, and why."""
    from ..runs.forecast import NOT_ESTIMATED

    left_out: dict[tuple[str, str], list[str]] = {}
    for stage in stages:
        if unknown := [what for what, key in _ESTIMATED.items() if stage[key] is None]:
            left_out.setdefault((", ".join(unknown), stage["basis"]), []).append(stage["name"])
    for (what, basis), names in left_out.items():
        where = ", ".join(dict.fromkeys(names))
        # what is unknown of a stage is all of it, or is named
        left = where if what == ", ".join(_ESTIMATED) else f"{what} of {where}"
        why = "" if basis == NOT_ESTIMATED else f" ({basis})"
        say(console, f"Not estimated, and not in the total: {left}{why}")


def _hours(hours: float | None) -> str:
    return ABSENT if hours is None else duration(3600 * hours)


def _size(num_bytes: int | None) -> str:
    return ABSENT if num_bytes is None else f"{amount(num_bytes)}B"


def show_diagnosis(console: Console, found: "Diagnosis") -> None:
    """Print the diagnosis of this machine, one fact per line, and the optional packages."""
    facts = {
        "system": f"{found.system}, Python {found.python}, {found.processor}",
        "versions": ", ".join(f"{name} {number}" for name, number in found.versions.items()),
        "device": ", ".join([found.device, *found.gpus]),
        "Triton kernels": found.kernels,
        "CPU": f"{found.cores} cores available, {found.threads} torch threads",
        "memory": f"{found.memory_free_gib:g} of {found.memory_gib:g} GiB free",
        "disk": f"{found.disk_free_gib:g} GiB free here",
        "matrix products": ", ".join(f"{dtype} {gflops:g} GFLOP/s" for dtype, gflops in found.gflops.items()),
        "precision auto": f"{found.precision} ({found.precision_why})",
        "compiler": found.compiler or "none",
        "torch.compile": found.compile,
    }
    assets = {f"bundled {name}": state for name, state in found.assets.items()}
    for title, text in (facts | assets).items():
        say(console, f"{title}: {text}")
    rows = [
        [
            package.name,
            package.version or "no",
            package.purpose,
            "" if package.version else install_line(package.name),
        ]
        for package in found.packages
    ]
    say(console, "\nOptional packages; no operator needs one:")
    console.print(plain_table(["package", "installed", "for", "install with"], rows))


def say(console: Console, text: str) -> None:
    """Print a text verbatim: no wrapping, highlighting or markup."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """Format a duration as `4:05` or `1:04:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

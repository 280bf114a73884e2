"""The command that compares two measured rows, of one run or of two, image by image."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..words import FIGURES, Figure, headline, is_number
from ._shared import Json, out, print_json
from .display import plain_table, say

if TYPE_CHECKING:
    from ..runs.pairing import RunRow

app = typer.Typer()

Row = Annotated[
    str,
    typer.Argument(
        metavar="RUN[:ROW]", help="Run folder, and a row such as finetuned. [dim]Default: its last row.[/]"
    ),
]


@app.command()
def compare(first: Row, second: Row, as_json: Json = False) -> None:
    """Say whether two models differ, by images of the same seeds.

    Shows differences with intervals. Figures of two rows may differ by less than their own intervals and still be told apart, because image i of both was
    drawn from the same noise.

    [dim]$ grafting compare runs/a runs/b
    $ grafting compare runs/a:finetuned runs/a:distilled[/]
    """
    from ..runs.pairing import paired, read_row, seen_in_images

    a, b = (read_row(*_parse_row(text)) for text in (first, second))
    found = paired(a, b) | seen_in_images(a, b)
    if as_json:
        print_json({"first": a.measured.name, "second": b.measured.name, **found})
    else:
        _show(a, b, found)


def _parse_row(text: str) -> tuple[Path, str | None]:
    folder, colon, row = text.rpartition(":")
    return (Path(folder), row) if colon and not Path(text).exists() else (Path(text), None)


def _show(a: "RunRow", b: "RunRow", found: dict[str, Any]) -> None:
    rows = [a.measured.figures, b.measured.figures]
    figures = [f for f in FIGURES.values() if f.of == "images" and _is_of_both(f, rows)]
    lines = [
        [figure.name(rows), *(_with_interval(figure, row) for row in rows), figure.paired({"paired": found})]
        for figure in figures
    ]
    out.print(plain_table(["figure", a.measured.name, b.measured.name, "first against second"], lines))
    if said := _verdict(found, rows):
        say(out, said)
    if difference := (found.get("frechet") or {}).get("difference"):
        value, low, high = (FIGURES["frechet"].write(difference[end]) for end in ("value", "low", "high"))
        say(
            out, f"Without the bias of finitely many images the distances differ by {value} ({low} to {high})"
        )
    for key, what in (
        ("image_distance", "of the range of pixels apart"),
        ("feature_distance", "apart in features"),
    ):
        if part := found.get(key):
            value, low, high = (FIGURES[key].write(part[end]) for end in ("value", "low", "high"))
            say(out, f"Images of the same seed lie {value} ({low} to {high}) {what}, root mean square")
    if reason := found.get("reason"):
        say(out, f"Not compared image by image: {reason}")
        say(out, "The intervals above are of each row alone: where they overlap, the rows may still differ")
    for note in found.get("notes", []):
        say(out, f"Note: {note}")


def _verdict(found: dict[str, Any], rows: list[Any]) -> str | None:
    """Whether the two can be told apart by the figure that they are compared by first; None if it was not compared."""
    figure = headline(rows)
    part = found.get(figure.key)
    if not part:
        return None
    none, estimate = (1.0, part["ratio"]) if "ratio" in part else (0.0, part["difference"])
    name = f"By {figure.name(rows)} of {rows[0]['num_images']} images"
    if estimate["low"] <= none <= estimate["high"]:
        return f"{name} the two cannot be told apart"
    is_better = (estimate["value"] < none) == (figure.better == "low")
    return f"{name} the first is {'better' if is_better else 'worse'}"


def _is_of_both(figure: Figure, rows: list[Any]) -> bool:
    return figure.judges and all(is_number(row.get(figure.key)) for row in rows)


def _with_interval(figure: Figure, row: Any) -> str:
    interval = figure.interval(row)
    return figure.write(row[figure.key]) + (f" ({interval})" if interval else "")

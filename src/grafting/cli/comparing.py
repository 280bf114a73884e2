"""The command that compares measured rows, of one run or of several, image by image."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RunError
from ..words import FIGURES, Figure, headline, is_number, verdict, without_empty
from ._shared import Json, out, print_json
from .display import plain_table, say, why_no_ratio

if TYPE_CHECKING:
    from ..runs.pairing import RunRow

app = typer.Typer()

Rows = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN[:ROW]...",
        help="Two run folders or more, and of each a row such as finetuned. [dim]Default: its last row.[/]",
    ),
]

Page = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="Write it as a page with images too (.html)."),
]


@app.command()
def compare(rows: Rows, page: Page = None, as_json: Json = False) -> None:
    """Say whether models differ, by images of the same seeds.

    Shows differences with intervals; of more than two models, each is compared with the first. Figures of two rows may differ by less than their own intervals and still be told apart, because image i of both was
    drawn from the same noise.

    [dim]$ grafting compare runs/a runs/b
    $ grafting compare runs/a:finetuned runs/a:distilled
    $ grafting compare runs/a runs/b runs/c --out comparison.html[/]
    """
    from ..runs.pairing import Against, read_row
    from ..runs.record import write_comparison

    if len(rows) < 2:
        raise RunError(f"compare needs two rows or more, RUN or RUN:ROW; found {len(rows)}")
    first, *others = (read_row(*_parse_row(text)) for text in rows)
    compared = [Against(other, first) for other in others]
    written = None if page is None else write_comparison(page, first, compared)
    if len(compared) > 1:
        _show_all(first, [(each.row, each.paired | each.seen) for each in compared], as_json=as_json)
    else:
        (other,) = compared
        found = other.of_first | other.seen
        if as_json:
            print_json({"first": first.measured.name, "second": other.row.measured.name, **found})
        else:
            _show(first, other.row, found)
    if written and not as_json:
        say(out, f"Comparison: {written}")


def _show_all(first: "RunRow", others: "list[tuple[RunRow, dict[str, Any]]]", *, as_json: bool) -> None:
    """A line for each row: its figures, and what they and its images are of the first's, by images of the same seeds."""
    from ..runs.pairing import settings_in_words

    if as_json:
        pairs = [{"name": row.measured.name, **found} for row, found in others]
        print_json({"first": first.measured.name, "others": pairs})
        return
    figures = [first.measured.figures, *(row.measured.figures for row, _ in others)]
    main = headline(figures)
    shown = [f for f in FIGURES.values() if "main" in f.shown and f is not main]
    lines = [
        [
            name,
            _with_interval(main, row),
            main.paired({"paired": found}),
            *(_seen(key, found) for key in ("image_distance", "feature_distance")),
            *(f.write(row.get(f.key)) for f in shown),
        ]
        for name, row, found in (
            (first.measured.name, figures[0], {}),
            *((row.measured.name, row.measured.figures, found) for row, found in others),
        )
    ]
    against = ["against the first", "pixels from the first", "features from the first"]
    heads = ["row", main.name(figures), *against, *(f.inline for f in shown)]
    out.print(plain_table(*without_empty(heads, lines)))
    for row, found in others:
        if said := _verdict(row, first, found):
            say(out, said)
        elif reason := why_no_ratio(found):
            say(out, f"{row.measured.name}: {reason}")
        if warning := settings_in_words(found):
            say(out, f"{row.measured.name}: {warning}")


def _parse_row(text: str) -> tuple[Path, str | None]:
    folder, colon, row = text.rpartition(":")
    return (Path(folder), row) if colon and not Path(text).exists() else (Path(text), None)


def _show(a: "RunRow", b: "RunRow", found: dict[str, Any]) -> None:
    from ..runs.pairing import seen_in_words

    rows = [a.measured.figures, b.measured.figures]
    figures = [f for f in FIGURES.values() if f.of == "images" and _is_of_both(f, rows)]
    lines = [
        [figure.name(rows), *(_with_interval(figure, row) for row in rows), figure.paired({"paired": found})]
        for figure in figures
    ]
    if lines:
        heads = ["figure", a.measured.name, b.measured.name, "first against second"]
        out.print(plain_table(*without_empty(heads, lines)))
    if said := _verdict(a, b, found):
        say(out, said)
    if difference := (found.get("frechet") or {}).get("difference"):
        value, low, high = (FIGURES["frechet"].write(difference[end]) for end in ("value", "low", "high"))
        say(
            out, f"Without the bias of finitely many images the distances differ by {value} ({low} to {high})"
        )
    for sentence in seen_in_words(found):
        say(out, sentence)
    if reason := found.get("reason"):
        say(out, f"Figures are not compared: {reason}")
    if reason and lines:
        say(out, "The intervals above are of each row alone: where they overlap, the rows may still differ")
    for note in found.get("notes", []):
        say(out, f"Note: {note}")


def _verdict(row: "RunRow", base: "RunRow", found: dict[str, Any]) -> str:
    a, b = ({**each.measured.figures, "name": each.measured.name} for each in (row, base))
    return verdict(a | {"paired": found}, b)


def _is_of_both(figure: Figure, rows: list[Any]) -> bool:
    return figure.judges and all(is_number(row.get(figure.key)) for row in rows)


def _seen(key: str, found: dict[str, Any]) -> str:
    """How far a row's images lie from the first's of the same seeds, in pixels or in features; empty if that is not known."""
    if key not in found:
        return ""
    value, low, high = (FIGURES[key].write(found[key][end]) for end in ("value", "low", "high"))
    return f"{value} ({low}\u2013{high})"


def _with_interval(figure: Figure, row: Any) -> str:
    interval = figure.interval(row)
    return figure.write(row.get(figure.key)) + (f" ({interval})" if interval else "")

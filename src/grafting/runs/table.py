"""The table of a sweep in files: JSON, which is read again, and CSV, Markdown and a picture, which are shown.

Several processes may add to one table. What is shown may be opened by a spreadsheet or a browser: a cell is text and
nothing else.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from ..errors import RunError
from ..machine.files import disk_errors, write_bytes, write_json
from ..machine.locks import Lock
from ..machine.reading import JsonObject, parse_json, read_bytes
from ..machine.sheets import csv_text
from ..report import write_sweep_picture
from ..words import Measured, RowName, markdown_table, shown_in, without_empty

TableLine: TypeAlias = JsonObject
"""A line of a sweep's table: labels, the stage, figures, costs and a fingerprint, by column."""

_NOT_SHOWN = frozenset({"fingerprint", "protocol", "notes"})


@contextmanager
def table_locked(table: Path) -> Iterator[None]:
    """Inside, no other process reads the table to add to it."""
    with disk_errors(table):
        table.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(table.with_name(f".{table.name}.lock"), wait=True)
    with lock:
        yield


@with_config(ConfigDict(extra="allow"))
class _Line(TypedDict):
    """What every line has, beside its labels and figures."""

    fingerprint: str
    stage: RowName


def read_table(table: Path) -> list[TableLine]:
    """The lines measured so far.

    Raises:
        RunError: the file is something else.
    """
    path = table.with_suffix(".json")
    if not path.is_file():
        return []
    try:
        content = read_bytes(path, error=RunError)
        parse_json(content, list[_Line], name=path, kind="the table of a sweep", error=RunError)
        return parse_json(content, list[TableLine], name=path, error=RunError)
    except RunError as error:
        raise RunError(f"{error}; name another with --table") from error


def write_table(table: Path, lines: Sequence[Mapping[str, Any]], *, note: str = "") -> None:
    """The lines as JSON, without their protocols as CSV and Markdown with a note below, and as a picture."""
    write_json(table.with_suffix(".json"), lines)
    columns = [key for key in dict.fromkeys(key for line in lines for key in line) if key not in _NOT_SHOWN]
    cells = [[_cell(line.get(column)) for column in columns] for line in lines]
    write_bytes(table.with_suffix(".csv"), csv_text([columns, *cells]).encode())
    below = f"\n{note}.\n" if note else ""
    write_bytes(
        table.with_suffix(".md"), f"{markdown_table(*without_empty(columns, cells))}\n{below}".encode()
    )
    write_sweep_picture(table.with_suffix(".svg"), lines)


def swept(row: Measured) -> Iterator[str]:
    """The keys of a row that a sweep's table keeps: figures, and their intervals."""
    for figure in shown_in("sweep"):
        yield from (k for k in (figure.key, f"{figure.key}_low", f"{figure.key}_high") if k in row)


def swept_pairs(paired: Measured) -> dict[str, float]:
    """What a sweep's table keeps of a row's comparison with the pretrained one, as columns: `frechet_ratio`, `recall_difference_low`."""
    columns: dict[str, float] = {}
    for figure in shown_in("sweep"):
        parts = paired.get(figure.key) or {}
        for kind in [kind for kind in ("ratio", "difference") if kind in parts][:1]:
            limits = {f"{figure.key}_{kind}_{end}": parts[kind][end] for end in ("low", "high")}
            columns |= {f"{figure.key}_{kind}": parts[kind]["value"]} | limits
    return columns


def seeded_keys(line: Measured) -> list[str]:
    """The columns of a sweep's line that are averaged over seeds: figures, and their comparisons with the pretrained model."""
    kinds = ("", "_ratio", "_difference")
    keys = [f"{figure.key}{kind}" for figure in shown_in("sweep") for kind in kinds]
    return [key for key in keys if key in line]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)

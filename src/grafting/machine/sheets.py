"""Tables as files that spreadsheets open."""

import csv
import io
import re
from collections.abc import Iterable, Sequence

# how spreadsheets know a formula; a number may begin so too
_FORMULA, _NUMBER = re.compile(r"[=+\-@\t\r]"), re.compile(r"[+-]?[\d.]+(e[+-]?\d+)?", re.IGNORECASE)


def csv_text(rows: Iterable[Sequence[str]]) -> str:
    """Rows as CSV, in whose cells a spreadsheet sees text or a number, and no formula."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_plain(cell) for cell in row] for row in rows)
    return text.getvalue()


def _plain(cell: str) -> str:
    return f"'{cell}" if _FORMULA.match(cell) and not _NUMBER.fullmatch(cell) else cell

"""The table of a sweep: two processes add to it, and what is shown is text."""

import csv
import multiprocessing

from grafting.runs.table import read_table, table_locked, write_table

LINE = {"recipe": "a", "stage": "finetuned", "frechet": 1.5, "params": 10, "fingerprint": "0"}


def _add_lines(table, writer):
    for number in range(30):
        with table_locked(table):
            lines = read_table(table)
            write_table(table, [*lines, LINE | {"fingerprint": f"{writer}-{number}"}])


def test_two_writers_of_thirty_lines_leave_sixty(tmp_path, monkeypatch):
    monkeypatch.setattr("grafting.runs.table.write_sweep_picture", lambda path, lines: None)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_add_lines, args=(tmp_path / "t", writer)) for writer in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    found = [line["fingerprint"] for line in read_table(tmp_path / "t")]
    assert sorted(found) == sorted(f"{writer}-{number}" for writer in range(2) for number in range(30))
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 61


def test_labels_are_text_to_a_spreadsheet(tmp_path):
    labels = ["=cmd()", "@sum", "+1+1", "-2", "-x", "1e-3", 'a,"b"\nc']
    write_table(tmp_path / "t", [LINE | {"recipe": label} for label in labels])
    with (tmp_path / "t.csv").open(newline="") as file:
        cells = [row["recipe"] for row in csv.DictReader(file)]
    assert cells == ["'=cmd()", "'@sum", "'+1+1", "-2", "'-x", "1e-3", 'a,"b"\nc']


def test_labels_are_text_to_a_browser(tmp_path):
    labels = ["a | b", "two\nlines", "<img src=x>", "![p](http://x)", "\\|"]
    write_table(tmp_path / "t", [LINE | {"recipe": label} for label in labels])
    head, rule, *rows = (tmp_path / "t.md").read_text().splitlines()
    assert (head, rule) == ("| recipe | stage | frechet | params |", "| --- | --- | --- | --- |")
    first = [row.removesuffix(" | finetuned | 1.5 | 10 |") for row in rows]
    want = ["a \\| b", "two lines", "&lt;img src=x>", "![p]\\(http://x)", "\\\\\\|"]
    assert first == [f"| {cell}" for cell in want]
    assert read_table(tmp_path / "t")[0]["recipe"] == "a | b"


def test_the_page_of_a_table_has_no_column_that_is_empty_in_all_rows(tmp_path):
    write_table(tmp_path / "t", [LINE | {"kid": None, "exact": 0.5}, LINE | {"kid": None}])
    head, _, *lines = (tmp_path / "t.md").read_text().splitlines()
    assert "exact" in head
    assert "kid" not in head
    assert len(lines) == 2
    assert "kid" in (tmp_path / "t.csv").read_text().splitlines()[0]

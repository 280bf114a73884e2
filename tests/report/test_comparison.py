"""The page of a comparison: what it says of each row, and that it shows the images that belong together."""

from pathlib import Path

import pytest

from grafting.errors import RunError
from grafting.report import ComparedRow, comparison_page
from grafting.runs.pairing import Against, RunRow, read_row
from grafting.runs.record import read_run, write_comparison
from report.pages import Page, tables_of, whole_page
from report.synthetic_run import metric_rows, write_run


def estimate(value: float, low: float, high: float) -> dict[str, dict[str, float]]:
    return {"ratio": {"value": value, "error": 0.01, "low": low, "high": high}}


def compare(folder: Path, **paired) -> Page:
    """A page of a run's pretrained row and others, with what was found of each."""
    run, rows = read_run(folder), {row["name"]: row for row in metric_rows()}
    compared = [ComparedRow("before", "one", run, rows["pretrained"])]
    compared += [
        ComparedRow(f"our {name}", "one", run, rows[name] | {"paired": found})
        for name, found in paired.items()
    ]
    return Page(comparison_page(compared))


def write(path: Path, first: RunRow, *others: RunRow) -> Path:
    return write_comparison(path, first, [Against(other, first) for other in others])


def test_runs_stand_side_by_side(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("narrow", "wide")]
    (runs[1] / "recipe.yaml").write_text(
        (runs[1] / "recipe.yaml").read_text().replace("steps: 900", "steps: 90")
    )
    page = whole_page(write(tmp_path / "page.html", *map(read_row, runs)))
    assert page.text.count("narrow and wide") == 0
    assert "wide and narrow are not compared by Fréchet distance." in page.text
    assert "Images, model by model" in page.text
    assert "Down a column" not in page.text
    sheets = [(a["data-name"], a["data-group"]) for _, a in page.tags if a.get("class") == "sheet"]
    assert sheets == [(name, group) for group in ("first", "more") for name in ("narrow", "wide")]
    assert tables_of(page)["settings.csv"] == [["", "narrow", "wide"], ["finetune.steps", "900", "90"]]
    assert page.text.count("4 of 8 attention operators replaced by hyena-x") == 2


def test_rows_of_one_run_have_one_plan(tmp_path):
    run = write_run(tmp_path / "run")
    path = write(tmp_path / "page.html", read_row(run, "pretrained"), read_row(run, "distilled"))
    page = whole_page(path)
    assert "pretrained · after stage 1" in page.text
    assert page.text.count("4 of 8 attention operators replaced by hyena-x") == 1
    assert "Settings that differ" not in page.text
    assert (
        page.tags.count(("dialog", {"aria-label": "One seed, model by model"})),
        page.script.count("showModal"),
    ) == (1, 1)


def test_runs_of_one_name_are_told_by_their_folders(tmp_path):
    runs = [write_run(tmp_path / name / "run") for name in "ab"]
    page = whole_page(write(tmp_path / "page.html", read_row(runs[0]), read_row(runs[1], "distilled")))
    assert f"{runs[0]}, after stage 2 · {runs[1]}, after stage 1" in page.text


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            (1.2, 1.1, 1.3),
            "our finetuned is worse than before: Fréchet distance 1.20\u00d7 (1.10\u20131.30).",
        ),
        (
            (0.8, 0.7, 0.9),
            "our finetuned is better than before: Fréchet distance 0.80\u00d7 (0.70\u20130.90).",
        ),
        (
            (1.0, 0.9, 1.1),
            "our finetuned and before cannot be told apart by Fréchet distance: 1.00\u00d7 (0.90\u20131.10).",
        ),
    ],
)
def test_the_verdict_comes_first(run_folder, found, said):
    page = compare(run_folder, finetuned={"frechet": estimate(*found)})
    assert said in page.text
    assert "The same seeds, model by model" in page.text


def test_one_that_is_not_paired_takes_the_same_seeds_back(run_folder):
    page = compare(
        run_folder, finetuned={"frechet": estimate(1.2, 1.1, 1.3)}, distilled={"reason": "other seeds"}
    )
    assert "Images, model by model" in page.text
    assert "our distilled: figures are not compared: other seeds" in page.text


def test_a_page_is_an_html_file(tmp_path):
    row = read_row(write_run(tmp_path / "run"))
    with pytest.raises(RunError, match="written to an .html file, found .*page.txt"):
        write(tmp_path / "page.txt", row, row)

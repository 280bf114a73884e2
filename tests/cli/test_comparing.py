"""What is said of a comparison: whether rows can be told apart, and which is better."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from commandline import call, fails
from grafting import cli
from grafting.words import FIGURES, verdict
from report.synthetic_run import garments, write_run, write_samples


def estimate(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


@pytest.mark.parametrize(
    ("key", "part", "said"),
    [
        ("frechet", {"ratio": estimate(1.05, 0.99, 1.11)}, "a and b cannot be told apart"),
        ("frechet", {"ratio": estimate(1.20, 1.10, 1.31)}, "a is worse than b"),
        ("frechet", {"ratio": estimate(0.80, 0.70, 0.91)}, "a is better than b"),
        ("exact", {"difference": estimate(0.02, -0.01, 0.05)}, "a and b cannot be told apart"),
        ("exact", {"difference": estimate(0.20, 0.10, 0.30)}, "a is better than b"),
        ("exact", {"difference": estimate(-0.20, -0.30, -0.10)}, "a is worse than b"),
        ("exact", {"difference": estimate(0.0, 0.0, 0.0)}, "a and b cannot be told apart"),
    ],
)
def test_the_verdict(key, part, said):
    a, b = ({"name": name, key: 0.5} for name in "ab")
    figure = FIGURES[key]
    row = a | {"paired": {key: part}}
    by = " by {}: {}" if "cannot" in said else ": {} {}"
    assert verdict(row, b) == said + by.format(figure.title, figure.paired(row))


def test_without_a_comparison_there_is_none():
    rows = [{"name": name, "frechet": 0.5} for name in "ab"]
    assert verdict(rows[0] | {"paired": {"reason": "x"}}, rows[1]) == ""


def test_runs_are_put_side_by_side(tmp_path):
    runs = [write_run(tmp_path / name) for name in "abc"]
    result = CliRunner().invoke(cli.app, ["compare", *(f"{run}:distilled" for run in runs)])
    assert result.exit_code == 0
    assert result.output.count("18.2 (17.6\u201318.8)") == 3
    assert result.output.count(": figures are not compared: ") == 2
    result = CliRunner().invoke(cli.app, ["compare", "--json", *map(str, runs)])
    assert [row["name"] for row in json.loads(result.output)["others"]] == [
        f"{run}:finetuned" for run in runs[1:]
    ]


def test_one_row_is_not_compared(tmp_path):
    result = CliRunner().invoke(cli.app, ["compare", str(write_run(tmp_path / "a"))])
    assert result.exit_code == 1
    assert "needs two rows or more" in result.output


def test_a_sweeps_folder_is_no_run(tmp_path):
    runs = [write_run(tmp_path / "many" / f"seed-{n}") for n in (1, 2)]
    (tmp_path / "many" / "table-over-seeds.md").touch()
    for row in ("", ":finetuned"):
        said = fails("compare", f"{tmp_path / 'many'}{row}", tmp_path / "other")
        assert f"holds 2 runs of a sweep: name one of them, such as {runs[0]}" in said
        assert f"{tmp_path / 'many' / 'table-over-seeds.md'} has the figures of all" in said


def write_guided(folder: Path, cfg_scale: float, *, measured: bool = True) -> Path:
    """A run with an image distance to others, sampled with this guidance."""
    run = write_run(folder)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["sample"] |= {"cfg_scale": cfg_scale}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if not measured:
        rows = [{"name": "finetuned", "params": 5, "num_images": 100}]
        (run / "metrics.json").write_text(json.dumps(rows))
    return run


def test_a_distance_of_other_settings_is_told_as_that(tmp_path):
    a, b, c = (write_guided(tmp_path / name, scale) for name, scale in (("a", 4.5), ("b", 1.5), ("c", 4.5)))
    warning = "sampled with other settings, so their distance is of these too: cfg_scale: 4.5 and 1.5\n"
    page = tmp_path / "page.html"
    assert warning in call("compare", a, b, "--out", page).stdout
    assert warning.strip() in page.read_text()
    assert "other settings" not in call("compare", a, c).stdout
    assert json.loads(call("compare", a, b, "--json").stdout)["sampling_differs"] == [
        "cfg_scale: 4.5 and 1.5"
    ]
    several = call("compare", a, b, c).stdout
    assert several.count(warning) == 1
    assert f"{b}:finetuned: The images were" in several
    others = json.loads(call("compare", a, b, c, "--json").stdout)["others"]
    assert [row.get("sampling_differs") for row in others] == [["cfg_scale: 4.5 and 1.5"], None]


def test_runs_without_a_suite_are_told_by_their_images_alone(tmp_path):
    a, b, c = (write_guided(tmp_path / name, 1.5, measured=False) for name in "abc")
    page = tmp_path / "page.html"
    said = call("compare", a, b, "--out", page).stdout
    assert said.startswith("Images of the same seed lie 0.0\u00a0% (")
    assert f"Figures are not compared: no suite has measured {b}:finetuned\n" in said
    assert "Intervals" not in said
    assert "No suite has measured b and a." in page.read_text()
    assert ">Protocol</h2>" not in page.read_text()
    head = call("compare", a, b, c).stdout.splitlines()[0]
    assert head.split("  ")[0] == "row"
    assert "pixels from the first" in head
    assert "distance" not in head
    assert "against the first" not in head


def test_why_images_are_not_compared_is_told(tmp_path):
    a, b = (write_guided(tmp_path / name, 1.5, measured=False) for name in "ab")
    write_samples(b, "finetuned", garments(1.0, 7))
    recipe = yaml.safe_load((b / "recipe.yaml").read_text())
    recipe["sample"] |= {"num_images": 7}
    (b / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    said = call("compare", a, b).stdout
    assert said.startswith("Images are not compared: there are 100 and 7 of them\n")
    assert json.loads(call("compare", a, b, "--json").stdout)["not_seen"].startswith("there are 100 and 7")
    (b / "samples/finetuned.safetensors").unlink()
    assert f"Images are not compared: {b}:finetuned has none here\n" in call("compare", a, b).stdout


def test_a_page_is_written_too(tmp_path):
    runs = [str(write_run(tmp_path / name)) for name in "ab"]
    result = CliRunner().invoke(cli.app, ["compare", *runs, "--out", str(tmp_path / "page.html")])
    assert result.exit_code == 0
    assert result.output.count("5.12 (4.90\u20135.34)") > 1
    assert "first against second" not in result.output
    assert result.output.endswith(f"Comparison: {tmp_path / 'page.html'}\n")
    assert "a · b" in (tmp_path / "page.html").read_text()

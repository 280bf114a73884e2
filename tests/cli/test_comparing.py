"""What is said of a comparison: whether rows can be told apart, and which is better."""

import json

import pytest
from typer.testing import CliRunner

from grafting import cli
from grafting.cli.comparing import _verdict
from report.synthetic_run import write_run


def estimate(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


@pytest.mark.parametrize(
    ("key", "part", "said"),
    [
        ("frechet", {"ratio": estimate(1.05, 0.99, 1.11)}, "the two cannot be told apart"),
        ("frechet", {"ratio": estimate(1.20, 1.10, 1.31)}, "the first is worse"),
        ("frechet", {"ratio": estimate(0.80, 0.70, 0.91)}, "the first is better"),
        ("exact", {"difference": estimate(0.02, -0.01, 0.05)}, "the two cannot be told apart"),
        ("exact", {"difference": estimate(0.20, 0.10, 0.30)}, "the first is better"),
        ("exact", {"difference": estimate(-0.20, -0.30, -0.10)}, "the first is worse"),
        ("exact", {"difference": estimate(0.0, 0.0, 0.0)}, "the two cannot be told apart"),
    ],
)
def test_the_verdict(key, part, said):
    rows = [{key: 0.5, "num_images": 600}] * 2
    assert _verdict({key: part}, rows).endswith(f"of 600 images {said}")


def test_without_a_comparison_there_is_none():
    assert _verdict({"reason": "x"}, [{"frechet": 0.5, "num_images": 600}] * 2) is None


def test_of_several_rows_each_is_compared_with_the_first():
    rows = [{"exact": 0.5, "num_images": 600}] * 2
    worse, same = estimate(-0.2, -0.3, -0.1), estimate(0.0, -0.1, 0.1)
    by = "By Exact of 600 images runs/b"
    assert _verdict({"exact": {"difference": worse}}, rows, "runs/b") == f"{by} is worse than the first"
    assert (
        _verdict({"exact": {"difference": same}}, rows, "runs/b")
        == f"{by} and the first cannot be told apart"
    )


def test_runs_are_put_side_by_side(tmp_path):
    runs = [write_run(tmp_path / name) for name in "abc"]
    result = CliRunner().invoke(cli.app, ["compare", *(f"{run}:distilled" for run in runs)])
    assert result.exit_code == 0
    assert result.output.count("18.2 (17.6\u201318.8)") == 3
    assert result.output.count("is not compared image by image") == 2
    result = CliRunner().invoke(cli.app, ["compare", "--json", *map(str, runs)])
    assert [row["name"] for row in json.loads(result.output)["others"]] == [
        f"{run}:finetuned" for run in runs[1:]
    ]


def test_one_row_is_not_compared(tmp_path):
    result = CliRunner().invoke(cli.app, ["compare", str(write_run(tmp_path / "a"))])
    assert result.exit_code == 1
    assert "needs two rows or more" in result.output

"""A recipe repeated with all its seeds moved: other weights and images each time, and means with t intervals."""

import json
import math

import pytest
from typer.testing import CliRunner

from commandline import says
from grafting import cli
from grafting.runs.file import load_recipe
from grafting.runs.recipe import Recipe
from grafting.runs.seeds import over_seeds, with_seeds_moved
from grafting.runs.sweep import Sweep, points, read_table, run_sweep, seeds_sweep
from grafting.words import bounds_of
from tinyrecipe import TINY

RECIPE = Recipe.model_validate(TINY | {"calibrate": {"samples": 8}, "rows": ["pretrained", "finetuned"]})


def seeds_of(recipe):
    return [
        recipe.seed,
        *(getattr(recipe, name).seed for name in ("calibrate", "distill", "finetune", "sample")),
    ]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    list(run_sweep(seeds_sweep(RECIPE, 3), folder, table=folder / "table"))
    return folder


def test_all_seeds_are_moved():
    assert seeds_of(with_seeds_moved(RECIPE, 2)) == [seed + 2 for seed in seeds_of(RECIPE)]
    assert with_seeds_moved(RECIPE, 0) == RECIPE
    found = points(seeds_sweep(RECIPE, 3))
    assert [point.name for point in found] == ["seed-1", "seed-2", "seed-3"]
    assert [seeds_of(point.recipe) for point in found] == [[n] * 5 for n in range(3)]
    assert [point.recipe.name for point in found] == [f"tiny-seed-{n}" for n in (1, 2, 3)]


def test_a_sweep_repeats_each_recipe():
    settings = {key: value for key, value in TINY.items() if key != "name"}
    grid = {"axes": {"steps": {4: {"finetune.steps": 4}, 5: {"finetune.steps": 5}}}}
    found = points(Sweep(name="s", settings=settings, grids=[grid], seeds=2))
    assert [point.name for point in found] == ["4-seed-1", "4-seed-2", "5-seed-1", "5-seed-2"]
    assert found[1].recipe.name == "s-4-seed-2"


def test_each_seed_is_a_run_of_its_own(ran):
    lines = read_table(ran / "table")
    assert [(line["seed"], line["stage"]) for line in lines] == [
        (f"seed-{n}", row) for n in (1, 2, 3) for row in ("pretrained", "finetuned")
    ]
    assert {load_recipe(ran / f"seed-{n}" / "recipe.yaml").sample.seed for n in (1, 2, 3)} == {0, 1, 2}
    assert len({line["frechet"] for line in lines if line["stage"] == "pretrained"}) == 3
    assert all("agreement_difference" in line for line in lines if line["stage"] == "finetuned")


def test_means_have_t_intervals(ran):
    lines = json.loads((ran / "table-over-seeds.json").read_text())
    assert [(line["stage"], line["seeds"]) for line in lines] == [("pretrained", 3), ("finetuned", 3)]
    values = [line["frechet"] for line in read_table(ran / "table") if line["stage"] == "finetuned"]
    mean = sum(values) / 3
    error = (sum((value - mean) ** 2 for value in values) / 2 / 3) ** 0.5
    assert lines[1]["frechet"] == pytest.approx(mean)
    assert lines[1]["frechet_high"] - mean == pytest.approx(4.302653 * error, rel=1e-5)
    assert (ran / "table-over-seeds.md").read_text().startswith("| stage | seeds | frechet |")


def test_ratios_are_averaged_by_their_logarithm():
    lines = [{"seed": f"seed-{n}", "stage": "finetuned", "frechet_ratio": r} for n, r in ((1, 1.0), (2, 4.0))]
    (line,) = over_seeds([*lines, {"seed": "seed-1", "stage": "distilled", "frechet": 1.0}])
    assert line["frechet_ratio"] == pytest.approx(2)
    assert line["frechet_ratio_low"] * line["frechet_ratio_high"] == pytest.approx(4)


def test_what_is_of_one_run_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text(json.dumps(TINY))
    result = CliRunner().invoke(
        cli.app, ["run", str(tmp_path / "r.yaml"), "--seeds", "3", "--until", "distill"]
    )
    assert result.exit_code == 1
    assert "--seeds makes whole runs and takes no --until" in result.stderr
    arguments = ["run", str(tmp_path / "r.yaml"), "--seeds", "3", "--dry-run"]
    told = CliRunner().invoke(cli.app, arguments)
    assert [line.split()[0] for line in told.output.splitlines()[2:6]] == [
        "seed-1",
        "seed-2",
        "seed-3",
        "total",
    ]


def test_the_interval_of_a_share_stays_a_share():
    lines = [
        {"seed": f"seed-{n}", "stage": "finetuned", "exact": value}
        for n, value in enumerate((0.0, 0.3, 0.05))
    ]
    (line,) = over_seeds(lines)
    assert line["exact"] == pytest.approx(0.35 / 3)
    assert line["exact_low"] == 0.0
    assert 0.3 < line["exact_high"] < 1


def test_an_interval_stays_within_what_its_figure_can_be():
    lines = [
        {
            "seed": f"seed-{n}",
            "stage": "finetuned",
            "exact_difference": d,
            "recall": r,
            "frechet": f,
            "kid": k,
        }
        for n, (d, r, f, k) in enumerate(((-0.9, 0.5, 1.0, 1.0), (-0.5, 0.9, 3.0, 3.0)), start=1)
    ]
    (line,) = over_seeds(lines)
    reach = 12.706205
    assert line["exact_difference"] == pytest.approx(-0.7)
    assert (line["exact_difference_low"], line["exact_difference_high"]) == (-1, 1)
    assert (line["recall_low"], line["recall_high"]) == (0, 1)
    assert line["frechet_low"] == 0
    assert line["frechet_high"] == pytest.approx(2 + reach)
    # an unbiased estimate can be negative
    assert bounds_of("kid") == (-math.inf, math.inf)
    assert bounds_of("kid_difference") == bounds_of("frechet_ratio") == (-math.inf, math.inf)


def test_two_seeds_are_said_to_tell_little(tmp_path):
    settings = TINY | {"distill": None, "finetune": None, "rows": ["pretrained"]}
    (tmp_path / "r.yaml").write_text(json.dumps(settings))
    said = says("run", tmp_path / "r.yaml", "--seeds", "2", "--out", tmp_path / "runs")
    table = (tmp_path / "runs" / "table-over-seeds.md").read_text()
    for text in (said, table):
        assert text.splitlines()[-1].startswith(
            "Intervals of two seeds reach 12.7 standard errors to each side"
        )

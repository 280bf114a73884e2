"""A sweep makes its recipes, shares what they have in common, resumes from its table, and says what is wrong with it."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from grafting.cli import app
from grafting.errors import MissingBackend, RecipeError, RunError
from grafting.runs.forecast import forecast
from grafting.runs.identity import row_fingerprint
from grafting.runs.job import prepare
from grafting.runs.stages import training_flops
from grafting.runs.sweep import (
    _in_order,
    load_sweep,
    measure,
    points,
    read_table,
    run_sweep,
    run_sweep_on_ray,
)
from grafting.words import amount
from tinyrecipe import SAVED_OFTEN as TINY

SWEEP = {
    "name": "tiny-sweep",
    **{key: value for key, value in TINY.items() if key not in ("name", "plan")},
    "distill": TINY["distill"] | {"steps": 2},
    "finetune": TINY["finetune"] | {"steps": 2, "output_weight": 1.0},
    "rows": ["distilled", "finetuned"],
    "pretraining_images": 1000,
    "grids": [
        {"labels": {"design": "none", "ratio": 0}, "changes": {"rows": ["pretrained", "finetuned"]}},
        {
            "changes": {"plan": [{"role": "attention", "operator": "hyena-x"}]},
            "axes": {
                "design": {"hyena-x": {}, "window": {"plan.0.operator": {"name": "window-1d", "window": 2}}},
                "ratio": {50: {"plan.0.blocks": "odd"}, 100: {"plan.0.blocks": "all"}},
            },
        },
    ],
}


def write(folder: Path, **changes) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(SWEEP | changes, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    sweep = load_sweep(write(folder))
    names = [point.name for point in run_sweep(sweep, folder / "runs", table=folder / "table")]
    return folder, sweep, names


def test_grids_become_recipes_in_order(finished):
    _, sweep, names = finished
    assert names == ["none-0", "hyena-x-50", "hyena-x-100", "window-50", "window-100"]
    assert [point.name for point in points(sweep)] == names
    last = points(sweep)[-1].recipe
    assert last.name == "tiny-sweep-window-100"
    assert last.plan[0].blocks == "all"
    assert last.plan[0].operator.window == 2
    assert last.finetune.output_weight == 1.0


def test_the_table_has_a_line_for_each_row(finished):
    folder, _, names = finished
    lines = read_table(folder / "table")
    assert [(f"{line['design']}-{line['ratio']}", line["stage"]) for line in lines] == [
        (name, stage)
        for name in names
        for stage in (("pretrained" if name == "none-0" else "distilled"), "finetuned")
    ]
    assert all(line["frechet_low"] <= line["frechet"] <= line["frechet_high"] for line in lines)
    assert len({json.dumps(line["protocol"]) for line in lines}) == 1
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["frechet"]) for row in rows] == [
        pytest.approx(line["frechet"], rel=1e-3) for line in lines
    ]
    assert (folder / "table.md").read_text().count("\n") == len(lines) + 2


def test_compute_is_counted_in_units_of_the_pretraining(finished):
    folder, sweep, _ = finished
    shares = {
        (line["design"], line["ratio"], line["stage"]): line["compute_share"]
        for line in read_table(folder / "table")
    }
    assert shares["none", 0, "pretrained"] == 0
    # two steps of four images, forward and backward, and the teacher's forward: 8 * (3 + 1) of 3 * 1000
    assert shares["none", 0, "finetuned"] == pytest.approx(8 * 4 / 3000, rel=1e-3)
    assert 0 < shares["window", 50, "distilled"] < shares["window", 100, "distilled"]
    job = prepare(points(sweep)[2].recipe)
    flops = training_flops(job, "finetuned")
    stage_1 = training_flops(job, "distilled").training
    assert flops.training - stage_1 == 8 * (3 * flops.model + flops.base)


def test_lines_are_in_the_sweeps_order_whatever_order_grids_name_labels_in(tmp_path):
    grids = [{"labels": {"recipe": "a", "design": "x"}}, {"labels": {"design": "y", "recipe": "a"}}]
    sweep = load_sweep(write(tmp_path, grids=grids))
    first, second, stranger = ({"recipe": "a", "design": d, "stage": "finetuned"} for d in "xyz")
    assert _in_order(sweep, [stranger, second, first]) == [first, second, stranger]


def test_half_the_sites_are_fitted_once(finished):
    folder, _, _ = finished
    steps = [
        json.loads(line) for line in (folder / "runs/hyena-x-100/distill/log.jsonl").read_text().splitlines()
    ]
    assert {key for step in steps for key in step if key.startswith("loss/")} == {"loss/blocks.0.attn"}
    assert len(list((folder / "runs/operators").glob("*.safetensors"))) == 4


def test_lines_in_the_table_are_not_measured_again(finished, tmp_path):
    folder, sweep, _ = finished
    (tmp_path / "table.json").write_text((folder / "table.json").read_text())
    assert len(list(run_sweep(sweep, tmp_path / "runs", table=tmp_path / "table"))) == 5
    assert not (tmp_path / "runs").exists()
    changed = load_sweep(write(tmp_path, finetune=SWEEP["finetune"] | {"steps": 3}))
    job, before = (prepare(points(s)[1].recipe) for s in (changed, sweep))
    assert row_fingerprint(job, "distilled") == row_fingerprint(before, "distilled")
    assert row_fingerprint(job, "finetuned") != row_fingerprint(before, "finetuned")


def test_what_was_left_half_written_goes_from_finished_runs_too(finished):
    folder, sweep, _ = finished
    left = folder / "runs/hyena-x-50/.manifest.json.partial"
    left.mkdir()
    list(run_sweep(sweep, folder / "runs", table=folder / "table", only={"design": "none"}))
    assert not left.exists()


def test_a_part_of_it(finished, tmp_path):
    _, sweep, _ = finished
    part = {"only": {"design": "window", "ratio": "50"}, "rows": ["distilled"]}
    (point,) = run_sweep(sweep, tmp_path / "runs", table=tmp_path / "table", **part)
    assert point.name == "window-50"
    assert [line["stage"] for line in read_table(tmp_path / "table")] == ["distilled"]
    # what no asked row needs is not done, and not in the way of asking for it later
    assert not (tmp_path / "runs" / "window-50" / "finetune").exists()
    list(run_sweep(sweep, tmp_path / "runs", table=tmp_path / "table", **part | {"rows": ["finetuned"]}))
    assert [line["stage"] for line in read_table(tmp_path / "table")] == ["distilled", "finetuned"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grids": []}, "grids: .*at least 1 item"),
        ({"grids": [{"labels": {"a": 1}, "changes": {"distil": {}}}]}, "in 1\n  distil: unknown key"),
        (
            {"grids": [{"labels": {"a": 1}, "changes": {"plan.0.blocks": 1}}]},
            "plan.0.blocks: .*no such setting",
        ),
        ({"grids": [{"labels": {"a": 1}}, {"labels": {"a": 1}}]}, "1: two recipes have these labels"),
        ({"grids": [{"label": {"a": 1}}]}, "grids.0.label: unknown key"),
    ],
)
def test_faults_are_found_at_loading(tmp_path, changes, message):
    with pytest.raises(RecipeError, match=message):
        load_sweep(write(tmp_path, **changes))


def test_what_is_asked_must_be_there(finished, tmp_path):
    _, sweep, _ = finished
    with pytest.raises(RecipeError, match=r"has design=mamba; there are\n  none-0"):
        list(run_sweep(sweep, tmp_path, table=tmp_path / "table", only={"design": "mamba"}))
    with pytest.raises(RecipeError, match="no rows tuned; there are pretrained"):
        list(run_sweep(sweep, tmp_path, table=tmp_path / "table", rows=["tuned"]))
    (tmp_path / "table.json").write_text("{}")
    with pytest.raises(RunError, match="not the table of a sweep"):
        list(run_sweep(sweep, tmp_path, table=tmp_path / "table"))


def test_command_line(finished, tmp_path):
    folder, _, _ = finished
    (tmp_path / "table.json").write_text((folder / "table.json").read_text())
    arguments = ["sweep", folder / "sweep.yaml", "--out", tmp_path / "runs", "--table", tmp_path / "table"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--only", "design=window"])
    assert result.exit_code == 0, result.output
    assert f"Table: {tmp_path / 'table.md'}" in result.output
    wrong = CliRunner().invoke(app, [*map(str, arguments), "--only", "window"])
    assert wrong.exit_code == 1
    assert "--only takes COLUMN=LABEL" in wrong.output


def test_a_dry_run_says_what_each_recipe_takes_and_the_sum(tmp_path):
    file, grids = write(tmp_path), SWEEP["grids"]
    alone = forecast(points(load_sweep(file))[-1].recipe, device="h100")
    arguments = ["sweep", str(file), "--dry-run", "--device", "h100", "--out", str(tmp_path / "runs")]
    told = CliRunner().invoke(app, [*arguments, "--only", "ratio=100"])
    assert told.exit_code == 0, told.output
    lines = [line.split() for line in told.output.splitlines()]
    assert [line[:2] for line in lines[2:4]] == [["hyena-x", "100"], ["window", "100"]]
    assert lines[3][2:4] == f"{alone.params / 1000:.1f} k".split()
    assert lines[4][0] == "total"
    disk = sum(stage.disk_bytes or 0 for stage in alone.stages)
    assert lines[3][-2:] == amount(disk).replace("k", "kB").replace("M", "MB").split()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.yaml"]
    grids = [
        {"changes": {"plan": [{"role": "attention", "blocks": [n], "operator": "softmax"}]}} for n in (5, 9)
    ]
    write(tmp_path, grids=[{"labels": {"at": n}, **grid} for n, grid in enumerate(grids)])
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 1
    assert "2 faults in recipes of 2" in refused.stderr
    assert "no block 5" in refused.stderr
    assert "no block 9" in refused.stderr
    only = CliRunner().invoke(app, ["sweep", str(file), "--mfu", "0.5"])
    assert "--mfu only applies to --dry-run" in only.stderr


def test_check_takes_a_sweep(tmp_path):
    file = str(write(tmp_path))
    told = CliRunner().invoke(app, ["check", file])
    assert told.exit_code == 0, told.output
    assert [line.split()[:3] for line in told.output.splitlines()[1:6]] == [
        ["none", "0", "0"],
        ["hyena-x", "50", "1"],
        ["hyena-x", "100", "2"],
        ["window", "50", "1"],
        ["window", "100", "2"],
    ]
    assert "The 5 recipes of the sweep are valid." in told.output
    facts = json.loads(CliRunner().invoke(app, ["check", file, "--json"]).output)
    assert [len(recipe["edits"]) for recipe in facts] == [0, 1, 2, 1, 2]
    assert facts[3]["labels"] == {"design": "window", "ratio": 50}
    assert "--set changes one recipe" in CliRunner().invoke(app, ["check", file, "--set", "seed=1"]).stderr
    for command in (["cost", file], ["run", file]):
        refused = CliRunner().invoke(app, command).stderr
        assert f"`grafting check {file}`" in refused
        assert f"`grafting sweep {file} --dry-run`" in refused


def test_ray_is_asked_for_by_name(finished, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingBackend, match=r"pip install 'ray>=2.9'"):
        list(run_sweep_on_ray(finished[1], tmp_path, table=tmp_path / "table"))


def test_a_point_measured_alone_gives_the_same_lines(finished, tmp_path):
    """What a Ray worker does: nothing of it depends on the runs before."""
    folder, sweep, _ = finished
    (line,) = measure(sweep, points(sweep)[3], tmp_path, rows=["distilled"])
    (same,) = (x for x in read_table(folder / "table") if x["fingerprint"] == line["fingerprint"])
    # beside it stands what another run's pretrained row says of it
    assert line == {key: same[key] for key in line}
    assert same.keys() - line.keys() >= {"agreement_difference", "image_distance"}

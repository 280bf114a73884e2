"""The command line: what it prints, its exit codes, and one small run from recipe to report."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import typer
import yaml
from typer.testing import Result

from commandline import call, fails, says
from grafting import Prompt, cli, write_prompts
from grafting.errors import RunError
from grafting.hosts import hosts
from grafting.operators import PRESETS, operator_configs
from grafting.runs.recipe import Recipe
from grafting.runs.stages import STAGES

# a model of two blocks, 16 tokens; ten images are the fewest that can be measured
RECIPE = {
    "name": "small",
    "source": {
        "host": "dit",
        "config": {
            "input_size": 32, "patch_size": 8, "in_channels": 1, "hidden_size": 16, "depth": 2, "num_heads": 2,
            "num_classes": 10,
        },
    },
    "plan": [{"role": "attention", "blocks": "odd", "operator": "hyena-x"}],
    "data": {"name": "testbed-subset"},
    "distill": {"steps": 2, "batch_size": 4, "holdout": 4},
    "finetune": {"steps": 2, "batch_size": 4, "warmup_steps": 0},
    "sample": {"sampler": "ddim", "steps": 2, "cfg_scale": 1.0, "num_images": 12, "clip": True},
    "rows": ["pretrained", "finetuned"],
}  # fmt: skip

COMMANDS = [
    "init",
    "quickstart",
    "run",
    "distill",
    "finetune",
    "check",
    "cost",
    "sites",
    "locality",
    "operators",
    "sample",
    "evaluate",
    "reference",
    "report",
    "schema",
    "doctor",
]


def write_recipe(folder: Path, **changes: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes))
    return path


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("cli")
    result = call("run", write_recipe(folder), "--out", folder / "run")
    assert result.exit_code == 0, result.output
    return folder / "run", result


def test_the_result_of_a_run_is_json_alone(ran: tuple[Path, Result]):
    folder, _ = ran
    result = call("run", folder.parent / "recipe.yaml", "--out", folder, "--json")
    found = json.loads(result.stdout)
    assert found["rows"] == json.loads((folder / "metrics.json").read_text())
    assert [found[key] for key in ("recipe", "folder", "until")] == ["small", str(folder), "report"]
    assert found["result"] == str(folder / "report.html")
    assert f"Recipe small, in {folder}" in result.stderr


def test_a_table_without_ratios_says_why(ran: tuple[Path, Result]):
    folder, result = ran
    said = "no ratio of Fréchet distances: 12 images are too few for 64 features; 256 are enough"
    assert said in " ".join(result.output.split())
    assert said in (folder / "report.html").read_text()
    compared = call("compare", *[f"{folder}:finetuned"] * 2, f"{folder}:pretrained").output
    assert f"{folder}:pretrained: {said}" in compared


# --help, --version, usage


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_an_example(command: str):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f"$ grafting {command}" in result.output


def test_check_says_that_no_pipeline_draws_with_a_graft(tmp_path: Path):
    host = hosts()["chroma"]
    prompts = [Prompt("a cat", {"encoder_hidden_states": torch.zeros(5, 24)})] * 20
    write_prompts(tmp_path / "prompts", prompts, source="zeros")
    recipe = {
        "name": "chroma",
        "source": {"host": "chroma", "config": host.spec.tiny},
        "plan": [{"role": "attention", "blocks": 0, "operator": "window-2d"}],
        "conditions": {"name": "prompts", "folder": str(tmp_path / "prompts")},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    result = call("check", path)
    assert result.exit_code == 0, result.output
    assert "\nprompts: 20 encoded already\n" in result.stdout
    assert f"Note: no pipeline draws with this graft: {host.pipeline_fault}\n" in result.stdout


def test_help_lists_every_command():
    listed = re.findall(r"^│ (\w+) ", call("--help").output, flags=re.MULTILINE)
    assert set(COMMANDS) <= set(listed)


def test_every_command_stands_on_its_page():
    page = (Path(__file__).parents[2] / "docs/commands.md").read_text()
    known = set(typer.main.get_command(cli.app).commands) - {"data"}  # whose commands follow it
    known |= {f"data {name}" for name in typer.main.get_command(cli.data.app).commands}
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    written = [name.removeprefix("grafting ") for cell in cells for name in re.findall("`([^`]+)`", cell)]
    shown = {match[0] for name in written if (match := re.match(r"(data )?[a-z]+", name))}
    assert shown == known


def test_stages_of_until_are_those_of_a_run():
    assert get_args(cli.run.StageName) == tuple(STAGES)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_freed_memory_is_kept():
    """8 x 16 MiB are asked for and freed ten times; after the first time their pages are there."""
    code = """
import resource, sys
from grafting.cli import keep_freed_memory

if "keep" in sys.argv:
    keep_freed_memory()
for _ in range(10):
    del [bytearray(b"1") * 2**24 for _ in range(8)][:]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
    faults = [
        int(subprocess.run([sys.executable, "-c", code, how], check=True, capture_output=True).stdout)
        for how in ("keep", "default")
    ]
    assert faults[0] < 0.5 * faults[1]


def test_version():
    assert re.fullmatch(r"grafting \d+\.\d+.*\n", call("--version").output)


@pytest.mark.parametrize("arguments", [["frobnicate"], ["run"], ["run", "x", "--until", "lunch"], ["sites"]])
def test_bad_usage_is_exit_code_2(arguments: list[str]):
    assert call(*arguments).exit_code == 2


# errors


def test_error_is_one_message_and_debug_shows_the_traceback(tmp_path: Path):
    message = f"Error: no recipe file {tmp_path / 'none.yaml'}\n"
    assert fails("check", tmp_path / "none.yaml") == message
    debugged = call("--debug", "check", tmp_path / "none.yaml")
    assert debugged.exit_code == 1
    assert "Traceback" in debugged.stderr
    assert debugged.stderr.endswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is empty"), ("[1]", "holds a list"), ("a: [", "is not YAML"), ("name: x", "data: missing")],
)
def test_recipe_that_is_none(tmp_path: Path, content: str, message: str):
    path = tmp_path / "r.yaml"
    path.write_text(content)
    assert message in fails("run", path, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_check_lists_all_faults_of_a_recipe(tmp_path: Path):
    message = fails("check", write_recipe(tmp_path, colour="red", seed=-1, rows=["best"]))
    assert all(fault in message for fault in ("colour: unknown key", "seed: ", "rows.0: "))


def test_where_mlps_are_edited_their_flops_are_told(tmp_path: Path):
    plan = [{"role": "mlp", "blocks": [1], "operator": {"name": "mlp", "ratio": 2.0}}]
    recipe = write_recipe(tmp_path, plan=plan)
    summary = json.loads(call("check", recipe, "--json").output)
    whole = 2 * 2 * 16 * 16 * 64  # 16 tokens of 16 channels, 64 inside
    assert summary["mlp_flops"] == {"before": 2 * whole, "after": whole + whole // 2}
    assert "MLP FLOPs: 131,072 to 98,304 (-25.0%)" in call("check", recipe).output


def test_check_lists_all_faults_of_a_plan(tmp_path: Path):
    plan = [
        {"role": "attention", "blocks": [0, 7], "operator": "hyena-x"},
        {"role": "attention", "blocks": [0], "operator": {"name": "window-1d", "window": 99}},
    ]
    message = fails("check", write_recipe(tmp_path, plan=plan))
    assert "no block 7" in message
    assert "named twice" in message


def test_interruption_is_exit_code_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("grafting.runs.run.run", interrupted)
    result = call("run", write_recipe(tmp_path), "--out", tmp_path / "run")
    assert result.exit_code == 130
    assert "same command again" in result.stderr


def test_errors_of_a_run_are_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*args: object, **kwargs: object) -> None:
        raise RunError("cannot write x: no space left")

    monkeypatch.setattr("grafting.runs.run.run", full)
    assert fails("distill", write_recipe(tmp_path)) == "Error: cannot write x: no space left\n"


# operators, schema, sites, check


def test_operators_lists_every_operator():
    listed = json.loads(call("operators", "--json").output)
    assert [entry["name"] for entry in listed] == list(operator_configs())
    assert all(entry["summary"] and entry["roles"] for entry in listed)
    assert all(name in call("operators").output for name in operator_configs())


@pytest.mark.parametrize("name", operator_configs())
def test_every_setting_of_an_operator_is_shown(name: str):
    output = call("operators", name).output
    fields = set(operator_configs()[name].model_fields) - {"name"}
    assert all(field in output for field in fields)
    assert set(json.loads(call("operators", name, "--json").output)["properties"]) == fields | {"name"}


def test_unknown_operator():
    said = fails("operators", "hyena-z")
    assert "there are gated-conv-se, gated-conv-x" in said
    assert "the presets hyena-se-published" in said


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_listed_and_spelt_out(name: str):
    spelt_out = call("operators", name).output
    assert spelt_out.startswith(f"{name}: {PRESETS[name]['name']}, ")
    assert name in call("operators").output
    assert json.loads(call("operators", name, "--json").output) == PRESETS[name]


def test_the_schema_in_the_repository_is_current(tmp_path: Path):
    assert call("schema", "--out", tmp_path / "schema.json").exit_code == 0
    committed = Path(__file__).parents[2] / "recipes" / "recipe.schema.json"
    assert committed.read_text() == (tmp_path / "schema.json").read_text(), "run `make schema`"


def test_schema_describes_recipes(tmp_path: Path):
    assert call("schema", "--out", tmp_path / "schema.json").exit_code == 0
    schema = json.loads((tmp_path / "schema.json").read_text())
    assert set(Recipe.model_fields) | {"base"} == set(schema["properties"])
    assert {"required": ["base"]} in schema["anyOf"]
    assert json.loads(call("schema").output) == schema


def test_check_describes_a_recipe_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    summary = json.loads(call("check", write_recipe(tmp_path), "--json").output)
    assert [(e["block"], e["path"], e["operator"]["name"]) for e in summary["edits"]] == [
        (1, "blocks.1.attn", "hyena-x")
    ]
    # 16 tokens of 16 channels: two attentions before, one and a Hyena-X of 4 taps after
    attention = 8 * 16 * 16**2 + 16**2 * (4 * 16 + 2 * 2)
    hyena = 2 * (4 * 16 * 16**2 + 3 * 4 * 16 * 16 + 16 * 16)
    assert summary["attention_flops"] == {"before": 2 * attention, "after": attention + hyena}
    assert "mlp_flops" not in summary
    assert summary["params"]["after"] != summary["params"]["before"]
    assert summary["stages"]["distill"].startswith("2 steps of 4 images, 5996 to train on and 4 held out")
    assert "The recipe is valid." in call("check", tmp_path / "recipe.yaml").output
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_sites_of_a_grafted_model(ran: tuple[Path, Result]):
    described = json.loads(call("sites", ran[0], "--json").output)
    assert described["host"] == "dit"
    assert [(site["block"], site["role"]) for site in described["sites"]] == [
        (0, "attention"), (0, "mlp"), (1, "attention"), (1, "mlp"),
    ]  # fmt: skip
    assert described["sites"][2]["operator"]["name"] == "hyena-x"
    assert described["sites"][0]["operator"] is None
    assert "blocks.1.mlp" in call("sites", ran[0] / "model").output


def test_sites_of_what_is_no_model(tmp_path: Path):
    said = fails("sites", tmp_path)
    assert (
        f"no model in {tmp_path}: it has neither model_index.json, as a pipeline's folder has, nor config.json"
        in said
    )


# run, report, sample, evaluate


def test_run_shows_progress_and_the_table(ran: tuple[Path, Result]):
    folder, result = ran
    assert "distill 2/2, loss" in result.output
    assert "finetune 1/2, loss" in result.output
    assert "finetune 2/2, loss" in result.output
    assert "sample finetuned 12/12" in result.output
    assert "after stage 2" in result.output
    assert f"Report: {folder / 'report.html'}" in result.output.splitlines()
    assert (folder / "report.html").is_file()


def test_run_again_does_nothing_again(ran: tuple[Path, Result]):
    again = call("run", ran[0] / "recipe.yaml", "--out", ran[0])
    assert again.exit_code == 0
    assert "2/2" not in again.output
    assert "after stage 2" in again.output


def test_run_folder_of_another_recipe_is_refused(tmp_path: Path, ran: tuple[Path, Result]):
    message = fails("run", write_recipe(tmp_path, name="other"), "--out", ran[0])
    assert "belongs to recipe 'small'" in message


def test_distill_stops_after_stage_1(tmp_path: Path):
    result = call("distill", write_recipe(tmp_path), "--out", tmp_path / "run")
    assert f"Distill: {tmp_path / 'run' / 'distill'}" in result.output
    assert (tmp_path / "run/distill/operators.safetensors").is_file()
    assert not (tmp_path / "run/model").exists()


def test_report_is_written_anew(ran: tuple[Path, Result]):
    page = ran[0] / "report.html"
    page.unlink()
    assert call("report", ran[0]).exit_code == 0
    assert page.is_file()


def test_report_of_what_is_no_run(tmp_path: Path):
    assert "not a run folder" in fails("report", tmp_path)


def test_samples_are_written_and_measured(tmp_path: Path, ran: tuple[Path, Result]):
    path = tmp_path / "s.npz"
    result = call(
        "sample", ran[0], "--out", path, "--num", 12, "--steps", 2, "--sampler", "ddim", "--labels", "3,5"
    )
    assert result.exit_code == 0, result.output
    with np.load(path) as arrays:
        assert arrays["arr_0"].shape == (12, 32, 32, 1)
        assert arrays["arr_0"].dtype == np.uint8
        assert arrays["labels"].tolist() == [3, 5] * 6
    assert path.with_suffix(".png").is_file()

    figures = json.loads(call("evaluate", path, "--json").stdout)
    assert figures["protocol"]["sampling"]["steps"] == 2
    assert figures["protocol"]["labels"] == "given, in turn: 3, 5"
    assert figures["frechet_low"] < figures["frechet"] < figures["frechet_high"]
    assert "Note: too few images: 12 for 64 features" in call("evaluate", path).output


def test_samples_of_a_run_are_measured_as_the_run_measured_them(ran: tuple[Path, Result]):
    result = call("evaluate", ran[0] / "samples/finetuned.safetensors", "--json")
    figures = json.loads(result.stdout)
    recorded = next(r for r in json.loads((ran[0] / "metrics.json").read_text()) if r["name"] == "finetuned")
    assert figures["protocol"] == recorded["protocol"]
    assert figures["frechet"] == pytest.approx(recorded["frechet"], rel=1e-6)


def test_samples_of_unknown_origin_are_named_by_their_hash(tmp_path: Path):
    path = tmp_path / "s.npz"
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 1), dtype=np.uint8)
    np.savez(path, arr_0=images, labels=np.arange(12) % 10)
    sampling = json.loads(call("evaluate", path, "--json").stdout)["protocol"]["sampling"]
    assert sampling.keys() == {"source", "sha256"}
    assert sampling["source"] == "file"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((12, 32, 32, 1), np.uint8)}, "labels is not a file in the archive"),
        ({"arr_0": np.zeros((12, 32, 32, 1)), "labels": np.zeros(12, int)}, "must be uint8"),
        ({"arr_0": np.zeros((12, 32, 32, 3), np.uint8), "labels": np.zeros(12, int)}, "[3, 32, 32]"),
        ({"arr_0": np.zeros((12, 32, 32, 1), np.uint8), "labels": np.zeros(3, int)}, "int64 [3]"),
        ({"arr_0": np.array([print] * 12), "labels": np.zeros(12, int)}, "not a complete .npz file of arrays"),
        ({"arr_0": np.zeros((12, 32, 32, 1), np.uint8), "labels": np.full(12, 11)}, "label 11"),
        ({"arr_0": np.zeros((3, 32, 32, 1), np.uint8), "labels": np.zeros(3, int)}, "at least 10"),
    ],
)  # fmt: skip
def test_bad_samples(tmp_path: Path, arrays: dict[str, np.ndarray], message: str):
    np.savez(tmp_path / "s.npz", **arrays)
    assert message in fails("evaluate", tmp_path / "s.npz")


def test_missing_and_truncated_samples(tmp_path: Path):
    assert "no samples file" in fails("evaluate", tmp_path / "s.npz")
    for name in ("s.npz", "s.safetensors"):
        (tmp_path / name).write_bytes(b"PK\3\4 and then nothing")
        assert str(tmp_path / name) in fails("evaluate", tmp_path / name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num", "0"], "--num: Input should be greater than 0, found 0"),
        (["--steps", "-1"], "steps: "),
        (["--labels", "3,coat"], "--labels is balanced, random or numbers such as 3,5; found '3,coat'"),
        (["--labels", "3,10"], "labels [10] are out of range: conditions are 0..9"),
        (
            ["--sampler", "euler"],
            "sampler euler does not run predicted noise, which takes ddpm, ddim, dpm-solver++",
        ),
        (["--out", "x.jpg"], "--out names an .npz file"),
        (["--shift", "3"], "--shift is a setting of flow, and dit predicts noise"),
        (["--prompts", "scenes"], "host 'dit' is asked for classes, which the model defines itself"),
    ],
)
def test_bad_sampling(
    ran: tuple[Path, Result],
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    assert message in fails("sample", ran[0], *options)
    assert not list(tmp_path.iterdir())


# the rest


def test_doctor_prints_json():
    result = call("doctor", "--json")
    found = json.loads(result.output)
    assert found["device"]
    assert result.exit_code == bool(found["problems"])


def test_recipes_are_found_beside_the_source():
    assert (cli.run.recipes_folder() / "testbed" / "quickstart.yaml").is_file()


def test_threads_are_torchs(monkeypatch: pytest.MonkeyPatch):
    chosen = []
    monkeypatch.setattr("torch.set_num_threads", chosen.append)
    assert call("--threads", "3", "operators").exit_code == 0
    assert chosen == [3]
    assert call("--threads", "0", "operators").exit_code == 2


def test_entry_point_runs_as_a_program():
    code = "from grafting.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code, "sites", "/nowhere"], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == (
        "Error: no model in /nowhere: it does not exist; a model is `testbed`, `scenes`, a folder of a model or of a run, or "
        "owner/name on the Hub\n"
    )


def test_settings_are_changed_on_the_command_line(tmp_path: Path):
    path = write_recipe(tmp_path)
    changes = ("--set", "distill.steps=3", "--set", "plan.0.blocks=[0]", "--set", "description=tried")
    summary = json.loads(call("check", path, *changes, "--json").output)
    assert summary["stages"]["distill"].startswith("3 steps of ")
    assert [edit["block"] for edit in summary["edits"]] == [0]
    assert json.loads(call("cost", path, *changes, "--json").output)["recipe"] == "small"
    call("distill", path, "--out", tmp_path / "run", *changes)
    written = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    assert (written["distill"]["steps"], written["plan"][0]["blocks"]) == (3, [0])
    assert written["description"] == "tried"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("distill.steps", "--set is KEY=VALUE, found distill.steps"),
        ("distill.steps=[", "--set distill.steps: its value '[' is not YAML"),
        ("distill.steps=many", "distill.steps: Input should be a valid integer"),
        ("distil.steps=3", "distil.steps: there is no such setting"),
        (
            "vae.source=x",
            "vae.source: this recipe has no `vae`; set it as a whole, --set 'vae={source: ...}'",
        ),
        (
            "plan.7.blocks=[0]",
            "plan.7.blocks: plan has 1 edit, numbered from 0; plan.0.blocks is of the first\n",
        ),
        (
            "plan.first.blocks=[0]",
            "plan.first.blocks: plan has 1 edit, numbered from 0; plan.0.first.blocks is of the first\n",
        ),
        ("plan.0.operator.taps=3", "plan.0.operator.taps: there is no such setting\n"),
        ("colour=red", "colour: unknown key"),
    ],
)
def test_bad_settings_on_the_command_line(tmp_path: Path, setting: str, message: str):
    assert message in fails("check", write_recipe(tmp_path), "--set", setting)
    assert os.listdir(tmp_path) == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("until", "said"),
    [
        ("calibrate", "Calibrate: {folder}/calibrate"),
        ("teach", "Teach: {folder}/teach/latents"),
        ("distill", "Distill: the recipe has no such stage"),
    ],
)
def test_a_run_says_what_its_last_stage_made(tmp_path, until, said):
    settings = {key: RECIPE[key] for key in ("name", "source", "plan")}
    made = {"name": "teacher", "num_images": 4, "sampler": "ddim", "steps": 1, "batch_size": 4}
    calibrate = {"samples": 4, "batch_size": 4}
    path, folder = tmp_path / "small.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(settings | {"data": made, "calibrate": calibrate}))
    told = says("run", path, "--out", folder, "--until", until)
    assert told.splitlines()[-1] == said.format(folder=folder)

"""A recipe runs from end to end, skips what is done, and a run killed anywhere ends as an uninterrupted one."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml

from commandline import says
from grafting.data.bundled import BundledSubsetConfig
from grafting.data.subset import write_subset
from grafting.editing.plan import Plan
from grafting.editing.surgery import build_operators
from grafting.errors import (
    DataError,
    GraftingError,
    PlanError,
    ProtocolError,
    RecipeError,
    ResumeWarning,
    RunError,
    TrainingWarning,
)
from grafting.runs.file import load_recipe, parse_recipe
from grafting.runs.folder import stale_stages
from grafting.runs.job import load_source, prepare, skeleton
from grafting.runs.operator_cache import OperatorStore
from grafting.runs.recipe import FreshModel, Recipe
from grafting.runs.record import write_report
from grafting.runs.run import run
from grafting.runs.stages import training_flops
from grafting.runs.states import Every
from grafting.weights.folder import save_model
from grafting.weights.tensors import load_tensors
from tinyrecipe import SAVED_OFTEN as TINY

ROOT = Path(__file__).parents[2]


def _recipe(**changes) -> Recipe:
    return Recipe.model_validate(TINY | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run, and the stages and steps that it went through."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    seen = []
    run(_recipe(), folder, on_step=lambda stage, step: seen.append((stage, step.done)))
    return folder, seen


def test_the_models_card_holds_the_recipe_and_no_figures_yet(finished):
    card = (finished[0] / "model" / "README.md").read_text()
    assert "# tiny\n" in card
    assert f"```yaml\n{(finished[0] / 'recipe.yaml').read_text().strip()}\n```" in card
    assert "## Figures" not in card


def test_run_leaves_what_the_design_says(finished):
    folder, seen = finished
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {"recipe.yaml", "plan.json", "manifest.json", "metrics.json", "report.html"} <= names
    assert {"model/config.json", "distill/operators.safetensors", "distill/log.jsonl"} <= names
    assert not any("partial" in name or "/states/" in name for name in names)
    assert [s for s in seen if s[0] == "distill"] == [("distill", i) for i in range(7)]
    assert [s for s in seen if s[0] == "finetune"] == [("finetune", i) for i in range(1, 7)]
    rows = json.loads((folder / "metrics.json").read_text())
    assert [row["name"] for row in rows] == ["pretrained", "random", "inherited", "distilled", "finetuned"]
    assert all(row["frechet_low"] <= row["frechet"] <= row["frechet_high"] for row in rows)
    assert len({row["params"] for row in rows[1:]}) == 1
    assert rows[1]["attention_mixing_flops"] < rows[0]["attention_mixing_flops"]
    assert all(row["protocol"] == rows[0]["protocol"] for row in rows)


def test_recipe_in_the_folder_is_the_recipe(finished):
    assert load_recipe(finished[0] / "recipe.yaml") == prepare(_recipe()).recipe


def test_nothing_is_done_twice(finished):
    folder, _ = finished
    seen = []
    run(_recipe(), folder, on_step=lambda stage, step: seen.append(stage))
    assert seen == []


def test_a_change_runs_what_depends_on_it(finished, tmp_path):
    folder, _ = finished
    seen = []
    changed = _recipe(finetune=TINY["finetune"] | {"lr": 2e-4})
    with pytest.warns(
        ResumeWarning,
        match=r"finetune is made again, and what follows from it: finetune.lr \(0.0001, now 0.0002\)",
    ):
        run(changed, folder, on_step=lambda stage, step: seen.append(stage))
    assert set(seen) == {
        "finetune", "sample finetuned",
        *(f"evaluate {r}" for r in ("pretrained", "random", "inherited", "distilled", "finetuned")),
    }  # fmt: skip
    with pytest.warns(ResumeWarning, match="finetune is made again"):
        run(_recipe(), folder)


def test_what_an_earlier_recipe_made_is_not_shown_as_the_new_ones(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "tiny")
    changed = _recipe(finetune=TINY["finetune"] | {"lr": 2e-4})
    run(changed, folder, until="distill")
    assert stale_stages(folder) > {"finetune", "samples/finetuned", "evaluate"}
    assert "distill" not in stale_stages(folder)
    page = write_report(folder).read_text()
    assert "of an earlier recipe, left out" in page
    assert "Its folder has of this recipe no finetune/log.jsonl, metrics.json" in page
    seen = []
    run(_recipe(), folder, on_step=lambda stage, step: seen.append(stage))  # back again: nothing was lost
    assert seen == []
    assert stale_stages(folder) == set()


def _run_until_killed(folder: Path, stage: str, done: int) -> None:
    def kill(name, step):
        if name == stage and step.done == done:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    run(_recipe(), folder, on_step=kill)


@pytest.mark.parametrize(
    ("stage", "done"),
    [
        ("distill", 0),
        ("distill", 5),
        ("finetune", 1),
        ("finetune", 5),
        ("sample random", 10),
        ("evaluate distilled", 20),
    ],
)
def test_killed_and_run_again_equals_uninterrupted(finished, tmp_path, stage, done):
    whole, folder = finished[0], tmp_path / "tiny"
    process = multiprocessing.get_context("fork").Process(
        target=_run_until_killed, args=(folder, stage, done)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    run(_recipe(), folder)
    for name in ("model/model", "distill/operators", "samples/finetuned", "samples/random"):
        want, got = (load_tensors(f / f"{name}.safetensors") for f in (whole, folder))
        assert want.keys() == got.keys()
        assert all(torch.equal(want[key], got[key]) for key in want), name
    logs = [
        [json.loads(x)["step"] for x in (folder / s / "log.jsonl").read_text().splitlines()]
        for s in ("distill", "finetune")
    ]
    assert logs == [list(range(7)), list(range(1, 7))]


def test_until(tmp_path):
    run(_recipe(), tmp_path / "run", until="distill")
    assert (tmp_path / "run" / "distill" / "operators.safetensors").is_file()
    assert not (tmp_path / "run" / "finetune").exists()


def test_folder_of_another_recipe(finished):
    with pytest.raises(RunError, match="belongs to recipe 'tiny', not 'other'"):
        run(_recipe(name="other"), finished[0])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"plan": [{"role": "attention", "blocks": [1, 9], "operator": "softmax"}]}, PlanError, "no block 9"),
        ({"plan": [{"role": "attention", "blocks": [1, 1], "operator": "softmax"}]}, PlanError, "named twice"),
        ({"plan": [{"role": "attention", "operator": {"name": "window-2d", "radius": 4}}]}, PlanError, "9 .*4"),
        ({"plan": [{"role": "attention", "operator": {"name": "mha", "num_heads": 5}}]}, PlanError, "32.*5"),
        ({"plan": [{"role": "mlp", "operator": "hyena-x"}]}, PlanError, "hyena-x replaces attention, not mlp"),
        ({"source": "nowhere"}, GraftingError, "no model in nowhere"),
        ({"source": {"host": "vit", "config": {}}}, GraftingError, "no host 'vit'; there are"),
        ({"source": {"host": "dit", "config": {"num_heads": 5}}}, GraftingError, "multiple of num_heads 5"),
        ({"source": {"host": "dit", "config": {"heads": 5}}}, GraftingError, "heads"),
        ({"data": {"name": "image-folder", "folder": "nowhere", "size": 32, "channels": 1}}, DataError, "nowhere"),
        ({"data": {"name": "fashion-mnist", "folder": "nowhere"}}, DataError, "nowhere"),
        ({"sample": TINY["sample"] | {"labels": [3, 11]}}, ProtocolError, r"labels \[11\] are out of range"),
        ({"source": TINY["source"] | {"config": TINY["source"]["config"] | {"in_channels": 3}}}, DataError, "shape"),
        ({"source": TINY["source"] | {"config": TINY["source"]["config"] | {"num_classes": 5}}}, DataError, "10 classes"),
        (
            {
                "source": TINY["source"] | {"config": TINY["source"]["config"] | {"class_dropout_prob": 0.0}},
                "sample": TINY["sample"] | {"cfg_scale": 2.0},
            },
            ProtocolError,
            "no null label",
        ),
    ],
)  # fmt: skip
def test_faults_are_found_before_anything_is_written(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        run(_recipe(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        (None, ["no recipe file"]),
        ("", ["is empty"]),
        ("- a\n- b\n", ["holds a list"]),
        ("name: [", ["is not YAML"]),
        ("name: x\ndata: {name: testbed-subset}\nspeed: 3\n", ["1 fault in", "speed: unknown key"]),
        ("name: a/b\ndata: {name: testbed-subset}\n", ["name: "]),
        ("name: x\ndata: {name: cifar}\n", ["data: ", "cifar"]),
        (
            yaml.safe_dump(TINY | {"plan": [{"role": "attn", "blocks": "some", "operator": "hyena-q"}], "seed": -1}),
            ["4 faults in", "plan.0.role", "plan.0.blocks: 'some' names no blocks", "no operator 'hyena-q'", "seed"],
        ),
        (yaml.safe_dump(TINY | {"distill": {"steps": -5}}), ["distill.steps", "-5"]),
        (yaml.safe_dump(TINY | {"sample": {"num_images": 0}}), ["sample.num_images", "0"]),
        (yaml.safe_dump(TINY | {"sample": {"steps": -1}}), ["sample.steps", "-1"]),
        ("base: r.yaml\n", ["is its own base"]),
        ("base: [a]\n", ["base names one file"]),
        ("!!python/object/apply:os.system ['true']\n", ["is not YAML"]),
    ],
)  # fmt: skip
def test_recipe_files_with_faults(tmp_path, content, messages):
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    for message in messages:
        assert message in str(error.value)


def test_base_and_differences(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(TINY))
    (tmp_path / "r.yaml").write_text("base: base.yaml\nname: longer\ndistill: {steps: 9}\n")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert (recipe.name, recipe.distill.steps, recipe.distill.batch_size) == ("longer", 9, 4)


def test_settings_of_another_kind_replace_those_of_the_base(tmp_path):
    scenes = {"name": "scenes", "seeds": "0-9"}
    base = {"source": "scenes", "name": "b", "data": scenes, "plan": TINY["plan"]}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "r.yaml").write_text("base: base.yaml\nname: r\ndata: {name: teacher, num_images: 5}\n")
    (tmp_path / "s.yaml").write_text("base: base.yaml\nname: s\ndata: {name: scenes}\n")
    assert load_recipe(tmp_path / "r.yaml").data.num_images == 5
    assert len(load_recipe(tmp_path / "s.yaml").data.load()) == 10


def test_source_described_by_its_config_with_weights_of_a_folder(tmp_path):
    source = FreshModel.model_validate(TINY["source"])
    saved, _ = load_source(source)
    save_model(tmp_path / "model", saved, Plan())
    described = source.model_copy(update={"weights": str(tmp_path / "model")})
    loaded, sha256 = load_source(described)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), saved.parameters(), strict=True))
    assert sha256 == load_source(str(tmp_path / "model"))[1]
    other = described.model_copy(update={"config": source.config | {"depth": 3, "num_classes": 5}})
    with pytest.raises(RecipeError) as error:
        load_source(other)
    assert "depth is 2 there, 3 in the recipe" in str(error.value)
    assert "num_classes is 10 there, 5 in the recipe" in str(error.value)


def test_skeleton_needs_no_weights():
    described = FreshModel.model_validate(TINY["source"] | {"weights": "nowhere"})
    names = {name: p.shape for name, p in load_source(FreshModel(**TINY["source"]))[0].named_parameters()}
    model = skeleton(described)
    assert {name: p.shape for name, p in model.named_parameters()} == names
    assert all(p.is_meta for p in model.parameters())


def test_read_only_folder(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("grafting.machine.files.os.replace", refuse)
    with pytest.raises(RunError, match="cannot write .*Read-only file system"):
        run(_recipe(), tmp_path / "run")


def test_disk_full_in_stage_1_and_then_space(finished, tmp_path, monkeypatch):
    calls = 0

    def full(*args, **kwargs):
        nonlocal calls
        calls += 1
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("grafting.runs.states.torch.save", full)
        with pytest.raises(RunError, match="No space left on device"):
            run(_recipe(), tmp_path / "run")
    assert calls == 1
    run(_recipe(), tmp_path / "run", until="distill")
    want, got = (
        load_tensors(f / "distill" / "operators.safetensors") for f in (finished[0], tmp_path / "run")
    )
    assert all(torch.equal(want[key], got[key]) for key in want)


def test_a_sweep_is_not_a_recipe():
    path = ROOT / "recipes" / "testbed" / "losses.yaml"
    with pytest.raises(
        RecipeError, match=r"holds many recipes: .* and `grafting sweep .*losses\.yaml` runs them"
    ):
        load_recipe(path)


def test_quickstart_fits_the_bundled_model():
    job = prepare(load_recipe(ROOT / "recipes" / "testbed" / "quickstart.yaml"))
    assert [site.block for site in job.chosen] == [4, 5, 6, 7]


def test_runs_with_one_store_fit_each_site_once(tmp_path):
    """Half of the sites first, then all: the second run fits the rest, and both equal runs of their own."""
    store = OperatorStore(tmp_path / "store")
    half, whole = TINY["plan"], [TINY["plan"][0] | {"blocks": "all"}]
    seen = []
    for name, plan in (("half", half), ("whole", whole)):
        recipe = _recipe(plan=plan)
        run(recipe, tmp_path / name, until="distill", store=store, on_step=lambda _, step: seen.append(step))
        run(recipe, tmp_path / f"{name}-alone", until="distill")
        shared, alone = (
            load_tensors(tmp_path / folder / "distill" / "operators.safetensors")
            for folder in (name, f"{name}-alone")
        )
        assert shared.keys() == alone.keys()
        assert all(torch.equal(shared[key], alone[key]) for key in alone)
    losses = [[key for key in step.values if key.startswith("loss/")] for step in seen]
    assert {tuple(keys) for keys in losses if keys} == {("loss/blocks.1.attn",), ("loss/blocks.0.attn",)}


def test_a_store_tells_starts_and_settings_apart(tmp_path):
    store, steps = OperatorStore(tmp_path / "store"), []
    changes = [
        {},
        {"seed": 1},
        {"distill": TINY["distill"] | {"lr": 1e-3}},
        {"calibrate": {"samples": 8}},
        {},
    ]
    for number, change in enumerate(changes):
        seen = []
        run(
            _recipe(**change),
            tmp_path / str(number),
            until="distill",
            store=store,
            on_step=lambda name, step, seen=seen: seen.append(name),
        )
        steps.append("distill" in seen)
    assert steps == [True, True, True, True, False]


def test_calibration_comes_before_stage_1_and_is_the_inherited_row(tmp_path):
    changes = {
        "plan": [{"role": "mlp", "blocks": "all", "operator": {"name": "mlp", "ratio": 2}}],
        "calibrate": {"samples": 64, "batch_size": 32},
        "distill": None,
        "finetune": None,
        "rows": ["inherited"],
    }
    seen = []
    run(_recipe(**changes), tmp_path / "run", on_step=lambda stage, step: seen.append(stage))
    assert seen[0] == "calibrate"
    calibrated = load_tensors(tmp_path / "run" / "calibrate" / "operators.safetensors")
    job = prepare(_recipe(**changes))
    built = build_operators(job.model, job.recipe.edits, seed=job.recipe.seed)
    assert {path: operator.state_dict().keys() for path, operator in built.items()} == {
        path: {key.removeprefix(f"{path}.") for key in calibrated if key.startswith(f"{path}.")}
        for path in built
    }
    path = "blocks.0.mlp.mixer.fc2.weight"
    assert not torch.equal(calibrated[path], built["blocks.0.mlp"].state_dict()["mixer.fc2.weight"])


def test_restructured_models_run_from_end_to_end(tmp_path):
    """A pair with an operator inside, and a block that is dropped, in one plan."""
    source = TINY["source"] | {"config": TINY["source"]["config"] | {"depth": 4}}
    plan = [
        {"edit": "merge", "blocks": [0, 1]},
        {"role": "attention", "blocks": [1], "operator": "hyena-x"},
        {"edit": "drop", "blocks": [2]},
    ]
    recipe = _recipe(source=source, plan=plan, rows=["pretrained", "inherited", "finetuned"])
    run(recipe, tmp_path / "run")
    log = (tmp_path / "run" / "distill" / "log.jsonl").read_text().splitlines()
    assert {key for key in json.loads(log[1]) if key.startswith("loss/")} == {"loss/blocks.0"}
    rows = {row["name"]: row for row in json.loads((tmp_path / "run" / "metrics.json").read_text())}
    assert rows["finetuned"]["attention_flops"] < rows["pretrained"]["attention_flops"]
    sites = json.loads((tmp_path / "run" / "plan.json").read_text())["sites"]
    assert [(s["block"], s["operator"]["name"]) for s in sites if s["role"] == "block" and s["operator"]] == [
        (0, "merge"),
        (1, "merge"),
        (2, "drop"),
    ]
    report = (tmp_path / "run" / "report.html").read_text()
    assert "2 of 4 blocks merged in pairs and 1 of 4 blocks dropped" in report
    assert "blocks 0 and 1, merged" in report
    job = prepare(recipe)
    assert training_flops(job, "finetuned").model < training_flops(job, "pretrained").model


def test_a_plan_that_only_drops_has_nothing_to_fit(tmp_path):
    run(_recipe(plan=[{"edit": "drop", "blocks": [1]}]), tmp_path / "run")
    assert not (tmp_path / "run" / "distill").exists()
    rows = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert [row["name"] for row in rows] == ["pretrained", "random", "inherited", "finetuned"]


def test_a_run_goes_on_with_the_subset_that_it_began_with(tmp_path):
    listing, path = BundledSubsetConfig().listing(), tmp_path / "subset.json"
    first, second = (listing.draw(per_class=30, seed=seed) for seed in (0, 1))
    write_subset(path, first)
    recipe = _recipe(data={"name": "testbed-subset", "subset": str(path)})
    folder = run(recipe, tmp_path / "run", until="calibrate")
    assert load_recipe(folder / "recipe.yaml").data.subset_sha256 == first.sha256
    run(recipe, folder, until="calibrate")
    write_subset(path, second)
    with pytest.raises(
        RunError, match=f"has sha256 {second.sha256}, the run in .* began with {first.sha256}"
    ):
        run(recipe, folder, until="calibrate")
    with pytest.raises(DataError, match=f"has sha256 {second.sha256}, the recipe asks for {first.sha256}"):
        run(load_recipe(folder / "recipe.yaml"), folder, until="calibrate")
    assert load_recipe(folder / "recipe.yaml").data.subset_sha256 == first.sha256
    wanted = recipe.data.model_copy(update={"subset_sha256": second.sha256})
    run(recipe.model_copy(update={"data": wanted}), folder, until="calibrate")
    assert load_recipe(folder / "recipe.yaml").data.subset_sha256 == second.sha256


@pytest.mark.parametrize(
    ("said", "steps", "seconds"),
    [(100, 100, 600), ("30 min", None, 1800), ("45s", None, 45), ("2 h", None, 7200)],
)
def test_states_are_saved_by_steps_or_by_time(said, steps, seconds):
    recipe = Recipe.model_validate(TINY | {"save_every": said})
    assert recipe.saving == Every(steps, seconds)
    assert recipe.model_dump()["save_every"] == said


@pytest.mark.parametrize("said", ["30 days", "0 min", "min", -1])
def test_no_other_time_is_known(said):
    with pytest.raises(ValueError, match="save_every"):
        Recipe.model_validate(TINY | {"save_every": said})


def test_images_that_the_judge_does_not_take_are_shown_without_its_remarks(tmp_path):
    recipe = {
        "name": "other-size",
        "source": "scenes",
        "data": {"name": "scenes", "seeds": "10000000-10000063"},
        "plan": [{"role": "attention", "blocks": "odd", "operator": {"name": "window-2d", "radius": 1}}],
        "sample": {"sampler": "dpm-solver++", "steps": 2, "num_images": 12, "shape": [3, 64, 64]},
        "rows": ["inherited"],
    }
    run(parse_recipe(recipe, source="here"), tmp_path / "run")
    assert "inherited" in (tmp_path / "run/report.html").read_text()


def test_a_changed_recipe_is_told_when_stages_are_made_again(tmp_path):
    recipe = _recipe()
    run(recipe, tmp_path / "run", until="distill")
    changed = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"batch_size": 2})})
    said = r"distill is made again, and what follows from it: distill.batch_size \(4, now 2\)"
    with pytest.warns(ResumeWarning, match=said):
        run(changed, tmp_path / "run", until="distill")
    run(changed, tmp_path / "run", until="distill")  # nothing is made, nothing is told
    # what no stage depends on
    run(changed.model_copy(update={"description": "another"}), tmp_path / "run", until="distill")


def test_what_was_done_before_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(yaml.safe_dump(TINY))
    assert "Done before" not in says("run", "recipe.yaml", "--until", "distill")
    assert "Done before: distill\n" in says("run", "recipe.yaml", "--until", "finetune")


def test_operators_that_stage_1_made_worse_are_warned_of(tmp_path):
    recipe = _recipe()
    wild = recipe.distill.model_copy(update={"lr": 100.0, "clip_norm": 1e6})
    with pytest.warns(
        TrainingWarning,
        match=r"stage 1 left 1 of 1 operators further .* R² of blocks.1.attn went from .* to -",
    ):
        run(recipe.model_copy(update={"distill": wild}), tmp_path / "run", until="distill")

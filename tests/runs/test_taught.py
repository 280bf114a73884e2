"""Runs without data: the source makes latents first, and everything after trains on them."""

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import grafting
from commandline import one_line, says
from grafting.data.latents import LatentsConfig
from grafting.data.prompts import Prompts
from grafting.errors import RunError
from grafting.latents import prompting
from grafting.runs.file import load_recipe
from grafting.runs.job import prepare
from grafting.runs.run import run
from grafting.runs.stages import training_flops
from grafting.runs.sweep import load_sweep, run_sweep
from latents.textpipelines import pixart, sd3
from processes import run_in_processes

WORDS = ["a red cat", "a blue dog on the mat", "three trees beside the sea"]
MADE = {"name": "teacher", "num_images": 12, "steps": 2, "batch_size": 5, "shape": [4, 8, 8]}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A pipeline's folder, its prompts, and a recipe without data."""
    folder = tmp_path_factory.mktemp("taught")
    pixart().save_pretrained(folder / "pipe")
    (folder / "words.txt").write_text("\n".join(WORDS))
    says(
        "data",
        "prompts",
        folder / "prompts",
        "--prompts",
        folder / "words.txt",
        "--pipeline",
        folder / "pipe",
    )
    recipe = {
        "name": "free",
        "source": str(folder / "pipe"),
        "plan": [{"role": "attention", "blocks": [1], "operator": {"name": "hyena-x", "kernel_size": 3}}],
        "data": MADE,
        "conditions": {"name": "prompts", "folder": str(folder / "prompts")},
        "distill": {"steps": 2, "batch_size": 4, "holdout": 4},
        "finetune": {"steps": 2, "batch_size": 4, "warmup_steps": 0, "objective": "output"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name in ("run", "run2"):  # the second stays as it is
        says("run", folder / "recipe.yaml", "--out", folder / name)
    return folder


def test_the_source_makes_the_data_and_the_rest_trains_on_them(begun):
    data = LatentsConfig(folder=begun / "run/teach/latents").load()
    x, labels = data.batch(torch.arange(12))
    assert x.shape == (12, 4, 8, 8)
    assert labels.tolist() == [0, 1, 2] * 4
    assert (begun / "run/model/config.json").is_file()
    assert json.loads((begun / "run/manifest.json").read_text())["stages"].keys() >= {
        "teach",
        "distill",
        "finetune",
    }


def test_latents_are_made_once_and_again_where_they_are_lost(begun):
    written = {path: path.stat().st_mtime_ns for path in (begun / "run/teach/latents").glob("*.safetensors")}
    says("run", begun / "recipe.yaml", "--out", begun / "run")
    assert {path: path.stat().st_mtime_ns for path in written} == written
    first = next(iter(written))
    content = first.read_bytes()
    first.unlink()
    says("run", begun / "recipe.yaml", "--out", begun / "run", "--set", "finetune.steps=3")
    assert first.read_bytes() == content


def test_a_recipe_without_data_makes_a_thousand(begun):
    recipe = yaml.safe_load((begun / "recipe.yaml").read_text())
    del recipe["data"]
    (begun / "none.yaml").write_text(yaml.safe_dump(recipe))
    told = json.loads(one_line("check", begun / "none.yaml", "--json"))
    assert told["stages"]["teach"] == "1000 latents of the source, dpm-solver++ with 20 steps"


def test_the_teachers_work_is_a_cost_of_what_was_trained_on_it(begun):
    recipe = load_recipe(begun / "recipe.yaml")
    guided = recipe.model_copy(update={"data": recipe.data.model_copy(update={"cfg_scale": 2.0})})
    costs = [training_flops(prepare(r), "finetuned") for r in (recipe, guided)]
    # 12 latents of two steps, and each step a second time for guidance
    assert costs[1].training - costs[0].training == 12 * 2 * costs[0].base
    assert training_flops(prepare(recipe), "pretrained").training == 0


def test_what_stage_2_cannot_train_or_encode_is_a_fault_of_the_recipe(begun, tmp_path):
    recipe = yaml.safe_load((begun / "recipe.yaml").read_text())
    prompts = tmp_path / "recipe.yaml"
    lora = {"trainable": ["new", {"lora": {"targets": ["attention"]}}]}
    edits = [{"role": "attention", "blocks": "all", "operator": {"name": "hyena-x", "kernel_size": 3}}]
    prompts.write_text(yaml.safe_dump(recipe | {"plan": edits, "finetune": recipe["finetune"] | lora}))
    assert "names no linear layer that is not trained itself: leave lora out" in one_line(
        "check", prompts, code=1
    )
    alone = {
        "source": str(begun / "pipe/transformer"),
        "conditions": {"name": "words", "file": str(begun / "words.txt")},
    }
    prompts.write_text(yaml.safe_dump(recipe | alone))
    assert "transformer is no pipeline of diffusers: it has no model_index.json" in one_line(
        "check", prompts, code=1
    )


def test_one_file_takes_a_pipeline_a_plan_and_words(begun, tmp_path):
    recipe = yaml.safe_load((begun / "recipe.yaml").read_text())
    recipe["conditions"] = {"name": "words", "file": str(begun / "words.txt"), "shard_size": 2}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(recipe))
    assert "The recipe is valid." in one_line("check", tmp_path / "one.yaml")
    assert not (tmp_path / "run").exists()
    says("run", tmp_path / "one.yaml", "--out", tmp_path / "run")
    assert Prompts(tmp_path / "run/prompts").words(1) == WORDS[1]
    written = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    assert written["conditions"] == {
        "name": "prompts",
        "folder": str(tmp_path / "run/prompts"),
        "verify": True,
    }
    # the pipeline as it was, with the graft in it; weights that were not edited take no room
    folder = tmp_path / "run/pipeline"
    pipeline = DiffusionPipeline.from_pretrained(folder)
    saved = load_file(tmp_path / "run/model/model.safetensors")
    own = pipeline.transformer.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in saved.items())
    assert grafting.plan_of(pipeline.transformer).edits
    source = Path(recipe["source"])
    others = [path for path in source.rglob("*") if path.is_file() and path.parent.name != "transformer"]
    same = {p for p in others if (folder / p.relative_to(source)).samefile(p)}
    assert same == {p for p in others if p.suffix == ".safetensors"}
    # saving into it leaves the source as it was
    before = {p: p.read_bytes() for p in others}
    pipeline.vae.to(torch.float64).save_pretrained(folder / "vae")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    assert {p: p.read_bytes() for p in others} == before
    # the same prompts by another way: the same model, and nothing is done twice
    same = [load_file(folder / "model/model.safetensors") for folder in (tmp_path / "run", begun / "run2")]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    says("run", tmp_path / "one.yaml", "--out", tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_encoders_are_opened_once_unless_words_or_their_files_change(begun, tmp_path, monkeypatch):
    opened, work = [], prompting.open_encoders
    monkeypatch.setattr(prompting, "open_encoders", lambda *a, **k: opened.append(a) or work(*a, **k))
    pipe, words = tmp_path / "pipe", tmp_path / "words.txt"
    shutil.copytree(begun / "pipe", pipe)
    words.write_text("\n".join(WORDS))

    def encode(folder: str, **settings) -> int:
        config = prompting.WordsConfig(file=words, **settings)
        before = len(opened)
        prompting.encode_words(config, tmp_path / folder, source=str(pipe), tell=lambda step: None)
        assert len(Prompts(tmp_path / folder)) == len(words.read_text().splitlines())
        return len(opened) - before

    assert [encode("a"), encode("a")] == [1, 0]
    # as many bytes as before, written later: their content is looked at
    weights = next((pipe / "text_encoder").glob("*.safetensors"))
    os.utime(weights, ns=(1, 1))
    assert [encode("a"), encode("a")] == [1, 0]
    # an index that was lost is written again
    (tmp_path / "a/prompts.json").unlink()
    assert [encode("a"), encode("a")] == [1, 0]
    words.write_text("\n".join(WORDS[:2]))
    with pytest.raises(RunError, match="other"):
        encode("a")
    assert encode("b") == 1


def test_words_that_are_not_there_are_refused_before_any_work(begun, tmp_path):
    recipe = yaml.safe_load((begun / "recipe.yaml").read_text())
    recipe["conditions"] = {"name": "words", "file": str(tmp_path / "none.txt")}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(recipe))
    assert "none.txt" in one_line("run", tmp_path / "one.yaml", "--out", tmp_path / "run", code=1)
    assert not (tmp_path / "run").exists()


def test_prompts_of_another_model_are_refused_before_any_work(begun, tmp_path):
    sd3().save_pretrained(tmp_path / "sd3")
    for command in (
        [
            "check",
            begun / "recipe.yaml",
            "--set",
            f"source={tmp_path / 'sd3'}",
            "--set",
            "plan.0.operator={name: window-1d, window: 2}",
        ],
        [
            "sample",
            tmp_path / "sd3",
            "--prompts",
            begun / "prompts",
            "--latents",
            tmp_path / "made",
            "--sampler",
            "euler",
        ],
    ):
        refused = one_line(*command, code=1)
        assert "are of another model than SD3Transformer2DModel" in refused
        assert "it takes no encoder_attention_mask" in refused
        assert "it needs pooled_projections" in refused
    assert not (tmp_path / "made").exists()


def test_a_shape_that_patches_do_not_divide_is_refused_before_any_work(begun):
    refused = one_line("check", begun / "recipe.yaml", "--set", "data.shape=[4,7,8]", code=1)
    assert "pixart cuts images into patches of 2 x 2, which 7 x 8 are not a multiple of" in refused


def test_a_forecast_counts_what_the_source_makes(begun):
    told = json.loads(one_line("run", begun / "recipe.yaml", "--dry-run", "--json"))
    assert [stage["name"] for stage in told["stages"]] == [
        "teach",
        "distill",
        "finetune",
        "pipeline",
        "report",
    ]
    cost = json.loads(one_line("cost", begun / "recipe.yaml", "--json"))
    assert told["stages"][0]["work"] == "12 latents, 2 passes each"
    assert told["stages"][0]["flops"] == 12 * 2 * cost["model"]["flops"]["before"]


def test_recipes_of_a_sweep_have_what_is_the_sources_from_one_another(begun, tmp_path):
    settings = yaml.safe_load((begun / "recipe.yaml").read_text()) | {
        "name": "several",
        "conditions": {"name": "words", "file": str(begun / "words.txt")},
        "vae": {"source": str(begun / "pipe/vae")},
        "sample": {"sampler": "dpm-solver++", "steps": 2, "num_images": 3, "shape": [4, 8, 8]},
        "rows": ["pretrained", "finetuned"],
    }
    kernels = {"short": {}, "long": {"plan.0.operator.kernel_size": 5}}
    swept = settings | {"grids": [{"axes": {"kernel": kernels}}]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(swept, sort_keys=False))
    sweep, told = load_sweep(tmp_path / "sweep.yaml"), {}

    def following(point):
        steps = told.setdefault(point.name, [])
        return nullcontext(lambda name, step: steps.append((name, step.done)))

    runs = tmp_path / "runs"
    list(run_sweep(sweep, runs, table=tmp_path / "table", following=following))
    of_source = {"prompts", "teach", "sample pretrained"}
    assert {name for name, _ in told["short"]} >= of_source | {"distill", "sample finetuned"}
    assert of_source.isdisjoint(name for name, _ in told["long"])
    latents = [next((runs / name / "teach/latents").glob("*.safetensors")) for name in told]
    assert latents[0].samefile(latents[1])
    rows = [json.loads((runs / name / "metrics.json").read_text()) for name in told]
    assert [len(found) for found in rows] == [2, 2]
    assert rows[0][0] == rows[1][0]
    # each run is whole in itself
    shutil.rmtree(runs / "short")
    told.clear()
    (tmp_path / "table.json").unlink()
    list(run_sweep(sweep, runs, table=tmp_path / "table", only={"kernel": "long"}, following=following))
    assert told == {"long": []}


def _stages(recipe: Path, folder: Path, others: list[Path]) -> set[str]:
    """The stages of a run that had steps to do."""
    told = set()
    run(load_recipe(recipe), folder, others=others, on_step=lambda stage, step: told.add(stage))
    return told


def test_two_processes_have_what_is_the_sources_from_another_run(begun, tmp_path):
    words = {"name": "words", "file": str(begun / "words.txt")}
    settings = yaml.safe_load((begun / "recipe.yaml").read_text()) | {"conditions": words}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    # the second process does its share, and tells nothing
    every = {"prompts", "teach", "distill", "finetune"}
    assert run_in_processes(_stages, tmp_path / "recipe.yaml", tmp_path / "a", []) == [every, set()]
    again = run_in_processes(_stages, tmp_path / "recipe.yaml", tmp_path / "b", [tmp_path / "a"])
    assert again == [every - {"prompts", "teach"}, set()]
    for name in ("prompts/prompts.json", "teach/latents", "model/model.safetensors"):
        own, other = (tmp_path / run / name for run in "ab")
        for path in sorted(own.rglob("*.safetensors")) if own.is_dir() else [own]:
            assert path.read_bytes() == (other / path.relative_to(own)).read_bytes()

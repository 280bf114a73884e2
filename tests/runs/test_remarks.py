"""What is said of a recipe in which nothing is wrong."""

import json
from pathlib import Path

import pytest
import yaml

from commandline import says
from grafting.data.bundled import scenes_pipeline_folder
from grafting.data.scenes import PRETRAINING, ScenesConfig
from grafting.errors import ResumeWarning
from grafting.runs.file import parse_recipe
from grafting.runs.job import prepare
from grafting.runs.remarks import seen_before
from grafting.runs.run import run
from tinyrecipe import TINY

PRETRAIN = Path(__file__).parents[2] / "recipes" / "scenes" / "pretrain.yaml"
SCENES = {
    "name": "on-scenes",
    "source": "scenes",
    "plan": [{"role": "attention", "blocks": [1], "operator": "softmax"}],
    "distill": {"steps": 1, "batch_size": 2, "holdout": 2},
}


def notes(folder: Path, settings: dict) -> list[str]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return json.loads(says("check", path, "--json"))["notes"]


def test_the_range_of_pretraining_is_that_of_its_recipe_and_of_the_card():
    seeds = f"{PRETRAINING.start}-{PRETRAINING.stop - 1}"
    assert yaml.safe_load(PRETRAIN.read_text())["data"]["seeds"] == seeds
    assert f"scenes of seeds {seeds}," in (scenes_pipeline_folder() / "README.md").read_text()


@pytest.mark.parametrize(
    ("seeds", "seen"),
    [("0-99", "100 of the 100"), ("799990-800089", "10 of the 100"), ("800000-800009", ""), (None, "")],
)
def test_data_of_the_pretraining_are_remarked(seeds, seen):
    data = {"name": "scenes"} | ({"seeds": seeds} if seeds else {})
    said = seen_before(prepare(parse_recipe(SCENES | {"data": data}, source="here")))
    unseen = ScenesConfig().seeds
    assert said == (
        [f"data: {seen} scenes were in the source's pretraining; `seeds: {unseen}` were not"] if seen else []
    )


def test_check_and_a_run_say_so(tmp_path):
    settings = SCENES | {"data": {"name": "scenes", "seeds": "0-63"}}
    (said,) = notes(tmp_path, settings)
    assert said.startswith("data: 64 of the 64 scenes")
    with pytest.warns(ResumeWarning, match="64 of the 64 scenes were in the source's pretraining"):
        run(parse_recipe(settings, source="here"), tmp_path / "run", until="distill")


def test_images_that_nothing_measures_are_remarked(tmp_path):
    sample = {"sampler": "euler", "steps": 1, "num_images": 12, "cfg_scale": 1.0}
    wide = SCENES | {"data": {"name": "scenes"}, "sample": sample | {"shape": [3, 64, 64]}}
    assert notes(tmp_path, wide) == [
        "the images will not be measured: images of [3, 64, 64]; scenes are [3, 32, 32]; `evaluate` names another suite"
    ]
    assert notes(tmp_path, wide | {"sample": sample}) == []


def test_an_mlp_of_the_hosts_own_size_is_remarked(tmp_path):
    def of(ratio: float) -> dict:
        edit = {"role": "mlp", "blocks": "odd", "operator": {"name": "mlp", "ratio": ratio}}
        return TINY | {"plan": [edit]}

    (said,) = notes(tmp_path, of(4))
    assert said == (
        "MLPs as large as those they replace change weights, and make the model neither smaller nor faster: blocks.1.mlp"
    )
    assert notes(tmp_path, of(3)) == []


@pytest.mark.parametrize(
    ("prompts", "steps", "said"),
    [(["a cat", "a dog", "a cat"], 100, 2), (range(32), 100, 0), (["a cat", "a dog"], 99, 0)],
)
def test_few_prompts_are_remarked(tmp_path, prompts, steps, said):
    (tmp_path / "prompts.txt").write_text("\n".join(map(str, prompts)))
    settings = SCENES | {
        "conditions": {"name": "words", "file": "./prompts.txt"},
        "finetune": {"steps": steps, "batch_size": 2, "warmup_steps": 0},
    }
    few = [note for note in notes(tmp_path, settings) if note.startswith("conditions: ")]
    assert few == (
        [
            f"conditions: {said} different prompts for {steps} steps of stage 2, which learns them by heart: have some hundreds, "
            "like those that the model will be asked"
        ]
        if said
        else []
    )


def test_a_single_prompt_is_remarked_however_short_the_training_is(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na cat\n")
    conditions = {"name": "words", "file": "./prompts.txt"}
    finetune = {"steps": 1, "batch_size": 2, "warmup_steps": 0}
    said = "conditions: a single prompt, which the graft is fitted to alone: have some hundreds, like those that the model will be asked"
    assert said in notes(tmp_path, SCENES | {"conditions": conditions, "finetune": finetune})

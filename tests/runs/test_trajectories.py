"""Runs on states along the source's own trajectories: nothing is stored, and two files of words and settings are all."""

import json

import pytest
import yaml

from commandline import one_line, says
from grafting.errors import RecipeError
from grafting.runs.file import load_recipe
from grafting.runs.folder import read_log
from grafting.runs.forecast import forecast
from grafting.runs.recipe import Recipe
from grafting.runs.shapes import Shapes
from grafting.sampling.trajectories import TrajectoriesConfig
from latents.textpipelines import pixart
from tinyrecipe import TINY

DATA = {"name": "trajectories", "sampler": "ddim", "steps": 3}
DISTILL = {"steps": 4, "batch_size": 4, "holdout": 4, "precision": "fp32"}
FINETUNE = {"steps": 4, "batch_size": 4, "warmup_steps": 0, "precision": "fp32"}


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    """A recipe of a class-conditional model in a file."""
    path = tmp_path_factory.mktemp("dit") / "recipe.yaml"
    recipe = {name: value for name, value in TINY.items() if name != "sample"}
    path.write_text(yaml.safe_dump(recipe | {"data": DATA, "distill": DISTILL, "finetune": FINETUNE}))
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A recipe of a text-to-image pipeline and words."""
    folder = tmp_path_factory.mktemp("text")
    pixart().save_pretrained(folder / "pipe")
    (folder / "words.txt").write_text("a red cat\na blue dog on the mat\nthree trees beside the sea\n")
    recipe = {
        "name": "free",
        "source": str(folder / "pipe"),
        "plan": [{"role": "attention", "blocks": [1], "operator": {"name": "hyena-x", "kernel_size": 3}}],
        "data": DATA | {"shape": [4, 8, 8], "cfg_scale": 2.0},
        "conditions": {"name": "words", "file": str(folder / "words.txt")},
        "distill": DISTILL,
        "finetune": [FINETUNE | {"steps": 2}, FINETUNE | {"steps": 2, "trainable": "new"}],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


@pytest.mark.parametrize("kind", ["dit", "text"])
def test_a_recipe_runs_without_data_and_stores_none(kind, request, tmp_path):
    says("run", request.getfixturevalue(kind), "--out", tmp_path / "run")
    assert (tmp_path / "run/model/config.json").is_file()
    assert not (tmp_path / "run/teach").exists()
    stages = json.loads((tmp_path / "run/manifest.json").read_text())["stages"]
    assert stages.keys() >= {"distill", "finetune"}
    log = list(read_log(tmp_path / "run/finetune/log.jsonl"))
    assert all(line["loss"] == line["output"] for line in log)


def test_a_loss_of_the_process_is_refused_in_the_file(dit):
    with pytest.raises(RecipeError, match=r"finetune: states along trajectories have no clean image"):
        load_recipe(dit, changes={"finetune.objective": "process"})
    told = one_line("check", dit, "--set", "data.sampler=euler", code=1)
    assert "sampler euler does not run predicted noise" in told


def test_a_check_says_what_is_walked(dit):
    told = json.loads(one_line("check", dit, "--json"))["stages"]
    assert "teach" not in told
    states = "4 steps of 4 states along the source's trajectories, ddim with 3 steps"
    assert told["distill"] == f"{states}; 4 held out"
    assert told["finetune"] == states


def test_a_forecast_counts_a_pass_for_each_state(dit):
    def flops(recipe):
        return [stage.flops for stage in forecast(recipe, peak_tflops=1.0, until="finetune").stages]

    walked = load_recipe(dit)
    stored = Recipe.model_validate(walked.model_dump() | {"data": {"name": "testbed-subset"}})
    guided = load_recipe(dit, changes={"data.cfg_scale": 2.0})
    teacher = Shapes.of(walked).cost.before.flops
    assert [stage.name for stage in forecast(walked, peak_tflops=1.0).stages] == [
        "distill",
        "finetune",
        "report",
    ]
    distill, finetune = flops(stored)
    images = 4 * 4
    # in stage 2 the pass that visits a state gives its target: the teacher is not asked again
    assert finetune == flops(walked)[1]
    assert flops(walked)[0] == distill + images * teacher
    assert flops(guided) == [distill + 2 * images * teacher, finetune + images * teacher]


def test_fixed_states_are_counted_with_those_that_are_left_over():
    config = TrajectoriesConfig(sampler="ddim", steps=5)
    assert [config.walked(count, batch_size=4) for count in (4, 20, 24, 32)] == [20, 20, 40, 40]

"""What is recorded of a model by its name: conditions and process that its weights do not say."""

from pathlib import Path

import pytest

from grafting.data import CaptionsConfig
from grafting.diffusion import FlowConfig
from grafting.errors import CheckpointError
from grafting.runs.recorded import Recorded, recorded


def test_the_bundled_models():
    assert recorded("scenes") == Recorded(conditions=CaptionsConfig(), process=FlowConfig(shift=1.5))
    assert recorded("testbed") == Recorded()


def test_a_run_and_the_model_in_it(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "manifest.json").write_text("{}")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\nconditions: {name: scenes, dropout: 0.2}\nprocess: {name: flow, shift: 3}\n")
    expected = Recorded(conditions=CaptionsConfig(dropout=0.2), process=FlowConfig(shift=3.0))
    assert recorded(tmp_path) == recorded(str(tmp_path / "model")) == expected
    recipe.write_text("name: x\n")
    assert recorded(tmp_path) == Recorded()


@pytest.mark.parametrize("content", ["process: {name: none}", "a: [", "- 1"])
def test_a_damaged_recipe_of_a_run(tmp_path: Path, content: str):
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(CheckpointError, match="recipe.yaml is not"):
        recorded(tmp_path)


def test_a_folder_that_no_run_made(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("process: {name: flow, shift: 3}")
    assert recorded(tmp_path) == recorded(tmp_path / "nowhere") == Recorded()

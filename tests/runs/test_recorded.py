"""What is recorded of a model by its name: conditions and process that its weights do not say."""

import json
from pathlib import Path

import pytest

from grafting.data import CaptionsConfig
from grafting.diffusion import FlowConfig, ShiftBySize
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


def pipeline(folder: Path, name: str, scheduler: dict[str, object]) -> Recorded:
    """What is recorded of a pipeline with this scheduler."""
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    given = {"_class_name": "FlowMatchEulerDiscreteScheduler", **scheduler}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(given))
    return recorded(folder)


DYNAMIC = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
}


def test_a_pipelines_process_is_its_schedulers(tmp_path: Path):
    assert pipeline(tmp_path, "StableDiffusion3Pipeline", {"shift": 3.0}).process == FlowConfig(shift=3.0)
    line = ShiftBySize(base=0.95, max=2.05, base_tokens=1024, max_tokens=4096)
    found = pipeline(tmp_path, "LTXPipeline", DYNAMIC | {"shift_terminal": 0.1}).process
    assert found == FlowConfig(shift_by_size=line, terminal=0.1)
    assert pipeline(tmp_path, "FluxPipeline", DYNAMIC).process == FlowConfig(shift_by_size=line)
    # rules of their own, which the scheduler does not hold: the process is the family's
    assert pipeline(tmp_path, "Flux2Pipeline", DYNAMIC).process is None
    assert pipeline(tmp_path, "CogView4Pipeline", DYNAMIC).process is None


def test_a_damaged_scheduler(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"scheduler_config.json is not a scheduler's config"):
        pipeline(tmp_path, "FluxPipeline", DYNAMIC | {"base_image_seq_len": "many"})


def test_a_folder_that_no_run_made(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("process: {name: flow, shift: 3}")
    assert recorded(tmp_path) == recorded(tmp_path / "nowhere") == Recorded()

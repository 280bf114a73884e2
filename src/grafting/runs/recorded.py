"""How models are asked and noised, by what is recorded of them: of a bundled model here, of a run's model in its recipe, of a
pipeline's in its scheduler.

A model folder holds weights and settings of its class, which say neither.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ..data import CaptionsConfig, ConditionsConfig
from ..diffusion import FlowConfig, ProcessConfig
from ..errors import CheckpointError
from ..hosts import process_of_scheduler
from ..machine.reading import JsonObject, damage, read_json, read_yaml
from ..weights.locate import PIPELINE_NAME


class Recorded(BaseModel):
    """Conditions and process of a model; None stands for those of its family."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    conditions: ConditionsConfig | None = None
    process: ProcessConfig | None = None


_BUNDLED = {"scenes": Recorded(conditions=CaptionsConfig(), process=FlowConfig(shift=1.5))}


def recorded(source: str | Path) -> Recorded:
    """What is recorded of the model that a name stands for: a bundled one, a run's folder, or the model in it."""
    if str(source) in _BUNDLED:
        return _BUNDLED[str(source)]
    scheduler = Path(source) / "scheduler" / "scheduler_config.json"
    if (Path(source) / PIPELINE_NAME).is_file() and scheduler.is_file():
        config = read_json(scheduler, JsonObject, kind="a scheduler's config")
        pipeline = str(read_json(Path(source) / PIPELINE_NAME, JsonObject).get("_class_name"))
        with damage(scheduler, "a scheduler's config"):
            process = process_of_scheduler(str(config.get("_class_name")), config, pipeline=pipeline)
        return Recorded(process=process)
    for folder in (Path(source), Path(source).parent):
        if (folder / "manifest.json").is_file() and (folder / "recipe.yaml").is_file():
            return _of_run(folder / "recipe.yaml")
    return Recorded()


def _of_run(path: Path) -> Recorded:
    content = read_yaml(path, error=CheckpointError)
    with damage(path, "a recipe that says how its model is asked and noised"):
        return Recorded.model_validate(content)

"""Inputs of a result as JSON: their hash tells whether a stage must run again, and whether a line was already measured."""

from typing import Any

from pydantic import BaseModel

from ..contract import OperatorConfig
from ..editing.plan import Merge
from ..machine.files import hash_json
from ..machine.reading import JsonObject
from ..words import RowName
from .folder import RunFolder
from .job import Job
from .rows import ROWS


def essence(value: Any) -> Any:
    """Settings as JSON without those that have their defaults, so that a new setting of the library changes no hash.

    Where a default was changed, `hashed_as_absent` of the settings' class names what is left out in its place.
    """
    if isinstance(value, BaseModel):
        absent = {key: field.default for key, field in type(value).model_fields.items()}
        absent |= getattr(type(value), "hashed_as_absent", {})
        fields = {key: getattr(value, key) for key in type(value).model_fields}
        return {key: essence(v) for key, v in fields.items() if _names(key, v) or v != absent[key]}
    return [essence(item) for item in value] if isinstance(value, list | tuple) else value


def _names(key: str, value: Any) -> bool:
    """True if a setting identifies its owner even at its default."""
    return key == "name" or (key == "edit" and value != "replace")


def result_settings(config: BaseModel) -> JsonObject:
    """The settings of a training stage that change its result; `how_it_runs` names the others."""
    left_out: frozenset[str] = getattr(type(config), "how_it_runs", frozenset())
    return {name: value for name, value in essence(config).items() if name not in left_out}


def teach_inputs(job: Job) -> list[Any]:
    """Inputs of the latents that the source makes itself."""
    return [
        job.identity["grafting"],
        job.identity["source"],
        job.identity["data"],
        list(job.shape),
        *_ways(job),
    ]


def calibrate_inputs(job: Job) -> list[Any]:
    """Inputs of the closed-form start."""
    return [job.identity, essence(job.recipe.calibrate)]


def distill_inputs(job: Job) -> list[Any]:
    """Inputs of stage 1."""
    assert job.recipe.distill is not None
    calibration = [essence(job.recipe.calibrate)] if job.recipe.calibrate else []
    return [job.identity, result_settings(job.recipe.distill), *calibration]


def finetune_inputs(job: Job, folder: RunFolder) -> list[Any]:
    """Inputs of stage 2, including the files left by the stage before it."""
    assert job.recipe.finetune is not None
    before = [name for name in ("distill", "calibrate") if getattr(job.recipe, name)]
    files = folder.stage_outputs(before[0]) if before and job.is_fitted else None
    phases = [result_settings(phase) for phase in job.recipe.phases]
    return [job.identity, phases if len(phases) > 1 else phases[0], files]


def operator_inputs(job: Job, path: str) -> list[Any]:
    """Inputs of one fitted operator: its site's part of the plan, or all of it where sites see each other."""
    assert job.recipe.distill is not None
    inputs = distill_inputs(job)
    in_pairs = any(isinstance(choice, Merge) for choice in job.chosen.values())
    if job.recipe.distill.inputs == "teacher" and not in_pairs:
        (operator,) = (config for site, config in job.chosen.items() if site.path == path)
        assert isinstance(operator, OperatorConfig)
        inputs[0] = inputs[0] | {"plan": operator.model_dump(mode="json")}
    return [path, *inputs]


def samples_inputs(job: Job, folder: RunFolder, row: RowName) -> list[Any]:
    """Inputs of a row's images: its model, the sampling settings, and the autoencoder."""
    kind = ROWS[row]
    model: list[Any] = [job.identity["grafting"], job.identity["source"]]
    if kind.is_edited:
        model += [job.identity["plan"], job.identity["seed"], row]
        stage = kind.read_from(job.recipe)
        model += [folder.stage_outputs(stage)] if stage else []
    return [model, essence(job.recipe.sample), *_ways(job)]


def _ways(job: Job) -> list[Any]:
    """Process, conditions and autoencoder, where they are other than those of a model of pixels and classes."""
    vae = job.decoder.identity if job.decoder else None
    return [part for part in (job.denoiser.identity, vae) if part]


def row_fingerprint(job: Job, row: RowName) -> str:
    """A hash of all that a row's figures depend on, known before anything is run."""
    recipe, kind = job.recipe, ROWS[row]
    depends: list[Any] = ["source", job.identity["source"]]
    if kind.is_edited:
        stages = [getattr(recipe, name) for name in kind.after]
        depends = [job.identity | {"plan": essence(recipe.edits)}, row, essence(stages)]
    return hash_json([*depends, *_ways(job), *([job.suite] if job.suite else []), essence(recipe.sample)])

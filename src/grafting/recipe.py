"""A recipe: a complete run as data. `run` carries it out, stage by stage, in one folder.

    pretrained model + plan --distill--> operators --finetune--> model --sample--> images --evaluate--> metrics --> report

Everything that can be wrong with a recipe is found before any work begins. Each stage reads what came before from the
folder, is skipped when nothing that it depends on changed, and resumes where a killed run stopped.
"""

import copy
import json
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, PositiveInt, StringConstraints
from torch import nn

from . import distillation, finetuning
from .calibration import CalibrateConfig, calibrate
from .checkpoint import (
    WEIGHTS_NAME,
    find_model,
    load_model,
    load_operators,
    save_model,
    save_operators,
)
from .contract import ClassConditional, NoiseProcess, Site, Step, TrainingData
from .costing import PlanCost, plan_cost
from .data import DataConfig
from .decoding import Decoder, VaeConfig, load_decoder
from .devices import default_device
from .diffusion import Diffusion
from .distillation import DistillConfig, distill
from .drawing import Drawing, describe_model
from .errors import DataError, HostError, RecipeError, RunError
from .evaluation import Suite, SuiteConfig, TestbedSuite, evaluate
from .files import hash_json, sha256_of, write_bytes, write_json
from .finetuning import FinetuneConfig, finetune
from .hosts import Host, host_of, hosts
from .metrics.cost import count_parameters, role_flops
from .parallel import any_process, barrier, broadcast, is_main, rank, together, world_size
from .plan import Choice, Drop, Edit, Merge, Plan, describe_choice, fault_list, operators_of
from .portable import Base
from .report import write_report
from .runfolder import RunFolder, read_log
from .samples import open_samples, origin_of
from .sampling import SamplingConfig, check_sampling
from .store import OperatorStore
from .surgery import Operators, build_operators, graft, paths_after, place, resolve
from .throughput import Work, device_at, measured

OnStep = Callable[[str, Step], None]
Row = Literal["pretrained", "random", "inherited", "distilled", "finetuned"]


class FreshModel(BaseModel):
    """A model described by its config: with the weights of a folder, or at random for pretraining and for trials."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    host: str
    config: dict[str, JsonValue]
    """Constructor arguments of the host's model class."""
    weights: str | None = None
    """A model folder of this config, from which the weights come; left out, they are random."""
    seed: int = Field(default=0, ge=0)
    """Of random weights."""


class Recipe(BaseModel):
    """A complete run as data."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Annotated[str, StringConstraints(pattern=r"^[\w.-]+$")]
    """Names the run's folder."""
    description: str = ""
    source: str | FreshModel = "testbed"
    """The pretrained model: `testbed`, a model folder, or a fresh model of a host."""
    plan: tuple[Edit, ...] = ()
    """The edits; none trains the model as it is."""
    data: DataConfig
    """What stages 1 and 2 train on."""
    calibrate: CalibrateConfig | None = None
    """Fit in closed form, before stage 1, what of the operators can be; left out, they start as they are built."""
    distill: DistillConfig | None = None
    """Stage 1; left out, operators go to stage 2 as they are built."""
    finetune: FinetuneConfig | None = None
    """Stage 2; left out, the distilled model is the result."""
    sample: SamplingConfig | None = None
    """How images are sampled, the same for every row; left out, none are."""
    vae: VaeConfig | None = None
    """What makes pixels of samples, where the model makes latents."""
    evaluate: SuiteConfig | None = None
    """The suite that measures samples; left out, the testbed's."""
    rows: tuple[Row, ...] = ("pretrained", "random", "inherited", "distilled", "finetuned")
    """Which models are sampled and measured."""
    seed: int = Field(default=0, ge=0)
    """Of the operators' random weights."""
    save_every: PositiveInt = 100
    """Steps of stage 1 and 2 between saved states."""

    @property
    def edits(self) -> Plan:
        return Plan(edits=self.plan)

    @property
    def suite(self) -> Suite:
        return self.evaluate or TestbedSuite()


def run(
    recipe: Recipe,
    folder: str | Path,
    *,
    until: str = "report",
    on_step: OnStep | None = None,
    store: OperatorStore | None = None,
    peak_tflops: float | None = None,
) -> Path:
    """Carry out a recipe in `folder`, up to stage `until`, and return the folder.

    Several processes (see `parallel`) share the work; the main one writes. `on_step` is called, in that one, with the
    stage's name and each of its steps. Operators that another run with the same store has
    fitted, at the same site from the same start, are taken from there. `peak_tflops` is of one device, for the share of it
    that training reaches; by default that of the device where it is a known one.

    Raises:
        GraftingError: anything wrong with the recipe, before any work; or what a stage could not do.
    """
    folder = Path(folder)
    with together():
        job = replace(prepare(recipe, store=store), peak_tflops=peak_tflops)
        with _open(job, folder) as run_folder:
            for name, stage in STAGES.items():
                stage(job, run_folder, on_step if on_step and is_main() else _ignore)
                if name == until:
                    break
    return folder


@dataclass(frozen=True)
class Job:
    """A recipe with what it names: checked and loaded."""

    recipe: Recipe
    model: nn.Module
    host: Host
    facts: ClassConditional
    chosen: dict[Site, Choice]
    data: TrainingData
    identity: dict[str, Any]  # hashes of the model, plan and data
    diffusion: NoiseProcess
    store: OperatorStore | None = None
    decoder: Decoder | None = None  # where images are sampled
    peak_tflops: float | None = None  # of one device, where the caller knows it
    suite: dict[str, str] | None = None  # hashes of what measures, where it does not come with the library


def prepare(recipe: Recipe, *, store: OperatorStore | None = None) -> Job:
    """Load what a recipe names and check that everything fits, without writing anything."""
    model, source_sha256 = load_source(recipe.source)
    host = host_of(model)
    chosen = resolve(model, recipe.edits)
    facts = host.class_conditional(model)
    if facts is None:
        raise HostError(f"recipes train class-conditional models; {host.name} has another condition")
    decoder = None
    if recipe.sample is not None:
        check_sampling(
            recipe.sample, num_classes=facts.num_classes, null_label=facts.null_label, channels=facts.shape[0]
        )
        decoder = load_decoder(facts.shape, recipe.vae)
    suite = _check_evaluate(recipe, None if decoder is None else decoder.image_shape(facts.shape))
    if recipe.distill is not None:
        distillation.check_division(recipe.distill)
    if recipe.finetune is not None:
        finetuning.check_division(recipe.finetune)
    data = recipe.data.load()
    _check_data(data, facts)
    if recipe.distill is not None and any(not isinstance(choice, Drop) for choice in chosen.values()):
        distillation.split(len(data), recipe.distill)
    identity = {
        "grafting": version("grafting"),
        "source": source_sha256,
        "plan": recipe.edits.model_dump(mode="json"),
        "seed": recipe.seed,
        "data": recipe.data.describe(),
    }
    model = model.to(default_device())
    return Job(recipe, model, host, facts, chosen, data, identity, Diffusion(), store, decoder, suite=suite)


def _check_evaluate(recipe: Recipe, image_shape: tuple[int, int, int] | None) -> dict[str, str] | None:
    """The hashes of what a recipe's images are measured with; see `Suite.identity`."""
    if recipe.evaluate is None:
        return None
    if recipe.sample is None or image_shape is None:
        raise RecipeError("evaluate: there is nothing to measure; the recipe has no `sample`")
    if faults := recipe.suite.faults(recipe.sample.num_images, image_shape):
        raise RecipeError(fault_list([f"evaluate: {fault}" for fault in faults], "what the recipe samples"))
    return recipe.suite.identity()


def _check_data(data: TrainingData, facts: ClassConditional) -> None:
    x, _ = data.batch(torch.tensor([0]))
    if tuple(x.shape[1:]) != facts.shape:
        raise DataError(f"the data's images have shape {tuple(x.shape[1:])}, the model makes {facts.shape}")
    if data.num_classes > facts.num_classes:
        raise DataError(f"the data has {data.num_classes} classes, the model knows {facts.num_classes}")


def load_source(source: str | FreshModel) -> tuple[nn.Module, str]:
    """The model that a recipe starts from, and a hash of what it is."""
    if isinstance(source, FreshModel) and source.weights is None:
        torch.manual_seed(source.seed)
        return _construct(source), hash_json(source.model_dump(mode="json", exclude_none=True))
    name = source.weights if isinstance(source, FreshModel) else source
    assert name is not None
    if name != "testbed" and not Path(name).exists():
        raise RecipeError(
            f"no model in {name}: it does not exist; a source is `testbed`, a model's folder, or a host and its config"
        )
    folder = find_model(name)
    model, plan = load_model(folder)
    if plan.edits:
        raise RecipeError(f"source {name} is already grafted: a recipe starts from a model without a plan")
    if isinstance(source, FreshModel):
        _check_config(model, source)
    return model, sha256_of(folder / WEIGHTS_NAME)


def skeleton(source: str | FreshModel) -> nn.Module:
    """The model that a recipe starts from, on the meta device: its modules and shapes, in eval mode, without values.

    A `FreshModel` needs no weights for it, wherever they lie.
    """
    if not isinstance(source, FreshModel):
        return load_source(source)[0].to("meta")
    with torch.device("meta"):
        return _construct(source).eval()


def _construct(source: FreshModel) -> nn.Module:
    if source.host not in hosts():
        raise HostError(f"no host {source.host!r}; there are {', '.join(hosts())}")
    try:
        return hosts()[source.host].model_class(**source.config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise HostError(f"source: {source.host} cannot be made from this config: {error}") from error


def _check_config(model: nn.Module, source: FreshModel) -> None:
    """Raises a RecipeError that lists where the weights' model is not the one that is described, if it is not."""
    described = skeleton(source)
    faults = [] if type(model) is type(described) else [f"it is a {type(model).__name__}"]
    faults += [
        f"{key} is {model.config.get(key)!r} there, {value!r} in the recipe"
        for key, value in described.config.items()
        if not key.startswith("_") and hash_json(model.config.get(key)) != hash_json(value)
    ]
    if faults:
        raise RecipeError(fault_list(faults, f"source: the model in {source.weights}"))


def _open(job: Job, folder: Path) -> RunFolder:
    _check_subset(job.recipe, folder / "recipe.yaml")
    run_folder = RunFolder(
        folder, recipe_name=job.recipe.name, writes=is_main(), barrier=barrier, anyone=any_process
    )
    if run_folder.writes:
        _describe(job, run_folder)
    return run_folder


def _check_subset(recipe: Recipe, written: Path) -> None:
    """Raises a RunError if the run began on another subset under the same name, unless the recipe says which it wants."""
    if recipe.data.subset is None or recipe.data.subset_sha256 is not None or not written.is_file():
        return
    before = yaml.safe_load(written.read_text()).get("data", {})
    found = recipe.data.pinned().subset_sha256
    if before.get("subset") == str(recipe.data.subset) and before.get("subset_sha256") not in (None, found):
        raise RunError(
            f"{recipe.data.subset} has sha256 {found}, the run in {written.parent} began with "
            f"{before['subset_sha256']}: name another folder with --out, or write `subset_sha256: {found}` in the "
            "recipe's data to start anew here"
        )


def _describe(job: Job, run_folder: RunFolder) -> None:
    """Write down the recipe, the plan and the machine."""
    folder = run_folder.path
    restructured = any(site.role == "block" for site in job.chosen)
    sites = [
        {
            "block": site.block,
            "role": site.role,
            "path": site.path,
            "operator": describe_choice(job.chosen.get(site)),
        }
        for site in (*job.host.sites(job.model), *(job.host.blocks(job.model) if restructured else ()))
    ]
    plan = job.recipe.edits.model_dump(mode="json")
    recipe = job.recipe.model_copy(update={"data": job.recipe.data.pinned()})
    described = yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False).encode()
    if (folder / "recipe.yaml").is_file() and (folder / "recipe.yaml").read_bytes() != described:
        run_folder.mark_stale()
    write_bytes(folder / "recipe.yaml", described)
    write_json(folder / "plan.json", {"host": job.host.name, "plan": plan, "sites": sites})
    run_folder.describe_machine(
        {
            "processor": platform.processor() or platform.machine(),
            "device": str(default_device()),
            "processes": world_size(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
    )


def _calibrate(job: Job, run_folder: RunFolder, on_step: OnStep) -> None:
    config = job.recipe.calibrate
    if config is None or not job.chosen:
        return
    with run_folder.stage("calibrate", [job.identity, _essence(config)]) as stage:
        # a minute's work, which is not shared
        if stage.done or not is_main():
            return
        operators = build_operators(job.model, job.recipe.edits, seed=job.recipe.seed)
        steps = calibrate(
            job.model,
            operators,
            job.data,
            config,
            predict=job.host.predict,
            diffusion=job.diffusion,
            classes=job.facts,
        )
        for step in stage.follow(steps, save_every=None):
            on_step("calibrate", step)
        save_operators(stage.folder / "operators.safetensors", operators)
        stage.outputs = [stage.folder / "operators.safetensors"]


def _distill(job: Job, run_folder: RunFolder, on_step: OnStep) -> None:
    config = job.recipe.distill
    if config is None or not _is_fitted(job):
        return
    with run_folder.stage("distill", _distill_inputs(job)) as stage:
        if stage.done:
            return
        operators, state = _starting_operators(job, run_folder), stage.load_state()
        # what another run has added to the store since this stage began is fitted here all the same
        to_fit = broadcast(set(state["operators"]) if state else _not_in_store(job, operators))
        fitted = {path: operator for path, operator in operators.items() if path in to_fit}
        if job.store is not None:
            for path in operators.keys() - to_fit:
                job.store.load(_store_key(job, path), operators[path])
        if fitted:
            steps = distill(
                job.model,
                fitted,
                job.data,
                config,
                roles={site.path: site.role for site in job.chosen},
                predict=job.host.predict,
                diffusion=job.diffusion,
                classes=job.facts,
                cache_folder=stage.folder / "cache",
                state=state,
            )
            steps = _measured(job, "distill", steps)
            for step in stage.follow(steps, save_every=job.recipe.save_every):
                on_step("distill", step)
        barrier()
        if not is_main():
            return
        shutil.rmtree(stage.folder / "cache", ignore_errors=True)
        if job.store is not None:
            for path, operator in fitted.items():
                job.store.save(_store_key(job, path), operator)
        save_operators(stage.folder / "operators.safetensors", operators)
        stage.outputs = [stage.folder / "operators.safetensors"]


def _is_fitted(job: Job) -> bool:
    """Whether the plan has anything for stage 1; where blocks are dropped there is nothing to fit."""
    return _has_fitted(job.chosen)


def _has_fitted(chosen: Mapping[Site, Choice]) -> bool:
    return any(not isinstance(choice, Drop) for choice in chosen.values())


def _not_in_store(job: Job, operators: Operators) -> set[str]:
    """The sites that are left to fit."""
    store = job.store
    return {path for path in operators if store is None or not store.holds(_store_key(job, path))}


def _store_key(job: Job, path: str) -> list[Any]:
    """All that a fitted operator depends on: its site's part of the plan, or all of it where sites see each other."""
    assert job.recipe.distill is not None
    inputs = _distill_inputs(job)
    in_pairs = any(isinstance(choice, Merge) for choice in job.chosen.values())
    if job.recipe.distill.inputs == "teacher" and not in_pairs:
        (operator,) = (config for site, config in job.chosen.items() if site.path == path)
        inputs[0] = inputs[0] | {"plan": operator.model_dump(mode="json")}
    return [path, *inputs]


def _distill_inputs(job: Job) -> list[Any]:
    recipe = job.recipe
    assert recipe.distill is not None
    calibration = [_essence(recipe.calibrate)] if recipe.calibrate else []
    return [job.identity, _settings(recipe.distill), *calibration]


def _settings(config: DistillConfig | FinetuneConfig) -> dict[str, Any]:
    """What a training stage's result depends on."""
    return {name: value for name, value in _essence(config).items() if name not in config.how_it_runs}


def _finetune(job: Job, run_folder: RunFolder, on_step: OnStep) -> None:
    config = job.recipe.finetune
    if config is None:
        return
    inputs = [job.identity, _settings(config), _fitted_fingerprint(job, run_folder)]
    with run_folder.stage("finetune", inputs) as stage:
        if stage.done:
            return
        model = copy.deepcopy(job.model)
        record = place(model, _fitted_operators(job, run_folder))
        steps = finetune(
            model,
            job.data,
            config,
            predict=job.host.predict,
            diffusion=job.diffusion,
            classes=job.facts,
            blocks=[site.path for site in job.host.blocks(job.model)],
            teacher=job.model if config.output_weight else None,
            new_parameters=record.new_parameters,
            state=stage.load_state(),
        )
        steps = _measured(job, "finetune", steps)
        for step in stage.follow(steps, save_every=job.recipe.save_every):
            on_step("finetune", step)
        if not is_main():
            return
        source = job.recipe.source
        base = Base(id=source) if isinstance(source, str) else None
        stage.outputs = save_model(run_folder.path / "model", model, job.recipe.edits, base=base)


def _sample(job: Job, run_folder: RunFolder, on_step: OnStep) -> None:
    config, decoder = job.recipe.sample, job.decoder
    if config is None or decoder is None:
        return
    for row in rows_of(job):
        inputs = [_row_identity(job, run_folder, row), _essence(config)]
        if decoder.identity is not None:
            inputs.append(decoder.identity)
        with run_folder.stage(f"samples/{row}", inputs) as stage:
            if stage.done:
                continue
            model = _row_model(job, run_folder, row)
            drawing = Drawing(
                stage.folder / "shards",
                config,
                facts=job.facts,
                decoder=decoder.to(default_device()),
                identity=describe_model(model, settings=inputs),
            )
            if is_main():
                for _ in stage.follow(drawing.drawn_before(), save_every=None):
                    pass
            steps = drawing.draw(model, predict=job.host.predict, rank=rank(), world_size=world_size())
            for step in stage.follow(steps, save_every=None):
                on_step(f"sample {row}", step)
            if is_main():
                for step in drawing.wait():
                    on_step(f"sample {row}", step)
            barrier()
            if not is_main():
                continue
            path = run_folder.path / "samples" / f"{row}.safetensors"
            drawing.write(path)
            write_json(stage.folder / "model.json", {"params": count_parameters(model)})
            stage.outputs = [path, stage.folder / "model.json"]


def _evaluate(job: Job, run_folder: RunFolder, on_step: OnStep) -> None:
    config = job.recipe.sample
    if config is None:
        return
    rows = rows_of(job)
    fingerprints = {row: run_folder.stage_outputs(f"samples/{row}") for row in rows}
    origin = origin_of(config, vae=job.decoder.identity if job.decoder else None)
    origin["num_images"] = config.num_images
    suite = job.recipe.suite
    with run_folder.stage("evaluate", [fingerprints, suite.inputs(job.suite, origin)]) as stage:
        if stage.done or not is_main():
            return
        new_evaluator = suite.open(origin, on_step=lambda step: on_step("reference", step))
        metrics = []
        for row in rows:
            samples = open_samples(run_folder.path / "samples" / f"{row}.safetensors")
            evaluator = new_evaluator()
            for step in evaluate(samples.batches(suite.batch_size), evaluator):
                on_step(f"evaluate {row}", step)
            metrics.append(
                {"name": row} | _cost(job, run_folder, row) | evaluator.result().model_dump(mode="json")
            )
        write_json(run_folder.path / "metrics.json", metrics)
        stage.outputs = [run_folder.path / "metrics.json"]


def _cost(job: Job, run_folder: RunFolder, row: Row) -> dict[str, Any]:
    """What a row's model costs: parameters, attention FLOPs an image and forward pass, measured sampling time."""
    folder = run_folder.path / "samples" / row
    times = sorted(line["ms_per_image"] for line in read_log(folder / "log.jsonl"))
    chosen = {} if row == "pretrained" else job.chosen
    standing = list(paths_after(job.host.sites(job.model), chosen))
    flops = role_flops(standing, operators_of(chosen), "attention")
    return {
        "params": json.loads((folder / "model.json").read_text())["params"],
        "attention_flops": flops.total,
        "attention_mixing_flops": flops.mixing,
        "ms_per_image": round(times[len(times) // 2], 3),
    }


def _report(job: Job, run_folder: RunFolder, on_step: OnStep) -> None:
    if is_main():
        write_report(run_folder.path)


STAGES: dict[str, Callable[[Job, RunFolder, OnStep], None]] = {
    "calibrate": _calibrate,
    "distill": _distill,
    "finetune": _finetune,
    "sample": _sample,
    "evaluate": _evaluate,
    "report": _report,
}


def _ignore(stage: str, step: Step) -> None:
    """What `run` does with steps when nobody follows them."""


def rows_of(job: Job) -> list[Row]:
    """The recipe's rows that exist: a row needs its stage."""
    return rows_in(job.recipe, job.chosen)


def rows_in(recipe: Recipe, chosen: Mapping[Site, Choice]) -> list[Row]:
    """The same, from what the plan does to the model."""
    exists = {
        "pretrained": True,
        "random": bool(chosen),
        "inherited": bool(chosen),
        "distilled": bool(_has_fitted(chosen) and recipe.distill),
        "finetuned": bool(recipe.finetune),
    }
    return [row for row in recipe.rows if exists[row]]


def row_fingerprint(job: Job, row: Row) -> str:
    """A hash of all that a row's figures depend on, known before anything is run."""
    recipe = job.recipe
    if row == "pretrained":
        depends = ["source", job.identity["source"]]
    else:
        used = {"random": 0, "inherited": 1, "distilled": 2, "finetuned": 3}[row]
        stages = [recipe.calibrate, recipe.distill, recipe.finetune][:used]
        depends = [job.identity | {"plan": _essence(recipe.edits)}, row, _essence(stages)]
    if job.decoder is not None and job.decoder.identity is not None:
        depends.append(job.decoder.identity)
    if job.suite is not None:
        depends.append(job.suite)
    return hash_json([*depends, _essence(recipe.sample)])


def _names(key: str, value: Any) -> bool:
    """Whether a setting says what its owner is, though it has its default."""
    return key == "name" or (key == "edit" and value != "replace")


def _essence(value: Any) -> Any:
    """Settings as JSON without those that have their defaults, so that a new setting of the library changes no hash."""
    if isinstance(value, BaseModel):
        fields = {key: (getattr(value, key), field) for key, field in type(value).model_fields.items()}
        return {k: _essence(v) for k, (v, field) in fields.items() if _names(k, v) or v != field.default}
    return [_essence(item) for item in value] if isinstance(value, list | tuple) else value


class TrainingFlops(NamedTuple):
    """FLOPs: of the training that led to a model, and of one image's forward pass through it and through its source."""

    training: int
    model: int
    base: int


def training_flops(job: Job, row: Row) -> TrainingFlops:
    """What it took to make a row's model. A backward pass counts as two forward passes."""
    cost = plan_cost(job.model, job.recipe.edits)
    base, model = cost.before.flops, cost.after.flops
    if row == "pretrained":
        return TrainingFlops(0, base, base)
    taken = stage_flops(job.recipe, cost, job.chosen)
    led_to = {"random": (), "inherited": ("calibrate",), "distilled": ("calibrate", "distill")}
    return TrainingFlops(sum(taken.get(stage, 0) for stage in led_to.get(row, taken)), model, base)


def stage_flops(recipe: Recipe, cost: PlanCost, chosen: Mapping[Site, Choice]) -> dict[str, int]:
    """FLOPs of each stage of training that a recipe has, all processes together."""
    base, model = cost.before.flops, cost.after.flops
    # a merged pair is fitted whole, and pairs are not told from the rest of the model
    merged = any(isinstance(choice, Merge) for choice in chosen.values())
    new = model if merged else sum(site.flops.total for site in cost.after.sites if site.operator is not None)
    taken = {}
    if recipe.calibrate and chosen:
        # an MLP narrower than the host's takes a second pass
        taken["calibrate"] = 2 * recipe.calibrate.samples * (base + new)
    if recipe.distill and chosen:
        taken["distill"] = recipe.distill.steps * recipe.distill.batch_size * (base + 3 * new)
    if recipe.finetune:
        teacher = base if recipe.finetune.output_weight else 0
        taken["finetune"] = recipe.finetune.steps * recipe.finetune.batch_size * (3 * model + teacher)
    return taken


def _measured(job: Job, name: Literal["distill", "finetune"], steps: Iterator[Step]) -> Iterator[Step]:
    """A stage's steps with how fast they are. FLOPs are counted where there is a peak to compare with."""
    config, device = getattr(job.recipe, name), default_device()
    known = device_at(device)
    peak = job.peak_tflops or (known.tflops(config.precision) if known else None)
    flops = 0.0
    if peak is not None and config.steps:
        cost = plan_cost(job.model, job.recipe.edits)
        flops = stage_flops(job.recipe, cost, job.chosen)[name] / config.steps
    work = Work(
        images=config.batch_size,
        tokens=job.host.sites(job.model)[0].grid.num_tokens,
        flops=flops,
        tflops=peak and peak * world_size(),
    )
    return measured(steps, work, device=device)


def _row_identity(job: Job, run_folder: RunFolder, row: Row) -> list[Any]:
    """All that a row's model depends on."""
    base = [job.identity["grafting"], job.identity["source"]]
    grafted = [*base, job.identity["plan"], job.identity["seed"], row]
    outputs = {"distilled": "distill", "finetuned": "finetune"}
    if job.recipe.calibrate:
        outputs["inherited"] = "calibrate"
    if row == "pretrained":
        return base
    return [*grafted, run_folder.stage_outputs(outputs[row])] if row in outputs else grafted


def _row_model(job: Job, run_folder: RunFolder, row: Row) -> nn.Module:
    """The model of one row, on the model's device."""
    if row == "pretrained":
        return job.model
    if row == "finetuned":
        return load_model(run_folder.path / "model")[0].to(default_device())
    model = copy.deepcopy(job.model)
    if row == "random":
        graft(model, job.recipe.edits.randomised(), seed=job.recipe.seed)
    elif row == "inherited":
        place(model, _starting_operators(job, run_folder))
    else:
        place(model, _fitted_operators(job, run_folder))
    return model.eval()


def _starting_operators(job: Job, run_folder: RunFolder) -> Operators:
    """The operators before any step: as they are built, or as calibration left them."""
    operators = build_operators(job.model, job.recipe.edits, seed=job.recipe.seed)
    if job.recipe.calibrate and operators:
        load_operators(run_folder.path / "calibrate" / "operators.safetensors", operators)
    return operators


def _fitted_operators(job: Job, run_folder: RunFolder) -> Operators:
    """The operators that stage 2 begins with: as stage 1 left them, or as they start when there is no stage 1."""
    operators = _starting_operators(job, run_folder)
    if job.recipe.distill and _is_fitted(job):
        load_operators(run_folder.path / "distill" / "operators.safetensors", operators)
    return operators


def _fitted_fingerprint(job: Job, run_folder: RunFolder) -> dict[str, str] | None:
    """The hashes of the files that `_fitted_operators` reads last; None if it reads none."""
    stages = [name for name in ("distill", "calibrate") if getattr(job.recipe, name)]
    return run_folder.stage_outputs(stages[0]) if stages and _is_fitted(job) else None

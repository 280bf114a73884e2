"""A recipe with what it names: loaded, and checked whole before any work begins."""

from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import JsonValue
from torch import nn

from ..contract import Conditions, Denoiser, Grid, Role, Site, TrainingData
from ..cost.count import Flops, role_flops
from ..data import Prompts, check_bound
from ..data.bundled import bundled_model_folder
from ..editing.plan import Choice, Drop, fault_list, operators_of
from ..editing.surgery import (
    build_operators,
    check_can_adapt,
    grafted,
    paths_after,
    resolve,
    sharing_copy,
)
from ..errors import DataError, HostError, RecipeError, listed
from ..hosts import Host, SdpaHost, config_of, constructed, host_of, hosts, use_spec
from ..latents.decoding import Decoder, load_decoder
from ..latents.prompting import WordsConfig, encoding_pipeline
from ..machine.devices import default_device
from ..machine.files import hash_json
from ..machine.precision import settled_run
from ..machine.reading import reason_of
from ..sampling.chain import ChainConfig, check_sampling
from ..sampling.taught import Taught, TaughtConfig
from ..sampling.trajectories import Trajectories, TrajectoriesConfig
from ..training import distillation
from ..training.phases import FinetuneConfig, check_division, phases_of, with_objectives
from ..training.supply import Data, supply_of
from ..training.trained import operator_parameters, selections
from ..weights.folder import load_model
from ..weights.locate import find_model
from ..weights.tensors import weights_sha256
from .operator_cache import OperatorStore
from .paths import naming_paths
from .recipe import FreshModel, Recipe
from .recorded import recorded

S = TypeVar("S", bound=ChainConfig)


@dataclass(frozen=True)
class Job:
    """A recipe with what it names: checked and loaded."""

    recipe: Recipe
    model: nn.Module
    host: Host
    denoiser: Denoiser
    shape: tuple[int, ...]  # of one input, as the data has it
    chosen: dict[Site, Choice]
    data: Data
    identity: dict[str, JsonValue]  # hashes of the model, plan, data, conditions and process
    store: OperatorStore | None = None
    decoder: Decoder | None = None  # where images are sampled
    peak_tflops: float | None = None  # of one device, where the caller knows it
    is_measured: bool = False  # whether a suite fits its images
    suite: dict[str, str] | None = None  # hashes of what measures, where it does not come with the library

    @property
    def grid(self) -> Grid:
        """The image tokens of the data's items."""
        return self.host.grid_of(self.model, self.shape)

    @property
    def edits_mlps(self) -> bool:
        return any(site.role == "mlp" for site in self.chosen)

    def flops_of(self, role: Role, *, is_edited: bool) -> Flops:
        """FLOPs per image and forward pass of all attention, or of all MLPs, before or after the plan."""
        chosen = self.chosen if is_edited else {}
        at_grid = {site: replace(site, grid=self.grid) for site in self.host.sites(self.model)}
        standing = [at_grid[site] for site in paths_after(list(at_grid), chosen)]
        operators = {at_grid.get(site, site): o for site, o in operators_of(chosen).items()}
        return role_flops(standing, operators, role)

    @property
    def is_fitted(self) -> bool:
        """True if the plan has anything for stage 1; dropped blocks leave nothing to fit."""
        return any(not isinstance(choice, Drop) for choice in self.chosen.values())


def prepare(recipe: Recipe, *, store: OperatorStore | None = None) -> Job:
    """Load what a recipe names and check that everything fits, without writing anything. The job's recipe says no `auto`."""
    with naming_paths(recipe.written):
        return _prepare(recipe, store)


def _prepare(recipe: Recipe, store: OperatorStore | None) -> Job:
    recipe, _ = settled_run(recipe, default_device())
    know_host(recipe)
    model, source_sha256 = load_source(recipe.source)
    host = host_of(model)
    chosen = resolve(model, recipe.edits)
    recipe = _as_recorded(recipe)
    if isinstance(recipe.conditions, WordsConfig):
        encoding_pipeline(recipe.conditions, recipe.source if isinstance(recipe.source, str) else None)
    denoiser = denoiser_of(recipe, model)
    recipe = with_objective(recipe, host)
    decoder = None
    data: Data
    if recipe.sample is not None:
        native = recipe.sample.shape or host.shape(model)
        check_sampling(recipe.sample, denoiser=denoiser, channels=native[0])
        decoder = load_decoder(native, recipe.vae)
    if isinstance(recipe.data, TaughtConfig | TrajectoriesConfig):
        data = _of_source(recipe, recipe.data, denoiser, host, model)
        shape = data.shape
    else:
        data = recipe.data.load()
        shape = _check_data(data, denoiser, host, model)
    is_measured, suite = False, None
    if recipe.sample is not None and decoder is not None:
        config = _with_shape(recipe.sample, shape, host, model)
        recipe = recipe.model_copy(update={"sample": config})
        is_measured = _is_measured(recipe, denoiser.conditions, decoder.image_shape(config.shape or shape))
        suite = recipe.suite.identity() if is_measured else None
    elif recipe.evaluate is not None:
        raise RecipeError("evaluate: there is nothing to measure; the recipe has no `sample`")
    if recipe.distill is not None:
        distillation.check_division(recipe.distill)
    check_division(recipe.phases)
    if any(phase.lora for phase in recipe.phases):
        check_can_adapt()
    if any(phase.trainable != "all" for phase in recipe.phases):
        _check_trained(recipe, model, host.at_grid(host.grid_of(model, shape)))
    if recipe.distill is not None and any(not isinstance(choice, Drop) for choice in chosen.values()):
        supply = supply_of(
            data, denoiser, teacher=model, device=default_device(), precision=recipe.distill.precision
        )
        distillation.split(supply, recipe.distill)
    identity: dict[str, JsonValue] = {
        "grafting": version("grafting"),
        "source": source_sha256,
        "plan": recipe.edits.model_dump(mode="json"),
        "seed": recipe.seed,
        "data": recipe.data.describe(),
        **denoiser.identity,
        **({"spec": _spec_of(host)} if recipe.spec and isinstance(host, SdpaHost) else {}),
    }
    model = model.to(default_device())
    return Job(
        recipe,
        model,
        host,
        denoiser,
        shape,
        chosen,
        data,
        identity,
        store,
        decoder,
        is_measured=is_measured,
        suite=suite,
    )


def _check_trained(recipe: Recipe, model: nn.Module, host: Host) -> None:
    """Raises a TrainingError if a phase of stage 2 selects nothing to train, or to adapt, of the grafted model."""
    bare = sharing_copy(model).to("meta")
    with torch.device("meta"):
        operators = build_operators(bare, recipe.edits, host=host)
    with grafted(bare, operators):
        selections(bare, recipe.phases, operator_parameters(bare))


def _spec_of(host: SdpaHost) -> JsonValue:
    """A host's spec; what it leaves out of the newer keys is not hashed, so that earlier runs resume."""
    unsaid: dict[str, Any] = {
        key: True for key in ("own_grid", "most", "pipeline_fault") if not getattr(host.spec, key)
    }
    unsaid["blocks"] = {i: {"image_alone"} for i, of in enumerate(host.spec.blocks) if not of.image_alone}
    return host.spec.model_dump(mode="json", exclude=unsaid)


def _is_measured(recipe: Recipe, conditions: Conditions, image_shape: tuple[int, ...]) -> bool:
    """True if images of this shape can be measured: by the recipe's suite, else by a testbed's if it supports them.

    Raises:
        RecipeError: the suite cannot measure them.
    """
    assert recipe.sample is not None
    suite = recipe.suite
    is_asked = suite.asked_by in (None, recipe.asked)
    if recipe.evaluate is None and (not is_asked or not suite.takes(image_shape)):
        return False
    faults = suite.faults(recipe.sample.num_images, image_shape)
    if not is_asked:
        faults.append(
            f"suite {suite.name} judges images by conditions {suite.asked_by}; the recipe's are {recipe.asked}"
        )
    else:
        faults += suite.misfits(conditions)
    if faults:
        raise RecipeError(fault_list([f"evaluate: {fault}" for fault in faults], "what the recipe samples"))
    return True


def _as_recorded(recipe: Recipe) -> Recipe:
    """The same, with conditions and process that the recipe leaves out as they are recorded of its source."""
    if not isinstance(recipe.source, str):
        return recipe
    known = recorded(recipe.source)
    missing = {name: value for name, value in known if value is not None and getattr(recipe, name) is None}
    return recipe.model_copy(update=missing)


def denoiser_of(recipe: Recipe, model: nn.Module) -> Denoiser:
    """A recipe's model as every stage sees it."""
    host = host_of(model)
    conditions = recipe.conditions.load() if recipe.conditions else None
    process = host.built(model, recipe.process) if recipe.process else None
    denoiser = host.denoiser(model, conditions, process)
    check_asked(model, denoiser.conditions)
    return denoiser


def check_asked(model: nn.Module, conditions: Conditions) -> None:
    """Raises a DataError if prompts hold other arguments than the model takes."""
    host = host_of(model)
    if isinstance(conditions, Prompts) and (faults := host.condition_faults(model, conditions.arguments)):
        head = f"the prompts in {conditions.folder} are of another model than {type(model).__name__}:"
        raise DataError(listed(head, faults))


def _of_source(
    recipe: Recipe,
    config: TaughtConfig | TrajectoriesConfig,
    denoiser: Denoiser,
    host: Host,
    model: nn.Module,
) -> Taught | Trajectories:
    """The data that the source makes itself.

    Raises:
        RecipeError: there is no plan, or the source cannot make such a shape.
    """
    if not recipe.plan:
        raise RecipeError(
            "data: missing; a recipe without a plan trains the source as it is, which learns nothing from what it makes itself"
        )
    config = _with_shape(config, host.shape(model), host, model)
    check_sampling(config, denoiser=denoiser, channels=(config.shape or host.shape(model))[0])
    if isinstance(config, TrajectoriesConfig):
        return Trajectories(config, shape=host.shape(model))
    return Taught(config, shape=host.shape(model), num_classes=len(denoiser.conditions))


def _check_data(data: TrainingData, denoiser: Denoiser, host: Host, model: nn.Module) -> tuple[int, ...]:
    """The shape of the data's items, which the model takes, under conditions that it knows."""
    x, _ = data.batch(torch.tensor([0]))
    shape = tuple(x.shape[1:])
    if faults := host.shape_faults(model, shape):
        raise DataError(f"the data has items of shape {list(shape)}: {faults[0]}")
    check_bound(data, denoiser.conditions)
    if data.num_classes > len(denoiser.conditions):
        raise DataError(
            f"the data has {data.num_classes} classes, the model knows {len(denoiser.conditions)}"
        )
    return shape


def _with_shape(config: S, shape: tuple[int, ...], host: Host, model: nn.Module) -> S:
    """The same, with the shape of samples where that is not the native one: the recipe's, else the data's."""
    if config.shape is None and shape != host.shape(model):
        config = config.model_copy(update={"shape": shape})
    if config.shape is not None and (faults := host.shape_faults(model, config.shape)):
        place = "data" if isinstance(config, TaughtConfig | TrajectoriesConfig) else "sample"
        raise RecipeError(f"{place}.shape: {faults[0]}")
    return config


def asked_shape(recipe: Recipe, model: nn.Module) -> tuple[int, ...] | None:
    """The shape that a recipe names for its samples, or for what its source makes to train on; None if it names none.

    Raises:
        RecipeError: the model takes no such shape.
    """
    host = host_of(model)
    parts = [part for part in (recipe.sample, recipe.data) if isinstance(part, ChainConfig)]
    shapes = [_with_shape(part, host.shape(model), host, model).shape for part in parts]
    return next(filter(None, shapes), None)


def know_host(recipe: Recipe) -> None:
    """Make the host of a recipe's spec known."""
    if recipe.spec is not None:
        use_spec(recipe.spec)


def with_objective(recipe: Recipe, host: Host) -> Recipe:
    """The same, with the objective of stage 2 that is the host's where the recipe names none."""
    if recipe.finetune is None or not host.distilled:
        return recipe
    phases = with_objectives(phases_of(recipe.finetune), by_output=True)
    is_one = isinstance(recipe.finetune, FinetuneConfig)
    return recipe.model_copy(update={"finetune": phases[0] if is_one else phases})


def load_source(source: str | FreshModel) -> tuple[nn.Module, str]:
    """The model that a recipe starts from, and a hash of what it is."""
    if isinstance(source, FreshModel) and source.weights is None:
        torch.manual_seed(source.seed)
        model = _construct(source)
        return hosts()[source.host].initialised(model), hash_json(
            source.model_dump(mode="json", exclude_none=True)
        )
    name = source.weights if isinstance(source, FreshModel) else source
    assert name is not None
    if bundled_model_folder(name) is None and not Path(name).exists():
        raise RecipeError(
            f"no model in {name}: it does not exist; a source is `testbed`, `scenes`, a model's folder, or a host and its config"
        )
    folder = find_model(name)
    model, plan = load_model(folder)
    if plan.edits:
        raise RecipeError(f"source {name} is already grafted: a recipe starts from a model without a plan")
    if isinstance(source, FreshModel):
        _check_config(model, source)
    return model, weights_sha256(folder)


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
        return constructed(hosts()[source.host].model_class, source.config)
    except Exception as error:  # whatever a class raises at settings of another kind
        raise HostError(
            f"source: {source.host} cannot be made from this config: {reason_of(error)}"
        ) from error


def _check_config(model: nn.Module, source: FreshModel) -> None:
    """Raises a RecipeError that lists where the weights' model is not the one that is described, if it is not."""
    described, found = skeleton(source), config_of(model)
    faults = [] if type(model) is type(described) else [f"it is a {type(model).__name__}"]
    faults += [
        f"{key} is {found.get(key)!r} there, {value!r} in the recipe"
        for key, value in config_of(described).items()
        if not key.startswith("_") and hash_json(found.get(key)) != hash_json(value)
    ]
    if faults:
        raise RecipeError(fault_list(faults, f"source: the model in {source.weights}"))

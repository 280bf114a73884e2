"""Model classes that carry their plan, so that diffusers saves and loads grafted models, alone or inside a pipeline.

For the model class `X` of every host there is `GraftedX`, made when it is first asked for: `X` with one more setting,
`grafting`, that says which operators stand where, and how the class is described where that is a spec. diffusers finds it by its
name in this module, beside `ModelMixin`; `import grafting` comes before a pipeline's `from_pretrained`. The class that a spec
names is imported, and has to be a model class; no code in a folder is run.

Its weights lie under a name of their own (`locate.GRAFTED_NAME`): loaded as an `X`, a graft is an error rather than random.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

# diffusers loads only from modules that show this name
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from pydantic import BaseModel, ConfigDict, ValidationError, model_serializer
from torch import nn

from ..contract import OperatorConfig
from ..editing.plan import Plan, Replace
from ..editing.surgery import edits_of, graft
from ..errors import CheckpointError, listed
from ..hosts import Host, SdpaHost, SdpaSpec, config_of, host_of, hosts
from ..machine.reading import Json, JsonObject, cut, faults_of, read_json, shown
from ..machine.settings import Settings
from ..operators import operator_configs
from .adapter import holds_adapter, with_adapter
from .locate import (
    CONFIG_NAME,
    DELTA_NAME,
    GRAFTED_INDEX_NAME,
    GRAFTED_NAME,
    INDEX_NAME,
    MODEL_FILES,
    WEIGHTS_NAME,
    find_folder,
)

PREFIX = "Grafted"

# where pipelines that were saved look for a grafted class; that module imports this one when it is asked
HOME = "grafting.portable"


class Base(Settings):
    """The pretrained model that a grafted one was made from."""

    id: str
    """`testbed`, `scenes`, a model folder, or `owner/name` on the Hub."""
    revision: str | None = None
    """Commit on the Hub; none for a folder."""
    licence: str | None = None
    """Of its weights, as an SPDX name or in the owner's words."""


class Record(BaseModel):
    """Record of the graft in a model's config; enough to build its operators."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    host: str
    spec: SdpaSpec | None = None
    """The host as data, if it is described so."""
    plan: Plan
    operator_versions: dict[str, int] = {}
    """Of each operator in the plan, what its weights mean; 1 where nothing is said."""
    base: Base | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """As records were before hosts were data, where one is not."""
        return {key: value for key, value in handler(self).items() if key != "spec" or value is not None}

    @classmethod
    def of(cls, model: nn.Module, plan: Plan, *, base: Base | None = None) -> "Record":
        """The record of a model that was grafted with this plan; its base is the one on record if none is given.

        Raises:
            CheckpointError: the model's host has no name to find it by.
        """
        host = host_of(model)
        spec = host.spec if isinstance(host, SdpaHost) else None
        if spec is None and host.name not in hosts():
            raise CheckpointError(
                f"host {host.name!r} is not known by its name, so a model saved with it could not be loaded; "
                f"known are {', '.join(hosts())}"
            )
        versions = {operator.name: operator.version for operator in _operators(plan)}
        recorded = config_of(model).get("grafting", {}).get("base")
        base = Base(**recorded) if base is None and recorded else base
        return cls(host=host.name, spec=spec, plan=plan, operator_versions=versions, base=base)

    @property
    def described(self) -> Host:
        """The host, as it was when the model was grafted if a spec describes it."""
        return hosts()[self.host] if self.spec is None else SdpaHost(self.spec)

    @classmethod
    def read(cls, settings: Mapping[str, Any], *, source: str) -> "Record":
        """A config's record, checked against the operators that are installed.

        Raises:
            CheckpointError: it describes no plan, an unknown operator, or another version of one.
        """
        try:
            record = cls.model_validate(dict(settings))
        except ValidationError as error:
            raise CheckpointError(listed(f"{source} does not describe a graft:", faults_of(error))) from error
        if record.spec is None and record.host not in hosts():
            raise CheckpointError(f"{source}: no host {shown(record.host)}; there are {', '.join(hosts())}")
        installed = {name: config.version for name, config in operator_configs().items()}
        names = [operator.name for operator in _operators(record.plan)]
        saved = dict.fromkeys(names, 1) | record.operator_versions
        others = [
            f"operator {shown(name)} of version {version}; installed is version {installed.get(name)}"
            for name, version in saved.items()
            if installed.get(name) != version
        ]
        if others:
            raise CheckpointError(
                f"{source} was saved with {cut(', '.join(others))}: its weights mean another thing"
            )
        return record


def _operators(plan: Plan) -> Iterator[OperatorConfig]:
    """A plan's operators, and those that they are made of."""
    waiting = [edit.operator for edit in plan.edits if isinstance(edit, Replace)]
    while waiting:
        operator = waiting.pop()
        yield operator
        waiting += operator.parts()


_NAMES = {WEIGHTS_NAME: GRAFTED_NAME, INDEX_NAME: GRAFTED_INDEX_NAME}


@contextmanager
def _under_diffusers_names(folder: Path) -> Iterator[Path]:
    """A graft's folder in which its weights have the names that diffusers knows: one of links, for as long as it is read."""
    links = {theirs: ours for theirs, ours in _NAMES.items() if (folder / ours).is_file()}
    with TemporaryDirectory() as linked:
        for file in folder.iterdir():
            (Path(linked) / file.name).symlink_to(file.resolve())
        for theirs, ours in links.items():
            (Path(linked) / theirs).symlink_to((folder / ours).resolve())
        yield Path(linked)


def _folder_of(path: str | PathLike, options: Mapping[str, Any]) -> Path:
    """The folder that arguments of `from_pretrained` name; downloaded where it is on the Hub."""
    subfolder = options.get("subfolder") or ""
    patterns = (f"{subfolder}/*",) if subfolder else MODEL_FILES
    return find_folder(Path(path), revision=options.get("revision"), patterns=patterns) / subfolder


@cache
def grafted_class(base: type[Any]) -> type[Any]:
    """The class `GraftedX` of a host's model class `X`: its settings and `grafting`, a `Record` as JSON."""

    def initialise(self: Any, *args: Any, grafting: Mapping[str, Any], **settings: Any) -> None:
        base.__init__(self, *args, **settings)
        record = Record.read(grafting, source=f"the config of this {type(self).__name__}")
        self.register_to_config(grafting=record.model_dump(mode="json"))
        graft(self, record.plan, host=record.described, inherit=False)

    # diffusers reads the settings' names from here
    signature = inspect.signature(base.__init__)
    grafting = inspect.Parameter("grafting", inspect.Parameter.KEYWORD_ONLY)
    initialise.__signature__ = signature.replace(parameters=[*signature.parameters.values(), grafting])  # type: ignore[attr-defined]  # no attribute of a function to mypy

    def from_pretrained(cls: Any, path: str | PathLike, **options: Any) -> Any:
        """Load as diffusers does, but raise an error on missing or unexpected tensors, where diffusers only warns."""
        folder = _folder_of(path, options)
        if (folder / DELTA_NAME).is_file():
            return _load_delta(folder, options)
        asked = {**options, "output_loading_info": True, "subfolder": None}
        with _under_diffusers_names(folder) as linked:
            model, found = base.from_pretrained.__func__(cls, linked, **asked)
        faults = [f"{kind.replace('_', ' ')}: {', '.join(map(str, n))}" for kind, n in found.items() if n]
        if faults:
            raise CheckpointError(listed(f"{path} does not fit {cls.__name__}", faults))
        model.register_to_config(_name_or_path=str(path))
        described = read_json(folder / CONFIG_NAME, JsonObject).get("grafting")
        if isinstance(described, dict) and "adapter_sha256" in described:
            _add_adapter(model, folder)
        return (model, found) if options.get("output_loading_info") else model

    def save_pretrained(self: Any, folder: str | PathLike, *args: Any, **options: Any) -> None:
        """Save as diffusers does, with the weights under the name of grafts."""
        if options.pop("push_to_hub", False):
            raise CheckpointError(
                "a graft is uploaded once it is saved: save it without push_to_hub, then `grafting push`"
            )
        base.save_pretrained(self, folder, *args, **options)
        for theirs, ours in _NAMES.items():
            if (Path(folder) / theirs).is_file():
                (Path(folder) / theirs).replace(Path(folder) / ours)

    members = {
        "__init__": initialise,
        "save_pretrained": save_pretrained,
        "__module__": HOME,
        "__doc__": f"`{base.__name__}` with operators of a plan in place.",
        "from_pretrained": classmethod(from_pretrained),
        "ungrafted": base,
    }
    return type(f"{PREFIX}{base.__name__}", (base,), members)


def _add_adapter(model: nn.Module, folder: Path) -> None:
    if not holds_adapter(folder):
        raise CheckpointError(
            f"{folder} is not on this machine, and its adapter is needed: use grafting.load"
        )
    model.load_state_dict(with_adapter(folder, model.state_dict()))


def _load_delta(folder: Path, options: Mapping[str, Any]) -> Any:
    from .folder import load_model  # which is made of this module

    dtype = options.get("torch_dtype") or options.get("dtype") or torch.float32
    model, _ = load_model(folder, dtype=dtype)
    return (model, {}) if options.get("output_loading_info") else model


def with_plan(model: nn.Module, plan: Plan, *, base: Base | None = None) -> nn.Module:
    """The same grafted model, as an instance of the class that diffusers saves with its plan; it shares the tensors.

    `load` returns such models by itself. A pipeline that holds a model which was grafted in place would save it without
    its plan.

    Raises:
        PlanError, RuntimeError: the model was not grafted with this plan.
    """
    record = Record.of(model, plan, base=base).model_dump(mode="json")
    model_class: Any = host_of(model).model_class
    made = grafted_class(model_class)(**settings_of(model), grafting=record)
    reference = next(model.parameters())
    if made.dtype != reference.dtype:
        made.to(reference.dtype)  # for buffers that no state dict holds
    made.to(reference.device).load_state_dict(model.state_dict(), assign=True)
    for name, parameter in model.named_parameters():
        made.get_parameter(name).requires_grad_(parameter.requires_grad)
    return made.train(model.training)


def plan_of(model: nn.Module) -> Plan:
    """The plan that a model was grafted with: the one on its record, else what stands in it; empty where nothing does.

    Raises:
        CheckpointError: its record describes no plan, or an operator that is not installed.
    """
    record = config_of(model).get("grafting")
    if record is not None:
        return Record.read(record, source=f"the config of this {type(model).__name__}").plan
    return Plan(edits=edits_of(model))


def settings_of(model: nn.Module) -> JsonObject:
    """The constructor arguments of a model's class before any graft."""
    return {k: v for k, v in config_of(model).items() if not k.startswith("_") and k != "grafting"}


@cache
def _class_in_folder(name: str) -> type[Any]:
    """Stands for the class `name` of a host that is not installed: the folder that is loaded says how it is described."""

    def from_pretrained(cls: Any, path: str | PathLike, **options: Any) -> Any:
        config = _folder_of(path, options) / CONFIG_NAME
        settings = read_json(config, dict[str, JsonObject | Json]).get("grafting")
        record = Record.read(settings if isinstance(settings, dict) else {}, source=str(config))
        model_class: Any = record.described.model_class
        return grafted_class(model_class).from_pretrained(path, **options)

    members = {"__module__": HOME, "from_pretrained": classmethod(from_pretrained)}
    return type(name, (ModelMixin,), members)


def __getattr__(name: str) -> Any:
    if name.startswith(PREFIX):
        for host in hosts().values():
            if name == f"{PREFIX}{host.class_name}":
                model_class: Any = host.model_class
                return grafted_class(model_class)
        if name.isidentifier() and "UNet" not in name:
            return _class_in_folder(name)
    raise AttributeError(f"module {HOME!r} has no attribute {name!r}")

"""Model classes that carry their plan, so that diffusers saves and loads grafted models, alone or inside a pipeline.

For the model class `X` of every host there is `GraftedX`, made when it is first asked for: `X` with one more setting,
`grafting`, that says which operators stand where. diffusers finds it by its name in this module, beside `ModelMixin`.
It imports no module because a folder names it: `import grafting` comes before a pipeline's `from_pretrained`.
"""

import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

# diffusers loads only from modules that show this name
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from ..contract import OperatorConfig
from ..editing.plan import Plan, Replace
from ..editing.surgery import edits_of, graft
from ..errors import CheckpointError
from ..hosts import config_of, host_of, hosts
from ..operators import operator_configs
from .adapter import holds_adapter, with_adapter

PREFIX = "Grafted"

# where pipelines that were saved look for a grafted class; that module imports this one when it is asked
_HOME = "grafting.portable"


class Base(BaseModel):
    """The pretrained model that a grafted one was made from."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    id: str
    """`testbed`, a model folder, or `owner/name` on the Hub."""
    revision: str | None = None
    """Commit on the Hub; none for a folder."""
    licence: str | None = None
    """Of its weights, as an SPDX name or in the owner's words."""


class Record(BaseModel):
    """Record of the graft in a model's config; enough to build its operators."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    host: str
    plan: Plan
    operator_versions: dict[str, int] = {}
    """Of each operator in the plan, what its weights mean; 1 where nothing is said."""
    base: Base | None = None

    @classmethod
    def of(cls, model: nn.Module, plan: Plan, *, base: Base | None = None) -> "Record":
        """The record of a model that was grafted with this plan; its base is the one on record if none is given.

        Raises:
            CheckpointError: the model's host has no name to find it by.
        """
        host = host_of(model)
        if host.name not in hosts():
            raise CheckpointError(
                f"host {host.name!r} is not known by its name, so a model saved with it could not be loaded; "
                f"known are {', '.join(hosts())}"
            )
        versions = {operator.name: operator.version for operator in _operators(plan)}
        recorded = config_of(model).get("grafting", {}).get("base")
        base = Base(**recorded) if base is None and recorded else base
        return cls(host=host.name, plan=plan, operator_versions=versions, base=base)

    @classmethod
    def read(cls, settings: Mapping[str, Any], *, source: str) -> "Record":
        """A config's record, checked against the operators that are installed.

        Raises:
            CheckpointError: it describes no plan, an unknown operator, or another version of one.
        """
        try:
            record = cls.model_validate(dict(settings))
        except ValidationError as error:
            faults = "\n  ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise CheckpointError(f"{source} does not describe a graft:\n  {faults}") from error
        if record.host not in hosts():
            raise CheckpointError(f"{source}: no host {record.host!r}; there are {', '.join(hosts())}")
        installed = {name: config.version for name, config in operator_configs().items()}
        names = [operator.name for operator in _operators(record.plan)]
        saved = dict.fromkeys(names, 1) | record.operator_versions
        others = [
            f"operator {name!r} of version {version}; installed is version {installed.get(name)}"
            for name, version in saved.items()
            if installed.get(name) != version
        ]
        if others:
            raise CheckpointError(
                f"{source} was saved with {', '.join(others)}: its weights mean another thing"
            )
        return record


def _operators(plan: Plan) -> Iterator[OperatorConfig]:
    """A plan's operators, and those that they are made of."""
    waiting = [edit.operator for edit in plan.edits if isinstance(edit, Replace)]
    while waiting:
        operator = waiting.pop()
        yield operator
        waiting += operator.parts()


@cache
def grafted_class(base: type[Any]) -> type[Any]:
    """The class `GraftedX` of a host's model class `X`: its settings and `grafting`, a `Record` as JSON."""

    def initialise(self: Any, *args: Any, grafting: Mapping[str, Any], **settings: Any) -> None:
        base.__init__(self, *args, **settings)
        record = Record.read(grafting, source=f"the config of this {type(self).__name__}")
        self.register_to_config(grafting=record.model_dump(mode="json"))
        graft(self, record.plan, host=hosts()[record.host], inherit=False)

    # diffusers reads the settings' names from here
    signature = inspect.signature(base.__init__)
    grafting = inspect.Parameter("grafting", inspect.Parameter.KEYWORD_ONLY)
    initialise.__signature__ = signature.replace(parameters=[*signature.parameters.values(), grafting])  # type: ignore[attr-defined]  # no attribute of a function to mypy

    def from_pretrained(cls: Any, path: str | PathLike, **options: Any) -> Any:
        """Load as diffusers does, but raise an error on missing or unexpected tensors, where diffusers only warns."""
        both = base.from_pretrained.__func__(cls, path, **{**options, "output_loading_info": True})
        faults = [f"{kind.replace('_', ' ')}: {', '.join(map(str, n))}" for kind, n in both[1].items() if n]
        if faults:
            raise CheckpointError("\n  ".join([f"{path} does not fit {cls.__name__}", *faults]))
        where = {name: options[name] for name in ("subfolder", "revision", "cache_dir") if name in options}
        if "adapter_sha256" in cls.load_config(path, **where).get("grafting", {}):
            _add_adapter(both[0], Path(path, options.get("subfolder") or ""))
        return both if options.get("output_loading_info") else both[0]

    members = {
        "__init__": initialise,
        "__module__": _HOME,
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


def settings_of(model: nn.Module) -> dict[str, Any]:
    """The constructor arguments of a model's class before any graft."""
    return {k: v for k, v in config_of(model).items() if not k.startswith("_") and k != "grafting"}


def __getattr__(name: str) -> Any:
    if name.startswith(PREFIX):
        # stops at the first match: naming a class of diffusers imports it, which takes seconds
        for host in hosts().values():
            base: Any = host.model_class
            if name == f"{PREFIX}{base.__name__}":
                return grafted_class(base)
    raise AttributeError(f"module {_HOME!r} has no attribute {name!r}")

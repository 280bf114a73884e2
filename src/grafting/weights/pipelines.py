"""Grafting in place what diffusers saves: a model, or a pipeline's transformer, which from then on carries its plan.

Its class becomes the `GraftedX` of `portable.py`, so that it, and any pipeline that holds it, is saved with its plan.
"""

import gc
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffusers.configuration_utils import ConfigMixin, FrozenDict
from torch import nn

from ..editing import surgery
from ..editing.placed import Placed
from ..editing.plan import Plan
from ..editing.surgery import Graft, edits_of, holds_operators
from ..errors import CheckpointError, HostError
from ..hosts import Host, config_of, host_of
from ..machine.reading import JsonObject
from .portable import Record, grafted_class


def graft(model: Any, plan: Plan, *, host: Host | None = None, seed: int = 0) -> Graft:
    """Apply a plan to a model, or to a diffusers pipeline's transformer, in place, and return the record that can undo it.

    An operator's random weights depend on `seed` and its site alone, not on the rest of the plan. A model of a known class
    becomes an instance of the class that diffusers saves with its plan, until the graft is undone; so a pipeline that holds it
    is saved with the plan, and loads again after `import grafting`.

    Args:
        model: a model, or a pipeline with a `transformer`.
        host: how to read the model, where it is of no known class or its host has settings.

    Raises:
        PlanError: the plan does not fit; lists every fault, and the model is unchanged.
        HostError: the model belongs to no known host, or the pipeline has no transformer, or does not draw with a graft in it.
    """
    transformer = _transformer_of(model)
    if transformer is not model:
        check_drawn(model, host or host_of(transformer))
    record = surgery.graft(transformer, plan, host=host, seed=seed)
    carry_plan(transformer)
    return replace(record, then=carry_plan)


def check_drawn(pipeline: Any, host: Host) -> None:
    """Raise a HostError if a pipeline cannot draw with operators in its transformer."""
    if host.pipeline_fault:
        raise HostError(
            f"a {type(pipeline).__name__} cannot draw with a graft: {host.pipeline_fault}; its transformer alone can be grafted, and "
            "called without that mask"
        )


def place(model: nn.Module, operators: Mapping[str, Placed], *, cast: bool = True) -> Graft:
    """Put operators at their sites, in place, as `graft` does. They may have been built on a copy of the model, or distilled since.

    Args:
        cast: give them the model's dtype, in place; without, they keep theirs, as in training.
    """
    record = surgery.place(model, operators, cast=cast)
    carry_plan(model)
    return replace(record, then=carry_plan)


def carry_plan(model: nn.Module) -> None:
    """Make a model an instance of its `GraftedX`, with what stands in it on record; of its own class if nothing does.

    So it is too where it could not be loaded again: its class keeps no config, or is known to this process alone, or an operator is.
    """
    base: Any = getattr(type(model), "ungrafted", type(model))
    own: Any = model
    record = _record_of(model, base)
    if record is not None:
        own.__class__ = grafted_class(base)
        own.register_to_config(grafting=record)
    elif type(model) is not base:
        own.__class__ = base
        own._internal_dict = FrozenDict({k: v for k, v in config_of(model).items() if k != "grafting"})
    for pipeline, name in _pipelines_with(model):
        setattr(pipeline, name, model)


def _record_of(model: nn.Module, base: type[Any]) -> JsonObject | None:
    """The record of what stands in a model, as JSON; None if nothing does, or nobody could read it."""
    if not holds_operators(model):
        return None
    if not isinstance(model, ConfigMixin) or host_of(model).model_class is not base:
        return None
    try:
        record = Record.of(model, Plan(edits=edits_of(model))).model_dump(mode="json")
        Record.read(record, source="the graft")
    except CheckpointError:
        return None
    return record


def _transformer_of(model: Any) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    parts = getattr(model, "components", None)
    found = parts.get("transformer") if isinstance(parts, dict) else None
    if not isinstance(found, nn.Module):
        has = f" with {', '.join(parts)}" if isinstance(parts, dict) else ""
        raise HostError(
            f"a {type(model).__name__}{has} is neither a model nor a pipeline with a transformer: give the model itself"
        )
    return found


def _pipelines_with(model: nn.Module) -> list[tuple[Any, str]]:
    """Every pipeline that holds a model, and under which name: it notes a part's class when it gets it, and never again."""
    module = sys.modules.get("diffusers.pipelines.pipeline_utils")
    if module is None:
        return []
    pipelines = [thing for thing in gc.get_objects() if issubclass(type(thing), module.DiffusionPipeline)]
    return [(p, name) for p in pipelines for name, part in list(vars(p).items()) if part is model]

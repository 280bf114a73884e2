"""Change in a model's cost under a plan: counted without running it, or measured; per site and whole, on any grid.

The counted part needs shapes only: a model on the `meta` device, no weights and no data.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from pydantic import JsonValue
from torch import nn
from torch.utils._pytree import tree_map_only

from ..contract import Grid, Kwargs, OperatorConfig, Site
from ..editing.plan import Drop, Merge, Plan, fault_list
from ..editing.surgery import build_operators, grafted, holds_operators, leaving_no_hook, resolve
from ..errors import HostError, PlanError
from ..hosts import config_of, host_of
from ..weights.portable import Record
from .count import ModelCost, SiteCost, changes, model_cost
from .latency import peak_memory, time_forward


@dataclass(frozen=True)
class PlanCost:
    """The cost of a model before and after a plan, for one image of `grid` tokens."""

    grid: Grid
    before: ModelCost
    after: ModelCost
    num_merged: int = 0
    """Blocks that are merged, whose sites are not told apart."""

    def to_json(self) -> dict[str, JsonValue]:
        """All figures: changes in percent, of the whole model, and of every site."""
        whole: JsonValue = {
            name: {"before": getattr(self.before, name), "after": getattr(self.after, name)}
            for name in ("flops", "params", "saved_bytes")
        }
        after = {cost.site.path: cost for cost in self.after.sites}
        return {
            "grid": [self.grid.rows, self.grid.cols],
            **changes(self.before, self.after),
            "model": whole,
            "num_merged": self.num_merged,
            "sites": [_site_json(cost, after.get(cost.site.path)) for cost in self.before.sites],
        }


@dataclass(frozen=True)
class Measured:
    """Medians over passes of the model before and after, taken in turn."""

    ms: dict[str, tuple[float, float]]  # by path, the whole model under ""
    speedup: float  # median over passes of before / after
    peak_bytes: tuple[int, int]

    def to_json(self) -> dict[str, JsonValue]:
        ms: dict[str, JsonValue] = {
            path: {"before": before, "after": after} for path, (before, after) in self.ms.items()
        }
        return {
            "ms": ms.pop(""),
            "speedup": self.speedup,
            "peak_bytes": {"before": self.peak_bytes[0], "after": self.peak_bytes[1]},
            "ms_of_sites": ms,
        }


def plan_cost(model: nn.Module, plan: Plan, *, grid: Grid | None = None) -> PlanCost:
    """The cost of a model before and after a plan; the model, on any device, is unchanged.

    Sites inside merged blocks are part of the whole model only: a pair is another module. Dropped blocks cost nothing.

    Args:
        grid: image tokens; by default the model's native grid.

    Raises:
        PlanError: the plan does not fit the model, or an operator does not fit this grid. HostError: the model has no
            positions for it.
    """
    host, (sites, chosen) = host_of(model), _sites(model, plan, grid)
    standing, edits = _standing(model, sites), resolve(model, plan)
    grid = grid or host.sites(model)[0].grid
    dropped = {site.block for site, edit in edits.items() if isinstance(edit, Drop)}
    kept = [site for site in sites if site.block not in dropped]

    def inputs() -> Kwargs:
        return example_of(model, grid)

    with leaving_no_hook(model):
        with next(model.parameters()).device:
            # a host of packed tokens cannot read the grid from positions without values
            operators = build_operators(model, plan, host=host.at_grid(grid))
        before = model_cost(model, sites, standing, inputs)
        with grafted(model, operators):
            after = model_cost(model, kept, standing | chosen, inputs)
    return PlanCost(grid, before, after, sum(isinstance(edit, Merge) for edit in edits.values()))


def measure_plan(model: nn.Module, plan: Plan, *, grid: Grid | None = None, repeats: int = 5) -> Measured:
    """Time and peak memory of a forward pass of one image, before and after a plan; the model is unchanged.

    The first pass of each is left out.

    Args:
        model: with weights, on the device to measure; their values do not matter.
    """
    host, (sites, _) = host_of(model), _sites(model, plan, grid)
    device, example = next(model.parameters()).device, example_of(model, grid or host.sites(model)[0].grid)
    inputs = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), example)
    with leaving_no_hook(model):
        operators = build_operators(model, plan)
        with grafted(model, operators):
            standing = {path for path, _ in model.named_modules()}
            peak_after = peak_memory(model, inputs)
        paths = [site.path for site in sites if site.path in standing]
        before, after = [], []
        for _ in range(1 + repeats):
            before.append(time_forward(model, paths, inputs))
            with grafted(model, operators):
                after.append(time_forward(model, paths, inputs))
        pairs = list(zip(before, after, strict=True))[1:]
    return Measured(
        ms={
            path: (median(b[path] for b, _ in pairs), median(a[path] for _, a in pairs)) for path in before[0]
        },
        speedup=median(b[""] / a[""] for b, a in pairs),
        peak_bytes=(peak_memory(model, inputs), peak_after),
    )


def example_of(model: nn.Module, grid: Grid, *, batch_size: int = 1) -> Kwargs:
    """Arguments of a forward pass of images of this grid, with as much text as sites declare, in the model's dtype."""
    host, dtype = host_of(model), next(model.parameters()).dtype
    num_text = max(site.num_text for site in host.sites(model))
    text = {"num_text": num_text} if num_text else {}
    size = {"rows": grid.rows, "cols": grid.cols, "frames": grid.frames, **text}
    example = host.example(model, batch_size=batch_size, **size)
    return tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, example)


def _standing(model: nn.Module, sites: Sequence[Site]) -> dict[Site, OperatorConfig]:
    """The operators that a grafted model already holds at these sites.

    Raises:
        PlanError: it holds operators, and its config does not say which.
    """
    held = [site for site in sites if holds_operators(model.get_submodule(site.path))]
    if not held:
        return {}
    record = config_of(model).get("grafting")
    if record is None:
        raise PlanError(
            "the model was grafted in place, so what stands at its sites is not on record: undo that graft first"
        )
    plan = Record.read(record, source="the model's config").plan
    chosen = resolve(model, plan)
    by_path = {site.path: choice for site, choice in chosen.items() if isinstance(choice, OperatorConfig)}
    return {site: by_path[site.path] for site in held}


def _sites(model: nn.Module, plan: Plan, grid: Grid | None) -> tuple[list[Site], dict[Site, OperatorConfig]]:
    """The sites to tell apart, on this grid: all but those in merged blocks; and which operators stand at them.

    Raises:
        HostError: the model has no positions for this grid. PlanError: lists which operators do not fit it.
    """
    host = host_of(model)
    if grid and (faults := host.grid_faults(model, grid)):
        raise HostError(faults[0])
    chosen = resolve(model, plan)
    merged = {site.block for site, edit in chosen.items() if isinstance(edit, Merge)}
    native = [site for site in host.sites(model) if site.block not in merged]
    sites = {site: replace(site, grid=grid or site.grid) for site in native}
    operators = {sites[s]: o for s, o in chosen.items() if s in sites and isinstance(o, OperatorConfig)}
    faults = [
        f"block {site.block}, {operator.name}: {fault}"
        for site, operator in operators.items()
        for fault in operator.faults(site)
    ]
    if faults:
        rows, cols = (grid.rows, grid.cols) if grid else (0, 0)
        raise PlanError(fault_list(faults, f"plan on a grid of {rows} x {cols} tokens"))
    return list(sites.values()), operators


def _site_json(before: SiteCost, after: SiteCost | None) -> dict[str, JsonValue]:
    """A site before and after; after is None where its block is no more."""
    figures: Mapping[str, Callable[[SiteCost], int]] = {
        "flops": lambda cost: cost.flops.total,
        "mixing_flops": lambda cost: cost.flops.mixing,
        "params": lambda cost: cost.params,
        "saved_bytes": lambda cost: cost.saved_bytes,
    }
    return {
        "block": before.site.block,
        "role": before.site.role,
        "path": before.site.path,
        "operator": after.operator.name if after and after.operator else None,
        **{
            name: {"before": figure(before), "after": figure(after) if after else 0}
            for name, figure in figures.items()
        },
    }

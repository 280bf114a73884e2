"""What a plan does to a model's cost: counted without running it, or measured; per site and whole, on any grid.

The counted part needs shapes only: a model on the `meta` device, no weights and no data.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import nn

from .contract import Grid, OperatorConfig, Site
from .errors import PlanError
from .hosts import host_of
from .metrics.cost import ModelCost, SiteCost, changes, model_cost
from .metrics.latency import peak_memory, time_forward
from .plan import Drop, Merge, Plan, fault_list
from .surgery import build_operators, grafted, resolve


@dataclass(frozen=True)
class PlanCost:
    """The cost of a model before and after a plan, for one image of `grid` tokens."""

    grid: Grid
    before: ModelCost
    after: ModelCost

    def to_json(self) -> dict[str, Any]:
        """All figures: changes in percent, of the whole model, and of every site."""
        whole = {
            name: {"before": getattr(self.before, name), "after": getattr(self.after, name)}
            for name in ("flops", "params", "saved_bytes")
        }
        after = {cost.site.path: cost for cost in self.after.sites}
        return {
            "grid": [self.grid.rows, self.grid.cols],
            **changes(self.before, self.after),
            "model": whole,
            "sites": [_site_json(cost, after.get(cost.site.path)) for cost in self.before.sites],
        }


@dataclass(frozen=True)
class Measured:
    """Medians over passes of the model before and after, taken in turn."""

    ms: dict[str, tuple[float, float]]  # by path, the whole model under ""
    speedup: float  # median over passes of before / after
    peak_bytes: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        ms = {path: {"before": before, "after": after} for path, (before, after) in self.ms.items()}
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
        PlanError: the plan does not fit the model, or an operator does not fit this grid.
    """
    host, (sites, chosen) = host_of(model), _sites(model, plan, grid)
    grid = grid or host.sites(model)[0].grid

    def inputs() -> dict[str, Any]:
        return host.example(model, rows=grid.rows, cols=grid.cols, batch_size=1)

    before = model_cost(model, sites, {}, inputs)
    with next(model.parameters()).device:
        operators = build_operators(model, plan)
    dropped = {site.block for site, edit in resolve(model, plan).items() if isinstance(edit, Drop)}
    with grafted(model, operators):
        after = model_cost(model, [site for site in sites if site.block not in dropped], chosen, inputs)
    return PlanCost(grid, before, after)


def measure_plan(model: nn.Module, plan: Plan, *, grid: Grid | None = None, repeats: int = 5) -> Measured:
    """Time and peak memory of a forward pass of one image, before and after a plan; the model is unchanged.

    The first pass of each is left out.

    Args:
        model: with weights, on the device to measure; their values do not matter.
    """
    host, (sites, _) = host_of(model), _sites(model, plan, grid)
    device, grid = next(model.parameters()).device, grid or host.sites(model)[0].grid
    example = host.example(model, rows=grid.rows, cols=grid.cols, batch_size=1)
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in example.items()}
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


def _sites(model: nn.Module, plan: Plan, grid: Grid | None) -> tuple[list[Site], dict[Site, OperatorConfig]]:
    """The sites to tell apart, on this grid: all but those in merged blocks; and which operators stand at them.

    Raises:
        PlanError: lists which operators do not fit this grid.
    """
    host = host_of(model)
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


def _site_json(before: SiteCost, after: SiteCost | None) -> dict[str, Any]:
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

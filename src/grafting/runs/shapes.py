"""A recipe's model counted on its shapes, before and after its plan: what a forecast is made from. Needs neither weights nor data."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..contract import Grid
from ..cost.count import count_parameters, dry_run
from ..cost.plan import PlanCost, example_of, plan_cost
from ..editing.adapters import is_of_adapter
from ..editing.plan import Drop
from ..editing.surgery import build_operators, grafted, merge_adapters, resolve
from ..hosts import host_of
from ..machine.devices import mixed_precision
from ..machine.precision import Precision
from ..training.stacking import kind_of
from ..training.student import block_linears
from ..training.trained import mark, operator_parameters, selection
from .job import asked_shape, know_host, skeleton
from .paths import naming_paths
from .recipe import Recipe

FP32, BF16 = 4, 2  # bytes


@dataclass(frozen=True, kw_only=True)
class PhaseShapes:
    """What one phase of stage 2 trains, in numbers of parameters, and what a backward pass of it keeps."""

    operators: int  # trained
    copies: int  # trained weights of the pretrained model, which get memory of their own
    adapters: int
    held: int  # of the student's weights, those that `frozen: bf16` holds
    saved: int  # bytes per image kept for the backward pass, without checkpointing

    @property
    def trained(self) -> int:
        return self.operators + self.copies + self.adapters


@dataclass(frozen=True)
class Shapes:
    """A recipe's model before and after its plan: all that is counted of it."""

    cost: PlanCost
    shape: tuple[int, ...]  # of an image or latent
    num_classes: int | None  # None for a text-conditioned model
    chosen: Mapping[Any, Any]
    new_params: int
    linears: int  # parameters of the pretrained model's linear layers in blocks
    num_blocks: int
    saved: int  # bytes per image kept for the backward pass of the grafted model, in stage 1's precision, all trained
    phases: tuple[PhaseShapes, ...]
    tokens: tuple[int, int]  # how many, text that stands among them included, and how wide
    num_fitted: int  # sites that stage 1 fits
    num_kinds: int  # of their operators, where equal ones are stacked
    fitted_tokens: int  # of all of these together

    @classmethod
    def of(cls, recipe: Recipe) -> "Shapes":
        with naming_paths(recipe.written):
            know_host(recipe)
            model = skeleton(recipe.source)
        host, chosen = host_of(model), resolve(model, recipe.edits)
        conditions, blocks = host.conditions(model), [site.path for site in host.blocks(model)]
        shape = asked_shape(recipe, model) or host.shape(model)
        cost = plan_cost(model, recipe.edits, grid=host.grid_of(model, shape))
        linears = sum(p.numel() for p in block_linears(model, blocks))
        # a host of packed tokens cannot read the grid from positions without values
        with torch.device("meta"):
            operators = build_operators(model, recipe.edits, host=host.at_grid(cost.grid))
        with grafted(model, operators):
            saved, counted = 0, dict[tuple[object, Precision], int]()
            if recipe.distill:
                saved = saved_an_image(model, recipe.distill.precision, cost.grid)
                counted["all", recipe.distill.precision] = saved
            phases = _phases(model, recipe, cost.grid, blocks, counted)
        sites = host.sites(model)
        fitted = [site for site, choice in chosen.items() if not isinstance(choice, Drop)]
        return cls(
            cost=cost,
            shape=shape,
            num_classes=None if conditions is None else len(conditions),
            chosen=chosen,
            new_params=sum(count_parameters(operator) for operator in operators.values()),
            linears=linears,
            num_blocks=max(len(blocks), 1),
            saved=saved,
            phases=phases,
            tokens=(cost.grid.num_tokens + max(site.num_text for site in sites), sites[0].dim),
            num_fitted=len(fitted),
            num_kinds=len({kind_of(path, operator) for path, operator in operators.items() if operator.fits}),
            fitted_tokens=sum(cost.grid.num_tokens + site.num_text for site in fitted),
        )

    @property
    def sequence_bytes(self) -> int:
        """One image's tokens between two blocks, in float32."""
        return math.prod(self.tokens) * FP32

    def dump_bytes(self, samples: int) -> int:
        """Each site's input and output for this many samples, in 16 bits.

        Source: arXiv:2506.05340's released code stores both in fp16 (8,000 samples of DiT-XL/2: 264 GB).
        """
        return 2 * BF16 * samples * self.fitted_tokens * self.tokens[1]


def _phases(
    model: nn.Module,
    recipe: Recipe,
    grid: Grid,
    blocks: list[str],
    counted: dict[tuple[object, Precision], int],
) -> tuple[PhaseShapes, ...]:
    """Each phase on the grafted model, which is left as it was.

    Args:
        counted: bytes kept for the backward pass, by what is trained and in which precision; gains those of the phases.
    """
    candidates = {name: p for name, p in model.named_parameters() if p.requires_grad}
    new, changed, found = operator_parameters(model), set[int](), []
    for phase in recipe.phases:
        selected = selection(model, candidates, phase, new)
        trained = mark(model, candidates, selected, phase, first=0)
        changed |= {id(parameter) for parameter in trained}
        counts = {"operators": 0, "copies": 0, "adapters": 0}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                kind = "adapters" if is_of_adapter(name) else "operators" if name in new else "copies"
                counts[kind] += parameter.numel()
        held = sum(p.numel() for p in block_linears(model, blocks) if id(p) not in changed)
        key = (phase.trainable, phase.precision)
        if key not in counted:
            counted[key] = saved_an_image(model, phase.precision, grid)
        merge_adapters(model)
        changed |= {id(parameter) for parameter in selected.changed}
        found.append(PhaseShapes(**counts, held=held, saved=counted[key]))
    for parameter in candidates.values():
        parameter.requires_grad_()
    return tuple(found)


def saved_an_image(model: nn.Module, precision: Precision, grid: Grid) -> int:
    """Bytes kept for the backward pass per image; bf16 copies of weights, kept once, are not among them."""

    def saved(batch_size: int) -> int:
        with mixed_precision(torch.device("cpu"), precision), warnings.catch_warnings():
            # a norm in fp32 of activations in bf16 says that it will be slower here, where nothing is computed
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            parts = dry_run(model, [], lambda: example_of(model, grid, batch_size=batch_size))
        return parts[""].saved_bytes

    return saved(2) - saved(1)

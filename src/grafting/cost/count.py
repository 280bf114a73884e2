"""Cost of operators and models without running them: FLOPs, parameters, activations kept for backward.

Operators declare their own FLOPs; all else of a model is counted in one forward pass on fake tensors, which have shapes
and no values, so the weights need not be at hand. Everything is for one image and forward pass, in float32.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..contract import OperatorConfig, Role, Site, softmax_attention_flops


@dataclass(frozen=True)
class Flops:
    """FLOPs per image; a multiply-accumulate counts as two."""

    mixing: int  # what replaces softmax(QK^T)V, or an MLP's layers
    projections: int  # q, k, v, output projections and featurizers

    @property
    def total(self) -> int:
        return self.mixing + self.projections

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.mixing + other.mixing, self.projections + other.projections)


def role_flops(sites: Sequence[Site], chosen: Mapping[Site, OperatorConfig], role: Role) -> Flops:
    """The cost of all sites of one role, with operators where `chosen` has them and the host's own elsewhere."""
    return sum(
        (site_flops(chosen.get(site), site) for site in sites if site.role == role),
        start=Flops(0, 0),
    )


def site_flops(operator: OperatorConfig | None, site: Site) -> Flops:
    """The cost of an operator at a site, or of the host's own when None."""
    if operator is None:
        return host_flops(site)
    return Flops(operator.mixing_flops(site), operator.projection_flops(site))


def table4_flops(operator: OperatorConfig | None, site: Site) -> Flops:
    """The same as arXiv:2506.05340 Table 4 counts it, which leaves out some work of some operators."""
    return host_flops(site) if operator is None else Flops(*operator.table4_flops(site))


def host_flops(site: Site) -> Flops:
    """The cost of the host's own attention, which is linear where it makes no call of softmax attention, or MLP."""
    if site.role == "attention":
        mixing = softmax_attention_flops(site, site.num_tokens**2)
        if not site.attention.turn:
            mixing = 4 * site.num_tokens * site.dim * site.head_dim
        return Flops(mixing, 8 * site.num_tokens * site.dim**2)
    return Flops(2 * site.num_tokens * (site.num_weights or 2 * site.dim * site.hidden_dim), 0)


def count_parameters(model: nn.Module) -> int:
    """All parameters, trained or fixed."""
    return sum(p.numel() for p in model.parameters())


@dataclass(frozen=True)
class SiteCost:
    """Operator at a site, and its cost per image."""

    site: Site
    operator: OperatorConfig | None  # None: the host's own
    flops: Flops
    table4: Flops
    params: int
    saved_bytes: int  # activations kept for the backward pass


@dataclass(frozen=True)
class ModelCost:
    """Cost of a model per image: its sites, and the whole."""

    sites: tuple[SiteCost, ...]
    flops: int  # as declared at the sites, as counted elsewhere
    params: int
    saved_bytes: int

    def of_roles(self, roles: frozenset[Role]) -> tuple[SiteCost, ...]:
        """All sites of these roles, edited or not."""
        return tuple(cost for cost in self.sites if cost.site.role in roles)


def model_cost(
    model: nn.Module,
    sites: Sequence[Site],
    chosen: Mapping[Site, Any],
    inputs: Callable[[], Mapping[str, Any]],
) -> ModelCost:
    """The cost of a model on any device, `meta` included.

    Args:
        sites: the places to tell apart, with the grid of the inputs. One that a model with merged or dropped blocks no
            longer has is left out: its work, if there is any, is part of the rest of the model.
        chosen: which operators stand at them; what it says of other sites does not matter.
        inputs: makes the arguments of a forward pass of one image.
    """
    paths = {path for path, _ in model.named_modules()}
    sites = [site for site in sites if site.path in paths]
    passed = dry_run(model, [site.path for site in sites], inputs)
    costs = tuple(
        SiteCost(
            site=site,
            operator=chosen.get(site),
            flops=site_flops(chosen.get(site), site),
            table4=table4_flops(chosen.get(site), site),
            params=count_parameters(model.get_submodule(site.path)),
            saved_bytes=passed[site.path].saved_bytes,
        )
        for site in sites
    )
    return ModelCost(
        sites=costs,
        flops=passed[""].counted_flops + sum(cost.flops.total for cost in costs),
        params=count_parameters(model),
        saved_bytes=sum(part.saved_bytes for part in passed.values()),
    )


def changes(before: ModelCost, after: ModelCost) -> dict[str, float]:
    """By how many percent a plan changes costs: of all operators of the edited and dropped roles, and of the whole model.

    `flops_op` and `flops_ft` are dFLOPs_op and dFLOPs_ft of arXiv:2506.05340 Table 4, counted by its rules; all other
    FLOPs are complete. A part that costs nothing before and after has changed by 0.
    """
    left = {cost.site.path for cost in after.sites}
    roles = frozenset(
        [cost.site.role for cost in after.sites if cost.operator is not None]
        + [cost.site.role for cost in before.sites if cost.site.path not in left]
    )
    old, new = before.of_roles(roles), after.of_roles(roles)
    measures: dict[str, Callable[[SiteCost], int]] = {
        "flops_op": lambda cost: cost.table4.mixing,
        "flops_ft": lambda cost: cost.table4.projections,
        "flops": lambda cost: cost.flops.total,
        "params": lambda cost: cost.params,
        "saved_bytes": lambda cost: cost.saved_bytes,
    }
    found = {
        f"{name}_delta_pct": _percent(sum(map(measure, old)), sum(map(measure, new)))
        for name, measure in measures.items()
    }
    whole = {
        f"model_{name}_delta_pct": _percent(getattr(before, name), getattr(after, name))
        for name in ("flops", "params", "saved_bytes")
    }
    return found | whole


def _percent(before: int, after: int) -> float:
    return 100 * (after / before - 1) if before else 100.0 * (after > 0)


@dataclass
class Passed:
    """Work of one part of a model in a forward pass."""

    counted_flops: int = 0  # of matrix products, convolutions and fused attention
    saved_bytes: int = 0


def dry_run(
    model: nn.Module, paths: Sequence[str], inputs: Callable[[], Mapping[str, Any]]
) -> dict[str, Passed]:
    """Count the work of the modules at `paths`, and under "" of all others, in a forward pass that computes nothing.

    What a tensor keeps for the backward pass belongs to the part that keeps it first; parameters are not counted.
    Attention is the CPU's fused kernel, which keeps no scores. FLOPs are those that torch counts, and a softmax's: what
    kernels do on padding is counted, other pointwise work is not.
    """
    parts = {path: Passed() for path in ("", *paths)}
    kept: dict[int, Any] = {}  # storages, held so that no other gets their address
    inside = [""]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in kept:
            parts[inside[-1]].saved_bytes += storage.nbytes()
            kept[storage._cdata] = storage
        return tensor

    counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION_OF_CPU)
    # some models hold tensors that are neither parameters nor buffers, such as positions
    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        tensors = {name: _fake(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
        kept |= {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors.values()}
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with counter, hooks, _entering(model, paths, inside, parts, counter):
            torch.func.functional_call(model, tensors, (), dict(inputs()))
    parts[""].counted_flops = counter.get_total_flops() - sum(part.counted_flops for part in parts.values())
    return parts


def _fused_attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """From shapes; with 2 for each score's softmax, as operators declare it, where torch counts the products only."""
    return sdpa_flop_count(query, key, value) + 2 * math.prod(query[:-1]) * key[-2]


# torch counts the fused attention of CUDA only
_ATTENTION_OF_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention_flops}


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).requires_grad_(tensor.requires_grad)


@contextmanager
def _entering(
    model: nn.Module,
    paths: Sequence[str],
    inside: list[str],
    parts: dict[str, Passed],
    counter: FlopCounterMode,
) -> Iterator[None]:
    """While a forward pass is at a path, it is last in `inside`; its FLOPs are added up as it leaves."""

    def enter(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            inside.append(path)
            parts[path].counted_flops -= counter.get_total_flops()

        return hook

    def leave(*_: Any) -> None:
        parts[inside.pop()].counted_flops += counter.get_total_flops()

    with ExitStack() as hooks:
        for path in paths:
            module = model.get_submodule(path)
            hooks.enter_context(module.register_forward_pre_hook(enter(path)))
            hooks.enter_context(module.register_forward_hook(leave))
        yield

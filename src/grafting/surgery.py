"""The only file that changes a model: it builds operators for a plan's sites, places them, and takes them out again.

A kernel stands inside a copy of the host's attention module, whose call of `scaled_dot_product_attention` it answers;
a mixer stands behind an adapter with the host's calling convention. Everything is checked and built before anything is
edited, so a failed graft leaves the model as it was.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .contract import Kernel, Mixer, OperatorConfig, Site
from .errors import HostError, PlanError
from .hosts import Call, Host, LayoutTracker, host_of
from .plan import Plan, fault_list
from .randomness import seeded

Operators = dict[str, nn.Module]
"""New modules, ready to stand at a site, by the site's path."""


def graft(model: nn.Module, plan: Plan, *, host: Host | None = None, seed: int = 0) -> "Graft":
    """Apply a plan to a model, in place, and return the record that can undo it.

    An operator's random weights depend on `seed` and its site alone, not on the rest of the plan.

    Args:
        host: how to read the model, where it is of no known class or its host has settings.

    Raises:
        PlanError: the plan does not fit; lists every fault, and the model is unchanged.
        HostError: the model belongs to no known host.
    """
    return place(model, build_operators(model, plan, host=host, seed=seed))


def build_operators(model: nn.Module, plan: Plan, *, host: Host | None = None, seed: int = 0) -> Operators:
    """The operators of a plan, built for a model that stays as it is, but for a hook that tells them its layout.

    They keep no reference to the model's parameters: what they inherit is copied. Raises as `graft`.
    """
    host = host or host_of(model)
    chosen = resolve(model, plan, host=host)
    _check_original(model, chosen)
    operators: Operators = {}
    for site, config in chosen.items():
        with seeded(seed, site.block, len(site.role)):
            operators[site.path] = _build(host, model.get_submodule(site.path), site, config)
    _track(operators, host, model)
    return operators


def resolve(model: nn.Module, plan: Plan, *, host: Host | None = None) -> dict[Site, OperatorConfig]:
    """The operator of every site that a plan edits; checks the plan against the model, whole. Raises as `graft`."""
    host = host or host_of(model)
    return plan.resolve(host.sites(model), host=f"host {host.name!r}", mixer_roles=frozenset(host.calls))


@dataclass(frozen=True)
class Graft:
    """What a graft did: the modules that it placed and those that it took out, by path."""

    model: nn.Module
    operators: Operators
    replaced: Operators

    @property
    def new_parameters(self) -> frozenset[str]:
        """Names, in the grafted model, of the parameters of its operators."""
        return frozenset(
            f"{path}.{name}"
            for path, operator in self.operators.items()
            for name, _ in operator.named_parameters()
        )

    def undo(self) -> None:
        """Put every replaced module back: the model is exactly what it was, in the mode (train, eval) that it is in."""
        for path, module in self.replaced.items():
            module.train(self.model.get_submodule(path).training)
            self.model.set_submodule(path, module)
        if LayoutTracker.of(self.model) and not any(map(_is_operator, self.model.modules())):
            host_of(self.model).untrack_layout(self.model)


def place(model: nn.Module, operators: Mapping[str, nn.Module]) -> Graft:
    """Put operators at their sites, in place. They may have been built on a copy of the model, or distilled since."""
    replaced = {path: model.get_submodule(path) for path in operators}
    for path, operator in operators.items():
        reference = next(replaced[path].parameters())
        operator.to(device=reference.device, dtype=reference.dtype).train(model.training)
        assert _is_operator(operator)
        _track({path: operator}, operator.tracker.host, model)
        model.set_submodule(path, operator)
    return Graft(model, dict(operators), replaced)


@contextmanager
def grafted(model: nn.Module, operators: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """The model with operators in place, for the duration of a `with`."""
    record = place(model, operators)
    try:
        yield model
    finally:
        record.undo()


def _check_original(model: nn.Module, chosen: Mapping[Site, OperatorConfig]) -> None:
    faults = [
        f"the {site.role} of block {site.block} already holds an operator; undo that graft first"
        for site in chosen
        if _is_operator(model.get_submodule(site.path))
    ]
    if faults:
        raise PlanError(fault_list(faults, "plan for a grafted model"))


def _build(
    host: Host, module: nn.Module, site: Site, config: OperatorConfig
) -> "KernelAttention | MixerAdapter":
    operator, tracker = config.build(site), LayoutTracker(host)
    if isinstance(operator, Kernel):
        attention = copy.deepcopy(module)
        if config.projections == "random":
            host.redraw(attention)
        return KernelAttention(attention, operator, tracker)
    if config.init == "inherit":
        weights = host.attention_weights if site.role == "attention" else host.mlp_weights
        operator.inherit(weights(module))
    return MixerAdapter(operator, host.calls[site.role], tracker)


def _track(operators: Operators, host: Host, model: nn.Module) -> None:
    for operator in operators.values():
        assert _is_operator(operator)
        operator.tracker = host.track_layout(model)


def _is_operator(module: nn.Module) -> "TypeGuard[KernelAttention | MixerAdapter]":
    return isinstance(module, KernelAttention | MixerAdapter)


class KernelAttention(nn.Module):
    """A host's attention module in which a kernel does what softmax attention did."""

    def __init__(self, attention: nn.Module, kernel: Kernel, tracker: LayoutTracker):
        super().__init__()
        self.attention = attention
        self.kernel = kernel
        self.tracker = tracker

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        calls: list[tuple[int, ...]] = []
        with _Interception(self.kernel, self.tracker, calls):
            output = self.attention(*args, **kwargs)
        if len(calls) != 1:
            raise HostError(
                f"{type(self.attention).__name__} called scaled_dot_product_attention {len(calls)} "
                "times; a kernel needs exactly one call (choose the native attention backend)"
            )
        return output


class MixerAdapter(nn.Module):
    """A mixer behind the calling convention of the module that it replaces."""

    def __init__(self, mixer: Mixer, call: Call, tracker: LayoutTracker):
        super().__init__()
        self.mixer = mixer
        self.call = call
        self.tracker = tracker

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else kwargs[self.call.tokens]
        for name in self.call.must_be_none:
            if kwargs.get(name) is not None:
                raise HostError(
                    f"the host passes {name} to its attention, and a mixer cannot honour it: use a kernel"
                )
        return self.mixer(x, self.tracker.layout)


class _Interception(TorchFunctionMode):
    """Answers `scaled_dot_product_attention` with a kernel; every other function runs as it is.

    It adds the shape of each answer to `calls`: a list of the caller's, since torch.compile forgets the
    attributes of a mode when its `with` ends.
    """

    def __init__(self, kernel: Kernel, tracker: LayoutTracker, calls: list[tuple[int, ...]]):
        super().__init__()
        self.kernel = kernel
        self.tracker = tracker
        self.calls = calls

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.unflatten:
            # written in Python with super(), which torch.compile cannot trace inside a mode; this is its native form
            return torch.unflatten(*args, **kwargs)
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        output = _answer(self.kernel, self.tracker, *args, **kwargs)
        self.calls.append(tuple(output.shape))
        return output


def _answer(
    kernel: Kernel,
    tracker: LayoutTracker,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel's output for the arguments of `scaled_dot_product_attention`."""
    if attn_mask is not None or dropout_p or is_causal:
        raise HostError(
            "the host calls scaled_dot_product_attention with a mask, dropout or is_causal, which a kernel replaces "
            f"(attn_mask {'given' if attn_mask is not None else 'None'}, dropout_p {dropout_p}, is_causal {is_causal})"
        )
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if query.shape[2] != key.shape[2] or query.shape[2] != tracker.layout.num_tokens:
        raise HostError(
            f"attention over {query.shape[2]} queries and {key.shape[2]} keys, but the model's layout is "
            f"{tracker.layout}: {tracker.layout.num_tokens} tokens"
        )
    return kernel(query, key, value, tracker.layout, scale=scale)

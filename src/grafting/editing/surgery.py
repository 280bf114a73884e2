"""The only file that changes a model: it builds operators for a plan's sites, places them, and takes them out again; and
low-rank adapters in the same way.

What it places is in `placed.py`; adapters are peft's. Where blocks are merged or dropped, all others keep their numbers. Everything is checked
and built before anything is edited, so a failed graft leaves the model as it was.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..contract import Kernel, KernelConfig, MixerConfig, OperatorConfig, Site
from ..errors import MissingBackend, PlanError
from ..hosts import Host, LayoutTracker, host_of
from ..machine.packages import install_line
from ..machine.randomness import seeded
from ..machine.reading import shown
from .adapters import adapters_of, is_of_adapter
from .placed import KernelAttention, MergedBlocks, MixerAdapter, Operators, Passage, Placed, outline
from .plan import Choice, Drop, Edit, Merge, Plan, Replace, fault_list, merged_pairs, words_of


def graft(
    model: nn.Module, plan: Plan, *, host: Host | None = None, seed: int = 0, inherit: bool = True
) -> "Graft":
    """Apply a plan to a model, in place, and return the record that can undo it.

    An operator's random weights depend on `seed` and its site alone, not on the rest of the plan.

    Args:
        host: how to read the model, where it is of no known class or its host has settings.
        inherit: without it, mixers stay as they are drawn: for those whose weights are loaded next.

    Raises:
        PlanError: the plan does not fit; lists every fault, and the model is unchanged.
        HostError: the model belongs to no known host.
    """
    return place(model, _built(model, plan, host or host_of(model), seed, inherit=inherit))


def build_operators(
    model: nn.Module, plan: Plan, *, host: Host | None = None, seed: int = 0, inherit: bool = True
) -> Operators:
    """The operators of a plan, built for a model that stays as it is, but for a hook that tells them its layout.

    They keep no reference to the model's parameters: what they inherit is copied, and can be trained where the model is
    frozen. Args and raises as `graft`.
    """
    host = host or host_of(model)
    operators = _built(model, plan, host, seed, inherit=inherit)
    host.track_layout(model).stays = True
    return operators


def _built(model: nn.Module, plan: Plan, host: Host, seed: int, *, inherit: bool = True) -> Operators:
    chosen = check_editable(model, plan, host=host, inherit=inherit)
    operators: Operators = {}
    for site, config in chosen.items():
        if isinstance(config, OperatorConfig):
            with seeded(seed, site.block, len(site.role)):
                operators[site.path] = _build(
                    host, model.get_submodule(site.path), site, config, inherit=inherit
                )
        elif isinstance(config, Drop):
            operators[site.path] = Passage(site, LayoutTracker(host))
        if site.path in operators:
            operators[site.path].choice = config
    for first, second, merge in merged_pairs(chosen):
        operators[first.path] = _merged(host, model, (first, second), merge, operators)
        operators[first.path].choice = merge
        operators[second.path] = Passage(second, LayoutTracker(host))
    for path, operator in operators.items():
        operator.read_of = operator.read_of or (outline(model.get_submodule(path)),)
    _track(operators, host, model)
    return operators


def check_editable(
    model: nn.Module, plan: Plan, *, host: Host | None = None, inherit: bool = True
) -> dict[Site, Choice]:
    """`resolve`, and whether operators can be made of what stands in the model now. Raises as `graft`."""
    _check_whole(model)
    chosen = resolve(model, plan, host=host)
    _check_original(model, chosen)
    _check_copyable(model, chosen, inherit=inherit)
    return chosen


def resolve(model: nn.Module, plan: Plan, *, host: Host | None = None) -> dict[Site, Choice]:
    """What becomes of every site that a plan edits; checks the plan against the model, whole. Raises as `graft`."""
    if not isinstance(plan, Plan):
        raise PlanError(f"a plan is grafting.Plan(edits=[...]); found {shown(plan)}")
    host = host or host_of(model)
    return plan.resolve(
        host.sites(model),
        blocks=host.blocks(model),
        host=f"host {host.name!r}",
    )


def paths_after(sites: Sequence[Site], chosen: Mapping[Site, Choice]) -> dict[Site, str]:
    """Where the modules of sites stand once `chosen` is grafted; those of dropped blocks are left out."""
    dropped = {site.block for site, edit in chosen.items() if isinstance(edit, Drop)}
    moved = {
        site.block: (f"{site.path}.", f"{pair[0].path}.branches.{branch}.")
        for *pair, _ in merged_pairs(chosen)
        for branch, site in enumerate(pair)
    }
    return {
        site: site.path.replace(*moved[site.block], 1) if site.block in moved else site.path
        for site in sites
        if site.block not in dropped
    }


@dataclass(frozen=True)
class Graft:
    """What a graft did: the modules that it placed and those that it took out, by path."""

    model: nn.Module
    operators: Operators
    replaced: dict[str, nn.Module]
    kind: tuple[torch.device, torch.dtype]
    """Of the model, when it was grafted."""
    then: Callable[[nn.Module], None] | None = None
    """Called with the model after an undo."""

    @property
    def new_parameters(self) -> frozenset[str]:
        """Names, in the grafted model, of the parameters of its operators."""
        return frozenset(
            f"{path}.{name}"
            for path, operator in self.operators.items()
            for name, _ in operator.named_parameters()
        )

    def __repr__(self) -> str:
        total = sum(p.numel() for p in self.model.parameters())
        inside = sum(p.numel() for operator in self.operators.values() for p in operator.parameters())
        more = inside - sum(p.numel() for module in self.replaced.values() for p in module.parameters())
        return "\n".join(
            [
                f"Graft of {self._model_name}, {len(self.operators)} places edited",
                *(f"  {edit}" for edit in edits_of(self.model)),
                f"  parameters: {total:,} in all ({more:+,}), {inside:,} in operators",
            ]
        )

    @property
    def _model_name(self) -> str:
        kind: type = getattr(type(self.model), "ungrafted", type(self.model))
        return kind.__name__

    def undo(self) -> None:
        """Put every replaced module back: the model is exactly what it was, in the mode (train, eval) that it is in.

        If the model moved to another device or dtype meanwhile, so do they.
        """
        device, dtype = _kind(self.model)
        for path, module in self.replaced.items():
            if (device, dtype) != self.kind:
                module.to(device=device, dtype=None if dtype == self.kind[1] else dtype)
            module.train(self.model.get_submodule(path).training)
            self.model.set_submodule(path, module)
        tracker = LayoutTracker.of(self.model)
        if tracker and not tracker.stays and not holds_operators(self.model):
            LayoutTracker.remove_from(self.model)
        if self.then is not None:
            self.then(self.model)


def place(model: nn.Module, operators: Mapping[str, Placed], *, cast: bool = True) -> Graft:
    """Put operators at their sites, in place. They may have been built on a copy of the model, or distilled since.

    Args:
        cast: give them the model's dtype, in place; without, they keep theirs, as in training.
    """
    kind, replaced = _kind(model), {path: model.get_submodule(path) for path in operators}
    for path, operator in operators.items():
        _settle(operator, path, replaced, cast=cast)
        operator.train(model.training)
        _track({path: operator}, operator.tracker.host, model)
        model.set_submodule(path, operator)
    return Graft(model, dict(operators), replaced, kind)


def _kind(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    first = next(model.parameters())
    return first.device, first.dtype


def _settle(operator: nn.Module, path: str, replaced: Mapping[str, nn.Module], *, cast: bool) -> None:
    """Give an operator the device of what it replaces, and its dtype: what it copied each its own, the rest the linears'."""
    old = replaced[path]
    if not cast:
        operator.to(next(old.parameters()).device)
        return
    weights = (module.weight for module in old.modules() if isinstance(module, nn.Linear))
    reference = next((w for w in weights if w.is_floating_point()), next(old.parameters()))
    dtypes: dict[int, torch.dtype] = {}
    for copied, module in _copies(operator, path, replaced):
        originals = dict(module.named_parameters())
        dtypes |= {id(p): originals[name].dtype for name, p in copied.named_parameters() if name in originals}

    # of a model that is made without values the operators' buffers have theirs all the same
    device = None if reference.is_meta else reference.device

    def settle(tensor: Tensor) -> Tensor:
        dtype = dtypes.get(id(tensor), reference.dtype) if tensor.is_floating_point() else None
        return tensor.to(device=device, dtype=dtype)

    operator._apply(settle)


def _copies(
    operator: nn.Module, path: str, replaced: Mapping[str, nn.Module]
) -> list[tuple[nn.Module, nn.Module]]:
    """The parts of an operator that are copies of the model's modules, and those modules."""
    if isinstance(operator, KernelAttention):
        return [(operator.attention, replaced[path])]
    if isinstance(operator, MergedBlocks):
        return [(b, replaced[p]) for b, p in zip(operator.branches, operator.replaces, strict=True)]
    return []


def edits_of(model: nn.Module) -> tuple[Edit, ...]:
    """The edits that a model holds, read off what stands in it; equal operators of a role are one edit."""
    blocks: dict[tuple[str, str], list[int]] = {}
    operators: dict[tuple[str, str], OperatorConfig] = {}
    restructured: list[Edit] = []
    for module in model.modules():
        if not isinstance(module, Placed):
            continue
        choice, site = module.choice, module.site
        if isinstance(choice, Merge | Drop):
            sites = module.sites if isinstance(module, MergedBlocks) else (site,)
            restructured.append(choice.model_copy(update={"blocks": tuple(s.block for s in sites)}))
        elif choice is not None:
            key = (site.role, choice.model_dump_json())
            operators[key] = choice
            blocks.setdefault(key, []).append(site.block)
    replaced = [
        Replace.model_validate({"role": key[0], "blocks": blocks[key], "operator": operator})
        for key, operator in operators.items()
    ]
    return (*replaced, *restructured)


@contextmanager
def grafted(model: nn.Module, operators: Mapping[str, Placed], *, cast: bool = True) -> Iterator[nn.Module]:
    """The model with operators in place, for the duration of a `with`; `cast` as in `place`."""
    record = place(model, operators, cast=cast)
    try:
        yield model
    finally:
        record.undo()


@contextmanager
def leaving_no_hook(model: nn.Module) -> Iterator[None]:
    """What operators were built for a model inside the block are not used after it: it loses the hook that they read."""
    was_tracked = LayoutTracker.of(model) is not None
    try:
        yield
    finally:
        if not was_tracked:
            LayoutTracker.remove_from(model)


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy whose parameters lie in the model's memory, until `keep_apart` gives some of them memory of their own."""
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, shared)


def keep_apart(parameters: Iterable[nn.Parameter], model: nn.Module) -> None:
    """Give those parameters memory of their own that lie in the model's, before they are trained."""
    taken = {p.untyped_storage().data_ptr() for p in model.parameters() if p.numel()}
    for parameter in parameters:
        if parameter.untyped_storage().data_ptr() in taken:
            parameter.data = parameter.data.clone()


def adapt(model: nn.Module, names: Sequence[str], *, rank: int, alpha: float) -> None:
    """Put low-rank adapters around linear layers, in place: x -> Wx + alpha / rank B(Ax), B zero at first, A and B in fp32.

    Source: arXiv:2106.09685, by peft.

    Raises:
        MissingBackend: peft is not installed.
    """
    check_can_adapt()
    from peft import LoraConfig, inject_adapter_in_model

    trained = {id(p): p.requires_grad for p in model.parameters()}
    # peft's annotation says int, its arithmetic is of floats
    settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha}
    exactly = "|".join(map(re.escape, names))
    inject_adapter_in_model(LoraConfig(**settings, target_modules=exactly), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained.get(id(parameter), True))
        if is_of_adapter(name):
            parameter.data = parameter.data.float()


def can_adapt() -> bool:
    """Whether peft is installed, which makes low-rank adapters."""
    return find_spec("peft") is not None


def check_can_adapt() -> None:
    """Raises a MissingBackend if peft is not installed."""
    if not can_adapt():
        raise MissingBackend(f"lora needs peft: {install_line('peft')}")


def merge_adapters(model: nn.Module) -> None:
    """Take a model's adapters out, in place, and add what they learned to the weights, which get memory of their own."""
    for path, adapter in adapters_of(model).items():
        adapter.base.weight.data = adapter.merged()
        model.set_submodule(path, adapter.base)
    if hasattr(model, "peft_config"):
        del model.peft_config


def _check_whole(model: nn.Module) -> None:
    """A plan's block numbers are those of the model as it was, so there is one restructuring at a time."""
    if any(isinstance(module, MergedBlocks | Passage) for module in model.modules()):
        raise PlanError(
            "the model has merged or dropped blocks, and a plan counts those of the model as it was: undo that graft "
            "first, or put all edits into one plan"
        )


def _check_original(model: nn.Module, chosen: Mapping[Site, Choice]) -> None:
    faults = [
        f"{words_of(site)} already holds an operator; undo that graft first"
        for site in chosen
        if holds_operators(model.get_submodule(site.path))
    ]
    if faults:
        raise PlanError(fault_list(faults, "plan for a grafted model"))


def _check_copyable(model: nn.Module, chosen: Mapping[Site, Choice], *, inherit: bool) -> None:
    """An operator is made of what it replaces, so that has to be there, as plain numbers."""
    faults = []
    for site, choice in chosen.items():
        module = model.get_submodule(site.path)
        hooks = {type(part._hf_hook).__name__ for part in module.modules() if hasattr(part, "_hf_hook")}
        hooks |= {name for part in module.modules() for name in _hooks_of_diffusers(part)}
        if hooks:
            faults.append(
                f"{words_of(site)} is offloaded or cast by hooks ({', '.join(sorted(hooks))}), which a graft cannot copy: "
                "graft first, then offload or cast"
            )
        verb = ""
        if isinstance(choice, MixerConfig) and choice.init == "inherit" and inherit:
            verb = f"{choice.name} cannot inherit"
        elif isinstance(choice, KernelConfig) and choice.projections == "random":
            verb = f"{choice.name} cannot draw again"
        if verb and (found := _not_plain(module)):
            faults.append(f"{words_of(site)} holds {found}, which {verb}: graft first")
    if faults:
        raise PlanError(fault_list(faults, "plan for this model"))


def _hooks_of_diffusers(module: nn.Module) -> list[str]:
    registry: Any = getattr(module, "_diffusers_hook", None)
    return [] if registry is None else list(registry.hooks)


def _not_plain(module: nn.Module) -> str:
    """What other than plain weights is in a module; empty if nothing is."""
    if any(hasattr(part, "base_layer") for part in module.modules()):
        return "linears with adapters"
    for name, parameter in module.named_parameters():
        kind = type(parameter.data)
        if kind.__module__.partition(".")[0] != "torch" or not parameter.is_floating_point():
            return f"quantised weights ({name} is a {kind.__name__} of {str(parameter.dtype).removeprefix('torch.')})"
    return ""


def _build(
    host: Host, module: nn.Module, site: Site, config: OperatorConfig, *, inherit: bool
) -> KernelAttention | MixerAdapter:
    operator, tracker = config.build(site), LayoutTracker(host)
    if isinstance(operator, Kernel):
        assert isinstance(config, KernelConfig)
        attention = _own_copy(module)
        if config.projections == "random":
            host.redraw(attention)
        return KernelAttention(attention, operator, site=site, tracker=tracker)
    assert isinstance(config, MixerConfig)
    if inherit and config.init == "inherit":
        weights = host.attention_weights if site.role == "attention" else host.mlp_weights
        operator.inherit(weights(module))
    return MixerAdapter(operator, site=site, tracker=tracker)


def _merged(
    host: Host, model: nn.Module, pair: tuple[Site, Site], merge: Merge, operators: Operators
) -> MergedBlocks:
    """The pair as one module; the operators of its blocks move from `operators` into it."""
    blocks = [_own_copy(model.get_submodule(site.path)) for site in pair]
    for site, block in zip(pair, blocks, strict=True):
        prefix = f"{site.path}."
        for path in [path for path in operators if path.startswith(prefix)]:
            block.set_submodule(path.removeprefix(prefix), operators.pop(path))
    call = pair[0].call
    assert call is not None
    return MergedBlocks(
        host.branches(blocks, call),
        merge,
        sites=pair,
        tracker=LayoutTracker(host),
    )


def _own_copy(module: nn.Module) -> nn.Module:
    """A copy that can be trained, though the module may be frozen, as teachers are; in a part of it what is fixed stays so."""
    copied = copy.deepcopy(module)
    is_frozen = not any(parameter.requires_grad for parameter in copied.parameters())
    for parameter in copied.parameters():
        if is_frozen and parameter.is_floating_point():
            parameter.requires_grad_()
    return copied


def _track(operators: Operators, host: Host, model: nn.Module) -> None:
    for module in (module for operator in operators.values() for module in operator.modules()):
        if isinstance(module, Placed):
            module.tracker = host.track_layout(model)


def holds_operators(module: nn.Module) -> bool:
    """Whether a module is one that surgery placed, or has one within."""
    return any(isinstance(part, Placed) for part in module.modules())

"""Equal sites as one: an operator with stacked parameters answers the calls of them all, after the teacher's pass.

Where sites are so small that launching their operations takes the time, this launches them once instead of once a site.
"""

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call, vmap
from torch.utils import _pytree

from ..contract import Kwargs, OperatorConfig
from ..editing.placed import KernelAttention, MixerAdapter, Placed
from ..errors import TrainingError
from .activations import Source

Learn = Callable[[Sequence[str], Tensor], None]
"""Takes the paths of n sites and their losses [n], with their graphs."""


@runtime_checkable
class Fitted(Protocol):
    """A site whose operator is fitted."""

    operator: Placed

    def loss(self, output: Any, target: Any) -> Tensor: ...


class _Call(NamedTuple):
    """What a site was called with and what came out, as a list, and how that is put together."""

    leaves: list[Any]
    tree: _pytree.TreeSpec
    versions: list[int]


class Stacks:
    """Sites by kind, and their calls while they wait for the end of a pass."""

    def __init__(self, sites: Mapping[str, Fitted]):
        self._sites = sites
        self._kinds = {path: kind_of(path, site.operator) for path, site in sites.items()}
        self._calls: dict[str, _Call] = {}

    def visit(self, source: Source, step: int, learn: Learn) -> None:
        """Visit a step's calls, and have the losses of equal sites learned from together, after each micro-batch.

        Raises:
            TrainingError: the model changes a call's tensors later in its pass, or an operator cannot be computed in this way.
        """

        def hold(path: str, args: tuple, kwargs: Kwargs, target: Any) -> None:
            if path in self._calls:  # the next micro-batch
                self._answer(learn)
            leaves, tree = _pytree.tree_flatten((args, kwargs, target))
            self._calls[path] = _Call(leaves, tree, _versions(leaves))

        source.visit(step, hold)
        self._answer(learn)

    def _answer(self, learn: Learn) -> None:
        groups: dict[Hashable, list[str]] = {}
        for path, call in self._calls.items():
            if _versions(call.leaves) != call.versions:
                raise TrainingError(
                    f"distill.stacked: the model changes what {path} was called with later in its pass: set stacked: false"
                )
            form = self._kinds[path], repr(call.tree), tuple(map(_form, call.leaves))
            groups.setdefault(form, []).append(path)
        for paths in groups.values():
            calls = [self._calls.pop(path) for path in paths]
            try:
                with torch.enable_grad(), warnings.catch_warnings():
                    # torch has no rule for its own attention on a CPU, and calls it site by site
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    learn(paths, _losses([self._sites[path] for path in paths], calls))
            except RuntimeError as error:
                if len(paths) == 1 or isinstance(error, torch.OutOfMemoryError):
                    raise
                raise TrainingError(
                    f"distill.stacked: {_name(self._sites[paths[0]].operator)} at {paths[0]} and {len(paths) - 1} more sites "
                    "cannot be computed as one: set stacked: false"
                ) from error


def _losses(sites: Sequence[Fitted], calls: Sequence[_Call]) -> Float[Tensor, " n"]:
    """Losses of equal sites; their gradients reach each site's own parameters."""
    first, tree = sites[0], calls[0].tree

    def loss(tensors: dict[str, Tensor], leaves: list[Any]) -> Tensor:
        args, kwargs, target = _pytree.tree_unflatten(leaves, tree)
        return first.loss(functional_call(first.operator, tensors, args, kwargs), target)

    named = [_tensors(site.operator) for site in sites]
    if len(sites) == 1:
        return loss(named[0], calls[0].leaves)[None]
    tensors = {name: torch.stack([each[name] for each in named]) for name in named[0]}
    joined = [_joined(several) for several in zip(*(call.leaves for call in calls), strict=True)]
    axes = [0 if is_stacked else None for _, is_stacked in joined]
    return vmap(loss, in_dims=(0, axes), randomness="different")(tensors, [leaf for leaf, _ in joined])


def kind_of(path: str, operator: Placed) -> Hashable:
    """A key that equal sites share. A merged pair of blocks has a key of its own, its path."""
    if not isinstance(operator, KernelAttention | MixerAdapter):
        return path
    form = tuple((name, *_form(tensor)) for name, tensor in _tensors(operator).items())
    return type(operator), repr(operator.choice), replace(operator.site, path="", block=0), form


def _name(operator: Placed) -> str:
    choice = operator.choice
    return choice.name if isinstance(choice, OperatorConfig) else type(operator).__name__


def _tensors(operator: Placed) -> dict[str, Tensor]:
    return dict(operator.named_parameters()) | dict(operator.named_buffers())


def _form(leaf: Any) -> tuple:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad
    return (leaf,) if isinstance(leaf, Hashable) else (id(leaf),)


def _versions(leaves: Sequence[Any]) -> list[int]:
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]


def _joined(several: Sequence[Any]) -> tuple[Any, bool]:
    """The same argument of several calls, and whether it is stacked: what is one for all stays so."""
    first = several[0]
    if not isinstance(first, Tensor) or all(leaf is first for leaf in several):
        return first, False
    return torch.stack(list(several)), True

"""The parameters that stage 2 trains: chosen by what a phase says, and all of a model that a state holds."""

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..editing.placed import Placed
from ..editing.surgery import adapt, check_can_adapt
from ..errors import CheckpointError, TrainingError, listed
from ..hosts import host_of
from ..machine.devices import half_types
from ..machine.randomness import seeded
from .phases import FinetuneConfig, LoraSettings

# of targets: roles of sites, which a plan may have edited in full
_WORDS = frozenset({"attention", "mlp"})

# tells the adapters' random numbers from those of steps
_ADAPTERS = 5


def operator_parameters(model: nn.Module) -> frozenset[str]:
    """Names of the parameters of all operators that stand in a model."""
    paths = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, Placed))
    return frozenset(name for name, _ in model.named_parameters() if name.startswith(paths))


def _named_in(
    config: FinetuneConfig, candidates: Mapping[str, nn.Parameter], new: frozenset[str]
) -> dict[str, nn.Parameter]:
    """The parameters that are trained as they are; adapters are other ones."""
    if config.trainable == "all":
        return dict(candidates)
    patterns = [part for part in config.parts if isinstance(part, str) and part != "new"]
    takes_new = "new" in config.parts
    return {
        name: parameter
        for name, parameter in candidates.items()
        if (takes_new and name in new) or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    }


def _lora_targets(
    model: nn.Module, lora: LoraSettings, taken: Mapping[str, nn.Parameter]
) -> dict[str, nn.Linear]:
    """The linear layers that get an adapter, by path; not those whose weight is trained itself."""
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    found: dict[str, nn.Linear] = {}
    for target in lora.targets:
        sites = _plain_sites(model, target) if target in _WORDS else None
        named = {
            p: m
            for p, m in linears.items()
            if (fnmatch.fnmatch(p, target) if sites is None else p.startswith(sites))
        }
        if not named and target not in _WORDS:
            raise TrainingError(
                f"lora.targets: {target!r} names none of the model's {len(linears)} linear layers, such as "
                f"{next(iter(linears), 'none')}"
            )
        found |= {path: module for path, module in named.items() if f"{path}.weight" not in taken}
    if not found:
        raise TrainingError(
            f"lora.targets: {', '.join(lora.targets)} names no linear layer that is not trained itself: leave lora out"
        )
    return found


def _plain_sites(model: nn.Module, role: str) -> tuple[str, ...]:
    """How the names of what is in a role's sites begin, where they hold no operator."""
    operators = [f"{path}." for path, module in model.named_modules() if isinstance(module, Placed)]
    prefixes = [f"{site.path}." for site in host_of(model).sites(model) if site.role == role]
    return tuple(p for p in prefixes if not p.startswith(tuple(operators)))


@dataclass(frozen=True)
class Selection:
    """What a phase trains of a model: parameters by name, and the linear layers that get an adapter by path."""

    parameters: Mapping[str, nn.Parameter]
    adapted: Mapping[str, nn.Linear]

    @property
    def changed(self) -> list[nn.Parameter]:
        """What the phase leaves changed, once its adapters are merged."""
        weights = [linear.get_parameter("weight") for linear in self.adapted.values()]
        return [*self.parameters.values(), *weights]


def selection(
    model: nn.Module, candidates: Mapping[str, nn.Parameter], config: FinetuneConfig, new: frozenset[str]
) -> Selection:
    """What a phase trains; the model is unchanged.

    Args:
        candidates: the model's parameters that may be trained, by name; others (such as positions) stay fixed.
        new: names of those of operators.

    Raises:
        TrainingError: nothing is selected, or weights in half precision. MissingBackend: peft is not installed.
    """
    parameters = _named_in(config, candidates, new)
    if not parameters and (config.lora is None or "new" in config.parts):
        raise TrainingError(
            f"trainable: {config.trained_in_words} selects none of the model's {len(candidates)} parameters, "
            f"such as {next(iter(candidates), 'none')}"
        )
    if half := half_types(parameters.values()):
        raise TrainingError(
            f"stage 2: the weights to train are {half}, in which most of an optimizer's steps round "
            "away: call model.float() first; with precision: bf16 it is computed in bf16 all the same"
        )
    if config.lora is None:
        return Selection(parameters, {})
    check_can_adapt()
    return Selection(parameters, _lora_targets(model, config.lora, parameters))


def selections(
    model: nn.Module, phases: Iterable[FinetuneConfig], new: frozenset[str]
) -> tuple[dict[str, nn.Parameter], list[Selection]]:
    """The parameters that may be trained, by name, and what each phase trains; raises as `selection`."""
    candidates = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return candidates, [selection(model, candidates, phase, new) for phase in phases]


def mark(
    model: nn.Module,
    candidates: Mapping[str, nn.Parameter],
    selected: Selection,
    config: FinetuneConfig,
    *,
    first: int,
) -> list[nn.Parameter]:
    """Set what is trained, with adapters put in their places; all that is trained, in the model's order.

    Args:
        first: steps before this phase, which with the seed give the adapters' random weights.
    """
    for name, parameter in candidates.items():
        parameter.requires_grad_(name in selected.parameters)
    if config.lora is not None:
        alpha = config.lora.rank * config.lora.scale
        with seeded(config.seed, first, _ADAPTERS):
            adapt(model, list(selected.adapted), rank=config.lora.rank, alpha=alpha)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Trained:
    """Parameters by name: those that training has changed so far, which are all of a model that a state holds.

    A state of before, which holds the whole model, is read too.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        self.parameters = dict(parameters)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        faults = [
            f"missing tensor {name}" if name not in state else f"{name} has another shape"
            for name, parameter in self.parameters.items()
            if name not in state or state[name].shape != parameter.shape
        ]
        if faults:
            raise CheckpointError(listed("stage 2's saved state is of another model", faults, most=12))
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name])


def names_of(parameters: Iterable[nn.Parameter], model: nn.Module) -> list[str]:
    """Names of parameters in their model."""
    wanted = {id(parameter) for parameter in parameters}
    return [name for name, parameter in model.named_parameters() if id(parameter) in wanted]

"""Before stage 1: what of an operator can be fitted in closed form, on the teacher's streamed activations.

An operator's output layer, its last linear, is refitted by least squares so that what the operator gives comes closest to
what the replaced module gave. Before that, an MLP narrower than the host's takes the neurons that were measured to matter.
One or two passes of the teacher over noised images, no gradient, nothing on disk: each site keeps sums, not activations.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ..contract import Denoiser, Kwargs, MlpWeights, NeuronMixer, Step
from ..editing.placed import KernelAttention, MixerAdapter, Placed
from ..errors import TrainingError
from ..functional.ridge import (
    error_removed,
    error_without,
    hardest_to_replace,
    moments,
    most_varying,
    ridge_correction,
    with_ones,
)
from ..hosts import host_of
from ..machine.precision import FP32_IS_ABSENT, Precision, settled
from ..machine.settings import Settings
from .activations import Repeatable, Visited
from .guard import check_weights
from .supply import Data, supply_of


class CalibrateConfig(Settings):
    """Settings of the closed-form start."""

    hashed_as_absent: ClassVar = FP32_IS_ABSENT

    samples: PositiveInt = 1024
    """Noised images in each pass. More than the data holds: images come again, with other noise."""
    batch_size: PositiveInt = 64
    ridge: PositiveFloat = 1e-4
    """Pull of an output layer towards the weights that it has, as a share of the variance of its inputs."""
    precision: Precision = "auto"
    """Of the teacher and the operators, bf16 or fp32, `auto` the faster; sums and solutions are always float64."""
    seed: NonNegativeInt = 0
    """With stage 1's seed, images that stage 1 holds out are used last."""


def calibrate(
    teacher: nn.Module,
    operators: Mapping[str, Placed],
    data: Data,
    config: CalibrateConfig,
    *,
    denoiser: Denoiser | None = None,
) -> Iterator[Step]:
    """Fit what has a closed form in `operators` (by site path, built for `teacher`), in place. The teacher is unchanged.

    Operators without an output layer of their own start as they are. The last step's values are `fit_r2_before/PATH` and
    `fit_r2/PATH` of the others: 1 minus the squared error over the variance of the teacher's output, on the images of the fit itself,
    where stage 1's `r2/PATH` is on held-out ones.

    Args:
        denoiser: how the teacher is called, its process and its conditions, which are dropped in their share; by
            default its host's.
    """
    config = settled(config, next(teacher.parameters()).device)
    visited = Visited(teacher, operators, denoiser or host_of(teacher).denoiser(teacher), config.precision)
    check_weights(teacher, "calibration")
    visited.prepare("calibration")
    # neurons first: output layers are refitted to those that were chosen
    passes = [sites for sites in (_neuron_choices(teacher, operators), _output_fits(operators)) if sites]
    supply = supply_of(
        data, visited.denoiser, teacher=teacher, device=visited.device, precision=config.precision
    )
    num_batches = math.ceil(config.samples / config.batch_size)
    for module in (teacher, *operators.values()):
        module.eval()
    for number, sites in enumerate(passes):
        stream = (number, 3)
        feed = supply.fixed(config.samples, batch_size=config.batch_size, seed=config.seed, stream=stream)
        source = Repeatable(visited, feed, (config.seed, *stream), paths=tuple(sites))
        for batch in range(num_batches):
            source.visit(batch, partial(_add, sites))
            yield Step(
                done=number * num_batches + batch + 1,
                total=len(passes) * num_batches,
                values=_finish(sites, config) if batch + 1 == num_batches else {},
            )


class _NeuronChoice:
    """The host's hidden activations at the site of a narrower MLP, as sums, and the neurons that it takes by them."""

    def __init__(self, tokens: str, mixer: NeuronMixer, weights: MlpWeights):
        self.tokens, self.mixer, self.weights = tokens, mixer, weights
        self.gram = torch.zeros(())

    def add(self, args: tuple, kwargs: Kwargs, output: Tensor) -> None:
        x = args[0] if args else kwargs[self.tokens]
        rows = with_ones(self.weights.activation(F.linear(x, *self.weights.up)).flatten(0, -2))
        self.gram = self.gram.to(rows) + rows.T @ rows

    def finish(self, config: CalibrateConfig) -> dict[str, float]:
        """Of two choices take the one whose other neurons a refitted output layer misses less."""
        covariance, _ = moments(self.gram)
        down, num = self.weights.down[0].double(), self.mixer.num_inherited_neurons
        choices = [choose(covariance, down, num=num) for choose in (most_varying, hardest_to_replace)]
        best = min(choices, key=lambda kept: error_without(covariance, down, kept))
        self.mixer.inherit_neurons(self.weights, best)
        return {}


class _OutputFit:
    """Sums over an output layer's inputs and residuals at its site, and the best layer by them."""

    def __init__(self, path: str, operator: nn.Module, layer: nn.Linear):
        self.path, self.operator, self.layer = path, operator, layer
        self.gram = self.cross = torch.zeros(())
        self.target_sum = self.target_square = self.error = torch.zeros(())

    def add(self, args: tuple, kwargs: Kwargs, output: Tensor) -> None:
        given: list[Tensor] = []
        with self.layer.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0])):
            residual = output.double() - self.operator(*args, **kwargs).double()
        (h,) = given
        rows, residual = with_ones(h.flatten(0, -2)), residual.flatten(0, -2)
        self.gram = self.gram.to(rows) + rows.T @ rows
        self.cross = self.cross.to(rows) + rows.T @ residual
        self.error = self.error.to(rows) + residual.square().sum()
        self.target_sum = self.target_sum.to(rows) + output.double().flatten(0, -2).sum(0)
        self.target_square = self.target_square.to(rows) + output.double().square().sum()

    def finish(self, config: CalibrateConfig) -> dict[str, float]:
        error = self.error.item()
        if not math.isfinite(error):
            raise TrainingError(
                f"calibration, {self.path}: the teacher's activations, or the operator's output, are not finite: use precision: "
                "fp32"
            )
        variance = (self.target_square - self.target_sum.square().sum() / self.gram[-1, -1]).item()
        if self.layer.bias is None:
            # features that seem to have no mean leave nothing to a bias
            self.gram[-1, :-1] = self.gram[:-1, -1] = self.cross[-1] = 0
        weight, bias = correction = ridge_correction(self.gram, self.cross, strength=config.ridge)
        self.layer.weight.add_(weight.to(self.layer.weight))
        if self.layer.bias is not None:
            self.layer.bias.add_(bias.to(self.layer.bias))
        left = error - error_removed(self.gram, self.cross, correction)
        variance = max(variance, 1e-30)
        return {
            f"fit_r2_before/{self.path}": 1 - error / variance,
            f"fit_r2/{self.path}": 1 - left / variance,
        }


_Sites = dict[str, _NeuronChoice] | dict[str, _OutputFit]


def _neuron_choices(teacher: nn.Module, operators: Mapping[str, Placed]) -> dict[str, _NeuronChoice]:
    """The sites whose operators took some of the host's neurons, but not all."""
    sites = {}
    for path, operator in operators.items():
        if not isinstance(operator, MixerAdapter) or not isinstance(mixer := operator.mixer, NeuronMixer):
            continue
        if mixer.num_inherited_neurons:
            weights = operator.tracker.host.mlp_weights(teacher.get_submodule(path))
            if mixer.num_inherited_neurons < len(weights.up[0]):
                sites[path] = _NeuronChoice(operator.call.tokens, mixer, weights)
    return sites


def _output_fits(operators: Mapping[str, Placed]) -> dict[str, _OutputFit]:
    """The sites whose operators have an output layer."""
    layers = {path: _output_layer(operator) for path, operator in operators.items()}
    return {
        path: _OutputFit(path, operators[path], layer) for path, layer in layers.items() if layer is not None
    }


def _output_layer(operator: nn.Module) -> nn.Linear | None:
    if isinstance(operator, KernelAttention):
        return operator.tracker.host.output_layer(operator.attention)
    return operator.mixer.output_layer if isinstance(operator, MixerAdapter) else None


def _add(sites: _Sites, path: str, args: tuple, kwargs: Kwargs, output: Any) -> None:
    sites[path].add(args, kwargs, output)


@torch.no_grad()
def _finish(sites: _Sites, config: CalibrateConfig) -> dict[str, float]:
    """Fit site by site; each one's sums are freed before the next."""
    values: dict[str, float] = {}
    while sites:
        values |= sites.pop(next(iter(sites))).finish(config)
    return values

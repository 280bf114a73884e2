"""Sampling: a model's process run back from noise, with or without guidance, under the conditions that are asked for.

Yields batches; saving and measuring them is the caller's business. Condition and noise of image i come from (seed, i)
alone, so a set of images may be drawn in batches of any size and by any number of processes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from pydantic import (
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    model_serializer,
    model_validator,
)
from torch import Tensor, nn

from ..contract import Conditions, Denoiser
from ..errors import HostError, ProtocolError, listed
from ..functional.pixels import to_uint8
from ..hosts import evaluating, host_of
from ..machine.compiling import compiled
from ..machine.precision import FP32_IS_ABSENT, Precision, settled
from ..machine.randomness import generator
from ..machine.settings import Settings
from .guidance import Guidance, Length

CIRCUMSTANCES = frozenset({"batch_size", "compile"})
"""Settings of sampling that say how fast it runs, not what comes out."""

_LABEL_STREAM = 3  # keeps the draw of a label apart from the noise of the same (seed, i)


class ChainConfig(Settings):
    """Settings of a model's run from noise, whatever it is drawn for. The defaults are DiT's."""

    _absent_by_default: ClassVar[frozenset[str]] = frozenset({"cfg_rescale", "negative", "shape"})
    """Fields that protocols and records leave out at their defaults: those written before had none of them."""

    sampler: Literal["ddpm", "ddim", "dpm-solver++", "euler", "heun"] = "ddpm"
    """Sampler. Predicted noise: `ddpm` is ancestral, with the predicted variance; `ddim` (eta 0) and `dpm-solver++` add no
    noise. Flow: `euler`, `heun` (two calls of the model per step) or `dpm-solver++`."""
    steps: Annotated[PositiveInt, Field(le=1000)] = 250
    """Steps per image; those of predicted noise are spread evenly over the 1,000 of training (at most 999 for
    `dpm-solver++`)."""
    cfg_scale: FiniteFloat = 1.5
    """Guidance scale, of null + cfg_scale * (conditional - null). 1 = off: the null half is not computed."""
    cfg_interval: Annotated[tuple[float, float], Field(examples=[(0.0, 0.7)])] = (0.0, 1.0)
    """Interval in which guidance is on: two shares of the way from clean (0) to pure noise (1)."""
    guided_channels: PositiveInt | None = None
    """Number of leading channels to guide (3 of 4 in DiT's published protocol); all if omitted."""
    cfg_rescale: Annotated[float, Field(ge=0, le=1)] | Length = 0.0
    """Rescaling of a guided prediction to the spread of the conditional one (arXiv:2305.08891), from 0 (off) to 1; `norm`
    rescales it to the conditional one's length at every place, `norm-2x2` in every square of 2 x 2 places (Qwen-Image),
    `norm-rows` in every row of every channel (Lumina 2)."""
    negative: NonNegativeInt | None = None
    """Number of the condition to guide away from; the null one if omitted."""
    shape: Annotated[tuple[PositiveInt, ...] | None, Field(examples=[(4, 32, 32)])] = None
    """Shape of one sample as the model makes it: channels, frames of a video, height, width. If omitted, that of the recipe's
    data, else the model's native one."""
    clip: bool = False
    """Clip the predicted clean image to [-1, 1] at each step: for models of pixels, not of latents."""

    @model_validator(mode="after")
    def _check(self) -> "ChainConfig":
        low, high = self.cfg_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"cfg_interval is [low, high] with 0 <= low <= high <= 1; found [{low}, {high}]")
        return self

    @model_serializer(mode="wrap")
    def _without_absent(self, to_dict: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        absent = {
            n for n in self._absent_by_default if getattr(self, n) == type(self).model_fields[n].default
        }
        return {name: value for name, value in to_dict(self).items() if name not in absent}

    @property
    def calls(self) -> int:
        """Calls of the model per image, those for guidance not counted."""
        return 2 * self.steps - 1 if self.sampler == "heun" else self.steps

    @property
    def guidance(self) -> Guidance | None:
        """Guidance as an object; None where it is off."""
        if self.cfg_scale == 1:
            return None
        return Guidance(
            scale=self.cfg_scale,
            interval=self.cfg_interval,
            channels=self.guided_channels,
            negative=self.negative,
            rescale=self.cfg_rescale,
        )


class SamplingConfig(ChainConfig):
    """Settings for sampling images. The defaults are DiT's, except for the number of images."""

    hashed_as_absent: ClassVar = FP32_IS_ABSENT

    num_images: PositiveInt = 64
    """Number of images to draw; they are numbered from 0."""
    batch_size: PositiveInt = 64
    """Images per batch; changes speed and memory, not the images (up to float rounding)."""
    seed: NonNegativeInt = 0
    """Random seed; image i depends on (seed, i) and its label alone."""
    labels: Annotated[
        Literal["balanced", "random"] | Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)],
        Field(examples=[(3, 5)]),
    ] = "balanced"
    """Condition of image i, by number (a class, or a row of the prompts): `balanced` is i mod their count, `random` is drawn
    from (seed, i), a list such as 3,5 is repeated."""
    precision: Precision = "auto"
    """Precision of the model's forward pass: fp32, bf16 (by autocast) or auto (bf16 where it is faster). The samplers'
    arithmetic is always fp32."""
    compile: bool = False
    """Compile each block, once for all blocks of a kind; changes speed, not the images (up to float rounding)."""

    @property
    def labels_rule(self) -> str:
        """Rule that gives image i its class."""
        if self.labels == "balanced":
            return "i mod number of classes"
        if self.labels == "random":
            return "uniform, from (seed, i)"
        return f"given, in turn: {', '.join(map(str, self.labels))}"


@dataclass(frozen=True)
class Batch:
    """Samples x of the images `indices`, as the model makes them: pixels about in [-1, 1], or latents.

    `labels` are the numbers of their conditions.
    """

    indices: tuple[int, ...]
    labels: Int[Tensor, " b"]
    x: Float[Tensor, " b *shape"]

    def images(self) -> UInt8[Tensor, " b *shape"]:
        """The samples of a model of pixels as 8-bit pixels."""
        return to_uint8(self.x)


def sample(
    model: nn.Module,
    config: SamplingConfig,
    *,
    denoiser: Denoiser | None = None,
    shape: tuple[int, ...] | None = None,
    indices: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Images drawn from a model, batch by batch; while a batch is drawn the model is in eval mode.

    Args:
        denoiser: how the model is called, its process and its conditions; by default its host's.
        shape: of a sample, [c, h, w] or [c, frames, h, w]; by default the model's native one. `config.shape` goes before it.
        indices: numbers of the images to draw (a process's share, or those missing); all when None.

    Raises:
        ProtocolError: the model cannot be sampled in this way; raised at the call, before any work.
    """
    how, size = (
        denoiser or host_of(model).denoiser(model),
        config.shape or shape or host_of(model).shape(model),
    )
    check_sampling(config, denoiser=how, channels=size[0])
    config = settled(config, next(model.parameters()).device)
    numbers = tuple(range(config.num_images) if indices is None else indices)
    regions = _regions(model) if config.compile else {}
    if numbers and min(numbers) < 0:
        raise ProtocolError(f"image numbers start at 0; found {min(numbers)}")

    def batches() -> Iterator[Batch]:
        for start in range(0, len(numbers), config.batch_size):
            chosen = numbers[start : start + config.batch_size]
            labels = labels_of(chosen, config, count=len(how.conditions))
            with compiled(regions, dynamic=False):
                x = _draw(model, config, how, shape=size, indices=chosen, labels=labels)
            yield Batch(chosen, labels, x)

    return batches()


def _regions(model: nn.Module) -> dict[str, nn.Module]:
    """What is compiled by itself: blocks, or the whole of a model of which none are known."""
    try:
        blocks = host_of(model).blocks(model)
    except HostError:
        blocks = ()
    return {block.path: model.get_submodule(block.path) for block in blocks} or {"the model": model}


def check_sampling(config: ChainConfig, *, denoiser: Denoiser, channels: int | None = None) -> None:
    """Raises a ProtocolError that lists why such a model cannot be sampled in this way, if it cannot.

    Args:
        channels: of a sample; None if not known yet, then `guided_channels` is not checked.
    """
    conditions = denoiser.conditions
    faults = denoiser.process.sampling_faults(config.sampler, steps=config.steps, clip=config.clip)
    if config.sampler not in denoiser.process.samplers and "sampler" not in config.model_fields_set:
        faults[0] += f"; {config.sampler} is the default: name one of these"
    if config.guidance is not None and config.negative is None and _has_no_null(conditions):
        faults.append(
            f"cfg_scale is {config.cfg_scale:g}, but the model has no null label or prompt to lead away from (it was trained "
            "without one, or distilled): set cfg_scale to 1"
        )
    if channels is not None and config.guided_channels is not None and config.guided_channels > channels:
        faults.append(f"guided_channels is {config.guided_channels}, but images have {channels} channels")
    labels = config.labels if isinstance(config, SamplingConfig) else ()
    asked = labels if isinstance(labels, tuple) else ()
    for name, numbers in (
        ("labels", asked),
        ("negative", () if config.negative is None else (config.negative,)),
    ):
        unknown = sorted({number for number in numbers if number >= len(conditions)})
        if unknown:
            faults.append(f"{name} {unknown} are out of range: conditions are 0..{len(conditions) - 1}")
    if faults:
        raise ProtocolError(listed("these samples cannot be drawn:", faults))


def _has_no_null(conditions: Conditions) -> bool:
    return conditions.nulls(torch.tensor([0])) is None


def labels_of(indices: Sequence[int], config: SamplingConfig, *, count: int) -> Int[Tensor, " b"]:
    """The number of each image's condition, of `count`."""
    if config.labels == "balanced":
        labels = [i % count for i in indices]
    elif config.labels == "random":
        streams = [generator(config.seed, i, _LABEL_STREAM) for i in indices]
        labels = [int(torch.randint(count, (), generator=stream)) for stream in streams]
    else:
        labels = [config.labels[i % len(config.labels)] for i in indices]
    return torch.tensor(labels, dtype=torch.int64)


@torch.no_grad()
def _draw(
    model: nn.Module,
    config: SamplingConfig,
    denoiser: Denoiser,
    *,
    shape: tuple[int, ...],
    indices: Sequence[int],
    labels: Tensor,
) -> Float[Tensor, " b *shape"]:
    """One batch, on the CPU."""
    device = next(model.parameters()).device
    streams = [generator(config.seed, i) for i in indices]
    states = visits(model, config, denoiser, shape=shape, numbers=labels, streams=streams)
    with evaluating(model), torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        for state in states:
            x = state.after
    return x.cpu()


class Visit(NamedTuple):
    """A state that a sampler visits, [B, ...]: x at a step, what the model predicts there without guidance, x's successor."""

    step: int | float
    x: Tensor
    prediction: Tensor
    after: Tensor


def visits(
    model: nn.Module,
    config: ChainConfig,
    denoiser: Denoiser,
    *,
    shape: tuple[int, ...],
    numbers: Int[Tensor, " b"],
    streams: Sequence[torch.Generator],
) -> Iterator[Visit]:
    """The states that a sampler visits from noise on, one each time that the iterator is asked; the last's successors are samples.

    Mode, precision and gradients of the model are the caller's.

    Args:
        numbers: of the conditions.
        streams: a fresh generator for each sample, of its first noise and of what the sampler adds.
    """
    x = _initial_noise(streams, shape).to(next(model.parameters()).device)
    chain = denoiser.process.at(shape).chain(
        config.sampler, steps=config.steps, clip=config.clip, streams=list(streams)
    )
    asked = _Asked(model, denoiser, numbers, config.guidance)
    for step, update in chain:
        prediction, guided = asked.predictions(x, step=step)
        after = update(guided.float(), x)
        yield Visit(step, x, prediction, after)
        x = after


def _initial_noise(streams: Sequence[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    return torch.stack([torch.randn(shape, generator=stream) for stream in streams])


class _Asked:
    """A model that is asked again and again under a batch's conditions, which are read and brought to its device once."""

    def __init__(self, model: nn.Module, denoiser: Denoiser, labels: Tensor, guidance: Guidance | None):
        self.model, self.denoiser, self.labels, self.guidance = model, denoiser, labels, guidance
        self._known: dict[bool, Any] = {}

    def predictions(self, x: Float[Tensor, "b c *hw"], *, step: int | float) -> tuple[Tensor, Tensor]:
        """The model's prediction of c or 2c channels, and the same guided where guidance is on; both halves are one batch."""
        guidance, denoiser = self.guidance, self.denoiser
        t = torch.full((len(x),), step, device=x.device)
        if guidance is None or not guidance.is_on(denoiser.process.share_of(step)):
            own = denoiser.predict(self.model, x, t, self._condition(x, is_guided=False))
            return own, own
        condition = self._condition(x, is_guided=True)
        own, null = denoiser.predict(self.model, torch.cat([x, x]), torch.cat([t, t]), condition).chunk(2)
        return own, guidance(own.float(), null.float(), channels=x.shape[1])

    def _condition(self, x: Tensor, *, is_guided: bool) -> Any:
        if is_guided not in self._known:
            conditions, numbers = self.denoiser.conditions, self.labels
            if is_guided and self.guidance is not None:
                numbers = torch.cat([numbers, self.guidance.nulls(conditions, numbers)])
            shape = tuple(x.shape[1:])
            self._known[is_guided] = conditions.at(numbers, shape=shape, device=x.device, dtype=x.dtype)
        return self._known[is_guided]

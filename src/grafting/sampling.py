"""Class-conditional sampling: a loop around diffusers' schedulers, with classifier-free guidance as in DiT.

Yields batches; saving and measuring them is the caller's business. Label and noise of image i come from (seed, i)
alone, so a set of images may be drawn in batches of any size and by any number of processes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, repeat
from typing import Annotated, Any, ClassVar, Literal

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from jaxtyping import Float, Int, UInt8
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from .contract import Predict
from .diffusion import BETA_END, BETA_START, NUM_STEPS, Diffusion
from .errors import ProtocolError
from .functional.pixels import to_uint8
from .precision import FP32_IS_ABSENT, Precision, settled
from .randomness import generator

_LABEL_STREAM = 3  # keeps the draw of a label apart from the noise of the same (seed, i)


class SamplingConfig(BaseModel):
    """How images are drawn from a model. The defaults are DiT's, but for the number of images."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    hashed_as_absent: ClassVar = FP32_IS_ABSENT

    sampler: Literal["ddpm", "ddim", "dpm-solver++"] = "ddpm"
    """`ddpm` is ancestral sampling with the predicted variance; `ddim` (eta 0) and `dpm-solver++` add no noise."""
    steps: Annotated[PositiveInt, Field(le=NUM_STEPS)] = 250
    """Calls of the model an image; spread evenly over the 1,000 of training (at most 999 for `dpm-solver++`)."""
    cfg_scale: FiniteFloat = 1.5
    """Guidance: null + cfg_scale * (conditional - null). At 1 there is none, and the null half is not computed."""
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    """Guidance is on at the training steps t with low <= t / 999 <= high: 0 is the cleanest, 1 is pure noise."""
    guided_channels: PositiveInt | None = None
    """Guide the first channels only (3 in DiT's published protocol, of 4); all of them when None."""
    clip: bool = False
    """Clip the predicted clean image to [-1, 1] at each step: for models of pixels, not of latents."""
    num_images: PositiveInt = 64
    """Images to draw: numbers 0 to num_images - 1."""
    batch_size: PositiveInt = 64
    """Images at a time; changes speed and memory, not the images (up to float rounding)."""
    seed: NonNegativeInt = 0
    """Image i depends on (seed, i) and its label alone."""
    labels: Literal["balanced", "random"] | Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (
        "balanced"
    )
    """Class of image i: `balanced` i mod num_classes, `random` from (seed, i), or the i-th of a list, repeated."""
    precision: Precision = "auto"
    """Of the model's forward pass (bf16 by autocast; `auto`: where it is faster); the samplers' arithmetic is always fp32."""
    compile: bool = False
    """Run the model through torch.compile; changes speed, not the images (up to float rounding)."""

    @model_validator(mode="after")
    def _check(self) -> "SamplingConfig":
        low, high = self.cfg_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"cfg_interval is [low, high] with 0 <= low <= high <= 1; found [{low}, {high}]")
        if self.sampler == "dpm-solver++" and self.steps == NUM_STEPS:
            # spaced for one step more, two of them would be the same
            raise ValueError(f"dpm-solver++ takes at most {NUM_STEPS - 1} steps; found {self.steps}")
        return self

    @property
    def labels_rule(self) -> str:
        """How image i gets its class, in words."""
        if self.labels == "balanced":
            return "i mod number of classes"
        if self.labels == "random":
            return "uniform, from (seed, i)"
        return f"given, in turn: {', '.join(map(str, self.labels))}"

    def guides_at(self, step: int) -> bool:
        """Whether guidance is on at training step `step`, 0..999."""
        low, high = self.cfg_interval
        return self.cfg_scale != 1 and low <= step / (NUM_STEPS - 1) <= high


@dataclass(frozen=True)
class Batch:
    """Samples x of the images `indices`, as the model makes them: pixels about in [-1, 1], or latents."""

    indices: tuple[int, ...]
    labels: Int[Tensor, "b"]
    x: Float[Tensor, "b c h w"]

    def images(self) -> UInt8[Tensor, "b c h w"]:
        """The samples of a model of pixels as 8-bit pixels."""
        return to_uint8(self.x)


def sample(
    model: nn.Module,
    config: SamplingConfig,
    *,
    predict: Predict,
    shape: tuple[int, int, int],
    num_classes: int,
    null_label: int | None,
    indices: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Images drawn from a model, batch by batch; while a batch is drawn the model is in eval mode.

    Args:
        predict: calls the model on noised images, steps and labels; it gives the noise, or noise and variance.
        shape: c, h, w of an image.
        num_classes: labels are 0..num_classes - 1.
        null_label: the label that stands for no class; None if the model was trained without one.
        indices: numbers of the images to draw (a process's share, or those missing); all when None.

    Raises:
        ProtocolError: the model cannot be sampled in this way; raised at the call, before any work.
    """
    check_sampling(config, num_classes=num_classes, null_label=null_label, channels=shape[0])
    config = settled(config, next(model.parameters()).device)
    numbers = tuple(range(config.num_images) if indices is None else indices)
    called: Any = torch.compile(model, dynamic=False) if config.compile and numbers else model
    if numbers and min(numbers) < 0:
        raise ProtocolError(f"images are numbered from 0; asked for number {min(numbers)}")

    def batches() -> Iterator[Batch]:
        for start in range(0, len(numbers), config.batch_size):
            chosen = numbers[start : start + config.batch_size]
            labels = labels_of(chosen, config, num_classes=num_classes)
            x = _draw(
                called, config, predict, shape=shape, indices=chosen, labels=labels, null_label=null_label
            )
            yield Batch(chosen, labels, x)

    return batches()


def check_sampling(
    config: SamplingConfig, *, num_classes: int, null_label: int | None, channels: int | None = None
) -> None:
    """Raises a ProtocolError that lists why such a model cannot be sampled in this way, if it cannot.

    Args:
        channels: of an image; None if not known yet, then `guided_channels` is not checked.
    """
    faults = []
    if config.cfg_scale != 1 and null_label is None:
        faults.append(
            f"cfg_scale is {config.cfg_scale:g}, but the model has no null label (it was trained with "
            f"class_dropout_prob 0): set cfg_scale to 1"
        )
    if channels is not None and config.guided_channels is not None and config.guided_channels > channels:
        faults.append(f"guided_channels is {config.guided_channels}, but images have {channels} channels")
    if isinstance(config.labels, tuple):
        unknown = sorted({label for label in config.labels if label >= num_classes})
        if unknown:
            faults.append(f"labels {unknown} are out of range: classes are 0..{num_classes - 1}")
    if faults:
        raise ProtocolError("\n  ".join(["these samples cannot be drawn:", *faults]))


def labels_of(indices: Sequence[int], config: SamplingConfig, *, num_classes: int) -> Int[Tensor, "b"]:
    """The class of each image, by number."""
    if config.labels == "balanced":
        labels = [i % num_classes for i in indices]
    elif config.labels == "random":
        streams = [generator(config.seed, i, _LABEL_STREAM) for i in indices]
        labels = [int(torch.randint(num_classes, (), generator=stream)) for stream in streams]
    else:
        labels = [config.labels[i % len(config.labels)] for i in indices]
    return torch.tensor(labels, dtype=torch.int64)


def retained_steps(num_steps: int) -> list[int]:
    """The training steps that a chain of `num_steps` visits, from the noisiest: 999 to 0 at even distances.

    A single step starts at 999. (DiT's would be 0, where the model expects an image without any noise.)

    Source: facebookresearch/DiT `diffusion/respace.py`, whose steps these are for every number of two or more.
    """
    if num_steps == 1:
        return [NUM_STEPS - 1]
    stride = (NUM_STEPS - 1) / (num_steps - 1)
    # summed up as in the source: a product would round some halves the other way
    return [round(step) for step in accumulate(repeat(stride, num_steps - 1), initial=0.0)][::-1]


@torch.no_grad()
def _draw(
    model: nn.Module,
    config: SamplingConfig,
    predict: Predict,
    *,
    shape: tuple[int, int, int],
    indices: Sequence[int],
    labels: Tensor,
    null_label: int | None,
) -> Float[Tensor, "b c h w"]:
    """One batch, on the CPU."""
    device = next(model.parameters()).device
    streams = [generator(config.seed, i) for i in indices]
    x = _initial_noise(streams, shape).to(device)
    labels = labels.to(device)
    with _evaluating(model), torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        for step, update in _updates(config, streams):
            prediction = _prediction(model, config, predict, x, labels, step=step, null_label=null_label)
            x = update(prediction.float(), x)
    return x.cpu()


def _initial_noise(streams: list[torch.Generator], shape: tuple[int, int, int]) -> Tensor:
    return torch.stack([torch.randn(shape, generator=stream) for stream in streams])


def _prediction(
    model: nn.Module,
    config: SamplingConfig,
    predict: Predict,
    x: Tensor,
    labels: Tensor,
    *,
    step: int,
    null_label: int | None,
) -> Tensor:
    """The model's prediction [B, C or 2C, H, W], with its first channels of noise guided where guidance is on.

    The other channels of noise and the variance are the conditional ones.

    Source: facebookresearch/DiT `DiT.forward_with_cfg`.
    """
    t = torch.full_like(labels, step)
    if null_label is None or not config.guides_at(step):
        return predict(model, x, t, labels)
    null_labels = torch.full_like(labels, null_label)
    both = predict(model, torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, null_labels])).float()
    conditional, null = both.chunk(2)
    guided = config.guided_channels or x.shape[1]
    eps, null_eps = conditional[:, :guided], null[:, :guided]
    return torch.cat([null_eps + config.cfg_scale * (eps - null_eps), conditional[:, guided:]], dim=1)


Update = Callable[[Tensor, Tensor], Tensor]
"""x_t's successor, from a prediction and x_t."""


def _updates(config: SamplingConfig, streams: list[torch.Generator]) -> Iterator[tuple[int, Update]]:
    """The training steps of a chain, from the noisiest, each with the update to make there."""
    return {"ddpm": _ddpm, "ddim": _ddim, "dpm-solver++": _dpm_solver}[config.sampler](config, streams)


def _ddpm(config: SamplingConfig, streams: list[torch.Generator]) -> Iterator[tuple[int, Update]]:
    scheduler = _respaced(DDPMScheduler, config, variance_type="learned_range")
    for position, step in _positions(config):

        def update(prediction: Tensor, x: Tensor, position: int = position) -> Tensor:
            if prediction.shape[1] == x.shape[1]:
                # -1 is the small end of the range between which a variance is predicted: that of the true posterior
                prediction = torch.cat([prediction, torch.full_like(x, -1)], dim=1)
            return scheduler.step(prediction, position, x, generator=streams).prev_sample

        yield step, update


def _ddim(config: SamplingConfig, streams: list[torch.Generator]) -> Iterator[tuple[int, Update]]:
    scheduler = _respaced(DDIMScheduler, config)
    for position, step in _positions(config):

        def update(prediction: Tensor, x: Tensor, position: int = position) -> Tensor:
            eps = prediction[:, : x.shape[1]]
            return scheduler.step(eps, position, x, use_clipped_model_output=config.clip).prev_sample

        yield step, update


def _dpm_solver(config: SamplingConfig, streams: list[torch.Generator]) -> Iterator[tuple[int, Update]]:
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=NUM_STEPS,
        beta_start=BETA_START,
        beta_end=BETA_END,
        algorithm_type="dpmsolver++",
        timestep_spacing="linspace",
        # this solver's only way to clip to [-1, 1]: dynamic thresholding whose threshold cannot exceed 1
        thresholding=config.clip,
        sample_max_value=1.0,
    )
    scheduler.set_timesteps(config.steps)
    for step in scheduler.timesteps.tolist():

        def update(prediction: Tensor, x: Tensor, step: int = step) -> Tensor:
            return scheduler.step(prediction[:, : x.shape[1]], step, x).prev_sample

        yield step, update


def _positions(config: SamplingConfig) -> Iterator[tuple[int, int]]:
    """Each retained step's position in the shorter chain, and the step itself, from the noisiest."""
    return zip(range(config.steps - 1, -1, -1), retained_steps(config.steps), strict=True)


def _respaced(scheduler_class: type, config: SamplingConfig, **options: str) -> Any:
    """A scheduler over the retained steps alone, as if they were all there are.

    diffusers' own spacing would do for DDPM, but its DDIM takes the step before t to be t - 1000 // steps, which it is
    not when steps end at 999 and 0.
    """
    alpha_bars = Diffusion().alpha_bars[retained_steps(config.steps)[::-1]]
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bars[:-1]])
    scheduler = scheduler_class(
        num_train_timesteps=config.steps,
        trained_betas=(1 - alpha_bars / before).tolist(),
        clip_sample=config.clip,
        **options,
    )
    # in float32 the differences of neighbours near 1 would keep four digits
    scheduler.alphas_cumprod = alpha_bars
    scheduler.set_timesteps(config.steps)
    return scheduler


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; outside, each module's mode is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode

"""Noise processes: that of DiT and PixArt, and the straight paths of SD3, Flux and Wan.

A process says how inputs are noised, what a prediction is trained to be, and how a sampler steps back. Pure functions of
tensors; the model is called by whoever calls these.

Source: arXiv:2006.11239 (process), arXiv:2102.09672 (learned variance, L_vlb), constants as in openai/guided-diffusion;
arXiv:2209.03003 (straight paths), arXiv:2403.03206 (the distribution of steps, shift).
"""

import copy
import math
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, JsonValue, PositiveFloat, PositiveInt, model_serializer, model_validator
from torch import Generator, Tensor

from .machine.settings import Settings
from .samplers import Chain, ddim, ddpm, dpm_solver, dpm_solver_flow, euler, heun

NUM_STEPS = 1000
BETA_START, BETA_END = 1e-4, 0.02


class Diffusion:
    """Linear betas over 1,000 steps, predicted noise, learned variance (DiT, PixArt).

    q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), for t in 0..999.
    """

    samplers: tuple[str, ...] = ("ddpm", "ddim", "dpm-solver++")

    @property
    def identity(self) -> dict[str, JsonValue]:
        return {"name": "diffusion"}

    @cached_property
    def betas(self) -> Float[Tensor, " steps"]:
        return torch.linspace(BETA_START, BETA_END, NUM_STEPS, dtype=torch.float64)

    @cached_property
    def alpha_bars(self) -> Float[Tensor, " steps"]:
        return (1 - self.betas).cumprod(0)

    @cached_property
    def _alpha_bars_before(self) -> Float[Tensor, " steps"]:
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bars[:-1]])

    @cached_property
    def posterior_log_variance(self) -> Float[Tensor, " steps"]:
        """Log variance of q(x_{t-1} | x_t, x_0); at t = 0, where it is -inf, that of t = 1."""
        variance = self.betas * (1 - self._alpha_bars_before) / (1 - self.alpha_bars)
        return torch.cat([variance[1:2], variance[1:]]).log()

    def at(self, shape: tuple[int, ...]) -> "Diffusion":
        return self

    def draw_steps(self, count: int, draw: torch.Generator) -> Int[Tensor, " count"]:
        return torch.randint(0, NUM_STEPS, (count,), generator=draw)

    def steps_at(self, shares: Float[Tensor, " count"]) -> Int[Tensor, " count"]:
        return (shares * NUM_STEPS + 1e-6).long().clamp(max=NUM_STEPS - 1)  # shares of whole steps stay whole

    def share_of(self, step: int | float) -> float:
        return step / (NUM_STEPS - 1)

    def add_noise(
        self, x: Float[Tensor, " b *chw"], noise: Float[Tensor, " b *chw"], t: Int[Tensor, " b"]
    ) -> Float[Tensor, " b *chw"]:
        """x_t for clean x, standard normal noise and steps t."""
        return self._at("signal", t, x) * x + self._at("scale", t, x) * noise

    def loss(
        self,
        prediction: Float[Tensor, "b out_c *hw"],
        *,
        x: Float[Tensor, "b c *hw"],
        x_t: Float[Tensor, "b c *hw"],
        noise: Float[Tensor, "b c *hw"],
        t: Int[Tensor, " b"],
    ) -> Float[Tensor, " b"]:
        """Per-sample training loss: mse of the noise, plus the variational bound where the variance is predicted too.

        The bound sees the predicted noise detached, so that it moves the variance only.
        """
        prediction = prediction.float()
        if prediction.shape[1] == x.shape[1]:
            return (noise - prediction).square().flatten(1).mean(1)
        eps, variance = prediction.chunk(2, dim=1)
        mse = (noise - eps).square().flatten(1).mean(1)
        return mse + self._bound(eps.detach(), variance, x=x, x_t=x_t, t=t)

    def sampling_faults(self, sampler: str, *, steps: int, clip: bool) -> list[str]:
        if sampler not in self.samplers:
            return [_unknown(sampler, self.samplers, "predicted noise")]
        # spaced for one step more, two of its would be the same
        most = NUM_STEPS - (sampler == "dpm-solver++")
        return [f"{sampler} takes at most {most} steps; found {steps}"] if steps > most else []

    def chain(self, sampler: str, *, steps: int, clip: bool, streams: list[Generator]) -> Chain:
        if sampler == "ddpm":
            return ddpm(self.alpha_bars, steps=steps, clip=clip, streams=streams)
        if sampler == "ddim":
            return ddim(self.alpha_bars, steps=steps, clip=clip)
        return dpm_solver(self.betas, steps=steps, clip=clip)

    def _bound(self, eps: Tensor, variance: Tensor, *, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """KL of the true posterior from the model's, in bits a dimension; at t = 0 the negative log likelihood of x."""
        low, high = self._at("low", t, x), self._at("high", t, x)
        log_variance = low + (variance + 1) / 2 * (high - low)  # arXiv:2102.09672 Eq. 15
        predicted_x = (x_t - self._at("scale", t, x) * eps) / self._at("signal", t, x)
        mean = self._posterior_mean(predicted_x, x_t, t)
        true_mean = self._posterior_mean(x, x_t, t)
        kl = 0.5 * (
            log_variance
            - low
            - 1
            + (low - log_variance).exp()
            + (true_mean - mean).square() * (-log_variance).exp()
        )
        nll = -discretized_log_likelihood(x, mean, 0.5 * log_variance)
        first = (t == 0).view(-1, *[1] * (x.ndim - 1))
        return torch.where(first, nll, kl).flatten(1).mean(1) / math.log(2)

    def _posterior_mean(self, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0 = x), arXiv:2006.11239 Eq. 7."""
        return self._at("from_x", t, x) * x + self._at("from_x_t", t, x) * x_t

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        return _table(name, like.device)[t].view(-1, *[1] * (like.ndim - 1))

    def _tables(self) -> dict[str, Tensor]:
        """Functions of the step, in float64: a square root is taken before rounding, lest 1 - alpha_bar keep four digits."""
        bars, before = self.alpha_bars, self._alpha_bars_before
        return {
            "signal": bars.sqrt(),
            "scale": (1 - bars).sqrt(),
            "low": self.posterior_log_variance,
            "high": self.betas.log(),
            "from_x": self.betas * before.sqrt() / (1 - bars),
            "from_x_t": (1 - before) * (1 - self.betas).sqrt() / (1 - bars),
        }


@lru_cache
def _table(name: str, device: torch.device) -> Tensor:
    """A table of the process on a device, where it stays; rounded first: not every device has float64."""
    with torch.inference_mode(False):
        return Diffusion()._tables()[name].float().to(device)


Spacing = Literal["ends", "even"]


class ShiftBySize(Settings):
    """A shift that grows with the number of image tokens, along a line that two sizes give.

    Source: arXiv:2403.03206 Sec. 5.3.2 has shifts that grow with the size; the line is that of black-forest-labs/flux
    `sampling.py::get_schedule`, the names of its ends as of diffusers' schedulers.
    """

    base: float = 0.5
    """The line at `base_tokens`."""
    max: float = 1.15
    """The line at `max_tokens`; it continues beyond."""
    base_tokens: PositiveInt = 256
    """Image tokens of the smaller size."""
    max_tokens: PositiveInt = 4096
    """Image tokens of the larger size."""
    kind: Literal["exponential", "linear"] = "exponential"
    """What the line gives: the shift's logarithm, or the shift."""

    @model_validator(mode="after")
    def _rises(self) -> "ShiftBySize":
        if self.base_tokens >= self.max_tokens:
            raise ValueError(
                f"base_tokens is the smaller size: found {self.base_tokens}, and max_tokens {self.max_tokens}"
            )
        if self.kind == "linear" and min(self.base, self.max) <= 0:
            raise ValueError(f"a shift is positive: found base {self.base:g} and max {self.max:g}")
        return self

    def at(self, tokens: int) -> float:
        """The shift of an image of so many tokens."""
        slope = (self.max - self.base) / (self.max_tokens - self.base_tokens)
        height = tokens * slope + self.base - slope * self.base_tokens
        return math.exp(height) if self.kind == "exponential" else height


class FlowMatching:
    """Straight paths x_t = (1 - s) x + s noise, of which the model predicts the velocity, noise - x (SD3, Flux, Wan).

    Steps are t = scale * s. They are drawn as SD3's, logit-normal (arXiv:2403.03206 Eq. 19), and then shifted towards noise
    (Eq. 23).

    Args:
        scale: the step of pure noise in the host's unit: 1 for Flux, 1000 for SD3 and Wan.
        shift: of the steps towards noise, in training and in sampling; 1 leaves them as they are. 3 for SD3 at 1024 x 1024
            pixels.
        spacing: of Euler's n steps before the shift: `ends` runs from pure noise to the last but one of a thousand, `even` takes
            1, (n - 1) / n, ... 1 / n.
        terminal: noise of the last of Euler's steps, in 0..1, to which all of them are stretched; None leaves them as they are.
        shift_by_size: takes the place of `shift`: steps are drawn and spaced by what `at` makes of the process.
        token_size: elements of a channel that make an image token; `shift_by_size` counts tokens.
    """

    samplers: tuple[str, ...] = ("euler", "heun", "dpm-solver++")

    def __init__(
        self,
        *,
        scale: float = 1.0,
        shift: float = 1.0,
        spacing: Spacing = "ends",
        terminal: float | None = None,
        shift_by_size: ShiftBySize | None = None,
        token_size: int = 1,
    ):
        self.scale, self._shift, self.spacing, self.terminal = scale, shift, spacing, terminal
        self.shift_by_size, self.token_size = shift_by_size, token_size
        self._tokens: int | None = None

    @property
    def shift(self) -> float:
        """Of the size that `at` was told, where it follows the size."""
        if self.shift_by_size is None:
            return self._shift
        assert self._tokens is not None, "the shift follows the size, which `at` is told"
        return self.shift_by_size.at(self._tokens)

    @property
    def identity(self) -> dict[str, JsonValue]:
        by_size = self.shift_by_size
        shift: JsonValue = self._shift if by_size is None else by_size.model_dump(mode="json")
        spacing: dict[str, JsonValue] = {"spacing": "even"} if self.spacing == "even" else {}
        terminal: dict[str, JsonValue] = {} if self.terminal is None else {"terminal": self.terminal}
        name = "shift" if by_size is None else "shift_by_size"
        return {"name": "flow", "scale": self.scale, name: shift, **spacing, **terminal}

    def at(self, shape: tuple[int, ...]) -> "FlowMatching":
        if self.shift_by_size is None:
            return self
        sized = copy.copy(self)
        sized._tokens = math.prod(shape[1:]) // self.token_size
        return sized

    def draw_steps(self, count: int, draw: torch.Generator) -> Float[Tensor, " count"]:
        s = torch.randn(count, generator=draw).sigmoid()
        return self.scale * self.shift * s / (1 + (self.shift - 1) * s)

    def steps_at(self, shares: Float[Tensor, " count"]) -> Float[Tensor, " count"]:
        return self.scale * shares.float()

    def share_of(self, step: int | float) -> float:
        return step / self.scale

    def add_noise(
        self, x: Float[Tensor, " b *chw"], noise: Float[Tensor, " b *chw"], t: Float[Tensor, " b"]
    ) -> Float[Tensor, " b *chw"]:
        """x_t for clean x, standard normal noise and steps t."""
        s = (t / self.scale).view(-1, *[1] * (x.ndim - 1))
        return (1 - s) * x + s * noise

    def loss(
        self,
        prediction: Float[Tensor, " b *chw"],
        *,
        x: Float[Tensor, " b *chw"],
        x_t: Float[Tensor, " b *chw"],
        noise: Float[Tensor, " b *chw"],
        t: Float[Tensor, " b"],
    ) -> Float[Tensor, " b"]:
        """Per-sample training loss: mse of the velocity."""
        return (noise - x - prediction.float()).square().flatten(1).mean(1)

    def sampling_faults(self, sampler: str, *, steps: int, clip: bool) -> list[str]:
        if sampler not in self.samplers:
            return [_unknown(sampler, self.samplers, "a predicted velocity")]
        if self.terminal is not None and sampler == "euler" and steps == 1:
            return [
                f"steps is 1, but process.terminal is {self.terminal:g}, where the last step of several stands: take two or more"
            ]
        if clip and sampler != "dpm-solver++":
            return [f"{sampler} has no clean image to clip: set clip to false, or sampler to dpm-solver++"]
        return []

    def chain(self, sampler: str, *, steps: int, clip: bool, streams: list[Generator]) -> Chain:
        if sampler == "dpm-solver++":
            return dpm_solver_flow(steps=steps, shift=self.shift, scale=self.scale, clip=clip)
        if sampler == "heun":
            return heun(steps=steps, shift=self.shift, scale=self.scale)
        return euler(
            steps=steps,
            shift=self.shift,
            scale=self.scale,
            even=self.spacing == "even",
            is_by_size=self.shift_by_size is not None,
            terminal=self.terminal,
        )


class DiffusionConfig(Settings):
    """Predicted noise over 1,000 steps (DiT, PixArt)."""

    name: Literal["diffusion"] = "diffusion"

    def build(self, *, scale: float) -> Diffusion:
        return Diffusion()


class FlowConfig(Settings):
    """A predicted velocity along straight paths (SD3, Flux, Wan)."""

    name: Literal["flow"] = "flow"
    shift: PositiveFloat = 1.0
    """Shift of the steps towards noise, in training and sampling; 1 leaves them as they are."""
    spacing: Spacing | None = None
    """Spacing of Euler's steps: `ends` as of SD3's pipeline, `even` as of FLUX's. If omitted, that of the host's family."""
    shift_by_size: ShiftBySize | None = None
    """Shift that follows the number of image tokens of what is trained on or sampled, in the place of `shift`."""
    terminal: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Noise of the last of Euler's steps, to which all of them are stretched: 0.1 for LTX-Video. If omitted, they are not."""

    @model_validator(mode="after")
    def _has_one_shift(self) -> "FlowConfig":
        if self.shift_by_size is not None and "shift" in self.model_fields_set:
            raise ValueError("shift_by_size takes the place of shift: name one of them")
        return self

    @model_serializer(mode="wrap")
    def _without_absent(self, to_dict: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        by_size = {"shift"} if self.shift_by_size is not None else set()
        absent = {n for n in ("spacing", "shift_by_size", "terminal") if getattr(self, n) is None}
        return {key: value for key, value in to_dict(self).items() if key not in by_size | absent}

    def build(self, *, scale: float, token_size: int = 1) -> FlowMatching:
        return FlowMatching(
            scale=scale,
            shift=self.shift,
            spacing=self.spacing or "ends",
            terminal=self.terminal,
            shift_by_size=self.shift_by_size,
            token_size=token_size,
        )

    def like(self, family: object) -> "FlowConfig":
        """This config, with the family's own spacing where it says none."""
        known = family.spacing if isinstance(family, FlowMatching) else None
        return self if self.spacing or known is None else self.model_copy(update={"spacing": known})


ProcessConfig = Annotated[DiffusionConfig | FlowConfig, Field(discriminator="name")]
"""A noise process as data; `build` takes the host's step of pure noise."""


def _unknown(sampler: str, known: tuple[str, ...], prediction: str) -> str:
    return f"sampler {sampler} does not run {prediction}, which takes {', '.join(known)}"


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability, in nats, of 8-bit values x in [-1, 1] under a Gaussian integrated over each value's bin."""

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse_scale = (-log_scale).exp()
    upper = cdf(inverse_scale * (x - mean + 1 / 255))
    lower = cdf(inverse_scale * (x - mean - 1 / 255))
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp(min=1e-12).log()

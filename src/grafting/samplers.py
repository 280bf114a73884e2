"""Sampling chains: the steps to call a model at, each with the update to make there.

Every function yields pairs (step, update) from the noisiest step on; an update takes the model's prediction at x_t, and x_t.
A noise process chooses among them and says what its model predicts. All but DDPM are diffusers' schedulers, imported when a
chain begins: that takes seconds. No update waits for the device: its coefficients are numbers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import accumulate, repeat
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from .contract import Update

Chain = Iterator[tuple[int | float, Update]]


def retained_steps(num_steps: int, *, of: int = 1000) -> list[int]:
    """The training steps that a chain of `num_steps` visits, from the noisiest: `of` - 1 to 0 at even distances.

    A single step starts at the noisiest. (DiT's would be 0, where the model expects an image without any noise.)

    Source: facebookresearch/DiT `diffusion/respace.py`, whose steps these are for every number of two or more.
    """
    if num_steps == 1:
        return [of - 1]
    stride = (of - 1) / (num_steps - 1)
    # summed up as in the source: a product would round some halves the other way
    return [round(step) for step in accumulate(repeat(stride, num_steps - 1), initial=0.0)][::-1]


def ddpm(
    alpha_bars: Float[Tensor, " steps"], *, steps: int, clip: bool, streams: Sequence[Generator]
) -> Chain:
    """Ancestral sampling, with the predicted variance where there is one.

    Source: arXiv:2006.11239 Algorithm 2; the order of operations is that of diffusers' `DDPMScheduler`.
    """
    bars = alpha_bars[retained_steps(steps, of=len(alpha_bars))[::-1]].tolist()
    noise = _Noise(streams)
    for position, step in _positions(steps, len(alpha_bars)):
        before = bars[position - 1] if position else 1.0
        update = partial(_ancestral, bar=bars[position], before=before, clip=clip)
        yield step, partial(update, noise=partial(noise.like, is_last=position == 1) if position else None)


def _ancestral(
    prediction: Tensor,
    x: Tensor,
    *,
    bar: float,
    before: float,
    clip: bool,
    noise: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """The step from alpha_bar `bar` to `before`; the last one adds no noise."""
    beta = 1 - bar / before
    eps, *variance = prediction.split(x.shape[1], dim=1)
    clean = (x - (1 - bar) ** 0.5 * eps) / bar**0.5
    if clip:
        clean = clean.clamp(-1, 1)
    mean = before**0.5 * beta / (1 - bar) * clean + (1 - beta) ** 0.5 * (1 - before) / (1 - bar) * x
    if noise is None:
        return mean
    # what is predicted lies between the variance of the true posterior and beta, arXiv:2102.09672 Eq. 15
    low, high = math.log(max((1 - before) / (1 - bar) * beta, 1e-20)), math.log(beta)
    if not variance:
        return mean + math.exp(0.5 * low) * noise(x)
    share = (variance[0] + 1) / 2
    return mean + (0.5 * (share * high + (1 - share) * low)).exp() * noise(x)


class _Noise:
    """Standard normal noise of each step, an image's from its own stream; the next step's is drawn while the model runs."""

    def __init__(self, streams: Sequence[Generator]):
        self._streams = streams
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grafting-noise")
        self._next: Future[Tensor] | None = None

    def like(self, x: Tensor, *, is_last: bool) -> Tensor:
        """A step's noise, where x is and of its shape."""
        noise = _drawn(self._streams, x) if self._next is None else self._next.result()
        self._next = None if is_last else self._pool.submit(_drawn, self._streams, x)
        return noise.to(x.device, non_blocking=True)


def _drawn(streams: Sequence[Generator], x: Tensor) -> Tensor:
    noise = torch.stack([torch.randn(x.shape[1:], generator=stream) for stream in streams])
    return noise.pin_memory() if x.is_cuda else noise


def ddim(alpha_bars: Float[Tensor, " steps"], *, steps: int, clip: bool) -> Chain:
    """DDIM with eta 0: no noise is added."""
    from diffusers import DDIMScheduler

    scheduler = _respaced(DDIMScheduler, alpha_bars, steps, clip)
    for position, step in _positions(steps, len(alpha_bars)):

        def update(prediction: Tensor, x: Tensor, position: int = position) -> Tensor:
            eps = prediction[:, : x.shape[1]]
            return scheduler.step(eps, position, x, use_clipped_model_output=clip).prev_sample

        yield step, update


def dpm_solver(betas: Float[Tensor, " steps"], *, steps: int, clip: bool) -> Chain:
    """DPM-Solver++ of second order, for predicted noise."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=len(betas),
        beta_start=float(betas[0]),
        beta_end=float(betas[-1]),
        algorithm_type="dpmsolver++",
        timestep_spacing="linspace",
        # this solver's only way to clip to [-1, 1]: dynamic thresholding whose threshold cannot exceed 1
        thresholding=clip,
        sample_max_value=1.0,
    )
    return _timed(scheduler, steps)


def euler(
    *,
    steps: int,
    shift: float,
    scale: float,
    even: bool = False,
    is_by_size: bool = False,
    terminal: float | None = None,
) -> Chain:
    """Euler's method along a straight path's velocity; the steps are those that diffusers' pipelines take.

    Args:
        even: take 1, (n - 1) / n, ... 1 / n before the shift, as FLUX's pipeline asks; else the scheduler's own, as SD3's.
        is_by_size: the shift is one image size's: the last of the scheduler's own steps is then shifted once, else twice.
        terminal: noise of the last step, in 0..1, to which all steps are stretched.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    # diffusers' linear kind takes the shift itself
    kind = {"use_dynamic_shifting": True, "time_shift_type": "linear"} if is_by_size else {"shift": shift}
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**kind, shift_terminal=terminal)
    asked: dict[str, Any] = {"mu": shift} if is_by_size else {}
    asked |= {"sigmas": [1 - i / steps for i in range(steps)]} if even else {"num_inference_steps": steps}
    scheduler.set_timesteps(**asked)
    return _along(scheduler, unit=scale / 1000)


def heun(*, steps: int, shift: float, scale: float) -> Chain:
    """Heun's method: every step but the last calls the model twice."""
    from diffusers import FlowMatchHeunDiscreteScheduler

    return _timed(FlowMatchHeunDiscreteScheduler(shift=shift), steps, unit=scale / 1000)


def dpm_solver_flow(*, steps: int, shift: float, scale: float, clip: bool) -> Chain:
    """DPM-Solver++ of second order, for a predicted velocity."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        thresholding=clip,
        sample_max_value=1.0,
    )
    return _timed(scheduler, steps, unit=scale / 1000)


def _timed(scheduler: Any, steps: int, *, unit: float | None = None) -> Chain:
    """So many of a scheduler's own steps."""
    scheduler.set_timesteps(steps)
    return _along(scheduler, unit=unit)


def _along(scheduler: Any, *, unit: float | None) -> Chain:
    """A scheduler's steps, told to the model as they are, or in its unit."""
    for t in scheduler.timesteps:

        def update(prediction: Tensor, x: Tensor, t: Tensor = t) -> Tensor:
            return scheduler.step(prediction[:, : x.shape[1]], t, x).prev_sample

        yield (t.item() if unit is None else t.item() * unit), update


def _positions(steps: int, num_train_steps: int) -> Iterator[tuple[int, int]]:
    """Each retained step's position in the shorter chain, and the step itself, from the noisiest."""
    return zip(range(steps - 1, -1, -1), retained_steps(steps, of=num_train_steps), strict=True)


def _respaced(scheduler_class: type, all_bars: Tensor, steps: int, clip: bool) -> Any:
    """A scheduler over the retained steps alone, as if they were all there are.

    diffusers' DDIM takes the step before t to be t - 1000 // steps, which it is not when steps end at 999 and 0.
    """
    alpha_bars = all_bars[retained_steps(steps, of=len(all_bars))[::-1]]
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bars[:-1]])
    scheduler = scheduler_class(
        num_train_timesteps=steps,
        trained_betas=(1 - alpha_bars / before).tolist(),
        clip_sample=clip,
    )
    # in float32 the differences of neighbours near 1 would keep four digits
    scheduler.alphas_cumprod = alpha_bars
    scheduler.set_timesteps(steps)
    return scheduler

"""Sampling chains by diffusers' schedulers: the steps to call a model at, each with the update to make there.

Every function yields pairs (step, update) from the noisiest step on; an update takes the model's prediction at x_t, and x_t.
A noise process chooses among them and says what its model predicts. diffusers is imported when a chain begins: it takes seconds.
"""

from collections.abc import Iterator, Sequence
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
    """Ancestral sampling, with the predicted variance where there is one."""
    from diffusers import DDPMScheduler

    scheduler = _respaced(DDPMScheduler, alpha_bars, steps, clip, variance_type="learned_range")
    for position, step in _positions(steps, len(alpha_bars)):

        def update(prediction: Tensor, x: Tensor, position: int = position) -> Tensor:
            if prediction.shape[1] == x.shape[1]:
                # -1 is the small end of the range between which a variance is predicted: that of the true posterior
                prediction = torch.cat([prediction, torch.full_like(x, -1)], dim=1)
            return scheduler.step(prediction, position, x, generator=list(streams)).prev_sample

        yield step, update


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


def euler(*, steps: int, shift: float, scale: float) -> Chain:
    """Euler's method along a straight path's velocity; the steps are those that diffusers' pipelines take."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return _timed(FlowMatchEulerDiscreteScheduler(shift=shift), steps, unit=scale / 1000)


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
    """A scheduler's own steps, told to the model as they are, or in its unit."""
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:

        def update(prediction: Tensor, x: Tensor, t: Tensor = t) -> Tensor:
            return scheduler.step(prediction[:, : x.shape[1]], t, x).prev_sample

        yield (t.item() if unit is None else t.item() * unit), update


def _positions(steps: int, num_train_steps: int) -> Iterator[tuple[int, int]]:
    """Each retained step's position in the shorter chain, and the step itself, from the noisiest."""
    return zip(range(steps - 1, -1, -1), retained_steps(steps, of=num_train_steps), strict=True)


def _respaced(scheduler_class: type, all_bars: Tensor, steps: int, clip: bool, **options: str) -> Any:
    """A scheduler over the retained steps alone, as if they were all there are.

    diffusers' own spacing would do for DDPM, but its DDIM takes the step before t to be t - 1000 // steps, which it is
    not when steps end at 999 and 0.
    """
    alpha_bars = all_bars[retained_steps(steps, of=len(all_bars))[::-1]]
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bars[:-1]])
    scheduler = scheduler_class(
        num_train_timesteps=steps,
        trained_betas=(1 - alpha_bars / before).tolist(),
        clip_sample=clip,
        **options,
    )
    # in float32 the differences of neighbours near 1 would keep four digits
    scheduler.alphas_cumprod = alpha_bars
    scheduler.set_timesteps(steps)
    return scheduler

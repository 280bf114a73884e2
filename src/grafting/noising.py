"""A training batch as both stages see it: images noised at random steps, some conditions dropped (arXiv:2506.05340 Eq. 2).

Everything is drawn for the step's whole batch and then cut, so that a batch is the same however many processes share it
and in however many parts each of them takes its share.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .contract import Denoiser
from .errors import TrainingError

_WHOLE = slice(None)


class NoisedBatch(NamedTuple):
    """Clean inputs x, standard normal noise and x_t, [B, ...] of any shape; numbers of the conditions and steps t [B]."""

    x: Tensor
    noise: Tensor
    x_t: Tensor
    numbers: Tensor
    t: Tensor

    def split(self, parts: int) -> "list[NoisedBatch]":
        """The same in `parts` batches of equal size."""
        size = len(self.t) // parts
        return [NoisedBatch(*part) for part in zip(*(a.split(size) for a in self), strict=True)]


def draw_noised(
    images: tuple[Tensor, Tensor],
    draw: torch.Generator,
    *,
    batch_size: int,
    denoiser: Denoiser,
    device: torch.device,
    part: slice = _WHOLE,
) -> NoisedBatch:
    """Images or latents and the numbers of their conditions, noised.

    Args:
        images: those in `part` of the step's batch.
        batch_size: of the whole batch.
        draw: a fresh CPU generator of the step.
        denoiser: its process noises; its conditions are dropped in their share.
    """
    x, numbers = images
    noise = torch.randn((batch_size, *x.shape[1:]), generator=draw)[part]
    t = denoiser.process.draw_steps(batch_size, draw)[part]
    if dropout := denoiser.conditions.dropout:
        nulls = denoiser.conditions.nulls(numbers)
        assert nulls is not None, "conditions that are dropped have a null"
        numbers = torch.where(torch.rand(batch_size, generator=draw)[part] < dropout, nulls, numbers)
    # numbers stay here: what a table of prompts holds is found by them
    x, noise, t = (a.to(device, non_blocking=True) for a in (x, noise, t))
    return NoisedBatch(x, noise, denoiser.process.add_noise(x, noise, t), numbers, t)


def check_batch_size(stage: str, batch_size: int, *, processes: int, accumulate: int) -> None:
    """Raises a TrainingError if a step's batch cannot be cut into equal parts, one for each process and micro-batch."""
    if batch_size % (processes * accumulate):
        raise TrainingError(
            f"{stage}: batch_size {batch_size} is that of all processes together; it has to be a multiple of "
            f"{processes} processes x accumulate {accumulate} = {processes * accumulate}"
        )

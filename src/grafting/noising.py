"""A training batch as both stages see it: images noised at random steps, some labels dropped (arXiv:2506.05340 Eq. 2).

Everything is drawn for the step's whole batch and then cut, so that a batch is the same however many processes share it
and in however many parts each of them takes its share.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .contract import ClassConditional, NoiseProcess
from .errors import TrainingError

_WHOLE = slice(None)


class NoisedBatch(NamedTuple):
    """Clean images x, standard normal noise and x_t [B, C, H, W], or videos of any shape; labels and steps t [B]."""

    x: Tensor
    noise: Tensor
    x_t: Tensor
    labels: Tensor
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
    diffusion: NoiseProcess,
    device: torch.device,
    classes: ClassConditional | None = None,
    part: slice = _WHOLE,
) -> NoisedBatch:
    """Images or latents and their labels, noised.

    Args:
        images: those in `part` of the step's batch.
        batch_size: of the whole batch.
        draw: a fresh CPU generator of the step.
        classes: what the model knows of classes; with it, labels are dropped in the model's share.
    """
    x, labels = images
    noise = torch.randn((batch_size, *x.shape[1:]), generator=draw)[part]
    t = diffusion.draw_steps(batch_size, draw)[part]
    if classes is not None and classes.label_dropout:
        assert classes.null_label is not None
        is_dropped = torch.rand(batch_size, generator=draw)[part] < classes.label_dropout
        labels = torch.where(is_dropped, classes.null_label, labels)
    x, labels, noise, t = (a.to(device, non_blocking=True) for a in (x, labels, noise, t))
    return NoisedBatch(x, noise, diffusion.add_noise(x, noise, t), labels, t)


def check_batch_size(stage: str, batch_size: int, *, processes: int, accumulate: int) -> None:
    """Raises a TrainingError if a step's batch cannot be cut into equal parts, one for each process and micro-batch."""
    if batch_size % (processes * accumulate):
        raise TrainingError(
            f"{stage}: batch_size {batch_size} is that of all processes together; it has to be a multiple of "
            f"{processes} processes x accumulate {accumulate} = {processes * accumulate}"
        )

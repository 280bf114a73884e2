"""A training batch as both stages see it: images noised at random steps, some conditions dropped (arXiv:2506.05340 Eq. 2).

Everything is drawn for the step's whole batch and then cut, so that a batch is the same however many processes share it
and in however many parts each of them takes its share.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..contract import Denoiser, FolderState, State, Step, TrainingData
from ..errors import TrainingError
from ..machine.randomness import batch_indices, generator
from .loader import Loader

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


class Drawn(NamedTuple):
    """What a step takes and draws, on the CPU: clean inputs x, noise, numbers of the conditions and steps t."""

    x: Tensor
    noise: Tensor
    numbers: Tensor
    t: Tensor

    def noised(self, denoiser: Denoiser, device: torch.device) -> NoisedBatch:
        """The batch on a device."""
        # numbers stay here: what a table of prompts holds is found by them
        x, noise, t = (a.to(device, non_blocking=True) for a in (self.x, self.noise, self.t))
        return NoisedBatch(x, noise, denoiser.process.add_noise(x, noise, t), self.numbers, t)


def draw(
    images: tuple[Tensor, Tensor],
    stream: torch.Generator,
    *,
    batch_size: int,
    denoiser: Denoiser,
    part: slice = _WHOLE,
) -> Drawn:
    """Draw noise and steps for images or latents, and which conditions are dropped.

    Args:
        images: those in `part` of the step's batch, and the numbers of their conditions.
        batch_size: of the whole batch.
        stream: a fresh CPU generator of the step.
        denoiser: its process draws steps; its conditions are dropped in their share.
    """
    x, numbers = images
    noise = torch.randn((batch_size, *x.shape[1:]), generator=stream)[part]
    t = denoiser.process.at(tuple(x.shape[1:])).draw_steps(batch_size, stream)[part]
    if dropout := denoiser.conditions.dropout:
        nulls = denoiser.conditions.nulls(numbers)
        assert nulls is not None, "conditions that are dropped have a null"
        numbers = torch.where(torch.rand(batch_size, generator=stream)[part] < dropout, nulls, numbers)
    return Drawn(x, noise, numbers, t)


@runtime_checkable
class BatchConfig(Protocol):
    """Settings of a stage that concern its batches."""

    steps: int
    batch_size: int
    accumulate: int
    seed: int


class Batches:
    """A process's share of each training batch; all random draws for step s come from (seed, s).

    Args:
        items: the items of `data` to train on; all when left out.
        share: the part of each batch that is this process's.
        end: the step up to which there are batches; that of `config` when left out.
        total: steps that are told as those in all; `end` when left out.
    """

    def __init__(
        self,
        data: TrainingData,
        config: BatchConfig,
        *,
        denoiser: Denoiser,
        device: torch.device,
        items: Tensor | None = None,
        share: slice = _WHOLE,
        end: int | None = None,
        total: int | None = None,
    ):
        self.config, self.denoiser, self.device, self.share = config, denoiser, device, share
        self.end = config.steps if end is None else end
        self.total = self.end if total is None else total
        self.loader = Loader(
            data,
            config.batch_size,
            seed=config.seed,
            items=items,
            steps=self.end,
            share=share,
            pin=device.type != "cpu",
            finish=partial(_draw_step, config=config, denoiser=denoiser, share=share),
        )

    def at(self, step: int) -> list[NoisedBatch]:
        """The noised micro-batches of a step."""
        whole = Drawn(*self.loader.at(step)).noised(self.denoiser, self.device)
        return whole.split(self.config.accumulate)

    def numbers(self, step: int, num_items: int) -> tuple[Tensor, ...]:
        """Indices of the items that a step takes of `num_items` stored elsewhere, by micro-batch."""
        indices = batch_indices(num_items, self.config.batch_size, step, self.config.seed)
        return indices[self.share].chunk(self.config.accumulate)

    def steps(
        self,
        first: int,
        take: Callable[[int], dict[str, float]],
        snapshot: Callable[[int], State | FolderState],
    ) -> Iterator[Step]:
        """Take step `first` and those after it, one each time that the iterator is asked.

        Args:
            take: takes a step; returns its values.
            snapshot: the state after so many steps.
        """
        with self.loader:
            for step in range(first, self.end):
                waited = self.loader.seconds_waited
                yield Step(
                    values=take(step),
                    done=step + 1,
                    total=self.total,
                    state=partial(snapshot, step + 1),
                    seconds_waited=self.loader.seconds_waited - waited,
                )


def _draw_step(
    step: int, images: tuple[Tensor, Tensor], *, config: BatchConfig, denoiser: Denoiser, share: slice
) -> Drawn:
    """What a step draws for its images; a pure function, called in the loader's threads."""
    stream = generator(config.seed, step)
    return draw(images, stream, batch_size=config.batch_size, denoiser=denoiser, part=share)


def check_batch_size(stage: str, batch_size: int, *, processes: int, accumulate: int) -> None:
    """Raises a TrainingError if a step's batch cannot be cut into equal parts, one for each process and micro-batch."""
    if batch_size % (processes * accumulate):
        raise TrainingError(
            f"{stage}: batch_size {batch_size} counts all processes; it must be a multiple of "
            f"{processes} processes x accumulate {accumulate} = {processes * accumulate}"
        )

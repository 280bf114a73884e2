"""A training batch as both stages see it: images noised at random steps, some conditions dropped (arXiv:2506.05340 Eq. 2).

Everything is drawn for the step's whole batch and then cut, so that a batch is the same however many processes share it
and in however many parts each of them takes its share.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..contract import Denoiser, FolderState, State, Step
from ..errors import TrainingError
from ..machine.randomness import batch_indices

_WHOLE = slice(None)


class NoisedBatch(NamedTuple):
    """Noised inputs x_t [B, ...] of any shape, numbers of their conditions and steps t [B], and what is known beside them."""

    x_t: Tensor
    numbers: Tensor
    t: Tensor
    x: Tensor | None = None
    """Clean inputs, where x_t was made from them and `noise`, which is standard normal."""
    noise: Tensor | None = None
    target: Tensor | None = None
    """The teacher's prediction for x_t, where it was made on the way."""

    def split(self, parts: int) -> "list[NoisedBatch]":
        """The same in `parts` batches of equal size."""
        size = len(self.t) // parts
        cut = ([None] * parts if a is None else a.split(size) for a in self)
        return [NoisedBatch(*part) for part in zip(*cut, strict=True)]


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
        return NoisedBatch(denoiser.process.add_noise(x, noise, t), self.numbers, t, x, noise)


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


@runtime_checkable
class Feed(Protocol):
    """Noised batches by number, each the same whenever it is asked for; fast for those that follow one another."""

    @property
    def seconds_waited(self) -> float:
        """Time that callers have waited for batches."""
        ...

    def at(self, number: int) -> NoisedBatch:
        """A process's share of a batch, on its device."""
        ...

    def close(self) -> None:
        """Let go of what was made ahead."""
        ...


class Batches:
    """A process's share of each training batch, in micro-batches.

    Args:
        feed: of this share.
        share: the part of each batch that is this process's.
        end: the step up to which there are batches; that of `config` when left out.
        total: steps that are told as those in all; `end` when left out.
    """

    def __init__(
        self,
        feed: Feed,
        config: BatchConfig,
        *,
        share: slice = _WHOLE,
        end: int | None = None,
        total: int | None = None,
    ):
        self.feed, self.config, self.share = feed, config, share
        self.end = config.steps if end is None else end
        self.total = self.end if total is None else total

    def at(self, step: int) -> list[NoisedBatch]:
        """The noised micro-batches of a step."""
        return self.feed.at(step).split(self.config.accumulate)

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
        with closing(self.feed):
            for step in range(first, self.end):
                waited = self.feed.seconds_waited
                yield Step(
                    values=take(step),
                    done=step + 1,
                    total=self.total,
                    state=partial(snapshot, step + 1),
                    seconds_waited=self.feed.seconds_waited - waited,
                )


def check_batch_size(stage: str, batch_size: int, *, processes: int, accumulate: int) -> None:
    """Raises a TrainingError if a step's batch cannot be cut into equal parts, one for each process and micro-batch."""
    if batch_size % (processes * accumulate):
        raise TrainingError(
            f"{stage}: batch_size {batch_size} counts all processes; it must be a multiple of "
            f"{processes} processes x accumulate {accumulate} = {processes * accumulate}"
        )

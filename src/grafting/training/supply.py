"""What stages train on, behind one wall: stored items that are noised, or states along the teacher's own trajectories.

A stage asks for batches and does not know which of them they are. All draws come from the seed and the number of a batch, for
the whole batch, so that it is the same however many processes share it and wherever a stage began.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..contract import Denoiser, TrainingData
from ..errors import TrainingError
from ..machine.precision import Precision
from ..machine.randomness import generator
from ..sampling.trajectories import Trajectories
from .batches import BatchConfig, Drawn, Feed, NoisedBatch, draw
from .dealing import Dealt, Walked
from .loader import Loader, read_items

Data: TypeAlias = TrainingData | Trajectories
"""What a stage may be given to train on."""


def supply_of(
    data: Data, denoiser: Denoiser, *, teacher: nn.Module | None, device: torch.device, precision: Precision
) -> "Supply":
    """The supply that these data are.

    Args:
        teacher: in eval mode; needed for its trajectories alone.
        precision: of the teacher.
    """
    if not isinstance(data, Trajectories):
        return Stored(data, denoiser, device)
    if teacher is None:
        raise TrainingError("the data are states along the teacher's trajectories, but there is no teacher")
    return AlongTrajectories(Walked(data, teacher, denoiser, precision))


def has_clean(data: Data) -> bool:
    """True of data with clean inputs, which a loss of the process needs."""
    return not isinstance(data, Trajectories)


@dataclass(frozen=True)
class Stored:
    """Items of stored data: all, or those of these indices in their order."""

    data: TrainingData
    denoiser: Denoiser
    device: torch.device
    items: Tensor | None = None

    def split(self, *, holdout: int, images: int | None, seed: int) -> "tuple[Stored, Stored]":
        """What is trained on, and what is held out of it.

        Args:
            holdout: number of items held out.
            images: number of items to train on; all others when None.
        """
        train, held_out = deal(len(self.data), holdout=holdout, images=images, seed=seed)
        return replace(self, items=train), replace(self, items=held_out)

    def steps(self, config: BatchConfig, *, share: slice, end: int) -> Feed:
        """A process's share of the batches of training steps up to `end`, each with fresh noise."""
        return _Loaded(self, config, share=share, end=end)

    def fixed(self, count: int, *, batch_size: int, seed: int, stream: tuple[int, ...]) -> Feed:
        """`count` inputs in whole batches, the same at every visit; the last may be smaller.

        They are the first items, again and again; of all items, those that stage 1 holds out come last.

        Args:
            stream: keeps these draws apart from others of the seed.
        """
        order = shuffled(len(self.data), seed).flip(0) if self.items is None else self.items
        return _Fixed(self, order[torch.arange(count) % len(order)].split(batch_size), seed, stream)


class _Loaded:
    """Batches that are read ahead, and their draws made, in the loader's threads."""

    def __init__(self, supply: Stored, config: BatchConfig, *, share: slice, end: int):
        self._supply = supply
        self._loader = Loader(
            supply.data,
            config.batch_size,
            seed=config.seed,
            items=supply.items,
            steps=end,
            share=share,
            pin=supply.device.type != "cpu",
            finish=partial(_draw_step, config=config, denoiser=supply.denoiser, share=share),
        )

    @property
    def seconds_waited(self) -> float:
        return self._loader.seconds_waited

    def at(self, number: int) -> NoisedBatch:
        return Drawn(*self._loader.at(number)).noised(self._supply.denoiser, self._supply.device)

    def close(self) -> None:
        self._loader.close()


def _draw_step(
    step: int, images: tuple[Tensor, Tensor], *, config: BatchConfig, denoiser: Denoiser, share: slice
) -> Drawn:
    """What a step draws for its images; a pure function, called in the loader's threads."""
    stream = generator(config.seed, step)
    return draw(images, stream, batch_size=config.batch_size, denoiser=denoiser, part=share)


@dataclass(frozen=True)
class _Fixed:
    """Batches of these items, each read and drawn alike whenever it is asked for."""

    supply: Stored
    indices: Sequence[Tensor]
    seed: int
    stream: tuple[int, ...]
    seconds_waited: float = 0.0

    def at(self, number: int) -> NoisedBatch:
        indices, denoiser = self.indices[number], self.supply.denoiser
        images, own = read_items(self.supply.data, indices), generator(self.seed, number, *self.stream)
        drawn = draw(images, own, batch_size=len(indices), denoiser=denoiser)
        return drawn.noised(denoiser, self.supply.device)

    def close(self) -> None:
        """Nothing is made ahead."""


@dataclass(frozen=True)
class AlongTrajectories:
    """States that the teacher's sampler visits: as many as are asked for, none twice."""

    walked: Walked

    def split(
        self, *, holdout: int, images: int | None, seed: int
    ) -> "tuple[AlongTrajectories, AlongTrajectories]":
        if images is not None:
            raise TrainingError(
                f"stage 1 is to train on {images} images, but states along trajectories are drawn anew at every step: leave "
                "`distill.images` out, or have `data: {name: teacher}`, which are stored"
            )
        return self, self

    def steps(self, config: BatchConfig, *, share: slice, end: int) -> Feed:
        return Dealt(
            self.walked,
            batch_size=config.batch_size,
            end=end,
            entropy=(config.seed,),
            share=share,
            parts=config.accumulate,
        )

    def fixed(self, count: int, *, batch_size: int, seed: int, stream: tuple[int, ...]) -> Feed:
        end = math.ceil(count / batch_size)
        return Dealt(self.walked, batch_size=batch_size, end=end, entropy=(seed, *stream), count=count)


Supply: TypeAlias = Stored | AlongTrajectories
"""Where a stage's batches come from."""


def deal(num_items: int, *, holdout: int, images: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to train on and indices held out, by seed.

    Raises:
        TrainingError: there are too few for both.
    """
    if num_items <= holdout:
        raise TrainingError(
            f"stage 1 holds out {holdout} images, but the data has {num_items}: set `holdout` to at most {num_items - 1}, or have more data"
        )
    rest = num_items - holdout
    if images is not None and images > rest:
        raise TrainingError(
            f"stage 1 is to train on {images} images, but the data has {num_items}, of which "
            f"{holdout} are held out: {rest} are left"
        )
    held_out, train = shuffled(num_items, seed).split([holdout, rest])
    return train[:images], held_out


def shuffled(num_items: int, seed: int) -> Tensor:
    """All indices in the order in which stage 1 deals them out: first those that it holds out, then the others."""
    return torch.randperm(num_items, generator=generator(seed, 2))

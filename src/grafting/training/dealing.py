"""Batches of states along a teacher's own trajectories, drawn during training.

A sampler of N calls meets N states on its way from noise. So for every N steps of training each row of the batch has a trajectory
of its own, whose states are dealt to those steps in an order of its own: a batch holds as many trajectories as rows, all
kinds of steps at once, and a state costs one pass of the teacher. While states are dealt the next trajectories are walked
by one call a step, so that all steps take equally long; a resumed stage walks its block again.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..contract import Denoiser
from ..errors import TrainingError
from ..machine.devices import mixed_precision
from ..machine.precision import Precision
from ..machine.randomness import generator
from ..sampling.chain import Visit, visits
from ..sampling.trajectories import Trajectories
from .batches import NoisedBatch

# keep these draws apart from others of the same numbers
_ROW_STREAM, _BLOCK_STREAM = 4, 5


@dataclass(frozen=True)
class Walked:
    """A teacher, in eval mode, that is walked along its sampler's states."""

    data: Trajectories
    teacher: nn.Module
    denoiser: Denoiser
    precision: Precision

    @property
    def device(self) -> torch.device:
        return next(self.teacher.parameters()).device

    def visits(self, numbers: Int[Tensor, " b"], streams: list[torch.Generator]) -> Iterator[Visit]:
        """The states of one trajectory for each condition."""
        data = self.data
        return visits(
            self.teacher, data.config, self.denoiser, shape=data.shape, numbers=numbers, streams=streams
        )


class Dealt:
    """A process's share of each batch of states; those of a batch come from trajectories of their own.

    Args:
        end: number of batches.
        entropy: the seed, and what keeps these draws apart from others of it.
        share: the part of each batch that is this process's.
        parts: into which the share is cut, to need less memory.
        count: rows of all batches together, where the last one is smaller.
    """

    def __init__(
        self,
        walked: Walked,
        *,
        batch_size: int,
        end: int,
        entropy: tuple[int, ...],
        share: slice = slice(None),
        parts: int = 1,
        count: int | None = None,
    ):
        self.walked, self.batch_size, self.end, self.entropy = walked, batch_size, end, entropy
        self.rows = torch.arange(batch_size)[share].chunk(parts)
        self.count = end * batch_size if count is None else count
        # states of a trajectory, and those of them that are dealt: few batches in all leave some over
        self.num_states = walked.data.config.calls
        self.num_dealt = self.num_states if count is None else min(self.num_states, end)
        self._blocks: dict[int, list[_Hand]] = {}

    @property
    def seconds_waited(self) -> float:
        """None: walking is work, not waiting."""
        return 0.0

    def at(self, number: int) -> NoisedBatch:
        """The states of a batch, each with the teacher's prediction for it."""
        block, place = divmod(number, self.num_dealt)
        is_last = (block + 1) * self.num_dealt >= self.end
        wanted = {block: self.num_states} | ({} if is_last else {block + 1: place + 1})
        self._blocks = {other: self._blocks.get(other) or self._begun(other) for other in wanted}
        device, precision = self.walked.device, self.walked.precision
        with torch.no_grad(), mixed_precision(device, precision):
            for other, num_states in wanted.items():
                for hand in self._blocks[other]:
                    hand.take(num_states)
        left = self.count - number * self.batch_size
        dealt = (
            torch.cat(same)[:left]
            for same in zip(*(hand.dealt(place) for hand in self._blocks[block]), strict=True)
        )
        x_t, t, target, numbers = dealt
        # numbers stay here: what a table of prompts holds is found by them
        return NoisedBatch(x_t.to(device), numbers, t.to(device), target=target.to(device))

    def close(self) -> None:
        self._blocks.clear()

    def _begun(self, block: int) -> "list[_Hand]":
        """The trajectories of a block, by micro-batch. All is drawn for the whole batch, and then cut."""
        draw, conditions = generator(*self.entropy, block, _BLOCK_STREAM), self.walked.denoiser.conditions
        numbers = torch.randint(len(conditions), (self.batch_size,), generator=draw)
        order = torch.rand(self.batch_size, self.num_states, generator=draw).argsort(dim=1)
        if conditions.dropout:
            nulls = conditions.nulls(numbers)
            assert nulls is not None, "conditions that are dropped have a null"
            is_dropped = torch.rand(self.batch_size, generator=draw) < conditions.dropout
            numbers = torch.where(is_dropped, nulls, numbers)
        return [
            _Hand(
                self.walked.visits(
                    numbers[rows],
                    [generator(*self.entropy, block, row, _ROW_STREAM) for row in rows.tolist()],
                ),
                numbers[rows],
                order[rows],
                self.num_dealt,
            )
            for rows in self.rows
        ]


class _Hand:
    """States of some rows' trajectories in the order in which they are dealt; they wait on the CPU.

    Args:
        order: the place [B, N] at which each state of a row is dealt; those from `num_dealt` on are not.
    """

    def __init__(self, visits: Iterator[Visit], numbers: Tensor, order: Int[Tensor, "b n"], num_dealt: int):
        self._visits, self._numbers, self._order, self._num_dealt = visits, numbers, order, num_dealt
        self._taken = 0
        self._states: tuple[Tensor, ...] = ()  # x_t, t and predictions, [num_dealt, B, ...]

    def take(self, num_states: int) -> None:
        """Walk on until so many states of each trajectory are known."""
        while self._taken < num_states:
            visit = next(self._visits)
            t = torch.full((len(visit.x),), visit.step)
            found = [visit.x.cpu(), t, visit.prediction.cpu()]
            if not all(a.isfinite().all() for a in found):
                raise TrainingError(
                    f"the teacher's own trajectories are not finite at step {visit.step:g} of the process: use precision: fp32, "
                    "or another sampler"
                )
            if not self._states:
                self._states = tuple(a.new_empty((self._num_dealt, *a.shape)) for a in found)
            places = self._order[:, self._taken]
            (rows,) = (places < self._num_dealt).nonzero(as_tuple=True)
            for states, state in zip(self._states, found, strict=True):
                states[places[rows], rows] = state[rows]
            self._taken += 1
        if self._taken == self._order.shape[1]:
            self._visits = iter(())  # nothing is left on the device

    def dealt(self, place: int) -> tuple[Tensor, ...]:
        """x_t, t, predictions and numbers of the conditions at a place."""
        return (*(states[place] for states in self._states), self._numbers)

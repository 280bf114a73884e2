"""Random numbers that depend on names, not on order: the same whatever ran before, the batch size or the processes.

Sample i draws from `generator(seed, i)`; training step s from `seeded(seed, s)`; so nothing needs to be saved to resume.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def generator(*entropy: int) -> torch.Generator:
    """A CPU generator for a tuple of non-negative integers, such as (seed, sample index)."""
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def sample_noise(seed: int, indices: list[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise [B, *shape]; row j depends on (seed, indices[j]) alone."""
    return torch.stack([torch.randn(shape, generator=generator(seed, i)) for i in indices])


def batch_indices(num_items: int, batch_size: int, step: int, seed: int) -> Tensor:
    """The items [batch_size] of training step `step`: epochs of seeded shuffles, cut into batches without a remainder."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // num_items
    orders = {e: torch.randperm(num_items, generator=generator(seed, e, 1)) for e in epochs.unique().tolist()}
    return torch.stack(
        [orders[e][p % num_items] for e, p in zip(epochs.tolist(), positions.tolist(), strict=True)]
    )


@contextmanager
def seeded(*entropy: int) -> Iterator[torch.Generator]:
    """Inside, torch's global generators start from `entropy` (for dropout); outside they are as before.

    Yields a CPU generator, from the same entropy, for explicit draws.
    """
    with torch.random.fork_rng():
        torch.manual_seed(generator(*entropy, 2).initial_seed())
        yield generator(*entropy)

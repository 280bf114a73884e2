"""Random numbers that depend on names, not on order: the same whatever ran before, the batch size or the processes.

Sample i draws from `generator(seed, i)`; training step s from `seeded(seed, s)`; so nothing needs to be saved to resume.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

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


def item_noise(seed: int, items: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise [B, *shape] of many stored items; row j depends on (seed, items[j]) alone.

    Almost twice as fast as `sample_noise`, whose numbers it does not give. No two items have the same noise: torch's
    generator keeps 32 bits of its seed, and these are a bijection of the item's number, shifted by a hash of `seed`.
    """
    stream, shift = torch.Generator(), generator(seed, 3).initial_seed()
    noise = torch.empty(len(items), *shape)
    for row, state in zip(noise.unbind(), (_mixed(items) + shift & 0xFFFFFFFF).tolist(), strict=True):
        row.normal_(generator=stream.manual_seed(state))
    return noise


def _mixed(numbers: Tensor) -> Tensor:
    """Whole numbers below 2^32, each to another one, scattered.

    Source: the last step of MurmurHash3 (`fmix32`, public domain).
    """
    x = numbers ^ numbers >> 16
    x = x * 0x85EBCA6B & 0xFFFFFFFF
    x = x ^ x >> 13
    x = x * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


def batch_indices(num_items: int, batch_size: int, step: int, seed: int) -> Tensor:
    """The items [batch_size] of training step `step`: epochs of seeded shuffles, cut into batches without a remainder."""
    first, end = step * batch_size, (step + 1) * batch_size
    epochs = range(first // num_items, (end - 1) // num_items + 1)
    starts = {epoch: epoch * num_items for epoch in epochs}
    return torch.cat(
        [_epoch_order(num_items, e, seed)[max(first - start, 0) : end - start] for e, start in starts.items()]
    )


# an order of ImageNet is 10 MB and takes 20 ms to draw, and a step needs one or two
@lru_cache(maxsize=4)
def _epoch_order(num_items: int, epoch: int, seed: int) -> Tensor:
    """All items in the order of an epoch; kept for the next step, so not to be written to."""
    return torch.randperm(num_items, generator=generator(seed, epoch, 1))


@contextmanager
def seeded(*entropy: int) -> Iterator[torch.Generator]:
    """Inside, torch's global generators, of the CPU and this process's GPU, start from `entropy` (for dropout); outside they
    are as before.

    Yields a CPU generator, from the same entropy, for explicit draws.
    """
    with restarted(generator(*entropy, 2).initial_seed()):
        yield generator(*entropy)


@contextmanager
def restarted(seed: int) -> Iterator[None]:
    """Inside, torch's global generators start from `seed`; outside they are as before.

    Of GPUs the process's own, where it has begun to use it: others would get a context of this process.
    """
    device = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(device):
        torch.default_generator.manual_seed(seed)
        if device:
            torch.cuda.manual_seed(seed)
        yield

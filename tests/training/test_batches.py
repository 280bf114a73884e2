"""A batch is the same however it is shared, and labels are dropped in the host's share."""

import torch

from grafting.machine.randomness import batch_indices, generator
from grafting.training.batches import Batches, draw
from grafting.training.distillation import DistillConfig
from grafting.training.supply import Stored
from toydata import denoiser, noise_images

CPU = torch.device("cpu")


def _draw(size, *, dropout=0.3, part=slice(None)):
    images = noise_images(size, size=16).batch(torch.arange(size)[part])
    how = denoiser(dropout=dropout)
    return draw(images, generator(5), batch_size=size, denoiser=how, part=part).noised(how, CPU)


def test_shares_and_parts_make_up_the_whole_batch():
    whole = _draw(24)
    for rank in range(3):
        share = _draw(24, part=slice(rank, None, 3))
        for name in ("x", "noise", "x_t", "numbers", "t"):
            assert torch.equal(getattr(share, name), getattr(whole, name)[rank::3]), name
        parts = share.split(4)
        assert [len(part.t) for part in parts] == [2, 2, 2, 2]
        assert torch.equal(torch.cat([part.x_t for part in parts]), share.x_t)


def test_labels_are_dropped_in_the_hosts_share():
    labels = _draw(1000, dropout=0.1).numbers
    assert 70 <= (labels == 10).sum() <= 130
    assert (_draw(8, dropout=1.0).numbers == 10).all()
    kept = labels != 10
    assert torch.equal(labels[kept], (torch.arange(1000) % 10)[kept])


def test_what_is_dropped_changes_nothing_else():
    dropped, kept = _draw(16, dropout=0.5), _draw(16, dropout=0.0)
    assert torch.equal(kept.numbers, torch.arange(16) % 10)
    for name in ("x", "noise", "x_t", "t"):
        assert torch.equal(getattr(dropped, name), getattr(kept, name)), name


def test_what_threads_draw_is_what_the_seed_and_the_step_say():
    data, how = noise_images(40, size=16), denoiser(dropout=0.3)
    config = DistillConfig(steps=9, batch_size=8, accumulate=2, seed=3)
    share = slice(1, None, 2)
    batches = Batches(Stored(data, how, CPU).steps(config, share=share, end=9), config, share=share)
    for step in (4, 5, 6, 0):
        items = batch_indices(40, 8, step, 3)[1::2]
        drawn = draw(data.batch(items), generator(3, step), batch_size=8, denoiser=how, part=share)
        want = drawn.noised(how, CPU).split(2)
        for got, part in zip(batches.at(step), want, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got[:5], part[:5], strict=True))

"""Random numbers depend on names alone: not on order, batch or what ran before."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grafting.machine.randomness import _mixed, batch_indices, generator, item_noise, sample_noise, seeded


def draw(*entropy: int) -> torch.Tensor:
    return torch.randn(4, generator=generator(*entropy))


def test_a_name_gives_one_stream_and_another_name_another():
    assert torch.equal(draw(0, 1), draw(0, 1))
    names = [(0, 1), (1, 0), (0, 2), (0, 1, 1), (0, 1, 2), (2**40, 1)]
    drawn = torch.stack([draw(*name) for name in names])
    assert len(drawn.unique(dim=0)) == len(names)


def test_negative_names_are_refused():
    with pytest.raises(ValueError, match="non-negative"):
        generator(-1)


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    whole = sample_noise(3, [0, 1, 2, 7], (2, 4, 4))
    assert torch.equal(whole[2:3], sample_noise(3, [2], (2, 4, 4)))
    assert torch.equal(whole[[3, 0]], sample_noise(3, [7, 0], (2, 4, 4)))


def test_noise_is_standard_normal():
    noise = sample_noise(0, list(range(200)), (1, 10, 10))
    assert noise.mean().abs() < 0.03
    assert (noise.std() - 1).abs() < 0.03
    assert noise.flatten(1).corrcoef().fill_diagonal_(0).abs().max() < 0.5


@settings(deadline=None, max_examples=25)
@given(num_items=st.integers(1, 40), batch_size=st.integers(1, 12), seed=st.integers(0, 9))
def test_every_epoch_visits_every_item_once(num_items, batch_size, seed):
    steps = -(-2 * num_items // batch_size)
    visited = torch.cat([batch_indices(num_items, batch_size, step, seed) for step in range(steps)])
    for epoch in range(2):
        assert sorted(visited[epoch * num_items : (epoch + 1) * num_items].tolist()) == list(range(num_items))


def test_batches_are_shuffled_anew_in_each_epoch_and_for_each_seed():
    first, second = batch_indices(50, 50, 0, 0), batch_indices(50, 50, 1, 0)
    assert not torch.equal(first, second)
    assert not torch.equal(first, batch_indices(50, 50, 0, 1))
    assert torch.equal(first, batch_indices(50, 50, 0, 0))


def test_seeded_leaves_the_global_generator_as_it_was():
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    with seeded(1, 2) as stream:
        inside, explicit = torch.rand(3), torch.rand(3, generator=stream)
    assert torch.equal(torch.rand(3), want)
    torch.manual_seed(99)
    with seeded(1, 2) as stream:
        assert torch.equal(torch.rand(3), inside)
        assert torch.equal(torch.rand(3, generator=stream), explicit)
    assert not torch.equal(inside, explicit)


def test_seeded_restores_the_generator_after_an_error():
    torch.manual_seed(5)
    before = torch.get_rng_state()

    def fail_inside() -> None:
        with seeded(0):
            torch.rand(1)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_is_cut_from_the_shuffles_of_its_epochs():
    orders = [torch.randperm(7, generator=generator(3, epoch, 1)) for epoch in range(4)]
    assert torch.equal(batch_indices(7, 10, 1, 3), torch.cat(orders)[10:20])
    batch_indices(7, 10, 1, 3).zero_()  # what is kept between steps cannot be written to
    assert torch.equal(batch_indices(7, 7, 2, 3), orders[2])


def test_noise_of_an_item_does_not_depend_on_its_batch():
    items = torch.tensor([5, 0, 1_281_166, 5])
    noise = item_noise(3, items, (2, 4, 4))
    assert torch.equal(noise[2:3], item_noise(3, items[2:3], (2, 4, 4)))
    assert torch.equal(noise[0], noise[3])
    assert not torch.equal(noise[:1], item_noise(4, items[:1], (2, 4, 4)))
    assert torch.equal(item_noise(0, items[:0], (2, 4, 4)), torch.empty(0, 2, 4, 4))


def test_noise_of_items_is_standard_normal_and_independent():
    noise = item_noise(0, torch.arange(200), (1, 10, 10))
    assert noise.mean().abs() < 0.03
    assert (noise.std() - 1).abs() < 0.03
    assert noise.flatten(1).corrcoef().fill_diagonal_(0).abs().max() < 0.5


def test_no_two_items_share_their_noise():
    assert len(_mixed(torch.arange(2**21)).unique()) == 2**21
    assert len(item_noise(0, torch.arange(5000), (16,))[:, 0].unique()) > 4990


def test_cuda_that_nothing_has_started_stays_asleep_and_unseeded(monkeypatch):
    """As on a machine with a GPU, before the first use of it."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for name in ("get_rng_state", "set_rng_state", "manual_seed"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("CUDA was started"))
    before = torch.get_rng_state()
    with seeded(4) as first:
        drawn = torch.rand(3), torch.rand(3, generator=first)
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.undo()
    with seeded(4) as again:
        assert torch.equal(torch.rand(3), drawn[0])
        assert torch.equal(torch.rand(3, generator=again), drawn[1])


def test_of_several_gpus_the_process_own_is_seeded(monkeypatch):
    states, put_back, seeds = {0: torch.zeros(2), 1: torch.ones(2)}, {}, []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: put_back.update({device: state}))
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds.append)
    with seeded(4):
        assert (len(seeds), put_back) == (1, {})
    assert put_back == {1: states[1]}

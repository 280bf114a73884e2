"""The loader gives the numbers of reading in place, whatever its threads do, passes errors on, and leaves no thread behind."""

import gc
import threading
import time
from collections.abc import Callable

import pytest
import torch

from grafting.errors import DataError
from grafting.machine.randomness import batch_indices
from grafting.training.loader import Loader

LEFT: frozenset[threading.Thread] = frozenset()


class Numbers:
    """Item i is an image full of i, of class i % 3; what was read is on record, and `before` is called each time."""

    num_classes = 3

    def __init__(self, count: int = 20, before: Callable[[torch.Tensor], None] = lambda indices: None):
        self.count, self.before, self.read = count, before, []

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.before(indices)
        self.read.append(indices)
        return indices.float()[:, None, None, None].expand(-1, 1, 2, 2), indices % 3


@pytest.fixture(autouse=True)
def others(monkeypatch) -> None:
    """Threads of loaders that tests before have left, such as those of a stage that was never taken to its end."""
    monkeypatch.setitem(globals(), "LEFT", frozenset(threading.enumerate()))


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("grafting-loader") and t not in LEFT]


def items(batch: tuple[torch.Tensor, torch.Tensor]) -> list[int]:
    x, labels = batch
    assert torch.equal(labels, x[:, 0, 0, 0].long() % 3)
    return x[:, 0, 0, 0].long().tolist()


@pytest.mark.parametrize(("prefetch", "workers"), [(0, 1), (2, 1), (5, 3)])
def test_batches_are_those_of_reading_in_place(prefetch: int, workers: int):
    with Loader(Numbers(), 8, seed=3, steps=9, prefetch=prefetch, workers=workers) as loader:
        found = [items(batch) for batch in map(loader.at, range(2, 9))]
    assert found == [batch_indices(20, 8, step, 3).tolist() for step in range(2, 9)]


def test_any_step_may_be_asked_for_next():
    with Loader(Numbers(), 4, seed=0) as loader:
        for step in (0, 1, 7, 2, 3, 3, 1000):
            assert items(loader.at(step)) == batch_indices(20, 4, step, 0).tolist()


def test_shares_of_all_processes_are_the_batch():
    found = []
    for rank in range(3):
        with Loader(Numbers(), 6, seed=1, share=slice(rank, None, 3)) as loader:
            found.append(items(loader.at(4)))
    assert [i for row in zip(*found, strict=True) for i in row] == batch_indices(20, 6, 4, 1).tolist()


def test_only_the_items_that_are_trained_on_are_read():
    chosen = torch.tensor([17, 3, 11])
    with Loader(Numbers(), 3, seed=1, items=chosen) as loader:
        assert items(loader.at(0)) == chosen[batch_indices(3, 3, 0, 1)].tolist()


def test_nothing_after_the_last_step_is_read():
    data = Numbers()
    with Loader(data, 4, seed=0, steps=3, prefetch=5) as loader:
        for step in (0, 1, 2, 1, 2):
            loader.at(step)
    assert len(data.read) == 5


def test_no_more_is_read_ahead_than_was_asked():
    data = Numbers()
    with Loader(data, 4, seed=0, prefetch=2) as loader:
        loader.at(0)
    assert len(data.read) <= 3


def test_the_next_batch_is_read_in_the_meantime():
    gate = threading.Event()
    data = Numbers(before=lambda indices: gate.wait(10))
    with Loader(data, 4, seed=0, prefetch=1) as loader:
        gate.set()
        loader.at(0)
        deadline = time.monotonic() + 10
        while len(data.read) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        waited = loader.seconds_waited
        gate.clear()  # from here on nothing new can be read
        loader.at(1)
        assert loader.seconds_waited - waited < 5
        gate.set()


def test_waiting_is_counted():
    with Loader(Numbers(before=lambda indices: time.sleep(0.05)), 4, seed=0, prefetch=0) as loader:
        assert loader.seconds_waited == 0
        loader.at(0)
        loader.at(1)
        assert loader.seconds_waited > 0.09


def test_an_error_is_passed_on_at_its_step_and_the_loader_goes_on():
    lost = set(batch_indices(20, 4, 2, 0).tolist())

    def fail(indices: torch.Tensor) -> None:
        if set(indices.tolist()) == lost:
            raise DataError("the shard latents-00007.safetensors is missing")

    data = Numbers(before=fail)
    with Loader(data, 4, seed=0) as loader:
        loader.at(0)
        loader.at(1)
        with pytest.raises(DataError, match="latents-00007"):
            loader.at(2)
        assert items(loader.at(3)) == batch_indices(20, 4, 3, 0).tolist()
        data.before = lambda indices: None
        assert set(items(loader.at(2))) == lost
    assert not threads()


def test_threads_end_with_the_block_whatever_ends_it():
    with pytest.raises(KeyError), Loader(Numbers(), 4, seed=0, workers=2) as loader:
        loader.at(0)
        assert threads()
        raise KeyError
    assert not threads()


def test_threads_of_a_forgotten_loader_end():
    loader = Loader(Numbers(), 4, seed=0)
    loader.at(0)
    del loader
    deadline = time.monotonic() + 10
    while threads() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert not threads()


def test_no_items_are_refused():
    with pytest.raises(DataError, match="there are no items"):
        Loader(Numbers(0), 8, seed=0)


@pytest.mark.gpu
def test_batches_in_pinned_memory():
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA: pytest -m gpu")
    with Loader(Numbers(), 4, seed=0, pin=True) as loader:
        x, labels = loader.at(3)
    assert x.is_pinned()
    assert labels.is_pinned()
    assert items((x, labels)) == batch_indices(20, 4, 3, 0).tolist()

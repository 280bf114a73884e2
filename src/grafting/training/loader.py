"""The batches of training steps, read ahead in background threads.

A step's batch is a pure function of the data, the seed and the step, so nothing of a loader is saved: one that begins at step
1,000 gives what one that came there gives. Threads change when a batch is read, never what is in it.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from ..contract import TrainingData
from ..errors import DataError
from ..machine.randomness import batch_indices

_WHOLE = slice(None)


class Loader:
    """The batches of steps by number, this process's share of each; those that follow are read in the meantime.

    Use it as a context manager: its threads end with the block. Without one they end when the loader is no longer
    referred to.

    Args:
        data: images or latents; `data.batch` is called from other threads.
        batch_size: items a step, over all processes.
        seed: of the order of the items.
        items: the items of `data` to train on; all when left out.
        steps: number of steps in all; without end when left out.
        share: the part of each batch that is this process's, such as `processes.share()`.
        prefetch: batches read ahead; 0 reads each when it is asked for.
        workers: threads that read, each a batch at a time; several, since a network's disk is slow to answer, not to read.
        pin: give tensors in pinned memory, from which copies to an accelerator overlap with computation.
        finish: makes of a step and its items what is given for it, in the threads that read; by default the items.

    Raises:
        DataError: there are no items.
    """

    def __init__(
        self,
        data: TrainingData,
        batch_size: int,
        *,
        seed: int,
        items: Tensor | None = None,
        steps: int | None = None,
        share: slice = _WHOLE,
        prefetch: int = 4,
        workers: int = 4,
        pin: bool = False,
        finish: Callable[[int, tuple[Tensor, Tensor]], tuple[Tensor, ...]] = lambda step, items: items,
    ):
        self._count = len(data) if items is None else len(items)
        if not self._count:
            raise DataError("there are no items to batch")
        self._data, self._batch_size, self._seed, self._items = data, batch_size, seed, items
        self._steps, self._share, self._prefetch = steps, share, prefetch
        self._pin, self._finish = pin, finish
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="grafting-loader")
        self._ahead: dict[int, Future[tuple[Tensor, ...]]] = {}
        self.seconds_waited = 0.0
        """Time that callers have waited for batches."""

    def at(self, step: int) -> tuple[Tensor, ...]:
        """This process's items [b, C, H, W] of training step `step`, and their labels [b]; or what `finish` makes of them.

        Fast for the step after the last one; any other step restarts there.
        """
        started = time.perf_counter()
        self._look_ahead(step)
        batch = self._ahead.pop(step).result()
        self.seconds_waited += time.perf_counter() - started
        return batch

    def close(self) -> None:
        """End the threads; what they are reading is thrown away."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _look_ahead(self, step: int) -> None:
        """Has `step` and those that follow it read, and nothing else."""
        end = step + 1 + self._prefetch
        if self._steps is not None:
            end = max(step + 1, min(end, self._steps))
        for other in [s for s in self._ahead if not step <= s < end]:
            self._ahead.pop(other).cancel()
        for wanted in range(step, end):
            if wanted not in self._ahead:
                self._ahead[wanted] = self._pool.submit(self._read, wanted)

    def _read(self, step: int) -> tuple[Tensor, ...]:
        indices = batch_indices(self._count, self._batch_size, step, self._seed)[self._share]
        items = read_items(self._data, indices if self._items is None else self._items[indices])
        finished = self._finish(step, items)
        return tuple(tensor.contiguous().pin_memory() for tensor in finished) if self._pin else finished


def read_items(data: TrainingData, indices: Tensor) -> tuple[Tensor, Tensor]:
    """These items, and their labels.

    Raises:
        DataError: one holds values that are not finite, with which nothing can be fitted.
    """
    x, labels = data.batch(indices)
    bad = (~x.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise DataError(
            f"item {int(indices[bad[0]])} of the training data ({type(data).__name__}, {len(data)} items) holds values that "
            "are not finite: mend it, or leave it out"
        )
    return x, labels

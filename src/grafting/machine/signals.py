"""SIGTERM and SIGINT, taken as a wish to stop: whoever works in steps finishes the one it is at, saves, and ends.

The command line catches the signals; where nobody does, as in a notebook, Python's own rules hold.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)

# a terminal signals all its processes, and torchrun then passes on to them what it got: within this time it is one wish
_ONE_WISH_S = 2.0


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to stop. Like its base it is no `Exception`, so that nobody handles it by accident."""

    def __init__(self, signum: int):
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """Exit code that a shell expects after a signal: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + self.signum


class _Wish:
    """The signal that came while it could wait and when, the one that did not wait, and how many ask that signals wait;
    one a process, as signals are."""

    signum: int | None = None
    since: float = 0.0
    raised: int | None = None
    waiting: int = 0


@contextmanager
def catching_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGINT raise `Interrupted`: at once, or where `deferred` is in force when its user is ready.

    A second signal does not wait, unless it comes so soon that a launcher passed the first one on. Does nothing outside of
    the main thread, where signals cannot be caught.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {signum: signal.signal(signum, _handle) for signum in SIGNALS}
    try:
        yield
    except Exception as error:
        if _Wish.raised is None:
            raise
        raise Interrupted(_Wish.raised) from error  # which foreign code took for an error of its own
    finally:
        _Wish.signum = _Wish.raised = None
        for signum, handler in earlier.items():
            signal.signal(signum, handler)


@contextmanager
def deferred() -> Iterator[Callable[[], int | None]]:
    """Inside, a caught signal waits; what is yielded says which one came, if any. Nothing is raised at the end."""
    _Wish.waiting += 1
    try:
        yield caught_signal
    finally:
        _Wish.waiting -= 1


def caught_signal() -> int | None:
    """The signal that came while it could wait, if any: whoever made it wait raises `Interrupted` when it is ready."""
    return _Wish.signum


def _handle(signum: int, frame: FrameType | None) -> None:
    if _Wish.waiting and _Wish.signum is None:
        _Wish.signum, _Wish.since = signum, time.monotonic()
        return
    if _Wish.waiting and time.monotonic() - _Wish.since < _ONE_WISH_S:
        return
    _Wish.raised = signum
    raise Interrupted(signum)

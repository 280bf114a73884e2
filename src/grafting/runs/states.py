"""The states that a stage of a run resumes from: whole or absent, with checksums, and two of them.

When the newer is damaged the older takes its place, with a warning. A state names its owner, all that the stage depends on, as
a hash: a state of equal shapes may be of another recipe. A state is written in a thread, from a copy, while the stage goes on.
"""

import io
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..contract import FolderState, State
from ..errors import CheckpointError, FaultWarning, ResumeWarning
from ..machine.files import atomic_folder, folder_faults, partial_path
from ..machine.reading import read_text, read_torch
from ..machine.sharding import kept_copy

STATE_NAME = "state.pt"
OWNER_NAME = "owner.txt"
NUM_STATES = 2


class SavedState(NamedTuple):
    """What was saved after a step: a dict, or the folder of a state that wrote itself."""

    step: int
    content: State | Path


def newest_state(states: Path, *, owner: str) -> SavedState | None:
    """The newest whole state of a stage's folder of states; None if there is none to resume from.

    Raises:
        CheckpointError: there are states, all of them damaged, or it is another owner's; says how to restart the stage.
    """
    faults: list[str] = []
    for folder in reversed(_folders(states)):
        step = int(folder.name)
        try:
            state = SavedState(step, read_state(folder))
        except CheckpointError as error:
            faults.append(str(error))
            continue
        _check_owner(folder, owner)
        if faults:
            warnings.warn(f"{'; '.join(faults)}. Resuming from step {step}", FaultWarning, stacklevel=3)
        return state
    if faults:
        raise CheckpointError(f"{'; '.join(faults)}. Delete {states} to restart the stage")
    return None


def write_state(states: Path, state: State | FolderState, step: int, *, owner: str, is_writer: bool) -> None:
    """Keep the state after a step, and of older ones the last.

    A state that writes itself is asked to on every process, into the same folder; one process is the writer of the rest.
    """
    path = states / f"{step:010d}"
    if not is_writer:
        if isinstance(state, FolderState):
            state.save(partial_path(path))
        return
    with atomic_folder(path) as folder:
        (folder / OWNER_NAME).write_text(f"{owner}\n")
        if isinstance(state, FolderState):
            state.save(folder)
        else:
            _save(state, folder / STATE_NAME)
    # after a return to an older state, those that it undid are of no use
    kept = [folder for folder in _folders(states) if folder.name <= path.name][-NUM_STATES:]
    for folder in _folders(states):
        if folder not in kept:
            shutil.rmtree(folder)


@dataclass(frozen=True)
class Every:
    """When states are saved: after so many steps, and when so many seconds have passed since the last one."""

    steps: int | None
    seconds: int | float

    def is_due(self, done: int) -> bool:
        """True if the state after this step is saved whatever the time."""
        return self.steps is not None and done % self.steps == 0


class StateWriter:
    """Writes a stage's states, one at a time. An error of a thread is raised by the next call.

    What several processes write together is written at once: they meet while they do.
    """

    def __init__(self, states: Path, *, owner: str, is_writer: bool):
        self._states, self._owner, self._is_writer = states, owner, is_writer
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grafting-states")
        self._writing: Future[None] | None = None

    def write(self, state: State | FolderState, step: int) -> None:
        """Keep the state after a step; see `write_state`. It may change as soon as this returns."""
        self.wait()
        write = partial(write_state, self._states, owner=self._owner, is_writer=self._is_writer)
        if isinstance(state, FolderState) or not self._is_writer:
            write(state, step)
        else:
            self._writing = self._pool.submit(write, kept_copy(state), step)

    def check(self) -> None:
        """Raise the error of a state that could not be written."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Return when all states are on disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        self._pool.shutdown()
        self.wait()


def read_state(folder: Path) -> State | Path:
    """A state as it was saved, or its folder.

    Raises:
        CheckpointError: it is damaged.
    """
    faults = folder_faults(folder)
    if faults:
        raise CheckpointError(f"{folder} is damaged: {', '.join(faults)}")
    path = folder / STATE_NAME
    if not path.is_file():
        return folder
    content = read_torch(path, kind="a whole state")
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds a {type(content).__name__}")
    return content


def _check_owner(folder: Path, owner: str) -> None:
    path = folder / OWNER_NAME
    if not path.is_file():
        told = f"{folder} is a state of an earlier version, which did not note whose it is: taken for this stage's"
        warnings.warn(told, ResumeWarning, stacklevel=4)
    elif read_text(path, error=CheckpointError).strip() != owner:
        raise CheckpointError(
            f"{folder} is the state of another recipe, or of another stage. Delete {folder.parent} to restart the stage"
        )


def _folders(states: Path) -> list[Path]:
    return sorted(states.glob("[!.]*"))


class _Watched(io.BufferedWriter):
    """A file to write to that remembers why a write failed, which torch does not tell."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path, "wb"))
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as error:
            self.error = error
            raise


def _save(state: State, path: Path) -> None:
    file = _Watched(path)
    try:
        torch.save(state, file)
    except RuntimeError as error:
        raise file.error or error from None
    finally:
        file.close()

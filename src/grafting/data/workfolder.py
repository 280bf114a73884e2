"""A folder while it is filled, shard by shard, by any number of processes that see the same files.

A shard's bytes depend on the work's facts and its number alone. It is done when its record, with its checksum, lies in `shards/`; so a
process that is killed loses the shard it was at, and whoever resumes finds the rest.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..errors import DataError, FaultWarning, ResumeWarning, RunError, listed
from ..machine.files import (
    clear_abandoned,
    disk_errors,
    disk_of,
    flatten,
    hash_json,
    is_empty,
    sha256_of,
    write_json,
)
from ..machine.locks import Lock, Taken
from ..machine.reading import JsonObject, read_json, shown
from ..machine.settings import Stored
from .shards import StoredFile

WORK_NAME = "work.json"
RECORDS_NAME = "shards"


class ShardRecord(Stored):
    """Outcome of a shard."""

    shard: StoredFile | None  # None where nothing of it could be read
    owner: str | None = None  # a hash of the work and the shard's number; None: an earlier version noted none


R = TypeVar("R", bound=ShardRecord)


class WorkFolder(Generic[R]):
    """A folder, the facts of the work that fills it, and the records of its shards.

    Args:
        facts: all that the shards' bytes depend on, as JSON.
        what: its content, in the plural.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], record: type[R], *, what: str):
        self.folder, self.facts, self.record, self.what = folder, dict(facts), record, what
        self._has_told = False

    def check(self) -> None:
        """Raises a RunError if the folder holds anything else than a part of this work, and says what differs."""
        if not self.folder.exists():
            return
        path = self.folder / WORK_NAME
        # looked at first: whoever makes the folder now says what it is before anything else
        empty = is_empty(self.folder)
        if not path.is_file():
            if not empty:
                raise RunError(
                    f"{self.folder} exists and is not a folder of {self.what} that was begun: name another, or empty it"
                )
            return
        found = flatten(read_json(path, JsonObject, kind="the record of a work", error=RunError))
        asked = flatten(self.facts)
        if keys := sorted(key for key in asked | found if asked.get(key) != found.get(key)):
            lines = [f"{key}: asked {asked.get(key)!r}, found {shown(found.get(key))}" for key in keys]
            head = f"{self.folder} holds {self.what} of another work; name another folder, or empty it:"
            raise RunError(listed(head, lines))

    def check_space(self, needed: int, *, remedy: str) -> int:
        """Bytes that are free.

        Raises:
            RunError: fewer than `needed`.
        """
        free: int = disk_of(self.folder)[1].free
        if needed > free:
            raise RunError(
                f"{self.folder}: {needed / 1e9:.1f} GB remain to be written and {free / 1e9:.1f} GB are free; "
                f"name a folder on another disk, or {remedy}"
            )
        return free

    def path(self, number: int) -> Path:
        return self.folder / RECORDS_NAME / f"{number:05}.json"

    def read(self, number: int) -> R | None:
        """Record of a shard; None if it is missing, damaged or another shard's, and the shard has to be made again."""
        try:
            record = read_json(self.path(number), self.record, error=DataError)
        except DataError:
            return None
        if record.owner is None and not self._has_told:
            self._has_told = True
            told = f"{self.folder} has shards of an earlier version, which did not note whose they are: taken as named"
            warnings.warn(told, ResumeWarning, stacklevel=4)
        if record.owner not in (None, self.owner(number)):
            told = f"{self.path(number)} is of another shard or another work; it is made again"
            warnings.warn(told, FaultWarning, stacklevel=4)
            return None
        return record

    def owner(self, number: int) -> str:
        return hash_json([self.facts, number])

    def write(self, number: int, record: R) -> None:
        write_json(self.path(number), record.model_dump(mode="json"))

    def is_done(self, number: int) -> bool:
        """True if the shard is there and is the one of its record."""
        record = self.read(number)
        if record is None or record.shard is None:
            return record is not None
        path = self.folder / record.shard.file
        return path.is_file() and sha256_of(path) == record.shard.sha256

    @contextmanager
    def working(self, num_shards: int, share: slice) -> Iterator[list[int]]:
        """Inside, this process fills the folder: gives its shards still to do, of those in its share.

        A shard whose file is not the one of its record is done again. What a killed process left half-written is removed.
        """
        self.check()
        write_json(self.folder / WORK_NAME, self.facts)
        with self._locked(f".lock-{share.start}-of-{share.step}"):
            clear_abandoned(self.folder)
            yield [n for n in range(num_shards)[share] if not self.is_done(n)]

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        try:
            with disk_errors(self.folder):
                lock = Lock(self.folder / name)
        except Taken:
            raise RunError(
                f"another process is working on the same shards of {self.folder}: wait for it to "
                "finish, or start several processes with torchrun to share the work"
            ) from None
        with lock:  # where there are no locks, two at the same shards write the same bytes
            yield

"""Members of tar files by position, read where they lie: nothing is unpacked, so no member can leave the archive."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..machine.reading import read_stretches, tar_members


@dataclass(frozen=True, slots=True)
class Member:
    """A stretch of a file."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Its bytes; threads may read at once."""
        content = np.empty(self.size, np.uint8)
        read_stretches(self.path, [(content, self.offset)])
        return content.tobytes()


def tar_files(source: Path) -> list[Path]:
    """A tar, or all tars of a folder by name.

    Raises:
        DataError: there are none.
    """
    if source.is_file():
        return [source]
    found = sorted(source.glob("*.tar"))
    if not found:
        raise DataError(f"no tar files in {source}: give a .tar or a folder of them")
    return found


def members(tar: Path) -> Iterator[tuple[str, Member]]:
    """Path and place of every plain file in a tar, in its order; links, devices and folders are passed over."""
    _check_end(tar, tar.stat().st_size)
    for name, offset, size in tar_members(tar):
        yield name, Member(tar, offset, size)


def _check_end(tar: Path, size: int) -> None:
    """An archive ends in two empty blocks; without them a cut between two members would go unnoticed."""
    end = Member(tar, max(size - 1024, 0), min(size, 1024)).read()
    if end.strip(b"\0") or not end:
        raise DataError(f"{tar} was cut short, or is not an uncompressed tar file: it has no end mark")

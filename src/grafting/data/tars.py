"""Members of tar files by position, read where they lie: nothing is unpacked, so no member can leave the archive."""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError


@dataclass(frozen=True, slots=True)
class Member:
    """A stretch of a file."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Its bytes; threads may read at once.

        Raises:
            OSError: the file is missing, or ends too early.
        """
        with self.path.open("rb", buffering=0) as file:
            content = os.pread(file.fileno(), self.size, self.offset)
        if len(content) != self.size:
            raise OSError(f"{self.path} ends {self.size - len(content)} bytes too early")
        return content


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
    """Path and place of every plain file in a tar, in its order; links, devices and folders are passed over.

    Raises:
        DataError: not a tar, a compressed one, or one that was cut short.
    """
    size = tar.stat().st_size
    _check_end(tar, size)
    try:
        with tarfile.open(tar, "r:") as archive:
            for info in archive:
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps all that it saw; an attribute without a type
                if not info.isreg() or info.issparse():
                    continue
                if info.offset_data + info.size > size:
                    raise DataError(f"{tar} was cut short: {info.name} ends after the end of the file")
                yield info.name, Member(tar, info.offset_data, info.size)
    except tarfile.TarError as error:
        raise DataError(f"{tar} is not an uncompressed tar file, or is damaged: {error}") from error


def _check_end(tar: Path, size: int) -> None:
    """An archive ends in two empty blocks; without them a cut between two members would go unnoticed."""
    end = Member(tar, max(size - 1024, 0), min(size, 1024)).read()
    if end.strip(b"\0") or not end:
        raise DataError(f"{tar} was cut short, or is not an uncompressed tar file: it has no end mark")

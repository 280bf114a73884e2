"""Files and folders that are whole or absent: atomic writes, hashes, and the errors of full or read-only disks in one
sentence.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import RunError

SUMS_NAME = "SHA256SUMS"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; becomes `path` when the block ends well, else is removed.

    Raises:
        RunError: the disk is full or the folder cannot be written to; `path` is as it was.
    """
    if path.is_dir():
        raise RunError(f"cannot write {path}: it is a folder; name a file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.chmod(0o666 & ~_umask())  # some writers make files that only their owner can read
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` to fill; becomes `path`, with the checksums of its files, when the block ends well.

    Its name depends on `path` alone, so that several processes can fill it together.

    Raises:
        RunError: the disk is full or the folder cannot be written to; nothing is left of it.
    """
    temporary = partial_folder(path)
    with disk_errors(path):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            names = _files_in(temporary)
            sums = "".join(f"{sha256_of(temporary / name)}  {name}\n" for name in names)
            (temporary / SUMS_NAME).write_text(sums)
            for file in (*names, SUMS_NAME, "."):
                _sync(temporary / file)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def partial_folder(path: Path) -> Path:
    """Temporary path where `atomic_folder` fills a folder."""
    return path.with_name(f".{path.name}.partial")


def is_empty(folder: Path) -> bool:
    """True if it is a folder without files except hidden ones, such as locks and files being written."""
    return folder.is_dir() and not any(folder.glob("[!.]*"))


def check_is_new(folder: Path) -> None:
    """Raises a RunError if something is where a folder is to be written: it may be all that there is of somebody's work."""
    if folder.is_dir() and not is_empty(folder):
        names = sorted(path.name for path in folder.glob("[!.]*"))
        raise RunError(
            f"{folder} exists and holds {', '.join(names[:4])}{', ...' * (len(names) > 4)}: name a new folder"
        )
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file: name a new folder")


def folder_faults(path: Path) -> list[str]:
    """Faults of a folder that `atomic_folder` made: files that changed since; empty if there are none."""
    try:
        lines = (path / SUMS_NAME).read_text().splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError):
        return [f"{SUMS_NAME} is missing or damaged"]
    found = set(_files_in(path)) - {SUMS_NAME}
    return [
        *(f"{name} is missing" for name in sums.keys() - found),
        *(f"{name} is not of this folder" for name in found - sums.keys()),
        *(
            f"{name} does not agree with its checksum"
            for name in sorted(sums.keys() & found)
            if sha256_of(path / name) != sums[name]
        ),
    ]


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Inside, a disk that is full or cannot be written to is one sentence about `path`.

    Raises:
        RunError: in the place of an OSError, also one that a library in Rust reports by its number.
    """
    try:
        yield
    except Exception as error:
        cause = _os_error(error)
        if cause is None:
            raise
        raise RunError(
            f"cannot write {path}: {cause.strerror or cause}; what was there is unchanged"
        ) from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, indented, keys in their order; numbers that are not finite become null."""
    write_bytes(path, (json.dumps(finite_json(value), indent=2, allow_nan=False) + "\n").encode())


def finite_json(value: Any) -> Any:
    """The value as JSON has words for it: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {name: finite_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def pickle_fault(error: Exception) -> str:
    """Why torch did not read a file as tensors alone, without its advice to run what the file says."""
    return str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0].partition(". ")[0]


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """The SHA-256, in hex, of a JSON value with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= flatten(item, f"{prefix}{name}.") if isinstance(item, Mapping) else {f"{prefix}{name}": item}
    return flat


def _os_error(error: Exception) -> OSError | None:
    """The error of the operating system that an error is or tells of."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def _files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

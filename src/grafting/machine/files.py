"""Files and folders that are whole or absent: atomic writes, hashes, and the errors of full or read-only disks in one
sentence.
"""

import filecmp
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import GraftingError, RunError
from .locks import hold

SUMS_NAME = "SHA256SUMS"

_PARTIAL, _LOCK = ".partial", ".lock"

Stamp: TypeAlias = tuple[int, ...]

# file systems keep times in steps of up to two seconds
_SETTLED_S = 2.5


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path to write to; becomes `path` when the block ends well, else is removed.

    It lies in a folder beside `path`, together with what libraries write on their way to it. What a killed process left
    there goes when `path` is written again. Of processes that write the same path one waits for the other.

    Raises:
        RunError: the disk is full or the folder cannot be written to; `path` is as it was.
    """
    if path.is_dir():
        raise RunError(f"cannot write {path}: it is a folder; name a file")
    with disk_errors(path), _workplace(path, wait=True) as temporary:
        yield temporary
        _settle(temporary)
        os.replace(temporary, path)
        _sync(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` to fill; becomes `path`, with the checksums of its files, when the block ends well.

    Its name depends on `path` alone, so that several processes can fill it together.

    Raises:
        RunError: the disk is full or the folder cannot be written to; nothing is left of it.
    """
    with disk_errors(path), _workplace(path) as temporary:
        temporary.mkdir()
        yield temporary
        names = _files_in(temporary)
        sums = "".join(f"{sha256_of(temporary / name)}  {name}\n" for name in names)
        (temporary / SUMS_NAME).write_text(sums)
        _settle(temporary)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
        _sync(path.parent)


@contextmanager
def atomic_files(path: Path, *, last: str, stale: Iterable[str] = ()) -> Iterator[Path]:
    """A temporary folder beside `path` to fill; its files become those of `path` when the block ends well.

    Where `path` is new they do so all at once. Else they replace its files one by one, and `last`, without which the folder
    is nothing, is not there meanwhile.

    Args:
        stale: files of the folder that do not go with the new ones.

    Raises:
        RunError: the disk is full, the folder cannot be written to, or another process is writing it.
    """
    with disk_errors(path), _workplace(path) as temporary:
        temporary.mkdir()
        yield temporary
        _settle(temporary)
        for name in (last, *stale):
            (path / name).unlink(missing_ok=True)
        _move(temporary, path, last=last)


@contextmanager
def new_folder(path: Path, *, last: str) -> Iterator[Path]:
    """A temporary path to make a folder at; becomes `path` when the block ends well, else is removed.

    Where `path` holds the same already, as after a command that was killed at its very end, it stays. Args as `atomic_files`.

    Raises:
        RunError: `path` holds something else; before the block unless it has a file `last`.
    """
    if not (path / last).is_file():
        check_is_new(path)
    with disk_errors(path), _workplace(path) as made:
        yield made
        if not _is_same(made, path):
            check_is_new(path)
            _move(made, path, last=last)


def _move(made: Path, path: Path, *, last: str) -> None:
    """Move a folder to its place at once or, where others' files are there, file by file."""
    if path.is_dir() and any(path.iterdir()):
        for name in sorted(_files_in(made), key=lambda name: name == last):
            os.replace(made / name, path / name)
        _sync(path)
    else:
        os.replace(made, path)
    _sync(path.parent)


def _is_same(folder: Path, other: Path) -> bool:
    """True if the other folder holds the same files, hidden ones aside."""
    names, others = (_files_in(f) for f in (folder, other))
    return names == [name for name in others if not name.startswith(".")] and all(
        filecmp.cmp(folder / name, other / name, shallow=False) for name in names
    )


def clear_abandoned(folder: Path) -> None:
    """Remove what killed processes were writing in a folder and those below it. What is being written is locked, and stays."""
    # not rglob, which fails where a folder goes while it looks
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if name.startswith(".") and name.endswith(_PARTIAL):
                _clear(Path(parent, name))


def clear_partial(path: Path) -> None:
    """The same of one path, for where it is not to be written again."""
    if partial_path(path).parent.is_dir():
        _clear(partial_path(path).parent)


def _clear(path: Path) -> None:
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)  # from before temporary files had a folder
        return
    with suppress(RunError, FileNotFoundError):
        descriptor = _take(path, wait=False)
        if descriptor is not None:
            _remove(path)
            os.close(descriptor)


def partial_path(path: Path) -> Path:
    """Temporary path of what becomes `path`: in a folder beside it, with a lock."""
    return path.with_name(f".{path.name}{_PARTIAL}") / path.name


@contextmanager
def _workplace(path: Path, *, wait: bool = False) -> Iterator[Path]:
    """The temporary path of what becomes `path`, where nothing is; what it leaves there is removed after the block."""
    place = partial_path(path).parent
    descriptor = _take(place, wait=wait)
    if descriptor is None and wait:
        # where there are no locks nobody waits: processes that write the same path then have a folder each
        _remove(place)
        place = place.with_name(f"{place.name.removesuffix(_PARTIAL)}.{os.getpid()}{_PARTIAL}")
        place.mkdir(exist_ok=True)
    try:
        _empty(place)
        yield place / path.name
    finally:
        _remove(place)
        if descriptor is not None:
            os.close(descriptor)


def _take(folder: Path, *, wait: bool) -> int | None:
    """Make a temporary folder, or take that of a killed process; returns what locks it until it is closed, if there are locks.

    Raises:
        RunError: another process is at work in it, and is not waited for.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with suppress(FileExistsError):
            folder.mkdir()
        try:
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            continue  # removed as an abandoned one, before it could be locked
        try:
            is_locked = hold(descriptor, wait=wait)
            if is_locked and _is_open(folder / _LOCK, descriptor):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise RunError(f"another process is writing {folder}: wait for it to finish") from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if not is_locked:
            return None
        # else whoever held it has removed it


def _empty(folder: Path) -> None:
    """Remove all from a temporary folder but its lock."""
    for path in folder.iterdir():
        if path.name != _LOCK:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _remove(folder: Path) -> None:
    """Remove a temporary folder as far as that can be done; its lock last, since who finds none begins anew."""
    with suppress(OSError):
        _empty(folder)
        (folder / _LOCK).unlink(missing_ok=True)
        folder.rmdir()


def _is_open(path: Path, descriptor: int) -> bool:
    """True if a path leads to what was opened."""
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False


def disk_of(path: Path) -> tuple[Path, Any]:
    """The nearest folder at or above a path that exists, and `total` and `free` bytes of its disk."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
    return there, shutil.disk_usage(there)


def names_in(folder: Path) -> set[str]:
    """The names of what is in a folder; none where it is not there."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return set(os.listdir(folder))
    return set()


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
        lines = (path / SUMS_NAME).read_bytes().decode().removesuffix("\n").split("\n")
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
    except GraftingError:
        raise  # it may tell of another file
    except Exception as error:
        cause = _os_error(error)
        if cause is None:
            raise
        raise RunError(
            f"cannot write {path}: {cause.strerror or cause}; what was there is unchanged"
        ) from error


def without_links(path: str, flags: int) -> int:
    """An opener of files that are written to where they lie, and not where a link leads to."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def link_weights(source: str | Path, target: str | Path) -> None:
    """Another name for the same weights where they are on the same disk; a copy of all else, which may be edited in place."""
    if str(source).endswith(".safetensors"):
        with suppress(OSError):
            os.link(Path(source).resolve(), target)
            return
    shutil.copyfile(source, target)


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


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hex; that of a file which is as it was is not computed again."""
    stamp = stamp_of(path)
    return _digest(path) if stamp is None else _known_digest(path.absolute(), stamp)


@lru_cache(maxsize=256)
def _known_digest(path: Path, stamp: Stamp) -> str:
    return _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp_of(path: Path) -> Stamp | None:
    """What differs once a file was written again; None where that was so lately that its times may not tell."""
    found = path.stat()
    if time.time() - max(found.st_mtime, found.st_ctime) < _SETTLED_S:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def hash_json(value: Any) -> str:
    """The SHA-256, in hex, of a JSON value with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def flatten(value: Mapping[Any, Any], prefix: str = "", *, lists: bool = False) -> dict[str, object]:
    """Flatten nested mappings, and `lists` too if asked, into one with dotted names: `finetune.0.lr`."""
    flat: dict[str, object] = {}
    for name, item in value.items():
        inner = dict(enumerate(item)) if lists and isinstance(item, list) else item
        if isinstance(inner, Mapping):
            flat |= flatten(inner, f"{prefix}{name}.", lists=lists)
        else:
            flat[f"{prefix}{name}"] = item
    return flat


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Names of flat mappings whose values differ, or that one has alone; those of `a` come first."""
    return [name for name in {**a, **b} if (name in a, a.get(name)) != (name in b, b.get(name))]


def _os_error(error: Exception) -> OSError | None:
    """The error of the operating system that an error is or tells of."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def _files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _settle(path: Path) -> None:
    """Bring a file, or a folder with all its files, to the disk, readable as new files are."""
    clear_abandoned(path)
    files = [path / name for name in _files_in(path)] if path.is_dir() else [path]
    for file in files:
        file.chmod(0o666 & ~_umask())  # some writers make files that only their owner can read
        _sync(file)
    if path.is_dir():
        _sync(path)


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

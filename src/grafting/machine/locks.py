"""Locks between processes: flocks, which the operating system takes back when a process ends, however it ends.

A lock is a file or a folder that is there anyway, or a hidden file of its own. File systems without locks are worked on
without: `works` says so.
"""

import errno
import fcntl
import os
import platform
import stat
import weakref
from pathlib import Path

from ..errors import RunError


class Taken(Exception):
    """Another process holds the lock; says which, as far as it has told."""


class Lock:
    """A lock file, held until it is released, the block ends, or nobody refers to it.

    Args:
        wait: wait while another process holds it.

    Raises:
        Taken: another process holds it.
        RunError: the file is a link, so that something else would be written to, or it cannot be made.
    """

    def __init__(self, path: Path, *, wait: bool = False):
        descriptor = _open(path)
        self.release = weakref.finalize(self, os.close, descriptor)
        try:
            self.works = hold(descriptor, wait=wait)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            self.release()
            raise Taken(holder) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def hold(descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file or folder until it is closed; False where the file system has no locks.

    Raises:
        BlockingIOError: another process holds it, and `wait` is not asked for.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _open(path: Path) -> int:
    """Open a lock file, made if it is missing, that has no other name."""
    try:
        # a link, symbolic or hard, would have another file emptied
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR):
            raise
        raise _refused(path) from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise _refused(path)
    return descriptor


def _refused(path: Path) -> RunError:
    return RunError(f"{path} is a link to another file, a folder or no file, and cannot be a lock: remove it")

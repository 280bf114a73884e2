"""Stop commands at every single change that they make to the disk, and see that the same command then ends as if undisturbed.

    python benchmarks/everywrite.py [--only JOB] [--stride N] [--keep FOLDER]      (the same: python benchmarks/soak.py --every-write)

A command runs in a child process whose changing system calls (open to write, write, fsync, rename, mkdir, unlink, ...) the
kernel hands to this process first (Linux, seccomp), whoever makes them: Python, torch, or a library in Rust.

- *Killed* at the n-th call: what lies on the disk before each call is what SIGKILL at that moment leaves. One run gives all of
  these moments.
- *Failed* at the n-th call: that call, and no other, gives "No space left on device". The command may go on or end with
  one sentence; it may not end otherwise.

From every state that differs the same command is run again, undisturbed. It has to end well, with the same files bit for bit
(but for times), and without a temporary file. Children are forked from a process that has imported everything. Ends with one
line of JSON; exit status 1 unless nothing was lost and nothing left.

    operations  changing system calls of all jobs
    trials      commands that were stopped or failed: each job, each call, both ways
    states      different states that these left, from each of which the command was run again
    lost        commands that failed otherwise than with a sentence, or did not end as the undisturbed one
    leftovers   temporary files after the command was run again
"""

import argparse
import contextlib
import ctypes
import errno
import fcntl
import gc
import hashlib
import json
import os
import platform
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

# per machine: number of `seccomp`, and of each call that changes a disk, with what names its file:
# the number of an argument that is a descriptor, or that is a path, perhaps after that of its folder's descriptor
_DESCRIPTOR, _PATH, _PATH_AT = "descriptor", "path", "path at"
_CALLS = {
    "x86_64": (317, {
        1: ("write", _DESCRIPTOR), 18: ("pwrite", _DESCRIPTOR), 20: ("writev", _DESCRIPTOR), 40: ("sendfile", _DESCRIPTOR),
        74: ("fsync", _DESCRIPTOR), 75: ("fdatasync", _DESCRIPTOR), 77: ("ftruncate", _DESCRIPTOR),
        285: ("fallocate", _DESCRIPTOR), 82: ("rename", _PATH), 83: ("mkdir", _PATH), 84: ("rmdir", _PATH),
        87: ("unlink", _PATH), 2: ("open", _PATH), 263: ("unlink", _PATH_AT), 264: ("rename", _PATH_AT),
        316: ("rename", _PATH_AT), 258: ("mkdir", _PATH_AT), 257: ("open", _PATH_AT),
    }),
    "aarch64": (277, {
        64: ("write", _DESCRIPTOR), 68: ("pwrite", _DESCRIPTOR), 66: ("writev", _DESCRIPTOR), 71: ("sendfile", _DESCRIPTOR),
        82: ("fsync", _DESCRIPTOR), 83: ("fdatasync", _DESCRIPTOR), 46: ("ftruncate", _DESCRIPTOR),
        47: ("fallocate", _DESCRIPTOR), 35: ("unlink", _PATH_AT), 38: ("rename", _PATH_AT), 276: ("rename", _PATH_AT),
        34: ("mkdir", _PATH_AT), 56: ("open", _PATH_AT),
    }),
}  # fmt: skip
_TO_WRITE = os.O_CREAT | os.O_TRUNC
_NO_NEW_PRIVILEGES, _SET_FILTER, _WITH_LISTENER = 38, 1, 1 << 3  # linux/prctl.h, linux/seccomp.h
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_SET, _RETURN = 0x20, 0x15, 0x45, 0x06  # linux/bpf_common.h
_ASK, _ALLOW = 0x7FC00000, 0x7FFF0000
_RECEIVE, _ANSWER = 0xC0502100, 0xC0182101
_HERE = 0xFFFFFF9C  # AT_FDCWD, in 32 bits


class Call(NamedTuple):
    """A system call that is about to change something below a folder."""

    number: int  # from 1
    name: str
    path: str


class Ended(NamedTuple):
    """How a child ended, and what it said."""

    status: int
    said: str


@dataclass(frozen=True)
class Job:
    """A command in a folder.

    Args:
        prepare: puts into the folder what the command finds there.
        work: the command; ends with SystemExit, as the command line does, or returns.
        results: hashes of all that it made and that does not tell time.
    """

    name: str
    prepare: Callable[[Path], None]
    work: Callable[[Path], None]
    results: Callable[[Path], dict[str, str]]


@dataclass
class Tally:
    """What happened to all jobs."""

    operations: dict[str, int] = field(default_factory=dict)
    trials: int = 0
    states: int = 0
    lost: int = 0
    leftovers: int = 0
    faults: list[str] = field(default_factory=list)

    def lose(self, what: str) -> None:
        self.lost += 1
        self.faults.append(what)


def every_write(job: Job, folder: Path, tally: Tally, *, stride: int = 1) -> None:
    """Stops a job at each of its calls, or at every `stride`-th, in both ways, in `folder`, and runs it again from every state
    that this leaves."""
    base, root = folder / f"{job.name}-base", folder / "work"
    _fresh(root)
    ended = alone(lambda: job.prepare(root))
    if ended.status != 0:
        raise SystemExit(f"{job.name} cannot be prepared: {ended.said}")
    shutil.copytree(root, base, symlinks=True)
    moments = _Moments(folder / f"{job.name}-moments", root, stride)
    ended = watched(lambda: job.work(root), root, moments.keep)
    if ended.status != 0:
        raise SystemExit(f"{job.name}, undisturbed, ended with {ended.status}: {ended.said}")
    want, count = job.results(root), moments.calls
    moments.keep(Call(1 + stride * count, "end", str(root)))
    tally.operations[job.name] = count
    numbers = range(1, count + 1, stride)
    tally.trials += 2 * len(numbers)
    for number in numbers:
        _fresh(root, base)
        where: list[Call] = []
        ended = watched(lambda: job.work(root), root, _failing(number, where))
        what = f"{job.name}, failed at {_told(where, number, root)}"
        if ended.status not in (0, 1) or "Traceback" in ended.said:
            tally.lose(f"{what}, ended with {ended.status}: {ended.said[-600:]}")
        moments.keep(Call(number, "failed", what))
    tally.states += len(moments.kept)
    for path, what in moments.kept.items():
        _fresh(root, path)
        ended = alone(lambda: job.work(root))
        got = job.results(root) if ended.status == 0 else {}
        if ended.status != 0:
            tally.lose(f"{job.name}, after {what}, ended with {ended.status}: {ended.said[-600:]}")
        elif got != want:
            differing = sorted(name for name in want.keys() | got.keys() if want.get(name) != got.get(name))
            tally.lose(f"{job.name}, after {what}: {', '.join(differing)} differ")
        left = [str(path.relative_to(root)) for path in root.rglob("*") if is_temporary(path)]
        tally.leftovers += len(left)
        tally.faults += [f"{job.name}, after {what}: {name} is left" for name in left]
    shutil.rmtree(base)
    shutil.rmtree(moments.folder, ignore_errors=True)


class _Moments:
    """Copies of a folder at all moments at which it differs."""

    def __init__(self, folder: Path, root: Path, stride: int):
        self.folder, self._root, self._stride = folder, root, stride
        self.calls = 0
        self.kept: dict[Path, str] = {}
        self._seen: set[str] = set()

    def keep(self, call: Call) -> None:
        """Copy the folder as it is before a call, unless such a copy is there."""
        self.calls = max(self.calls, call.number)
        if (call.number - 1) % self._stride:
            return
        digest = _digest(self._root)
        if digest not in self._seen:
            self._seen.add(digest)
            path = self.folder / str(len(self.kept))
            shutil.copytree(self._root, path, symlinks=True)
            killed = f"killed at {_told([call], call.number, self._root)}"
            self.kept[path] = call.path if call.name == "failed" else killed


def _failing(number: int, where: list[Call]) -> Callable[[Call], int]:
    def fail(call: Call) -> int:
        if call.number != number:
            return 0
        where.append(call)
        return errno.ENOSPC

    return fail


def _told(calls: list[Call], number: int, root: Path) -> str:
    path = f" ({calls[0].name} {calls[0].path.removeprefix(f'{root}/')})" if calls else ""
    return f"call {number}{path}"


def is_temporary(path: Path) -> bool:
    """True for what is of use only until something is written."""
    return path.name.endswith(".partial") or path.name.startswith(".tmp")


def watched(work: Callable[[], None], root: Path, on_call: Callable[[Call], int | None]) -> Ended:
    """Does `work` in a child, and asks `on_call` before each call that changes something below `root`; an error's number that
    it returns is what the call then gives."""
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryFile() as said:
        pid = os.fork()
        if not pid:
            _live(work, said.fileno(), lambda: _hand_over(theirs))
        theirs.close()
        _, (listener,), _, _ = socket.recv_fds(ours, 1, 1)
        ours.close()
        try:
            _answer(listener, f"{root}/", on_call)
        finally:
            os.close(listener)
        return _waited(pid, said)


def alone(work: Callable[[], None]) -> Ended:
    """Does `work` in a child, undisturbed."""
    with tempfile.TemporaryFile() as said:
        pid = os.fork()
        if not pid:
            _live(work, said.fileno(), lambda: None)
        return _waited(pid, said)


def _waited(pid: int, said: Any) -> Ended:
    _, status = os.waitpid(pid, 0)
    said.seek(0)
    return Ended(os.waitstatus_to_exitcode(status), said.read().decode(errors="replace"))


def _live(work: Callable[[], None], said: int, begin: Callable[[], None]) -> None:
    """A child's life."""
    status = 0
    gc.disable()  # it would touch, and so copy, all that the parent has imported
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    try:
        begin()
        work()
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 70
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _hand_over(to: socket.socket) -> None:
    """Has the kernel ask another process about this one's calls from now on."""
    number, calls = _CALLS[platform.machine()]
    libc = ctypes.CDLL(None, use_errno=True)
    program = _program(calls)
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    listener = libc.syscall(
        number, _SET_FILTER, _WITH_LISTENER, ctypes.create_string_buffer(header, len(header))
    )
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    socket.send_fds(to, [b"x"], [listener])
    os.close(listener)


def _program(calls: dict[int, tuple[str, str]]) -> bytes:
    """A filter in BPF: ask about these calls, of those that open a file only where it is to be written."""

    def line(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    lines = [line(_LOAD, 0)]
    for number, (name, by) in calls.items():
        if name != "open":
            lines += [line(_JUMP_IF_EQUAL, number, 0, 1), line(_RETURN, _ASK)]
            continue
        flags = 16 + 8 * (2 if by == _PATH_AT else 1)
        lines += [line(_JUMP_IF_EQUAL, number, 0, 4), line(_LOAD, flags), line(_JUMP_IF_SET, _TO_WRITE, 0, 1)]
        lines += [line(_RETURN, _ASK), line(_RETURN, _ALLOW)]
    return b"".join([*lines, line(_RETURN, _ALLOW)])


def _answer(listener: int, root: str, on_call: Callable[[Call], int | None]) -> None:
    """Answers the kernel's questions until the child has ended."""
    _, calls = _CALLS[platform.machine()]
    poll, number = select.poll(), 0
    poll.register(listener, select.POLLIN)
    while True:
        ((_, event),) = poll.poll()
        if not event & select.POLLIN:
            return
        question = bytearray(80)
        try:
            fcntl.ioctl(listener, _RECEIVE, question)
        except OSError:
            continue  # it was killed meanwhile
        known, thread, _, call, _, _, *arguments = struct.unpack("QIIiIQ6Q", question)
        name, by = calls[call]
        path, error = _path(thread, by, arguments), 0
        if path.startswith(root):
            number += 1
            error = on_call(Call(number, name, path)) or 0
        with contextlib.suppress(OSError):
            fcntl.ioctl(listener, _ANSWER, struct.pack("QqiI", known, 0, -error, 0 if error else 1))


def _path(thread: int, by: str, arguments: list[int]) -> str:
    """The path that a call is about."""
    process = f"/proc/{thread}"
    if by == _DESCRIPTOR:
        return _link(f"{process}/fd/{arguments[0] & 0xFFFFFFFF}")
    name = _text(process, arguments[by == _PATH_AT])
    if name.startswith("/"):
        return name
    is_here = by == _PATH or arguments[0] & 0xFFFFFFFF == _HERE
    return f"{_link(f'{process}/cwd' if is_here else f'{process}/fd/{arguments[0]}')}/{name}"


def _text(process: str, address: int) -> str:
    with open(f"{process}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(4096).partition(b"\0")[0].decode(errors="replace")


def _link(path: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(path)
    return ""


def _digest(folder: Path) -> str:
    """A hash of all names and contents in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path.relative_to(folder)}\0".encode(errors="surrogateescape"))
        if path.is_file():
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _fresh(root: Path, source: Path | None = None) -> None:
    shutil.rmtree(root, ignore_errors=True)
    if source is None:
        root.mkdir(parents=True)
    else:
        shutil.copytree(source, root, symlinks=True)


def is_possible() -> bool:
    """True where the kernel lets a process watch another's calls."""
    if platform.machine() not in _CALLS or sys.platform != "linux":
        return False
    with tempfile.TemporaryDirectory() as folder:
        pid = os.fork()
        if not pid:
            signal.alarm(10)
            ours, theirs = socket.socketpair()
            try:
                _hand_over(theirs)
            except OSError:
                os._exit(1)
            os._exit(0 if ours and folder else 1)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def main(arguments: list[str] | None = None) -> int:
    from everyjob import JOBS, get_ready

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=list(JOBS), help="this job alone; repeatable")
    parser.add_argument(
        "--stride", type=int, default=1, help="stop at every so many calls (default: at each)"
    )
    parser.add_argument("--keep", type=Path, help="work here, and leave the folder")
    args = parser.parse_args(arguments)
    folder = args.keep or Path(tempfile.mkdtemp(prefix="every-write-"))
    get_ready()
    tally, started = Tally(), time.monotonic()
    for name in args.only or JOBS:
        begun, before = time.monotonic(), len(tally.faults)
        every_write(JOBS[name], folder.resolve(), tally, stride=args.stride)
        found, seconds = tally.faults[before:], time.monotonic() - begun
        print(
            f"{name}: {tally.operations[name]} operations, {len(found)} faults, {seconds:.0f} s", flush=True
        )
        for fault in found:
            print(f"    {fault}", flush=True)
    if args.keep is None:
        shutil.rmtree(folder)
    minutes = round((time.monotonic() - started) / 60, 1)
    print(json.dumps({
        "operations": sum(tally.operations.values()), "jobs": tally.operations, "trials": tally.trials,
        "states": tally.states, "lost": tally.lost, "leftovers": tally.leftovers, "minutes": minutes,
    }))  # fmt: skip
    return int(bool(tally.faults))


if __name__ == "__main__":
    raise SystemExit(main())

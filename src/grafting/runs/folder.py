"""A run's folder: which stages are done, from which inputs, with which outputs.

A stage is skipped when its inputs' hash and its outputs' hashes agree with the manifest. A stage whose inputs changed
starts from scratch, and so does everything that reads its outputs.

What a fault may leave behind is found by checksums and named: of the manifest (`manifest.py`) and of a stage's states
(`states.py`) there are two, so that the older serves when the newer is damaged. One process at a time holds the folder,
by a lock of the operating system that ends with the process, however it ends. Nothing depends on the clock or on the
machine.
"""

import json
import platform
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

from ..contract import Step
from ..data.workfolder import WORK_NAME
from ..errors import FaultWarning, ResumeWarning, RunError
from ..machine.files import (
    clear_abandoned,
    disk_errors,
    finite_json,
    hash_json,
    link_weights,
    sha256_of,
    without_links,
    write_bytes,
)
from ..machine.locks import Lock, Taken
from ..machine.reading import JsonObject, parse_json, read_bytes, shown
from ..machine.signals import Interrupted, caught_signal, deferred
from .manifest import (
    FORMAT,
    MANIFEST,
    Entry,
    Manifest,
    is_run,
    new_manifest,
    newest_whole_manifest,
    read_manifest,
    write_manifest,
)
from .states import Every, StateWriter, newest_state

_LONGEST_LOG = 1 << 30

Line: TypeAlias = JsonObject
"""A line of a stage's log: `step`, `seconds` and the step's figures."""


def refuse_strangers(path: Path) -> None:
    """Raises a RunError if a folder holds anything but a run, or the prompts with which a run begins."""
    if is_run(path) or not path.exists():
        return
    own = path / "prompts"
    others = [found for found in path.glob("[!.]*") if not (found == own and (own / WORK_NAME).is_file())]
    if others or not path.is_dir():
        raise RunError(f"{path} exists and is not a run folder: name another, or empty it")


class RunFolder:
    """The folder of one run, which belongs to the recipe of one name; held, until it is closed, by this process.

    Args:
        writes: whether this is the process that writes. Of a run's processes one does; the others read what it wrote.
        barrier: returns when every process of the run has called it.
        anyone: whether a thing is so on any process of the run; every process calls it.
        others: folders of runs of the same source, which may have done what this one has to do.

    Raises:
        RunError: the folder belongs to another recipe, holds something else than a run, or another process is at work
            in it.
    """

    def __init__(
        self,
        path: Path,
        *,
        recipe_name: str,
        writes: bool = True,
        barrier: Callable[[], None] = lambda: None,
        anyone: Callable[[bool], bool] = bool,
        others: Sequence[Path] = (),
    ):
        self.path = path
        self.others = others
        self.writes = writes
        self.barrier = barrier
        self.anyone = anyone
        self._recipe_name = recipe_name
        self._manifest = new_manifest(recipe_name)
        self._to_tell: list[str] = []
        self.changes = ""
        """What has changed in the recipe, in words; emptied once it is told."""
        if writes:
            refuse_strangers(self.path)
            self._lock = _locked(path)
            self._manifest = self._read()
            clear_abandoned(path)
            if not is_run(path):
                self._write()  # first of all: a folder that is left without a manifest is no run

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process have the folder."""
        if self.writes:
            self._lock.release()

    def _read(self) -> Manifest:
        if not is_run(self.path):
            return new_manifest(self._recipe_name)
        manifest = newest_whole_manifest(self.path)
        if manifest.recipe != self._recipe_name:
            raise RunError(
                f"{self.path} belongs to recipe {shown(manifest.recipe)}, not {self._recipe_name!r}: "
                "name another folder with --out"
            )
        if manifest.format != FORMAT:
            raise RunError(f"{self.path} is a run of format {manifest.format}, this is {FORMAT}")
        return manifest

    @contextmanager
    def stage(
        self, name: str, inputs: Any, *, of_source: bool = False, is_long: bool = True
    ) -> "Iterator[Stage]":
        """Opens a stage with all that its outputs depend on, as JSON; records it as done when the block ends well.

        Args:
            of_source: whether its outputs are of the source alone, and are taken from another run that has done it.
            is_long: whether people should hear why it runs again, when the recipe has changed.

        Raises:
            Interrupted: a signal came, which the program catches, and the stage is done.
        """
        if of_source and self.writes:
            self._take_over(name, hash_json(inputs))
        self.barrier()
        stage = Stage(self, name, hash_json(inputs))
        if stage.runs_again and is_long and self.changes:
            self.tell(f"{name} is made again, and what follows from it: {self.changes}")
            self.changes = ""
        self.barrier()
        started = time.monotonic()
        with stage.patience:
            if not stage.done:
                self._tell()
            yield stage
            self.barrier()
            if not stage.done and self.writes:
                stage.record(seconds=time.monotonic() - started)
            self.barrier()
        # a signal that came after the last step: the stage is done, the next one is not begun
        if self.anyone(caught_signal() is not None):
            raise Interrupted(caught_signal() or signal.SIGTERM)

    def _take_over(self, name: str, inputs: str) -> None:
        """Take a stage's outputs from another run that made them of the same inputs; they are checked when it is opened."""
        own = self.entry(name)
        if own is not None and own.inputs == inputs and own.done:
            return
        for other in self.others:
            try:
                found = read_manifest(other / MANIFEST).stages.get(name)
            except RunError:
                continue
            if found is None or not found.done or found.inputs != inputs:
                continue
            shutil.rmtree(self.path / name, ignore_errors=True)
            # the other run may start over meanwhile
            with suppress(FileNotFoundError), disk_errors(self.path):
                log = f"{name}/log.jsonl"
                for output in (*(found.outputs or {}), *([log] if (other / log).is_file() else [])):
                    target = self.path / output
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.unlink(missing_ok=True)
                    link_weights(other / output, target)
                self.write_entry(name, found)
                self.mark_stale(after=name)
            return

    def entry(self, name: str) -> Entry | None:
        """Record of a stage, if there is one."""
        if not self.writes:
            self._manifest = self._read()
        return self._manifest.stages.get(name)

    def stage_outputs(self, name: str) -> dict[str, str]:
        """The hashes of a finished stage's outputs: what later stages depend on."""
        entry = self.entry(name)
        if entry is None or not entry.done or entry.outputs is None:
            raise RunError(f"stage {name} of {self.path} has not finished: run it first")
        return entry.outputs

    def describe_machine(self, facts: JsonObject) -> None:
        """Keep facts of the machine beside the stages' times, and those of earlier machines; nothing depends on them."""
        before = self._manifest.machine.get("threads")
        now = facts.get("threads")
        if facts.get("device") == "cpu" and before not in (None, now):
            self.tell(
                f"{self.path} resumes with {now} CPU threads, not {before}: results will differ in the last bits "
                f"from those of a run that had {before} throughout"
            )
        facts = {"host": platform.node(), **facts}
        machines = [m for m in self._manifest.machines if m != facts]
        self._manifest = self._manifest.model_copy(update={"machine": facts, "machines": [*machines, facts]})
        self._write()

    def tell(self, what: str) -> None:
        """Say this, as a `ResumeWarning`, when a stage is opened that is not done: where all are done, it is of no concern."""
        if what and self.writes:
            self._to_tell.append(what)

    def _tell(self) -> None:
        while self._to_tell:
            warnings.warn(self._to_tell.pop(0), ResumeWarning, stacklevel=3)

    def mark_stale(self, *, after: str | None = None) -> None:
        """Note that what stages made may be of an earlier recipe, until they are opened again; `after` one, or all."""
        stages = self._manifest.stages
        names = list(stages)
        for name in names if after is None else names[names.index(after) + 1 :]:
            self.write_entry(name, stages[name].model_copy(update={"stale": True}))

    def write_entry(self, name: str, entry: Entry) -> None:
        self._manifest.stages[name] = entry
        self._write()

    def _write(self) -> None:
        if self.writes:
            write_manifest(self.path, self._manifest)


def stale_stages(folder: Path) -> frozenset[str]:
    """The stages of a run's folder whose outputs may be of an earlier recipe than the one that lies there."""
    return frozenset(name for name, entry in _stages_in(folder).items() if entry.stale)


def done_stages(folder: Path) -> list[str]:
    """The stages of a run's folder that are done, in their order; empty of what is no run, or a damaged one."""
    try:
        return [name for name, entry in _stages_in(folder).items() if entry.done]
    except RunError:
        return []


def _stages_in(folder: Path) -> dict[str, Entry]:
    path = folder / MANIFEST
    return read_manifest(path).stages if path.is_file() else {}


class Stage:
    """One stage of a run: its folder, its saved states, its log, and the files that it declares as outputs."""

    def __init__(self, run: RunFolder, name: str, inputs: str):
        self._run = run
        self.name = name
        self.inputs = inputs
        self.folder = run.path / name
        self.outputs: list[Path] = []
        self._states = self.folder / "states"
        self._log_path = self.folder / "log.jsonl"
        self._first_step: int | None = None
        self.patience = ExitStack()
        """Once steps have been followed signals wait in here: no work after the last saved state is lost to them."""
        entry = run.entry(name)
        self.done = False
        self.runs_again = entry is not None and entry.inputs != inputs
        """Whether it was begun before, from other inputs."""
        if entry is None or entry.inputs != inputs:
            self._start_anew()
            return
        if entry.stale:
            entry = Entry(**entry.model_dump(exclude_unset=True, exclude={"stale"}))
            run.write_entry(name, entry)
        self.done = entry.done and self._intact(entry.outputs or {})
        if self.done and run.writes:
            self._remove_states()

    @property
    def _owner(self) -> str:
        return hash_json([self.name, self.inputs])

    def _start_anew(self) -> None:
        if self._run.writes:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._run.write_entry(self.name, Entry(inputs=self.inputs, done=False))
            self._run.mark_stale(after=self.name)

    def _intact(self, outputs: Mapping[str, str]) -> bool:
        files = {self._run.path / name: digest for name, digest in outputs.items()}
        damaged = [
            path for path, digest in files.items() if not (path.is_file() and sha256_of(path) == digest)
        ]
        if damaged:
            names = ", ".join(map(str, damaged))
            _warn(f"{names}: missing, or changed since it was written; {self.name} runs again")
        return not damaged

    def record(self, *, seconds: float) -> None:
        """Note in the manifest that the stage is done; its states are no longer needed."""
        before = self._run.entry(self.name)
        total = seconds + (before.seconds if before else 0.0)
        outputs = {str(path.relative_to(self._run.path)): sha256_of(path) for path in self.outputs}
        entry = Entry(inputs=self.inputs, done=True, seconds=round(total, 1), outputs=outputs)
        self._run.write_entry(self.name, entry)
        self._remove_states()

    def _remove_states(self) -> None:
        """What is done needs none; a run that was killed when it was may have left some."""
        shutil.rmtree(self._states, ignore_errors=True)

    def load_state(self) -> Any:
        """The newest whole state to resume from, or None to start; cuts the log back to it.

        A dict as it was saved, or the folder of a state that wrote itself. Raises as `newest_state`.
        """
        state = newest_state(self._states, owner=self._owner)
        self._begin(None if state is None else state.step)
        return None if state is None else state.content

    def follow(self, steps: Iterator[Step], *, save_every: Every | None) -> Iterator[Step]:
        """Passes a stage's steps on, logging each and saving the state now and then, or never.

        States are written while the stage goes on, and are on disk when it ends.

        Raises:
            Interrupted: a signal came, which the program catches; the state after the last step is saved.
            RunError: the log or a state cannot be written.
        """
        if self._first_step is None:
            self._begin(None)
        started = saved = time.monotonic()
        signal_caught = self.patience.enter_context(deferred())
        writer = StateWriter(self._states, owner=self._owner, is_writer=self._run.writes)
        self.patience.callback(writer.close)
        for step in steps:
            writer.check()
            line = {"step": step.done, "seconds": round(time.monotonic() - started, 3), **step.values}
            self._log(line)
            # asked once: a signal that comes after this line waits for the next step, which is then saved
            signum = signal_caught()
            stop = self._run.anyone(signum is not None) if save_every else signum is not None
            is_late = save_every and self._run.anyone(time.monotonic() - saved >= save_every.seconds)
            if save_every and step.done and (stop or is_late or save_every.is_due(step.done)):
                writer.write(step.state(), step.done)
                saved = time.monotonic()
            if stop:
                writer.wait()
                if save_every:
                    self._run.barrier()  # a launcher ends the others when the first one leaves
                raise Interrupted(signum or signal.SIGTERM)
            yield step
        writer.wait()

    def _log(self, line: Mapping[str, object]) -> None:
        if self._run.writes:
            with disk_errors(self._log_path), open(self._log_path, "a", opener=without_links) as log:
                log.write(_line_of(line))

    def _begin(self, step: int | None) -> None:
        """Truncate the log to the step from which the stage resumes, or to its start."""
        self._first_step = step or 0
        if not self._run.writes:
            return
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if step is None:
                self._log_path.unlink(missing_ok=True)
        if self._log_path.is_file():
            kept = [line for line in read_log(self._log_path) if step_of(line) <= self._first_step]
            write_bytes(self._log_path, "".join(map(_line_of, kept)).encode())
            if step and not kept:
                _warn(f"{self._log_path} lost its steps up to {step}: curves of {self.name} begin after them")


def _line_of(step: Mapping[str, Any]) -> str:
    """A step as a line of JSON: values that are not finite are null, and named as that."""
    finite = finite_json(step)
    lost = [name for name, value in finite.items() if value is None and step[name] is not None]
    return json.dumps(finite | ({"not_finite": lost} if lost else {}), allow_nan=False) + "\n"


def read_log(path: Path) -> list[Line]:
    """The steps of a log; lines that are damaged are left out with a warning, and one cut off at the end without."""
    *whole, _ = read_bytes(path, error=RunError, most=_LONGEST_LOG).split(b"\n")
    steps = []
    for number, content in enumerate(whole, start=1):
        try:
            line = parse_json(content, JsonObject, name=path, error=RunError)
            step_of(line)
        except RunError:
            _warn(f"{path}, line {number} is damaged and skipped")
        else:
            steps.append(line)
    return steps


def step_of(line: Line) -> int:
    """The step of a line of a log. Raises a RunError if it has none."""
    step = line.get("step")
    if not isinstance(step, int):
        raise RunError(f"a line of a log has no step: {shown(line)}")
    return step


def _locked(folder: Path) -> Lock:
    """The right to work in a folder."""
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = Lock(folder / ".lock")
    except Taken as holder:
        raise RunError(
            f"another run is using {folder} ({holder}): wait for it to finish, or name another folder with --out"
        ) from None
    if not lock.works:
        _warn(f"{folder} cannot be locked: make sure that no other run uses it")
    return lock


def _warn(message: str) -> None:
    warnings.warn(message, FaultWarning, stacklevel=3)

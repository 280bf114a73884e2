"""A run's folder: which stages are done, from which inputs, with which outputs; and the state to resume one from.

A stage is skipped when its inputs' hash and its outputs' hashes agree with the manifest. A stage whose inputs changed
starts anew, and so does everything that reads its outputs.
"""

import json
import pickle
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .contract import Step
from .errors import CheckpointError, RunError
from .files import atomic_path, hash_json, sha256_of, write_bytes, write_json

FORMAT = 1


class RunFolder:
    """The folder of one run, which belongs to the recipe of one name.

    Raises:
        RunError: the folder belongs to another recipe, or holds something else than a run.
    """

    def __init__(self, path: Path, *, recipe_name: str):
        self.path = path
        self._manifest_path = path / "manifest.json"
        self._manifest = self._read(recipe_name)

    def _read(self, recipe_name: str) -> dict[str, Any]:
        if not self._manifest_path.is_file():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.glob("[!.]*"))):
                raise RunError(
                    f"{self.path} exists and is not the folder of a run: name another, or empty it"
                )
            return {"format": FORMAT, "recipe": recipe_name, "stages": {}}
        try:
            manifest = json.loads(self._manifest_path.read_text())
        except ValueError as error:
            raise RunError(f"{self._manifest_path} is not JSON: {error}") from error
        if manifest.get("recipe") != recipe_name:
            raise RunError(
                f"{self.path} belongs to recipe {manifest.get('recipe')!r}, asked was {recipe_name!r}: "
                "name another folder with --out"
            )
        if manifest.get("format") != FORMAT:
            raise RunError(f"{self.path} is a run of format {manifest.get('format')}, this is {FORMAT}")
        return manifest

    @contextmanager
    def stage(self, name: str, inputs: Any) -> "Iterator[Stage]":
        """Opens a stage with all that its outputs depend on, as JSON; records it as done when the block ends well."""
        stage = Stage(self, name, hash_json(inputs))
        started = time.monotonic()
        yield stage
        if not stage.done:
            stage.record(seconds=time.monotonic() - started)

    def entry(self, name: str) -> dict[str, Any]:
        return self._manifest["stages"].get(name, {})

    def stage_outputs(self, name: str) -> dict[str, str]:
        """The hashes of a finished stage's outputs: what later stages depend on."""
        entry = self.entry(name)
        if not entry.get("done"):
            raise RunError(f"stage {name} of {self.path} is not done: run it first")
        return entry["outputs"]

    def describe_machine(self, facts: dict[str, Any]) -> None:
        """Keep facts of the machine beside the stages' times; nothing depends on them."""
        self._manifest["machine"] = facts
        write_json(self._manifest_path, self._manifest)

    def write_entry(self, name: str, entry: dict[str, Any]) -> None:
        self._manifest["stages"][name] = entry
        write_json(self._manifest_path, self._manifest)


class Stage:
    """One stage of a run: its folder, its saved state, its log, and the files that it declares as outputs."""

    def __init__(self, run: RunFolder, name: str, inputs: str):
        self._run = run
        self.name = name
        self.inputs = inputs
        self.folder = run.path / name
        self.outputs: list[Path] = []
        entry = run.entry(name)
        if entry.get("inputs") != inputs:
            self._start_anew()
        self.done = entry.get("inputs") == inputs and entry.get("done", False) and self._intact(entry)
        self._state_path = self.folder / "state.pt"
        self._log_path = self.folder / "log.jsonl"

    def _start_anew(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._run.write_entry(self.name, {"inputs": self.inputs, "done": False})

    def _intact(self, entry: dict[str, Any]) -> bool:
        files = {self._run.path / name: digest for name, digest in entry["outputs"].items()}
        return all(path.is_file() and sha256_of(path) == digest for path, digest in files.items())

    def record(self, *, seconds: float) -> None:
        """Note in the manifest that the stage is done; its state is no longer needed."""
        previous = self._run.entry(self.name).get("seconds", 0.0)
        outputs = {str(path.relative_to(self._run.path)): sha256_of(path) for path in self.outputs}
        entry = {
            "inputs": self.inputs,
            "done": True,
            "seconds": round(previous + seconds, 1),
            "outputs": outputs,
        }
        self._run.write_entry(self.name, entry)
        self._state_path.unlink(missing_ok=True)

    def load_state(self) -> dict[str, Any] | None:
        """The state to resume from, or None to start; cuts the log back to it.

        Raises:
            CheckpointError: the state file is damaged.
        """
        if not self._state_path.is_file():
            self._log_path.unlink(missing_ok=True)
            return None
        try:
            state = torch.load(self._state_path, weights_only=True, map_location="cpu")
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise CheckpointError(
                f"{self._state_path} is damaged: {error}. Delete it to start the stage anew"
            ) from error
        self._cut_log(state["step"])
        return state

    def save_state(self, state: dict[str, Any]) -> None:
        """Replace the saved state, atomically."""
        with atomic_path(self._state_path) as temporary:
            torch.save(state, temporary)

    def follow(self, steps: Iterator[Step], *, save_every: int | None) -> Iterator[Step]:
        """Passes a stage's steps on, logging each and saving the state after every `save_every` steps, or never."""
        self.folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        for step in steps:
            line = {"step": step.done, "seconds": round(time.monotonic() - started, 3), **step.values}
            with self._log_path.open("a") as log:
                log.write(json.dumps(line) + "\n")
            if save_every and step.done and step.done % save_every == 0:
                self.save_state(step.state())
            yield step

    def _cut_log(self, last_step: int) -> None:
        if self._log_path.is_file():
            lines = self._log_path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last_step]
            write_bytes(self._log_path, "".join(kept).encode())

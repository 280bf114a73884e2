"""A run's manifest: which stages are done, from which inputs, with which outputs; with a checksum of itself.

A folder has two: the one before the newest serves when that is damaged.
"""

import warnings
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, model_validator

from ..errors import FaultWarning, RunError
from ..machine.files import hash_json, write_bytes, write_json
from ..machine.reading import Inside, JsonObject, parse_json, read_bytes

FORMAT = 1
MANIFEST, _PREVIOUS = "manifest.json", "manifest.previous.json"


class Entry(BaseModel):
    """Record of a stage."""

    model_config = ConfigDict(frozen=True)

    inputs: str  # hash of all that its outputs depend on
    done: bool = False
    seconds: NonNegativeFloat = 0.0
    outputs: dict[Inside, str] | None = None  # hash of each file, once it is done
    stale: bool = False  # made by an earlier recipe than the one that lies there, as far as is known

    @model_validator(mode="after")
    def _has_outputs(self) -> "Entry":
        if self.done and self.outputs is None:
            raise ValueError("it is done, and has no outputs")
        return self

    def on_record(self) -> JsonObject:
        """As the manifest has it."""
        return self.model_dump(mode="json", exclude_unset=True)


class Manifest(BaseModel):
    """What a run's folder says of itself; fields that this version does not know are kept."""

    model_config = ConfigDict(extra="allow")

    format: int = FORMAT
    recipe: str
    stages: dict[str, Entry] = {}
    machine: JsonObject = {}
    machines: list[JsonObject] = []
    sha256: str | None = Field(default=None, exclude=True)

    def on_record(self) -> JsonObject:
        """As it is written, without its checksum."""
        stages = {name: entry.on_record() for name, entry in self.stages.items()}
        return self.model_dump(mode="json", exclude_unset=True) | {"stages": stages}


def new_manifest(recipe: str) -> Manifest:
    """Manifest of a run that has done nothing yet."""
    return Manifest(format=FORMAT, recipe=recipe, stages={})


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return any((folder / name).is_file() for name in (MANIFEST, _PREVIOUS))


def read_manifest(path: Path) -> Manifest:
    """A run's manifest. Raises a RunError if it is missing or damaged."""
    return _parse(read_bytes(path, kind="a manifest", error=RunError), path)


def newest_whole_manifest(folder: Path) -> Manifest:
    """The newer of a run's manifests that is whole, with a warning if it is the older one; a RunError if none is."""
    faults = []
    for name in (MANIFEST, _PREVIOUS):
        try:
            manifest = read_manifest(folder / name)
        except RunError as error:
            faults.append(str(error))
            continue
        if faults:
            told = f"{faults[0]}; {name} is used, which is one change behind"
            warnings.warn(told, FaultWarning, stacklevel=3)
        return manifest
    raise RunError(
        f"{'; '.join(faults)}. Name another folder, or delete both: all stages then start from scratch"
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a run's newest manifest; the one before it is kept, unless it is damaged."""
    path = folder / MANIFEST
    try:
        content = read_bytes(path, error=RunError)
        _parse(content, path)
    except RunError:
        pass  # no manifest yet, or a damaged one: keep the previous one
    else:
        write_bytes(folder / _PREVIOUS, content)
    record = manifest.on_record()
    write_json(path, record | {"sha256": hash_json(record)})


def _parse(content: bytes, path: Path) -> Manifest:
    raw = parse_json(content, JsonObject, name=path, error=RunError)
    digest = raw.pop("sha256", None)
    # a manifest of before there were checksums has none
    if digest not in (None, hash_json(raw)):
        raise RunError(f"{path} does not agree with its checksum")
    return parse_json(content, Manifest, name=path, kind="a manifest", error=RunError)

"""A run's manifest: which stages are done, from which inputs, with which outputs; with a checksum of itself."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, model_validator

from ..errors import RunError
from ..machine.files import hash_json
from ..machine.reading import Inside, JsonObject, parse_json, read_bytes

FORMAT = 1


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


def read_manifest(path: Path) -> Manifest:
    """A run's manifest. Raises a RunError if it is missing or damaged."""
    return parse_manifest(read_bytes(path, kind="a manifest", error=RunError), path)


def parse_manifest(content: bytes, path: Path) -> Manifest:
    """The same of a file's content."""
    raw = parse_json(content, JsonObject, name=path, error=RunError)
    digest = raw.pop("sha256", None)
    # a manifest of before there were checksums has none
    if digest not in (None, hash_json(raw)):
        raise RunError(f"{path} does not agree with its checksum")
    return parse_json(content, Manifest, name=path, kind="a manifest", error=RunError)

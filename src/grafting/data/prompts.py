"""Encoded prompts in a folder: what a text-conditioned model is given for each, by number.

A prompt is its words and its tensors, by the names of the model's arguments and without a batch axis; a dotted name is an
argument inside a mapping, `added_cond_kwargs.resolution`, and one that ends in `[]` is an argument that is a list with one tensor
per item, each of its own length. Shards hold the tensors, `words.jsonl` the words, `common.safetensors` what is the same for all
prompts. Prompts that ask for nothing, the nulls, are stored like the others, and numbered after them. `promptfolder.py` writes such
a folder. Nothing here runs a text encoder.
"""

import copy
import hashlib
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Int
from pydantic import (
    Field,
    JsonValue,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)
from torch import Tensor

from ..contract import Kwargs, TrainingData
from ..errors import DataError
from ..machine.files import hash_json
from ..machine.reading import parse_json, read_bytes, read_json, read_safetensors
from ..machine.settings import Settings, Stored
from .latents import LatentSet, Shard
from .scenes import Captions, Scenes
from .shards import DTYPES, ShardFile, StoredFile, by_shard, check_files

INDEX_NAME = "prompts.json"

Dropout = Annotated[float, Field(ge=0, le=1)]


class Column(Stored):
    """A tensor that every prompt has."""

    dtype: str
    shape: tuple[NonNegativeInt, ...]  # of a prompt's; where lengths differ, without the first axis
    ragged: bool = False  # each prompt has its own length along a first axis
    axis: NonNegativeInt = 0  # where a batch's prompts stand in the argument
    along: NonNegativeInt = 0  # ragged: which axis of a prompt's tensor is stored as its first
    optional: bool = False  # a mask that is passed only where it hides something


class PromptShard(Shard):
    """A file of so many prompts."""

    lengths: dict[str, NonNegativeInt] = {}  # of each ragged column: of all prompts together


class PromptLine(Stored):
    """A line of the words."""

    words: str
    null: NonNegativeInt = 0  # which of the nulls


class PromptIndex(Stored):
    """Index of a folder of prompts; prompts are numbered through its shards, the nulls after all others."""

    source: str  # where the words are from, and what encoded them
    count: PositiveInt  # without the nulls
    num_nulls: NonNegativeInt = 0
    columns: dict[str, Column]
    shards: tuple[PromptShard, ...]
    words: StoredFile
    common: StoredFile | None = None
    shared: dict[str, Literal["common", "constant"]] = {}  # the tensors in it
    values: dict[str, JsonValue] = {}  # constants that are no tensors
    dropout: Dropout = 0.0

    @property
    def sha256(self) -> str:
        """A hash of all that prompts are, their words included; not of where they lie or come from, nor of dropout."""
        content = self.model_dump(mode="json", exclude={"source", "dropout"}, exclude_defaults=True)
        return hash_json(content)

    @property
    def files(self) -> list[StoredFile]:
        return [*self.shards, self.words, *([self.common] if self.common else [])]

    @model_validator(mode="after")
    def _agrees(self) -> "PromptIndex":
        ragged = {name for name, column in self.columns.items() if column.ragged}
        if sum(shard.count for shard in self.shards) != self.count + self.num_nulls:
            raise ValueError("its shards do not hold as many prompts as it says")
        if any(shard.lengths.keys() != ragged for shard in self.shards):
            raise ValueError("its shards do not say the lengths of its ragged columns")
        if unknown := {column.dtype for column in self.columns.values()} - DTYPES.keys():
            raise ValueError(f"unknown dtypes: {sorted(unknown)}")
        if odd := odd_names([*self.columns, *self.shared, *self.values]):
            raise ValueError(f"arguments without names of their own: {odd}")
        if wrong := [
            n
            for n, c in self.columns.items()
            if max(c.axis, c.along) > len(c.shape) or ((c.axis or c.along) and n.endswith("[]"))
        ]:
            raise ValueError(f"arguments without that axis: {wrong}")
        return self


class PromptsConfig(Settings):
    """Prompts in a folder that `write_prompts` filled."""

    name: Literal["prompts"] = "prompts"
    folder: Path
    """Folder of the shards and their index."""
    dropout: Dropout | None = None
    """Share of prompts that training replaces by their null; left out, what the folder says."""
    verify: bool = True
    """Compare the SHA-256 of every file (about one second per GB); sizes are always compared."""

    def load(self) -> "Prompts":
        """The prompts, of which nothing is in memory.

        Raises:
            DataError: the folder, the index or a file is missing or damaged, or there is no null to drop prompts for.
        """
        prompts = Prompts(self.folder, dropout=self.dropout, verify=False)
        prompts.check(hashes=self.verify)
        return prompts


class Prompts:
    """Prompts as a text-conditioned model takes them, by number: `Conditions` from a folder.

    Sizes of all files are compared at once. Threads may read at once.

    Args:
        folder: what `write_prompts` filled.
        dropout: share of prompts that training replaces by their null; left out, what the folder says.
        verify: compare the SHA-256 of a shard when it is first read from.

    Raises:
        DataError: the folder, the index or a file is missing or damaged, or there is no null to drop prompts for.
    """

    def __init__(self, folder: str | Path, *, dropout: float | None = None, verify: bool = True):
        folder = Path(folder)
        self.folder, self.index = folder, read_index(folder)
        self.dropout = self.index.dropout if dropout is None else dropout
        check_dropout(self.dropout, num_nulls=self.index.num_nulls)
        self.check(hashes=False)
        self._ends = torch.tensor([shard.count for shard in self.index.shards]).cumsum(0)
        self._shards = [
            ShardFile(
                folder / shard.file,
                count=shard.count,
                columns={name: (column.dtype, column.shape) for name, column in self.index.columns.items()},
                lengths=shard.lengths,
                sha256=shard.sha256 if verify else None,
            )
            for shard in self.index.shards
        ]

    def __len__(self) -> int:
        return self.index.count

    @property
    def sha256(self) -> str:
        """Hash of the prompts that their latents are bound to, whatever share of them is dropped."""
        return self.index.sha256

    @property
    def identity(self) -> dict[str, JsonValue]:
        return {"name": "prompts", "sha256": self.sha256, "dropout": self.dropout}

    @property
    def arguments(self) -> dict[str, int | None]:
        """The arguments that prompts give a model by name, and their channels; None where these are not known."""
        columns = {name: c.shape[-1] if c.shape else None for name, c in self.index.columns.items()}
        known = columns | dict.fromkeys([*self.index.shared, *self.index.values])
        return {name.removesuffix("[]").partition(".")[0]: size for name, size in known.items()}

    def nulls(self, numbers: Int[Tensor, " b"]) -> Int[Tensor, " b"] | None:
        """The number of each prompt's null, which is a null's own; None if the folder has none."""
        if self.index.num_nulls == 0:
            return None
        if self.index.num_nulls == 1:
            return torch.full_like(numbers, len(self))
        nulls = [self._line(number).null for number in self._checked(numbers).tolist()]
        return torch.tensor(nulls, dtype=numbers.dtype, device=numbers.device) + len(self)

    def at(
        self, numbers: Int[Tensor, " b"], *, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> Kwargs:
        """Keyword arguments for these prompts and nulls, each tensor [B, ...] but constants and those that say another axis.

        Prompts of unequal length are padded with zeros, and so are their masks, to the longest of the batch. Floating-point
        tensors are cast to `dtype`, others are not. Sizes are left to the host, which knows `shape`.

        Raises:
            DataError: a number is out of range, or a shard is missing or damaged.
        """
        groups = list(by_shard(self._ends, self._checked(numbers)))
        found = {name: self._read(name, groups, count=len(numbers)) for name in self.index.columns}
        for name, column in self.index.columns.items():
            if column.axis or column.along:
                rows = torch.movedim(cast(Tensor, found[name]), 1, 1 + column.along)
                found[name] = torch.movedim(rows, 0, column.axis)
            if column.optional and cast(Tensor, found[name]).all():
                del found[name]
        for name, tensor in self._shared.items():
            is_common = self.index.shared[name] == "common"
            found[name] = tensor.expand(len(numbers), *tensor.shape) if is_common else tensor
        moved = {name: _moved(value, device, dtype) for name, value in found.items()}
        return _nested(moved | copy.deepcopy(self.index.values))

    def words(self, number: int) -> str:
        self._checked(torch.tensor([number]))
        return self._line(number).words

    def check(self, *, hashes: bool = True) -> None:
        """Raises a DataError that names every file that is missing or not what the index says."""
        check_files(self.folder, self.index.files, what="prompts", hashes=hashes)

    def _read(
        self, name: str, groups: list[tuple[int, list[int], list[int]]], *, count: int
    ) -> Tensor | list[Tensor]:
        """A column's rows [count, ...], zeros behind the shorter ones; each by itself if the argument is a list."""
        column = self.index.columns[name]
        lengths = np.zeros(count, np.int64)
        for shard, rows, places in groups:
            lengths[places] = self._shards[shard].spans(name)[1][rows]
        tensor = torch.zeros(count, lengths.max(initial=0), *column.shape, dtype=getattr(torch, column.dtype))
        content = tensor.flatten(1).view(torch.uint8).numpy()
        for shard, rows, places in groups:
            self._shards[shard].read_rows(name, rows, content, places)
        if name.endswith("[]"):
            return [row[:length] for row, length in zip(tensor, lengths.tolist(), strict=True)]
        return tensor if column.ragged else tensor[:, 0]

    @cached_property
    def _shared(self) -> dict[str, Tensor]:
        """The tensors that are the same for all prompts."""
        if self.index.common is None:
            return {}
        path = self.folder / self.index.common.file
        self._content(self.index.common)
        tensors, _ = read_safetensors(path, error=DataError)
        if missing := self.index.shared.keys() - tensors.keys():
            raise DataError(f"{path} is damaged: it has no {', '.join(sorted(missing))}")
        return {name: tensors[name] for name in self.index.shared}

    @cached_property
    def _lines(self) -> list[bytes]:
        """The words of all prompts and nulls, as JSON."""
        lines = self._content(self.index.words).split(b"\n")[:-1]
        if len(lines) != self._total:
            raise DataError(
                f"{self.folder / self.index.words.file} has {len(lines)} lines, not {self._total}"
            )
        return lines

    def _line(self, number: int) -> PromptLine:
        path = self.folder / self.index.words.file
        line = f"{path}: line {number + 1}"
        return parse_json(self._lines[number], PromptLine, name=line, kind="words", error=DataError)

    def _content(self, file: StoredFile) -> bytes:
        """A file's bytes, which are those that the index names."""
        path = self.folder / file.file
        content = read_bytes(path, kind="complete", most=file.bytes)
        if hashlib.sha256(content).hexdigest() != file.sha256:
            raise DataError(f"{path} is damaged: its sha256 is not {file.sha256[:12]}")
        return content

    @property
    def _total(self) -> int:
        return self.index.count + self.index.num_nulls

    def _checked(self, numbers: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """The numbers, on the CPU.

        Raises:
            DataError: one of them is out of range.
        """
        found = numbers.cpu()
        wrong = found[(found < 0) | (found >= self._total)].tolist()
        if wrong:
            raise DataError(f"prompt {wrong[0]} is out of range in {self.folder}: {self._range}")
        return found

    @property
    def _range(self) -> str:
        count, nulls = len(self), {0: "without a null prompt", 1: f"the null prompt is {len(self)}"}
        several = f"null prompts {count}..{self._total - 1}"
        return f"prompts are 0..{count - 1}, {nulls.get(self.index.num_nulls, several)}"


def check_bound(data: TrainingData, conditions: object) -> None:
    """Raises a DataError if data are of other prompts than the model is asked by, or of prompts and it is asked by class."""
    if not isinstance(data, LatentSet | Scenes) or data.conditions_sha256 is None:
        return
    asked = conditions.sha256 if isinstance(conditions, Prompts | Captions) else None
    if data.conditions_sha256 != asked:
        by = f"by the prompts {asked[:12]}" if asked else "by class"
        raise DataError(
            f"{data} are of the prompts {data.conditions_sha256[:12]}, and the model is asked {by}: "
            "name those that the data were made for"
        )


def read_index(folder: Path) -> PromptIndex:
    """The index of a folder of prompts.

    Raises:
        DataError: there is none, or it is damaged.
    """
    path = folder / INDEX_NAME
    if not folder.is_dir():
        raise DataError(
            f"no folder {folder}: `grafting data prompts {folder} ...` makes one of encoded prompts"
        )
    if not path.is_file():
        raise DataError(
            f"no prompts in {folder}: {INDEX_NAME} is missing, which `grafting data prompts` and `write_prompts` write last"
        )
    return read_json(path, PromptIndex, kind="an index of prompts", error=DataError)


def odd_names(names: Collection[str]) -> list[str]:
    """Names that no argument can have, that are there twice, or that are also those of a mapping that holds others."""
    paths = [tuple(name.removesuffix("[]").split(".")) for name in names]
    return [
        name
        for name, path in zip(names, paths, strict=True)
        if not all(part.isidentifier() for part in path)
        or sum(other[: len(path)] == path for other in paths) > 1
    ]


def check_dropout(dropout: float, *, num_nulls: int) -> None:
    """Raises a DataError if prompts cannot be dropped in that share."""
    if not 0 <= dropout <= 1:
        raise DataError(f"dropout is a share of the prompts, from 0 to 1; found {dropout:g}")
    if dropout and not num_nulls:
        raise DataError(f"prompts are dropped in a share of {dropout:g}, but no prompt asks for nothing")


def _moved(value: Tensor | list[Tensor], device: torch.device, dtype: torch.dtype) -> Any:
    """On that device; floating-point tensors in that dtype."""
    if isinstance(value, list):
        return [_moved(item, device, dtype) for item in value]
    return value.to(device, dtype if value.is_floating_point() else value.dtype)


def _nested(flat: Mapping[str, Any]) -> Kwargs:
    """Keyword arguments by name, those of dotted names in mappings."""
    arguments: Kwargs = {}
    for name, value in flat.items():
        *parents, last = name.removesuffix("[]").split(".")
        place = arguments
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return arguments

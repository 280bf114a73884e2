"""A folder of encoded prompts while it is written, shard by shard; the index is written last: a folder with one is complete."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypedDict

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import DataError, RunError, listed
from ..machine.files import atomic_path, hash_json, write_bytes, write_json
from ..machine.reading import JsonObject, damage, parse_json
from .prompts import INDEX_NAME, Column, PromptIndex, PromptShard, check_dropout, odd_names
from .shards import LENGTHS, StoredFile
from .workfolder import ShardRecord, WorkFolder

WORDS_NAME = "words.jsonl"
COMMON_NAME = "common.safetensors"


class Form(TypedDict, total=False):
    """What a `Column` says of its argument beside its tensor."""

    axis: int
    along: int
    optional: bool


class Prompt(NamedTuple):
    """A prompt to write."""

    words: str
    tensors: Mapping[str, Tensor]  # by the names of arguments, without a batch axis
    null: int = 0  # which of the nulls stands for it where it is dropped, counted from 0


def write_prompts(
    folder: str | Path,
    rows: Iterable[Prompt],
    *,
    source: str,
    nulls: Sequence[Prompt] = (),
    lengths: Mapping[str, str] | None = None,
    mask_dtype: torch.dtype = torch.bool,
    common: Mapping[str, Tensor] | None = None,
    constants: Mapping[str, Any] | None = None,
    dropout: float = 0.0,
    shard_bytes: int = 1 << 28,
) -> PromptIndex:
    """Write prompts as shards, and then their index: a folder with an index is complete.

    In memory are the tensors of one shard, and all words.

    Args:
        rows: the prompts; all have the same tensors, of the same dtypes and shapes but for declared lengths.
        source: where the words are from, and what encoded them.
        nulls: prompts that ask for nothing: one for all, or several, which `Prompt.null` chooses among.
        lengths: tensors that each prompt has in a length of its own, along the first axis, and the name of the mask of each:
            `{"encoder_hidden_states": "encoder_attention_mask"}`. A prompt without that mask is given one of ones.
        mask_dtype: of the masks that are made.
        common: tensors that are the same for all prompts, expanded along a batch axis that is put before theirs.
        constants: tensors and JSON values that are passed as they are, `{"guidance": torch.tensor([3.5])}`.
        dropout: share of prompts that training replaces by their null.
        shard_bytes: a shard ends with the prompt that makes it this large.

    Raises:
        DataError: no prompts, one that is not like those before it, or no null to drop prompts for.
        RunError: the folder holds prompts, or cannot be written.
    """
    folder = Path(folder)
    if (folder / INDEX_NAME).exists():
        raise RunError(f"{folder} holds prompts already: name another folder")
    check_dropout(dropout, num_nulls=len(nulls))
    shared = _write_shared(folder, common or {}, constants or {})
    names = [*shared["shared"], *shared["values"]]
    table = _Table(lengths or {}, mask_dtype, num_nulls=len(nulls), others=names)
    own = (null._replace(null=number) for number, null in enumerate(nulls))
    shards = [
        _write_shard(folder / f"prompts-{number:05}.safetensors", prompts, table.columns)
        for number, prompts in enumerate(_sharded(map(table.admit, chain(rows, own)), shard_bytes))
    ]
    if len(table.lines) == len(nulls):
        raise DataError(f"no prompts to write to {folder}")
    facts = {"source": source, "columns": table.columns, "shards": shards, "dropout": dropout, **shared}
    return _write_index(folder, table.lines, len(nulls), facts)


def _write_index(folder: Path, lines: Sequence[str], num_nulls: int, facts: Mapping[str, Any]) -> PromptIndex:
    """The words of all prompts, the nulls' last, and the index, with which the folder is complete.

    Args:
        facts: fields of the index beside those.
    """
    write_bytes(folder / WORDS_NAME, "".join(lines).encode("utf-8", "surrogatepass"))
    words = StoredFile.of(folder / WORDS_NAME)
    index = PromptIndex(count=len(lines) - num_nulls, num_nulls=num_nulls, words=words, **facts)
    write_json(folder / INDEX_NAME, index.model_dump(mode="json"))
    return index


class _Record(ShardRecord):
    """Outcome of a shard's prompts."""

    shard: PromptShard | None
    columns: dict[str, Column]


class PromptFolder:
    """A folder of prompts while any number of processes fill it, shard by shard; its index is written last.

    Args:
        facts: all that the shards' bytes depend on beside the words, as JSON.
        words: of all prompts, in their order.
        like: a prompt as all others are.
        per_shard: prompts a shard; the nulls have one of their own.
        forms: how arguments are made of their tensors, where that is not along the first axis and always.
        lengths, nulls, common, constants, dropout: as of `write_prompts`.
    """

    def __init__(
        self,
        folder: Path,
        facts: Mapping[str, Any],
        *,
        words: Sequence[str],
        like: Prompt,
        nulls: Sequence[Prompt],
        per_shard: int,
        lengths: Mapping[str, str],
        forms: Mapping[str, Form],
        common: Mapping[str, Tensor],
        constants: Mapping[str, Any],
        dropout: float,
    ):
        if not words:
            raise DataError(f"no prompts to write to {folder}")
        check_dropout(dropout, num_nulls=len(nulls))
        self.folder, self.words, self.nulls, self.per_shard = folder, words, nulls, per_shard
        self.common, self.constants, self.dropout = common, constants, dropout
        self._table = _Table(
            lengths, torch.bool, num_nulls=len(nulls), others=[*common, *constants], forms=forms
        )
        self.prompt_bytes = sum(tensor.nbytes for tensor in self._table.admit(like).values())
        """Bytes of a prompt, of that one's length."""
        of_words = hash_json([list(words), [null.words for null in nulls]])
        self._work = WorkFolder(
            folder,
            {
                **facts,
                "prompts": len(words),
                "words_sha256": of_words,
                "per_shard": per_shard,
                "dropout": dropout,
            },
            _Record,
            what="prompts",
        )

    @property
    def num_shards(self) -> int:
        return self._num_filled + bool(self.nulls)

    @cached_property
    def _num_filled(self) -> int:
        return -(-len(self.words) // self.per_shard)

    def words_of(self, number: int) -> Sequence[str]:
        """The prompts that a shard covers; none of the last one's, which has the nulls."""
        return self.words[number * self.per_shard : (number + 1) * self.per_shard]

    def check(self) -> tuple[int, int]:
        """Bytes that remain to be written, at the length of the prompt that others are like, and bytes that are free."""
        self._work.check()
        left = [n for n in range(self.num_shards) if not self._work.path(n).is_file()]
        needed = self.prompt_bytes * sum(len(self.words_of(n)) or len(self.nulls) for n in left)
        return needed, self._work.check_space(needed, remedy="fewer prompts")

    def working(self, share: slice) -> AbstractContextManager[list[int]]:
        """As `WorkFolder.working`."""
        return self._work.working(self.num_shards, share)

    def write(self, number: int, rows: Iterable[Prompt]) -> None:
        """Write a shard's prompts and then its record; the nulls' shard has them of its own."""
        (self.folder / INDEX_NAME).unlink(missing_ok=True)  # it may name what this shard was
        own = rows if number < self._num_filled else self.nulls
        admitted = [self._table.admit(prompt) for prompt in own]
        shard = _write_shard(self.folder / f"prompts-{number:05}.safetensors", admitted, self._table.columns)
        owner = self._work.owner(number)
        self._work.write(number, _Record(shard=shard, columns=self._table.columns, owner=owner))

    def finish(self, *, source: str) -> PromptIndex | None:
        """Write the index if every shard is done, else do nothing: another process is still at work, or was stopped.

        Raises:
            DataError: shards whose prompts are not alike.
        """
        records = [record for n in range(self.num_shards) if (record := self._work.read(n)) is not None]
        if len(records) < self.num_shards:
            return None
        if any(record.columns != records[0].columns for record in records):
            raise DataError(
                f"the shards of {self.folder} have prompts of different kinds: empty it, and start again"
            )
        lines = [
            *map(_line, self.words),
            *(_line(null.words, number) for number, null in enumerate(self.nulls)),
        ]
        facts = {
            "source": source,
            "columns": records[0].columns,
            "shards": [record.shard for record in records if record.shard is not None],
            "dropout": self.dropout,
            **_write_shared(self.folder, self.common, self.constants),
        }
        return _write_index(self.folder, lines, len(self.nulls), facts)


def _line(words: str, null: int = 0) -> str:
    return json.dumps({"words": words} | ({"null": null} if null else {}), ensure_ascii=False) + "\n"


class _Table:
    """Format of the prompts, taken from the first, and the words of those that were admitted."""

    def __init__(
        self,
        lengths: Mapping[str, str],
        mask_dtype: torch.dtype,
        *,
        num_nulls: int,
        others: Collection[str],
        forms: Mapping[str, Form] = MappingProxyType({}),
    ):
        self.lengths, self.mask_dtype, self.num_nulls, self.others = lengths, mask_dtype, num_nulls, others
        self.forms = forms
        self.columns: dict[str, Column] = {}
        self.lines: list[str] = []

    def admit(self, prompt: Prompt) -> dict[str, Tensor]:
        """A prompt's tensors, with its masks; copies, since a part of a batch holds the batch in memory.

        Raises:
            DataError: it is not like those before.
        """
        tensors = {
            name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in prompt.tensors.items()
        }
        for name, mask in self.lengths.items():
            if name in tensors and mask not in tensors:
                tensors[mask] = torch.ones(tensors[name].shape[:1], dtype=self.mask_dtype)
        if faults := [*self._length_faults(tensors), *self._faults(prompt, tensors)]:
            head = f"prompt {len(self.lines)}, {prompt.words!r}, cannot be stored:"
            raise DataError(listed(head, faults))
        self.lines.append(_line(prompt.words, prompt.null))
        return tensors

    def _faults(self, prompt: Prompt, tensors: Mapping[str, Tensor]) -> Iterator[str]:
        found = {name: self._column(name, tensor) for name, tensor in tensors.items()}
        self.columns = self.columns or found
        if odd := odd_names([*found, *self.others]):
            yield f"arguments without names of their own: {', '.join(odd)}"
        if found.keys() != self.columns.keys():
            yield f"it has {', '.join(found)}, and the first prompt {', '.join(self.columns)}"
        for name in [name for name in found if name in self.columns]:
            if found[name] != self.columns[name]:
                yield _difference(name, found[name], self.columns[name])
            if tensors[name].is_floating_point() and tensors[name].isnan().any():
                yield f"{name} holds NaN"
        if not 0 <= prompt.null < max(self.num_nulls, 1):
            yield f"its null is number {prompt.null}, and there are {self.num_nulls}, counted from 0"

    def _length_faults(self, tensors: Mapping[str, Tensor]) -> Iterator[str]:
        for name, mask in self.lengths.items():
            if name not in tensors:
                yield f"it has no {name}, of which a mask is declared"
            elif (size := tensors[name].shape[:1]) != tensors[mask].shape[:1] or not size:
                shapes = list(tensors[name].shape), list(tensors[mask].shape)
                yield f"{name} {shapes[0]} and its mask {mask} {shapes[1]} differ in length"

    def _column(self, name: str, tensor: Tensor) -> Column:
        ragged = name in self.lengths or name in self.lengths.values() or name.endswith("[]")
        dtype = str(tensor.dtype).removeprefix("torch.")
        shape = tuple(tensor.shape[1:] if ragged else tensor.shape)
        return Column(dtype=dtype, shape=shape, ragged=ragged, **self.forms.get(name, {}))


def _difference(name: str, found: Column, first: Column) -> str:
    text = f"{name} is {found.dtype} {list(found.shape)}, and of the first prompt {first.dtype} {list(first.shape)}"
    if found.dtype == first.dtype and found.shape[1:] == first.shape[1:]:
        text += f": name its mask, `lengths={{{name!r}: MASK}}`, or bring all to one length"
    return text


def _sharded(rows: Iterable[dict[str, Tensor]], size: int) -> Iterator[list[dict[str, Tensor]]]:
    """The same rows in groups of `size` bytes or little more, the last of what is left."""
    held: list[dict[str, Tensor]] = []
    num_bytes = 0
    for row in rows:
        held.append(row)
        num_bytes += sum(tensor.nbytes for tensor in row.values())
        if num_bytes >= size:
            yield held
            held, num_bytes = [], 0
    if held:
        yield held


def _write_shard(path: Path, rows: list[dict[str, Tensor]], columns: Mapping[str, Column]) -> PromptShard:
    tensors, lengths = {}, {}
    for name, column in columns.items():
        parts = [row[name] for row in rows]
        tensors[name] = torch.cat(parts) if column.ragged else torch.stack(parts)
        if column.ragged:
            lengths[name] = len(tensors[name])
            tensors[LENGTHS + name] = torch.tensor([len(part) for part in parts], dtype=torch.int32)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)
    return PromptShard.of(path, count=len(rows), lengths=lengths)


def _write_shared(folder: Path, common: Mapping[str, Tensor], constants: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the tensors that are the same for all prompts; gives what the index says of them and of other constants."""
    constant = {name: value for name, value in constants.items() if isinstance(value, Tensor)}
    kinds = dict.fromkeys(common, "common") | dict.fromkeys(constant, "constant")
    if odd := odd_names([*common, *constants]):
        raise DataError(f"arguments without names of their own: {', '.join(odd)}")
    with damage("a constant", "a tensor or a JSON value", error=DataError):
        text = json.dumps({name: value for name, value in constants.items() if name not in constant})
    values = parse_json(text, JsonObject, name="the constants", error=DataError)
    if not kinds:
        return {"shared": kinds, "values": values}
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in {**common, **constant}.items()}
    with atomic_path(folder / COMMON_NAME) as temporary:
        save_file(tensors, temporary)
    return {"shared": kinds, "values": values, "common": StoredFile.of(folder / COMMON_NAME)}

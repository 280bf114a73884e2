"""A folder of latents while it is filled, shard by shard, by any number of processes that see the same files.

A shard covers fixed images, whatever else was done, and its bytes depend on the work's facts alone. It is done when its record,
with its checksum, lies in `shards/`; so a process that is killed loses the shard it was at, and whoever resumes finds the
rest. The index is written last, by whoever finds every record: a folder with an index is complete.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from ..contract import Step
from ..errors import DataError, listed
from ..machine.files import sha256_of, write_bytes, write_json
from .latents import INDEX_NAME, ItemNames, LatentIndex, Shard, StoredDtype, rows_not_finite, write_shard
from .workfolder import WORK_NAME as WORK_NAME
from .workfolder import ShardRecord, WorkFolder

FORMAT = 1
NAMES_NAME = "items.txt"
UNREADABLE_NAME = "unreadable.txt"

Dtype = Literal["fp16", "bf16", "fp32"]
DTYPES: dict[Dtype, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

_LABEL_BYTES = 4


class Record(ShardRecord):
    """Outcome of a shard's images."""

    shard: Shard | None  # None where no image could be read
    names: tuple[str, ...]  # of the items, in their order
    unreadable: dict[str, str] = {}  # name of an image, and why it is left out


@dataclass(frozen=True, kw_only=True)
class LatentFolder:
    """A folder of latents to fill with `num_images` images, `per_shard` per shard."""

    folder: Path
    facts: Mapping[str, Any]  # all that the shards' bytes depend on, as JSON
    num_images: int
    per_shard: int
    shape: tuple[int, ...]  # of an item as it is stored
    dtype: Dtype
    num_classes: int
    items_per_image: int = 1

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.per_shard)

    def images_of(self, number: int) -> range:
        """The images that a shard covers."""
        return range(number * self.per_shard, min((number + 1) * self.per_shard, self.num_images))

    def count(self, shards: Iterable[int]) -> int:
        """Images that these shards cover."""
        return sum(len(self.images_of(number)) for number in shards)

    def start(self, missing: Iterable[int], share: slice) -> Step:
        """The step that a share's work begins at, when these of its shards are still to do."""
        total = self.count(range(self.num_shards)[share])
        return Step(done=total - self.count(missing), total=total)

    @cached_property
    def _work(self) -> WorkFolder[Record]:
        return WorkFolder(self.folder, self.facts, Record, what="latents")

    def check(self) -> tuple[int, int]:
        """Bytes that the shards still to be written take, and bytes that are free."""
        self._work.check()
        left = [number for number in range(self.num_shards) if not self._work.path(number).is_file()]
        needed = self.count(left) * self.image_bytes
        return needed, self._work.check_space(needed, remedy="a smaller dtype")

    @property
    def image_bytes(self) -> int:
        """Bytes on disk per image."""
        values = torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize
        return self.items_per_image * (values + _LABEL_BYTES)

    def working(self, share: slice) -> AbstractContextManager[list[int]]:
        """As `WorkFolder.working`."""
        return self._work.working(self.num_shards, share)

    def write(
        self,
        number: int,
        latents: Float[Tensor, "n c *fhw"],
        labels: Sequence[int],
        *,
        names: Sequence[str],
        unreadable: Mapping[str, str],
    ) -> None:
        """Write a shard and then its record."""
        assert len(latents) == len(labels) == len(names)
        stored = latents.to(DTYPES[self.dtype])
        _check_finite(stored, names, dtype=self.dtype)
        _check_labels(labels, names, num_classes=self.num_classes)
        (self.folder / INDEX_NAME).unlink(missing_ok=True)  # it may name what this shard was
        record = Record(
            shard=write_shard(self.folder, number, stored, torch.tensor(labels)) if len(labels) else None,
            names=tuple(names),
            unreadable=dict(unreadable),
            owner=self._work.owner(number),
        )
        self._work.write(number, record)

    def finish(self, facts: Mapping[str, Any], *, max_unreadable: int) -> LatentIndex | None:
        """Write the index if every shard is done, else do nothing: another process is still at work, or was stopped.

        Args:
            facts: fields of the index that are not of the shards.

        Raises:
            DataError: more unreadable images than `max_unreadable`, or not one that is readable.
        """
        found = [self._work.read(number) for number in range(self.num_shards)]
        records = [record for record in found if record is not None]
        if len(records) < self.num_shards:
            return None
        unreadable = {name: reason for record in records for name, reason in record.unreadable.items()}
        (self.folder / UNREADABLE_NAME).unlink(missing_ok=True)
        if unreadable:
            lines = "".join(f"{_line(name)}\t{_line(reason)}\n" for name, reason in unreadable.items())
            write_bytes(self.folder / UNREADABLE_NAME, lines.encode())
        self.check_unreadable(unreadable, max_unreadable)
        shards = tuple(record.shard for record in records if record.shard is not None)
        if not shards:
            raise DataError(f"no image of {self.num_images} could be read; see {UNREADABLE_NAME}")
        names = self.folder / NAMES_NAME
        write_bytes(names, "".join(f"{_line(name)}\n" for r in records for name in r.names).encode())
        index = LatentIndex(
            dtype=cast(StoredDtype, str(DTYPES[self.dtype]).removeprefix("torch.")),
            shape=self.shape,
            num_classes=self.num_classes,
            shards=shards,
            mirrored=self.items_per_image == 2,
            unreadable=len(unreadable),
            items=ItemNames(file=NAMES_NAME, sha256=sha256_of(names)),
            **facts,
        )
        write_json(self.folder / INDEX_NAME, index.model_dump(mode="json"))
        return index

    def check_unreadable(self, unreadable: Mapping[str, str], max_unreadable: int) -> None:
        """Raises a DataError if more images than that cannot be read."""
        if len(unreadable) > max_unreadable:
            head = (
                f"{len(unreadable)} of {self.num_images} images cannot be read, {max_unreadable} allowed: "
                "repair them and start again, or allow a larger share"
            )
            shown = [f"{_line(name)}: {_line(reason)}" for name, reason in list(unreadable.items())[:5]]
            raise DataError(listed(head, shown))

    def unreadable_of(self, number: int) -> dict[str, str]:
        """The images of a shard that could not be read when it was done, and why."""
        record = self._work.read(number)
        return {} if record is None else record.unreadable


def _check_finite(latents: Tensor, names: Sequence[str], *, dtype: Dtype) -> None:
    if bad := rows_not_finite(latents):
        raise DataError(
            f"{len(bad)} latents are not finite in {dtype}, the first of {names[bad[0]]}: "
            "choose a dtype of larger range (bf16, fp32), or look at the autoencoder"
        )


def _check_labels(labels: Sequence[int], names: Sequence[str], *, num_classes: int) -> None:
    wrong = [i for i, label in enumerate(labels) if not 0 <= label < num_classes]
    if wrong:
        raise DataError(f"labels are 0..{num_classes - 1}, found {labels[wrong[0]]} of {names[wrong[0]]}")


def _line(text: str) -> str:
    """A text on one line."""
    return " ".join(text.splitlines()) if text.splitlines() != [text] else text

"""Latents of large data sets in a folder: safetensors shards and a JSON index that says what they are. Reader and writer.

A batch reads the rows that it names and nothing else. A shard holds `latents` (samples [n, C, ...], or the VAE's means and
log variances [n, 2C, ...]; of images [C, h, w], of videos [C, F, h, w]) as the VAE gives them, and `labels` [n], which are classes
or numbers of prompts; the scale and shift of the diffusion model are in the index and are applied as they are read.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float, Int, Int32
from pydantic import (
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_serializer,
    model_validator,
)
from safetensors.torch import save_file
from torch import Tensor

from ..errors import DataError
from ..machine.files import atomic_path, hash_json, sha256_of, write_json
from ..machine.randomness import item_noise
from ..machine.reading import Inside, JsonObject, read_json, read_text, shown
from ..machine.settings import Stored
from .shards import ShardFile, StoredFile, by_shard, check_files
from .subset import Listing, PartialData, subset_sha256

INDEX_NAME = "latents.json"

StoredAs = Literal["samples", "moments"]
StoredDtype = Literal["float64", "float32", "float16", "bfloat16"]


class Shard(StoredFile):
    """A file of so many items."""

    count: PositiveInt

    @model_serializer(mode="wrap")
    def _in_order(self, to_dict: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Serialise in the format of all earlier indexes, so that the same folder has the same bytes."""
        return {"file": self.file, "count": self.count, **to_dict(self)}


class ItemNames(Stored):
    """The file that names the items, one per line, in their order."""

    file: Inside
    sha256: str


class LatentIndex(Stored):
    """Index of a folder of latents; items are numbered through its shards."""

    source: str  # the data set and split
    vae: str
    scale: PositiveFloat  # multiplies a latent, less the shift, before the diffusion model sees it
    shift: FiniteFloat = 0.0
    stored: StoredAs
    dtype: StoredDtype
    shape: Annotated[tuple[PositiveInt, ...], Field(min_length=3, max_length=8)]  # of an item as it is stored
    num_classes: PositiveInt  # of prompts, where labels are their numbers
    shards: Annotated[tuple[Shard, ...], Field(min_length=1)]
    vae_revision: str | None = None  # the commit on the Hub
    vae_sha256: str | None = None  # of its config and weights
    crop_size: PositiveInt | None = None  # of the images, in pixels
    mirrored: bool = False  # every image is there twice: as it is, and after it mirrored from left to right
    source_revision: str | None = None  # the commit on the Hub
    source_sha256: str | None = None  # of the ids and labels of the images
    unreadable: NonNegativeInt = 0  # images that are left out
    notes: str = ""
    items: ItemNames | None = None
    conditions_sha256: str | None = None  # of the prompts whose numbers the labels are

    @model_validator(mode="after")
    def _fits(self) -> "LatentIndex":
        item = math.prod(self.shape) * getattr(torch, self.dtype).itemsize
        if small := [shard.file for shard in self.shards if shard.bytes < shard.count * item]:
            raise ValueError(f"{small[0]} has not the bytes for as many {self.dtype} {shown(self.shape)}")
        return self

    @model_serializer(mode="wrap")
    def _without_absent(self, to_dict: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Leaves out that the latents are of no prompts: indexes of before did not say so."""
        absent = {"conditions_sha256"} if self.conditions_sha256 is None else set()
        return {key: value for key, value in to_dict(self).items() if key not in absent}

    @property
    def count(self) -> int:
        return sum(shard.count for shard in self.shards)


class LatentsConfig(PartialData):
    """Latents in a folder that `write_latents` filled, or a part of them.

    Where items have names a subset is of images, and takes the mirrored ones along.
    """

    name: Literal["latents"] = "latents"
    folder: Path
    """Folder of the shards and their index."""
    seed: NonNegativeInt = 0
    """Of the draw of `per_class`, and of samples from stored means and variances: one for each item, always the same."""
    verify: bool = True
    """Compare the SHA-256 of every shard that is read from (about one second per GB); sizes are always compared."""

    def load(self) -> "LatentSet":
        """The latents, of which nothing but labels is read.

        Raises:
            DataError: the folder, the index or a shard is missing or damaged, or the subset is of another data set.
        """
        latents, places = self._whole(), self._places(seed=self.seed)
        if places is not None:
            latents = latents.take(places)
        latents.check(hashes=self.verify)
        return latents

    def listing(self) -> Listing:
        latents = self._whole()
        index, copies = latents.index, 1
        ids: Sequence[int] | Sequence[str] = range(index.count)
        if index.items is not None:
            copies = 2 if index.mirrored else 1
            ids = read_item_names(self.folder, index)[::copies]
        return Listing(
            source=index.source,
            num_classes=index.num_classes,
            ids=ids,
            read_labels=lambda: latents.labels[::copies],
            copies=copies,
        )

    def _whole(self) -> "LatentSet":
        index = read_index(self.folder)
        return LatentSet(self.folder, index, torch.arange(index.count), seed=self.seed)

    def describe(self) -> JsonObject:
        """Identity of the data in a run's manifest: hashes of the index and of the chosen items, not their location."""
        latents = self.model_copy(update={"verify": False}).load()  # the index names the hashes that count
        return {
            "name": self.name,
            # without what older indexes do not have, so that their hashes stay
            "sha256": hash_json(latents.index.model_dump(mode="json", exclude_defaults=True)),
            "items_sha256": subset_sha256(tuple(latents.items.tolist())),
            "count": len(latents),
            "seed": self.seed,
        }


class LatentShard(ShardFile):
    """A shard's `latents` [count, *shape] and int32 `labels` [count]."""

    def __init__(self, path: Path, *, num_classes: int, **facts: Any):
        super().__init__(path, **facts)
        self._num_classes = num_classes

    @cached_property
    def labels(self) -> Int32[np.ndarray, " n"]:
        """The class of every row.

        Raises:
            DataError: the shard is missing or damaged, or a label is no class.
        """
        labels = self.integers("labels")
        if len(labels) and not 0 <= labels.min() <= labels.max() < self._num_classes:
            raise DataError(
                f"the shard {self.path} has labels {labels.min()}..{labels.max()}; classes are 0..{self._num_classes - 1}"
            )
        return labels


class LatentSet:
    """Latents by index, as a diffusion model takes them: scaled, float32.

    Args:
        items: the numbers, through all shards, of the items of this set.
        seed: an item's sample from its mean and variance depends on (seed, number) alone.
    """

    def __init__(self, folder: Path, index: LatentIndex, items: Int[Tensor, " m"], *, seed: int):
        self.folder, self.index, self.items, self.seed = folder, index, items, seed
        self._ends = torch.tensor([shard.count for shard in index.shards]).cumsum(0)
        self._shards = [
            LatentShard(
                folder / shard.file,
                count=shard.count,
                columns={"latents": (index.dtype, index.shape), "labels": ("int32", ())},
                num_classes=index.num_classes,
            )
            for shard in index.shards
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __str__(self) -> str:
        return f"the latents in {self.folder}"

    @property
    def num_classes(self) -> int:
        return self.index.num_classes

    @property
    def conditions_sha256(self) -> str | None:
        """The hash of the prompts whose numbers the labels are; None where they are classes."""
        return self.index.conditions_sha256

    @cached_property
    def labels(self) -> Int[Tensor, " m"]:
        """The class of every item of this set."""
        labels = np.empty(len(self.items), np.int64)
        for shard, rows, places in self._by_shard(self.items):
            labels[places] = shard.labels[rows]
        return torch.from_numpy(labels)

    def batch(self, indices: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b c *fhw"], Int[Tensor, " b"]]:
        """Latents and labels of these items of the set; each shard is opened once. Threads may call it at once."""
        numbers = self.items[indices]
        stored = torch.empty(len(numbers), *self.index.shape, dtype=getattr(torch, self.index.dtype))
        content, labels = stored.flatten(1).view(torch.uint8).numpy(), np.empty(len(numbers), np.int64)
        for shard, rows, places in self._by_shard(numbers):
            shard.read_rows("latents", rows, content, places)
            _check_finite(stored[places], rows, shard.path)
            labels[places] = shard.labels[rows]
        latents = self._samples(stored.float(), numbers)
        return latents.sub_(self.index.shift).mul_(self.index.scale), torch.from_numpy(labels)

    def _by_shard(self, numbers: Tensor) -> Iterator[tuple[LatentShard, list[int], list[int]]]:
        """Each shard that holds some of these items, their rows in it, and their places among `numbers`."""
        for number, rows, places in by_shard(self._ends, numbers):
            yield self._shards[number], rows, places

    def take(self, indices: Int[Tensor, " m"]) -> "LatentSet":
        """The set of these items, in this order."""
        return LatentSet(self.folder, self.index, self.items[indices], seed=self.seed)

    def check(self, *, hashes: bool) -> None:
        """Raises a DataError that names every shard of this set's items that is missing or not what the index says."""
        used = torch.searchsorted(self._ends, self.items, right=True).unique().tolist()
        check_files(
            self.folder, (self.index.shards[number] for number in used), what="latents", hashes=hashes
        )

    def _samples(self, stored: Tensor, numbers: Tensor) -> Tensor:
        """The latents of what is stored, which is overwritten.

        Source: the posterior of diffusers' `AutoencoderKL`: mean, then log variance, kept within -30 and 20.
        """
        if self.index.stored == "samples":
            return stored
        mean, log_variance = stored.chunk(2, dim=1)
        deviation = log_variance.clamp_(-30, 20).mul_(0.5).exp_()
        return deviation.mul_(item_noise(self.seed, numbers, tuple(mean.shape[1:]))).add_(mean)


def _check_finite(stored: Tensor, rows: list[int], path: Path) -> None:
    if bad := rows_not_finite(stored):
        raise DataError(
            f"{path}: row {rows[bad[0]]} of `latents` holds values that are not finite: encode it again, or leave it out"
        )


def rows_not_finite(stored: Tensor) -> list[int]:
    """The rows that hold a value that is not finite."""
    return (~stored.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist() if len(stored) else []


def read_index(folder: Path) -> LatentIndex:
    """The index of a folder of latents.

    Raises:
        DataError: there is none, or it is damaged.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        raise DataError(
            f"no latents in {folder}: {INDEX_NAME}, which `write_latents` writes last, is missing"
        )
    return read_json(path, LatentIndex, kind="an index of latents", error=DataError)


def read_item_names(folder: Path, index: LatentIndex) -> list[str]:
    """The name of every item, in their order: of an image its class and file, with ` mirrored` behind it if it is.

    Raises:
        DataError: the index does not say them, or the file is missing or damaged.
    """
    if index.items is None:
        raise DataError(f"the items in {folder} have no names, only numbers 0..{index.count - 1}")
    path = folder / index.items.file
    if not path.is_file() or sha256_of(path) != index.items.sha256:
        raise DataError(f"{path}, the names of the items, is missing or damaged")
    return read_text(path).split("\n")[:-1]


def write_latents(
    folder: str | Path,
    batches: Iterable[tuple[Float[Tensor, "b c *fhw"], Int[Tensor, " b"]]],
    *,
    source: str,
    vae: str,
    scale: float,
    shift: float = 0.0,
    num_classes: int,
    conditions_sha256: str | None = None,
    stored: StoredAs = "samples",
    dtype: torch.dtype = torch.float16,
    shard_size: int = 2048,
) -> LatentIndex:
    """Write batches of unscaled latents (or means and log variances) and labels as shards, and then their index.

    Only `shard_size` items are in memory. A folder with an index is complete.

    Args:
        num_classes: labels are below it; the number of prompts, where labels are their numbers.
        conditions_sha256: `Prompts.sha256` of those prompts; left out, labels are classes.

    Raises:
        DataError: no items, a value that is not finite in `dtype`, or a label that is no class.
        RunError: the folder cannot be written.
    """
    folder = Path(folder)
    (folder / INDEX_NAME).unlink(missing_ok=True)
    shards, shape = [], None
    for number, (latents, labels) in enumerate(_regrouped(batches, shard_size)):
        if labels.min() < 0 or labels.max() >= num_classes:
            raise DataError(
                f"labels are 0..{num_classes - 1}, found {int(labels.min())}..{int(labels.max())}"
            )
        shape, stored_as = tuple(latents.shape[1:]), latents.to(dtype)
        if bad := rows_not_finite(stored_as):
            first = number * shard_size + bad[0]
            raise DataError(f"item {first} is not finite in {dtype}: mend it or leave it out")
        shards.append(write_shard(folder, number, stored_as, labels))
    if shape is None:
        raise DataError(f"no latents to write to {folder}")
    index = LatentIndex(
        source=source,
        vae=vae,
        scale=scale,
        shift=shift,
        stored=stored,
        dtype=cast(StoredDtype, str(dtype).removeprefix("torch.")),
        shape=shape,
        num_classes=num_classes,
        shards=tuple(shards),
        conditions_sha256=conditions_sha256,
    )
    write_json(folder / INDEX_NAME, index.model_dump(mode="json"))
    return index


def write_shard(
    folder: Path, number: int, latents: Float[Tensor, "n c *fhw"], labels: Int[Tensor, " n"]
) -> Shard:
    """Writes a folder's shard of that number, in the dtype that its latents have; gives its entry of the index."""
    path = folder / f"latents-{number:05}.safetensors"
    with atomic_path(path) as temporary:
        save_file({"latents": latents.contiguous(), "labels": labels.to(torch.int32).contiguous()}, temporary)
    return Shard.of(path, count=len(labels))


def _regrouped(
    batches: Iterable[tuple[Tensor, Tensor]], size: int
) -> Iterator[tuple[Float[Tensor, "n c *fhw"], Int[Tensor, " n"]]]:
    """The same items in groups of `size`, the last of what is left."""
    latents: list[Tensor] = []
    labels: list[Tensor] = []
    held = 0
    for batch_latents, batch_labels in batches:
        latents.append(batch_latents)
        labels.append(batch_labels)
        held += len(batch_labels)
        while held >= size:
            whole_latents, whole_labels = torch.cat(latents), torch.cat(labels)
            yield whole_latents[:size], whole_labels[:size]
            latents, labels = [whole_latents[size:]], [whole_labels[size:]]
            held -= size
    if held:
        yield torch.cat(latents), torch.cat(labels)

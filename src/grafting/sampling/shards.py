"""Shards of a set of images in a folder, each whole or absent and with its checksum, until the set is whole.

A shard is a batch: number b holds the images from b times the batch size on, whoever makes it. The index says which images
they are, so that two sets are never mixed. This file does not know what makes the images.
"""

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxtyping import Int, UInt8
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError, FaultWarning, RunError, listed
from ..machine.files import (
    atomic_path,
    differing,
    disk_errors,
    flatten,
    hash_json,
    is_empty,
    names_in,
    partial_path,
    write_json,
)
from ..machine.reading import JsonObject, cut, open_safetensors, read_json, read_safetensors
from ..metrics.features import tensors_sha256

INDEX_NAME = "drawing.json"

_FORMAT = 1


class Shards:
    """The images of a set, as far as they are there.

    Args:
        folder: made by `begin`, of no use when the images are in a file of their own.
        drawing: all that the images depend on, as JSON.

    Raises:
        RunError: the folder holds other images (says each difference), or something else.
    """

    def __init__(self, folder: Path, *, num_images: int, batch_size: int, drawing: Mapping[str, Any]):
        self.folder, self._num_images, self._batch_size = folder, num_images, batch_size
        # shards of another size hold other images under the same number
        self._index = {"format": _FORMAT, "batch_size": batch_size, "drawing": drawing}
        self._key = hash_json(self._index)
        self._check()

    def __len__(self) -> int:
        return -(-self._num_images // self._batch_size)

    def images_of(self, shard: int) -> range:
        """The numbers of a shard's images."""
        first = shard * self._batch_size
        return range(first, min(first + self._batch_size, self._num_images))

    def missing(self) -> set[int]:
        """The shards that are not there yet; does not read them."""
        names = names_in(self.folder)
        return {shard for shard in range(len(self)) if self._path(shard).name not in names}

    def begin(self) -> None:
        """Make the folder, and say in it which images it is for."""
        write_json(self.folder / INDEX_NAME, self._index)

    @property
    def is_begun(self) -> bool:
        """True until the shards are discarded."""
        return (self.folder / INDEX_NAME).is_file()

    def write(self, shard: int, images: Tensor, labels: Tensor, *, ms_per_image: float) -> None:
        """Write a shard, atomically, with how long it took."""
        tensors = {"images": images.contiguous(), "labels": labels.cpu()}
        words = {"sha256": tensors_sha256(tensors, self._key, str(shard)), "ms_per_image": str(ms_per_image)}
        with atomic_path(self._path(shard)) as temporary:
            save_file(tensors, temporary, metadata=words)

    def load(self, shard: int) -> tuple[Tensor, Tensor] | None:
        """A shard's images and labels; None if it is not there, or not what was written of these images."""
        path = self._path(shard)
        if not path.is_file():
            return None
        try:
            tensors, words = read_safetensors(path)
        except CheckpointError:
            tensors, words = {}, {}
        recorded = words.get("sha256")
        if recorded == tensors_sha256(tensors, self._key, str(shard)):
            return tensors["images"], tensors["labels"]
        warnings.warn(f"{path} is damaged and will be drawn again", FaultWarning, stacklevel=2)
        return None

    def ms_per_image(self, shard: int) -> float:
        """Time per image that a shard took."""
        with open_safetensors(self._path(shard), error=RunError) as file:
            return float(file.metadata()["ms_per_image"])

    def batches(self) -> Iterator[tuple[UInt8[Tensor, "b c *size"], Int[Tensor, " b"]]]:
        """The images and labels of all shards, in their order.

        Raises:
            RunError: a shard is missing or damaged; one that is damaged is removed, so that the next call draws it.
        """
        for shard in range(len(self)):
            found = self.load(shard)
            if found is None:
                self._path(shard).unlink(missing_ok=True)
                raise RunError(
                    f"{self._path(shard)} is missing or damaged; run the same command again to redraw this shard only"
                )
            yield found

    def discard(self) -> None:
        """Remove the shards, all at once."""
        going = partial_path(self.folder).parent
        shutil.rmtree(going, ignore_errors=True)
        with disk_errors(self.folder), suppress(FileNotFoundError):
            self.folder.rename(going)
        shutil.rmtree(going, ignore_errors=True)

    def _check(self) -> None:
        if not self.folder.exists():
            return
        path = self.folder / INDEX_NAME
        # looked at first: whoever makes the folder now writes the index before anything else
        empty = is_empty(self.folder)
        if not path.is_file():
            if not empty:
                raise RunError(f"{self.folder} exists and holds no shards of images: move it away")
            return
        try:
            found = read_json(path, JsonObject, kind="a record of which images are drawn", error=RunError)
        except RunError as error:
            raise RunError(f"{error}. Remove {self.folder} to start over") from error
        if found != self._index:
            head = (
                f"{self.folder} holds part of a different set of images: use the settings they were drawn with, "
                "or remove it to start over"
            )
            raise RunError(listed(head, differences(found, self._index)))

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:06}.safetensors"


def differences(found: Any, asked: Mapping[str, Any]) -> list[str]:
    """Each setting of two sets of images that differs, with both values."""
    if not isinstance(found, Mapping):
        return ["what drew them is not recorded"]
    mine, its = flatten(asked), flatten(found)
    return [
        f"{name}: {cut(str(its.get(name, 'nothing')))} there, {cut(str(mine.get(name, 'nothing')))} asked"
        for name in differing(its, mine)
    ]

"""Sampled images as one file, written and read in batches: fifty thousand of them are never in memory at once.

An .npz file holds arr_0 [N, H, W, C] of 8 bits, as ADM's evaluation reads it, and labels [N] (of videos
[N, F, H, W, C]); a run's folder holds `samples/ROW.safetensors`, with images [N, C, H, W] and labels. Both also say how the images were sampled, so that
measuring them later knows the protocol, and what drew them.
"""

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zipfile import ZipFile

import numpy as np
import torch
from jaxtyping import Int, UInt8
from pydantic import ConfigDict, with_config
from torch import Tensor
from typing_extensions import TypedDict

from ..contract import Denoiser
from ..errors import CheckpointError, DataError, ProtocolError
from ..machine.devices import default_device
from ..machine.files import atomic_path, sha256_of
from ..machine.precision import settled
from ..machine.reading import Json, JsonObject, NpzFile, cut, damage, open_safetensors, parse_json, read_yaml
from .chain import SamplingConfig

Batches = Iterable[tuple[Tensor, Tensor]]
"""Images [B, C, H, W] of 8 bits and their labels [B]."""

_IMAGES = "arr_0"


@with_config(ConfigDict(extra="allow"))
class Origin(TypedDict):
    """How images came about, as their protocol says it."""

    sampling: JsonObject
    labels: Json
    weights_dtype: str


class Samples(NamedTuple):
    """Images, labels, and how they came about: `sampling`, `labels` and `weights_dtype` of their protocol."""

    images: UInt8[Tensor, "n c *size"]
    labels: Int[Tensor, " n"]
    origin: Origin


@dataclass(frozen=True, kw_only=True)
class SampleFile:
    """A file of samples, of which only the labels have been read.

    Args:
        shape: channels, height and width of an image; of a video its frames after the channels.
        labels: None where the file has none, as ADM's own files.
        origin: `sampling`, `labels` and `weights_dtype` of the images' protocol.
        record: what drew them: model, autoencoder, versions; empty where it was not recorded.
        read: the images in batches of a size, from the first.
    """

    path: Path
    num_images: int
    shape: tuple[int, ...]
    labels: Int[Tensor, " n"] | None
    origin: Origin
    record: JsonObject
    read: Callable[[int], Iterator[Tensor]]

    def images(self, size: int = 500) -> Iterator[UInt8[Tensor, "b c *size"]]:
        """The images in their order, `size` at a time."""
        return self.read(size)

    def batches(self, size: int = 500) -> Iterator[tuple[UInt8[Tensor, "b c *size"], Int[Tensor, " b"]]]:
        """The images with their labels, `size` at a time. Raises as `images`, and at the call if there are no labels."""
        if self.labels is None:
            raise DataError(
                f"{self.path}: labels is not a file in the archive; samples are arr_0 [N, H, W, C] and labels [N]"
            )
        return zip(self.images(size), self.labels.split(size), strict=True)


def origin_of(
    config: SamplingConfig,
    *,
    weights_dtype: str = "float32",
    denoiser: Denoiser | None = None,
    vae: Mapping[str, Any] | None = None,
) -> Origin:
    """Sampling part of a protocol; noise process, conditions and autoencoder belong to it."""
    sampling = settled(config, default_device()).model_dump(mode="json")
    sampling |= denoiser.identity if denoiser else {}
    return {
        "sampling": sampling if vae is None else sampling | {"vae": dict(vae)},
        "labels": config.labels_rule,
        "weights_dtype": weights_dtype,
    }


def write_samples(
    path: str | Path,
    batches: Batches,
    *,
    num_images: int,
    shape: tuple[int, ...],
    origin: Mapping[str, Any],
    record: Mapping[str, Any] | None = None,
) -> None:
    """Write an .npz or .safetensors file, atomically, as the batches come; one of them is in memory at a time.

    The same images, labels and words give the same bytes.

    Args:
        num_images: how many the batches hold together.
        shape: channels, height and width of an image; of a video its frames after the channels.
        origin: see `origin_of`.
        record: what drew the images, as JSON.

    Raises:
        DataError: the batches hold another number of images, or images of another shape; nothing is written.
        RunError: it cannot be written.
    """
    path = Path(path)
    counted = _checked(batches, num_images=num_images, shape=shape)
    words = {"origin": json.dumps(origin), "record": json.dumps(record or {})}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        write = _write_npz if path.suffix == ".npz" else _write_safetensors
        write(file, counted, (num_images, *shape), words)


def read_samples(path: str | Path) -> Samples:
    """All samples of a file, in memory. Raises as `open_samples` and `SampleFile.batches`."""
    path = Path(path)
    file = open_samples(path)
    parts = list(file.batches())
    images = torch.cat([images for images, _ in parts]) if parts else torch.empty(0, *file.shape).byte()
    assert file.labels is not None
    return Samples(images, file.labels, file.origin)


def open_samples(path: str | Path) -> SampleFile:
    """An .npz file, or a `samples/ROW.safetensors` in a run's folder, to be read in batches.

    Raises:
        DataError, CheckpointError: no such file, or it is damaged or something else.
        ProtocolError: a run that has not finished sampling.
    """
    path = Path(path)
    if not path.is_file():
        found = ": it is a folder; a run's samples are its samples/ROW.safetensors" if path.is_dir() else ""
        raise DataError(f"no samples file {path}{found}")
    readers = {".npz": _open_npz, ".safetensors": _open_safetensors}
    if path.suffix not in readers:
        raise DataError(f"samples are an {' or a '.join(readers)} file, found {path}")
    return readers[path.suffix](path)


def _checked(batches: Batches, *, num_images: int, shape: tuple[int, ...]) -> Batches:
    """The same batches, known to be what the file's header says."""
    done = 0
    for images, labels in batches:
        done += len(images)
        if tuple(images.shape[1:]) != shape or len(labels) != len(images) or done > num_images:
            raise DataError(
                f"{num_images} images of {list(shape)} were to be written; found {len(images)} of "
                f"{list(images.shape[1:])} with {len(labels)} labels, {done} images so far"
            )
        yield images, labels
    if done < num_images:
        raise DataError(f"{num_images} images were to be written; got only {done}")


def _write_npz(file: BinaryIO, batches: Batches, shape: tuple[int, ...], words: dict[str, str]) -> None:
    num_images, channels, *size = shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (num_images, *size, channels)}
    labels = [torch.empty(0, dtype=torch.int64)]
    # members are stored as they are, with the time of 1980: what is read is what was written, byte for byte
    with ZipFile(file, "w") as archive:
        with archive.open(f"{_IMAGES}.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for images, batch_labels in batches:
                member.write(images.movedim(1, -1).contiguous().numpy().data)
                labels.append(batch_labels.cpu().long())
        arrays = {"labels": torch.cat(labels).numpy(), **{key: np.array(text) for key, text in words.items()}}
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _write_safetensors(
    file: BinaryIO, batches: Batches, shape: tuple[int, ...], words: dict[str, str]
) -> None:
    """Source: the format's own page, github.com/huggingface/safetensors: length, JSON header, then the tensors' bytes.

    Labels stand first, so that none has to be kept until the images are written: their place is filled in at the end.
    """
    num_images = shape[0]
    sizes = (8 * num_images, int(np.prod(shape)))
    starts = list(accumulate(sizes, initial=0))
    header = {
        "__metadata__": words,
        "labels": {"dtype": "I64", "shape": [num_images], "data_offsets": starts[:2]},
        "images": {"dtype": "U8", "shape": list(shape), "data_offsets": starts[1:]},
    }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(struct.pack("<Q", len(encoded)) + encoded)
    first = file.tell()
    file.seek(first + starts[1])
    labels = [torch.empty(0, dtype=torch.int64)]
    for images, batch_labels in batches:
        file.write(images.contiguous().numpy().data)
        labels.append(batch_labels.cpu().long())
    file.seek(first)
    file.write(torch.cat(labels).numpy().astype("<i8").data)


def _open_npz(path: Path) -> SampleFile:
    file = NpzFile(path)
    if _IMAGES not in file.names:
        raise DataError(
            f"{path}: arr_0 is not a file in the archive; samples are arr_0 [N, H, W, C] and labels [N]"
        )
    labels = file.array("labels") if "labels" in file.names else None
    origin, record = _told(path, {n: file.text(n) for n in ("origin", "record") if n in file.names})
    shape, dtype, is_fortran = file.header(_IMAGES)
    is_batch = dtype == np.uint8 and len(shape) in (4, 5)
    if labels is not None:
        is_batch = is_batch and labels.shape == shape[:1] and np.issubdtype(labels.dtype, np.integer)
    if not is_batch:
        given = "no labels" if labels is None else f"{labels.dtype} {list(labels.shape)}"
        raise DataError(
            f"{path}: arr_0 must be uint8 [N, H, W, C] and labels integers [N]; "
            f"found {dtype} {list(shape)} and {given}"
        )
    if is_fortran:
        raise DataError(f"{path}: arr_0 is in Fortran order; save np.ascontiguousarray of it")
    num_images, *size, channels = shape
    return SampleFile(
        path=path,
        num_images=num_images,
        shape=(channels, *size),
        labels=None if labels is None else torch.from_numpy(labels).long(),
        origin=_unrecorded(path) if origin is None else origin,
        record=record,
        read=lambda size: (torch.from_numpy(rows).movedim(-1, 1) for rows in file.rows(_IMAGES, size)),
    )


def _open_safetensors(path: Path) -> SampleFile:
    with open_safetensors(path) as file:
        names, words = set(file.keys()), file.metadata() or {}
        if not {"images", "labels"} <= names:
            held = cut(", ".join(sorted(names)) or "nothing")
            raise CheckpointError(f"{path} holds {held}; samples are images and labels")
        labels = file.get_tensor("labels").long()
        shape = tuple(file.get_slice("images").get_shape())
        dtype = file.get_slice("images").get_dtype()
    if dtype != "U8" or len(shape) not in (4, 5) or labels.shape != shape[:1]:
        raise CheckpointError(
            f"{path}: images must be uint8 [N, C, H, W] and labels [N]; "
            f"found {dtype} {list(shape)} and {list(labels.shape)}"
        )
    num_images, *image = shape
    origin, record = _told(path, words)
    return SampleFile(
        path=path,
        num_images=num_images,
        shape=tuple(image),
        labels=labels,
        origin=_origin_in_run(path, num_images) if origin is None else origin,
        record=record,
        read=lambda size: _read_safetensors(path, num_images, size),
    )


def _read_safetensors(path: Path, num_images: int, size: int) -> Iterator[Tensor]:
    for first in range(0, num_images, size):
        # reopened for each batch: pages of a file that stays mapped would count as memory in use
        with open_safetensors(path) as file:
            part = file.get_slice("images")[first : min(first + size, num_images)]
        yield part


def _origin_in_run(path: Path, num_images: int) -> Origin:
    """The origin of samples that do not say it themselves, from the recipe in the folder of their run."""
    recipe_path = path.parent.parent / "recipe.yaml"
    recipe = read_yaml(recipe_path, error=DataError) if recipe_path.is_file() else None
    sample = recipe.get("sample") if isinstance(recipe, dict) else None
    if not isinstance(sample, dict) or not sample:
        return _unrecorded(path)
    with damage(recipe_path, "a recipe whose `sample` can be read", error=DataError):
        config = SamplingConfig.model_validate({"precision": "fp32"} | sample)
    if num_images != config.num_images:
        raise ProtocolError(f"{path} holds {num_images} images, {recipe_path} says {config.num_images}")
    return origin_of(config)


def _told(path: Path, words: Mapping[str, str]) -> tuple[Origin | None, JsonObject]:
    """What a file says of how its images came about, if it does, and of what drew them."""
    kind = "a file of samples that says how they came about"
    origin = (
        parse_json(words["origin"], Origin, name=path, kind=kind, error=DataError)
        if "origin" in words
        else None
    )
    return origin, parse_json(words.get("record", "{}"), JsonObject, name=path, kind=kind, error=DataError)


def _unrecorded(path: Path) -> Origin:
    sampling: JsonObject = {"source": "file", "sha256": sha256_of(path)}
    return {"sampling": sampling, "labels": "as in the file", "weights_dtype": "unknown"}

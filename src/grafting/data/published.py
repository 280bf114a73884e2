"""The published ImageNet latents, `grafting/sd_vae_features_imagenet_1k_256x256`, written as a folder of shards.

A WebDataset: tars `split_000000.tar` ... of `KEY.latent.pth` [4, 32, 32], `KEY.label.pth` (one number) and `KEY.image_path`,
each tensor saved by `torch.save`; a folder into which they were unpacked will do. They are samples and not moments, were
multiplied by 0.18215, and were drawn once from images of which about half were mirrored.

Source: keshik6/grafting `src/datasets/extract_vae_features.py` at 85bd9e1, which wrote them.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from ..contract import Step
from ..errors import DataError
from ..machine.processes import ALL
from ..machine.reading import read_torch
from ..machine.settings import Settings
from .images import short_name
from .latentfolder import FORMAT, Dtype, LatentFolder
from .tars import Member, members, tar_files

PUBLISHED_VAE = "stabilityai/sd-vae-ft-ema"
PUBLISHED_SCALE = 0.18215

_PARTS = ("latent.pth", "label.pth", "image_path")
_LARGEST = 1 << 24  # bytes of a part; a latent of 1024x1024 pixels takes 256 KiB
_STEP = 256  # items between two steps

_NOTES = (
    "Published samples, drawn once; about half of the images were mirrored, and all were resized by torchvision to a short "
    "side of 256 before ADM's crop (keshik6/grafting, src/datasets/extract_vae_features.py)."
)


@dataclass(frozen=True, kw_only=True)
class Published:
    """Published latents by number: where the parts of each lie."""

    name: str
    keys: list[str]
    read: Callable[[int, str], bytes]  # a part of an item; empty where it has none
    sha256: str  # of keys and sizes

    def __len__(self) -> int:
        return len(self.keys)

    def item(self, number: int) -> tuple[Tensor, int, str]:
        """Latent [C, h, w] as it was published, class, and the path of its image, or its key if it has none.

        Raises:
            DataError: a part is missing or is not what it should be; nothing in it is executed.
        """
        key = self.keys[number]
        latent, label = (_tensor(self.read(number, part), f"{key}.{part}") for part in _PARTS[:2])
        if latent.ndim != 3 or not latent.is_floating_point():
            raise DataError(f"{key}.latent.pth: expected C, h, w of floating point, found {_said(latent)}")
        if label.numel() != 1 or label.is_floating_point() or label.is_complex():
            raise DataError(f"{key}.label.pth: expected one whole number, found {_said(label)}")
        path = self.read(number, "image_path").decode("utf-8", errors="replace").strip()
        return latent, int(label), path or key


def open_published(source: Path) -> Published:
    """The latents in a tar, in a folder of tars, or in a folder into which they were unpacked; by name, tar after tar.

    Raises:
        DataError: there are none, a tar is damaged, or an item lacks a part or has one twice or of an unlikely size.
    """
    if not source.exists():
        raise DataError(
            f"no {source}: give the published latents, a tar, a folder of tars or of unpacked files"
        )
    if source.is_file() or any(source.glob("*.tar")):
        found = _in_tars(tar_files(source))
    else:
        found = _in_folder(source)
    if not found.keys:
        raise DataError(f"no latents in {source}: files KEY.latent.pth and KEY.label.pth were looked for")
    return found


class ImportConfig(Settings):
    """Settings for importing published latents."""

    dtype: Dtype = "fp16"
    """Of the stored latents."""
    shard_size: PositiveInt = 2048
    """Items per shard."""
    num_classes: PositiveInt = 1000
    scale: PositiveFloat = PUBLISHED_SCALE
    """Factor by which they were multiplied."""
    vae: str = PUBLISHED_VAE
    """Autoencoder that made them, for the record."""


def import_published(
    published: Published, folder: Path, config: ImportConfig, *, share: slice = ALL
) -> Iterator[Step]:
    """Fill `folder` with this process's shards of published latents, one shard in memory; resumable as `encode` is.

    They are divided by `config.scale`, so that the shards hold what the autoencoder gives, as all folders of latents do.

    Raises:
        DataError: a part that is missing or damaged, or latents of several shapes. RunError: the folder holds something
            else, or the disk has not the space.
    """
    target = import_target(published, folder, config)
    target.check()

    def steps() -> Iterator[Step]:
        with target.working(share) as shards:
            yield from filling(shards)
        facts = {
            "source": published.name,
            "source_sha256": published.sha256,
            "vae": config.vae,
            "scale": config.scale,
            "stored": "samples",
            "notes": _NOTES,
        }
        target.finish(facts, max_unreadable=0)

    def filling(shards: list[int]) -> Iterator[Step]:
        step = target.start(shards, share)
        yield step
        for number in shards:
            latents = torch.empty(len(target.images_of(number)), *target.shape)
            labels, names = [], []
            for row, item in enumerate(target.images_of(number)):
                latent, label, name = published.item(item)
                if latent.shape != target.shape:
                    raise DataError(
                        f"{published.keys[item]}: a latent {tuple(latent.shape)}, the first one is {target.shape}"
                    )
                latents[row] = latent
                labels.append(label)
                names.append(name)
                if (row + 1) % _STEP == 0 and row + 1 < len(latents):
                    yield replace(step, done=step.done + row + 1)
            target.write(number, latents / config.scale, labels, names=names, unreadable={})
            step = replace(step, done=step.done + len(latents))
            yield step

    return steps()


def import_target(published: Published, folder: Path, config: ImportConfig) -> LatentFolder:
    """The folder that `import_published` fills; the first latent says the shape."""
    channels, height, width = published.item(0)[0].shape
    return LatentFolder(
        folder=folder,
        facts={
            "format": FORMAT,
            "published": {"name": published.name, "items": len(published), "sha256": published.sha256},
            "import": config.model_dump(mode="json"),
        },
        num_images=len(published),
        per_shard=config.shard_size,
        shape=(channels, height, width),
        dtype=config.dtype,
        num_classes=config.num_classes,
    )


def _in_tars(tars: list[Path]) -> Published:
    """Places are kept as numbers: a million items have three million of them."""
    keys: list[str] = []
    tables = []
    for number, tar in enumerate(tars):
        rows: dict[str, list[int]] = {}
        for path, member in members(tar):
            key, part = _split(path)
            if part is None:
                continue
            row = rows.setdefault(key, [number, -1, 0, -1, 0, -1, 0])
            place = 1 + 2 * _PARTS.index(part)
            _check_part(f"{tar}: {path}", member.size, known=row[place] >= 0)
            row[place : place + 2] = member.offset, member.size
        _check_whole(str(tar), {key: (row[1] >= 0, row[3] >= 0) for key, row in rows.items()})
        keys += [f"{tar.stem}/{key}" for key in rows]
        tables.append(np.array(list(rows.values()), np.int64).reshape(-1, 7))
    table = np.concatenate(tables)

    def read(number: int, part: str) -> bytes:
        row, place = table[number], 1 + 2 * _PARTS.index(part)
        if row[place] < 0:
            return b""
        member = Member(tars[row[0]], int(row[place]), int(row[place + 1]))
        return _contents(member, f"{keys[number]}.{part}")

    return Published(
        name=short_name(tars[0].parent), keys=keys, read=read, sha256=_hash(keys, table[:, 2::2].tolist())
    )


def _in_folder(folder: Path) -> Published:
    rows: dict[str, dict[str, Member]] = {}
    for parent, subfolders, files in os.walk(folder):
        subfolders.sort()
        for file in files:
            path = Path(parent, file)
            key, part = _split(str(path.relative_to(folder)))
            if part is None or not path.is_file():
                continue
            row, size = rows.setdefault(key, {}), path.stat().st_size
            _check_part(str(path), size, known=part in row)
            row[part] = Member(path, 0, size)
    _check_whole(str(folder), {key: (_PARTS[0] in row, _PARTS[1] in row) for key, row in rows.items()})
    keys = sorted(rows)

    def read(number: int, part: str) -> bytes:
        member = rows[keys[number]].get(part)
        return b"" if member is None else _contents(member, f"{keys[number]}.{part}")

    sizes = [[row[part].size if part in row else 0 for part in _PARTS] for row in (rows[k] for k in keys)]
    return Published(name=short_name(folder), keys=keys, read=read, sha256=_hash(keys, sizes))


def _split(path: str) -> tuple[str, str | None]:
    """Key and part of a file, from `KEY.latent.pth` or `KEY/latent.pth`; no part if it is something else."""
    for part in _PARTS:
        if path.endswith(("." + part, "/" + part)):
            return path[: -len(part) - 1], part
    return path, None


def _check_part(name: str, size: int, *, known: bool) -> None:
    if known:
        raise DataError(f"{name} is there twice")
    if not size <= _LARGEST:
        raise DataError(f"{name} has {size} bytes; no part of an item is larger than {_LARGEST}")


def _check_whole(source: str, has_parts: dict[str, tuple[bool, bool]]) -> None:
    torn = [key for key, parts in has_parts.items() if not all(parts)]
    if torn:
        raise DataError(
            f"{len(torn)} of {len(has_parts)} items in {source} lack latent.pth or label.pth, the first is {torn[0]}"
        )


def _contents(member: Member, name: str) -> bytes:
    try:
        return member.read()
    except DataError as error:
        raise DataError(f"{name} cannot be read: {error}") from error


def _tensor(content: bytes, name: str) -> Tensor:
    """The tensor that `torch.save` wrote; anything else than tensors and plain values is refused unread."""
    value = read_torch(content, name=name, kind="a tensor that torch.save wrote", error=DataError)
    if not isinstance(value, Tensor):
        raise DataError(f"{name} holds a {type(value).__name__}, not a tensor")
    return value


def _hash(keys: list[str], sizes: list[list[int]]) -> str:
    lines = (f"{key}\t{size}\n" for key, size in zip(keys, sizes, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _said(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"

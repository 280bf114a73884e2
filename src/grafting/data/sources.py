"""Streams of encoded images with labels and ids: an image folder as ImageNet's, WebDataset tars, a data set of the Hub.

Images are numbered in an order that depends on names and not on the file system, and each is read on its own, so that any
process can start anywhere. Nothing is unpacked. `centre_crop` is what ADM and DiT do to an image before they train on it.
"""

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import HfApi
from jaxtyping import UInt8
from PIL import Image

from ..errors import DataError, MissingBackend
from ..machine.huberrors import HUB_ERRORS
from ..machine.packages import install_line
from ..machine.reading import (
    PICTURE_SUFFIXES,
    JsonObject,
    damage,
    parse_json,
    read_bytes,
    read_picture,
    reason_of,
)
from .images import list_image_folder, short_name
from .tars import Member, members, tar_files

_COMMIT = re.compile(r"[0-9a-f]{40}")

# what a WebDataset calls an item's class
_LABEL_SUFFIXES = frozenset({".cls", ".json"})
_MOST_PIXELS = 1 << 28
_LONGEST_LABEL = 1 << 20  # bytes; a class is a number, and the JSON beside an image some facts


@dataclass(frozen=True, kw_only=True)
class ImageStream:
    """Encoded images by number, with labels and ids."""

    name: str  # of the data set and split, as subsets and indexes say it
    ids: Sequence[str]
    labels: Sequence[int]
    num_classes: int
    read: Callable[[int], bytes]  # the encoded image of a number; threads may call it at once
    revision: str | None = None  # the commit on the Hub

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def sha256(self) -> str:
        """A hash of ids and labels in their order; pixels are not read."""
        lines = (f"{name}\t{label}\n" for name, label in zip(self.ids, self.labels, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def crop(self, number: int, *, size: int) -> UInt8[np.ndarray, "size size 3"]:
        """The image of a number, cropped."""
        return centre_crop(decode(self.read(number)), size)


def decode(content: bytes) -> Image.Image:
    """An image in RGB; grey, palette and CMYK files are converted, an orientation in EXIF is not applied."""
    return read_picture(content, name="it")


def centre_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The central square of an image, scaled: halved while the short side is twice `size` or more, then made to fit.

    Raises:
        DataError: so long and narrow that what is cut away would fill the memory.

    Source: openai/guided-diffusion `image_datasets.py::center_crop_arr`, which DiT took over.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    shape = (round(image.width * scale), round(image.height * scale))
    if shape[0] * shape[1] > _MOST_PIXELS:
        raise DataError(f"{image.width} x {image.height} pixels are too long and narrow to crop to {size}")
    image = image.resize(shape, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def image_folder(folder: Path, *, name: str | None = None) -> ImageStream:
    """The images of `folder`/CLASS/*, by class name and file name; classes are numbered in the order of their names.

    Args:
        name: of the data set; by default the last two parts of the path.
    """
    listing = list_image_folder(folder)
    ids = list(map(str, listing.ids))
    return ImageStream(
        name=name or listing.source,
        ids=ids,
        labels=listing.labels.tolist(),
        num_classes=listing.num_classes,
        read=lambda number: read_bytes(folder / ids[number]),
    )


def image_tars(source: Path, *, num_classes: int | None = None, name: str | None = None) -> ImageStream:
    """The images of a WebDataset: a tar or a folder of them, by tar name and by place in the tar; read where they lie.

    An image `KEY.jpg` or `KEY.png` has its class in `KEY.cls`, a number, or in `KEY.json` under `cls` or `label`. All headers
    are read first (about a minute a million members); the images later, one by one.

    Args:
        num_classes: by default one more than the highest label.

    Raises:
        DataError: no tar, a damaged or compressed tar, an image without a class, or two of one key.
    """
    ids: list[str] = []
    labels: list[int] = []
    places: list[Member] = []
    for tar in tar_files(source):
        for key, image, label in _tar_items(tar):
            ids.append(f"{tar.stem}/{key}")
            labels.append(label)
            places.append(image)
    if not ids:
        raise DataError(
            f"no image in the tars of {source}: members that end in {', '.join(sorted(PICTURE_SUFFIXES))} are read"
        )
    return ImageStream(
        name=name or short_name(source.resolve().with_suffix("") if source.suffix == ".tar" else source),
        ids=ids,
        labels=labels,
        num_classes=_count_classes(labels, num_classes, source),
        read=lambda number: places[number].read(),
    )


def image_dataset(
    source: str | Path,
    *,
    split: str = "train",
    revision: str | None = None,
    num_classes: int | None = None,
    name: str | None = None,
) -> ImageStream:
    """The images of a data set of `datasets`: `owner/name` on the Hub, a folder of its files, or one of `save_to_disk`.

    It needs one column of images and one of classes: a `ClassLabel`, or whole numbers called `label`.

    Args:
        revision: branch, tag or commit on the Hub; the commit that it stands for is kept.
        num_classes: by default those that the column names, else one more than the highest label.

    Raises:
        MissingBackend: `datasets` is not installed. DataError: no such data set or split, or its columns do not fit.
    """
    on_hub = not Path(source).exists()
    commit = _commit_of(str(source), revision) if on_hub else None
    table = _open_dataset(source, split=split, revision=commit)
    image_column, label_column = _columns(table, source)
    labels = [int(label) for label in table[label_column]]
    named = getattr(table.features[label_column], "num_classes", None)
    lock = threading.Lock()
    rows = table.select_columns([image_column])

    def read(number: int) -> bytes:
        with lock:
            cell = rows[number][image_column]
        return cell["bytes"] if cell["bytes"] is not None else read_bytes(Path(cell["path"]))

    return ImageStream(
        name=name or f"{source if on_hub else short_name(Path(source))} {split}",
        ids=[f"{split}/{number}" for number in range(len(labels))],
        labels=labels,
        num_classes=_count_classes(labels, num_classes or named, source),
        read=read,
        revision=commit,
    )


def _tar_items(tar: Path) -> Iterator[tuple[str, Member, int]]:
    """Key, image and class of every item of a tar, in its order."""
    images: dict[str, Member] = {}
    labels: dict[str, int] = {}
    for path, member in members(tar):
        # a key is all before the first dot of the file name
        base = os.path.basename(path)
        suffix = base[base.find(".") :].lower() if "." in base[1:] else ""
        key = path.removesuffix(base) + base[: len(base) - len(suffix)]
        if suffix in PICTURE_SUFFIXES and not base.startswith("."):
            if key in images:
                raise DataError(f"{tar} holds two images of the key {key}")
            images[key] = member
        elif suffix in _LABEL_SUFFIXES and key not in labels:
            label = _label_in(member, suffix, tar=tar, key=key)
            if label is not None:
                labels[key] = label
    bare = [key for key in images if key not in labels]
    if bare:
        raise DataError(
            f"{len(bare)} of {len(images)} images in {tar} have no class, the first is {bare[0]}: a member KEY.cls with "
            f"a number, or KEY.json with `cls` or `label`, has to say it"
        )
    for key, image in images.items():
        yield key, image, labels[key]


def _label_in(member: Member, suffix: str, *, tar: Path, key: str) -> int | None:
    """The class in a small member; None if its JSON does not say one."""
    if member.size > _LONGEST_LABEL:
        raise DataError(f"{tar}: {key}{suffix} has {member.size} bytes, too many for a class")
    text = member.read().decode("utf-8", errors="replace").strip()
    with damage(f"{tar}: {key}{suffix}", f"a class number, {text[:40]!r}", error=DataError):
        if suffix == ".cls":
            return int(text)
        facts = parse_json(text, JsonObject, name=f"{tar}: {key}{suffix}", error=DataError)
        label = next((facts[name] for name in ("cls", "label") if name in facts), None)
        return None if label is None else int(str(label))


def _commit_of(source: str, revision: str | None) -> str:
    """Resolve a branch or tag of a data set to a commit; a commit needs no network."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    try:
        found = HfApi().dataset_info(source, revision=revision).sha
    except HUB_ERRORS as error:
        raise DataError(
            f"no data set {source}: there is no such folder, and the Hub does not give it: {reason_of(error)}"
        ) from error
    assert found is not None
    return found


def _open_dataset(source: str | Path, *, split: str, revision: str | None) -> Any:
    """The data set, whose images are not decoded."""
    try:
        import datasets
    except ImportError as error:
        raise MissingBackend(
            f"the data set {source} is read with `datasets`: {install_line('datasets')}"
        ) from error
    folder = Path(source)
    # whatever a foreign package raises
    with damage(source, f"a data set whose split {split!r} can be opened", error=DataError):
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            table = datasets.load_from_disk(str(folder))
            if isinstance(table, datasets.DatasetDict):
                table = table[split]
        else:
            table = datasets.load_dataset(str(source), split=split, revision=revision)
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _columns(table: Any, source: str | Path) -> tuple[str, str]:
    """The names of the column of images and of the column of classes."""
    kinds = {column: type(feature).__name__ for column, feature in table.features.items()}
    images = [column for column, kind in kinds.items() if kind == "Image"]
    classes = [column for column, kind in kinds.items() if kind == "ClassLabel"]
    if not classes and str(getattr(table.features.get("label"), "dtype", "")).startswith(("int", "uint")):
        classes = ["label"]
    if len(images) != 1 or len(classes) != 1:
        found = ", ".join(f"{column}: {kind}" for column, kind in kinds.items())
        raise DataError(
            f"the data set {source} needs one column of images and one of classes (ClassLabel, or whole numbers called "
            f"label); found {found}"
        )
    return images[0], classes[0]


def _count_classes(labels: Sequence[int], num_classes: int | None, source: str | Path) -> int:
    lowest, highest = min(labels, default=0), max(labels, default=0)
    if lowest < 0 or (num_classes is not None and highest >= num_classes):
        allowed = "0 or more" if num_classes is None else f"0..{num_classes - 1}"
        raise DataError(f"labels of {source} are {lowest}..{highest}, allowed are {allowed}")
    return num_classes or highest + 1

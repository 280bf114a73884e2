"""Images in memory with their labels, as training reads them; and the readers of Fashion-MNIST and of image folders.

Each source is also a config, so that a recipe can name it. Latents of large data sets are not for this file.
"""

import hashlib
import math
import os
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image
from pydantic import PositiveInt
from torch import Tensor

from ..errors import DataError
from ..machine.reading import PICTURE_SUFFIXES, JsonObject, damage, read_gzip, read_picture
from .subset import Listing, PartialData

FASHION_MNIST_CLASSES = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
CLASS_NAMES = {"fashion-mnist": FASHION_MNIST_CLASSES, "testbed-subset": FASHION_MNIST_CLASSES}
"""Names of classes, by the name of the data in a recipe."""

# where Debian's package dataset-fashion-mnist puts the files
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class ImageSet:
    """8-bit images and labels; `batch` gives them in [-1, 1], padded to `size` with the lowest value."""

    images: UInt8[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]
    num_classes: int
    size: int  # height = width after padding, in pixels

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"]]:
        return self.pixels(indices).float() / 127.5 - 1, self.labels[indices]

    def pixels(self, indices: Int[Tensor, " b"]) -> UInt8[Tensor, "b c h w"]:
        """The same images in 8 bits, padded: what samples are compared with."""
        pad = self.size - self.images.shape[-1]
        return F.pad(self.images[indices], [pad // 2, pad - pad // 2] * 2)

    def take(self, indices: Int[Tensor, " m"]) -> "ImageSet":
        """The set of these images, in this order."""
        return ImageSet(self.images[indices], self.labels[indices], self.num_classes, self.size)

    def sha256(self) -> str:
        """A hash of the images and labels, in their order."""
        digest = hashlib.sha256(self.images.numpy().tobytes())
        digest.update(self.labels.numpy().astype("<i8").tobytes())
        return digest.hexdigest()


class ImageSource(PartialData):
    """Source of images in a recipe."""

    name: str

    @abstractmethod
    def read(self, places: Int[Tensor, " m"] | None) -> ImageSet:
        """The images at these places of the data set, or all, in memory.

        Raises:
            DataError: something is missing or damaged.
        """

    def load(self) -> ImageSet:
        """The images that are asked for, in memory.

        Raises:
            DataError: something is missing or damaged, a class has too few images, or the subset is another or of
                another data set.
        """
        return self.read(self._places(seed=0))

    def describe(self) -> JsonObject:
        """Identity of the data in a run's manifest: the content's hash, not its location."""
        images = self.load()
        return {"name": self.name, "sha256": images.sha256(), "count": len(images)}


class FashionMnistConfig(ImageSource):
    """Fashion-MNIST from its four idx .gz files: 28x28 grey, padded to 32x32, 10 classes."""

    name: Literal["fashion-mnist"] = "fashion-mnist"
    folder: Path = FASHION_MNIST_FOLDER
    """Folder of the files; by default where Debian's package dataset-fashion-mnist puts them."""
    split: Literal["train", "test"] = "train"
    """The 60,000 training images or the 10,000 test images."""

    def listing(self) -> Listing:
        labels = self.read(None).labels
        return Listing(
            source=f"fashion-mnist {self.split}",
            num_classes=10,
            ids=range(len(labels)),
            read_labels=lambda: labels,
        )

    def read(self, places: Int[Tensor, " m"] | None) -> ImageSet:
        images = read_fashion_mnist(self.folder, train=self.split == "train")
        return images if places is None else images.take(places)


class ImageFolderConfig(ImageSource):
    """A folder with one subfolder of PNG, JPEG or WebP files per class; classes are numbered in the order of their names."""

    name: Literal["image-folder"] = "image-folder"
    folder: Path
    """Folder of the class subfolders."""
    size: PositiveInt
    """Height = width to crop and resize to, in pixels."""
    channels: Literal[1, 3] = 3
    """1 for grey, 3 for colour; files are converted."""

    def listing(self) -> Listing:
        return list_image_folder(self.folder)

    def read(self, places: Int[Tensor, " m"] | None) -> ImageSet:
        return read_image_folder(self.folder, size=self.size, channels=self.channels, places=places)


def read_fashion_mnist(folder: Path = FASHION_MNIST_FOLDER, *, train: bool = True) -> ImageSet:
    """The 60,000 training or 10,000 test images of Fashion-MNIST, 28x28 grey, padded to 32x32.

    Raises:
        DataError: a file is missing or damaged, or images and labels do not belong together.
    """
    prefix = "train" if train else "t10k"
    images = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise DataError(
            f"{folder}: expected images (N, 28, 28) and labels (N,), found {images.shape} and {labels.shape}"
        )
    return ImageSet(
        torch.from_numpy(images)[:, None], torch.from_numpy(labels).long(), num_classes=10, size=32
    )


def read_image_folder(
    folder: Path, *, size: int, channels: int = 3, places: Int[Tensor, " m"] | None = None
) -> ImageSet:
    """The images of `folder`/CLASS/*, cropped to their central square and resized to `size`.

    Args:
        places: of the images to read, in the order of `list_image_folder`; all when left out.

    Raises:
        DataError: no folder, no class subfolder, a class without images, or a file that is not an image.
    """
    listing = list_image_folder(folder)
    if places is None:
        places = torch.arange(len(listing.ids))
    files = [folder / str(listing.ids[place]) for place in places.tolist()]
    images = np.stack([_read_image(path, size, "L" if channels == 1 else "RGB") for path in files])
    return ImageSet(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        listing.labels[places],
        num_classes=listing.num_classes,
        size=size,
    )


def list_image_folder(folder: Path) -> Listing:
    """The images of such a folder by class and file name, in the order of both; none is read.

    Raises:
        DataError: no folder, no class subfolder, or a class without images.
    """
    found = class_images(folder)
    counts = torch.tensor([len(names) for names in found.values()])
    return Listing(
        source=short_name(folder),
        num_classes=len(found),
        ids=[f"{class_name}/{name}" for class_name, names in found.items() for name in names],
        read_labels=lambda: torch.arange(len(found)).repeat_interleave(counts),
    )


def class_images(folder: Path) -> dict[str, list[str]]:
    """The classes of a folder with a subfolder for each, by name, and the names of each one's images, by name.

    What is hidden, as macOS and notebooks leave it, is passed over.

    Raises:
        DataError: no folder, no class subfolder, a class without images, or a name that is not UTF-8.
    """
    if not folder.is_dir():
        raise DataError(f"no folder {folder}: give a folder with one subfolder of images per class")
    classes = _visible(folder, lambda entry: entry.is_dir())
    if not classes:
        raise DataError(f"{folder} has no subfolder: put each class's images in a subfolder of its own")
    return {name: _images_in(folder / name) for name in classes}


def short_name(path: Path) -> str:
    """The last two parts of a path: `imagenet/train`."""
    return "/".join(part for part in path.resolve().parts[-2:] if part != os.sep)


def _images_in(folder: Path) -> list[str]:
    found = _visible(folder, lambda entry: os.path.splitext(entry.name)[1].lower() in PICTURE_SUFFIXES)
    if not found:
        endings = ", ".join(sorted(PICTURE_SUFFIXES))
        raise DataError(f"{folder} has no image; files that end in {endings} are read")
    return found


def _visible(folder: Path, is_asked: Callable[[os.DirEntry[str]], bool]) -> list[str]:
    """Sorted names of what is asked for in a folder and not hidden."""
    with damage(folder, "a folder that can be read", error=DataError), os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if not e.name.startswith(".") and is_asked(e))
    if odd := [name for name in names if not name.isprintable() and "\udc80" <= max(name) <= "\udcff"]:
        raise DataError(f"{folder} holds {odd[0]!a}, a name that is not UTF-8: rename it")
    return names


def _read_image(path: Path, size: int, mode: str) -> np.ndarray:
    """[size, size, C]; reduced with antialiasing, since aliased training images change every metric."""
    image = read_picture(path, mode=mode)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS)).reshape(size, size, -1)


def _read_idx(path: Path) -> np.ndarray:
    """An idx file of bytes: magic 0x0000 08 ndim, big-endian sizes, data."""
    if not path.is_file():
        raise DataError(
            f"no file {path}: install Debian's package dataset-fashion-mnist, or give the folder of the "
            f"idx .gz files of Fashion-MNIST"
        )
    raw = read_gzip(path)
    if raw[:3] != b"\0\0\x08":
        raise DataError(f"{path} is not an idx file of bytes: it starts with {raw[:4].hex()}")
    ndim = raw[3]
    if len(raw) < 4 + 4 * ndim:
        raise DataError(f"{path} is cut short: its header ends after {len(raw)} bytes")
    shape = tuple(np.frombuffer(raw, ">u4", count=ndim, offset=4).tolist())
    data = np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim)
    if data.size != math.prod(shape):
        raise DataError(f"{path} is cut short: its header says {shape}, it holds {data.size} bytes")
    return data.reshape(shape).copy()

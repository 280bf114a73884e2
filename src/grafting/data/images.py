"""Images in memory with their labels, as training reads them; and the reader of Fashion-MNIST's files."""

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ..errors import DataError

FASHION_MNIST_CLASSES = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

# where Debian's package dataset-fashion-mnist puts the files
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class ImageSet:
    """8-bit images and labels; `batch` gives them in [-1, 1], padded to `size` with the lowest value."""

    images: UInt8[Tensor, "n c h w"]
    labels: Int[Tensor, "n"]
    num_classes: int
    size: int  # height = width after padding, in pixels

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Int[Tensor, "b"]) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, "b"]]:
        x = self.images[indices].float() / 127.5 - 1
        pad = self.size - x.shape[-1]
        x = F.pad(x, [pad // 2, pad - pad // 2] * 2, value=-1.0)
        return x, self.labels[indices]

    def sha256(self) -> str:
        """A hash of the images and labels, in their order."""
        digest = hashlib.sha256(self.images.numpy().tobytes())
        digest.update(self.labels.numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def read_fashion_mnist(folder: Path = FASHION_MNIST_FOLDER, *, train: bool = True) -> ImageSet:
    """The 60,000 training or 10,000 test images of Fashion-MNIST, 28x28 grey, padded to 32x32.

    Raises:
        DataError: a file is missing or is not an idx file.
    """
    prefix = "train" if train else "t10k"
    images = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
    return ImageSet(
        torch.from_numpy(images)[:, None], torch.from_numpy(labels).long(), num_classes=10, size=32
    )


def _read_idx(path: Path) -> np.ndarray:
    """An idx file of bytes: magic 0x0000 08 ndim, big-endian sizes, data."""
    if not path.is_file():
        raise DataError(
            f"no file {path}: install Debian's package dataset-fashion-mnist, or give the folder of the "
            f"idx .gz files of Fashion-MNIST"
        )
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise DataError(f"{path} is not an idx file of bytes: it starts with {raw[:4].hex()}")
    ndim = raw[3]
    shape = np.frombuffer(raw, ">i4", count=ndim, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape).copy()

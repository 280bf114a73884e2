"""Arrays of an .npz file, small ones whole and large ones a part at a time: nothing that is pickled is ever loaded."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from ..errors import DataError


class NpzFile:
    """An .npz file, opened for each thing that is asked of it.

    Raises:
        DataError: there is no such file, or it is not an .npz file.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise DataError(f"no file {path}")
        self.path = path
        with damage(path), ZipFile(path) as archive:
            members = [name for name in archive.namelist() if name.endswith(".npy")]
        self.names = frozenset(name.removesuffix(".npy") for name in members)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array, without reading it."""
        with self._header(name) as (_, shape, _):
            return shape

    def matrix(self, name: str) -> Tensor:
        """An array of floats as float64.

        Raises:
            DataError: the file is damaged, or the array holds something else.
        """
        with damage(self.path), np.load(self.path, allow_pickle=False) as arrays:
            values = arrays[name]
        if values.dtype.kind != "f":
            raise DataError(f"{self.path}: {name} is {values.dtype}, statistics are floats")
        return torch.from_numpy(values.astype(np.float64))

    def images(self, name: str, batch_size: int) -> Iterator[UInt8[Tensor, "b c h w"]]:
        """The images of an array [N, H, W, C] of 8 bits, some at a time, in their order.

        Raises:
            DataError: the file is damaged, or the array holds something else.
        """
        with self._header(name) as (member, shape, dtype):
            if dtype != np.uint8 or len(shape) != 4:
                found = "an array stored by columns" if dtype is None else f"{dtype} {list(shape)}"
                raise DataError(f"{self.path}: {name} must be images, uint8 [N, H, W, C]; found {found}")
            for start in range(0, shape[0], batch_size):
                part = (min(batch_size, shape[0] - start), *shape[1:])
                data = bytearray(member.read(prod(part)))
                if len(data) < prod(part):
                    raise DataError(
                        f"{self.path} is not a complete .npz file: {name} ends after {start} images"
                    )
                yield torch.frombuffer(data, dtype=torch.uint8).view(part).permute(0, 3, 1, 2)

    @contextmanager
    def _header(self, name: str):
        """The member after its header, its shape, and its dtype, or None where it is stored by columns."""
        with damage(self.path), ZipFile(self.path) as archive, archive.open(f"{name}.npy") as member:
            version = np.lib.format.read_magic(member)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, by_columns, dtype = read(member)
            yield member, shape, None if by_columns else dtype


@contextmanager
def damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, ValueError, BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is not a complete .npz file of arrays: {error}") from error

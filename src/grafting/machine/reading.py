"""The one door for what is read from disk: whatever is wrong with a file is one error that names it.

No other module opens YAML, JSON, safetensors, .npz, tar, torch or picture files. What a file claims (aliases, depth, digits,
shapes, pixels) is bounded before anything is expanded or allocated. No code in a file is run, nothing waits on a pipe, and a message
quotes little of an input. What the content means is for the callers to say.
"""

import gzip
import io
import math
import os
import stat
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import numpy as np
import torch
from PIL import Image
from pydantic import AfterValidator, NonNegativeInt, TypeAdapter
from safetensors import safe_open
from torch import Tensor
from torch.utils import _pytree
from typing_extensions import TypedDict

from ..errors import CheckpointError, DataError
from ._damage import PICTURES, Kind
from ._damage import cut as cut
from ._damage import damage as damage
from ._damage import failure_of as failure_of
from ._damage import fault_of as fault_of
from ._damage import faults_of as faults_of
from ._damage import nearest_choice as nearest_choice
from ._damage import reason_of as reason_of
from ._damage import shown as shown
from ._yaml import Json as Json
from ._yaml import load_yaml
from .settings import is_no_name

T = TypeVar("T")
if TYPE_CHECKING:
    Form: TypeAlias = type[T]
else:

    class Form:
        """A class or another form of JSON, such as `dict[str, int]`, which is none to those that check types as tests run."""

        def __class_getitem__(cls, item: object) -> object:
            return Any


JsonObject: TypeAlias = dict[str, Json]

# bytes that are read of a file of words, of one that is compressed once it is not, and of an array that is read whole
_TEXT, _EXPANDED, _ARRAY = 1 << 28, 1 << 28, 1 << 30
_RECIPE = 1 << 18  # bytes: YAML is read by slow code
_PIXELS = 1 << 26
_HEADER = 100_000_000  # bytes: safetensors' own limit
_SAFETENSORS = "a complete safetensors file"
_NPZ = "a complete .npz file of arrays"

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})

# safetensors' names of dtypes
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or not path.name:
        raise ValueError("leads out of the folder")
    if is_no_name(name):
        raise ValueError("is longer than a file's name can be")
    return name


Inside = Annotated[str, AfterValidator(_inside)]
"""Name of a file in the folder of what names it."""


def opened(path: Path) -> io.BufferedReader:
    """A plain file, open for reading. Raises an OSError for anything else, and waits for nobody to write to a pipe."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is a folder" if path.is_dir() else "it is no plain file")
    return os.fdopen(descriptor, "rb")


def read_bytes(
    path: Path, *, kind: str = "a readable file", error: Kind = DataError, most: int = _TEXT
) -> bytes:
    """A file's content.

    Raises:
        error: it is missing, no plain file, cannot be read or has more than `most` bytes.
    """
    with damage(path, kind, error=error), opened(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise ValueError(f"it has {size} bytes, and at most {most} are read")
        return file.read(most)


def read_text(path: Path, *, kind: str = "text in UTF-8", error: Kind = DataError) -> str:
    """A file's text. Raises as `read_bytes`."""
    content = read_bytes(path, kind=kind, error=error)
    with damage(path, kind, error=error):
        return content.decode()


@lru_cache(maxsize=64)
def _adapter(form: Any) -> Any:
    return TypeAdapter(form)


def read_json(path: Path, form: Form[T], *, kind: str = "JSON", error: Kind = CheckpointError) -> T:
    """The content of a JSON file in a form: a pydantic model, or a type. A boolean is no number.

    Raises:
        error: it is missing, not JSON, or has another form; the first faults are listed.
    """
    return parse_json(read_bytes(path, kind=kind, error=error), form, name=path, kind=kind, error=error)


def parse_json(
    text: str | bytes, form: Form[T], *, name: object, kind: str = "JSON", error: Kind = CheckpointError
) -> T:
    """The same of a text that stands in a file, or beside something else in it."""
    known: Any = form
    adapter = _adapter(known)
    with damage(name, kind, error=error):
        found: T = adapter.validate_json(text, strict=True)
        return found


def read_yaml(path: Path, *, error: Kind = CheckpointError) -> Json:
    """The content of a YAML file, as JSON would have it, but that keys may be numbers.

    Raises:
        error: it is missing or not YAML, says a key twice, holds itself, an object, or a number in a form that YAML 1.1 alone
            knows, or would take much memory.
    """
    content = read_bytes(path, kind="YAML", error=error, most=_RECIPE)
    with damage(path, "YAML", error=error):
        return load_yaml(content.decode())


def parse_yaml(text: str, *, name: object, error: Kind) -> Json:
    """The same of a text."""
    with damage(name, "YAML", error=error):
        return load_yaml(text)


@contextmanager
def open_safetensors(
    path: Path, *, framework: Literal["pt", "np"] = "pt", error: Kind = CheckpointError
) -> Iterator[Any]:
    """A safetensors file, of which parts can be read inside; nothing is allocated that the file does not hold."""
    with damage(path, _SAFETENSORS, error=error):
        opened(path).close()
        with safe_open(path, framework=framework) as file:
            yield file


def read_safetensors(
    path: Path, *, error: Kind = CheckpointError
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and the words beside them.

    Raises:
        error: it is missing, cut short or something else.
    """
    with open_safetensors(path, error=error) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


class _Entry(TypedDict):
    """A tensor in a safetensors header."""

    dtype: str
    shape: tuple[NonNegativeInt, ...]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]


class Place(NamedTuple):
    """Where a tensor lies in a file."""

    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    start: int  # of its bytes


def read_header(path: Path) -> dict[str, Place]:
    """The tensors of a safetensors file, all of whose bytes it holds; none of them is read.

    Raises:
        DataError: it is missing, cut short or something else.
    """
    header_of, entries_of = _adapter(JsonObject), _adapter(dict[str, _Entry])
    with damage(path, _SAFETENSORS, error=DataError), opened(path) as file:
        total = os.fstat(file.fileno()).st_size
        size = int.from_bytes(file.read(8), "little")
        if size > min(total - 8, _HEADER):
            raise ValueError(f"its header would have {size} bytes, and the file has {total}")
        header = header_of.validate_json(file.read(size))
        header.pop("__metadata__", None)
        entries = entries_of.validate_python(header)
        places = {}
        for name, entry in entries.items():
            (start, end), dtype, shape = entry["data_offsets"], entry["dtype"], entry["shape"]
            if end - start != math.prod(shape) * DTYPES[dtype].itemsize or 8 + size + end > total:
                raise ValueError(f"{shown(name)} is not the {dtype} {shown(shape)} that its header says")
            places[name] = Place(dtype, shape, 8 + size + start)
        return places


def read_stretches(path: Path, pieces: Iterable[tuple[np.ndarray, int]]) -> None:
    """Fills arrays of bytes from offsets in a file. Threads may read at once, and do not hold Python's lock.

    Raises:
        DataError: the file is missing, cannot be read, or ends too early.
    """
    with damage(path, "a complete file", error=DataError), opened(path) as file:
        for target, start in pieces:
            done = 0
            while done < len(target):
                count = os.preadv(file.fileno(), [target[done:].data], start + done)
                if count == 0:
                    raise EOFError(f"it ends {len(target) - done} bytes too early")
                done += count


class NpzFile:
    """An .npz file of plain arrays, small ones whole and large ones a part at a time; opened for each thing that is asked.

    Raises:
        DataError: there is no such file, or it is not an .npz file; of all methods, it is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        with self._archive() as archive:
            members = [name for name in archive.namelist() if name.endswith(".npy")]
        self.names = dict.fromkeys(name.removesuffix(".npy") for name in members).keys()  # in their order

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype, bool]:
        """An array's shape and dtype, and whether it is stored by columns."""
        with self._member(name) as (_, shape, dtype, by_columns):
            return shape, dtype, by_columns

    def array(self, name: str) -> np.ndarray:
        """An array, whole."""
        with self._member(name) as (member, shape, dtype, by_columns):
            if (size := math.prod(shape) * dtype.itemsize) > _ARRAY:
                raise ValueError(f"{name} has {size} bytes, and at most {_ARRAY} are read")
            content = bytearray(member.read(size))
            if len(content) < size or member.read(1):
                raise EOFError(f"{name} is cut short")
            return np.ndarray(shape, dtype, content, order="F" if by_columns else "C")

    def text(self, name: str) -> str:
        """An array that is a text."""
        with damage(self.path, _NPZ, error=DataError):
            return str(self.array(name))

    def rows(self, name: str, size: int) -> Iterator[np.ndarray]:
        """An array that is stored by rows, `size` of them at a time."""
        with self._member(name) as (member, (count, *row), dtype, _):
            for first in range(0, count, size):
                part = np.empty((min(size, count - first), *row), dtype)
                if member.readinto(part.reshape(-1).view(np.uint8).data) != part.nbytes:
                    raise EOFError(f"{name} ends before its {count} rows do")
                yield part
            member.read(1)  # the archive's checksum is compared at the end of the member

    @contextmanager
    def _archive(self) -> Iterator[ZipFile]:
        with (
            damage(self.path, _NPZ, error=DataError),
            opened(self.path) as file,
            ZipFile(file) as archive,
        ):
            yield archive

    @contextmanager
    def _member(self, name: str) -> Iterator[tuple[Any, tuple[int, ...], np.dtype, bool]]:
        """A member after its header, and what that says; the member is as long as that."""
        with self._archive() as archive, archive.open(f"{name}.npy") as member:
            version = np.lib.format.read_magic(member)
            formats = np.lib.format
            read = {(1, 0): formats.read_array_header_1_0, (2, 0): formats.read_array_header_2_0}[version]
            shape, by_columns, dtype = read(member)
            if dtype.hasobject:
                raise ValueError(f"{name} holds objects, which are not read")
            left = archive.getinfo(f"{name}.npy").file_size - member.tell()
            if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != left:
                raise ValueError(f"{name} is not the {dtype} {shown(shape)} that its header says")
            yield member, shape, dtype, by_columns


def read_torch(
    source: Path | bytes,
    *,
    name: object = None,
    kind: str = "a torch file of plain tensors",
    error: Kind = CheckpointError,
    allowed: Sequence[Any] = (),
    any_kind: bool = False,
    advice: str = "",
) -> object:
    """What `torch.save` wrote: tensors on the CPU and plain values; no code in it is run.

    Args:
        allowed: other classes and functions that may be in it, as `torch.serialization.safe_globals` takes them.
        any_kind: leave it to the caller to refuse sparse, quantised and meta tensors, whose names it knows.
        advice: what to do, for the error.

    Raises:
        error: it is missing, cut short, holds other objects or a tensor that is larger than its values, sparse, quantised or empty
            of values (meta).
    """
    with damage(source if name is None else name, kind, error=error, advice=advice), _stream(source) as file:
        _refuse_expanding(file)
        with torch.serialization.safe_globals(list(allowed)):
            content: object = torch.load(file, map_location="cpu", weights_only=True)
        for tensor in _pytree.tree_leaves(content):
            if isinstance(tensor, Tensor) and not (any_kind and _is_odd(tensor)):
                _check_plain(tensor)
        return content


def _stream(source: Path | bytes) -> io.BufferedReader | io.BytesIO:
    return opened(source) if isinstance(source, Path) else io.BytesIO(source)


def _refuse_expanding(file: io.BufferedReader | io.BytesIO) -> None:
    """torch stores what it writes as it is; a compressed archive may be of any size."""
    if is_zipfile(file):
        with ZipFile(file) as archive:
            if any(info.compress_type != ZIP_STORED for info in archive.infolist()):
                raise ValueError("it is compressed, as torch writes no file")
    file.seek(0)


def _is_odd(tensor: Tensor) -> bool:
    return tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta


def _check_plain(tensor: Tensor) -> None:
    said = f"a tensor {tensor.dtype} {shown(tuple(tensor.shape))}"
    if _is_odd(tensor):
        raise ValueError(f"{said} is sparse, quantised or without values")
    if (size := tensor.numel() * tensor.element_size()) > max(tensor.untyped_storage().nbytes(), _ARRAY):
        raise ValueError(f"{said} stands for {size} bytes that the file has not got")


def tar_members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every plain file in a tar, in its order; links, devices and folders are passed over.

    Raises:
        DataError: not a tar, a compressed one, or one that was cut short.
    """
    with damage(path, "an uncompressed tar file, or is damaged", error=DataError), opened(path) as file:
        total, before = os.fstat(file.fileno()).st_size, -1
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps all that it saw; an attribute without a type
                if info.offset_data <= before or info.size < 0:
                    raise ValueError("its headers lead back")
                before = info.offset_data
                if not info.isreg() or info.issparse():
                    continue
                if info.offset_data + info.size > total:
                    raise DataError(
                        f"{path} was cut short: {shown(info.name)} ends after the end of the file"
                    )
                yield info.name, info.offset_data, info.size


def read_gzip(path: Path) -> bytes:
    """What a gzip file holds, up to 256 MiB. Raises a DataError if it is damaged or holds more."""
    with (
        damage(path, "a complete gzip file", error=DataError),
        opened(path) as file,
        gzip.open(file) as inner,
    ):
        content = inner.read(_EXPANDED + 1)
        if not content:
            raise EOFError("it is empty")
        if len(content) > _EXPANDED:
            raise ValueError(f"it holds more than {_EXPANDED} bytes")
        return content


def read_picture(source: Path | bytes, *, mode: str = "RGB", name: object = None) -> Image.Image:
    """A PNG, JPEG or WebP in a mode; 16 bits of grey become 8, an orientation in EXIF is not applied.

    Raises:
        DataError: it is missing, another format (none of which is opened: EPS would start Ghostscript), cut short or of more pixels
            than 2^26.

    Source: facebookresearch/DiT `train.py`, which reads with torchvision's `ImageFolder`; it converts in this way.
    """
    with _picture(source, name) as picture:
        if picture.mode.startswith("I"):
            return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert(mode)
        return picture.convert(mode)


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture, whose pixels are not read. Raises as `read_picture`."""
    with _picture(path, None) as picture:
        return picture.size


@contextmanager
def _picture(source: Path | bytes, name: object) -> Iterator[Image.Image]:
    with (
        damage(source if name is None else name, "a picture that can be read", error=DataError),
        _stream(source) as file,
        Image.open(file, formats=PICTURES) as picture,
    ):
        if picture.width * picture.height > _PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} pixels; at most {_PIXELS} are read")
        yield picture

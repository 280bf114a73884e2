"""Subsets of a data set as data: which items, by index or file name, with a hash that says that two are the same.

A subset file is JSON and small enough to publish; it holds no images. Every data config of a recipe is a `PartialData`, which
takes such a file, or draws a subset itself.
"""

import hashlib
import pickletools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import torch
from jaxtyping import Int
from pydantic import BaseModel, PositiveInt, StringConstraints
from torch import Tensor

from ..errors import DataError, listed
from ..machine.files import write_json
from ..machine.randomness import generator
from ..machine.reading import cut, damage, read_bytes, read_json
from ..machine.settings import Settings

# classes that an error names one by one
_NAMED = 20

# what a pickle of a list of texts is made of; nothing in it makes an object or calls a function
_TEXTS = frozenset({"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"})
_FRAME_OF_TEXTS = frozenset(
    [
        "PROTO",
        "FRAME",
        "EMPTY_LIST",
        "LIST",
        "MARK",
        "MEMOIZE",
        "BINPUT",
        "LONG_BINPUT",
        "PUT",
        "APPEND",
        "APPENDS",
        "STOP",
    ]
)


@dataclass(frozen=True, kw_only=True)
class Subset:
    """Items of a data set: their indices, or their names where the set has no fixed order."""

    source: str  # the data set that the ids belong to
    num_classes: int
    ids: tuple[int, ...] | tuple[str, ...]
    drawn: str = ""  # how, in words

    @property
    def sha256(self) -> str:
        return subset_sha256(self.ids)


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Listing of a data set without its images: the ids that a subset can name, and their classes, loaded on demand."""

    source: str
    num_classes: int
    ids: Sequence[int] | Sequence[str]
    read_labels: Callable[[], Tensor]  # of each id, [n], int64
    copies: int = 1  # items of the data set for each id, one after the other (an image and its mirror image)

    @cached_property
    def labels(self) -> Int[Tensor, " n"]:
        return self.read_labels()

    @cached_property
    def class_counts(self) -> Tensor:
        """Ids of every class [C]."""
        return self.labels.bincount(minlength=self.num_classes)

    def draw(self, *, per_class: int | None = None, fraction: float | None = None, seed: int = 0) -> Subset:
        """`per_class` ids of every class, or this fraction of each class's, rounded; drawn as `stratified_subset` does.

        Raises:
            DataError: neither or both are given, a fraction that is none, or a class has too few items.
        """
        if (per_class is None) == (fraction is None):
            raise DataError("give a number of items of every class, or a fraction of each: one of the two")
        if per_class is not None:
            wanted, drawn = self._wanted(per_class), f"{per_class} of every class, seed {seed}"
        else:
            assert fraction is not None
            wanted, drawn = self._share(fraction), f"{fraction:g} of each class, seed {seed}"
        ids = tuple(self.ids[place] for place in _drawn(self.labels, wanted, seed).tolist())
        return Subset(source=self.source, num_classes=self.num_classes, ids=ids, drawn=drawn)

    def pick(self, paths: Sequence[str], *, drawn: str) -> Subset:
        """The items whose names are these paths, or end in the same folder and file.

        Raises:
            DataError: the items have numbers only, a path is not there, or several items end as it does.
        """
        if not all(isinstance(name, str) for name in self.ids):
            raise DataError(f"the items of {self.source!r} have numbers and no names, so no paths find them")
        known: dict[str, list[str]] = {}
        for name in map(str, self.ids):
            for key in {name, _ending(name)}:
                known.setdefault(key, []).append(name)
        found = [known.get(path) or known.get(_ending(path), []) for path in paths]
        faults = [
            f"{path}: {len(names) or 'no'} such items"
            for path, names in zip(paths, found, strict=True)
            if len(names) != 1
        ]
        if faults:
            head = f"{len(faults)} of {len(paths)} paths do not name one item of {self.source!r}, such as {self.ids[0]!r}"
            raise DataError(listed(head, faults, most=_NAMED))
        ids = tuple(names[0] for names in found)
        return Subset(source=self.source, num_classes=self.num_classes, ids=ids, drawn=drawn)

    def places(self, subset: Subset) -> Int[Tensor, " m"]:
        """Sorted positions of the subset's items in the data set.

        Raises:
            DataError: the subset is of another data set, or names items that are not there.
        """
        by_number = all(isinstance(name, int) for name in self.ids[:1])
        # a number means nothing in another data set; a name that is there is the same image
        if subset.num_classes != self.num_classes or (by_number and subset.source != self.source):
            raise DataError(
                f"a subset of {subset.source!r} with {subset.num_classes} classes does not fit "
                f"{self.source!r} with {self.num_classes}"
            )
        place_of = {name: place for place, name in enumerate(self.ids)}
        missing = [name for name in subset.ids if name not in place_of]
        if missing:
            raise DataError(
                f"{len(missing)} of the {len(subset.ids)} items of a subset of {subset.source!r} are not in "
                f"{self.source!r}, such as {missing[0]!r}; its items are {self.ids[0]!r} to {self.ids[-1]!r}"
            )
        return self._items(torch.tensor(sorted(place_of[name] for name in subset.ids)))

    def places_drawn(self, *, per_class: int, seed: int) -> Int[Tensor, " m"]:
        """The same of a subset that `draw` would draw."""
        return self._items(_drawn(self.labels, self._wanted(per_class), seed))

    def _items(self, places: Tensor) -> Tensor:
        return (places[:, None] * self.copies + torch.arange(self.copies)).flatten()

    def _wanted(self, per_class: int) -> Tensor:
        _check_enough(self.class_counts, per_class)
        return torch.full_like(self.class_counts, per_class)

    def _share(self, fraction: float) -> Tensor:
        if not 0 < fraction <= 1:
            raise DataError(f"a fraction is above 0 and at most 1, found {fraction:g}")
        wanted = (self.class_counts.double() * fraction).round().long()
        if not wanted.numel() or wanted.min() == 0:
            raise DataError(
                f"a fraction of {fraction:g} leaves nothing of {_counted(self.class_counts, wanted == 0)}"
            )
        return wanted


class PartialData(Settings, ABC):
    """A data set of a recipe, or a part of it."""

    subset: Path | None = None
    """A file of `grafting data subset`: only what it names; all when left out."""
    subset_sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")] | None = None
    """Required hash of the file. The copy of the recipe in a run's folder always has it."""
    per_class: PositiveInt | None = None
    """Instead of a file: of every class this many items, drawn by seed."""

    @abstractmethod
    def listing(self) -> Listing:
        """Listing of the whole data set.

        Raises:
            DataError: something is missing or damaged.
        """

    def pinned(self) -> "PartialData":
        """The same, with the hash of its subset file."""
        subset = self._read_subset()
        return self if subset is None else self.model_copy(update={"subset_sha256": subset.sha256})

    def _places(self, *, seed: int) -> Tensor | None:
        """Positions of the selected items in the data set; None for all of them."""
        if None not in (self.subset, self.per_class):
            raise DataError("data names both a subset file and per_class: give one of them")
        subset = self._read_subset()
        if self.per_class is not None:
            return self.listing().places_drawn(per_class=self.per_class, seed=seed)
        if subset is None:
            return None
        try:
            return self.listing().places(subset)
        except DataError as error:
            raise DataError(f"{self.subset}: {error}") from error

    def _read_subset(self) -> Subset | None:
        if self.subset is None:
            if self.subset_sha256 is not None:
                raise DataError("data has subset_sha256, but names no subset file that it is of")
            return None
        subset = read_subset(self.subset)
        if self.subset_sha256 not in (None, subset.sha256):
            raise DataError(
                f"{self.subset} has sha256 {subset.sha256}, the recipe asks for {self.subset_sha256}: "
                "it is another subset"
            )
        return subset


def stratified_subset(labels: Int[Tensor, " n"], *, per_class: int, seed: int) -> Int[Tensor, " m"]:
    """Sorted indices of `per_class` items of every class, drawn at random; a class's draw depends on (seed, class).

    More of a class are the same ones and others: 64 are among 128 of the same seed.

    Raises:
        DataError: a class has too few items, or `per_class` is not positive.
    """
    counts = labels.bincount()
    if not len(labels):
        raise DataError(f"asked for {per_class} items of every class, found no items")
    is_class = counts > 0
    _check_enough(torch.where(is_class, counts, per_class), per_class)
    return _drawn(labels, is_class * per_class, seed)


def subset_sha256(ids: tuple[int, ...] | tuple[str, ...]) -> str:
    """The SHA-256, in hex, of the ids sorted and written one per line; their order does not matter."""
    return hashlib.sha256("".join(f"{i}\n" for i in sorted(ids)).encode()).hexdigest()


def write_subset(path: Path, subset: Subset) -> None:
    """Write a subset file: source, sha256, num_classes, ids, and how they were drawn if that is known."""
    fields = asdict(subset)
    drawn = {"drawn": subset.drawn} if fields.pop("drawn") else {}
    write_json(path, {"source": fields.pop("source"), "sha256": subset.sha256, **drawn, **fields})


class _SubsetFile(BaseModel):
    """Content of a subset file."""

    source: str
    sha256: str
    num_classes: PositiveInt
    ids: tuple[int, ...] | tuple[str, ...]
    drawn: str = ""


def read_subset(path: Path) -> Subset:
    """The subset in a file that `write_subset` wrote.

    Raises:
        DataError: no such file, not a subset file, no ids, an id named twice, or the ids are not those of its hash.
    """
    kind = "a subset file (JSON with source, sha256, num_classes, ids)"
    fields = read_json(path, _SubsetFile, kind=kind, error=DataError)
    subset = Subset(source=fields.source, num_classes=fields.num_classes, ids=fields.ids, drawn=fields.drawn)
    with damage(path, kind, error=DataError):
        claimed, found = fields.sha256, subset.sha256
    if not subset.ids:
        raise DataError(f"{path} names no items")
    if len(set(subset.ids)) < len(subset.ids):
        raise DataError(f"{path} names {len(subset.ids) - len(set(subset.ids))} ids more than once")
    if claimed != found:
        raise DataError(
            f"{path} was changed: it says sha256 {cut(claimed)}, its {len(subset.ids)} ids have {found}"
        )
    return subset


def read_paths(path: Path) -> list[str]:
    """The paths in a file: one per line, or a pickled list of texts, as the paper's authors published theirs.

    A pickle is taken apart, not loaded: nothing in it can run.

    Raises:
        DataError: no such file, or it holds something else, no path, or one twice.
    """
    kind = "a list of paths, one per line or pickled"
    content = read_bytes(path, kind=kind)
    with damage(path, kind, error=DataError):
        found = _pickled_texts(content) if content[:1] == b"\x80" else content.decode().splitlines()
    paths = [line.strip() for line in found if line.strip()]
    if not paths or len(set(paths)) < len(paths):
        raise DataError(
            f"{path} names {f'{len(paths) - len(set(paths))} paths twice' if paths else 'no path'}"
        )
    return paths


def _pickled_texts(content: bytes) -> list[str]:
    texts = []
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in _TEXTS:
            texts.append(str(argument))
        elif opcode.name not in _FRAME_OF_TEXTS:
            raise ValueError(f"its pickle holds more than a list of texts ({opcode.name})")
    return texts


def _ending(path: str) -> str:
    """The folder and the name of a file: what an image keeps when a data set moves."""
    return "/".join(path.replace("\\", "/").rsplit("/", 2)[-2:])


def _drawn(labels: Tensor, wanted: Tensor, seed: int) -> Tensor:
    """Sorted indices of `wanted[c]` items of each class c."""
    counts = labels.bincount(minlength=len(wanted)).tolist()
    classes = labels.argsort(stable=True).split(counts)
    chosen = [
        members[torch.randperm(len(members), generator=generator(seed, number))[:count]]
        for number, (members, count) in enumerate(zip(classes, wanted.tolist(), strict=True))
    ]
    return torch.cat(chosen).sort().values


def _check_enough(counts: Tensor, per_class: int) -> None:
    if per_class < 1:
        raise DataError(f"per_class must be at least 1, found {per_class}")
    few = counts < per_class
    if not len(counts) or few.any():
        raise DataError(
            f"asked for {per_class} items of every class, but {int(few.sum())} of {len(counts)} classes have fewer: "
            f"{_counted(counts, few)}"
        )


def _counted(counts: Tensor, which: Tensor) -> str:
    classes = which.nonzero().flatten().tolist()
    named = [f"class {number}: {int(counts[number])}" for number in classes[:_NAMED]]
    rest = len(classes) - len(named)
    return ", ".join([*named, *([f"and {rest} more"] if rest else [])])

"""The file of what each image adds to a row's figures: a small .npz of plain arrays, bound to the figures that it is of."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..errors import DataError
from ..machine.files import atomic_path, hash_json
from ..machine.reading import NpzFile, damage, parse_json
from ..metrics.frechet import FrechetInfluences
from .per_image import PerImage

_FORMAT = "grafting-influences-1"
_MOST_FEATURES = 4 * 2**20
"""Features are kept up to this many numbers, 16 MiB."""

_OWN = ("labels", "strata", "clusters", "features", "point_groups")
_KINDS = ("scores", "influences", "points")
_FRECHET = ("influence", "corrected_influence", "curvature", "strata")


class _FrechetFacts(BaseModel):
    """The numbers of `FrechetInfluences`."""

    model_config = ConfigDict(from_attributes=True)

    num_features: int
    value: float
    corrected: float | None


class _Words(BaseModel):
    """What the file says of itself."""

    format: Literal["grafting-influences-1"]
    of: str  # hash of the figures
    names: list[str] = Field(alias="keys")  # of the figures
    frechet: _FrechetFacts | None


def save_influences(path: Path, per_image: PerImage, *, figures: Mapping[str, Any]) -> None:
    """Write what each image adds to these figures, atomically."""
    arrays: dict[str, Any] = {name: tensor.detach().cpu().numpy() for name, tensor in _tensors(per_image)}
    words = {
        "format": _FORMAT,
        "of": hash_json(dict(figures)),
        "keys": list(figures),
        "frechet": per_image.frechet and _FrechetFacts.model_validate(per_image.frechet).model_dump(),
    }
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, words=np.array(json.dumps(words)), **arrays)


def load_influences(path: Path, *, figures: Mapping[str, Any]) -> PerImage:
    """Load what `save_influences` wrote of these figures.

    Raises:
        DataError: no such file, or it is damaged, something else, or of other figures.
    """
    file = NpzFile(path)
    kind = "a file of influences of this library"
    words = parse_json(file.text("words"), _Words, name=path, kind=kind, error=DataError)
    if words.of != hash_json({key: figures.get(key) for key in words.names}):
        raise DataError(f"{path} is of other figures than those beside it: measure the images again")
    with damage(path, kind, error=DataError):
        tensors = {name: torch.from_numpy(file.array(name)) for name in file.names if name != "words"}
        own: Any = {name: tensors.get(name) for name in _OWN}
        kinds: Any = {each: _under(tensors, each) for each in _KINDS}
        facts: Any = {} if words.frechet is None else words.frechet.model_dump()
        facts |= _under(tensors, "frechet")
        return PerImage(**own, **kinds, frechet=FrechetInfluences(**facts) if facts else None)


def _tensors(per_image: PerImage) -> Iterator[tuple[str, Tensor]]:
    for name in _OWN:
        tensor = getattr(per_image, name)
        if tensor is not None and (name != "features" or tensor.numel() <= _MOST_FEATURES):
            yield name, tensor
    for kind in _KINDS:
        for key, tensor in getattr(per_image, kind).items():
            yield f"{kind}.{key}", tensor
    for name in _FRECHET:
        tensor = getattr(per_image.frechet, name, None)
        if tensor is not None:
            yield f"frechet.{name}", tensor


def _under(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{kind}."): t for name, t in tensors.items() if name.startswith(f"{kind}.")}

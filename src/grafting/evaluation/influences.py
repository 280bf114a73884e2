"""The file of what each image adds to a row's figures: a small .npz of plain arrays, bound to the figures that it is of."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..machine.files import atomic_path, hash_json
from ..metrics.frechet import FrechetInfluences
from ._npz import NpzFile, damage
from .per_image import PerImage

_FORMAT = "grafting-influences-1"
_MOST_FEATURES = 4 * 2**20
"""Features are kept up to this many numbers, 16 MiB."""

_OWN = ("labels", "strata", "clusters", "features", "point_groups")
_KINDS = ("scores", "influences", "points")
_FRECHET = ("influence", "corrected_influence", "curvature", "strata")


def save_influences(path: Path, per_image: PerImage, *, figures: Mapping[str, Any]) -> None:
    """Write what each image adds to these figures, atomically.

    Raises:
        RunError: it cannot be written.
    """
    arrays: dict[str, Any] = {name: tensor.detach().cpu().numpy() for name, tensor in _tensors(per_image)}
    words = {
        "format": _FORMAT,
        "of": hash_json(dict(figures)),
        "keys": list(figures),
        "frechet": _frechet_facts(per_image.frechet),
    }
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, words=np.array(json.dumps(words)), **arrays)


def load_influences(path: Path, *, figures: Mapping[str, Any]) -> PerImage:
    """Load what `save_influences` wrote of these figures.

    Raises:
        DataError: no such file, or it is damaged, something else, or of other figures.
    """
    names = NpzFile(path).names
    with damage(path), np.load(path, allow_pickle=False) as file:
        words = json.loads(str(file["words"])) if "words" in names else {}
        tensors = {name: torch.from_numpy(file[name]) for name in names - {"words"}}
    if words.get("format") != _FORMAT:
        raise DataError(f"{path} is not a file of influences of this library")
    if words["of"] != hash_json({key: figures.get(key) for key in words["keys"]}):
        raise DataError(f"{path} is of other figures than those beside it: measure the images again")
    kinds: dict[str, Any] = {kind: _under(tensors, kind) for kind in _KINDS}
    own: dict[str, Any] = {name: tensors.get(name) for name in _OWN}
    of_frechet: dict[str, Any] = (words["frechet"] or {}) | _under(tensors, "frechet")
    frechet = FrechetInfluences(**of_frechet) if of_frechet else None
    return PerImage(**own, **kinds, frechet=frechet)


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


def _frechet_facts(frechet: FrechetInfluences | None) -> dict[str, Any] | None:
    names = ("num_features", "value", "corrected")
    return None if frechet is None else {name: getattr(frechet, name) for name in names}


def _under(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{kind}."): t for name, t in tensors.items() if name.startswith(f"{kind}.")}

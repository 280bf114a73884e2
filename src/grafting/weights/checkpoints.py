"""State dicts as people keep them: beside other things in a file, under a key, behind a prefix; and what is no state dict.

Nothing here opens a file but to look at its first bytes.
"""

import argparse
import pathlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, listed
from ..machine.reading import damage, opened
from .locate import GRAFTED_INDEX_NAME, GRAFTED_NAME

# what training scripts keep their weights under, the averaged ones first
_KEYS = ("ema", "model", "state_dict", "model_state_dict", "module")

# counters of averages, which are no weights
_COUNTERS = frozenset({"num_updates", "decay", "n_averaged", "step"})

_STEM = "diffusion_pytorch_model"
_WEIGHTS = re.compile(
    rf"{_STEM}(\.(?P<variant>\w+))?\.(?P<kind>safetensors|bin)(?P<index>\.index(\.(?P<of_index>\w+))?\.json)?"
)

_POINTER, _PAGES = b"version https://git-lfs", (b"<!doctype", b"<html")


def harmless_globals() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What may stand beside the weights in a torch file: settings, paths and NumPy's numbers. Making them runs no code of the file."""
    paths = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    kinds = {type(np.dtype(kind)) for kind in "?bhilqBHILQefd"}
    scalar: Any = np.float64(0).__reduce__()[0]
    rebuild: Any = np.zeros(1).__reduce__()[0]
    return [
        argparse.Namespace,
        *(
            (pathlib.PurePosixPath, f"{module}.{name}")
            for name in paths
            for module in ("pathlib", "pathlib._local")
        ),
        *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
        *((rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
        np.ndarray,
        np.dtype,
        *sorted(kinds, key=str),
    ]


def check_is_weights(path: Path) -> None:
    """Raise a CheckpointError that says what a file is, where its first bytes show that it holds no weights."""
    with damage(path, "a file of weights"), opened(path) as file:
        start = file.read(64).lstrip().lower()
    if start.startswith(_POINTER):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, a note in the place of the weights: fetch them with `git lfs pull`"
        )
    if start.startswith(_PAGES):
        raise CheckpointError(
            f"{path} is an HTML page, as a download without a login or of a page about the file gives: download the file itself"
        )


def weight_file(folder: Path) -> Path | None:
    """The file of a diffusers folder that holds its weights, or the index of several; None if there is none.

    A graft's goes before all others, one without a variant before one with (`fp16`), safetensors before torch files, a whole one before several.

    Raises:
        CheckpointError: there are several variants alone.
    """
    for name in (GRAFTED_NAME, GRAFTED_INDEX_NAME):
        if (folder / name).is_file():
            return folder / name
    found = [
        (match, path) for path in sorted(folder.glob(f"{_STEM}*")) if (match := _WEIGHTS.fullmatch(path.name))
    ]
    variants = {match["variant"] or match["of_index"] for match, _ in found}
    if len(variants) > 1 and None not in variants:
        names = ", ".join(sorted(path.name for _, path in found))
        raise CheckpointError(
            f"{folder} holds several variants of the weights, and nothing tells which: keep one of {names}"
        )
    ranked = [
        (
            (match["variant"] or match["of_index"] or "", match["kind"] == "bin", match["index"] is not None),
            path,
        )
        for match, path in found
    ]
    return min(ranked)[1] if ranked else None


def state_dict_of(content: Mapping[Any, Any], *, source: object) -> tuple[dict[str, Tensor], str | None]:
    """The weights in what a file holds, without the prefix that all of their names have, and the key that they were under.

    Raises:
        CheckpointError: there is no state dict, or a tensor in it is no weight: not finite, or no floating-point numbers.
    """
    key = next((key for key in _KEYS if isinstance(content.get(key), Mapping)), None)
    found: Mapping[Any, Any] = content if key is None else content[key]
    tensors = {name: value for name, value in found.items() if _counts(name, value)}
    others = [
        str(name)
        for name, value in tensors.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if not tensors or others:
        held = f"; found {', '.join(map(str, list(found)[:8]))}" if found else ""
        raise CheckpointError(
            f"{source} holds no state dict, at the top level or under {', '.join(f'`{key}`' for key in _KEYS)}{held}"
        )
    faults = [f"{name}: {fault}" for name, value in tensors.items() if (fault := _fault_of(value))]
    if faults:
        head = f"{source}: {len(faults)} of {len(tensors)} tensors are no weights"
        raise CheckpointError(listed(head, faults, most=8))
    return _without_prefix(tensors), key


def _counts(name: Any, value: Any) -> bool:
    """True if an entry is meant as a weight, or as something that has to be refused: no plain value, and no counter."""
    plain = value is None or isinstance(
        value, str | bytes | bool | int | float | np.generic | np.ndarray | pathlib.PurePath
    )
    return not plain and not (name in _COUNTERS and isinstance(value, Tensor) and value.ndim == 0)


def _fault_of(tensor: Tensor) -> str:
    said = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return f"{said} is sparse, quantised or without values (meta): save dense tensors"
    if not tensor.is_floating_point():
        return f"{said} is not of floating point: dequantise or convert it before"
    finite = tensor.isfinite()
    if not finite.all():
        row = int((~finite).nonzero()[0, 0]) if tensor.ndim else 0
        return f"{said} holds {int((~finite).sum())} values that are not finite, the first in row {row}"
    return ""


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what wrappers put before all of them: `module.`, `_orig_mod.`, `model.`; a model has more parts than one."""
    names = list(tensors)
    while len({name.partition(".")[0] for name in names}) == 1 and all("." in name for name in names):
        names = [name.partition(".")[2] for name in names]
    return dict(zip(names, tensors.values(), strict=True))

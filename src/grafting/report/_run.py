"""Reads what a run's folder holds, in its own formats and without torch; every part may be missing.

Nothing is computed here: see `_page.py` for what the report makes of it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import yaml
from jaxtyping import Int64, UInt8

from ..errors import RunError
from ..runfolder import read_log, stale_stages
from ..words import ROW_TITLES

# more than any picture in the report shows
MAX_IMAGES = 100


class Samples(NamedTuple):
    """The first images of one model, and how many there are in all."""

    images: UInt8[np.ndarray, "n c h w"]
    labels: Int64[np.ndarray, " n"]
    num_images: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run's folder as data; a part that is not there is None or empty, and is named in `missing`."""

    name: str
    recipe: Mapping[str, Any] | None
    recipe_text: str | None
    plan: Mapping[str, Any] | None
    distill_log: list[dict[str, Any]] | None
    finetune_log: list[dict[str, Any]] | None
    samples: dict[str, Samples]
    rows: list[dict[str, Any]] | None
    manifest: Mapping[str, Any] | None
    missing: list[str]

    def leaves_out(self, stage: str) -> bool:
        """True if the recipe itself has no such stage."""
        return self.recipe is not None and stage in self.recipe and self.recipe[stage] is None


def read_run(folder: Path) -> Run:
    """All parts of a run's folder but those that stages made by an earlier recipe.

    Raises:
        RunError: there is no such folder, it holds no part of a run, or a part is damaged.
    """
    stale = stale_stages(folder)
    parts: dict[str, Any] = {
        name: None if _STAGE_OF.get(name) in stale else _read_part(folder / name, read)
        for name, read in _READERS.items()
    }
    samples = {
        path.stem: _read_samples(path)
        for path in _sample_paths(folder)
        if f"samples/{path.stem}" not in stale
    }
    if not samples and all(part is None for part in parts.values()):
        raise RunError(f"{folder} is not a run folder: it holds none of {', '.join(_READERS)}")
    recipe, manifest = parts["recipe.yaml"], parts["manifest.json"]
    run = Run(
        name=str((recipe or {}).get("name") or (manifest or {}).get("recipe") or folder.resolve().name),
        recipe=recipe,
        recipe_text=(folder / "recipe.yaml").read_text() if recipe is not None else None,
        plan=parts["plan.json"],
        distill_log=parts["distill/log.jsonl"],
        finetune_log=parts["finetune/log.jsonl"],
        samples=samples,
        rows=parts["metrics.json"],
        manifest=manifest,
        missing=[],
    )
    absent = [name for name, part in parts.items() if not part and not run.leaves_out(name.split("/")[0])]
    run.missing.extend(absent if samples else [*absent, "samples/*.safetensors"])
    return run


def _read_part(path: Path, read: Callable[[Path], Any]) -> Any:
    if not path.is_file():
        return None
    try:
        return read(path)
    except (ValueError, yaml.YAMLError, OSError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def _read_mapping(path: Path) -> dict[str, Any]:
    value = yaml.safe_load(path.read_text()) if path.suffix == ".yaml" else json.loads(path.read_text())
    if not isinstance(value, dict):
        raise ValueError(f"it should be a mapping, and is a {type(value).__name__}")
    return value


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = json.loads(path.read_text())
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "name" in row for row in rows):
        raise ValueError("it should be a list of rows, each with a name")
    return rows


_READERS: dict[str, Callable[[Path], Any]] = {
    "recipe.yaml": _read_mapping,
    "plan.json": _read_mapping,
    "distill/log.jsonl": read_log,
    "finetune/log.jsonl": read_log,
    "metrics.json": _read_rows,
    "manifest.json": _read_mapping,
}

_STAGE_OF = {"distill/log.jsonl": "distill", "finetune/log.jsonl": "finetune", "metrics.json": "evaluate"}


def _sample_paths(folder: Path) -> list[Path]:
    """Sample files: the models of a recipe in their order, then any others by name."""
    order: dict[str, int] = {name: place for place, name in enumerate(ROW_TITLES)}
    paths = folder.glob("samples/[!.]*.safetensors")
    return sorted(paths, key=lambda path: (order.get(path.stem, len(order)), path.stem))


def _read_samples(path: Path) -> Samples:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return Samples(
                _pictures(_first(file.get_slice("images"))),
                _first(file.get_slice("labels")).astype(np.int64),
                file.get_slice("images").get_shape()[0],
            )
    except (safetensors.SafetensorError, OSError) as error:
        raise RunError(f"{path} is not a complete samples file: {error}") from error


def _pictures(images: np.ndarray) -> np.ndarray:
    """Images [n, c, h, w] as they are, and of videos [n, c, frames, h, w] the frame in the middle."""
    return images[:, :, images.shape[2] // 2] if images.ndim == 5 else images


def _first(rows: Any) -> np.ndarray:
    """The first `MAX_IMAGES` rows of a safetensors slice, which cannot be cut past its end nor where it is empty."""
    count = min(rows.get_shape()[0], MAX_IMAGES)
    return rows[:count] if count else np.zeros(rows.get_shape(), np.uint8)

"""A run's folder read as a record, and its report; every part may be missing.

What stages made by an earlier recipe is left out. Nothing is computed here: `report` says what is made of it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from pydantic import BaseModel, ValidationError

from ..data import ConditionsConfig
from ..data.images import CLASS_NAMES
from ..errors import GraftingError, RunError
from ..evaluation import Suite, SuiteConfig, suite_of
from ..machine.files import write_bytes
from ..machine.reading import JsonObject, open_safetensors, read_json, read_text, read_yaml
from ..report import (
    MAX_IMAGES,
    ComparedRow,
    RunRecord,
    Samples,
    WrittenLocality,
    WrittenPlan,
    comparison_page,
    report_page,
)
from ..words import ROW_TITLES, Row
from .folder import read_log, stale_stages
from .manifest import read_manifest
from .pairing import Against, RunRow, seen_in_words


def write_report(folder: str | Path) -> Path:
    """Write `report.html` into a run's folder, from what is there so far; returns its path.

    Raises:
        RunError: the folder is not that of a run, a part of it is damaged, or it cannot be written to.
    """
    path = Path(folder) / "report.html"
    write_bytes(path, report_page(read_run(Path(folder))).encode())
    return path


def write_comparison(path: Path, first: RunRow, others: Sequence[Against]) -> Path:
    """Write a page of a measured row and others of any runs, each compared with the first; returns its path.

    Raises:
        RunError: the file is no .html, a part of a run's folder is damaged, or the page cannot be written.
    """
    if path.suffix != ".html":
        raise RunError(f"a comparison is written to an .html file, found {path}")
    rows = [first, *(other.row for other in others)]
    runs = {row.folder: read_run(row.folder) for row in rows}
    titles = {folder: _title(folder, runs) for folder in runs}
    names = _names_of(rows, titles)
    figures = [_figures(first, None), *(_figures(other.row, other) for other in others)]
    compared = [
        ComparedRow(name, titles[row.folder], runs[row.folder], found)
        for name, row, found in zip(names, rows, figures, strict=True)
    ]
    write_bytes(path, comparison_page(compared).encode())
    return path


def _figures(row: RunRow, against: Against | None) -> Row:
    """A row's figures, those that compare it with its own run's pretrained model replaced by the comparison with the first."""
    of_pretrained = ("image_distance", "feature_distance", "paired")
    figures = {key: value for key, value in row.measured.figures.items() if not key.startswith(of_pretrained)}
    if against:
        notes = [*figures.get("notes", []), *seen_in_words(against.seen)]
        figures |= {"paired": against.paired, "notes": notes}
    return cast(Row, figures)


def _names_of(rows: Sequence[RunRow], titles: Mapping[Path, str]) -> list[str]:
    """What each is called: its run, its row, or both, as far as they differ."""
    called = [ROW_TITLES.get(row.row, row.row) for row in rows]  # type: ignore[call-overload]  # rows of other versions
    if len(titles) == 1:
        return called
    if len(set(called)) == 1:
        return [titles[row.folder] for row in rows]
    return [f"{titles[row.folder]}, {name}" for row, name in zip(rows, called, strict=True)]


def _title(folder: Path, folders: Collection[Path]) -> str:
    """A folder's name, or its whole path where another has the same name."""
    return folder.name if [other.name for other in folders].count(folder.name) == 1 else str(folder)


def read_run(folder: Path) -> RunRecord:
    """All parts of a run's folder but those that stages made by an earlier recipe.

    Raises:
        RunError: there is no such folder, it holds no part of a run, or a part is damaged.
    """
    stale = stale_stages(folder)
    parts = {
        name: read(folder / name) if _STAGE_OF.get(name) not in stale and (folder / name).is_file() else None
        for name, read in _READERS.items()
    }
    told = _tellers(parts["recipe.yaml"])
    samples = {
        path.stem: _read_samples(path, *told)
        for path in _sample_paths(folder)
        if f"samples/{path.stem}" not in stale
    }
    if not samples and all(part is None for part in parts.values()):
        raise RunError(f"{folder} is not a run folder: it holds none of {', '.join(_READERS)}")
    recipe, manifest = parts["recipe.yaml"], parts["manifest.json"]
    run = RunRecord(
        name=str((recipe or {}).get("name") or (manifest or {}).get("recipe") or folder.resolve().name),
        recipe=recipe,
        recipe_text=read_text(folder / "recipe.yaml", error=RunError) if recipe is not None else None,
        plan=parts["plan.json"],
        distill_log=parts["distill/log.jsonl"],
        finetune_log=parts["finetune/log.jsonl"],
        samples=samples,
        rows=parts["metrics.json"],
        manifest=manifest,
        missing=[],
        locality=_read_locality(folder / "locality.json"),
    )
    absent = [name for name, part in parts.items() if not part and not run.leaves_out(name.split("/")[0])]
    run.missing.extend(absent if samples else [*absent, "samples/*.safetensors"])
    return run


def _read_recipe(path: Path) -> JsonObject:
    value = read_yaml(path, error=RunError)
    if not isinstance(value, dict):
        raise RunError(f"{path} is not a recipe: it is a {type(value).__name__}")
    return value


def _read_locality(path: Path) -> WrittenLocality | None:
    return read_json(path, WrittenLocality, kind="a locality", error=RunError) if path.is_file() else None


_READERS: dict[str, Callable[[Path], Any]] = {
    "recipe.yaml": _read_recipe,
    "plan.json": partial(read_json, form=WrittenPlan, kind="a plan", error=RunError),
    "distill/log.jsonl": read_log,
    "finetune/log.jsonl": read_log,
    "metrics.json": partial(
        read_json, form=list[Row], kind="a list of rows, each with a name", error=RunError
    ),
    "manifest.json": lambda path: read_manifest(path).on_record(),
}

_STAGE_OF = {"distill/log.jsonl": "distill", "finetune/log.jsonl": "finetune", "metrics.json": "evaluate"}


def _sample_paths(folder: Path) -> list[Path]:
    """Sample files: the models of a recipe in their order, then any others by name."""
    order: dict[str, int] = {name: place for place, name in enumerate(ROW_TITLES)}
    paths = folder.glob("samples/[!.]*.safetensors")
    return sorted(paths, key=lambda path: (order.get(path.stem, len(order)), path.stem))


_Words: TypeAlias = Callable[[int], str]


def _tellers(recipe: JsonObject | None) -> tuple[_Words | None, Suite | None]:
    """What has words for conditions and remarks on images, as far as the recipe names them and they can still be read."""
    class_words = _class_words((recipe or {}).get("data"))
    asked = {name: value for name, value in (recipe or {}).items() if name in ("conditions", "evaluate")}
    try:
        known = _Asked.model_validate(asked)
        conditions = known.conditions.load() if known.conditions else None
    except (GraftingError, ValidationError):
        return class_words, None
    name = known.conditions.name if known.conditions else "classes"
    return conditions.words if conditions else class_words, known.evaluate or suite_of(name)


def _class_words(data: object) -> _Words | None:
    """Names of the classes that are known by the data's name."""
    names = CLASS_NAMES.get(str(data.get("name"))) if isinstance(data, dict) else None
    return (lambda number: names[number] if 0 <= number < len(names) else str(number)) if names else None


class _Asked(BaseModel):
    """The part of a recipe that says what images show, and who judges them."""

    conditions: ConditionsConfig | None = None
    evaluate: SuiteConfig | None = None


def _read_samples(path: Path, words_of: _Words | None, suite: Suite | None) -> Samples:
    with open_safetensors(path, framework="np", error=RunError) as file:
        images = _first(file.get_slice("images"))
        if images.ndim == 5:
            images = images[:, :, images.shape[2] // 2]  # of videos the frame in the middle
        labels = _first(file.get_slice("labels")).astype(np.int64)
        count = file.get_slice("images").get_shape()[0]
    words = None if words_of is None else [words_of(number) for number in labels.tolist()]
    remarks = None
    if suite is not None and suite.takes(images.shape[1:]):
        remarks = suite.remarks(torch.from_numpy(images), torch.from_numpy(labels))
    return Samples(images, labels, count, words, remarks)


def _first(rows: Any) -> np.ndarray:
    """The first `MAX_IMAGES` rows of a safetensors slice, which cannot be cut past its end nor where it is empty."""
    count = min(rows.get_shape()[0], MAX_IMAGES)
    return rows[:count] if count else np.zeros(rows.get_shape(), np.uint8)

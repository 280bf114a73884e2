"""Rows of runs compared image by image: every row of a run with its pretrained one, and any two rows of any two runs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import DataError, GraftingError, RunError
from ..evaluation.comparison import MeasuredRow, comparison, distance_estimate, distances, turned
from ..evaluation.influences import load_influences
from ..evaluation.protocol import CIRCUMSTANCES
from ..machine.files import differing, flatten
from ..machine.reading import JsonObject, read_json
from ..metrics.paired import Estimate
from ..sampling.files import open_samples
from ..words import FIGURES, PRETRAINED, Row
from .folder import stale_stages
from .table import swept, swept_pairs

_BATCH = 500


class RunRow(NamedTuple):
    """A measured row of a run's folder."""

    folder: Path
    row: str
    measured: MeasuredRow


def influences_path(folder: Path, row: str) -> Path:
    """Where a run keeps what each image adds to a row's figures."""
    return folder / "influences" / f"{row}.npz"


def read_row(folder: Path, row: str | None = None) -> RunRow:
    """A measured row of a run's folder; the last one if none is named.

    Raises:
        RunError: the folder has no figures, or none of this row. DataError: a file is damaged.
    """
    rows = _read_figures(folder)
    names = [str(found["name"]) for found in rows]
    if row is None:
        row = names[-1]
    if row not in names:
        raise RunError(f"{folder} has no row {row!r}; it has {', '.join(names)}")
    return _run_row(folder, rows[names.index(row)], name=f"{folder}:{row}")


@dataclass(frozen=True)
class Against:
    """A row compared with the first of several; what is found is computed when it is first asked for, and kept."""

    row: RunRow
    first: RunRow

    @cached_property
    def paired(self) -> JsonObject:
        """The row's figures against the first's, as `paired`."""
        return paired(self.row, self.first)

    @property
    def of_first(self) -> JsonObject:
        """The first's figures against the row's."""
        return turned(self.paired) | {"to": self.row.row}

    @cached_property
    def seen(self) -> JsonObject:
        """How far images of the same seeds lie from each other, as JSON; empty where they are not of the same seeds.

        Of `image_distance` and `feature_distance` a `value` with its `error`, `low` and `high`, and as `sampling_differs` the
        settings that both were not sampled with alike, if any. Or why there are none, as `not_seen`.
        """
        found: JsonObject = {key: e._asdict() for key, e in _likeness(self.first, self.row).items()}
        if not found:
            return {"not_seen": _unlike(self.first, self.row)}
        sampling = _sampling_differences(self.first, self.row)
        if sampling:
            found["sampling_differs"] = [*sampling]
        return found


def seen_in_words(found: Mapping[str, Any]) -> list[str]:
    """A sentence for each distance between images of the same seeds that was found as `Against.seen`."""
    kinds = {"image_distance": "of the range of pixels apart", "feature_distance": "apart in features"}
    if why := found.get("not_seen"):
        return [f"Images are not compared: {why}"]
    parts = {
        key: [FIGURES[key].write(found[key][end]) for end in ("value", "low", "high")]
        for key in kinds
        if key in found
    }
    said = [
        f"Images of the same seed lie {value} ({low} to {high}) {kinds[key]}, root mean square"
        for key, (value, low, high) in parts.items()
    ]
    return said + list(filter(None, [settings_in_words(found)]))


def settings_in_words(found: Mapping[str, Any]) -> str:
    """A sentence on the settings that images compared as `Against.seen` were not sampled with alike; empty if there are none."""
    differ = "; ".join(found.get("sampling_differs", []))
    return (
        f"The images were sampled with other settings, so their distance is of these too: {differ}"
        if differ
        else ""
    )


def with_pretrained(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a run, each with its comparison to the pretrained one as `paired`, and its images' distance to that one's.

    Where they cannot be paired, `paired` says why in `reason`.
    """
    base = next((row for row in rows if row["name"] == PRETRAINED), None)
    if base is None:
        return [dict(row) for row in rows]
    against = _run_row(folder, base, name=PRETRAINED)
    return [dict(row) if row is base else _with_base(folder, row, against) for row in rows]


def _with_base(folder: Path, row: Mapping[str, Any], base: RunRow) -> dict[str, Any]:
    mine = _run_row(folder, row, name=str(row["name"]))
    figures = _as_figures(_likeness(mine, base))
    return {**row, **figures, **({"paired": paired(mine, base)} if "protocol" in row else {})}


def paired(row: RunRow, base: RunRow) -> JsonObject:
    """A row's comparison with another as JSON, or the `reason` that they cannot be compared."""
    try:
        return {"to": base.row, **comparison(row.measured, base.measured)}
    except GraftingError as error:
        return {"to": base.row, "reason": str(error)}


def pretrained_rows(folders: Iterable[Path]) -> Iterator[RunRow]:
    """The pretrained rows of those runs that have measured theirs."""
    for folder in folders:
        if influences_path(folder, PRETRAINED).is_file():
            with suppress(GraftingError):
                yield read_row(folder, PRETRAINED)


def columns_against(bases: Sequence[RunRow], folder: Path | None, row: str) -> dict[str, float]:
    """A sweep's columns of a row's comparison with the first of `bases` that it can be paired with; empty if it can be paired with none."""
    if folder is None or not bases or not influences_path(folder, row).is_file():
        return {}
    mine = read_row(folder, row)
    for base in bases:
        found = paired(mine, base)
        if "reason" not in found:
            return _distance_columns(mine, base) | swept_pairs(found)
    return {}


def _distance_columns(row: RunRow, base: RunRow) -> dict[str, float]:
    columns = _as_figures(_likeness(row, base))
    return {key: columns[key] for key in swept(columns)}


def _as_figures(estimates: Mapping[str, Estimate]) -> dict[str, float]:
    """Estimates as figures of a row with their intervals."""
    figures: dict[str, float] = {}
    for key, found in estimates.items():
        figures |= {key: found.value, f"{key}_low": found.low, f"{key}_high": found.high}
    return figures


def _likeness(a: RunRow, b: RunRow) -> dict[str, Estimate]:
    """Mean distances between images of the same number: in pixels, as a share of their range, and in features."""
    if _unlike(a, b):
        return {}
    one, other = (open_samples(_samples_path(row)) for row in (a, b))
    labels = one.labels
    assert labels is not None
    pairs = zip(one.images(_BATCH), other.images(_BATCH), strict=True)
    in_pixels = torch.cat([distances(x, y) / 255 for x, y in pairs])
    found = {"image_distance": distance_estimate(in_pixels, a.measured, one.origin["sampling"], labels)}
    mine, its = (row.measured.per_image and row.measured.per_image.features for row in (a, b))
    if isinstance(mine, Tensor) and isinstance(its, Tensor) and mine.shape == its.shape:
        found["feature_distance"] = distance_estimate(
            distances(mine, its), a.measured, one.origin["sampling"], labels
        )
    return found


def _unlike(a: RunRow, b: RunRow) -> str:
    """Why images of two rows cannot be compared one by one; empty if they can."""
    for row in (a, b):
        if not _samples_path(row).is_file():
            return f"{row.measured.name} has none here"
    one, other = (open_samples(_samples_path(row)) for row in (a, b))
    seeds = [file.origin["sampling"].get("seed") for file in (one, other)]
    if one.shape != other.shape:
        sizes = [" x ".join(map(str, file.shape)) for file in (one, other)]
        return f"their sizes differ, {sizes[0]} and {sizes[1]}"
    if one.labels is None or other.labels is None or len(one.labels) < 2:
        return "it is not known what they show, or there is only one"
    if len(one.labels) != len(other.labels):
        return f"there are {len(one.labels)} and {len(other.labels)} of them"
    if not torch.equal(one.labels, other.labels):
        return "they show other prompts or classes"
    return "" if seeds[0] == seeds[1] else f"they began from other noise, of seeds {seeds[0]} and {seeds[1]}"


def _sampling_differences(a: RunRow, b: RunRow) -> list[str]:
    """The settings that two rows' images were sampled with and that differ, each with both values: `cfg_scale: 4.5 and 1.5`."""
    one, other = (flatten(open_samples(_samples_path(row)).origin["sampling"]) for row in (a, b))
    return [
        f"{name}: {one.get(name, 'nothing')} and {other.get(name, 'nothing')}"
        for name in differing(one, other)
        if name not in CIRCUMSTANCES
    ]


def _samples_path(row: RunRow) -> Path:
    return row.folder / "samples" / f"{row.row}.safetensors"


def _run_row(folder: Path, figures: Mapping[str, Any], *, name: str) -> RunRow:
    row = str(figures["name"])
    path = influences_path(folder, row)
    per_image = load_influences(path, figures=figures) if path.is_file() else None
    return RunRow(folder, row, MeasuredRow(name, figures, per_image))


def _read_figures(folder: Path) -> list[Row]:
    path = folder / "metrics.json"
    if not folder.is_dir():
        raise RunError(f"there is no folder {folder}: a run, or RUN:ROW, is compared with another")
    if not path.is_file() and (runs := sorted(found.parent for found in folder.glob("*/manifest.json"))):
        table = next(filter(Path.is_file, (folder / "table-over-seeds.md", folder / "table.md")), None)
        raise RunError(
            f"{folder} holds {len(runs)} runs of a sweep: name one of them, such as {runs[0]}, to compare it with a run of the same seed"
            + (f"; {table} has the figures of all" if table else "")
        )
    if not path.is_file():
        raise RunError(f"{folder} has no metrics.json: a run is compared once its images are measured")
    if "evaluate" in stale_stages(folder):
        raise RunError(f"{path} is of an earlier recipe: run the recipe again")
    rows = read_json(path, list[Row], kind="a list of rows, each with a name", error=DataError)
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows

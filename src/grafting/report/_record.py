"""A run as data, which `runs` reads from its folder: all that a report shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Int64, UInt8
from pydantic import ConfigDict, Field, JsonValue, with_config
from typing_extensions import TypedDict

from ..contract import Role
from ..evaluation import Remark
from ..words import Row

# more than any picture in the report shows
MAX_IMAGES = 100


Line: TypeAlias = dict[str, JsonValue]
"""A line of a stage's log, by the names of its figures."""


@with_config(ConfigDict(extra="allow"))
class PlannedOperator(TypedDict):
    """An operator with its settings, or what becomes of a block."""

    name: str


class PlannedSite(TypedDict):
    """A site of the model, and what the plan puts there."""

    block: Annotated[int, Field(ge=0, lt=10_000)]
    role: Role
    path: str
    operator: PlannedOperator | None


class WrittenPlan(TypedDict):
    """A run's `plan.json`."""

    host: str
    plan: dict[str, JsonValue]
    sites: list[PlannedSite]


class SiteShares(TypedDict):
    """How much of a site's attention lies in each band, by its width in tokens."""

    path: str
    bands: dict[str, float]


class WrittenLocality(TypedDict):
    """What `grafting locality --json` writes of a pretrained model; kept by hand as a run's `locality.json`."""

    sites: list[SiteShares]


class Samples(NamedTuple):
    """The first images of one model, at most `MAX_IMAGES`, and how many there are in all.

    `words` are those of each image's condition, `remarks` what the run's suite says of it; both may be missing.
    """

    images: UInt8[np.ndarray, "n c h w"]
    labels: Int64[np.ndarray, " n"]
    num_images: int
    words: Sequence[str] | None = None
    remarks: Sequence[Remark] | None = None


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run as data; a part that is not there is None or empty, and is named in `missing`."""

    name: str
    recipe: Mapping[str, Any] | None
    recipe_text: str | None
    plan: WrittenPlan | None
    distill_log: list[Line] | None
    finetune_log: list[Line] | None
    samples: dict[str, Samples]
    rows: list[Row] | None
    manifest: Mapping[str, Any] | None
    missing: list[str]
    locality: WrittenLocality | None = None

    def leaves_out(self, stage: str) -> bool:
        """True if the recipe itself has no such stage."""
        return self.recipe is not None and stage in self.recipe and self.recipe[stage] is None

"""A recipe carried out with several seeds: training and sampling are repeated with all of them moved, and figures averaged.

The noise of training is larger than that of sampling, and only repeated training shows it; as each repetition has its own
sampling seed, a t interval over them holds both.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..metrics.paired import seeds_estimate
from ..words import bounds_of, is_number
from .recipe import Recipe
from .table import seeded_keys

TWO_SEEDS = "Intervals of two seeds reach 12.7 standard errors to each side and tell little; those of three reach 4.3, of five 2.8"

SEED = "seed"
"""The column of a table that says which repetition a line is of: seed-1, seed-2 ..."""

_STAGES = ("calibrate", "distill", "finetune", "sample")


def with_seeds_moved(recipe: Recipe, by: int) -> Recipe:
    """The recipe with its own seed and those of all its stages moved; by 0, as it is written."""

    def move(config: Any) -> Any:
        return config.model_copy(update={"seed": config.seed + by})

    moved: dict[str, Any] = {"seed": recipe.seed + by}
    for name in _STAGES:
        if (config := getattr(recipe, name)) is not None:
            moved[name] = tuple(map(move, config)) if isinstance(config, tuple) else move(config)
    return recipe.model_copy(update=moved)


def over_seeds(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lines that differ by their seed alone as one: each figure's mean, with a 95 % t interval over seeds.

    Ratios are averaged by their logarithm. What has one seed so far is left out.
    """
    groups: dict[tuple[tuple[str, Any], ...], list[Mapping[str, Any]]] = {}
    for line in lines:
        if SEED in line:
            groups.setdefault(tuple(_without_seed(line)), []).append(line)
    return [dict(labels) | _mean(group) for labels, group in groups.items() if len(group) > 1]


def _without_seed(line: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The labels of a line, which stand before its stage, and the stage."""
    for key, value in line.items():
        if key != SEED:
            yield key, value
        if key == "stage":
            return


def _mean(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"seeds": len(lines)}
    for key in seeded_keys(lines[0]):
        values = [line.get(key) for line in lines]
        if all(is_number(value) for value in values):
            found |= _interval(key, values)
    same = ("params", "compute_share", "model_flops", "num_images")
    return found | {key: lines[0][key] for key in same if key in lines[0]}


def _interval(key: str, values: Sequence[Any]) -> dict[str, float]:
    """A figure's mean over seeds and its limits."""
    of_logarithm = key.endswith("_ratio") and min(values) > 0
    found = seeds_estimate([math.log(value) for value in values] if of_logarithm else values)
    found = found.within(*bounds_of(key))
    value, low, high = (math.exp(v) if of_logarithm else v for v in (found.value, found.low, found.high))
    return {key: value, f"{key}_low": low, f"{key}_high": high}

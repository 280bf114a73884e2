"""The judge of scenes: reads what stands in each cell of an image, and says whether that is what its caption and the rules say.

Code, no network: colour is told from grey by saturation, each cell is matched with all shapes at all places within a pixel, and the
background with all gratings. An image with a cell that is no object, or with colour outside of objects, is unreadable, and then
nothing is true of it. `data/scenes.py` has the rules.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..data import scenes
from ..data.scenes import CELL, CELLS, SIDE, TASKS, Caption, caption_of
from ..errors import DataError
from ..machine.files import hash_json
from ..machine.settings import Settings
from ..metrics.paired import mean_estimate, share_estimate
from .per_image import PerImage
from .protocol import Identity, Metrics, Protocol
from .suite import OnStep, PairedEvaluator, Remark, Suite, SuiteEvaluator

NOTHING, NO_OBJECT = -1, -2
_SHAPE = (3, SIDE, SIDE)
_MISFIT = 9.0  # squared error of saturation, over a cell, of what is no object; drawn objects reach 6 with noise of 8 levels
_STRAY = 0.06  # share of the image with colour outside of objects
_SATURATED, _GREY = 0.5, 0.15  # saturation of objects, and of background
_FEWEST_GREY = 50  # pixels that a background is fitted to
_VERSION = 1  # raised when the same image is judged otherwise


class Readings(NamedTuple):
    """What the judge saw in images: shape and colour per cell (-1 nothing, -2 no object), the share of stray colour, and how
    far the background is from the nearest grating, in levels (rms)."""

    cells: Int[np.ndarray, "b 4 4 2"]
    stray: Float[np.ndarray, " b"]
    background: Float[np.ndarray, " b"]

    @property
    def readable(self) -> Bool[np.ndarray, " b"]:
        return (self.stray < _STRAY) & (self.cells != NO_OBJECT).all((1, 2, 3))


def read_scenes(images: Tensor) -> Readings:
    """Read images [B, 3, 32, 32] of 8 bits."""
    pixels = images.permute(0, 2, 3, 1).numpy().astype(float)
    saturation = np.clip((pixels.max(3) - pixels.min(3)) / 170, 0, 1)
    cells, covered = _objects(pixels, saturation)
    stray = ((saturation > 0.3) & ~covered).mean((1, 2))
    return Readings(cells, stray, _background(pixels.mean(3), saturation < _GREY))


def _objects(
    pixels: Float[np.ndarray, "b 32 32 3"], saturation: Float[np.ndarray, "b 32 32"]
) -> tuple[Int[np.ndarray, "b 4 4 2"], Bool[np.ndarray, "b 32 32"]]:
    """The best shape and colour of every cell, and the pixels that objects cover."""
    masks, count = scenes.shape_masks(), len(pixels)
    # a cell's object lies within a pixel of it, inside of the image
    tops = np.clip(np.arange(CELLS)[:, None] * CELL + np.arange(-1, 2), 0, SIDE - CELL)
    rows, cols = tops[:, None, :, None], tops[None, :, None, :]
    places = np.lib.stride_tricks.sliding_window_view(saturation, (CELL, CELL), axis=(1, 2))[:, rows, cols]
    matches = np.einsum("brcyxij,sij->brcyxs", places, masks)
    errors = (places**2).sum((-2, -1))[..., None] + (masks**2).sum((1, 2)) - 2 * matches
    flat = errors.reshape(count, CELLS, CELLS, -1)
    y, x, shape = np.unravel_index(flat.argmin(-1), errors.shape[3:])
    top, left = tops[np.arange(CELLS)[:, None], y], tops[np.arange(CELLS), x]
    # all pixels of each cell's object, as indices
    image = np.arange(count)[:, None, None, None, None]
    within = np.arange(CELL)
    at = image, top[..., None, None] + within[:, None], left[..., None, None] + within
    colours = np.array(list(scenes.COLOURS.values()), float)
    nearest = ((pixels[..., None, :] - colours) ** 2).sum(-1).argmin(-1)
    inner = masks[shape] > 0.9
    votes = np.stack([((nearest[at] == k) & inner).sum((-2, -1)) for k in range(len(colours))])
    occupied = _centres(saturation) >= _SATURATED
    found = np.stack([shape, votes.argmax(0)], -1)
    found[flat.min(-1) >= _MISFIT] = NO_OBJECT
    found[~occupied] = NOTHING
    covered = np.zeros(saturation.shape, bool)
    np.logical_or.at(covered, at, (masks[shape] > 0) & occupied[..., None, None])
    return found, covered


def _centres(saturation: Float[np.ndarray, "b 32 32"]) -> Float[np.ndarray, "b 4 4"]:
    """The highest saturation in the middle of every cell."""
    cells = saturation.reshape(-1, CELLS, CELL, CELLS, CELL)
    return cells[:, :, 2:6, :, 1:7].max((2, 4))


def _background(
    grey: Float[np.ndarray, "b 32 32"], free: Bool[np.ndarray, "b 32 32"]
) -> Float[np.ndarray, " b"]:
    """Distance to the nearest grating, rms over the pixels of the background; over all where there is hardly any."""
    weights = np.where(free.sum((1, 2), keepdims=True) < _FEWEST_GREY, True, free).astype(float)
    waves = (grey - scenes.MEAN_LEVEL) / scenes.CONTRAST
    errors = []
    for angle in scenes.ANGLES:
        for length in scenes.WAVELENGTHS:
            basis = np.stack([scenes.grating(angle, length, phase) for phase in (0.0, -np.pi / 2)])
            products = np.einsum("bij,kij,lij->bkl", weights, basis, basis)
            parts = np.linalg.solve(products, np.einsum("bij,bij,kij->bk", weights, waves, basis)[..., None])
            # of what fits best only the phase is free; flat grey has none, and all are as far
            parts = parts[..., 0] + [1e-9, 0]
            parts = parts / np.linalg.norm(parts, axis=1, keepdims=True)
            misses = (waves - np.einsum("bk,kij->bij", parts, basis)) ** 2
            errors.append((weights * misses).sum((1, 2)) / weights.sum((1, 2)))
    return scenes.CONTRAST * np.sqrt(np.min(errors, axis=0))


@dataclass(frozen=True)
class Verdict:
    """What is true of one image.

    Args:
        true: the caption is true, as GenEval asks.
        exact: it is true, its objects are there as often as it says, and beside them one pair of twins and nothing else.
        twins: for each unsaid object, its distance to the mirrored cell in rows and columns, and whether its twin is there.
    """

    true: bool
    exact: bool
    twins: tuple[tuple[tuple[int, int], bool], ...]


def judge(cells: Int[np.ndarray, "4 4 2"], caption: Caption, *, readable: bool) -> Verdict:
    """Judge what was read in an image by the caption that it was asked for."""
    occupied = np.argwhere(cells[..., 0] >= 0).tolist()
    found = [(r, c, int(cells[r, c, 0]), int(cells[r, c, 1])) for r, c in occupied]
    said = {shape for shape, _ in caption.said}
    unsaid = [place for place in found if place[2] not in said]
    twins = []
    for r, c, *kind in unsaid:
        row, col = scenes.mirrored(r, c)
        twins.append(((abs(row - r), abs(col - c)), readable and cells[row, col].tolist() == kind))
    true = readable and _is_true(found, caption)
    complete = len(found) == len(caption.said) + 2 and len(unsaid) == 2
    return Verdict(true, true and complete and all(stands for _, stands in twins), tuple(twins))


def _is_true(found: list[tuple[int, int, int, int]], caption: Caption) -> bool:
    """True if objects are as the caption says; as often as it says only where it counts.

    Source: djghosh13/geneval `evaluate_images.py`, whose other objects do not matter either.
    """
    first = [f for f in found if f[2] == caption.shape and caption.colour in (None, f[3])]
    if caption.count is not None:
        return len(first) == caption.count
    if caption.other_shape is None:
        return bool(first)
    other = [f for f in found if f[2] == caption.other_shape and caption.other_colour in (None, f[3])]
    if caption.relation is None:
        return bool(first and other)
    axis, sign = {"left of": (1, 1), "right of": (1, -1), "above": (0, 1), "below": (0, -1)}[
        scenes.RELATIONS[caption.relation]
    ]
    return any(sign * (b[axis] - a[axis]) > 0 for a in first for b in other)


class ScenesMetrics(Metrics):
    """Settings of the judge's figures: none."""

    suite: Literal["scenes"] = "scenes"

    @property
    def min_images(self) -> int:
        """Two of each task, so that intervals know the spread within tasks."""
        return 2 * len(TASKS)


class ScenesEvaluation(Settings):
    """The figures of one model's scenes, with 95 % intervals over other draws of as many images of the same tasks."""

    exact: float
    exact_low: float
    exact_high: float
    true: float
    """Mean over the six tasks of the share of images of which the caption is true."""
    true_low: float
    true_high: float
    true_single: float
    true_two: float
    true_counting: float
    true_colour: float
    true_position: float
    true_binding: float
    twins: float
    """Share of unsaid objects whose twin is there, per image; 0 for an image without unsaid objects."""
    twins_low: float
    twins_high: float
    twins_near: float | None
    """Of unsaid objects one row and one column from the mirrored cell; None where no image has one."""
    twins_apart: float | None
    """Of those three rows or three columns from it."""
    twins_far: float | None
    """Of those three rows and three columns from it."""
    background: float
    """Distance from the nearest grating in levels, rms over an image's background, mean over images."""
    background_low: float
    background_high: float
    num_images: int
    notes: tuple[str, ...] = ()
    protocol: Protocol


# the distances of an object from the mirrored cell, in rows and columns, by how far a local operator has to reach
_DISTANCES: dict[str, frozenset[tuple[int, int]]] = {
    "twins_near": frozenset({(1, 1)}),
    "twins_apart": frozenset({(1, 3), (3, 1)}),
    "twins_far": frozenset({(3, 3)}),
}


class ScenesEvaluator(PairedEvaluator[ScenesEvaluation]):
    """Judges images as they come; keeps what it read in each."""

    def update(self, images: Tensor, labels: Tensor | None) -> None:
        if labels is None or labels.shape != images.shape[:1]:
            raise DataError(f"{len(images)} images came without the number of a caption each")
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != _SHAPE:
            raise DataError(
                f"scenes are images of 8 bits of {list(_SHAPE)}; found {images.dtype} of {list(images.shape[1:])}"
            )
        self._protocol.check_room(self.num_images + len(images))
        for number in labels.tolist():
            caption_of(number)
        seen = read_scenes(images)
        self._batches.append({
            "labels": labels.cpu().long(),
            "cells": torch.from_numpy(seen.cells),
            "stray": torch.from_numpy(seen.stray),
            "background": torch.from_numpy(seen.background),
        })  # fmt: skip

    def measure(self) -> tuple[ScenesEvaluation, PerImage]:
        rows = self.state()
        found, tasks = _scores(rows), rows["labels"] % len(TASKS)
        figures: dict[str, float | None] = {}
        for name, scores in found.items():
            figures[name] = None if scores.isnan().all() else float(scores.nanmean())
        for name in ("exact", "true", "twins", "background"):
            estimate_of = mean_estimate if name == "background" else share_estimate
            estimate = estimate_of(found[name], strata=tasks)
            figures |= {f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        figures["true"] = float(np.mean([figures[f"true_{task}"] for task in TASKS]))
        evaluation = ScenesEvaluation.model_validate(
            figures | {"num_images": self.num_images, "protocol": self._protocol}
        )
        of_all = {name: scores for name, scores in found.items() if not scores.isnan().any()}
        of_some = {
            name: _influences(scores)
            for name, scores in found.items()
            if name not in of_all and not scores.isnan().all()
        }
        return evaluation, PerImage(labels=rows["labels"], scores=of_all, influences=of_some, strata=tasks)


def _scores(rows: dict[str, Tensor]) -> dict[str, Float[Tensor, " n"]]:
    """Every figure's number of each image; NaN where an image does not count."""
    seen = Readings(*(rows[name].numpy() for name in Readings._fields))
    captions = [caption_of(number) for number in rows["labels"].tolist()]
    verdicts = [
        judge(cells, caption, readable=bool(readable))
        for cells, caption, readable in zip(seen.cells, captions, seen.readable, strict=True)
    ]
    true = torch.tensor([float(verdict.true) for verdict in verdicts], dtype=torch.float64)
    tasks = rows["labels"] % len(TASKS)
    scores = {"exact": torch.tensor([float(verdict.exact) for verdict in verdicts], dtype=torch.float64)}
    scores["true"] = true
    for number, task in enumerate(TASKS):
        scores[f"true_{task}"] = torch.where(tasks == number, true, torch.nan)
    # without any unsaid object there are no twins
    scores["twins"] = _share_of_twins(verdicts, frozenset().union(*_DISTANCES.values())).nan_to_num()
    for name, distances in _DISTANCES.items():
        scores[name] = _share_of_twins(verdicts, distances)
    return scores | {"background": rows["background"].double()}


def _influences(scores: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Influence of each image on the mean of those scores that count, which differ from row to row."""
    counted = ~scores.isnan()
    return ((scores - scores.nanmean()) / counted.double().mean()).nan_to_num()


def _share_of_twins(
    verdicts: Sequence[Verdict], distances: frozenset[tuple[int, int]]
) -> Float[Tensor, " n"]:
    """Share of unsaid objects at these distances whose twin is there, per image; NaN for an image without such objects."""
    found = [[stands for distance, stands in verdict.twins if distance in distances] for verdict in verdicts]
    return torch.tensor([np.mean(s) if s else math.nan for s in found], dtype=torch.float64)


class ScenesSuite(Suite):
    """The judge of scenes: captions, twins and background, read by code."""

    name: Literal["scenes"] = "scenes"
    asked_by: ClassVar = "scenes"

    def faults(self, num_images: int, image_shape: tuple[int, ...]) -> list[str]:
        faults, least = [], ScenesMetrics().min_images
        if image_shape != _SHAPE:
            faults.append(f"images of {list(image_shape)}; scenes are {list(_SHAPE)}")
        if num_images < least:
            faults.append(
                f"{num_images} images; the judge of scenes needs at least {least}, two of each task"
            )
        return faults

    def inputs(self, identity: dict[str, str] | None, origin: Mapping[str, Any]) -> Any:
        return self.open(origin)().protocol.model_dump(mode="json")

    def remarks(self, images: Tensor, labels: Tensor) -> list[Remark]:
        seen = read_scenes(images)
        captions = [caption_of(number) for number in labels.tolist()]
        return [
            _remark(cells, caption, readable=bool(readable))
            for cells, caption, readable in zip(seen.cells, captions, seen.readable, strict=True)
        ]

    def open(
        self, origin: Mapping[str, Any], *, on_step: OnStep | None = None
    ) -> Callable[[], SuiteEvaluator]:
        rules = hash_json({"judge": _VERSION, "captions": scenes.Captions().sha256})
        protocol = Protocol.of(
            Identity(name="scenes-judge", sha256=rules),
            Identity(name="scenes-rules", sha256=rules),
            **origin,
            metrics=ScenesMetrics(),
        )
        return lambda: ScenesEvaluator(protocol)


def _remark(cells: Int[np.ndarray, "4 4 2"], caption: Caption, *, readable: bool) -> Remark:
    """What was read in an image, with the objects marked that are none, that lack their twin or have another colour than said."""
    verdict = judge(cells, caption, readable=readable)
    said = dict(caption.said)
    found, wrong = [], []
    for r, c in np.argwhere(cells[..., 0] != NOTHING).tolist():
        shape, colour = cells[r, c].tolist()
        if shape == NO_OBJECT:
            found.append("no object")
            wrong.append((r, c))
            continue
        found.append(f"{tuple(scenes.COLOURS)[colour]} {scenes.SHAPES[shape]}")
        is_twin = cells[scenes.mirrored(r, c)].tolist() == [shape, colour]
        if not (said[shape] in (None, colour) if shape in said else is_twin):
            wrong.append((r, c))
    judged = (
        "exact" if verdict.exact else "true" if verdict.true else "not true" if readable else "unreadable"
    )
    side = 1 / CELLS
    marks = tuple((c * side, r * side, side, side) for r, c in wrong)
    return Remark(f"{judged}: {', '.join(found) or 'nothing'}", marks)

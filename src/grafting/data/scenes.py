"""Scenes: captioned drawings of 32 x 32 colour pixels, each a pure function of its seed, for a text-to-image testbed.

A scene is a grid of 4 x 4 cells of 8 pixels. Its caption says some objects (one of GenEval's six tasks). Two things go unsaid, and
only far tokens can keep them: a pair of twins, equal objects of a shape that the caption does not name, at cells mirrored at the
centre; and one grating behind everything. `evaluation/scenes.py` judges images by these rules. No file is read.
"""

import math
import re
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Annotated, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from pydantic import AfterValidator, Field, JsonValue
from torch import Tensor

from ..errors import DataError
from ..machine.files import hash_json
from ..machine.reading import JsonObject
from ..machine.settings import Settings

SIDE, CELL, CELLS = 32, 8, 4
_SUPERSAMPLED = 4  # samples per pixel and axis, for edges

Task = Literal["single", "two", "counting", "colour", "position", "binding"]
TASKS: tuple[Task, ...] = get_args(Task)
COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 90, 240),
    "yellow": (240, 210, 40),
    "magenta": (220, 60, 220),
    "cyan": (60, 220, 220),
}
SHAPES = ("disc", "square", "triangle", "cross", "ring", "bar")
COUNTS = ("one", "two", "three", "four")
RELATIONS = ("left of", "right of", "above", "below")
ANGLES = tuple(math.radians(angle) for angle in (0, 45, 90, 135))
WAVELENGTHS = (5.0, 8.0, 12.0)  # pixels
MEAN_LEVEL, CONTRAST = 96, 34  # of the gratings, in 8-bit levels

_WORDS = ("-", *COUNTS, *COLOURS, *SHAPES, *RELATIONS, "and")
_SLOTS = 6  # count, colour, shape, relation, colour, shape
CAPTION_TOKENS, CAPTION_CHANNELS = _SLOTS, 32
_PER_TASK = 900  # as many as the task with most captions has
_CAPTIONS_VERSION, _DRAWING_VERSION = 1, 1  # raised when a number or seed comes to mean something else


@dataclass(frozen=True)
class Caption:
    """A caption's objects: the first, of which there may be several, and in three of the tasks another one.

    Shapes, colours and relations are numbers of `SHAPES`, `COLOURS`, `RELATIONS`; None is what the caption leaves open.
    """

    task: Task
    shape: int
    colour: int | None = None
    count: int | None = None
    relation: int | None = None
    other_shape: int | None = None
    other_colour: int | None = None

    @property
    def slots(self) -> tuple[str, ...]:
        """Its words by place; `-` where it has none."""
        joined = "-" if self.other_shape is None else "and"
        return (
            "-" if self.count is None else COUNTS[self.count - 1],
            _colour_name(self.colour),
            SHAPES[self.shape],
            joined if self.relation is None else RELATIONS[self.relation],
            _colour_name(self.other_colour),
            "-" if self.other_shape is None else SHAPES[self.other_shape],
        )

    @property
    def words(self) -> str:
        """The caption as text: `three rings`, `a red ring and a blue cross`."""
        count, colour, shape, relation, other_colour, other_shape = self.slots
        if self.count is not None:
            plural = "" if self.count == 1 else "es" if shape == "cross" else "s"
            return f"{count} {shape}{plural}"
        parts = ["a", colour, shape]
        if other_shape != "-":
            parts += [relation, "a", other_colour, other_shape]
        return " ".join(part for part in parts if part != "-")

    @property
    def said(self) -> list[tuple[int, int | None]]:
        """Shape and colour of each object that it says."""
        first = [(self.shape, self.colour)] * (self.count or 1)
        return first if self.other_shape is None else [*first, (self.other_shape, self.other_colour)]


def _colour_name(colour: int | None) -> str:
    return "-" if colour is None else tuple(COLOURS)[colour]


def caption_of(number: int) -> Caption:
    """The caption of a number: its task is number mod 6, and each task goes through all its captions in turn.

    Raises:
        DataError: the number is out of range.
    """
    if not 0 <= number < len(TASKS) * _PER_TASK:
        raise DataError(
            f"caption {number} is out of range: scenes have captions 0..{len(TASKS) * _PER_TASK - 1}"
        )
    turn, task = divmod(number, len(TASKS))
    captions = _captions_of(TASKS[task])
    # a stride near the golden ratio, without a common divisor: any first captions are spread over all of them
    return captions[turn * _stride(len(captions)) % len(captions)]


@cache
def _captions_of(task: Task) -> tuple[Caption, ...]:
    """All captions of a task."""
    shapes, colours = range(len(SHAPES)), range(len(COLOURS))
    pairs = [(a, b) for a in shapes for b in shapes if a != b]
    if task == "single":
        return tuple(Caption(task, a) for a in shapes)
    if task == "counting":
        return tuple(Caption(task, a, count=n + 1) for a in shapes for n in range(len(COUNTS)))
    if task == "colour":
        return tuple(Caption(task, a, colour=c) for a in shapes for c in colours)
    if task == "two":
        return tuple(Caption(task, a, other_shape=b) for a, b in pairs)
    if task == "position":
        relations = range(len(RELATIONS))
        return tuple(Caption(task, a, relation=r, other_shape=b) for a, b in pairs for r in relations)
    return tuple(
        Caption(task, a, colour=c, other_shape=b, other_colour=d)
        for a, b in pairs
        for c in colours
        for d in colours
        if c != d
    )


@cache
def _stride(count: int) -> int:
    stride = round(0.618 * count)
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


class CaptionsConfig(Settings):
    """Captions of scenes, by number."""

    name: Literal["scenes"] = "scenes"
    dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of captions that training replaces by the empty one."""

    def load(self) -> "Captions":
        return Captions(dropout=self.dropout)


class Captions:
    """Captions of scenes as a text-conditioned model takes them: `Conditions` without a text encoder.

    A caption is 6 tokens of 32 channels, each the one-hot vector of its word (or of none) beside that of its place, so that a
    model's projection of captions is its table of words. The empty caption has the number after all others.
    """

    def __init__(self, *, dropout: float = 0.1):
        self.dropout = dropout

    def __len__(self) -> int:
        return len(TASKS) * _PER_TASK

    @property
    def sha256(self) -> str:
        """Hash of the table, to which data of numbered captions are bound."""
        return hash_json({"name": "scenes", "captions": _CAPTIONS_VERSION})

    @property
    def identity(self) -> dict[str, JsonValue]:
        return {"name": "scenes", "version": _CAPTIONS_VERSION, "dropout": self.dropout}

    def nulls(self, numbers: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """The number of the empty caption, for each."""
        return torch.full_like(numbers, len(self))

    def at(
        self, numbers: Int[Tensor, " b"], *, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """`encoder_hidden_states` [B, 6, 32] and `encoder_attention_mask` [B, 6], all ones."""
        tokens = torch.stack([self._tokens(number) for number in numbers.tolist()])
        mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=device)
        return {"encoder_hidden_states": tokens.to(device, dtype), "encoder_attention_mask": mask}

    def words(self, number: int) -> str:
        return "" if number == len(self) else caption_of(number).words

    def _tokens(self, number: int) -> Float[Tensor, "6 32"]:
        slots = ("-",) * _SLOTS if number == len(self) else caption_of(number).slots
        return _token_table()[[_WORDS.index(word) for word in slots], torch.arange(_SLOTS)]


@cache
def _token_table() -> Float[Tensor, "words 6 32"]:
    """The vector of each word at each place, with entries of about unit size."""
    table = torch.zeros(len(_WORDS), _SLOTS, CAPTION_CHANNELS)
    table[torch.arange(len(_WORDS)), :, torch.arange(len(_WORDS))] = 4.0
    table[:, torch.arange(_SLOTS), len(_WORDS) + torch.arange(_SLOTS)] = 4.0
    return table


@dataclass(frozen=True)
class Scene:
    """A drawing, the number of its caption, and what stands in each cell: shape and colour, or -1 and -1."""

    image: UInt8[np.ndarray, "32 32 3"]
    caption: int
    cells: Int[np.ndarray, "4 4 2"]


def draw_scene(seed: int, *, caption: int | None = None) -> Scene:
    """The scene of a seed: its task is seed mod 6, its caption is drawn from the seed.

    Args:
        caption: the number of another caption to draw by.
    """
    rng = np.random.default_rng(seed)
    drawn = seed % len(TASKS) + len(TASKS) * int(rng.integers(_PER_TASK))
    number = drawn if caption is None else caption
    cells = _place(caption_of(number), rng)
    return Scene(paint(cells, rng), number, cells)


def _place(caption: Caption, rng: np.random.Generator) -> Int[np.ndarray, "4 4 2"]:
    """A layout of what the caption says, of twins, and of nothing else."""
    cells = np.full((CELLS, CELLS, 2), -1)
    said = [
        (shape, rng.integers(len(COLOURS)) if colour is None else colour) for shape, colour in caption.said
    ]
    places: list[tuple[int, int]] = []
    if caption.relation is not None:
        places = _related(caption.relation, rng)
        for place, object_ in zip(places, said, strict=True):
            cells[place] = object_
    unnamed = [shape for shape in range(len(SHAPES)) if shape not in {shape for shape, _ in said}]
    twin = unnamed[rng.integers(len(unnamed))], rng.integers(len(COLOURS))
    pairs = [((r, c), mirrored(r, c)) for r in range(CELLS // 2) for c in range(CELLS)]
    free = [pair for pair in pairs if all(cells[place][0] < 0 for place in pair)]
    for place in free[rng.integers(len(free))]:
        cells[place] = twin
    if not places:
        empty = np.argwhere(cells[..., 0] < 0)
        for (r, c), object_ in zip(rng.permutation(empty), said, strict=False):
            cells[r, c] = object_
    return cells


def _related(relation: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Cells of two objects of which the first stands in this relation to the second."""
    low, high = (int(place) for place in np.sort(rng.permutation(CELLS)[:2]))
    u, v = (int(place) for place in rng.integers(CELLS, size=2))
    first, second = (low, high) if RELATIONS[relation] in ("left of", "above") else (high, low)
    return [(u, first), (v, second)] if relation < 2 else [(first, u), (second, v)]


def mirrored(row: int, col: int) -> tuple[int, int]:
    """The cell on the other side of the centre."""
    return CELLS - 1 - row, CELLS - 1 - col


def paint(cells: Int[np.ndarray, "4 4 2"], rng: np.random.Generator) -> UInt8[np.ndarray, "32 32 3"]:
    """An image of a layout, each object moved by at most a pixel, before a grating of random angle, wavelength and phase."""
    angle, length = ANGLES[rng.integers(len(ANGLES))], WAVELENGTHS[rng.integers(len(WAVELENGTHS))]
    behind = MEAN_LEVEL + CONTRAST * grating(angle, length, rng.uniform(0, 2 * math.pi))
    image = np.repeat(behind[..., None], 3, axis=2)
    colours = np.array(list(COLOURS.values()), float)
    for r, c in np.argwhere(cells[..., 0] >= 0):
        shape, colour = cells[r, c]
        top, left = np.clip(np.array([r, c]) * CELL + rng.integers(-1, 2, size=2), 0, SIDE - CELL)
        mask, place = shape_masks()[shape, ..., None], np.s_[top : top + CELL, left : left + CELL]
        image[place] = image[place] * (1 - mask) + colours[colour] * mask
    return image.round().clip(0, 255).astype(np.uint8)


@cache
def shape_masks() -> Float[np.ndarray, "6 8 8"]:
    """The share of each pixel of a cell that a shape covers."""
    count = CELL * _SUPERSAMPLED
    y, x = (np.mgrid[0:count, 0:count] + 0.5) / _SUPERSAMPLED - CELL / 2
    r = np.hypot(x, y)
    inside: dict[str, Bool[np.ndarray, "n n"]] = {
        "disc": r < 3,
        "square": (abs(x) < 2.6) & (abs(y) < 2.6),
        "triangle": (y < 2.6) & (y > -3) & (abs(x) < (y + 3) / 1.8),
        "cross": ((abs(x) < 1) | (abs(y) < 1)) & (r < 3.2),
        "ring": (r < 3.2) & (r > 1.7),
        "bar": (abs(y) < 1.3) & (abs(x) < 3.2),
    }
    blocks = (CELL, _SUPERSAMPLED, CELL, _SUPERSAMPLED)
    return np.stack([inside[shape].reshape(blocks).mean((1, 3)) for shape in SHAPES])


def grating(angle: float, length: float, phase: float) -> Float[np.ndarray, "32 32"]:
    """A plane wave in [-1, 1]; angle in radians, length in pixels."""
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(float)
    return np.cos(2 * math.pi * (x * math.cos(angle) + y * math.sin(angle)) / length + phase)


def _range_of_seeds(text: str) -> str:
    found = re.fullmatch(r"(\d+)-(\d+)", text)
    if not found or int(found[1]) > int(found[2]) or int(found[2]) >= 2**63:
        raise ValueError(f"a range of seeds is written FIRST-LAST, such as 0-999999; found {text!r}")
    return text


PRETRAINING = range(800_000)
"""Seeds of the scenes that the bundled model of `scenes` was pretrained on: those of recipes/scenes/pretrain.yaml."""


class ScenesConfig(Settings):
    """Scenes of a range of seeds, drawn as they are asked for."""

    name: Literal["scenes"] = "scenes"
    seeds: Annotated[str, AfterValidator(_range_of_seeds)] = "10000000-10999999"
    """First and last seed; one scene each. The bundled model was pretrained on 0-799999."""

    def load(self) -> "Scenes":
        return Scenes(self.span)

    def pinned(self) -> "ScenesConfig":
        """The same: a range of seeds says all."""
        return self

    def describe(self) -> JsonObject:
        """Identity of the data in a run's manifest."""
        return {"name": self.name, "version": _DRAWING_VERSION, "seeds": self.seeds}

    @property
    def span(self) -> range:
        first, last = map(int, self.seeds.split("-"))
        return range(first, last + 1)


class Scenes:
    """Scenes by index, in [-1, 1], with the numbers of their captions."""

    def __init__(self, seeds: range):
        self.seeds = seeds

    def __len__(self) -> int:
        return len(self.seeds)

    def __str__(self) -> str:
        return "scenes"

    @property
    def num_classes(self) -> int:
        return len(Captions())

    @cached_property
    def conditions_sha256(self) -> str:
        """Hash of the captions whose numbers these are."""
        return Captions().sha256

    def batch(self, indices: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b 3 32 32"], Int[Tensor, " b"]]:
        scenes = [draw_scene(self.seeds[index]) for index in indices.tolist()]
        images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2)
        return images.float() / 127.5 - 1, torch.tensor([scene.caption for scene in scenes])

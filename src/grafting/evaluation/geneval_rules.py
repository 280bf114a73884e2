"""GenEval's rules: whether the objects that were found in an image are those that its prompt asks for.

Pure functions of detections; `geneval_vision.py` makes these.

Source: arXiv:2310.11513; djghosh13/geneval, `evaluation/evaluate_images.py`, `summary_scores.py`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxtyping import Bool
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor

from ..errors import DataError, listed
from ..machine.files import sha256_of
from ..machine.reading import parse_json, read_text

Tag = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
Relation = Literal["left of", "right of", "above", "below"]

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

# COCO's classes in their order, under the names that prompts use: three are not COCO's own (computer mouse, tv remote, computer keyboard)
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book",
    "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip

_CONFIDENT, _COUNTED = 0.3, 0.9  # scores that an object must exceed; where objects are counted, the second
_MOST = 16  # objects of a class, the surest first
_OVERLAP = 0.1  # of both sizes together: offsets as small as that have no direction
_DIRECTED = 0.5  # of the whole offset, along one axis


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Wanted(_Line):
    """Objects that must be in the image: at least `count` of a class, all of a colour, somewhere beside others."""

    name: str = Field(alias="class")
    count: PositiveInt = 1
    color: str | None = None
    position: tuple[Relation, int] | None = None
    """A relation to the objects of an earlier entry, by its number."""


class Unwanted(_Line):
    """Objects of which there must be fewer than `count`."""

    name: str = Field(alias="class")
    count: PositiveInt


class Prompt(_Line):
    """A line of GenEval's `evaluation_metadata.jsonl`."""

    tag: Tag
    prompt: str
    include: tuple[Wanted, ...] = Field(min_length=1)
    exclude: tuple[Unwanted, ...] = ()

    def line(self) -> str:
        """It as a line of the file."""
        return self.model_dump_json(by_alias=True, exclude_unset=True)

    def faults(self) -> list[str]:
        """What it asks for that cannot be judged."""
        named = [item.name for item in self.include] + [item.name for item in self.exclude]
        unknown = [f"no class {name!r}" for name in named if name not in CLASSES]
        colours = [f"no colour {item.color!r}" for item in self.include if item.color not in (None, *COLOURS)]
        return unknown + colours + [
            f"position names object {item.position[1]}, which does not stand before it"
            for place, item in enumerate(self.include)
            if item.position is not None and not 0 <= item.position[1] < place
        ]  # fmt: skip


@dataclass(frozen=True)
class PromptFile:
    """GenEval's prompts, in the order of the file: a condition's number is its line."""

    path: Path
    prompts: tuple[Prompt, ...]
    sha256: str

    @classmethod
    def read(cls, path: str | Path) -> "PromptFile":
        """Read `evaluation_metadata.jsonl`.

        Raises:
            DataError: no such file, or lines that are no prompts of GenEval's; names each.
        """
        path = Path(path)
        if not path.is_file():
            raise DataError(
                f"no prompts file {path}: GenEval's is prompts/evaluation_metadata.jsonl in its repository"
            )
        prompts, faults = [], []
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            name = f"line {number}"
            try:
                prompts.append(parse_json(line, Prompt, name=name, kind="a prompt", error=DataError))
                faults += [f"{name}: {fault}" for fault in prompts[-1].faults()]
            except DataError as error:
                faults.append(str(error))
        if faults or not prompts:
            raise DataError(listed(f"{path} is not GenEval's prompts:", faults[:20] or ["it is empty"]))
        return cls(path, tuple(prompts), sha256_of(path))


@dataclass(frozen=True)
class Detection:
    """An object in an image.

    Args:
        name: one of `CLASSES`.
        score: how sure the detector is, 0 to 1.
        box: left, top, right, bottom in pixels.
        mask: the object's pixels [H, W]; None where only the box is known.
    """

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: Bool[Tensor, "h w"] | None = None


ColoursOf = Callable[[str, Sequence[Detection]], Sequence[str]]
"""The colours of objects of a class in the image that is judged."""


@dataclass(frozen=True)
class Verdict:
    """Whether an image is what its prompt asks for, and if not, why; and the objects that were looked at, by class."""

    correct: bool
    reasons: tuple[str, ...]
    found: Mapping[str, tuple[Detection, ...]]


def judge(detections: Sequence[Detection], prompt: Prompt, colours_of: ColoursOf) -> Verdict:
    """Judge an image by the objects in it.

    Args:
        colours_of: asked only for objects whose colour the prompt names.
    """
    found = _kept(detections, least=_COUNTED if prompt.tag == "counting" else _CONFIDENT)
    reasons: list[str] = []
    matched: list[Sequence[Detection]] = []  # by entry; empty where that did not match
    for wanted in prompt.include:
        objects = found.get(wanted.name, ())[: wanted.count]
        faults = _faults(wanted, objects, matched, colours_of)
        reasons += faults
        matched.append(() if faults else objects)
    for unwanted in prompt.exclude:
        number = len(found.get(unwanted.name, ()))
        if number >= unwanted.count:
            reasons.append(f"expected {unwanted.name}<{unwanted.count}, found {number}")
    return Verdict(not reasons, tuple(reasons), found)


def _kept(detections: Sequence[Detection], *, least: float) -> dict[str, tuple[Detection, ...]]:
    """The sure ones of each class, the surest first."""
    sure = sorted((d for d in detections if d.score > least), key=lambda d: -d.score)
    return {
        name: tuple(d for d in sure if d.name == name)[:_MOST] for name in dict.fromkeys(d.name for d in sure)
    }


def _faults(
    wanted: Wanted,
    objects: Sequence[Detection],
    matched: Sequence[Sequence[Detection]],
    colours_of: ColoursOf,
) -> list[str]:
    if len(objects) < wanted.count:
        return [f"expected {wanted.name}>={wanted.count}, found {len(objects)}"]
    if wanted.color is not None:
        colours = list(colours_of(wanted.name, objects))
        if colours.count(wanted.color) < wanted.count:
            seen = ", ".join(f"{colours.count(c)} {c}" for c in dict.fromkeys(colours))
            return [f"expected {wanted.color} {wanted.name}>={wanted.count}, found {seen}"]
    if wanted.position is None:
        return []
    relation, place = wanted.position
    if not matched[place]:
        return [f"no target for {wanted.name} to be {relation}"]
    stands = [relations(a.box, b.box) for a in objects for b in matched[place]]
    return [
        f"expected {wanted.name} {relation} target, found {' and '.join(sorted(found)) or 'no direction'}"
        for found in stands
        if relation not in found
    ]


def relations(a: Sequence[float], b: Sequence[float]) -> set[Relation]:
    """Where box a stands as seen from box b; nothing where they lie over each other."""
    offsets, free = [], []
    for axis in (0, 1):
        offset = (a[axis] + a[axis + 2] - b[axis] - b[axis + 2]) / 2
        sizes = abs(a[axis + 2] - a[axis]) + abs(b[axis + 2] - b[axis])
        offsets.append(offset)
        free.append(math.copysign(max(abs(offset) - _OVERLAP * sizes, 0.0), offset))
    if max(map(abs, free)) < 1e-3:
        return set()
    x, y = (part / math.hypot(*offsets) for part in free)
    named: dict[Relation, bool] = {
        "left of": x < -_DIRECTED,
        "right of": x > _DIRECTED,
        "above": y < -_DIRECTED,
        "below": y > _DIRECTED,
    }
    return {relation for relation, stands in named.items() if stands}

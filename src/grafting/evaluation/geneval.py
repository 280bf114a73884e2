"""GenEval's suite: whether images show what their prompts ask for, by objects, numbers, colours and places.

Conditions are GenEval's prompts in the order of their file, four images each. The score is the mean over six tasks of the share
of images that are right, as in published tables; here it is called after what sees the images, see `geneval_vision.py`.

Source: arXiv:2310.11513; djghosh13/geneval.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from pydantic import Field, JsonValue, PositiveInt
from torch import Tensor

from ..contract import Conditions
from ..errors import DataError
from ..machine.settings import Settings
from ..metrics._interval import spread
from .geneval_rules import Detection, Prompt, PromptFile, Tag, Verdict, judge
from .geneval_vision import ColourReader, Detector
from .per_image import PerImage
from .protocol import Identity, Metrics, Protocol
from .suite import OnStep, PairedEvaluator, Suite, SuiteEvaluator

TAGS: tuple[Tag, ...] = get_args(Tag)
OFFICIAL_COUNT = 4  # images of each prompt in published tables
_RULES = 1  # raised when the same detections are judged otherwise


class GenevalMetrics(Metrics):
    """Settings of GenEval's figures: none."""

    suite: Literal["geneval"] = "geneval"

    @property
    def min_images(self) -> int:
        return 2


class GenevalEvaluation(Settings):
    """The figures of one model's images, with 95 % intervals over other prompts of the same tasks."""

    geneval: float | None
    """Mean over the six tasks of the share of images that are right; None unless all six were asked for."""
    geneval_low: float | None = None
    geneval_high: float | None = None
    geneval_single_object: float | None
    geneval_two_object: float | None
    geneval_counting: float | None
    geneval_colors: float | None
    geneval_position: float | None
    geneval_color_attr: float | None
    num_images: int
    notes: tuple[str, ...] = ()
    protocol: Protocol


class GenevalEvaluator(PairedEvaluator[GenevalEvaluation]):
    """Judges images as they come.

    Args:
        detect: finds the objects in images [B, 3, H, W] of 8 bits.
        read_colours: tells the colours of some of them in an image [3, H, W].
        prompts: what conditions ask for.
    """

    def __init__(
        self,
        detect: Callable[[Tensor], list[list[Detection]]],
        read_colours: Callable[..., list[str]],
        prompts: PromptFile,
        protocol: Protocol,
    ):
        super().__init__(protocol)
        self._detect, self._read_colours, self._prompts = detect, read_colours, prompts
        self.verdicts: list[Verdict] = []

    def update(self, images: Tensor, labels: Tensor | None) -> None:
        if labels is None or labels.shape != images.shape[:1]:
            raise DataError(f"{len(images)} images came without the number of a prompt each")
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise DataError(
                f"GenEval judges colour images of 8 bits [B, 3, H, W]; found {images.dtype} {list(images.shape)}"
            )
        self._protocol.check_room(self.num_images + len(images))
        asked = [self._prompt(number) for number in labels.tolist()]
        images = images.cpu()
        verdicts = [
            judge(found, prompt, partial(self._read_colours, image))
            for image, prompt, found in zip(images, asked, self._detect(images), strict=True)
        ]
        self.verdicts += verdicts
        correct = torch.tensor([verdict.correct for verdict in verdicts])
        self._batches.append({"labels": labels.cpu(), "correct": correct})

    def _prompt(self, number: int) -> Prompt:
        if not 0 <= number < len(self._prompts.prompts):
            raise DataError(
                f"an image of prompt {number}; {self._prompts.path} has 0 to {len(self._prompts.prompts) - 1}"
            )
        return self._prompts.prompts[number]

    def details(self) -> list[dict[str, JsonValue]]:
        """A line for each image as in GenEval's `results.jsonl`, without the name of its file."""
        return [
            _line(verdict, self._prompts.prompts[number])
            for verdict, number in zip(self.verdicts, self.state()["labels"].tolist(), strict=True)
        ]

    def measure(self) -> tuple[GenevalEvaluation, PerImage]:
        rows = self.state()
        labels, scores = rows["labels"], rows["correct"].double()
        tags = torch.tensor([TAGS.index(self._prompt(number).tag) for number in labels.tolist()])
        asked = tags.unique()
        shares = {TAGS[tag]: float(scores[tags == tag].mean()) for tag in asked.tolist()}
        figures: dict[str, float | None] = {f"geneval_{tag}": shares.get(tag) for tag in TAGS}
        influences = {f"geneval_{tag}": _influences(scores, tags, tags == TAGS.index(tag)) for tag in shares}
        figures["geneval"] = None
        if len(asked) == len(TAGS):
            score = sum(shares.values()) / len(TAGS)
            influences["geneval"] = _influences(scores, tags, torch.ones_like(tags, dtype=torch.bool))
            found = spread(influences["geneval"], strata=tags, clusters=labels).of_share(score)
            figures |= {"geneval": score, "geneval_low": found.low, "geneval_high": found.high}
        evaluation = GenevalEvaluation.model_validate(
            figures
            | {"num_images": self.num_images, "protocol": self._protocol, "notes": tuple(self._notes(labels))}
        )
        return evaluation, PerImage(labels=labels, influences=influences, strata=tags, clusters=labels)

    def _notes(self, labels: Tensor) -> list[str]:
        notes = [
            "seen by transformers' Mask2Former; published figures are of mmdet's, and the two were not compared"
        ]
        counts = labels.bincount(minlength=len(self._prompts.prompts))
        if not bool((counts == OFFICIAL_COUNT).all()):
            notes.append(
                f"published figures are of {OFFICIAL_COUNT} images of each of {len(counts)} prompts; "
                f"these are {int(counts.min())} to {int(counts.max())} of each"
            )
        return notes


def _influences(scores: Float[Tensor, " n"], tags: Tensor, counted: Tensor) -> Float[Tensor, " n"]:
    """Influence of each image on the mean over the counted tasks of the share of their images that are right."""
    means = torch.zeros(len(TAGS), dtype=torch.float64)
    sizes = tags.bincount(minlength=len(TAGS)).double()
    means.index_add_(0, tags, scores)
    within = (scores - (means / sizes)[tags]) * len(scores) / (sizes[tags] * len(tags[counted].unique()))
    return torch.where(counted, within, 0.0)


def _line(verdict: Verdict, prompt: Prompt) -> dict[str, JsonValue]:
    boxes = {
        name: [[*found.box, found.score] for found in objects] for name, objects in verdict.found.items()
    }
    return {
        "tag": prompt.tag,
        "prompt": prompt.prompt,
        "correct": verdict.correct,
        "reason": "\n".join(verdict.reasons),
        "metadata": prompt.line(),
        "details": json.dumps(boxes),
    }


class GenevalSuite(Suite):
    """GenEval (transformers' Mask2Former): objects, numbers, colours and places that prompts ask for."""

    name: Literal["geneval"] = "geneval"
    prompts: str = Field(examples=["evaluation_metadata.jsonl"])
    """GenEval's `evaluation_metadata.jsonl`; condition i is its line i."""
    detector: str = "facebook/mask2former-swin-small-coco-instance"
    """A Mask2Former of COCO's instances: a folder, or `owner/name` on the Hub."""
    colours: str = "openai/clip-vit-large-patch14"
    """A CLIP that tells colours: a folder, or `owner/name` on the Hub."""
    batch_size: PositiveInt = 8
    """Images per call of the detector."""

    asked_by: ClassVar = "prompts"
    has_details: ClassVar = True

    def faults(self, num_images: int, image_shape: tuple[int, ...]) -> list[str]:
        faults, least = [], GenevalMetrics().min_images
        if len(image_shape) != 3 or image_shape[0] != 3:
            faults.append(f"images of {list(image_shape)}; GenEval judges colour images [3, H, W]")
        if num_images < least:
            faults.append(f"{num_images} images; GenEval needs at least {least}")
        return faults

    def misfits(self, conditions: Conditions) -> list[str]:
        prompts = PromptFile.read(self.prompts).prompts
        if len(conditions) != len(prompts):
            return [f"{len(conditions)} conditions; {self.prompts} has {len(prompts)} prompts, one a line"]
        others = [n for n, prompt in enumerate(prompts) if conditions.words(n) != prompt.prompt]
        return [
            f"condition {n} is {conditions.words(n)!r}; line {n + 1} of {self.prompts} asks for {prompts[n].prompt!r}"
            for n in others[:1]
        ]

    def identity(self) -> dict[str, str]:
        return {
            "prompts": PromptFile.read(self.prompts).sha256,
            "detector": Detector(self.detector).sha256,
            "colours": ColourReader(self.colours).sha256,
        }

    def open(
        self, origin: Mapping[str, Any], *, on_step: OnStep | None = None
    ) -> Callable[[], SuiteEvaluator]:
        prompts = PromptFile.read(self.prompts)
        detector, colours = Detector(self.detector), ColourReader(self.colours)
        protocol = Protocol.of(
            Identity(name="GenEval (transformers' Mask2Former)", sha256=detector.sha256),
            Identity(name=f"CLIP, rules {_RULES}", sha256=colours.sha256),
            **origin,
            metrics=GenevalMetrics(),
        )
        return lambda: GenevalEvaluator(detector, colours, prompts, protocol)

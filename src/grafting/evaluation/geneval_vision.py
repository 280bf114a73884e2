"""What GenEval sees in images: objects by transformers' Mask2Former, their colours by CLIP.

The published figures are of mmdet's Mask2Former; its authors' weights in transformers' form find nearly the same objects, but
nobody has compared the two on GenEval, so figures made here are called after what made them. Needs the extra `text`.

Source: arXiv:2112.01527; arXiv:2103.00020; djghosh13/geneval, `evaluation/evaluate_images.py`; open-mmlab/mmdetection,
`maskformer_fusion_head.py` (`instance_postprocess`).
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from ..errors import CheckpointError, MissingBackend
from ..machine.devices import default_device
from ..machine.packages import install_line
from ..metrics.features import weights_sha256
from .geneval_rules import CLASSES, COLOURS, Detection

_MOST_DETECTIONS = 100  # of all classes together, as mmdet keeps
_FAINTEST = 0.3  # less sure objects are looked at by no rule
_TEMPLATES = (
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
)
_BEHIND = 0x99  # grey that hides what is not the object


class Detector:
    """Finds the objects of COCO's 80 classes by a Mask2Former for instances.

    Args:
        name: a folder, or `owner/name` on the Hub.

    Raises:
        CheckpointError: no such model, or one of other classes. MissingBackend: transformers is not installed.
    """

    def __init__(self, name: str):
        self.processor = _loaded("AutoImageProcessor", name)
        self.model = _loaded("Mask2FormerForUniversalSegmentation", name).eval().to(default_device())
        if (found := self.model.config.num_labels) != len(CLASSES):
            raise CheckpointError(
                f"{name} tells {found} classes apart; GenEval needs COCO's {len(CLASSES)}, "
                "such as facebook/mask2former-swin-small-coco-instance"
            )
        self.sha256 = weights_sha256(self.model)

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "b 3 h w"]) -> list[list[Detection]]:
        """The objects in each image."""
        inputs = self.processor(images=list(map(_picture, images)), return_tensors="pt").to(default_device())
        found = self.model(**inputs)
        padded = inputs["pixel_values"].shape[-2:]
        detections = []
        for classes, masks, inside in zip(
            found.class_queries_logits, found.masks_queries_logits, inputs["pixel_mask"], strict=True
        ):
            rows, cols = int(inside[:, 0].sum()), int(inside[0].sum())
            masks = F.interpolate(masks[None], padded, mode="bilinear", align_corners=False)[
                ..., :rows, :cols
            ]
            masks = F.interpolate(masks, images.shape[-2:], mode="bilinear", align_corners=False)[0]
            detections.append(_instances(classes, masks))
        return detections


def _instances(classes: Float[Tensor, "q k1"], masks: Float[Tensor, "q h w"]) -> list[Detection]:
    """Objects from a model's queries: logits of classes, the last for no object, and logits of masks."""
    num_classes = classes.shape[1] - 1
    chances = classes.softmax(-1)[:, :-1].flatten()
    scores, places = chances.topk(min(_MOST_DETECTIONS, len(chances)))
    found = []
    for score, place in zip(scores.tolist(), places.tolist(), strict=True):
        query, label = divmod(place, num_classes)
        mask = masks[query] > 0
        if not mask.any():
            continue
        # how sure the mask is weighs in
        sure = score * float(masks[query].sigmoid()[mask].mean())
        if sure > _FAINTEST:
            found.append(Detection(CLASSES[label], sure, _box(mask), mask.cpu()))
    return found


def _box(mask: Tensor) -> tuple[float, float, float, float]:
    rows, cols = mask.any(1).nonzero(), mask.any(0).nonzero()
    return float(cols[0]), float(rows[0]), float(cols[-1] + 1), float(rows[-1] + 1)


class ColourReader:
    """Tells the colours of objects by CLIP, without training: each is seen alone, before grey.

    Args:
        name: a folder, or `owner/name` on the Hub.

    Raises:
        CheckpointError: no such model. MissingBackend: transformers is not installed.
    """

    def __init__(self, name: str):
        self.processor = _loaded("AutoImageProcessor", name)
        self.tokenizer = _loaded("AutoTokenizer", name)
        self.model = _loaded("CLIPModel", name).eval().to(default_device())
        self.sha256 = weights_sha256(self.model)
        self._directions = cache(self._directions)  # type: ignore[method-assign]  # kept with the reader, not with its class

    @torch.no_grad()
    def __call__(self, image: UInt8[Tensor, "3 h w"], name: str, objects: Sequence[Detection]) -> list[str]:
        """The colour of each object of a class in an image."""
        pictures = [_alone(image, found) for found in objects]
        inputs = self.processor(images=pictures, return_tensors="pt").to(default_device())
        seen = F.normalize(_embedding(self.model.get_image_features(**inputs)), dim=-1)
        return [COLOURS[number] for number in (seen @ self._directions(name).T).argmax(-1).tolist()]

    def _directions(self, name: str) -> Float[Tensor, "10 d"]:
        """Where CLIP puts each colour of a class: the mean over sentences."""
        sentences = [t.format(colour=colour, name=name) for colour in COLOURS for t in _TEMPLATES]
        inputs = self.tokenizer(sentences, padding=True, return_tensors="pt").to(default_device())
        said = F.normalize(_embedding(self.model.get_text_features(**inputs)), dim=-1)
        return F.normalize(said.unflatten(0, (len(COLOURS), -1)).mean(1), dim=-1)


def _alone(image: Tensor, found: Detection) -> Image.Image:
    """An object cut out of its image, before grey where its mask is known."""
    if found.mask is not None:
        image = torch.where(found.mask, image, image.new_tensor(_BEHIND))
    left, top, right, bottom = map(round, found.box)
    return _picture(image[:, top:bottom, left:right])


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image.movedim(0, -1).numpy()))


def _embedding(output: Any) -> Tensor:
    """Features of CLIP: newer versions of transformers wrap them."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _loaded(kind: str, name: str) -> Any:
    """A model, tokenizer or image processor of transformers."""
    try:
        import transformers
    except ImportError as error:
        raise MissingBackend(f"GenEval's suite needs transformers: {install_line('transformers')}") from error
    # its messages on the console are advice to its own users
    transformers.logging.set_verbosity_error()
    try:
        return getattr(transformers, kind).from_pretrained(name)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{name} cannot be read as transformers' {kind}: {str(error)[:200]}") from error

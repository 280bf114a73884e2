"""A small convolutional classifier of 32x32 grey images: the feature network of the bundled testbed.

It plays the part that Inception plays for photographs: its pooled features are what Frechet distances are
measured in, its logits say whether a sample shows the class that was asked for. Distances in these features
are not FID and are not comparable with it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from pydantic import BaseModel, PositiveInt
from torch import Tensor, nn

from ..machine.files import write_bytes
from ..machine.reading import damage, parse_json, read_safetensors


class ClassifierOutput(NamedTuple):
    """Return pooled features [B, F] of images, and a logit per class."""

    pooled: Float[Tensor, "b f"]
    logits: Float[Tensor, "b classes"]


class Classifier(nn.Module):
    """Pre-activation residual network at 16x16, 8x8 and 4x4; features are averaged over positions after a ReLU.

    Args:
        widths: channels at the three resolutions.
        feature_dim: pooled features, F. A covariance needs many more images than features, so F is small.
        num_classes: classes.
    """

    def __init__(self, widths: Sequence[int] = (32, 64, 128), feature_dim: int = 64, num_classes: int = 10):
        super().__init__()
        self.config = {"widths": list(widths), "feature_dim": feature_dim, "num_classes": num_classes}
        fine, middle, coarse = widths
        self.body = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(4, fine, 3, padding=1),
            Residual(fine),
            Activated(fine, nn.Conv2d(fine, middle, 3, stride=2, padding=1)),
            Residual(middle),
            Residual(middle),
            Activated(middle, nn.Conv2d(middle, coarse, 3, stride=2, padding=1)),
            Residual(coarse),
            Activated(coarse, nn.Conv2d(coarse, feature_dim, 1)),
            nn.BatchNorm2d(feature_dim),
        )
        self.head = nn.Linear(feature_dim, num_classes)

    def forward(self, images: UInt8[Tensor, "b 1 h w"]) -> ClassifierOutput:
        """Features and logits of 8-bit images; height and width are multiples of 8."""
        x = images.to(self.head.weight.dtype) / 127.5 - 1
        pooled = F.relu(self.body(x)).mean((2, 3))
        return ClassifierOutput(pooled, self.head(pooled))


class Activated(nn.Module):
    """layer(relu(norm(x))), x [B, C, H, W]."""

    def __init__(self, channels: int, layer: nn.Module):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.layer = layer

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        return self.layer(F.relu(self.norm(x)))


class Residual(nn.Module):
    """x + conv(relu(norm(x)))."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch = Activated(channels, nn.Conv2d(channels, channels, 3, padding=1, bias=False))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return x + self.branch(x)


def save_classifier(path: Path, model: Classifier) -> None:
    """Write a classifier to a safetensors file, its floating-point values rounded to float16."""
    tensors = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in model.state_dict().items()
    }
    write_bytes(path, safetensors.torch.save(tensors, {"config": json.dumps(model.config)}))


class _Config(BaseModel):
    """Arguments of `Classifier` in its file."""

    widths: list[PositiveInt]
    feature_dim: PositiveInt
    num_classes: PositiveInt


def load_classifier(path: Path) -> Classifier:
    """The classifier that `save_classifier` wrote, in eval mode; it computes in float32 with the stored values.

    Raises:
        CheckpointError: no such file, or it is damaged or something else.
    """
    kind = "a complete classifier file"
    tensors, words = read_safetensors(path)
    config = parse_json(words.get("config", ""), _Config, name=path, kind=kind)
    with damage(path, kind):
        model = Classifier(config.widths, config.feature_dim, config.num_classes)
        model.load_state_dict(tensors)
    return model.eval()

"""Small random data for tests of training, and a denoiser of ten classes."""

import torch

from grafting.conditions import ClassLabels
from grafting.contract import Denoiser, NoiseProcess, Predict
from grafting.data.images import ImageSet
from grafting.diffusion import Diffusion
from grafting.hosts import hosts


def noise_images(num_images: int, *, size: int, num_classes: int = 10) -> ImageSet:
    """Random 8-bit images with labels, the same at every call."""
    draw = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (num_images, 1, size, size), generator=draw, dtype=torch.uint8)
    return ImageSet(images, torch.arange(num_images) % num_classes, num_classes=num_classes, size=size)


def denoiser(
    predict: Predict | None = None,
    *,
    process: NoiseProcess | None = None,
    count: int = 10,
    null_label: int | None = 10,
    dropout: float = 0.0,
) -> Denoiser:
    """A DiT's, unless another call is given; labels are not dropped unless asked for."""
    conditions = ClassLabels(count, null_label=null_label, dropout=dropout)
    return Denoiser(predict or hosts()["dit"].predict, process or Diffusion(), conditions)

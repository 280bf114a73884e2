"""Small random data for tests of training."""

import torch

from grafting.data.images import ImageSet


def noise_images(num_images: int, *, size: int, num_classes: int = 10) -> ImageSet:
    """Random 8-bit images with labels, the same at every call."""
    draw = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (num_images, 1, size, size), generator=draw, dtype=torch.uint8)
    return ImageSet(images, torch.arange(num_images) % num_classes, num_classes=num_classes, size=size)

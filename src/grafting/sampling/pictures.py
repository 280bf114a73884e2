"""Pictures of a set of images: PNG files in a folder, each named by its image's number."""

from collections.abc import Iterable
from pathlib import Path

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from ..errors import DataError
from ..machine.files import atomic_path, names_in


class Pictures:
    """A folder of pictures.

    Args:
        shape: of an image.

    Raises:
        DataError: images of this shape cannot be pictures.
    """

    def __init__(self, folder: Path, *, shape: tuple[int, ...]):
        if shape[0] not in (1, 3):
            raise DataError(
                f"pictures are grey or in colour; these images have {shape[0]} channels: omit --png"
            )
        if len(shape) != 3:
            raise DataError("pictures are of images; this model makes videos: omit --png")
        self.folder = folder

    def missing(self, numbers: Iterable[int]) -> set[int]:
        """Those of these images that have no picture yet."""
        names = names_in(self.folder)
        return {number for number in numbers if f"{number:06}.png" not in names}

    def write(self, numbers: Iterable[int], images: UInt8[Tensor, "b c h w"]) -> None:
        """Write images, grey or in colour, each atomically."""
        for number, image in zip(numbers, images.permute(0, 2, 3, 1).numpy(), strict=True):
            with atomic_path(self.folder / f"{number:06}.png") as temporary:
                Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(
                    temporary, format="PNG"
                )

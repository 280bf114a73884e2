"""Contact sheets: many small images in one PNG."""

import base64
import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ..errors import DataError
from ..machine.files import write_bytes

# wider images are shown smaller, so that a report stays small
MAX_SIDE = 128


def write_grid(
    images: UInt8[np.ndarray, "n c h w"], path: str | Path, *, columns: int = 10, scale: int = 1, gap: int = 2
) -> Path:
    """Write images, in rows of `columns` and each pixel `scale` wide, as one PNG on white; returns its path.

    Raises:
        DataError: there is no image, or they are neither grey (C = 1) nor colour (C = 3).
        RunError: the file cannot be written.
    """
    path = Path(path)
    pixels = _sheet(images, columns=columns, scale=scale, gap=gap)
    sheet = Image.fromarray(pixels)
    ground = Image.new("RGBA", sheet.size, "white")
    mode = "L" if images.shape[1] == 1 else "RGB"
    write_bytes(path, _png(Image.alpha_composite(ground, sheet.convert("RGBA")).convert(mode)))
    return path


def sheet_uri(images: UInt8[np.ndarray, "n c h w"], *, columns: int) -> str:
    """Images in rows of `columns` as a PNG in a data URI, with one clear pixel between them."""
    content = _png(Image.fromarray(_sheet(shrunk(images), columns=columns, scale=1, gap=1)))
    return "data:image/png;base64," + base64.b64encode(content).decode()


def shrunk(images: UInt8[np.ndarray, "n c h w"]) -> UInt8[np.ndarray, "n c h2 w2"]:
    """The images at most `MAX_SIDE` wide and high, in their proportions."""
    height, width = images.shape[2:]
    factor = MAX_SIDE / max(height, width)
    if factor >= 1:
        return images
    size = (round(width * factor), round(height * factor))
    planes = [np.asarray(Image.fromarray(plane).resize(size)) for image in images for plane in image]
    return np.stack(planes).reshape(*images.shape[:2], size[1], size[0])


def _sheet(
    images: UInt8[np.ndarray, "n c h w"], *, columns: int, scale: int, gap: int
) -> UInt8[np.ndarray, "height width ca"]:
    """One image with an alpha channel that is 0 between the images and where the last row is not full."""
    num_images, channels, height, width = images.shape
    if num_images == 0 or channels not in (1, 3):
        raise DataError(f"a sheet needs images of 1 or 3 channels; found {num_images} images of {channels}")
    columns = min(columns, num_images)
    rows = -(-num_images // columns)
    cell_height, cell_width = height * scale + gap, width * scale + gap
    sheet = np.zeros((rows * cell_height - gap, columns * cell_width - gap, channels + 1), np.uint8)
    for place, image in enumerate(images):
        top, left = (place // columns) * cell_height, (place % columns) * cell_width
        cell = sheet[top : top + height * scale, left : left + width * scale]
        cell[..., :-1] = image.transpose(1, 2, 0).repeat(scale, 0).repeat(scale, 1)
        cell[..., -1] = 255
    return sheet


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()

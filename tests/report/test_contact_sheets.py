"""Contact sheets, pixel by pixel."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from grafting.errors import DataError
from grafting.report import write_grid
from grafting.report._images import sheet_uri, shrunk


def test_a_grid_has_each_image_in_its_place(tmp_path):
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * 40 + np.zeros((5, 1, 3, 2), np.uint8)
    path = write_grid(images, tmp_path / "grid.png", columns=3, scale=2, gap=1)
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == (2 * 6 + 1, 3 * 4 + 2)
    assert (pixels[:6, :4] == 0).all()
    assert (pixels[:6, 5:9] == 40).all()
    assert (pixels[7:, 5:9] == 160).all()
    assert (pixels[6] == 255).all()  # the gap
    assert (pixels[7:, 10:] == 255).all()  # no sixth image


def test_a_grid_keeps_colours_and_enlarges_without_smoothing(tmp_path):
    image = np.zeros((1, 3, 2, 2), np.uint8)
    image[0, :, 0, 1] = (255, 128, 7)
    pixels = np.asarray(Image.open(write_grid(image, tmp_path / "grid.png", scale=3)))
    assert pixels.shape == (6, 6, 3)
    assert (pixels[:3, 3:] == (255, 128, 7)).all()
    assert (pixels[3:] == 0).all()


@pytest.mark.parametrize("shape", [(0, 1, 4, 4), (2, 4, 4, 4)])
def test_a_grid_of_nothing_or_of_latents_is_refused(tmp_path, shape):
    with pytest.raises(DataError, match="images of 1 or 3 channels; found"):
        write_grid(np.zeros(shape, np.uint8), tmp_path / "grid.png")
    assert list(tmp_path.iterdir()) == []


def test_a_sheet_is_a_png_that_is_clear_between_images():
    uri = sheet_uri(np.full((4, 1, 8, 8), 9, np.uint8), columns=2)
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))
    assert sheet.shape == (17, 17, 2)
    assert (sheet[8, :, 1] == 0).all()
    assert (sheet[:8, :8] == (9, 255)).all()


def test_large_images_shrink_in_their_proportions():
    images = np.full((2, 3, 256, 512), 77, np.uint8)
    assert shrunk(images).shape == (2, 3, 64, 128)
    assert (shrunk(images) == 77).all()
    small = np.zeros((2, 1, 32, 32), np.uint8)
    assert shrunk(small) is small

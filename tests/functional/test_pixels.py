import pytest
import torch

from grafting.errors import GraftingError
from grafting.functional.pixels import to_uint8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_undoes_the_reading_of_pixels(dtype):
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(pixels.to(dtype) / 127.5 - 1), pixels)


def test_truncates_and_clamps():
    x = torch.tensor([-2.0, -1.0, -128 / 127.5, 0.0, 1 / 127.5 * 0.999, 127 / 127.5, 1.0, 3.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 128, 128, 255, 255, 255]


def test_refuses_what_is_not_finite():
    x = torch.zeros(2, 1, 4, 4)
    x[1, 0, 0, 0] = torch.nan
    with pytest.raises(GraftingError, match="hold 1 values that are not finite"):
        to_uint8(x)

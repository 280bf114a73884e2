"""The device that these tests compare with the CPU: CUDA, in full fp32.

`GRAFTING_TEST_DEVICE=cpu pytest -m gpu` runs them on a machine without one, the CPU in its place.
"""

import os
import warnings
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    device = torch.device(os.environ.get("GRAFTING_TEST_DEVICE", "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA: pytest -m gpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch have a second name for it
        before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
        yield device
        torch.backends.cudnn.allow_tf32 = before

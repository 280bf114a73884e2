"""Every test starts from the same seed, on one thread, offline; uninitialised memory is filled with NaN."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# what `auto` is, on whatever machine the tests run
os.environ["GRAFTING_PRECISION"] = "fp32"

import pytest
import torch

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)

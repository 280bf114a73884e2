"""Every test starts from the same seed, on one thread, offline; uninitialised memory is filled with NaN.

CUDA is there for tests marked `gpu` alone, and these run by themselves, `pytest -m gpu`: all others run on the CPU, on whatever machine.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# what `auto` is, on whatever machine the tests run
os.environ["GRAFTING_PRECISION"] = "fp32"

import pytest
import torch

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_configure(config: pytest.Config) -> None:
    """Here and in every process that tests start."""
    if not config.option.markexpr.startswith("gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVIDIA_TF32_OVERRIDE": "0"}
    # what CUDA cannot do twice alike is done all the same, and told once by each kernel
    config.addinivalue_line("filterwarnings", "ignore:.*deterministic:UserWarning")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)

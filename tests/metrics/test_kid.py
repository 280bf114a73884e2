import math

import pytest
import torch
from torch import nn
from torchmetrics.image.kid import KernelInceptionDistance

from grafting.metrics.kid import kernel_distance


class Rows(nn.Module):
    """A feature network whose images are their features."""

    num_features = 12

    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_equals_torchmetrics_on_all_rows():
    real, generated = torch.randn(90, 12).double(), torch.randn(90, 12).double() + 0.3
    oracle = KernelInceptionDistance(feature=Rows(), subsets=1, subset_size=90)
    oracle.update(real, real=True)
    oracle.update(generated, real=False)
    assert kernel_distance(real, generated).value == pytest.approx(float(oracle.compute()[0]), rel=1e-5)


def test_chunks_do_not_matter():
    real, generated = torch.randn(50, 6), torch.randn(37, 6)
    whole = kernel_distance(real, generated)
    assert kernel_distance(real, generated, chunk_size=7)[:2] == pytest.approx(whole[:2], rel=1e-9)


def test_the_error_is_the_jackknifes_by_definition():
    real, generated = torch.randn(20, 4), torch.randn(15, 4)
    without = torch.tensor(
        [kernel_distance(real, generated[torch.arange(15) != i]).value for i in range(15)],
        dtype=torch.float64,
    )
    want = (14 / 15 * (without - without.mean()).square().sum()).sqrt()
    assert kernel_distance(real, generated).standard_error == pytest.approx(float(want), rel=1e-9)


def test_unbiased_and_its_error_is_the_spread_over_draws():
    real = torch.randn(400, 8)
    same = [kernel_distance(torch.randn(100, 8), torch.randn(100, 8)).value for _ in range(200)]
    mean, spread = torch.tensor(same).mean(), torch.tensor(same).std()
    assert abs(mean) < 3 * spread / math.sqrt(200)
    shifted = [kernel_distance(real, torch.randn(100, 8) + 0.5) for _ in range(200)]
    spread = torch.tensor([s.value for s in shifted]).std()
    claimed = torch.tensor([s.standard_error for s in shifted]).mean()
    assert 0.8 <= claimed / spread <= 1.3


def test_refuses_too_few_rows():
    with pytest.raises(ValueError, match="there are 5 and 2"):
        kernel_distance(torch.randn(5, 3), torch.randn(2, 3))

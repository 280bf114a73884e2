import pytest
import torch
from torch import nn
from torchmetrics.image.inception import InceptionScore

from grafting.machine.randomness import generator
from grafting.metrics.inception_score import inception_score


@pytest.mark.parametrize("splits", [1, 10])
@pytest.mark.filterwarnings("ignore:Metric `InceptionScore`", "ignore:.*degrees of freedom")
def test_equals_torchmetrics(splits):
    logits = 3 * torch.randn(200, 10).double()
    oracle = InceptionScore(feature=nn.Identity(), splits=splits)
    oracle.update(logits)
    torch.manual_seed(generator(0).initial_seed())
    with torch.random.fork_rng():
        value, _ = oracle.compute()
    assert inception_score(logits, splits=splits) == pytest.approx(float(value), rel=1e-6)


def test_is_one_for_no_opinion_and_k_for_every_class_certain():
    assert inception_score(torch.zeros(40, 5)) == pytest.approx(1)
    certain = 100 * torch.eye(5).repeat(20, 1)
    assert inception_score(certain, splits=1) == pytest.approx(5)


def test_the_order_of_images_does_not_sort_the_splits():
    sorted_by_class = 100 * torch.eye(5).repeat_interleave(40, 0)
    assert inception_score(sorted_by_class) > 4


def test_refuses_fewer_rows_than_splits():
    with pytest.raises(ValueError, match="10 splits need as many rows of logits; there are 9"):
        inception_score(torch.zeros(9, 5))

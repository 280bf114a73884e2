import pytest
import torch
from torch import nn

from grafting.errors import DataError
from grafting.metrics.features import ModuleNetwork, extract, weights_sha256


class Pools(nn.Module):
    """Row and column means as features, two classes."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 2)

    def forward(self, images):
        x = images.float().mean(1) / 255
        pooled = torch.cat([x.mean(1), x.mean(2)], 1)
        return pooled, self.head(pooled)


IMAGES = torch.arange(2 * 16, dtype=torch.uint8).view(2, 1, 4, 4)


def test_features_are_plain_float32_rows():
    pooled, logits, _ = extract(ModuleNetwork(Pools(), "pools"), IMAGES)
    assert pooled.shape == (2, 8)
    assert logits.shape == (2, 2)
    assert pooled.dtype == torch.float32
    assert not logits.requires_grad


def test_the_hash_is_of_names_and_values():
    network = Pools()
    before = weights_sha256(network)
    assert before == weights_sha256(network) == ModuleNetwork(network, "any name").sha256
    with torch.no_grad():
        network.head.bias[0] += 1e-3
    assert weights_sha256(network) != before
    assert weights_sha256(nn.Sequential(network)) != weights_sha256(network)
    assert weights_sha256(network.bfloat16()) != before


@pytest.mark.parametrize("images", [IMAGES.float(), IMAGES[:, 0]])
def test_refuses_images_that_are_not_8_bit_batches(images):
    with pytest.raises(DataError, match=r"8-bit images \[B, C, H, W\]"):
        extract(ModuleNetwork(Pools(), "pools"), images)


def test_refuses_features_that_are_not_finite():
    network = Pools()
    nn.init.constant_(network.head.bias, torch.nan)
    with pytest.raises(DataError, match=r"'pools' gave logits that are not finite for 2 of 2 images"):
        extract(ModuleNetwork(network, "pools"), IMAGES)


def test_refuses_a_network_that_gives_no_row_an_image():
    class Maps(Pools):
        def forward(self, images):
            return images.float(), None

    with pytest.raises(DataError, match="one row per image"):
        extract(ModuleNetwork(Maps(), "maps"), IMAGES)

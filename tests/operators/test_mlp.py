"""MLPs of other widths: what they take from the host, and what they cost."""

import pytest
import torch

from closeness import assert_close
from grafting.contract import Grid, MlpWeights, Site, TokenLayout
from grafting.models.dit import Mlp
from grafting.operators import parse_operator
from grafting.operators.mlp import MLPConfig, strongest

SITE = Site(role="mlp", block=0, path="mlp", dim=12, hidden_dim=48, grid=Grid(3, 5))
LAYOUT = TokenLayout(SITE.grid)


def weights_of(mlp):
    up, down = (mlp.fc1.weight, mlp.fc1.bias), (mlp.fc2.weight, mlp.fc2.bias)
    return MlpWeights(up, down, lambda x: torch.nn.functional.gelu(x, approximate="tanh"))


def inherited(ratio, host):
    mixer = MLPConfig(ratio=ratio).build(SITE)
    mixer.inherit(weights_of(host))
    return mixer


@pytest.mark.parametrize("ratio", [4.0, 4.1, 6.0])
def test_as_wide_or_wider_it_starts_as_the_host(ratio):
    host, x = Mlp(12, 48), torch.randn(2, 15, 12)
    mixer = inherited(ratio, host)
    assert mixer.fc1.weight.shape == (int(ratio * 12), 12)
    assert_close("output", mixer(x, LAYOUT), host(x), 1e-6)


def test_new_neurons_learn():
    mixer = inherited(6.0, Mlp(12, 48))
    mixer(torch.randn(2, 15, 12), LAYOUT).square().sum().backward()
    assert not mixer.fc2.weight[:, 48:].any()
    assert (mixer.fc2.weight.grad[:, 48:].abs().sum(0) > 0).all()
    assert mixer.fc1.weight[48:].any(dim=1).all()


def test_narrower_it_keeps_the_strongest_neurons():
    host = Mlp(12, 48)
    with torch.no_grad():
        host.fc1.weight[::2] *= 1e-3
        host.fc1.bias[::2] = 0
    mixer, x = inherited(2.0, host), torch.randn(2, 15, 12)
    assert torch.equal(mixer.fc1.weight, host.fc1.weight[1::2])
    assert torch.equal(mixer.fc2.weight, host.fc2.weight[:, 1::2])
    assert_close("output", mixer(x, LAYOUT), host(x), 1e-2)


def test_it_takes_the_neurons_that_it_is_told_to_take():
    host, x = Mlp(12, 48), torch.randn(2, 15, 12)
    mixer = inherited(2.0, host)
    kept = torch.arange(10, 34)
    mixer.inherit_neurons(weights_of(host), kept)
    assert mixer.num_inherited_neurons == 24
    hidden = torch.nn.functional.gelu(host.fc1(x), approximate="tanh")[..., kept]
    want = torch.nn.functional.linear(hidden, host.fc2.weight[:, kept], host.fc2.bias)
    assert_close("output", mixer(x, LAYOUT), want, 1e-6)


@pytest.mark.parametrize(("ratio", "num"), [(2.0, 24), (4.0, 48), (6.0, 48)])
def test_it_knows_how_many_neurons_it_took(ratio, num):
    assert MLPConfig(ratio=ratio).build(SITE).num_inherited_neurons == 0
    assert inherited(ratio, Mlp(12, 48)).num_inherited_neurons == num


def test_strength_is_the_product_of_both_norms():
    up = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    down = torch.tensor([[0.1, 9.0, 1.0], [0.0, 0.0, 1.0]])
    assert strongest(up, down, num=2).tolist() == [1, 2]


def test_inheriting_from_a_host_without_biases():
    mixer = MLPConfig(ratio=2.0).build(SITE)
    mixer.inherit(MlpWeights((torch.randn(30, 12), None), (torch.randn(12, 30), None), torch.relu))
    assert not mixer.fc1.bias.any()
    assert not mixer.fc2.bias.any()


def test_faults():
    assert MLPConfig(ratio=0.1).faults(SITE) == []
    assert MLPConfig(ratio=0.05).faults(SITE) == ["ratio 0.05 of width 12 leaves no hidden neuron"]
    for ratio in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError):
            MLPConfig(ratio=ratio)


@pytest.mark.parametrize(("ratio", "change"), [(3.0, -0.25), (6.0, 0.5)])
def test_cost_and_size_as_published(ratio, change):
    """arXiv:2506.05340 Table 4, all 28 operators: -25 % and +50 % of both."""
    big = Site(role="mlp", block=0, path="mlp", dim=1152, hidden_dim=4608, grid=Grid(16, 16))
    config, host = MLPConfig(ratio=ratio), MLPConfig()
    assert config.mixing_flops(big) / host.mixing_flops(big) - 1 == change
    assert config.projection_flops(big) == 0
    with torch.device("meta"):
        ours, hosts = (sum(p.numel() for p in c.build(big).parameters()) for c in (config, host))
    assert hosts == 10_622_592
    assert ours / hosts - 1 == pytest.approx(change, abs=1e-4)


def test_keeps_bfloat16():
    mixer = MLPConfig().build(SITE).bfloat16()
    assert mixer(torch.randn(1, 1, 12, dtype=torch.bfloat16), LAYOUT).dtype == torch.bfloat16


def test_found_by_name_for_mlps_only():
    assert parse_operator({"name": "mlp", "ratio": 3}) == MLPConfig(ratio=3.0)
    assert MLPConfig.roles == {"mlp"}

"""The control mixer: with the host's weights it is the host's attention."""

import pytest
import torch

from closeness import assert_close
from grafting.contract import AttentionWeights, Grid, Site, TokenLayout
from grafting.models.dit import Attention
from grafting.operators import parse_operator
from grafting.operators.mha import MHAConfig


def site(dim=24, num_heads=4):
    return Site(role="attention", block=0, path="attn", dim=dim, num_heads=num_heads, grid=Grid(3, 5))


def weights_of(attention):
    q, k, v = zip(attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3), strict=True)
    return AttentionWeights(q, k, v, (attention.proj.weight, attention.proj.bias))


def test_inherited_it_is_the_hosts_attention():
    host, mixer = Attention(24, 4), MHAConfig().build(site())
    mixer.inherit(weights_of(host))
    x = torch.randn(3, 15, 24, requires_grad=True)
    got, want = mixer(x, TokenLayout(site().grid)), host(x)
    assert_close("output", got, want, 1e-6)
    assert_close(
        "gradient",
        *(torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (got, want)),
        1e-5,
    )


def test_inheriting_copies_the_weights():
    host, mixer = Attention(24, 4), MHAConfig().build(site())
    mixer.inherit(weights_of(host))
    before = mixer(torch.ones(1, 2, 24), TokenLayout(site().grid))
    host.qkv.weight.data.zero_()
    assert torch.equal(mixer(torch.ones(1, 2, 24), TokenLayout(site().grid)), before)


def test_inheriting_from_a_host_without_biases():
    mixer = MHAConfig().build(site())
    matrices = torch.randn(4, 24, 24)
    mixer.inherit(AttentionWeights(*((matrix, None) for matrix in matrices)))
    assert torch.equal(mixer.in_proj.weight, matrices[:3].flatten(0, 1))
    assert torch.equal(mixer.out_proj.weight, matrices[3])
    assert not mixer.in_proj.bias.any()
    assert not mixer.out_proj.bias.any()


def test_heads_are_the_sites_unless_given():
    assert MHAConfig().build(site()).num_heads == 4
    assert MHAConfig(num_heads=2).build(site()).num_heads == 2


def test_faults():
    assert MHAConfig().faults(site()) == []
    assert MHAConfig(num_heads=5).faults(site()) == ["width 24 is not a multiple of num_heads 5"]
    assert MHAConfig().faults(site(num_heads=0)) == ["the site has no attention heads: give num_heads"]
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        MHAConfig(num_heads=0)


def test_cost_is_that_of_attention():
    config, big = MHAConfig(), site(dim=1152, num_heads=16)
    assert config.mixing_flops(big) == 15**2 * (4 * 1152 + 2 * 16)
    assert config.projection_flops(big) == 8 * 15 * 1152**2


def test_found_by_name():
    assert parse_operator({"name": "mha", "num_heads": 2}) == MHAConfig(num_heads=2)
    assert parse_operator("mha").randomised().init == "random"

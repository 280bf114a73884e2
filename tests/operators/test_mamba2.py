"""Mamba-2: equal to another implementation and to its recurrence, symmetry of the two directions, starting values, cost."""

import pytest
import torch
import torch.nn.functional as F

from closeness import assert_close
from grafting.contract import AttentionWeights, Grid, Site, TokenLayout
from grafting.functional.ssd import ssd_reference
from grafting.operators import parse_operator
from grafting.operators.mamba2 import Mamba2Config

DIM = 24
PARAMETERS = [
    "A_log",
    "D",
    "conv1d.bias",
    "conv1d.weight",
    "dt_bias",
    "in_proj.weight",
    "norm.weight",
    "out_proj.weight",
]
LAYOUT = TokenLayout(Grid(7, 9))


def site(grid=LAYOUT.grid, *, dim=DIM, num_text=0):
    return Site(role="attention", block=0, path="attn", dim=dim, num_heads=4, grid=grid, num_text=num_text)


DIT_XL2 = Site(role="attention", block=0, path="attn", dim=1152, num_heads=16, grid=Grid(16, 16))


def built(**settings):
    """The operator with norm weights and skips that are not all alike."""
    mixer = Mamba2Config(**settings).build(site())
    for name, parameter in mixer.named_parameters():
        if name.split(".")[-1] in ("D", "weight") and parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=1)
    return mixer


def gradients(y, inputs):
    return torch.autograd.grad((y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum(), inputs)


@pytest.mark.parametrize("num_tokens", [1, 63, 100])
@pytest.mark.parametrize("conv_size", [1, 4])
def test_causal_form_equals_transformers(num_tokens, conv_size):
    # here and not above: it takes seconds to import
    from transformers import Mamba2Config as TheirConfig
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    ours = built(direction="causal", state_dim=8, head_dim=6, conv_size=conv_size)
    config = TheirConfig(
        hidden_size=DIM,
        state_size=8,
        head_dim=6,
        num_heads=2 * DIM // 6,
        expand=2,
        n_groups=1,
        conv_kernel=conv_size,
        chunk_size=16,
        layer_norm_epsilon=1e-5,
        use_bias=False,
        use_conv_bias=True,
    )
    theirs = Mamba2Mixer(config, layer_idx=0)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, num_tokens, DIM, requires_grad=True)
    got, want = ours(x, TokenLayout(Grid(1, num_tokens))), theirs(x)
    assert_close("output", got, want, 1e-5)
    own, other = ({"x": x, **dict(mixer.named_parameters())} for mixer in (ours, theirs))
    got_gradients, want_gradients = (
        gradients(got, list(own.values())),
        gradients(want, [other[n] for n in own]),
    )
    for name, a, b in zip(own, got_gradients, want_gradients, strict=True):
        # one token decays nothing: its rates have no gradient
        if num_tokens > 1 or name != "A_log":
            assert_close(f"gradient of {name}", a, b, 1e-4)


def reference_scan(tokens, conv, dt_bias, A_log, D, *, head_dim=16, state_dim=64):
    """One direction, the filter tap by tap and the states token by token."""
    inner = 2 * DIM
    xBC, dt = tokens[..., : inner + 2 * state_dim], tokens[..., inner + 2 * state_dim :]
    padded = F.pad(xBC, (0, 0, 3, 0))
    length = tokens.shape[1]
    xBC = F.silu(conv.bias + sum(conv.weight[:, 0, j] * padded[:, j : j + length] for j in range(4)))
    x = xBC[..., :inner].unflatten(-1, (-1, head_dim))
    B, C = xBC[..., inner : inner + state_dim], xBC[..., inner + state_dim :]
    y = ssd_reference(x, F.softplus(dt + dt_bias), -A_log.exp(), B, C)
    return (y + D[:, None] * x).flatten(2)


@pytest.mark.parametrize("settings", [{}, {"weights": "separate"}, {"direction": "causal"}], ids=str)
def test_equals_its_definition(settings):
    mixer = built(**settings)
    x = torch.randn(2, LAYOUT.num_tokens, DIM, requires_grad=True)
    projected = mixer.in_proj(x)
    gate, tokens = projected[..., : 2 * DIM], projected[..., 2 * DIM :]
    y = reference_scan(tokens, mixer.conv1d, mixer.dt_bias, mixer.A_log, mixer.D)
    if mixer.bidirectional:
        back = mixer if mixer.reverse is None else mixer.reverse
        back_y = reference_scan(tokens.flip(1), back.conv1d, back.dt_bias, back.A_log, back.D)
        y = (y + back_y.flip(1)) / 2
    y = y * F.silu(gate)
    y = mixer.norm.weight * y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    want, got = mixer.out_proj(y), mixer(x, LAYOUT)
    assert_close("output", got, want, 1e-5)
    inputs = {"x": x, **dict(mixer.named_parameters())}
    pairs = zip(gradients(got, list(inputs.values())), gradients(want, list(inputs.values())), strict=True)
    for name, (a, b) in zip(inputs, pairs, strict=True):
        assert_close(f"gradient of {name}", a, b, 1e-4)


def test_reversed_tokens_give_the_reversed_output_with_shared_weights_only():
    x = torch.randn(2, LAYOUT.num_tokens, DIM)
    shared, separate = built(), built(weights="separate")
    assert_close("shared", shared(x.flip(1), LAYOUT), shared(x, LAYOUT).flip(1), 1e-5)
    difference = separate(x.flip(1), LAYOUT) - separate(x, LAYOUT).flip(1)
    assert difference.abs().max() > 1e-2


def test_separate_directions_swap_with_their_weights():
    """Exchanging the two sets of weights is the same as reversing the tokens: each set belongs to one direction."""
    x = torch.randn(2, LAYOUT.num_tokens, DIM)
    mixer, swapped = (Mamba2Config(weights="separate").build(site()) for _ in range(2))
    state = mixer.state_dict()
    own = ("conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D")
    exchange = {name: f"reverse.{name}" for name in own} | {f"reverse.{name}": name for name in own}
    swapped.load_state_dict({exchange.get(name, name): value for name, value in state.items()})
    assert_close("swapped", swapped(x.flip(1), LAYOUT), mixer(x, LAYOUT).flip(1), 1e-5)


@pytest.mark.parametrize("text_first", [True, False])
def test_text_tokens_are_part_of_the_sequence(text_first):
    layout = TokenLayout(Grid(3, 5), **{"before" if text_first else "after": 4})
    mixer = built()
    x = torch.randn(1, 19, DIM)
    assert torch.equal(mixer(x, layout), mixer(x, TokenLayout(Grid(1, 19))))


def test_parameters_are_those_of_the_published_weights():
    for settings in ({}, {"direction": "causal"}):
        mixer = Mamba2Config(**settings).build(DIT_XL2)
        assert sorted(mixer.state_dict()) == PARAMETERS
        assert sum(p.numel() for p in mixer.parameters()) == 8_290_864
    attention = parse_operator("mha").build(DIT_XL2)
    assert round(100 * 8_290_864 / sum(p.numel() for p in attention.parameters()) - 100, 2) == 56.05


def test_starts_as_mamba_ssm_does():
    mixer = Mamba2Config(weights="separate").build(DIT_XL2)
    for direction in (mixer, mixer.reverse):
        steps, rates = F.softplus(direction.dt_bias), direction.A_log.exp()
        assert steps.min() >= 1e-3 * 0.99
        assert steps.max() <= 0.1 * 1.01
        assert abs(steps.log().mean().exp() - 1e-2) < 3e-3  # log-uniform: the geometric middle
        assert rates.min() >= 1
        assert rates.max() <= 16.01
        assert abs(rates.mean() - 8.5) < 1.5
        assert (direction.D == 1).all()
    assert (mixer.norm.weight == 1).all()


def test_a_width_that_does_not_fit_is_a_fault():
    assert Mamba2Config(head_dim=16).faults(site(dim=20)) == [
        "expand 2 x width 20 = 40 is not a multiple of head_dim 16"
    ]
    assert Mamba2Config(head_dim=20).faults(site(dim=20)) == []
    assert Mamba2Config(direction="causal", weights="separate").faults(site()) == [
        "weights: separate is for two directions, and direction: causal has one; use weights: shared"
    ]


def host_weights(*, bias=True):
    shape = (DIM, DIM)
    return AttentionWeights(
        *((torch.randn(shape) / DIM**0.5, torch.randn(DIM) if bias else None) for _ in range(4))
    )


@pytest.mark.parametrize(
    "settings", [{}, {"weights": "separate"}, {"direction": "causal"}, {"expand": 4}], ids=str
)
@pytest.mark.parametrize("bias", [True, False])
def test_inherits_an_average_of_the_hosts_values(settings, bias):
    """Where all tokens are alike there is nothing to mix: the output lies along the host's out(v)."""
    mixer, weights = Mamba2Config(**settings).build(site()), host_weights(bias=bias)
    mixer.inherit(weights)
    x = torch.randn(32, 1, DIM).expand(32, LAYOUT.num_tokens, DIM)
    values = F.linear(x, weights.v[0], weights.v[1])
    want = F.linear(values, weights.out[0])
    similarity = F.cosine_similarity(mixer(x, LAYOUT), want, dim=-1)
    # at random it is 0; at this width the gates' random part shows
    assert similarity.mean() > 0.6


def test_inherited_output_follows_the_gates_at_no_size():
    """The same z for all channels is taken out by the norm: halving it changes little."""
    mixer = Mamba2Config().build(site())
    mixer.inherit(host_weights())
    x = torch.randn(4, LAYOUT.num_tokens, DIM)
    before = mixer(x, LAYOUT)
    with torch.no_grad():
        mixer.in_proj.weight[: 2 * DIM] /= 2
    assert F.cosine_similarity(before, mixer(x, LAYOUT), dim=-1).mean() > 0.9


@pytest.mark.parametrize("settings", [{"state_dim": 64}, {"expand": 1, "head_dim": 8}], ids=str)
def test_more_state_than_directions_and_a_single_copy_inherit_too(settings):
    mixer = Mamba2Config(**settings).build(site())
    mixer.inherit(host_weights())
    x = torch.randn(2, LAYOUT.num_tokens, DIM)
    for gradient in torch.autograd.grad(mixer(x, LAYOUT).square().sum(), list(mixer.parameters())):
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


def test_published_changes_of_cost():
    """Table 4 at 50, 75 and 100 % of the blocks: 14, 21 and 28 of 28 (arXiv:2506.05340)."""
    base = parse_operator("mha").table4_flops(DIT_XL2)
    ours = Mamba2Config(direction="causal").table4_flops(DIT_XL2)
    mixing, projections = (100 * (new / old - 1) for new, old in zip(ours, base, strict=True))
    assert [round(share * mixing, 2) for share in (0.5, 0.75, 1)] == [-37.59, -56.38, -75.17]
    assert [round(share * projections, 2) for share in (0.5, 0.75, 1)] == [77.89, 116.83, 155.77]


def test_work_of_the_linears_is_their_weights():
    mixer = Mamba2Config(direction="causal").build(DIT_XL2)
    weights = sum(p.numel() for p in (mixer.in_proj.weight, mixer.out_proj.weight, mixer.conv1d.weight))
    assert Mamba2Config(direction="causal").projection_flops(DIT_XL2) == 256 * 2 * weights
    both_ways = Mamba2Config().projection_flops(DIT_XL2) - Mamba2Config(direction="causal").projection_flops(
        DIT_XL2
    )
    assert both_ways == 256 * 2 * mixer.conv1d.weight.numel()


def test_in_double_precision():
    mixer, x = built(), torch.randn(2, 63, DIM)
    with torch.no_grad():
        assert_close("outputs", mixer.double()(x.double(), LAYOUT), mixer.float()(x, LAYOUT), 1e-4)

"""Hyena-SE, -X and -Y: definition, geometry, what they take from the host, cost; the contract is tested elsewhere."""

import jaxtyping
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from closeness import assert_close
from grafting.contract import AttentionWeights, Grid, Site, TokenLayout
from grafting.functional.conv import depthwise_1d_reference, depthwise_2d_reference
from grafting.models.dit import Attention
from grafting.operators import parse_operator
from grafting.operators._filters import GATE_SPREAD, TokenFilter
from grafting.operators.hyena import HyenaSEConfig, HyenaXConfig, HyenaYConfig

CONFIGS = [HyenaSEConfig, HyenaXConfig, HyenaYConfig]
GEOMETRIES = ["centred", "causal", "2d"]
DIM = 12
BEFORE = {"centred": 2, "causal": 3}
every_config = pytest.mark.parametrize("config", CONFIGS)
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES)


def site(grid, *, dim=DIM, num_text=0):
    return Site(role="attention", block=0, path="attn", dim=dim, num_heads=4, grid=grid, num_text=num_text)


def host_weights(dim=DIM, *, bias=True):
    return AttentionWeights(*((torch.randn(dim, dim), torch.randn(dim) if bias else None) for _ in range(4)))


def reference_filter(token_filter, x, grid):
    """The filter by its definition, for image tokens only."""
    if token_filter is None:
        return x
    weight, bias = token_filter.weight, token_filter.bias
    if token_filter.geometry != "2d":
        return depthwise_1d_reference(x, weight, bias, before=BEFORE[token_filter.geometry])
    frames = x.unflatten(1, (grid.frames, grid.rows, grid.cols))
    return torch.stack([depthwise_2d_reference(f, weight, bias) for f in frames.unbind(1)], 1).flatten(1, 3)


def reference(mixer, x, grid):
    """paper.md's formula, one projection at a time."""
    qkv = reference_filter(mixer.short_filter, mixer.in_proj(x), grid)
    q, k, v = qkv[..., :DIM], qkv[..., DIM : 2 * DIM], qkv[..., 2 * DIM :]
    return mixer.out_proj(q * reference_filter(mixer.inner_filter, k * v, grid))


def gradients(y, inputs):
    return torch.autograd.grad((y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum(), inputs)


def randomise_filters(mixer):
    for token_filter in (mixer.short_filter, mixer.inner_filter):
        if token_filter is not None:
            torch.nn.init.normal_(token_filter.weight)
            torch.nn.init.normal_(token_filter.bias)


@every_config
@every_geometry
@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(3, 5), Grid(7, 9), Grid(3, 2, frames=3)])
def test_equals_its_definition(config, geometry, grid):
    mixer = config(geometry=geometry).build(site(grid))
    randomise_filters(mixer)
    x = torch.randn(2, grid.num_tokens, DIM, requires_grad=True)
    got, want = mixer(x, TokenLayout(grid)), reference(mixer, x, grid)
    assert_close("output", got, want, 1e-5)
    inputs = {"x": x, **dict(mixer.named_parameters())}
    pairs = zip(gradients(got, list(inputs.values())), gradients(want, list(inputs.values())), strict=True)
    for name, (a, b) in zip(inputs, pairs, strict=True):
        assert_close(f"gradient of {name}", a, b, 1e-4)


def seen_by(mixer, layout, token):
    """Places whose change changes the output at `token`."""
    x = torch.randn(1, layout.num_tokens, DIM, requires_grad=True)
    grad = torch.autograd.grad(mixer(x, layout)[:, token].square().sum(), x)[0]
    return grad[0].abs().sum(-1).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("geometry", "kernel_size", "want"),
    [
        ("causal", 4, [7, 8, 9, 10]),
        ("centred", 4, [8, 9, 10, 11]),
        ("centred", 3, [9, 10, 11]),
        ("2d", 3, [5, 6, 10, 11, 15, 16]),  # token 10 starts a row of five
        ("2d", 2, [5, 10]),
    ],
)
def test_which_tokens_a_token_sees(geometry, kernel_size, want):
    mixer = HyenaXConfig(geometry=geometry, kernel_size=kernel_size).build(site(Grid(4, 5)))
    assert seen_by(mixer, TokenLayout(Grid(4, 5)), 10) == want


@pytest.mark.parametrize("text_first", [True, False])
def test_text_tokens_are_part_of_the_sequence_in_1d(text_first):
    layout = TokenLayout(Grid(2, 2), **{"before" if text_first else "after": 3})
    mixer = HyenaXConfig().build(site(layout.grid, num_text=3))
    assert seen_by(mixer, layout, 3) == [1, 2, 3, 4]


@pytest.mark.parametrize("text_first", [True, False])
def test_text_tokens_see_the_centre_tap_in_2d(text_first):
    layout = TokenLayout(Grid(3, 2), **{"before" if text_first else "after": 3})
    mixer = HyenaXConfig(geometry="2d", kernel_size=3).build(site(layout.grid, num_text=3))
    x = torch.randn(2, 9, DIM)
    y, image = mixer(x, layout), layout.image_slice
    assert_close("image", y[:, image], mixer(x[:, image], TokenLayout(layout.grid)), 1e-6)
    for token in set(range(9)) - set(range(9)[image]):
        # a text token is filtered as the one token of a 1 x 1 grid is
        alone = mixer(x[:, token : token + 1], TokenLayout(Grid(1, 1)))
        assert_close("text", y[:, token : token + 1], alone, 1e-6)


def test_frames_do_not_see_each_other_in_2d():
    layout = TokenLayout(Grid(2, 2, frames=2))
    mixer = HyenaSEConfig(geometry="2d", kernel_size=3).build(site(layout.grid))
    assert seen_by(mixer, layout, 0) == [0, 1, 2, 3]


@every_geometry
def test_identity_filter(geometry):
    token_filter, layout = TokenFilter(DIM, 4, geometry), TokenLayout(Grid(3, 5), before=2)
    token_filter.set_identity()
    x = torch.randn(2, 17, DIM)
    assert torch.equal(token_filter(x, layout), x)


def test_random_start_as_published():
    mixer = HyenaSEConfig(geometry="causal").build(site(Grid(3, 5)))
    assert mixer.inner_filter.weight[:, 0].eq(torch.tensor([0.0, 0, 0, 1])).all()
    assert not mixer.inner_filter.bias.any()
    conv = torch.nn.Conv1d(3 * DIM, 3 * DIM, 4, groups=3 * DIM)
    assert mixer.short_filter.weight.abs().max() <= 0.5
    assert mixer.short_filter.weight.std().item() == pytest.approx(conv.weight.std().item(), rel=0.2)


@pytest.mark.parametrize(
    ("config", "filters"), zip(CONFIGS, [{"short", "inner"}, {"short"}, {"inner"}], strict=True)
)
def test_published_weights_load(config, filters):
    linear = {
        "in_proj.weight": (36, 12),
        "in_proj.bias": (36,),
        "out_proj.weight": (12, 12),
        "out_proj.bias": (12,),
    }
    short = {"short_filter.weight": (36, 1, 4), "short_filter.bias": (36,)}
    inner = {"inner_filter.weight": (12, 1, 4), "inner_filter.bias": (12,)}
    names = linear | (short if "short" in filters else {}) | (inner if "inner" in filters else {})
    state = config(geometry="causal").build(site(Grid(3, 5))).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == names


def blurred(x, geometry, grid):
    """Half of each token and half of its neighbours' share, by the definition of the filters."""
    taps = torch.full([4] if geometry != "2d" else [4, 4], 0.5 / (3 if geometry != "2d" else 15))
    own = BEFORE.get(geometry, 2)
    taps[(own,) * taps.ndim] = 0.5
    weight = taps.expand(x.shape[-1], 1, *taps.shape)
    if geometry == "2d":
        return depthwise_2d_reference(x.unflatten(1, (grid.rows, grid.cols)), weight).flatten(1, 2)
    return depthwise_1d_reference(x, weight, before=own)


@every_config
@every_geometry
def test_inherited_it_starts_as_blurred_values(config, geometry):
    weights, layout = host_weights(), TokenLayout(Grid(5, 7))
    mixer = config(geometry=geometry).build(site(layout.grid))
    mixer.inherit(weights)
    x = torch.nn.functional.layer_norm(torch.randn(4, 35, DIM), (DIM,))
    v = blurred(torch.nn.functional.linear(x, *weights.v), geometry, layout.grid)
    # two gates of spread s multiply v by 1 +- sqrt(2) s
    assert_close("blurred", mixer(x, layout), torch.nn.functional.linear(v, *weights.out), 2 * GATE_SPREAD)


@every_config
def test_inherited_gates_keep_the_hosts_direction(config):
    weights = host_weights()
    mixer = config().build(site(Grid(5, 7)))
    mixer.inherit(weights)
    x = torch.nn.functional.layer_norm(torch.randn(4, 35, DIM), (DIM,))
    q, k, v = mixer.in_proj(x).chunk(3, dim=-1)
    for gate, (weight, _) in ((q, weights.q), (k, weights.k)):
        assert gate.mean().item() == pytest.approx(1, abs=0.02)
        assert gate.std().item() == pytest.approx(GATE_SPREAD, rel=0.2)
        direction = torch.nn.functional.linear(x, weight / weight.norm(dim=1, keepdim=True))
        assert_close("direction", (gate - 1) / GATE_SPREAD, direction, 1e-4)
    assert_close("values", v, torch.nn.functional.linear(x, *weights.v), 1e-6)


@every_config
@every_geometry
def test_inherited_it_points_where_attention_does(config, geometry):
    """More than the product of the host's projections does, on layer-normed, modulated tokens of smooth images."""
    grid, dim = Grid(8, 8), 64
    image = torch.nn.functional.interpolate(torch.randn(8, dim, 4, 4), size=8, mode="bilinear")
    x = torch.nn.functional.layer_norm(image.flatten(2).mT, (dim,)) * (1 + 0.3 * torch.randn(8, 1, dim))
    attention = Attention(dim, 4)
    q, k, v = zip(attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3), strict=True)
    mixer = config(geometry=geometry).build(site(grid, dim=dim))
    mixer.inherit(AttentionWeights(q, k, v, (attention.proj.weight, attention.proj.bias)))
    qkv = torch.stack(attention.qkv(x).chunk(3, dim=-1))

    def alignment(y):
        return torch.cosine_similarity((y - attention.proj.bias).flatten(), want.flatten(), dim=0)

    want = attention(x) - attention.proj.bias
    assert alignment(mixer(x, TokenLayout(grid))) > 2 * alignment(attention.proj(qkv.prod(0))).abs()


@every_config
def test_inherited_every_parameter_learns(config):
    mixer, x = config().build(site(Grid(3, 5))), torch.randn(2, 15, DIM)
    mixer.inherit(host_weights())
    mixer(x, TokenLayout(Grid(3, 5))).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_inheriting_from_a_host_without_biases():
    mixer = HyenaXConfig().build(site(Grid(3, 5)))
    mixer.inherit(host_weights(bias=False))
    assert not mixer.in_proj.bias[2 * DIM :].any()
    assert not mixer.out_proj.bias.any()


XL = site(Grid(16, 16), dim=1152)
# arXiv:2506.05340 Table 4, all 28 operators: change of operator FLOPs, of featurizer FLOPs, of parameters; percent
PUBLISHED = [
    (HyenaSEConfig, -99.03, 0.26, 0.434),
    (HyenaXConfig, -99.81, 0.26, 0.325),
    (HyenaYConfig, -99.03, 0, 0.108),
]


@pytest.mark.parametrize(("config", "mixing", "projection", "params"), PUBLISHED)
@pytest.mark.parametrize("geometry", ["causal", "centred"])
def test_cost_and_size_as_published(config, mixing, projection, params, geometry):
    ours, mha = config(geometry=geometry), parse_operator("mha")

    def change(measure):
        return 100 * (measure(ours) / measure(mha) - 1)

    def num_params(operator):
        with torch.device("meta"):
            return sum(p.numel() for p in operator.build(XL).parameters())

    assert change(lambda c: c.mixing_flops(XL)) == pytest.approx(mixing, abs=0.005)
    assert change(lambda c: c.projection_flops(XL)) == pytest.approx(projection, abs=0.005)
    assert change(num_params) == pytest.approx(params, abs=0.001)


def test_cost_of_2d_counts_all_taps():
    config = HyenaSEConfig(geometry="2d", kernel_size=3)
    assert config.mixing_flops(XL) == 20 * 256 * 1152
    assert config.projection_flops(XL) == 8 * 256 * 1152**2 + 54 * 256 * 1152


@every_config
@every_geometry
def test_bfloat16_autocast_and_checkpointing(config, geometry):
    layout = TokenLayout(Grid(3, 5))
    mixer = config(geometry=geometry).build(site(layout.grid))
    x = torch.randn(2, 15, DIM, requires_grad=True)
    inputs = (x, *mixer.parameters())
    want = mixer(x, layout)
    with torch.autocast("cpu", torch.bfloat16):
        got = checkpoint(mixer, x, layout, use_reentrant=False)
    assert got.dtype == torch.bfloat16
    assert_close("autocast", got.float(), want, 5e-2)
    pairs = zip(gradients(got.float(), inputs), gradients(want, inputs), strict=True)
    for a, b in pairs:
        assert_close("gradient", a, b, 0.1)
    low = mixer.bfloat16()(x.bfloat16(), layout)
    assert low.dtype == torch.bfloat16
    assert_close("bfloat16", low.float(), want, 5e-2)


def test_settings_that_are_refused():
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        HyenaXConfig(kernel_size=0)
    with pytest.raises(ValueError, match="centred"):
        parse_operator({"name": "hyena-x", "geometry": "4d"})
    with pytest.raises(ValueError, match="Extra inputs"):
        parse_operator({"name": "hyena-x", "d_model": 1152})


@every_config
def test_found_by_name(config):
    assert parse_operator(config().name) == config()


@pytest.fixture
def _untyped():
    """Shape checks are Python that torch.compile cannot trace whole."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.slow
@pytest.mark.usefixtures("_untyped")
@every_geometry
def test_compiles_whole(geometry):
    layout = TokenLayout(Grid(3, 5), before=2)
    mixer = HyenaSEConfig(geometry=geometry).build(site(layout.grid, num_text=2))
    x = torch.randn(2, 17, DIM, requires_grad=True)
    inputs = (x, *mixer.parameters())
    got, want = torch.compile(mixer, fullgraph=True)(x, layout), mixer(x, layout)
    assert_close("output", got, want, 1e-5)
    for a, b in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        assert_close("gradient", a, b, 1e-4)

"""MLP Hyena-X: definition, the number of tokens, cost; the contract is tested elsewhere."""

import pytest
import torch

from closeness import assert_close
from grafting.contract import Grid, MlpWeights, Site, TokenLayout
from grafting.errors import HostError
from grafting.operators import parse_operator
from grafting.operators.mlp_hyena import MLPHyenaXConfig

DIM = 12
FILTERS = ["shared", "per-token"]
every_choice = pytest.mark.parametrize("filters", FILTERS)


def site(grid, *, dim=DIM):
    return Site(role="mlp", block=0, path="mlp", dim=dim, hidden_dim=4 * dim, grid=grid)


def reference(mixer, x):
    """paper.md's formula, token by token, channel by channel and tap by tap."""
    taps, biases = mixer.short_filter.weight[:, 0], mixer.short_filter.bias
    tokens = []
    for t, projected in enumerate(mixer.in_proj(x).unbind(1)):
        own = t % len(taps)
        channels = []
        for c in range(projected.shape[1]):
            y = biases[own].expand(len(x))
            for j, tap in enumerate(taps[own].flip(0)):
                if c - j >= 0:
                    y = y + tap * projected[:, c - j]
            channels.append(y)
        filtered = torch.stack(channels, dim=1)
        q, k, v = filtered[:, : 2 * DIM], filtered[:, 2 * DIM : 4 * DIM], filtered[:, 4 * DIM :]
        tokens.append(mixer.out_proj(q * k * v))
    return torch.stack(tokens, dim=1)


def gradients(y, inputs):
    return torch.autograd.grad((y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum(), inputs)


@every_choice
@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(3, 5)])
@pytest.mark.parametrize("kernel_size", [1, 4])
def test_equals_its_definition(filters, grid, kernel_size):
    mixer = MLPHyenaXConfig(filters=filters, kernel_size=kernel_size).build(site(grid))
    x = torch.randn(2, grid.num_tokens, DIM, requires_grad=True)
    got, want = mixer(x, TokenLayout(grid)), reference(mixer, x)
    assert_close("output", got, want, 1e-5)
    inputs = {"x": x, **dict(mixer.named_parameters())}
    pairs = zip(gradients(got, list(inputs.values())), gradients(want, list(inputs.values())), strict=True)
    for name, (a, b) in zip(inputs, pairs, strict=True):
        assert_close(f"gradient of {name}", a, b, 1e-4)


def test_a_shared_filter_takes_any_number_of_tokens():
    mixer = MLPHyenaXConfig().build(site(Grid(3, 5)))
    x = torch.randn(2, 28, DIM)
    y = mixer(x, TokenLayout(Grid(4, 7)))
    assert_close("any token by itself", y[:, 20:21], mixer(x[:, 20:21], TokenLayout(Grid(1, 1))), 1e-5)


def test_filters_of_their_own_fix_the_number_of_tokens():
    mixer = MLPHyenaXConfig(filters="per-token").build(site(Grid(3, 5)))
    with pytest.raises(HostError, match="each of 15 tokens, and the model passes 28.*`filters: shared`"):
        mixer(torch.randn(2, 28, DIM), TokenLayout(Grid(4, 7)))


@pytest.mark.parametrize(("filters", "num_filters"), [("shared", 1), ("per-token", 15)])
def test_published_weights_load(filters, num_filters):
    state = MLPHyenaXConfig(filters=filters).build(site(Grid(3, 5))).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "in_proj.weight": (72, 12),
        "in_proj.bias": (72,),
        "short_filter.weight": (num_filters, 1, 4),
        "short_filter.bias": (num_filters,),
        "out_proj.weight": (12, 24),
        "out_proj.bias": (12,),
    }


def test_random_start_is_that_of_torch():
    mixer = MLPHyenaXConfig(filters="per-token").build(site(Grid(16, 16)))
    conv = torch.nn.Conv1d(256, 256, 4, groups=256)
    for ours, torchs in zip(mixer.short_filter.parameters(), conv.parameters(), strict=True):
        assert ours.abs().max() <= 0.5
        assert ours.std().item() == pytest.approx(torchs.std().item(), rel=0.2)


def host(hidden_dim, activation, *, bias=True):
    up, down = torch.nn.Linear(DIM, hidden_dim, bias=bias), torch.nn.Linear(hidden_dim, DIM, bias=bias)
    return MlpWeights((up.weight, up.bias), (down.weight, down.bias), activation)


def inherited(weights, filters="shared"):
    mixer = MLPHyenaXConfig(filters=filters).build(site(Grid(3, 5)))
    mixer.inherit(weights)
    return mixer


def mlp(x, weights):
    return torch.nn.functional.linear(
        weights.activation(torch.nn.functional.linear(x, *weights.up)), *weights.down
    )


@every_choice
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hidden_dim", [2 * DIM, DIM])
def test_inherited_parabolas_are_taken_as_they_are(filters, bias, hidden_dim):
    weights = host(hidden_dim, lambda x: 0.3 + 0.5 * x + 0.4 * x**2, bias=bias)
    x = torch.randn(2, 15, DIM)
    assert_close("output", inherited(weights, filters)(x, TokenLayout(Grid(3, 5))), mlp(x, weights), 1e-5)


def test_inherited_it_is_close_to_an_mlp_with_room_for_half_of_its_neurons():
    """On normal tokens, where one channel in two has a strong column; the rest of the error is gelu less its parabola."""
    weights = host(4 * DIM, torch.nn.functional.gelu)
    with torch.no_grad():
        weights.down[0][:, ::2] *= 0.01
    mixer, x = inherited(weights), torch.randn(64, 15, DIM)
    want = mlp(x, weights)
    error = (mixer(x, TokenLayout(Grid(3, 5))) - want).square().mean() / want.var((0, 1)).mean()
    assert error < 0.01


def test_inherited_every_parameter_learns():
    mixer = inherited(host(4 * DIM, torch.nn.functional.gelu))
    mixer(torch.randn(2, 15, DIM), TokenLayout(Grid(3, 5))).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


XL = site(Grid(16, 16), dim=1152)


@pytest.mark.parametrize(("ratio", "published"), [(0.5, "+0.01"), (0.75, "+0.02"), (1.0, "+0.02")])
def test_cost_as_published(ratio, published):
    """arXiv:2506.05340 Table 4, for the share of the blocks that is replaced; percent of an MLP's FLOPs."""
    (ours, projections), (mlp, _) = (parse_operator(n).table4_flops(XL) for n in ("mlp-hyena-x", "mlp"))
    assert f"{100 * ratio * (ours / mlp - 1):+.2f}" == published
    assert projections == 0


@pytest.mark.parametrize(("ratio", "published"), [(0.5, "+0.02"), (0.75, "+0.03"), (1.0, "+0.03")])
def test_size_as_published(ratio, published):
    config = MLPHyenaXConfig(filters="per-token")
    with torch.device("meta"):
        ours, mlp = (
            sum(p.numel() for p in c.build(XL).parameters()) for c in (config, parse_operator("mlp"))
        )
    assert mlp == 10_622_592
    assert ours - mlp == 3_584
    assert f"{100 * ratio * (ours / mlp - 1):+.2f}" == published


def test_all_work_is_counted():
    """The linears, two gates of width 2 D, and four taps on each of 6 D channels."""
    linears = 2 * (6 + 2) * 1152**2
    assert MLPHyenaXConfig().mixing_flops(XL) == 256 * (linears + 4 * 1152 + 48 * 1152)


def test_settings_that_are_refused():
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        MLPHyenaXConfig(kernel_size=0)
    with pytest.raises(ValueError, match="per-token"):
        parse_operator({"name": "mlp-hyena-x", "filters": "per-channel"})

"""Gated convolutions as kernels: the mixers on the host's projections, with global text; the contract is tested elsewhere."""

import pytest
import torch

from closeness import assert_close
from grafting.contract import AttentionCall, Grid, Site, TokenLayout
from grafting.functional.softmax import softmax_attention
from grafting.operators.gated_conv import GatedConvSEConfig, GatedConvXConfig, GatedConvYConfig
from grafting.operators.hyena import HyenaSEConfig, HyenaXConfig, HyenaYConfig

DIM, HEADS = 12, 3
PAIRS = [
    (GatedConvSEConfig, HyenaSEConfig),
    (GatedConvXConfig, HyenaXConfig),
    (GatedConvYConfig, HyenaYConfig),
]


def site(grid, num_text=0):
    order = ("rest", "image") if num_text else ("image",)
    call = AttentionCall(order=order)
    return Site(
        role="attention",
        block=0,
        path="attn",
        dim=DIM,
        num_heads=HEADS,
        grid=grid,
        num_text=num_text,
        attention=call,
    )


def heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def drawn(kernel):
    for parameter in kernel.parameters():
        torch.nn.init.normal_(parameter)
    return kernel.double()


def qkv(layout, batch=2):
    q = torch.randn(batch, HEADS, layout.num_queries, DIM // HEADS, dtype=torch.float64)
    return q, *(
        torch.randn(batch, HEADS, layout.num_tokens, DIM // HEADS, dtype=torch.float64) for _ in range(2)
    )


@pytest.mark.parametrize("geometry", ["centred", "causal", "2d", "3d"])
@pytest.mark.parametrize(("kernel_config", "mixer_config"), PAIRS)
def test_it_is_the_mixer_on_a_hosts_projections(kernel_config, mixer_config, geometry):
    grid = Grid(3, 4, frames=2)
    mixer = drawn(mixer_config(kernel_size=3, geometry=geometry).build(site(grid)))
    kernel = drawn(kernel_config(kernel_size=3, geometry=geometry).build(site(grid)))
    if mixer.short_filter is None:
        kernel.short_filter.set_identity()
    else:
        kernel.short_filter.load_state_dict(mixer.short_filter.state_dict())
    if mixer.inner_filter is not None:
        kernel.inner_filter.load_state_dict(mixer.inner_filter.state_dict())
    x = torch.randn(2, grid.num_tokens, DIM, dtype=torch.float64)
    q, k, v = map(heads, mixer.in_proj(x).chunk(3, dim=-1))
    mixed = kernel(q, k, v, TokenLayout(grid)).transpose(1, 2).flatten(2)
    assert_close("output", mixer.out_proj(mixed), mixer(x, TokenLayout(grid)), 1e-12)


@pytest.mark.parametrize("config", [kernel for kernel, _ in PAIRS])
def test_it_starts_as_values_blurred_over_their_neighbours(config):
    grid = Grid(16, 16)
    kernel = config(kernel_size=3, geometry="2d").build(site(grid)).double()
    q, k, v = qkv(TokenLayout(grid))
    blur = torch.full((3, 3), 0.5 / 8, dtype=torch.float64)
    blur[1, 1] = 0.5
    image = v.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, (16, 16))
    blurred = torch.nn.functional.conv2d(image, blur.expand(DIM, 1, 3, 3), padding=1, groups=DIM)
    blurred = heads(blurred.flatten(2).transpose(1, 2))
    ratio = kernel(q, k, v, TokenLayout(grid)) / blurred
    if config is not GatedConvYConfig:  # in Y the gated values are blurred
        assert_close("gates", ratio, (1 + 0.1 * q) * (1 + 0.1 * k), 1e-8)
    assert float((ratio.median() - 1).detach().abs()) < 0.05


@pytest.mark.parametrize(("before", "after"), [(3, 0), (0, 2), (3, 2)])
def test_text_sees_everything_and_is_seen_by_the_image(before, after):
    grid = Grid(3, 4)
    layout = TokenLayout(grid, before=before, after=after)
    kernel = drawn(GatedConvSEConfig().build(site(grid, num_text=before + after)))
    q, k, v = qkv(layout)
    mixed = kernel(q, k, v, layout)
    image, others = layout.split(mixed)
    (_, others_q), (image_q, _) = layout.split(q), layout.split(q)
    assert_close("text", others, softmax_attention(others_q, k, v), 1e-12)
    (image_k, others_k), (image_v, others_v) = layout.split(k), layout.split(v)
    alone = kernel(image_q, image_k, image_v, TokenLayout(grid))
    seen = kernel.others_weight[:, None, None] * softmax_attention(image_q, others_k, others_v)
    assert_close("image", image, alone + seen, 1e-12)


@pytest.mark.parametrize("config", [kernel for kernel, _ in PAIRS])
def test_masked_tokens_are_as_if_they_were_not_there(config):
    grid = Grid(3, 4)
    layout = TokenLayout(grid, before=4)
    kernel = drawn(config().build(site(grid, num_text=4)))
    q, k, v = qkv(layout)
    key_mask = torch.ones(2, layout.num_tokens, dtype=torch.bool)
    key_mask[0, 2:4] = False
    key_mask[1, :4] = False
    masked = kernel(q, k, v, TokenLayout(grid, before=4, key_mask=key_mask))
    short = torch.cat([torch.arange(2), torch.arange(4, layout.num_tokens)])
    alone = kernel(*(x[:1, :, short] for x in (q, k, v)), TokenLayout(grid, before=2))
    assert_close("two of four", masked[:1, :, short], alone, 1e-12)
    without = kernel(*(x[1:, :, 4:] for x in (q, k, v)), TokenLayout(grid))
    assert_close("none of four", masked[1:, :, 4:], without, 1e-12)


def test_queries_of_the_image_alone():
    grid = Grid(3, 4)
    kernel = drawn(GatedConvXConfig().build(site(grid, num_text=5)))
    layout = TokenLayout(grid, before=5)
    q, k, v = qkv(layout)
    whole = kernel(q, k, v, layout)
    image = kernel(q[:, :, 5:], k, v, TokenLayout(grid, before=5, image_queries=True))
    assert_close("image", image, whole[:, :, 5:], 1e-12)


def test_text_that_it_was_not_built_for_is_an_error():
    grid = Grid(3, 4)
    kernel = GatedConvXConfig().build(site(grid)).double()
    layout = TokenLayout(grid, before=2)
    with pytest.raises(ValueError, match="built for image tokens alone"):
        kernel(*qkv(layout), layout)


def test_flops():
    plain = site(Grid(4, 8))
    tokens = 32 * DIM
    assert GatedConvXConfig(kernel_size=4).mixing_flops(plain) == (2 + 2 * 3 * 4) * tokens
    assert GatedConvYConfig(kernel_size=4).mixing_flops(plain) == (2 + 2 * (3 + 4)) * tokens
    assert GatedConvSEConfig(kernel_size=3, geometry="2d").mixing_flops(plain) == (2 + 2 * 4 * 9) * tokens
    pairs = 5 * 32 + 5 * 37
    assert GatedConvXConfig().mixing_flops(site(Grid(4, 8), num_text=5)) == (2 + 24) * tokens + pairs * (
        4 * DIM + 2 * HEADS
    )

"""Hybrids: the weighted sum of their parts, what may be a part, faults, cost and schema; the contract is tested elsewhere."""

import jsonschema
import pytest
import torch

from closeness import assert_close
from grafting.contract import Grid, Site, TokenLayout
from grafting.operators import parse_operator
from grafting.operators.hybrid import HybridConfig

SITE = Site(role="attention", block=0, path="attn", dim=12, num_heads=3, grid=Grid(5, 7), num_text=2)


def inputs():
    return [torch.randn(2, 3, SITE.num_tokens, 4) for _ in range(3)]


def test_starts_as_the_mean_of_local_and_global():
    qkv = inputs()
    parts = [
        parse_operator(name).build(SITE)(*qkv, TokenLayout(SITE.grid, SITE.num_text))
        for name in ("window-2d", "linear")
    ]
    hybrid = HybridConfig().build(SITE)
    assert_close(
        "output", hybrid(*qkv, TokenLayout(SITE.grid, SITE.num_text)), (parts[0] + parts[1]) / 2, 1e-6
    )


def test_each_head_weighs_each_part():
    qkv = inputs()
    hybrid = HybridConfig(first="softmax", second={"name": "window-1d", "window": 2}).build(SITE)
    torch.nn.init.normal_(hybrid.gate)
    first, second = (
        part(*qkv, TokenLayout(SITE.grid, SITE.num_text), scale=0.3) for part in (hybrid.first, hybrid.second)
    )
    got = hybrid(*qkv, TokenLayout(SITE.grid, SITE.num_text), scale=0.3)
    for head in range(3):
        want = hybrid.gate[0, head] * first[:, head] + hybrid.gate[1, head] * second[:, head]
        assert_close("output", got[:, head], want, 1e-6)


def test_with_one_gate_shut_it_is_the_other_part():
    qkv, softmax = inputs(), parse_operator("softmax").build(SITE)
    hybrid = HybridConfig(first="linear", second="softmax").build(SITE)
    with torch.no_grad():
        hybrid.gate.copy_(torch.tensor([[0.0], [1.0]]))
    assert torch.equal(
        hybrid(*qkv, TokenLayout(SITE.grid, SITE.num_text)),
        softmax(*qkv, TokenLayout(SITE.grid, SITE.num_text)),
    )


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("hyena-x", "hyena-x is a mixer; the parts of a hybrid are kernels: gated-conv-se"),
        ("hybrid", "parts of a hybrid cannot be hybrids themselves"),
        (
            {"name": "linear", "projections": "random"},
            "linear has projections 'random', but both parts share those of the hybrid",
        ),
        ({"name": "linear", "conv": 0}, "greater than 0"),
        ("linnear", "no operator 'linnear'"),
    ],
)
@pytest.mark.parametrize("place", ["first", "second"])
def test_what_cannot_be_a_part_is_said(part, message, place):
    with pytest.raises(ValueError, match=message):
        parse_operator({"name": "hybrid", place: part})


def test_faults_of_both_parts():
    config = HybridConfig(first={"name": "window-2d", "radius": 3}, second={"name": "linear", "conv": 4})
    assert config.faults(SITE) == [
        "first: radius 3 spans 2 * 3 + 1 = 7 > 5 rows; use radius 2 or less",
        "second: conv 4 is even and has no centre: use 3 or 5",
    ]


def test_cost_is_that_of_both_parts_and_the_gates():
    def flops(settings):
        return parse_operator(settings).mixing_flops(SITE)

    assert flops("hybrid") == flops("window-2d") + flops("linear") + 4 * 37 * 12
    assert HybridConfig().projection_flops(SITE) == parse_operator("softmax").projection_flops(SITE)


def test_the_projections_are_those_of_the_hybrid():
    randomised = HybridConfig().randomised()
    assert randomised.projections == "random"
    assert randomised.first.projections == randomised.second.projections == "kept"


def test_nested_settings_survive_json():
    config = HybridConfig(first={"name": "window-1d", "window": 3}, second={"name": "linear", "conv": 3})
    assert parse_operator(config.model_dump(mode="json")) == config
    assert type(config).model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("settings", "fits"),
    [
        ({"name": "hybrid"}, True),
        ({"name": "hybrid", "first": "ttt", "second": {"name": "linear", "conv": 3}}, True),
        ({"name": "hybrid", "first": "hyena-x"}, False),
        ({"name": "hybrid", "first": "hybrid"}, False),
        ({"name": "hybrid", "first": {"name": "linear", "radius": 3}}, False),
    ],
)
def test_schema_for_editors(settings, fits):
    validator = jsonschema.Draft202012Validator(HybridConfig.model_json_schema())
    assert validator.is_valid(settings) == fits


def test_parts_see_the_grid():
    """A frame of one row makes window-2d another function, so the layout has to reach it."""
    layouts = [TokenLayout(Grid(6, 6), before=1), TokenLayout(Grid(1, 36), before=1)]
    hybrid, qkv = HybridConfig().build(SITE), inputs()
    a, b = (hybrid(*qkv, layout) for layout in layouts)
    assert (a - b).abs().max() > 1e-3

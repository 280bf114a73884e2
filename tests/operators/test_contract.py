"""What every operator promises, tried on every operator there is: a new file in `operators/` is tested by existing."""

import json
from dataclasses import replace

import jaxtyping
import pytest
import torch
from pydantic import ValidationError
from torch.utils.checkpoint import checkpoint

from closeness import assert_close
from grafting.contract import Grid, KernelConfig, Site, TokenLayout
from grafting.operators import operator_configs, parse_operator
from hiddenweights import hide_weights
from operatorcases import (
    DIM,
    KERNELS,
    LAYOUTS,
    NUM_HEADS,
    built,
    describe,
    every_fit,
    every_operator,
    every_variant,
    inputs_for,
    ordinary,
    site_for,
)


def tokens_first(y, config):
    """[L, B, ...] for both kinds of operator."""
    return y.permute(2, 0, 1, 3) if isinstance(config, KernelConfig) else y.transpose(0, 1)


def is_causal(config):
    settings = config.model_dump()
    return "causal" in (settings.get("geometry"), settings.get("direction")) or settings.get("causal", False)


def test_the_operators_of_this_package_are_found():
    assert {"linear", "softmax", "window-1d", "window-2d"} <= operator_configs().keys()


@every_variant
def test_an_ordinary_site_has_no_faults(config):
    assert config.faults(site_for(config)) == []


@every_fit
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_keeps_shape_and_dtype_and_has_finite_gradients(config, layout, dtype):
    operator, inputs = built(config, layout).to(dtype), inputs_for(config, layout, dtype=dtype)
    y = operator(*inputs, layout)
    assert y.shape == inputs[-1].shape
    assert y.dtype == dtype
    assert y.isfinite().all()
    y.float().square().sum().backward()
    for name, tensor in (*operator.named_parameters(), *((f"input {i}", x) for i, x in enumerate(inputs))):
        assert tensor.grad is not None, f"{name} has no gradient"
        assert tensor.grad.isfinite().all(), f"the gradient of {name} is not finite"


@every_fit
def test_samples_of_a_batch_do_not_meet(config, layout):
    operator, inputs = built(config, layout), inputs_for(config, layout, batch=3)
    together = operator(*inputs, layout)
    for i in range(3):
        alone = operator(*(x[i : i + 1] for x in inputs), layout)
        assert_close(f"sample {i}", together[i : i + 1], alone, 1e-5)


@every_variant
def test_causality_is_as_declared(config):
    """A change of the later tokens reaches an earlier one exactly if the operator does not say that it is causal."""
    layout, place = ordinary(config), 30
    operator, inputs = built(config), inputs_for(config, layout)
    changed = [x.detach().clone() for x in inputs]
    for x in changed:
        tokens_first(x, config)[place + 1 :] += 1
    before, after = (tokens_first(operator(*xs, layout), config)[: place + 1] for xs in (inputs, changed))
    if is_causal(config) or "mlp" in config.roles:
        assert torch.equal(before, after)
    else:
        assert (before[place] - after[place]).abs().max() > 1e-4


@every_variant
def test_gradient_checkpointing_changes_nothing(config):
    operator, inputs = built(config), inputs_for(config, ordinary(config))
    plain = operator(*inputs, ordinary(config))
    recomputed = checkpoint(operator, *inputs, ordinary(config), use_reentrant=False)
    assert torch.equal(plain, recomputed)
    gradients = [torch.autograd.grad(y.sum(), inputs) for y in (plain, recomputed)]
    for want, got in zip(*gradients, strict=True):
        assert torch.equal(want, got)


@every_variant
@torch.no_grad()
def test_weights_are_read_by_the_module_that_has_them_alone(config):
    """What offloads or casts weights brings them in when their module is called: no part reads those of another."""
    operator, inputs = built(config), inputs_for(config, ordinary(config))
    want = operator(*inputs, ordinary(config))
    hide_weights(operator, torch.half)
    assert torch.equal(operator(*inputs, ordinary(config)), want)


@every_variant
def test_config_survives_json(config):
    assert parse_operator(json.loads(json.dumps(config.model_dump()))) == config


@every_variant
def test_weights_load_strictly_into_a_fresh_operator(config):
    operator, fresh = built(config), config.build(site_for(config))
    fresh.load_state_dict(operator.state_dict(), strict=True)
    inputs = inputs_for(config, ordinary(config))
    assert torch.equal(operator(*inputs, ordinary(config)), fresh(*inputs, ordinary(config)))


@every_variant
def test_work_is_counted_in_whole_numbers(config):
    site = site_for(config)
    for flops in (config.mixing_flops(site), config.projection_flops(site), *config.table4_flops(site)):
        assert isinstance(flops, int)
        assert flops >= 0
    assert config.mixing_flops(site) > 0


@every_variant
def test_randomised_takes_nothing_from_the_host(config):
    randomised = config.randomised()
    assert "random" in randomised.model_dump().values()
    assert randomised.randomised() == randomised
    randomised.build(site_for(randomised))


@every_operator
def test_an_unknown_setting_is_refused(config):
    with pytest.raises(ValidationError, match="no_such_setting"):
        parse_operator({"name": config.name, "no_such_setting": 1})


@every_operator
def test_its_name_alone_means_its_defaults(config):
    assert parse_operator(config.name) == config


@every_operator
def test_every_setting_is_described(config):
    fields = {key: field for key, field in type(config).model_fields.items() if key != "name"}
    assert [key for key, field in fields.items() if not field.description] == []
    assert type(config).__doc__


@pytest.fixture
def _unchecked_shapes():
    """Dynamo cannot trace the checks of shapes that the tests put around every function."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.slow
@pytest.mark.usefixtures("_unchecked_shapes")
@every_variant
@pytest.mark.parametrize("number", [0, 1])
def test_compiles_as_one_graph(config, number):
    fits = [layout for layout in (*LAYOUTS[1:4:2], *LAYOUTS) if not config.faults(site_for(config, layout))]
    layout = fits[min(number, len(fits) - 1)]
    torch.compiler.reset()
    operator, inputs = built(config, layout), inputs_for(config, layout)
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    want, got = operator(*inputs, layout), compiled(*inputs, layout)
    assert_close("output", got, want, 1e-5)
    gradients = [torch.autograd.grad(y.square().sum(), inputs) for y in (want, got)]
    for i, (want_gradient, got_gradient) in enumerate(zip(*gradients, strict=True)):
        assert_close(f"gradient of input {i}", got_gradient, want_gradient, 1e-4)


def test_faults_of_windows_say_what_would_fit():
    site = Site(role="attention", block=0, path="attn", dim=DIM, num_heads=NUM_HEADS, grid=Grid(8, 6))
    assert parse_operator({"name": "window-2d", "radius": 4}).faults(site) == [
        "radius 4 spans 2 * 4 + 1 = 9 > 8 rows; use radius 2 or less",
        "radius 4 spans 2 * 4 + 1 = 9 > 6 columns; use radius 2 or less",
    ]
    assert parse_operator({"name": "window-1d", "window": 24}).faults(site) == [
        "window 24 spans 2 * 24 + 1 = 49 > 48 image tokens; use window 23 or less"
    ]
    assert parse_operator({"name": "window-1d", "window": 23}).faults(site) == []


def test_an_even_filter_of_linear_attention_is_a_fault():
    config = parse_operator({"name": "linear", "conv": 4})
    assert config.faults(site_for(config)) == ["conv 4 is even and has no centre: use 3 or 5"]


@pytest.mark.parametrize(
    "settings",
    [{"name": "window-1d", "window": 0}, {"name": "window-2d", "radius": -1}, {"name": "linear", "conv": 0}],
)
def test_sizes_must_be_positive(settings):
    with pytest.raises(ValidationError, match="greater than 0"):
        parse_operator(settings)


def test_work_of_the_kernels_as_the_paper_counts_it():
    """At 256 tokens, width 1152 and 16 heads, relative to the L^2 (4 D + 2 H) of softmax (arXiv:2506.05340, Table 4)."""
    site = Site(role="attention", block=0, path="attn", dim=1152, num_heads=16, grid=Grid(16, 16))
    softmax = parse_operator("softmax").mixing_flops(site)

    def share(settings):
        return parse_operator(settings).mixing_flops(site) / softmax

    assert share({"name": "window-1d", "window": 4}) == 9 / 256
    assert share({"name": "window-2d", "radius": 3}) == 49 / 256
    pair = 4 * 1152 + 2 * 16
    assert share("linear") == pytest.approx(4 * 72 * 1152 / (256 * pair))
    assert share({"name": "linear", "conv": 5}) == pytest.approx((4 * 72 + 2 * 25) * 1152 / (256 * pair))


def test_text_tokens_are_counted_as_global():
    site = Site(role="attention", block=0, path="attn", dim=1, num_heads=1, grid=Grid(10, 10), num_text=7)
    flops = parse_operator({"name": "window-1d", "window": 4}).mixing_flops(site)
    assert flops == (4 + 2) * (100 * (9 + 7) + 7 * 107)


@pytest.mark.parametrize("config", KERNELS, ids=describe)
def test_hidden_keys_are_as_if_they_were_not_there(config):
    """Two samples that hide different tokens beside the image give what each gives without them."""
    layout = LAYOUTS[-1]
    operator, (q, k, v) = built(config, layout), inputs_for(config, layout)
    mask = torch.ones(2, layout.num_tokens, dtype=torch.bool)
    mask[0, [1, -1]] = mask[1, [-2, -1]] = False
    together = operator(q, k, v, replace(layout, key_mask=mask))
    for i, (before, after) in enumerate([(1, 2), (2, 1)]):
        seen = [x[i : i + 1, :, mask[i]] for x in (q, k, v)]
        alone = operator(*seen, TokenLayout(layout.grid, before, after))
        assert_close(f"sample {i}", together[i : i + 1, :, mask[i]], alone, 1e-5)


@pytest.mark.parametrize("config", KERNELS, ids=describe)
def test_hidden_image_tokens_are_not_seen(config):
    layout = LAYOUTS[-1]
    operator, (q, k, v) = built(config, layout), inputs_for(config, layout)
    mask = torch.ones(2, layout.num_tokens, dtype=torch.bool)
    mask[1, layout.before + 7] = False
    masked = replace(layout, key_mask=mask)
    want = operator(q, k, v, masked)
    k, v = (torch.where(mask[:, None, :, None], x, 3.0) for x in (k, v))
    got = operator(q, k, v, masked)
    seen = mask[:, None, :, None].expand_as(want)
    assert_close("output", got[seen], want[seen], 1e-5)
    assert got.isfinite().all()


@pytest.mark.parametrize("config", KERNELS, ids=describe)
def test_queries_of_the_image_alone_give_what_they_give_among_all(config):
    layout = LAYOUTS[-1]
    operator, (q, k, v) = built(config, layout), inputs_for(config, layout)
    mask = torch.ones(2, layout.num_tokens, dtype=torch.bool)
    mask[1, -1] = False
    image = layout.image_slice
    for key_mask in (None, mask):
        whole = operator(q, k, v, replace(layout, key_mask=key_mask))
        alone = replace(layout, key_mask=key_mask, image_queries=True)
        assert_close("output", operator(q[:, :, image], k, v, alone), whole[:, :, image], 1e-5)

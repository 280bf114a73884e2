"""The generic host: Flux, which is it with a spec, and models that a user describes."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import CogView3PlusTransformer2DModel
from torch import nn

from grafting.contract import Grid, TokenLayout
from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import build_operators, graft, place
from grafting.errors import HostError, PlanError
from grafting.hosts import (
    BlockList,
    LatentTokens,
    LayoutTracker,
    PackedTokens,
    SdpaHost,
    SdpaSpec,
    host_of,
    hosts,
    load_spec,
)
from grafting.hosts._host import randomise
from grafting.hosts._spec import MlpLayers, Time

FLUX, WAN = hosts()["flux"], hosts()["wan"]
GRID = Grid(rows=4, cols=6)
NUM_TEXT = 5


def plan(operator, blocks="all") -> Plan:
    return Plan(edits=(Replace(role="attention", blocks=blocks, operator=operator),))


@pytest.fixture
def flux():
    return FLUX.tiny().eval()


@pytest.fixture
def inputs(flux):
    return FLUX.example(flux, rows=GRID.rows, cols=GRID.cols, batch_size=2)


def test_flux_blocks_are_counted_through_both_lists(flux):
    sites = FLUX.sites(flux)
    assert [(s.block, s.path) for s in sites] == [
        (0, "transformer_blocks.0.attn"),
        (0, "transformer_blocks.0.ff"),
        (1, "transformer_blocks.1.attn"),
        (1, "transformer_blocks.1.ff"),
        (2, "single_transformer_blocks.0.attn"),
    ]
    assert {(s.role, s.dim, s.num_heads, s.hidden_dim, s.num_text) for s in sites} == {
        ("attention", 32, 2, 0, 512),
        ("mlp", 32, 0, 128, 0),
    }


def test_flux_layout_has_text_first_and_the_grid_of_the_positions(flux, inputs):
    assert FLUX.image_grid(flux, inputs) == GRID
    layout = FLUX.sites(flux)[0].attention.layout(GRID, GRID.num_tokens + NUM_TEXT, {})
    assert layout == TokenLayout(GRID, before=NUM_TEXT)
    turned = FLUX.example(flux, rows=GRID.cols, cols=GRID.rows, batch_size=1)
    assert FLUX.image_grid(flux, turned) == Grid(GRID.cols, GRID.rows)
    batched = inputs | {"img_ids": inputs["img_ids"].expand(2, -1, -1)}
    assert FLUX.image_grid(flux, batched) == GRID


def test_positions_that_are_no_grid_are_an_error(flux, inputs):
    inputs["img_ids"] = inputs["img_ids"].flip(0)
    with pytest.raises(
        HostError, match="img_ids is not one grid in raster order: 24 image tokens, 4 rows and 6"
    ):
        FLUX.image_grid(flux, inputs)


def test_a_given_grid_is_checked_against_the_tokens(flux, inputs):
    host = FLUX.at_grid(GRID)
    graft(flux, plan({"name": "window-2d", "radius": 1}), host=host)
    assert host_of(flux) is host
    flux(**inputs)
    wrong = FLUX.example(flux, rows=5, cols=6, batch_size=1)
    with pytest.raises(
        HostError, match=r"flux: 30 image tokens, but its host was made for Grid\(rows=4, cols=6"
    ):
        flux(**wrong)


def test_a_window_does_not_fit_the_grid_that_the_host_was_made_for(flux):
    with pytest.raises(PlanError, match="3 > 2 columns"):
        graft(flux, plan({"name": "window-2d", "radius": 1}), host=FLUX.at_grid(Grid(8, 2)))


@pytest.mark.parametrize("path", ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"])
def test_a_window_keeps_text_tokens_global(flux, inputs, path):
    """In one joint attention, d(output of token i) / d(input of token j) is zero only outside of the window."""
    graft(flux, plan({"name": "window-2d", "radius": 1}))
    flux(**inputs)  # sets the layout
    LayoutTracker.of(flux).stays = True
    text, image = torch.randn(1, NUM_TEXT, 32), torch.randn(1, GRID.num_tokens, 32)
    attention = flux.get_submodule(path)

    def attend(text, image):
        if path.startswith("single"):
            return attention(hidden_states=torch.cat([text, image], 1))[0]
        image_out, text_out = attention(hidden_states=image, encoder_hidden_states=text)
        return torch.cat([text_out, image_out], 1)[0]

    by_text, by_image = torch.autograd.functional.jacobian(lambda *x: attend(*x).sum(-1), (text, image))
    reached = torch.cat([by_text[:, 0], by_image[:, 0]], dim=1).abs().amax(-1) > 0  # [L, L]
    row, col = torch.arange(GRID.num_tokens) // GRID.cols, torch.arange(GRID.num_tokens) % GRID.cols
    near = ((row[:, None] - row).abs() <= 1) & ((col[:, None] - col).abs() <= 1)
    assert reached[:NUM_TEXT].all(), "text sees everything"
    assert reached[:, :NUM_TEXT].all(), "text is seen by everything"
    assert torch.equal(reached[NUM_TEXT:, NUM_TEXT:], near)


def test_mixers_and_mlps_are_refused_with_every_block(flux):
    edits = [Replace(role="attention", operator="hyena-x"), Replace(role="mlp", blocks=2, operator="mlp")]
    with pytest.raises(PlanError) as caught:
        graft(flux, Plan(edits=edits))
    message = str(caught.value)
    assert message.startswith("2 faults in plan for host 'flux' (blocks 0..2)")
    assert "blocks 0, 1, 2: hyena-x is a mixer, and the host takes only kernels for this attention" in message
    assert "block 2 has no replaceable mlp" in message
    assert not flux._forward_pre_hooks


def test_flux_predicts_unpacked_images(flux, inputs):
    x_t = torch.randn(2, 4, 2 * GRID.rows, 2 * GRID.cols)
    condition = {name: inputs[name] for name in ("encoder_hidden_states", "pooled_projections")}
    graft(flux, plan("softmax"))
    got = FLUX.predict(flux, x_t, inputs["timestep"], condition)
    assert got.shape == x_t.shape
    tokens = (
        F.pixel_unshuffle(x_t, 2).flatten(2).transpose(1, 2)
    )  # diffusers' own order: channel, row, column
    want = flux(**(inputs | {"hidden_states": tokens})).sample
    assert torch.equal(F.pixel_shuffle(want.transpose(1, 2).unflatten(2, (GRID.rows, GRID.cols)), 2), got)


COGVIEW = SdpaHost(
    SdpaSpec(
        name="cogview",
        model_class="diffusers:CogView3PlusTransformer2DModel",
        blocks=(BlockList(path="transformer_blocks", attention="attn1"),),
        order=("rest", "image"),
        native_grid=Grid(8, 8),
        native_num_text=77,
    )
)


@pytest.fixture
def cogview():
    model = CogView3PlusTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=24,
        time_embed_dim=12,
        condition_dim=8,
        pos_embed_max_size=16,
        sample_size=16,
    )
    return randomise(model).eval()


def cogview_condition():
    places = {name: torch.zeros(2, 2) for name in ("original_size", "target_size", "crop_coords")}
    return {"encoder_hidden_states": torch.randn(2, NUM_TEXT, 24), **places}


def test_a_users_spec_grafts_a_class_that_is_no_host(cogview):
    x_t, t, condition = torch.randn(2, 4, 8, 12), torch.rand(2), cogview_condition()
    with pytest.raises(
        HostError, match=r"no host for a model of class CogView3PlusTransformer2DModel.*host=SdpaHost"
    ):
        graft(cogview, plan("softmax"))
    assert isinstance(cogview, COGVIEW.model_class)
    with torch.no_grad():
        before = COGVIEW.predict(cogview, x_t, t, condition)
        record = graft(cogview, plan("softmax"), host=COGVIEW)
        assert torch.equal(COGVIEW.predict(cogview, x_t, t, condition), before)
        operator = next(iter(record.operators.values()))
        layout = operator.tracker.layout(operator.site, GRID.num_tokens + NUM_TEXT)
        assert layout == TokenLayout(GRID, before=NUM_TEXT)
        record.undo()
        assert not cogview._forward_pre_hooks
        place(cogview, build_operators(cogview, plan({"name": "window-2d", "radius": 1}), host=COGVIEW))
        assert not torch.allclose(COGVIEW.predict(cogview, x_t, t, condition), before)


def test_a_spec_that_does_not_fit_says_where(cogview):
    blocks = (BlockList(path="blocks", attention="attn"),)
    host = SdpaHost(COGVIEW.spec.model_copy(update={"blocks": blocks}))
    with pytest.raises(
        HostError, match=r"spec 'cogview' does not fit CogView3PlusTransformer2DModel: .*blocks"
    ):
        graft(cogview, plan("softmax"), host=host)
    host = SdpaHost(COGVIEW.spec.model_copy(update={"num_heads": "config.n_head"}))
    with pytest.raises(HostError, match=r"does not fit .*n_head"):
        graft(cogview, plan("softmax"), host=host)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"image": LatentTokens(argument="latent")},
            "image.argument says 'latent', and its forward takes hidden",
        ),
        ({"time": Time(argument="t")}, "time.argument says 't', and its forward takes hidden_states"),
        (
            {"mlp": MlpLayers(up="net.0.up", down="net.2")},
            "mlp.up says 'net.0.up', and net.0 is a GELU, which has proj",
        ),
        ({"mlp": MlpLayers(up="in", down="net.2")}, "mlp.up says 'in', and a FeedForward has net"),
        ({"mlp": MlpLayers(up="net.0.proj", down="net.9")}, "mlp.down says 'net.9', and net is a ModuleList"),
    ],
)
def test_a_key_of_a_spec_that_names_what_is_not_there_is_one_error(cogview, change, says):
    blocks = (COGVIEW.spec.blocks[0].model_copy(update={"mlp": "ff"}),)
    host = SdpaHost(COGVIEW.spec.model_copy(update={"blocks": blocks, **change}))
    with pytest.raises(HostError, match=f"spec 'cogview' does not fit .*: {says}"):
        graft(cogview, plan("softmax"), host=host)


def test_projections_that_are_not_there_are_one_error():
    host = SdpaHost(COGVIEW.spec.model_copy(update={"projections": ("q", "k", "v", "out")}))
    for ask in (host.attention_weights, host.output_layer):
        with pytest.raises(HostError, match=r"projections says '(q|out)', and a Linear has no parts"):
            ask(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"native_grid": {"rows": -4, "cols": 4}}, r"native_grid: Grid\(rows=-4.* has no tokens"),
        ({"name": "../x"}, "name: a host's name is a word, and no path"),
        ({"name": ""}, "name: a host's name is a word, and no path"),
        ({"name": "dit"}, "name: there is a host 'dit' already, of DiT: give the spec another name"),
        ({"num_heads": 0}, "num_heads.*greater than 0"),
        ({"native_num_text": -1}, "native_num_text: .*greater than or equal to 0"),
        ({"blocks": [{"path": "b", "attention": "mlp", "mlp": "mlp"}]}, "they are two modules"),
        ({"blocks": [{"path": "b", "attention": "ff", "mlp": "ff.mlp"}]}, "they are two modules"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(tmp_path, change, says):
    facts = COGVIEW.spec.model_dump(mode="json") | change
    (tmp_path / "spec.yaml").write_text(json.dumps(facts))
    with pytest.raises(HostError, match=says):
        load_spec(tmp_path / "spec.yaml")


def test_an_attention_that_makes_no_call_is_an_error(cogview):
    blocks = (BlockList(path="transformer_blocks", attention="ff"),)
    host = SdpaHost(COGVIEW.spec.model_copy(update={"blocks": blocks}))
    graft(cogview, plan("softmax"), host=host)
    with pytest.raises(
        HostError,
        match=r"transformer_blocks.0.ff: FeedForward called scaled_dot_product_attention 0 times",
    ):
        COGVIEW.predict(cogview, torch.randn(2, 4, 8, 12), torch.rand(2), cogview_condition())


def test_what_a_spec_does_not_say_is_refused():
    for ask in (
        COGVIEW.tiny,
        lambda: COGVIEW.mlp_weights(nn.Identity()),
        lambda: COGVIEW.attention_weights(nn.Identity()),
    ):
        with pytest.raises(HostError, match="the spec of host 'cogview' does not declare"):
            ask()


def test_latents_of_videos_have_frames():
    image = LatentTokens(argument="latent", patch_size=(1, 2, 2))
    host = SdpaHost(COGVIEW.spec.model_copy(update={"image": image}))
    video = {"latent": torch.zeros(1, 4, 3, 8, 12)}
    assert host.image_grid(nn.Identity(), video) == Grid(rows=4, cols=6, frames=3)


def test_windows_of_a_video_stay_in_their_frame():
    """d(output of token i) / d(input of token j) of Wan's attention; its positions are rotations, its text is elsewhere."""
    wan, grid = WAN.tiny().eval(), Grid(rows=3, cols=4, frames=2)
    inputs = WAN.example(wan, rows=3, cols=4, batch_size=1)
    inputs["hidden_states"] = torch.randn(1, 4, 2, 6, 8)
    graft(wan, plan({"name": "window-2d", "radius": 1}))
    wan(**inputs)
    LayoutTracker.of(wan).stays = True
    assert WAN.image_grid(wan, inputs) == grid
    rotary = wan.rope(inputs["hidden_states"])
    attention = wan.get_submodule("blocks.0.attn1")
    x = torch.randn(1, grid.num_tokens, 32)
    by_token = torch.autograd.functional.jacobian(lambda x: attention(x, None, None, rotary).sum(-1)[0], x)
    reached = by_token[:, 0].abs().amax(-1) > 0
    place = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4))
    frame, row, col = (place[:, None] - place).abs().unbind(-1)
    assert torch.equal(reached, (frame == 0) & (row <= 1) & (col <= 1))


def test_specs_are_data():
    spec = FLUX.spec
    assert SdpaSpec.model_validate_json(spec.model_dump_json()) == spec
    assert isinstance(spec.image, PackedTokens)
    with pytest.raises(ValueError, match="blocks"):
        SdpaSpec(name="x", model_class="x:X", blocks=(), image=LatentTokens(), native_grid=Grid(1, 1))

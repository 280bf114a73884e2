"""Tracing: what each attention of a transformer is seen to hold, and the spec that follows."""

import json
import re
from types import MethodType

import diffusers
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from grafting.cli import app
from grafting.contract import Grid, ModuleCall
from grafting.editing.plan import Merge, Plan, Replace
from grafting.editing.surgery import graft
from grafting.errors import HostError, PlanError
from grafting.hosts import load_spec, trace
from grafting.hosts._forwards import _mask_seen, perturbed, unmixed_forward
from grafting.hosts._observing import AttentionCall, Axis, Run, observe
from grafting.weights.tensors import save_tensors
from hosts import pipelines
from hosts.zoo import COLS, FRAMES, ROWS, TEXT, Specimen, specimens, text

NUM_IMAGE = ROWS * COLS
IMAGE, TEXT_RUN = Run("image", NUM_IMAGE), Run("text", TEXT, "encoder_hidden_states")
VIDEO = Run("image", FRAMES * NUM_IMAGE)
LATENT = (Axis(2, 2 * ROWS, ROWS), Axis(3, 2 * COLS, COLS))
PACKED = (Axis(1, NUM_IMAGE, NUM_IMAGE),)
OF_VIDEO = (Axis(2, FRAMES, FRAMES), Axis(3, 2 * ROWS, ROWS), Axis(4, 2 * COLS, COLS))
TURNED = (Axis(1, FRAMES, FRAMES), *OF_VIDEO[1:])

# by class: what its attention over the image sees, and along which axes
SEEN = {
    "Flux": ("joint", (TEXT_RUN, IMAGE), PACKED),
    "SD3": ("joint", (IMAGE, TEXT_RUN), LATENT),
    "PixArt": ("self", (IMAGE,), LATENT),
    "Wan": ("self", (VIDEO,), OF_VIDEO),
    "CogVideoX": ("joint", (TEXT_RUN, VIDEO), TURNED),
    "QwenImage": ("joint", (TEXT_RUN, IMAGE), PACKED),
    "LTXVideo": ("self", (VIDEO,), (Axis(1, 48, 48),)),
    "AuraFlow": ("joint", (Run("other", 8), TEXT_RUN, IMAGE), LATENT),
    "HunyuanVideo": ("joint", (VIDEO, TEXT_RUN), OF_VIDEO),
}


def specimen(name: str) -> Specimen:
    """By the beginning of its class's name."""
    return next(s for s in specimens() if s.name.startswith(f"{name}Transformer"))


def image_calls(model: nn.Module, inputs: dict) -> list[AttentionCall]:
    return [call for call in observe(model, inputs).calls if call.kind in ("self", "joint", "mixed")]


_SLOW = ("CogVideoX", "AuraFlow", "HunyuanVideo")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in _SLOW else n for n in SEEN])
def test_whose_tokens_an_attention_sees_and_where_they_lie(name):
    kind, runs, axes = SEEN[name]
    calls = image_calls(specimen(name).model(), specimen(name).example())
    assert calls
    for call in calls:
        assert (call.kind, call.queries, call.keys) == (kind, runs, runs)
        assert (call.axes, call.raster) == (axes, True)
        assert (call.num_heads, call.num_kv_heads, call.head_dim, call.causal) == (2, 2, 16, False)


def test_queries_of_the_image_alone():
    for call in image_calls(specimen("PRX").model(), specimen("PRX").example()):
        assert (call.kind, call.queries, call.keys) == ("mixed", (IMAGE,), (TEXT_RUN, IMAGE))


def test_a_mask_of_all_that_hides_where_a_prompt_is_padded():
    subject = specimen("PixArt")
    model, inputs = subject.model(), subject.example()
    to_text = [call for call in observe(model, inputs).calls if call.kind == "cross"]
    assert {(call.mask, call.mask_padded) for call in to_text} == {("all true", "of keys")}
    inputs["encoder_attention_mask"][0, -2:] = 0
    assert [call.mask for call in unmixed_forward(model, inputs).calls] == ["none", "of keys"] * 2


def test_a_mask_of_padding_that_sees_itself_is_one_of_keys():
    """Samples packed side by side see their own tokens alone; so does padding."""
    segments = torch.tensor([1, 1, 1, 1, 0, 0])
    here = torch.arange(6)
    masks = {
        "of keys": segments[:, None] == segments,
        "of pairs": here[:, None] >= here,
        "all true": segments[:, None] >= -1,
    }
    assert {word: _mask_seen(mask[None, None]) for word, mask in masks.items()} == {
        word: word for word in masks
    }
    assert _mask_seen((here[:, None] - here).abs() < 2) == "of pairs"
    assert _mask_seen((segments == 1)[None, None, None]) == "of keys"


def test_no_token_is_mixed_with_another():
    """A change of one image place changes one image token of every attention, and no text."""
    subject = specimen("SD3")
    model, inputs = subject.model(), subject.example()
    moved = perturbed(inputs, "hidden_states", axis=3, chosen=[0, 1])  # the first column of patches
    pairs = zip(unmixed_forward(model, inputs).calls, unmixed_forward(model, moved).calls, strict=True)
    for before, after in pairs:
        changed = (before.values[0] != after.values[0]).any(-1)
        assert changed.nonzero().flatten().tolist() == list(range(0, NUM_IMAGE, COLS))


def test_inputs_model_and_random_numbers_stay_as_they_were():
    subject = specimen("PixArt")
    model, inputs = subject.model().train(), subject.example()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    trace(model, example=inputs)
    assert torch.equal(torch.rand(1), want)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(inputs[n], v) for n, v in subject.example().items() if isinstance(v, torch.Tensor))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_spec_is_proposed_with_conventions():
    subject = specimen("Wan")
    traced = trace(subject.model(), example=subject.example())
    assert traced.grid == Grid(ROWS, COLS, FRAMES)
    (blocks,) = traced.spec.blocks
    assert (blocks.path, blocks.attention, blocks.mlp) == ("blocks", "attn1", "ffn")
    assert blocks.mixers == ModuleCall(must_be_none=("encoder_hidden_states", "attention_mask"))
    assert (blocks.arguments, blocks.returns) == (("hidden_states",), ("hidden_states",))
    assert traced.spec.projections == ("to_q", "to_k", "to_v", "to_out.0")
    assert (traced.spec.mlp.up, traced.spec.mlp.down) == ("net.0.proj", "net.2")
    assert (traced.spec.mlp.activation, traced.spec.mlp.gated) == ("gelu-tanh", False)
    assert [question.partition(" ")[0] for question in traced.questions] == [
        "native_grid",
        "time:",
        "output:",
        "process:",
    ]
    assert "2 x blocks.*.attn1: self, image 48, mask: none" in str(traced)


@pytest.mark.parametrize(
    ("name", "alone"),
    [("QwenImage", [("mlp",)]), ("Lumina2", [("attention", "mlp"), ()]), ("CogVideoX", [()])],
)
def test_what_sees_the_image_alone_is_proposed(name, alone):
    subject = specimen(name)
    spec = trace(subject.model(), example=subject.example()).spec
    assert [blocks.image_alone for blocks in spec.blocks] == alone
    assert spec.native_num_text == TEXT


def test_blocks_of_which_the_model_uses_a_part_elsewhere_are_fixed():
    subject = next(s for s in specimens() if s.name.startswith("DiT"))
    (blocks,) = trace(subject.model(), example=subject.example()).spec.blocks
    assert blocks.fixed == {0: "the model uses its norm1.emb outside of it"}


@pytest.mark.parametrize(
    "name",
    ["PRX", pytest.param("Flux", marks=pytest.mark.slow), pytest.param("AuraFlow", marks=pytest.mark.slow)],
)
def test_softmax_kernels_change_nothing(name):
    subject = specimen(name)
    traced = trace(subject.model(), example=subject.example())
    before = traced.outputs()
    plan = Plan(edits=(Replace(role="attention", blocks=traced.blocks, operator="softmax"),))
    graft(traced.model, plan, host=traced.host)
    assert all(map(torch.equal, before, traced.outputs()))


def test_a_pipeline_tells_its_process_its_time_and_its_sign():
    pipe, call = pipelines.pixart()
    traced = trace(pipe, **call)
    assert (traced.spec.time.whole, traced.spec.output.half) == (True, True)
    assert traced.spec.process.name == "diffusion"
    assert traced.questions == ()
    assert "step" not in vars(pipe.scheduler)
    assert not traced.model._forward_pre_hooks


@pytest.mark.slow
def test_a_process_that_is_none_of_ours_is_not_taken_for_another():
    pipe, call = pipelines.cog_video_x()
    traced = trace(pipe, **call)
    assert traced.spec.process is None
    assert any("grafting does not have that of CogVideoXDDIMScheduler" in q for q in traced.questions)


@pytest.mark.slow
def test_a_pipeline_tells_that_time_and_output_are_reversed():
    pipe, call = pipelines.lumina2()
    spec = trace(pipe, **call).spec
    assert (spec.time.argument, spec.time.scale, spec.time.reversed) == ("timestep", 1.0, True)
    assert (spec.output.sign, spec.process.name, spec.process.shift) == (-1, "flow", 3.0)


def test_what_cannot_be_traced_is_an_error():
    subject = specimen("PixArt")
    model = subject.model()
    with pytest.raises(HostError, match="says nothing of its inputs: give example="):
        trace(model)
    with pytest.raises(HostError, match="does not run on the example inputs hidden_states"):
        trace(model, example={"hidden_states": torch.zeros(1, 4, 8, 8)})
    with pytest.raises(HostError, match="prompt: only a pipeline is called with these"):
        trace(model, example=subject.example(), prompt="a cat")
    with pytest.raises(HostError, match="a diffusers pipeline is needed .* found a str"):
        trace("owner/name")
    with pytest.raises(HostError, match="Linear made no call of scaled_dot_product_attention"):
        trace(nn.Linear(2, 2), example={"input": torch.zeros(1, 2)})


def test_a_graft_is_not_traced():
    subject = specimen("PixArt")
    model = subject.model()
    plan = Plan(edits=(Replace(role="attention", blocks=0, operator="softmax"),))
    graft(model, plan)
    with pytest.raises(HostError, match="PixArtTransformer2DModel is grafted already"):
        trace(model, example=subject.example())


def test_pipelines_without_a_transformer_are_an_error():
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    with pytest.raises(
        HostError, match="DDPMPipeline has a UNet2DModel, whose blocks have several resolutions"
    ):
        trace(DDPMPipeline(unet, DDPMScheduler()))
    with pytest.raises(HostError, match="UNet2DModel is a UNet"):
        trace(unet, example={})
    pipe, call = pipelines.pixart()
    with pytest.raises(HostError, match="is not called with heihgt; it takes prompt"):
        trace(pipe, **call, heihgt=64)
    with pytest.raises(HostError, match="does not run on prompt, height"):
        trace(pipe)


def test_a_message_quotes_little_of_what_a_pipeline_says():
    pipe, call = pipelines.pixart()
    with pytest.raises(HostError, match="does not run on .*Cannot forward both `prompt`") as told:
        trace(pipe, **call, prompt="x")
    assert len(str(told.value).splitlines()) == 1
    assert len(str(told.value)) < 1000


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (NameError("name 'ftfy' is not defined", name="ftfy"), "the package 'ftfy' seems to be missing"),
        (
            ModuleNotFoundError("No module named 'a.b'", name="a.b"),
            "the package 'a' seems to be missing: install it",
        ),
        (ImportError("needs the tokens library"), "needs the tokens library; a package seems to be missing"),
    ],
)
def test_a_package_that_a_pipeline_lacks_is_named(monkeypatch, error, says):
    def fails(*args, **kwargs):
        raise error

    pipe, call = pipelines.pixart()
    monkeypatch.setattr(pipe, "encode_prompt", fails)
    with pytest.raises(HostError, match=says) as told:
        trace(pipe, **call)
    assert "height=" not in str(told.value)


def test_only_what_surgery_accepts_is_said_to_be_taken():
    subject = specimen("SD3")
    traced = trace(subject.model(), example=subject.example())
    assert traced.takes == ("kernels, MLPs, drop",)
    assert "transformer_blocks.*.attn takes kernels, MLPs, drop" in str(traced)
    with pytest.raises(PlanError, match="only one tensor of tokens can be merged"):
        graft(traced.model, Plan(edits=(Merge(blocks=(0, 1)),)), host=traced.host)


def test_the_mlp_of_a_text_longer_than_the_image_is_not_the_images():
    subject = specimen("SD3")
    traced = trace(subject.model(), example=subject.example() | {"encoder_hidden_states": text(length=64)})
    assert traced.takes == ("kernels, MLPs, drop",)
    assert traced.spec.blocks[0].mlp == "ff"


def test_mixers_without_projections_to_inherit_are_said_to_start_at_random():
    torch.manual_seed(0)
    fused = nn.ModuleDict({"blocks": nn.ModuleList(Fused() for _ in range(2))})
    fused.forward = MethodType(
        lambda self, hidden_states: self["blocks"][1](self["blocks"][0](hidden_states)), fused
    )
    traced = trace(fused, example={"hidden_states": torch.randn(1, 6, 8)})
    assert traced.takes == ("kernels, mixers with init: random, merge and drop",)
    inherits, draws = (
        Plan(edits=(Replace(role="attention", operator={"name": "hyena-x", "kernel_size": 3, "init": init}),))
        for init in ("inherit", "random")
    )
    with pytest.raises(HostError, match="use init: random"):
        graft(fused, inherits, host=traced.host)
    graft(fused, draws, host=traced.host)


class FusedAttention(nn.Module):
    """One layer for queries, keys and values."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Fused(nn.Module):
    """A block without an MLP."""

    def __init__(self):
        super().__init__()
        self.attention = FusedAttention()

    def forward(self, x):
        return x + self.attention(x)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, "there is no model in"),
        ({"_class_name": "UNet2DConditionModel"}, "holds a UNet2DConditionModel; .* is a UNet"),
    ],
)
def test_the_command_refuses_a_folder_without_a_transformer(tmp_path, config, says):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    result = CliRunner().invoke(app, ["sites", str(tmp_path), "--trace"])
    assert result.exit_code == 1
    assert re.search(says, " ".join(result.output.split()))


@pytest.mark.parametrize("frames", [3, 4])
def test_attention_along_time_is_none_along_space_with_as_many_tokens(frames):
    """Latte's blocks attend in turn to the 2 x 2 tokens of a frame, and to a place in all frames."""
    torch.manual_seed(0)
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=4,
        patch_size=2,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        video_length=frames,
    )
    example = {
        "hidden_states": torch.randn(1, 4, frames, 4, 4),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 5, 24),
    }
    traced = trace(model, example=example)
    assert [blocks.path for blocks in traced.spec.blocks] == ["transformer_blocks"]
    (said,) = [q for q in traced.questions if q.startswith("temporal_transformer_blocks.*.attn1 is left out")]
    assert (
        "3 image tokens in a call, others 4"
        if frames == 3
        else "along axes 2 of the image, others' along axes 3, 4"
    ) in said


@pytest.mark.slow
def test_a_mask_that_is_added_and_hides_nothing_is_told():
    """Chroma's pipeline passes its mask as numbers, which are added to the scores."""
    pipe, call = pipelines.chroma()
    with pytest.raises(HostError, match="its mask adds other numbers than 0 and minus infinity"):
        trace(pipe, **call)


def test_the_command_shows_writes_and_proves(tmp_path):
    subject = specimen("PixArt")
    subject.model().save_pretrained(tmp_path / "model")
    save_tensors(tmp_path / "example.safetensors", subject.example())
    arguments = ["sites", str(tmp_path / "model"), "--trace"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "--example FILE.safetensors" in " ".join(result.output.split())
    arguments += ["--example", str(tmp_path / "example.safetensors"), "--out", str(tmp_path / "spec.yaml")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "the same output, bit for bit" in result.stdout
    assert "transformer_blocks.*.attn1 takes kernels, mixers, MLPs, merge and drop" in result.stdout
    spec = load_spec(tmp_path / "spec.yaml")
    assert (spec.name, spec.image.argument, spec.blocks[0].attention) == (
        "pixart-traced",
        "hidden_states",
        "attn1",
    )


@pytest.mark.slow
def test_the_command_gives_json(tmp_path):
    subject = specimen("PixArt")
    subject.model().save_pretrained(tmp_path / "model")
    save_tensors(tmp_path / "example.safetensors", subject.example())
    arguments = [
        "sites",
        str(tmp_path / "model"),
        "--trace",
        "--example",
        str(tmp_path / "example.safetensors"),
    ]
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    facts = json.loads(result.stdout)
    assert (facts["exact"], facts["grid"]) == (True, {"rows": ROWS, "cols": COLS, "frames": 1})


def test_options_of_a_trace_need_a_trace(tmp_path):
    result = CliRunner().invoke(app, ["sites", "testbed", "--with", "height=64"])
    assert result.exit_code == 1
    assert "--out, --with and --example go with --trace" in result.output

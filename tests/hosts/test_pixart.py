"""What is particular to PixArt: two attentions in a block, of which one is a site, and a mapping as condition."""

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from closeness import assert_close
from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import KernelAttention, MixerAdapter, graft
from grafting.errors import HostError
from grafting.hosts import hosts

HOST = hosts()["pixart"]


@pytest.fixture
def model():
    return HOST.tiny().eval()


@pytest.fixture
def inputs(model):
    return HOST.example(model, rows=8, cols=8, batch_size=2)


def plan(operator, role="attention") -> Plan:
    return Plan(edits=(Replace(role=role, operator=operator),))


def test_attention_to_the_text_stays(model, inputs):
    cross = model.transformer_blocks[0].attn2
    graft(model, plan("hyena-x"))
    assert isinstance(model.transformer_blocks[0].attn1, MixerAdapter)
    assert model.transformer_blocks[0].attn2 is cross
    with torch.no_grad():
        output = model(**inputs).sample
        inputs["encoder_hidden_states"] = torch.randn_like(inputs["encoder_hidden_states"])
        assert not torch.allclose(model(**inputs).sample, output)


def test_predict_is_a_forward_pass_on_a_condition(model, inputs):
    names = ("encoder_hidden_states", "encoder_attention_mask")
    condition = {name: inputs[name] for name in names} | {"added_cond_kwargs": None}
    with torch.no_grad():
        got = HOST.predict(model, inputs["hidden_states"], inputs["timestep"], condition)
        assert torch.equal(got, model(**inputs).sample)
    assert got.shape == (2, 8, 16, 16)


def test_inherited_mha_and_mlp_change_nothing(model, inputs):
    with torch.no_grad():
        before = model(**inputs).sample
        graft(model, plan("mha"))
        graft(model, plan("mlp", role="mlp"))
        assert_close("output", model(**inputs).sample, before, 1e-5)


def test_a_mask_on_the_image_tokens_is_refused_by_mixers(model, inputs):
    inputs["attention_mask"] = torch.ones(2, 64)
    record = graft(model, plan("mha"))
    with pytest.raises(
        HostError, match=r"the host passes attention_mask .* a mixer cannot honour it: use a kernel"
    ):
        model(**inputs)
    record.undo()
    graft(model, plan("softmax"))
    without = {name: value for name, value in inputs.items() if name != "attention_mask"}
    with torch.no_grad():
        assert_close("a mask of ones", model(**inputs).sample, model(**without).sample, 1e-6)


def test_the_processor_without_sdpa_is_an_error(model, inputs):
    model.set_default_attn_processor()
    graft(model, plan("softmax"))
    with pytest.raises(HostError, match="Attention called scaled_dot_product_attention 0 times"):
        model(**inputs)


def test_an_mlp_with_a_gate_is_not_inherited():
    settings = dict(HOST.tiny().config) | {"activation_fn": "geglu"}
    model = PixArtTransformer2DModel(**{k: v for k, v in settings.items() if not k.startswith("_")})
    with pytest.raises(HostError, match=r"an MLP of GEGLU has no plain two-layer form.*init: random"):
        graft(model, plan("mlp", role="mlp"))
    assert not model._forward_pre_hooks
    graft(model, plan({"name": "mlp", "init": "random"}, role="mlp"))


def test_attention_processors_still_reach_a_kernels_attention(model):
    graft(model, plan("linear"))
    assert isinstance(model.transformer_blocks[0].attn1, KernelAttention)
    assert "transformer_blocks.0.attn1.attention.processor" in model.attn_processors

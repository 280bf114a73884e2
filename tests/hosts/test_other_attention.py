"""Attention that makes no call of SDPA, which mixers may replace, and blocks that are the attention themselves."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from grafting.editing.plan import Drop, Merge, Plan, Replace
from grafting.editing.surgery import graft
from grafting.errors import HostError, PlanError
from grafting.hosts import BlockList, trace
from grafting.weights.folder import load, save
from hosts.test_tracing import specimen


def hyena(init="inherit", **edit):
    return Replace(role="attention", operator={"name": "hyena-x", "init": init}, **edit)


@pytest.fixture(scope="module")
def sana():
    subject = specimen("Sana")
    return trace(subject.model(), example=subject.example())


def test_linear_attention_is_a_site_of_mixers(sana):
    (blocks,) = sana.spec.blocks
    assert (blocks.attention, blocks.turn) == ("attn1", ())
    assert sana.spec.projections == ("to_q", "to_k", "to_v", "to_out.0")
    site = sana.host.sites(sana.model)[1]
    assert (site.path, site.dim, site.num_heads) == ("transformer_blocks.1.attn1", 32, 2)
    assert sana.blocks == ()
    assert "attn1 takes mixers, merge and drop" in str(sana)
    assert "attn1 takes mixers alone: it makes no call of scaled_dot_product_attention" in str(sana)
    with pytest.raises(
        PlanError, match="makes no call of scaled_dot_product_attention that a kernel could answer"
    ):
        graft(
            sana.model, Plan(edits=(Replace(role="attention", blocks=0, operator="softmax"),)), host=sana.host
        )


def test_a_mixer_starts_from_linear_attention_and_is_undone_exactly(sana):
    before, attention = sana.outputs(), sana.model.transformer_blocks[0].attn1
    record = graft(sana.model, Plan(edits=(hyena(blocks=[0]),)), host=sana.host)
    (mixer,) = (operator.mixer for operator in record.operators.values())
    own = [attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]]
    for (weight, _), layer in zip(sana.host.attention_weights(attention), own, strict=True):
        assert torch.equal(weight, layer.weight)
    assert torch.equal(mixer.output_layer.weight, attention.to_out[0].weight)
    assert not torch.equal(sana.outputs()[0], before[0])
    record.undo()
    assert torch.equal(sana.outputs()[0], before[0])


@pytest.mark.parametrize("edits", [(hyena(blocks="all"),), (Merge(blocks=[0, 1]),), (Drop(blocks=[1]),)])
def test_it_is_trained_saved_and_loaded(sana, edits, tmp_path):
    record = graft(sana.model, Plan(edits=edits), host=sana.host)
    output = sana.model(**sana.example, return_dict=False)[0]
    output.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in sana.model.parameters())
    save(sana.model, tmp_path / "graft")
    with torch.no_grad():
        again = load(tmp_path / "graft")(**sana.example, return_dict=False)[0]
    torch.testing.assert_close(again, output.detach(), rtol=1e-5, atol=1e-5)
    record.undo()


class Attending(nn.Module):
    """A block that is itself the attention: norm, attention over all tokens, and a residual."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Plain(ModelMixin, ConfigMixin):
    """Patches of 2 x 2, and such blocks."""

    @register_to_config
    def __init__(
        self, dim: int = 16, num_attention_heads: int = 2, in_channels: int = 4, patch_size: int = 2
    ):
        super().__init__()
        self.embed = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.blocks = nn.ModuleList(Attending(dim) for _ in range(3))
        self.out = nn.Linear(dim, in_channels * patch_size**2)

    def forward(self, sample, timestep):
        x = self.embed(sample)
        rows, cols = x.shape[2:]
        x = x.flatten(2).transpose(1, 2) + timestep[:, None, None]
        for block in self.blocks:
            x = block(x)
        x = self.out(x).unflatten(1, (rows, cols)).unflatten(3, (-1, 2, 2))
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def test_a_block_that_is_the_attention_takes_kernels(tmp_path):
    torch.manual_seed(0)
    model, example = Plain(), {"sample": torch.randn(2, 4, 8, 12), "timestep": torch.rand(2)}
    traced = trace(model, example=example)
    assert traced.spec.blocks == (BlockList(path="blocks", attention=""),)
    assert "\nblocks.* takes kernels\n" in str(traced)
    before, host = traced.outputs()[0], traced.host
    record = graft(
        model, Plan(edits=(Replace(role="attention", blocks="all", operator="softmax"),)), host=host
    )
    assert torch.equal(traced.outputs()[0], before)
    record.undo()
    with pytest.raises(PlanError, match="the host does not declare how block 1 is called"):
        graft(model, Plan(edits=(Drop(blocks=[1]),)), host=host)
    window = {"name": "window-2d", "radius": 1}
    graft(model, Plan(edits=(Replace(role="attention", blocks=[0, 2], operator=window),)), host=host)
    after = traced.outputs()[0]
    assert not torch.equal(after, before)
    save(model, tmp_path / "graft")
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "graft")(**example), after)


def test_blocks_of_both_kinds_take_kernels_where_a_call_is_made():
    class Attention(nn.Module):
        def __init__(self, is_linear):
            super().__init__()
            self.qkv, self.is_linear = nn.Linear(16, 48), is_linear

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            mixed = (
                q.relu() @ (k.relu().mT @ v) if self.is_linear else F.scaled_dot_product_attention(q, k, v)
            )
            return mixed.transpose(1, 2).flatten(2)

    model, example = Plain(), {"sample": torch.randn(2, 4, 8, 12), "timestep": torch.rand(2)}
    model.blocks = nn.ModuleList(nn.Sequential(Attention(i == 1)) for i in range(3))
    traced = trace(model, example=example)
    assert (traced.spec.blocks[0].turn, traced.blocks) == (("image",), (0, 2))
    assert "blocks.1.0: it makes no call, as others do; leave it out of plans" in traced.questions
    before = traced.outputs()[0]
    graft(
        model, Plan(edits=(Replace(role="attention", blocks=[0, 2], operator="softmax"),)), host=traced.host
    )
    assert torch.equal(traced.outputs()[0], before)


def test_attention_outside_of_lists_is_told():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.only = Attending(16)

        def forward(self, x):
            return self.only(x)

    with pytest.raises(HostError, match="could take the place of: only stands in no list of blocks"):
        trace(Single(), example={"x": torch.randn(2, 6, 16)})


def test_attention_on_another_backend_is_told():
    """It makes no call of SDPA either, but would on the native one."""

    class Attention(nn.Module):
        def forward(self, x):
            return x.cumsum(1)

    block = Attention()
    block.processor = SimpleNamespace(_attention_backend="flash")
    model = nn.Sequential(block)
    model.forward = lambda x: block(x)
    with pytest.raises(HostError, match="choose the native one"):
        trace(model, example={"x": torch.randn(1, 6, 8)})

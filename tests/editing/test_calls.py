"""What a kernel answers of an attention's calls: which of them, under which masks, and what it refuses."""

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from closeness import assert_close
from grafting.contract import ANY_CALL, AttentionCall, Grid, KernelConfig, Site, TokenLayout
from grafting.editing.masks import key_mask_of
from grafting.editing.placed import KernelAttention
from grafting.editing.plan import Plan, Replace
from grafting.errors import HostError, PlanError
from grafting.hosts import LayoutTracker, hosts
from grafting.operators import parse_operator
from grafting.operators.softmax import Softmax

GRID = Grid(rows=3, cols=4)
LAYOUT = TokenLayout(GRID, before=3)
LENGTH = LAYOUT.num_tokens


class Attention(nn.Module):
    """Attention that makes the calls that it is asked for; a processor stands beside it."""

    def __init__(self):
        super().__init__()
        self.processor = "native"

    def forward(self, *calls):
        return [F.scaled_dot_product_attention(*qkv, **settings) for qkv, settings in calls]


def placed(operator="softmax", **facts):
    call = AttentionCall(**{"order": ("rest", "image"), **facts})
    site = Site(
        role="attention", block=2, path="x", dim=8, grid=GRID, num_text=3, num_heads=2, attention=call
    )
    tracker = LayoutTracker(hosts()["dit"])
    tracker._grid, tracker.stays = GRID, True
    config = parse_operator(operator)
    attention = KernelAttention(Attention(), config.build(site), site=site, tracker=tracker)
    attention.choice = config
    return attention


def call(num_queries=LENGTH, num_keys=LENGTH, *, batch=2, heads=2, **settings):
    torch.manual_seed(num_queries)
    keys = torch.randn(2, batch, heads, num_keys, 4)
    return (torch.randn(batch, 2, num_queries, 4), *keys), settings


def test_what_it_is_asked_beside_a_call_is_the_attentions():
    attention = placed()
    assert attention.processor == "native"
    with pytest.raises(AttributeError, match="nothing"):
        _ = attention.nothing


def test_calls_of_text_alone_go_through_as_they_are():
    attention = placed({"name": "window-2d", "radius": 1}, turn=("other", "image"), image_queries=True)
    text, image = call(3, 3, is_causal=True), call(GRID.num_tokens, LENGTH)
    got = attention(text, image)
    want = Attention()(text, image)
    assert torch.equal(got[0], want[0])
    assert not torch.allclose(got[1], want[1])
    alone = attention.kernel(*image[0], TokenLayout(GRID, before=3, image_queries=True))
    assert torch.equal(got[1], alone)


def test_one_call_for_each_sample_may_have_texts_of_its_own_length():
    attention = placed({"name": "window-2d", "radius": 1})
    calls = [call(GRID.num_tokens + n, GRID.num_tokens + n, batch=1) for n in (3, 5)]
    got = attention(*calls)
    assert [x.shape[2] for x in got] == [15, 17]
    with pytest.raises(HostError, match=r"called scaled_dot_product_attention 2 times on \[2, 2\] images"):
        attention(call(), call())
    with pytest.raises(HostError, match="called scaled_dot_product_attention 0 times"):
        attention()
    with pytest.raises(HostError, match="3 times"):
        placed(turn=("other", "image"))(call(), call(), call())


def test_others_on_both_sides_are_told_apart_by_a_length():
    layout = AttentionCall(order=("rest", "image", "text")).layout(GRID, 20, {"text": 5})
    assert (layout.before, layout.after) == (3, 5)
    image, others = layout.split(torch.arange(20.0)[None, None, :, None])
    assert image.flatten().tolist() == list(range(3, 15))
    assert torch.equal(layout.join(image, others), torch.arange(20.0)[None, None, :, None])


def test_grouped_heads_are_repeated():
    attention = placed()
    qkv, _ = call(heads=1)
    (got,) = attention((qkv, {"enable_gqa": True}))
    (want,) = Attention()((qkv, {"enable_gqa": True}))
    assert_close("output", got, want, 1e-6)


def test_tokens_that_are_not_the_layouts_are_refused():
    with pytest.raises(
        HostError, match=r"attention of block 2 is over 10 tokens, of which 12 are the image's"
    ):
        placed()(call(10, 10))
    with pytest.raises(
        HostError, match=r"has 12 queries and 15 keys, of which 12 are the image's: .* declares 15"
    ):
        placed()(call(12, 15))
    with pytest.raises(HostError, match="dropout or is_causal"):
        placed()(call(is_causal=True))


SEEN = torch.ones(2, LENGTH, dtype=torch.bool)
SEEN[0, 1:3] = False
LOWERED = torch.zeros(2, LENGTH).masked_fill(~SEEN, float("-inf"))


@pytest.mark.parametrize(
    "mask",
    [
        SEEN[:, None, None],
        SEEN[:, None, None].expand(2, 2, LENGTH, LENGTH),
        SEEN[:, None, None] & SEEN[:, None, :, None],
        LOWERED[:, None, None],
        LOWERED.clamp(min=-10000.0)[:, None, None].expand(-1, 2, LENGTH, -1),
    ],
    ids=["keys", "expanded", "pairs of seen", "added", "added and expanded"],
)
def test_masks_of_keys_are_recognised(mask):
    assert torch.equal(key_mask_of(mask, LAYOUT), SEEN)
    qkv, _ = call()
    (got,) = placed()((qkv, {"attn_mask": mask}))
    want = F.scaled_dot_product_attention(*qkv, attn_mask=SEEN[:, None, None])
    assert_close("output", got, want, 1e-6)


def test_a_mask_that_hides_nothing_is_none():
    for mask in (
        torch.ones(2, 1, 1, LENGTH).bool(),
        torch.zeros(LENGTH, LENGTH),
        torch.ones(2, 1, 1, LENGTH),
    ):
        assert key_mask_of(mask, LAYOUT) is None
    qkv, _ = call()
    assert torch.equal(
        placed()((qkv, {"attn_mask": torch.zeros(LENGTH, LENGTH)}))[0], Softmax()(*qkv, LAYOUT)
    )


def test_other_masks_are_refused():
    causal = torch.ones(LENGTH, LENGTH).tril().bool()
    with pytest.raises(
        HostError, match=r"mask \[15, 15\] of torch.bool.*from some queries alone, as a causal one"
    ):
        placed()(call(attn_mask=causal))
    with pytest.raises(HostError, match="it is a bias, and hides nothing"):
        placed()(call(attn_mask=SEEN[:, None, None].float()))


class DeafConfig(KernelConfig):
    """A kernel that knows nothing of masks."""

    name: Literal["deaf"] = "deaf"

    def build(self, site):
        return Softmax()

    def mixing_flops(self, site):
        return 0


def test_an_operator_that_honours_no_mask_is_refused_before_any_work():
    attention = placed()
    attention.choice = DeafConfig()
    attention(call())
    with pytest.raises(HostError, match="deaf does not honour a key mask.*prompts of one length"):
        attention(call(attn_mask=SEEN[:, None, None]))
    site = placed(masked=True, image_queries=True).site
    plan = Plan(edits=(Replace(role="attention", blocks=0, operator="softmax"),))
    assert plan.resolve([site.__class__(**{**vars(site), "block": 0})])
    deaf = Plan.model_construct(edits=(plan.edits[0].model_copy(update={"operator": DeafConfig()}),))
    with pytest.raises(PlanError) as caught:
        deaf.resolve([site.__class__(**{**vars(site), "block": 0})])
    assert "deaf does not honour a key mask, which the attention has where prompts are padded" in str(
        caught.value
    )
    assert "deaf does not honour queries of the image alone, with more keys" in str(caught.value)
    assert parse_operator("hybrid").call_faults(site.attention) == []
    assert parse_operator("hyena-x").call_faults(site.attention)
    assert parse_operator("ttt").honours == ANY_CALL

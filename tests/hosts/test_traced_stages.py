"""What stages need of a traced host: predictions for images and videos as they are, and blocks that can be taken out."""

from functools import cache

import pytest
import torch

from grafting.editing.plan import Drop, Merge, Plan
from grafting.editing.surgery import graft
from grafting.errors import HostError, PlanError
from grafting.hosts import LatentTokens, SdpaHost, hosts, trace
from hosts.test_tracing import specimen
from hosts.zoo import COLS, ROWS


@cache
def traced_of(name):
    case = specimen(name)
    return trace(case.model(), example=case.example())


def image_of(tokens):
    """[B, L, C, 2, 2] -> [B, C, 2 ROWS, 2 COLS]."""
    return tokens.unflatten(1, (ROWS, COLS)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


PATCHES = {
    # name: the images of an example, what of it a condition holds, and the images of what the model returns
    "AnyFlow": (lambda x: x.transpose(1, 2), lambda x: None, lambda y: y.transpose(1, 2)),
    "JoyImageEditPlus": (
        lambda x: image_of(x[:, :, :, 0]),
        lambda x: None,
        lambda y: image_of(y[:, :, :, 0]),
    ),
    "Latte": (lambda x: x, lambda x: None, lambda y: y.chunk(2, 1)[0]),
    "QwenImage21": (
        lambda x: image_of(x.unflatten(2, (4, 2, 2))),
        lambda x: None,
        lambda y: image_of(y[:, -ROWS * COLS :].unflatten(2, (4, 2, 2))),
    ),
    "WanAnimate": (lambda x: x[:, :4], lambda x: x[:, 4:], lambda y: y),
}


_SLOW = ("AnyFlow", "Latte", "WanAnimate")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in _SLOW else n for n in PATCHES]
)
def test_a_prediction_is_a_call_of_the_model_in_the_shape_of_images(name):
    images, beside, returned = PATCHES[name]
    case = specimen(name)
    model, example = case.model(), case.example()
    traced = traced_of(name)
    host, time = traced.host, traced.spec.time.argument
    argument = traced.spec.image.argument
    x, more = images(example[argument]), beside(example[argument])
    assert host.shape(model) == x.shape[1:]
    given = {n: v for n, v in example.items() if n not in (argument, time, "img_shapes", "shape_list")}
    given |= {} if more is None else {argument: more}
    t = example[time][:, 0] if example[time].ndim == 2 else example[time]
    with torch.no_grad():
        found = host.predict(model, x, t, given)
        assert torch.equal(found, returned(model(**example, return_dict=False)[0]))


def test_channels_that_only_a_condition_can_hold_are_asked_for():
    wan = hosts()["wan"]
    image = LatentTokens(beside=8)
    host = SdpaHost(wan.spec.model_copy(update={"image": image, "channels": "config.out_channels"}))
    model = wan.model_class(**wan.spec.tiny | {"in_channels": 12})
    assert host.shape(model)[0] == 4
    assert host.needed(model)["hidden_states"] == 8
    assert "it needs hidden_states" in host.condition_faults(model, {"encoder_hidden_states": 24})
    with pytest.raises(
        HostError, match="hidden_states holds 8 channels behind the image's: a condition gives"
    ):
        host.predict(model, torch.randn(2, 4, 3, 8, 12), torch.ones(2), {})
    assert host.example(model, rows=4, cols=6, frames=3, batch_size=2)["hidden_states"].shape == (
        2,
        12,
        3,
        8,
        12,
    )
    more, text = torch.randn(2, 8, 3, 8, 12), torch.randn(2, 5, 24)
    with torch.no_grad():
        found = host.predict(
            model,
            torch.ones(2, 4, 3, 8, 12),
            torch.ones(2),
            {"hidden_states": more, "encoder_hidden_states": text},
        )
        whole = torch.cat([torch.ones(2, 4, 3, 8, 12), more], 1)
        assert torch.equal(found, model(whole, torch.ones(2), text, return_dict=False)[0])


def test_what_a_model_reads_of_blocks_is_there_when_they_are_not():
    """QwenImage21 reads `attn.processor` of every block."""
    case = specimen("QwenImage21")
    model = case.model()
    before = model.transformer_blocks[1].attn.processor
    host = traced_of("QwenImage21").host
    record = graft(model, Plan(edits=(Drop(blocks=[1]),)), host=host)
    assert type(model.transformer_blocks[1].attn.processor) is type(before)
    assert not list(model.transformer_blocks[1].parameters())
    with torch.no_grad():
        model(**case.example())
    record.undo()
    assert model.transformer_blocks[1].attn.processor is before


def test_blocks_that_are_called_otherwise_than_their_neighbours_are_dropped_and_not_merged():
    """AceStep's first layer sees a sliding window; BriaFibo2's last one reads the text once more."""
    case = specimen("BriaFibo2")
    model = case.model()
    traced = trace(model, example=case.example())
    assert [blocks.apart for blocks in traced.spec.blocks] == [
        {},
        {2: "it is called with other arguments than most of these blocks"},
    ]
    with pytest.raises(
        PlanError, match="block 3 cannot be merged: it is called with other arguments than most"
    ):
        graft(model, Plan(edits=(Merge(blocks=[2, 3]),)), host=traced.host)
    graft(model, Plan(edits=(Merge(blocks=[1, 2]), Drop(blocks=[3]))), host=traced.host)
    with torch.no_grad():
        model(**case.example())

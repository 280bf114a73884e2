"""A PixArt that is to be pretrained starts as blocks without text, whose head says nothing yet."""

import torch

from grafting.hosts.pixart import PixArtHost
from grafting.runs.job import load_source
from grafting.runs.recipe import FreshModel

CONFIG = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 12,
    "use_additional_conditions": False,
}


def test_a_fresh_model_is_initialised_for_pretraining():
    model, identity = load_source(FreshModel(host="pixart", config=CONFIG))
    again, same = load_source(FreshModel(host="pixart", config=CONFIG))
    assert identity == same
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    captions = {"encoder_hidden_states": torch.randn(2, 3, 12), "encoder_attention_mask": torch.ones(2, 3)}
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([10.0, 900.0])
    with torch.no_grad():
        assert not PixArtHost().predict(model, x, t, captions).any()
        model.proj_out.weight.normal_()
        said = PixArtHost().predict(model, x, t, captions)
        unsaid = PixArtHost().predict(
            model, x, t, captions | {"encoder_hidden_states": torch.zeros(2, 3, 12)}
        )
    assert torch.equal(said, unsaid)
    assert said.std() > 0.1

"""diffusers' DiT folders, read and written, against the recorded outputs of the original code at every step."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file

from closeness import assert_close
from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import graft
from grafting.errors import CheckpointError, HostError
from grafting.models import DiT
from grafting.weights.diffusers import export_diffusers, original_embeddings, to_diffusers
from grafting.weights.folder import load
from grafting.weights.portable import plan_of
from grafting.weights.published import convert_weights

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "dit.safetensors")
ORIGINAL = {name.removeprefix("model."): x for name, x in GOLDEN.items() if name.startswith("model.")}


@pytest.fixture
def original() -> DiT:
    model = DiT(input_size=8, hidden_size=48, depth=2, num_heads=4, num_classes=10).eval()
    model.load_state_dict(ORIGINAL)
    return model


def golden_inputs():
    return tuple(GOLDEN[f"forward.{name}"] for name in ("x", "t", "y"))


@torch.no_grad()
def diffusers_output(model):
    x, t, y = golden_inputs()
    return model(x, timestep=t, class_labels=y).sample


@pytest.mark.parametrize("kind", ["safetensors", "bin", "pipeline"])
def test_a_diffusers_folder_becomes_the_original(tmp_path, original, kind):
    """What the conversion script of diffusers makes of the published weights: its class as it is, with its eps."""
    theirs = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=12, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    theirs.load_state_dict(to_diffusers(original).state_dict())
    folder = tmp_path / "theirs" / "transformer" if kind == "pipeline" else tmp_path / "theirs"
    theirs.save_pretrained(folder, safe_serialization=kind != "bin")
    convert_weights(tmp_path / "theirs", tmp_path / "out")
    model = load(tmp_path / "out")
    plan = plan_of(model)
    assert plan == Plan()
    with torch.no_grad():
        got = model(*golden_inputs())
    for i, step in enumerate(GOLDEN["forward.t"].tolist()):
        assert_close(f"output at t = {step}", got[i], GOLDEN["forward.output"][i], 1e-5)
    origin = json.loads((tmp_path / "out" / "config.json").read_text())["_origin"]
    assert "10000^(-i/127)" in origin["time_embedding"]
    assert "1e-05" in origin["norm_eps"]


def test_an_exported_folder_has_the_originals_outputs(tmp_path, original):
    export_diffusers(original, tmp_path)
    model = DiTTransformer2DModel.from_pretrained(tmp_path).eval()
    # as diffusers' class computes it, far off at late steps: what the note in the config is about
    off = (diffusers_output(model) - GOLDEN["forward.output"]).square().mean((1, 2, 3)).sqrt()
    assert off[0] < 1e-5 < 1e-2 < off[-1]
    got = diffusers_output(original_embeddings(model))
    for i, step in enumerate(GOLDEN["forward.t"].tolist()):
        assert_close(f"output at t = {step}", got[i], GOLDEN["forward.output"][i], 1e-5)
    note = json.loads((tmp_path / "config.json").read_text())["_grafting"]
    assert "downscale_freq_shift = 0" in note["time_embedding"]
    convert_weights(tmp_path, tmp_path / "back")
    back = load(tmp_path / "back")
    for name, tensor in original.state_dict().items():
        # positions are computed anew, in float64
        assert_close(name, back.state_dict()[name], tensor, 1e-6 if name == "pos_embed" else 0)


def test_what_diffusers_class_has_no_place_for_is_refused(tmp_path, original):
    with pytest.raises(CheckpointError, match="which always has one"):
        to_diffusers(DiT(input_size=8, hidden_size=48, depth=1, num_heads=4, class_dropout_prob=0.0))
    with pytest.raises(CheckpointError, match="mlp_ratio is 3.0"):
        to_diffusers(DiT(input_size=8, hidden_size=48, depth=1, num_heads=4, mlp_ratio=3.0))
    graft(original, Plan(edits=(Replace(role="attention", blocks=[1], operator="hyena-x"),)))
    with pytest.raises(CheckpointError, match="only a DiT without edits .* found a DiT with edits"):
        export_diffusers(original, tmp_path)


def test_diffusers_folders_that_are_not_the_published_dit_are_refused(tmp_path, original):
    theirs = to_diffusers(original)
    with torch.no_grad():
        theirs.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight[3] += 1
    theirs.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match="blocks have embedders of their own.*\n.*blocks.1.norm1.emb.class_emb"
    ):
        convert_weights(tmp_path, tmp_path / "out")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"activation_fn": "geglu"}))
    with pytest.raises(CheckpointError, match="activation_fn is 'geglu', expected 'gelu-approximate'"):
        convert_weights(tmp_path, tmp_path / "out")


def test_load_says_how_to_read_a_diffusers_folder(tmp_path, original):
    export_diffusers(original, tmp_path)
    with pytest.raises(HostError, match="holds a DiTTransformer2DModel; .*`grafting convert` reads it"):
        load(tmp_path)

"""The commands that read and write model folders: convert, merge, push."""

import json

import pytest
import torch

from commandline import says
from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import graft
from grafting.hosts import hosts
from grafting.runs import hub
from grafting.weights.folder import load, save_delta, save_model
from grafting.weights.portable import Base, plan_of

PLAN = Plan(edits=(Replace(role="attention", blocks=[1], operator="hyena-x"),))


@pytest.fixture
def published(tmp_path):
    """A tiny DiT in the published layout, with Hyena-X in block 1."""
    model = hosts()["dit"].tiny()
    graft(model, PLAN)
    tensors = {name.replace(".mixer.", "."): tensor for name, tensor in model.state_dict().items()}
    torch.save({"ema": tensors}, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_convert(published, tmp_path):
    said = says(
        "convert", published, tmp_path / "out", "--num-heads", 2, "--num-classes", 10, "--base", "some/base",
        "--licence", "MIT",
    )  # fmt: skip
    assert "Read as facebookresearch/DiT, grafted" in said
    assert "hyena-x" in said
    plan = plan_of(load(tmp_path / "out"))
    assert plan.edits[0].blocks == (1,)
    assert plan.edits[0].operator.geometry == "causal"
    grafting = json.loads((tmp_path / "out" / "config.json").read_text())["grafting"]
    assert grafting["base"] == {"id": "some/base", "revision": None, "licence": "MIT"}


def test_convert_asks_for_what_it_cannot_know(published, tmp_path):
    said = says("convert", published, tmp_path / "out", code=1)
    assert said.startswith(f"Error: {published} cannot be converted: 2 faults")
    assert "give --num-heads" in said
    assert "give --num-classes" in said


def test_convert_to_diffusers(tmp_path):
    save_model(tmp_path / "dit", hosts()["dit"].tiny(), Plan())
    assert "diffusers folder" in says("convert", tmp_path / "dit", tmp_path / "out", "--to", "diffusers")
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["_class_name"] == "DiTTransformer2DModel"
    )
    says("convert", tmp_path / "out", tmp_path / "back")
    assert torch.equal(
        load(tmp_path / "back").blocks[2].attn.qkv.weight,
        load(tmp_path / "dit").blocks[2].attn.qkv.weight,
    )


def test_merge(tmp_path):
    save_model(tmp_path / "base", hosts()["dit"].tiny(), Plan())
    model = load(tmp_path / "base")
    graft(model, PLAN)
    save_delta(tmp_path / "delta", model, PLAN, Base(id="elsewhere/base"), source=tmp_path / "base")
    assert "no model in elsewhere/base" in says("merge", tmp_path / "delta", tmp_path / "whole", code=1)
    assert "Model:" in says("merge", tmp_path / "delta", tmp_path / "whole", "--base", tmp_path / "base")
    whole = load(tmp_path / "whole")
    plan = plan_of(whole)
    assert plan == PLAN
    assert torch.equal(whole.blocks[1].attn.mixer.in_proj.weight, model.blocks[1].attn.mixer.in_proj.weight)


def test_push(published, tmp_path, monkeypatch):
    calls = []

    class Stub:
        def create_repo(self, repo_id, *, private, exist_ok):
            calls.append((repo_id, private))

        def upload_folder(self, *, repo_id, folder_path, commit_message, allow_patterns):
            calls.append((repo_id, folder_path))

    monkeypatch.setattr(hub, "HfApi", Stub)
    says("convert", published, tmp_path / "run" / "model", "--num-heads", 2, "--num-classes", 10)
    (tmp_path / "run" / "manifest.json").write_text('{"recipe": ""}')
    assert "Uploaded: https://huggingface.co/me/mine" in says("push", tmp_path / "run", "me/mine")
    assert calls == [("me/mine", True), ("me/mine", str(tmp_path / "run" / "model"))]
    says("push", tmp_path / "run", "me/mine", "--public")
    assert calls[2] == ("me/mine", False)

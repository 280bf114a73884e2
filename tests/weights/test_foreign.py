"""Grafts of a class that grafting does not know: their spec travels with them, so another process loads them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import load_file

import foreignmodel
import tinypipeline
from closeness import assert_close
from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import graft
from grafting.errors import CheckpointError, GraftingError, HostError
from grafting.hosts import SdpaHost, hosts, load_spec, use_spec
from grafting.hosts import _registry as registry
from grafting.weights.folder import load_model, save_delta, save_model
from grafting.weights.portable import Base, with_plan

PLAN = Plan(
    edits=(
        Replace(role="attention", blocks=0, operator={"name": "window-2d", "radius": 1}),
        Replace(role="attention", blocks=1, operator="hyena-x"),
    )
)
TESTS = str(Path(__file__).parents[1])
FRESH = """
import sys
sys.path.insert(0, {tests!r})
import grafting, tinypipeline, torch
from diffusers import PixArtSigmaPipeline
from grafting.hosts import _registry
from safetensors.torch import save_file

def of(folder):
    model = grafting.load(folder)
    torch.manual_seed(5)
    return tinypipeline.of(model)

images = {{}}
for name, open_pipeline in (("whole", of), ("delta", of), ("pipeline", PixArtSigmaPipeline.from_pretrained)):
    _registry._given.clear()  # each finds its spec by itself
    images[name] = tinypipeline.draw(open_pipeline(f"{folder}/{{name}}"))
save_file(images, "{folder}/there.safetensors")
"""


@pytest.fixture
def model():
    model = foreignmodel.tiny()
    graft(model, PLAN, host=foreignmodel.host())
    return model


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    monkeypatch.setattr(registry, "_given", {})


def test_another_process_loads_it_whole_as_a_delta_and_in_its_pipeline(model, tmp_path):
    transformer = with_plan(model, PLAN)
    torch.manual_seed(5)  # of the other parts
    pipeline = tinypipeline.of(transformer)
    here = tinypipeline.draw(pipeline)
    _save_base(tmp_path / "base")
    save_model(tmp_path / "whole", model, PLAN)
    save_delta(tmp_path / "delta", model, PLAN, Base(id=str(tmp_path / "base")))
    pipeline.save_pretrained(tmp_path / "pipeline")
    code = FRESH.format(tests=TESTS, folder=tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, there in load_file(tmp_path / "there.safetensors").items():
        assert_close(name, there, here, 1e-5)


def _save_base(folder):
    use_spec(foreignmodel.SPEC)
    save_model(folder, foreignmodel.tiny(), Plan())
    registry._given.clear()


def test_its_base_class_does_not_find_its_weights(model, tmp_path):
    save_model(tmp_path / "ours", model, PLAN)
    with_plan(model, PLAN).save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        for model_class in (PixArtTransformer2DModel, foreignmodel.ForeignTransformer):
            with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
                model_class.from_pretrained(tmp_path / folder)


def test_a_class_that_is_not_there_is_one_error(model, tmp_path):
    save_model(tmp_path, model, PLAN)
    config = json.loads((tmp_path / "config.json").read_text())
    config["grafting"]["spec"]["model_class"] = "nowhere.models:ForeignTransformer"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        HostError, match=r"nowhere.models:ForeignTransformer, which cannot be imported: No module"
    ):
        load_model(tmp_path)
    config["grafting"]["spec"]["model_class"] = "os:path.join"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        GraftingError, match=r"holds a ForeignTransformer, and its graft was made with a host of join"
    ):
        load_model(tmp_path)


def test_a_checkpoint_that_brings_code_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "code.Model"}}))
    with pytest.raises(CheckpointError, match=r"brings code of its own .*trust_remote_code.*--spec FILE"):
        load_model(tmp_path)


def test_an_unknown_class_is_loaded_with_its_spec(tmp_path):
    _save_base(tmp_path / "base")
    with pytest.raises(HostError, match=r"no host for a model of class ForeignTransformer.*--spec FILE"):
        load_model(tmp_path / "base")
    spec = tmp_path / "foreign.yaml"
    spec.write_text(foreignmodel.SPEC.model_dump_json())
    assert use_spec(spec) is hosts()["foreign"]
    assert isinstance(load_model(tmp_path / "base")[0], foreignmodel.ForeignTransformer)


def test_faults_of_a_spec_are_one_error(tmp_path):
    spec = tmp_path / "spec.yaml"
    with pytest.raises(HostError, match="is missing"):
        load_spec(spec)
    spec.write_text("name: x\nblocks: []\norder: [rest]\nwidth: 3\n")
    with pytest.raises(HostError) as caught:
        load_spec(spec)
    message = str(caught.value)
    assert all(part in message for part in ("model_class: missing", "blocks: ", "width: unknown key"))
    other = foreignmodel.SPEC.model_copy(update={"name": "flux"})
    with pytest.raises(HostError, match="there is a host 'flux' already, of FluxTransformer2DModel"):
        use_spec(other)
    gone = foreignmodel.SPEC.model_copy(update={"model_class": "foreignmodel:Gone"})
    with pytest.raises(HostError, match="foreignmodel:Gone, which cannot be imported"):
        use_spec(gone)
    no_model = foreignmodel.SPEC.model_copy(update={"model_class": "foreignmodel:tiny"})
    with pytest.raises(HostError, match="is no class of models"):
        use_spec(no_model)


def test_a_spec_of_another_class_or_version_is_one_error():
    with pytest.raises(
        HostError,
        match="spec 'foreign' is of ForeignTransformer, and the model is a PixArtTransformer2DModel",
    ):
        graft(hosts()["pixart"].tiny(), PLAN, host=foreignmodel.host())
    blocks = (foreignmodel.SPEC.blocks[0].model_copy(update={"attention": "self_attn"}),)
    moved = SdpaHost(foreignmodel.SPEC.model_copy(update={"blocks": blocks}))
    with pytest.raises(
        HostError, match=r"does not fit ForeignTransformer: .*self_attn.*another version of its package"
    ):
        graft(foreignmodel.tiny(), PLAN, host=moved)


def test_the_random_weights_of_a_spec_do_not_load_where_it_says_otherwise(model, tmp_path):
    save_model(tmp_path, model, PLAN)
    loaded, plan = load_model(tmp_path)
    assert plan == PLAN
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name

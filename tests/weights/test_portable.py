"""Grafted models go through diffusers' own saving and loading, alone and in a pipeline, in another process too."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import PixArtSigmaPipeline
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

import grafting.portable
import tinypipeline
from closeness import assert_close
from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import graft
from grafting.errors import CheckpointError, PlanError
from grafting.hosts import LayoutTracker, host_of, hosts
from grafting.weights.folder import load, save_model
from grafting.weights.locate import GRAFTED_INDEX_NAME, GRAFTED_NAME
from grafting.weights.portable import Base, grafted_class, plan_of, with_plan

PIXART = hosts()["pixart"]
PLAN = Plan(
    edits=(
        Replace(role="attention", blocks=[1], operator="hyena-x"),
        Replace(role="attention", blocks=[0], operator={"name": "window-2d", "radius": 1}),
        Replace(role="mlp", blocks=[0], operator={"name": "mlp", "ratio": 2}),
    )
)


@pytest.fixture
def model():
    model = PIXART.tiny().eval()
    graft(model, PLAN)
    return model


def _output(model):
    torch.manual_seed(3)
    example = host_of(model).example(model, rows=4, cols=6, batch_size=2)
    with torch.no_grad():
        return host_of(model).predict(model, *_split(example))


def _split(example):
    return example.pop("hidden_states"), example.pop("timestep"), example


def test_a_pipeline_saves_its_grafted_model_and_another_process_loads_it(model, tmp_path):
    pipeline = tinypipeline.of(with_plan(model, PLAN))
    pipeline.save_pretrained(tmp_path / "pipeline")
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["transformer"] == ["grafting.portable", "GraftedPixArtTransformer2DModel"]
    here = tinypipeline.draw(pipeline)
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import grafting, tinypipeline
from diffusers import PixArtSigmaPipeline
from safetensors.torch import save_file
pipeline = PixArtSigmaPipeline.from_pretrained({str(tmp_path / "pipeline")!r})
assert type(pipeline.transformer.transformer_blocks[1].attn1.mixer).__name__ == "Hyena"
save_file({{"images": tinypipeline.draw(pipeline)}}, {str(tmp_path / "there.safetensors")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    there = load_file(tmp_path / "there.safetensors")["images"]
    # not bit for bit: only tests run on torch's deterministic algorithms
    assert_close("images", there, here, 1e-5)
    assert here.std() > 0.01


def test_a_pipeline_takes_a_loaded_model_for_its_own(model, tmp_path):
    tinypipeline.of(PIXART.tiny()).save_pretrained(tmp_path / "pipeline")
    save_model(tmp_path / "grafted", model, PLAN)
    loaded = load(tmp_path / "grafted")
    pipeline = PixArtSigmaPipeline.from_pretrained(tmp_path / "pipeline", transformer=loaded)
    assert torch.equal(_output(pipeline.transformer), _output(model))
    # and saves it with its plan
    pipeline.save_pretrained(tmp_path / "again")
    again = PixArtSigmaPipeline.from_pretrained(tmp_path / "again").transformer
    assert torch.equal(_output(again), _output(model))
    assert plan_of(load(tmp_path / "again" / "transformer")) == PLAN


@pytest.mark.parametrize("name", ["dit", "flux", "pixart", "sd3", "wan"])
def test_every_host_round_trips_through_diffusers(tmp_path, name):
    host = hosts()[name]
    model = host.tiny().eval()
    plan = Plan(edits=(Replace(role="attention", blocks=[1], operator={"name": "window-1d", "window": 2}),))
    graft(model, plan)
    same = with_plan(model, plan, base=Base(id="somewhere"))
    shared = zip(same.parameters(), model.parameters(), strict=True)
    assert all(ours.data_ptr() == theirs.data_ptr() for ours, theirs in shared)
    same.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / GRAFTED_INDEX_NAME).is_file()
    example = host.example(model, rows=4, cols=6, batch_size=2)
    for loaded in (type(same).from_pretrained(tmp_path), load(tmp_path)):
        assert isinstance(loaded, host.model_class)
        assert LayoutTracker.of(loaded) is not None
        assert torch.equal(loaded(**example)[0], model(**example)[0])
        assert loaded.config.grafting["base"]["id"] == "somewhere"


def test_a_saved_folder_is_read_by_diffusers_and_dtype_is_kept(model, tmp_path):
    save_model(tmp_path, model, PLAN)
    loaded = grafting.portable.GraftedPixArtTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    # the hashes of that folder are not those of what diffusers will write
    loaded.save_pretrained(tmp_path / "again")
    assert "weights_sha256" not in json.loads((tmp_path / "again" / "config.json").read_text())["grafting"]
    assert plan_of(load(tmp_path / "again")) == PLAN


def test_ema_of_a_grafted_model_round_trips(model, tmp_path):
    same = with_plan(model, PLAN)
    ema = EMAModel(same.parameters(), model_cls=type(same), model_config=same.config)
    ema.save_pretrained(tmp_path)
    loaded = EMAModel.from_pretrained(tmp_path, type(same))
    for got, want in zip(loaded.shadow_params, model.parameters(), strict=True):
        assert torch.equal(got, want)


def test_diffusers_refuses_what_it_would_only_warn_of(model, tmp_path):
    with_plan(model, PLAN).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / GRAFTED_NAME)
    tensors["extra"] = tensors.pop("transformer_blocks.1.attn1.mixer.out_proj.bias")
    save_file(tensors, tmp_path / GRAFTED_NAME, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match="missing keys: transformer_blocks.1.attn1.mixer.out_proj.bias\n"
    ):
        grafted_class(PIXART.model_class).from_pretrained(tmp_path)


def test_a_model_with_another_plan_is_refused(model):
    with pytest.raises(RuntimeError, match="Missing key"):
        with_plan(model, Plan(edits=PLAN.edits[:1]))
    with pytest.raises(PlanError, match="no block 9"):
        with_plan(model, Plan(edits=(Replace(role="attention", blocks=[9], operator="hyena-x"),)))


def test_training_state_is_kept(model):
    model.requires_grad_(False).train()
    model.transformer_blocks[1].requires_grad_(True)
    same = with_plan(model, PLAN)
    assert same.training
    trained = {name for name, p in same.named_parameters() if p.requires_grad}
    assert trained == {
        name for name, _ in model.named_parameters() if name.startswith("transformer_blocks.1.")
    }


def test_unknown_classes_are_attribute_errors():
    for name in ("GraftedUNet", "DiT", "Frobnicate"):
        with pytest.raises(AttributeError, match=f"'grafting.portable' has no attribute '{name}'"):
            getattr(grafting.portable, name)


def test_a_mixer_that_inherits_is_loaded_where_the_hosts_weights_are_not_drawn(tmp_path):
    model = hosts()["dit"].tiny().eval()
    plan = Plan(edits=(Replace(role="attention", blocks=[1], operator="mamba2"),))
    graft(model, plan)
    save_model(tmp_path, model, plan)
    loaded = grafted_class(hosts()["dit"].model_class).from_pretrained(tmp_path, low_cpu_mem_usage=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name

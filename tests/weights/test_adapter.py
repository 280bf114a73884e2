"""Adapters beside a model's weights: alone, beside a delta, and inside a pipeline; damaged ones are errors."""

import json
import shutil

import pytest
import torch
from diffusers import PixArtSigmaPipeline

import tinypipeline
from grafting.editing.adapters import adapters_of
from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import adapt, graft, merge_adapters
from grafting.errors import CheckpointError
from grafting.hosts import hosts
from grafting.weights.folder import load, merge_delta, save, save_delta, save_model
from grafting.weights.portable import Base, with_plan

pytest.importorskip("peft")

PIXART = hosts()["pixart"]
PLAN = Plan(edits=(Replace(role="attention", blocks=[1], operator={"name": "hyena-x", "kernel_size": 3}),))
NAMES = ["transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn2.to_out.0", "proj_out"]


@pytest.fixture
def adapted():
    """A grafted model with adapters that do something."""
    model = PIXART.tiny().eval()
    graft(model, PLAN)
    adapt(model, NAMES, rank=2, alpha=3.0)
    with torch.no_grad():
        for adapter in adapters_of(model).values():
            adapter.b.normal_(std=0.5)
    return model


def output(model):
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**PIXART.example(model, rows=4, cols=6, batch_size=2)).sample


def test_only_the_named_layers_are_adapted(adapted):
    """`proj_out` is also how other names end."""
    assert list(adapters_of(adapted)) == NAMES


def test_merged_is_what_both_compute(adapted):
    want = output(adapted)
    keys = PIXART.tiny().state_dict().keys()
    merge_adapters(adapted)
    assert torch.allclose(output(adapted), want, atol=1e-5)
    assert not adapters_of(adapted)
    assert not hasattr(adapted, "peft_config")
    left = {name for name in adapted.state_dict() if ".attn1." not in name}
    assert left == {name for name in keys if ".attn1." not in name}


def test_a_folder_is_loaded_with_its_adapter(adapted, tmp_path):
    want = output(adapted)
    files = save_model(tmp_path / "model", adapted, PLAN, base=Base(id="somewhere"))
    assert {path.name for path in files} == {
        "config.json", "model.safetensors", "adapter_model.safetensors", "adapter_config.json",
    }  # fmt: skip
    assert torch.allclose(output(load(tmp_path / "model")), want, atol=1e-5)
    # a later save without adapters leaves none behind
    merge_adapters(adapted)
    save_model(tmp_path / "model", adapted, PLAN)
    assert not list((tmp_path / "model").glob("adapter*"))
    assert torch.allclose(output(load(tmp_path / "model")), want, atol=1e-5)


def test_a_model_without_a_plan_is_loaded_with_its_adapter(tmp_path):
    model = PIXART.tiny().eval()
    adapt(model, NAMES, rank=2, alpha=2.0)
    with torch.no_grad():
        adapters_of(model)["proj_out"].b.fill_(0.1)
    want = output(model)
    save(model, tmp_path / "model")
    assert torch.allclose(output(load(tmp_path / "model")), want, atol=1e-5)


def test_a_delta_and_its_adapter_hold_what_is_new(adapted, tmp_path):
    source = PIXART.tiny().eval()
    source.load_state_dict(
        {name: t for name, t in _bare(adapted).items() if name in source.state_dict()}, strict=False
    )
    save(source, tmp_path / "source")
    save_delta(tmp_path / "delta", adapted, PLAN, Base(id=str(tmp_path / "source")))
    delta = json.loads((tmp_path / "delta" / "config.json").read_text())["grafting"]["delta"]
    assert {f"{name}.weight" for name in NAMES} <= delta["borrowed"].keys()
    want = output(adapted)
    assert torch.allclose(output(load(tmp_path / "delta")), want, atol=1e-5)
    merge_delta(tmp_path / "delta", tmp_path / "whole")
    assert not list((tmp_path / "whole").glob("adapter*"))
    assert torch.allclose(output(load(tmp_path / "whole")), want, atol=1e-5)


def _bare(model):
    from grafting.editing.adapters import without_adapters

    return without_adapters(model.state_dict())


def test_a_pipeline_loads_its_model_with_the_adapter(adapted, tmp_path):
    plain = PIXART.tiny().eval()
    graft(plain, PLAN)
    tinypipeline.of(with_plan(plain, PLAN)).save_pretrained(tmp_path / "pipeline")
    shutil.rmtree(tmp_path / "pipeline" / "transformer")
    save_model(tmp_path / "pipeline" / "transformer", adapted, PLAN)
    pipeline = PixArtSigmaPipeline.from_pretrained(tmp_path / "pipeline")
    assert torch.allclose(output(pipeline.transformer), output(adapted), atol=1e-5)
    given = PixArtSigmaPipeline.from_pretrained(
        tmp_path / "pipeline", transformer=load(tmp_path / "pipeline" / "transformer")
    )
    assert torch.equal(tinypipeline.draw(given), tinypipeline.draw(pipeline))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"peft_type": "LOHA"}, "is not the config of a low-rank adapter of peft"),
        ({"r": 0}, "is not the config of a low-rank adapter of peft"),
        ("not json", "is not the config of a low-rank adapter of peft"),
    ],
)
def test_a_damaged_description_is_an_error(adapted, tmp_path, damage, message):
    save_model(tmp_path, adapted, PLAN)
    path = tmp_path / "adapter_config.json"
    path.write_text(damage if isinstance(damage, str) else json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_an_adapter_of_another_model_is_an_error(adapted, tmp_path):
    save_model(tmp_path / "graft", adapted, PLAN)
    save(hosts()["dit"].tiny(), tmp_path / "other")
    for path in (tmp_path / "graft").glob("adapter*"):
        shutil.copy(path, tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"does not fit the model\n  proj_out: no such linear layer"):
        load(tmp_path / "other")


def test_adapters_of_several_ranks_are_not_saved(adapted, tmp_path):
    save_model(tmp_path / "model", adapted, PLAN)
    adapters_of(adapted)[NAMES[0]].layer.r["default"] = 3
    with pytest.raises(
        CheckpointError, match=r"adapters of several ranks and alphas, \[\(2, 3.0\), \(3, 3.0\)\]"
    ):
        save_model(tmp_path / "model", adapted, PLAN)
    # what was there is still whole
    assert load(tmp_path / "model")

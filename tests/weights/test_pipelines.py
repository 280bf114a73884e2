"""A graft in place goes with its model, and with every pipeline that holds it, through diffusers' own saving and loading."""

import copy
import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from diffusers import PixArtSigmaPipeline
from torch import nn
from typer.testing import CliRunner

import tinypipeline
from grafting import (
    CheckpointError,
    HostError,
    Plan,
    Replace,
    adapt,
    build_operators,
    graft,
    load,
    place,
    plan_of,
    trace,
)
from grafting.cli import app
from grafting.hosts import hosts
from grafting.machine.files import sha256_of
from grafting.runs.job import load_source
from grafting.weights.folder import save
from grafting.weights.locate import WEIGHTS_NAME
from hosts.pipelines import chroma

PIXART = hosts()["pixart"]
PLAN = Plan(edits=(Replace(role="attention", blocks=[1], operator="hyena-x"),))
MORE = Plan(edits=(Replace(role="attention", blocks=[0], operator="linear"),))


@pytest.fixture
def pipeline():
    return tinypipeline.of(PIXART.tiny())


def test_a_pipeline_that_could_not_draw_with_a_graft_is_refused_first():
    """Chroma's adds its mask as numbers; the transformer alone is called without one."""
    pipe, _ = chroma()
    plan = Plan(edits=[Replace(role="attention", operator="window-2d")])
    told = (
        "a ChromaPipeline cannot draw with a graft: its pipeline adds a mask of zeros and ones to the scores"
    )
    with pytest.raises(HostError, match=told):
        graft(pipe, plan)
    with pytest.raises(HostError, match=told):
        adapt(pipe, plan, prompts=["a cat"])
    assert plan_of(pipe.transformer) == Plan()
    assert len(graft(pipe.transformer, plan).operators) == 4


@pytest.mark.parametrize("of", [lambda p: p, lambda p: p.transformer], ids=["pipeline", "model"])
def test_a_pipeline_saves_the_graft_of_its_transformer(pipeline, tmp_path, of):
    untouched = tinypipeline.draw(pipeline)
    record = graft(of(pipeline), PLAN)
    assert record.model is pipeline.transformer
    drawn = tinypipeline.draw(pipeline)
    assert not torch.equal(drawn, untouched)
    pipeline.save_pretrained(tmp_path)
    again = PixArtSigmaPipeline.from_pretrained(tmp_path)
    assert plan_of(again.transformer) == PLAN
    assert torch.equal(tinypipeline.draw(again), drawn)
    assert plan_of(load(tmp_path)) == PLAN
    record.undo()
    assert type(pipeline.transformer) is PIXART.model_class
    assert pipeline.config["transformer"] == ("diffusers", "PixArtTransformer2DModel")
    assert "grafting" not in pipeline.transformer.config
    assert torch.equal(tinypipeline.draw(pipeline), untouched)


class Attending(nn.Module):
    """A layer of attention of four heads."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(32), Attending()

    def forward(self, x):
        return x + self.attention(self.norm(x))


class Plain(nn.Module):
    """A transformer that is none of diffusers' models, on images [B, H, W, 4]."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 32), nn.Linear(32, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x, t):
        y = self.inner(x).flatten(1, 2) + t[:, None, None]
        for block in self.blocks:
            y = block(y)
        return self.outer(y).unflatten(1, x.shape[1:3])


def test_a_graft_of_a_model_without_a_config_stays_in_memory():
    model = Plain()
    inputs = {"x": torch.randn(1, 6, 8, 4), "t": torch.tensor([0.3])}
    before = model(**inputs)
    found = trace(model, example=inputs)
    record = graft(model, Plan(edits=[Replace(role="attention", operator="window-2d")]), host=found.host)
    assert type(model) is Plain
    assert not torch.equal(model(**inputs), before)
    record.undo()
    assert torch.equal(model(**inputs), before)


@pytest.mark.slow
def test_without_this_package_a_grafted_pipeline_does_not_load(pipeline, tmp_path):
    graft(pipeline, PLAN)
    pipeline.save_pretrained(tmp_path)
    code = f"from diffusers import PixArtSigmaPipeline as P; P.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode
    assert "grafting.portable" in done.stderr


def test_the_last_undo_gives_the_class_back(pipeline):
    first = graft(pipeline, PLAN)
    second = graft(pipeline, MORE)
    assert {edit.operator.name for edit in plan_of(pipeline.transformer).edits} == {"hyena-x", "linear"}
    second.undo()
    assert plan_of(pipeline.transformer) == PLAN
    first.undo()
    assert type(pipeline.transformer) is PIXART.model_class


def test_operators_that_are_placed_are_saved_as_well(pipeline, tmp_path):
    record = place(pipeline.transformer, build_operators(pipeline.transformer, PLAN))
    graft(pipeline, MORE)
    assert repr(record).startswith("Graft of PixArtTransformer2DModel, 1 places edited")
    pipeline.save_pretrained(tmp_path)
    again = PixArtSigmaPipeline.from_pretrained(tmp_path).transformer
    assert len(plan_of(again).edits) == 2
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in pipeline.transformer.state_dict().items())


@pytest.mark.parametrize("name", ["dit", "flux", "pixart", "sd3", "wan"])
def test_a_model_grafted_in_place_saves_itself_whole(name, tmp_path):
    model = hosts()[name].tiny().eval()
    graft(model, MORE)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert plan_of(loaded) == MORE
    for twin in (loaded, load(tmp_path), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(t, twin.state_dict()[n]) for n, t in model.state_dict().items())


def test_what_has_no_transformer_is_told_so(pipeline):
    with pytest.raises(HostError, match="a AutoencoderKL|no host for a model of class AutoencoderKL"):
        graft(pipeline.vae, PLAN)
    with pytest.raises(
        HostError, match="a DDIMScheduler is neither a model nor a pipeline with a transformer"
    ):
        graft(pipeline.scheduler, PLAN)
    del pipeline.transformer
    with pytest.raises(HostError, match="neither a model nor a pipeline"):
        graft({"transformer": None}, PLAN)


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"safe_serialization": False}, {}], ids=str)
def test_pipeline_folders_are_read(pipeline, tmp_path, options):
    want = pipeline.transformer.state_dict()
    pipeline.save_pretrained(tmp_path / "pipeline", **options)
    loaded = load(tmp_path / "pipeline")
    assert all(torch.equal(tensor, want[name]) for name, tensor in loaded.state_dict().items())
    listed = CliRunner().invoke(app, ["sites", str(tmp_path / "pipeline"), "--json"])
    assert listed.exit_code == 0, listed.output
    assert len(json.loads(listed.stdout)["sites"]) == 4
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "pipeline"), str(tmp_path / "converted")])
    assert done.exit_code == 0, done.output
    converted = load(tmp_path / "converted").state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in converted.items())


def test_a_recipe_starts_from_a_pipeline_folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    found, from_transformer = (load_source(str(folder)) for folder in (tmp_path, tmp_path / "transformer"))
    assert found[1] == from_transformer[1] == sha256_of(tmp_path / "transformer" / WEIGHTS_NAME)
    want = pipeline.transformer.state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in found[0].state_dict().items())


def test_a_pipeline_without_a_transformer_says_what_it_has(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "transformer")
    with pytest.raises(
        CheckpointError, match="is a pipeline without `transformer/config.json`; its models are vae"
    ):
        load(tmp_path)


def test_variants_in_shards_are_read(tmp_path):
    model = PIXART.tiny()
    for variant, options in (
        (None, {}),
        ("fp16", {"variant": "fp16"}),
        ("bin", {"safe_serialization": False}),
    ):
        folder = tmp_path / str(variant)
        model.save_pretrained(folder, max_shard_size="40KB", **options)
        assert len(list(folder.iterdir())) > 4
        loaded = load(folder).state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    save(model, tmp_path / "again")

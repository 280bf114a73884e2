"""What is not finite stops a stage at its start, with its place; a log is JSON whatever a step's values are."""

import json
import math

import pytest
import torch

from grafting.contract import Step
from grafting.data.latents import INDEX_NAME, LatentsConfig, write_latents, write_shard
from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import build_operators
from grafting.errors import DataError, TrainingError
from grafting.hosts import hosts
from grafting.machine.files import write_json
from grafting.runs.folder import RunFolder, read_log
from grafting.training.calibration import CalibrateConfig, calibrate
from grafting.training.distillation import DistillConfig, distill
from grafting.training.finetuning import FinetuneConfig, finetune
from grafting.training.guard import GuardConfig
from toydata import denoiser, noise_images

HOST = hosts()["dit"]
PLAN = Plan(edits=(Replace(role="attention", blocks=[1], operator="mha"),))


class WithBadItem:
    """64 images, of which number 9 is infinite."""

    num_classes = 10

    def __len__(self):
        return 64

    def batch(self, indices):
        x = torch.zeros(len(indices), 1, 16, 16)
        x[indices == 9] = math.inf
        return x, indices % 10


def stages(teacher, data, *, policy=None):
    operators = build_operators(teacher, PLAN)
    guard = None if policy is None else GuardConfig(policy=policy, max=1000)
    distilling = DistillConfig(steps=8, batch_size=8, holdout=8, guard=guard)
    finetuning = FinetuneConfig(steps=8, batch_size=8, guard=guard)
    calibrating = CalibrateConfig(samples=64, batch_size=8)
    return {
        "calibration": lambda: calibrate(teacher, operators, data, calibrating, denoiser=denoiser()),
        "stage 1": lambda: distill(teacher, operators, data, distilling, denoiser=denoiser()),
        "stage 2": lambda: finetune(teacher, data, finetuning, denoiser=denoiser()),
    }


STAGES = ("calibration", "stage 1", "stage 2")
policies = pytest.mark.parametrize("policy", [None, "stop", "skip", "rollback"])


@policies
def test_latents_that_are_not_finite_are_named(tmp_path, policy):
    latents, labels = torch.randn(64, 1, 16, 16), torch.arange(64) % 10
    facts = {"source": "toy", "vae": "toy", "scale": 1.0, "num_classes": 10, "shard_size": 32}
    index = write_latents(tmp_path, [(latents, labels)], **facts)
    latents[::8, 0, 3] = torch.nan  # as who does not write by us may have them
    halves = enumerate(zip(latents.half().split(32), labels.split(32), strict=True))
    shards = tuple(write_shard(tmp_path, number, *half) for number, half in halves)
    write_json(tmp_path / INDEX_NAME, index.model_copy(update={"shards": shards}).model_dump(mode="json"))
    data = LatentsConfig(folder=tmp_path).load()
    for stage, start in stages(HOST.tiny(), data, policy=policy).items():
        with pytest.raises(
            DataError, match=r"latents-0000\d.safetensors: row \d+ of `latents` .* not finite"
        ):
            list(start())
        assert stage


@pytest.mark.parametrize("stage", STAGES)
def test_an_item_that_is_not_finite_is_named(stage):
    with pytest.raises(DataError, match="item 9 of the training data .* not finite"):
        list(stages(HOST.tiny(), WithBadItem())[stage]())


@policies
@pytest.mark.parametrize("stage", STAGES)
def test_a_source_whose_weights_are_not_finite_is_told_so(stage, policy):
    teacher = HOST.tiny()
    teacher.blocks[2].mlp.fc1.weight.data[5, 1] = torch.nan
    with pytest.raises(
        TrainingError,
        match=rf"{stage}: the model's own weights are not finite: blocks.2.mlp.fc1.weight, row 5 \(1 of",
    ):
        list(stages(teacher, noise_images(64, size=16), policy=policy)[stage]())


def test_activations_that_are_not_finite_are_named():
    teacher = HOST.tiny()
    with torch.no_grad():
        teacher.blocks[0].attn.proj.weight.mul_(1e30)
        teacher.blocks[0].adaLN_modulation[1].bias.fill_(1e30)
    with pytest.raises(TrainingError, match=r"stage 1, blocks.1.attn: the teacher's output .* is not finite"):
        list(stages(teacher, noise_images(64, size=16), policy="skip")["stage 1"]())


def test_a_log_is_json_whatever_the_values_are(tmp_path):
    def steps():
        yield Step(done=1, total=2, values={"loss/a": 0.5, "r2/a": math.nan})
        yield Step(done=2, total=2, values={"loss/a": -math.inf})

    with RunFolder(tmp_path, recipe_name="r") as run, run.stage("distill", 1) as stage:
        assert len(list(stage.follow(steps(), save_every=None))) == 2
    path = tmp_path / "distill" / "log.jsonl"
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert lines == read_log(path)
    assert (lines[0]["loss/a"], lines[0]["r2/a"], lines[0]["not_finite"]) == (0.5, None, ["r2/a"])
    assert (lines[1]["loss/a"], lines[1]["not_finite"]) == (None, ["loss/a"])


def test_json_files_have_null_for_what_is_no_number(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1.5, math.nan, (math.inf,)], "b": {"c": -math.inf, "d": True}})
    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert found == {"a": [1.5, None, [None]], "b": {"c": None, "d": True}}

"""Whole runs through the command line, on CUDA: killed, resumed, sampled, and gone on with on the other device."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml

from grafting.sampling.files import read_samples
from tinyrecipe import SAVED_OFTEN

pytestmark = pytest.mark.gpu
KILLED = """
import os, signal, sys
from grafting.runs.file import load_recipe
from grafting.runs.run import run

def kill(stage, step):
    if (stage, step.done) == (sys.argv[3], int(sys.argv[4])):
        os.kill(os.getpid(), signal.SIGKILL)

run(load_recipe(sys.argv[1]), sys.argv[2] and __import__("pathlib").Path(sys.argv[2]), on_step=kill)
"""


def started(*arguments, device, code=None):
    """A process that sees the device or, for the CPU, no other."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {}
    command = ["-c", code] if code else ["-m", "grafting"]
    return subprocess.run(
        [sys.executable, *command, *map(str, arguments)],
        env=os.environ | hidden | {"JAXTYPING_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def says(*arguments, device):
    done = started(*arguments, device=device)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(SAVED_OFTEN))
    return path


def losses(folder, stage):
    """The loss of each step, of the last time that it was taken."""
    lines = [json.loads(line) for line in (folder / stage / "log.jsonl").read_text().splitlines()]
    kept = {line["step"]: line for line in lines if "step" in line}
    return {
        step: sum(value for name, value in line.items() if name == "loss" or name.startswith("loss/"))
        for step, line in kept.items()
    }


def test_a_run_is_killed_resumed_and_gone_on_with_elsewhere(recipe, device, tmp_path):
    cpu, whole = torch.device("cpu"), tmp_path / "whole"
    says("run", recipe, "--out", whole, device=device)
    assert (whole / "report.html").is_file()
    rows = json.loads((whole / "metrics.json").read_text())
    assert [row["name"] for row in rows] == ["pretrained", "random", "inherited", "distilled", "finetuned"]
    assert all(row["ms_per_image"] > 0 for row in rows)
    for name, stage, second in (("a", "distill", device), ("b", "finetune", cpu)):
        folder = tmp_path / name
        killed = started(recipe, folder, stage, 5, device=device, code=KILLED)
        assert killed.returncode == -9, killed.stderr[-3000:]
        says("run", recipe, "--out", folder, device=second)
        for trained in ("distill", "finetune"):
            want = losses(whole, trained)
            assert losses(folder, trained) == pytest.approx(want, rel=1e-3 if second == device else 2e-2)
    manifest = json.loads((whole / "manifest.json").read_text())
    assert device.type in json.dumps(manifest)


def test_samples_are_those_of_the_cpu(device, tmp_path):
    options = ("--num", 6, "--steps", 4, "--sampler", "ddim", "--batch-size", 4, "--precision", "fp32")
    for name, where in (("cpu", torch.device("cpu")), ("there", device)):
        says("sample", "testbed", *options, "--out", tmp_path / f"{name}.npz", device=where)
    want, got = (read_samples(tmp_path / f"{name}.npz") for name in ("cpu", "there"))
    assert torch.equal(got.labels, want.labels)
    difference = (got.images.int() - want.images.int()).abs()
    assert difference.max() <= 2
    assert (difference > 0).float().mean() <= 0.01


def test_the_doctor_finds_the_device(device):
    found = json.loads(says("doctor", "--json", device=device))
    assert found["device"].startswith(device.type)
    assert found["problems"] == []
    assert bool(found["gpus"]) == (device.type == "cuda")
    assert all(gflops > 0 for gflops in found["gflops"].values())


def test_a_plan_is_measured(recipe, device):
    found = json.loads(says("cost", recipe, "--measure", "--json", device=device))
    assert found["measured"]["ms"]["before"] > 0
    assert found["measured"]["peak_bytes"]["after"] > 0
    said = json.loads(says("locality", "testbed", "--noised", "--images", "20", "--json", device=device))
    assert said["sites"]


def test_a_graft_of_a_model_on_the_cpu_leaves_cuda_alone(device):
    """What only edits on the CPU makes no context on a GPU, so that processes may be forked after it."""
    code = """
import torch
from grafting import Plan, Replace, graft
from grafting.hosts import hosts
torch.manual_seed(1)
graft(hosts()["dit"].tiny(), Plan(edits=(Replace(role="attention", operator="hyena-x"),)))
assert not torch.cuda.is_initialized()
"""
    done = started(device=device, code=code)
    assert done.returncode == 0, done.stderr[-3000:]

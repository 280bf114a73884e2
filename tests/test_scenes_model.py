"""The bundled model of scenes: it draws what its card says, on the command line and as a pipeline of diffusers."""

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import grafting
from closeness import assert_close
from grafting.cli import app
from grafting.data import Captions
from grafting.data.bundled import scenes_pipeline_folder
from grafting.diffusion import FlowMatching
from grafting.hosts import host_of
from grafting.machine.files import sha256_of
from grafting.machine.randomness import sample_noise
from grafting.runs.file import load_recipe
from grafting.sampling.chain import SamplingConfig, sample

FOLDER = scenes_pipeline_folder()
SHAPE, COUNT, STEPS = (3, 32, 32), 6, 6
ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes/scenes"


def test_the_pipeline_of_the_page_draws_the_images_of_our_sampler():
    model = grafting.load("scenes").eval()
    config = SamplingConfig(
        sampler="dpm-solver++", steps=STEPS, cfg_scale=3.0, clip=True, num_images=COUNT, precision="fp32"
    )
    denoiser = host_of(model).denoiser(model, Captions(), FlowMatching(scale=1000.0, shift=1.5))
    ours = torch.cat([batch.x for batch in sample(model, config, denoiser=denoiser)])

    page = (ROOT / "docs" / "scenes.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    fewer = block.replace("num_inference_steps=20", f"num_inference_steps={STEPS}, latents=noise")
    assert fewer != block
    names = {"noise": sample_noise(0, list(range(COUNT)), SHAPE)}
    exec(fewer, names)
    assert_close("pipeline", names["images"], ours, 1e-4)


def test_the_command_line_draws_and_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, result.output
        return result.stdout

    call("sample", "scenes", "--num", "12", "--steps", "8", "--cfg-scale", "3", "--clip")
    found = json.loads(call("evaluate", "samples.npz", "--suite", "scenes", "--json"))
    # the card's figure at 20 steps is 0.81; of noise it is 0
    assert found["true"] > 0.4
    assert found["background"] < 5
    call("init", "mine.yaml", "--source", "scenes")
    mine, quickstart = load_recipe("mine.yaml"), load_recipe(RECIPES / "quickstart.yaml")
    for section in ("plan", "data", "calibrate", "distill", "finetune", "sample"):
        assert getattr(mine, section) == getattr(quickstart, section), section


def test_the_card_is_of_these_weights():
    card = (FOLDER / "README.md").read_text()
    weights = FOLDER / "transformer/diffusion_pytorch_model.safetensors"
    assert sha256_of(weights) in card
    assert f"{weights.stat().st_size:,} bytes" in card
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 8e6


def test_recipes_are_guided_as_the_card_found_best():
    card = (FOLDER / "README.md").read_text()
    scales, exact = (
        [float(cell) for cell in line.strip("| ").split("|")[1:]]
        for line in card.splitlines()
        if line.startswith(("| guidance", "| exact"))
    )
    best = scales[exact.index(max(exact))]
    assert load_recipe(RECIPES / "quickstart.yaml").sample.cfg_scale == best

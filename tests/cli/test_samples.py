"""`grafting sample`: many processes, killed and called again, latents through an autoencoder, pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from commandline import fails, says
from grafting.data.latents import write_latents
from grafting.editing.plan import Plan
from grafting.errors import ProtocolError, ResumeWarning
from grafting.functional.pixels import to_uint8
from grafting.hosts import hosts
from grafting.latents.autoencoder import load_autoencoder
from grafting.models.dit import DiT
from grafting.runs.job import prepare
from grafting.runs.recipe import Recipe
from grafting.runs.run import run
from grafting.sampling.chain import SamplingConfig, sample
from grafting.sampling.files import open_samples, origin_of, read_samples
from grafting.weights.folder import save_model
from imagefiles import write_vae
from processes import run_in_processes

FEW = ("--num", 10, "--steps", 2, "--sampler", "ddim", "--batch-size", 4)
LATENTS = {
    "input_size": 8,
    "in_channels": 2,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 10,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path, Path]:
    """Models of grey pixels and of latents, and an autoencoder of those latents."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    save_model(folder / "pixels", hosts()["dit"].tiny(), Plan())
    save_model(folder / "latents", DiT(**LATENTS), Plan())
    write_vae(folder / "vae")
    return folder / "pixels", folder / "latents", folder / "vae"


def test_one_or_two_processes_write_the_same_file(tmp_path, folders):
    says("sample", folders[0], *FEW, "--out", tmp_path / "1.npz")
    out = tmp_path / "2.npz"
    assert says("sample", folders[0], *FEW, "--out", out, RANK="1", WORLD_SIZE="2") == ""
    assert not out.exists()
    assert len(list((tmp_path / "2.shards").glob("shard-*"))) == 1
    said = says("sample", folders[0], *FEW, "--out", out, RANK="0", WORLD_SIZE="2")
    assert "4 of 10 images were already drawn" in said
    assert "sample 10/10" in said
    assert f"10 images: {out}, {out.with_suffix('.png')}" in said
    assert "images/s, 2 processes" in said
    assert out.read_bytes() == (tmp_path / "1.npz").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"1.npz", "1.png", "2.npz", "2.png"}


def test_again_is_not_drawn_again_and_others_are_not_written_over(tmp_path, folders):
    command = ("sample", folders[0], *FEW, "--out", tmp_path / "s.npz")
    says(*command)
    content = (tmp_path / "s.npz").read_bytes()
    assert "s.npz, already drawn" in says(*command, "--png", tmp_path / "png")
    assert len(list((tmp_path / "png").glob("*.png"))) == 10
    message = fails(*command, "--seed", 1)
    assert "s.npz exists and holds other images: name another file, or remove it" in message
    assert "sampling.seed: 0 there, 1 asked" in message
    assert (tmp_path / "s.npz").read_bytes() == content


def test_every_image_becomes_a_picture_if_asked(tmp_path, folders):
    says("sample", folders[0], *FEW, "--out", tmp_path / "s.npz", "--png", tmp_path / "png")
    images = read_samples(tmp_path / "s.npz").images
    for number in (0, 9):
        with Image.open(tmp_path / "png" / f"{number:06}.png") as picture:
            assert np.array_equal(np.asarray(picture), images[number, 0].numpy())


def test_latents_become_pixels(tmp_path, folders):
    _, latents, vae = folders
    options = ("--vae", vae, "--guided-channels", 1, "--cfg-scale", 1.5, "--vae-batch-size", 3)
    said = says("sample", latents, *FEW, *options, "--out", tmp_path / "s.npz")
    assert "s.png" in said
    file = open_samples(tmp_path / "s.npz")
    assert (file.num_images, file.shape) == (10, (3, 16, 16))
    sampling = file.origin["sampling"]
    assert (sampling["guided_channels"], sampling["clip"]) == (1, False)
    assert sampling["vae"]["sha256"] == load_autoencoder(vae).sha256
    assert sampling["vae"]["scale"] == 0.3611
    assert file.record["vae"] == load_autoencoder(vae).describe()

    config = SamplingConfig(
        sampler="ddim", steps=2, cfg_scale=1.5, guided_channels=1, num_images=10, batch_size=4
    )
    model = DiT.from_pretrained(latents)
    drawn = sample(model, config, denoiser=hosts()["dit"].denoiser(model), shape=(2, 8, 8))
    want = torch.cat([to_uint8(load_autoencoder(vae).decode(batch.x)) for batch in drawn])
    difference = (read_samples(tmp_path / "s.npz").images.int() - want.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= 1e-3


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (1, (), "makes latents of 2 channels, and no autoencoder is named"),
        (0, ("--vae", "{vae}"), "takes latents of 2: a model of pixels needs none"),
        (1, ("--vae", "{vae}/nowhere"), "no autoencoder in"),
        (1, ("--vae", "{vae}", "--guided-channels", 3), "guided_channels is 3, but images have 2 channels"),
        (0, ("--precision", "fp8"), "--precision: Input should be 'auto', 'fp32' or 'bf16', found 'fp8'"),
        (1, ("--vae-batch-size", 3, "--vae-tiling"), "--vae-batch-size and --vae-tiling: only with --vae"),
        (0, ("--batch-size", 0), "--batch-size: Input should be greater than 0, found 0"),
        (1, ("--vae", "{vae}", "--vae-batch-size", 0), "--vae-batch-size: Input should be greater than 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_told_before_any_work(tmp_path, folders, model, options, message):
    options = [str(option).format(vae=folders[2]) for option in options]
    assert message in fails("sample", folders[model], *FEW, *options, "--out", tmp_path / "s.npz")
    assert not list(tmp_path.iterdir())


def test_an_environment_that_makes_no_sense(tmp_path, folders):
    message = fails("sample", folders[0], *FEW, "--out", tmp_path / "s.npz", RANK="first", WORLD_SIZE="2")
    assert "RANK is 'first', not a number" in message


def recipe(folder: Path, vae: dict | None) -> Recipe:
    """A run without training, of a model of latents."""
    latents = [(torch.randn(12, 2, 8, 8), torch.arange(12) % 10)]
    write_latents(folder / "data", latents, source="noise", vae="toy", scale=1.0, num_classes=10)
    return Recipe.model_validate(
        {
            "name": "latents",
            "source": {"host": "dit", "config": LATENTS},
            "data": {"name": "latents", "folder": str(folder / "data")},
            "sample": {
                "sampler": "ddim",
                "steps": 2,
                "num_images": 10,
                "batch_size": 4,
                "guided_channels": 1,
            },
            "vae": vae,
        }
    )


def test_a_recipe_of_latents_samples_pixels(tmp_path, folders):
    made = recipe(tmp_path, {"source": str(folders[2])})
    run(made, tmp_path / "run", until="sample")
    file = open_samples(tmp_path / "run/samples/pretrained.safetensors")
    assert (file.num_images, file.shape) == (10, (3, 16, 16))
    job = prepare(made)
    assert file.origin == origin_of(made.sample, vae=job.decoder.identity)
    assert not (tmp_path / "run/samples/pretrained/shards").exists()
    log = (tmp_path / "run/samples/pretrained/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [4, 8, 10]
    # another decoder, other samples
    seen = []
    again = recipe(tmp_path, {"source": str(folders[2]), "precision": "bf16"})
    with pytest.warns(
        ResumeWarning,
        match=r"pretrained is made again, and what follows from it: vae.precision \('fp32', now 'bf16'\)",
    ):
        run(again, tmp_path / "run", until="sample", on_step=lambda stage, step: seen.append(stage))
    assert seen == ["sample pretrained"] * 3


def _sampled(made: Recipe, folder: Path) -> list[int]:
    """Carries a recipe out, perhaps as one of several processes; says after how many images its steps were told."""
    seen = []
    run(made, folder, until="sample", on_step=lambda stage, step: seen.append(step.done))
    return seen


def test_two_processes_sample_a_recipe_as_one_does(tmp_path, folders):
    made = recipe(tmp_path, {"source": str(folders[2])})
    _sampled(made, tmp_path / "1")
    first, second = run_in_processes(_sampled, made, tmp_path / "2")
    assert first[-1] == 10
    assert second == []  # the main one tells
    log = (tmp_path / "2/samples/pretrained/log.jsonl").read_text().splitlines()
    assert len(log) == 2  # of three batches
    name = "samples/pretrained.safetensors"
    assert (tmp_path / "2" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


def test_a_recipe_of_latents_without_an_autoencoder_is_refused(tmp_path):
    with pytest.raises(ProtocolError, match="makes latents of 2 channels.*`vae: {source: ...}` in a recipe"):
        run(recipe(tmp_path, None), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_killed_and_called_again(tmp_path, folders):
    """The whole way: two real processes, SIGKILL at work, and the same command again."""
    # not --num: of torchrun's own options it could be several
    options = ["--num-images", "60", "--steps", "40", "--sampler", "ddim", "--batch-size", "4"]
    arguments = ["-m", "grafting", "sample", str(folders[0]), *options]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*torchrun, *arguments, "--out", str(tmp_path / "2.npz")]
    process = subprocess.Popen(command)
    while len(list(tmp_path.glob("2.shards/shard-*"))) < 4 and process.poll() is None:
        pass
    assert process.poll() is None
    for part in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
        part.kill()
    process.wait()
    drawn = len(list(tmp_path.glob("2.shards/shard-*")))
    assert 4 <= drawn < 15
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "of 60 images were already drawn" in said
    one = [sys.executable, *arguments, "--out", str(tmp_path / "1.npz")]
    subprocess.run(one, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (tmp_path / "2.npz").read_bytes() == (tmp_path / "1.npz").read_bytes()

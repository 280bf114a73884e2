"""`grafting data latents` from the outside: one command makes latents of images, says what it takes, and goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import imagefiles
import publishedlatents
from grafting.cli import app
from grafting.data.latents import LatentsConfig, read_index
from grafting.machine.files import sha256_of


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae") / "toy"
    imagefiles.write_vae(folder)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return imagefiles.write_folder(tmp_path / "images" / "train")


def call(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["data", "latents", *map(str, arguments)])
    return result.exit_code, result.output


def test_images_become_latents_and_the_second_time_nothing_is_done(images: Path, vae: Path, tmp_path: Path):
    options = ("--vae", vae, "--size", 16, "--shard-size", 5, "--batch-size", 2, "--workers", 2)
    code, output = call(tmp_path / "out", "--images", images, *options)
    assert code == 0, output
    assert "12 images of 3 classes, of images/train" in output
    assert "12 items in 3 shards; 12 images left to encode, 6.19e-06 GB" in output
    assert "A first batch took" in output
    assert "latents 12/12" in output
    assert f"Latents: {tmp_path / 'out'}, 12 items in 3 shards" in output
    assert len(LatentsConfig(folder=tmp_path / "out").load()) == 12
    code, output = call(tmp_path / "out", "--images", images, *options)
    assert code == 0
    assert "0 images left to encode" in output


def test_dry_run_says_and_writes_nothing(images: Path, vae: Path, tmp_path: Path):
    code, output = call(
        tmp_path / "out", "--images", images, "--vae", vae, "--size", 16, "--flip", "--dry-run"
    )
    assert code == 0, output
    assert "24 items in 1 shards; 12 images left to encode" in output
    assert not (tmp_path / "out").exists()


def test_tars(vae: Path, tmp_path: Path):
    tars = imagefiles.write_image_tars(tmp_path / "tars")
    code, output = call(tmp_path / "a", "--tars", tars, "--vae", vae, "--size", 16, "--num-classes", 10)
    assert code == 0, output
    assert read_index(tmp_path / "a").num_classes == 10


def test_published_latents(tmp_path: Path):
    source = tmp_path / "published" / "split_000000.tar"
    imagefiles.write_tar(source, publishedlatents.members(range(3)))
    code, output = call(tmp_path / "out", "--published", source, "--dry-run")
    assert code == 0, output
    assert not (tmp_path / "out").exists()
    code, output = call(tmp_path / "out", "--published", source, "--dtype", "fp32")
    assert code == 0, output
    assert "3 published latents, of" in output
    assert read_index(tmp_path / "out").count == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one source of --images, --tars, --dataset, --published; found none"),
        (("--images", "a", "--tars", "b"), "found --images and --tars"),
        (("--images", "nowhere"), "no folder nowhere"),
        (("--published", "a", "--size", "16"), "--published cannot be combined with --size"),
        (
            ("--published", "a", "--dtype", "fp8"),
            "dtype: Input should be 'fp16', 'bf16' or 'fp32', found 'fp8'",
        ),
        (("--images", "a", "--num-classes", "3"), "--num-classes does not go with --images"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments, message: str):
    result = CliRunner().invoke(app, ["data", "latents", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 1
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_no_autoencoder_there(images: Path, tmp_path: Path):
    code, output = call(tmp_path / "out", "--images", images, "--vae", tmp_path)
    assert code == 1
    assert "no autoencoder in" in output


@pytest.mark.slow
def test_two_processes_of_the_command_line(images: Path, vae: Path, tmp_path: Path):
    """As torchrun starts them: RANK and WORLD_SIZE in the environment are enough."""
    options = ["--images", images, "--vae", vae, "--size", 16, "--shard-size", 5, "--batch-size", 2]
    command = [sys.executable, "-m", "grafting", "data", "latents"]
    processes = [
        subprocess.Popen(
            [*command, str(tmp_path / "two"), *map(str, options)],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    subprocess.run(
        [*command, str(tmp_path / "one"), *map(str, options)],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    files = {p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("[!.]*") if p.is_file()}
    assert files == {
        p.relative_to(tmp_path / "two") for p in (tmp_path / "two").rglob("[!.]*") if p.is_file()
    }
    assert all(sha256_of(tmp_path / "one" / f) == sha256_of(tmp_path / "two" / f) for f in files)

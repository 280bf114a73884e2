"""The autoencoder of a folder: its moments and images are diffusers' own; what is not one is refused."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from closeness import assert_close
from grafting.errors import CheckpointError
from grafting.latents.autoencoder import load_autoencoder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def save(folder: Path, **settings) -> AutoencoderKL:
    """A random autoencoder that makes 16x16 pixels one of its latent's; with Flux's scale and shift."""
    sizes = {"block_out_channels": (8, 8, 8, 8, 8), "latent_channels": 4, "norm_num_groups": 4}
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 5,
        "up_block_types": ("UpDecoderBlock2D",) * 5,
    }
    vae = AutoencoderKL(**blocks, **sizes, **{"scaling_factor": 0.3611, "shift_factor": 0.1159} | settings)
    vae.eval().save_pretrained(folder)
    return vae


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "toy")
    return tmp_path / "toy"


def test_moments_and_images_are_those_of_diffusers(tmp_path: Path):
    vae = save(tmp_path / "toy")
    loaded = load_autoencoder(tmp_path / "toy")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        posterior = vae.encode(images.float() / 127.5 - 1).latent_dist
        latents = torch.randn(2, 4, 2, 2)
        want = vae.decode(latents / 0.3611 + 0.1159).sample
    mean, log_variance = loaded.encode(images).chunk(2, dim=1)
    assert_close("mean", mean, posterior.mean, ratio=1e-6)
    assert_close("log variance", log_variance, posterior.logvar, ratio=1e-6)
    assert_close("images", loaded.decode(latents), want, ratio=1e-5)
    assert (loaded.scale, loaded.shift, loaded.factor, loaded.channels) == (0.3611, 0.1159, 16, 4)
    assert (loaded.name, loaded.revision) == ("toy", None)


def test_a_vae_without_a_shift(tmp_path: Path):
    save(tmp_path / "toy", scaling_factor=0.18215, shift_factor=None)
    assert load_autoencoder(tmp_path / "toy").shift == 0.0


def test_bf16_is_close_and_not_the_same(folder: Path):
    loaded, images = load_autoencoder(folder), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    exact, rough = loaded.encode(images), loaded.encode(images, precision="bf16")
    assert rough.dtype == torch.float32
    assert_close("moments", rough, exact, ratio=0.05)
    assert not torch.equal(rough, exact)


def test_hash_is_of_config_and_weights(folder: Path, tmp_path: Path):
    first = load_autoencoder(folder)
    moved = load_autoencoder(folder.rename(tmp_path / "moved"))
    assert (moved.name, moved.sha256) == ("moved", first.sha256)
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    (tmp_path / "moved" / "config.json").write_text(json.dumps(config | {"scaling_factor": 1.0}))
    assert load_autoencoder(tmp_path / "moved").sha256 != first.sha256


def test_a_pipelines_autoencoder_is_in_its_vae_folder(tmp_path: Path):
    save(tmp_path / "pixart" / "vae")
    (tmp_path / "pixart" / "model_index.json").write_text("{}")
    assert load_autoencoder(tmp_path / "pixart").name == "pixart/vae"


def test_the_hubs_commit_is_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The Hub's cache as its client lays it out, without the Hub."""
    repository = tmp_path / "cache" / "models--owner--toy-vae"
    (repository / "snapshots").mkdir(parents=True)
    folder.rename(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for revision in (None, COMMIT):
        loaded = load_autoencoder("owner/toy-vae", revision=revision)
        assert (loaded.name, loaded.revision) == ("owner/toy-vae", COMMIT)


def test_weights_with_the_attention_names_of_older_releases(folder: Path):
    """`sd-vae-ft-ema` was published so; diffusers renames them as it loads."""
    want = load_autoencoder(folder).module.state_dict()
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(folder / WEIGHTS)
    for new, old in names.items():
        tensors = {key.replace(f"0.{new}.", f"0.{old}."): value for key, value in tensors.items()}
    assert any("proj_attn" in key for key in tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    got = load_autoencoder(folder).module.state_dict()
    assert all(torch.equal(got[key], want[key]) for key in want)


def _drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["quant_conv.bias"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _configure(**changes):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no autoencoder in .*toy: it has no config.json"),
        (lambda folder: (folder / "config.json").write_text("["), "config.json is not a config of diffusers"),
        (lambda folder: (folder / WEIGHTS).unlink(), "toy is not an autoencoder that can be read"),
        (
            lambda folder: (folder / WEIGHTS).write_bytes(b"short"),
            "toy is not an autoencoder that can be read",
        ),
        (_drop_tensor, "not those of its config:\n  quant_conv.bias is missing"),
        (_configure(_class_name=None), "toy holds a model without a class, not an AutoencoderKL"),
        (
            _configure(_class_name=None, architectures=["CLIPTextModel"]),
            "toy holds a CLIPTextModel, not an AutoencoderKL",
        ),
        (_configure(_class_name="DiT"), "toy holds a DiT, not an AutoencoderKL"),
        (_configure(latents_mean=[0.0] * 4), "has a mean and scale for each channel"),
    ],
)
def test_what_is_no_autoencoder(folder: Path, damage, message: str):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_autoencoder(folder)

"""From samples to pixels: DiT's rounding, and an autoencoder's decoder with the scale and shift of its config."""

from pathlib import Path

import pytest
import torch

from grafting.errors import CheckpointError, GraftingError, ProtocolError, SettingsError
from grafting.latents.decoding import Decoder, VaeConfig, load_decoder
from imagefiles import write_vae

SHAPE = (2, 8, 8)  # of a latent; `write_vae` makes 16x16 pixels of it


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    write_vae(tmp_path / "toy")
    return tmp_path / "toy"


def decoder(folder: Path, **settings) -> Decoder:
    return load_decoder(SHAPE, VaeConfig(source=str(folder), **settings))


def test_images_are_those_of_diffusers_rounded_as_in_dit(folder, tmp_path):
    vae = write_vae(tmp_path / "again")
    latents = 0.3611 * torch.randn(5, *SHAPE)
    with torch.no_grad():
        x = vae.decode(latents / 0.3611 + 0.1159).sample
    want = torch.clamp(127.5 * x + 128, 0, 255).to(torch.uint8)
    got = decoder(tmp_path / "again", batch_size=5)(latents)
    assert torch.equal(got, want)
    assert got.shape == (5, 3, 16, 16)
    assert got.float().std() > 3


def test_batches_change_nothing_but_rounding(folder):
    latents = torch.randn(5, *SHAPE)
    want = decoder(folder, batch_size=5)(latents).int()
    for batch_size in (1, 2):
        got = decoder(folder, batch_size=batch_size)(latents).int()
        assert (got - want).abs().max() <= 1
        assert (got != want).float().mean() <= 1e-3


def test_what_a_decoder_is_is_on_record(folder):
    plain, other = decoder(folder), decoder(folder, precision="bf16", tiling=True)
    assert plain.image_shape(SHAPE) == (3, 16, 16)
    assert plain.describe() == {"name": "toy", "revision": None, "sha256": plain.identity["sha256"]}
    assert plain.identity == {
        "sha256": plain.identity["sha256"],
        "scale": 0.3611,
        "shift": 0.1159,
        "precision": "fp32",
        "tiling": False,
    }
    assert len(plain.identity["sha256"]) == 64
    assert other.identity == plain.identity | {"precision": "bf16", "tiling": True}
    latents = torch.randn(2, *SHAPE)
    assert not torch.equal(plain(latents), other(latents))


def test_large_latents_are_decoded_in_tiles(folder):
    large = torch.randn(1, 2, 384, 40)
    whole, tiled = decoder(folder)(large).float(), decoder(folder, tiling=True)(large).float()
    assert whole.shape == tiled.shape == (1, 3, 768, 80)
    # a tile's group norms see the tile alone
    assert 0 < (whole - tiled).abs().mean() < 20


def test_models_of_pixels_need_no_autoencoder():
    for channels in (1, 3):
        made = load_decoder((channels, 8, 8), None)
        assert made.identity is None
        assert made.describe() is None
        assert made.image_shape((channels, 8, 8)) == (channels, 8, 8)
        x = torch.tensor([-1.2, -1.0, 0.0, 0.999, 2.0]).expand(1, channels, 1, 5)
        assert made(x)[0, 0, 0].tolist() == [0, 0, 128, 255, 255]


def test_latents_without_or_with_another_autoencoder_are_refused(folder):
    with pytest.raises(
        ProtocolError, match=r"makes latents of 4 channels, and no autoencoder is named.*--vae"
    ):
        load_decoder((4, 8, 8), None)
    with pytest.raises(ProtocolError, match="makes 4 channels, the autoencoder toy takes latents of 2"):
        load_decoder((4, 8, 8), VaeConfig(source=str(folder)))
    with pytest.raises(ProtocolError, match="a model of pixels needs none"):
        load_decoder((3, 8, 8), VaeConfig(source=str(folder)))
    with pytest.raises(CheckpointError, match="no autoencoder in"):
        load_decoder(SHAPE, VaeConfig(source=str(folder / "nowhere")))


def test_what_has_diverged_becomes_no_pixels(folder):
    with pytest.raises(GraftingError, match="not finite"):
        decoder(folder)(torch.full((1, *SHAPE), float("nan")))


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"precision": "fp8"}, {"tile": True}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(SettingsError, match=next(iter(settings))):
        VaeConfig(source="x", **settings)

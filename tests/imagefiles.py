"""Real images, of the bundled Fashion-MNIST, written out as people have them: folders and WebDataset tars; a tiny autoencoder."""

import io
import json
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKL
from PIL import Image

from grafting.data.bundled import bundled_subset
from grafting.data.images import ImageSet

CLASSES = ("Bag", "Coat", "Dress")
_LABELS = {"Bag": 8, "Coat": 4, "Dress": 3}


@cache
def _subset() -> ImageSet:
    return bundled_subset()


def encoded(class_name: str, number: int, *, kind: str = "PNG", size: tuple[int, int] = (28, 28)) -> bytes:
    """An image of a class, by number, enlarged to width and height."""
    images = _subset()
    where = (images.labels == _LABELS[class_name]).nonzero().flatten()[number]
    picture = Image.fromarray(images.images[where, 0].numpy()).resize(size)
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def write_folder(folder: Path, *, per_class: int = 4) -> Path:
    """CLASS/NAME.png of `per_class` images of each class; one has ImageNet's ending, one is larger and not square."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            (folder / name / f"{name}_{number:03}.png").write_bytes(encoded(name, number))
    first = folder / "Bag" / "Bag_000.png"
    first.with_suffix(".JPEG").write_bytes(encoded("Bag", 0, kind="JPEG", size=(90, 140)))
    first.unlink()
    return folder


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_image_tars(folder: Path) -> Path:
    """Two tars of 3 and 2 images; the first says classes by `cls`, the second by `json`."""
    first: dict[str, bytes] = {}
    for number, name in enumerate(CLASSES):
        first |= {f"a/{number}.png": encoded(name, number), f"a/{number}.cls": str(number).encode()}
    second: dict[str, bytes] = {}
    for number, name in enumerate(CLASSES[1:], 1):
        facts = json.dumps({"label": number, "text": name}).encode()
        second |= {f"{number}.jpg": encoded(name, number, kind="JPEG"), f"{number}.json": facts}
    write_tar(folder / "b-000001.tar", second)
    write_tar(folder / "b-000000.tar", first)
    return folder


def write_vae(folder: Path) -> AutoencoderKL:
    """A random autoencoder that makes 2x2 pixels one of its latent's, with Flux's scale and shift."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "latent_channels": 2, "norm_num_groups": 4}
    vae = AutoencoderKL(**blocks, **sizes, scaling_factor=0.3611, shift_factor=0.1159).eval()
    vae.save_pretrained(folder)
    return vae


def noise_image(width: int, height: int, *, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)

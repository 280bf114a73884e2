"""The autoencoder between images and latents: diffusers' `AutoencoderKL`, from a folder or the Hub, with what identifies it.

A diffusion model sees `scale * (latent - shift)`, both from the autoencoder's config. Encoding gives the posterior's mean and
log variance and not a sample, decoding takes what a diffusion model makes.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from pydantic import JsonValue
from torch import Tensor

from ..errors import CheckpointError, listed
from ..machine.files import sha256_of
from ..machine.precision import Precision, resolve_precision
from ..machine.reading import JsonObject, cut, damage, read_json
from ..weights.locate import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME, find_folder

# of a folder of an autoencoder alone, and of one of a whole pipeline
_FILES = (CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME, "diffusion_pytorch_model-*.safetensors")
VAE_FILES = (*_FILES, *(f"vae/{name}" for name in _FILES))

_CLASS = "AutoencoderKL"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """An `AutoencoderKL` in eval mode, in float32, and what identifies it."""

    module: Any  # diffusers' class, which takes seconds to import
    name: str  # `owner/name` on the Hub, or the name of its folder
    revision: str | None  # the commit on the Hub; None of a local folder
    sha256: str  # of its config and weights

    @property
    def scale(self) -> float:
        return float(self.module.config["scaling_factor"])

    @property
    def shift(self) -> float:
        return float(self.module.config["shift_factor"] or 0.0)

    @property
    def factor(self) -> int:
        """Pixels of an image a side for one of a latent."""
        return 2 ** (len(self.module.config["block_out_channels"]) - 1)

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return int(self.module.config["latent_channels"])

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def to(self, device: torch.device) -> "Autoencoder":
        """This autoencoder, moved to a device."""
        self.module.to(device)
        return self

    def encode(
        self, images: UInt8[Tensor, "b 3 h w"], *, precision: Precision = "fp32"
    ) -> Float[Tensor, "b c2 h2 w2"]:
        """The posterior of images: means, then log variances within -30 and 20; unscaled, float32, on the CPU.

        Source: the bounds are those of diffusers' `DiagonalGaussianDistribution`.
        """
        with self._running(precision):
            pixels = images.to(self.device, non_blocking=True).float() / 127.5 - 1
            posterior = self.module.encode(pixels).latent_dist
            return torch.cat([posterior.mean, posterior.logvar], dim=1).float().cpu()

    def decode(
        self, latents: Float[Tensor, "b c h w"], *, precision: Precision = "fp32"
    ) -> Float[Tensor, "b 3 h2 w2"]:
        """The images, about in [-1, 1], of latents as a diffusion model makes them: scaled and shifted; on the CPU."""
        with self._running(precision):
            unscaled = latents.to(self.device).float() / self.scale + self.shift
            return self.module.decode(unscaled).sample.float().cpu()

    def describe(self) -> dict[str, JsonValue]:
        """Identity, as JSON."""
        return {"name": self.name, "revision": self.revision, "sha256": self.sha256}

    @contextmanager
    def _running(self, precision: Precision) -> Iterator[None]:
        """No gradients, and the same algorithms at every call, so that what is done again comes out the same."""
        bf16 = resolve_precision(precision, self.device) == "bf16"
        with (
            torch.no_grad(),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
            torch.autocast(self.device.type, torch.bfloat16, enabled=bf16),
        ):
            yield


def load_autoencoder(
    source: str | Path, *, revision: str | None = None, device: torch.device | None = None
) -> Autoencoder:
    """The autoencoder of a folder or of `owner/name` on the Hub; a pipeline's is found in its `vae` folder.

    Args:
        revision: branch, tag or commit on the Hub; the commit that it stands for is kept.

    Raises:
        CheckpointError: there is none, it is damaged, of another class, or scales each channel on its own.
    """
    found = find_folder(source, revision=revision, patterns=VAE_FILES)
    folder = found / "vae" if (found / "vae" / CONFIG_NAME).is_file() else found
    _check_config(folder)
    from_hub = _COMMIT.fullmatch(found.name) is not None and not Path(source).exists()
    vae = Autoencoder(
        module=_load(folder).eval().requires_grad_(False),
        name=str(source) if from_hub else _name_of(folder),
        revision=found.name if from_hub else None,
        sha256=_sha256_of(folder),
    )
    return vae.to(device or torch.device("cpu"))


def _check_config(folder: Path) -> None:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(
            f"no autoencoder in {folder}: it has no {CONFIG_NAME}; give the folder of a diffusers AutoencoderKL or of "
            f"a pipeline that has one, or owner/name on the Hub"
        )
    config = read_json(path, JsonObject, kind="a config of diffusers")
    name = config.get("_class_name")
    if name != _CLASS:
        classes = config.get("architectures")  # as transformers writes it
        found = name or (", ".join(map(str, classes)) if isinstance(classes, list) else "")
        raise CheckpointError(
            f"{folder} holds a {cut(str(found)) or 'model without a class'}, not an AutoencoderKL"
        )
    if config.get("latents_mean") or config.get("latents_std"):
        raise CheckpointError(
            f"the autoencoder in {folder} has a mean and scale for each channel (latents_mean, latents_std); "
            f"only one scale and shift for all are known"
        )


def _load(folder: Path) -> Any:
    from diffusers.models import AutoencoderKL

    # diffusers opens the files: whatever it raises
    with damage(folder, "an autoencoder that can be read"):
        module, info = AutoencoderKL.from_pretrained(
            folder,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            local_files_only=True,
            output_loading_info=True,
        )
    faults = [f"{key} is missing" for key in info["missing_keys"]]
    faults += [f"{key} is unknown" for key in info["unexpected_keys"]]
    if faults:
        raise CheckpointError(listed(f"the weights in {folder} are not those of its config:", faults, most=8))
    return module


def _name_of(folder: Path) -> str:
    """`vae` alone would say nothing."""
    path = folder.resolve()
    return f"{path.parent.name}/vae" if path.name == "vae" else path.name


def _sha256_of(folder: Path) -> str:
    names = sorted({path.name for pattern in _FILES for path in folder.glob(pattern)})
    digest = hashlib.sha256("".join(f"{sha256_of(folder / name)}  {name}\n" for name in names).encode())
    return digest.hexdigest()

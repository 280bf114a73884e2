"""From what a model makes to 8-bit pixels: by rounding where it makes pixels, through a VAE where latents."""

import torch
from jaxtyping import Float, UInt8
from pydantic import JsonValue, PositiveInt
from torch import Tensor

from ..errors import ProtocolError
from ..functional.pixels import to_uint8
from ..machine.precision import Precision, settled
from ..machine.settings import Settings
from .autoencoder import Autoencoder, load_autoencoder

# channels of images: grey and colour; anything else is a latent
_PIXEL_CHANNELS = (1, 3)


class VaeConfig(Settings):
    """The autoencoder that makes pixels of a model's latents."""

    source: str
    """Autoencoder that decodes latents: a folder of diffusers' AutoencoderKL, or of a pipeline that has one in `vae`; or
    owner/name on the Hub."""
    revision: str | None = None
    """Branch, tag or commit of the autoencoder on the Hub."""
    batch_size: PositiveInt = 16
    """Latents decoded per batch; changes speed and memory, not the images (up to float rounding). 1 needs least memory."""
    tiling: bool = False
    """Decode large latents in overlapping tiles, which saves memory and changes the images a little."""
    precision: Precision = "auto"
    """Precision of the decoder's forward pass: fp32, bf16 (by autocast) or auto (bf16 where it is faster)."""


class Decoder:
    """Makes 8-bit images of what a model makes: with an autoencoder, or by rounding alone where there is none."""

    def __init__(self, vae: Autoencoder | None = None, config: VaeConfig | None = None):
        assert (vae is None) == (config is None)
        self._vae, self._config = vae, config
        if vae is not None and config is not None:
            (vae.module.enable_tiling if config.tiling else vae.module.disable_tiling)()

    def to(self, device: torch.device) -> "Decoder":
        """This decoder, moved to a device."""
        if self._vae is not None:
            self._vae.to(device)
        return self

    @property
    def identity(self) -> dict[str, JsonValue] | None:
        """All that pixels depend on beside the samples, as JSON; None without an autoencoder. Names are no part of it."""
        if self._vae is None or self._config is None:
            return None
        vae, config = self._vae, settled(self._config, self._vae.device)
        return {
            "sha256": vae.sha256,
            "scale": vae.scale,
            "shift": vae.shift,
            "precision": config.precision,
            "tiling": config.tiling,
        }

    def describe(self) -> dict[str, JsonValue] | None:
        """The autoencoder's name, revision and hash, for the record; None without one."""
        return None if self._vae is None else self._vae.describe()

    def image_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Channels, height and width of the images of samples [c, h, w]; videos have frames after the channels."""
        if self._vae is None:
            return shape
        _, height, width = shape
        channels = int(self._vae.module.config["out_channels"])
        return (channels, height * self._vae.factor, width * self._vae.factor)

    def __call__(self, x: Float[Tensor, "b c *size"]) -> UInt8[Tensor, "b c2 *size2"]:
        """8-bit images of samples as the model makes them, by DiT's rounding; on the CPU."""
        if self._vae is None or self._config is None:
            return to_uint8(x).cpu()
        vae, precision = self._vae, self._config.precision
        parts = x.split(self._config.batch_size)
        return torch.cat([to_uint8(vae.decode(part, precision=precision)) for part in parts])


def load_decoder(shape: tuple[int, ...], config: VaeConfig | None) -> Decoder:
    """Build the decoder that turns a model's samples [c, h, w] into pixels, on the CPU.

    Raises:
        ProtocolError: a model of latents without an autoencoder, or an autoencoder of other latents.
        CheckpointError: the autoencoder is missing or damaged.
    """
    if config is None:
        if not makes_pixels(shape):
            raise ProtocolError(
                f"the model makes latents of {shape[0]} channels, and no autoencoder is named that makes pixels of "
                "them: name its folder or owner/name on the Hub, with --vae, or `vae: {source: ...}` in a recipe"
            )
        return Decoder()
    if len(shape) != 3:
        raise ProtocolError(
            f"the model makes videos of latents {list(shape)}, and the autoencoder that `vae` names is of images: leave it out "
            "where nothing is sampled"
        )
    vae = load_autoencoder(config.source, revision=config.revision)
    if vae.channels != shape[0]:
        raise ProtocolError(
            f"the model makes {shape[0]} channels, the autoencoder {vae.name} takes latents of {vae.channels}"
            + (": a model of pixels needs none" if makes_pixels(shape) else "")
        )
    return Decoder(vae, config)


def makes_pixels(shape: tuple[int, ...]) -> bool:
    """True if samples [c, h, w] or [c, frames, h, w] are grey or colour images, not latents."""
    return shape[0] in _PIXEL_CHANNELS

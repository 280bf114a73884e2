"""Feature networks behind one interface: 8-bit images in, features (class logits, spatial features) out.

Metrics are functions of these features; nothing here or in them knows which network made the features.
"""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from ..errors import DataError


class Features(NamedTuple):
    """Output of a feature network for B images."""

    pooled: Float[Tensor, "b f"]
    logits: Float[Tensor, "b k"] | None  # None: the network has no classes
    spatial: Float[Tensor, "b s"] | None = None  # of an earlier layer, with positions; None: it gives none


@runtime_checkable
class FeatureNetwork(Protocol):
    """A fixed network that turns images [B, C, H, W] of 8-bit pixels into features.

    It resizes and normalises by itself, and each image's features depend on that image alone.
    """

    @property
    def name(self) -> str:
        """Display name; part of every protocol."""
        ...

    @property
    def sha256(self) -> str:
        """A hash of its weights, as `weights_sha256` makes it; part of every protocol."""
        ...

    def __call__(self, images: UInt8[Tensor, "b c h w"]) -> Features: ...


class ModuleNetwork(nn.Module):
    """A feature network from a module whose forward gives (features [B, F], logits [B, K] or None).

    It may give spatial features [B, S] as well, which ADM's suite needs.

    The module is put in eval mode, and images are moved to where its weights are.

    Args:
        module: takes 8-bit images [B, C, H, W].
        name: what it is called in protocols.
    """

    def __init__(self, module: nn.Module, name: str):
        super().__init__()
        self.name = name
        self.module = module.eval()
        self.sha256 = weights_sha256(module)

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> Features:
        device = next(self.module.parameters()).device
        return Features(*self.module(images.to(device)))


def extract(network: FeatureNetwork, images: Tensor) -> Features:
    """Features of the images, float32 on the CPU, without gradients.

    Raises:
        DataError: the images are not 8-bit [B, C, H, W], or the network does not give one finite row an image.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise DataError(
            f"metrics take 8-bit images [B, C, H, W]; found {images.dtype} {list(images.shape)}. "
            f"functional.pixels.to_uint8 makes them from images in [-1, 1]"
        )
    with torch.no_grad():
        pooled, logits, spatial = network(images)
    return Features(
        _checked(pooled, "features", network, len(images)),
        None if logits is None else _checked(logits, "logits", network, len(images)),
        None if spatial is None else _checked(spatial, "spatial features", network, len(images)),
    )


def weights_sha256(module: nn.Module) -> str:
    """A hash of a module's parameters and buffers: their names, dtypes, shapes and values."""
    return tensors_sha256(module.state_dict())


def tensors_sha256(tensors: Mapping[str, Tensor], *labels: str) -> str:
    """A hash of named tensors, in the order of their names, after some words."""
    digest = hashlib.sha256(repr(labels).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _checked(rows: Tensor, what: str, network: FeatureNetwork, num_images: int) -> Tensor:
    if rows.ndim != 2 or len(rows) != num_images:
        raise DataError(
            f"feature network {network.name!r} gave {what} {list(rows.shape)} for {num_images} images; "
            f"one row per image is needed"
        )
    rows = rows.float().cpu()
    bad = int((~rows.isfinite()).any(dim=1).sum())
    if bad:
        raise DataError(
            f"feature network {network.name!r} gave {what} that are not finite for {bad} of {num_images} images"
        )
    return rows

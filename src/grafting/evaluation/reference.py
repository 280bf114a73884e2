"""Reference for evaluation: statistics of all reference images, and features of a random part of them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ..errors import CheckpointError, DataError, ProtocolError
from ..machine.files import write_bytes
from ..machine.randomness import generator
from ..machine.reading import damage, read_safetensors, shown
from ..metrics.features import FeatureNetwork, extract, tensors_sha256
from ..metrics.frechet import FeatureStatistics
from ..metrics.kid import mean_kernel
from ..metrics.manifold import neighbour_radii
from .protocol import Identified, Identity

_REFERENCE_FORMAT = "grafting-reference-1"


@dataclass(frozen=True)
class Reference:
    """Reference for evaluation: statistics of all reference images, and features of a random part of them."""

    name: str
    network: Identity
    statistics: FeatureStatistics
    features: Float[Tensor, "m f"]
    sha256: str = field(init=False)
    _radii: dict[int, Tensor] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self):
        digest = tensors_sha256(self._tensors(), self.name, self.network.name, self.network.sha256)
        object.__setattr__(self, "sha256", digest)

    @classmethod
    def build(
        cls,
        batches: Iterable[Tensor],
        network: FeatureNetwork,
        *,
        name: str,
        num_features: int = 5000,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> "Reference":
        """The reference of images [B, C, H, W] of 8 bits, in one pass; the size of batches does not matter.

        Args:
            batches: the reference images.
            network: what makes features of them, and must make those of measured images.
            name: what protocols call it.
            num_features: rows kept for the metrics that need rows, drawn at random.
            dtype: in which those rows are kept.

        Raises:
            DataError: no two images, images that are not 8-bit, or features that are not finite.
        """
        draw = generator(seed)
        statistics: FeatureStatistics | None = None
        kept: _Sample | None = None
        for images in batches:
            features = extract(network, images).pooled
            keys = torch.rand(len(features), generator=draw, dtype=torch.float64)
            batch, sample = FeatureStatistics.of(features), _Sample(keys, features).smallest(num_features)
            statistics = batch if statistics is None else statistics.merge(batch)
            kept = sample if kept is None else kept.merge(sample, num_features)
        if statistics is None or kept is None or statistics.count < 2:
            raise DataError(f"reference {name!r} needs at least 2 images; got fewer")
        rows = kept.rows.to(dtype)
        if not rows.isfinite().all():
            raise DataError(f"features of reference {name!r} are too large for {dtype}; keep torch.float32")
        return cls(name, Identity(name=network.name, sha256=network.sha256), statistics, rows)

    def save(self, path: Path) -> None:
        """Write the reference to one safetensors file, atomically."""
        metadata = {
            "format": _REFERENCE_FORMAT,
            "name": self.name,
            "network_name": self.network.name,
            "network_sha256": self.network.sha256,
            "sha256": self.sha256,
        }
        write_bytes(path, safetensors.torch.save(self._tensors(), metadata))

    @classmethod
    def load(cls, path: Path, network: FeatureNetwork | None = None) -> "Reference":
        """Load what `save` wrote; with `network`, only if that network made its features.

        Raises:
            CheckpointError: no such file, or it is damaged or something else.
            ProtocolError: another feature network made it.
        """
        metadata, tensors = read_reference(path, _REFERENCE_FORMAT)
        with damage(path, "a complete reference"):
            reference = cls(
                metadata["name"],
                Identity(name=metadata["network_name"], sha256=metadata["network_sha256"]),
                FeatureStatistics.from_tensors(tensors),
                tensors["features"],
            )
        if reference.sha256 != metadata.get("sha256"):
            raise CheckpointError(f"{path} is damaged: its content does not have the hash written in it")
        if network is not None:
            check_made_by(reference.name, reference.network, network)
        return reference

    def radii(self, k: int) -> Float64[Tensor, " m"]:
        """The distance from each row of the features to its k-th neighbour; computed once."""
        if k not in self._radii:
            self._radii[k] = neighbour_radii(self.features.float(), k)
        return self._radii[k]

    @cached_property
    def mean_kernel(self) -> float:
        """The kernel distance's mean over pairs of rows of the features."""
        return mean_kernel(self.features.float())

    def _tensors(self) -> dict[str, Tensor]:
        return self.statistics.to_tensors() | {"features": self.features}


class _Sample(NamedTuple):
    """Rows drawn uniformly from a stream of unknown length: those with the smallest of as many random keys."""

    keys: Float[Tensor, " n"]
    rows: Float[Tensor, "n f"]

    def smallest(self, limit: int) -> "_Sample":
        order = self.keys.argsort()[:limit]
        return _Sample(self.keys[order], self.rows[order])

    def merge(self, other: "_Sample", limit: int) -> "_Sample":
        entering = (
            other.keys < self.keys[-1] if len(self.keys) == limit else torch.ones_like(other.keys).bool()
        )
        if not entering.any():
            return self
        keys, rows = (torch.cat([mine, its[entering]]) for mine, its in zip(self, other, strict=True))
        return _Sample(keys, rows).smallest(limit)


def check_made_by(name: str, maker: Identity, network: Identified) -> None:
    """Refuses a network that did not make the features of reference `name`.

    Raises:
        ProtocolError: by its hash it is another one than `maker`.
    """
    if network.sha256 != maker.sha256:
        raise ProtocolError(
            f"reference {name!r} holds features of network {maker.name!r} "
            f"(sha256 {maker.sha256[:12]}), not of {network.name!r} ({network.sha256[:12]}); "
            f"build a reference with the network in use"
        )


def read_reference(path: Path, form: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The words and tensors of a reference's file.

    Raises:
        CheckpointError: no such file, or it is damaged or not of format `form`.
    """
    tensors, words = read_safetensors(path)
    if words.get("format") != form:
        raise CheckpointError(
            f"{path} is not a reference of this library: its format is {shown(words.get('format'))}, not {form!r}"
        )
    return words, tensors

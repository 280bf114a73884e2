"""What ADM's suite measures against: ADM's own .npz, images alone, or what `AdmReference.save` wrote."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, UInt8
from pydantic import JsonValue
from torch import Tensor

from ..contract import Step
from ..errors import CheckpointError, DataError, listed
from ..machine.files import sha256_of, write_bytes
from ..machine.reading import NpzFile, damage
from ..metrics.features import FeatureNetwork, tensors_sha256
from ..metrics.frechet import Gaussian, frechet_distance
from ._gathered import Gathered, check_width, spatial_features
from .protocol import Identity
from .reference import check_made_by, read_reference
from .suite import OnStep

_REFERENCE_FORMAT = "grafting-adm-reference-1"
_STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
_IMAGES = "arr_0"


@dataclass(frozen=True)
class AdmReference:
    """Statistics of a reference's features, and the features of its images.

    Args:
        name: what protocols call it.
        sha256: of the .npz file that it is of, whatever device made the features.
        network: what made the features.
        pooled: mean and covariance of pooled features.
        spatial: of spatial features, positions row by row, channels last.
        features: pooled features of the file's images; None if it has statistics alone.
        statistics: whether the statistics stood in the file or are those of its images.
        spread: where the file has both, the Frechet distances, pooled and spatial, of its images from its statistics.
            On the published network these are about those of as many real images; else one of the two is not what
            made the statistics.
    """

    name: str
    sha256: str
    network: Identity
    pooled: Gaussian
    spatial: Gaussian
    features: Float[Tensor, "m f"] | None
    statistics: Literal["given", "computed"]
    spread: tuple[float, float] | None

    @classmethod
    def of_npz(
        cls,
        path: Path,
        network: FeatureNetwork,
        *,
        batch_size: int = 64,
        on_step: OnStep | None = None,
    ) -> "AdmReference":
        """The reference of an .npz file, by one call of the network for each `batch_size` of its images.

        `on_step` is called after each of them.

        Raises:
            DataError: the file is missing or damaged, holds neither, or does not fit the network.
        """
        check_adm_reference(path)
        file = NpzFile(path)
        gathered = Gathered()
        if _IMAGES in file.names:
            total = file.header(_IMAGES)[0][0]
            for images in _images(file, batch_size):
                gathered.add(spatial_features(network, images))
                if on_step is not None:
                    on_step(Step(done=gathered.count, total=total))
        given = set(_STATISTICS) <= file.names
        if given:
            pooled, spatial = (
                Gaussian(_matrix(file, mean), _matrix(file, covariance))
                for mean, covariance in (_STATISTICS[:2], _STATISTICS[2:])
            )
        else:
            pooled, spatial = gathered.gaussians()
        features = gathered.pooled() if gathered.count else None
        if given and features is not None:
            check_width(path, network, features, pooled, "mu")
            check_width(path, network, gathered.spatial.mean[None], spatial, "mu_s")
        spread = None
        if given and gathered.count > 1:
            own = gathered.gaussians()
            spread = frechet_distance(own[0], pooled), frechet_distance(own[1], spatial)
        return cls(
            name=path.stem,
            sha256=sha256_of(path),
            network=Identity(name=network.name, sha256=network.sha256),
            pooled=pooled,
            spatial=spatial,
            features=features,
            statistics="given" if given else "computed",
            spread=spread,
        )

    def save(self, path: Path) -> None:
        """Write the reference to one safetensors file, atomically: reading it takes no call of the network."""
        words = {
            "format": _REFERENCE_FORMAT,
            "name": self.name,
            "source_sha256": self.sha256,
            "network_name": self.network.name,
            "network_sha256": self.network.sha256,
            "statistics": self.statistics,
            "spread": "" if self.spread is None else " ".join(map(repr, self.spread)),
            "sha256": tensors_sha256(self._tensors()),
        }
        write_bytes(path, safetensors.torch.save(self._tensors(), words))

    @classmethod
    def load(cls, path: Path, network: FeatureNetwork) -> "AdmReference":
        """Load what `save` wrote, if that network made its features.

        Raises:
            CheckpointError: no such file, or it is damaged or something else.
            ProtocolError: another feature network made it.
        """
        words, tensors = read_reference(path, _REFERENCE_FORMAT)
        if tensors_sha256(tensors) != words.get("sha256"):
            raise CheckpointError(f"{path} is damaged: its content does not have the hash written in it")
        with damage(path, "a complete reference"):
            maker = Identity(name=words["network_name"], sha256=words["network_sha256"])
            check_made_by(words["name"], maker, network)
            pooled, spatial = (
                (float(number) for number in words["spread"].split()) if words["spread"] else (0.0, 0.0)
            )
            return cls(
                name=words["name"],
                sha256=words["source_sha256"],
                network=maker,
                pooled=Gaussian(tensors["pooled.mean"], tensors["pooled.covariance"]),
                spatial=Gaussian(tensors["spatial.mean"], tensors["spatial.covariance"]),
                features=tensors.get("features"),
                statistics="given" if words["statistics"] == "given" else "computed",
                spread=(pooled, spatial) if words["spread"] else None,
            )

    @property
    def num_images(self) -> int:
        return 0 if self.features is None else len(self.features)

    def facts(self) -> dict[str, JsonValue]:
        """Facts as JSON."""
        return {
            "num_images": self.num_images,
            "name": self.name,
            "sha256": self.sha256,
            "network": self.network.model_dump(),
            "statistics": self.statistics,
            "spread": None if self.spread is None else list(self.spread),
        }

    def words(self) -> list[str]:
        """The same as lines of text."""
        origin = "as the file has them" if self.statistics == "given" else "of these images"
        lines = [f"{self.num_images} images, statistics {origin}, features of {self.network.name}"]
        if self.spread is not None:
            pooled, spatial = self.spread
            lines.append(
                f"Distance from its statistics to its own images: {pooled:.4g} (pooled) and {spatial:.4g} (spatial)"
            )
        return lines

    def _tensors(self) -> dict[str, Tensor]:
        moments = {
            f"{name}.{field}": tensor
            for name, gaussian in (("pooled", self.pooled), ("spatial", self.spatial))
            for field, tensor in (("mean", gaussian.mean), ("covariance", gaussian.covariance))
        }
        return moments if self.features is None else moments | {"features": self.features}


def open_adm_reference(
    path: str | Path,
    network: FeatureNetwork,
    *,
    batch_size: int = 64,
    on_step: OnStep | None = None,
) -> AdmReference:
    """The reference of an .npz file or of a file that `AdmReference.save` wrote. Raises as either does."""
    path = Path(path)
    if path.suffix == ".npz":
        return AdmReference.of_npz(path, network, batch_size=batch_size, on_step=on_step)
    return AdmReference.load(path, network)


def _matrix(file: NpzFile, name: str) -> Tensor:
    """An array of floats as float64."""
    values = file.array(name)
    if values.dtype.kind != "f":
        raise DataError(f"{file.path}: {name} is {values.dtype}, statistics are floats")
    return torch.from_numpy(values.astype(np.float64))


def _images(file: NpzFile, batch_size: int) -> Iterator[UInt8[Tensor, "b c h w"]]:
    """The images of a file, some at a time, in their order."""
    shape, dtype, by_columns = file.header(_IMAGES)
    if dtype != np.uint8 or len(shape) != 4 or by_columns:
        found = "an array stored by columns" if by_columns else f"{dtype} {list(shape)}"
        raise DataError(f"{file.path}: {_IMAGES} must be images, uint8 [N, H, W, C]; found {found}")
    for rows in file.rows(_IMAGES, batch_size):
        yield torch.from_numpy(rows).permute(0, 3, 1, 2)


def check_adm_reference(path: Path) -> None:
    """Looks at what a reference's file has, without reading much of it.

    Raises:
        DataError, CheckpointError: it is missing or something else, or its arrays do not belong together.
    """
    if path.suffix != ".npz":
        read_reference(path, _REFERENCE_FORMAT)
        return
    file = NpzFile(path)
    missing = [name for name in _STATISTICS if name not in file.names]
    faults = []
    if _IMAGES not in file.names and missing:
        faults.append(
            f"it holds {', '.join(sorted(file.names)) or 'nothing'}; a reference is images, {_IMAGES}, "
            f"or statistics, {', '.join(_STATISTICS)}, or both"
        )
    elif 0 < len(missing) < len(_STATISTICS):
        faults.append(f"its statistics lack {', '.join(missing)}")
    if not missing:
        shapes = {name: file.header(name)[0] for name in _STATISTICS}
        faults += [
            f"{mean} is {list(shapes[mean])} and {covariance} {list(shapes[covariance])}; expected [F] and [F, F]"
            for mean, covariance in (_STATISTICS[:2], _STATISTICS[2:])
            if len(shapes[mean]) != 1 or shapes[covariance] != shapes[mean] * 2
        ]
    elif _IMAGES in file.names and (shape := file.header(_IMAGES)[0])[:1] < (2,):
        faults.append(f"{_IMAGES} is {list(shape)}; statistics need at least 2 images")
    if faults:
        raise DataError(listed(f"{path} cannot be a reference:", faults))

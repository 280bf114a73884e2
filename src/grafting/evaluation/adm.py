"""ADM's suite without TensorFlow: FID, sFID, Inception score, precision and recall as tables of ImageNet report them.

The reference is ADM's own file, such as VIRTUAL_imagenet256_labeled.npz, or images alone, or what `AdmReference.save`
wrote. Pooled features are kept, a row an image; of spatial features only the statistics, so their number costs nothing.
Any network with spatial features will do, but on other weights than the published ones the figures have other names.

Source: openai/guided-diffusion, evaluations/evaluator.py; arXiv:2105.05233.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import safetensors.torch
import torch
from jaxtyping import Float
from pydantic import Field, JsonValue, PositiveInt, model_serializer
from torch import Tensor

from ..contract import Step
from ..errors import CheckpointError, DataError, ProtocolError
from ..machine.devices import default_device
from ..machine.files import sha256_of, write_bytes
from ..metrics.adm import adm_inception_score, adm_precision_recall
from ..metrics.features import FeatureNetwork, Features, ModuleNetwork, extract, tensors_sha256
from ..metrics.frechet import FeatureStatistics, Gaussian, frechet_bias, frechet_distance, frechet_estimate
from ..metrics.inception import PUBLISHED_SHA256_PREFIX, load_inception
from ..words import INCEPTION_NAME as INCEPTION_NAME
from ._npz import NpzFile
from .protocol import Data, Identity, Metrics, Protocol
from .reference import check_made_by, read_reference
from .suite import KeptReference, OnStep, Suite, SuiteEvaluator

UNKNOWN_INCEPTION_NAME = "inception-2015-12-05 with other weights"

_REFERENCE_FORMAT = "grafting-adm-reference-1"
_STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
_IMAGES = "arr_0"
_PUBLISHED_IMAGES = 50_000


class AdmConfig(Metrics):
    """Settings of ADM's suite; the defaults are its own, so that figures compare with published ones."""

    suite: Literal["adm"] = "adm"
    neighbours: PositiveInt = 3
    """k of precision and recall."""
    score_split_size: PositiveInt = 5000
    """Images of each part of the Inception score, in the order of the file: ten parts of 50,000."""
    distances: Literal["float16", "float32"] = "float16"
    """Of precision and recall; ADM rounds them to half precision."""

    @property
    def min_images(self) -> int:
        """The fewest images for which every metric is defined."""
        return self.neighbours + 1


class AdmEvaluation(Data):
    """The figures of ADM's suite. On the published weights of Inception they are FID, sFID and the Inception score.

    The interval is 95 %, over other draws of as many images; the reference is taken as fixed.
    """

    frechet: float
    """FID, between Gaussians of the pooled features."""
    frechet_low: float
    frechet_high: float
    frechet_bias: float | None
    """About how much `frechet` is too high because images are finite; None where they are too few to tell."""
    spatial_frechet: float
    """sFID, the same of features that have positions."""
    inception_score: float
    precision: float | None
    """None, as `recall`, where the reference has statistics and no images."""
    recall: float | None
    agreement: None = None
    """Inception's classes are not those of samples."""
    num_images: int
    notes: tuple[str, ...] = ()
    """Notes for readers of the figures."""
    protocol: Protocol


class AdmSuite(Suite):
    """ADM's figures, as tables of ImageNet have them: FID, sFID, Inception score, precision, recall."""

    name: Literal["adm"] = "adm"
    reference: str = Field(examples=["VIRTUAL_imagenet256_labeled.npz"])
    """An .npz of ADM's, such as VIRTUAL_imagenet256_labeled.npz, or a file that `grafting reference` wrote."""
    weights: str = Field(examples=["pt_inception-2015-12-05-6726825d.pth"])
    """pt_inception-2015-12-05-6726825d.pth, or a file in the same layout."""
    batch_size: PositiveInt = 64
    """Images per call of the network."""

    uses_labels: ClassVar[bool] = False

    @model_serializer
    def _as_before(self) -> dict[str, JsonValue]:
        """The keys of recipe.yaml, which tells a run's folder whether its recipe is still the same."""
        settings = {key: getattr(self, key) for key in ("reference", "weights", "batch_size")}
        return {"suite": self.name} | settings

    def faults(self, num_images: int, image_shape: tuple[int, ...]) -> list[str]:
        least = AdmConfig().min_images
        if image_shape[0] == 3 and num_images >= least:
            return []
        return [
            f"{num_images} images of {image_shape[0]} channels; ADM's suite measures {least} or more images of 3"
        ]

    def identity(self) -> dict[str, str]:
        check_adm_reference(Path(self.reference))
        load_inception(Path(self.weights))
        return {name: sha256_of(Path(getattr(self, name))) for name in ("reference", "weights")}

    def open(
        self, origin: Mapping[str, Any], *, on_step: OnStep | None = None
    ) -> Callable[[], SuiteEvaluator]:
        network = inception_network(self.weights)
        reference = open_adm_reference(self.reference, network, batch_size=self.batch_size, on_step=on_step)
        protocol = Protocol.of(network, reference, metrics=AdmConfig(), **origin)
        return lambda: AdmEvaluator(network, reference, protocol)

    def keep_reference(self, path: Path, *, on_step: OnStep | None = None) -> KeptReference:
        network = inception_network(self.weights)
        reference = AdmReference.of_npz(
            Path(self.reference), network, batch_size=self.batch_size, on_step=on_step
        )
        reference.save(path)
        return KeptReference(reference.facts(), reference.words())


def inception_network(weights: str | Path) -> ModuleNetwork:
    """The network of FID on the default device, named as such if its file is the published one.

    Raises:
        CheckpointError: no such file, or it does not hold this network's weights.
    """
    weights = Path(weights)
    module = load_inception(weights)
    published = sha256_of(weights).startswith(PUBLISHED_SHA256_PREFIX)
    network = ModuleNetwork(module, INCEPTION_NAME if published else UNKNOWN_INCEPTION_NAME)
    return network.to(default_device())


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
        gathered = _Gathered()
        if _IMAGES in file.names:
            total = file.shape(_IMAGES)[0]
            for images in file.images(_IMAGES, batch_size):
                gathered.add(_spatial_features(network, images))
                if on_step is not None:
                    on_step(Step(done=gathered.count, total=total))
        given = set(_STATISTICS) <= file.names
        if given:
            pooled, spatial = (
                Gaussian(file.matrix(mean), file.matrix(covariance))
                for mean, covariance in (_STATISTICS[:2], _STATISTICS[2:])
            )
        else:
            pooled, spatial = gathered.gaussians()
        features = gathered.pooled() if gathered.count else None
        if given and features is not None:
            _check_width(path, network, features, pooled, "mu")
            _check_width(path, network, gathered.spatial.mean[None], spatial, "mu_s")
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
        if tensors_sha256(tensors) != words["sha256"]:
            raise CheckpointError(f"{path} is damaged: its content does not have the hash written in it")
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
            for field, tensor in gaussian._asdict().items()
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
        shapes = {name: file.shape(name) for name in _STATISTICS}
        faults += [
            f"{mean} is {list(shapes[mean])} and {covariance} {list(shapes[covariance])}; expected [F] and [F, F]"
            for mean, covariance in (_STATISTICS[:2], _STATISTICS[2:])
            if len(shapes[mean]) != 1 or shapes[covariance] != shapes[mean] * 2
        ]
    elif _IMAGES in file.names and (shape := file.shape(_IMAGES))[:1] < (2,):
        faults.append(f"{_IMAGES} is {list(shape)}; statistics need at least 2 images")
    if faults:
        raise DataError(f"{path} cannot be a reference:" + "".join(f"\n  {fault}" for fault in faults))


class AdmEvaluator(SuiteEvaluator):
    """Gathers the features of images as they come, and turns them into an `AdmEvaluation`.

    Keeps one float32 row of pooled features and logits an image, on the CPU; of spatial features, their statistics.

    Args:
        network: makes features, spatial ones among them.
        reference: what they are measured against.
        protocol: how the images are made and measured, with an `AdmConfig`; see `Protocol.of`.
        state: what an earlier evaluator's `state()` returned, to resume from there.

    Raises:
        ProtocolError: network, reference and protocol do not belong together, or too few images are planned.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        reference: AdmReference,
        protocol: Protocol,
        *,
        state: dict[str, Tensor] | None = None,
    ):
        check_made_by(reference.name, reference.network, network)
        self._config = _check_protocol(network, reference, protocol)
        self._network, self._reference, self._protocol = network, reference, protocol
        self._gathered = _Gathered() if state is None else _Gathered.of_state(state)

    @property
    def protocol(self) -> Protocol:
        return self._protocol

    @property
    def num_images(self) -> int:
        """Images seen so far."""
        return self._gathered.count

    def update(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Add images [B, C, H, W] of 8 bits; their labels play no part.

        Raises:
            DataError: images that are not 8-bit, features that are not finite or not as wide as the reference's.
            ProtocolError: more images than the protocol says.
        """
        self._protocol.check_room(self.num_images + len(images))
        features = _spatial_features(self._network, images)
        if not self._gathered.count:
            _check_width(self._reference.name, self._network, features.pooled, self._reference.pooled, "mu")
            assert features.spatial is not None
            _check_width(
                self._reference.name, self._network, features.spatial, self._reference.spatial, "mu_s"
            )
        self._gathered.add(features)

    def state(self) -> dict[str, Tensor]:
        """State needed to resume from here, as tensors."""
        if not self._gathered.count:
            raise ProtocolError("no image has been evaluated: sample at least one batch first")
        return self._gathered.state()

    def result(self) -> AdmEvaluation:
        """The figures of all images given.

        Raises:
            ProtocolError: no image came, or fewer than the protocol says.
        """
        self._protocol.check_whole(self.num_images)
        rows = self.state()
        features, reference, config = rows["features"], self._reference, self._config
        frechet = frechet_estimate(features, reference.pooled)
        bias = frechet_bias(features, reference.pooled)
        precision = recall = None
        if reference.features is not None:
            real, generated = (rows.to(default_device()) for rows in (reference.features, features))
            precision, recall = adm_precision_recall(
                real, generated, k=config.neighbours, distances=config.distances
            )
        return AdmEvaluation(
            frechet=frechet.value,
            frechet_low=frechet.low,
            frechet_high=frechet.high,
            frechet_bias=bias,
            spatial_frechet=frechet_distance(self._gathered.spatial, reference.spatial),
            inception_score=adm_inception_score(rows["logits"], split_size=config.score_split_size),
            precision=precision,
            recall=recall,
            num_images=len(features),
            notes=tuple(_notes(features, bias, config, reference)),
            protocol=self._protocol,
        )


class _Gathered:
    """Rows of pooled features and logits, and the statistics of spatial features."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Tensor]] = []
        self.spatial = FeatureStatistics.of(torch.empty(0, 0))
        self.count = 0

    @classmethod
    def of_state(cls, state: dict[str, Tensor]) -> "_Gathered":
        gathered = cls()
        gathered._rows = [{name: state[name] for name in ("features", "logits")}]
        names = ("count", "mean", "scatter")
        gathered.spatial = FeatureStatistics.from_tensors({name: state[f"spatial.{name}"] for name in names})
        gathered.count = len(state["features"])
        return gathered

    def add(self, features: Features) -> None:
        assert features.logits is not None
        assert features.spatial is not None
        self._rows.append({"features": features.pooled, "logits": features.logits})
        batch = FeatureStatistics.of(features.spatial)
        self.spatial = self.spatial.merge(batch) if self.count else batch
        self.count += len(features.pooled)

    def pooled(self) -> Tensor:
        return torch.cat([rows["features"] for rows in self._rows])

    def gaussians(self) -> tuple[Gaussian, Gaussian]:
        """Of pooled and of spatial features."""
        both = (FeatureStatistics.of_many(self.pooled()), self.spatial)
        pooled, spatial = (Gaussian(statistics.mean, statistics.covariance) for statistics in both)
        return pooled, spatial

    def state(self) -> dict[str, Tensor]:
        spatial = {f"spatial.{name}": tensor for name, tensor in self.spatial.to_tensors().items()}
        logits = torch.cat([rows["logits"] for rows in self._rows])
        return {"features": self.pooled(), "logits": logits} | spatial


def _spatial_features(network: FeatureNetwork, images: Tensor) -> Features:
    features = extract(network, images)
    if features.spatial is None or features.logits is None:
        raise DataError(
            f"feature network {network.name!r} gives no spatial features or no logits; ADM's suite needs both"
        )
    return features


def _check_width(
    where: Path | str, network: FeatureNetwork, features: Tensor, given: Gaussian, name: str
) -> None:
    if features.shape[1] != len(given.mean):
        raise DataError(
            f"reference {where}: {name} is of {len(given.mean)} features, "
            f"feature network {network.name!r} gives {features.shape[1]}"
        )


def _check_protocol(network: FeatureNetwork, reference: AdmReference, protocol: Protocol) -> AdmConfig:
    faults, config = protocol.misfits(network, reference), protocol.metrics
    if not isinstance(config, AdmConfig):
        raise ProtocolError("this protocol is not of ADM's suite: its metrics must be an AdmConfig")
    if reference.features is not None and len(reference.features) <= config.neighbours:
        faults.append(
            f"its metrics look at {config.neighbours} neighbours; the reference has {len(reference.features)} images"
        )
    if faults:
        raise ProtocolError(
            "this protocol cannot be carried out:" + "".join(f"\n  {fault}" for fault in faults)
        )
    return config


def _notes(features: Tensor, bias: float | None, config: AdmConfig, reference: AdmReference) -> list[str]:
    num_images, width = features.shape
    notes = []
    if reference.network.name != INCEPTION_NAME:
        notes.append(
            f"the feature network is not the published {INCEPTION_NAME}: "
            f"these figures are not FID, sFID and the Inception score"
        )
    if num_images <= width:
        notes.append(
            f"too few images: {num_images} for {width} features, so the covariance lacks rank and the Frechet distances "
            f"mostly measure that"
        )
    elif num_images < 10_000 and bias is None:
        notes.append(
            f"frechet is far too high with {num_images} images of {width} features; "
            f"the error can be estimated from {4 * width} images on"
        )
    if bias is not None and num_images < _PUBLISHED_IMAGES:
        notes.append(f"frechet is about {bias:.3g} too high with {num_images} images")
    if num_images != _PUBLISHED_IMAGES:
        notes.append(f"published figures use {_PUBLISHED_IMAGES} images; these use {num_images}")
    if num_images % config.score_split_size:
        notes.append(
            f"the last part of the Inception score has {num_images % config.score_split_size} images, "
            f"not {config.score_split_size}"
        )
    if reference.features is None:
        notes.append("the reference has no images: precision and recall cannot be measured")
    if reference.spread is not None:
        pooled, spatial = reference.spread
        notes.append(
            f"distance from the reference's statistics to its own {reference.num_images} images: "
            f"{pooled:.4g} (pooled) and {spatial:.4g} (spatial)"
        )
    return notes

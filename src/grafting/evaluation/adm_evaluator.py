"""The figures of ADM's suite, by one row of pooled features and logits an image."""

from typing import Literal

from pydantic import PositiveInt
from torch import Tensor

from ..errors import ProtocolError, listed
from ..machine.devices import default_device
from ..machine.settings import Settings
from ..metrics.adm import adm_precision_recall
from ..metrics.features import FeatureNetwork
from ..metrics.frechet import FeatureStatistics, FrechetInfluences, frechet_distance
from ..metrics.inception_score import adm_inception_score
from ..metrics.manifold import neighbourhoods
from ..words import INCEPTION_NAME
from ._gathered import Gathered, check_width, spatial_features
from .adm_reference import AdmReference
from .per_image import PerImage, dealt_in_turn
from .protocol import Metrics, Protocol
from .reference import check_made_by
from .suite import PairedEvaluator

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


class AdmEvaluation(Settings):
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


class AdmEvaluator(PairedEvaluator[AdmEvaluation]):
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
        super().__init__(protocol)
        check_made_by(reference.name, reference.network, network)
        self._config = _check_protocol(network, reference, protocol)
        self._network, self._reference = network, reference
        self._gathered = Gathered() if state is None else Gathered.of_state(state)

    @property
    def num_images(self) -> int:
        return self._gathered.count

    def update(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Add images [B, C, H, W] of 8 bits; their labels tell intervals what was dealt in turn.

        Raises:
            DataError: images that are not 8-bit, features that are not finite or not as wide as the reference's.
            ProtocolError: more images than the protocol says.
        """
        self._protocol.check_room(self.num_images + len(images))
        features = spatial_features(self._network, images)
        if not self._gathered.count:
            check_width(self._reference.name, self._network, features.pooled, self._reference.pooled, "mu")
            assert features.spatial is not None
            check_width(
                self._reference.name, self._network, features.spatial, self._reference.spatial, "mu_s"
            )
        self._gathered.add(features, labels)

    def state(self) -> dict[str, Tensor]:
        if not self._gathered.count:
            raise ProtocolError("no image has been evaluated: sample at least one batch first")
        return self._gathered.state()

    def measure(self) -> tuple[AdmEvaluation, PerImage]:
        rows, config, reference = self.state(), self._config, self._reference
        features, labels = rows["features"], rows.get("labels")
        strata = dealt_in_turn(self._protocol.sampling, labels)
        frechet = FrechetInfluences.of(features, reference.pooled, strata=strata)
        spatial = FeatureStatistics.from_tensors(
            {name: rows[f"spatial.{name}"] for name in ("count", "mean", "scatter")}
        )
        fidelity = None
        if reference.features is not None:
            real, generated = (rows.to(default_device()) for rows in (reference.features, features))
            fidelity = adm_precision_recall(real, generated, k=config.neighbours, distances=config.distances)
        interval = frechet.estimate()
        evaluation = AdmEvaluation(
            frechet=interval.value,
            frechet_low=interval.low,
            frechet_high=interval.high,
            frechet_bias=frechet.bias,
            spatial_frechet=frechet_distance(spatial, reference.spatial),
            inception_score=adm_inception_score(rows["logits"], split_size=config.score_split_size),
            precision=fidelity and fidelity.precision,
            recall=fidelity and fidelity.recall,
            num_images=len(features),
            notes=tuple(_notes(features, frechet.bias, config, reference)),
            protocol=self._protocol,
        )
        per_image = PerImage(
            labels=labels,
            scores={} if fidelity is None else {"precision": fidelity.precise.double()},
            frechet=frechet,
            points={} if fidelity is None else {"recall": fidelity.recalled.double()},
            point_groups=None if reference.features is None else neighbourhoods(reference.features),
            features=features,
        )
        return evaluation, per_image


def _check_protocol(network: FeatureNetwork, reference: AdmReference, protocol: Protocol) -> AdmConfig:
    faults, config = protocol.misfits(network, reference), protocol.metrics
    if not isinstance(config, AdmConfig):
        raise ProtocolError("this protocol is not of ADM's suite: its metrics must be an AdmConfig")
    if reference.features is not None and len(reference.features) <= config.neighbours:
        faults.append(
            f"its metrics look at {config.neighbours} neighbours; the reference has {len(reference.features)} images"
        )
    if faults:
        raise ProtocolError(listed("this protocol cannot be carried out:", faults))
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
            f"the Fréchet distance is far too high with {num_images} images of {width} features; "
            f"the error can be estimated from {4 * width} images on"
        )
    if bias is not None and num_images < _PUBLISHED_IMAGES:
        notes.append(f"the Fréchet distance is about {bias:.3g} too high with {num_images} images")
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

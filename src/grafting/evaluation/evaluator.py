"""Features of images, gathered as they come, and this library's own figures of them."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..contract import Step
from ..errors import DataError, ProtocolError, listed
from ..machine.randomness import generator
from ..metrics.features import FeatureNetwork, extract
from ..metrics.frechet import FrechetInfluences
from ..metrics.inception_score import inception_score
from ..metrics.kid import kernel_distance
from ..metrics.manifold import density_coverage, neighbourhoods, precision_recall
from ..metrics.paired import even_strata
from .figures import Evaluation
from .per_image import PerImage, dealt_in_turn, spread_out
from .protocol import MetricsConfig, Protocol
from .reference import Reference, check_made_by
from .suite import PairedEvaluator, SuiteEvaluator


class Evaluator(PairedEvaluator[Evaluation]):
    """Gathers the features of images as they come, and turns them into an `Evaluation`.

    Keeps one float32 row of features (and logits) an image, on the CPU.

    Args:
        network: makes features of images.
        reference: what they are measured against.
        protocol: how the images are made and measured; see `Protocol.of`.
        state: what an earlier evaluator's `state()` returned, to resume from there.

    Raises:
        ProtocolError: network, reference and protocol do not belong together, or too few images are planned.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        reference: Reference,
        protocol: Protocol,
        *,
        state: dict[str, Tensor] | None = None,
    ):
        super().__init__(protocol, state)
        check_made_by(reference.name, reference.network, network)
        self._config = _check_protocol(network, reference, protocol)
        self._network, self._reference = network, reference

    def update(self, images: Tensor, labels: Tensor | None) -> None:
        """Add images [B, C, H, W] of 8 bits with the labels [B] they were sampled with.

        Raises:
            DataError: images that are not 8-bit, not one label an image, a label out of range, or features that
                are not finite.
            ProtocolError: more images than the protocol says.
        """
        if labels is None or labels.shape != images.shape[:1]:
            found = "no labels" if labels is None else f"labels {list(labels.shape)}"
            raise DataError(f"{len(images)} images came with {found}; expected one label per image")
        self._protocol.check_room(self.num_images + len(images))
        pooled, logits, _ = extract(self._network, images)
        width = len(self._reference.statistics.mean)
        if pooled.shape[1] != width:
            raise DataError(
                f"feature network {self._network.name!r} gives {pooled.shape[1]} features, the reference has {width}"
            )
        batch = {"features": pooled, "labels": labels.cpu().long()}
        if logits is not None:
            _check_labels(batch["labels"], logits.shape[1])
            batch["logits"] = logits
        self._batches.append(batch)

    def measure(self) -> tuple[Evaluation, PerImage]:
        rows, config, reference = self.state(), self._config, self._reference
        features, labels, logits = rows["features"], rows["labels"], rows.get("logits")
        strata = even_strata(dealt_in_turn(self._protocol.sampling, labels))
        frechet = FrechetInfluences.of(features, reference.statistics, strata=strata)
        drawn = torch.randperm(len(features), generator=generator(0))[: config.pairwise_images]
        some, real = features[drawn], reference.features.float()
        some_strata = None if strata is None else strata[drawn]
        kid = kernel_distance(real, some, strata=some_strata, within_real=reference.mean_kernel)
        few, more = config.precision_neighbours, config.density_neighbours
        fidelity = precision_recall(real, some, k=few, radii=reference.radii(few))
        spread = density_coverage(real, some, k=more, radii=reference.radii(more))
        scores = {"precision": fidelity.precise, "density": spread.dense}
        scores = {key: spread_out(values, drawn, len(features)) for key, values in scores.items()}
        if logits is not None:
            scores["agreement"] = (logits.argmax(1) == labels).double()
        interval = frechet.estimate()
        evaluation = Evaluation(
            frechet=interval.value,
            frechet_low=interval.low,
            frechet_high=interval.high,
            frechet_bias=frechet.bias,
            kid=kid.value,
            kid_error=kid.standard_error,
            precision=fidelity.precision,
            recall=fidelity.recall,
            density=spread.density,
            coverage=spread.coverage,
            inception_score=None if logits is None else inception_score(logits, splits=config.score_splits),
            agreement=None if logits is None else float(scores["agreement"].mean()),
            num_images=len(features),
            notes=tuple(_notes(features, frechet.bias, config)),
            protocol=self._protocol,
        )
        per_image = PerImage(
            labels=labels,
            scores=scores,
            influences={"kid": spread_out(kid.influence, drawn, len(features))},
            frechet=frechet,
            points={"recall": fidelity.recalled.double(), "coverage": spread.covered.double()},
            point_groups=neighbourhoods(real),
            features=features,
        )
        return evaluation, per_image


def evaluate(batches: Iterable[tuple[Tensor, Tensor | None]], evaluator: SuiteEvaluator) -> Iterator[Step]:
    """Feed sampled batches (images of 8 bits [B, C, H, W], labels [B] or None) to the evaluator, one step per batch.

    When the iterator ends, `evaluator.result()` has the figures.

    Raises:
        DataError, ProtocolError: as `Evaluator.update`; no image came at all.
    """
    for images, labels in batches:
        evaluator.update(images, labels)
        yield Step(done=evaluator.num_images, total=evaluator.protocol.num_images, state=evaluator.state)
    if not evaluator.num_images:
        raise ProtocolError("no images to evaluate: sampling returned none")


def _notes(features: Tensor, bias: float | None, config: MetricsConfig) -> list[str]:
    num_images, width = features.shape
    notes = []
    if num_images <= width:
        notes.append(
            f"too few images: {num_images} for {width} features, so the covariance lacks rank and frechet mostly measures that"
        )
    if bias is not None and num_images < 10_000:
        notes.append(f"the Fréchet distance is about {bias:.3g} too high with {num_images} images")
    if num_images > config.pairwise_images:
        notes.append(
            f"kid, precision, recall, density and coverage are computed on {config.pairwise_images} images drawn at random"
        )
    return notes


def _check_protocol(network: FeatureNetwork, reference: Reference, protocol: Protocol) -> MetricsConfig:
    faults, config = protocol.misfits(network, reference), protocol.metrics
    if not isinstance(config, MetricsConfig):
        raise ProtocolError(
            f"this protocol's metrics are of type {type(config).__name__}; an Evaluator takes a MetricsConfig"
        )
    num_neighbours = max(config.precision_neighbours, config.density_neighbours)
    if len(reference.features) <= num_neighbours:
        faults.append(
            f"its metrics look at {num_neighbours} neighbours; the reference keeps {len(reference.features)} rows"
        )
    if faults:
        raise ProtocolError(listed("this protocol cannot be carried out:", faults))
    return config


def _check_labels(labels: Tensor, num_classes: int) -> None:
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        raise DataError(
            f"label {int(outside[0])} is not a class of the feature network: it knows 0..{num_classes - 1}"
        )

"""Measures sampled images against a reference, and keeps beside each figure everything that it depends on.

`evaluate` consumes batches as sampling yields them, so images need not become files. A `Protocol` is that "everything";
figures measured under unlike protocols are refused by `ratio`. Figures of other feature networks than Inception
are not FID, KID or the Inception score, and are not called so.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, JsonValue, PositiveInt
from torch import Tensor

from .contract import Step
from .errors import CheckpointError, DataError, ProtocolError
from .files import write_bytes
from .functional.pixels import UINT8_RULE
from .metrics.features import FeatureNetwork, extract, tensors_sha256
from .metrics.frechet import FeatureStatistics, frechet_bias, frechet_estimate
from .metrics.inception_score import inception_score
from .metrics.kid import kernel_distance
from .metrics.manifold import density_coverage, precision_recall
from .randomness import generator

_REFERENCE_FORMAT = "grafting-reference-1"

# settings of sampling that say where and how fast it ran, not what came out
_CIRCUMSTANCES = frozenset({"batch_size", "compile", "device", "num_processes"})


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Identity(_Data):
    """A network or reference by name and by content."""

    name: str
    sha256: str


class MetricsConfig(_Data):
    """Settings of the metrics; the defaults are those of their papers."""

    precision_neighbours: PositiveInt = 3
    """k of precision and recall."""
    density_neighbours: PositiveInt = 5
    """k of density and coverage."""
    score_splits: PositiveInt = 10
    """Parts of the Inception score."""
    pairwise_images: PositiveInt = 10_000
    """Most images, drawn at random, that the kernel distance and neighbour metrics see: their cost is quadratic."""

    @property
    def min_images(self) -> int:
        """The fewest images for which every metric is defined."""
        return max(4, self.precision_neighbours + 1, self.score_splits)


class Protocol(_Data):
    """Everything a figure depends on except the model: equal protocols, comparable figures."""

    sampling: dict[str, JsonValue]
    """Sampler, steps, guidance, seed ...: the sampling config as JSON."""
    num_images: PositiveInt
    labels: str
    """The rule by which image i gets its class, in words."""
    weights_dtype: str
    feature_network: Identity
    reference: Identity
    uint8_rule: str = UINT8_RULE
    metrics: MetricsConfig = MetricsConfig()
    definitions: int = 1
    """Counts changes of this library after which the same images give other figures."""
    recorded: dict[str, JsonValue] = Field(default_factory=dict)
    """Circumstances worth keeping (versions, device); they are not compared."""

    @classmethod
    def of(
        cls,
        network: FeatureNetwork,
        reference: "Reference",
        *,
        sampling: dict[str, JsonValue],
        num_images: int,
        labels: str,
        weights_dtype: str,
        metrics: MetricsConfig | None = None,
    ) -> "Protocol":
        """The protocol of measuring with this network against this reference, the versions in use recorded."""
        return cls(
            sampling=sampling,
            num_images=num_images,
            labels=labels,
            weights_dtype=weights_dtype,
            feature_network=Identity(name=network.name, sha256=network.sha256),
            reference=Identity(name=reference.name, sha256=reference.sha256),
            metrics=metrics or MetricsConfig(),
            recorded={"grafting": version("grafting"), "torch": torch.__version__},
        )

    def differences(self, other: "Protocol") -> list[str]:
        """Each field that differs, with both values: `sampling.steps: 50 and 250`; empty if figures compare."""
        mine, theirs = self._compared(), other._compared()
        absent = "nothing"
        return [
            f"{name}: {mine.get(name, absent)} and {theirs.get(name, absent)}"
            for name in mine | theirs
            if (name in mine, mine.get(name)) != (name in theirs, theirs.get(name))
        ]

    def _compared(self) -> dict[str, JsonValue]:
        fields = self.model_dump(mode="json", exclude={"recorded"})
        fields["sampling"] = {k: v for k, v in fields["sampling"].items() if k not in _CIRCUMSTANCES}
        return _flatten(fields)


class Evaluation(_Data):
    """The figures of one model's images, and the protocol under which they hold.

    Intervals are 95 %, over other draws of as many images; the reference is taken as fixed.
    """

    frechet: float
    frechet_low: float
    frechet_high: float
    frechet_bias: float | None
    """About how much `frechet` is too high because images are finite; None where they are too few to tell."""
    kid: float
    kid_error: float
    """Standard error of `kid`."""
    precision: float
    recall: float
    density: float
    coverage: float
    inception_score: float | None
    """None, as `agreement`, where the feature network has no classes."""
    agreement: float | None
    """Share of images whose most likely class is the label they were sampled with."""
    num_images: int
    notes: tuple[str, ...] = ()
    """What a reader of the figures should know about them."""
    protocol: Protocol


def ratio(a: Evaluation, b: Evaluation, metric: str = "frechet") -> float:
    """a's figure over b's.

    Raises:
        ProtocolError: the protocols differ (names each field with both values), there is no such figure, or b's is 0.
    """
    differences = a.protocol.differences(b.protocol)
    if differences:
        raise ProtocolError(
            "these figures were measured differently and cannot be compared:"
            + "".join(f"\n  {difference}" for difference in differences)
        )
    over, under = (evaluation.model_dump().get(metric) for evaluation in (a, b))
    if not (isinstance(over, float) and isinstance(under, float)):
        raise ProtocolError(f"there is no figure {metric!r} in both evaluations")
    if under == 0:
        raise ProtocolError(f"{metric} of the second evaluation is 0, which nothing can be a multiple of")
    return over / under


@dataclass(frozen=True)
class Reference:
    """What images are measured against: statistics of all reference images, and features of a random part of them."""

    name: str
    network: Identity
    statistics: FeatureStatistics
    features: Float[Tensor, "m f"]
    sha256: str = field(init=False)

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
            raise DataError(f"reference {name!r} needs at least 2 images; it was given fewer")
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
        """What `save` wrote; with `network`, only if that network made its features.

        Raises:
            CheckpointError: no such file, or it is damaged or something else.
            ProtocolError: another feature network made it.
        """
        metadata, tensors = _read_safetensors(path)
        if metadata.get("format") != _REFERENCE_FORMAT:
            raise CheckpointError(
                f"{path} is not a reference of this library: its format is {metadata.get('format')!r}, "
                f"not {_REFERENCE_FORMAT!r}"
            )
        reference = cls(
            metadata["name"],
            Identity(name=metadata["network_name"], sha256=metadata["network_sha256"]),
            FeatureStatistics.from_tensors(tensors),
            tensors["features"],
        )
        if reference.sha256 != metadata["sha256"]:
            raise CheckpointError(f"{path} is damaged: its content does not have the hash written in it")
        if network is not None:
            reference.check_network(network)
        return reference

    def check_network(self, network: FeatureNetwork) -> None:
        """Refuses a network that did not make these features.

        Raises:
            ProtocolError: by its hash it is another one.
        """
        if network.sha256 != self.network.sha256:
            raise ProtocolError(
                f"reference {self.name!r} holds features of network {self.network.name!r} "
                f"(sha256 {self.network.sha256[:12]}), not of {network.name!r} ({network.sha256[:12]}); "
                f"build a reference with the network that is used"
            )

    def _tensors(self) -> dict[str, Tensor]:
        return self.statistics.to_tensors() | {"features": self.features}


class Evaluator:
    """Gathers the features of images as they come, and turns them into an `Evaluation`.

    Keeps one float32 row of features (and logits) an image, on the CPU.

    Args:
        network: makes features of images.
        reference: what they are measured against.
        protocol: how the images are made and measured; see `Protocol.of`.
        state: what an earlier evaluator's `state()` returned, to go on from there.

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
        reference.check_network(network)
        _check_protocol(network, reference, protocol)
        self._network, self._reference, self._protocol = network, reference, protocol
        self._batches: list[dict[str, Tensor]] = [] if state is None else [state]

    @property
    def protocol(self) -> Protocol:
        return self._protocol

    @property
    def num_images(self) -> int:
        """Images seen so far."""
        return sum(len(batch["labels"]) for batch in self._batches)

    def update(self, images: Tensor, labels: Tensor) -> None:
        """Add images [B, C, H, W] of 8 bits with the labels [B] they were sampled with.

        Raises:
            DataError: images that are not 8-bit, not one label an image, a label out of range, or features that
                are not finite.
            ProtocolError: more images than the protocol says.
        """
        if labels.shape != images.shape[:1]:
            raise DataError(f"{len(images)} images came with labels {list(labels.shape)}; one each is needed")
        if self.num_images + len(images) > self._protocol.num_images:
            raise ProtocolError(
                f"the protocol says {self._protocol.num_images} images; {self.num_images + len(images)} came"
            )
        pooled, logits = extract(self._network, images)
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

    def state(self) -> dict[str, Tensor]:
        """All that is needed to go on from here, as tensors."""
        if not self._batches:
            raise ProtocolError("no image has been evaluated: sample at least one batch first")
        return {name: torch.cat([batch[name] for batch in self._batches]) for name in self._batches[0]}

    def result(self) -> Evaluation:
        """The figures of all images given.

        Raises:
            ProtocolError: no image came, or fewer than the protocol says.
        """
        rows = self.state()
        if self.num_images != self._protocol.num_images:
            raise ProtocolError(
                f"the protocol says {self._protocol.num_images} images; only {self.num_images} came"
            )
        return _measure(rows, self._reference, self._protocol)


def evaluate(batches: Iterable[tuple[Tensor, Tensor]], evaluator: Evaluator) -> Iterator[Step]:
    """Feed sampled batches (images of 8 bits [B, C, H, W], labels [B]) to the evaluator, a step a batch.

    When the iterator ends, `evaluator.result()` has the figures.

    Raises:
        DataError, ProtocolError: as `Evaluator.update`; no image came at all.
    """
    for images, labels in batches:
        evaluator.update(images, labels)
        yield Step(done=evaluator.num_images, total=evaluator.protocol.num_images, state=evaluator.state)
    if not evaluator.num_images:
        raise ProtocolError("no image came to be evaluated: sampling gave nothing")


class _Sample(NamedTuple):
    """Rows drawn uniformly from a stream of unknown length: those with the smallest of as many random keys."""

    keys: Float[Tensor, "n"]
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


def _measure(rows: dict[str, Tensor], reference: Reference, protocol: Protocol) -> Evaluation:
    features, config = rows["features"], protocol.metrics
    frechet = frechet_estimate(features, reference.statistics)
    # halves thinner than the features are wide no longer follow the 1 / n law
    bias = frechet_bias(features, reference.statistics) if len(features) >= 4 * features.shape[1] else None
    drawn = torch.randperm(len(features), generator=generator(0))[: config.pairwise_images]
    some, real = features[drawn], reference.features.float()
    kid = kernel_distance(real, some)
    fidelity = precision_recall(real, some, k=config.precision_neighbours)
    spread = density_coverage(real, some, k=config.density_neighbours)
    logits = rows.get("logits")
    return Evaluation(
        frechet=frechet.value,
        frechet_low=frechet.low,
        frechet_high=frechet.high,
        frechet_bias=bias,
        kid=kid.value,
        kid_error=kid.standard_error,
        precision=fidelity.precision,
        recall=fidelity.recall,
        density=spread.density,
        coverage=spread.coverage,
        inception_score=None if logits is None else inception_score(logits, splits=config.score_splits).value,
        agreement=None if logits is None else float((logits.argmax(1) == rows["labels"]).double().mean()),
        num_images=len(features),
        notes=tuple(_notes(features, bias, config)),
        protocol=protocol,
    )


def _notes(features: Tensor, bias: float | None, config: MetricsConfig) -> list[str]:
    num_images, width = features.shape
    notes = []
    if num_images <= width:
        notes.append(
            f"{num_images} images are fewer than the {width} features and one more: their covariance lacks rank, "
            f"and frechet measures mostly that"
        )
    if bias is not None and num_images < 10_000:
        notes.append(f"with {num_images} images frechet is too high by about {bias:.3g}")
    if num_images > config.pairwise_images:
        notes.append(
            f"kid, precision, recall, density and coverage see {config.pairwise_images} images drawn at random"
        )
    return notes


def _check_protocol(network: FeatureNetwork, reference: Reference, protocol: Protocol) -> None:
    faults = [
        f"it names {what} {said.name!r} ({said.sha256[:12]}), given is {found.name!r} ({found.sha256[:12]})"
        for what, said, found in (
            ("feature network", protocol.feature_network, network),
            ("reference", protocol.reference, reference),
        )
        if said.sha256 != found.sha256
    ]
    if protocol.num_images < protocol.metrics.min_images:
        faults.append(
            f"it says {protocol.num_images} images; its metrics need at least {protocol.metrics.min_images}"
        )
    num_neighbours = max(protocol.metrics.precision_neighbours, protocol.metrics.density_neighbours)
    if len(reference.features) <= num_neighbours:
        faults.append(
            f"its metrics look at {num_neighbours} neighbours; the reference keeps {len(reference.features)} rows"
        )
    if faults:
        raise ProtocolError(
            "this protocol cannot be carried out:" + "".join(f"\n  {fault}" for fault in faults)
        )


def _check_labels(labels: Tensor, num_classes: int) -> None:
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        raise DataError(
            f"label {int(outside[0])} is not a class of the feature network: it knows 0..{num_classes - 1}"
        )


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"no reference file {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, JsonValue]:
    """Nested mappings as one, with dotted names."""
    flat: dict[str, JsonValue] = {}
    for name, item in value.items():
        if isinstance(item, dict) and item:
            flat |= _flatten(item, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = item
    return flat

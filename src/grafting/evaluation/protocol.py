"""Protocol of a figure: networks and references by content, settings of metrics, and how images were sampled."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.metadata import version
from typing import Annotated, Any, runtime_checkable
from typing import Protocol as Interface

import torch
from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    PositiveInt,
    SerializeAsAny,
)

from ..errors import ProtocolError
from ..functional.pixels import UINT8_RULE
from ..machine.files import differing, flatten
from ..machine.settings import Settings

# settings of sampling that say where and how fast it ran, not what came out
CIRCUMSTANCES = frozenset({"batch_size", "compile", "device", "num_processes"})


class Identity(Settings):
    """A network or reference by name and by content."""

    name: str
    sha256: str


@runtime_checkable
class Identified(Interface):
    """A network or reference, which protocols know by an `Identity`."""

    @property
    def name(self) -> str: ...

    @property
    def sha256(self) -> str: ...


class Metrics(Settings, ABC):
    """Settings of a suite's figures, with a field `suite: Literal[...]` that says whose they are."""

    @property
    @abstractmethod
    def min_images(self) -> int:
        """The fewest images for which every figure is defined."""


class MetricsConfig(Metrics):
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


def _metrics_of(value: Any) -> Any:
    """A suite's settings read from JSON, where `suite` says whose they are; the first suite's do not say it."""
    if not isinstance(value, Mapping):
        return value
    for kind in Metrics.__subclasses__():
        suite = kind.model_fields.get("suite")
        if value.get("suite") == (suite and suite.default):
            return kind.model_validate(value)
    raise ValueError(f"no suite {value.get('suite')!r} measures here")


class Protocol(Settings):
    """Everything a figure depends on except the model: equal protocols, comparable figures."""

    sampling: dict[str, JsonValue]
    """Sampler, steps, guidance, seed ...: the sampling config as JSON."""
    num_images: PositiveInt
    labels: str
    """Rule by which image i gets its class."""
    weights_dtype: str
    feature_network: Identity
    reference: Identity
    uint8_rule: str = UINT8_RULE
    metrics: Annotated[SerializeAsAny[Metrics], BeforeValidator(_metrics_of)] = MetricsConfig()
    definitions: int = 1
    """Counts changes of this library after which the same images give other figures."""
    recorded: dict[str, JsonValue] = Field(default_factory=dict)
    """Circumstances worth keeping (versions, device); they are not compared."""

    @classmethod
    def of(
        cls,
        network: Identified,
        reference: Identified,
        *,
        sampling: dict[str, JsonValue],
        num_images: int,
        labels: str,
        weights_dtype: str,
        metrics: Metrics | None = None,
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
            for name in differing(mine, theirs)
        ]

    def misfits(self, network: Identified, reference: Identified) -> list[str]:
        """Reasons why this protocol cannot be carried out with this network and reference."""
        faults = [
            f"it names {what} {said.name!r} ({said.sha256[:12]}), found {found.name!r} ({found.sha256[:12]})"
            for what, said, found in (
                ("feature network", self.feature_network, network),
                ("reference", self.reference, reference),
            )
            if said.sha256 != found.sha256
        ]
        if self.num_images < self.metrics.min_images:
            faults.append(
                f"it says {self.num_images} images; its metrics need at least {self.metrics.min_images}"
            )
        return faults

    def check_room(self, num_images: int) -> None:
        """Raise a ProtocolError if that many images are more than it says."""
        if num_images > self.num_images:
            raise ProtocolError(f"the protocol says {self.num_images} images; got {num_images}")

    def check_whole(self, num_images: int) -> None:
        """Raise a ProtocolError unless exactly `num_images` images were seen, and at least one."""
        if not num_images:
            raise ProtocolError("no image has been evaluated: sample at least one batch first")
        if num_images != self.num_images:
            raise ProtocolError(f"the protocol says {self.num_images} images; got only {num_images}")

    def _compared(self) -> dict[str, object]:
        fields = self.model_dump(mode="json", exclude={"recorded"})
        fields["sampling"] = {k: v for k, v in fields["sampling"].items() if k not in CIRCUMSTANCES}
        return flatten(fields)

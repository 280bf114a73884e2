"""The form of a suite: a config says what measures, opening it makes evaluators, and each of these measures one model.

A suite is one file of this folder and one line of the union in `__init__.py`; its figures are rows of `words.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, runtime_checkable
from typing import Protocol as Interface

import torch
from pydantic import JsonValue, PositiveInt
from torch import Tensor

from ..contract import Conditions, Step
from ..errors import DataError, ProtocolError
from ..machine.settings import Settings
from .per_image import PerImage
from .protocol import Protocol

OnStep = Callable[[Step], None]


@runtime_checkable
class Result(Interface):
    """Figures of one model's images: a pydantic model whose numbers are rows of `words.py`."""

    @property
    def num_images(self) -> int: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    @property
    def protocol(self) -> Protocol: ...

    def model_dump(self, *, mode: str = "python") -> dict[str, Any]: ...


R = TypeVar("R", bound=Result)


class Remark(NamedTuple):
    """What a suite says of one image: a text, and the places that are wrong, as left, top, width, height in shares of it."""

    text: str
    marks: tuple[tuple[float, float, float, float], ...] = ()


class SuiteEvaluator(ABC):
    """Takes images as they come, and gives their figures at the end."""

    @property
    @abstractmethod
    def protocol(self) -> Protocol: ...

    @property
    @abstractmethod
    def num_images(self) -> int:
        """Images seen so far."""

    @abstractmethod
    def update(self, images: Tensor, labels: Tensor | None) -> None:
        """Add images [B, C, H, W] of 8 bits with the numbers [B] of the conditions they were sampled with.

        Raises:
            DataError: images that this suite cannot measure. ProtocolError: more of them than the protocol says.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """All that is needed to resume from here, as tensors."""

    @abstractmethod
    def result(self) -> Result:
        """The figures of all images given.

        Raises:
            ProtocolError: no image came, or fewer than the protocol says.
        """

    def per_image(self) -> PerImage | None:
        """What each image adds to these figures, for comparisons image by image; None where a suite does not keep it."""
        return None

    def details(self) -> list[dict[str, JsonValue]] | None:
        """A line of JSON for each image, in the form that others read; None from a suite that has none."""
        return None


class PairedEvaluator(SuiteEvaluator, Generic[R]):
    """An evaluator of a protocol that makes figures and what each image adds to them in one go, and once.

    It keeps what `update` puts into `_batches` of each batch: rows by name, `labels` among them.

    Args:
        state: what an earlier evaluator's `state()` returned, to resume from there.
    """

    def __init__(self, protocol: Protocol, state: dict[str, Tensor] | None = None):
        self._protocol = protocol
        self._batches: list[dict[str, Tensor]] = [] if state is None else [state]
        self._measured: tuple[R, PerImage] | None = None

    @property
    def protocol(self) -> Protocol:
        return self._protocol

    @property
    def num_images(self) -> int:
        return sum(len(batch["labels"]) for batch in self._batches)

    def state(self) -> dict[str, Tensor]:
        if not self._batches:
            raise ProtocolError("no image has been evaluated: sample at least one batch first")
        return {name: torch.cat([batch[name] for batch in self._batches]) for name in self._batches[0]}

    @abstractmethod
    def measure(self) -> tuple[R, PerImage]:
        """Figures of all images given, and what each image adds to them."""

    def result(self) -> R:
        return self._once()[0]

    def per_image(self) -> PerImage:
        return self._once()[1]

    def _once(self) -> tuple[R, PerImage]:
        self._protocol.check_whole(self.num_images)
        if self._measured is None:
            self._measured = self.measure()
        return self._measured


class KeptReference(NamedTuple):
    """A reference that was written to a file: facts as JSON, `num_images` among them, and lines of text for people."""

    facts: dict[str, JsonValue]
    words: list[str]


class Suite(Settings, ABC):
    """A suite's settings, as a recipe's `evaluate` has them."""

    name: str
    batch_size: PositiveInt = 500
    """Images per call of the network."""

    asked_by: ClassVar[str | None] = None
    """Name of the conditions whose images it judges, `classes` among them; None if any images will do."""
    uses_labels: ClassVar[bool] = True
    """False of a suite that measures images whose conditions are not known."""

    has_details: ClassVar[bool] = False
    """True of a suite whose evaluators say something of each image; see `SuiteEvaluator.details`."""

    @abstractmethod
    def faults(self, num_images: int, image_shape: tuple[int, ...]) -> list[str]:
        """Reasons why it cannot measure these images; each tells them first: `3 images; at least 10 are needed`."""

    def takes(self, image_shape: tuple[int, ...]) -> bool:
        """Whether it measures images of this shape, if there are enough."""
        return not self.faults(1_000_000, image_shape)

    def misfits(self, conditions: Conditions) -> list[str]:
        """Reasons why it cannot judge images of these conditions; empty if it can."""
        return []

    def identity(self) -> dict[str, str] | None:
        """Hashes of the files that it measures with; None if all of it comes with this library.

        Raises:
            DataError, CheckpointError: a file is missing, or is something else.
        """
        return None

    def inputs(self, identity: dict[str, str] | None, origin: Mapping[str, Any]) -> Any:
        """JSON of everything that figures depend on beside the images, known before `open`, which may take minutes."""
        return [identity, dict(origin)]

    @abstractmethod
    def open(
        self, origin: Mapping[str, Any], *, on_step: OnStep | None = None
    ) -> Callable[[], SuiteEvaluator]:
        """Load what measures; the result makes an evaluator for each model, all with one protocol.

        Args:
            origin: what the protocol says of the images: `sampling`, `num_images`, `labels`, `weights_dtype`.
            on_step: called after each batch of a reference's images.
        """

    def remarks(self, images: Tensor, labels: Tensor) -> list[Remark] | None:
        """Remarks on images [B, C, H, W] of 8 bits, for people; None from a suite that measures no image by itself."""
        return None

    def keep_reference(self, path: Path, *, on_step: OnStep | None = None) -> KeptReference:
        """Write what `open` needs of the reference to a file, which then stands for it.

        Raises:
            DataError: this suite has no reference of the user's.
        """
        raise DataError(f"suite {self.name} has no reference to keep")

"""The testbed's suite: figures of small grey images by the bundled classifier, against all of Fashion-MNIST."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, ClassVar, Literal

from ..data.bundled import CLASSIFIER_NAME, bundled_classifier, bundled_reference_path
from ..metrics.features import ModuleNetwork
from .evaluator import Evaluator
from .protocol import MetricsConfig, Protocol
from .reference import Reference
from .suite import OnStep, Suite, SuiteEvaluator

_SHAPE = (1, 32, 32)


@cache
def _bundled() -> tuple[ModuleNetwork, Reference]:
    """Opened once: a reference keeps what only its own rows say, which takes seconds to find."""
    network = ModuleNetwork(bundled_classifier(), CLASSIFIER_NAME)
    return network, Reference.load(bundled_reference_path(), network)


class TestbedSuite(Suite):
    """The bundled network and reference: Fréchet and kernel distance, precision, recall, density, coverage, agreement."""

    __test__ = False  # pytest takes classes called Test... for tests

    name: Literal["testbed"] = "testbed"
    asked_by: ClassVar = "classes"

    def faults(self, num_images: int, image_shape: tuple[int, ...]) -> list[str]:
        faults, least = [], MetricsConfig().min_images
        if image_shape != _SHAPE:
            faults.append(
                f"images of {list(image_shape)}; the bundled network measures images of {list(_SHAPE)}"
            )
        if num_images < least:
            faults.append(f"{num_images} images; the testbed's figures need at least {least}")
        return faults

    def inputs(self, identity: dict[str, str] | None, origin: Mapping[str, Any]) -> Any:
        return self.open(origin)().protocol.model_dump(mode="json")

    def open(
        self, origin: Mapping[str, Any], *, on_step: OnStep | None = None
    ) -> Callable[[], SuiteEvaluator]:
        network, reference = _bundled()
        protocol = Protocol.of(network, reference, **origin)
        return lambda: Evaluator(network, reference, protocol)

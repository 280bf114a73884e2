"""ADM's suite without TensorFlow: FID, sFID, Inception score, precision and recall as tables of ImageNet report them.

Any network with spatial features will do, but on other weights than the published ones the figures have other names.

Source: openai/guided-diffusion, evaluations/evaluator.py; arXiv:2105.05233.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, JsonValue, PositiveInt, model_serializer

from ..machine.devices import default_device
from ..machine.files import sha256_of
from ..metrics.features import ModuleNetwork
from ..metrics.inception import PUBLISHED_SHA256_PREFIX, load_inception
from ..words import INCEPTION_NAME
from .adm_evaluator import AdmConfig, AdmEvaluator
from .adm_reference import AdmReference, check_adm_reference, open_adm_reference
from .protocol import Protocol
from .suite import KeptReference, OnStep, Suite, SuiteEvaluator

UNKNOWN_INCEPTION_NAME = "inception-2015-12-05 with other weights"


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

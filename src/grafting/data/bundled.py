"""What comes with the package: the testbed of garments, and the pretrained models of both testbeds.

`recipes/testbed/make_assets.py` and `recipes/scenes/export_model.py` make the files; the cards beside them say from what. Every
file is checked against `checksums.json`, so a half-installed package says so instead of giving odd figures.
"""

from importlib import resources
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import DataError
from ..machine.files import sha256_of
from ..machine.reading import NpzFile, read_json
from ..models.classifier import Classifier, load_classifier
from .images import ImageSet, ImageSource
from .subset import Listing, read_subset

# what protocols call the bundled feature network and reference
CLASSIFIER_NAME = "testbed-classifier"
REFERENCE_NAME = "fashion-mnist-train"


class BundledSubsetConfig(ImageSource):
    """The bundled tenth of Fashion-MNIST's training set: 600 images of each of 10 classes, padded to 32x32."""

    name: Literal["testbed-subset"] = "testbed-subset"

    def listing(self) -> Listing:
        """By their numbers in Fashion-MNIST's training set, so that a subset of these is one of all as well."""
        subset = read_subset(bundled_subset_file())
        return Listing(
            source=subset.source,
            num_classes=subset.num_classes,
            ids=subset.ids,
            read_labels=lambda: bundled_subset().labels,
        )

    def read(self, places: Int[Tensor, " m"] | None) -> ImageSet:
        images = bundled_subset()
        return images if places is None else images.take(places)


def bundled_subset() -> ImageSet:
    """6,000 training images of Fashion-MNIST, 600 per class, 28x28 grey, padded to 32x32."""
    file = NpzFile(_asset("subset.npz"))
    images, labels = torch.from_numpy(file.array("images")), torch.from_numpy(file.array("labels"))
    return ImageSet(images[:, None], labels.long(), num_classes=10, size=32)


def bundled_subset_file() -> Path:
    """The subset file (see `read_subset`) that says which images of the training set these are."""
    return _asset("subset.json")


def bundled_classifier() -> Classifier:
    """The testbed's feature network and judge of classes, in eval mode.

    Raises:
        DataError: the file is missing or damaged.
    """
    return load_classifier(_asset("classifier.safetensors"))


def bundled_reference_path() -> Path:
    """The file of the bundled classifier's features of all 60,000 training images, for `Reference.load`.

    Raises:
        DataError: the file is missing or damaged.
    """
    return _asset("reference.safetensors")


def testbed_model_folder() -> Path:
    """The folder of the pretrained testbed DiT: `DiT.from_pretrained` reads it.

    Raises:
        DataError: a file is missing or damaged.
    """
    return _model_folder("testbed", "dit")


def scenes_pipeline_folder() -> Path:
    """The folder of the pretrained text-to-image model of scenes: a `PixArtSigmaPipeline` without text encoder and VAE."""
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        _asset(name, "scenes")
    return _model_folder("scenes", "transformer").parent


def bundled_model_folder(name: str) -> Path | None:
    """The folder of the model of this name; None if none that is bundled has it."""
    if name == "testbed":
        return testbed_model_folder()
    return scenes_pipeline_folder() / "transformer" if name == "scenes" else None


def _home(bundle: str) -> Path:
    return Path(str(resources.files("grafting").joinpath("assets", bundle)))


def _model_folder(bundle: str, folder: str) -> Path:
    config, _ = (
        _asset(f"{folder}/{name}", bundle) for name in ("config.json", "diffusion_pytorch_model.safetensors")
    )
    return config.parent


def _asset(name: str, bundle: str = "testbed") -> Path:
    """A bundled file, after its hash was compared."""
    home = _home(bundle)
    path, expected = home / name, _checksums(home / "checksums.json").get(name)
    if not path.is_file():
        raise DataError(f"the bundled file {path} is missing: reinstall grafting")
    if expected is None:
        raise DataError(
            f"the bundled file {path} is not in {home / 'checksums.json'}; the script that made it writes it there"
        )
    found = sha256_of(path)
    if found != expected:
        raise DataError(
            f"the bundled file {path} is damaged: its sha256 is {found[:12]}, not {expected[:12]}; "
            f"reinstall grafting"
        )
    return path


def _checksums(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise DataError(f"the bundled file {path} is missing: reinstall grafting")
    return read_json(path, dict[str, str], error=DataError)

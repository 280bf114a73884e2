"""What training and evaluation read: images, latents, subsets, and the bundled testbed."""

from typing import Annotated

from pydantic import Field

from .bundled import BundledSubsetConfig as BundledSubsetConfig
from .images import FashionMnistConfig as FashionMnistConfig
from .images import ImageFolderConfig as ImageFolderConfig
from .images import ImageSet as ImageSet
from .latents import LatentsConfig as LatentsConfig
from .latents import LatentSet as LatentSet

# how a recipe names its data; `name` tells which
DataConfig = Annotated[
    BundledSubsetConfig | FashionMnistConfig | ImageFolderConfig | LatentsConfig, Field(discriminator="name")
]


def load_data(config: DataConfig) -> ImageSet | LatentSet:
    """The images or latents that a recipe's `data:` names.

    Raises:
        DataError: something is missing or damaged.
    """
    return config.load()

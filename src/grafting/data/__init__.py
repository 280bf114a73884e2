"""What training and evaluation read: images, subsets, and the bundled testbed."""

from typing import Annotated

from pydantic import Field

from .bundled import BundledSubsetConfig as BundledSubsetConfig
from .images import FashionMnistConfig as FashionMnistConfig
from .images import ImageFolderConfig as ImageFolderConfig
from .images import ImageSet as ImageSet

# how a recipe names its data; `name` tells which
DataConfig = Annotated[
    BundledSubsetConfig | FashionMnistConfig | ImageFolderConfig, Field(discriminator="name")
]


def load_data(config: DataConfig) -> ImageSet:
    """The images that a recipe's `data:` names, in memory.

    Raises:
        DataError: something is missing or damaged.
    """
    return config.load()

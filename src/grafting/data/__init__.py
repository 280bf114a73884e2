"""Data for training and evaluation: images, latents, prompts, subsets, and the two testbeds."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from .bundled import BundledSubsetConfig as BundledSubsetConfig
from .images import FashionMnistConfig as FashionMnistConfig
from .images import ImageFolderConfig as ImageFolderConfig
from .images import ImageSet as ImageSet
from .images import list_image_folder
from .latents import INDEX_NAME
from .latents import LatentsConfig as LatentsConfig
from .latents import LatentSet as LatentSet
from .promptfolder import Prompt as Prompt
from .promptfolder import write_prompts as write_prompts
from .prompts import Prompts as Prompts
from .prompts import PromptsConfig as PromptsConfig
from .prompts import check_bound as check_bound
from .scenes import Captions as Captions
from .scenes import CaptionsConfig as CaptionsConfig
from .scenes import Scenes as Scenes
from .scenes import ScenesConfig as ScenesConfig
from .subset import Listing

# how a recipe names its data; `name` tells which
DataConfig = Annotated[
    BundledSubsetConfig | FashionMnistConfig | ImageFolderConfig | LatentsConfig | ScenesConfig,
    Field(discriminator="name"),
]
# how a recipe names what its model may be asked for
ConditionsConfig = Annotated[PromptsConfig | CaptionsConfig, Field(discriminator="name")]


def load_data(config: DataConfig) -> ImageSet | LatentSet | Scenes:
    """The images or latents that a recipe's `data:` names.

    Raises:
        DataError: something is missing or damaged.
    """
    return config.load()


def list_data(source: str) -> Listing:
    """List `testbed`, `fashion-mnist`, a folder of latents or an image folder; no image is read."""
    named = {"testbed": BundledSubsetConfig(), "fashion-mnist": FashionMnistConfig()}
    if source in named:
        return named[source].listing()
    folder = Path(source)
    if (folder / INDEX_NAME).is_file():
        return LatentsConfig(folder=folder).listing()
    return list_image_folder(folder)

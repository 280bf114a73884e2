"""Where models are: the folder that a name stands for, and the names of the files in it."""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from ..data.bundled import bundled_model_folder
from ..errors import CheckpointError
from ..machine.huberrors import HUB_ERRORS
from ..machine.reading import reason_of

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_NAME = "diffusion_pytorch_model.safetensors.index.json"
# of whole models that hold operators: names by which diffusers does not find the weights for a class that lacks them, and that
# are downloaded with a pipeline all the same
GRAFTED_NAME = "model.safetensors"
GRAFTED_INDEX_NAME = "model.safetensors.index.json"
DELTA_NAME = "delta.safetensors"

PIPELINE_NAME = "model_index.json"

# of a pipeline on the Hub the transformer alone
MODEL_FILES = (
    "*.json",
    "diffusion_pytorch_model*",
    f"{GRAFTED_NAME}*",
    "adapter_model.safetensors",
    "transformer/*",
    DELTA_NAME,
    "README.md",
)

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def find_model(source: str | Path, *, revision: str | None = None) -> Path:
    """The folder of the model that a name stands for; a pipeline's is its transformer. Raises as `load`."""
    return model_in(find_folder(source, revision=revision, patterns=MODEL_FILES))


def model_in(folder: Path) -> Path:
    """The folder of the transformer of a pipeline; of anything else the folder itself."""
    if not (folder / PIPELINE_NAME).is_file():
        return folder
    found = folder / "transformer"
    if not (found / CONFIG_NAME).is_file():
        parts = ", ".join(sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))) or "none"
        raise CheckpointError(
            f"{folder} is a pipeline without `transformer/{CONFIG_NAME}`; its models are {parts}: name one of these folders"
        )
    return found


def find_folder(source: str | Path, *, revision: str | None = None, patterns: Sequence[str]) -> Path:
    """The folder that a name stands for, downloaded if it is on the Hub. Raises as `load`.

    Args:
        patterns: the files that are downloaded.
    """
    if bundled := bundled_model_folder(str(source)):
        return bundled
    folder = Path(source).expanduser()
    if folder.exists() or str(source).startswith(".") or not HUB_NAME.fullmatch(str(source)):
        return folder / "model" if (folder / "manifest.json").is_file() else folder
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=list(patterns)))
    except HUB_ERRORS as error:
        raise CheckpointError(
            f"no model in {source}: it does not exist, and the Hub does not give it: {reason_of(error)}"
        ) from error

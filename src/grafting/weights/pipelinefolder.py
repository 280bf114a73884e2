"""A pipeline's folder with another transformer in it, as a run leaves it: weights that are not edited are linked, not copied."""

import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ..errors import CheckpointError
from ..machine.files import atomic_files, link_weights, write_bytes, write_json
from ..machine.reading import read_json
from .card import CARD_NAME
from .folder import read_config
from .locate import CONFIG_NAME, HUB_NAME, MODEL_FILES, PIPELINE_NAME, find_folder, model_in
from .portable import HOME, PREFIX


class _Index(BaseModel):
    """`model_index.json`: settings of the pipeline, and for each part its library and class."""

    model_config = ConfigDict(extra="allow")

    transformer: tuple[str, str]


def pipeline_in(source: str | Path) -> Path | None:
    """The folder of the pipeline that a source names, if it is one's with a transformer. Raises as `find_folder`."""
    folder = find_folder(source, patterns=MODEL_FILES)
    is_one = (folder / PIPELINE_NAME).is_file() and model_in(folder) != folder
    return folder if is_one else None


def write_pipeline(folder: Path, source: str | Path, model: Path) -> list[Path]:
    """Write a copy of a pipeline with the model of a folder as its transformer; returns the files that are new.

    Its other parts are the source's files: safetensors are linked where the disk allows it, which whoever saves others in their
    place replaces, and all else is copied. Of a pipeline on the Hub what is not here yet is downloaded. It loads by
    `DiffusionPipeline.from_pretrained`, after `import grafting`.

    Raises:
        CheckpointError: there is no such pipeline. RunError: the folder cannot be written; what was there is then gone.
    """
    found = pipeline_in(_whole(source))
    if found is None:
        raise CheckpointError(f"{source} is no pipeline with a transformer")
    index = read_json(found / PIPELINE_NAME, _Index, error=CheckpointError).model_dump(mode="json")
    shutil.rmtree(folder, ignore_errors=True)  # parts that this pipeline has not got
    with atomic_files(folder, last=PIPELINE_NAME) as made:
        for part in _parts(index, found):
            shutil.copytree(found / part, made / part, copy_function=link_weights)
        shutil.copytree(model, made / "transformer", copy_function=link_weights)
        name = str(read_config(model)["_class_name"])
        place = {"transformer": [HOME, name]} if name.startswith(PREFIX) else {}
        write_bytes(
            made / CARD_NAME, _card(str(index.get("_class_name", "pipeline")), grafted=bool(place)).encode()
        )
        write_json(made / PIPELINE_NAME, index | place)
    return [folder / PIPELINE_NAME, folder / CARD_NAME, folder / "transformer" / CONFIG_NAME]


def _card(pipeline: str, *, grafted: bool) -> str:
    """What whoever gets the folder has to know."""
    first = "import grafting  # diffusers finds the transformer's class by it\n" if grafted else ""
    return (
        f"---\nlibrary_name: diffusers\ntags: [grafting, diffusion]\n---\n\n# A grafted {pipeline}\n\n"
        "Operators of its transformer were replaced by `grafting`; the card in `transformer/` says which, and from what model.\n\n"
        f'```python\n{first}from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained("this folder")\n```\n'
    )


def _whole(source: str | Path) -> str | Path:
    """The folder of a pipeline on the Hub, with all its parts; anything else as it is."""
    if Path(source).expanduser().exists() or not HUB_NAME.fullmatch(str(source)):
        return source
    from diffusers import DiffusionPipeline

    return str(DiffusionPipeline.download(str(source)))


def _parts(index: dict[str, Any], folder: Path) -> list[str]:
    """Folders of a pipeline's parts, but for its transformer's."""
    return [
        name
        for name, value in index.items()
        if name != "transformer" and isinstance(value, list) and (folder / name).is_dir()
    ]

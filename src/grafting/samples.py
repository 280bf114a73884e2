"""Sampled images as one .npz file: arr_0 [N, H, W, C] of 8 bits, as ADM's evaluation reads it, and their labels.

The file also records how the images were sampled, so that measuring it later knows its protocol. The samples in a run's
folder are read too, with the protocol of the run's recipe.
"""

import io
import json
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from .checkpoint import load_tensors
from .errors import CheckpointError, DataError, ProtocolError
from .files import sha256_of, write_bytes
from .recipefile import load_recipe
from .sampling import SamplingConfig


class Samples(NamedTuple):
    """Images, labels, and how they came about: `sampling`, `labels` and `weights_dtype` of their protocol."""

    images: UInt8[Tensor, "n c h w"]
    labels: Int[Tensor, "n"]
    origin: dict[str, Any]


def write_samples(
    path: Path, images: UInt8[Tensor, "n c h w"], labels: Int[Tensor, "n"], config: SamplingConfig
) -> None:
    """Write an .npz file, atomically.

    Raises:
        RunError: it cannot be written.
    """
    buffer = io.BytesIO()
    np.savez(
        buffer,
        arr_0=images.permute(0, 2, 3, 1).numpy(),
        labels=labels.numpy(),
        origin=np.array(json.dumps(_origin(config))),
    )
    write_bytes(path, buffer.getvalue())


def read_samples(path: Path) -> Samples:
    """The samples of an .npz file, or of a `samples/ROW.safetensors` in a run's folder.

    Raises:
        DataError, CheckpointError: no such file, or it is damaged or something else.
        ProtocolError: a run that has not finished sampling.
    """
    if not path.is_file():
        raise DataError(f"no samples file {path}")
    return _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)


def _read_npz(path: Path) -> Samples:
    try:
        # without pickles: a file of arrays has no code to run
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            images, labels = arrays["arr_0"], arrays["labels"]
            origin = json.loads(str(arrays["origin"])) if "origin" in arrays else _unrecorded(path)
    except KeyError as error:
        raise DataError(f"{path}: {error.args[0]}; samples are arr_0 [N, H, W, C] and labels [N]") from error
    except (OSError, EOFError, ValueError, BadZipFile) as error:
        raise DataError(f"{path} is not a whole .npz file of arrays: {error}") from error
    is_batch = images.dtype == np.uint8 and images.ndim == 4 and labels.shape == images.shape[:1]
    if not is_batch or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{path}: arr_0 must be uint8 [N, H, W, C] and labels integers [N]; "
            f"found {images.dtype} {list(images.shape)} and {labels.dtype} {list(labels.shape)}"
        )
    return Samples(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels).long(), origin)


def _read_safetensors(path: Path) -> Samples:
    tensors = load_tensors(path)
    if not {"images", "labels"} <= tensors.keys():
        raise CheckpointError(
            f"{path} holds {', '.join(tensors) or 'nothing'}; samples are images and labels"
        )
    images, labels = tensors["images"], tensors["labels"]
    recipe_path = path.parent.parent / "recipe.yaml"
    config = load_recipe(recipe_path).sample if recipe_path.is_file() else None
    if config is None:
        return Samples(images, labels, _unrecorded(path))
    if len(images) != config.num_images:
        raise ProtocolError(f"{path} holds {len(images)} images, {recipe_path} says {config.num_images}")
    return Samples(images, labels, _origin(config))


def _origin(config: SamplingConfig) -> dict[str, Any]:
    return {
        "sampling": config.model_dump(mode="json"),
        "labels": config.labels_rule,
        "weights_dtype": "float32",
    }


def _unrecorded(path: Path) -> dict[str, Any]:
    sampling = {"source": "file", "sha256": sha256_of(path)}
    return {"sampling": sampling, "labels": "as in the file", "weights_dtype": "unknown"}

"""Tensors in files: safetensors, written atomically and loaded strictly, and torch files from which no code is run."""

import argparse
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..editing.surgery import Operators
from ..errors import CheckpointError, listed
from ..machine.files import atomic_path, pickle_fault
from .locate import CONFIG_NAME, GRAFTED_INDEX_NAME, GRAFTED_NAME, INDEX_NAME, WEIGHTS_NAME


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder that holds a whole model, in one file or several with an index.

    Raises:
        CheckpointError: there are none, or a file is missing or truncated.
    """
    whole = next((folder / n for n in (GRAFTED_NAME, WEIGHTS_NAME) if (folder / n).is_file()), None)
    if whole is not None:
        return load_tensors(whole)
    index = next((folder / n for n in (GRAFTED_INDEX_NAME, INDEX_NAME) if (folder / n).is_file()), None)
    if index is None:
        raise CheckpointError(f"{folder} has a {CONFIG_NAME} but no {WEIGHTS_NAME}: it is half-written")
    shards = set(json.loads(index.read_text())["weight_map"].values())
    return {name: t for shard in sorted(shards) for name, t in load_tensors(folder / shard).items()}


def save_tensors(path: Path, tensors: dict[str, Tensor], *, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as one safetensors file, atomically."""
    whole = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(whole, temporary, metadata=metadata)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: no such file, or it is truncated or not safetensors.
    """
    if not path.is_file():
        raise CheckpointError(f"no file {path}")
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error


def read_pickle(path: Path) -> dict[str, Any]:
    """Load a torch file of tensors and plain values; no code in it is run.

    Raises:
        CheckpointError: no such file, it is truncated, or it holds other objects.
    """
    try:
        # DiT's training script keeps its arguments beside the weights, as a plain bag of settings
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"no file {path}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = pickle_fault(error)
        raise CheckpointError(
            f"{path} is truncated, or not a torch file of plain tensors: {reason}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a state dict")
    return content


def save_operators(path: Path, operators: Operators) -> None:
    """Write operators, that stand in no model yet, as one safetensors file with the names of a grafted model."""
    save_tensors(
        path,
        {
            f"{site}.{name}": t
            for site, module in operators.items()
            for name, t in module.state_dict().items()
        },
    )


def load_operators(path: Path, operators: Operators) -> None:
    """Fill operators with the tensors of a file that `save_operators` wrote. Raises as `load_strictly`."""
    tensors = load_tensors(path)
    for site, module in operators.items():
        own = {n.removeprefix(f"{site}."): t for n, t in tensors.items() if n.startswith(f"{site}.")}
        load_strictly(module, own, source=f"{path} at {site}")


def load_strictly(module: nn.Module, tensors: dict[str, Tensor], *, source: str) -> None:
    """Copy tensors into a module that has exactly these names and shapes.

    Raises:
        CheckpointError: lists what is missing, unexpected or of another shape; the module is unchanged.
    """
    own = module.state_dict()
    faults = [f"missing tensor {name}" for name in own.keys() - tensors.keys()]
    faults += [f"unexpected tensor {name}" for name in tensors.keys() - own.keys()]
    faults += [
        f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if tensors[name].shape != own[name].shape
    ]
    if faults:
        head = f"{source} does not fit {type(module).__name__}: {len(faults)} faults"
        raise CheckpointError(listed(head, sorted(faults), most=12))
    module.load_state_dict(tensors)


def tensor_hash(tensor: Tensor) -> str:
    """The SHA-256, in hex, of a tensor's type, shape and values."""
    values = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{values.dtype} {tuple(values.shape)} ".encode())
    digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

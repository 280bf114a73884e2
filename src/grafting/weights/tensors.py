"""Tensors in files: safetensors, written atomically and loaded strictly, and torch files from which no code is run."""

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
from ..machine.files import atomic_path, hash_json, pickle_fault, sha256_of
from .checkpoints import check_is_weights, harmless_globals, weight_file
from .locate import CONFIG_NAME, WEIGHTS_NAME

_QUANTISED = frozenset({torch.int8, torch.uint8})


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder that holds a whole model, in one file or several with an index.

    Raises:
        CheckpointError: there are none, or a file is missing or truncated.
    """
    return {name: t for path in weight_files(folder) for name, t in _read(path).items()}


def weights_sha256(folder: Path) -> str:
    """The SHA-256 of a folder's weights, or of those of its files where there are several."""
    digests = [sha256_of(path) for path in weight_files(folder)]
    return digests[0] if len(digests) == 1 else hash_json(digests)


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights, of whatever variant. Raises as `read_weights`."""
    found = weight_file(folder)
    if found is None:
        raise CheckpointError(f"{folder} has a {CONFIG_NAME} but no {WEIGHTS_NAME}: it is half-written")
    if found.suffix != ".json":
        return [found]
    return [folder / shard for shard in sorted(set(json.loads(found.read_text())["weight_map"].values()))]


def _read(path: Path) -> dict[str, Tensor]:
    return load_tensors(path) if path.suffix == ".safetensors" else read_pickle(path)


def check_can_be_saved(model: nn.Module) -> None:
    """Raise a CheckpointError unless a model's weights are its class's own: no adapters', none that are quantised or elsewhere."""
    adapted = sorted(name for name, part in model.named_modules() if hasattr(part, "base_layer"))
    if adapted:
        raise CheckpointError(
            f"{len(adapted)} layers have adapters (LoRA), such as {adapted[0]}, and a model saved with them could not be loaded: "
            "merge them into the weights or unload them first"
        )
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            raise CheckpointError(
                f"{name} has no values here, as its layer is offloaded: bring the model back first"
            )
        if type(tensor).__module__.partition(".")[0] != "torch" or tensor.dtype in _QUANTISED:
            raise CheckpointError(
                f"{name} is quantised ({type(tensor).__name__} of {tensor.dtype}), and a model saved with it could not be "
                "loaded: save it before it is quantised"
            )


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
    check_is_weights(path)
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error


def read_pickle(path: Path) -> dict[Any, Any]:
    """Load a torch file of tensors and plain values; no code in it is run.

    Raises:
        CheckpointError: no such file, it is truncated, or it holds other objects.
    """
    if path.is_file():
        check_is_weights(path)
    try:
        with torch.serialization.safe_globals(harmless_globals()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"no file {path}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = pickle_fault(error)
        raise CheckpointError(
            f"{path} is truncated, or not a torch file of plain tensors: {reason}; of a pickled model save the state dict alone"
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

"""A model spread over processes (FSDP2), and states of which every process writes its part (torch's distributed checkpoints).

Each process holds a part of every weight, gradient and moment. A block's weights are whole while it runs. A state read
back may be spread over another number of processes, or lie in one.
"""

import json
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils import _pytree

from ..errors import CheckpointError
from ..machine import processes
from .reading import Form, cut, opened, read_json

T = TypeVar("T")

FACTS_NAME = "facts.json"

# what the index of a distributed checkpoint is made of; it is a pickle, of which nothing else is read
_INDEX_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_INDEX_NAMES = {
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
}


def shard(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Spread a model's parameters over all processes, in place: block by block, then those outside of blocks."""
    mesh = init_device_mesh(device.type, (processes.world_size(),))
    for block in blocks:
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_spread(tensor: Tensor) -> bool:
    """True if each process holds a part of it."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread over processes; all of them call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_whole(source: nn.Module, target: nn.Module) -> None:
    """Fill a plain model with the weights of one that is spread over processes, in every process."""
    tensors = source.state_dict()
    for name, tensor in target.state_dict().items():
        tensor.copy_(whole(tensors[name]))


def kept_copy(tree: Any) -> Any:
    """A copy of nested dicts and lists whose tensors lie on the CPU, or where they are if they are spread.

    A tensor that stands in several places is copied once.
    """
    copies: dict[int, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            alone = tensor.detach()
            copies[id(tensor)] = alone.clone() if is_spread(tensor) else alone.to("cpu", copy=True)
        return copies[id(tensor)]

    return _pytree.tree_map_only(Tensor, copied, tree)


class ShardedState:
    """A training state that writes itself into a folder, each process its part.

    Args:
        tree: dicts and lists of tensors by name; what else is in it is not kept.
        facts: the rest, as JSON.
    """

    def __init__(self, tree: Any, facts: Mapping[str, Any]):
        self.tensors, self.facts = tensors_of(tree), dict(facts)

    def save(self, folder: Path) -> None:
        """Write it; all processes call this with the same folder, which the main one has made."""
        processes.barrier()
        with _also_alone():
            dcp.save(self.tensors, storage_writer=dcp.FileSystemWriter(folder))
        if processes.is_main():
            (folder / FACTS_NAME).write_text(json.dumps(self.facts))


def read_facts(folder: Path, form: Form[T]) -> T:
    """Contents of a state's folder other than tensors, in a form."""
    return read_json(folder / FACTS_NAME, form, kind="what a state of a sharded run says of itself")


def read_tensors(folder: Path, tree: Any) -> None:
    """Fill the tensors of a tree like the saved one, whatever part of them lies here. All processes call it.

    Raises:
        CheckpointError: the folder holds the state of another model, or is damaged.
    """
    try:
        with _also_alone():
            dcp.load(tensors_of(tree), storage_reader=_Reader(folder))
    # whatever torch raises at a damaged file; its own is no Exception
    except (Exception, CheckpointException) as error:
        # torch tells of every process, with tracebacks
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise CheckpointError(
            f"the state in {folder} is damaged or another model's: {cut(str(cause))} Delete it to restart the stage"
        ) from error


def tensors_of(tree: Any) -> dict[str, Tensor]:
    """The tensors of nested dicts and lists, by their place."""
    leaves, _ = _pytree.tree_flatten_with_path(tree)
    return {_pytree.keystr(path): leaf.detach() for path, leaf in leaves if isinstance(leaf, Tensor)}


@contextmanager
def _also_alone() -> Iterator[None]:
    """Inside, torch does not warn that there is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


class _Reader(dcp.FileSystemReader):
    """Reads a distributed checkpoint without running what a pickle may hold."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with opened(Path(self.path) / ".metadata") as file:
            metadata = _IndexReader(file).load()
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        is_index = module in _INDEX_MODULES and not name.startswith("__") and "." not in name
        if is_dtype or is_index or (module, name) in _INDEX_NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its index holds {module}.{name}, which is not allowed")

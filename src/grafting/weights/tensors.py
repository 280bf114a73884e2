"""Tensors in files: safetensors, written atomically and loaded strictly, and torch files from which no code is run."""

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import init
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from ..editing.adapters import adapters_of
from ..editing.surgery import Operators
from ..errors import CheckpointError, listed
from ..machine.files import atomic_path, hash_json, sha256_of
from ..machine.reading import Inside, read_json, read_safetensors, read_torch
from .checkpoints import check_is_weights, harmless_globals, weight_file
from .locate import CONFIG_NAME, GRAFTED_INDEX_NAME, GRAFTED_NAME, WEIGHTS_NAME

_QUANTISED = frozenset({torch.int8, torch.uint8})


class _WeightIndex(BaseModel):
    """Index of weights in several files, as diffusers writes it."""

    weight_map: Annotated[dict[str, Inside], Field(min_length=1)]  # of each tensor its file


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
    own = [folder / name for name in (GRAFTED_NAME, GRAFTED_INDEX_NAME) if (folder / name).is_file()]
    found = own[0] if own else weight_file(folder)
    if found is None:
        raise CheckpointError(f"{folder} has a {CONFIG_NAME} but no {WEIGHTS_NAME}: it is half-written")
    if found.suffix != ".json":
        return [found]
    index = read_json(found, _WeightIndex, kind="an index of weights")
    return [folder / shard for shard in sorted(set(index.weight_map.values()))]


def _read(path: Path) -> dict[str, Tensor]:
    return load_tensors(path) if path.suffix == ".safetensors" else read_pickle(path)


def check_can_be_saved(model: nn.Module) -> None:
    """Raise a CheckpointError unless a model's weights are its class's own: none that are quantised or elsewhere.

    Nor those of adapters, other than low-rank ones, which have files of their own.
    """
    wrapped = {name for name, part in model.named_modules() if hasattr(part, "base_layer")}
    adapted = sorted(wrapped - adapters_of(model).keys())
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
    return read_safetensors(path)[0]


def read_pickle(path: Path) -> dict[Any, Any]:
    """Load a torch file of tensors and plain values; no code in it is run.

    Raises:
        CheckpointError: no such file, it is truncated, or it holds other objects.
    """
    if not path.is_file():
        raise CheckpointError(f"no file {path}")
    check_is_weights(path)
    advice = "; of a pickled model save the state dict alone"
    content = read_torch(path, allowed=harmless_globals(), any_kind=True, advice=advice)
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


def filled(make: Callable[[], nn.Module], tensors: Mapping[str, Tensor], *, source: str) -> nn.Module:
    """The model that `make` makes, whose parameters and persistent buffers lie in these tensors' memory where the dtype is theirs.

    Its parameters are not drawn before, so this takes no longer than the files' mapping. Tensors of `load_tensors` are mapped
    copy on write: training changes no file. Of two names for one memory, the second gets a copy.

    Raises:
        CheckpointError: as `load_strictly`. What `make` raises.
    """
    model = _without_values(make)
    if model is None:
        model = make()
        load_strictly(model, tensors, source=source)
        return model
    own = model.state_dict()
    _check_fits(model, own, tensors, source=source)
    taken: set[int] = set()
    assigned = {}
    for name, like in own.items():
        tensor = tensors[name].to(like.dtype)
        is_shared = tensor.numel() > 0 and tensor.untyped_storage().data_ptr() in taken
        assigned[name] = tensor.clone() if is_shared else tensor
        taken.add(assigned[name].untyped_storage().data_ptr())
    model.load_state_dict(assigned, assign=True)
    return model


def _without_values(make: Callable[[], nn.Module]) -> nn.Module | None:
    """The model with its parameters on meta and all else as it is made; None if it needs their values, or ties some of them."""
    try:
        with parameters_on_meta():
            model = make()
    except Exception:  # values were asked of meta; or the settings are wrong, which the second try says
        return None
    named = [name for name, _ in model.named_parameters()]
    all_names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    others = (value for m in model.modules() for value in (*m.buffers(recurse=False), *vars(m).values()))
    derived = any(isinstance(value, Tensor) and value.is_meta for value in others)
    return None if derived or len(named) != len(all_names) else model


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters that this thread registers inside have no values; buffers, and all else that a constructor computes, have."""
    thread = threading.get_ident()
    known: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}

    def emptied(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        _, empty = known.setdefault(id(parameter), (parameter, _on_meta(parameter)))
        return empty

    handle = register_module_parameter_registration_hook(emptied)  # type: ignore[arg-type]  # declared to return nothing; what it returns is registered
    try:
        with _Undrawn():
            yield
    finally:
        handle.remove()


_DRAWS = frozenset(
    {
        Tensor.fill_, Tensor.normal_, Tensor.uniform_, Tensor.zero_,
        init.constant_, init.kaiming_uniform_, init.normal_, init.trunc_normal_, init.uniform_,
    }
)  # fmt: skip


class _Undrawn(TorchFunctionMode):
    """Does not initialise tensors on meta, for which torch takes longer than for all else in a constructor."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    empty = parameter.detach().to("meta")
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Copy tensors into a module that has exactly these names and shapes.

    Raises:
        CheckpointError: lists what is missing, unexpected or of another shape; the module is unchanged.
    """
    _check_fits(module, module.state_dict(), tensors, source=source)
    module.load_state_dict(tensors)


def _check_fits(
    module: nn.Module, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, source: str
) -> None:
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


def tensor_hash(tensor: Tensor) -> str:
    """The SHA-256, in hex, of a tensor's type, shape and values."""
    values = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{values.dtype} {tuple(values.shape)} ".encode())
    digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

"""Models on disk: a folder with `config.json` (class, base config, plan) and safetensors weights, loaded strictly.

A folder without a plan is an ordinary diffusers folder, and is read as such. A missing, unexpected or misshapen tensor,
a truncated file or a hash that does not agree is an error that names it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import CheckpointError, HostError
from .files import atomic_path, sha256_of, write_json
from .hosts import host_of, hosts
from .plan import Plan
from .surgery import Operators, build_operators, place

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


def save_model(
    folder: Path, model: nn.Module, plan: Plan, *, metadata: dict[str, str] | None = None
) -> list[Path]:
    """Write a model and the plan that it was grafted with (an empty plan for none); returns the files.

    The config is written last: a folder with a config is complete.

    Raises:
        RunError: the folder cannot be written; a half-written folder has no config.
    """
    host = host_of(model)
    config, weights = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    config.unlink(missing_ok=True)
    save_tensors(weights, model.state_dict(), metadata={"format": "pt", **(metadata or {})})
    settings = {k: v for k, v in model.config.items() if not k.startswith("_")}
    described = {"_class_name": type(model).__name__, **settings}
    if plan.edits:
        described["grafting"] = {
            "host": host.name,
            "plan": plan.model_dump(mode="json"),
            "weights_sha256": sha256_of(weights),
        }
    write_json(config, described)
    return [config, weights]


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Plan]:
    """The model of a folder, in eval mode, and its plan (empty when it was not grafted).

    Raises:
        CheckpointError: the folder is missing, incomplete, damaged or of an unknown class; says what was expected.
    """
    config = _read_config(folder)
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        raise CheckpointError(f"{folder} has a {CONFIG_NAME} but no {WEIGHTS_NAME}: it is half-written")
    grafting = config.pop("grafting", None)
    if grafting and sha256_of(weights) != grafting["weights_sha256"]:
        raise CheckpointError(
            f"{weights} is not the file that {CONFIG_NAME} describes: its SHA-256 is {sha256_of(weights)}, "
            f"recorded is {grafting['weights_sha256']}"
        )
    tensors = load_tensors(weights)
    model = _base_model(folder, config)
    plan = Plan.model_validate(grafting["plan"]) if grafting else Plan()
    place(model, build_operators(model, plan))
    load_strictly(model, tensors, source=str(weights))
    return (model if dtype == torch.float32 else model.to(dtype)).eval(), plan


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
        listed = "\n  ".join(sorted(faults)[:12])
        more = f"\n  and {len(faults) - 12} more" if len(faults) > 12 else ""
        raise CheckpointError(
            f"{source} does not fit {type(module).__name__}: {len(faults)} faults\n  {listed}{more}"
        )
    module.load_state_dict(tensors)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        if folder.is_file():
            found = "it is a file; asked is a folder of config.json and safetensors (pickles are not read)"
        elif folder.is_dir():
            found = f"it has no {CONFIG_NAME} (half-written?)"
        else:
            found = "it does not exist"
        raise CheckpointError(f"no model in {folder}: {found}")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or "_class_name" not in config:
        raise CheckpointError(f"{path} does not say the model's class (_class_name)")
    return config


def _base_model(folder: Path, config: dict[str, Any]) -> nn.Module:
    name = config["_class_name"]
    # stops at the first match: naming a class of diffusers imports it, which takes seconds
    model_class = next((h.model_class for h in hosts().values() if h.model_class.__name__ == name), None)
    if model_class is None:
        known = ", ".join(h.model_class.__name__ for h in hosts().values())
        raise HostError(f"{folder} holds a {name}; known are {known}")
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        return model_class(**settings)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG_NAME} does not describe a {name}: {error}") from error

"""Models on disk: a folder with `config.json` (class, settings, plan), safetensors weights and a card, loaded strictly.

A *full* folder holds every tensor, and diffusers reads it too (`portable.py`). A *delta* holds only the tensors that its
base has not got, and says which of the base's it borrows, with their hashes. A folder without a plan is an ordinary
diffusers folder. What is missing, unexpected, misshapen, truncated, edited, made of another base or with another version
of an operator is an error that names it.
"""

import argparse
import hashlib
import json
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..data.bundled import testbed_model_folder
from ..editing.plan import Plan
from ..editing.surgery import Operators, holds_operators
from ..errors import CheckpointError, HostError
from ..hosts import host_of, hosts
from ..machine.files import atomic_path, hash_json, pickle_fault, sha256_of, write_json
from ..machine.huberrors import HUB_ERRORS
from .card import write_card
from .portable import PREFIX, Base, Record, grafted_class, plan_of, settings_of

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_NAME = "diffusion_pytorch_model.safetensors.index.json"
DELTA_NAME = "delta.safetensors"

MODEL_FILES = ("*.json", "*.safetensors", "README.md")

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    base: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The model that a name stands for, in eval mode, grafted or not; `plan_of` gives its plan.

    Args:
        source: `testbed`, a model folder, the folder of a run, or `owner/name` on the Hub.
        revision: branch, tag or commit on the Hub.
        base: where the base of a delta is, if not where the delta says.

    Raises:
        CheckpointError: there is no such model, or it is damaged or of an unknown class; says what was expected.
    """
    return load_model(find_model(source, revision=revision), dtype=dtype, base=base)[0]


def find_model(
    source: str | Path, *, revision: str | None = None, patterns: Sequence[str] = MODEL_FILES
) -> Path:
    """The folder of the model that a name stands for, downloaded if it is on the Hub. Raises as `load`.

    Args:
        patterns: the files that are downloaded.
    """
    if source == "testbed":
        return testbed_model_folder()
    folder = Path(source)
    if folder.exists() or not HUB_NAME.fullmatch(str(source)):
        return folder / "model" if (folder / "manifest.json").is_file() else folder
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=list(patterns)))
    except HUB_ERRORS as error:
        raise CheckpointError(
            f"no model in {source}: it does not exist, and the Hub does not give it: {error}"
        ) from error


def save(model: nn.Module, folder: str | Path, *, base: Base | None = None) -> Path:
    """Write a model, grafted or not, to a folder that `load` reads; returns the folder.

    Args:
        base: the pretrained model that it was made from, for the record.

    Raises: as `save_model`.
    """
    save_model(folder, model, plan_of(model), base=base)
    return Path(folder)


def save_model(
    folder: str | Path,
    model: nn.Module,
    plan: Plan,
    *,
    base: Base | None = None,
    origin: Mapping[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
) -> list[Path]:
    """Write a model, whole, and the plan that it was grafted with (an empty plan for none); returns the files.

    The config is written last: a folder with a config is complete. A grafted model gets a card, `README.md`.

    Args:
        base: the pretrained model that it was made from, for the record.
        origin: what its weights were read from and what was done to them, for the record.
        metadata: written into the weights file.

    Raises:
        CheckpointError: the model could not be loaded again: its host is not known, or its graft is not in the plan.
        RunError: the folder cannot be written; a half-written folder has no config.
    """
    folder = Path(folder)
    weights = folder / WEIGHTS_NAME
    record = _record(model, plan, base)
    _clear(folder)
    save_tensors(weights, model.state_dict(), metadata={"format": "pt", **(metadata or {})})
    return [_write_config(folder, model, record, weights=weights, origin=origin), weights]


def save_delta(
    folder: str | Path, model: nn.Module, plan: Plan, base: Base, *, source: str | Path | None = None
) -> list[Path]:
    """Write only those tensors of a model that its base has not got; returns the files.

    A tensor of the base is known by its content, whatever its name: an attention that stands inside an operator, or a
    block that moved, is borrowed all the same.

    Args:
        source: where the base is, if not where it says.

    Raises:
        CheckpointError: the base cannot be loaded, or is in this folder; or as `save_model`.
        RunError: the folder cannot be written; a half-written folder has no config.
    """
    folder = Path(folder)
    tensors = model.state_dict()
    dtype = next(model.parameters()).dtype
    found = base if source is None else Base(id=str(source))
    if find_model(found.id, revision=found.revision).resolve() == folder.resolve():
        raise CheckpointError(f"the base is in {folder}, which a delta would overwrite: name another folder")
    record = _record(model, plan, base)
    names = {tensor_hash(t): name for name, t in _base_tensors(found, dtype=dtype).items()}
    hashes = {name: tensor_hash(tensor) for name, tensor in tensors.items()}
    borrowed = {name: names[digest] for name, digest in hashes.items() if digest in names}
    weights = folder / DELTA_NAME
    _clear(folder)
    save_tensors(
        weights, {name: t for name, t in tensors.items() if name not in borrowed}, metadata={"format": "pt"}
    )
    delta = {
        "dtype": str(dtype).removeprefix("torch."),
        "borrowed": borrowed,
        "sha256": {base_name: hashes[name] for name, base_name in borrowed.items()},
    }
    return [_write_config(folder, model, record, weights=weights, delta=delta), weights]


def merge_delta(delta: str | Path, folder: str | Path, *, base: str | Path | None = None) -> list[Path]:
    """Write the whole model that a delta stands for, which then needs its base no more; returns the files.

    Raises as `load_model`.
    """
    delta, folder = Path(delta), Path(folder)
    config = _read_config(delta)
    if "delta" not in config.get("grafting", {}):
        raise CheckpointError(f"{delta} is not a delta: it is already a standalone model")
    model, plan = load_model(delta, base=base)
    return save_model(folder, model, plan, base=Record.read(config["grafting"], source=str(delta)).base)


def load_model(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, base: str | Path | None = None
) -> tuple[nn.Module, Plan]:
    """The model of a folder, in eval mode, and its plan (empty when it was not grafted).

    A grafted model is an instance of its `portable.grafted_class`.

    Args:
        base: where the base of a delta is, if not where the delta says.

    Raises:
        CheckpointError: the folder is missing, incomplete, damaged or of an unknown class; says what was expected.
    """
    folder = Path(folder)
    config = _read_config(folder)
    grafting = config.pop("grafting", None)
    if grafting is None:
        model = _build(folder, _model_class(folder, config), config)
        load_strictly(model, read_weights(folder), source=str(folder))
        return (model if dtype == torch.float32 else model.to(dtype)).eval(), Plan()
    model_class = grafted_class(_model_class(folder, config))
    record = Record.read(grafting, source=str(folder / CONFIG_NAME))
    weights = folder / (DELTA_NAME if "delta" in grafting else WEIGHTS_NAME)
    _check_hashes(folder, config, grafting, weights=weights)
    tensors = load_tensors(weights) if "delta" in grafting else read_weights(folder)
    if "delta" in grafting:
        tensors |= _borrow(folder, record, grafting["delta"], base=base)
    model = _build(folder, model_class, {**config, "grafting": record.model_dump(mode="json")})
    load_strictly(model, tensors, source=str(weights))
    return (model if dtype == torch.float32 else model.to(dtype)).eval(), record.plan


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder that holds a whole model, in one file or several with an index.

    Raises:
        CheckpointError: there are none, or a file is missing or truncated.
    """
    if (folder / WEIGHTS_NAME).is_file():
        return load_tensors(folder / WEIGHTS_NAME)
    if not (folder / INDEX_NAME).is_file():
        raise CheckpointError(f"{folder} has a {CONFIG_NAME} but no {WEIGHTS_NAME}: it is half-written")
    shards = set(json.loads((folder / INDEX_NAME).read_text())["weight_map"].values())
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
            found = (
                "it is a file; asked is a folder of config.json and safetensors (pickles are not read); `grafting convert` "
                "makes one of published weights"
            )
        elif folder.is_dir():
            found = (
                f"it has no {CONFIG_NAME}: half-written, or published weights, which `grafting convert` reads"
            )
        else:
            found = "it does not exist; a model is `testbed`, a folder of a model or of a run, or owner/name on the Hub"
        raise CheckpointError(f"no model in {folder}: {found}")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or "_class_name" not in config:
        raise CheckpointError(f"{path} does not say the model's class (_class_name)")
    return config


def _model_class(folder: Path, config: dict[str, Any]) -> Any:
    """The class of a folder's model before any graft."""
    name = config["_class_name"].removeprefix(PREFIX)
    # stops at the first match: naming a class of diffusers imports it, which takes seconds
    model_class = next((h.model_class for h in hosts().values() if h.model_class.__name__ == name), None)
    if model_class is None:
        known = ", ".join(h.model_class.__name__ for h in hosts().values())
        hint = "; `grafting convert` reads it" if name == "DiTTransformer2DModel" else ""
        raise HostError(f"{folder} holds a {name}; known are {known}{hint}")
    return model_class


def _build(folder: Path, model_class: type[nn.Module], config: dict[str, Any]) -> nn.Module:
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        return model_class(**settings)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / CONFIG_NAME} does not describe a {model_class.__name__}: {error}"
        ) from error


def _record(model: nn.Module, plan: Plan, base: Base | None) -> Record:
    if not plan.edits and holds_operators(model):
        raise CheckpointError(
            "the model is grafted, and the plan to save with it is empty: it could not be loaded"
        )
    return Record.of(model, plan, base=base)


def _clear(folder: Path) -> None:
    """Make a folder half-written, whatever it held: no config, and neither kind of weights."""
    for name in (CONFIG_NAME, WEIGHTS_NAME, DELTA_NAME):
        (folder / name).unlink(missing_ok=True)


def _write_config(
    folder: Path,
    model: nn.Module,
    record: Record,
    *,
    weights: Path,
    delta: Mapping[str, Any] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Path:
    """Write the card, and last the config, whose hashes cover the weights and the config itself."""
    name, settings = host_of(model).model_class.__name__, settings_of(model)
    # keys with an underscore are passed over by diffusers
    noted = {} if origin is None else {"_origin": dict(origin)}
    described: dict[str, Any] = {"_class_name": name, **noted, **settings}
    if record.plan.edits:
        described = {
            "_class_name": PREFIX + name,
            **noted,
            **settings,
            "grafting": {
                **record.model_dump(mode="json"),
                **({} if delta is None else {"delta": delta}),
                "weights_sha256": sha256_of(weights),
            },
        }
        described["grafting"]["config_sha256"] = hash_json(described)
        write_card(folder, described)
    write_json(folder / CONFIG_NAME, described)
    return folder / CONFIG_NAME


def _check_hashes(folder: Path, config: dict[str, Any], grafting: dict[str, Any], *, weights: Path) -> None:
    """Compare with the hashes that `save_model` and `save_delta` write; diffusers writes none."""
    recorded = grafting.get("config_sha256")
    unsigned = {k: v for k, v in grafting.items() if k != "config_sha256"}
    if recorded and hash_json({**config, "grafting": unsigned}) != recorded:
        raise CheckpointError(
            f"{folder / CONFIG_NAME} was edited after it was saved: it does not agree with its own SHA-256"
        )
    recorded = grafting.get("weights_sha256")
    if recorded and not weights.is_file():
        raise CheckpointError(f"{folder} has a {CONFIG_NAME} but no {weights.name}: it is half-written")
    if recorded and sha256_of(weights) != recorded:
        raise CheckpointError(
            f"{weights} is not the file that {CONFIG_NAME} describes: its SHA-256 is {sha256_of(weights)}, "
            f"recorded is {recorded}"
        )


def _borrow(
    folder: Path, record: Record, delta: dict[str, Any], *, base: str | Path | None
) -> dict[str, Tensor]:
    """The tensors of the base that a delta borrows, each known to be the one that it was saved with."""
    if record.base is None:
        raise CheckpointError(f"{folder} is a delta but does not name its base")
    where = record.base if base is None else Base(id=str(base))
    tensors = _base_tensors(where, dtype=getattr(torch, delta["dtype"]))
    faults = [
        f"{name} is missing" if name not in tensors else f"{name} has other values"
        for name, digest in delta["sha256"].items()
        if name not in tensors or tensor_hash(tensors[name]) != digest
    ]
    if faults:
        more = f"\n  and {len(faults) - 12} more" if len(faults) > 12 else ""
        raise CheckpointError(
            "\n  ".join(
                [
                    f"{folder} is a delta of {record.base.id}{_at(record.base)}, and {where.id} is another model: "
                    f"{len(faults)} of {len(delta['sha256'])} tensors differ",
                    *faults[:12],
                ]
            )
            + more
        )
    return {name: tensors[base_name] for name, base_name in delta["borrowed"].items()}


def _base_tensors(base: Base, *, dtype: torch.dtype) -> dict[str, Tensor]:
    return load(base.id, revision=base.revision, dtype=dtype).state_dict()


def _at(base: Base) -> str:
    return "" if base.revision is None else f" at {base.revision}"


def tensor_hash(tensor: Tensor) -> str:
    """The SHA-256, in hex, of a tensor's type, shape and values."""
    values = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{values.dtype} {tuple(values.shape)} ".encode())
    digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

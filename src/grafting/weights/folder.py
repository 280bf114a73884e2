"""Models on disk: a folder with `config.json` (class, settings, plan), safetensors weights and a card, loaded strictly.

A *full* folder holds every tensor, and diffusers reads it too (`portable.py`). A *delta* holds only the tensors that its
base has not got, and says which of the base's it borrows, with their hashes. A folder without a plan is an ordinary
diffusers folder. What is missing, unexpected, misshapen, truncated, edited, made of another base or with another version
of an operator is an error that names it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from ..editing.adapters import without_adapters
from ..editing.plan import Plan
from ..editing.surgery import holds_operators
from ..errors import CheckpointError, HostError
from ..hosts import Host, constructed, host_of, hosts, unknown_class
from ..machine.files import Stamp, atomic_files, hash_json, sha256_of, stamp_of, write_bytes, write_json
from ..machine.reading import JsonObject, cut, damage, read_json
from .adapter import ADAPTER_CONFIG_NAME, ADAPTER_NAME, save_adapters, with_adapter
from .card import CARD_NAME, card_of
from .delta import Delta, borrow, check_is_base, less_base
from .locate import CONFIG_NAME, DELTA_NAME, GRAFTED_NAME, PIPELINE_NAME, WEIGHTS_NAME, find_model, model_in
from .portable import PREFIX, Base, Record, grafted_class, plan_of, settings_of
from .tensors import check_can_be_saved, filled, load_tensors, read_weights, save_tensors

# what a folder may hold of one model and not of the next
_WEIGHTS = (WEIGHTS_NAME, GRAFTED_NAME, DELTA_NAME, ADAPTER_NAME, ADAPTER_CONFIG_NAME)


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    base: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The model that a name stands for, in eval mode, grafted or not; `plan_of` gives its plan.

    Args:
        source: `testbed`, `scenes`, a model folder, the folder of a run, or `owner/name` on the Hub.
        revision: branch, tag or commit on the Hub.
        base: where the base of a delta is, if not where the delta says.

    Raises:
        CheckpointError: there is no such model, or it is damaged or of an unknown class; says what was expected.
    """
    return load_model(find_model(source, revision=revision), dtype=dtype, base=base)[0]


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

    Adapters that stand in it are written beside it, for `load` to add. A new folder is whole or absent; in one that is there
    the config is written last: a folder with a config is complete. A grafted model gets a card, `README.md`.

    Args:
        base: the pretrained model that it was made from, for the record.
        origin: what its weights were read from and what was done to them, for the record.
        metadata: written into the weights file.

    Raises:
        CheckpointError: the model could not be loaded again: its host is not known, or its graft is not in the plan.
        RunError: the folder cannot be written; what was there is unchanged.
    """
    name = GRAFTED_NAME if plan.edits else WEIGHTS_NAME
    words = {"format": "pt", **(metadata or {})}
    record = _record(model, plan, base)
    return _write(Path(folder), name, _own_tensors(model), model, record, origin=origin, words=words)


def save_delta(
    folder: str | Path, model: nn.Module, plan: Plan, base: Base, *, source: str | Path | None = None
) -> list[Path]:
    """Write only those tensors of a model that its base has not got; returns the files.

    Args:
        source: where the base is, if not where it says.

    Raises:
        CheckpointError: the base cannot be loaded, or is in this folder; or as `save_model`.
        RunError: the folder cannot be written; what was there is unchanged.
    """
    folder = Path(folder)
    dtype = next(model.parameters()).dtype
    found = base if source is None else Base(id=str(source))
    if find_model(found.id, revision=found.revision).resolve() == folder.resolve():
        raise CheckpointError(f"the base is in {folder}, which a delta would overwrite: name another folder")
    record = _record(model, plan, base)
    base_tensors = _base_tensors(found, dtype=dtype, host=record.described)
    own, delta = less_base(_own_tensors(model), base_tensors, dtype=dtype)
    return _write(folder, DELTA_NAME, own, model, record, delta=delta)


def merge_delta(delta: str | Path, folder: str | Path, *, base: str | Path | None = None) -> list[Path]:
    """Write the whole model that a delta stands for, which then needs its base no more; returns the files.

    Raises as `load_model`.
    """
    delta, folder = Path(delta), Path(folder)
    grafting = read_config(delta).get("grafting")
    if not isinstance(grafting, dict) or "delta" not in grafting:
        raise CheckpointError(f"{delta} is not a delta: it is already a standalone model")
    model, plan = load_model(delta, base=base)
    return save_model(folder, model, plan, base=Record.read(grafting, source=str(delta)).base)


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    base: str | Path | None = None,
    host: Host | None = None,
) -> tuple[nn.Module, Plan]:
    """The model of a folder, in eval mode, and its plan (empty when it was not grafted).

    A grafted model is an instance of its `portable.grafted_class`.

    Args:
        base: where the base of a delta is, if not where the delta says.
        host: of a model without operators, if not one that is known by its class.

    Raises:
        CheckpointError: the folder is missing, incomplete, damaged or of an unknown class; says what was expected.
    """
    return _load(Path(folder), dtype=dtype, base=base, host=host, above=())


def _load(
    folder: Path,
    *,
    dtype: torch.dtype,
    base: str | Path | None,
    host: Host | None,
    above: tuple[Path, ...],
) -> tuple[nn.Module, Plan]:
    """As `load_model`; `above` are the deltas whose base, or base's base, the folder is."""
    folder = model_in(folder)
    if folder.resolve() in above:
        raise CheckpointError(f"the delta in {folder} is its own base: name the right one")
    config = read_config(folder)
    grafting = config.pop("grafting", None)
    if grafting is None:
        plain = _model_class(folder, config, host)
        tensors = with_adapter(folder, read_weights(folder))
        model = filled(lambda: _build(folder, plain, config), tensors, source=str(folder))
        return (model if dtype == torch.float32 else model.to(dtype)).eval(), Plan()
    if not isinstance(grafting, dict):
        raise CheckpointError(f"{folder / CONFIG_NAME} does not describe a graft: `grafting` is no mapping")
    with damage(folder / CONFIG_NAME, "the config of a graft"):
        signed = _Signed.model_validate(grafting, strict=True)
    record = Record.read(grafting, source=str(folder / CONFIG_NAME))
    model_class = grafted_class(_grafted_model_class(folder, config, record))
    # before grafts had a name of their own for their weights, they had diffusers'
    whole = GRAFTED_NAME if (folder / GRAFTED_NAME).is_file() else WEIGHTS_NAME
    weights = folder / (whole if signed.delta is None else DELTA_NAME)
    _check_hashes(folder, signed, {**config, "grafting": grafting}, weights=weights)
    tensors = read_weights(folder) if signed.delta is None else load_tensors(weights)
    if signed.delta is not None:
        tensors |= _borrowed(folder, record, signed.delta, base=base, above=above)
    settings = {**config, "grafting": record.model_dump(mode="json")}
    tensors = with_adapter(folder, tensors)
    model = filled(lambda: _build(folder, model_class, settings), tensors, source=str(weights))
    return (model if dtype == torch.float32 else model.to(dtype)).eval(), record.plan


class _Signed(BaseModel):
    """What a graft's config says beside its `Record`: hashes, which diffusers does not write, and of a delta what it borrows."""

    delta: Delta | None = None
    weights_sha256: str | None = None
    adapter_sha256: str | None = None
    config_sha256: str | None = None


def read_config(folder: Path) -> JsonObject:
    """The config of a model's folder.

    Raises:
        CheckpointError: there is none, or it does not say the model's class.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        if folder.is_file():
            found = (
                "it is a file; asked is a folder of config.json and safetensors (pickles are not read); `grafting convert` "
                "makes one of published weights"
            )
        elif folder.is_dir():
            found = (
                f"it has neither {PIPELINE_NAME}, as a pipeline's folder has, nor {CONFIG_NAME}, as a model's: half-written, or "
                "published weights, which `grafting convert` reads"
            )
        else:
            found = "it does not exist; a model is `testbed`, `scenes`, a folder of a model or of a run, or owner/name on the Hub"
        raise CheckpointError(f"no model in {folder}: {found}")
    config = read_json(path, JsonObject)
    if not isinstance(config.get("_class_name"), str) and "auto_map" not in config:
        raise CheckpointError(f"{path} does not say the model's class (_class_name)")
    return config


def _grafted_model_class(folder: Path, config: JsonObject, record: Record) -> Any:
    """The class of a folder's model before its graft, which has a spec of its own or a known host."""
    name, host = str(config.get("_class_name")).removeprefix(PREFIX), record.described
    if host.class_name != name:
        raise CheckpointError(
            f"{folder} holds a {cut(name)}, and its graft was made with a host of {host.class_name}"
        )
    return host.model_class


def _model_class(folder: Path, config: JsonObject, host: Host | None) -> Any:
    """The class of a folder's model, which holds no operators."""
    name = config.get("_class_name")
    if "auto_map" in config or not isinstance(name, str):
        raise CheckpointError(
            f"{folder} brings code of its own for its class (auto_map, `trust_remote_code`), and none is run: install that "
            "code as a package, and name the class in a spec (--spec FILE)"
        )
    name = name.removeprefix(PREFIX)
    among = [*([] if host is None else [host]), *hosts().values()]
    model_class = next((host.model_class for host in among if host.class_name == name), None)
    if model_class is None:
        hint = "; `grafting convert` reads it" if name == "DiTTransformer2DModel" else ""
        raise HostError(f"{folder} holds a {cut(name)}; {unknown_class(cut(name))}{hint}")
    return model_class


def _build(folder: Path, model_class: type[nn.Module], config: JsonObject) -> nn.Module:
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    with damage(folder / CONFIG_NAME, f"the config of a {model_class.__name__}"):
        return constructed(model_class, settings)


def _record(model: nn.Module, plan: Plan, base: Base | None) -> Record:
    if not plan.edits and holds_operators(model):
        raise CheckpointError(
            "the model is grafted, and the plan to save with it is empty: it could not be loaded"
        )
    check_can_be_saved(model)
    return Record.of(model, plan, base=base)


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors, without its adapters."""
    return without_adapters(model.state_dict())


def _write(
    folder: Path,
    name: str,
    tensors: dict[str, Tensor],
    model: nn.Module,
    record: Record,
    *,
    delta: Delta | None = None,
    origin: Mapping[str, Any] | None = None,
    words: dict[str, str] | None = None,
) -> list[Path]:
    """Write the weights, the adapter, the card, and the config, whose hashes cover the weights and the config itself.

    Args:
        name: of the weights' file.
        words: written into it.
    """
    model_class, settings = host_of(model).class_name, settings_of(model)
    # keys with an underscore are passed over by diffusers
    noted = {} if origin is None else {"_origin": dict(origin)}
    described: JsonObject = {"_class_name": model_class, **noted, **settings}
    with atomic_files(folder, last=CONFIG_NAME, stale=_WEIGHTS) as made:
        adapter = save_adapters(made, model, base=record.base.id if record.base else None)
        save_tensors(made / name, tensors, metadata=words or {"format": "pt"})
        files = [made / CONFIG_NAME, made / name, *adapter]
        if record.plan.edits:
            grafting: JsonObject = {
                **record.model_dump(mode="json"),
                **({} if delta is None else {"delta": delta.model_dump(mode="json")}),
                "weights_sha256": sha256_of(made / name),
                **_adapter_hash(made),
            }
            described |= {"_class_name": PREFIX + model_class, "grafting": grafting}
            grafting["config_sha256"] = hash_json(described)
            write_bytes(made / CARD_NAME, card_of(folder, described).encode())
        write_json(made / CONFIG_NAME, described)
    return [folder / file.name for file in files]


def _adapter_hash(folder: Path) -> dict[str, str]:
    path = folder / ADAPTER_NAME
    return {"adapter_sha256": sha256_of(path)} if path.is_file() else {}


def _check_hashes(folder: Path, signed: _Signed, described: Mapping[str, Any], *, weights: Path) -> None:
    """Compare with the hashes that `save_model` and `save_delta` write; diffusers and early versions wrote none of a whole model."""
    if signed.delta is not None and None in (signed.config_sha256, signed.weights_sha256):
        raise CheckpointError(
            f"{folder / CONFIG_NAME} was edited after it was saved: it has no SHA-256 of itself and the weights"
        )
    recorded = signed.config_sha256
    unsigned = {k: v for k, v in described["grafting"].items() if k != "config_sha256"}
    if recorded and hash_json({**described, "grafting": unsigned}) != recorded:
        raise CheckpointError(
            f"{folder / CONFIG_NAME} was edited after it was saved: it does not agree with its own SHA-256"
        )
    recorded = signed.weights_sha256
    if recorded and not weights.is_file():
        raise CheckpointError(f"{folder} has a {CONFIG_NAME} but no {weights.name}: it is half-written")
    if recorded and sha256_of(weights) != recorded:
        raise CheckpointError(
            f"{weights} is not the file that {CONFIG_NAME} describes: its SHA-256 is {sha256_of(weights)}, "
            f"recorded is {cut(recorded)}"
        )
    if signed.adapter_sha256 != _adapter_hash(folder).get("adapter_sha256"):
        raise CheckpointError(
            f"{folder / ADAPTER_NAME} is missing, or not the adapter that {CONFIG_NAME} describes"
        )


def _borrowed(
    folder: Path, record: Record, delta: Delta, *, base: str | Path | None, above: tuple[Path, ...]
) -> dict[str, Tensor]:
    """The tensors of a delta that are its base's."""
    if record.base is None:
        raise CheckpointError(f"{folder} is a delta but does not name its base")
    where = record.base if base is None else Base(id=str(base))
    revision = "" if record.base.revision is None else f" at {record.base.revision}"
    try:
        found = model_in(find_model(where.id, revision=where.revision))
        before = _stamps_of(found)
        tensors = _base_tensors(
            where, dtype=getattr(torch, delta.dtype), host=record.described, above=(*above, folder.resolve())
        )
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} is a delta; its base: {error} (`base` names another place)"
        ) from error
    known = (hash_json(delta.model_dump(mode="json")), found.resolve(), before)
    if known not in _COMPARED:
        check_is_base(
            delta,
            tensors,
            otherwise=f"{folder} is a delta of {record.base.id}{revision}, and {where.id} is another model",
        )
    if before is not None and before == _stamps_of(found):
        _COMPARED.add(known)
    return borrow(delta, tensors)


# what deltas ask of their bases, and those bases' files, whose tensors this process has hashed
_COMPARED: set[tuple[str, Path, tuple[Stamp | None, ...] | None]] = set()


def _stamps_of(folder: Path) -> tuple[Stamp | None, ...] | None:
    """What shows that a whole model's files are as they were; None where nothing does, or it borrows of another."""
    if not folder.is_dir() or (folder / DELTA_NAME).is_file():
        return None
    stamps = tuple(stamp_of(path) for path in sorted(folder.iterdir()) if path.is_file())
    return None if None in stamps else stamps


def _base_tensors(
    base: Base, *, dtype: torch.dtype, host: Host, above: tuple[Path, ...] = ()
) -> dict[str, Tensor]:
    found = find_model(base.id, revision=base.revision)
    return _load(found, dtype=dtype, base=None, host=host, above=above)[0].state_dict()

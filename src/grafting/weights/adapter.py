"""Low-rank adapters beside a model's weights, in the files that peft writes and reads; read here without peft.

Whoever loads the folder gets the adapter added to the weights. `PeftModel.from_pretrained` takes it by itself.
"""

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..editing.adapters import adapters_of, merged_weight
from ..errors import CheckpointError, listed
from ..machine.files import write_json
from ..machine.reading import read_json
from .tensors import load_tensors, save_tensors

ADAPTER_NAME = "adapter_model.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"

_PREFIX = "base_model.model."


class _AdapterConfig(BaseModel):
    """Those of peft's settings that say what an adapter's tensors mean."""

    model_config = ConfigDict(extra="ignore")

    peft_type: str = Field(pattern="^LORA$")
    r: int = Field(gt=0)
    lora_alpha: float


def save_adapters(folder: Path, model: nn.Module, *, base: str | None) -> list[Path]:
    """Write the adapters that stand in a model, if there are any; returns the files.

    Raises:
        CheckpointError: they have several ranks or scales, for which these files have no place.
    """
    adapters = adapters_of(model)
    if not adapters:
        return []
    settings = sorted({(adapter.rank, adapter.alpha) for adapter in adapters.values()})
    if len(settings) > 1:
        raise CheckpointError(
            f"the model has adapters of several ranks and alphas, {settings}, and one can be saved: merge them"
        )
    tensors: dict[str, Tensor] = {}
    for path, adapter in adapters.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = adapter.a
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = adapter.b
    [(rank, alpha)] = settings
    described = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(adapters),
        "bias": "none",
        "inference_mode": True,
    }
    save_tensors(folder / ADAPTER_NAME, tensors, metadata={"format": "pt"})
    write_json(folder / ADAPTER_CONFIG_NAME, described)
    return [folder / ADAPTER_NAME, folder / ADAPTER_CONFIG_NAME]


def holds_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_NAME).is_file() or (folder / ADAPTER_CONFIG_NAME).is_file()


def with_adapter(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors with what a folder's adapter adds to them; as they are where there is none.

    Raises:
        CheckpointError: the adapter is damaged, of another kind, or of another model.
    """
    if not holds_adapter(folder):
        return dict(tensors)
    path = folder / ADAPTER_CONFIG_NAME
    config = read_json(path, _AdapterConfig, kind="the config of a low-rank adapter of peft")
    saved = {name.removeprefix(_PREFIX): t for name, t in load_tensors(folder / ADAPTER_NAME).items()}
    adapted, faults = dict(tensors), []
    for name in [name for name in saved if name.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        weight, a, b = (
            tensors.get(f"{module}.weight"),
            saved.pop(name),
            saved.pop(f"{module}.lora_B.weight", None),
        )
        if weight is None or b is None or weight.shape != (len(b), a.shape[1]) or len(a) != b.shape[1]:
            faults.append(f"{module}: no such linear layer, or its shape is another")
        else:
            adapted[f"{module}.weight"] = merged_weight(weight, a, b, scale=config.lora_alpha / config.r)
    if faults := [*faults, *(f"unexpected tensor {name}" for name in saved)]:
        raise CheckpointError(listed(f"{folder / ADAPTER_NAME} does not fit the model", faults, most=12))
    return adapted

"""Low-rank adapters that stand in a model, read as data: peft's layers, which `surgery` places and takes out."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

# of the modules that peft puts around a linear layer
_PARTS = re.compile(r"\.(lora_[AB]|base_layer)(\.default)?(?=\.)")


@dataclass(frozen=True)
class Adapter:
    """A linear layer with a low-rank adapter around it."""

    layer: Any

    @property
    def base(self) -> nn.Linear:
        return self.layer.get_base_layer()

    @property
    def a(self) -> nn.Parameter:
        """Weight [rank, in]."""
        return self.layer.lora_A["default"].weight

    @property
    def b(self) -> nn.Parameter:
        """Weight [out, rank]."""
        return self.layer.lora_B["default"].weight

    @property
    def rank(self) -> int:
        return self.layer.r["default"]

    @property
    def alpha(self) -> float:
        return self.layer.lora_alpha["default"]

    def merged(self) -> Tensor:
        """The weight of the linear layer that does what both do, in new memory."""
        return merged_weight(self.base.weight, self.a, self.b, scale=self.alpha / self.rank)


@torch.no_grad()
def merged_weight(
    weight: Float[Tensor, "out in"],
    a: Float[Tensor, "rank in"],
    b: Float[Tensor, "out rank"],
    *,
    scale: float,
) -> Float[Tensor, "out in"]:
    """W + scale B A, in the dtype of W."""
    return weight + ((b @ a) * scale).to(weight.dtype)


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """A model's adapters, by the path of the linear layer that each is around."""
    return {
        path: Adapter(module)
        for path, module in model.named_modules()
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict)
    }


def is_of_adapter(name: str) -> bool:
    """True of the name of an adapter's own parameter."""
    return ".lora_A." in name or ".lora_B." in name


def without_adapters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as it is without adapters: what they are around has its own name again."""
    return {_PARTS.sub("", name): t for name, t in tensors.items() if not is_of_adapter(name)}

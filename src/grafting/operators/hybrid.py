"""Two kernels in one place, added: say a local one and a global one."""

from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, SerializeAsAny
from pydantic.json_schema import JsonSchemaValue
from torch import Tensor, nn

from ..contract import ANY_CALL, AttentionCall, Kernel, KernelConfig, Site, TokenLayout
from ._registry import operator_configs, parse_operator


def _parse_part(value: Any) -> KernelConfig:
    """A kernel that can be part of a hybrid."""
    part = parse_operator(value)
    if not isinstance(part, KernelConfig):
        raise ValueError(
            f"{part.name} is a mixer; the parts of a hybrid are kernels: {', '.join(_part_configs())}"
        )
    if isinstance(part, HybridConfig):
        raise ValueError("parts of a hybrid cannot be hybrids themselves")
    if part.projections != "kept":
        raise ValueError(
            f"{part.name} has projections {part.projections!r}, but both parts share those of the hybrid: set them there"
        )
    return part


def _part_configs() -> dict[str, type[KernelConfig]]:
    return {
        name: config
        for name, config in operator_configs().items()
        if issubclass(config, KernelConfig) and config is not HybridConfig
    }


class _PartSchema:
    """For editors: a part is the name of a kernel, or the settings of one."""

    @classmethod
    def __get_pydantic_json_schema__(cls, _: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        configs = _part_configs()
        settings = [handler(config.__pydantic_core_schema__) for config in configs.values()]
        return {
            "anyOf": [
                {"type": "string", "enum": list(configs)},
                {"type": "object", "required": ["name"], "oneOf": settings},
            ]
        }


Part = Annotated[SerializeAsAny[KernelConfig], BeforeValidator(_parse_part), _PartSchema]


class HybridConfig(KernelConfig):
    """Two kernels on the same q, k and v, whose outputs are added with learned weights; by default local and global."""

    honours = ANY_CALL
    name: Literal["hybrid"] = "hybrid"
    first: Part = Field(default="window-2d", validate_default=True)
    """A kernel: its name, or a mapping of its name and settings. Its `projections` are those of the hybrid."""
    second: Part = Field(default="linear", validate_default=True)
    """Another kernel, in the same way."""

    def parts(self) -> tuple[KernelConfig, ...]:
        return self.first, self.second

    def call_faults(self, call: AttentionCall) -> list[str]:
        return [fault for part in self.parts() for fault in part.call_faults(call)]

    def faults(self, site: Site) -> list[str]:
        parts = {"first": self.first, "second": self.second}
        return [f"{place}: {fault}" for place, part in parts.items() for fault in part.faults(site)]

    def build(self, site: Site) -> "Hybrid":
        return Hybrid(self.first.build(site), self.second.build(site), num_heads=site.num_heads)

    def mixing_flops(self, site: Site) -> int:
        gates = 4 * site.num_tokens * site.dim
        return self.first.mixing_flops(site) + self.second.mixing_flops(site) + gates


class Hybrid(Kernel):
    """gate[0] first(q, k, v) + gate[1] second(q, k, v), with a gate for each head; they start as the mean, at 1/2.

    Gates are plain numbers and need not sum to 1: one part may be of another size than the attention it stands for.

    Args:
        first: a kernel.
        second: another.
        num_heads: heads, H.
    """

    def __init__(self, first: Kernel, second: Kernel, *, num_heads: int):
        super().__init__()
        self.first = first
        self.second = second
        self.gate = nn.Parameter(torch.full((2, num_heads), 0.5))

    def forward(
        self,
        q: Float[Tensor, "b heads m k"],
        k: Float[Tensor, "b heads l k"],
        v: Float[Tensor, "b heads l v"],
        layout: TokenLayout,
        *,
        scale: float | None = None,
    ) -> Float[Tensor, "b heads m v"]:
        first, second = (part(q, k, v, layout, scale=scale) for part in (self.first, self.second))
        gate = self.gate.to(v.dtype)[:, :, None, None]
        return gate[0] * first + gate[1] * second

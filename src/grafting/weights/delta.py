"""A model as what its base has not got: the tensors of its own, and the names and hashes of those that it borrows.

A tensor of the base is known by its content, whatever its name: an attention that stands inside an operator, or a block
that moved, is borrowed all the same.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor

from ..errors import CheckpointError, listed
from .tensors import tensor_hash

Dtype = Literal["float64", "float32", "float16", "bfloat16"]
_NAMES: dict[torch.dtype, Dtype] = {
    torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16",
}  # fmt: skip


class Delta(BaseModel):
    """What a delta borrows of its base, as its config says it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: Dtype
    borrowed: dict[str, str]  # of each tensor its name in the base
    sha256: dict[str, str]  # of each of those the hash

    @model_validator(mode="after")
    def _all_have_hashes(self) -> "Delta":
        if bare := set(self.borrowed.values()) - self.sha256.keys():
            raise ValueError(f"{len(bare)} borrowed tensors have no hash, such as {min(bare)}")
        return self


def less_base(
    tensors: Mapping[str, Tensor], base: Mapping[str, Tensor], *, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Delta]:
    """The tensors that a base has not got, and what is borrowed of it."""
    names = {tensor_hash(tensor): name for name, tensor in base.items()}
    hashes = {name: tensor_hash(tensor) for name, tensor in tensors.items()}
    borrowed = {name: names[digest] for name, digest in hashes.items() if digest in names}
    own = {name: tensor for name, tensor in tensors.items() if name not in borrowed}
    sha256 = {base_name: hashes[name] for name, base_name in borrowed.items()}
    return own, Delta(dtype=_NAMES[dtype], borrowed=borrowed, sha256=sha256)


def borrow(delta: Delta, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a base, as `check_is_base` found it, that a delta borrows."""
    return {name: base[base_name] for name, base_name in delta.borrowed.items()}


def check_is_base(delta: Delta, base: Mapping[str, Tensor], *, otherwise: str) -> None:
    """Hash the tensors that a delta borrows: each has to be the one that it was saved with.

    Args:
        otherwise: what is wrong where they are not.

    Raises:
        CheckpointError: the base has other tensors; lists them.
    """
    faults = [
        f"{name} is missing" if name not in base else f"{name} has other values"
        for name, digest in delta.sha256.items()
        if name not in base or tensor_hash(base[name]) != digest
    ]
    if faults:
        counted = f"{otherwise}: {len(faults)} of {len(delta.sha256)} tensors differ"
        raise CheckpointError(listed(counted, faults, most=12))

"""Conditions that need no data: the classes of a class-conditional model."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from pydantic import JsonValue
from torch import Tensor

from .errors import DataError


class ClassLabels:
    """Classes 0 to `count` - 1; the condition is the label itself, [B].

    Args:
        count: number of classes.
        null_label: the label that stands for no class; None if the model was trained without one.
        dropout: share of labels that training replaces by the null label.
        names: of the classes, in order.

    Raises:
        DataError: labels are to be dropped, but there is no null label.
    """

    def __init__(
        self,
        count: int,
        *,
        null_label: int | None = None,
        dropout: float = 0.0,
        names: Sequence[str] | None = None,
    ):
        if dropout and null_label is None:
            raise DataError(f"labels are dropped in a share of {dropout:g}, but no label stands for no class")
        assert names is None or len(names) == count
        self.count, self.null_label, self.dropout, self.names = count, null_label, dropout, names

    def __len__(self) -> int:
        return self.count

    @property
    def identity(self) -> dict[str, JsonValue]:
        return {
            "name": "classes",
            "count": self.count,
            "null_label": self.null_label,
            "dropout": self.dropout,
        }

    def nulls(self, numbers: Int[Tensor, " b"]) -> Int[Tensor, " b"] | None:
        return None if self.null_label is None else torch.full_like(numbers, self.null_label)

    def at(
        self, numbers: Int[Tensor, " b"], *, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> Int[Tensor, " b"]:
        return numbers.to(device, non_blocking=True)

    def words(self, number: int) -> str:
        return self.names[number] if self.names else f"class {number}"

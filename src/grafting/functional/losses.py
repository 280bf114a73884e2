"""Regression losses between activations, for stage 1."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Regression = Literal["l1", "l2", "huber"]


def regression_loss(
    prediction: Tensor,
    target: Tensor,
    kind: Regression,
    *,
    huber_delta: float = 1.0,
    normalised: bool = False,
    outlier_threshold: float | None = None,
) -> Tensor:
    """Mean loss over all elements, in float32.

    Args:
        prediction: the operator's output, any shape.
        target: the teacher's output, same shape.
        kind: absolute, squared, or Huber with `huber_delta`.
        normalised: divide by the same loss of predicting zero, so that sites of any scale weigh alike.
        outlier_threshold: leave out elements whose target exceeds this many times the target's root mean square
            (after TinyFusion, arXiv:2412.01199, section on masked distillation).
    """
    prediction, target = prediction.float(), target.float()
    kept = None
    if outlier_threshold is not None:
        kept = (target.abs() <= outlier_threshold * target.square().mean().sqrt()).float()

    def mean_loss(value: Tensor) -> Tensor:
        if kind == "huber":
            elements = F.huber_loss(value, target, reduction="none", delta=huber_delta)
        else:
            difference = (value - target).abs()
            elements = difference if kind == "l1" else difference.square()
        return elements.mean() if kept is None else (elements * kept).sum() / kept.sum().clamp(min=1)

    loss = mean_loss(prediction)
    return loss / mean_loss(torch.zeros_like(target)).clamp(min=1e-12) if normalised else loss

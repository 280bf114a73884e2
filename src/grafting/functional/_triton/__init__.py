"""Fused forms for a GPU, in Triton: gated convolutions, windows, linear attention, scans. What they must equal stands in the files above.

Calls choose by device: CUDA tensors of a size and precision that the kernels take go to them, all else to the plain path, as do
the transforms of `torch.func` and forward-mode gradients. `GRAFTING_FUSED=0` in the environment leaves out the kernels. They are
operators of `torch.library`, which `torch.compile` calls as they are; a gradient of a gradient goes through the plain path. All
sums are taken in one order, so that a result can be repeated bit for bit.
"""

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

VARIABLE = "GRAFTING_FUSED"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels, on any device: slow, for tests."""

ENABLED = os.environ.get(VARIABLE, "1") != "0" and importlib.util.find_spec("triton") is not None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def can_fuse(*tensors: Tensor) -> bool:
    """Whether the kernels take tensors like these: of one device and precision, and outside of a transform."""
    first = tensors[0]
    return (
        ENABLED
        and (INTERPRETED or (first.is_cuda and _is_recent(first.device)))
        and first.dtype in DTYPES
        and all(x.device == first.device and x.numel() > 0 for x in tensors)
        and not is_transformed()
    )


def fused_kernels(device: torch.device) -> str:
    """Say if the kernels run on a device, and if not, why."""
    if os.environ.get(VARIABLE, "1") == "0":
        return f"off: {VARIABLE}=0"
    if not ENABLED:
        return "off: there is no triton, which comes with torch's CUDA builds"
    if device.type != "cuda":
        return f"off: they do not run on {device.type}"
    return "on" if _is_recent(device) else "off: the device is older than they need"


def in_autocast(x: Tensor) -> Tensor:
    """What autocast makes of the input of a matrix product."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _is_recent(device: torch.device) -> bool:
    """Whether a device has bf16 and copies that do not wait, as NVIDIA's have since Ampere."""
    return torch.version.hip is not None or torch.cuda.get_device_properties(device).major >= 8


def has_wide_products(device: torch.device) -> bool:
    """Whether products of matrices read their operands from shared memory: on H100, B200 and their like.

    Elsewhere threads hold them. Beyond some 500 registers' worth the assembler gives up, and has all of a thread in memory.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


def is_transformed() -> bool:
    """Within vmap, grad or jvp of `torch.func`, or forward-mode gradients, of which the kernels know nothing."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or _forward_level() >= 0


def _forward_level() -> int:
    return torch.autograd.forward_ad._current_level


def differentiable_gradients(
    output: Tensor, inputs: Sequence[Tensor | None], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs that need one, from a plain output, with a graph of their own."""
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True, allow_unused=True))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in inputs)

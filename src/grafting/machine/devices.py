"""Choice of device and precision."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import RunError
from .precision import Precision, resolve_precision
from .processes import local_rank

# up to here float32 is faster than bfloat16, forward and backward (PyTorch 2.13, head dim 32: 3.0x at 64 tokens, 1.4x at
# 256, 0.9x at 1,024)
_FEW_TOKENS = 512


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU. Of several processes each gets the accelerator of its own number.

    Raises:
        RunError: a machine has more processes than accelerators.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or local_rank() is None:
        return accelerator or torch.device("cpu")
    number, count = local_rank() or 0, torch.accelerator.device_count()
    if number >= count:
        raise RunError(
            f"process {number} of this machine finds {count} {accelerator.type} devices: start one process per device"
        )
    return torch.device(accelerator.type, number)


def reading(figures: Tensor) -> Callable[[], list[float]]:
    """Start to bring figures from their device; the call waits for these, and for nothing that was launched since."""
    if not figures.is_cuda:
        return figures.tolist
    copied, event = figures.to("cpu", non_blocking=True), torch.cuda.Event()
    event.record()

    def read() -> list[float]:
        event.synchronize()
        return copied.tolist()

    return read


def is_half(tensor: Tensor) -> bool:
    """True if its type is below float32, in which most of an optimizer's steps round away."""
    return tensor.is_floating_point() and tensor.itemsize < 4


def half_types(tensors: Iterable[Tensor]) -> str:
    """List the types below float32 among some tensors; empty if there are none."""
    return " and ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors if is_half(t)}))


@contextmanager
def mixed_precision(
    device: torch.device, precision: Precision, *, is_checkpointed: bool = False
) -> Iterator[None]:
    """Inside, models run in `precision`: bf16 is autocast, fp32 is as they are.

    On a CPU, attention over few tokens that will be differentiated runs in float32 all the same: the backward pass of its
    fused attention is slow in bfloat16.

    Args:
        is_checkpointed: parts of the forward pass run again in the backward pass, to which autocast alone comes along: so
            attention is as autocast has it.
    """
    enabled = resolve_precision(precision, device) == "bf16"
    # torch 2.6 keeps a weight that was cast without gradients for a later use with them; each is used once in any case
    with torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False):
        if enabled and device.type == "cpu" and not is_checkpointed:
            with _Float32Attention():
                yield
        else:
            yield


class _Float32Attention(TorchFunctionMode):
    """Runs `scaled_dot_product_attention` over few tokens in float32, where gradients are wanted."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        names = ("query", "key", "value")
        given = dict(zip(names, args, strict=False)) | kwargs
        query = given["query"]
        if query.dtype != torch.bfloat16 or query.shape[-2] > _FEW_TOKENS:
            return func(*args, **kwargs)
        wide = {name: _widened(value) for name, value in kwargs.items()}
        with torch.autocast("cpu", enabled=False):
            return func(*map(_widened, args), **wide).to(query.dtype)


def _widened(value: Any) -> Any:
    """A tensor of numbers in float32, such as a mask that is added; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

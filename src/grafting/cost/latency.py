"""Measured cost of a forward pass on this machine: time, whole and by part, and peak memory.

A single time means little on a machine that does other work too: compare passes that were measured in turn.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@torch.no_grad()
def time_forward(model: nn.Module, paths: Sequence[str], inputs: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds of one forward pass, under "", and of the modules at `paths` in it.

    On CUDA they are times of the device, between events in its stream; nothing waits between modules.
    """
    device = next(model.parameters()).device
    is_cuda = device.type == "cuda"
    marks: dict[str, list[Any]] = {path: [] for path in ("", *paths)}

    def mark(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            marks[path].append(_cuda_event(device) if is_cuda else time.perf_counter())

        return hook

    with ExitStack() as hooks:
        for path in marks:
            module = model.get_submodule(path)
            hooks.enter_context(module.register_forward_pre_hook(mark(path)))
            hooks.enter_context(module.register_forward_hook(mark(path)))
        model(**inputs)
    if is_cuda:
        torch.cuda.synchronize(device)
        return {path: start.elapsed_time(end) for path, (start, end) in marks.items()}
    return {path: 1000 * (end - start) for path, (start, end) in marks.items()}


@torch.no_grad()
def peak_memory(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """Most bytes that a forward pass without gradients holds at one time, beside weights and inputs.

    On CUDA what torch's allocator gave out, in a second pass: workspaces that kernels keep from the first one on are left
    out. Elsewhere what tensors hold after each operation.
    """
    device = next(model.parameters()).device
    if device.type == "cuda":
        model(**inputs)
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        model(**inputs)
        return torch.cuda.max_memory_allocated(device) - held
    given = (*model.parameters(), *model.buffers(), *inputs.values())
    with _LiveStorages(t for t in given if isinstance(t, Tensor)) as live:
        model(**inputs)
    return live.peak


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of storages that operations made and that are still held; `given` ones are not counted."""

    def __init__(self, given: Iterable[Tensor]):
        super().__init__()
        self.peak = 0
        self._given = {t.untyped_storage()._cdata for t in given}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self._given:
                self._live[key] = (
                    StorageWeakRef(tensor.untyped_storage()),
                    tensor.untyped_storage().nbytes(),
                )
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self._live.values()))
        return result


def _cuda_event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event

"""A teacher's activations: visited while it runs on noised images, or kept on disk.

Those on disk are for stage 1 on a fixed set of samples, as the paper trains it; streaming (see `distillation.py`) needs
none. Files are memory-mapped: a site's inputs and outputs for all samples, in the teacher's own dtype.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from .contract import Denoiser, TrainingData
from .devices import half_types, is_half, mixed_precision
from .errors import TrainingError
from .files import write_json
from .noising import NoisedBatch, draw_noised
from .precision import Precision, resolve_precision
from .randomness import generator, seeded

# what happens at a site: its path, the arguments of the call, the old module's output
Visit = Callable[[str, tuple, dict[str, Any], Any], None]


class ActivationCache:
    """What each site was called with and what it gave, for `num_samples` samples in files under `folder`.

    Tensors whose first dimension is the batch are kept a sample at a time; all else about a call must be the same for
    every sample, and is kept once, in memory.
    """

    def __init__(self, folder: Path, num_samples: int):
        self.folder = folder
        self.num_samples = num_samples
        self._calls: dict[str, tuple[list[Any], Any]] = {}  # leaves, tree of (args, kwargs, output)

    def fill(self, batches: Iterable[Callable[[Visit], None]]) -> None:
        """Record every batch that `batches` runs through the teacher; each calls its argument at each site.

        A cache that an earlier process completed is not written again: one batch is run, for the form of the calls.
        """
        complete = self.folder / "complete.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        start = 0
        for run in batches:
            size = 0

            def visit(path: str, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
                nonlocal size
                size = self._batch_size(output)
                self._write(path, (args, kwargs, output), start, write=not complete.is_file())  # noqa: B023

            run(visit)
            start += size
            if complete.is_file():
                return
        write_json(complete, {"samples": self.num_samples, "bytes": self.num_bytes})

    def replay(self, indices: Tensor, paths: Iterable[str], visit: Visit) -> None:
        """Visit these sites with the recorded calls of these samples, as one batch."""
        for path in paths:
            leaves, tree = self._calls[path]
            batch = [leaf[indices] if isinstance(leaf, _OnDisk) else leaf for leaf in leaves]
            args, kwargs, output = _pytree.tree_unflatten(batch, tree)
            visit(path, args, kwargs, output)

    @property
    def num_bytes(self) -> int:
        """Size of the files."""
        return sum(
            leaf.num_bytes
            for leaves, _ in self._calls.values()
            for leaf in leaves
            if isinstance(leaf, _OnDisk)
        )

    def _write(self, path: str, call: tuple, start: int, *, write: bool) -> None:
        values, tree = _pytree.tree_flatten(call)
        size = self._batch_size(call[2])
        if path not in self._calls:
            leaves = [
                _OnDisk(self.folder / f"{path}.{i}.bin", value, self.num_samples)
                if isinstance(value, Tensor) and value.ndim and len(value) == size
                else value
                for i, value in enumerate(values)
            ]
            self._calls[path] = (leaves, tree)
        for leaf, value in zip(self._calls[path][0], values, strict=True):
            if isinstance(leaf, _OnDisk) and write:
                leaf.check(value, path)
                leaf[slice(start, start + size)] = value

    @staticmethod
    def _batch_size(output: Any) -> int:
        return len(_pytree.tree_leaves(output)[0])


class _OnDisk:
    """A memory-mapped tensor [num_samples, ...] in a file of its own."""

    def __init__(self, path: Path, example: Tensor, num_samples: int):
        shape = (num_samples, *example.shape[1:])
        size = math.prod(shape)
        self._device = example.device
        self._tensor = torch.from_file(str(path), shared=True, size=size, dtype=example.dtype).view(shape)
        self.num_bytes = size * example.element_size()

    def check(self, value: Tensor, path: str) -> None:
        """Raises a TrainingError unless a batch's items are of the first batch's shape, as prompts of one length are."""
        if value.shape[1:] != self._tensor.shape[1:]:
            raise TrainingError(
                f"cache_samples keeps calls of one shape; {path} was called with {list(self._tensor.shape[1:])} and then "
                f"{list(value.shape[1:])} per item, as prompts of unequal length do: leave cache_samples out"
            )

    def __setitem__(self, rows: slice, value: Tensor) -> None:
        self._tensor[rows] = value.detach().cpu()

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self._tensor[rows].to(self._device)


@contextmanager
def visiting(
    modules: Mapping[str, nn.Module], visit: Visit, *, until: Mapping[str, nn.Module] = MappingProxyType({})
) -> Iterator[None]:
    """While the block runs, `visit` each call of these modules, with its arguments and output.

    Args:
        until: where a later module's output counts, that module; it is called once after each call of the first.
    """
    handles = []
    for path, module in modules.items():
        before, after = _hooks(path, visit)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(until.get(path, module).register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(path: str, visit: Visit) -> tuple[Callable, Callable]:
    """One that keeps a call's arguments, and one that visits them with an output."""
    calls: list[tuple[tuple, dict[str, Any]]] = []

    def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    def after(_module: nn.Module, _args: tuple, output: Any) -> None:
        visit(path, *calls.pop(), output)

    return before, after


def run_noised(
    teacher: nn.Module,
    data: TrainingData,
    indices: Tensor,
    entropy: tuple[int, ...],
    *,
    denoiser: Denoiser,
    precision: Precision = "fp32",
) -> None:
    """Run the teacher on these images, with noise, steps and dropped conditions drawn from `entropy`."""
    device = next(teacher.parameters()).device
    with seeded(*entropy) as draw:
        images = data.batch(indices)
        batch = draw_noised(images, draw, batch_size=len(indices), denoiser=denoiser, device=device)
        run_on_batch(teacher, batch, denoiser=denoiser, precision=precision)


@torch.no_grad()
def run_on_batch(teacher: nn.Module, batch: NoisedBatch, *, denoiser: Denoiser, precision: Precision) -> None:
    """Run the teacher, for those who visit it."""
    with mixed_precision(batch.x_t.device, precision):
        denoiser(teacher, batch.x_t, batch.t, batch.numbers)


def prepare_for_training(
    stage: str, teacher: nn.Module, operators: Mapping[str, nn.Module], *, precision: Precision
) -> None:
    """Move operators to the teacher's device, and to fp32: in half precision most of an optimizer's steps round away.

    Raises:
        TrainingError: the teacher's weights are of half precision, so nothing can be computed in fp32.
    """
    half, device = half_types(teacher.parameters()), next(teacher.parameters()).device
    if half and resolve_precision(precision, device) == "fp32":
        raise TrainingError(
            f"{stage}: the model's weights are {half}, and precision is fp32: set precision: bf16, or load the model in float32"
        )
    for operator in operators.values():
        for parameter in filter(is_half, operator.parameters()):
            parameter.data = parameter.data.float()
        operator.to(device)


def shuffled(num_items: int, seed: int) -> Tensor:
    """All indices in the order in which stage 1 deals them out: first those that it holds out, then the others."""
    return torch.randperm(num_items, generator=generator(seed, 2))

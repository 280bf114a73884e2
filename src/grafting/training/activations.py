"""A teacher's activations: visited while it runs on noised images, or kept on disk.

Both are sources of one kind: `source.visit(step, visit)`. Those on disk are for stage 1 on a fixed set of samples, as the
paper trains it. Files are memory-mapped: a site's inputs and outputs for all samples, in the teacher's own dtype.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..contract import Denoiser, Kwargs
from ..editing.placed import Placed
from ..editing.surgery import grafted
from ..errors import TrainingError
from ..machine.devices import half_types, is_half, mixed_precision
from ..machine.files import write_json
from ..machine.precision import Precision, resolve_precision
from ..machine.randomness import seeded
from .batches import Batches, Feed, NoisedBatch

# what happens at a site: its path, the arguments of the call, the old module's output
Visit = Callable[[str, tuple, Kwargs, Any], None]


@runtime_checkable
class Source(Protocol):
    """Source of the activations of training steps."""

    def visit(self, step: int, visit: Visit) -> None:
        """Visit every site with the calls of a step's batch, one micro-batch after the other."""
        ...


@dataclass(frozen=True)
class Visited:
    """A teacher whose sites are visited while it runs on noised images.

    `operators` are built for it, by site path. What a visitor sees is what the old modules give for the teacher's own
    activations, or, with `inputs` of a student, for those of the model with all `operators` in it.
    """

    teacher: nn.Module
    operators: Mapping[str, Placed]
    denoiser: Denoiser
    precision: Precision
    inputs: Literal["teacher", "student"] = "teacher"

    @property
    def device(self) -> torch.device:
        return next(self.teacher.parameters()).device

    def prepare(self, stage: str) -> None:
        """Move operators to the teacher's device, and to fp32: in half precision most of an optimizer's steps round away.

        Raises:
            TrainingError: the teacher's weights are of half precision, so nothing can be computed in fp32.
        """
        half = half_types(self.teacher.parameters())
        if half and resolve_precision(self.precision, self.device) == "fp32":
            raise TrainingError(
                f"{stage}: the model's weights are {half}, and precision is fp32: set precision: bf16, or load the model in "
                "float32"
            )
        for operator in self.operators.values():
            for parameter in filter(is_half, operator.parameters()):
                parameter.data = parameter.data.float()
            operator.to(self.device)

    def run(self, batch: NoisedBatch, paths: Sequence[str], entropy: tuple[int, ...], visit: Visit) -> None:
        """Run the teacher, visiting these sites on the way; what is random in its modules comes from `entropy`."""
        computing = mixed_precision(self.device, self.precision)
        with self._visiting(paths, visit), seeded(*entropy), torch.no_grad(), computing:
            self.denoiser(self.teacher, batch.x_t, batch.t, batch.numbers)

    @contextmanager
    def _visiting(self, paths: Sequence[str], visit: Visit) -> Iterator[None]:
        fitted = {path: self.operators[path] for path in paths}
        old = {path: [self.teacher.get_submodule(p) for p in o.replaces] for path, o in fitted.items()}
        if self.inputs == "teacher":
            first, last = ({path: modules[end] for path, modules in old.items()} for end in (0, -1))
            with visiting(first, visit, until=last):
                yield
            return

        def visit_student(path: str, args: tuple, kwargs: Kwargs, _: Any) -> None:
            visit(path, args, kwargs, fitted[path].replaced_output(old[path], args, kwargs))

        with grafted(self.teacher, self.operators, cast=False), visiting(fitted, visit_student):
            yield


@dataclass(frozen=True)
class Streamed:
    """Activations of the teacher as it runs on every step's own batch; nothing is kept."""

    visited: Visited
    batches: Batches
    paths: Sequence[str]

    def visit(self, step: int, visit: Visit) -> None:
        for number, batch in enumerate(self.batches.at(step)):
            self.visited.run(batch, self.paths, (self.batches.config.seed, step, number), visit)


@dataclass(frozen=True)
class Repeatable:
    """Activations of the teacher on batches that are the same at every visit; what is random in its modules is too."""

    visited: Visited
    feed: Feed
    entropy: tuple[int, ...]
    paths: Sequence[str]

    def visit(self, step: int, visit: Visit) -> None:
        seed, *stream = self.entropy
        self.visited.run(self.feed.at(step), self.paths, (seed, step, *stream, 1), visit)


class ActivationCache:
    """Recorded inputs and outputs of each site, for `num_samples` samples in files under `folder`.

    Tensors whose first dimension is the batch are kept a sample at a time; all else about a call must be the same for
    every sample, and is kept once, in memory.

    Args:
        batches: which samples a step takes.
        paths: the sites that are visited.
    """

    def __init__(self, folder: Path, num_samples: int, *, batches: Batches, paths: Sequence[str]):
        self.folder, self.num_samples, self.batches, self.paths = folder, num_samples, batches, paths
        self._calls: dict[str, tuple[list[Any], Any]] = {}  # leaves, tree of (args, kwargs, output)

    def fill(self, source: Source) -> None:
        """Record all samples, a whole batch of them at each step of the source.

        A cache that an earlier process completed is not written again: one batch is run, for the form of the calls.
        """
        complete = self.folder / "complete.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        write = not complete.is_file()
        starts = range(0, self.num_samples, self.batches.config.batch_size)
        for number, start in enumerate(starts if write else starts[:1]):
            source.visit(number, partial(self._record, start, write))
        if write:
            write_json(complete, {"samples": self.num_samples, "bytes": self.num_bytes})

    def visit(self, step: int, visit: Visit) -> None:
        for numbers in self.batches.numbers(step, self.num_samples):
            for path in self.paths:
                leaves, tree = self._calls[path]
                batch = [leaf[numbers] if isinstance(leaf, _OnDisk) else leaf for leaf in leaves]
                visit(path, *_pytree.tree_unflatten(batch, tree))

    @property
    def num_bytes(self) -> int:
        """Size of the files."""
        leaves = (leaf for leaves, _ in self._calls.values() for leaf in leaves)
        return sum(leaf.num_bytes for leaf in leaves if isinstance(leaf, _OnDisk))

    def _record(self, start: int, write: bool, path: str, args: tuple, kwargs: Kwargs, output: Any) -> None:
        values, tree = _pytree.tree_flatten((args, kwargs, output))
        size = len(_pytree.tree_leaves(output)[0])
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
    with ExitStack() as hooks:
        for path, module in modules.items():
            before, after = _hooks(path, visit)
            hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(until.get(path, module).register_forward_hook(after))
        yield


def _hooks(path: str, visit: Visit) -> tuple[Callable, Callable]:
    """Return two hooks: one keeps a call's arguments, the other visits them with the output."""
    calls: list[tuple[tuple, Kwargs]] = []

    def before(_: nn.Module, args: tuple, kwargs: Kwargs) -> None:
        calls.append((args, kwargs))

    def after(_module: nn.Module, _args: tuple, output: Any) -> None:
        visit(path, *calls.pop(), output)

    return before, after

"""Several processes as one run: which one this is, what they agree on, and how they end together.

Thin over torch.distributed. Whoever starts the processes (`torchrun`, `accelerate launch`) says in the environment how many
there are; without that a run is one process, and everything here costs nothing. Figures travel as CPU tensors through gloo,
gradients on a GPU through NCCL. All processes see the same files.
"""

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree

from ..errors import RunError

T = TypeVar("T")

# longer than any stage in which one process works and the others wait; one that ends is noticed at once
_TIMEOUT = datetime.timedelta(hours=6)
_REPORTS = "grafting/reports"


def rank() -> int:
    """This process's number, 0 for the main one."""
    return dist.get_rank() if dist.is_initialized() else _number("RANK", 0)


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else _number("WORLD_SIZE", 1)


def local_rank() -> int | None:
    """This process's number on its machine, which is also its accelerator's; None where nobody gave one."""
    return _number("LOCAL_RANK", 0) if "LOCAL_RANK" in os.environ else None


def is_main() -> bool:
    """True if this is the process that writes."""
    return rank() == 0


ALL = slice(0, None, 1)
"""The share of a process that is alone."""


def share() -> slice:
    """This process's part of anything that all of them have: every `world_size()`-th item."""
    return slice(rank(), None, world_size())


def connect() -> bool:
    """True if there are other processes; joins them at the first call that finds some.

    Raises:
        RunError: the environment does not say how to find them.
    """
    if world_size() == 1:
        return False
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank() or 0)
        try:
            dist.init_process_group(backend, timeout=_TIMEOUT)
            dist.all_reduce(torch.zeros(1))  # one that fails at once must not leave while others still join
        except (ValueError, dist.DistError) as error:
            raise RunError(
                f"by the environment this is process {rank()} of {world_size()}, but the processes cannot connect: {error}. "
                "Start them with torchrun or accelerate launch, or unset RANK and WORLD_SIZE"
            ) from error
    return True


@contextmanager
def together() -> Iterator[None]:
    """A block that all processes run and leave together. Of an error that several meet, one is raised.

    The first process to fail raises its own error; the others, which fail with it or miss it, end silently with exit
    status 1. A process that joined here leaves here.
    """
    joined = not dist.is_initialized() and connect()
    try:
        yield
    except Exception as error:
        if joined and not _is_first_to_report():
            raise SystemExit(1) from error
        raise
    finally:
        if joined:
            dist.destroy_process_group()


def _is_first_to_report() -> bool:
    try:
        return dist.distributed_c10d._get_default_store().add(_REPORTS, 1) == 1
    except (dist.DistError, RuntimeError):
        return is_main()  # whoever kept the store is gone


@contextmanager
def main_first() -> Iterator[None]:
    """The main process runs the block alone, then the others do: they find the files that it wrote."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def barrier() -> None:
    """Waits until every process is here."""
    if connect():
        dist.all_reduce(torch.zeros(1))


def total(values: Sequence[float]) -> list[float]:
    """The sums over processes of some figures, in float64."""
    summed = torch.tensor(values, dtype=torch.float64)
    if connect():
        dist.all_reduce(summed)
    return summed.tolist()


def mean(values: Sequence[float]) -> list[float]:
    """The means over processes of some figures, in float64."""
    return [value / world_size() for value in total(values)]


def any_process(condition: bool) -> bool:
    """True if the condition holds in any process."""
    return total([float(condition)])[0] > 0


def broadcast(value: T) -> T:
    """The main process's value, in every process."""
    return gather(value)[0]


def gather(value: T) -> list[T]:
    """Every process's value, by rank, in every process. Tensors arrive on the CPU."""
    if not connect():
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, _on_cpu(value))
    return found


def gather_on_main(value: T) -> list[T]:
    """Every process's value, by rank, in the main process; only its own elsewhere."""
    if not connect():
        return [value]
    found: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(_on_cpu(value), found)
    return found if found is not None else [value]


def copy_from(owner: int, tensor: Tensor) -> None:
    """Writes one process's values into every process's tensor."""
    if connect():
        dist.broadcast(tensor.detach(), owner)


@torch.no_grad()
def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replaces the gradients of `parameters` by their means over processes: one message for all of them.

    A parameter without a gradient here counts as zero; all processes pass the same parameters in the same order.
    """
    if not parameters or not connect():
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([g.float().flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for parameter, mean_gradient in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
        parameter.grad = mean_gradient.view_as(parameter).to(parameter.dtype)


def _on_cpu(value: Any) -> Any:
    return _pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), value)


def _number(name: str, default: int) -> int:
    """A number in the environment."""
    value = os.environ.get(name, str(default))
    if not value.isdigit():
        raise RunError(f"the environment variable {name} is {value!r}, not a number of processes")
    return int(value)

"""Compilation region by region, such as block by block: once for all regions of a kind, and soon done.

What calls a region, its hooks included, runs as it is.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import FaultWarning

# versions of one function that torch compiles by default before it gives up: for other shapes, and without gradients
_VERSIONS = 8


@contextmanager
def compiled(
    regions: Mapping[str, nn.Module], *, dynamic: bool | None = None, backend: str = "inductor"
) -> Iterator[None]:
    """Inside, these modules run compiled. One of which there come to be too many versions is named in a warning.

    Args:
        regions: by path; none stands in another.
        dynamic: as `torch.compile` has it.
    """
    if not regions:
        yield
        return
    from torch._dynamo import config  # takes seconds

    limit = _VERSIONS + len(regions)  # they may all be unlike
    logger, listening = logging.getLogger("torch._dynamo.convert_frame"), _Listening()
    with ExitStack() as replacing, config.patch(recompile_limit=limit):
        for path, module in regions.items():
            forward = torch.compile(module.forward, dynamic=dynamic, backend=backend)
            replacing.enter_context(with_forward(module, _saying_so(path, forward, listening)))
        logger.addHandler(listening)
        try:
            yield
        finally:
            logger.removeHandler(listening)


@contextmanager
def with_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, this function is a module's forward pass."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _saying_so(path: str, forward: Callable[..., Any], listening: "_Listening") -> Callable[..., Any]:
    """A compiled forward pass that says when it runs."""

    def run(*args: Any, **kwargs: Any) -> Any:
        listening.running = path
        return forward(*args, **kwargs)

    return run


class _Listening(logging.Handler):
    """Hears torch give up a region, and names it."""

    running = ""

    def emit(self, record: logging.LogRecord) -> None:
        if "recompile_limit" in record.getMessage():
            warnings.warn(
                f"{self.running} is called in too many ways to be compiled for each, and runs as it is from here on",
                FaultWarning,
                stacklevel=2,
            )

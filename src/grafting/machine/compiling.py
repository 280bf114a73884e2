"""Compilation region by region, such as block by block: once for all regions of a kind, and soon done.

What calls a region, its hooks included, runs as it is.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
    before = {path: vars(module).get("forward") for path, module in regions.items()}
    for path, module in regions.items():
        forward = torch.compile(module.forward, dynamic=dynamic, backend=backend)
        module.forward = _saying_so(path, forward, listening)
    logger.addHandler(listening)
    try:
        with config.patch(recompile_limit=limit):
            yield
    finally:
        logger.removeHandler(listening)
        for path, module in regions.items():
            del module.forward
            if (own := before[path]) is not None:
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

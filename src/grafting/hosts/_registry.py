"""Finds every host: the final `Host` classes in this folder's files."""

import importlib
import pkgutil
from functools import cache
from pathlib import Path

from torch import nn

from ..errors import HostError
from ._host import Host, LayoutTracker


@cache
def hosts() -> dict[str, Host]:
    """Every host by name."""
    modules = [m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.name[0] != "_"]
    found: dict[str, Host] = {}
    for module in (importlib.import_module(f"{__package__}.{name}") for name in modules):
        for item in vars(module).values():
            if isinstance(item, type) and issubclass(item, Host) and item.__module__ == module.__name__:
                host = item()
                found[host.name] = host
    return dict(sorted(found.items()))


def host_of(model: nn.Module) -> Host:
    """The host that this model belongs to: that of an earlier graft, else the one whose class it is.

    Raises:
        HostError: none; names those that there are.
    """
    tracker = LayoutTracker.of(model)
    if tracker is not None:
        return tracker.host
    for host in hosts().values():
        if isinstance(model, host.model_class):
            return host
    known = ", ".join(f"{h.name} ({h.model_class.__name__})" for h in hosts().values())
    raise HostError(
        f"no host for a model of class {type(model).__name__}; there are {known}; any other whose "
        "attention calls scaled_dot_product_attention takes kernels with host=SdpaHost(SdpaSpec(...))"
    )

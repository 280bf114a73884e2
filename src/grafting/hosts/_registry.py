"""Finds every host: the `Host` classes and the specs in this folder, and those of installed packages' entry points."""

import importlib
import pkgutil
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from ..errors import HostError, listed
from ..machine.reading import faults_of, read_yaml
from ._host import Host, LayoutTracker
from ._sdpa import SdpaHost
from ._spec import SdpaSpec

_FOLDER = Path(__file__).parent


_given: dict[str, Host] = {}


def hosts() -> dict[str, Host]:
    """Every host by name: those that were given by `use_spec`, then those that are installed."""
    return _given | _installed()


def use_spec(spec: SdpaSpec | str | Path) -> Host:
    """Make the host that a spec, or its file, describes known by its name and class, for as long as this process runs.

    Raises:
        HostError: the file describes no spec, its class cannot be imported, or its name is that of another host.
    """
    host = SdpaHost(spec if isinstance(spec, SdpaSpec) else load_spec(spec))
    other = hosts().get(host.name, host)
    if not isinstance(other, SdpaHost) or other.spec != host.spec:
        raise HostError(_taken(other))
    _ = host.model_class
    _given[host.name] = host
    return host


@cache
def _installed() -> dict[str, Host]:
    found: dict[str, Host] = {}
    own = (SdpaHost(_read_spec(path)) for path in sorted((_FOLDER / "specs").glob("*.yaml")))
    of_packages = (_as_host(point.load(), point.name) for point in entry_points(group="grafting.hosts"))
    for host in (*_own_classes(), *own, *of_packages):
        if host.name in found:
            raise HostError(f"host {host.name!r} is defined twice: {found[host.name]} and {host}")
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
    names = {part.__name__ for part in type(model).__mro__}
    for host in hosts().values():
        if host.class_name in names and isinstance(model, host.model_class):
            return host
    raise HostError(unknown_class(type(model).__name__))


def unknown_class(name: str) -> str:
    """What to say of a class that no host is of."""
    if "UNet" in name:
        return f"a {name} is a UNet, whose blocks have several resolutions: grafting edits transformers"
    known = ", ".join(f"{host.name} ({host.class_name})" for host in hosts().values())
    return (
        f"no host for a model of class {name}; there are {known}; for any other `grafting sites MODEL --trace --out FILE` "
        "proposes a spec, which is given as --spec FILE, or host=SdpaHost(SdpaSpec(...))"
    )


def load_spec(path: str | Path) -> SdpaSpec:
    """The spec in a YAML or JSON file.

    Raises:
        HostError: the file is missing or describes no spec; lists what is wrong with it. Or its name is that of a host of
            another class.
    """
    spec = _read_spec(path)
    other = hosts().get(spec.name)
    if other is not None and other.class_name != SdpaHost(spec).class_name:
        raise HostError(f"{path}: name: {_taken(other)}")
    return spec


def _taken(other: Host) -> str:
    return f"there is a host {other.name!r} already, of {other.class_name}: give the spec another name"


def _read_spec(path: str | Path) -> SdpaSpec:
    try:
        return SdpaSpec.model_validate(read_yaml(Path(path), error=HostError))
    except ValidationError as error:
        raise HostError(listed(f"{path} is no spec of a host:", faults_of(error))) from error


def _own_classes() -> Iterator[Host]:
    modules = [m.name for m in pkgutil.iter_modules([str(_FOLDER)]) if m.name[0] != "_"]
    for module in (importlib.import_module(f"{__package__}.{name}") for name in modules):
        for item in vars(module).values():
            if isinstance(item, type) and issubclass(item, Host) and item.__module__ == module.__name__:
                yield item()


def _as_host(found: Any, name: str) -> Host:
    """A host from what an entry point names: a host or its class, a spec, or a spec's file."""
    if isinstance(found, type) and issubclass(found, Host):
        return found()
    if isinstance(found, Host):
        return found
    if isinstance(found, SdpaSpec):
        return SdpaHost(found)
    if isinstance(found, str | Path):
        return SdpaHost(_read_spec(found))
    raise HostError(
        f"entry point {name!r} of grafting.hosts gives {found!r}: it must name a Host, a SdpaSpec, or the path of a spec"
    )

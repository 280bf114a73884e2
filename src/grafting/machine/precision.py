"""Compute precision of a model: `auto`, the default, is bf16 if the device is faster in it, else fp32.

The device is asked once a process, by a short measurement. What is hashed, described or written down says fp32 or bf16:
whoever does that, or computes, settles its config first. Resumed work keeps its precision.
"""

import functools
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeVar, cast, runtime_checkable

import torch
import torch.nn.functional as F
from pydantic import BaseModel

from ..errors import FaultWarning, ResumeWarning, RunError
from .processes import broadcast, is_main
from .reading import read_yaml

Precision = Literal["auto", "fp32", "bf16"]

VARIABLE = "GRAFTING_PRECISION"
"""Of the environment: fp32 or bf16, what `auto` then is, whatever the device."""

FASTER = 1.3
"""Minimum speedup of bf16 over fp32 for it to be chosen."""

FP32_IS_ABSENT: Mapping[str, Any] = MappingProxyType({"precision": "fp32"})
"""`hashed_as_absent` of configs with a precision: fp32 was the default once, and hashes had no word for it."""

# the measurement: edges of square matrices, up to one that takes long enough to be told from the start of a pass
_SIZES = (128, 256, 512, 1024, 2048)
_LONG_S = 2e-3

S = TypeVar("S", bound=BaseModel)


@runtime_checkable
class Computing(Protocol):
    """Config of what computes in a precision."""

    @property
    def precision(self) -> Precision: ...

    def model_copy(self, *, update: Mapping[str, Any] | None = None) -> Any: ...


C = TypeVar("C", bound=Computing)


def recorded_precision(record: Any, *keys: str) -> Any:
    """What a record of work that was begun says under `precision`, below these keys; None if it does not."""
    for key in (*keys, "precision"):
        record = record.get(key) if isinstance(record, dict) else None
    return record


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """fp32 or bf16: what is asked for, and where that is `auto`, what the device is faster in.

    Raises:
        RunError: the environment says something else than fp32 or bf16.
    """
    if precision != "auto":
        return precision
    forced = os.environ.get(VARIABLE)
    if forced:
        if forced not in ("fp32", "bf16"):
            raise RunError(
                f"the environment variable {VARIABLE} is {forced!r}: fp32 or bf16, or leave it out"
            )
        return cast(Precision, forced)
    return "bf16" if bf16_speedup(device) >= FASTER else "fp32"


def why(device: torch.device) -> str:
    """Reason for the choice of `auto` on a device."""
    if os.environ.get(VARIABLE):
        return f"{VARIABLE} says so"
    return f"bf16 is {bf16_speedup(device):.2g} times as fast as fp32 in a linear layer"


@functools.cache
def bf16_speedup(device: torch.device) -> float:
    """Speedup of bf16 over fp32 for a linear layer, forward and backward; measured once per process.

    The fastest of a few, in turns, and on a CPU by its own time there, so that other work on the machine weighs on neither.
    Takes up to about a quarter of a second; draws no random numbers.
    """
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return 0.0
    with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a device without bf16 says so, and computes in fp32
        _fastest(device, 64, times=1)
        for size in _SIZES:
            fp32, bf16 = _fastest(device, size, times=3)
            if bf16 >= _LONG_S and bf16 > 2 * fp32:
                break  # emulated: larger ones would take seconds
            if fp32 >= _LONG_S or size == _SIZES[-1]:
                more = _fastest(device, size, times=3)
                fp32, bf16 = min(fp32, more[0]), min(bf16, more[1])
                break
    return fp32 / bf16


def _fastest(device: torch.device, size: int, *, times: int) -> tuple[float, float]:
    """Seconds of the fastest pass in fp32, and in bf16."""
    x, weight = (
        torch.ones(size, size, device=device, dtype=torch.float32, requires_grad=True) for _ in range(2)
    )
    pairs = [(_seconds(x, weight, bf16=False), _seconds(x, weight, bf16=True)) for _ in range(times)]
    return min(a for a, _ in pairs), min(b for _, b in pairs)


def _seconds(x: torch.Tensor, weight: torch.Tensor, *, bf16: bool) -> float:
    x.grad = weight.grad = None
    clock = time.process_time if x.device.type == "cpu" else time.perf_counter
    started = clock()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        y = F.linear(x, weight)
    y.sum().backward()  # a gradient that is given would import sympy, for half a second
    assert weight.grad is not None
    weight.grad.sum().item()  # a number on the CPU: waits for the device
    return clock() - started


def settled(config: C, device: torch.device, *, together: bool = False) -> C:
    """The same config with fp32 or bf16 in the place of `auto`.

    Args:
        together: all processes ask, and are told what the main one found.
    """
    if config.precision != "auto":
        return config
    found = resolve_precision("auto", device) if is_main() or not together else "fp32"
    return config.model_copy(update={"precision": broadcast(found) if together else found})


def settled_as_begun(config: C, device: torch.device, *, begun: Any, where: Path) -> C:
    """The same, in the precision of work that was begun, if it was; a warning says where the device would choose another.

    Args:
        begun: the precision on record; anything else counts as none.
        where: the work's folder.
    """
    if config.precision != "auto" or begun not in ("fp32", "bf16"):
        return settled(config, device)
    if begun != resolve_precision("auto", device):
        warnings.warn(_goes_on(where, begun, device), ResumeWarning, stacklevel=2)
    return config.model_copy(update={"precision": begun})


def settled_sections(settings: S, choose: Callable[[str], Precision]) -> S:
    """Settings with sections, as a recipe: each whose precision is `auto` has what `choose` says of its name.

    Of a list of sections, each has the list's name and its number: `finetune.0`.
    """

    def chosen(name: str, section: Any) -> Any:
        if isinstance(section, tuple):
            return tuple(chosen(f"{name}.{number}", part) for number, part in enumerate(section))
        return section.model_copy(update={"precision": choose(name)}) if _is_undecided(section) else section

    changed = {name: new for name, section in settings if (new := chosen(name, section)) != section}
    return settings.model_copy(update=changed) if changed else settings


def precisions_of(settings: BaseModel) -> list[Precision]:
    """The precision of each section that has one."""
    sections = [section for _, section in _each(settings)]
    return [section.precision for section in sections if isinstance(section, Computing)]


def settled_run(recipe: S, device: torch.device, *, folder: Path | None = None) -> tuple[S, str]:
    """A recipe without `auto`, and what is to be said of that, if anything. The main process chooses, and tells the others.

    What the run in `folder` began in holds, section by section; a section that it had not goes by the others where they agree,
    and by the device where there is nothing to go by.
    """
    names = [name for name, section in _each(recipe) if _is_undecided(section)]
    if not names:
        return recipe, ""
    choices, told = broadcast(_choices(names, device, folder) if is_main() else ({}, ""))
    return settled_sections(recipe, choices.__getitem__), told


def _choices(names: list[str], device: torch.device, folder: Path | None) -> tuple[dict[str, Precision], str]:
    own = resolve_precision("auto", device)
    begun = _begun(folder / "recipe.yaml") if folder is not None else {}
    agreed = set(begun.values())
    others = agreed.pop() if len(agreed) == 1 else own
    choices = {name: begun.get(name, others) for name in names}
    held = [choice for choice in choices.values() if choice != own]
    return choices, _goes_on(folder, held[0], device) if folder is not None and held else ""


def _goes_on(where: Path, begun: Precision, device: torch.device) -> str:
    own = resolve_precision("auto", device)
    return (
        f"{where} began in {begun} and keeps it; auto would now be {own} ({why(device)}); "
        f"to start again in {own}, ask for precision {own}"
    )


def _begun(written: Path) -> dict[str, Precision]:
    """The precision of each section of a recipe that was written down."""
    if not written.is_file():
        return {}
    try:
        sections = read_yaml(written, error=RunError)
    except RunError as error:
        message = f"{error}. What precision the run began in is not known, and is chosen again"
        warnings.warn(message, FaultWarning, stacklevel=2)
        return {}
    begun: dict[str, Precision] = {}
    for name, section in _each(sections.items() if isinstance(sections, dict) else ()):
        if isinstance(section, dict) and section.get("precision") in ("fp32", "bf16"):
            begun[name] = cast(Precision, section["precision"])
    return begun


def _is_undecided(section: Any) -> bool:
    return isinstance(section, BaseModel) and getattr(section, "precision", None) == "auto"


def _each(sections: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The same, with lists taken apart."""
    for name, section in sections:
        if isinstance(section, list | tuple):
            yield from ((f"{name}.{number}", part) for number, part in enumerate(section))
        else:
            yield name, section

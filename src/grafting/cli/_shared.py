"""Helpers shared by several commands: consoles, common arguments, and parsing of models and recipes."""

import atexit
import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from ..errors import DataError, HostError

if TYPE_CHECKING:
    from torch import nn

    from ..contract import Denoiser
    from ..editing.plan import Plan
    from ..runs.recipe import Recipe

# lines that go to a file or another program are cut at no terminal's edge
# of several processes (see `machine.processes`) the main one speaks
_silent = os.environ.get("RANK", "0") != "0"
out = Console(width=None if sys.stdout.isatty() else 200, quiet=_silent)
err = Console(stderr=True, quiet=_silent)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="[cyan]testbed[/], [cyan]scenes[/], a model or run folder, or owner/name on the Hub.",
    ),
]
PromptsFolder = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Folder of encoded prompts, or [cyan]scenes[/], for text-conditioned models. "
        "[dim]Default: those of the run, if a run made the model.[/]",
    ),
]
ProcessName = Literal["diffusion", "flow"]
Process = Annotated[
    ProcessName | None,
    typer.Option(help="Noise process: predicted noise, or flow. [dim]Default: the model's.[/]"),
]
Shift = Annotated[
    float | None, typer.Option(help="Shift of flow steps towards noise. [dim]Default: the model's.[/]")
]
Out = Annotated[Path | None, typer.Option("--out", help="Run folder. [dim]Default: runs/NAME.[/]")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a recipe setting: [cyan]--set finetune.steps=10[/]. Repeatable.",
    ),
]


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection in a command that ends soon, nor at its end.

    torch and diffusers are a million objects that stay. Looking through them again and again takes a quarter of such a command's time.
    """
    atexit.register(gc.freeze)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


_specs: list[Path] = []


def _use_spec(path: Path | None) -> Path | None:
    if path is not None:
        from ..hosts import use_spec

        use_spec(path)
        _specs[:] = [path]
    return path


Spec = Annotated[
    Path | None,
    typer.Option(
        "--spec",
        metavar="FILE",
        callback=_use_spec,
        help="Description (YAML) of the model's class, if grafting does not know it.",
    ),
]


def open_model(name: str) -> "tuple[nn.Module, Plan]":
    """Load the model named on the command line, with the plan it was grafted with."""
    from ..weights.folder import load_model
    from ..weights.locate import find_model

    return load_model(find_model(name))


def open_denoiser(
    name: str,
    model: "nn.Module",
    *,
    prompts: str | None,
    process: "ProcessName | None" = None,
    shift: float | None = None,
) -> "Denoiser":
    """The denoiser of the model named on the command line: as its options say, else as is recorded of it.

    Raises:
        HostError, DataError: it is asked by prompts, and none are given, or they are missing or damaged; or it is asked by
            class, and prompts are given; or a shift is given for a process without one.
    """
    from ..data import Captions, Prompts
    from ..diffusion import DiffusionConfig, FlowConfig, FlowMatching
    from ..hosts import host_of
    from ..runs.job import check_asked
    from ..runs.recorded import recorded

    host, known = host_of(model), recorded(name)
    config = {"flow": FlowConfig(), "diffusion": DiffusionConfig(), None: known.process}[process]
    is_flow = isinstance(host.process(model), FlowMatching) if config is None else config.name == "flow"
    if shift is not None and not is_flow:
        raise HostError(
            f"--shift is a setting of flow, and {host.name} predicts noise; if this model was trained as flow, add --process flow"
        )
    if shift is not None:
        kept = config.model_dump(exclude={"shift_by_size"}) if isinstance(config, FlowConfig) else {}
        config = FlowConfig(**kept | {"shift": shift})
    conditions = known.conditions.load() if known.conditions else None
    if prompts is not None:
        conditions = Captions() if prompts == "scenes" else Prompts(prompts)
    denoiser = host.denoiser(model, conditions, host.built(model, config) if config else None)
    check_asked(model, denoiser.conditions)
    return denoiser


def open_recipe(path: Path, settings: list[str] | None = None) -> "Recipe":
    """Load a recipe from a file and apply the `--set` overrides."""
    from ..runs.file import load_recipe

    given = {"spec": str(_specs[0].resolve())} if _specs else {}
    return load_recipe(path, changes=given | dict(map(parse_setting, settings or ())))


def parse_setting(text: str) -> tuple[str, Any]:
    """Split KEY=VALUE into the key and its value, parsed as YAML."""
    from ..machine.reading import cut, parse_yaml

    key, equals, value = text.partition("=")
    if not equals:
        raise DataError(f"--set is KEY=VALUE, found {text}")
    return key, parse_yaml(value, name=f"--set {key}: its value {cut(value)!r}", error=DataError)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))

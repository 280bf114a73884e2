"""The command line `grafting`: each command parses its arguments, calls the library once, and prints the result.

torch and diffusers take seconds to import, so commands import what they need themselves and `--help` stays fast.
Errors a user can cause print one message and exit with code 1; wrong usage exits with 2, SIGINT with 130, SIGTERM with 143.
"""

import ctypes
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated, Any, NoReturn, TextIO

import typer
from typer.core import TyperGroup

from ..cli import about, checking, comparing, data, inspection, measuring, run, samples, weights
from ..errors import FaultWarning, GraftingError, ResumeWarning, TrainingWarning, listed
from ..machine.signals import Interrupted, catching_signals
from ._shared import err

_RESUMABLE = frozenset({"quickstart", "run", "distill", "finetune", "sweep", "sample", "data"})


class _Commands(TyperGroup):
    """Command group that reports an error as one message."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with catching_signals(), _faults_in_a_line():
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            signum = error.signum if isinstance(error, Interrupted) else signal.SIGINT
            goes_on = ctx.invoked_subcommand in _RESUMABLE
            again = ": run the same command again to resume" if goes_on else ""
            err.print(f"\nInterrupted by {signal.Signals(signum).name}{again}.", soft_wrap=True)
            raise typer.Exit(128 + signum) from None
        except GraftingError as error:
            _fail(str(error), debug=ctx.params["debug"])
        except BrokenPipeError:
            raise  # the reader of a pipe has seen enough
        except OSError as error:
            named = "" if error.filename is None else f"{str(error.filename)[:200]}: "
            _fail(f"{named}{error.strerror or error}", debug=ctx.params["debug"])
        except ValueError as error:
            from pydantic import ValidationError

            if not isinstance(error, ValidationError):
                raise
            _fail(_faults_of(error), debug=ctx.params["debug"])


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for group in (run, comparing, checking, inspection, about, samples, measuring, weights):
    app.add_typer(group.app)
app.add_typer(data.app, name="data")


def main() -> None:
    """The entry point `grafting`."""
    keep_freed_memory()
    app()


def keep_freed_memory() -> None:
    """Tell the C library to keep up to 1 GiB of freed memory, and tensors of up to 32 MiB (its limit), on the heap.

    Fresh pages cost time: stage 2 with hyena-x on the testbed takes 12 % longer without this. Does nothing unless the C library is
    glibc.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(trim_threshold, 2**30)
    mallopt(mmap_threshold, 2**25)


def _print_version(asked: bool) -> bool:
    if asked:
        typer.echo(f"grafting {version('grafting')}")
        raise typer.Exit
    return asked


@app.callback()
def _global_options(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Number of CPU threads. [dim]Default: torch's choice.[/]")
    ] = None,
) -> None:
    """Edit pretrained diffusion transformers: replace operators, distill, finetune, measure.

    Start with [bold]grafting quickstart[/]; [bold]grafting COMMAND --help[/] shows an example of each.
    """
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


@contextmanager
def _faults_in_a_line() -> Iterator[None]:
    """Show each of our own warnings as one line, without its source location."""
    with warnings.catch_warnings():
        shown = warnings.showwarning
        told = FaultWarning, ResumeWarning, TrainingWarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, told):
                print(f"Warning: {message}", file=sys.stderr)
            else:
                shown(message, category, filename, lineno, file, line)

        for each in told:
            warnings.simplefilter("always", each)
        warnings.showwarning = show
        yield


def _faults_of(error: Any) -> str:
    """List every fault in a pydantic error, one per line."""
    from ..machine.reading import fault_of

    lines = [f"{'.'.join(map(str, e['loc'])) or error.title}: {fault_of(e)}" for e in error.errors()]
    return listed(f"these settings cannot be used ({error.title}):", lines)


def _fail(message: str, *, debug: bool) -> NoReturn:
    """Print one message and exit; called while an error is being handled."""
    if debug:
        traceback.print_exc()
    # not through rich: it would wrap lines and read brackets as markup
    print(f"Error: {message}", file=sys.stderr)
    raise typer.Exit(1) from None

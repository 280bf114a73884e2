"""Nothing that is read first is wrapped at 80 columns: the list of commands, their examples, and what a step says."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from grafting.cli import app
from grafting.cli.display import describe_values


def paths(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from paths(inner, (*path, name))


@pytest.mark.parametrize("path", list(paths(get_command(app))), ids=" ".join)
def test_help_fits_80_columns(path: tuple[str, ...]):
    runner = CliRunner(env={"COLUMNS": "80"})
    lines = [line.rstrip() for line in runner.invoke(app, [*path, "--help"]).output.splitlines()]
    assert all(len(line) <= 80 for line in lines)
    for line, following in pairwise(lines):
        if line.startswith((" $ ", "   --")):
            is_whole = not following or following.startswith((" $ ", "╭")) or line.endswith("\\")
            assert is_whole, f"this example is wrapped: {line} / {following}"
    commands = (
        lines[lines.index(next(x for x in lines if "─ Commands" in x)) :] if path in ((), ("data",)) else []
    )
    assert not [line for line in commands if line.startswith("│      ")]


def test_a_step_says_its_shares_in_percent():
    said = describe_values(
        {"loss/a": 0.03, "loss/b": 0.05, "r2/a": 0.871, "images_per_s": 81.25, "data_wait": 0.0561}
    )
    assert said == "loss 0.0400, held-out R² 0.871, images/s 81.2, waiting for data 5.6\u00a0%"


def test_calibrations_r2_is_not_called_as_stage_1s():
    """One is of the images that were fitted, the other of held-out ones."""
    assert describe_values({"fit_r2/a": 0.9, "fit_r2_before/a": -1.0}) == "R² of the fit 0.900"


def test_a_phase_is_a_whole_number():
    assert describe_values({"phase": 2.0, "loss": 0.5}) == "loss 0.500, phase 2"

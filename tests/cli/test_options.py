"""Options of commands are the fields of the configs that they fill."""

import subprocess
import sys
from typing import Annotated, Literal

import pytest
import typer
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from typer.testing import CliRunner, Result

from grafting.cli.options import Options, command
from grafting.errors import DataError


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    steps: PositiveInt = 5
    """Steps per image,
    with `care` about [low, high]."""
    rate: float = 0.5
    """Rate."""
    kind: Literal["a", "b"] = "a"
    """Kind."""
    share: Annotated[float, Field(le=1)] | Literal["all"] = 0.0
    """Share."""
    size: Annotated[tuple[PositiveInt, ...] | None, Field(examples=[(4, 32)])] = None
    """Size."""
    range: tuple[float, float] = (0.0, 1.5)
    """Range."""
    labels: Annotated[Literal["every"] | tuple[int, ...], Field(examples=[(3,)])] = "every"
    """Labels."""
    quick: bool = False
    """Quick."""
    safe: bool = True
    """Safe."""
    left: int = 1
    """Of no interest here."""

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        if self.steps > 100:
            raise ValueError("steps are too many")
        return self


class Source(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    source: str
    """Source."""
    copies: int = 1
    """Copies."""


SETTINGS = Options(
    config=Settings,
    title="How",
    own={
        "steps": {"names": ("--num", "--num-steps"), "default": 7},
        "quick": {"default": None, "help": "Quick or not."},
        "size": {"metavar": "H,W"},
    },
    without=frozenset({"left"}),
)
SOURCE = Options(config=Source, title="Where", prefix="from-", own={"source": {"names": ("--from",)}})


def _app(seen: list) -> typer.Typer:
    app = typer.Typer(rich_markup_mode="rich")

    @command(app, settings=lambda: SETTINGS, source=lambda: SOURCE)
    def work(
        name: Annotated[str, typer.Argument()],
        settings: Settings,
        source: Source | None,
        loud: Annotated[bool, typer.Option("--loud", help="Loud.")] = False,
    ) -> None:
        """Do the work."""
        seen.append((name, settings, source, loud))

    @app.command()
    def rest() -> None:
        """Rest."""

    return app


def _call(*arguments: str) -> tuple[Result, list]:
    seen: list = []
    return CliRunner().invoke(_app(seen), ["work", *arguments]), seen


def _settings(*arguments: str) -> Settings:
    result, seen = _call("x", *arguments)
    assert result.exit_code == 0, result.output
    return seen[0][1]


def test_without_options_the_defaults_hold():
    result, seen = _call("x", "--loud")
    assert result.exit_code == 0, result.output
    assert seen == [("x", Settings(steps=7), None, True)]
    assert seen[0][1].model_fields_set == {"steps"}


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (["--num", "9"], {"steps": 9}),
        (["--num-steps", "9"], {"steps": 9}),
        (["--rate", "0.5"], {"rate": 0.5}),
        (["--kind", "b"], {"kind": "b"}),
        (["--share", "0.25"], {"share": 0.25}),
        (["--share", "all"], {"share": "all"}),
        (["--size", "4,8,8"], {"size": (4, 8, 8)}),
        (["--range", "0.5,1"], {"range": (0.5, 1.0)}),
        (["--labels", "every"], {"labels": "every"}),
        (["--labels", "7"], {"labels": (7,)}),
        (["--labels", "7,9"], {"labels": (7, 9)}),
        (["--quick"], {"quick": True}),
        (["--no-quick"], {"quick": False}),
        (["--no-safe"], {"safe": False}),
    ],
)
def test_an_option_fills_its_field(options: list[str], changes: dict):
    found = _settings(*options)
    assert found == Settings(**({"steps": 7} | changes))
    assert found.model_fields_set == {"steps", *changes}


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--num", "0", "--kind", "c"], ["--num: Input should be greater than 0, found 0", "--kind: Input should be 'a' or 'b', found 'c'"]),
        (["--size", "4,wide"], ["--size is numbers such as 4,32; found '4,wide'"]),
        (["--labels", "few,3"], ["--labels is every or numbers such as 3; found 'few,3'"]),
        (["--range", "1"], ["--range is numbers; found '1'"]),
        (["--num", "101"], ["  steps are too many"]),
        (["--from-copies", "2"], ["--from-copies: only with --from"]),
    ],
)  # fmt: skip
def test_faults_name_the_options(options: list[str], messages: list[str]):
    result, seen = _call("x", *options)
    assert isinstance(result.exception, DataError)
    assert all(message in str(result.exception) for message in messages)
    assert not seen


@pytest.mark.parametrize("options", [["--left", "1"], ["--no-loud"], ["--num", "many"], ["--steps", "1"]])
def test_what_is_no_option_is_wrong_usage(options: list[str]):
    assert _call("x", *options)[0].exit_code == 2


def test_a_config_with_required_settings():
    _, seen = _call("x", "--from", "there", "--from-copies", "3")
    assert seen[0][2] == Source(source="there", copies=3)


def test_help_page():
    result = CliRunner(env={"COLUMNS": "120"}).invoke(_app([]), ["work", "--help"])
    lines = [" ".join(line.strip("│ ").split()) for line in result.output.splitlines()]
    assert "Do the work." in lines
    assert any(line.startswith("╭─ How") for line in lines)
    assert any(line.startswith("╭─ Where") for line in lines)
    for line in (
        "--num,--num-steps <int> Steps per image, with care about [low, high]. [default: 7]",
        "--rate <float> Rate. [default: 0.5]",
        "--share <str> Share. [default: 0]",
        "--size H,W Size.",
        "--range N,N Range. [default: 0,1.5]",
        "--labels <str> Labels. [default: every]",
        "--quick --no-quick <bool> Quick or not.",
        "--safe --no-safe <bool> Safe. [default: safe]",
        "--from <str> Source.",
        "--from-copies <int> Copies. [default: 1]",
    ):
        assert line in lines


def test_a_list_of_commands_needs_no_config():
    def unwanted() -> Options:
        raise AssertionError

    app = typer.Typer()
    command(app, settings=unwanted)(test_a_list_of_commands_needs_no_config)
    app.command()(test_help_page)
    assert "test-help-page" in CliRunner().invoke(app, ["--help"]).output
    code = "import sys; from grafting.cli import app; app(['--help'], standalone_mode=False); print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "sample" in shown
    assert shown.splitlines()[-1] == "False"


def test_an_option_that_is_no_field_is_our_own_fault():
    with pytest.raises(TypeError, match="Source has no steps"):
        _ = Options(config=Source, title="", own={"steps": {}}).options

"""The command line as tests call it, in this process."""

from typer.testing import CliRunner, Result

from grafting import cli


def call(*arguments: object, **environment: str) -> Result:
    return CliRunner(env=environment).invoke(cli.app, [str(argument) for argument in arguments])


def says(*arguments: object, code: int = 0, **environment: str) -> str:
    """All that a command says that ends so."""
    result = call(*arguments, **environment)
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def fails(*arguments: object, **environment: str) -> str:
    """The one message of a command that fails."""
    result = call(*arguments, **environment)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.output
    return result.stderr


def one_line(*arguments: object, code: int = 0) -> str:
    """The same in one line, however wide the terminal is."""
    return " ".join(says(*arguments, code=code).split())

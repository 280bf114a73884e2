"""Commands for weights: convert published weights, merge a delta, upload a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ._shared import open_model, out
from .display import plain_table, say
from .options import Options, command

if TYPE_CHECKING:
    from ..weights.published import PublishedFacts

app = typer.Typer()


def _facts() -> Options:
    from ..weights.published import PublishedFacts

    return Options(
        config=PublishedFacts,
        title="Facts that the tensors do not show",
        without=frozenset({"geometry", "base"}),
    )


@command(app, facts=_facts)
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Weights file (.pt, .safetensors), diffusers DiT folder, or owner/name on the Hub.",
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="Output model folder.")],
    facts: "PublishedFacts",
    base: Annotated[str | None, typer.Option(help="Base model, stored as provenance.")] = None,
    licence: Annotated[
        str | None, typer.Option(help="Licence of the base's weights, stored as provenance.")
    ] = None,
    to: Annotated[Literal["grafting", "diffusers"], typer.Option(help="Output format.")] = "grafting",
) -> None:
    """Convert published DiT weights, or grafts, to a model folder.

    [dim]$ grafting convert model.pt dit-hyena-x[/]
    """
    from ..editing.plan import Replace
    from ..machine.files import new_folder
    from ..weights.diffusers import export_diffusers
    from ..weights.locate import CONFIG_NAME
    from ..weights.portable import Base
    from ..weights.published import convert_weights, read_published

    if base is not None:
        facts = facts.model_copy(update={"base": Base(id=base, licence=licence)})
    if to == "diffusers":
        with new_folder(folder, last=CONFIG_NAME) as made:
            is_file = Path(source).is_file()
            loaded = read_published(Path(source), facts).model if is_file else open_model(source)[0]
            export_diffusers(loaded, made)
        say(out, f"diffusers folder: {folder}")
        return
    with new_folder(folder, last=CONFIG_NAME) as made:
        converted = convert_weights(source, made, facts)
    edits = [
        [edit.role, edit.operator.name, str(edit.blocks)]
        for edit in converted.plan.edits
        if isinstance(edit, Replace)
    ]
    if edits:
        out.print(plain_table(["role", "operator", "blocks"], edits))
    say(out, f"Read as {converted.origin['format']}, {'grafted' if edits else 'not grafted'}: {folder}")


@app.command()
def merge(
    delta: Annotated[str, typer.Argument(metavar="DELTA", help="Delta: a folder, or owner/name on the Hub.")],
    folder: Annotated[Path, typer.Argument(help="Output folder for the standalone model.")],
    base: Annotated[
        str | None, typer.Option(help="Location of the base. [dim]Default: as recorded in the delta.[/]")
    ] = None,
) -> None:
    """Merge a delta into its base and write a standalone model.

    [dim]$ grafting merge my-delta my-model[/]
    """
    from ..machine.files import new_folder
    from ..weights.folder import merge_delta
    from ..weights.locate import CONFIG_NAME, find_model

    with new_folder(folder, last=CONFIG_NAME) as made:
        merge_delta(find_model(delta), made, base=base)
    say(out, f"Model: {folder}")


@app.command()
def push(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Model or run folder.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub.")],
    public: Annotated[bool, typer.Option("--public", help="Make a newly created repository public.")] = False,
) -> None:
    """Upload a grafted model, with a card, to the Hub.

    [dim]$ grafting push runs/quickstart my-name/dit-windows[/]
    """
    from ..runs.hub import push_to_hub
    from ..weights.locate import find_model

    say(out, f"Uploaded: {push_to_hub(find_model(model), repo, private=not public)}")

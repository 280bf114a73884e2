"""Commands on data: latents of images, and subsets."""

import typer

app = typer.Typer(
    no_args_is_help=True,
    help="Make latents of images, and draw subsets.",
    rich_markup_mode="rich",
)


@app.callback()
def _data() -> None:
    """Make latents of images, and draw subsets."""

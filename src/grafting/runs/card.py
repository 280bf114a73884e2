"""The card of a run's model, with the figures and the recipe of the run."""

from pathlib import Path

from ..weights.card import recipe_of, rows_of, write_card
from ..weights.folder import read_config
from .folder import stale_stages


def write_model_card(model: Path) -> None:
    """Write the card of a saved graft again, with what the run whose folder it lies in has to say, if it lies in one.

    Figures and recipe of another model are left out.
    """
    config, run = read_config(model), model.parent
    if not (run / "manifest.json").is_file():
        write_card(model, config)
        return
    stale = stale_stages(run)
    rows = [] if "evaluate" in stale else rows_of(run)
    recipe = "" if "finetune" in stale else recipe_of(run)
    write_card(model, config, metrics=rows, recipe=recipe)

"""The card of a run's model, with the figures and the recipe of the run."""

from pathlib import Path

from ..machine.files import write_bytes
from ..weights.card import CARD_NAME, card_of, recipe_of, rows_of
from ..weights.folder import read_config
from .folder import stale_stages


def write_model_card(model: Path) -> None:
    """Write the card of a saved graft again, with what the run whose folder it lies in has to say, if it lies in one.

    Figures and recipe of another model are left out.
    """
    config, run = read_config(model), model.parent
    rows, recipe = [], ""
    if (run / "manifest.json").is_file():
        stale = stale_stages(run)
        rows = [] if "evaluate" in stale else rows_of(run)
        recipe = "" if "finetune" in stale else recipe_of(run)
    card = card_of(model, config, metrics=rows, recipe=recipe)
    write_bytes(model / CARD_NAME, card.encode())

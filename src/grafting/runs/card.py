"""The card of a run's model, with the figures and the recipe of the run."""

import json
from pathlib import Path

from ..machine.files import write_bytes
from ..weights.card import CARD_NAME, card_of
from ..weights.locate import CONFIG_NAME
from .folder import stale_stages


def write_model_card(model: Path) -> None:
    """Write the card of a saved graft again, with what the run whose folder it lies in has to say, if it lies in one.

    Figures and recipe of another model are left out.
    """
    config, run = json.loads((model / CONFIG_NAME).read_text()), model.parent
    rows = recipe = ""
    if (run / "manifest.json").is_file():
        stale = stale_stages(run)
        rows = "" if "evaluate" in stale else _text(run / "metrics.json")
        recipe = "" if "finetune" in stale else _text(run / "recipe.yaml")
    card = card_of(model, config, metrics=json.loads(rows) if rows else [], recipe=recipe)
    write_bytes(model / CARD_NAME, card.encode())


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""

"""Names of what people read: the rows of a run."""

from typing import Literal

RowName = Literal["pretrained", "random", "inherited", "distilled", "finetuned"]

ROW_TITLES: dict[RowName, str] = {
    "pretrained": "pretrained",
    "random": "operators at random",
    "inherited": "inherited",
    "distilled": "after stage 1",
    "finetuned": "after stage 2",
}
"""Rows in the order in which they are measured, with their titles."""

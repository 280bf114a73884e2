"""Every transformer class of diffusers in trial: what docs/hosts.md says holds."""

import json
import re

import diffusers
import pytest

from hosts import trials, zoo
from hosts.zoo import Specimen, specimens

ROWS = {row["class"]: row for row in json.loads(trials.RESULTS.read_text())}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("specimen", specimens(), ids=lambda specimen: specimen.name)
def test_a_class_can_do_what_the_table_says(specimen: Specimen):
    found, recorded = trials.row(specimen), ROWS[specimen.name]
    lost = [column for column in trials.COLUMNS if recorded[column] and not found[column]]
    assert not lost, f"{found['reason']}; `make hosts` writes the table anew"


VERSION = re.search(r"of diffusers ([\d.]+),", trials.PAGE.read_text())[1]


def test_the_page_shows_the_table():
    assert trials.PAGE.read_text() == trials.page(list(ROWS.values()), VERSION)


def test_a_class_that_lacks_something_has_a_reason():
    columns = [column for column in trials.COLUMNS if column != "pipeline"]
    assert all(row["reason"] for row in ROWS.values() if not all(row[column] for column in columns))


@pytest.mark.slow
@pytest.mark.skipif(diffusers.__version__ != VERSION, reason="the table is of another version of diffusers")
def test_the_table_is_of_every_class():
    assert list(ROWS) == zoo.transformer_classes()


def test_as_many_classes_as_promised():
    counts = {column: sum(row[column] for row in ROWS.values()) for column in trials.COLUMNS}
    full = [r for r in ROWS.values() if r["traced"] and r["identity"] and r["kernel"] and r["saved"]]
    assert len(full) >= 60
    assert min(counts["stage1"], counts["stage2"]) >= 60
    assert counts["mixer"] >= 38
    assert counts["pipeline"] >= 15

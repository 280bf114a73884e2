"""What a run's identity holds of a recipe."""

from typing import Any

import pytest

from grafting.hosts import SdpaHost, hosts
from grafting.runs.job import _spec_of


@pytest.mark.parametrize(
    ("name", "hashed"),
    [
        ("wan", [None]),
        ("qwenimage", [["mlp"]]),
        ("lumina2", [["attention", "mlp"], None]),
    ],
)
def test_a_newer_key_is_hashed_where_a_spec_says_it(name: str, hashed: list[Any]):
    host = hosts()[name]
    assert isinstance(host, SdpaHost)
    spec: Any = _spec_of(host)
    assert [blocks.get("image_alone") for blocks in spec["blocks"]] == hashed
    assert all("masked" in blocks for blocks in spec["blocks"])

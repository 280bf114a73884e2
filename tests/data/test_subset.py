"""Subsets: how they are drawn, what their hash sees, what their file refuses."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grafting.data.subset import Subset, read_subset, stratified_subset, subset_sha256, write_subset
from grafting.errors import DataError

LABELS = torch.tensor([2, 0, 1, 0, 1, 2, 2, 0, 1, 0])


def _subset() -> Subset:
    return Subset(source="digits train", num_classes=3, ids=(9, 1, 4))


def test_every_class_has_as_many_and_indices_are_sorted():
    indices = stratified_subset(LABELS, per_class=2, seed=0)
    assert LABELS[indices].bincount().tolist() == [2, 2, 2]
    assert indices.tolist() == sorted(set(indices.tolist()))


def test_draw_depends_on_the_seed_alone():
    labels = torch.arange(10).repeat(50)
    draws = [stratified_subset(labels, per_class=5, seed=seed).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_a_class_keeps_its_draw_when_another_class_goes():
    labels = torch.arange(10).repeat(50)
    whole = stratified_subset(labels, per_class=5, seed=0)
    kept = labels < 9
    part = kept.nonzero().flatten()[stratified_subset(labels[kept], per_class=5, seed=0)]
    assert part.tolist() == whole[labels[whole] < 9].tolist()


def test_all_of_a_class_may_be_asked_for():
    assert stratified_subset(torch.tensor([1, 0, 1, 0]), per_class=2, seed=3).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("labels", "per_class", "message"),
    [
        (LABELS, 4, "asked for 4 items of every class, found class 0: 4, class 1: 3, class 2: 3"),
        (LABELS, 0, "per_class must be at least 1, found 0"),
        (LABELS[:0], 1, "found no items"),
    ],
)
def test_what_cannot_be_drawn_is_refused(labels, per_class, message):
    with pytest.raises(DataError, match=message):
        stratified_subset(labels, per_class=per_class, seed=0)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 10**9), unique=True), st.randoms())
def test_hash_does_not_depend_on_order(ids, random):
    shuffled = random.sample(ids, len(ids))
    assert subset_sha256(tuple(ids)) == subset_sha256(tuple(shuffled))


def test_hash_of_known_ids():
    # printf '1\n2\n10\n' | sha256sum
    assert subset_sha256((10, 1, 2)) == "29186ee59865abdf5f37da40cefc9e7f345e49860aefd7a8f43438cdaf88f856"
    assert subset_sha256((1, 2)) != subset_sha256((12,))


@pytest.mark.parametrize("ids", [(9, 1, 4), ("b/2.png", "a/1.png")])
def test_file_round_trip(tmp_path, ids):
    subset = Subset(source="digits train", num_classes=3, ids=ids)
    write_subset(tmp_path / "subset.json", subset)
    assert read_subset(tmp_path / "subset.json") == subset


def _changed(content: dict, **changes) -> str:
    return json.dumps(content | changes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: "{", "is not a subset file"),
        (lambda c: "[1, 2]", "is not a subset file"),
        (lambda c: json.dumps({"ids": [1]}), "is not a subset file .*'source'"),
        (lambda c: _changed(c, ids=[1, "a"]), "is not a subset file"),
        (lambda c: _changed(c, ids=[9, 1, 5]), "was changed: it says sha256 .* its 3 ids have"),
        (lambda c: _changed(c, ids=[9, 1, 4, 4]), "names 1 ids more than once"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    path = tmp_path / "subset.json"
    write_subset(path, _subset())
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(DataError, match=message):
        read_subset(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no subset file .*none\.json"):
        read_subset(tmp_path / "none.json")

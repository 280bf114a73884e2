"""A store gives an operator to its own key alone."""

import shutil

import pytest
import torch
from torch import nn

from grafting.errors import CheckpointError, FaultWarning, ResumeWarning
from grafting.machine.files import hash_json
from grafting.runs.operator_cache import OperatorStore
from grafting.weights.tensors import load_tensors, save_tensors


@pytest.fixture
def store(tmp_path):
    """Two operators of equal shapes."""
    store = OperatorStore(tmp_path / "store")
    for key in ("a", "b"):
        store.save(key, nn.Linear(2, 2))
    return store


def _path(store, key):
    return store.folder / f"{hash_json(key)}.safetensors"


def test_an_operator_is_what_was_saved(store):
    saved, loaded = nn.Linear(2, 2), nn.Linear(2, 2)
    store.save(["a", 1], saved)
    assert store.holds(["a", 1])
    assert not store.holds(["a", 2])
    store.load(["a", 1], loaded)
    assert torch.equal(loaded.weight, saved.weight)


def test_two_swapped_files_are_not_taken_for_each_other(store, tmp_path):
    a, b = (_path(store, key) for key in ("a", "b"))
    shutil.move(a, tmp_path / "a")
    shutil.move(b, a)
    shutil.move(tmp_path / "a", b)
    for key in ("a", "b"):
        with pytest.raises(CheckpointError, match="holds another operator: it was saved as "):
            store.load(key, nn.Linear(2, 2))
        with pytest.warns(FaultWarning, match="holds another operator.*fitting it again"):
            assert not store.holds(key)


def test_operators_of_an_earlier_version_are_taken_with_one_warning(store):
    for key in ("a", "b"):
        save_tensors(_path(store, key), load_tensors(_path(store, key)))
    with pytest.warns(ResumeWarning, match="operators of an earlier version") as told:
        assert all(store.holds(key) for key in ("a", "b"))
    assert len(told) == 1

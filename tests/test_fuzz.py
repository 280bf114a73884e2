"""Mutated files of every kind end well or with one error, soon, and nothing is written. `benchmarks/fuzz.py` takes more of them."""

import resource

import pytest

from mutations import LONGEST_MESSAGE, targets_in, trial, trials

INPUTS = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def targets(folder):
    return targets_in(folder)


def test_whole_files_are_read(targets, folder):
    for target in targets:
        outcome = trial(target, target.path.read_bytes(), folder)
        assert (outcome.fault, outcome.said) == ("", ""), target.name


def test_mutated_files_are_one_error_or_are_read(targets, folder):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = list(trials(targets, folder, numbers=range(INPUTS), seed=1))
    faults = [(name, number, outcome) for name, number, outcome in found if outcome.fault]
    assert not faults
    refused = {name for name, _, outcome in found if outcome.said}
    # a damaged line of a log is passed over with a warning
    assert refused == {target.name for target in targets} - {"log"}, "each reader refuses some"
    assert max(len(outcome.said) for _, _, outcome in found) < LONGEST_MESSAGE
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mib < 500

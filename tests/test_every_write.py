"""Commands that are killed, or meet a full disk, at any of their changes to the disk: the same command then ends as if undisturbed.

`benchmarks/everywrite.py` says how; it does the same for every command that writes, which takes longer.
"""

import pytest
from everyjob import JOBS, get_ready
from everywrite import Tally, every_write, is_possible

QUICK = ("merge", "push")

pytestmark = pytest.mark.skipif(not is_possible(), reason="needs seccomp, by which the kernel tells of calls")


def assert_nothing_lost(name, folder):
    get_ready()
    tally = Tally()
    every_write(JOBS[name], folder.resolve(), tally)
    assert tally.faults == []
    assert tally.operations[name] > 5
    assert tally.states > 3


@pytest.mark.parametrize("name", QUICK)
def test_at_every_call(name, tmp_path):
    assert_nothing_lost(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(JOBS.keys() - set(QUICK)))
def test_at_every_call_of_the_rest(name, tmp_path):
    assert_nothing_lost(name, tmp_path)

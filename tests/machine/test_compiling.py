"""Regions are compiled once for all of a kind, however many kinds there are, and one that is given up is named."""

import pytest
import torch
from torch import nn

from grafting.errors import FaultWarning
from grafting.machine.compiling import compiled


def _block(num_layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(num_layers)))


def _graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def _anew():
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()


@pytest.mark.parametrize(("sizes", "graphs"), [([2] * 12, 1), (range(1, 13), 12)])
def test_a_region_of_each_kind_is_compiled_once(sizes, graphs):
    regions = {str(number): _block(size) for number, size in enumerate(sizes)}
    x = torch.randn(2, 4)
    want = [block(x) for block in regions.values()]
    for _ in range(2):
        with compiled(regions, dynamic=False, backend="eager"):
            got = [block(x) for block in regions.values()]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert _graphs() == graphs
    assert not any("forward" in vars(block) for block in regions.values())


def _call_in_many_ways(block: nn.Module) -> None:
    with compiled({"blocks.3": block}, dynamic=False, backend="eager"):
        for size in range(2, 14):
            block(torch.randn(size, 4))


def test_a_region_that_torch_gives_up_is_named():
    block = _block(1)
    with pytest.warns(FaultWarning, match=r"blocks\.3 is called in too many ways"):
        _call_in_many_ways(block)
    assert "forward" not in vars(block)

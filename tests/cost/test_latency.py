"""Measured cost, on modules whose cost is known."""

import time

import torch
from torch import nn

from grafting.cost.latency import peak_memory, time_forward


class Sleep(nn.Module):
    def __init__(self, seconds: float):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seconds = seconds

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return input * self.scale


def test_times_of_parts_and_of_the_whole():
    model = nn.Sequential(Sleep(0.02), Sleep(0.05))
    ms = time_forward(model, ["0", "1"], {"input": torch.ones(3)})
    assert ms["0"] >= 20
    assert ms["1"] >= 50
    assert ms[""] >= ms["0"] + ms["1"]
    assert not model._forward_hooks
    assert not model[0]._forward_pre_hooks


def test_peak_is_what_is_held_at_one_time():
    """Each of four layers makes 4,000 bytes; when one has run, its input and output are held."""
    model = nn.Sequential(*(nn.Tanh() for _ in range(4)), Sleep(0))
    assert peak_memory(model, {"input": torch.ones(1000)}) == 2 * 4000

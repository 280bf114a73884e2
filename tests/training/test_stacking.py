"""Sites fitted as one learn what each learns by itself."""

from types import SimpleNamespace

import pytest
import torch

from closeness import assert_close
from grafting.editing.placed import KernelAttention, MixerAdapter
from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import build_operators
from grafting.errors import SettingsError, TrainingError
from grafting.hosts import hosts
from grafting.training.distillation import DistillConfig, distill
from grafting.training.stacking import Stacks
from toydata import denoiser, noise_images

RANDOM = {"name": "softmax", "projections": "random"}
ATTENTIONS = [
    RANDOM,
    "linear",
    "ttt",
    "hyena-x",
    "hyena-y",
    {"name": "window-2d", "radius": 1},
    "window-1d",
    "mamba2",
    "gated-conv-x",
    "mha",
    "hybrid",
]


def _fitted(edits, *, host="dit", **settings):
    """The operators after some steps, and the losses of each."""
    torch.manual_seed(3)
    teacher = hosts()[host].tiny().eval()
    operators = build_operators(teacher, Plan(edits=edits))
    config = DistillConfig(
        **{"steps": 3, "batch_size": 8, "holdout": 8, "holdout_every": 3, "lr": 1e-2, "precision": "fp32"}
        | settings
    )
    steps = distill(teacher, operators, noise_images(32, size=16), config, denoiser=denoiser())
    return operators, [step.values for step in steps]


def _counting(monkeypatch):
    """The calls of operators whose losses have gradients."""
    calls = []
    for kind in (KernelAttention, MixerAdapter):

        def forward(self, *args, _own=kind.forward, **kwargs):
            if torch.is_grad_enabled():
                calls.append(self.site.path)
            return _own(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", forward)
    return calls


def _assert_same(edits, **settings):
    (one, losses), (other, theirs) = _fitted(edits, stacked=True, **settings), _fitted(edits, **settings)
    for mine, wanted in zip(losses, theirs, strict=True):
        assert mine == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    for path in other:
        for (name, mine), wanted in zip(one[path].named_parameters(), other[path].parameters(), strict=True):
            assert_close(f"{path}.{name}", mine, wanted, 1e-4)


@pytest.mark.parametrize("operator", ATTENTIONS, ids=str)
def test_equal_sites_learn_as_one_what_they_learn_alone(operator, monkeypatch):
    edits = (Replace(role="attention", blocks="all", operator=operator),)
    _assert_same(edits)
    calls = _counting(monkeypatch)
    _fitted(edits, stacked=True)
    assert calls == ["blocks.0.attn"] * 3  # of three blocks, in three steps


def test_unlike_sites_are_kept_apart(monkeypatch):
    edits = (
        Replace(role="attention", blocks=[0, 2], operator="hyena-x"),
        Replace(role="attention", blocks=[1], operator="linear"),
        Replace(role="mlp", blocks="all", operator={"name": "mlp", "ratio": 2.0}),
    )
    _assert_same(edits)
    calls = _counting(monkeypatch)
    _fitted(edits, stacked=True, steps=1)
    assert sorted(calls) == ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn"]


def test_micro_batches():
    _assert_same((Replace(role="attention", blocks="all", operator="linear"),), accumulate=2)


def test_in_bf16():
    edits = (Replace(role="attention", blocks="all", operator="linear"),)
    (_, stacked), (_, alone), (_, full) = (
        _fitted(edits, steps=1, **settings)
        for settings in ({"stacked": True, "precision": "bf16"}, {"precision": "bf16"}, {})
    )
    assert stacked[1]["loss/blocks.1.attn"] == pytest.approx(alone[1]["loss/blocks.1.attn"], rel=1e-3)
    assert stacked[1] != full[1]


def test_what_looks_at_values_cannot_be_stacked(monkeypatch):
    forward = MixerAdapter.forward

    def looking(self, x):
        return forward(self, x) if float(x.abs().sum()) else x

    edits = (Replace(role="attention", blocks="all", operator="hyena-x"),)
    monkeypatch.setattr(MixerAdapter, "forward", looking)
    _fitted(edits)
    with pytest.raises(
        TrainingError, match=r"stacked: hyena-x at blocks.0.attn and 2 more sites cannot be computed as"
    ):
        _fitted(edits, stacked=True)


def test_a_call_that_changes_later_is_refused():
    torch.manual_seed(3)
    operators = build_operators(
        hosts()["dit"].tiny(), Plan(edits=(Replace(role="attention", blocks=[0], operator="linear"),))
    )
    sites = {path: SimpleNamespace(operator=operator, loss=len) for path, operator in operators.items()}

    def visit(step, visit):
        x = torch.zeros(1, 16, 32)
        visit("blocks.0.attn", (x,), {}, x)
        x += 1

    with pytest.raises(TrainingError, match=r"the model changes what blocks.0.attn was called with"):
        Stacks(sites).visit(SimpleNamespace(visit=visit), 0, lambda *_: None)


def test_settings_that_exclude_it():
    with pytest.raises(SettingsError, match="stacked requires inputs: teacher"):
        DistillConfig(stacked=True, inputs="student")
    with pytest.raises(SettingsError, match="stacked and compile exclude each other"):
        DistillConfig(stacked=True, compile=True)

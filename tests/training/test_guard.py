"""The guard finds what is bad and nothing else; training skips, returns or stops, and resumes exactly after either."""

import copy
import math

import pytest
import torch

from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import build_operators
from grafting.errors import TrainingError
from grafting.hosts import hosts
from grafting.training.distillation import DistillConfig, distill
from grafting.training.finetuning import FinetuneConfig, finetune
from grafting.training.guard import Guard, GuardConfig
from grafting.training.supply import shuffled
from toydata import denoiser, noise_images

HOST = hosts()["dit"]
# in stage 1's order the first image that is trained on
POISONED = int(shuffled(32, 0)[8])


class _Poisoned:
    """Noise images, one of which makes the loss NaN: one bad step in each epoch of four."""

    num_classes = 10

    def __init__(self):
        self.images = noise_images(32, size=16)

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        x, labels = self.images.batch(indices)
        x[indices == POISONED] = 1e30
        return x, labels


def _finetuned(model, *, state=None, **guard):
    return finetune(
        model,
        _Poisoned(),
        FinetuneConfig(steps=8, batch_size=8, lr=1e-3, warmup_steps=0, guard=GuardConfig(**guard)),
        denoiser=denoiser(),
        state=state,
    )


def _distilled(operators, teacher, *, state=None, **guard):
    return distill(
        teacher,
        operators,
        _Poisoned(),
        DistillConfig(steps=7, batch_size=8, holdout=8, lr=1e-3, guard=GuardConfig(**guard)),
        denoiser=denoiser(),
        state=state,
    )


def _operators():
    torch.manual_seed(3)
    teacher = HOST.tiny().eval()
    edit = Replace(role="attention", blocks=[1], operator={"name": "softmax", "projections": "random"})
    return build_operators(teacher, Plan(edits=(edit,))), teacher


def _weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_spike_is_a_figure_far_above_its_median():
    guard = Guard(GuardConfig(spike=10, window=20))
    for value in (1.0,) * 9:
        assert guard.judge({"loss": value, "grad_norm": 5 * value}) == {}
    assert guard.judge({"loss": 50.0, "grad_norm": 5.0}) == {}  # too early to say what is usual
    assert guard.judge({"loss": 9.9, "grad_norm": 5.0}) == {}
    assert guard.judge({"loss": 10.5, "grad_norm": 5.0}) == {"spike": 10.5}
    assert guard.judge({"loss": 1.0, "grad_norm": 60.0}) == {"spike": 12.0}
    assert guard.judge({"loss": math.inf, "grad_norm": 5.0}) == {"not_finite": 1.0}
    assert not guard.stops
    assert guard.judge({"loss": 11.0, "grad_norm": 5.0}) == {"spike": 11.0}  # bad ones moved no median
    assert guard.stops
    assert guard.why() == "; 4 bad steps are more than guard.max: 3"


def test_the_median_runs():
    guard = Guard(GuardConfig(window=4))
    for value in (1.0, 1.0, 1.0, 1.0, 8.0, 8.0, 8.0, 8.0):
        assert guard.judge({"loss": value}) == {}
    assert guard.judge({"loss": 79.0}) == {}
    other = Guard(GuardConfig(window=4))
    other.load(guard.state())
    assert other.judge({"loss": 81.0}) == guard.judge({"loss": 81.0}) == {"spike": 81 / 8}
    assert other.state() == guard.state()


def test_without_a_config_only_what_is_not_finite_stops():
    guard = Guard(None)
    for value in (*(1.0,) * 20, 1e9):
        assert guard.judge({"loss": value}) == {}
    assert guard.judge({"loss": math.nan})
    assert guard.stops


def test_skip_passes_over_bad_steps():
    model = HOST.tiny()
    before, after, told = _weights(model), [], []
    for step in _finetuned(model, policy="skip"):
        after.append(_weights(model))
        told.append(step.values)
    bad = [number for number, values in enumerate(told) if "guard/skipped" in values]
    assert len(bad) == 2
    for number, (old, new) in enumerate(zip([before, *after], after, strict=False)):
        assert _equal(old, new) == (number in bad)
    assert "loss" not in told[bad[0]]
    assert told[bad[0]]["guard/not_finite"] == 1.0
    assert all(math.isfinite(value) for values in told for value in values.values())


def test_rollback_returns_and_lowers_the_learning_rate():
    model = HOST.tiny()
    weights, told = [_weights(model)], []
    for step in _finetuned(model, policy="rollback", window=3):
        weights.append(_weights(model))
        told.append(step.values)
    bad = [number for number, values in enumerate(told) if "guard/rolled_back_to" in values]
    assert len(bad) == 2
    for number in bad:
        to = told[number]["guard/rolled_back_to"]
        assert to == number - number % 3
        assert _equal(weights[number + 1], weights[int(to)])
    assert [values["lr"] for values in told] == [
        1e-3 / 2 ** sum(number > b for b in bad) for number in range(8)
    ]


@pytest.mark.parametrize("guard", [{"policy": "skip"}, {"policy": "rollback", "window": 3}])
@pytest.mark.parametrize("done", [2, 3, 6])
def test_stage_2_resumes_exactly(guard, done):
    start = HOST.tiny()
    whole, part, resumed = (copy.deepcopy(start) for _ in range(3))
    want = [s.values for s in _finetuned(whole, **guard)]
    state = next(copy.deepcopy(s.state()) for s in _finetuned(part, **guard) if s.done == done)
    got = [s.values for s in _finetuned(resumed, state=state, **guard)]
    assert got == want[done:]
    assert _equal(_weights(resumed), _weights(whole))


@pytest.mark.parametrize("guard", [{"policy": "skip"}, {"policy": "rollback", "window": 3}])
@pytest.mark.parametrize("done", [3, 5])
def test_stage_1_resumes_exactly(guard, done):
    whole, teacher = _operators()
    want = [s.values for s in _distilled(whole, teacher, **guard)]
    events = [name for values in want for name in values if name.startswith("guard_")]
    assert len(events) == 4 if guard["policy"] == "skip" else 6
    part, teacher = _operators()
    state = next(copy.deepcopy(s.state()) for s in _distilled(part, teacher, **guard) if s.done == done)
    resumed, teacher = _operators()
    assert [s.values for s in _distilled(resumed, teacher, state=state, **guard)] == want[done + 1 :]
    for path, operator in whole.items():
        assert _equal(_weights(operator), _weights(resumed[path]))


def test_stop_names_the_step():
    with pytest.raises(TrainingError, match=r"stage 2, step [0-3]: loss nan, .* as it was after step"):
        list(_finetuned(HOST.tiny(), policy="stop"))
    operators, teacher = _operators()
    with pytest.raises(TrainingError, match=r"stage 1, step [0-2], blocks\.1\.attn: the loss is nan"):
        list(_distilled(operators, teacher, policy="stop"))


def test_too_many_bad_steps_are_an_error():
    with pytest.raises(TrainingError, match=r"2 bad steps are more than guard.max: 1"):
        list(_finetuned(HOST.tiny(), policy="skip", max=1))

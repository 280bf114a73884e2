"""Models are built without values and lie in their files' memory; what a constructor computes is right all the same."""

import copy
import hashlib

import pytest
import torch
from torch import nn

from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import graft
from grafting.errors import CheckpointError
from grafting.hosts import hosts
from grafting.operators import operator_configs
from grafting.weights import folder as folders
from grafting.weights.folder import load_model, save_delta, save_model
from grafting.weights.locate import WEIGHTS_NAME
from grafting.weights.portable import Base
from grafting.weights.tensors import filled, load_tensors, save_tensors
from tinygraft import HOST, PLAN, example


class Plain(nn.Module):
    """A constructor that computes buffers and attributes of its own."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("steps", torch.arange(3.0) / 7, persistent=False)
        self.register_buffer("counter", torch.tensor(5))
        self.table = torch.linspace(0, 1, 4)


class Derived(Plain):
    """A buffer that is made of a parameter's values."""

    def __init__(self):
        super().__init__()
        nn.init.ones_(self.linear.weight)
        self.register_buffer("doubled", self.linear.weight.detach() * 2, persistent=False)


class Hidden(Plain):
    """The same in an attribute."""

    def __init__(self):
        super().__init__()
        nn.init.ones_(self.linear.weight)
        self.doubled = self.linear.weight.detach() * 2


class Asking(Plain):
    """A constructor that reads a parameter's values."""

    def __init__(self):
        super().__init__()
        nn.init.ones_(self.linear.weight)
        self.doubled = torch.tensor(2 * self.linear.weight.sum().item())


class Tied(Plain):
    """One parameter under two names."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(3, 3)
        self.other.weight = self.linear.weight


@pytest.mark.parametrize("kind", [Plain, Derived, Hidden, Asking, Tied])
def test_what_a_constructor_computes_is_right(kind):
    wanted = kind()
    made = filled(kind, {name: t.clone() for name, t in wanted.state_dict().items()}, source="here")
    for ours, theirs in zip(
        (*made.parameters(), *made.buffers()), (*wanted.parameters(), *wanted.buffers()), strict=True
    ):
        assert torch.equal(ours, theirs)
        assert type(ours) is type(theirs)
        assert ours.requires_grad == theirs.requires_grad
    assert torch.equal(made.table, wanted.table)
    if kind in (Hidden, Asking):
        assert torch.equal(made.doubled, wanted.doubled)
    if kind is Tied:
        assert made.other.weight is made.linear.weight


def test_a_model_does_not_share_memory_between_its_names():
    weight = torch.ones(3, 3)
    pair = lambda: nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))  # noqa: E731
    made = filled(pair, {"0.weight": weight, "1.weight": weight}, source="here")
    made[0].weight.data.zero_()
    assert made[1].weight.eq(1).all()


def test_faults_are_those_of_a_strict_load():
    with pytest.raises(
        CheckpointError, match=r"2 faults\s+missing tensor linear.weight\s+unexpected tensor x"
    ):
        filled(Plain, {**{n: t for n, t in Plain().state_dict().items() if n != "linear.weight"}, "x": torch.ones(1)}, source="here")  # fmt: skip


def test_other_dtypes_become_the_models():
    tensors = {name: t.to(torch.bfloat16) for name, t in Plain().state_dict().items()}
    made = filled(Plain, tensors, source="here")
    assert made.linear.weight.dtype == torch.float32
    assert made.counter.dtype == torch.int64


def test_no_random_number_is_drawn(tmp_path):
    save_model(tmp_path, HOST.tiny(), Plan())
    before = torch.get_rng_state()
    load_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", sorted(hosts()))
def test_every_host_is_as_constructed(tmp_path, name):
    wanted = hosts()[name].tiny().eval()
    save_model(tmp_path, wanted, Plan())
    made, _ = load_model(tmp_path)
    assert {n for n, _ in made.named_buffers()} == {n for n, _ in wanted.named_buffers()}
    for (path, ours), (_, theirs) in zip(made.named_modules(), wanted.named_modules(), strict=True):
        for key, value in vars(theirs).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(vars(ours)[key], value), f"{path}.{key}"
    tensors = {**dict(made.named_parameters()), **dict(made.named_buffers())}
    for n, value in {**dict(wanted.named_parameters()), **dict(wanted.named_buffers())}.items():
        assert torch.equal(tensors[n], value), n


@pytest.mark.parametrize("name", sorted(operator_configs().keys() - {"window-3d"}))
def test_every_operator_is_as_grafted(tmp_path, name):
    model = HOST.tiny().eval()
    role = min(operator_configs()[name].roles)
    plan = Plan(edits=(Replace(role=role, blocks="odd", operator={"name": name}),)).randomised()
    graft(model, plan)
    save_model(tmp_path, model, plan)
    loaded, _ = load_model(tmp_path)
    assert torch.equal(loaded(**example()), model(**example()))
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(loaded.buffers(), model.buffers(), strict=True)
    )


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_training_does_not_write_to_the_file(tmp_path):
    save_model(tmp_path, HOST.tiny(), Plan())
    before = _digest(tmp_path / WEIGHTS_NAME)
    model, _ = load_model(tmp_path)
    other, _ = load_model(tmp_path)
    kept = copy.deepcopy(other.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert _digest(tmp_path / WEIGHTS_NAME) == before
    assert all(torch.equal(t, kept[name]) for name, t in other.state_dict().items())


def test_a_folder_may_be_rewritten_while_its_model_is_in_use(tmp_path):
    model = HOST.tiny().eval()
    save_model(tmp_path, model, Plan())
    loaded, _ = load_model(tmp_path)
    expected = model(**example())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    save_model(tmp_path, model, Plan())
    save_model(tmp_path, loaded, Plan())
    assert torch.equal(loaded(**example()), expected)
    assert torch.equal(load_model(tmp_path)[0](**example()), expected)


def test_a_model_lies_in_its_file(tmp_path):
    save_tensors(tmp_path / "x", dict(Plain().state_dict()))
    tensors = load_tensors(tmp_path / "x")
    made = filled(Plain, tensors, source="here")
    assert made.linear.weight.data_ptr() == tensors["linear.weight"].data_ptr()
    # a copy of one takes no memory of the others
    assert tensors["linear.weight"].untyped_storage().nbytes() == 36


def test_a_base_is_hashed_once_until_its_files_change(tmp_path, monkeypatch):
    model = HOST.tiny().eval()
    save_model(tmp_path / "base", model, Plan())
    graft(model, PLAN)
    save_delta(tmp_path / "delta", model, PLAN, Base(id=str(tmp_path / "base")))
    hashed = []
    real = folders.check_is_base
    monkeypatch.setattr(folders, "check_is_base", lambda *a, **k: (hashed.append(1), real(*a, **k)))
    load_model(tmp_path / "delta")
    load_model(tmp_path / "delta")
    assert len(hashed) == 2  # files that were written a moment ago may change without their times'
    monkeypatch.setattr("grafting.machine.files._SETTLED_S", -1.0)
    load_model(tmp_path / "delta")
    load_model(tmp_path / "delta")
    assert len(hashed) == 3
    other = HOST.tiny()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    save_model(tmp_path / "base", other, Plan())
    with pytest.raises(CheckpointError, match="is another model"):
        load_model(tmp_path / "delta")

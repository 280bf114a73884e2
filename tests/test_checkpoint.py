"""A saved model comes back exactly, and every kind of damage is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from grafting.checkpoint import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    load_model,
    load_operators,
    save_model,
    save_operators,
)
from grafting.errors import CheckpointError, HostError, RunError
from grafting.hosts import hosts
from grafting.plan import Plan, Replace
from grafting.surgery import build_operators, graft

HOST = hosts()["dit"]
PLAN = Plan(
    edits=(
        Replace(role="attention", blocks="odd", operator={"name": "hyena-x", "kernel_size": 3}),
        Replace(role="attention", blocks=[0], operator={"name": "window-1d", "window": 2}),
        Replace(role="mlp", blocks=[2], operator={"name": "mlp", "ratio": 2.0}),
    )
)


@pytest.fixture
def folder(tmp_path):
    model = HOST.tiny().eval()
    graft(model, PLAN)
    save_model(tmp_path / "model", model, PLAN)
    return tmp_path / "model"


def _example():
    torch.manual_seed(5)
    model = HOST.tiny()
    return HOST.example(model, rows=8, cols=8, batch_size=2)


@pytest.mark.parametrize("plan", [Plan(), PLAN])
def test_round_trip_is_exact(tmp_path, plan):
    model = HOST.tiny().eval()
    graft(model, plan)
    save_model(tmp_path, model, plan)
    loaded, loaded_plan = load_model(tmp_path)
    assert loaded_plan == plan
    assert torch.equal(loaded(**_example()), model(**_example()))
    assert list(loaded.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("name", hosts())
def test_every_host_round_trips(tmp_path, name):
    host = hosts()[name]
    model = host.tiny().eval()
    plan = Plan(edits=(Replace(role="attention", blocks="odd", operator={"name": "window-1d", "window": 2}),))
    graft(model, plan.randomised())
    save_model(tmp_path, model, plan.randomised())
    loaded, loaded_plan = load_model(tmp_path)
    example = host.example(model, rows=4, cols=6, batch_size=2)
    outputs = [m(**example)[0] for m in (model, loaded)]
    assert loaded_plan == plan.randomised()
    assert torch.equal(*outputs)


def test_a_folder_without_plan_is_a_diffusers_folder(tmp_path):
    model = HOST.tiny().eval()
    save_model(tmp_path, model, Plan())
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**_example()), model(**_example()))
    model.save_pretrained(tmp_path / "theirs")
    assert torch.equal(load_model(tmp_path / "theirs")[0](**_example()), model(**_example()))


def test_operators_round_trip(tmp_path):
    model = HOST.tiny()
    first, second = (
        build_operators(model, PLAN.randomised(), seed=1),
        build_operators(model, PLAN.randomised(), seed=2),
    )
    save_operators(tmp_path / "o.safetensors", first)
    load_operators(tmp_path / "o.safetensors", second)
    for path in first:
        for name, tensor in first[path].state_dict().items():
            assert torch.equal(tensor, second[path].state_dict()[name])


def _edit_config(folder, **changes):
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(config | changes))


def _edit_weights(folder, edit):
    tensors = load_file(folder / WEIGHTS_NAME)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS_NAME)
    config = json.loads((folder / CONFIG_NAME).read_text())
    from grafting.files import sha256_of

    config["grafting"]["weights_sha256"] = sha256_of(folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(config))


def test_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no model in .*nowhere: it does not exist"):
        load_model(tmp_path / "nowhere")


def test_a_pickle_is_not_read(tmp_path):
    torch.save({"ema": {}}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"it is a file; .* \(pickles are not read\)"):
        load_model(tmp_path / "model.pt")


def test_half_written(folder):
    (folder / WEIGHTS_NAME).unlink()
    with pytest.raises(CheckpointError, match="half-written"):
        load_model(folder)


def test_no_config(folder):
    (folder / CONFIG_NAME).unlink()
    with pytest.raises(CheckpointError, match=r"it has no config\.json"):
        load_model(folder)


def test_truncated(folder):
    weights = folder / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is not the file that config.json describes"):
        load_model(folder)
    config = json.loads((folder / CONFIG_NAME).read_text())
    del config["grafting"]
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        load_model(folder)


def test_missing_unexpected_and_misshapen_tensors_are_all_named(folder):
    def edit(tensors):
        tensors["extra"] = tensors.pop("blocks.1.attn.mixer.in_proj.weight")
        tensors["pos_embed"] = torch.zeros(1, 2, 3)

    _edit_weights(folder, edit)
    with pytest.raises(CheckpointError, match="3 faults") as error:
        load_model(folder)
    message = str(error.value)
    assert "missing tensor blocks.1.attn.mixer.in_proj.weight" in message
    assert "unexpected tensor extra" in message
    assert "pos_embed has shape (1, 2, 3), expected (1, 64, 32)" in message


def test_unknown_class(folder):
    _edit_config(folder, _class_name="Unknown")
    with pytest.raises(HostError, match="holds a Unknown; known are"):
        load_model(folder)


def test_config_that_describes_no_model(folder):
    _edit_config(folder, num_heads=5)
    with pytest.raises(CheckpointError, match="hidden_size 32 must be a multiple of num_heads 5"):
        load_model(folder)


def test_config_not_json(folder):
    (folder / CONFIG_NAME).write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        load_model(folder)


def test_failed_write_leaves_what_was_there(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("grafting.checkpoint.save_file", disk_full)
    with pytest.raises(RunError, match="No space left on device"):
        save_operators(folder / WEIGHTS_NAME, build_operators(HOST.tiny(), PLAN))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

"""A saved model comes back exactly, and every kind of damage is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from grafting.contract import OperatorConfig
from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import build_operators, graft
from grafting.errors import CheckpointError, HostError, RunError
from grafting.hosts import hosts
from grafting.operators import operator_configs
from grafting.weights.folder import load, load_model, save_model
from grafting.weights.locate import CONFIG_NAME, GRAFTED_NAME, INDEX_NAME
from grafting.weights.portable import Base, plan_of
from grafting.weights.tensors import load_operators, save_operators
from tinygraft import HOST, PLAN, edit_weights, example, write_config


@pytest.fixture
def folder(tmp_path):
    model = HOST.tiny().eval()
    graft(model, PLAN)
    save_model(tmp_path / "model", model, PLAN)
    return tmp_path / "model"


@pytest.mark.parametrize("plan", [Plan(), PLAN])
def test_round_trip_is_exact(tmp_path, plan):
    model = HOST.tiny().eval()
    graft(model, plan)
    save_model(tmp_path, model, plan)
    loaded, loaded_plan = load_model(tmp_path)
    assert loaded_plan == plan
    assert torch.equal(loaded(**example()), model(**example()))
    assert list(loaded.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("name", ["dit", "flux", "pixart", "sd3", "wan"])
def test_every_host_round_trips(tmp_path, name):
    host = hosts()[name]
    model = host.tiny().eval()
    plan = Plan(edits=(Replace(role="attention", blocks="odd", operator={"name": "window-1d", "window": 2}),))
    graft(model, plan.randomised())
    save_model(tmp_path, model, plan.randomised())
    loaded, loaded_plan = load_model(tmp_path)
    inputs = host.example(model, rows=4, cols=6, batch_size=2)
    outputs = [m(**inputs)[0] for m in (model, loaded)]
    assert loaded_plan == plan.randomised()
    assert torch.equal(*outputs)


def test_a_folder_without_plan_is_a_diffusers_folder(tmp_path):
    model = HOST.tiny().eval()
    save_model(tmp_path, model, Plan())
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**example()), model(**example()))
    model.save_pretrained(tmp_path / "theirs")
    assert torch.equal(load_model(tmp_path / "theirs")[0](**example()), model(**example()))


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
    write_config(folder, config | changes)


def test_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no model in .*nowhere: it does not exist"):
        load_model(tmp_path / "nowhere")


def test_a_pickle_is_not_read(tmp_path):
    torch.save({"ema": {}}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"it is a file; .* \(pickles are not read\)"):
        load_model(tmp_path / "model.pt")


def test_half_written(folder):
    (folder / GRAFTED_NAME).unlink()
    with pytest.raises(CheckpointError, match="half-written"):
        load_model(folder)


def test_no_config(folder):
    (folder / CONFIG_NAME).unlink()
    with pytest.raises(
        CheckpointError, match=r"nor config\.json, as a model.s: half-written, or published weights"
    ):
        load_model(folder)


def test_truncated(folder):
    weights = folder / GRAFTED_NAME
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is not the file that config.json describes"):
        load_model(folder)
    config = json.loads((folder / CONFIG_NAME).read_text())
    del config["grafting"]
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is not a complete safetensors file"):
        load_model(folder)


def test_missing_unexpected_and_misshapen_tensors_are_all_named(folder):
    def edit(tensors):
        tensors["extra"] = tensors.pop("blocks.1.attn.mixer.in_proj.weight")
        tensors["pos_embed"] = torch.zeros(1, 2, 3)

    edit_weights(folder, edit)
    with pytest.raises(CheckpointError, match="3 faults") as error:
        load_model(folder)
    message = str(error.value)
    assert "missing tensor blocks.1.attn.mixer.in_proj.weight" in message
    assert "unexpected tensor extra" in message
    assert "pos_embed has shape (1, 2, 3), expected (1, 64, 32)" in message


def test_unknown_class(folder):
    _edit_config(folder, _class_name="Unknown")
    with pytest.raises(CheckpointError, match="holds a Unknown, and its graft was made with a host of DiT"):
        load_model(folder)
    config = json.loads((folder / CONFIG_NAME).read_text())
    del config["grafting"]
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(HostError, match=r"holds a Unknown; no host .*DiT.*--spec FILE"):
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

    monkeypatch.setattr("grafting.weights.tensors.save_file", disk_full)
    with pytest.raises(RunError, match="No space left on device"):
        save_operators(folder / GRAFTED_NAME, build_operators(HOST.tiny(), PLAN))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_edited_config_is_refused(folder):
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["grafting"]["plan"]["edits"][1]["operator"]["window"] = 3
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="config.json was edited after it was saved"):
        load_model(folder)


def test_another_version_of_an_operator_is_refused(folder, monkeypatch):
    monkeypatch.setattr(operator_configs()["hyena-x"], "version", 2)
    with pytest.raises(CheckpointError, match="operator 'hyena-x' of version 1; installed is version 2"):
        load_model(folder)


@pytest.mark.parametrize("operator", ["hybrid", {"name": "ttt", "window": 1}])
def test_another_version_of_a_part_is_refused(tmp_path, monkeypatch, operator):
    model = HOST.tiny()
    plan = Plan(edits=(Replace(role="attention", blocks=[1], operator=operator),))
    graft(model, plan)
    save_model(tmp_path, model, plan)
    monkeypatch.setattr(operator_configs()["window-2d"], "version", 2)
    with pytest.raises(CheckpointError, match="operator 'window-2d' of version 1; installed is version 2"):
        load(tmp_path)


def test_what_could_not_be_loaded_is_not_saved(folder):
    before = sorted(folder.iterdir())
    model = load(folder)
    with pytest.raises(CheckpointError, match="the model is grafted, and the plan to save with it is empty"):
        save_model(folder, model, Plan())
    model.blocks[1].attn.tracker.host = _Nameless()
    with pytest.raises(CheckpointError, match="host 'mine' is not known by its name"):
        save_model(folder, model, PLAN)
    assert sorted(folder.iterdir()) == before


class _Nameless(type(HOST)):
    name = "mine"


def test_every_operator_has_a_version():
    assert OperatorConfig.version == 1
    assert all(config.version >= 1 for config in operator_configs().values())


def test_folders_from_before_versions_are_of_version_1(folder, monkeypatch):
    config = json.loads((folder / CONFIG_NAME).read_text())
    for added in ("operator_versions", "config_sha256", "base"):
        del config["grafting"][added]
    (folder / CONFIG_NAME).write_text(json.dumps(config | {"_class_name": "DiT"}))
    assert load_model(folder)[1] == PLAN
    monkeypatch.setattr(operator_configs()["hyena-x"], "version", 2)
    with pytest.raises(CheckpointError, match="operator 'hyena-x' of version 1; installed is version 2"):
        load_model(folder)


def test_the_base_stays_on_record(folder, tmp_path):
    model, plan = load_model(folder)
    save_model(tmp_path / "first", model, plan, base=Base(id="testbed", licence="Apache-2.0"))
    save_model(tmp_path / "second", load_model(tmp_path / "first")[0], plan)
    assert load_model(tmp_path / "second")[0].config.grafting["base"]["licence"] == "Apache-2.0"


def test_an_unknown_operator_is_refused(folder):
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["grafting"]["plan"]["edits"][0]["operator"] = {"name": "lost"}
    write_config(folder, config)
    with pytest.raises(CheckpointError, match="does not describe a graft:\n.*no operator 'lost'; there are"):
        load_model(folder)


def test_load_takes_names_folders_and_runs(folder, tmp_path):
    assert plan_of(load("testbed")) == Plan()
    assert plan_of(load(folder)) == PLAN
    (tmp_path / "manifest.json").write_text("{}")
    assert plan_of(load(str(tmp_path))) == PLAN
    with pytest.raises(CheckpointError, match="no model in nobody/nothing: it does not exist, and the Hub"):
        load("nobody/nothing")


def test_shards_are_read(folder):
    tensors = load_file(folder / GRAFTED_NAME)
    names = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(names.values()):
        save_file({n: t for n, t in tensors.items() if names[n] == shard}, folder / shard)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": names}))
    whole, _ = load_model(folder)
    (folder / GRAFTED_NAME).unlink()
    config = json.loads((folder / CONFIG_NAME).read_text())
    for recorded in ("weights_sha256", "config_sha256"):
        del config["grafting"][recorded]
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    assert torch.equal(load_model(folder)[0](**example()), whole(**example()))
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no file .*part-1.safetensors"):
        load_model(folder)

"""A delta holds what its base has not got, comes back exactly, and no other base will do."""

import pytest
import torch
from safetensors.torch import load_file

from grafting.editing.plan import Drop, Merge, Plan, Replace
from grafting.editing.surgery import graft
from grafting.errors import CheckpointError
from grafting.hosts import hosts
from grafting.weights.folder import load, load_model, merge_delta, save_delta, save_model
from grafting.weights.locate import DELTA_NAME, GRAFTED_NAME, WEIGHTS_NAME
from grafting.weights.portable import Base
from tinygraft import HOST, PLAN, edit_weights, example


@pytest.fixture
def base(tmp_path):
    save_model(tmp_path / "base", HOST.tiny(), Plan())
    return Base(id=str(tmp_path / "base"), licence="CC0-1.0")


@pytest.fixture
def delta(tmp_path, base):
    """A grafted model, one of whose kept tensors was also trained, as a delta of its base."""
    model, _ = load_model(tmp_path / "base")
    graft(model, PLAN)
    with torch.no_grad():
        model.final_layer.linear.weight.add_(0.1)
    save_delta(tmp_path / "delta", model, PLAN, base)
    return tmp_path / "delta", model.eval()


def test_a_delta_holds_what_its_base_has_not_got(delta):
    folder, model = delta
    stored = set(load_file(folder / DELTA_NAME))
    operators = {
        f"blocks.1.attn.mixer.{n}" for n in ("in_proj.weight", "in_proj.bias", "short_filter.weight")
    }
    operators |= {f"blocks.2.mlp.mixer.{n}" for n in ("fc1.weight", "fc1.bias", "fc2.weight")}
    # out_proj and fc2.bias are the host's own
    assert stored == {*operators, "blocks.1.attn.mixer.short_filter.bias", "final_layer.linear.weight"}
    assert "blocks.0.attn.attention.qkv.weight" not in stored
    loaded, plan = load_model(folder)
    assert plan == PLAN
    assert torch.equal(loaded(**example()), model(**example()))


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("dit", Merge(blocks=[0, 1])),
        ("dit", Drop(blocks=[1])),
        ("pixart", Merge(blocks=[0, 1])),
        ("flux", Drop(blocks=[1])),
    ],
    ids=str,
)
def test_restructured_models_come_back_whole_and_as_deltas(tmp_path, name, edit):
    host = hosts()[name]
    plan = Plan(edits=(edit,))
    save_model(tmp_path / "base", host.tiny(), Plan())
    model, _ = load_model(tmp_path / "base")
    graft(model, plan)
    save_model(tmp_path / "full", model, plan)
    save_delta(tmp_path / "delta", model, plan, Base(id=str(tmp_path / "base")))
    inputs = host.example(model, rows=4, cols=6, batch_size=2)
    want = model.eval()(**inputs)[0]
    for folder in ("full", "delta"):
        assert torch.equal(load_model(tmp_path / folder)[0](**inputs)[0], want)
    # blocks that moved are borrowed: only what is new is stored
    assert all(".merge." in name for name in load_file(tmp_path / "delta" / DELTA_NAME))


def test_a_delta_of_the_testbed_is_small(tmp_path):
    model = load("testbed")
    plan = Plan(edits=(Replace(role="attention", blocks="odd", operator="hyena-y"),))
    graft(model, plan)
    save_delta(tmp_path / "delta", model, plan, Base(id="testbed"))
    save_model(tmp_path / "full", model, plan)
    sizes = [(tmp_path / a / b).stat().st_size for a, b in (("delta", DELTA_NAME), ("full", GRAFTED_NAME))]
    assert sizes[0] < 0.1 * sizes[1]
    assert torch.equal(load(tmp_path / "delta").x_embedder.proj.weight, model.x_embedder.proj.weight)


def test_a_delta_in_bfloat16_comes_back_exactly(tmp_path, base):
    model, _ = load_model(tmp_path / "base", dtype=torch.bfloat16)
    graft(model, PLAN)
    save_delta(tmp_path / "delta", model, PLAN, base)
    loaded, _ = load_model(tmp_path / "delta", dtype=torch.bfloat16)
    assert len(load_file(tmp_path / "delta" / DELTA_NAME)) < len(model.state_dict()) / 2
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_merged_delta_needs_no_base(delta, tmp_path):
    folder, model = delta
    merge_delta(folder, tmp_path / "whole")
    (tmp_path / "base" / WEIGHTS_NAME).unlink()
    loaded, plan = load_model(tmp_path / "whole")
    assert plan == PLAN
    assert torch.equal(loaded(**example()), model(**example()))
    assert loaded.config.grafting["base"]["licence"] == "CC0-1.0"
    with pytest.raises(CheckpointError, match="is not a delta: it is already a standalone model"):
        merge_delta(tmp_path / "whole", tmp_path / "again")


def test_a_delta_finds_a_base_that_moved(delta, tmp_path):
    folder, model = delta
    (tmp_path / "base").rename(tmp_path / "moved")
    message = "is a delta; its base: no model in .*base: it does not exist.*(`base` names another place)"
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)
    assert torch.equal(load_model(folder, base=tmp_path / "moved")[0](**example()), model(**example()))


def test_a_foreign_base_is_refused(delta, tmp_path):
    folder, _ = delta
    save_model(tmp_path / "other", HOST.tiny(), Plan())
    with pytest.raises(CheckpointError, match="is a delta of .*base, and .*other is another model") as error:
        load_model(folder, base=tmp_path / "other")
    assert "tensors differ\n" in str(error.value)
    assert "has other values" in str(error.value)


def test_a_delta_with_a_renamed_tensor_is_refused(delta):
    folder, _ = delta

    def edit(tensors):
        tensors["extra"] = tensors.pop("final_layer.linear.weight")

    edit_weights(folder, edit, name=DELTA_NAME)
    with pytest.raises(
        CheckpointError, match="2 faults\n  missing tensor final_layer.linear.weight\n  unexpected"
    ):
        load_model(folder)


def test_a_truncated_or_missing_delta_is_refused(delta):
    weights = delta[0] / DELTA_NAME
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match="is not the file that config.json describes"):
        load_model(delta[0])
    weights.unlink()
    with pytest.raises(CheckpointError, match="no delta.safetensors: it is half-written"):
        load_model(delta[0])


def test_saving_a_full_model_over_a_delta_leaves_no_delta(delta):
    folder, model = delta
    save_model(folder, model, PLAN)
    assert not (folder / DELTA_NAME).exists()
    assert torch.equal(load_model(folder)[0](**example()), model(**example()))


def test_a_delta_does_not_overwrite_its_base(tmp_path):
    save_model(tmp_path, HOST.tiny(), Plan())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = load(tmp_path)
    graft(model, PLAN)
    with pytest.raises(CheckpointError, match="the base is in .*: name another folder"):
        save_delta(tmp_path, model, PLAN, Base(id=str(tmp_path)))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

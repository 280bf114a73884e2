"""What a plan changes: on any grid, with merged and dropped blocks, on the command line."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from grafting.cli import app
from grafting.contract import Grid
from grafting.cost.plan import measure_plan, plan_cost
from grafting.editing.plan import Plan
from grafting.editing.surgery import graft
from grafting.errors import PlanError
from grafting.hosts import hosts
from grafting.models.dit import DiT
from grafting.weights.folder import load_model, save_model

RECIPE = {
    "name": "tiny",
    "source": {
        "host": "dit",
        "config": {"input_size": 16, "hidden_size": 32, "depth": 4, "num_heads": 2},
        "weights": "nowhere",
    },
    "data": {"name": "latents", "folder": "nowhere"},
    "plan": [{"role": "attention", "blocks": "odd", "operator": "hyena-x"}],
}


def model() -> DiT:
    return hosts()["dit"].tiny()


def plan(*edits: dict) -> Plan:
    return Plan.model_validate({"edits": edits})


def test_larger_grids_gain_more_and_the_model_is_unchanged():
    dit = model()
    before = {name: p.clone() for name, p in dit.named_parameters()}
    edits = plan({"role": "attention", "operator": "hyena-x"})
    native, large = (plan_cost(dit, edits, grid=grid).to_json() for grid in (None, Grid(32, 24)))
    assert (native["grid"], large["grid"]) == ([8, 8], [32, 24])
    assert large["model_flops_delta_pct"] < native["model_flops_delta_pct"]
    assert large["model"]["params"] == native["model"]["params"]
    assert all(torch.equal(p, before[name]) for name, p in dit.named_parameters())


def test_operator_that_does_not_fit_the_grid():
    edits = plan({"role": "attention", "operator": {"name": "window-2d", "radius": 3}})
    with pytest.raises(PlanError, match=r"grid of 4 x 4 tokens\n.*radius 3 spans"):
        plan_cost(model(), edits, grid=Grid(4, 4))


def test_dropped_blocks_cost_nothing():
    found = plan_cost(model(), plan({"edit": "drop", "blocks": 1})).to_json()
    gone = [site for site in found["sites"] if site["block"] == 1]
    assert [site["params"]["after"] for site in gone] == [0, 0]
    assert abs(found["flops_delta_pct"] + 100 / 3) < 1e-9
    assert found["model"]["flops"]["after"] < found["model"]["flops"]["before"]


def test_merged_blocks_are_part_of_the_whole():
    found = plan_cost(model(), plan({"edit": "merge", "blocks": [0, 1]})).to_json()
    assert {site["block"] for site in found["sites"]} == {2}
    assert found["num_merged"] == 2
    dim, tokens = 32, 64
    assert found["model"]["params"]["after"] - found["model"]["params"]["before"] == 2 * dim * dim + dim
    more = found["model"]["flops"]["after"] - found["model"]["flops"]["before"]
    assert more == 2 * tokens * 2 * dim * dim


def test_measured_passes():
    edits = plan({"role": "attention", "blocks": [1], "operator": "hyena-x"})
    found = measure_plan(model(), edits, repeats=2)
    assert set(found.ms) == {"", *(f"blocks.{i}.{part}" for i in range(3) for part in ("attn", "mlp"))}
    assert all(before > 0 and after > 0 for before, after in found.ms.values())
    assert min(*found.peak_bytes, found.speedup) > 0


def test_command_needs_neither_weights_nor_data(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    result = CliRunner().invoke(app, ["cost", str(path), "--grid", "16x8", "--measure", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["recipe"], found["grid"], len(found["sites"])) == ("tiny", [16, 8], 8)
    assert {"flops_op_delta_pct", "flops_ft_delta_pct", "flops_delta_pct", "params_delta_pct"} <= set(found)
    assert found["measured"]["ms"]["before"] > 0
    shown = CliRunner().invoke(app, ["cost", str(path)])
    assert "All operators of the edited roles, operator FLOPs as in Table 4: -4" in shown.output
    assert CliRunner().invoke(app, ["cost", str(path), "--grid", "8"]).exit_code == 1


@pytest.mark.parametrize("name", ["dit", "flux", "pixart", "sd3", "wan"])
def test_every_host_is_counted_in_any_dtype_and_keeps_no_hook(name):
    edits = plan({"role": "attention", "blocks": [1], "operator": {"name": "window-2d", "radius": 1}})
    host = hosts()[name]
    counted = []
    for dtype in (torch.float32, torch.bfloat16):
        model = host.tiny().to(dtype)
        counted.append(plan_cost(model, edits, grid=Grid(4, 6)))
        assert measure_plan(model, edits, grid=Grid(4, 6), repeats=1).speedup > 0
        assert not model._forward_pre_hooks
    wide, half = (cost.to_json()["model"]["flops"] for cost in counted)
    assert wide == half
    assert wide["after"] < wide["before"]


def test_what_stands_beside_the_sites_is_counted_on_their_frames():
    model = hosts()["wan"].tiny()
    one, two = (plan_cost(model, plan(), grid=Grid(4, 6, frames=n)).before for n in (1, 2))
    rest = [cost.flops - sum(site.flops.total for site in cost.sites) for cost in (one, two)]
    assert rest[1] > 1.8 * rest[0]


def test_a_grafted_model_is_counted_with_the_operators_that_it_holds(tmp_path):
    first = plan({"role": "attention", "blocks": [0], "operator": {"name": "window-1d", "window": 2}})
    grafted = model()
    graft(grafted, first)
    save_model(tmp_path, grafted, first)
    loaded = load_model(tmp_path)[0]
    more = plan({"role": "attention", "blocks": [1], "operator": "hyena-x"})
    assert plan_cost(loaded, more).before.flops == plan_cost(model(), first).after.flops
    with pytest.raises(PlanError, match="grafted in place, so what stands at its sites is not on record"):
        plan_cost(grafted, more)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("pixart", {"sample_size": 128, "num_attention_heads": 3, "cross_attention_dim": 48}),
        ("flux", {"guidance_embeds": True}),
    ],
)
def test_models_with_more_conditions_are_counted(name, settings):
    """PixArt-alpha of 1024 pixels is told the image's size, FLUX.1-dev its guidance."""
    host = hosts()[name]
    config = {key: value for key, value in host.tiny().config.items() if not key.startswith("_")}
    model = host.model_class(**config | settings)
    assert plan_cost(model, plan(), grid=Grid(4, 6)).before.flops > 0

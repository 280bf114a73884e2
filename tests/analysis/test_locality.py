"""Locality: exact for maps that are known, text left out, squares within a frame, and a model that is what it was."""

import copy
import json

import pytest
import torch
from typer.testing import CliRunner

from closeness import assert_close
from grafting.analysis import Locality, SiteLocality, noised_locality, watching_locality
from grafting.analysis.locality import _Recording, _result, uniform_share
from grafting.cli import app
from grafting.contract import Grid, Site, TokenLayout
from grafting.editing.plan import Plan
from grafting.editing.surgery import graft
from grafting.errors import HostError, PlanError
from grafting.hosts import hosts
from toydata import denoiser, noise_images

HOST = hosts()["dit"]
DATA = noise_images(32, size=16)


def _site(grid: Grid, *, num_text: int = 0) -> Site:
    return Site(role="attention", block=0, path="attn", dim=8, grid=grid, num_text=num_text, num_heads=2)


def _recorded(q, k, layout: TokenLayout) -> SiteLocality:
    kernel = _Recording()
    kernel(q, k, torch.randn_like(k), layout)
    return _result({_site(layout.grid): kernel}).sites[0]


def _noised(model, **settings) -> Locality:
    settings = {"samples": 12, "batch_size": 5} | settings
    return noised_locality(model, DATA, denoiser=denoiser(), **settings)


def _pairs_within(grid: Grid, *, k: int | None = None, radius: int | None = None) -> float:
    """The share of pairs of tokens in a band or square, counted one by one."""
    places = [(f, r, c) for f in range(grid.frames) for r in range(grid.rows) for c in range(grid.cols)]
    inside = 0
    for i, (f, r, c) in enumerate(places):
        for j, (g, s, d) in enumerate(places):
            if k is not None:
                inside += abs(i - j) <= k
            else:
                inside += f == g and max(abs(r - s), abs(c - d)) <= radius
    return inside / len(places) ** 2


@pytest.mark.parametrize("grid", [Grid(3, 5), Grid(4, 4), Grid(2, 3, frames=2)])
def test_uniform_attention_has_the_share_of_its_band(grid: Grid):
    q = torch.zeros(2, 2, grid.num_tokens, 4)
    found = _recorded(q, torch.randn_like(q), TokenLayout(grid))
    for k in (0, 1, 3, grid.num_tokens, 100):
        assert found.band(k) == pytest.approx(_pairs_within(grid, k=k), abs=1e-6)
        assert uniform_share(grid.num_tokens, k) == pytest.approx(_pairs_within(grid, k=k), abs=1e-12)
    for radius in (0, 1, 2, 7):
        assert found.window(radius) == pytest.approx(_pairs_within(grid, radius=radius), abs=1e-6)
    shown = Locality(grid, 2, (found,)).to_json(bands=(2,), radii=(1,))
    assert shown["uniform"]["windows"][1] == pytest.approx(_pairs_within(grid, radius=1), abs=1e-12)


def test_attention_of_each_token_to_itself_is_all_local():
    q = 100 * torch.eye(12).expand(3, 2, 12, 12)
    found = _recorded(q, q, TokenLayout(Grid(3, 4)))
    assert (found.band(0), found.window(0)) == (pytest.approx(1), pytest.approx(1))


def test_map_is_that_of_softmax_attention_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch):
    q, k = torch.randn(2, 3, 2, 20, 8)
    attention = (q @ k.mT / 8**0.5).softmax(-1).mean((0, 1))
    index = torch.arange(20)
    band = ((index[:, None] - index).abs() <= 4).float()
    want = (attention * band).sum().item() / 20
    for scores in (1, 7 * 6 * 20, 2**22):
        monkeypatch.setattr("grafting.analysis.locality._CHUNK_SCORES", scores)
        assert _recorded(q, k, TokenLayout(Grid(4, 5))).band(4) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("text_first", [True, False])
def test_text_tokens_are_left_out(text_first: bool):
    grid, layout = Grid(3, 4), TokenLayout(Grid(3, 4), **{"before" if text_first else "after": 5})
    q, k = torch.randn(2, 2, 2, layout.num_tokens, 8)
    found = _recorded(q, k, layout)
    image = layout.image_slice
    assert found == _recorded(q[:, :, image], k[:, :, image], TokenLayout(grid))
    assert found.band(grid.num_tokens) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", ["dit", "flux", "pixart", "sd3", "wan"])
def test_every_host_is_measured_and_left_as_it_was(name: str):
    host = hosts()[name]
    model = host.tiny().eval()
    inputs = host.example(model, rows=4, cols=6, batch_size=2)
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    with torch.no_grad():
        want = model(**inputs, **({} if name == "dit" else {"return_dict": False}))
        with watching_locality(model) as result:
            got = model(**inputs, **({} if name == "dit" else {"return_dict": False}))
    found = result()
    assert torch.equal(torch.as_tensor(got if name == "dit" else got[0]), want if name == "dit" else want[0])
    assert (found.grid, found.num_maps) == (Grid(4, 6), 2)
    assert [site.path for site in found.sites] == [
        site.path for site in host.sites(model) if site.role == "attention"
    ]
    for site in found.sites:
        assert (site.band(23), site.window(5)) == (pytest.approx(1, abs=1e-5), pytest.approx(1, abs=1e-5))
        assert 0 < site.band(1) < 1
    assert list(model.modules()) == modules
    assert not model._forward_pre_hooks
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_failed_pass_leaves_the_model_as_it_was():
    model = HOST.tiny()
    modules = list(model.modules())
    with pytest.raises(RuntimeError, match="stop"), watching_locality(model):
        raise RuntimeError("stop")
    assert list(model.modules()) == modules
    assert not model._forward_pre_hooks


def test_uniform_model_on_noised_images():
    model = HOST.tiny().eval()
    with torch.no_grad():
        for block in model.blocks:
            # no queries: all keys are alike
            block.attn.qkv.weight[:32] = 0
            block.attn.qkv.bias[:32] = 0
    found = _noised(model)
    assert (found.grid, found.num_maps, len(found.sites)) == (Grid(8, 8), 12, 3)
    for site in found.sites:
        assert site.band(8) == pytest.approx(uniform_share(64, 8), abs=1e-6)
        assert site.window(1) == pytest.approx(uniform_share(8, 1) ** 2, abs=1e-6)


def test_noised_images_do_not_depend_on_the_batch_size():
    model = HOST.tiny().eval()
    want, got, other = (_noised(model, **s) for s in ({}, {"batch_size": 12}, {"seed": 1}))
    raster = [torch.tensor([site.raster for site in found.sites]) for found in (want, got, other)]
    assert_close("raster", raster[1], raster[0], 1e-5)
    assert not torch.equal(raster[2], raster[0])


def test_steps_are_evenly_spread():
    steps = []

    def predict(model, x_t, t, condition):
        steps.extend(t.tolist())
        return HOST.predict(model, x_t, t, condition)

    noised_locality(HOST.tiny().eval(), DATA, denoiser=denoiser(predict), samples=5, batch_size=2)
    assert steps == [100, 300, 500, 700, 900]


def test_lists_of_blocks():
    shares = [0.5, 0.9, 0.5, 0.1, 0.9]
    sites = tuple(SiteLocality(i, f"blocks.{i}.attn", (s, 1 - s), (1.0,)) for i, s in enumerate(shares))
    found = Locality(Grid(1, 2), 1, sites)
    assert found.top_local(3, band=0) == [0, 1, 4]
    assert found.low_local(2, band=0) == [0, 3]
    assert found.top_local(2, band=1) == [0, 1]


def test_sites_that_hold_an_operator_are_left_out():
    model = HOST.tiny().eval()
    plan = [{"role": "attention", "blocks": [1], "operator": "hyena-x"}]
    record = graft(model, Plan.model_validate({"edits": plan}))
    assert [site.block for site in _noised(model).sites] == [0, 2]
    assert model.get_submodule("blocks.1.attn") is record.operators["blocks.1.attn"]
    graft(model, Plan.model_validate({"edits": [plan[0] | {"blocks": [0, 2]}]}))
    with pytest.raises(HostError, match="every site holds an operator"):
        _noised(model)


def test_errors():
    model = HOST.tiny().eval()
    with watching_locality(model) as result:
        pass
    with pytest.raises(HostError, match="the model did not run"):
        result()
    with pytest.raises(HostError, match="measured on one grid"), watching_locality(model):
        for rows in (8, 4):
            model(**HOST.example(model, rows=rows, cols=8, batch_size=1))
    graft(model, Plan.model_validate({"edits": [{"edit": "drop", "blocks": 1}]}))
    with pytest.raises(PlanError, match="merged or dropped blocks"):
        _noised(model)


def test_command_on_the_testbed():
    arguments = ["locality", "testbed", "--noised", "--images", "20", "--bands", "2,8"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["grid"], found["num_maps"], len(found["sites"])) == ([8, 8], 20, 8)
    for site in found["sites"]:
        assert 0 < site["bands"]["2"] < site["bands"]["8"] < 1
    local, other = found["lists"]["top_local"], found["lists"]["low_local"]
    assert sorted(local + other) == list(range(8))
    shares = {site["block"]: site["bands"]["8"] for site in found["sites"]}
    assert min(shares[i] for i in local) >= max(shares[i] for i in other)
    shown = CliRunner().invoke(app, arguments).stdout
    assert f"Most local half: {local}" in shown
    sampled = ["locality", "testbed", "--images", "2", "--steps", "2"]
    shown = CliRunner().invoke(app, sampled).stdout
    assert "2 images drawn by ddim with 2 steps, cfg scale 1.5, fp32: 8 maps per block" in shown


@pytest.mark.parametrize("bands", ["0", "two", "4,,8", "-1"])
def test_bands_that_are_none(bands: str):
    result = CliRunner().invoke(app, ["locality", "testbed", "--bands", bands])
    assert result.exit_code == 1
    assert "--bands is numbers of tokens" in result.stderr


def test_a_band_as_wide_as_the_image():
    result = CliRunner().invoke(app, ["locality", "testbed", "--bands", "2,64"])
    assert result.exit_code == 1
    assert "--bands: 64 is too wide for 64 tokens" in result.stderr

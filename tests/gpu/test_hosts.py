"""Every host that comes with the library, grafted, computes on CUDA what it computes on the CPU; so it does offloaded or cast."""

import copy
import warnings

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import tinypipeline
from closeness import assert_close
from grafting import graft
from grafting.contract import Grid
from grafting.cost.latency import peak_memory
from grafting.cost.plan import measure_plan, plan_cost
from grafting.editing.plan import Drop, Merge, Plan, Replace
from grafting.hosts import SdpaHost, hosts
from grafting.weights.folder import load, load_model, save_delta, save_model
from grafting.weights.portable import Base

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:In .* autocast:UserWarning")]
HOSTS = hosts()
WINDOW = Plan(edits=(Replace(role="attention", operator={"name": "window-2d", "radius": 1}),))
LINEAR = Plan(edits=(Replace(role="attention", operator={"name": "linear", "conv": 3}),))
MIXERS = Plan(
    edits=(
        Replace(role="attention", blocks=[0], operator="hyena-x"),
        Replace(role="attention", blocks=[1], operator="mamba2"),
        Replace(role="mlp", blocks=[1], operator={"name": "mlp", "ratio": 2}),
    )
)
# arguments that say which tokens of prompts are padding
PADDED = {
    "pixart": "encoder_attention_mask",
    "qwenimage": "encoder_hidden_states_mask",
    "lumina2": "encoder_attention_mask",
    "hunyuanvideo": "encoder_attention_mask",
    "mochi": "encoder_attention_mask",
}


def to(value, device):
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), value)


def example(host, model) -> dict:
    frames = 2 if isinstance(host, SdpaHost) and host.spec.native_grid.frames > 1 else 1
    torch.manual_seed(1)
    inputs = host.example(model, rows=6, cols=4, frames=frames, batch_size=2)
    if host.name in PADDED:
        name = PADDED[host.name]
        inputs[name] = torch.ones(2, 5).to(inputs[name].dtype if name in inputs else torch.bool)
        inputs[name][0, -2:] = 0
    return inputs


def run(model: nn.Module, inputs: dict) -> Tensor:
    output = model(**inputs)
    output = output if isinstance(output, Tensor) else output[0]
    return output if isinstance(output, Tensor) else torch.stack(list(output))


def gradients(model: nn.Module, inputs: dict) -> tuple[Tensor, dict[str, Tensor]]:
    output = run(model, inputs)
    output.float().square().mean().backward()
    return output.detach().cpu(), {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=HOSTS)
def host(request):
    return HOSTS[request.param]


@pytest.fixture
def model(host):
    torch.manual_seed(0)
    return host.tiny().eval()


@pytest.mark.parametrize("plan", [WINDOW, LINEAR], ids=["window", "linear"])
def test_a_grafted_model_is_that_of_the_cpu(host, model, plan, device):
    """Grafted on the CPU and moved; and grafted on CUDA."""
    inputs, there = example(host, model), copy.deepcopy(model).to(device)
    graft(model, plan)
    graft(there, plan)
    want, want_gradients = gradients(copy.deepcopy(model), inputs)
    for grafted in (copy.deepcopy(model).to(device), there):
        got, got_gradients = gradients(grafted, to(inputs, device))
        assert_close("output", got, want, 1e-3)
        assert got_gradients.keys() == want_gradients.keys()
        assert_close("gradients", _flat(got_gradients), _flat(want_gradients), 1e-2)


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for _, tensor in sorted(tensors.items())])


def test_it_predicts_what_it_predicts_on_the_cpu(host, model, device):
    inputs = example(host, model)
    graft(model, WINDOW)
    if isinstance(host, SdpaHost):
        frames = 2 if host.spec.native_grid.frames > 1 else 1
        x = torch.randn(2, *host.at_grid(Grid(6, 4, frames)).shape(model))
        condition = {name: inputs[name] for name in host.needed(model)}
        t = host.spec.time.scale * torch.rand(2)
    elif host.name == "dit":
        x, t, condition = inputs["x"], inputs["t"], inputs["y"]
    else:
        x, t = inputs["hidden_states"], inputs["timestep"]
        condition = {n: inputs[n] for n in ("encoder_hidden_states", "encoder_attention_mask")}
    with torch.no_grad():
        want = host.predict(model, x, t, condition)
        got = host.predict(model.to(device), x.to(device), t.to(device), to(condition, device))
    assert got.device.type == device.type
    assert_close("prediction", got.cpu(), want, 1e-3)


def test_bf16_stays_close(host, model, device):
    inputs = example(host, model)
    graft(model, WINDOW)
    with torch.no_grad():
        want = run(model, inputs)
        with torch.autocast(device.type, torch.bfloat16):
            got = run(model.to(device), to(inputs, device))
    assert_close("output", got.float().cpu(), want, 0.2)


RESTRUCTURED = {
    "mixers": MIXERS,
    "merged": Plan(edits=(Merge(blocks=[0, 1]), Replace(role="attention", blocks=0, operator="linear"))),
    "dropped": Plan(edits=(Drop(blocks=[0]),)),
}


@pytest.mark.parametrize("host", ["dit", "pixart"], indirect=True)
@pytest.mark.parametrize("plan", RESTRUCTURED.values(), ids=RESTRUCTURED)
def test_mixers_and_restructured_models_are_those_of_the_cpu(host, model, plan, device):
    inputs, there = example(host, model), copy.deepcopy(model).to(device)
    graft(model, plan)
    record = graft(there, plan)
    want, want_gradients = gradients(model, inputs)
    got, got_gradients = gradients(there, to(inputs, device))
    assert_close("output", got, want, 1e-3)
    assert_close("gradients", _flat(got_gradients), _flat(want_gradients), 1e-2)
    there.to("cpu")
    record.undo()
    assert {p.device.type for p in there.parameters()} == {"cpu"}


def offloaded(model, device):
    return accelerate.cpu_offload(model, execution_device=device)


def offloaded_with_buffers(model, device):
    return accelerate.cpu_offload(model, device, offload_buffers=len(model._parameters) > 0)


def group_offloaded(model, device):
    model.enable_group_offload(
        onload_device=device, offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    return model


@pytest.mark.parametrize(
    "hold", [offloaded, offloaded_with_buffers, group_offloaded], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("plan", [WINDOW, LINEAR, MIXERS], ids=["window", "linear", "mixers"])
@pytest.mark.parametrize("host", ["dit", "pixart", "flux"], indirect=True)
@torch.no_grad()
def test_offloaded_models_compute_the_same(host, model, plan, hold, device):
    if host.name == "flux" and plan is MIXERS:
        pytest.skip("Flux takes kernels only")
    inputs = example(host, model)
    graft(model, plan)
    want = run(model, inputs)
    held = hold(copy.deepcopy(model), device)
    for _ in range(2):
        assert_close("output", run(held, to(inputs, device)).cpu(), want, 1e-3)


@pytest.mark.parametrize("host", ["dit", "pixart", "flux"], indirect=True)
@torch.no_grad()
def test_layers_stored_in_fp8_compute_in_full_precision(host, model, device):
    inputs = example(host, model)
    graft(model, WINDOW)
    want = copy.deepcopy(model)
    model.to(device).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    rounded = {n: p for n, p in model.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert len(rounded) > 5
    for name, parameter in rounded.items():
        want.get_parameter(name).copy_(parameter.float())
    assert_close("output", run(model, to(inputs, device)).cpu(), run(want, inputs), 1e-3)


@pytest.mark.parametrize("name", ["dit", "flux", "pixart", "sd3", "wan"])
def test_a_graft_on_cuda_is_saved_and_loaded(name, device, tmp_path):
    host = HOSTS[name]
    save_model(tmp_path / "base", host.tiny(), Plan())
    model, _ = load_model(tmp_path / "base")
    inputs = example(host, model)
    graft(model.to(device), LINEAR)
    save_model(tmp_path / "full", model, LINEAR)
    save_delta(tmp_path / "delta", model, LINEAR, Base(id=str(tmp_path / "base")))
    model.save_pretrained(tmp_path / "own")
    want = model.state_dict()
    with torch.no_grad():
        output = run(model, to(inputs, device))
    for folder in ("full", "delta", "own"):
        loaded = load(tmp_path / folder).eval()
        state = loaded.state_dict()
        assert all(torch.equal(state[n], tensor.cpu()) for n, tensor in want.items())
        with torch.no_grad():
            assert_close(folder, run(loaded.to(device), to(inputs, device)).cpu(), output.cpu(), 1e-4)


@pytest.fixture
def pipeline():
    torch.manual_seed(0)
    return tinypipeline.of(HOSTS["pixart"].tiny())


def whole(pipeline, device):
    return pipeline.to(device)


def model_offloaded(pipeline, device):
    pipeline.enable_model_cpu_offload(device=device)
    return pipeline


def sequentially_offloaded(pipeline, device):
    pipeline.enable_sequential_cpu_offload(device=device)
    return pipeline


@pytest.mark.parametrize("hold", [whole, model_offloaded, sequentially_offloaded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("plan", [LINEAR, MIXERS], ids=["linear", "mixers"])
def test_a_pipeline_draws_what_it_draws_on_the_cpu(pipeline, plan, hold, device, tmp_path):
    """Grafted in place, saved, loaded with its graft, and moved."""
    if device.type == "cpu" and hold is not whole:
        pytest.skip("offloading a pipeline needs an accelerator")
    graft(pipeline, plan)
    want = tinypipeline.draw(pipeline)
    pipeline.save_pretrained(tmp_path)
    again = hold(type(pipeline).from_pretrained(tmp_path), device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = tinypipeline.draw(again)
    assert_close("image", got.cpu(), want, 1e-2)


def test_a_delta_stands_in_a_pipeline_on_cuda(pipeline, device, tmp_path):
    save_model(tmp_path / "base", pipeline.transformer, Plan())
    model, _ = load_model(tmp_path / "base")
    graft(model, LINEAR)
    save_delta(tmp_path / "delta", model, LINEAR, Base(id=str(tmp_path / "base")))
    pipeline.transformer = model.eval()
    want = tinypipeline.draw(pipeline)
    pipeline.transformer = load(tmp_path / "delta")
    pipeline.to(device)
    assert {p.device.type for p in pipeline.transformer.parameters()} == {device.type}
    assert_close("image", tinypipeline.draw(pipeline).cpu(), want, 1e-2)


@pytest.mark.parametrize("name", ["dit", "flux", "pixart", "sd3", "wan"])
def test_cost_is_counted_and_measured(name, device):
    edits = Plan(edits=(Replace(role="attention", blocks=[1], operator={"name": "window-2d", "radius": 1}),))
    model = HOSTS[name].tiny().eval()
    want = plan_cost(model, edits, grid=Grid(4, 6)).to_json()
    assert plan_cost(model.to(device), edits, grid=Grid(4, 6)).to_json() == want
    found = measure_plan(model, edits, grid=Grid(4, 6), repeats=2)
    assert all(before > 0 and after > 0 for before, after in found.ms.values())
    assert found.ms[""][0] >= max(before for path, (before, _) in found.ms.items() if path)
    assert min(*found.peak_bytes, found.speedup) > 0
    assert {p.device.type for p in model.parameters()} == {device.type}


def test_peak_memory_does_not_depend_on_what_ran_before(device):
    """Of three layers on 4 MiB: what goes into one and comes out of it, but no workspace that its first call takes."""
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False), nn.Tanh(), nn.Tanh()).to(device)
    inputs = {"input": torch.ones(1024, 1024, device=device)}
    first, second = (peak_memory(model, inputs) for _ in range(2))
    assert first == second >= 2 * 2**22

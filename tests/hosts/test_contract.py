"""What every host promises, on its tiny instance: a new file in `hosts/` is tested by being there."""

import copy
import inspect
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from closeness import assert_close
from grafting.contract import Grid
from grafting.editing.plan import Drop, Merge, Plan, Replace
from grafting.editing.surgery import KernelAttention, graft, resolve
from grafting.errors import HostError, PlanError
from grafting.hosts import LayoutTracker, SdpaHost, host_of, hosts
from grafting.weights.folder import load_model, save_model

# one of each way to be described and called; all specs are tested in `test_specs.py`
HOSTS = {name: hosts()[name] for name in ("dit", "flux", "pixart", "sd3", "wan")}
NON_SQUARE = Grid(rows=6, cols=4)

OPERATORS = [
    ("attention", {"name": "window-1d", "window": 2}),
    ("attention", {"name": "window-2d", "radius": 1}),
    ("attention", "linear"),
    ("attention", {"name": "softmax", "projections": "random"}),
    ("attention", "mha"),
    ("attention", "hyena-se"),
    ("attention", "hyena-x"),
    ("attention", "hyena-y"),
    ("mlp", {"name": "mlp", "ratio": 3}),
    ("mlp", {"name": "mlp", "init": "random"}),
]
RESTRUCTURINGS = {
    "merge": Plan(edits=(Merge(blocks=[0, 1]),)),
    "drop": Plan(edits=(Drop(blocks=[0]),)),
    "drop the last but one": Plan(edits=(Drop(blocks=1),)),
    "merge with an operator inside": Plan(
        edits=(Merge(blocks=[0, 1]), Replace(role="attention", blocks=1, operator="linear"))
    ),
    "drop and an operator": Plan(
        edits=(
            Drop(blocks=[0]),
            Replace(role="attention", blocks=1, operator={"name": "window-2d", "radius": 1}),
        )
    ),
}
PLACES = [(host, role, operator) for host in HOSTS for role, operator in OPERATORS]


def plan(operator, *, role="attention", blocks="all") -> Plan:
    return Plan(edits=(Replace(role=role, blocks=blocks, operator=operator),))


def everywhere(host, operator, role) -> Plan:
    """In all blocks that have such a part."""
    blocks = [site.block for site in host.sites(host.tiny()) if site.role == role]
    return plan(operator, role=role, blocks=blocks)


def takes(host, role: str, operator) -> bool:
    try:
        return bool(resolve(host.tiny(), everywhere(host, operator, role)))
    except PlanError:
        return False


def takes_mixers(host) -> bool:
    return any(site.module for site in host.sites(host.tiny()) if site.role == "attention")


def run(model: nn.Module, inputs: dict) -> Tensor:
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output.sample


def gradients(model: nn.Module, inputs: dict) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    output = run(model, inputs)
    output.square().mean().backward()
    return output.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=HOSTS)
def host(request):
    return HOSTS[request.param]


@pytest.fixture
def model(host):
    return host.tiny().eval()


@pytest.fixture
def inputs(host, model):
    return host.example(model, rows=NON_SQUARE.rows, cols=NON_SQUARE.cols, batch_size=2)


def test_a_model_knows_its_host(host, model):
    assert host_of(model) is host


def test_sites_exist_and_their_facts_are_true(host, model):
    sites = host.sites(model)
    assert len({site.path for site in sites}) == len({(s.block, s.role) for s in sites}) == len(sites) > 1
    assert [s.block for s in sites] == sorted(s.block for s in sites)
    for site in sites:
        model.get_submodule(site.path)
        if site.role == "attention":
            assert site.num_heads * site.head_dim == site.dim
        if site.role == "attention" and host.output_layer(model.get_submodule(site.path)):
            weights = host.attention_weights(model.get_submodule(site.path))
            assert {w.shape for w, _ in weights} == {(site.dim, site.dim)}
        if site.role == "mlp":
            weights = host.mlp_weights(model.get_submodule(site.path))
            assert weights.up[0].shape == (site.hidden_dim, site.dim)
            assert weights.down[0].shape == (site.dim, site.hidden_dim)


def test_declared_weights_compute_what_the_modules_compute(host, model):
    x = torch.randn(2, 7, host.sites(model)[0].dim)
    for site in host.sites(model):
        module = model.get_submodule(site.path)
        if site.role == "mlp":
            up, down, activation = host.mlp_weights(module)
            y = nn.functional.linear(activation(nn.functional.linear(x, *up)), *down)
        elif isinstance(host, SdpaHost):
            continue  # norms and rotations between the projections are not inherited
        else:
            weights = host.attention_weights(module)
            q, k, v = (nn.functional.linear(x, *w).unflatten(-1, (site.num_heads, -1)) for w in weights[:3])
            y = nn.functional.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v)))
            y = nn.functional.linear(y.transpose(1, 2).flatten(2), *weights.out)
        assert_close(site.path, y, module(x), 1e-5)


def test_kept_softmax_is_the_identity_bit_for_bit(host, model, inputs):
    output, gradient = gradients(model, inputs)
    graft(model, plan("softmax"))
    grafted_output, grafted_gradient = gradients(model, inputs)
    assert torch.equal(output, grafted_output)
    renamed = {name.replace(".attention.", "."): g for name, g in grafted_gradient.items()}
    assert renamed.keys() == gradient.keys()
    assert all(torch.equal(g, renamed[name]) for name, g in gradient.items())


@pytest.mark.parametrize(("host", "role", "operator"), PLACES, indirect=["host"])
def test_operators_run_forward_and_backward(host, role, operator, model, inputs):
    if not takes(host, role, operator):
        assert not takes_mixers(host)
        assert operator in ("mha", "hyena-se", "hyena-x", "hyena-y")
        return
    with torch.no_grad():
        before = run(model, inputs)
    record = graft(model, everywhere(host, operator, role))
    output, gradient = gradients(model, inputs)
    assert output.shape == before.shape
    inherited_whole = operator == "mha" and not isinstance(host, SdpaHost)
    assert torch.allclose(output, before, rtol=1e-4, atol=1e-5) == inherited_whole
    assert record.new_parameters
    for name in record.new_parameters:
        if model.get_parameter(name).requires_grad:
            assert gradient[name].isfinite().all(), name
    paths = {site.path for site in host.sites(model) if site.role == role}
    assert record.operators.keys() == record.replaced.keys() == paths


def test_the_layout_is_that_of_the_input(host, model, inputs):
    operators = graft(model, plan("softmax")).operators
    run(model, inputs)
    (grid,) = {operator.tracker.grid for operator in operators.values()}
    assert grid == NON_SQUARE
    run(model, host.example(model, rows=3, cols=5, batch_size=1))
    assert LayoutTracker.of(model).grid == Grid(rows=3, cols=5)


def test_positional_arguments_give_the_same_layout(host, model, inputs):
    graft(model, plan("softmax"))
    first = next(iter(inspect.signature(model.forward).parameters))
    rest = {name: value for name, value in inputs.items() if name != first}
    output = model(inputs[first], **rest)
    assert LayoutTracker.of(model).grid == NON_SQUARE
    assert torch.equal(output if isinstance(output, Tensor) else output.sample, run(model, inputs))


def test_a_grid_read_in_another_shape_gives_another_output(host, model, inputs, monkeypatch):
    def outputs_with(operator):
        record = graft(model, plan(operator))
        with torch.no_grad():
            right = run(model, inputs)
            turned = Grid(NON_SQUARE.cols, NON_SQUARE.rows)
            with monkeypatch.context() as patch:
                patch.setattr(type(host), "image_grid", lambda *args: turned)
                wrong = run(model, inputs)
        record.undo()
        return right, wrong

    right, wrong = outputs_with({"name": "window-2d", "radius": 1})
    assert right.isfinite().all()
    assert not torch.allclose(right, wrong, rtol=1e-3)
    assert torch.equal(*outputs_with("softmax"))


@pytest.mark.parametrize("operator", [{"name": "window-2d", "radius": 1}, "hyena-x"])
def test_gradient_checkpointing_changes_nothing(host, model, inputs, operator):
    if not takes(host, "attention", operator):
        pytest.skip("this host takes kernels only")
    graft(model, plan(operator))
    output, gradient = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    again, again_gradient = gradients(model, inputs)
    assert torch.equal(output, again)
    assert all(torch.equal(g, again_gradient[name]) for name, g in gradient.items())


def test_two_models_with_two_grids_do_not_disturb_each_other(host, model, inputs):
    operator = {"name": "window-2d", "radius": 1}
    other, other_inputs = host.tiny().eval(), host.example(model, rows=4, cols=3, batch_size=1)
    graft(model, plan(operator))
    graft(other, plan(operator))
    alone, _ = gradients(model, inputs)
    other_alone, _ = gradients(other, other_inputs)
    first = run(model, inputs)
    second = run(other, other_inputs)
    (first.square().mean() + second.square().mean()).backward()
    assert torch.equal(first, alone)
    assert torch.equal(second, other_alone)


def test_a_copy_is_independent(host, model, inputs):
    operator = {"name": "window-2d", "radius": 1}
    graft(model, plan(operator))
    before, _ = gradients(model, inputs)
    twin = copy.deepcopy(model)
    assert LayoutTracker.of(twin) is not LayoutTracker.of(model)
    assert {m.tracker for m in twin.modules() if isinstance(m, KernelAttention)} == {LayoutTracker.of(twin)}
    run(twin, host.example(model, rows=3, cols=4, batch_size=1))
    assert LayoutTracker.of(model).grid == NON_SQUARE
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(run(model, inputs), before)


def test_state_dict_loads_strictly_into_a_second_model(host, model, inputs):
    kernels = plan({"name": "softmax", "projections": "random"})
    graft(model, kernels, seed=1)
    second = host.tiny().eval()
    graft(second, kernels, seed=2)
    assert not torch.allclose(run(second, inputs), run(model, inputs))
    second.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(run(second, inputs), run(model, inputs))


def test_undo_restores_the_model_exactly(host, model, inputs):
    state, modules = dict(model.state_dict(keep_vars=True)), dict(model.named_modules())
    output = run(model, inputs)
    record = graft(model, plan({"name": "linear", "projections": "random"}, blocks="odd"))
    assert not torch.equal(run(model, inputs), output)
    record.undo()
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[name] is tensor for name, tensor in state.items())
    assert all(module is modules[name] for name, module in model.named_modules())
    assert not model._forward_pre_hooks
    assert not model._forward_pre_hooks_with_kwargs
    assert torch.equal(run(model, inputs), output)


def test_blocks_are_declared_as_they_are_called(host, model, inputs):
    """Each gets its declared tokens in their places or by name, and returns them in the declared order."""
    blocks = host.blocks(model)
    num_blocks = len({s.block for s in host.sites(model)})
    assert [site.block for site in blocks] == list(range(num_blocks))
    for site in (site for site in blocks if not site.fixed):
        seen = []
        block = model.get_submodule(site.path)
        handle = block.register_forward_hook(lambda _, *call, seen=seen: seen.append(call), with_kwargs=True)
        run(model, inputs)
        handle.remove()
        ((args, kwargs, output),) = seen
        given = dict(zip(site.call.arguments, args, strict=False)) | kwargs
        outputs = [output] if isinstance(output, Tensor) else output
        assert [t.shape for t in outputs] == [given[name].shape for name in site.call.returns]
        assert {t.shape[-1] for t in outputs} == {site.dim}


@pytest.fixture(params=RESTRUCTURINGS)
def restructuring(request, host):
    edits = RESTRUCTURINGS[request.param]
    two_streams = len(host.blocks(host.tiny())[0].call.returns) > 1
    if two_streams and any(isinstance(edit, Merge) for edit in edits.edits):
        with pytest.raises(
            PlanError, match="blocks 0 and 1 give .*hidden_states and .*hidden_states: only one"
        ):
            graft(host.tiny(), edits)
        pytest.skip("blocks with two streams are not merged")
    return edits


def test_restructured_models_run_forward_and_backward(host, model, inputs, restructuring):
    with torch.no_grad():
        before = run(model, inputs)
    record = graft(model, restructuring)
    output, gradient = gradients(model, inputs)
    assert output.shape == before.shape
    assert not torch.allclose(output, before, rtol=1e-2)
    assert gradient.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(g.isfinite().all() for g in gradient.values())
    assert record.new_parameters == {
        n for path in record.operators for n, _ in model.named_parameters() if n.startswith(f"{path}.")
    }
    with torch.no_grad():
        assert_close("without gradients", run(model, inputs), output, 1e-5)


def test_restructured_models_are_undone_exactly(host, model, inputs, restructuring):
    state, modules = dict(model.state_dict(keep_vars=True)), dict(model.named_modules())
    output = run(model, inputs)
    record = graft(model, restructuring)
    with torch.no_grad():
        for name in record.new_parameters:
            model.get_parameter(name).zero_()
    record.undo()
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[name] is tensor for name, tensor in state.items())
    assert all(module is modules[name] for name, module in model.named_modules())
    assert not model._forward_pre_hooks
    assert torch.equal(run(model, inputs), output)


def test_restructured_models_are_saved_and_loaded(host, model, inputs, restructuring, tmp_path):
    record = graft(model, restructuring)
    with torch.no_grad():
        for name in record.new_parameters:
            model.get_parameter(name).add_(0.01)
    save_model(tmp_path, model, restructuring)
    loaded, plan_read = load_model(tmp_path)
    assert plan_read == restructuring
    assert list(loaded.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        assert torch.equal(run(loaded, inputs), run(model, inputs))


def test_restructured_models_take_gradient_checkpointing(host, model, inputs, restructuring):
    graft(model, restructuring)
    output, gradient = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    again, again_gradient = gradients(model, inputs)
    assert torch.equal(output, again)
    assert all(torch.equal(g, again_gradient[name]) for name, g in gradient.items())


def test_a_copy_of_a_restructured_model_is_independent(host, model, inputs, restructuring):
    graft(model, restructuring)
    with torch.no_grad():
        before = run(model, inputs)
        twin = copy.deepcopy(model)
        assert torch.equal(run(twin, inputs), before)
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(run(model, inputs), before)
        assert not torch.equal(run(twin, inputs), before)


def test_attention_that_is_not_sdpa_is_an_error(host, model, inputs, monkeypatch):
    graft(model, plan("softmax", blocks=0))
    path = host.sites(model)[0].path
    monkeypatch.setattr(model.get_submodule(f"{path}.attention"), "forward", lambda *args, **kwargs: args)
    with pytest.raises(HostError, match=r"called scaled_dot_product_attention 0 times"):
        run(model, inputs)


_COMPILE = """
import sys
import torch
from grafting.contract import Grid
from grafting.hosts import hosts
from grafting.editing.plan import Drop, Merge, Plan, Replace
from grafting.editing.surgery import graft

torch.manual_seed(0)
host = hosts()[sys.argv[1]]
takes_mixers = any(site.module for site in host.sites(host.tiny()) if site.role == "attention")
host = host.at_grid(Grid(4, 6))
edits = [("attention", "even", "window-2d"), ("attention", "odd", "hyena-x" if takes_mixers else "linear")]
edits += [("mlp", 0, "mlp")]
edits = [Replace(role=role, blocks=blocks, operator=operator) for role, blocks, operator in edits]
model = host.tiny().eval()
if sys.argv[2] == "restructured":
    edits = [Merge(blocks=[0, 1]), edits[1]] if takes_mixers else [Drop(blocks=0), edits[1]]
graft(model, Plan(edits=edits), host=host)
inputs = host.example(model, rows=4, cols=6, batch_size=2)

def forward_backward(model):
    output = model(**inputs)
    output = output if isinstance(output, torch.Tensor) else output.sample
    model.zero_grad()
    output.square().mean().backward()
    return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

want, want_gradients = forward_backward(model)
model.compile(fullgraph=True)
for _ in range(2):  # with and without a layout from an earlier pass
    got, gradients = forward_backward(model)
torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(gradients, want_gradients, rtol=1e-3, atol=1e-5)
with torch.no_grad():
    output = model(**inputs)
    torch.testing.assert_close(output if isinstance(output, torch.Tensor) else output.sample, want, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.slow
@pytest.mark.parametrize("edits", ["operators", "restructured"])
def test_compiles_whole(host, edits):
    """In a process of its own: beartype, which checks shapes in tests, cannot be compiled."""
    process = subprocess.run(
        [sys.executable, "-c", _COMPILE, host.name, edits],
        env=os.environ | {"JAXTYPING_DISABLE": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]

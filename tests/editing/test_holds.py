"""What people do to a model: offload it, cast it, copy it, differentiate it. It computes what it did, or one error says why not."""

import copy
import pickle
import warnings
from functools import partial

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from closeness import assert_close
from grafting.editing.plan import Drop, Merge, Plan, Replace
from grafting.editing.surgery import graft, resolve
from grafting.errors import HostError, PlanError
from grafting.hosts import hosts
from grafting.operators import operator_configs
from hiddenweights import hide_weights

CPU = torch.device("cpu")
HOSTS = {name: hosts()[name] for name in ("dit", "flux", "pixart", "sd3", "wan")}
SETTINGS = {"window-1d": {"window": 2}, "mamba2": {"weights": "separate"}}
PLANS = {
    "nothing": Plan(),
    **{
        f"{name}-{role}": Plan(edits=(Replace(role=role, operator={"name": name, **SETTINGS.get(name, {})}),))
        for name, config in operator_configs().items()
        for role in config.roles
    },
    "merge": Plan(edits=(Merge(blocks=[0, 1]), Replace(role="attention", blocks=0, operator="linear"))),
    "drop": Plan(edits=(Drop(blocks=[0]),)),
}


def run(model: nn.Module, inputs: dict) -> Tensor:
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output.sample


def fits(host: str, plan: Plan) -> bool:
    try:
        resolve(HOSTS[host].tiny(), plan)
    except PlanError:
        return False
    return True


def grafted(host: str, plan: Plan) -> tuple[nn.Module, dict]:
    torch.manual_seed(0)
    model = HOSTS[host].tiny().eval()
    graft(model, plan)
    return model, HOSTS[host].example(model, rows=6, cols=4, batch_size=2)


def offloaded(model, folder):
    return accelerate.cpu_offload(model, execution_device=CPU)


def offloaded_with_buffers(model, folder):
    """As diffusers' `enable_sequential_cpu_offload` does to each part of a pipeline."""
    return accelerate.cpu_offload(model, CPU, offload_buffers=len(model._parameters) > 0)


def on_disk(model, folder):
    return accelerate.disk_offload(model, folder, execution_device=CPU)


def partly_on_disk(model, folder):
    own = [name for name, _ in model.named_parameters(recurse=False)]
    first, *others = [name for name, part in model.named_children() if list(part.parameters())]
    places = {first: "disk"} | dict.fromkeys((*others, *own), "cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following device_map keys do not match any submodules")
        return accelerate.dispatch_model(model, places, main_device=CPU, offload_dir=folder)


def group_offloaded(model, folder):
    options = {"offload_type": "leaf_level", "offload_to_disk_path": str(folder)}
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, **options)
    return model


def copied(model, folder):
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    return twin


def pickled(model, folder):
    return pickle.loads(pickle.dumps(model))


def functional(model, folder):
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data.zero_()
    return lambda **inputs: torch.func.functional_call(model, parameters, (), inputs)


def hidden(model, folder):
    hide_weights(model)
    return model


HOLDS = {
    f.__name__: f
    for f in (
        offloaded,
        offloaded_with_buffers,
        on_disk,
        partly_on_disk,
        group_offloaded,
        copied,
        pickled,
        functional,
        hidden,
    )
}
QUICK = {
    "dit": ("hybrid-attention", "mamba2-attention", "mlp-hyena-x-mlp", "merge"),
    "flux": ("drop",),
    "pixart": ("hyena-se-attention",),
}
CASES = [
    pytest.param(host, name, marks=() if name in QUICK.get(host, ()) else pytest.mark.slow)
    for host in HOSTS
    for name, plan in PLANS.items()
    if fits(host, plan)
]
every_case = pytest.mark.parametrize(("host", "name"), CASES)


@every_case
@torch.no_grad()
def test_held_models_compute_the_same(host, name, tmp_path):
    model, inputs = grafted(host, PLANS[name])
    want = run(model, inputs)
    for hold in HOLDS:
        held = HOLDS[hold](grafted(host, PLANS[name])[0], tmp_path / hold)
        for time in ("once", "again"):
            assert torch.equal(run(held, inputs), want), f"{hold}, {time}"


@every_case
@torch.no_grad()
def test_layers_stored_in_fp8_compute_in_full_precision(host, name):
    model, inputs = grafted(host, PLANS[name])
    want = copy.deepcopy(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    rounded = {n: p for n, p in model.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert len(rounded) > 10
    for n, parameter in rounded.items():
        want.get_parameter(n).copy_(parameter.float())
    assert torch.equal(run(model, inputs), run(want, inputs))


@every_case
def test_forward_derivatives(host, name):
    """`torch.func.jvp` against central differences in double precision; torch has it for the plain attention alone."""
    model, inputs = grafted(host, PLANS[name])
    image = next(iter(inputs))
    direction = torch.randn_like(inputs[image])
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        _, got = torch.func.jvp(lambda x: run(model, inputs | {image: x}), (inputs[image],), (direction,))
        exact, size = model.double(), 1e-3
        in_double = partial(_to, dtype=torch.float64)
        after, before = (
            run(exact, in_double(inputs | {image: inputs[image] + sign * size * direction}))
            for sign in (1, -1)
        )
    assert_close("derivative", got.double(), (after - before) / (2 * size), 1e-3)


def _to(inputs, dtype):
    if isinstance(inputs, dict):
        return {name: _to(value, dtype) for name, value in inputs.items()}
    return inputs.to(dtype) if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs


@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_forward_called_past_the_model_says_so(host):
    """It would not set the token layout: the last one may have been another."""
    plan = PLANS["window-2d-attention"]
    model, inputs = grafted(host, plan)
    turned = HOSTS[host].example(model, rows=4, cols=6, batch_size=2)
    with pytest.raises(HostError, match="no forward pass of its model has set the token layout"):
        model.forward(**turned)
    run(model, inputs)
    with pytest.raises(HostError, match=r"outside of a forward pass.*call model\(...\), not model.forward"):
        model.forward(**turned)


@pytest.mark.parametrize("hold", [offloaded, group_offloaded], ids=lambda f: f.__name__)
def test_a_graft_comes_before_offloading(hold, tmp_path):
    model = hold(HOSTS["dit"].tiny(), tmp_path)
    with pytest.raises(
        PlanError, match=r"the attention of block 0 is offloaded or cast by hooks.*graft first"
    ):
        graft(model, PLANS["linear-attention"])


def test_a_graft_comes_before_casting():
    model = HOSTS["pixart"].tiny()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(PlanError, match=r"offloaded or cast by hooks \(layerwise_casting\).*graft first"):
        graft(model, PLANS["hyena-x-attention"])


def test_grafted_sites_keep_the_native_backend_when_all_others_change():
    """Flux has one block of either kind left ungrafted; the counting backend stands for any that torch does not answer."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    model, inputs = grafted(
        "flux", Plan(edits=(Replace(role="attention", blocks=[0], operator="window-2d"),))
    )
    native, calls, want = _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE], [], None
    with torch.no_grad():
        want = run(model, inputs)

    def counting(*args, **kwargs):
        calls.append(1)
        with torch._C.DisableTorchFunction():
            return native(*args, **kwargs)

    other = _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH]
    active = _AttentionBackendRegistry._active_backend
    _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH] = counting
    try:
        model.set_attention_backend("_native_math")
        with torch.no_grad():
            assert torch.equal(run(model, inputs), want)
        assert len(calls) == 2
    finally:
        _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH] = other
        _AttentionBackendRegistry.set_active_backend(active)


class Int8(torch.Tensor):
    """A quantised weight, as torchao's: a subclass that linears take and that is plain numbers nowhere else."""

    __module__ = "torchao.standin"

    @staticmethod
    def __new__(cls, weight):
        made = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)
        made.scale = weight.abs().amax(1, keepdim=True) / 127
        made.values = (weight / made.scale).round().to(torch.int8)
        return made

    def plain(self):
        return self.values * self.scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            x, weight, *bias = args
            return func(x, weight.plain(), *bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} of a quantised weight")


def quantise(model):
    for part in model.modules():
        if type(part) is nn.Linear:
            part.weight = nn.Parameter(Int8(part.weight.detach()), requires_grad=False)


@torch.no_grad()
def test_quantised_after_a_graft_it_computes_with_the_rounded_weights():
    for name in ("mamba2-attention", "window-2d-attention", "mlp-mlp"):
        model, inputs = grafted("dit", PLANS[name])
        want = copy.deepcopy(model)
        quantise(model)
        for path, part in model.named_modules():
            if isinstance(part, nn.Linear) and isinstance(part.weight.data, Int8):
                want.get_submodule(path).weight.copy_(part.weight.data.plain())
        assert_close(name, run(model, inputs), run(want, inputs), 1e-6)


@pytest.mark.parametrize(
    ("operator", "role", "words"),
    [
        ("hyena-x", "attention", "which hyena-x cannot inherit: graft first"),
        ({"name": "mlp", "ratio": 2}, "mlp", "which mlp cannot inherit: graft first"),
        (
            {"name": "linear", "projections": "random"},
            "attention",
            "which linear cannot draw again: graft first",
        ),
    ],
)
def test_a_quantised_model_has_nothing_to_inherit(operator, role, words):
    model = HOSTS["dit"].tiny()
    quantise(model)
    plan = Plan(edits=(Replace(role=role, blocks=[1], operator=operator),))
    with pytest.raises(
        PlanError, match=rf"of block 1 holds quantised weights \(\w+.weight is a Int8 of float32\), {words}"
    ):
        graft(model, plan)


@pytest.mark.parametrize("name", ["mamba2-attention", "window-2d-attention"])
def test_adapters_on_a_grafted_model_add_what_they_should(name):
    peft = pytest.importorskip("peft")
    model, inputs = grafted("dit", PLANS[name])
    want = copy.deepcopy(model)
    linears = [path for path, part in model.named_modules() if type(part) is nn.Linear and ".attn" in path]
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=linears, init_lora_weights=False), model)
    with torch.no_grad():
        for path in linears:
            want.get_submodule(path).weight.add_(model.get_submodule(path).get_delta_weight("default"))
        assert_close(name, run(model, inputs), run(want, inputs), 1e-5)

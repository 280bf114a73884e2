"""Every operator computes on CUDA what it computes on the CPU, in outputs and gradients."""

import copy
from dataclasses import replace

import pytest
import torch

from closeness import assert_close
from grafting.contract import TokenLayout
from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import build_operators, place
from grafting.hosts import hosts
from grafting.operators import operator_configs
from operatorcases import (
    KERNELS,
    LAYOUTS,
    built,
    describe,
    every_fit,
    every_variant,
    inputs_for,
    ordinary,
    site_for,
)

pytestmark = pytest.mark.gpu
HOST = hosts()["dit"]
SETTINGS = {"window-1d": {"window": 2}}
PLACES = [
    (role, name)
    for name, config in operator_configs().items()
    for role in config.roles
    if name != "window-3d"
]


def moved(layout: TokenLayout, device: torch.device) -> TokenLayout:
    return layout if layout.key_mask is None else replace(layout, key_mask=layout.key_mask.to(device))


def computed(operator, inputs, layout, device, *, bf16=False):
    """The output of a copy on a device, and the gradients of inputs and parameters."""
    operator = copy.deepcopy(operator).to(device)
    inputs = [x.detach().to(device).requires_grad_() for x in inputs]
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        y = operator(*inputs, moved(layout, device))
    assert y.device.type == device.type
    y.float().square().mean().backward()
    tensors = {"output": y.detach(), **{f"input {i}": x.grad for i, x in enumerate(inputs)}}
    tensors |= {name: p.grad for name, p in operator.named_parameters() if p.grad is not None}
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def assert_same(got, want, *, output, gradients):
    assert got.keys() == want.keys()
    largest = max(tensor.abs().max() for name, tensor in want.items() if name != "output")
    for name, tensor in want.items():
        if name == "output" or tensor.abs().max() > 1e-5 * largest:
            assert_close(name, got[name], tensor, output if name == "output" else gradients)
        else:  # zero but for rounding, such as of the query of a single key
            assert got[name].abs().max() <= 1e-4 * largest, name


@every_fit
def test_outputs_and_gradients_are_those_of_the_cpu(config, layout, device):
    operator, inputs = built(config, layout), inputs_for(config, layout)
    want, got = (computed(operator, inputs, layout, d) for d in (torch.device("cpu"), device))
    assert_same(got, want, output=1e-4, gradients=1e-3)


@every_variant
def test_bf16_comes_close(config, device):
    """Close to fp32 on the CPU, from the weights that operators start with."""
    operator, inputs = config.build(site_for(config)), inputs_for(config, ordinary(config))
    want = computed(operator, inputs, ordinary(config), torch.device("cpu"))
    got = computed(operator, inputs, ordinary(config), device, bf16=True)
    assert got["output"].isfinite().all()
    assert_close("output", got["output"].float(), want["output"], 0.1)
    assert all(tensor.isfinite().all() for tensor in got.values())


@pytest.mark.parametrize("only_image", [False, True])
@pytest.mark.parametrize("config", KERNELS, ids=describe)
def test_hidden_keys_are_those_of_the_cpu(config, only_image, device):
    layout = LAYOUTS[-1]
    mask = torch.ones(2, layout.num_tokens, dtype=torch.bool)
    mask[0, [1, -1]] = mask[1, [-2, layout.before + 7]] = False
    masked = replace(layout, key_mask=mask, image_queries=only_image)
    operator, (q, k, v) = built(config, layout), inputs_for(config, layout)
    if only_image:
        q = q[:, :, layout.image_slice]
    seen = mask[:, layout.image_slice] if only_image else mask
    outputs = []
    for d in (torch.device("cpu"), device):
        with torch.no_grad():
            y = copy.deepcopy(operator).to(d)(*(x.to(d) for x in (q, k, v)), moved(masked, d)).cpu()
        outputs.append(y[seen[:, None].expand(y.shape[:3])])
    assert_close("output", outputs[1], outputs[0], 1e-4)


@pytest.mark.parametrize("randomised", [False, True])
@pytest.mark.parametrize(("role", "name"), PLACES)
def test_operators_built_for_a_model_on_cuda_are_those_built_on_the_cpu(role, name, randomised, device):
    plan = Plan(edits=(Replace(role=role, operator={"name": name, **SETTINGS.get(name, {})}),))
    plan = plan.randomised() if randomised else plan
    model = HOST.tiny().eval()
    inputs = HOST.example(model, rows=8, cols=8, batch_size=2)
    there = copy.deepcopy(model).to(device)
    want, got = (build_operators(m, plan, seed=3) for m in (model, there))
    for path, operator in want.items():
        found = got[path].state_dict()
        for key, tensor in operator.state_dict().items():
            # what is inherited may be rounded in another order
            assert_close(f"{path}.{key}", found[key].cpu(), tensor, 1e-4)
    for m, operators in ((model, want), (there, got)):
        place(m, operators)
    assert {p.device.type for p in there.parameters()} == {device.type}
    with torch.no_grad():
        assert_close(
            "output", there(**{k: x.to(device) for k, x in inputs.items()}).cpu(), model(**inputs), 1e-3
        )

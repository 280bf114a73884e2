"""Straight paths: the process is diffusers', and both stages run on the hosts that are trained with it."""

import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from closeness import assert_close
from grafting.contract import NoiseProcess
from grafting.diffusion import Diffusion, FlowMatching
from grafting.distillation import DistillConfig, distill
from grafting.finetuning import FinetuneConfig, finetune
from grafting.hosts import hosts
from grafting.plan import Plan, Replace
from grafting.surgery import build_operators, place

X, NOISE = torch.randn(2, 6, 4, 3, 5, generator=torch.Generator().manual_seed(0)).unbind()
PROCESSES = {
    "flux": FlowMatching(),
    "sd3": FlowMatching(scale=1000.0, shift=3.0),
    "wan": FlowMatching(scale=1000.0),
}


class Prompts:
    """Random latents, each with one of four prompts."""

    num_classes = 4

    def __init__(self, *shape: int):
        self.x = torch.randn(48, *shape, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[indices], indices % 4


def of_prompts(host, inputs: dict[str, torch.Tensor]):
    """The host's call, of latents with the number of a prompt in the place of its embedding."""
    names = [name for name in ("encoder_hidden_states", "pooled_projections") if name in inputs]

    def predict(model, x_t, t, labels):
        return host.predict(model, x_t, t, {name: inputs[name][labels] for name in names})

    return predict


@pytest.mark.parametrize("process", [Diffusion(), *PROCESSES.values()])
def test_processes_keep_their_promise(process):
    assert isinstance(process, NoiseProcess)
    t = process.draw_steps(1000, torch.Generator().manual_seed(0))
    ends = process.steps_at(torch.tensor([0.0, 1.0]))
    assert ((t >= ends[0]) & (t <= ends[1])).all()
    assert torch.equal(t, process.draw_steps(1000, torch.Generator().manual_seed(0)))
    x_t = process.add_noise(X[:2], NOISE[:2], ends)
    assert_close("clean", x_t[0], X[0], 0.02)
    assert_close("noise", x_t[1], NOISE[1], 0.02)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_paths_are_those_of_diffusers(scale):
    scheduler = FlowMatchEulerDiscreteScheduler()
    steps = scheduler.timesteps[[999, 700, 400, 99, 50, 0]]
    want = scheduler.scale_noise(X, steps, NOISE)
    got = FlowMatching(scale=scale).add_noise(X, NOISE, steps / 1000 * scale)
    assert_close("x_t", got, want, 1e-6)


def test_steps_are_shifted_as_those_of_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    plain, shifted = (
        FlowMatching(shift=s).draw_steps(9, torch.Generator().manual_seed(0)) for s in (1.0, 3.0)
    )
    assert_close("shifted", shifted, 3 * plain / (1 + 2 * plain), 1e-6)
    # diffusers shifts its own grid: 0.5 becomes 0.75
    assert scheduler.sigmas[500].item() == pytest.approx(3 * 0.5 / (1 + 2 * 0.5), abs=1e-6)


def test_the_loss_is_that_of_the_velocity():
    t = torch.full((6,), 0.3)
    process = FlowMatching()
    facts = {"x": X, "x_t": process.add_noise(X, NOISE, t), "noise": NOISE, "t": t}
    assert torch.equal(process.loss(NOISE - X, **facts), torch.zeros(6))
    assert_close("loss", process.loss(NOISE - X + 2, **facts), torch.full((6,), 4.0), 1e-5)
    # where the velocity leads from x_t
    assert_close("x", facts["x_t"] - 0.3 * (NOISE - X), X, 1e-5)


@pytest.mark.parametrize("name", PROCESSES)
def test_both_stages_train(name):
    host, process = hosts()[name], PROCESSES[name]
    teacher = host.tiny().eval()
    inputs = host.example(teacher, rows=4, cols=4, batch_size=4)
    frames = (2,) if name == "wan" else ()
    data = Prompts(4, *frames, 8, 8)
    how = {"predict": of_prompts(host, inputs), "diffusion": process}
    operator = {"name": "softmax", "projections": "random"}
    operators = build_operators(
        teacher, Plan(edits=(Replace(role="attention", blocks=[1], operator=operator),))
    )
    config = DistillConfig(steps=100, batch_size=8, lr=1e-2, holdout=8, holdout_every=100)
    roles = dict.fromkeys(operators, "attention")
    steps = list(distill(teacher, operators, data, config, roles=roles, **how))
    (path,) = operators
    assert steps[-1].values[f"r2/{path}"] > max(0.3, steps[0].values[f"r2/{path}"])

    student = copy.deepcopy(teacher)
    place(student, operators)
    config = FinetuneConfig(steps=20, batch_size=8, lr=1e-3, warmup_steps=0, ema_decay=0.5, output_weight=1.0)
    losses = [step.values["loss"] for step in finetune(student, data, config, teacher=teacher, **how)]
    assert sum(losses[-5:]) < sum(losses[:5])

"""Straight paths: the process is diffusers', and both stages run on the hosts that are trained with it."""

import copy
import math
from typing import ClassVar

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from pydantic import ValidationError

from closeness import assert_close
from grafting.contract import Conditions, NoiseProcess
from grafting.diffusion import Diffusion, FlowConfig, FlowMatching, ShiftBySize
from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import build_operators, place
from grafting.errors import ProtocolError
from grafting.hosts import hosts
from grafting.machine.randomness import generator
from grafting.sampling.chain import SamplingConfig, check_sampling, sample
from grafting.training.batches import draw
from grafting.training.distillation import DistillConfig, distill
from grafting.training.finetuning import FinetuneConfig, finetune
from toydata import denoiser

X, NOISE = torch.randn(2, 6, 4, 3, 5, generator=torch.Generator().manual_seed(0)).unbind()
PROCESSES = {
    "flux": FlowMatching(),
    "sd3": FlowMatching(scale=1000.0, shift=3.0),
    "wan": FlowMatching(scale=1000.0),
}
LINE = ShiftBySize(base=0.5, max=1.15, base_tokens=256, max_tokens=4096)


class Latents:
    """Random latents, each with one of four prompts."""

    num_classes = 4

    def __init__(self, *shape: int):
        self.x = torch.randn(48, *shape, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[indices], indices % 4


class Prompts:
    """The first four prompts of an example's inputs; the last stands for none, and is asked for in a third of the batches."""

    dropout = 0.3
    identity: ClassVar = {"name": "example"}

    def __init__(self, inputs: dict[str, torch.Tensor]):
        names = ("encoder_hidden_states", "pooled_projections")
        self.tensors = {name: inputs[name] for name in names if name in inputs}

    def __len__(self) -> int:
        return 4

    def nulls(self, numbers: torch.Tensor) -> torch.Tensor:
        return torch.full_like(numbers, 4)

    def at(self, numbers: torch.Tensor, *, shape, device, dtype) -> dict[str, torch.Tensor]:
        return {name: tensor[numbers].to(device, dtype) for name, tensor in self.tensors.items()}

    def words(self, number: int) -> str:
        return f"prompt {number}"


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


def test_a_shift_by_size_goes_along_a_line():
    assert [LINE.at(n) for n in (256, 4096)] == pytest.approx([math.exp(0.5), math.exp(1.15)])
    linear = ShiftBySize(base=1.0, max=3.0, base_tokens=100, max_tokens=300, kind="linear")
    assert [linear.at(n) for n in (100, 150, 500)] == pytest.approx([1.0, 1.5, 5.0])


def test_training_and_sampling_have_the_shift_of_the_size():
    process = FlowMatching(shift_by_size=LINE, token_size=4)
    for shape, tokens in (((4, 32, 32), 256), ((4, 16, 24), 96), ((4, 2, 16, 24), 192)):
        plain = FlowMatching(shift=LINE.at(tokens))
        drawn = [p.at(shape).draw_steps(9, torch.Generator().manual_seed(0)) for p in (process, plain)]
        assert torch.equal(*drawn)
        how = denoiser(process=process)
        batch = draw(
            (torch.zeros(9, *shape), torch.zeros(9).long()), generator(0), batch_size=9, denoiser=how
        )
        same = draw(
            (torch.zeros(9, *shape), torch.zeros(9).long()),
            generator(0),
            batch_size=9,
            denoiser=denoiser(process=plain),
        )
        assert torch.equal(batch.t, same.t)
        for sampler in process.samplers:
            how = {"steps": 5, "clip": False, "streams": []}
            chains = [[t for t, _ in p.at(shape).chain(sampler, **how)] for p in (process, plain)]
            last = slice(
                0, 4 if sampler == "euler" else 5
            )  # a fixed shift moves the last of Euler's own steps twice
            assert chains[0][last] == pytest.approx(chains[1][last], rel=1e-2 if sampler == "euler" else 1e-9)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("spacing", ["ends", "even"])
def test_eulers_steps_by_size_and_to_a_terminal_are_those_of_diffusers(spacing, kind):
    line = ShiftBySize(base=1.0, max=2.0, kind=kind)
    process = FlowMatching(spacing=spacing, shift_by_size=line, token_size=4, terminal=0.1).at((4, 64, 64))
    got = [t for t, _ in process.chain("euler", steps=4, clip=False, streams=[])]
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type=kind, shift_terminal=0.1
    )
    steps = {"sigmas": [1, 0.75, 0.5, 0.25]} if spacing == "even" else {"num_inference_steps": 4}
    scheduler.set_timesteps(**steps, mu=1.0 + (1024 - 256) / (4096 - 256))
    assert got == pytest.approx((scheduler.timesteps / 1000).tolist(), rel=1e-6)
    assert got[-1] == pytest.approx(0.1)


def test_configs_of_before_are_written_as_before():
    assert FlowConfig(shift=3).model_dump(mode="json") == {"name": "flow", "shift": 3.0}
    assert FlowConfig(shift=3).build(scale=1.0).identity == {"name": "flow", "scale": 1.0, "shift": 3.0}
    config = FlowConfig(shift_by_size=LINE, terminal=0.1, spacing="even")
    written = config.model_dump(mode="json")
    assert written.keys() == {"name", "spacing", "shift_by_size", "terminal"}
    assert FlowConfig.model_validate(written) == config
    assert config.build(scale=1.0).identity == {**written, "scale": 1.0}


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"shift": 3, "shift_by_size": {}}, "shift_by_size takes the place of shift: name one of them"),
        ({"shift_by_size": {"base_tokens": 4096}}, "base_tokens is the smaller size: found 4096, and max_tokens 4096"),
        ({"shift_by_size": {"base": 0.0, "kind": "linear"}}, "a shift is positive: found base 0 and max 1.15"),
        ({"terminal": 1.0}, "less than 1"),
    ],
)  # fmt: skip
def test_faults_of_a_shift_by_size(asked, told):
    with pytest.raises(ValidationError, match=told):
        FlowConfig.model_validate({"name": "flow", **asked})


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
    prompts = Prompts(host.example(teacher, rows=4, cols=4, batch_size=5))
    assert isinstance(prompts, Conditions)
    frames = (2,) if name == "wan" else ()
    data = Latents(4, *frames, 8, 8)
    how = {"denoiser": host.denoiser(teacher, prompts, process)}
    operator = {"name": "softmax", "projections": "random"}
    operators = build_operators(
        teacher, Plan(edits=(Replace(role="attention", blocks=[1], operator=operator),))
    )
    config = DistillConfig(steps=100, batch_size=8, lr=1e-2, holdout=8, holdout_every=100)
    steps = list(distill(teacher, operators, data, config, **how))
    (path,) = operators
    assert steps[-1].values[f"r2/{path}"] > max(0.3, steps[0].values[f"r2/{path}"])

    student = copy.deepcopy(teacher)
    place(student, operators)
    config = FinetuneConfig(steps=20, batch_size=8, lr=1e-3, warmup_steps=0, ema_decay=0.5, output_weight=1.0)
    losses = [step.values["loss"] for step in finetune(student, data, config, teacher=teacher, **how)]
    assert sum(losses[-5:]) < sum(losses[:5])


def velocity_to(known: torch.Tensor, scale: float):
    """A model that knows the image: its velocity leads from x_t straight to it."""
    return lambda model, x, t, y: (x - known) / (t / scale).view(-1, *[1] * (x.ndim - 1)).clamp(min=1e-6)


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 3, 4, 6)])
@pytest.mark.parametrize("num_steps", [1, 2, 20])
@pytest.mark.parametrize("sampler", FlowMatching().samplers)
def test_chains_of_any_length_recover_what_the_model_knows(sampler, num_steps, shape):
    known = torch.linspace(-0.9, 0.9, math.prod(shape)).view(1, *shape)
    process = FlowMatching(scale=1000.0, shift=3.0)
    config = SamplingConfig(sampler=sampler, steps=num_steps, cfg_scale=1, num_images=2)
    how = denoiser(velocity_to(known, 1000.0), process=process)
    (batch,) = sample(torch.nn.Linear(1, 1), config, denoiser=how, shape=shape)
    # diffusers' DPM-Solver++ ends at its smallest sigma's clean image, from times rounded to whole numbers
    assert_close(sampler, batch.x, known.expand(2, *known.shape[1:]), 0.05 if "dpm" in sampler else 1e-4)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_eulers_steps_are_those_of_a_pipeline(scale):
    """SD3's loop: the scheduler's own steps, told to the model in its unit."""
    torch.manual_seed(0)
    weight = torch.randn(4, 4)
    seen = []

    def predict(model, x, t, y):
        seen.append(t[0].item())
        return torch.einsum("oc,bchw->bohw", weight, x) * (t / scale).view(-1, 1, 1, 1)

    config = SamplingConfig(sampler="euler", steps=4, cfg_scale=1, num_images=1)
    how = denoiser(predict, process=FlowMatching(scale=scale, shift=3.0))
    (batch,) = sample(torch.nn.Linear(1, 1), config, denoiser=how, shape=(4, 2, 2))

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    x = torch.randn(4, 2, 2, generator=generator(0, 0))[None]
    for t in scheduler.timesteps:
        velocity = torch.einsum("oc,bchw->bohw", weight, x) * (t / 1000)
        x = scheduler.step(velocity, t, x).prev_sample
    assert_close("x", batch.x, x, 1e-5)
    assert seen == pytest.approx([scale * t / 1000 for t in scheduler.timesteps.tolist()], rel=1e-6)


def test_heun_calls_the_model_twice_per_step_but_the_last():
    calls = []

    def predict(model, x, t, y):
        calls.append(t[0].item())
        return x

    config = SamplingConfig(sampler="heun", steps=5, cfg_scale=1, num_images=1)
    list(
        sample(
            torch.nn.Linear(1, 1), config, denoiser=denoiser(predict, process=FlowMatching()), shape=(1, 2, 2)
        )
    )
    assert len(calls) == config.calls == 9


def test_samplers_of_another_process_are_refused():
    flow, noise = denoiser(process=FlowMatching()), denoiser()
    with pytest.raises(
        ProtocolError, match="sampler ddpm does not run a predicted velocity, which takes euler, heun"
    ):
        check_sampling(SamplingConfig(), denoiser=flow)
    with pytest.raises(ProtocolError, match="sampler heun does not run predicted noise, which takes ddpm"):
        check_sampling(SamplingConfig(sampler="heun"), denoiser=noise)
    with pytest.raises(ProtocolError, match="euler has no clean image to clip"):
        check_sampling(SamplingConfig(sampler="euler", clip=True), denoiser=flow)
    with pytest.raises(ProtocolError, match="dpm-solver\\+\\+ takes at most 999 steps; found 1000"):
        check_sampling(SamplingConfig(sampler="dpm-solver++", steps=1000), denoiser=noise)

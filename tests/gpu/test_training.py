"""Calibration, stage 1 and stage 2 on CUDA: close to the CPU's figures, and the same when killed and resumed, there or elsewhere."""

import copy
import os

import pytest
import torch
from torch.utils._pytree import tree_map_only

from closeness import assert_close
from grafting.editing.plan import Merge, Plan, Replace
from grafting.editing.surgery import build_operators, graft, sharing_copy
from grafting.hosts import hosts
from grafting.machine.randomness import seeded
from grafting.training import finetuning, student
from grafting.training.calibration import CalibrateConfig, calibrate
from grafting.training.distillation import DistillConfig, distill
from grafting.training.finetuning import FinetuneConfig, finetune
from plainprocess import in_a_plain_process
from toydata import denoiser, noise_images

pytestmark = pytest.mark.gpu
HOST = hosts()["dit"]
CPU = torch.device("cpu")
DATA = noise_images(64, size=16)
PLAN = Plan(
    edits=(
        Replace(
            role="attention", blocks=[0], operator={"name": "window-2d", "radius": 1, "projections": "random"}
        ),
        Replace(role="attention", blocks=[1], operator={"name": "hyena-x", "kernel_size": 3}),
        Replace(role="mlp", blocks=[2], operator={"name": "mlp", "ratio": 2}),
    )
)
MERGED = Plan(edits=(Merge(blocks="1-2"), Replace(role="attention", blocks=[0], operator="linear")))


def train_on(device, monkeypatch):
    """Stage 2 trains on the default device, which is this."""
    for module in (finetuning, student):
        monkeypatch.setattr(module, "default_device", lambda: device)


@pytest.fixture(autouse=True)
def _there(device, monkeypatch):
    train_on(device, monkeypatch)


def setup(device, plan=PLAN):
    """A teacher on a device with its operators; the same at every call."""
    torch.manual_seed(3)
    teacher = HOST.tiny().eval().to(device)
    return teacher, build_operators(teacher, plan)


def stage_1(device, *, plan=PLAN, state=None, folder=None, **settings):
    teacher, operators = setup(device, plan)
    config = DistillConfig(**{"steps": 6, "batch_size": 8, "holdout": 16, "holdout_every": 3} | settings)
    return operators, distill(
        teacher, operators, DATA, config, denoiser=denoiser(), cache_folder=folder, state=state
    )


def to_cpu(value):
    return tree_map_only(torch.Tensor, lambda x: x.detach().cpu().clone(), value)


def curves(steps, *, state_at=None):
    """Every step's values, and a state as it is read from disk, on the CPU."""
    values, state = [], None
    for step in steps:
        values.append(step.values)
        if step.done == state_at:
            state = to_cpu(copy.deepcopy(step.state()))
    return values, state


def assert_like(got, want, *, rel):
    assert [v.keys() for v in got] == [v.keys() for v in want]
    for found, wanted in zip(got, want, strict=True):
        assert found == pytest.approx(wanted, rel=rel, abs=rel / 10)


def assert_same_weights(got, want, ratio):
    """As a whole: a parameter without effect, as the bias of keys, follows the rounding of its gradient."""
    found, wanted = (
        torch.cat([tensor.flatten().cpu() for o in operators.values() for tensor in o.state_dict().values()])
        for operators in (got, want)
    )
    assert_close("weights", found, wanted, ratio)


STAGE_1 = {
    "streamed": {},
    "student's inputs": {"inputs": "student"},
    "merged": {"plan": MERGED},
    "in parts": {"accumulate": 2},
    "stacked": {"stacked": True},
    "on disk": {"cache_samples": 12, "batch_size": 6, "steps": 5},
}


@pytest.mark.parametrize("name", STAGE_1)
def test_stage_1_is_that_of_the_cpu_and_is_resumed(name, device, tmp_path):
    settings = STAGE_1[name]
    want, _ = curves(stage_1(CPU, folder=tmp_path / "cpu", **settings)[1])
    whole, steps = stage_1(device, folder=tmp_path / "a", **settings)
    got, state = curves(steps, state_at=4)
    assert_like(got, want, rel=1e-2)
    resumed, steps = stage_1(device, folder=tmp_path / "a", state=state, **settings)
    rest, _ = curves(steps)
    assert_like(rest, got[5:], rel=1e-3)
    assert_same_weights(resumed, whole, 1e-2)
    assert {p.device.type for o in whole.values() for p in o.parameters()} == {device.type}


@pytest.mark.parametrize("first", ["cpu", "device"])
def test_stage_1_goes_on_elsewhere(first, device):
    here, there = (CPU, device) if first == "cpu" else (device, CPU)
    want, state = curves(stage_1(here)[1], state_at=4)
    resumed, steps = stage_1(there, state=state)
    got, _ = curves(steps)
    assert_like(got, want[5:], rel=1e-2)
    assert {p.device.type for o in resumed.values() for p in o.parameters()} == {there.type}


def test_stage_1_in_bf16(device):
    want, _ = curves(stage_1(CPU)[1])
    got, state = curves(stage_1(device, precision="bf16")[1], state_at=4)
    assert_like(got, want, rel=0.2)
    rest, _ = curves(stage_1(device, precision="bf16", state=state)[1])
    assert_like(rest, got[5:], rel=1e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_calibration_is_that_of_the_cpu(precision, device):
    found = []
    for where, how in ((CPU, "fp32"), (device, precision)):
        teacher, operators = setup(where)
        config = CalibrateConfig(samples=64, batch_size=32, precision=how)
        *_, last = calibrate(teacher, operators, DATA, config, denoiser=denoiser())
        found.append((last.values, operators))
    (want, fitted), (got, there) = found
    tolerance = 1e-3 if precision == "fp32" else 0.05
    assert got == pytest.approx(want, rel=tolerance, abs=tolerance)
    if precision == "fp32":
        assert_same_weights(there, fitted, 0.05)


BASE = {"steps": 4, "batch_size": 8, "lr": 1e-3, "warmup_steps": 1, "ema_decay": 0.9, "precision": "fp32"}
LORA = {"lora": {"rank": 2, "alpha": 4}}
STAGE_2 = {
    "whole": [{}],
    "in parts": [{"accumulate": 2}],
    "checkpointed": [{"gradient_checkpointing": True}],
    "averages on the cpu": [{"ema_device": "cpu"}],
    "teacher's output": [{"output_weight": 1.0}],
    "operators, then adapters": [{"trainable": "new"}, {"trainable": LORA, "steps": 2}],
    "guarded": [{"guard": {"policy": "rollback", "window": 2}}],
}
BF16 = {
    "bf16": [{"precision": "bf16"}],
    "held in bf16": [
        {"trainable": ["new", LORA], "precision": "bf16", "frozen": "bf16", "output_weight": 1.0}
    ],
}


def stage_2(phases, *, state=None, **settings):
    if any("lora" in str(phase) for phase in phases):
        pytest.importorskip("peft")
    torch.manual_seed(3)
    teacher = HOST.tiny().eval()
    model = sharing_copy(teacher)
    graft(model, PLAN)
    configs = [FinetuneConfig(**BASE | phase | settings) for phase in phases]
    options = {"denoiser": denoiser(), "blocks": [f"blocks.{i}" for i in range(3)], "teacher": teacher}
    return model, finetune(model, DATA, configs, **options, state=state)


@pytest.mark.parametrize("name", STAGE_2)
def test_stage_2_is_that_of_the_cpu_and_is_resumed(name, device, monkeypatch):
    whole, steps = stage_2(STAGE_2[name])
    got, state = curves(steps, state_at=3)
    resumed, steps = stage_2(STAGE_2[name], state=state)
    rest, _ = curves(steps)
    assert_like(rest, got[3:], rel=1e-3)
    assert_same_weights({"": resumed}, {"": whole}, 1e-2)
    assert {p.device.type for p in whole.parameters()} == {device.type}
    train_on(CPU, monkeypatch)
    want, elsewhere = curves(stage_2(STAGE_2[name])[1], state_at=3)
    assert_like(got, want, rel=2e-2)
    # a state of one device goes on on the other
    _, steps = stage_2(STAGE_2[name], state=state)
    assert_like(curves(steps)[0], want[3:], rel=2e-2)
    train_on(device, monkeypatch)
    _, steps = stage_2(STAGE_2[name], state=elsewhere)
    assert_like(curves(steps)[0], want[3:], rel=2e-2)


@pytest.mark.parametrize("name", BF16)
def test_stage_2_in_bf16(name, device):
    fp32 = [{**phase, "precision": "fp32", "frozen": "fp32"} for phase in BF16[name]]
    want, _ = curves(stage_2([{k: v for k, v in p.items() if k != "frozen"} for p in fp32])[1])
    whole, steps = stage_2(BF16[name])
    got, state = curves(steps, state_at=3)
    assert_like([{"loss": v["loss"]} for v in got], [{"loss": v["loss"]} for v in want], rel=0.1)
    resumed, steps = stage_2(BF16[name], state=state)
    assert_like(curves(steps)[0], got[3:], rel=1e-2)
    assert_same_weights({"": resumed}, {"": whole}, 1e-2)
    assert {p.dtype for p in whole.parameters()} == {torch.float32}


def test_compiled_stages_learn_the_same(device):
    if device.type == "cpu":
        pytest.skip("torch.compile on the CPU is tried elsewhere")
    in_a_plain_process(check_compiled_stages)


def check_compiled_stages():
    device = torch.device(os.environ.get("GRAFTING_TEST_DEVICE", "cuda"))
    plain, compiled = (curves(stage_1(device, steps=3, compile=c)[1])[0] for c in (False, True))
    assert_like(compiled, plain, rel=1e-2)
    plain, compiled = (
        curves(stage_2([{}], steps=3, precision="bf16", compile=c)[1])[0] for c in (False, True)
    )
    assert_like(compiled, plain, rel=0.05)


def test_random_numbers_of_the_device_are_as_before(device):
    def drawn(between):
        torch.manual_seed(5)
        torch.rand(1, device=device)
        between()
        return torch.rand(3, device=device)

    def seeded_draw(*entropy):
        with seeded(*entropy):
            return torch.rand(3, device=device)

    assert torch.equal(drawn(lambda: seeded_draw(1, 2)), drawn(lambda: None))
    assert torch.equal(seeded_draw(1, 2), seeded_draw(1, 2))
    assert not torch.equal(seeded_draw(1, 3), seeded_draw(1, 2))

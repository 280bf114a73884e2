"""Several processes train as one does: the same curves, the same weights, one error, one writer."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
import yaml

from closeness import assert_close
from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import build_operators
from grafting.errors import CheckpointError, RunError, TrainingError
from grafting.hosts import hosts
from grafting.machine import processes
from grafting.machine.sharding import read_tensors
from grafting.runs.recipe import Recipe
from grafting.runs.run import run
from grafting.training.distillation import DistillConfig, distill
from grafting.training.finetuning import FinetuneConfig, finetune
from grafting.weights.tensors import load_tensors
from processes import run_in_processes
from toydata import denoiser, noise_images

HOST = hosts()["dit"]
RANDOM = Plan(edits=(Replace(role="attention", operator={"name": "softmax", "projections": "random"}),))


def _finetuned(settings, until=None, state=None, folder=None):
    """The values of every step of a little stage 2, the last state and the final weights."""
    torch.manual_seed(0)
    teacher = HOST.tiny().eval()
    model = copy.deepcopy(teacher)
    with processes.together():
        steps = []
        for step in finetune(
            model,
            noise_images(64, size=16),
            FinetuneConfig(
                **{"steps": 6, "batch_size": 16, "lr": 1e-2, "warmup_steps": 0, "ema_decay": 0.9} | settings
            ),
            denoiser=denoiser(dropout=0.4),
            blocks=[site.path for site in HOST.blocks(model)],
            teacher=teacher,
            state=state,
        ):
            steps.append(step.values)
            if step.done == until:
                return steps, step.state().save(folder)
    return steps, _numbers(model)


def _distilled(settings, until=None, state=None):
    """The same of stage 1."""
    torch.manual_seed(0)
    teacher = HOST.tiny().eval()
    operators = build_operators(teacher, RANDOM)
    config = {"steps": 6, "batch_size": 16, "holdout": 24, "holdout_every": 3, "lr": 1e-2}
    with processes.together():
        steps = []
        for step in distill(
            teacher,
            operators,
            noise_images(64, size=16),
            DistillConfig(**config | settings),
            denoiser=denoiser(dropout=0.4),
            state=state,
        ):
            steps.append(step.values)
            if step.done == until:
                return steps, copy.deepcopy(step.state())
    return steps, {path: _numbers(operator) for path, operator in operators.items()}


def _numbers(module):
    return {name: tensor.tolist() for name, tensor in module.state_dict().items()}


def _assert_same_curve(got, want, tolerance=1e-4):
    assert [values.keys() for values in got] == [values.keys() for values in want]
    for number, (values, wanted) in enumerate(zip(got, want, strict=True)):
        for name in values:
            assert values[name] == pytest.approx(wanted[name], rel=tolerance, abs=1e-7), (number, name)


def test_two_processes_finetune_as_one():
    settings = {"output_weight": 1.0}
    want, _ = _finetuned(settings)
    (first, weights), (second, others) = run_in_processes(_finetuned, settings)
    _assert_same_curve(first, want)
    assert first == second
    assert weights == others


def test_two_processes_distill_as_one():
    want, _ = _distilled({})
    (first, operators), (second, others) = run_in_processes(_distilled, {})
    _assert_same_curve(first, want)
    assert first == second
    assert operators == others


def test_sites_spread_over_processes_are_fitted_bit_for_bit():
    want, operators = _distilled({})
    for steps, fitted in run_in_processes(_distilled, {"spread": "sites"}):
        assert steps == want
        assert fitted == operators


@pytest.mark.parametrize("stage", [_finetuned, _distilled])
def test_micro_batches_change_nothing(stage):
    _assert_same_curve(stage({"accumulate": 4})[0], stage({})[0])


def test_micro_batches_of_two_processes():
    want, _ = _finetuned({})
    for steps, _ in run_in_processes(_finetuned, {"accumulate": 2}):
        _assert_same_curve(steps, want)


@pytest.mark.parametrize("stage", [_finetuned, _distilled])
def test_a_batch_that_does_not_divide_is_an_error(stage):
    name = stage.__name__
    with pytest.raises(TrainingError, match="multiple of 1 processes x accumulate 3 = 3"):
        stage({"accumulate": 3})
    assert name
    found = run_in_processes(stage, {"batch_size": 6, "accumulate": 2})
    assert sum("6 counts all processes; it must be a multiple of 2 processes" in f for f in found) == 1
    assert "SystemExit: 1" in found


def test_sharded_equals_unsharded():
    """Weights less closely: keys' biases have no gradient but rounding, which Adam makes steps of."""
    want, weights = _finetuned({"output_weight": 1.0})
    settings = {"output_weight": 1.0, "shard": True}
    for steps, got in run_in_processes(_finetuned, settings):
        _assert_same_curve(steps, want)
        for name, tensor in got.items():
            assert_close(name, torch.tensor(tensor), torch.tensor(weights[name]), 1e-3)


@pytest.mark.slow
def test_a_sharded_state_goes_on_with_other_numbers_of_processes(tmp_path):
    settings = {"shard": True, "guard": {"policy": "rollback", "window": 5}}
    want, _ = _finetuned(settings)
    at_2, at_4 = tmp_path / "2", tmp_path / "4"
    at_2.mkdir()
    at_4.mkdir()
    [(steps, _), _] = run_in_processes(_finetuned, settings, 2, None, at_2)
    steps += _finetuned(settings, 4, at_2, at_4)[0]
    [(rest, _), (others, _)] = run_in_processes(_finetuned, settings, None, at_4)
    assert rest == others
    _assert_same_curve(steps + rest, want)
    damaged = at_2 / "__0_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged or another model's.*Delete it"):
        _finetuned(settings, 4, at_2)
    with pytest.raises(CheckpointError, match="made with shard: True, the recipe says False"):
        _finetuned({}, 4, at_4)


class _Malice:
    def __reduce__(self):
        return print, ("run",)


def test_no_pickle_is_run_from_a_states_index(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Malice()))
    with pytest.raises(CheckpointError, match=r"its index holds builtins\.print, which is not allowed"):
        read_tensors(tmp_path, {"x": torch.zeros(1)})


def _all_that_is_agreed_on():
    with processes.together():
        here = processes.rank()
        tensor = torch.full((3,), float(here))
        processes.copy_from(1, tensor)
        parameter = torch.nn.Parameter(torch.zeros(2))
        parameter.grad = torch.tensor([1.0, 3.0]) * here
        processes.average_gradients([parameter])
        return {
            "total": processes.total([float(here), 10.0]),
            "mean": processes.mean([float(here)]),
            "any": [processes.any_process(here == 1), processes.any_process(False)],
            "broadcast": processes.broadcast({"rank": here}),
            "gather": processes.gather(here),
            "on_main": processes.gather_on_main(here),
            "copied": tensor.tolist(),
            "gradient": parameter.grad.tolist(),
            "share": list(range(5))[processes.share()],
        }


def test_what_processes_agree_on():
    first, second = run_in_processes(_all_that_is_agreed_on)
    assert first.pop("share") == [0, 2, 4]
    assert second.pop("share") == [1, 3]
    assert (first.pop("on_main"), second.pop("on_main")) == ([0, 1], [1])
    assert first == second
    assert first == {
        "total": [1.0, 20.0],
        "mean": [0.5],
        "any": [True, False],
        "broadcast": {"rank": 0},
        "gather": [0, 1],
        "copied": [1.0, 1.0, 1.0],
        "gradient": [0.5, 1.5],
    }


def test_one_process_needs_no_other():
    assert (processes.rank(), processes.world_size(), processes.is_main()) == (0, 1, True)
    assert processes.gather("x") == ["x"]
    assert processes.mean([2.0]) == [2.0]
    assert not torch.distributed.is_initialized()


def _one_fails():
    with processes.together():
        if processes.rank() == 1:
            raise RunError("this disk is full")
        processes.barrier()


def test_one_process_error_ends_all_with_one_message():
    assert run_in_processes(_one_fails) == ["SystemExit: 1", "RunError: this disk is full"]


def test_processes_that_cannot_meet(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RunError, match="process 0 of 2, but the processes cannot connect"):
        processes.connect()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(RunError, match="WORLD_SIZE is 'two'"):
        processes.world_size()


def _recipe(**finetune):
    config = {
        "input_size": 32,
        "patch_size": 8,
        "in_channels": 1,
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 10,
    }
    return {
        "name": "tiny",
        "source": {"host": "dit", "config": config},
        "plan": [{"role": "attention", "operator": {"name": "hyena-x", "kernel_size": 3}}],
        "data": {"name": "testbed-subset"},
        "distill": {"steps": 4, "batch_size": 4, "holdout": 8, "holdout_every": 2},
        "finetune": {"steps": 6, "batch_size": 4, "warmup_steps": 0, "ema_decay": 0.9} | finetune,
        "save_every": 2,
    }


def _until_step_5(folder):
    """A sharded run that is lost after step 5 of stage 2."""

    def lost(stage, step):
        if stage == "finetune" and step.done == 5:
            raise RunError("lost")

    run(Recipe.model_validate(_recipe(shard=True)), folder, on_step=lost)


@pytest.mark.slow
def test_a_sharded_run_of_two_processes_is_gone_on_with_by_one(tmp_path):
    run(Recipe.model_validate(_recipe(shard=True)), tmp_path / "whole")
    assert sorted(run_in_processes(_until_step_5, tmp_path / "lost")) == ["RunError: lost", "SystemExit: 1"]
    assert (tmp_path / "lost/finetune/states/0000000004/__1_0.distcp").is_file()
    seen = []
    run(
        Recipe.model_validate(_recipe(shard=True)),
        tmp_path / "lost",
        on_step=lambda stage, step: seen.append((stage, step.done)),
    )
    assert seen == [("finetune", 5), ("finetune", 6)]
    want, got = (load_tensors(tmp_path / name / "model/model.safetensors") for name in ("whole", "lost"))
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        if tensor.any():
            assert_close(name, got[name], tensor, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--nproc-per-node", "2"],
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
    ],
)
def test_a_recipe_of_two_processes_is_that_of_one(tmp_path, launcher):
    """Curves in the log, files in the folder, and what is said, once."""
    recipe = _recipe()
    run(Recipe.model_validate(recipe), tmp_path / "one")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", *launcher, "-m", "grafting", "run", "recipe.yaml", "--out", "two"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("Report: two/report.html") == 1
    files = [{str(p.relative_to(tmp_path / f)) for p in (tmp_path / f).rglob("*")} for f in ("one", "two")]
    assert files[0] == files[1]
    for stage in ("distill", "finetune"):
        logs = [
            [json.loads(line) for line in (tmp_path / f / stage / "log.jsonl").read_text().splitlines()]
            for f in ("one", "two")
        ]
        # what depends on the machine is not compared
        names = [n for n in logs[0][-1] if "/" in n or n in ("loss", "grad_norm", "lr", "diffusion")]
        assert len(names) >= 4
        curves = [[{n: line[n] for n in names if n in line} for line in log] for log in logs]
        _assert_same_curve(curves[1], curves[0])

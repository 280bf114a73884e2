"""Trackers get a run's steps and nothing else, go on under one id, stay offline; throughput is what a clock says."""

import json
import os
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from typer.testing import CliRunner

from grafting import cli
from grafting.contract import Step
from grafting.cost.speed import DEVICES, Work, device_called, measured
from grafting.errors import MissingBackend, RunError
from grafting.runs.trackers import check_trackers, run_id_of, tracking

SETTINGS = {"name": "small", "finetune": {"lr": 1e-4}}


class Run:
    """What `init` of wandb and trackio returns, with what it was told."""

    def __init__(self, **settings):
        self.settings, self.logged, self.metrics, self.finished = settings, [], {}, False
        self.hub_is_asked = not constants.is_offline_mode()

    def define_metric(self, name, *, step_metric):
        self.metrics[name] = step_metric

    def log(self, values, step=None):
        self.logged.append((values, step))

    def finish(self):
        self.finished = True


def fake(monkeypatch, name: str) -> list[Run]:
    """Puts a module in the place of a tracker's package; returns the runs that it starts."""
    runs: list[Run] = []

    def init(**settings):
        runs.append(Run(**settings))
        return runs[-1]

    module = types.ModuleType(name)
    module.__dict__.update(init=init, Settings=lambda **settings: settings)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("grafting.runs.trackers.find_spec", lambda name: sys.modules.get(name))
    return runs


def follow(folder: Path, *names: str, steps=(1, 2)) -> None:
    with tracking(names, folder, name="small", settings=SETTINGS) as on_step:
        for step in steps:
            on_step("distill", Step(done=step, total=9, values={"loss/a": step / 8, "lr": float("nan")}))


def test_wandb_is_offline_and_goes_on_under_its_id(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "")  # so that it is put back
    monkeypatch.delenv("WANDB_ERROR_REPORTING")
    monkeypatch.setenv("WANDB_API_KEY", "secret-key")
    runs = fake(monkeypatch, "wandb")
    follow(tmp_path, "wandb")
    follow(tmp_path, "wandb", steps=(3,))
    first, second = runs
    assert first.settings["mode"] == "offline"
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    assert first.settings["dir"] == str(tmp_path / "tracking")
    assert first.settings["id"] == second.settings["id"]
    assert second.settings["resume"] == "allow"
    assert first.settings["config"] == SETTINGS
    assert first.settings["settings"]["disable_code"]
    assert "secret-key" not in repr(first.settings)
    assert first.metrics == {"distill/*": "distill/step"}
    assert first.logged[0] == (
        {"distill/loss/a": 0.125, "distill/step": 1},
        None,
    )  # what is not finite is left out
    assert first.finished
    monkeypatch.setenv("WANDB_MODE", "online")
    follow(tmp_path, "wandb")
    assert runs[-1].settings["mode"] == "online"


def test_trackio_writes_into_the_run(tmp_path, monkeypatch):
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    monkeypatch.delenv("GRADIO_ANALYTICS_ENABLED", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    runs = fake(monkeypatch, "trackio")
    follow(tmp_path, "trackio")
    assert os.environ["TRACKIO_DIR"] == str(tmp_path / "tracking" / "trackio")
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert runs[0].settings["name"] == run_id_of(tmp_path / "tracking", "small")
    assert "space_id" not in runs[0].settings
    assert [step for _, step in runs[0].logged] == [1, 2]
    assert runs[0].settings["auto_log_cpu"] is runs[0].settings["auto_log_gpu"] is False
    assert runs[0].hub_is_asked is False  # trackio keeps the name of whoever is logged in
    assert not constants.is_offline_mode()
    monkeypatch.setenv("TRACKIO_SPACE_ID", "someone/somewhere")
    follow(tmp_path, "trackio")
    assert runs[1].hub_is_asked is True
    monkeypatch.delenv("TRACKIO_DIR")
    monkeypatch.delenv("GRADIO_ANALYTICS_ENABLED")


def test_tensorboard_draws_each_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    follow(tmp_path, "tensorboard", steps=(1, 2, 3))
    follow(tmp_path, "tensorboard", steps=(3, 4))  # killed after step 3, its last state after step 2
    events = EventAccumulator(str(tmp_path / "tracking" / "tensorboard" / "distill")).Reload()
    assert events.Tags()["scalars"] == ["loss/a"]
    assert [(e.step, e.value) for e in events.Scalars("loss/a")] == [(i, i / 8) for i in (1, 2, 3, 4)]


def test_only_the_main_process_tracks(tmp_path, monkeypatch):
    runs = fake(monkeypatch, "wandb")
    monkeypatch.setenv("RANK", "1")
    follow(tmp_path, "wandb")
    assert not runs
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_without_a_tracker_or_a_step(tmp_path, monkeypatch):
    fake(monkeypatch, "wandb")
    follow(tmp_path)
    follow(tmp_path, "wandb", steps=())
    assert not list(tmp_path.iterdir())


def test_a_missing_or_unknown_tracker_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr("grafting.runs.trackers.find_spec", lambda name: None)
    with pytest.raises(
        MissingBackend, match=r"not installed: wandb, trackio. pip install 'wandb>=0.19' 'trackio>=0.43'"
    ):
        check_trackers(["wandb", "trackio"])
    with pytest.raises(MissingBackend, match="no tracker comet; there are tensorboard, wandb, trackio"):
        check_trackers(["comet"])
    recipe = Path(__file__).parents[2] / "recipes" / "testbed" / "quickstart.yaml"
    result = CliRunner().invoke(
        cli.app, ["run", str(recipe), "--out", str(tmp_path / "run"), "--track", "wandb"]
    )
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: not installed: wandb.")
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_cannot_start_says_so(tmp_path, monkeypatch):
    fake(monkeypatch, "wandb")

    def init(**settings):
        raise ConnectionError("no such host")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    with pytest.raises(RunError, match="wandb cannot start: no such host. Leave out --track wandb"):
        follow(tmp_path, "wandb")


def test_a_damaged_id_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run.json is damaged: delete it"):
        run_id_of(tmp_path, "small")


def test_rates_are_those_of_the_clock():
    def steps():
        yield Step(done=0, total=2, values={"loss": 1.0})
        time.sleep(0.05)
        yield Step(done=1, total=2, values={"loss": 0.5}, seconds_waited=0.02)

    work = Work(steps=2, images=8, tokens=256, flops=1e9, tflops=0.1)
    before = time.perf_counter()
    first, second = measured(steps(), [work], device=torch.device("cpu"))
    elapsed = time.perf_counter() - before
    assert set(first.values) == {"loss", "memory_gib"}
    assert first.values["memory_gib"] > 0.05
    found = second.values
    assert 8 / elapsed * 0.99 < found["images_per_s"] <= 8 / 0.05
    assert found["tokens_per_s"] == pytest.approx(256 * found["images_per_s"], rel=1e-3)
    assert found["mfu"] == pytest.approx(found["images_per_s"] / 8 * 1e9 / 1e11, rel=1e-3)
    assert found["data_wait"] == pytest.approx(0.02 * found["images_per_s"] / 8, rel=1e-3)
    assert second.values["loss"] == 0.5


def test_without_a_known_peak_there_is_no_share_of_it():
    work = Work(steps=2, images=8, tokens=256, flops=1e9)
    (step,) = measured(iter([Step(done=1, total=1)]), [work], device=torch.device("cpu"))
    assert "mfu" not in step.values


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", None),  # another chip, half as fast
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("Tesla T4", None),
    ],
)
def test_devices_are_known_by_the_names_of_drivers(name: str, kind: str | None):
    assert device_called(name) == (DEVICES[kind] if kind else None)


def test_a_run_logs_how_fast_it_is(tmp_path):
    from grafting.runs.recipe import Recipe
    from grafting.runs.run import run

    recipe = Recipe.model_validate(
        {
            "name": "small",
            "source": {
                "host": "dit",
                "config": {
                    "input_size": 32, "patch_size": 8, "in_channels": 1, "hidden_size": 16, "depth": 2,
                    "num_heads": 2, "num_classes": 10,
                },
            },
            "plan": [{"role": "attention", "blocks": "odd", "operator": "hyena-x"}],
            "data": {"name": "testbed-subset"},
            "distill": {"steps": 2, "batch_size": 4, "holdout": 4},
            "finetune": {"steps": 2, "batch_size": 4, "warmup_steps": 0},
        }
    )  # fmt: skip
    run(recipe, tmp_path / "run", until="finetune", peak_tflops=0.01)
    for stage in ("distill", "finetune"):
        lines = [json.loads(x) for x in (tmp_path / "run" / stage / "log.jsonl").read_text().splitlines()]
        assert all(0 < line["mfu"] < 1 for line in lines[-2:])
        assert all(
            line["tokens_per_s"] == pytest.approx(16 * line["images_per_s"], rel=1e-2) for line in lines[-2:]
        )

"""`auto` is settled once, from a measurement or what was begun; what is hashed and written says fp32 or bf16, as it always did."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

import tinyrecipe
from grafting import cli
from grafting.cost.speed import DEVICES
from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import build_operators
from grafting.errors import FaultWarning, ResumeWarning, RunError
from grafting.hosts import hosts
from grafting.latents.encoding import EncodingConfig
from grafting.machine import precision
from grafting.machine.devices import mixed_precision
from grafting.machine.files import hash_json
from grafting.machine.precision import (
    VARIABLE,
    Precision,
    bf16_speedup,
    resolve_precision,
    settled,
    settled_run,
)
from grafting.machine.processes import is_main
from grafting.runs.file import load_recipe
from grafting.runs.forecast import Forecast, StageForecast, forecast
from grafting.runs.identity import essence
from grafting.runs.job import prepare
from grafting.runs.recipe import Recipe
from grafting.runs.run import run
from grafting.runs.sweep import load_sweep, measure, points, read_table
from grafting.sampling.chain import SamplingConfig, sample
from grafting.sampling.drawing import settled_as_drawn
from grafting.sampling.files import origin_of
from grafting.training.calibration import CalibrateConfig
from grafting.training.distillation import DistillConfig, distill
from grafting.training.finetuning import FinetuneConfig, finetune
from grafting.weights.folder import save_model
from processes import run_in_processes
from toydata import denoiser, noise_images

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
HOST = hosts()["dit"]
SECTIONS = ("distill", "finetune", "sample")


@pytest.fixture
def speedup(monkeypatch: pytest.MonkeyPatch):
    """Sets what bf16 gains on every device."""
    monkeypatch.delenv(VARIABLE)
    return lambda ratio: monkeypatch.setattr(precision, "bf16_speedup", lambda device: ratio)


def tiny(**changes) -> Recipe:
    return Recipe.model_validate(tinyrecipe.TINY | {"rows": ["finetuned"]} | changes)


# the choice


@pytest.mark.parametrize(("ratio", "choice"), [(0.1, "fp32"), (1.29, "fp32"), (1.3, "bf16"), (8, "bf16")])
def test_bf16_is_chosen_where_it_gains_enough(speedup, ratio, choice):
    speedup(ratio)
    assert resolve_precision("auto", CPU) == choice
    assert precision.why(CPU).startswith(f"bf16 is {ratio:.2g} times as fast as fp32")
    assert [resolve_precision(asked, CPU) for asked in ("fp32", "bf16")] == ["fp32", "bf16"]


def test_the_environment_has_the_last_word(speedup, monkeypatch):
    speedup(8)
    monkeypatch.setenv(VARIABLE, "fp32")
    assert resolve_precision("auto", CPU) == "fp32"
    assert precision.why(CPU) == "GRAFTING_PRECISION says so"
    monkeypatch.setenv(VARIABLE, "fp16")
    with pytest.raises(RunError, match="GRAFTING_PRECISION is 'fp16': fp32 or bf16"):
        resolve_precision("auto", CPU)


@pytest.mark.parametrize(
    ("flops", "start_s", "low", "high"),
    [
        ((6e10, 1e9), (1e-4, 1e-4), 0.01, 0.3),  # a core that emulates bf16
        ((1e11, 2.5e11), (3e-5, 5e-5), 2.3, 2.5),  # one with bf16 units
        ((4e12, 1e13), (3e-5, 5e-5), 2.3, 2.5),  # many of them
        ((4e13, 6e14), (5e-5, 8e-5), 6, 15),  # an H100
        ((4e13, 4e13), (5e-5, 8e-5), 0.9, 1.0),
    ],
)
def test_the_measurement_takes_sizes_that_tell(monkeypatch, flops, start_s, low, high):
    seconds = []

    def timed(x, weight, *, bf16):
        seconds.append(start_s[bf16] + 6 * len(x) ** 3 / flops[bf16])
        # every third call is disturbed
        return seconds[-1] + (0.05 if len(seconds) % 3 == 0 else 0)

    monkeypatch.setattr(precision, "_seconds", timed)
    assert low < bf16_speedup.__wrapped__(CPU) < high
    assert sum(seconds) < 0.3


def test_it_measures_here_without_a_trace():
    state = torch.get_rng_state()
    with torch.inference_mode(), mixed_precision(CPU, "bf16"):
        ratio = bf16_speedup(CPU)
    assert 0 < ratio < 100
    assert bf16_speedup(CPU) == ratio
    assert torch.equal(torch.get_rng_state(), state)


def _told() -> tuple[str, str, str]:
    """What a process settles on, of which only one may measure."""

    def measured(device: torch.device) -> float:
        assert is_main()
        return 2.0

    os.environ.pop(VARIABLE)
    precision.bf16_speedup = measured
    recipe, _ = settled_run(tiny(), CPU)
    direct = settled(FinetuneConfig(), CPU, together=True)
    return recipe.distill.precision, recipe.sample.precision, direct.precision


def test_one_process_measures_and_tells_the_others():
    assert run_in_processes(_told) == [("bf16", "bf16", "bf16")] * 2


@pytest.mark.parametrize(
    "config",
    [CalibrateConfig, DistillConfig, FinetuneConfig, SamplingConfig, EncodingConfig],
)
def test_auto_is_the_default(config):
    assert config().precision == "auto"
    assert settled(config(precision="bf16"), CPU).precision == "bf16"


# called directly


def test_stages_and_samplers_take_auto(speedup):
    """They compute as they do when told what it stands for."""
    teacher = HOST.tiny().eval()
    plan = Plan(edits=(Replace(role="attention", blocks=[0], operator="hyena-x"),))
    data, how = noise_images(24, size=16), {"denoiser": denoiser()}

    def distilled(asked: Precision) -> torch.Tensor:
        operators = build_operators(teacher, plan)
        config = DistillConfig(steps=2, batch_size=8, holdout=8, precision=asked)
        list(distill(teacher, operators, data, config, **how))
        return torch.cat([p.flatten() for o in operators.values() for p in o.parameters()])

    def finetuned(asked: Precision) -> torch.Tensor:
        model = copy.deepcopy(teacher)
        config = FinetuneConfig(steps=2, batch_size=8, warmup_steps=0, precision=asked)
        list(finetune(model, data, config, **how))
        return torch.cat([p.flatten() for p in model.parameters()])

    def drawn(asked: Precision) -> torch.Tensor:
        config = SamplingConfig(steps=2, num_images=2, cfg_scale=1, precision=asked)
        (batch,) = sample(teacher, config, **how)
        return batch.x

    for work in (distilled, finetuned, drawn):
        fp32, bf16 = work("fp32"), work("bf16")
        assert not torch.equal(fp32, bf16)
        for ratio, want in ((0.5, fp32), (2, bf16)):
            speedup(ratio)
            assert torch.equal(work("auto"), want), work.__name__


def test_mixed_precision_takes_auto(speedup):
    speedup(2)
    with mixed_precision(CPU, "auto"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_a_protocol_says_what_it_was(speedup):
    speedup(2)
    assert origin_of(SamplingConfig())["sampling"]["precision"] == "bf16"
    speedup(1)
    assert origin_of(SamplingConfig()) == origin_of(SamplingConfig(precision="fp32"))


# hashes

# of the tiny recipe's settings, by the version in which fp32 was the default
HASHES = {
    "fp32": {
        "calibrate": "947b0404478b0bc1c933d450220e0b674b0adbe87c0815dc0483976027a71a84",
        "distill": "2203622690bf2d5ceaff104719d049b55e4c49d4d0aec53c8a0d994c9580072e",
        "finetune": "9b8ccb119d962d9df2987d7d7bb9f309c2acb2ee5331e061061facffbf781af0",
        "sample": "3e54c48234e687fd884fa770fc60615a2e68af6285c6261a715964841c719cab",
    },
    "bf16": {
        "calibrate": "6d4c9ce19501aabcb5e3b45b4d50d1f277fa77edc5d306607e3f6e602e1fe1f4",
        "distill": "e621caed02e38ad4e05fd155180977214905bd62a3e45b443d3afdca7b498e10",
        "finetune": "c2ee3d9dbe1c3b0523004c0e743c167fe97794d117158c59e3b568d9c4dd804a",
        "sample": "54a69809cc25d988ab10451973663fca2878f1cf53a34d0d5311c9b126502a5f",
    },
}


@pytest.mark.parametrize("choice", HASHES)
def test_hashes_are_those_of_before(monkeypatch, choice):
    monkeypatch.setenv(VARIABLE, choice)
    recipe = prepare(tiny(calibrate={"samples": 32})).recipe
    assert {name: hash_json(essence(getattr(recipe, name))) for name in HASHES[choice]} == HASHES[choice]


def test_published_lines_are_known_whatever_the_device_would_choose(tmp_path):
    """The table was measured in bf16, and its recipes leave that to the device, which is of fp32 here."""
    sweep = load_sweep(ROOT / "recipes/testbed/losses.yaml")
    known = frozenset(line["fingerprint"] for line in read_table(ROOT / "results/testbed/losses"))
    for point in points(sweep)[:2]:
        assert measure(sweep, point, tmp_path, known=known) == []
    assert not [*tmp_path.iterdir()]


# what was begun


def _written(folder: Path) -> dict[str, str]:
    sections = yaml.safe_load((folder / "recipe.yaml").read_text())
    return {name: sections[name]["precision"] for name in SECTIONS if name in sections}


def test_a_run_goes_on_in_what_it_began_in(tmp_path, monkeypatch, recwarn):
    folder, seen = tmp_path / "run", []
    monkeypatch.setenv(VARIABLE, "bf16")
    run(tiny(sample=None), folder, until="distill")
    assert _written(folder) == {"distill": "bf16", "finetune": "bf16"}
    monkeypatch.setenv(VARIABLE, "fp32")
    with pytest.warns(ResumeWarning, match=r"began in bf16 and keeps it; auto would now be fp32"):
        run(tiny(), folder, on_step=lambda stage, _: seen.append(stage))
    assert "distill" not in seen
    assert _written(folder) == dict.fromkeys(SECTIONS, "bf16")
    (row,) = json.loads((folder / "metrics.json").read_text())
    assert row["protocol"]["sampling"]["precision"] == "bf16"
    # nothing is left to do, and nothing to tell
    seen.clear()
    recwarn.clear()
    run(tiny(), folder, on_step=lambda stage, _: seen.append(stage))
    assert not seen
    assert not recwarn.list
    # what is asked for is done
    asked = tiny(distill=tinyrecipe.TINY["distill"] | {"precision": "fp32"})
    with pytest.warns(ResumeWarning):
        run(asked, folder, on_step=lambda stage, _: seen.append(stage))
    assert {"distill", "finetune"} <= set(seen)
    assert _written(folder) == {"distill": "fp32", "finetune": "bf16", "sample": "bf16"}


@pytest.mark.parametrize("choice", ["fp32", "bf16"])
def test_a_run_that_said_its_precision_is_not_begun_anew(tmp_path, monkeypatch, choice):
    said = {name: tinyrecipe.TINY[name] | {"precision": choice} for name in SECTIONS}
    run(tiny(**said), tmp_path / "run")
    before = (tmp_path / "run/recipe.yaml").read_bytes()
    monkeypatch.setenv(VARIABLE, "fp32" if choice == "bf16" else "bf16")
    seen = []
    run(tiny(), tmp_path / "run", on_step=lambda stage, _: seen.append(stage))
    assert not seen
    assert (tmp_path / "run/recipe.yaml").read_bytes() == before


def test_sections_hold_one_by_one(tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text("distill: {precision: bf16}\nfinetune: {precision: fp32}\nvae: 3\n")
    monkeypatch.setenv(VARIABLE, "bf16")
    recipe, told = settled_run(tiny(), CPU, folder=tmp_path)
    assert [getattr(recipe, name).precision for name in SECTIONS] == ["bf16", "fp32", "bf16"]
    assert "began in fp32 and keeps it" in told
    assert settled_run(recipe, CPU, folder=tmp_path) == (recipe, "")


def test_a_record_that_cannot_be_read_is_told(tmp_path):
    (tmp_path / "recipe.yaml").write_text("a: [")
    with pytest.warns(FaultWarning, match=r"recipe.yaml is not YAML: .* is not known, and is chosen again"):
        recipe, _ = settled_run(tiny(), CPU, folder=tmp_path)
    assert recipe.distill.precision == "fp32"


def test_images_that_are_drawn_hold(tmp_path, monkeypatch):
    save_model(tmp_path / "model", HOST.tiny(), Plan())
    out, shards, config = tmp_path / "s.npz", tmp_path / "s.shards", SamplingConfig()
    command = ["sample", str(tmp_path / "model"), "--num", "4", "--steps", "1", "--sampler", "ddim"]

    def called(*more: str, choice: str) -> str:
        found = CliRunner(env={VARIABLE: choice}).invoke(cli.app, [*command, *more, "--out", str(out)])
        assert found.exit_code == 0, found.output
        return found.output

    called(choice="bf16")
    assert settled_as_drawn(config, shards, out).precision == "bf16"
    assert "already drawn" in called(choice="fp32")
    shards.mkdir()
    (shards / "drawing.json").write_text(json.dumps({"drawing": {"sampling": {"precision": "bf16"}}}))
    with pytest.warns(ResumeWarning, match=r"s.shards began in bf16 and keeps it"):
        assert settled_as_drawn(config, shards, tmp_path / "none").precision == "bf16"
    (shards / "drawing.json").write_text("{")
    assert settled_as_drawn(config, shards, tmp_path / "none").precision == "fp32"
    assert settled_as_drawn(SamplingConfig(precision="bf16"), shards, out).precision == "bf16"


# what is said


def timed(found: Forecast) -> list[StageForecast]:
    return [stage for stage in found.stages if stage.hours is not None]


def test_a_dry_run_knows_what_known_devices_choose():
    for name, device in DEVICES.items():
        found = timed(forecast(tiny(), device=name))
        assert all(f"{device.bf16_tflops:g} TFLOP/s (bf16)" in stage.basis for stage in found)
    asked = tiny(distill=tinyrecipe.TINY["distill"] | {"precision": "fp32"})
    assert "67 TFLOP/s (fp32)" in forecast(asked, device="h100").stages[0].basis
    here = timed(forecast(tiny(), peak_tflops=1.0))
    assert all("1 TFLOP/s (fp32)" in stage.basis for stage in here)


def test_doctor_says_it(monkeypatch, speedup):
    speedup(0.126)
    said = CliRunner().invoke(cli.app, ["doctor"])
    assert said.exit_code == 0, said.output
    assert "precision auto: fp32 (bf16 is 0.13 times as fast as fp32 in a linear layer)" in said.output


def test_the_command_line_tells_it_in_a_line(tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tinyrecipe.TINY | {"rows": ["finetuned"]}))
    folder = tmp_path / "run"
    command = ["run", str(tmp_path / "r.yaml"), "--out", str(folder), "--until"]
    for choice, until in (("bf16", "distill"), ("fp32", "finetune")):
        said = CliRunner(env={VARIABLE: choice}).invoke(cli.app, [*command, until])
        assert said.exit_code == 0, said.output
    assert f"Warning: {folder} began in bf16 and keeps it; auto would now be fp32" in said.stderr


@pytest.mark.parametrize(
    "path", ["testbed/quickstart.yaml", "testbed/hyena_x_50.yaml", "imagenet/full_8gpu.yaml"]
)
def test_bundled_recipes_leave_it_to_the_device(path):
    recipe = load_recipe(ROOT / "recipes" / path)
    assert [getattr(recipe, name).precision for name in SECTIONS] == ["auto"] * 3

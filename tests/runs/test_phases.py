"""A recipe with phases: killed in any of them it ends as undisturbed, and all that shows a run knows them."""

import json
import os
import shutil
import signal
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

import grafting
from grafting import cli
from grafting.errors import CheckpointError, RecipeError
from grafting.hosts._host import randomise
from grafting.runs.file import load_recipe, parse_recipe
from grafting.runs.identity import result_settings
from grafting.runs.job import prepare
from grafting.runs.recipe import Recipe
from grafting.runs.run import run
from grafting.runs.seeds import with_seeds_moved
from grafting.weights.card import CARD_NAME
from grafting.weights.tensors import load_tensors
from tinyrecipe import TINY

LORA = {"lora": {"rank": 2, "targets": ["mlp"], "adapter": "saved"}}
BASE = {"batch_size": 4, "warmup_steps": 0, "ema_decay": 0.5, "precision": "fp32"}
PHASES = [
    BASE | {"steps": 3, "trainable": "new"},
    BASE | {"steps": 3, "trainable": ["new", LORA], "objective": {"process": 1, "output": 1}},
]


def recipe(**changes) -> Recipe:
    return Recipe.model_validate(TINY | {"finetune": PHASES, "save_every": 2, "sample": None} | changes)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model whose output is not zero, as that of a fresh one is."""
    folder = tmp_path_factory.mktemp("phases") / "source"
    torch.manual_seed(0)
    grafting.save(randomise(grafting.DiT(**TINY["source"]["config"])), folder)
    return folder


def weighted(source: Path) -> Recipe:
    """The recipe on that model, which goes by its config, so that it is saved whole."""
    return recipe(source=TINY["source"] | {"weights": str(source)})


@pytest.fixture(scope="module")
def finished(source):
    pytest.importorskip("peft")
    run(weighted(source), source.parent / "tiny")
    return source.parent / "tiny"


def _killed(source: Path, folder: Path, done: int) -> None:
    def kill(name, step):
        if name == "finetune" and step.done == done:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    run(weighted(source), folder, on_step=kill)


# in the first phase; in the second with a state of the first; with a state of the second
@pytest.mark.parametrize("done", [3, 5])
def test_killed_in_any_phase_and_run_again_equals_undisturbed(source, finished, tmp_path, done):
    process = get_context("fork").Process(target=_killed, args=(source, tmp_path / "run", done))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    run(weighted(source), tmp_path / "run")
    for name in ("model", "adapter_model"):
        got, want = (load_tensors(f / "model" / f"{name}.safetensors") for f in (tmp_path / "run", finished))
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want)


def test_a_log_counts_on_and_names_phases(finished):
    lines = [json.loads(line) for line in (finished / "finetune/log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["phase"]) for line in lines] == [(s, 1 + (s > 3)) for s in range(1, 7)]
    assert ["output" in line for line in lines] == 3 * [False] + 3 * [True]


def test_a_report_marks_phases(finished):
    page = (finished / "report.html").read_text()
    assert "phase 1, steps 1 to 3 (new); phase 2, steps 4 to 6 (new + lora 2)." in page


def test_a_model_is_loaded_with_its_adapter(source, finished):
    loaded, folder = grafting.load(finished).state_dict(), finished / "model"
    whole, adapter = (load_tensors(folder / f"{n}.safetensors") for n in ("model", "adapter_model"))
    linears = ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]
    for name, tensor in loaded.items():
        want = whole[name]
        if name.removesuffix(".weight") in linears:
            path = f"base_model.model.{name.removesuffix('.weight')}"
            want = want + adapter[f"{path}.lora_B.weight"] @ adapter[f"{path}.lora_A.weight"]
            assert not torch.equal(tensor, whole[name])
        assert torch.equal(tensor, want), name
    assert len(adapter) == 2 * len(linears)
    # what adapters stand around is the pretrained model's
    before = grafting.load(source).state_dict()
    assert all(torch.equal(whole[f"{path}.weight"], before[f"{path}.weight"]) for path in linears)
    assert "A low-rank adapter (LoRA) lies beside the weights" in (folder / CARD_NAME).read_text()


def test_peft_takes_the_adapter_by_itself(finished):
    peft = pytest.importorskip("peft")
    model, x = grafting.load(finished), torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    bare = grafting.load(finished)
    bare.load_state_dict(load_tensors(finished / "model/model.safetensors"))
    adapted = peft.PeftModel.from_pretrained(bare, str(finished / "model"))
    t, y = torch.tensor([3, 700]), torch.tensor([1, 2])
    with torch.no_grad():
        assert torch.allclose(adapted(x, t, y), model(x, t, y), atol=1e-5)


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_damaged_adapter_is_an_error(finished, tmp_path, damage):
    folder = shutil.copytree(finished / "model", tmp_path / "model")
    path = folder / "adapter_model.safetensors"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing, or not the adapter"):
        grafting.load(folder)


def test_an_adapter_lies_beside_a_delta(source, finished, tmp_path):
    """The source has a name, so the model is written as what it has not got."""
    run(recipe(source=str(source)), tmp_path / "run")
    own = load_tensors(tmp_path / "run/model/delta.safetensors")
    assert all(name.startswith("blocks.1.attn.") for name in own)
    assert {p.name for p in (tmp_path / "run/model").iterdir()} == {
        "config.json", "delta.safetensors", "adapter_model.safetensors", "adapter_config.json", "README.md",
    }  # fmt: skip
    got, want = grafting.load(tmp_path / "run").state_dict(), grafting.load(finished).state_dict()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_hashes_of_one_phase_are_what_they_were():
    one = TINY["finetune"]
    alone, listed = recipe(finetune=one), recipe(finetune=[one])
    assert alone == listed
    assert result_settings(alone.finetune) == {k: v for k, v in one.items() if k != "precision"} | {
        "precision": "auto"
    }


def test_each_phase_has_its_precision_and_seed(monkeypatch):
    monkeypatch.setenv("GRAFTING_PRECISION", "bf16")
    phases = [{"steps": 1, "batch_size": 4}, {"steps": 1, "batch_size": 4, "precision": "fp32"}]
    found = prepare(recipe(finetune=phases)).recipe
    assert [phase.precision for phase in found.phases] == ["bf16", "fp32"]
    assert [phase.seed for phase in with_seeds_moved(found, 2).phases] == [2, 2]


def test_faults_are_told_with_their_phase(tmp_path):
    phases = [
        {"stepz": 1}, {"trainable": {"lora": {"rank": 0}}}, {"trainable": ["new", {"lore": {}}]}, {"lr": -1}
    ]  # fmt: skip
    with pytest.raises(RecipeError) as error:
        parse_recipe(TINY | {"finetune": phases}, source="here")
    told = str(error.value)
    for fault in (
        "finetune.0.stepz: unknown",
        "finetune.1.trainable.lora.rank:",
        "finetune.2.trainable.1.lore: unknown",
        "finetune.3.lr:",
    ):
        assert fault in told, told
    for finetune, fault in (([], "at least one"), ([PHASES[1], PHASES[0]], "saved is for the last phase")):
        with pytest.raises(RecipeError, match=fault):
            parse_recipe(TINY | {"finetune": finetune}, source="here")


def test_a_setting_of_a_phase_is_changed_by_its_number(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(TINY | {"finetune": PHASES}))
    changed = load_recipe(tmp_path / "recipe.yaml", changes={"finetune.1.steps": 9})
    assert [phase.steps for phase in changed.phases] == [3, 9]


def test_commands_tell_of_phases(tmp_path):
    pytest.importorskip("peft")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(TINY | {"finetune": PHASES, "sample": None}))
    checked = CliRunner().invoke(cli.app, ["check", str(path)])
    assert "finetune, phase 2: 3 steps of 4 of 6000 images, which train new + lora 2" in checked.output
    forecast = CliRunner().invoke(cli.app, ["run", str(path), "--dry-run", "--device", "h100"])
    assert "finetune, phase 2, activations: " in forecast.output
    assert "with gradient checkpointing" in forecast.output

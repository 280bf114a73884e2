"""What an earlier version left on disk: read as it was written, not done again, and gone on with where it was killed.

`golden/before` was made at commit c516de7 (its make.py says how). These tests use what users use, the public names and the
command line, so that they hold whatever moves inside. What is read is compared exactly; what this machine computes anew from
it, with a tolerance.
"""

import json
import shutil
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtSigmaPipeline
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import grafting
from closeness import assert_close
from grafting.cli import app
from grafting.errors import ResumeWarning
from grafting.machine.precision import settled_run

BEFORE = Path(__file__).parent / "golden" / "before"
OUTPUTS = load_file(BEFORE / "outputs.safetensors")
ROWS = ["pretrained", "random", "inherited", "distilled", "finetuned"]
STAGES = ["calibrate", "distill", "finetune", *(f"samples/{row}" for row in ROWS), "evaluate"]


@pytest.fixture(autouse=True)
def _beside_the_files(tmp_path, monkeypatch):
    """A copy to work in: recipes, runs and models name each other by relative paths."""
    shutil.copytree(BEFORE, tmp_path / "before")
    monkeypatch.chdir(tmp_path / "before")


def command(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def run(folder: str, **options: Any) -> dict[str, list[int]]:
    """Carries out the recipe; the steps of each stage that were made."""
    made = defaultdict(list)
    recipe = grafting.load_recipe("recipe.yaml")
    grafting.run(recipe, folder, on_step=lambda stage, step: made[stage].append(step.done), **options)
    return dict(made)


@contextmanager
def told_of_unnamed_owners(expected: bool = True) -> Iterator[None]:
    """States and operators of that time do not name what they belong to: one warning says so."""
    with warnings.catch_warnings(record=True, action="always", category=ResumeWarning) as caught:
        yield
    told = [str(warning.message) for warning in caught]
    assert len(told) == expected, told
    assert all("of an earlier version, which did not note whose" in text for text in told)


def stages(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "manifest.json").read_text())["stages"]


def log(folder: str | Path, stage: str) -> list[str]:
    return Path(folder, stage, "log.jsonl").read_text().splitlines()


def results(folder: str) -> dict[str, tuple[bytes, int]]:
    """What stages made and logged, with the time at which it was."""
    found = [path for path in Path(folder).rglob("*") if path.suffix in (".safetensors", ".jsonl")]
    found += (Path(folder, name) for name in ("metrics.json", "model/config.json"))
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in found if path.is_file()}


def assert_same_tensors(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def assert_close_files(got: Path, want: Path, ratio: float) -> None:
    tensors, wanted = load_file(got), load_file(want)
    assert tensors.keys() == wanted.keys()
    for name in wanted:
        assert_close(name, tensors[name], wanted[name], ratio)


# runs


@pytest.mark.parametrize("way", ["library", "command line"])
def test_a_finished_run_is_not_done_again(way):
    before, entries = results("run-finished"), stages("run-finished")
    assert list(entries) == STAGES
    assert all(entry["done"] for entry in entries.values())
    if way == "library":
        assert run("run-finished") == {}
    else:
        assert "Report: run-finished/report.html" in command("run", "recipe.yaml", "--out", "run-finished")
    assert stages("run-finished") == entries
    assert results("run-finished") == before
    assert Path("run-finished/report.html").is_file()


@pytest.mark.parametrize(
    ("killed_in", "made"),
    [
        ("distill", {"distill": [5, 6], "finetune": [1, 2, 3, 4, 5, 6]}),
        ("finetune", {"finetune": [5, 6]}),
        ("sample", {"sample finetuned": [12]}),
    ],
)
def test_a_killed_run_goes_on_where_it_was(killed_in, made):
    """Steps up to the last saved state stay as they were logged, with their times; what follows them is made, once."""
    folder = f"run-{killed_in}"
    finished = [stage for stage, entry in stages(folder).items() if entry["done"]]
    before = results(folder)
    # measuring takes seconds a row, and is no stage that anything goes on in
    until = "report" if killed_in == "sample" else "sample"
    with told_of_unnamed_owners(killed_in != "sample"):
        found = run(folder, until=until)
    assert {stage: steps for stage, steps in found.items() if stage in made} == made
    assert not {"calibrate", *finished} & found.keys()
    after = results(folder)
    for path, what in before.items():
        if any(path.startswith((f"{folder}/{stage}/", f"{folder}/{stage}.")) for stage in finished):
            assert after[path] == what
    for stage, num_kept in (("distill", 5), ("finetune", 4)):
        kept = log(BEFORE / folder, stage)[:num_kept] if (BEFORE / folder / stage).exists() else []
        lines = log(folder, stage)
        assert lines[: len(kept)] == kept
        assert [json.loads(line)["step"] for line in lines] == list(range(stage == "finetune", 7))
    assert all(entry["done"] for entry in stages(folder).values())
    assert list(Path(folder).rglob("states")) == list(Path(folder).rglob("shards")) == []
    assert list(stages(folder)) == (STAGES if until == "report" else STAGES[:-1])
    if until == "report":
        assert [row["name"] for row in json.loads(Path(folder, "metrics.json").read_text())] == ROWS
        assert Path(folder, "report.html").is_file()
    for names in ("distill/operators.safetensors", "model/*.safetensors"):
        want, got = (next(Path(run).glob(names)) for run in ("run-finished", folder))
        # AdamW's first steps are nearly as large for a gradient of 1e-7 as for another, so rounding shows
        assert_close_files(got, want, 0.02)
    shared = "finetuned" if killed_in == "sample" else "pretrained"
    got, want = (
        grafting.read_samples(Path(run, "samples", f"{shared}.safetensors"))
        for run in (folder, "run-finished")
    )
    assert torch.equal(got.labels, want.labels)
    assert (got.images.float() - want.images.float()).abs().mean() < 1


def test_a_killed_run_goes_on_from_the_command_line():
    kept = log("run-finetune", "finetune")[:4]
    printed = command("run", "recipe.yaml", "--out", "run-finetune", "--until", "finetune")
    assert "Finetune: run-finetune/model" in printed
    assert log("run-finetune", "finetune")[:4] == kept
    assert len(log("run-finetune", "finetune")) == 6


def test_the_recipe_in_a_runs_folder_is_the_recipe():
    recipe, _ = settled_run(grafting.load_recipe("recipe.yaml"), torch.device("cpu"))
    for folder in ("run-distill", "run-finetune", "run-sample", "run-finished"):
        assert grafting.load_recipe(f"{folder}/recipe.yaml") == recipe


def test_operators_in_a_store_are_not_fitted_again():
    with told_of_unnamed_owners():
        made = run("run-with-store", until="distill", store=grafting.OperatorStore(Path("store")))
    assert set(made) == {"calibrate"}
    assert_same_tensors(
        load_file("run-with-store/distill/operators.safetensors"),
        load_file("run-finished/distill/operators.safetensors"),
    )


def test_samples_of_a_run_are_measured_as_they_were():
    printed = command("evaluate", "run-finished/samples/finetuned.safetensors", "--json")
    recorded = json.loads(Path("run-finished/metrics.json").read_text())[-1]
    found = json.loads(printed)
    for name in ("frechet", "kid", "agreement", "precision", "recall", "density", "coverage"):
        assert found[name] == pytest.approx(recorded[name], rel=1e-3, abs=1e-6)
    without = {"recorded"}
    assert {k: v for k, v in found["protocol"].items() if k not in without} == {
        k: v for k, v in recorded["protocol"].items() if k not in without
    }


# models


@pytest.mark.parametrize("folder", ["source", "graft", "run-finished"])
def test_a_model_folder_is_read_exactly(folder):
    model = grafting.load(folder)
    plan = grafting.plan_of(model)
    path = next(Path(folder).glob("**/diffusion_pytorch_model.safetensors"))
    assert_same_tensors(model.state_dict(), load_file(path))
    num_edits = {"source": 0, "graft": 4, "run-finished": 2}
    assert len(plan.edits) == num_edits[folder]


@pytest.mark.parametrize("folder", ["graft", "delta"])
def test_a_graft_computes_what_it_did(folder):
    model = grafting.load(folder)
    with torch.no_grad():
        got = model(*(OUTPUTS[name] for name in ("x", "t", "y")))
    assert_close(folder, got, OUTPUTS[folder], 1e-4)


def test_a_delta_is_made_whole():
    command("merge", "delta", "whole")
    delta, whole = (grafting.load(folder).state_dict() for folder in ("delta", "whole"))
    assert_same_tensors(delta, whole)
    source, own = (
        load_file("source/diffusion_pytorch_model.safetensors"),
        load_file("delta/delta.safetensors"),
    )
    assert own.keys() < delta.keys()
    assert_same_tensors({name: delta[name] for name in own}, own)
    borrowed = source.keys() & delta.keys() - own.keys()
    assert_same_tensors({name: delta[name] for name in borrowed}, {name: source[name] for name in borrowed})


def test_a_saved_graft_is_written_as_it_was(tmp_path):
    model = grafting.load("graft")
    plan = grafting.plan_of(model)
    grafting.save_model(tmp_path / "again", model, plan, base=grafting.Base(id="source"))
    assert (tmp_path / "again" / "config.json").read_text() == Path("graft/config.json").read_text()


def test_a_pipeline_draws_what_it_did():
    import grafting.portable  # noqa: F401, before `from_pretrained`, as the library's documentation has it

    pipeline = PixArtSigmaPipeline.from_pretrained("pipeline", tokenizer=None, text_encoder=None)
    stored = load_file("pipeline/transformer/diffusion_pytorch_model.safetensors")
    assert_same_tensors(pipeline.transformer.state_dict(), stored)
    generator = torch.Generator().manual_seed(7)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        prompt_embeds=torch.randn(1, 5, 8, generator=generator),
        prompt_attention_mask=torch.ones(1, 5),
        negative_prompt=None,
        negative_prompt_embeds=torch.randn(1, 5, 8, generator=generator),
        negative_prompt_attention_mask=torch.ones(1, 5),
        num_inference_steps=2,
        height=16,
        width=16,
        use_resolution_binning=False,
        generator=generator,
        output_type="pt",
    ).images
    assert_close("image", image, OUTPUTS["pipeline"], 1e-3)


# data and samples


def test_latents_are_read_exactly():
    latents = grafting.load_data(grafting.load_recipe("latents.yaml").data)
    x, y = latents.batch(torch.arange(6))
    assert torch.equal(y, OUTPUTS["latents.y"])
    # a sample is a mean and an exponential of a variance, whose last bit is the machine's
    assert_close("latents", x, OUTPUTS["latents.x"], 1e-6)


def test_latents_are_not_encoded_again():
    before = {path: path.read_bytes() for path in Path("latents").rglob("*") if path.is_file()}
    options = ["--images", "images", "--name", "two-classes", "--vae", "pipeline/vae", "--size", 16]
    command("data", "latents", "latents", *options, "--shard-size", 4, "--batch-size", 2)
    assert {path: path.read_bytes() for path in before} == before
    assert len(list(Path("latents").glob("*.safetensors"))) == 2


def test_a_recipe_on_latents_runs():
    recipe = grafting.load_recipe("latents.yaml")
    assert grafting.run(recipe, "on-latents", until="finetune").is_dir()


@pytest.mark.parametrize("path", ["samples.npz", "run-finished/samples/finetuned.safetensors"])
def test_samples_are_read(path):
    samples = grafting.read_samples(path)
    assert samples.images.shape == (12, 1, 32, 32)
    assert samples.images.float().std() > 10
    assert samples.labels.tolist() == [i % 10 for i in range(12)]
    assert samples.origin["sampling"]["num_images"] == 12
    assert grafting.open_samples(path).record["drawing"]["model"]["sha256"]


def test_samples_are_drawn_again_alike():
    options = ["--num", 12, "--batch-size", 4, "--steps", 3]
    command("sample", "source", *options, "--out", "again.npz")
    got, want = grafting.read_samples("again.npz"), grafting.read_samples("samples.npz")
    assert torch.equal(got.labels, want.labels)
    assert (got.images.float() - want.images.float()).abs().mean() < 1


def test_samples_drawn_before_are_not_drawn_again():
    drawn_with = grafting.open_samples("samples.npz").record["drawing"]
    if any(drawn_with[name] != version(name) for name in ("torch", "grafting")):
        pytest.skip(f"drawn with other versions, which count: {drawn_with}")
    options = ["--num", 12, "--batch-size", 4, "--steps", 3]
    assert "already drawn" in command("sample", "source", *options, "--out", "samples.npz")

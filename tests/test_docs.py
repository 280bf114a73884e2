"""What README and docs/ show works: Python runs, commands and their options exist, recipes are valid, links lead somewhere.

A Python block that cannot run here has `<!-- not run: WHY -->` in the line above it.
"""

import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from diffusers import PixArtSigmaPipeline
from typer.main import get_command
from typer.testing import CliRunner

import grafting
import tinypipeline
from grafting.cli import app
from grafting.editing.surgery import build_operators
from grafting.hosts import hosts
from grafting.runs.file import parse_recipe
from grafting.runs.sweep import Sweep, points
from latents import textpipelines
from toydata import noise_images

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
_BLOCK = re.compile(r"(?:<!-- (not run: [^>]+) -->\n)?```(\w+)\n(.*?)```", flags=re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def blocks(page: str, language: str) -> list[str]:
    return [code for why, name, code in _BLOCK.findall(PAGES[page]) if name == language and not why]


def run(page: str, names: dict[str, Any], edited: Callable[[str], str] = str) -> dict[str, Any]:
    """The names of a page after its Python, one block after the other."""
    for block in blocks(page, "python"):
        exec(edited(block), names)
    return names


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150
    example = blocks("README.md", "python")[0]
    assert len([line for line in example.splitlines() if line]) <= 10


def test_readme_grafts_a_pipeline_and_leaves_it_as_it_was(monkeypatch: pytest.MonkeyPatch, capsys):
    pipeline = tinypipeline.of(hosts()["pixart"].tiny())
    before, load = tinypipeline.draw(pipeline), PixArtSigmaPipeline.from_pretrained
    call = PixArtSigmaPipeline.__call__

    def draw(self: Any, *words: str, **vectors: Any) -> Any:
        """Asked by words, the pipeline draws from vectors: it has no text encoder."""
        return call(self, **vectors) if vectors else SimpleNamespace(images=tinypipeline.draw(self))

    monkeypatch.setattr(PixArtSigmaPipeline, "__call__", draw)
    monkeypatch.setattr(PixArtSigmaPipeline, "from_pretrained", lambda name: pipeline)
    names = run("README.md", {})
    assert "operator='window-2d'" in capsys.readouterr().out
    assert torch.equal(tinypipeline.draw(pipeline), before)
    assert not torch.equal(names["image"], before[0])
    assert torch.equal(tinypipeline.draw(load("my-pipeline"))[0], names["image"])


def test_prompts_latents_and_recipe_of_a_text_to_image_model():
    pipeline = textpipelines.pixart()
    pipeline.save_pretrained("my-pipeline")
    model = pipeline.transformer
    Path("words.txt").write_text("a red cat\na blue dog\nsun\n")
    Path("one.yaml").write_text(blocks("text-to-image.md", "yaml")[0])
    short = [
        "data={name: teacher, num_images: 8, steps: 1}",
        "distill.steps=1",
        "distill.holdout=4",
        "finetune.steps=1",
    ]
    sizes = ["distill.batch_size=2", "finetune.batch_size=2", "finetune.warmup_steps=0"]
    given = [word for setting in short + sizes for word in ("--set", setting)]
    result = CliRunner().invoke(app, ["run", "one.yaml", *given], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    captions = ["a ring", "two crosses", "a red bar"]

    def encode(words: str) -> tuple[torch.Tensor, torch.Tensor]:
        draw = torch.Generator().manual_seed(len(words))
        return torch.randn(4, model.config.caption_channels, generator=draw), torch.ones(4)

    latents = (torch.randn(600, *hosts()["pixart"].shape(model)), torch.arange(600) % 3)
    names = run("text-to-image.md", {"captions": captions, "encode": encode, "batches": [latents]})
    grafted = names["pipeline"].transformer
    assert [edit.operator.name for edit in grafting.plan_of(grafted).edits] == ["gated-conv-x"]
    prompts = grafting.Prompts("prompts")
    assert (len(prompts), prompts.words(1), prompts.dropout) == (3, "two crosses", 0.1)
    assert prompts.nulls(torch.tensor([0, 2])).tolist() == [3, 3]
    Path("recipe.yaml").write_text(next(b for b in blocks("text-to-image.md", "yaml") if "plan:" in b))
    result = CliRunner().invoke(app, ["check", "recipe.yaml"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "1 of 4 sites are edited" in result.stdout
    assert "The recipe is valid." in result.stdout


def test_extending_shows_an_operator_a_host_and_scores(capsys):
    names = run("extending.md", {})
    assert grafting.plan_of(names["transformer"]).edits[0].operator.name == "window-2d"
    said = capsys.readouterr().out
    assert said.count("Graft of") == 2
    assert "operator='mean'" in said
    images, labels = torch.zeros(2, 1, 32, 32), torch.tensor([0, 1])
    assert torch.isfinite(names["model"](images, torch.tensor([5, 500]), labels)).all()


def test_a_delta_is_saved_as_it_is_shown():
    names = run("faq.md", {})
    assert grafting.plan_of(names["again"]) == names["plan"]
    assert Path("my-delta/delta.safetensors").is_file()


def test_calibration_runs_as_it_is_shown(capsys):
    model = hosts()["dit"].tiny()
    edit = grafting.Replace(role="mlp", operator={"name": "mlp", "ratio": 3.0})
    names = {
        "calibrate": grafting.calibrate,
        "CalibrateConfig": lambda: grafting.CalibrateConfig(samples=32, batch_size=16),
        "model": model,
        "operators": build_operators(model, grafting.Plan(edits=[edit])),
        "data": noise_images(64, size=16),
    }
    run("initialisation.md", names)
    assert "fit_r2/blocks.0.mlp" in capsys.readouterr().out


def test_paired_scores_run_as_they_are_shown():
    task = torch.arange(60) % 6
    a, b = torch.rand(2, 60, dtype=torch.float64)
    run("statistics.md", {"scores_a": a, "scores_b": b, "task": task})


def test_every_python_block_is_run_or_says_why_not():
    files = ("test_docs.py", "test_quickstart_page.py", "test_my_pipeline.py", "test_scenes_model.py")
    here = "".join((Path(__file__).parent / name).read_text() for name in files)
    unseen = [page for page in PAGES if blocks(page, "python") and f'"{page}"' not in here]
    assert not unseen, f"no test runs the Python of {unseen}"


def commands(page: str) -> Iterator[list[str]]:
    """Calls of `grafting` in a page's shell blocks and inline code, as words."""
    shell = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL))
    for line in (*shell, *inline):
        words = shlex.split(line, comments=True) if line.count("'") % 2 == 0 else line.split()
        if "grafting" in words and words[0] in ("grafting", "torchrun"):
            yield words[words.index("grafting") + 1 :]


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_options_exist(page: str):
    for words in commands(page):
        command: Any = get_command(app)
        context = command.make_context("grafting", [], resilient_parsing=True)
        for word in words:
            if word in getattr(command, "commands", {}):
                command = command.commands[word]
        known = {
            option
            for parameter in command.get_params(context)
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        asked = {word.partition("=")[0] for word in words if word.startswith("--")}
        known |= {"--help", "--version"}
        is_named = command.name not in (None, "root") or not words or words[0].startswith(("-", "COMMAND"))
        assert is_named, f"{page}: no such command: grafting {' '.join(words)}"
        assert asked <= known, f"{page}: grafting {' '.join(words)}: no {', '.join(asked - known)}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")])
def test_recipes_are_valid(page: str):
    least = {"name": "shown", "data": {"name": "testbed-subset"}}
    for block in blocks(page, "yaml"):
        shown = yaml.safe_load(block)
        if "grids" in shown:  # of a sweep, whose base stands for itself
            plan = [{"role": "attention", "blocks": "odd", "operator": "softmax"}]
            settings = least | {"plan": plan, "finetune": {}}
            assert len(points(Sweep(name=shown["name"], grids=shown["grids"], settings=settings))) == 5
        else:
            parse_recipe(least | shown, source=page)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", *PAGES])
def test_links_lead_to_files(page: str):
    path = ROOT / page if (ROOT / page).exists() else ROOT / "docs" / page
    links = [link.partition("#")[0] for link in _LINK.findall(path.read_text()) if "://" not in link]
    missing = [link for link in links if link and not (path.parent / link).exists()]
    assert not missing, f"{page} links to {missing}"


def test_every_page_is_in_the_site():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    assert not [page for page in PAGES if page != "README.md" and f"- {page}" not in nav]


def test_pages_from_the_code_are_current():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import make_pages
    finally:
        sys.path.pop(0)
    for name, make in make_pages.PAGES.items():
        assert PAGES[name] == make(), f"docs/{name} is not what the code says: make pages"

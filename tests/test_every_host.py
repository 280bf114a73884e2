"""A whole recipe on every host that is asked by text: prompts and latents in folders, and from there as with classes."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from grafting.cli import app
from grafting.data import Prompt, Prompts, write_prompts
from grafting.data.latents import write_latents
from grafting.hosts import hosts
from grafting.sampling.files import read_samples

# tiny models of 3 channels, whose samples are pictures without an autoencoder; what a prompt is; the shape of one input
HOSTS = {
    "pixart": ({"in_channels": 3, "out_channels": 6}, {"encoder_hidden_states": 24}, (3, 16, 16), {}),
    "sd3": (
        {"in_channels": 3, "out_channels": 3},
        {"encoder_hidden_states": 24, "pooled_projections": 12},
        (3, 8, 8),
        {"sampler": "euler"},
    ),
    "flux": (
        {"in_channels": 12},
        {"encoder_hidden_states": 24, "pooled_projections": 12},
        (3, 8, 8),
        {"sampler": "heun", "cfg_scale": 1.0},
    ),
    "wan": (
        {"in_channels": 3, "out_channels": 3},
        {"encoder_hidden_states": 24},
        (3, 2, 8, 8),
        {"sampler": "dpm-solver++"},
    ),
}


def call(*args: object) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def prompts(folder: Path, sizes: dict[str, int], *, is_ragged: bool, seed: int = 0) -> str:
    """Six prompts and a null, each of its own length where the host masks what is padded; the hash of the folder."""
    draw = torch.Generator().manual_seed(seed)

    def prompt(number: int) -> Prompt:
        num_tokens = 3 + number % 3 if is_ragged else 5
        shapes = {
            name: (num_tokens, size) if name == "encoder_hidden_states" else (size,)
            for name, size in sizes.items()
        }
        return Prompt(
            f"prompt {number}", {n: torch.randn(shape, generator=draw) for n, shape in shapes.items()}
        )

    lengths = {"encoder_hidden_states": "encoder_attention_mask"} if is_ragged else None
    write_prompts(
        folder,
        map(prompt, range(6)),
        source="random",
        nulls=[prompt(0)],
        lengths=lengths,
        mask_dtype=torch.float32,
        dropout=0.1,
    )
    return Prompts(folder).sha256


@pytest.fixture(scope="module", params=HOSTS)
def ran(request, tmp_path_factory) -> tuple[str, Path]:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    config, sizes, shape, sampling = HOSTS[name]
    sha256 = prompts(folder / "prompts", sizes, is_ragged=name == "pixart")
    x = torch.randn(24, *shape, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    write_latents(
        folder / "latents",
        [(x, torch.arange(24) % 6)],
        source="random",
        vae="none",
        scale=1.0,
        num_classes=6,
        conditions_sha256=sha256,
    )
    tiny = {k: v for k, v in hosts()[name].tiny().config.items() if not k.startswith("_")}
    # what a host's class adds by itself
    asked = {k: v for k, v in tiny.items() if isinstance(v, int | float | str | bool | list | tuple)} | config
    recipe = {
        "name": name,
        "source": {"host": name, "config": json.loads(json.dumps(asked))},
        "plan": [{"role": "attention", "blocks": [1], "operator": {"name": "linear"}}],
        "data": {"name": "latents", "folder": str(folder / "latents")},
        "conditions": {"name": "prompts", "folder": str(folder / "prompts")},
        "distill": {"steps": 2, "batch_size": 4, "holdout": 8},
        "finetune": {"steps": 2, "batch_size": 4, "warmup_steps": 0, "output_weight": 1.0},
        "sample": {"sampler": "ddim", "steps": 2, "num_images": 7, "batch_size": 4, "shape": list(shape)}
        | sampling,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    call("run", folder / "recipe.yaml", "--out", folder / "run")
    return name, folder


def test_it_runs_from_stage_1_to_a_report(ran):
    name, folder = ran
    rows = json.loads((folder / "run/metrics.json").read_text())
    assert [row["name"] for row in rows] == ["pretrained", "random", "inherited", "distilled", "finetuned"]
    assert all(row["params"] > 0 and row["ms_per_image"] > 0 for row in rows)
    counted = json.loads(call("cost", folder / "recipe.yaml", "--json"))
    assert rows[0]["attention_flops"] < counted["model"]["flops"]["before"]
    samples = read_samples(folder / "run/samples/finetuned.safetensors")
    assert tuple(samples.images.shape) == (7, *HOSTS[name][2])
    assert samples.labels.tolist() == [0, 1, 2, 3, 4, 5, 0]
    assert samples.origin["sampling"]["conditions"]["name"] == "prompts"
    page = (folder / "run/report.html").read_text()
    for said in ("no suite has measured its images", "shows costs alone", '<span class="name">prompt</span>'):
        assert said in page
    assert "chet distance" not in page


def test_it_is_not_done_again(ran):
    _, folder = ran
    before = (folder / "run/distill/log.jsonl").read_bytes()
    call("run", folder / "recipe.yaml", "--out", folder / "run")
    assert (folder / "run/distill/log.jsonl").read_bytes() == before


def test_it_is_checked_and_counted(ran):
    _, folder = ran
    assert "The recipe is valid." in call("check", folder / "recipe.yaml")
    counted = json.loads(call("cost", folder / "recipe.yaml", "--json"))
    assert counted["recipe"] == ran[0]
    assert "finetune" in call("run", folder / "recipe.yaml", "--dry-run", "--device", "h100")


def test_it_is_sampled_and_its_locality_measured(ran, tmp_path):
    name, folder = ran
    shape = ",".join(map(str, HOSTS[name][2]))
    options = ("--prompts", folder / "prompts", "--shape", shape, "--steps", "2")
    sampler = "dpm-solver++" if name == "pixart" else "euler"
    call("sample", folder / "run", *options, "--sampler", sampler, "--num", "3", "--out", tmp_path / "s.npz")
    assert tuple(read_samples(tmp_path / "s.npz").images.shape) == (3, *HOSTS[name][2])
    source = folder / "source"
    if not source.exists():
        hosts()[name].tiny().save_pretrained(source)
    measured = json.loads(
        call(
            "locality",
            source,
            "--prompts",
            folder / "prompts",
            "--images",
            "2",
            "--steps",
            "2",
            "--cfg-scale",
            "1",
            "--shape",
            "4" + shape[1:],
            "--json",
        )
    )
    assert len(measured["sites"]) > 1


def test_latents_of_other_prompts_are_refused(ran, tmp_path):
    name, folder = ran
    sizes = HOSTS[name][1]
    prompts(tmp_path / "other", sizes, is_ragged=name == "pixart", seed=1)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["conditions"]["folder"] = str(tmp_path / "other")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(app, ["check", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 1
    assert "name those that the data were made for" in result.stderr

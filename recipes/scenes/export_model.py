"""Makes the bundled model of scenes from a pretraining run: a diffusers pipeline folder in bf16, with its card and picture.

    grafting run recipes/scenes/pretrain.yaml
    grafting run recipes/scenes/pretrain_more.yaml
    python recipes/scenes/export_model.py runs/scenes-pretrain runs/scenes-pretrain-more --notes "where and how long they ran"

Reads the runs' logs and the last one's model; judges 600 images at each of a few guidance scales; writes src/grafting/assets/scenes.
"""

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from PIL import Image
from torch import Tensor

from grafting.data.scenes import TASKS, Captions
from grafting.diffusion import FlowMatching
from grafting.evaluation import ScenesEvaluation, ScenesSuite
from grafting.hosts import host_of
from grafting.machine.files import sha256_of, write_bytes, write_json
from grafting.sampling.chain import SamplingConfig, sample

ASSETS = Path("src/grafting/assets/scenes")
GUIDANCE = (1.0, 1.5, 2.0, 3.0)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def main() -> None:
    options = parse_options()
    recipes = [yaml.safe_load((run / "recipe.yaml").read_text()) for run in options.runs]
    shift = recipes[0]["process"]["shift"]
    shutil.rmtree(options.out, ignore_errors=True)
    save_pipeline(options.runs[-1] / "model", options.out, shift=shift)
    model = PixArtTransformer2DModel.from_pretrained(options.out / "transformer", torch_dtype=torch.float32)
    scores = {}
    for scale in options.guidance:
        images, scores[scale] = judged(model, scale, shift=shift, count=options.images)
        print(
            f"guidance {scale:g}: exact {scores[scale].exact:.3f}, true {scores[scale].true:.3f}", flush=True
        )
        if scores[scale].exact == max(found.exact for found in scores.values()):
            save_picture(images, options.out / "samples.png")
    write_card(options.out, recipes, read_losses(options.runs), scores, notes=options.notes)
    write_checksums(options.out)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of the runs, each from the one before it")
    parser.add_argument("--out", type=Path, default=ASSETS, metavar="FOLDER")
    parser.add_argument("--images", type=int, default=600, help="to judge at each guidance scale")
    parser.add_argument("--guidance", type=float, nargs="+", default=GUIDANCE)
    parser.add_argument("--notes", default="", help="a sentence about the run, for the card")
    return parser.parse_args()


def save_pipeline(source: Path, out: Path, *, shift: float) -> None:
    """The model as `PixArtSigmaPipeline` loads it, with the sampler that its process asks for."""
    model = PixArtTransformer2DModel.from_pretrained(source).to(torch.bfloat16)
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        flow_shift=shift,
        thresholding=True,  # clips the predicted image to [-1, 1]
        sample_max_value=1.0,
    )
    parts = {"tokenizer": None, "text_encoder": None, "vae": None}
    PixArtSigmaPipeline(transformer=model, scheduler=scheduler, **parts).save_pretrained(out)
    config = json.loads((out / "transformer" / "config.json").read_text())
    config.pop("_name_or_path")  # of the run, on the machine that made it
    write_json(out / "transformer" / "config.json", config)
    (out / "transformer" / WEIGHTS).chmod(0o644)  # safetensors writes files that others may not read


def judged(
    model: PixArtTransformer2DModel, scale: float, *, shift: float, count: int
) -> tuple[Tensor, ScenesEvaluation]:
    """Images of a guidance scale, and what the judge says of them."""
    config = SamplingConfig(
        sampler="dpm-solver++",
        steps=20,
        cfg_scale=scale,
        clip=True,
        num_images=count,
        batch_size=60,
        precision="fp32",
    )
    denoiser = host_of(model).denoiser(model, Captions(), FlowMatching(scale=1000.0, shift=shift))
    origin = {"num_images": count, "labels": config.labels_rule, "weights_dtype": "bfloat16"}
    evaluator = ScenesSuite().open({"sampling": config.model_dump(mode="json"), **origin})()
    images = []
    for batch in sample(model.eval(), config, denoiser=denoiser):
        images.append(batch.images())
        evaluator.update(images[-1], batch.labels)
    found = evaluator.result()
    assert isinstance(found, ScenesEvaluation)
    return torch.cat(images), found


def save_picture(images: Tensor, path: Path, *, columns: int = 12, rows: int = 5) -> None:
    """The first images in a grid, each task a column, enlarged threefold."""
    cells = torch.nn.functional.pad(images[: columns * rows], (2, 2, 2, 2), value=255)
    _, channels, height, width = cells.shape
    grid = cells.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    picture = Image.fromarray(grid.reshape(rows * height, columns * width, channels).numpy())
    picture.resize((picture.width * 3, picture.height * 3), Image.Resampling.NEAREST).save(
        path, optimize=True
    )


def read_losses(runs: Sequence[Path]) -> dict[int, float]:
    """Mean losses of twenty parts of each run, by their last steps, counted from the first run on."""
    found: dict[int, float] = {}
    for run in runs:
        rows = [json.loads(line) for line in (run / "finetune" / "log.jsonl").read_text().splitlines()]
        losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
        steps, before = sorted(losses), max(found, default=0)
        parts = [steps[len(steps) * k // 20 : len(steps) * (k + 1) // 20] for k in range(20)]
        found |= {before + part[-1]: sum(losses[step] for step in part) / len(part) for part in parts if part}
    return found


def write_card(
    out: Path,
    recipes: Sequence[Mapping[str, Any]],
    losses: Mapping[int, float],
    scores: Mapping[float, ScenesEvaluation],
    *,
    notes: str,
) -> None:
    """The model's card."""
    weights, trainings = out / "transformer" / WEIGHTS, [recipe["finetune"] for recipe in recipes]
    figures = ("exact", "true", *(f"true_{task}" for task in TASKS), "twins", "twins_near", "twins_apart")
    figures = (*figures, "twins_far", "background")
    seen = sum(training["steps"] * training["batch_size"] for training in trainings)
    lines = [
        "# scenes: a small text-to-image PixArt, pretrained on drawn scenes",
        "",
        "`source: scenes` in a recipe. Its images, captions and judge are code: `grafting/data/scenes.py`, `evaluation/scenes.py`.",
        "",
        f"- **File:** `transformer/{WEIGHTS}`, {weights.stat().st_size:,} bytes, sha256 `{sha256_of(weights)}`; bfloat16, computed in float32",
        "- **Input:** 32x32 colour images in [-1, 1], step 0..1000, a caption of 6 tokens; **output:** velocity (flow matching)",
        f"- **Data:** scenes of seeds {recipes[0]['data']['seeds']}, drawn by this package. **Licence:** that of this package, Apache-2.0",
        "- **Made by:** the commands at the top of `recipes/scenes/export_model.py`",
        f"- **Training:** {seen:,} images, AdamW",
    ]
    lines += [
        f"    {number}. {training['steps']:,} steps of {training['batch_size']}, learning rate {training['lr']}, "
        f"warm-up {training['warmup_steps']}, linear cool-down over the last {training['cooldown_steps']:,}, EMA {training['ema_decay']}"
        for number, training in enumerate(trainings, 1)
    ]
    lines += [f"- **The runs:** {notes}"] if notes else []
    lines += ["", "| guidance | " + " | ".join(f"{scale:g}" for scale in scores) + " |"]
    lines += ["|---|" + "---|" * len(scores)]
    for name in figures:
        values = [getattr(found, name) for found in scores.values()]
        lines.append(f"| {name} | " + " | ".join("-" if v is None else f"{v:.3f}" for v in values) + " |")
    count = next(iter(scores.values())).num_images
    best = max(scores, key=lambda scale: scores[scale].exact)
    lines += [
        "",
        f"{count} images each, dpm-solver++ with 20 steps, seed 0, clipped. "
        f"`samples.png`: the first 60 at guidance {best:g}, a task a column.",
    ]
    lines += [
        "",
        "| step | loss |",
        "|---|---|",
        *(f"| {step:,} | {loss:.4f} |" for step, loss in losses.items()),
    ]
    write_bytes(out / "README.md", ("\n".join(lines) + "\n").encode())


def write_checksums(out: Path) -> None:
    """List the hash of every file that the package loads."""
    files = sorted(path for path in out.rglob("*") if path.suffix in {".safetensors", ".json"})
    write_json(out / "checksums.json", {path.relative_to(out).as_posix(): sha256_of(path) for path in files})


if __name__ == "__main__":
    main()

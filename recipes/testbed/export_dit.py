"""Puts the result of `pretrain.yaml` among the package's assets: weights in float16, config, loss curve, samples, card.

grafting run recipes/testbed/pretrain.yaml
python recipes/testbed/export_dit.py runs/testbed-pretrain
python recipes/testbed/make_assets.py --only checksums
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file

from grafting.machine.files import sha256_of, write_bytes
from grafting.report import write_grid
from grafting.weights.locate import CONFIG_NAME, WEIGHTS_NAME
from grafting.weights.tensors import save_tensors

NUM_CURVE_POINTS = 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the finished run's folder")
    parser.add_argument("--out", type=Path, default=Path("src/grafting/assets/testbed/dit"))
    parser.add_argument("--notes", default="", help="a sentence for the card: how the run went")
    options = parser.parse_args()
    tensors = load_file(options.run / "model" / WEIGHTS_NAME)
    save_tensors(
        options.out / WEIGHTS_NAME, {n: t.half() for n, t in tensors.items()}, metadata={"format": "pt"}
    )
    write_bytes(options.out / CONFIG_NAME, (options.run / "model" / CONFIG_NAME).read_bytes())
    samples = load_numpy(options.run / "samples" / "finetuned.safetensors")["images"]
    write_grid(samples[:100], options.out / "samples.png", columns=10, scale=2)
    write_bytes(options.out / "README.md", card(options.run, options.out, options.notes).encode())


def card(run: Path, out: Path, notes: str) -> str:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    settings = recipe["finetune"]
    [metrics] = json.loads((run / "metrics.json").read_text())
    weights = out / WEIGHTS_NAME
    images = settings["steps"] * settings["batch_size"]
    return f"""\
# testbed: a small class-conditional DiT, pretrained on Fashion-MNIST

The model that the quickstart, the tests and the testbed's tables start from. Its class is `grafting.models.dit.DiT`.

- **File:** `{weights.name}`, {weights.stat().st_size:,} bytes, sha256 `{sha256_of(weights)}`; float16, computed in float32
- **Parameters:** {metrics["params"]:,}
- **Input:** 32x32 grey images in [-1, 1], step 0..999, class 0..9 (10: no class); **output:** noise and variance
- **Data:** all 60,000 training images of Fashion-MNIST (arXiv:1708.07747), as packaged by Debian in `dataset-fashion-mnist`
- **Licence of the data:** MIT, copyright 2017 Zalando SE, https://tech.zalando.com
- **Licence of the weights:** that of this package, Apache-2.0
- **Made by:** `grafting run recipes/testbed/pretrain.yaml`, then `python recipes/testbed/export_dit.py`
- **Training:** {settings["steps"]:,} steps of batch {settings["batch_size"]} ({images:,} images), AdamW, learning rate {settings["lr"]:g}, warm-up {settings["warmup_steps"]},
  linear cool-down over the last {settings["cooldown_steps"]:,} steps, EMA {settings["ema_decay"]}, {settings["precision"]} autocast; PyTorch {torch.__version__}
{f"- **The run:** {notes}" if notes else ""}

| figure | value |
|---|---|
| Frechet distance | {metrics["frechet"]:.3f} ({metrics["frechet_low"]:.3f} to {metrics["frechet_high"]:.3f}) |
| classifier agreement | {metrics["agreement"]:.1%} |
| precision / recall | {metrics["precision"]:.3f} / {metrics["recall"]:.3f} |
| density / coverage | {metrics["density"]:.3f} / {metrics["coverage"]:.3f} |

Measured on {metrics["num_images"]:,} samples: {protocol_in_words(recipe["sample"])}; features by `testbed-classifier`, reference `fashion-mnist-train`.
`samples.png` shows the first 100, a class a column.

Loss curve (mean of the steps up to each):

| step | loss |
|---|---|
{curve(run / "finetune" / "log.jsonl", settings["steps"])}
"""


def protocol_in_words(sample: dict[str, Any]) -> str:
    low, high = sample["cfg_interval"]
    return (
        f"{sample['sampler']}, {sample['steps']} steps, cfg scale {sample['cfg_scale']:g} where {low:g} <= t/999 <= {high:g}, "
        f"seed {sample['seed']}, labels {sample['labels']}"
    )


def curve(log: Path, steps: int) -> str:
    """Rows of a table: the mean loss of each twentieth of training."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    ends = [steps * (i + 1) // NUM_CURVE_POINTS for i in range(NUM_CURVE_POINTS)]
    starts = [0, *ends[:-1]]
    rows = []
    for start, end in zip(starts, ends, strict=True):
        losses = [line["loss"] for line in lines if start < line["step"] <= end]
        rows.append(f"| {end:,} | {sum(losses) / len(losses):.4f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()

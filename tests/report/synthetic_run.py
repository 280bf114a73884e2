"""A run's folder as `recipe.run` leaves it, made of numpy: every part of it, with made-up figures."""

import json
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import save_file

SITES = [
    {
        "block": block,
        "role": role,
        "path": f"blocks.{block}.{'attn' if role == 'attention' else 'mlp'}",
        "operator": {"name": "hyena-x", "kernel_size": 4, "geometry": "centred", "init": "inherit"}
        if role == "attention" and block % 2
        else None,
    }
    for block in range(8)
    for role in ("attention", "mlp")
]
GRAFTED = [site["path"] for site in SITES if site["operator"]]

# frechet, its interval, agreement, parameters, attention FLOPs, ms an image
FIGURES = {
    "pretrained": (4.61, 4.42, 4.80, 0.953, 2_631_424, 10_485_760, 31.2),
    "random": (613.2, 605.0, 621.9, 0.104, 2_634_000, 9_961_472, 28.8),
    "inherited": (242.0, 238.0, 246.1, 0.31, 2_634_000, 9_961_472, 28.9),
    "distilled": (18.2, 17.6, 18.8, 0.87, 2_634_000, 9_961_472, 28.7),
    "finetuned": (5.12, 4.9, 5.34, 0.949, 2_634_000, 9_961_472, 28.8),
}


def protocol(num_images: int = 2000, batch_size: int = 100) -> dict:
    return {
        "sampling": {
            "sampler": "ddim",
            "steps": 50,
            "cfg_scale": 1.5,
            "seed": 0,
            "batch_size": batch_size,
            "device": "cpu",
        },
        "num_images": num_images,
        "labels": "i mod 10",
        "weights_dtype": "float32",
        "feature_network": {"name": "testbed-classifier", "sha256": "9f" * 32},
        "reference": {"name": "fashion-mnist-train", "sha256": "3c" * 32},
        "uint8_rule": "clamp(127.5 x + 128, 0, 255)",
        "metrics": {"precision_neighbours": 3, "density_neighbours": 5},
        "definitions": 1,
        "recorded": {"grafting": "0.1.0", "torch": "2.13.0"},
    }


def metric_rows() -> list[dict]:
    rows = []
    for name, (frechet, low, high, agreement, params, flops, ms) in FIGURES.items():
        row = {"name": name, "frechet": frechet, "frechet_low": low, "frechet_high": high}
        row |= {"agreement": agreement, "params": params, "attention_flops": flops, "ms_per_image": ms}
        row |= {
            "attention_mixing_flops": flops // 10,
            "kid": frechet / 1000,
            "precision": 0.8,
            "recall": 0.71,
        }
        row |= {"density": 0.93, "coverage": 0.88, "inception_score": 8.1, "num_images": 2000}
        row |= {
            "notes": ["the Fréchet distance is about 0.9 too high with 2000 images"],
            "protocol": protocol(batch_size=len(rows) + 1),
        }
        rows.append(row)
    return rows


def distill_steps(num_steps: int = 300) -> list[dict]:
    noise = np.random.default_rng(0)
    steps = []
    for step in range(num_steps + 1):
        values: dict = {"step": step, "seconds": 0.1 * step}
        for place, path in enumerate(GRAFTED):
            loss = (place + 1) * (0.03 + 0.4 * np.exp(-step / 40))
            if step:
                values[f"loss/{path}"] = float(loss * noise.lognormal(0, 0.15))
            if step % 100 == 0:
                values |= {
                    f"holdout_loss/{path}": float(loss),
                    f"r2/{path}": float(0.97 - loss / (place + 1) * 2),
                }
        steps.append(values)
    return steps


def finetune_steps(num_steps: int = 900) -> list[dict]:
    noise = np.random.default_rng(1)
    return [
        {
            "step": step,
            "seconds": 0.3 * step,
            "loss": float((0.055 + 0.03 * np.exp(-step / 120)) * noise.lognormal(0, 0.12)),
            "lr": 1e-4 * min(1.0, step / 100),
            "grad_norm": float(noise.lognormal(-1, 0.3)),
        }
        for step in range(1, num_steps + 1)
    ]


def garments(strength: float, num_images: int = 100, channels: int = 1, side: int = 32) -> np.ndarray:
    """Pale shapes [N, C, side, side] of ten kinds, less noise the larger `strength` is."""
    noise = np.random.default_rng(2)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    kinds = [np.abs(x) ** (1 + k % 4) + np.abs(y * (0.6 + k / 10)) ** (1 + k // 3) < 0.7 for k in range(10)]
    images = [strength * kinds[i % 10] * noise.uniform(0.5, 1) for i in range(num_images)]
    images = [i + (1 - strength) * noise.random((side, side)) for i in images]
    return (255 * np.stack(images).clip(0, 1)).astype(np.uint8)[:, None].repeat(channels, 1)


def write_samples(folder: Path, name: str, images: np.ndarray) -> None:
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    labels = np.arange(len(images), dtype=np.int64) % 10
    save_file({"images": images, "labels": labels}, folder / "samples" / f"{name}.safetensors")


def write_log(folder: Path, stage: str, steps: list[dict]) -> None:
    (folder / stage).mkdir(parents=True, exist_ok=True)
    (folder / stage / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))


def write_run(folder: Path, *, name: str = "quickstart") -> Path:
    """A whole run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {
        "name": name,
        "description": "Half of the attention of the bundled DiT becomes centred Hyena-X.",
        "source": "testbed",
        "plan": {"edits": [{"role": "attention", "blocks": "odd", "operator": "hyena-x"}]},
        "data": {"name": "testbed-subset"},
        "distill": {"steps": 300},
        "finetune": {"steps": 900},
        "sample": {"num_images": 100},
        "evaluate": {},
        "seed": 0,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (folder / "plan.json").write_text(json.dumps({"host": "dit", "plan": recipe["plan"], "sites": SITES}))
    write_log(folder, "distill", distill_steps())
    write_log(folder, "finetune", finetune_steps())
    strengths = {"pretrained": 1.0, "random": 0.0, "inherited": 0.3, "distilled": 0.7, "finetuned": 0.95}
    for model, strength in strengths.items():
        write_samples(folder, model, garments(strength))
    (folder / "metrics.json").write_text(json.dumps(metric_rows()))
    stages = {"distill": 62.5, "finetune": 181.2, "sample": 93.0, "evaluate": 12.3}
    manifest = {
        "format": 1,
        "recipe": name,
        "library": "0.1.0",
        "stages": {
            stage: {"inputs": "0", "done": True, "seconds": seconds, "outputs": {}}
            for stage, seconds in stages.items()
        },
        "machine": {"device": "cpu", "threads": 1, "torch": "2.13.0"},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder

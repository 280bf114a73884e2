"""A recipe whose every stage takes a moment: a random DiT of two blocks and 16 tokens, on the bundled images."""

TINY = {
    "name": "tiny",
    "source": {
        "host": "dit",
        "config": {
            "input_size": 32, "patch_size": 8, "in_channels": 1, "hidden_size": 32, "depth": 2, "num_heads": 2,
            "num_classes": 10,
        },
    },
    "plan": [{"role": "attention", "blocks": "odd", "operator": {"name": "hyena-x", "kernel_size": 3}}],
    "data": {"name": "testbed-subset"},
    "distill": {"steps": 2, "batch_size": 4, "holdout": 8},
    "finetune": {"steps": 2, "batch_size": 4, "warmup_steps": 0},
    "sample": {"sampler": "ddim", "steps": 2, "num_images": 20, "batch_size": 10, "cfg_scale": 1.0},
}  # fmt: skip

SAVED_OFTEN = TINY | {
    "distill": {"steps": 6, "batch_size": 4, "holdout": 8, "holdout_every": 3},
    "finetune": {"steps": 6, "batch_size": 4, "warmup_steps": 2, "ema_decay": 0.9},
    "save_every": 2,
}

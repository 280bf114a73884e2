"""The designs of arXiv:2506.05340 by name, as data: an operator and the settings with which it is the published one.

Each starts at random, as published: nothing is taken from the host. A preset is a name for settings, so a recipe that
wants others writes them out.
"""

PRESETS: dict[str, dict[str, str | float]] = {
    "hyena-se-published": {"name": "hyena-se", "geometry": "causal", "init": "random"},
    "hyena-x-published": {"name": "hyena-x", "geometry": "causal", "init": "random"},
    "hyena-y-published": {"name": "hyena-y", "geometry": "causal", "init": "random"},
    "mamba2-published": {"name": "mamba2", "direction": "causal", "init": "random"},
    "mlp-hyena-x-published": {"name": "mlp-hyena-x", "filters": "per-token", "init": "random"},
    "mlp-r3": {"name": "mlp", "ratio": 3.0, "init": "random"},
    "mlp-r4": {"name": "mlp", "ratio": 4.0, "init": "random"},
    "mlp-r6": {"name": "mlp", "ratio": 6.0, "init": "random"},
    "self-graft": {"name": "softmax", "projections": "random"},
    "swa": {"name": "window-1d", "window": 4, "projections": "random"},
}

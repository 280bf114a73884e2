"""Operators to be tried: each with its defaults, with every other value of its named choices, and with `MORE_SETTINGS`."""

from typing import Literal, get_args, get_origin

import pytest
import torch

from grafting.contract import Grid, KernelConfig, Site, TokenLayout
from grafting.operators import operator_configs

MORE_SETTINGS = {
    "hyena-se": [{"kernel_size": 3, "geometry": "2d"}],
    "hybrid": [{"first": "softmax", "second": {"name": "linear", "conv": 3}}],
    "linear": [{"conv": 3}, {"conv": 5, "feature_map": "softmax"}],
    "mamba2": [{"state_dim": 5, "head_dim": 4, "expand": 1, "conv_size": 1}],
    "mha": [{"num_heads": 2}],
    "mlp": [{"ratio": 1.5}],
    "mlp-hyena-x": [{"kernel_size": 3, "filters": "per-token"}],
    "ttt": [{"window": 1}],
    "window-1d": [{"window": 1}],
    "window-2d": [{"radius": 2, "border": "shifted"}],
    "gated-conv-se": [{"kernel_size": 3, "geometry": "2d"}],
}
DIM, NUM_HEADS = 16, 4
LAYOUTS = [
    TokenLayout(Grid(1, 1)),
    TokenLayout(Grid(7, 9)),
    TokenLayout(Grid(5, 20), before=5),
    TokenLayout(Grid(20, 5), after=5),
    TokenLayout(Grid(5, 6, frames=3)),
    TokenLayout(Grid(6, 5), before=2, after=3),
]


def choices(annotation):
    if annotation is bool:
        return (False, True)
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def variants():
    for name, config in operator_configs().items():
        fields = {key: field for key, field in config.model_fields.items() if key != "name"}
        one_changed = [
            {key: choice}
            for key, field in fields.items()
            for choice in choices(field.annotation)
            if choice != field.default
        ]
        for changed in ({}, *one_changed, *MORE_SETTINGS.get(name, [])):
            yield config(**changed)


def describe(value):
    if isinstance(value, TokenLayout):
        grid = value.grid
        text = f"{value.before}+" * bool(value.before) + f"+{value.after}" * bool(value.after)
        return f"{grid.frames}x{grid.rows}x{grid.cols}{text}"
    settings = {k: v for k, v in value.model_dump(exclude_defaults=True).items() if k != "name"}
    return "-".join([value.name, *(f"{k}={v}" for k, v in settings.items())])


def ordinary(config):
    """The layout that an operator is tried on: an image, or a video for one that needs frames."""
    return LAYOUTS[4] if config.name == "window-3d" else LAYOUTS[1]


def site_for(config, layout=None):
    layout = layout or ordinary(config)
    facts = {"num_heads": NUM_HEADS} if "attention" in config.roles else {"hidden_dim": 4 * DIM}
    role = "attention" if "attention" in config.roles else "mlp"
    return Site(
        role=role, block=0, path="part", dim=DIM, grid=layout.grid, num_text=layout.num_others, **facts
    )


def inputs_for(config, layout, *, batch=2, dtype=torch.float32):
    """q, k, v for a kernel and x for a mixer; the output must be shaped like the last of them."""
    num_tensors = 3 if isinstance(config, KernelConfig) else 1
    shape = (batch, layout.num_tokens, DIM)
    tensors = [torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(num_tensors)]
    if num_tensors == 1:
        return tensors
    return [x.detach().unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2).requires_grad_() for x in tensors]


def built(config, layout=None):
    """The operator with all parameters drawn anew, so that nothing is hidden by a start at zero or identity."""
    operator = config.build(site_for(config, layout))
    for parameter in operator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return operator


every_variant = pytest.mark.parametrize("config", list(variants()), ids=describe)
every_operator = pytest.mark.parametrize("config", [c() for c in operator_configs().values()], ids=describe)
every_fit = pytest.mark.parametrize(
    ("config", "layout"),
    [(c, layout) for c in variants() for layout in LAYOUTS if not c.faults(site_for(c, layout))],
    ids=describe,
)
KERNELS = [c for c in variants() if "key mask" in c.honours and not c.faults(site_for(c, LAYOUTS[-1]))]

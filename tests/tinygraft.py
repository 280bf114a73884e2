"""A small grafted model, and a saved one changed by someone who makes the hashes right."""

import json

import torch
from safetensors.torch import load_file, save_file

from grafting.editing.plan import Plan, Replace
from grafting.hosts import hosts
from grafting.machine.files import hash_json, sha256_of
from grafting.weights.locate import CONFIG_NAME, GRAFTED_NAME

HOST = hosts()["dit"]
PLAN = Plan(
    edits=(
        Replace(role="attention", blocks="odd", operator={"name": "hyena-x", "kernel_size": 3}),
        Replace(role="attention", blocks=[0], operator={"name": "window-1d", "window": 2}),
        Replace(role="mlp", blocks=[2], operator={"name": "mlp", "ratio": 2.0}),
    )
)


def example():
    """Inputs of a call of the tiny model."""
    torch.manual_seed(5)
    model = HOST.tiny()
    return HOST.example(model, rows=8, cols=8, batch_size=2)


def write_config(folder, config):
    """Write a config as someone would who makes its own hash right."""
    config["grafting"].pop("config_sha256")
    config["grafting"]["config_sha256"] = hash_json(config)
    (folder / CONFIG_NAME).write_text(json.dumps(config))


def edit_weights(folder, edit, *, name=GRAFTED_NAME):
    """Change the tensors of a folder in place, and its hashes with them."""
    tensors = load_file(folder / name)
    edit(tensors)
    save_file(tensors, folder / name)
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["grafting"]["weights_sha256"] = sha256_of(folder / name)
    write_config(folder, config)

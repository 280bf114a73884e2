"""Checkpoints as people keep them give the same weights; what is none is told what it is and what to do."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import graft
from grafting.errors import CheckpointError
from grafting.hosts import hosts
from grafting.weights.folder import load, save
from grafting.weights.published import PublishedFacts, convert_weights, read_file

FACTS = PublishedFacts(num_heads=2, num_classes=10)
DIT = hosts()["dit"]


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return DIT.tiny().state_dict()


def behind(prefix, tensors):
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


KEPT = {
    "as it is": lambda w: w,
    "DDP": lambda w: {"model": behind("module.", w)},
    "compiled": lambda w: behind("_orig_mod.", w),
    "compiled in DDP": lambda w: {"ema": behind("module._orig_mod.", w), "model": {"other": torch.ones(1)}},
    "Lightning": lambda w: {
        "state_dict": behind("model.", w),
        "hyper_parameters": {"lr": np.float64(1e-4), "folder": Path("data") / "x"},
        "pytorch-lightning_version": "2.4",
        "epoch": 3,
    },
    "training script": lambda w: {
        "model": behind("module.", w),
        "args": argparse.Namespace(lr=np.float32(1e-4), out=Path("/runs")),
        "best": np.float64(0.5),
        "step": np.int64(7),
        "random": np.arange(3),
    },
    "counted average": lambda w: {"ema": w | {"num_updates": torch.tensor(9), "decay": torch.tensor(0.99)}},
}


@pytest.mark.parametrize("kept", KEPT)
def test_weights_are_found_in_what_people_save(tmp_path, weights, kept):
    torch.save(KEPT[kept](weights), tmp_path / "model.pt")
    convert_weights(tmp_path / "model.pt", tmp_path / "out", FACTS)
    loaded = load(tmp_path / "out").state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in weights.items())


def test_prefixes_of_safetensors_come_off(tmp_path, weights):
    save_file(behind("_orig_mod.module.", weights), tmp_path / "model.safetensors")
    tensors, key = read_file(tmp_path / "model.safetensors")
    assert (tensors.keys(), key) == (weights.keys(), None)


class Whole:
    """A class of a training script, pickled as a whole."""


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "a Git LFS pointer.*git lfs pull",
        ),
        (b"\n <!DOCTYPE html>\n<html><body>sign in</body></html>", "an HTML page.*download the file itself"),
    ],
)
def test_what_is_no_checkpoint_is_told_what_it_is(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        convert_weights(tmp_path / name, tmp_path / "out", FACTS)


def test_pickled_objects_are_not_made(tmp_path):
    torch.save({"model": Whole()}, tmp_path / "model.pt")
    with pytest.raises(
        CheckpointError, match=r"GLOBAL .*Whole was not an allowed .*save the state dict alone"
    ):
        convert_weights(tmp_path / "model.pt", tmp_path / "out", FACTS)


def sparse(tensor):
    return tensor.to_sparse()


def not_finite(tensor):
    tensor = tensor.clone()
    tensor[3] = torch.nan
    return tensor


ODD = {
    "int8": (lambda t: t.to(torch.int8), "int8 .* is not of floating point: dequantise"),
    "complex": (lambda t: t.to(torch.complex64), "complex64 .* is not of floating point"),
    "sparse": (sparse, "is sparse, quantised or without values"),
    "meta": (lambda t: t.to("meta"), "is sparse, quantised or without values"),
    "quantised": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "is sparse, quantised or"),
    "NaN": (not_finite, "values that are not finite, the first in row 3"),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("odd", ODD)
def test_tensors_that_are_no_weights_are_refused_with_their_name(tmp_path, weights, odd):
    change, words = ODD[odd]
    name = "blocks.1.attn.qkv.bias"
    torch.save(weights | {name: change(weights[name])}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=rf"1 of \d+ tensors are no weights\n  {name}: .*{words}"):
        convert_weights(tmp_path / "model.pt", tmp_path / "out", FACTS)
    assert not (tmp_path / "out").exists()


def test_names_that_no_model_has_are_one_error(tmp_path, weights):
    for content, words in (
        ({3: torch.ones(2)} | weights, "holds no state dict"),
        (weights | {"blocks.1000000000.attn.qkv.weight": torch.ones(2, 2)}, "has block 1000000000"),
    ):
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises(CheckpointError, match=words):
            convert_weights(tmp_path / "model.pt", tmp_path / "out", FACTS)


def test_several_variants_alone_are_a_question(tmp_path):
    model = hosts()["pixart"].tiny()
    for variant in ("fp16", "non_ema"):
        model.save_pretrained(tmp_path, variant=variant)
    with pytest.raises(CheckpointError, match=r"several variants.*fp16.safetensors, .*non_ema.safetensors"):
        load(tmp_path)
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path).proj_out.weight, model.proj_out.weight)


class Adapted(torch.nn.Module):
    """A linear with an adapter, as peft wraps it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer


def test_a_model_with_adapters_is_not_saved(tmp_path):
    model = DIT.tiny()
    graft(model, Plan(edits=(Replace(role="attention", blocks=[1], operator="linear"),)))
    model.blocks[1].attn.attention.qkv = Adapted(model.blocks[1].attn.attention.qkv)
    with pytest.raises(
        CheckpointError, match=r"1 layers have adapters \(LoRA\), such as blocks.1.*: merge them"
    ):
        save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_weights_that_are_elsewhere_or_quantised_are_not_saved(tmp_path):
    model = DIT.tiny()
    model.blocks[0].mlp.to("meta")
    with pytest.raises(CheckpointError, match=r"blocks.0.mlp.fc1.weight has no values here, .*offloaded"):
        save(model, tmp_path)
    model = DIT.tiny()
    linear = model.blocks[0].mlp.fc1
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(CheckpointError, match=r"blocks.0.mlp.fc1.weight is quantised .*save it before"):
        save(model, tmp_path)

"""Converted weights compute what their published layout does, written out independently; whatever is amiss is named."""

import argparse
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import published
from closeness import assert_close
from grafting.data import bundled
from grafting.editing.plan import Plan
from grafting.errors import CheckpointError, HostError
from grafting.weights.folder import load
from grafting.weights.portable import Base, plan_of
from grafting.weights.published import LAYOUTS, PublishedFacts, convert_weights

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "dit.safetensors")
ORIGINAL = {name.removeprefix("model."): x for name, x in GOLDEN.items() if name.startswith("model.")}
GOLDEN_FACTS = PublishedFacts(num_heads=4, num_classes=10)

D, SIDE, PATCH, CHANNELS = 16, 4, 2, 3
TOKENS = SIDE**2
FACTS = PublishedFacts(num_heads=published.HEADS, num_classes=7, window=4)


def linears(**shapes):
    return {f"{n}.{k}": s if k == "weight" else s[:1] for n, s in shapes.items() for k in ("weight", "bias")}


IN_OUT = {"in_proj": (3 * D, D), "out_proj": (D, D)}
FILTER = {"short_filter": (3 * D, 1, 4)}
INNER = {"inner_filter": (D, 1, 4)}
HEADS, STATE, WIDE = 8, 5, 2 * D
MAMBA2 = {
    "in_proj.weight": (2 * WIDE + 2 * STATE + HEADS, D),
    "conv1d.weight": (WIDE + 2 * STATE, 1, 4),
    "conv1d.bias": (WIDE + 2 * STATE,),
    "dt_bias": (HEADS,),
    "A_log": (HEADS,),
    "D": (HEADS,),
    "norm.weight": (WIDE,),
    "out_proj.weight": (D, WIDE),
}
MLP_HYENA = linears(in_proj=(6 * D, D), short_filter=(TOKENS, 1, 4), out_proj=(D, 2 * D))

# what may stand in a block: the tensors' shapes, and what they compute
ATTENTION = {
    "": (linears(qkv=(3 * D, D), proj=(D, D)), published.mha),
    "hyena-se": (linears(**IN_OUT, **FILTER, **INNER), published.hyena),
    "hyena-x": (linears(**IN_OUT, **FILTER), published.hyena),
    "hyena-y": (linears(**IN_OUT, **INNER), published.hyena),
    "window-1d": (linears(Wqkv=(3 * D, D), out_proj=(D, D)), published.swa),
    "mamba2": (MAMBA2, published.mamba2),
}
MLPS = {
    "": (linears(fc1=(4 * D, D), fc2=(D, 4 * D)), published.mlp),
    "mlp": (linears(fc1=(3 * D, D), fc2=(D, 3 * D)), published.mlp),
    "mlp-hyena-x": (MLP_HYENA, published.mlp_hyena),
}


def tensors_of(*blocks, labels=8, learn_sigma=True):
    """Random published tensors of a DiT with these (attention, MLP) in its blocks, and the function of each module."""
    out = CHANNELS * (1 + learn_sigma)
    shapes = {
        **linears(**{"x_embedder.proj": (D, CHANNELS, PATCH, PATCH), "t_embedder.mlp.0": (D, 256)}),
        **linears(**{"t_embedder.mlp.2": (D, D), "final_layer.linear": (PATCH**2 * out, D)}),
        **linears(**{"final_layer.adaLN_modulation.1": (2 * D, D)}),
        "y_embedder.embedding_table.weight": (labels, D),
        "pos_embed": (1, TOKENS, D),
    }
    modules = {}
    for i, (attention, mlp) in enumerate(blocks):
        shapes |= linears(**{f"blocks.{i}.adaLN_modulation.1": (6 * D, D)})
        for part, (own, function) in (("attn", ATTENTION[attention]), ("mlp", MLPS[mlp])):
            shapes |= {f"blocks.{i}.{part}.{name}": shape for name, shape in own.items()}
            modules[f"blocks.{i}.{part}"] = function
    generator = torch.Generator().manual_seed(4)
    scale = {name: shape[-1] ** -0.5 if len(shape) == 2 else 0.5 for name, shape in shapes.items()}
    return {n: scale[n] * torch.randn(s, generator=generator) for n, s in shapes.items()}, modules


def inputs(num_classes=8):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4, CHANNELS, SIDE * PATCH, SIDE * PATCH, generator=generator)
    return x, torch.tensor([0, 100, 500, 999]), torch.randint(0, num_classes, (4,), generator=generator)


def saved(tmp_path, tensors, key="ema"):
    torch.save({key: tensors} if key else tensors, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def converted(tmp_path, tensors, facts=FACTS):
    convert_weights(saved(tmp_path, tensors), tmp_path / "out", facts)
    model = load(tmp_path / "out")
    return model, plan_of(model)


@torch.no_grad()
def compare(model, tensors, modules):
    want = published.dit(tensors, *inputs(), modules)
    for i, (got, expected) in enumerate(zip(model(*inputs()), want, strict=True)):
        assert_close(f"output {i}", got, expected, 1e-5)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("mlp", MLPS)
def test_every_layout_computes_what_was_published(tmp_path, attention, mlp):
    tensors, modules = tensors_of((attention, ""), ("", mlp), (attention, mlp))
    model, plan = converted(tmp_path, tensors)
    found = {(edit.role, edit.operator.name, edit.blocks) for edit in plan.edits}
    expected = {("attention", attention, (0, 2)), ("mlp", mlp, (1, 2))}
    assert found == {edit for edit in expected if edit[1]}
    compare(model, tensors, modules)


def test_a_mixture_of_all_layouts(tmp_path):
    blocks = [(a, m) for a, m in zip(ATTENTION, [*MLPS, *MLPS], strict=True)]
    tensors, modules = tensors_of(*blocks, learn_sigma=False)
    model, plan = converted(tmp_path, tensors)
    assert len(plan.edits) == len(ATTENTION) + len(MLPS) - 2
    assert not model.config.learn_sigma
    compare(model, tensors, modules)


def test_the_layouts_are_tested_here():
    assert {layout.operator for layout in LAYOUTS if layout.role == "attention"} == set(ATTENTION)
    assert {layout.operator for layout in LAYOUTS if layout.role == "mlp"} == set(MLPS) - {""}


def test_settings_are_read_from_shapes(tmp_path):
    _, plan = converted(tmp_path, tensors_of(("mamba2", "mlp"), ("hyena-se", "mlp-hyena-x"))[0])
    mamba2, hyena, mlp, mlp_hyena = (
        next(e.operator for e in plan.edits if e.operator.name == name)
        for name in ("mamba2", "hyena-se", "mlp", "mlp-hyena-x")
    )
    assert (mamba2.expand, mamba2.head_dim, mamba2.state_dim, mamba2.conv_size) == (2, 4, STATE, 4)
    assert mamba2.direction == "causal"
    assert (hyena.kernel_size, hyena.geometry) == (4, "causal")
    assert mlp.ratio == 3
    assert mlp_hyena.filters == "per-token"


@pytest.mark.parametrize("hidden", [29, 41, 47, 113])
def test_any_hidden_width_is_kept(tmp_path, hidden):
    tensors, modules = tensors_of(("", ""))
    for name, shape in linears(fc1=(hidden, D), fc2=(D, hidden)).items():
        tensors[f"blocks.0.mlp.{name}"] = torch.randn(shape)
    model, _ = converted(tmp_path, tensors)
    assert len(model.blocks[0].mlp.mixer.fc1.weight) == hidden
    compare(model, tensors, modules)


def test_the_base_mlp_may_have_another_ratio(tmp_path):
    tensors, modules = tensors_of(("", "mlp"), ("", "mlp"))
    model, plan = converted(tmp_path, tensors, FACTS.model_copy(update={"mlp_ratio": 3.0}))
    assert plan == Plan()
    compare(model, tensors, modules)


@pytest.mark.parametrize("key", ["ema", "model", None])
def test_the_original_is_read_with_and_without_a_key(tmp_path, key):
    convert_weights(saved(tmp_path, ORIGINAL, key), tmp_path / "out", GOLDEN_FACTS)
    model = load(tmp_path / "out")
    plan = plan_of(model)
    assert plan == Plan()
    with torch.no_grad():
        got = model(*(GOLDEN[f"forward.{name}"] for name in ("x", "t", "y")))
    for i, step in enumerate(GOLDEN["forward.t"].tolist()):
        assert_close(f"output at t = {step}", got[i], GOLDEN["forward.output"][i], 1e-5)
    origin = json.loads((tmp_path / "out" / "config.json").read_text())["_origin"]
    assert (origin["key"], origin["file"]) == (key, "model.pt")


def test_training_checkpoints_and_safetensors_are_read(tmp_path):
    whole = {"model": {}, "ema": ORIGINAL, "opt": {"state": {}}, "args": argparse.Namespace(lr=1e-4)}
    torch.save(whole, tmp_path / "0400000.pt")
    convert_weights(tmp_path / "0400000.pt", tmp_path / "a", GOLDEN_FACTS)
    save_file(ORIGINAL, tmp_path / "dit.safetensors")
    convert_weights(tmp_path / "dit.safetensors", tmp_path / "b", GOLDEN_FACTS)
    (tmp_path / "hub").mkdir()
    (tmp_path / "0400000.pt").rename(tmp_path / "hub" / "model.pt")
    convert_weights(tmp_path / "hub", tmp_path / "c", GOLDEN_FACTS)
    for folder in "abc":
        assert torch.equal(load(tmp_path / folder).pos_embed, ORIGINAL["pos_embed"])


def test_the_published_size_needs_no_facts(tmp_path):
    width, hyena = 1152, linears(in_proj=(3456, 1152), out_proj=(1152, 1152), short_filter=(3456, 1, 4))
    shapes = {
        **linears(**{"x_embedder.proj": (width, 4, 2, 2), "t_embedder.mlp.0": (width, 256)}),
        **linears(**{"t_embedder.mlp.2": (width, width), "final_layer.linear": (32, width)}),
        **linears(**{"final_layer.adaLN_modulation.1": (2 * width, width)}),
        "y_embedder.embedding_table.weight": (1001, width),
        "pos_embed": (1, 256, width),
        **{f"blocks.0.attn.{name}": shape for name, shape in hyena.items()},
        **{f"blocks.1.attn.{n}": s for n, s in linears(Wqkv=(3456, width), out_proj=(width, width)).items()},
    }
    for i in range(2):
        shapes |= linears(**{f"blocks.{i}.adaLN_modulation.1": (6 * width, width)})
        shapes |= linears(**{f"blocks.{i}.mlp.fc1": (4608, width), f"blocks.{i}.mlp.fc2": (width, 4608)})
    source = saved(tmp_path, {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()})
    model, plan, _ = convert_weights(source, tmp_path / "out")
    assert model.config.num_heads == 16
    assert (model.config.num_classes, model.config.input_size, model.config.depth) == (1000, 32, 2)
    assert [edit.operator.name for edit in plan.edits] == ["hyena-x", "window-1d"]
    assert plan.edits[1].operator.window == 4


def test_the_base_and_origin_are_recorded(tmp_path):
    tensors, _ = tensors_of(("hyena-x", ""))
    converted(tmp_path, tensors, FACTS.model_copy(update={"base": Base(id="facebook/DiT-XL-2-256")}))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["grafting"]["base"]["id"] == "facebook/DiT-XL-2-256"
    assert config["_origin"]["key"] == "ema"
    assert len(config["_origin"]["sha256"]) == 64


def refused(tmp_path, tensors, facts=FACTS):
    with pytest.raises(CheckpointError) as error:
        convert_weights(saved(tmp_path, tensors), tmp_path / "out", facts)
    assert not (tmp_path / "out").exists()
    return str(error.value)


def test_what_tensors_cannot_tell_is_asked_for_all_at_once(tmp_path):
    message = refused(
        tmp_path, tensors_of(("window-1d", ""), ("", ""), ("window-1d", ""))[0], PublishedFacts()
    )
    assert "3 faults" in message
    assert (
        "width 16 is not a published width (384: 6, 768: 12, 1024: 16, 1152: 16 heads): give --num-heads"
        in message
    )
    assert (
        "the table of 8 labels may or may not hold a null label: give --num-classes (7 if it does, 8"
        in message
    )
    assert (
        "blocks 0, 2 have sliding-window attention, whose window is not in its tensors: give --window"
        in message
    )


def test_facts_that_do_not_fit_are_refused(tmp_path):
    message = refused(tmp_path, tensors_of(("", ""))[0], PublishedFacts(num_heads=3, num_classes=5))
    assert "width 16 is not a multiple of 3 heads: give another --num-heads" in message
    assert "a table of 8 labels is not that of 5 classes: give another --num-classes" in message


def test_unknown_layouts_are_listed_with_the_known_ones(tmp_path):
    tensors, _ = tensors_of(("hyena-x", ""), ("hyena-x", ""), ("", ""))
    for block in (0, 1):
        tensors[f"blocks.{block}.attn.rotary.freqs"] = torch.zeros(2)
    del tensors["blocks.2.mlp.fc2.bias"]
    message = refused(tmp_path, tensors)
    assert "2 faults" in message
    assert re.search(
        r"blocks 0, 1, attn: found in_proj.bias, .*, rotary.freqs, .*\n\s+expected one of: .*mamba2:", message
    )
    assert "blocks 2, mlp: found fc1.bias, fc1.weight, fc2.weight\n" in message


def test_unknown_tensors_and_shapes_are_listed(tmp_path):
    tensors, _ = tensors_of(("hyena-se", ""), ("", "mlp-hyena-x"))
    tensors["extra.weight"] = torch.zeros(2)
    tensors["blocks.0.attn.inner_filter.weight"] = torch.zeros(D, 1, 3)
    tensors["blocks.1.mlp.short_filter.weight"] = torch.zeros(5, 1, 4)
    message = refused(tmp_path, tensors)
    assert "unexpected tensor extra.weight" in message
    assert "blocks.0.attn.mixer.inner_filter.weight has shape (16, 1, 3), expected (16, 1, 4)" in message
    assert "blocks.1.mlp.mixer.short_filter.weight has shape (5, 1, 4), expected (16, 1, 4)" in message


def test_what_is_no_dit_is_refused(tmp_path):
    assert "is not a DiT: expected x_embedder.proj.weight" in refused(
        tmp_path, {"conv.weight": torch.zeros(3)}
    )
    tensors, _ = tensors_of(("", ""))
    tensors["final_layer.linear.weight"] = torch.zeros(5 * PATCH**2, D)
    tensors["pos_embed"] = torch.zeros(1, 15, D)
    message = refused(tmp_path, tensors)
    assert "the head makes 5 channels, expected 3, or 6 with a variance" in message
    assert "pos_embed has 15 tokens, expected a square number" in message


class Runs:
    """An object whose unpickling runs code."""

    def __reduce__(self):
        return exec, ("raise SystemExit",)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    torch.save({"ema": Runs()}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="not a torch file of plain tensors"):
        convert_weights(tmp_path / "model.pt", tmp_path / "out")


def test_files_that_hold_no_state_dict_are_refused(tmp_path):
    for content, words in (([1], "holds a list, expected a state dict"), ({"a": 1}, "holds no state dict")):
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises(CheckpointError, match=words):
            convert_weights(tmp_path / "model.pt", tmp_path / "out")
    (tmp_path / "model.pt").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(CheckpointError, match="is not a torch file"):
        convert_weights(tmp_path / "model.pt", tmp_path / "out")
    with pytest.raises(CheckpointError, match="no file .*lost.pt"):
        convert_weights(tmp_path / "lost.pt", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is a model folder already, not published weights"):
        convert_weights(bundled.testbed_model_folder(), tmp_path / "out")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "model.safetensors").touch()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(HostError, match=r"holds a UNet2DConditionModel; .* is a UNet"):
        convert_weights(tmp_path / "unet", tmp_path / "out")
    with pytest.raises(CheckpointError, match="should hold one weights file .* found none"):
        convert_weights(tmp_path / "empty", tmp_path / "out")

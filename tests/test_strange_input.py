"""Inputs that strangers and bad disks hand over: each is one error that says what is wrong, before anything is allocated or written.

Their kinds are endless names and numbers, values of another type, files that claim what they are not, and folders with more in them
than was meant.
"""

import json
import os
import time

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import imagefiles
from grafting import cli
from grafting.data.images import list_image_folder, read_image_folder
from grafting.data.latents import INDEX_NAME, LatentsConfig, write_latents
from grafting.data.sources import image_folder
from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import graft
from grafting.errors import CheckpointError, DataError, GraftingError, RecipeError, RunError
from grafting.machine.files import hash_json
from grafting.models.dit import DiT
from grafting.report import report_page
from grafting.runs.file import load_recipe
from grafting.runs.folder import RunFolder
from grafting.runs.job import prepare
from grafting.runs.record import read_run
from grafting.runs.run import run
from grafting.runs.sweep import load_sweep
from grafting.weights.folder import load, load_model, save_delta, save_model
from grafting.weights.portable import Base
from grafting.weights.published import PublishedFacts, convert_weights
from tinyrecipe import TINY

CONFIG = TINY["source"]["config"]
EDIT = TINY["plan"][0]


def config(**changes):
    return {"source": {"host": "dit", "config": CONFIG | changes}}


def edit(**changes):
    return {"plan": [EDIT | changes]}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (edit(blocks="0-99999999999"), "no block 2"),
        (edit(blocks=f"0-{'9' * 5000}"), "names no blocks"),
        (edit(blocks=True), "blocks is true"),
        (edit(blocks=[True, False]), "blocks is a list with a boolean"),
        (edit(operator={"name": "hyena-x", "kernel_size": 1_000_000}), "kernel_size.*4096"),
        (edit(operator={"name": "hyena-x", "kernel_size": True}), "kernel_size is true"),
        (edit(operator={"name": {"a": "b"}}), "an operator is a name"),
        (edit(role="mlp", operator={"name": "mlp", "ratio": 1e9}), "ratio.*256"),
        (config(depth=1_000_000_000), "depth is 1e[+]09"),
        (config(depth=50, hidden_size=1 << 20), "GB"),
        (config(depth=0), "depth is 0; sizes are whole numbers above 0"),
        (config(depth=True), "depth is True"),
        (config(patch_size=0), "patch_size is 0"),
        (config(num_heads=0), "num_heads is 0"),
        (config(hidden_size=0), "hidden_size is 0"),
        (config(hidden_size=-32), "hidden_size is -32"),
        (config(hidden_size="32"), "hidden_size.*'32'"),
        (config(class_dropout_prob=float("nan")), "class_dropout_prob.*nan"),
        (config(mlp_ratio=1e9), "mlp_ratio is"),
        ({"source": config()["source"] | {"seed": 2**70}}, "seed.*below 2"),
        ({"data": {"name": "testbed-subset", "per_class": 1e30}}, "per_class"),
        ({"source": "x" * 10_000}, "name is too long"),
        ({"source": "a\0b"}, "zero byte|not allowed"),
        ({"name": "x" * 10_000}, "at most 200"),
        ({"name": ".."}, "name"),
        ({"name": "."}, "name"),
        ({"name": "a/../../b"}, "name"),
        ({"rows": []}, "at least one row"),
        ({"rows": ["pretrained", "pretrained"]}, "none twice"),
        ({"seed": True}, "seed is true"),
        ({"finetune": TINY["finetune"] | {"steps": True}}, "finetune.*steps is true"),
        ({"finetune": TINY["finetune"] | {"lr": float("inf")}}, "lr.*finite"),
        ({"finetune": TINY["finetune"] | {"lr": 1e38}}, "lr.*below 2"),
        ({"finetune": TINY["finetune"] | {"lr": "1e38"}}, "lr.*below 2"),
        ({"finetune": TINY["finetune"] | {"trainable": ["[[["]}}, "bracket is not closed"),
        ({"distill": TINY["distill"] | {"huber_delta": float("nan")}}, "huber_delta"),
        ({"description": 7}, "description.*string"),
    ],
    ids=str,
)  # fmt: skip
def test_a_recipe_is_refused_before_any_work(changes, says, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(TINY | changes))
    started = time.monotonic()
    with pytest.raises(GraftingError, match=f"(?s){says}") as caught:
        prepare(load_recipe(path))
    assert len(str(caught.value)) < 1500
    assert time.monotonic() - started < 20
    assert os.listdir(tmp_path) == ["recipe.yaml"]


def test_dates_and_patterns_are_texts(tmp_path):
    path = tmp_path / "recipe.yaml"
    finetune = yaml.safe_dump(
        TINY["finetune"] | {"trainable": ["blocks.*", "[xt]_embedder.*"]}, default_flow_style=True
    )
    path.write_text(
        yaml.safe_dump(TINY | {"finetune": None}).replace("finetune: null", f"finetune: {finetune}")
        + "description: 2001-99-99\n"
    )
    assert load_recipe(path).description == "2001-99-99"


def test_a_sweep_is_counted_before_it_is_made(tmp_path):
    path, lr = tmp_path / "sweep.yaml", {f"{n}": {"finetune.lr": 1e-3} for n in range(60)}
    path.write_text(yaml.safe_dump(TINY | {"grids": [{"axes": {f"a{n}": lr for n in range(4)}}]}))
    with pytest.raises(RecipeError, match="has 12960000 recipes; at most 10000"):
        load_sweep(path)
    path.write_text(yaml.safe_dump(TINY | {"grids": [{"axes": {"a": {"..": {}}}}]}))
    with pytest.raises(RecipeError, match="no name of a folder"):
        load_sweep(path)


def test_bases_without_end(tmp_path):
    for number in range(100):
        (tmp_path / f"{number}.yaml").write_text(f"base: ./{number + 1}.yaml\n")
    with pytest.raises(RecipeError, match="more than 32 files are the base of one another"):
        load_recipe(tmp_path / "0.yaml")


def test_a_path_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_model(tmp_path / "m", DiT(**CONFIG), Plan())
    assert load("~/m").config.depth == 2


@pytest.mark.parametrize(
    "arguments",
    [["sample", "{w}/model", "--num", "1000000000000000", "--out", "{w}/s.npz"], ["check", "x" * 10_000], ["sample", "x" * 10_000], ["report", "x" * 300]],
    ids=lambda arguments: " ".join(arguments)[:20],
)  # fmt: skip
def test_commands_end_at_once(arguments, tmp_path):
    save_model(tmp_path / "model", DiT(**CONFIG), Plan())
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(cli.app, [a.format(w=tmp_path) for a in arguments])
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    assert len(result.output) < 1500
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def models(tmp_path):
    """A base, a whole graft of it and a delta."""
    base = DiT(**CONFIG).eval()
    save_model(tmp_path / "base", base, Plan())
    plan = Plan(edits=(Replace(role="attention", blocks="odd", operator="hyena-x"),))
    graft(base, plan)
    save_model(tmp_path / "whole", base, plan)
    save_delta(tmp_path / "delta", base, plan, Base(id=str(tmp_path / "base")))
    return tmp_path


def change_config(folder, change, *, signs=True):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content)
    if signs and "grafting" in content:
        content["grafting"].pop("config_sha256", None)
        content["grafting"]["config_sha256"] = hash_json(content)
    path.write_text(json.dumps(content))


def drop_sums(content):
    del content["grafting"]["config_sha256"], content["grafting"]["weights_sha256"]


@pytest.mark.parametrize(
    ("change", "signs", "says"),
    [
        (lambda c: c["grafting"]["delta"].update(dtype="load"), True, "delta.dtype"),
        (lambda c: c["grafting"]["delta"].update(sha256={}), True, "borrowed tensors have no hash"),
        (lambda c: c["grafting"]["delta"].pop("borrowed"), True, "delta.borrowed: missing"),
        (lambda c: c["grafting"].update(delta=[]), True, "delta"),
        (lambda c: c["grafting"]["base"].update(id=7), True, "base"),
        (drop_sums, False, "has no SHA-256"),
        (lambda c: c["grafting"].pop("plan"), True, "plan: missing"),
        (lambda c: c.update(_class_name=["DiT"]), True, "_class_name"),
        (lambda c: c.update(depth=10**9), True, "depth is 1e[+]09"),
    ],
)
def test_the_config_of_a_delta(models, change, signs, says):
    change_config(models / "delta", change, signs=signs)
    with pytest.raises(GraftingError, match=says) as caught:
        load_model(models / "delta")
    assert len(str(caught.value)) < 1000


def test_a_delta_is_not_its_own_base(models):
    change_config(models / "delta", lambda c: c["grafting"]["base"].update(id=str(models / "delta")))
    with pytest.raises(CheckpointError, match="is its own base") as caught:
        load_model(models / "delta")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "content", ["", "[]", '{"_class_name": ', "{}", "7", '{"_class_name": "DiT", "depth": [1]}']
)
def test_a_config_that_is_none(models, content):
    (models / "base" / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="config.json"):
        load_model(models / "base")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": "../w.safetensors"}}', '{"weight_map": {"a": "/w.safetensors"}}', '{"weight_map": {"a": 7}}'],
)  # fmt: skip
def test_an_index_of_weights(models, content):
    folder = models / "base"
    (folder / "diffusion_pytorch_model.safetensors").rename(models / "w.safetensors")
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="index.json is not an index of weights"):
        load_model(folder)


@pytest.fixture
def latents(tmp_path):
    folder = tmp_path / "latents"
    batches = [(torch.randn(6, 4, 2, 2), torch.arange(6) % 3)]
    write_latents(folder, batches, source="toy", vae="toy", scale=0.5, num_classes=3, shard_size=3)
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "load"}, {"dtype": "int64"}, {"shape": [4, 10**9, 10**9]}, {"shape": [4]}, {"shards": []}, {"num_classes": True},
        {"scale": 0}, {"shift": None}, {"items": {"file": "../../passwd", "sha256": ""}}, {"mirrored": 1}, {"other": 1},
        {"shards": [{"file": "/etc/passwd", "count": 1, "bytes": 900, "sha256": ""}]},
        {"shards": [{"file": "latents-00000.safetensors", "count": 10**12, "bytes": 280, "sha256": ""}]},
    ],
    ids=str,
)  # fmt: skip
def test_an_index_of_latents(latents, change):
    index = json.loads((latents / INDEX_NAME).read_text())
    (latents / INDEX_NAME).write_text(json.dumps(index | change))
    with pytest.raises(DataError, match="is not an index of latents"):
        LatentsConfig(folder=latents).load()


@pytest.mark.parametrize("label", [3, -1])
def test_labels_of_latents_are_classes(latents, label):
    """The null label, which follows the classes, would train the unconditional model without a word."""
    path = latents / "latents-00001.safetensors"
    tensors = load_file(path)
    tensors["labels"][0] = label
    save_file(tensors, path)
    data = LatentsConfig(folder=latents, verify=False).load()
    with pytest.raises(DataError, match=rf"has labels .*{label}.*; classes are 0..2"):
        data.batch(torch.tensor([3]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.update({"blocks.1000000000.attn.qkv.weight": torch.ones(3)}), "block 1000000000, and tensors of 3 blocks"),
        (lambda t: t.update({7: torch.ones(3)}), "no state dict"),
        (lambda t: t.update({"x_embedder.proj.weight": torch.ones(3).to_sparse()}), "sparse"),
        (lambda t: t.update({"x_embedder.proj.weight": torch.empty(3, device="meta")}), "without values"),
        (lambda t: t.update({"x_embedder.proj.bias": torch.empty(0)}), "has shape"),
        (lambda t: t.update({"x_embedder.proj.bias": torch.full((32,), float("nan"))}), "no weights"),
        (lambda t: t.update({"x_embedder.proj.bias": torch.ones(32, dtype=torch.int8)}), "no weights"),
        (lambda t: t.update({"x_embedder.proj.bias": torch.ones(32, dtype=torch.complex64)}), "no weights"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_weights_of_a_stranger(change, says, tmp_path):
    tensors = dict(DiT(**CONFIG).state_dict())
    change(tensors)
    torch.save(tensors, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=says):
        convert_weights(tmp_path / "w.pt", tmp_path / "out", PublishedFacts(num_heads=2, num_classes=10))
    assert not (tmp_path / "out").exists()


def test_a_manifest_that_is_signed_and_says_nothing_of_outputs(tmp_path):
    with RunFolder(tmp_path, recipe_name="r") as folder, folder.stage("s", 1):
        pass
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["stages"]["s"]["outputs"], manifest["sha256"]
    path.write_text(json.dumps(manifest | {"sha256": hash_json(manifest)}))
    (tmp_path / "manifest.previous.json").unlink()
    with pytest.raises(RunError, match="it is done, and has no outputs"):
        RunFolder(tmp_path, recipe_name="r")


def test_a_plan_of_many_blocks_has_no_picture(tmp_path):
    site = {"block": 10**9, "role": "attention", "path": "blocks.0.attn", "operator": None}
    (tmp_path / "plan.json").write_text(json.dumps({"host": "dit", "plan": {}, "sites": [site]}))
    with pytest.raises(RunError, match="plan.json is not a plan: sites.0.block"):
        report_page(read_run(tmp_path))


@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: path.write_text("")], ids=["lost", "emptied"]
)
def test_a_run_without_the_log_of_its_samples_is_measured(damage, tmp_path):
    recipe = TINY | {"distill": None, "finetune": None, "rows": ["pretrained"]}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in recipe.items() if value is not None}))
    folder = run(load_recipe(path), tmp_path / "run", until="sample")
    damage(folder / "samples" / "pretrained" / "log.jsonl")
    run(load_recipe(path), folder)
    (row,) = json.loads((folder / "metrics.json").read_text())
    assert row["ms_per_image"] is None
    assert row["params"] > 0


@pytest.fixture
def pictures(tmp_path):
    """A folder of classes in which macOS and a notebook have been, with a picture of each kind."""
    folder = imagefiles.write_folder(tmp_path / "images")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "0.png").write_bytes(imagefiles.encoded("Bag", 0))
    (folder / "Bag" / "._0.png").write_bytes(b"\0\5\x16\7")
    (folder / "Bag" / "9.webp").write_bytes(imagefiles.encoded("Bag", 3, kind="WEBP"))
    return folder


def test_one_reader_of_image_folders_passes_over_what_is_hidden(pictures):
    listing, stream = list_image_folder(pictures), image_folder(pictures)
    assert list(listing.ids) == list(stream.ids)
    assert listing.labels.tolist() == list(stream.labels)
    assert listing.num_classes == stream.num_classes == 3
    assert "Bag/9.webp" in listing.ids
    assert not any(part.startswith(".") for name in listing.ids for part in name.split("/"))
    assert len(read_image_folder(pictures, size=8)) == len(listing.ids)


@pytest.mark.parametrize(
    "read", [lambda folder: list_image_folder(folder), lambda folder: image_folder(folder)]
)
def test_a_file_name_that_is_not_utf8_is_named(read, pictures):
    (pictures / "Coat" / os.fsdecode(b"caf\xe9.png")).write_bytes(imagefiles.encoded("Coat", 0))
    with pytest.raises(DataError, match=r"caf\\udce9.png', a name that is not UTF-8"):
        read(pictures)


def test_sixteen_bits_in_an_image_folder(pictures):
    Image.fromarray(np.full((28, 28), 30_000, np.uint16)).save(pictures / "Dress" / "Dress_000.png")
    images = read_image_folder(pictures, size=28, channels=1)
    place = list_image_folder(pictures).ids.index("Dress/Dress_000.png")
    assert images.images[place].unique().tolist() == [117]


def test_a_pipe_among_pictures_is_refused(pictures):
    os.mkfifo(pictures / "Coat" / "pipe.png")
    with pytest.raises(DataError, match="pipe.png .*no plain file"):
        read_image_folder(pictures, size=8)

"""Every kind of bad input that is known, and what is said of it: one message that names what was asked and what is allowed.

Each is given to the command line in a folder of good and bad files, in which nothing may change.
"""

import json
import pickle
import re
import shutil
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from commandline import call
from grafting.data.latents import write_latents
from grafting.editing.plan import Plan
from grafting.editing.surgery import graft
from grafting.machine.files import sha256_of
from grafting.models.dit import DiT
from grafting.runs.folder import RunFolder
from grafting.weights.folder import save_model

CONFIG = {
    "input_size": 32, "patch_size": 8, "in_channels": 1, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 10,
}  # fmt: skip
SOURCE = {"host": "dit", "config": CONFIG}
PLAN = [{"role": "attention", "blocks": "odd", "operator": "hyena-x"}]
DISTILL = {"steps": 2, "batch_size": 4, "holdout": 8}
FINETUNE = {"steps": 2, "batch_size": 4, "warmup_steps": 0}
SAMPLE = {"sampler": "ddim", "steps": 2, "num_images": 20, "cfg_scale": 1.0}
RECIPE = {
    "name": "tiny", "source": SOURCE, "plan": PLAN, "data": {"name": "testbed-subset"},
    "distill": DISTILL, "finetune": FINETUNE, "sample": SAMPLE,
}  # fmt: skip
LATENTS = {**CONFIG, "input_size": 4, "patch_size": 2, "in_channels": 4}


class Bad(NamedTuple):
    """A command with something wrong, and what its message has to say; `{w}` in either is the folder of files."""

    name: str
    arguments: list[str]
    messages: list[str]  # regular expressions
    code: int = 1
    recipe: dict[str, Any] | str | None = None  # a file {w}/recipe.yaml
    environment: dict[str, str] = {}


def runs(name: str, changes: dict[str, Any] | str, *messages: str, out: str = "{w}/out") -> Bad:
    """A recipe that differs from a good one, or a whole file's text."""
    recipe = changes if isinstance(changes, str) else RECIPE | changes
    return Bad(name, ["run", "{w}/recipe.yaml", "--out", out], list(messages), recipe=recipe)


def calls(name: str, arguments: str, *messages: str, code: int = 1, **environment: str) -> Bad:
    return Bad(name, arguments.split(), list(messages), code, RECIPE, environment)


def edits(name: str, edit: dict[str, Any], *messages: str) -> Bad:
    return runs(name, {"plan": [edit]}, *messages)


def reads(name: str, data: dict[str, Any], *messages: str, **source: Any) -> Bad:
    config = LATENTS if data["name"] == "latents" else CONFIG
    changes = {"data": data, "source": {"host": "dit", "config": {**config, **source}}}
    return runs(name, changes | ({"sample": None} if data["name"] == "latents" else {}), *messages)


def images(folder: str, **more: Any) -> dict[str, Any]:
    return {"name": "image-folder", "folder": f"{{w}}/{folder}", "size": 32, "channels": 1, **more}


def latents(folder: str, **more: Any) -> dict[str, Any]:
    return {"name": "latents", "folder": f"{{w}}/{folder}", **more}


RECIPES = [
    runs("unknown key", {"speed": 3}, "1 fault in .*recipe.yaml", "speed: unknown key"),
    runs("unknown key inside", {"distill": DISTILL | {"step": 3}}, "distill.step: unknown key"),
    runs("no data", yaml.safe_dump({"name": "x"}), "data: missing; a recipe without a plan"),
    runs("unknown data", {"data": {"name": "cifar"}}, "data: .*cifar", "testbed-subset"),
    runs("empty recipe", "", "recipe.yaml is empty", "a recipe is a mapping such as `name: my-run`"),
    runs("list for a recipe", "- a\n", "holds a list", "a recipe is a mapping"),
    runs("no YAML", "name: [", "recipe.yaml is not YAML"),
    runs("YAML with code", "!!python/object/apply:os.system ['touch /tmp/executed']", "is not YAML"),
    runs("key twice", "name: x\nseed: 1\nname: y\n", "is not YAML: name is given twice, in lines 1 and 3"),
    runs("own base", "base: recipe.yaml\n", "recipe.yaml is its own base"),
    runs("missing base", "base: other.yaml\n", "no recipe file .*other.yaml"),
    runs("sweep for a recipe", "name: x\ngrids: [{axes: {}}]\n", "holds many recipes", "grafting sweep"),
    runs("path for a name", {"name": "a/b"}, "name: .*pattern"),
    runs("negative seed", {"seed": -1}, "seed: .*greater than or equal to 0", "-1"),
    runs("save_every 0", {"save_every": 0}, "save_every: .*greater than 0", "0"),
    runs("unknown row", {"rows": ["best"]}, "rows.0", "'pretrained'.*'finetuned'", "best"),
    runs("negative steps", {"distill": DISTILL | {"steps": -5}}, "distill.steps: .*greater than or equal to 0", "-5"),
    runs("lr is not a number", {"finetune": FINETUNE | {"lr": float("nan")}}, "finetune.lr: ", "nan"),
    runs("lr is a word", {"finetune": FINETUNE | {"lr": "fast"}}, "finetune.lr: .*number", "fast"),
    runs("ema_decay 1", {"finetune": FINETUNE | {"ema_decay": 1}}, "ema_decay: .*less than 1"),
    runs("unknown precision", {"finetune": FINETUNE | {"precision": "fp8"}}, "precision: .*'fp32' or 'bf16'", "fp8"),
    runs("unknown loss", {"distill": DISTILL | {"loss": "l3"}}, "distill.loss: .*'l1', 'l2' or 'huber'", "l3"),
    runs(
        "cache of a student",
        {"distill": DISTILL | {"cache_samples": 8, "inputs": "student"}},
        "cache_samples requires inputs: teacher",
    ),
    runs("all held out", {"distill": DISTILL | {"holdout": 6000}}, "holds out 6000 images", "the data has 6000"),
    runs(
        "more images than there are",
        {"distill": DISTILL | {"images": 7000}},
        "train on 7000 images", "has 6000, of which 8 are held out: 5992 are left",
    ),
    runs(
        "no objective",
        {"finetune": FINETUNE | {"diffusion_weight": 0, "output_weight": 0}},
        "stage 2 has no objective: diffusion_weight and output_weight are both 0",
    ),
    runs(
        "nothing to train",
        {"finetune": FINETUNE | {"trainable": ["blocks.9.*"]}},
        "trainable: .*blocks.9.* selects none of the model's [0-9]+ parameters, such as ",
    ),
    edits("block out of range", {"role": "attention", "blocks": [1, 9], "operator": "softmax"}, "no block 9", r"blocks 0\.\.1"),
    edits("plan of no block", {"role": "attention", "blocks": [], "operator": "softmax"}, "plan.0.blocks: names no block"),
    edits("block named twice", {"role": "attention", "blocks": [1, 1], "operator": "softmax"}, "named twice"),
    edits("no block", {"role": "attention", "blocks": "some", "operator": "softmax"}, "'some' names no blocks", "write all, odd"),
    edits("range backwards", {"role": "attention", "blocks": "8-2", "operator": "softmax"}, "'8-2': a range ends before it begins"),
    edits("unknown role", {"role": "attn", "operator": "softmax"}, "role: .*'attention' or 'mlp'", "attn"),
    edits("unknown operator", {"role": "attention", "operator": "hyena-q"}, "no operator 'hyena-q'", "there are .*hyena-x"),
    edits("unknown setting", {"role": "attention", "operator": {"name": "hyena-x", "size": 3}}, "size: unknown key"),
    edits("MLP at attention", {"role": "attention", "operator": "mlp"}, "mlp replaces mlp, not attention"),
    edits("attention at MLP", {"role": "mlp", "operator": "hyena-x"}, "hyena-x replaces attention, not mlp"),
    edits("heads that do not fit", {"role": "attention", "operator": {"name": "mha", "num_heads": 5}}, "32.* 5"),
    edits("window too large", {"role": "attention", "operator": {"name": "window-2d", "radius": 4}}, "9 .*4"),
    edits("negative kernel", {"role": "attention", "operator": {"name": "hyena-x", "kernel_size": -3}}, "kernel_size: .*greater than", "-3"),
    edits("one block merged", {"edit": "merge", "blocks": [0]}, "1 blocks do not form pairs", r"blocks 0\.\.1"),
    edits("all blocks dropped", {"edit": "drop", "blocks": "all"}, "drop"),
    runs("no such model", {"source": "nowhere"}, "no model in nowhere"),
    runs("unknown host", {"source": {"host": "vit", "config": {}}}, "no host 'vit'; there are .*dit"),
    runs("heads do not divide", {"source": {"host": "dit", "config": CONFIG | {"num_heads": 5}}}, "multiple of num_heads 5", "32"),
    runs("unknown argument", {"source": {"host": "dit", "config": {"heads": 5}}}, "cannot be made from this config", "heads"),
    runs("negative width", {"source": {"host": "dit", "config": CONFIG | {"hidden_size": -32}}}, "dit cannot be made from this config: hidden_size is -32"),
    runs("grafted source", {"source": "{w}/grafted"}, "grafted is already grafted", "a recipe starts from a model without a plan"),
    runs(
        "weights of another model",
        {"source": {**SOURCE, "config": CONFIG | {"depth": 3}, "weights": "{w}/dit"}},
        "the model in {w}/dit", "depth is 2 there, 3 in the recipe",
    ),
    runs("data of another shape", {"source": {"host": "dit", "config": CONFIG | {"in_channels": 3}}}, r"shape \[1, 32, 32\]: dit makes inputs of \[3, 32, 32\] alone"),
    runs("more classes than known", {"source": {"host": "dit", "config": CONFIG | {"num_classes": 5}}}, "10 classes, the model knows 5"),
    runs("label out of range", {"sample": SAMPLE | {"labels": [3, 11]}}, r"labels \[11\] are out of range", r"0\.\.9"),
    runs("unknown sampler", {"sample": SAMPLE | {"sampler": "euler"}}, "sampler euler does not run predicted noise, which takes ddpm, ddim", "euler"),
    runs("no images", {"sample": SAMPLE | {"num_images": 0}}, "num_images: .*greater than 0", "0"),
    runs("negative sampling steps", {"sample": SAMPLE | {"steps": -1}}, "sample.steps: ", "-1"),
    runs("too many steps", {"sample": SAMPLE | {"sampler": "dpm-solver++", "steps": 1000}}, "at most 999 steps; found 1000"),
    runs("interval backwards", {"sample": SAMPLE | {"cfg_interval": [0.8, 0.2]}}, r"0 <= low <= high <= 1; found \[0.8, 0.2\]"),
    runs(
        "guidance without a null label",
        {"source": {"host": "dit", "config": CONFIG | {"class_dropout_prob": 0.0}}, "sample": SAMPLE | {"cfg_scale": 2.0}},
        "cfg_scale", "no null label",
    ),
    runs("too few images to measure", {"sample": SAMPLE | {"num_images": 3}}, "3 images", "10"),
    runs("latents without autoencoder", {"source": {"host": "dit", "config": LATENTS}}, "latents of 4 channels", "`vae: {{source: ...}}` in a recipe"),
    runs("folder of another recipe", {}, "run-of-other belongs to recipe 'other', not 'tiny'", "--out", out="{w}/run-of-other"),
    runs("folder of something else", {}, "thesis exists and is not a run folder: name another", out="{w}/thesis"),
    runs("file for a folder", {}, "notes.txt exists and is not a run folder", out="{w}/notes.txt"),
    runs("folder in use", {}, r"another run is using {w}/run-in-use \(process \d+ on .+\): wait for it to finish", out="{w}/run-in-use"),
    runs("damaged manifests", {}, "manifest.json is not JSON", "previous.json is missing", "delete both", out="{w}/run-damaged"),
    runs("folder that cannot be written", {}, "cannot write /proc/grafting/run: ", out="/proc/grafting/run"),
]  # fmt: skip

DATA = [
    reads("no image folder", images("nowhere"), "no folder {w}/nowhere: give a folder with one subfolder of images per class"),
    reads("images without classes", images("flat"), "{w}/flat has no subfolder"),
    reads("class without images", images("hollow"), "{w}/hollow/b has no image", r"\.png"),
    reads("text for an image", images("text"), r"{w}/text/a/0\.png is not a picture that can be read"),
    reads("half an image", images("half"), r"{w}/half/a/0\.png is not a picture that can be read"),
    reads("negative size", images("good", per_class=None) | {"size": -32}, "size: .*greater than 0", "-32"),
    reads("size of another model", images("good") | {"size": 16}, r"shape \[1, 16, 16\]: dit makes inputs of \[1, 32, 32\] alone"),
    reads("no Fashion-MNIST", {"name": "fashion-mnist", "folder": "{w}/nowhere"}, "no file {w}/nowhere/", "dataset-fashion-mnist"),
    reads("idx that is none", {"name": "fashion-mnist", "folder": "{w}/idx"}, "is not a complete gzip file"),
    reads("more a class than there are", images("good", per_class=9), "9 items of every class", "2 of 2 classes have fewer: class 0: 2"),
    reads("no subset file", images("good", subset="{w}/nowhere.json"), "{w}/nowhere.json is missing"),
    reads("subset is no JSON", images("good", subset="{w}/notes.txt"), "notes.txt is not a subset file", "source, sha256, num_classes, ids"),
    reads("subset was changed", images("good", subset="{w}/changed.json"), "changed.json was changed: it says sha256 00", "its 2 ids have"),
    reads("subset of other data", images("good", subset="{w}/other.json"), "{w}/other.json: ", "does not fit|are not in"),
    reads("another subset than asked", images("good", subset="{w}/other.json", subset_sha256="0" * 64), "other.json has sha256 [0-9a-f]{{64}}, the recipe asks for 0000"),
    reads("no latents", latents("nowhere"), "{w}/nowhere"),
    reads("index is no JSON", latents("latents-no-json"), "latents-no-json/latents.json"),
    reads("index without shards", latents("latents-no-key"), "latents-no-key/latents.json", "shards"),
    reads("shard is missing", latents("latents-missing"), "latents in {w}/latents-missing are incomplete or damaged", r"00001\.safetensors is missing"),
    reads("shard is cut", latents("latents-cut"), "latents in {w}/latents-cut are incomplete or damaged", r"00001\.safetensors is cut short or changed: \d+ bytes, not \d+"),
    reads("shard has another hash", latents("latents-flipped"), "latents in {w}/latents-flipped are incomplete or damaged", r"00001\.safetensors is damaged: its sha256 is not [0-9a-f]+"),
    reads("latents of another shape", latents("latents"), r"shape \[4, 4, 4\]: dit makes inputs of \[4, 8, 8\] alone", input_size=8),
    calls("latents of nothing", "data latents {w}/out", "give one source of .*--images", "found none"),
    calls("latents of two sources", "data latents {w}/out --images {w}/good --tars {w}/x.tar", "give one source", "--images and --tars"),
    calls("latents in a strange folder", "data latents {w}/thesis --images {w}/good --vae {w}/dit --size 32", "thesis|dit"),
    calls("autoencoder that is none", "data latents {w}/out --images {w}/good --vae {w}/dit --size 32", "{w}/dit holds a DiT, not an AutoencoderKL"),
    calls("subset of no amount", "data subset {w}/good {w}/s.json", "a number of items of every class, or a fraction"),
    calls("subset of 3 halves", "data subset {w}/good {w}/s.json --fraction 1.5", "above 0 and at most 1, found 1.5"),
    calls("subset to a text", "data subset {w}/good {w}/s.txt --per-class 1", "ends in .json, found {w}/s.txt"),
    calls("subset over another", "data subset {w}/good {w}/other.json --per-class 1", "other.json is another subset, with sha256"),
]  # fmt: skip

MODELS = [
    calls("no model", "sites {w}/nowhere", "no model in {w}/nowhere"),
    calls("folder without a model", "sites {w}/thesis", "no model in {w}/thesis"),
    calls("truncated weights", "sites {w}/truncated", "diffusion_pytorch_model.safetensors is not a complete safetensors file"),
    calls("no weights", "sites {w}/weightless", "has a config.json but no diffusion_pytorch_model.safetensors"),
    calls("config is no JSON", "sites {w}/configless", "config.json is not JSON"),
    calls("unknown class", "sites {w}/unknown", "unknown holds a Transformer9; no host .*DiT.*--spec FILE"),
    calls("weights of another width", "sites {w}/other-width", "does not fit DiT: 31 faults", r"has shape \(192,\), expected \(384,\)"),
    calls("edited config", "sites {w}/edited", "config.json was edited after it was saved"),
    calls("other weights", "sites {w}/swapped", "is not the file that config.json describes: its SHA-256 is"),
    calls("merge of a whole model", "merge {w}/grafted {w}/out", "{w}/grafted is not a delta: it is already a standalone model"),
    calls("pickle with code", "convert {w}/evil.pt {w}/out", "evil.pt is not a torch file of plain tensors"),
    calls("half a checkpoint", "convert {w}/half.pt {w}/out", "half.pt is not a torch file"),
    calls("convert over a model", "convert {w}/dit/diffusion_pytorch_model.safetensors {w}/grafted --num-heads 2 --num-classes 10", "{w}/grafted exists and holds .*: name a new folder"),
    calls("convert to a file", "convert {w}/half.pt {w}/other.json", "{w}/other.json is a file: name a new folder"),
    calls("list for weights", "convert {w}/list.pt {w}/out", "list.pt holds a list, expected a state dict"),
    calls("weights of no DiT", "convert {w}/foreign.safetensors {w}/out", "is not a DiT: expected .*found 1 tensors: layer"),
    calls("no such file", "convert {w}/none.pt {w}/out", "none.pt"),
    calls("samples file of another kind", "sample {w}/dit --out {w}/out.gif", "--out names an .npz file, found {w}/out.gif"),
    calls("words for labels", "sample {w}/dit --out {w}/out.npz --labels cats", "--labels is balanced, random or numbers such as 3,5; found 'cats'"),
    calls("class that is not known", "sample {w}/dit --out {w}/out.npz --labels 3,11", r"labels \[11\] are out of range", r"0\.\.9"),
    calls("negative number of images", "sample {w}/dit --out {w}/out.npz --num -4", "--num: .*greater than 0, found -4"),
    calls("sampler that is not known", "sample {w}/dit --out {w}/out.npz --sampler euler", "sampler euler does not run predicted noise", "ddpm, ddim"),
    calls("precision that is not known", "sample {w}/dit --out {w}/out.npz --precision fp8", "--precision: .*'fp32' or 'bf16', found 'fp8'"),
    calls("model that diverged", "sample {w}/diverged --out {w}/out.npz --num 2 --steps 2", "not finite", "diverged"),
]  # fmt: skip

SAMPLES = [
    calls("no samples", "evaluate {w}/none.npz", "no samples file {w}/none.npz"),
    calls("folder for samples", "evaluate {w}/dit", "no samples file {w}/dit: it is a folder; a run's samples are its samples/ROW"),
    calls("recipe for samples", "evaluate {w}/recipe.yaml", "samples are an .npz or a .safetensors file, found {w}/recipe.yaml"),
    calls("npz without arr_0", "evaluate {w}/nameless.npz", "arr_0 is not a file in the archive", r"arr_0 \[N, H, W, C\] and labels \[N\]"),
    calls("pickled npz", "evaluate {w}/pickled.npz", "pickled.npz is not a complete .npz file of arrays"),
    calls("floats", "evaluate {w}/floats.npz", "arr_0 must be uint8", "found float64"),
    calls("half an npz", "evaluate {w}/half.npz", "half.npz is not a complete .npz file"),
    calls("text for an npz", "evaluate {w}/text.npz", "text.npz is not a complete .npz file"),
    calls("zip that leaves its folder", "evaluate {w}/leaving.npz", "arr_0 is not a file in the archive"),
    calls("images of another size", "evaluate {w}/large.npz", r"holds images of \[3, 64, 64\]; the bundled network measures images of \[1, 32, 32\]"),
    calls("labels of no class", "evaluate {w}/labels.npz", r"label 12 is not a class of the feature network: it knows 0\.\.9"),
    calls("too few to measure", "evaluate {w}/few.npz", "3 images", "10"),
    calls("ADM without a reference", "evaluate {w}/few.npz --suite adm", "--suite adm needs --reference"),
    calls("safetensors of something else", "evaluate {w}/foreign.safetensors", "holds layer; samples are images and labels"),
    calls("report of nothing", "report {w}/thesis", "thesis is not a run folder: it holds none of"),
]  # fmt: skip

COMMANDS = [
    calls("no recipe", "check {w}/none.yaml", "no recipe file {w}/none.yaml"),
    calls("unknown operator's settings", "operators hyena-q", "no operator 'hyena-q'; did you mean 'hyena-.'. there are .*hyena-x"),
    calls("grid in words", "cost {w}/recipe.yaml --grid large", "--grid is rows x columns of tokens, such as 64x64, or"),
    calls("bands in words", "locality {w}/dit --bands wide", "--bands is numbers of tokens, such as 2,4,8; found 'wide'"),
    calls("device that is not known", "run {w}/recipe.yaml --dry-run --device abacus", "no device 'abacus'; there are .*h100"),
    calls("device for a run", "run {w}/recipe.yaml --out {w}/out --device h100", "--device only applies to --dry-run"),
    calls("schema to a folder", "schema --out {w}", "cannot write {w}: it is a folder; name a file"),
    calls("folder for a recipe", "check {w}/dit", "no recipe file {w}/dit: it is a folder"),
    calls("a sweep's second recipe", "sweep {w}/second.yaml --out {w}/out", "1 fault in recipes of 2", "nine: .*no block 9"),
    calls("sweep's unknown label", "sweep {w}/sweep.yaml --out {w}/out --only lr=7", "no recipe of sweep s has lr=7; there are", "low: "),
    calls("sweep's unknown row", "sweep {w}/sweep.yaml --out {w}/out --rows best", "no rows best; there are pretrained"),
    calls("label without a column", "sweep {w}/sweep.yaml --out {w}/out --only low", "--only takes COLUMN=LABEL, found 'low'"),
    calls("table that is none", "sweep {w}/sweep.yaml --out {w}/out --table {w}/other", "other.json is not the table of a sweep: .*name another with --table"),
    calls("place that is not in the settings", "sweep {w}/placeless.yaml --out {w}/out", "distill.deep.lr: there is no such setting"),
    calls("tracker that is not known", "run {w}/recipe.yaml --out {w}/out --track abacus", "abacus", "tensorboard"),
    calls("processes in words", "run {w}/recipe.yaml --out {w}/out", "WORLD_SIZE is 'two', not a number", WORLD_SIZE="two"),
    calls("unknown command", "frobnicate", "No such command 'frobnicate'", code=2),
    calls("unknown option", "run {w}/recipe.yaml --fast", "No such option.*--fast", code=2),
    calls("no argument", "sites", "Missing argument 'MODEL'", code=2),
    calls("unknown stage", "run {w}/recipe.yaml --until lunch", "'lunch' is not one of .*'distill'", code=2),
    calls("no threads", "--threads 0 sites {w}/dit", "Invalid value for .--threads", code=2),
]  # fmt: skip

# what the work itself finds, which leaves the folder that it began to be gone on with
BEGUN = frozenset({"no objective", "nothing to train", "too few images to measure", "model that diverged"})
KINDS = [*RECIPES, *DATA, *MODELS, *SAMPLES, *COMMANDS]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with good and bad files; a run is at work in one of its folders."""
    folder = tmp_path_factory.mktemp("files")
    for make in (_write_images, _write_subsets, _write_latents, _write_models, _write_samples, _write_sweeps):
        make(folder)
    (folder / "notes.txt").write_text("precious")
    (folder / "thesis").mkdir()
    (folder / "thesis" / "thesis.tex").write_text("precious")
    with RunFolder(folder / "run-of-other", recipe_name="other") as run:
        run.describe_machine({})
    (folder / "run-damaged").mkdir()
    (folder / "run-damaged" / "manifest.json").write_text("{")
    with ExitStack() as stack:
        stack.enter_context(RunFolder(folder / "run-in-use", recipe_name="tiny"))
        yield folder


def _write_images(folder: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32), dtype=np.uint8))
    for name in ("good", "hollow", "text", "half", "flat"):
        for label in "ab":
            (folder / name / label).mkdir(parents=True)
            for number in range(2):
                picture.save(folder / name / label / f"{number}.png")
    for path in (folder / "hollow" / "b").iterdir():
        path.unlink()
    (folder / "text" / "a" / "0.png").write_text("a picture")
    whole = (folder / "half" / "a" / "0.png").read_bytes()
    (folder / "half" / "a" / "0.png").write_bytes(whole[: len(whole) // 2])
    for path in sorted((folder / "flat").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (folder / "idx").mkdir()
    for split in ("train", "t10k"):
        for part in ("images-idx3", "labels-idx1"):
            (folder / "idx" / f"{split}-{part}-ubyte.gz").write_bytes(b"no gzip")


def _write_subsets(folder: Path) -> None:
    call("data", "subset", str(folder / "good"), str(folder / "own.json"), "--per-class", "1")
    own = json.loads((folder / "own.json").read_text())
    (folder / "changed.json").write_text(json.dumps(own | {"sha256": "0" * 64}))
    other = folder / "elsewhere"
    for label in "ab":
        (other / label).mkdir(parents=True)
        Image.new("L", (32, 32)).save(other / label / "strange.png")
    call("data", "subset", str(other), str(folder / "other.json"), "--per-class", "1")


def _write_latents(folder: Path) -> None:
    for name in (
        "latents",
        "latents-no-json",
        "latents-no-key",
        "latents-missing",
        "latents-cut",
        "latents-flipped",
    ):
        draws = (torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2)
        write_latents(
            folder / name, [draws], source="random", vae="none", scale=1.0, num_classes=2, shard_size=4
        )
    (folder / "latents-no-json" / "latents.json").write_text("{")
    index = json.loads((folder / "latents-no-key" / "latents.json").read_text())
    del index["shards"]
    (folder / "latents-no-key" / "latents.json").write_text(json.dumps(index))
    (folder / "latents-missing" / "latents-00001.safetensors").unlink()
    for name in ("latents-cut", "latents-flipped"):
        path = folder / name / "latents-00001.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[:-9] if name == "latents-cut" else content[:-1] + bytes([content[-1] ^ 1]))


def _write_models(folder: Path) -> None:
    model = DiT(**CONFIG)
    for name in ("dit", "truncated", "weightless", "configless", "unknown", "other-width"):
        save_model(folder / name, model, Plan())
    weights = "diffusion_pytorch_model.safetensors"
    content = (folder / "truncated" / weights).read_bytes()
    (folder / "truncated" / weights).write_bytes(content[: len(content) // 2])
    (folder / "weightless" / weights).unlink()
    (folder / "configless" / "config.json").write_text("{")
    config = json.loads((folder / "dit" / "config.json").read_text())
    (folder / "unknown" / "config.json").write_text(json.dumps(config | {"_class_name": "Transformer9"}))
    (folder / "other-width" / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    plan = Plan.model_validate({"edits": PLAN})
    graft(model, plan, seed=0)
    for name in ("grafted", "edited", "swapped"):
        save_model(folder / name, model, plan)
    path = folder / "edited" / "config.json"
    path.write_text(path.read_text().replace('"num_heads": 2', '"num_heads": 4', 1))
    (folder / "swapped" / "model.safetensors").write_bytes((folder / "dit" / weights).read_bytes())
    diverged = DiT(**CONFIG)
    torch.nn.init.constant_(diverged.final_layer.linear.bias, float("nan"))
    save_model(folder / "diverged", diverged, Plan())
    torch.save([1, 2], folder / "list.pt")
    torch.save({"a": torch.zeros(1000)}, folder / "half.pt")
    (folder / "half.pt").write_bytes((folder / "half.pt").read_bytes()[:1000])
    (folder / "evil.pt").write_bytes(pickle.dumps(_Evil(folder), protocol=2))
    save_file({"layer": torch.zeros(2)}, folder / "foreign.safetensors")


class _Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, folder: Path):
        self.path = folder / "executed"

    def __reduce__(self):
        return open, (str(self.path), "w")


def _write_samples(folder: Path) -> None:
    grey = np.zeros((12, 32, 32, 1), np.uint8)
    np.savez(folder / "nameless.npz", images=grey)
    np.savez(
        folder / "pickled.npz", arr_0=np.array([_Evil(folder)], dtype=object), labels=np.zeros(1, np.int64)
    )
    np.savez(folder / "floats.npz", arr_0=grey / 2, labels=np.zeros(12, np.int64))
    np.savez(folder / "large.npz", arr_0=np.zeros((12, 64, 64, 3), np.uint8), labels=np.zeros(12, np.int64))
    np.savez(folder / "labels.npz", arr_0=grey, labels=np.full(12, 12))
    np.savez(folder / "few.npz", arr_0=grey[:3], labels=np.zeros(3, np.int64))
    content = (folder / "large.npz").read_bytes()
    (folder / "half.npz").write_bytes(content[: len(content) // 2])
    (folder / "text.npz").write_text("images")
    with zipfile.ZipFile(folder / "leaving.npz", "w") as archive:
        archive.writestr("../executed", "x")


def _write_sweeps(folder: Path) -> None:
    sweep = {"name": "s", **{k: v for k, v in RECIPE.items() if k != "name"}}
    axes = {"lr": {"low": {"distill.lr": 1e-4}, "high": {"distill.lr": 1e-3}}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep | {"grids": [{"axes": axes}]}))
    edit = {"role": "attention", "operator": "softmax"}
    axes = {"blocks": {n: {"plan": [edit | {"blocks": [b]}]} for n, b in (("one", 1), ("nine", 9))}}
    (folder / "second.yaml").write_text(yaml.safe_dump(sweep | {"grids": [{"axes": axes}]}))
    axes = {"lr": {"low": {"distill.deep.lr": 1e-4}}}
    (folder / "placeless.yaml").write_text(yaml.safe_dump(sweep | {"grids": [{"axes": axes}]}))


def plain(text: str) -> str:
    """A message without the frame that usage errors are drawn in."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


def content_of(folder: Path) -> dict[str, str]:
    """Every file with its hash, and every folder."""
    return {
        str(path.relative_to(folder)): sha256_of(path) if path.is_file() else "folder"
        for path in folder.rglob("*")
        if path.name != ".lock"
    }


def test_there_are_sixty_kinds():
    assert len({bad.name for bad in KINDS}) == len(KINDS) >= 60


@pytest.mark.parametrize("bad", KINDS, ids=lambda bad: bad.name.replace(" ", "-"))
def test_bad_input_is_one_clear_message_and_nothing_changes(files, bad):
    recipe = bad.recipe if isinstance(bad.recipe, str) else yaml.safe_dump(bad.recipe)
    (files / "recipe.yaml").write_text(recipe.replace("{w}", str(files)))
    before = content_of(files)
    result = call(*(part.replace("{w}", str(files)) for part in bad.arguments), **bad.environment)
    assert result.exit_code == bad.code, result.output
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
    if bad.code == 1:
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("Error: ") == 1
    for message in bad.messages:
        pattern = message.replace("{w}", re.escape(str(files))).replace("{{", "{").replace("}}", "}")
        assert re.search(pattern, plain(result.stderr), re.DOTALL), f"{pattern!r} is not in\n{result.stderr}"
    after = content_of(files)
    if bad.name in BEGUN:
        assert before.items() <= after.items()
        for path in files.glob("out*"):
            shutil.rmtree(path)
    else:
        assert after == before
    assert not (files / "executed").exists()

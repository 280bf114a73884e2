"""Files that are whole, and seeded mutations of them: what a stranger, a bad disk or an enemy may hand to a reader.

`trial` reads one: it ends well or with one `GraftingError`, soon, and writes nothing. `test_fuzz.py` takes some hundred of
them, `benchmarks/fuzz.py` as many as are asked for.
"""

import copy
import io
import json
import random
import signal
import tarfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

import imagefiles
from grafting.data.latents import LatentsConfig, write_latents
from grafting.data.promptfolder import Prompt, write_prompts
from grafting.data.prompts import Prompts
from grafting.data.subset import Subset, read_subset, write_subset
from grafting.data.tars import members
from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import graft, resolve
from grafting.errors import GraftingError
from grafting.machine.files import hash_json
from grafting.machine.reading import read_picture
from grafting.models.dit import DiT
from grafting.report import report_page
from grafting.runs.file import load_recipe
from grafting.runs.folder import RunFolder
from grafting.runs.job import skeleton
from grafting.runs.manifest import Entry
from grafting.runs.record import read_run
from grafting.runs.sweep import load_sweep
from grafting.sampling.files import open_samples, write_samples
from grafting.weights.folder import load_model, save_delta, save_model
from grafting.weights.portable import Base
from grafting.weights.published import PublishedFacts, read_published
from grafting.weights.tensors import read_weights
from tinyrecipe import TINY

LONGEST_S = 20.0
LONGEST_MESSAGE = 4000


class Target(NamedTuple):
    """A file that is read, in a folder of its own."""

    name: str
    path: Path
    read: Callable[[], object]
    sign: Callable[[Any], Any] = lambda value: value  # makes the hashes of a mutated value right


class Outcome(NamedTuple):
    """What became of a file."""

    fault: str  # traceback, hang, written, or nothing
    said: str


class Hang(BaseException):
    """It took too long."""


# values that are often not thought of
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**70, 10**30, 1e38, 1e308, float("nan"), float("inf"), -0.5, "", ".", "..",
    "../x", "/etc/passwd", "~", "0-99999999999", "9" * 4000, "x" * 10_000, "\u202e\ud7ff\U0001f600", "a\0b", "[[[", "every 1 of 0",
    "load", "float32", [], {}, [[]], [None], [1, 1], {"": 0}, {"name": []}, [True], ["a", "a"], 1_000_000, "1:5",
]  # fmt: skip


def mutated(value: Any, draw: random.Random) -> Any:
    """A JSON value with one to three places changed: deleted, doubled, renamed, or of another type or size."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            break
        inside, key = draw.choice(places)
        match draw.randrange(6):
            case 0:
                del inside[key]
            case 1 if isinstance(inside, dict):
                inside[draw.choice(["", "name", "base", "x" * 300, "\u0000"])] = inside.pop(key)
            case 2:
                inside[key] = _nested(draw.choice((3, 30, 80)), inside[key])
            case 3 if isinstance(inside, list):
                inside.append(inside[key])
            case _:
                inside[key] = copy.deepcopy(draw.choice(ODD))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(pairs):
        yield value, key
        yield from _places(item)


def _nested(depth: int, value: Any) -> Any:
    for level in range(depth):
        value = [value] if level % 2 else {"x": value}
    return value


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Bytes with bits flipped, cut short, with a hole, doubled, or with others in them."""
    place = draw.randrange(max(1, len(content)))
    match draw.randrange(8):
        case 0 | 1 | 2 | 3:
            changed = bytearray(content or b"\0")
            for _ in range(draw.choice((1, 1, 2, 8))):
                # headers are short, and most of what can go wrong is in them
                last = min(len(changed), draw.choice((16, 512, len(changed))))
                changed[draw.randrange(last)] ^= 1 << draw.randrange(8)
            return bytes(changed)
        case 4:
            return content[:place]
        case 5:
            return content[:place] + bytes(min(64, len(content) - place)) + content[place + 64 :]
        case 6:
            return content[:place] + content[: draw.randrange(2000)] + content[place:]
    return content[:place] + draw.randbytes(draw.randrange(1, 64)) + content[place:]


TEXTS = {
    ".yaml": ["[" * 1000, "{a: " * 1000, "a: &a [*a]", "name: " + "1" * 5000, "description: 2001-99-99", "lr: !!float abc", "? [a]\n: b"],
    ".json": ["[" * 1000, '{"a":' * 1000, "1" * 5000, "NaN", '"\\ud800"', "[]", "null", "", "\ufeff{}"],
}  # fmt: skip


def _bomb() -> str:
    """Nine levels of ten aliases."""
    lines = ["bomb: &b0 [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]"]
    lines += [f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 10)}]" for i in range(1, 10)]
    return "\n".join(lines) + "\ndescription: *b9\n"


def mutation(target: Target, content: bytes, draw: random.Random) -> bytes:
    """The content of a file, changed."""
    suffix = target.path.suffix
    if suffix not in TEXTS or draw.random() < 0.25:
        return damaged(content, draw)
    if draw.random() < 0.1:
        odd = draw.choice(TEXTS[suffix])
        return (
            (content + f"\n{odd}\n".encode()) if suffix == ".yaml" and draw.random() < 0.5 else odd.encode()
        )
    if suffix == ".yaml" and draw.random() < 0.05:
        return content + _bomb().encode()
    value = mutated(yaml.safe_load(content) if suffix == ".yaml" else json.loads(content), draw)
    with suppress(KeyError, TypeError, AttributeError, ValueError):  # there may be nothing left to sign
        value = target.sign(value)
    text = yaml.safe_dump(value, sort_keys=False) if suffix == ".yaml" else json.dumps(value)
    return text.encode("utf-8", "surrogatepass")


def trial(target: Target, content: bytes, folder: Path) -> Outcome:
    """Reads a file with this content, and puts the right one back."""
    right = target.path.read_bytes()
    target.path.write_bytes(content)
    before, fault, said = _listing(folder), "", ""
    try:
        with _at_most(LONGEST_S), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read()
    except GraftingError as error:
        said = str(error)
        fault = "traceback" if len(said) > LONGEST_MESSAGE or not said else ""
    except Hang:
        fault = "hang"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        fault, said = (
            "traceback",
            f"{type(error).__name__}: {error}"[:500] + f" ({last.filename}:{last.lineno})",
        )
    written = _listing(folder) != before
    target.path.write_bytes(right)
    return Outcome("written" if written else fault, said)


def trials(
    targets: list[Target], folder: Path, *, numbers: range, seed: int
) -> Iterator[tuple[str, int, Outcome]]:
    """Mutations by number, dealt to the targets in turn: the name of each, its number, and what became of it."""
    contents = [target.path.read_bytes() for target in targets]
    for number in numbers:
        place = number % len(targets)
        draw = random.Random(f"{seed} {targets[place].name} {number}")
        content = mutation(targets[place], contents[place], draw)
        yield targets[place].name, number, trial(targets[place], content, folder)


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }


def targets_in(folder: Path) -> list[Target]:
    """Every kind of file that is read, whole, each in a folder of its own."""
    makers = (
        _recipe, _sweep, _models, _run, _latents, _prompts, _subset, _samples, _published, _pictures,
    )  # fmt: skip
    found = []
    for make in makers:
        own = folder / make.__name__.strip("_")
        own.mkdir(parents=True)
        found += make(own)
    return found


def _recipe(folder: Path) -> list[Target]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(TINY))

    def read() -> object:
        recipe = load_recipe(path)
        return resolve(skeleton(recipe.source), recipe.edits)

    return [Target("recipe", path, read)]


def _sweep(folder: Path) -> list[Target]:
    path = folder / "sweep.yaml"
    axes = {
        "part": {"odd": {"plan.0.blocks": "odd"}, "all": {"plan.0.blocks": "all"}},
        "lr": {1: {"distill.lr": 1e-3}},
    }
    path.write_text(yaml.safe_dump(TINY | {"seeds": 2, "grids": [{"labels": {"what": "x"}, "axes": axes}]}))
    return [Target("sweep", path, lambda: load_sweep(path))]


def _models(folder: Path) -> list[Target]:
    model = DiT(**TINY["source"]["config"]).eval()
    save_model(folder / "base", model, Plan())
    plan = Plan(edits=(Replace(role="attention", blocks="odd", operator="hyena-x"),))
    grafted = copy.deepcopy(model)
    graft(grafted, plan)
    save_delta(folder / "delta", grafted, plan, Base(id=str(folder / "base")))
    save_model(folder / "whole", grafted, plan)
    _split(folder)

    def sign(config: Any) -> Any:
        config["grafting"].pop("config_sha256", None)
        config["grafting"]["config_sha256"] = hash_json(config)
        return config

    configs = [
        Target(
            f"{name}-config", folder / name / "config.json", lambda name=name: load_model(folder / name), sign
        )
        for name in ("delta", "whole")
    ]
    weights = folder / "base" / "diffusion_pytorch_model.safetensors"
    index = folder / "split" / "diffusion_pytorch_model.safetensors.index.json"
    return [
        *configs,
        Target("config", folder / "base" / "config.json", lambda: load_model(folder / "base")),
        Target("weights", weights, lambda: load_model(folder / "base")),
        Target("weights-index", index, lambda: read_weights(folder / "split")),
    ]


def _split(folder: Path) -> None:
    """Weights in two files, with an index."""
    (folder / "split").mkdir()
    tensors = {"a": torch.ones(3), "b": torch.zeros(2, 2)}
    for name, tensor in tensors.items():
        save_file({name: tensor}, folder / "split" / f"{name}.safetensors")
    index = {"metadata": {"total_size": 28}, "weight_map": {name: f"{name}.safetensors" for name in tensors}}
    (folder / "split" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def _run(folder: Path) -> list[Target]:
    """A run's folder: its manifest, plan, figures and log."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(TINY))
    sites = [
        {"block": b, "role": "attention", "path": f"blocks.{b}.attn", "operator": None} for b in range(2)
    ]
    sites[1]["operator"] = {"name": "hyena-x", "kernel_size": 3}
    (folder / "plan.json").write_text(
        json.dumps({"host": "dit", "plan": {"edits": TINY["plan"]}, "sites": sites})
    )
    figures = {"frechet": 12.5, "frechet_low": 12.0, "frechet_high": 13.0, "ms_per_image": 1.5}
    rows = [
        {"name": name, "params": 9, "num_images": 20, **figures, "protocol": {"a": {"b": 1}}}
        for name in ("pretrained", "finetuned")
    ]
    (folder / "metrics.json").write_text(json.dumps(rows))
    (folder / "finetune").mkdir()
    lines = [json.dumps({"step": n, "seconds": 1.0, "loss": 0.5}) for n in range(3)]
    (folder / "finetune" / "log.jsonl").write_text("\n".join(lines) + "\n")
    with RunFolder(folder / "made", recipe_name="tiny") as run:
        run.write_entry(
            "finetune", Entry(inputs="0" * 64, done=True, seconds=3.0, outputs={"plan.json": "0" * 64})
        )
    (folder / "made" / "manifest.json").rename(folder / "manifest.json")

    def sign(manifest: Any) -> Any:
        manifest.pop("sha256", None)
        return manifest | {"sha256": hash_json(manifest)}

    def read() -> object:
        return report_page(read_run(folder))

    return [
        Target("manifest", folder / "manifest.json", read, sign),
        Target("plan", folder / "plan.json", read),
        Target("figures", folder / "metrics.json", read),
        Target("log", folder / "finetune" / "log.jsonl", read),
        Target("run-recipe", folder / "recipe.yaml", read),
    ]


def _latents(folder: Path) -> list[Target]:
    latents, labels = torch.randn(6, 4, 2, 2), torch.arange(6) % 3
    write_latents(
        folder, [(latents, labels)], source="toy", vae="toy", scale=0.5, num_classes=3, shard_size=4
    )

    def read() -> object:
        data = LatentsConfig(folder=folder, verify=False).load()
        return data.batch(torch.tensor([0, len(data) - 1])), data.labels

    shard = folder / "latents-00000.safetensors"
    return [Target("latents-index", folder / "latents.json", read), Target("latents-shard", shard, read)]


def _prompts(folder: Path) -> list[Target]:
    rows = [Prompt(f"word {n}", {"states": torch.ones(2 + n, 4)}) for n in range(3)]
    write_prompts(
        folder / "made", rows, source="toy", lengths={"states": "mask"}, common={"sizes": torch.ones(2)}
    )

    def read() -> object:
        prompts = Prompts(folder / "made", verify=False)
        found = prompts.at(
            torch.tensor([0, 2]), shape=(4, 2, 2), device=torch.device("cpu"), dtype=torch.float32
        )
        return found, prompts.words(1)

    index, shard = folder / "made" / "prompts.json", folder / "made" / "prompts-00000.safetensors"
    return [Target("prompts-index", index, read), Target("prompts-shard", shard, read)]


def _subset(folder: Path) -> list[Target]:
    path = folder / "subset.json"
    write_subset(path, Subset(source="toy", num_classes=3, ids=("a/1", "b/2", "c/3")))
    return [Target("subset", path, lambda: read_subset(path))]


def _samples(folder: Path) -> list[Target]:
    """Samples as both kinds of file, one of them compressed."""
    images, labels = torch.randint(0, 255, (6, 3, 8, 8), dtype=torch.uint8), torch.arange(6)
    origin = {"sampling": {"seed": 0}, "labels": "balanced", "weights_dtype": "float32"}
    for suffix in ("npz", "safetensors"):
        write_samples(
            folder / f"s.{suffix}", [(images, labels)], num_images=6, shape=(3, 8, 8), origin=origin
        )
    np.savez_compressed(folder / "c.npz", arr_0=images.movedim(1, -1).numpy(), labels=labels.numpy())

    def read(path: Path) -> object:
        return list(open_samples(path).batches(4))

    paths = [folder / name for name in ("s.npz", "s.safetensors", "c.npz")]
    return [Target(f"samples-{path.name}", path, lambda path=path: read(path)) for path in paths]


def _published(folder: Path) -> list[Target]:
    model = DiT(**TINY["source"]["config"])
    path, facts = folder / "w.pt", PublishedFacts(num_heads=2, num_classes=10)
    torch.save({"ema": model.state_dict(), "opt": {"lr": 0.1}}, path)
    return [Target("published", path, lambda: read_published(path, facts))]


def _pictures(folder: Path) -> list[Target]:
    found = []
    for kind in ("PNG", "JPEG", "WEBP"):
        path = folder / f"x.{kind.lower()}"
        path.write_bytes(imagefiles.encoded("Bag", 0, kind=kind))
        found.append(Target(f"picture-{kind}", path, lambda path=path: read_picture(path)))
    tar = folder / "x.tar"
    with tarfile.open(tar, "w") as archive:
        for number in range(3):
            info = tarfile.TarInfo(f"{number}.cls")
            info.size = 1
            archive.addfile(info, io.BytesIO(b"1"))
    return [*found, Target("tar", tar, lambda: [member.read() for _, member in members(tar)])]

"""What a file, an archive or an environment variable cannot do: run code, leave its folder, travel. Each test can fail."""

import ast
import io
import json
import os
import pickle
import socket
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import grafting
import tinyrecipe
from grafting.data.published import open_published
from grafting.data.tars import members
from grafting.errors import GraftingError
from grafting.machine.files import atomic_folder
from grafting.metrics.inception import load_inception
from grafting.runs.file import load_recipe
from grafting.runs.recipe import Recipe
from grafting.runs.run import run
from grafting.runs.states import STATE_NAME, read_state
from grafting.sampling.files import read_samples
from grafting.weights.folder import load_model
from grafting.weights.published import read_file
from grafting.weights.tensors import read_pickle

SOURCE = Path(grafting.__file__).parent
TINY = tinyrecipe.TINY | {
    "distill": {"steps": 1, "batch_size": 4, "holdout": 4},
    "finetune": {"steps": 1, "batch_size": 4, "warmup_steps": 0},
    "rows": ["pretrained", "finetuned"],
}

# readers that execute what a file holds, unless these arguments say that they may not
GUARDED = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "np.lib.format.read_array": ("allow_pickle", False),
    "np.lib.format.write_array": ("allow_pickle", False),
    "np.save": ("allow_pickle", False),
}
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.load_all", "yaml.full_load",
    "yaml.unsafe_load", "yaml.dump", "pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps", "marshal.loads",
    "joblib.load", "dill.load", "shutil.unpack_archive", "tempfile.mktemp",
}  # fmt: skip
UNPACKING = (".extract", ".extractall")  # methods of archives; members are read where they lie


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a file whose function has a name, with the name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            try:
                yield ast.unparse(node.func), node
            except ValueError:
                continue


def faults(text: str) -> list[str]:
    """What a source file does that none may."""
    found = []
    for name, call in calls(ast.parse(text)):
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name in GUARDED:
            argument, value = GUARDED[name]
            if arguments.get(argument) != repr(value):
                found.append(f"line {call.lineno}: {name} without {argument}={value}")
        if name in FORBIDDEN or name.endswith(UNPACKING):
            found.append(f"line {call.lineno}: {name}")
        if arguments.get("shell", "False") != "False":
            found.append(f"line {call.lineno}: {name} through a shell")
        if arguments.get("trust_remote_code", "False") != "False":
            found.append(f"line {call.lineno}: {name} runs code of a repository")
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_source_runs_nothing_that_it_reads(path: Path):
    assert faults(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "pickle.loads(content)",
        "tarfile.open(path).extractall(folder)",
        "subprocess.run(command, shell=True)",
        "load_dataset(name, trust_remote_code=True)",
    ],
)
def test_the_rule_sees_what_it_forbids(line: str):
    assert len(faults(line)) == 1


def test_the_one_unpickler_names_what_it_allows():
    """A distributed checkpoint's index is a pickle: of it nothing but index types is made."""
    made = [
        (path.name, node.name)
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and any("Unpickler" in ast.unparse(base) for base in node.bases)
    ]
    assert made == [("sharding.py", "_IndexReader")]
    from grafting.machine.sharding import _IndexReader

    for harmful in (os.system, eval, exec, getattr):
        content = io.BytesIO(pickle.dumps(harmful))
        with pytest.raises(pickle.UnpicklingError, match="which is not allowed"):
            _IndexReader(content).load()


class Harmful:
    """A pickle that leaves a file where it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def torch_file(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


def open_state(path: Path) -> None:
    """As a run reads a state whose checksums agree: the file was put there by somebody who could make them agree."""
    with atomic_folder(path.parent / "state") as folder:
        (folder / STATE_NAME).write_bytes(path.read_bytes())
    read_state(path.parent / "state")


READERS: dict[str, Callable[[Path], object]] = {
    "weights": read_pickle,
    "published weights": read_file,
    "inception": load_inception,
    "a run's state": open_state,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("form", ["zip", "bare"])
def test_a_pickle_is_refused_and_not_run(reader: str, form: str, tmp_path: Path):
    mark, path = tmp_path / "it-ran", tmp_path / "model.pt"
    if form == "zip":
        torch_file(path, {"weight": Harmful(mark)})
    else:
        path.write_bytes(pickle.dumps({"weight": Harmful(mark)}, protocol=2))
    with pytest.raises(GraftingError):
        READERS[reader](path)
    assert not mark.exists()
    # the file does what it is feared for
    torch.load(path, weights_only=False) if form == "zip" else pickle.loads(path.read_bytes())
    assert mark.exists()


def test_a_pickle_in_published_latents_is_refused_and_not_run(tmp_path: Path):
    mark = tmp_path / "it-ran"
    (tmp_path / "latents").mkdir()
    with tarfile.open(tmp_path / "latents" / "split_000000.tar", "w") as archive:
        for name, value in {"0.latent.pth": Harmful(mark), "0.label.pth": torch.tensor(0)}.items():
            buffer = io.BytesIO()
            torch.save(value, buffer)
            info = tarfile.TarInfo(name)
            info.size = buffer.tell()
            buffer.seek(0)
            archive.addfile(info, buffer)
    with pytest.raises(GraftingError, match="not a tensor"):
        open_published(tmp_path / "latents").item(0)
    assert not mark.exists()


@pytest.mark.parametrize("array", ["arr_0", "labels", "origin"])
def test_a_pickle_in_samples_is_refused_and_not_run(array: str, tmp_path: Path):
    mark = tmp_path / "it-ran"
    arrays = {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.zeros(2, np.int64)}
    arrays[array] = np.array([Harmful(mark)], dtype=object)
    np.savez(tmp_path / "samples.npz", **arrays, allow_pickle=True)
    with pytest.raises(GraftingError):
        read_samples(tmp_path / "samples.npz")
    assert not mark.exists()


def test_a_model_folder_with_a_pickle_beside_it_is_not_unpickled(tmp_path: Path):
    mark, folder = tmp_path / "it-ran", tmp_path / "model"
    folder.mkdir()
    torch_file(folder / "diffusion_pytorch_model.bin", {"weight": Harmful(mark)})
    torch_file(folder / "model.pt", {"weight": Harmful(mark)})
    (folder / "config.json").write_text(json.dumps({"_class_name": "DiT"}))
    with pytest.raises(GraftingError):
        load_model(folder)
    assert not mark.exists()


def test_yaml_makes_no_objects(tmp_path: Path):
    mark, path = tmp_path / "it-ran", tmp_path / "recipe.yaml"
    path.write_text(f"name: !!python/object/apply:pathlib.Path.touch [{mark}]\n")
    with pytest.raises(GraftingError, match="is not YAML"):
        load_recipe(path)
    assert not mark.exists()


def test_members_of_a_tar_stay_in_it(tmp_path: Path):
    """Nothing is unpacked: names that lead outside, links and devices make no file."""
    inside = tmp_path / "data"
    inside.mkdir()
    with tarfile.open(inside / "images.tar", "w") as archive:
        for name in ("../outside.png", "/tmp/grafting-outside.png", "a/b.png"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    read = {name: member.read() for name, member in members(inside / "images.tar")}
    assert set(read.values()) == {b"abc"}
    assert not any("link" in name for name in read)
    assert [p.name for p in tmp_path.rglob("*")] == ["data", "images.tar"]
    assert not Path("/tmp/grafting-outside.png").exists()


def test_a_zip_that_unpacks_to_too_much_is_refused(tmp_path: Path):
    (tmp_path / "latents").mkdir()
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(2**26))
    with tarfile.open(tmp_path / "latents" / "split_000000.tar", "w") as archive:
        for name in ("0.latent.pth", "0.label.pth"):
            info = tarfile.TarInfo(name)
            info.size = len(bomb.getvalue())
            archive.addfile(info, io.BytesIO(bomb.getvalue()))
    with pytest.raises(GraftingError, match="compressed"):
        open_published(tmp_path / "latents").item(0)


def test_a_run_needs_no_network_and_keeps_no_secret(tmp_path: Path, monkeypatch):
    secrets = {"HF_TOKEN": "hf_QqZ7secretsecret", "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)

    def refuse(self, address, *args):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(AssertionError, match="a connection"):
        socket.create_connection(("127.0.0.1", 9))
    folder = run(Recipe.model_validate(TINY), tmp_path / "run")
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert {"report.html", "metrics.json", "manifest.json", "recipe.yaml"} <= {path.name for path in written}
    for path in written:
        content = path.read_bytes()
        assert not any(value.encode() in content for value in secrets.values()), path
        assert str(Path.home()).encode() + b"/" not in content, path


def test_a_revision_of_the_hub_is_kept_as_its_commit(tmp_path: Path, monkeypatch):
    """A branch may move; what is written down is what it stood for."""
    from diffusers import AutoencoderKL

    from grafting.latents.autoencoder import load_autoencoder

    commit = "f4bb6b8e5d0c1a2b3c4d5e6f708192a3b4c5d6e7"
    snapshot = tmp_path / "snapshots" / commit
    AutoencoderKL(block_out_channels=(32,), norm_num_groups=8).save_pretrained(snapshot)
    asked = {}

    def download(name, *, revision, allow_patterns):
        asked.update(name=name, revision=revision)
        return str(snapshot)

    monkeypatch.setattr("grafting.weights.locate.snapshot_download", download)
    vae = load_autoencoder("stabilityai/sd-vae-ft-ema", revision="main")
    assert asked == {"name": "stabilityai/sd-vae-ft-ema", "revision": "main"}
    assert vae.revision == commit

"""The published latents: tars or unpacked files become a folder of latents, and nothing in them is trusted."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import imagefiles
from closeness import assert_close
from grafting.data.latents import INDEX_NAME, LatentsConfig, read_index, read_item_names
from grafting.data.published import ImportConfig, import_published, open_published
from grafting.errors import DataError, RunError
from grafting.machine.files import sha256_of
from publishedlatents import LABELS, LATENTS, item, members, saved

CONFIG = ImportConfig(shard_size=3, dtype="fp32")


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    imagefiles.write_tar(tmp_path / "published" / "split_000001.tar", members(range(4, 7)))
    imagefiles.write_tar(tmp_path / "published" / "split_000000.tar", members(range(4)))
    return tmp_path / "published"


def run(source: Path, folder: Path, config: ImportConfig = CONFIG, **settings) -> list:
    return list(import_published(open_published(source), folder, config, **settings))


def hashes(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_of(p) for p in sorted(folder.rglob("[!.]*")) if p.is_file()}


def test_tars_become_latents(tars: Path, tmp_path: Path):
    steps = run(tars, tmp_path / "out")
    assert [step.done for step in steps] == [0, 3, 6, 7]
    latents = LatentsConfig(folder=tmp_path / "out").load()
    x, labels = latents.batch(torch.arange(7))
    # training sees them as they were published
    assert_close("latents", x, LATENTS, ratio=1e-6)
    assert labels.tolist() == LABELS
    assert read_item_names(tmp_path / "out", latents.index)[4] == "/data/n01440764/4.JPEG"
    index = latents.index
    assert (index.vae, index.scale, index.stored) == ("stabilityai/sd-vae-ft-ema", 0.18215, "samples")
    assert (index.num_classes, index.shape) == (1000, (4, 4, 4))
    assert "mirrored" in index.notes
    shard = load_file(tmp_path / "out" / "latents-00000.safetensors")
    assert_close("as the autoencoder gives them", shard["latents"], LATENTS[:3] / 0.18215, ratio=1e-6)


def test_half_precision_is_the_default(tars: Path, tmp_path: Path):
    run(tars, tmp_path / "out", ImportConfig())
    latents = LatentsConfig(folder=tmp_path / "out").load()
    assert latents.index.dtype == "float16"
    assert_close("latents", latents.batch(torch.arange(7))[0], LATENTS, ratio=1e-3)


@pytest.mark.parametrize("layout", ["KEY.part", "KEY/part"])
def test_unpacked_files_are_the_same_items(tars: Path, tmp_path: Path, layout: str):
    for name, content in members(range(7)).items():
        key, _, part = name.partition(".")
        path = tmp_path / "unpacked" / (f"{key}/{part}" if layout == "KEY/part" else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    run(tars, tmp_path / "a")
    run(tmp_path / "unpacked", tmp_path / "b")
    shards = [f"latents-0000{number}.safetensors" for number in range(3)] + ["items.txt"]
    assert [sha256_of(tmp_path / "a" / name) for name in shards] == [
        sha256_of(tmp_path / "b" / name) for name in shards
    ]


def test_stopped_and_shared_between_processes_it_is_the_same(tars: Path, tmp_path: Path):
    run(tars, tmp_path / "whole")
    steps = import_published(open_published(tars), tmp_path / "out", CONFIG)
    for step in steps:
        if step.done == 3:
            break
    steps.close()
    assert not (tmp_path / "out" / INDEX_NAME).exists()
    run(tars, tmp_path / "out", share=slice(1, None, 2))
    assert run(tars, tmp_path / "out", share=slice(0, None, 2))[0].done == 3
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    with pytest.raises(RunError, match="another work.*\n  import.dtype: asked 'fp16', found 'fp32'"):
        run(tars, tmp_path / "out", ImportConfig(shard_size=3))


class Malicious:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_pickle_is_executed(tmp_path: Path):
    for number, content in enumerate(
        [saved(Malicious(tmp_path / "owned")), pickle.dumps(Malicious(tmp_path / "owned"))]
    ):
        source = tmp_path / str(number)
        imagefiles.write_tar(source / "t.tar", item(0) | {"00000000.latent.pth": content})
        with pytest.raises(DataError, match="t/00000000.latent.pth is not a tensor that torch.save wrote"):
            run(source, tmp_path / "out")
    assert not (tmp_path / "owned").exists()


def test_a_tar_in_which_tensors_swell_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("grafting.data.published._LARGEST", 10_000)
    swollen = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved(torch.zeros(4, 64, 64)))) as plain,
        zipfile.ZipFile(swollen, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for info in plain.infolist():
            packed.writestr(info.filename, plain.read(info))
    assert len(swollen.getvalue()) < 10_000
    imagefiles.write_tar(tmp_path / "a" / "t.tar", item(0) | {"00000000.latent.pth": swollen.getvalue()})
    with pytest.raises(DataError, match="latent.pth .*compressed"):
        run(tmp_path / "a", tmp_path / "out")
    imagefiles.write_tar(tmp_path / "b" / "t.tar", item(0) | {"00000000.latent.pth": bytes(10_001)})
    with pytest.raises(DataError, match="t.tar: 00000000.latent.pth has 10001 bytes; no part .* than 10000"):
        run(tmp_path / "b", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent.pth": saved({"latent": LATENTS[0]})}, "latent.pth holds a dict, not a tensor"),
        ({"latent.pth": saved(LATENTS)}, r"expected C, h, w of floating point, found float32 \(7, 4, 4, 4\)"),
        ({"latent.pth": saved(torch.ones(4, 4, 4, dtype=torch.int64))}, "of floating point, found int64"),
        ({"label.pth": saved(torch.tensor(0.5))}, "label.pth: expected one whole number, found float32"),
        ({"label.pth": saved(torch.tensor([1, 2]))}, r"expected one whole number, found int64 \(2,\)"),
        ({"label.pth": saved(torch.tensor(1000))}, r"labels are 0..999, found 1000 of /data"),
        (
            {"latent.pth": saved(LATENTS[0] * float("nan"))},
            "1 latents are not finite in fp32, the first of /",
        ),
        ({"latent.pth": saved(LATENTS[0])[:-200]}, "latent.pth is not a tensor that torch.save wrote"),
        ({"label.pth": None}, "1 of 2 items in .*t.tar lack latent.pth or label.pth, the first is 00000000"),
    ],
)
def test_items_that_are_none(tmp_path: Path, changes: dict[str, bytes | None], message: str):
    parts = item(0) | {f"00000000.{part}": content for part, content in changes.items()}
    parts = {name: content for name, content in parts.items() if content is not None}
    imagefiles.write_tar(tmp_path / "in" / "t.tar", parts | item(1))
    with pytest.raises(DataError, match=message):
        run(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out" / INDEX_NAME).exists()


def test_latents_of_several_shapes(tmp_path: Path):
    wide = item(1) | {"00000001.latent.pth": saved(torch.zeros(4, 4, 8))}
    imagefiles.write_tar(tmp_path / "in" / "t.tar", item(0) | wide)
    with pytest.raises(DataError, match=r"t/00000001: a latent \(4, 4, 8\), the first one is \(4, 4, 4\)"):
        run(tmp_path / "in", tmp_path / "out")


def test_sources_without_latents(tmp_path: Path):
    with pytest.raises(DataError, match="no .*nowhere: give the published latents"):
        open_published(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no latents in .*empty: files KEY.latent.pth"):
        open_published(tmp_path / "empty")
    imagefiles.write_tar(tmp_path / "t.tar", {"a.png": b""})
    with pytest.raises(DataError, match="no latents in"):
        open_published(tmp_path / "t.tar")


def test_members_that_would_leave_the_tar_touch_nothing(tmp_path: Path):
    outside = {f"../../{name}": content for name, content in item(0).items()}
    imagefiles.write_tar(tmp_path / "deep" / "in" / "t.tar", outside)
    run(tmp_path / "deep" / "in", tmp_path / "deep" / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep"]
    assert read_index(tmp_path / "deep" / "out").count == 1

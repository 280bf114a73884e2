"""Streams of images: the crop is ADM's, order and ids do not depend on the disk, and what cannot be read says why."""

import io
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import imagefiles
from grafting.data import sources
from grafting.data.sources import centre_crop, decode, image_dataset, image_folder, image_tars
from grafting.errors import DataError, MissingBackend


def crop_by_the_published_rule(image: Image.Image, size: int) -> np.ndarray:
    """ADM's rule as its paper's code states it, on arrays."""
    while True:
        width, height = image.size
        if min(width, height) < 2 * size:
            break
        image = image.resize((width // 2, height // 2), resample=Image.Resampling.BOX)
    ratio = size / min(width, height)
    pixels = np.array(
        image.resize((round(width * ratio), round(height * ratio)), resample=Image.Resampling.BICUBIC)
    )
    y, x = ((length - size) // 2 for length in pixels.shape[:2])
    return pixels[y : y + size, x : x + size]


@pytest.mark.parametrize(
    ("width", "height"), [(500, 375), (375, 501), (64, 64), (63, 200), (128, 129), (40, 33), (257, 1031)]
)
def test_crop_is_adms(width: int, height: int):
    image = imagefiles.noise_image(width, height, seed=width)
    got = centre_crop(image, 64)
    assert got.shape == (64, 64, 3)
    assert np.array_equal(got, crop_by_the_published_rule(image, 64))


def test_halving_is_the_mean_of_four_pixels():
    image = imagefiles.noise_image(256, 128, seed=0)
    pixels = np.asarray(image).astype(float)
    means = pixels.reshape(64, 2, 128, 2, 3).mean(axis=(1, 3))
    # Pillow rounds after each direction
    assert np.abs(centre_crop(image, 64) - means[:, 32:96]).max() <= 1


def test_an_image_that_needs_no_resizing_is_cut_and_no_more():
    image = imagefiles.noise_image(64, 90, seed=1)
    assert np.array_equal(centre_crop(image, 64), np.asarray(image)[13:77])


def test_a_hair_of_an_image_is_refused():
    with pytest.raises(DataError, match="1 x 60000 pixels are too long and narrow to crop to 256"):
        centre_crop(Image.new("RGB", (1, 60000)), 256)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "I;16"])
def test_files_of_any_mode_become_rgb(mode: str):
    buffer = io.BytesIO()
    kind = "JPEG" if mode == "CMYK" else "PNG"
    Image.new(mode, (8, 8)).save(buffer, kind)
    assert decode(buffer.getvalue()).mode == "RGB"


@pytest.mark.parametrize(
    "content",
    [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", bytes(range(100)), "whole"],
    ids=["empty", "png", "gif", "noise", "cut"],
)
def test_what_is_no_image_is_refused(content):
    if content == "whole":
        content = imagefiles.encoded("Bag", 0, kind="JPEG", size=(90, 140))[:-300]
    with pytest.raises(DataError, match="not a picture that can be read"):
        decode(content)


def test_folder_in_the_order_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = imagefiles.write_folder(tmp_path / "imagenet" / "train")
    (folder / "Bag" / "._Bag_001.png").write_bytes(b"macOS")
    (folder / "Bag" / "notes.txt").write_text("no image")
    stream = image_folder(folder)
    assert (len(stream), stream.num_classes, stream.name) == (12, 3, "imagenet/train")
    assert stream.ids[:2] == ["Bag/Bag_000.JPEG", "Bag/Bag_001.png"]
    assert list(stream.labels) == [0] * 4 + [1] * 4 + [2] * 4
    assert stream.read(1) == imagefiles.encoded("Bag", 1)

    class Backwards:
        """A disk that lists its entries the other way round."""

        def __init__(self, path):
            with real(path) as entries:
                self.entries = sorted(entries, key=lambda e: e.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    real = os.scandir
    monkeypatch.setattr(sources.os, "scandir", Backwards)
    again = image_folder(folder)
    assert list(again.ids) == list(stream.ids)
    assert again.sha256 == stream.sha256


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no folder .*: give a folder with one subfolder"),
        (["a.png"], "has no subfolder"),
        (
            ["Bag/a.png", "Coat/b.txt"],
            "Coat has no image; files that end in .jpeg, .jpg, .png, .webp are read",
        ),
    ],
)
def test_folders_that_are_none(tmp_path: Path, names: list[str], message: str):
    for name in names:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(b"")
    with pytest.raises(DataError, match=message):
        image_folder(tmp_path / "set")


def test_tars_by_name_and_place(tmp_path: Path):
    stream = image_tars(imagefiles.write_image_tars(tmp_path / "train"))
    assert stream.ids == ["b-000000/a/0", "b-000000/a/1", "b-000000/a/2", "b-000001/1", "b-000001/2"]
    assert (list(stream.labels), stream.num_classes) == ([0, 1, 2, 1, 2], 3)
    assert stream.read(2) == imagefiles.encoded("Dress", 2)
    assert stream.crop(4, size=16).shape == (16, 16, 3)
    assert image_tars(tmp_path / "train" / "b-000001.tar", num_classes=10).num_classes == 10


def test_links_and_paths_that_leave_a_tar_touch_nothing(tmp_path: Path):
    (tmp_path / "secret.png").write_bytes(imagefiles.encoded("Bag", 3))
    tar = imagefiles.write_tar(
        tmp_path / "t.tar", {"../../up.png": imagefiles.encoded("Bag", 0), "../../up.cls": b"0"}
    )
    with tarfile.open(tar, "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.png")
        archive.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    stream = image_tars(tar)
    assert stream.ids == ["t/../../up"]
    assert stream.read(0) == imagefiles.encoded("Bag", 0)
    assert sorted(tmp_path.rglob("*")) == before


def _tar(tmp_path: Path, **members: bytes) -> Path:
    return imagefiles.write_tar(
        tmp_path / "t.tar", {name.replace("_", "."): content for name, content in members.items()}
    )


PICTURE = imagefiles.encoded("Bag", 0)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a_png": PICTURE}, "1 of 1 images in .*t.tar have no class, the first is a"),
        ({"a_png": PICTURE, "a_jpg": PICTURE, "a_cls": b"0"}, "two images of the key a"),
        ({"a_png": PICTURE, "a_cls": b"bag"}, "a.cls is not a class number, 'bag'"),
        ({"a_png": PICTURE, "a_json": b"{"}, "a.json is not JSON"),
        ({"a_png": PICTURE, "a_json": b'{"text": "bag"}'}, "have no class"),
        ({"a_cls": b"0"}, "no image in the tars"),
        ({"a_png": PICTURE, "a_cls": b"-1"}, "labels of .* are -1..-1, allowed are 0 or more"),
    ],
)
def test_tars_that_cannot_be_read(tmp_path: Path, members, message: str):
    with pytest.raises(DataError, match=message):
        image_tars(_tar(tmp_path, **members))


def test_tars_cut_short_compressed_or_missing(tmp_path: Path):
    tar = _tar(tmp_path, a_png=PICTURE, a_cls=b"0")
    with pytest.raises(DataError, match="labels of .* are 1..1, allowed are 0..0"):
        image_tars(imagefiles.write_tar(tmp_path / "u.tar", {"a.png": PICTURE, "a.cls": b"1"}), num_classes=1)
    with tarfile.open(tmp_path / "z.tar", "w:gz") as archive:
        archive.add(tar, "a.tar")
    with pytest.raises(DataError, match="z.tar was cut short, or is not an uncompressed tar file"):
        image_tars(tmp_path / "z.tar")
    content = tar.read_bytes()
    for length in (0, 100, 512 + len(PICTURE) // 2, 1024 + len(PICTURE) // 512 * 512):
        tar.write_bytes(content[:length])
        with pytest.raises(DataError, match="t.tar was cut short"):
            image_tars(tar)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no tar files in"):
        image_tars(tmp_path / "empty")


def test_a_tar_cut_short_later_is_an_unreadable_image(tmp_path: Path):
    stream = image_tars(_tar(tmp_path, a_png=PICTURE, a_cls=b"0"))
    (tmp_path / "t.tar").write_bytes(b"short")
    with pytest.raises(DataError, match="ends .* bytes too early"):
        stream.read(0)


def test_data_sets_on_disk_and_as_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(imagefiles.CLASSES))}
    )
    rows = {
        "image": [{"bytes": imagefiles.encoded(n, 0), "path": None} for n in ("Coat", "Bag")],
        "label": [1, 0],
    }
    table = datasets.Dataset.from_dict(rows, features=features)
    table.save_to_disk(tmp_path / "toy")
    stream = image_dataset(tmp_path / "toy")
    assert (stream.ids, list(stream.labels), stream.num_classes) == (["train/0", "train/1"], [1, 0], 3)
    assert stream.read(1) == imagefiles.encoded("Bag", 0)
    assert stream.name.endswith("/toy train")
    datasets.DatasetDict({"val": table}).save_to_disk(tmp_path / "splits")
    assert image_dataset(tmp_path / "splits", split="val").sha256 != stream.sha256
    with pytest.raises(DataError, match="cannot open split 'test' of the data set"):
        image_dataset(tmp_path / "splits", split="test")
    (tmp_path / "parquet").mkdir()
    table.to_parquet(tmp_path / "parquet" / "train-00000.parquet")
    assert image_dataset(tmp_path / "parquet").sha256 == stream.sha256


def test_the_hubs_commit_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int32")})
    rows = {"image": [{"bytes": PICTURE, "path": None}], "label": [4]}
    asked = []

    def load_dataset(name: str, *, split: str, revision: str):
        asked.append((name, split, revision))
        return datasets.Dataset.from_dict(rows, features=features)

    class Hub:
        def dataset_info(self, name: str, *, revision: str | None):
            return type("Info", (), {"sha": "b" * 40})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="no data set owner/toy: .* the Hub does not give it"):
        image_dataset("owner/toy")
    monkeypatch.setattr(sources, "HfApi", Hub)
    stream = image_dataset("owner/toy", split="val")
    assert (stream.name, stream.revision, stream.num_classes) == ("owner/toy val", "b" * 40, 5)
    assert image_dataset("owner/toy", revision="a" * 40).revision == "a" * 40
    assert asked == [("owner/toy", "val", "b" * 40), ("owner/toy", "train", "a" * 40)]


def test_data_sets_whose_columns_do_not_fit(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(tmp_path / "toy")
    with pytest.raises(
        DataError, match="needs one column of images and one of classes .* found text: Value, label: Value"
    ):
        image_dataset(tmp_path / "toy")


def test_without_the_package_of_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingBackend, match=r"read with `datasets`: pip install 'datasets>=3'"):
        image_dataset(tmp_path)

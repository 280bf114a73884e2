"""Images in memory, and their readers."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from grafting.data import DataConfig, FashionMnistConfig, ImageFolderConfig, ImageSet, load_data
from grafting.data.images import FASHION_MNIST_FOLDER, read_fashion_mnist, read_image_folder
from grafting.errors import DataError


def _images(num: int = 4, *, channels: int = 1, height: int = 28, size: int = 32) -> ImageSet:
    pixels = torch.arange(num * channels * height**2).remainder(256).byte()
    labels = torch.arange(num) % 2
    return ImageSet(pixels.view(num, channels, height, height), labels, num_classes=2, size=size)


def _write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def _write_fashion_mnist(folder: Path, num: int = 3) -> np.ndarray:
    images = np.arange(num * 784).reshape(num, 28, 28) % 251
    _write_idx(folder / "t10k-images-idx3-ubyte.gz", images)
    _write_idx(folder / "t10k-labels-idx1-ubyte.gz", np.arange(num) + 5)
    return images


def _write_image_folder(folder: Path) -> None:
    """Class `a` red, class `b` blue; wider than high, with green sides that the crop removes."""
    for name, colour in (("b", (0, 0, 255)), ("a", (255, 0, 0))):
        (folder / name).mkdir(parents=True)
        image = Image.new("RGB", (60, 20), (0, 255, 0))
        image.paste(colour, (20, 0, 40, 20))
        image.save(folder / name / "1.png")
    Image.new("L", (9, 30), 128).save(folder / "b" / "2.JPG")
    (folder / "b" / "notes.txt").write_text("not an image")


def test_batch_is_in_the_models_range_and_padded_with_its_lowest_value():
    images = _images()
    x, labels = images.batch(torch.tensor([3, 0]))
    assert x.shape == (2, 1, 32, 32)
    assert labels.tolist() == [1, 0]
    assert torch.equal(x[:, :, 2:-2, 2:-2], images.images[[3, 0]].float() / 127.5 - 1)
    assert (x[:, :, :2] == -1).all()
    assert (x[..., -2:] == -1).all()


def test_pixels_are_the_batch_in_8_bits():
    images = _images(height=27)  # odd padding
    indices = torch.tensor([1, 2])
    pixels = images.pixels(indices)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels.float() / 127.5 - 1, images.batch(indices)[0])


def test_take_keeps_the_order_asked_for():
    taken = _images().take(torch.tensor([2, 1]))
    assert len(taken) == 2
    assert torch.equal(taken.images, _images().images[[2, 1]])
    assert taken.labels.tolist() == [0, 1]


def test_hash_sees_images_labels_and_order():
    images = _images()
    swapped = images.take(torch.tensor([1, 0, 2, 3]))
    relabelled = ImageSet(images.images, 1 - images.labels, num_classes=2, size=32)
    assert len({images.sha256(), swapped.sha256(), relabelled.sha256()}) == 3
    assert images.sha256() == _images().sha256()


def test_fashion_mnist_files_are_read(tmp_path):
    written = _write_fashion_mnist(tmp_path)
    images = read_fashion_mnist(tmp_path, train=False)
    assert np.array_equal(images.images[:, 0].numpy(), written)
    assert images.labels.tolist() == [5, 6, 7]
    assert (images.num_classes, images.size) == (10, 32)


@pytest.mark.skipif(
    not FASHION_MNIST_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed"
)
def test_debians_fashion_mnist_is_whole():
    images = load_data(FashionMnistConfig(split="test"))
    assert images.images.shape == (10_000, 1, 28, 28)
    assert images.labels.bincount().tolist() == [1000] * 10


def test_missing_fashion_mnist_names_the_package(tmp_path):
    with pytest.raises(DataError, match=r"no file .*train-images.*dataset-fashion-mnist"):
        read_fashion_mnist(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not gzip", "is not a complete gzip file"),
        (gzip.compress(bytes(1000), mtime=0)[:-12], "is not a complete gzip file"),
        (gzip.compress(b"PK\x03\x04", mtime=0), "is not an idx file of bytes: it starts with 504b0304"),
        (
            gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 9, 1, 2]), mtime=0),
            r"cut short: its header says \(9,\), it holds 2",
        ),
        (gzip.compress(bytes([0, 0, 8, 3, 0, 0]), mtime=0), "cut short: its header ends"),
    ],
)
def test_damaged_fashion_mnist_is_refused(tmp_path, content, message):
    _write_fashion_mnist(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_fashion_mnist(tmp_path, train=False)


def test_images_and_labels_must_belong_together(tmp_path):
    _write_fashion_mnist(tmp_path)
    _write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.zeros(4))
    with pytest.raises(DataError, match=r"found \(3, 28, 28\) and \(4,\)"):
        read_fashion_mnist(tmp_path, train=False)


def test_image_folder_is_cropped_resized_and_labelled_by_name(tmp_path):
    _write_image_folder(tmp_path)
    images = read_image_folder(tmp_path, size=16)
    assert images.images.shape == (3, 3, 16, 16)
    assert images.labels.tolist() == [0, 1, 1]
    assert images.num_classes == 2
    means = images.images.float().mean((2, 3)).tolist()
    assert means[0] == [255, 0, 0]
    assert means[1] == [0, 0, 255]
    assert means[2] == pytest.approx([128] * 3, abs=2)


def test_image_folder_in_grey(tmp_path):
    _write_image_folder(tmp_path)
    config = ImageFolderConfig(folder=tmp_path, size=8, channels=1)
    assert config.load().images.shape == (3, 1, 8, 8)
    assert config.describe()["count"] == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no folder"),
        (lambda folder: folder.mkdir(), "has no subfolder"),
        (lambda folder: (folder / "a").mkdir(parents=True), "has no image"),
    ],
)
def test_empty_image_folders_are_refused(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(DataError, match=message):
        read_image_folder(tmp_path / "data", size=8)


def test_a_broken_image_is_named(tmp_path):
    _write_image_folder(tmp_path)
    whole = (tmp_path / "a" / "1.png").read_bytes()
    (tmp_path / "a" / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"1\.png is not a picture"):
        read_image_folder(tmp_path, size=8)


def test_data_is_named_in_a_recipe(tmp_path):
    adapter = TypeAdapter(DataConfig)
    _write_fashion_mnist(tmp_path)
    config = adapter.validate_python({"name": "fashion-mnist", "folder": str(tmp_path), "split": "test"})
    images = load_data(config)
    assert config.describe() == {"name": "fashion-mnist", "sha256": images.sha256(), "count": 3}
    assert adapter.validate_json(adapter.dump_json(config)) == config


@pytest.mark.parametrize(
    "value",
    [
        {"name": "imagenet"},
        {"name": "fashion-mnist", "spit": "test"},
        {"name": "testbed-subset", "size": 32},
        {"name": "image-folder", "folder": ".", "size": 0},
        {"name": "image-folder", "folder": ".", "size": 8, "channels": 4},
        {"folder": "."},
    ],
)
def test_faulty_data_configs_are_refused(value):
    with pytest.raises(ValidationError):
        TypeAdapter(DataConfig).validate_python(value)

"""Files of samples: numpy and safetensors read them, in bounded memory, and what is damaged is named."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from grafting.errors import CheckpointError, DataError, ProtocolError
from grafting.sampling.chain import SamplingConfig
from grafting.sampling.files import open_samples, origin_of, read_samples, write_samples

SHAPE = (3, 4, 6)
ORIGIN = origin_of(SamplingConfig(steps=5), vae={"name": "toy", "sha256": "00"})
KINDS = ("npz", "safetensors")


def some(num_images: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, 256, (num_images, *SHAPE), dtype=torch.uint8), torch.arange(num_images) % 7


def write(path: Path, images, labels, *, size: int = 4, **changes) -> None:
    batches = zip(images.split(size), labels.split(size), strict=True)
    settings = {"num_images": len(images), "shape": SHAPE, "origin": ORIGIN, "record": {"model": "m"}}
    write_samples(path, batches, **settings | changes)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read(tmp_path: Path, kind: str):
    images, labels = some()
    path = tmp_path / f"s.{kind}"
    write(path, images, labels)
    file = open_samples(path)
    assert (file.num_images, file.shape) == (11, SHAPE)
    assert (file.origin, file.record) == (ORIGIN, {"model": "m"})
    assert [len(batch) for batch in file.images(5)] == [5, 5, 1]
    for _ in range(2):  # as often as one likes
        parts = list(file.batches(5))
        assert torch.equal(torch.cat([part for part, _ in parts]), images)
        assert torch.equal(torch.cat([part for _, part in parts]), labels)
    whole = read_samples(path)
    assert torch.equal(whole.images, images)
    assert torch.equal(whole.labels, labels)
    assert whole.origin == ORIGIN


def test_others_read_the_files(tmp_path: Path):
    images, labels = some()
    for kind in KINDS:
        write(tmp_path / f"s.{kind}", images, labels)
    with np.load(tmp_path / "s.npz", allow_pickle=False) as arrays:
        assert arrays["arr_0"].dtype == np.uint8
        assert np.array_equal(arrays["arr_0"], images.permute(0, 2, 3, 1).numpy())
        assert arrays["labels"].tolist() == labels.tolist()
    tensors = load_file(tmp_path / "s.safetensors")
    assert torch.equal(tensors["images"], images)
    assert torch.equal(tensors["labels"], labels)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_images_are_the_same_bytes(tmp_path: Path, kind: str):
    images, labels = some()
    paths = [tmp_path / f"{size}.{kind}" for size in (1, 4, 11)]
    for size, path in zip((1, 4, 11), paths, strict=True):
        write(path, images, labels, size=size)
    assert len({path.read_bytes() for path in paths}) == 1


def peak_mb(function) -> float:
    """Most memory that Python and numpy held at once, beside what they held before."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_memory_holds_a_few_batches_whatever_the_number_of_images(tmp_path: Path, kind: str):
    num_batches, size, shape = 100, 16, (3, 128, 128)  # 79 MB in batches of 0.8
    path = tmp_path / f"s.{kind}"
    labels = torch.zeros(size, dtype=torch.int64)

    def batches():
        for number in range(num_batches):
            yield torch.from_numpy(np.full((size, *shape), number, np.uint8)), labels

    def read():
        numbers = [int(images[0, 0, 0, 0]) for images in open_samples(path).images(size)]
        assert numbers == list(range(num_batches))

    num_images = num_batches * size
    assert (
        peak_mb(lambda: write_samples(path, batches(), num_images=num_images, shape=shape, origin=ORIGIN)) < 5
    )
    assert path.stat().st_size > 78e6
    assert peak_mb(read) < 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 12}, "12 images were to be written; got only 11"),
        ({"num_images": 6}, "6 images of"),
        ({"shape": (1, 4, 6)}, r"of \[1, 4, 6\] were to be written; found 4 of \[3, 4, 6\]"),
    ],
)
def test_batches_that_are_not_what_was_announced_leave_nothing(tmp_path: Path, kind, changes, message):
    path = tmp_path / f"s.{kind}"
    path.write_text("what was there")
    with pytest.raises(DataError, match=message):
        write(path, *some(), **changes)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "what was there"


def test_damage_is_found(tmp_path: Path):
    path = tmp_path / "s.npz"
    images, labels = some()
    write(path, images, labels)
    whole = path.read_bytes()
    place = whole.index(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(DataError, match=r"s.npz is not a complete .npz file of arrays: Bad CRC-32"):
        list(open_samples(path).images())
    for kind in KINDS:
        path = tmp_path / f"t.{kind}"
        write(path, images, labels)
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises((DataError, CheckpointError), match=f"t.{kind} is"):
            open_samples(path)


def test_compressed_files_are_read_too(tmp_path: Path):
    images, labels = some()
    arrays = {"arr_0": images.permute(0, 2, 3, 1).numpy(), "labels": labels.numpy()}
    np.savez_compressed(tmp_path / "s.npz", **arrays)
    assert torch.equal(read_samples(tmp_path / "s.npz").images, images)


def test_files_without_labels_have_images(tmp_path: Path):
    path = tmp_path / "s.npz"
    images, _ = some()
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy())
    file = open_samples(path)
    assert file.labels is None
    assert torch.equal(torch.cat(list(file.images(3))), images)
    with pytest.raises(DataError, match="labels is not a file in the archive"):
        file.batches()


class Loud:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.zeros(3, int)}, "arr_0 is not a file in the archive"),
        ({"arr_0": np.zeros((3, 4, 4, 1), np.float32)}, r"found float32 \[3, 4, 4, 1\] and no labels"),
        ({"arr_0": np.zeros((3, 4, 4), np.uint8)}, r"found uint8 \[3, 4, 4\]"),
        ({"arr_0": np.array([Loud()] * 3)}, "holds objects"),
        ({"arr_0": np.zeros((3, 4, 4, 2), np.uint8, order="F")}, "Fortran order"),
        ({"arr_0": np.zeros((3, 4, 4, 1), np.uint8), "labels": np.zeros(3)}, r"float64 \[3\]"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, arrays, message):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(DataError, match=message):
        open_samples(tmp_path / "s.npz")


def test_other_tensors_are_refused(tmp_path: Path):
    path = tmp_path / "s.safetensors"
    save_file({"images": torch.zeros(2, 1, 4, 4), "labels": torch.zeros(2).long()}, path)
    with pytest.raises(CheckpointError, match=r"found F32 \[2, 1, 4, 4\]"):
        open_samples(path)
    save_file({"pictures": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="holds pictures; samples are images and labels"):
        open_samples(path)


def test_samples_of_older_runs_have_the_origin_of_the_runs_recipe(tmp_path: Path):
    path = tmp_path / "samples" / "random.safetensors"
    path.parent.mkdir()
    images, labels = some(3)
    save_file({"images": images, "labels": labels}, path)
    assert open_samples(path).origin["sampling"].keys() == {"source", "sha256"}
    config = SamplingConfig(num_images=3, steps=7)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"sample": config.model_dump(mode="json")}))
    assert open_samples(path).origin == origin_of(config)
    recipe.write_text(yaml.safe_dump({"sample": {"num_images": 4}}))
    with pytest.raises(ProtocolError, match=r"holds 3 images, .*recipe.yaml says 4"):
        open_samples(path)
    recipe.write_text(yaml.safe_dump({"sample": {"num_pictures": 4}}))
    with pytest.raises(DataError, match="is not a recipe whose `sample` can be read: num_pictures"):
        open_samples(path)


def test_the_origin_names_the_autoencoder():
    config = SamplingConfig(labels=(3, 8), precision="fp32")
    assert origin_of(config)["sampling"] == config.model_dump(mode="json")
    assert ORIGIN["sampling"]["vae"] == {"name": "toy", "sha256": "00"}
    assert origin_of(config, weights_dtype="bfloat16")["weights_dtype"] == "bfloat16"
    assert origin_of(config)["labels"] == "given, in turn: 3, 8"

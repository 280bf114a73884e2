"""Latents of images: diffusers' own moments, the same files whoever makes them and however often they are killed."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import imagefiles
from closeness import assert_close
from grafting.data import latentfolder, latents
from grafting.data.latents import INDEX_NAME, LatentsConfig, read_index, read_item_names
from grafting.data.sources import ImageStream, centre_crop, decode, image_folder
from grafting.errors import DataError, FaultWarning, ResumeWarning, RunError
from grafting.latents.autoencoder import Autoencoder, load_autoencoder
from grafting.latents.encoding import EncodingConfig, encode, forecast
from grafting.machine.files import sha256_of

# 12 images in shards of 5, 5 and 2, in batches of 2, 2, 1
CONFIG = EncodingConfig(size=16, shard_size=5, batch_size=2, max_unreadable=0)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Autoencoder:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae") / "toy"
    imagefiles.write_vae(folder)
    return load_autoencoder(folder)


@pytest.fixture
def stream(tmp_path: Path) -> ImageStream:
    return image_folder(imagefiles.write_folder(tmp_path / "images"), name="toy")


def run(stream: ImageStream, vae: Autoencoder, folder: Path, config=CONFIG, **settings) -> list:
    return list(encode(stream, vae, config, folder, **settings))


def hashes(folder: Path) -> dict[str, str]:
    """Of all files but locks."""
    return {str(p.relative_to(folder)): sha256_of(p) for p in sorted(folder.rglob("[!.]*")) if p.is_file()}


def in_child(work: Callable[[], object]) -> int:
    """Carries out a work in a process of its own, and gives its wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.fixture
def undisturbed(stream: ImageStream, vae: Autoencoder, tmp_path: Path) -> dict[str, str]:
    run(stream, vae, tmp_path / "undisturbed")
    return hashes(tmp_path / "undisturbed")


def test_moments_are_those_of_diffusers(stream: ImageStream, vae: Autoencoder, tmp_path: Path):
    steps = run(stream, vae, tmp_path / "out", CONFIG.model_copy(update={"dtype": "fp32"}))
    assert [step.done for step in steps] == [0, 2, 4, 5, 7, 9, 10, 12]
    assert all(step.total == 12 for step in steps)
    latents = LatentsConfig(folder=tmp_path / "out").load()
    pixels = [centre_crop(decode(stream.read(number)), 16) for number in range(12)]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = vae.module.encode(x).latent_dist
    want = torch.cat([posterior.mean, posterior.logvar], dim=1)
    stored = torch.cat([_stored(tmp_path / "out", n) for n in range(3)])
    assert_close("moments", stored, want, ratio=1e-5)
    assert torch.equal(latents.labels, torch.tensor([0] * 4 + [1] * 4 + [2] * 4))
    assert read_item_names(tmp_path / "out", latents.index) == list(stream.ids)


def _stored(folder: Path, number: int) -> torch.Tensor:
    return load_file(folder / f"latents-{number:05}.safetensors")["latents"]


def test_index_says_what_the_latents_are(stream: ImageStream, vae: Autoencoder, tmp_path: Path):
    run(stream, vae, tmp_path / "out")
    index = read_index(tmp_path / "out")
    assert (index.source, index.vae, index.vae_sha256) == ("toy", "toy", vae.sha256)
    assert (index.scale, index.shift, index.stored, index.dtype) == (0.3611, 0.1159, "moments", "float16")
    assert (index.shape, index.crop_size, index.num_classes) == ((4, 8, 8), 16, 3)
    assert (index.source_sha256, index.unreadable, index.mirrored) == (stream.sha256, 0, False)
    assert [shard.count for shard in index.shards] == [5, 5, 2]


def test_what_training_reads_is_scaled_and_shifted(stream: ImageStream, vae: Autoencoder, tmp_path: Path):
    """With next to no variance a sample is the mean, and decoding it is what diffusers' own round trip gives."""
    run(stream, vae, tmp_path / "out", CONFIG.model_copy(update={"dtype": "fp32"}))
    latents = LatentsConfig(folder=tmp_path / "out").load()
    draws = torch.stack(
        [
            LatentsConfig(folder=tmp_path / "out", seed=s, verify=False).load().batch(torch.tensor([3]))[0]
            for s in range(200)
        ]
    )
    mean, log_variance = _stored(tmp_path / "out", 0)[3].chunk(2)
    assert_close("mean", draws.mean(0)[0], 0.3611 * (mean - 0.1159), ratio=0.2)
    deviation = 0.3611 * (0.5 * log_variance).exp()
    assert abs((draws.std(0)[0] / deviation).mean().item() - 1) < 0.02
    assert latents.num_classes == 3


def test_mirrored_images_are_items_after_their_originals(
    stream: ImageStream, vae: Autoencoder, tmp_path: Path
):
    run(stream, vae, tmp_path / "out", CONFIG.model_copy(update={"mirrored": True, "dtype": "fp32"}))
    latents = LatentsConfig(folder=tmp_path / "out").load()
    assert (len(latents), latents.index.mirrored) == (24, True)
    assert latents.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    names = read_item_names(tmp_path / "out", latents.index)
    assert names[:3] == ["Bag/Bag_000.JPEG", "Bag/Bag_000.JPEG mirrored", "Bag/Bag_001.png"]
    image = torch.from_numpy(stream.crop(1, size=16).copy()).permute(2, 0, 1)
    want = vae.encode(torch.stack([image, image.flip(-1)]))
    assert_close("moments", _stored(tmp_path / "out", 0)[2:4], want, ratio=1e-5)
    assert not torch.equal(want[0], want[1])


def test_killed_in_the_middle_of_shards_and_writes(
    stream: ImageStream, vae: Autoencoder, tmp_path: Path, undisturbed, monkeypatch: pytest.MonkeyPatch
):
    """SIGKILL after 1 batch, in the second shard, and while the second shard's file is half-written."""
    folder, save = tmp_path / "killed", latents.save_file

    def die_after(num_steps: int) -> None:
        for count, _ in enumerate(encode(stream, vae, CONFIG, folder)):
            if count == num_steps:
                os.kill(os.getpid(), signal.SIGKILL)

    def die_while_writing() -> None:
        def half(tensors, path: Path) -> None:
            save(tensors, path)
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        latents.save_file = half
        run(stream, vae, folder)

    assert in_child(lambda: die_after(1)) == signal.SIGKILL
    assert not list(folder.glob("*.safetensors"))
    assert in_child(lambda: die_after(5)) == signal.SIGKILL
    assert [p.name for p in folder.glob("*.safetensors")] == ["latents-00000.safetensors"]
    assert in_child(die_while_writing) == signal.SIGKILL
    assert len(list(folder.glob(".*.partial"))) == 1
    encoded = []
    monkeypatch.setattr(Autoencoder, "encode", _counting(Autoencoder.encode, encoded))
    steps = run(stream, vae, folder)
    assert steps[0].done == 5
    assert sum(encoded) == 7
    assert hashes(folder) == undisturbed


def _counting(encode_images, counts: list[int]):
    def counted(self, images, **settings):
        counts.append(len(images))
        return encode_images(self, images, **settings)

    return counted


def test_two_processes_make_what_one_makes(
    stream: ImageStream, vae: Autoencoder, tmp_path: Path, undisturbed
):
    folder = tmp_path / "shared"
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            try:
                run(stream, vae, folder, share=slice(rank, None, 2))
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert hashes(folder) == undisturbed


def test_the_last_process_writes_the_index(
    stream: ImageStream, vae: Autoencoder, tmp_path: Path, undisturbed
):
    folder = tmp_path / "shared"
    steps = run(stream, vae, folder, share=slice(1, None, 2))
    assert (steps[-1].done, steps[-1].total) == (5, 5)
    assert not (folder / INDEX_NAME).exists()
    # whoever goes on may be another number of processes
    assert run(stream, vae, folder)[0].done == 5
    assert hashes(folder) == undisturbed


def test_a_finished_folder_is_not_done_again_but_damage_is(
    stream: ImageStream, vae: Autoencoder, tmp_path: Path, undisturbed, monkeypatch: pytest.MonkeyPatch
):
    folder, encoded = tmp_path / "undisturbed", []
    monkeypatch.setattr(Autoencoder, "encode", _counting(Autoencoder.encode, encoded))
    run(stream, vae, folder)
    assert encoded == []
    shard = folder / "latents-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    (folder / "shards" / "00002.json").write_text("{")
    run(stream, vae, folder)
    assert sum(encoded) == 5 + 2
    assert hashes(folder) == undisturbed


def _encoded_anew(stream, vae, folder, encoded: list[int], match: str) -> int:
    encoded.clear()
    with pytest.warns(FaultWarning, match=match):
        run(stream, vae, folder)
    return sum(encoded)


def test_shards_under_other_numbers_and_of_other_work_are_done_again(
    stream: ImageStream, vae: Autoencoder, tmp_path: Path, undisturbed, monkeypatch: pytest.MonkeyPatch
):
    """Their checksums are whole, so nothing but their owner would tell."""
    folder, encoded = tmp_path / "undisturbed", []
    monkeypatch.setattr(Autoencoder, "encode", _counting(Autoencoder.encode, encoded))
    first, second = (folder / "shards" / f"0000{number}.json" for number in (0, 1))
    swapped = second.read_text(), first.read_text()
    first.write_text(swapped[0])
    second.write_text(swapped[1])
    assert _encoded_anew(stream, vae, folder, encoded, "json is of another shard or another work") == 5 + 5
    assert hashes(folder) == undisturbed
    run(stream, vae, tmp_path / "other", config=CONFIG.model_copy(update={"precision": "bf16"}))
    for name in ("latents-00000.safetensors", "shards/00000.json"):
        shutil.copy(tmp_path / "other" / name, folder / name)
    assert _encoded_anew(stream, vae, folder, encoded, "00000.json is of another shard or another work") == 5
    assert hashes(folder) == undisturbed


def test_shards_of_an_earlier_version_are_taken_with_one_warning(
    stream: ImageStream, vae: Autoencoder, tmp_path: Path, undisturbed
):
    folder = tmp_path / "undisturbed"
    for path in (folder / "shards").iterdir():
        record = json.loads(path.read_text())
        del record["owner"]
        path.write_text(json.dumps(record))
    with pytest.warns(ResumeWarning, match="has shards of an earlier version") as told:
        run(stream, vae, folder)
    assert len(told) == 1


def test_unreadable_images_are_left_out_and_listed(stream: ImageStream, vae: Autoencoder, tmp_path: Path):
    for name in ("Bag/Bag_002.png", "Dress/Dress_003.png"):
        (tmp_path / "images" / name).write_bytes(b"no image")
    (tmp_path / "images" / "Dress" / "Dress_002.png").unlink()
    with pytest.raises(DataError, match="1 of 12 images cannot be read, 0 allowed.*\n  Bag/Bag_002.png: "):
        run(stream, vae, tmp_path / "out")
    assert not (tmp_path / "out" / INDEX_NAME).exists()
    run(stream, vae, tmp_path / "out", CONFIG.model_copy(update={"max_unreadable": 0.25}))
    latents = LatentsConfig(folder=tmp_path / "out").load()
    assert latents.index.unreadable == 3
    # the last shard has nothing that can be read, and the others keep the images that they would have had
    assert [shard.count for shard in latents.index.shards] == [4, 5]
    assert read_item_names(tmp_path / "out", latents.index)[:3] == [
        "Bag/Bag_000.JPEG",
        "Bag/Bag_001.png",
        "Bag/Bag_003.png",
    ]
    listed = (tmp_path / "out" / "unreadable.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == [
        "Bag/Bag_002.png",
        "Dress/Dress_002.png",
        "Dress/Dress_003.png",
    ]
    assert "it is not a picture that can be read" in listed[0]


def test_mended_images_are_taken_in_when_it_is_started_again(
    stream: ImageStream, vae: Autoencoder, tmp_path: Path, undisturbed
):
    broken, folder = tmp_path / "images" / "Dress" / "Dress_000.png", tmp_path / "out"
    content, config = broken.read_bytes(), CONFIG.model_copy(update={"max_unreadable": 0.1})
    broken.write_bytes(content[:40])
    run(stream, vae, folder, config)
    left_out = hashes(folder)
    assert run(stream, vae, folder, config)[0].done == 12
    assert hashes(folder) == left_out
    broken.write_bytes(content)
    assert run(stream, vae, folder, config)[0].done == 7
    assert hashes(folder) == undisturbed


def test_too_many_unreadable_images_over_all_processes(stream: ImageStream, vae: Autoencoder, tmp_path: Path):
    for name in ("Bag/Bag_002.png", "Coat/Coat_003.png"):
        (tmp_path / "images" / name).write_bytes(b"no image")
    config = CONFIG.model_copy(update={"max_unreadable": 0.1})
    run(stream, vae, tmp_path / "out", config, share=slice(1, None, 2))
    with pytest.raises(DataError, match="2 of 12 images cannot be read, 1 allowed"):
        run(stream, vae, tmp_path / "out", config, share=slice(0, None, 2))
    assert not (tmp_path / "out" / INDEX_NAME).exists()


def test_a_folder_of_other_settings_is_refused(stream: ImageStream, vae: Autoencoder, tmp_path: Path):
    run(stream, vae, tmp_path / "out")
    before = hashes(tmp_path / "out")
    other = CONFIG.model_copy(update={"size": 24, "batch_size": 3})
    with pytest.raises(
        RunError,
        match="another work.*\n  encoding.batch_size: asked 3, found 2\n  encoding.size: asked 24, found 16$",
    ):
        run(stream, vae, tmp_path / "out", other)
    (tmp_path / "images" / "Bag" / "Bag_009.png").write_bytes(imagefiles.encoded("Bag", 9))
    with pytest.raises(RunError, match="source.images: asked 13, found 12\n  source.sha256"):
        run(image_folder(tmp_path / "images", name="toy"), vae, tmp_path / "out")
    with pytest.raises(RunError, match="images exists and is not a folder of latents that was begun"):
        run(stream, vae, tmp_path / "images")
    assert hashes(tmp_path / "out") == before


def test_another_process_may_make_the_folder_at_the_same_moment(
    stream: ImageStream, vae: Autoencoder, tmp_path: Path, monkeypatch
):
    run(stream, vae, tmp_path / "other")
    folder, is_file = tmp_path / "latents", Path.is_file
    folder.mkdir()

    def then_the_other_encodes(path: Path) -> bool:
        found = is_file(path)
        if path == folder / latentfolder.WORK_NAME and not found:
            shutil.copytree(tmp_path / "other", folder, dirs_exist_ok=True)
        return found

    monkeypatch.setattr(Path, "is_file", then_the_other_encodes)
    run(stream, vae, folder)
    assert hashes(folder) == hashes(tmp_path / "other")


def test_the_same_shards_are_not_done_by_two(stream: ImageStream, vae: Autoencoder, tmp_path: Path):
    first = encode(stream, vae, CONFIG, tmp_path / "out")
    next(first)
    with pytest.raises(RunError, match="another process is working on the same shards of .*out"):
        run(stream, vae, tmp_path / "out")
    first.close()
    run(stream, vae, tmp_path / "out")


def test_sizes_that_the_autoencoder_cannot_take(stream: ImageStream, vae: Autoencoder, tmp_path: Path):
    with pytest.raises(
        DataError, match="images of 17 pixels per side cannot be encoded: toy takes multiples of 2"
    ):
        run(stream, vae, tmp_path / "out", CONFIG.model_copy(update={"size": 17}))
    assert not (tmp_path / "out").exists()


def test_full_disks_are_known_beforehand(
    stream: ImageStream, vae: Autoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Usage:
        free = 12 * (4 * 8 * 8 * 2 + 4) - 1

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(RunError, match=r"0.0 GB remain to be written and 0.0 GB are free"):
        run(stream, vae, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()
    Usage.free += 1
    run(stream, vae, tmp_path / "deep" / "out")


def test_bytes_on_disk_are_what_was_forecast(stream: ImageStream, vae: Autoencoder, tmp_path: Path):
    found = forecast(stream, vae, CONFIG, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (found.num_images, found.num_items, found.num_shards, found.images_left) == (12, 12, 3, 12)
    assert found.decode_seconds > 0
    assert found.encode_seconds > 0
    run(stream, vae, tmp_path / "out", share=slice(0, None, 2))
    written = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    left = forecast(stream, vae, CONFIG, tmp_path / "out")
    assert (left.images_left, left.bytes_left) == (5, 5 * 516)
    # headers beside the items
    assert 0 <= written - 7 * 516 < 2 * 300


def test_latents_that_half_precision_cannot_hold(
    stream: ImageStream, vae: Autoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        Autoencoder, "encode", lambda self, images, **_: torch.full((len(images), 4, 8, 8), 1e5)
    )
    with pytest.raises(DataError, match="5 latents are not finite in fp16, the first of Bag/Bag_000.JPEG"):
        run(stream, vae, tmp_path / "out")
    run(stream, vae, tmp_path / "wide", CONFIG.model_copy(update={"dtype": "bf16"}))
    assert read_index(tmp_path / "wide").dtype == "bfloat16"


def test_workers_and_their_number_change_nothing(
    stream: ImageStream, vae: Autoencoder, tmp_path: Path, undisturbed
):
    run(stream, vae, tmp_path / "out", workers=5)
    assert hashes(tmp_path / "out") == undisturbed


def test_an_error_ends_the_threads(stream: ImageStream, vae: Autoencoder, tmp_path: Path, monkeypatch):
    """What is no fault of an image is passed on, and nothing keeps decoding."""

    def broken(image, size):
        raise ZeroDivisionError

    monkeypatch.setattr("grafting.data.sources.centre_crop", broken)
    with pytest.raises(ZeroDivisionError):
        run(stream, vae, tmp_path / "out")
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]


def test_facts_on_disk_are_json(stream: ImageStream, vae: Autoencoder, tmp_path: Path):
    run(stream, vae, tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "work.json").read_text())
    assert facts["encoding"]["size"] == 16
    assert "max_unreadable" not in facts["encoding"]
    assert facts["format"] == latentfolder.FORMAT


def test_work_goes_on_in_the_precision_that_it_began_in(
    stream: ImageStream, vae: Autoencoder, tmp_path: Path, monkeypatch
):
    folder = tmp_path / "latents"
    monkeypatch.setenv("GRAFTING_PRECISION", "bf16")
    steps = encode(stream, vae, CONFIG, folder)
    while not next(steps).done:
        pass
    steps.close()
    assert json.loads((folder / "work.json").read_text())["encoding"]["precision"] == "bf16"
    run(stream, vae, tmp_path / "undisturbed", CONFIG.model_copy(update={"precision": "bf16"}))
    monkeypatch.setenv("GRAFTING_PRECISION", "fp32")
    with pytest.warns(ResumeWarning, match="latents began in bf16 and keeps it"):
        run(stream, vae, folder)
    assert hashes(folder) == hashes(tmp_path / "undisturbed")
    with pytest.raises(RunError, match=r"encoding.precision: asked 'fp32', found 'bf16'"):
        run(stream, vae, folder, CONFIG.model_copy(update={"precision": "fp32"}))

"""Folders of latents: what is written is read, scaled, item by item; damage is named."""

import json
import os
from pathlib import Path

import pytest
import torch

from closeness import assert_close
from grafting.contract import TrainingData
from grafting.data.latentfolder import LatentFolder
from grafting.data.latents import INDEX_NAME, LatentsConfig, read_index, read_item_names, write_latents
from grafting.data.subset import Subset, write_subset
from grafting.errors import DataError
from grafting.machine.files import hash_json, sha256_of

LATENTS = torch.randn(11, 4, 2, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1])


def write(folder: Path, latents: torch.Tensor = LATENTS, **settings) -> Path:
    """11 items, given in batches of 4, 4, 3, in shards of 5, 5, 1."""
    facts = {"source": "toy train", "vae": "toy-vae", "scale": 0.5, "num_classes": 3, "shard_size": 5}
    batches = zip(latents.split(4), LABELS.split(4), strict=True)
    write_latents(folder, batches, **facts | settings)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "latents", dtype=torch.float32)


def test_items_come_back_scaled_in_any_order_across_shards(folder: Path):
    latents = LatentsConfig(folder=folder).load()
    indices = torch.tensor([10, 0, 4, 5, 9, 5])
    x, labels = latents.batch(indices)
    assert_close("latents", x, 0.5 * LATENTS[indices], ratio=1e-7)
    assert torch.equal(labels, LABELS[indices])
    assert [shard.count for shard in latents.index.shards] == [5, 5, 1]
    assert isinstance(latents, TrainingData)
    assert (len(latents), latents.num_classes) == (11, 3)


def test_a_shift_is_taken_away_before_the_scale(tmp_path: Path):
    """Source: diffusers' Flux pipelines, `(latent - shift_factor) * scaling_factor`."""
    x, _ = (
        LatentsConfig(folder=write(tmp_path, dtype=torch.float32, shift=0.25)).load().batch(torch.arange(11))
    )
    assert_close("latents", x, 0.5 * (LATENTS - 0.25), ratio=1e-6)


def test_indexes_of_before_shifts_are_read_and_keep_their_hash(folder: Path):
    index = json.loads((folder / INDEX_NAME).read_text())
    old = ("source", "vae", "scale", "stored", "dtype", "shape", "num_classes", "shards")
    older = {key: index[key] for key in old}
    (folder / INDEX_NAME).write_text(json.dumps(older))
    assert read_index(folder).shift == 0.0
    assert LatentsConfig(folder=folder).describe()["sha256"] == hash_json(older)


def test_latents_of_prompts_say_which(folder: Path, tmp_path: Path):
    assert LatentsConfig(folder=folder).load().conditions_sha256 is None
    bound = LatentsConfig(folder=write(tmp_path / "bound", dtype=torch.float32, conditions_sha256="ab" * 32))
    assert bound.load().take(torch.tensor([3])).conditions_sha256 == "ab" * 32
    assert bound.describe()["sha256"] != LatentsConfig(folder=folder).describe()["sha256"]


def test_names_of_items(folder: Path):
    with pytest.raises(DataError, match=r"the items in .* have no names, only numbers 0\.\.10"):
        read_item_names(folder, read_index(folder))
    (folder / "items.txt").write_text("a\nb\n")
    index = json.loads((folder / INDEX_NAME).read_text())
    items = {"file": "items.txt", "sha256": sha256_of(folder / "items.txt")}
    (folder / INDEX_NAME).write_text(json.dumps(index | {"items": items}))
    assert read_item_names(folder, read_index(folder)) == ["a", "b"]
    (folder / "items.txt").write_text("a\nc\n")
    with pytest.raises(DataError, match="items.txt, the names of the items, is missing or damaged"):
        read_item_names(folder, read_index(folder))


VIDEOS = torch.randn(11, 4, 3, 2, 3, generator=torch.Generator().manual_seed(1))


def test_videos(tmp_path: Path):
    folder = write(tmp_path, VIDEOS, dtype=torch.float32)
    indices = torch.tensor([10, 0, 4])
    x, labels = LatentsConfig(folder=folder).load().batch(indices)
    assert torch.equal(x, 0.5 * VIDEOS[indices])
    assert torch.equal(labels, LABELS[indices])
    assert read_index(folder).shape == (4, 3, 2, 3)


def test_samples_of_videos_from_means_and_variances(tmp_path: Path):
    videos = VIDEOS.clone()
    videos[:, 2:] = -100  # log variances of next to nothing
    latents = LatentsConfig(folder=write(tmp_path, videos, stored="moments", dtype=torch.float32)).load()
    x, _ = latents.batch(torch.arange(11))
    assert_close("means", x, 0.5 * VIDEOS[:, :2], ratio=1e-5)


def test_a_folder_of_videos_filled_shard_by_shard(tmp_path: Path):
    folder = LatentFolder(
        folder=tmp_path, facts={}, num_images=11, per_shard=4, shape=(4, 3, 2, 3), dtype="fp32", num_classes=3
    )
    with folder.working(slice(0, None, 1)) as shards:
        for number in shards:
            items = list(folder.images_of(number))
            labels, names = LABELS[items].tolist(), [str(item) for item in items]
            folder.write(number, VIDEOS[items], labels, names=names, unreadable={})
    folder.finish(
        {"source": "toy", "vae": "toy", "scale": 1.0, "stored": "samples", "conditions_sha256": "cd" * 32},
        max_unreadable=0,
    )
    latents = LatentsConfig(folder=tmp_path).load()
    assert torch.equal(latents.batch(torch.arange(11))[0], VIDEOS)
    assert latents.conditions_sha256 == "cd" * 32


def test_files_of_an_index_stay_in_its_folder(folder: Path):
    text = (folder / INDEX_NAME).read_text()
    for name in ("../latents-00001.safetensors", "/latents-00001.safetensors"):
        (folder / INDEX_NAME).write_text(text.replace("latents-00001.safetensors", name))
        with pytest.raises(DataError, match=f"leads out of the folder, found '{name}'"):
            read_index(folder)


def test_half_precision_by_default(tmp_path: Path):
    x, _ = LatentsConfig(folder=write(tmp_path)).load().batch(torch.arange(11))
    assert x.dtype == torch.float32
    assert_close("latents", x, 0.5 * LATENTS, ratio=1e-3)
    assert torch.equal(x, 0.5 * LATENTS.half().float())


def test_a_shard_is_opened_when_it_is_read(folder: Path):
    latents = LatentsConfig(folder=folder, verify=False).load()
    (folder / "latents-00002.safetensors").unlink()
    latents.batch(torch.arange(10))
    with pytest.raises(DataError, match=r"latents-00002.safetensors is missing"):
        latents.batch(torch.tensor([10]))


def test_a_shard_that_is_cut_while_it_is_in_use_is_named(folder: Path):
    latents = LatentsConfig(folder=folder).load()
    latents.batch(torch.arange(11))
    # what remains holds no labels, which are known by now, and not the last of the latents
    os.truncate(
        folder / "latents-00001.safetensors", (folder / "latents-00001.safetensors").stat().st_size - 28
    )
    latents.batch(torch.arange(9))
    with pytest.raises(DataError, match=r"latents-00001.safetensors is not a complete file: it ends 8 bytes"):
        latents.batch(torch.tensor([9]))


def test_brain_floats_come_back(tmp_path: Path):
    x, _ = LatentsConfig(folder=write(tmp_path, dtype=torch.bfloat16)).load().batch(torch.arange(11))
    assert torch.equal(x, 0.5 * LATENTS.bfloat16().float())


def test_sample_of_a_mean_and_variance_depends_on_seed_and_item_alone(tmp_path: Path):
    folder = write(tmp_path, stored="moments", dtype=torch.float32)
    latents = LatentsConfig(folder=folder).load()
    x, _ = latents.batch(torch.tensor([7, 2]))
    assert x.shape == (2, 2, 2, 3)
    assert torch.equal(x[1:], latents.batch(torch.tensor([2]))[0])
    part = LatentsConfig(folder=folder, per_class=1).load()
    assert torch.equal(part.batch(torch.tensor([0]))[0], latents.batch(part.items[:1])[0])
    other = LatentsConfig(folder=folder, seed=1).load().batch(torch.tensor([7, 2]))[0]
    assert not torch.equal(x, other)


def test_samples_have_the_stored_mean_and_variance(tmp_path: Path):
    mean, log_variance = torch.full((4000, 1, 1, 1), 3.0), torch.full((4000, 1, 1, 1), 2 * 0.6931472)
    moments = torch.cat([mean, log_variance], dim=1)
    facts = {"source": "toy", "vae": "toy", "scale": 0.5, "num_classes": 1, "stored": "moments"}
    write_latents(tmp_path, [(moments, torch.zeros(4000, dtype=torch.int64))], **facts)
    x, _ = LatentsConfig(folder=tmp_path).load().batch(torch.arange(4000))
    assert abs(x.mean().item() - 1.5) < 4 * 1 / 4000**0.5
    assert abs(x.std().item() - 1) < 0.05


def test_subset_by_file_and_by_class(folder: Path, tmp_path: Path):
    write_subset(tmp_path / "s.json", Subset(source="toy train", num_classes=3, ids=(9, 2, 4)))
    latents = LatentsConfig(folder=folder, subset=tmp_path / "s.json").load()
    # sorted: what a subset's hash says is the same trains the same
    assert latents.items.tolist() == [2, 4, 9]
    assert torch.equal(latents.batch(torch.tensor([2]))[0], 0.5 * LATENTS[9:10])
    assert latents.labels.tolist() == [2, 1, 0]
    drawn = LatentsConfig(folder=folder, per_class=2).load()
    assert drawn.labels.bincount().tolist() == [2, 2, 2]


def test_description_is_of_the_content(folder: Path, tmp_path: Path):
    whole = LatentsConfig(folder=folder).describe()
    assert whole == LatentsConfig(folder=folder.rename(tmp_path / "moved")).describe()
    assert whole != LatentsConfig(folder=tmp_path / "moved", per_class=3).describe()
    again = write(tmp_path / "again", dtype=torch.float32, scale=0.25)
    assert whole["sha256"] != LatentsConfig(folder=again).describe()["sha256"]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "latents-00001.safetensors is missing"),
        (_cut, r"latents-00001.safetensors is cut short or changed: \d+ bytes, not \d+"),
        (_flip, "latents-00001.safetensors is damaged: its sha256 is not"),
    ],
)
def test_damaged_shard_is_named(folder: Path, damage, message: str):
    damage(folder / "latents-00001.safetensors")
    with pytest.raises(DataError, match=message):
        LatentsConfig(folder=folder).load()


def test_only_shards_of_the_subset_are_needed(folder: Path, tmp_path: Path):
    write_subset(tmp_path / "s.json", Subset(source="toy train", num_classes=3, ids=(0, 10)))
    (folder / "latents-00001.safetensors").unlink()
    assert len(LatentsConfig(folder=folder, subset=tmp_path / "s.json").load()) == 2


def test_shard_of_another_shape(folder: Path):
    index = json.loads((folder / INDEX_NAME).read_text())
    (folder / INDEX_NAME).write_text(json.dumps(index | {"shape": [4, 1, 5]}))
    latents = LatentsConfig(folder=folder).load()
    with pytest.raises(
        DataError,
        match=r"latents-00000.* holds latents F32 \(5, 4, 2, 3\), .* says latents F32 \(5, 4, 1, 5\)",
    ):
        latents.batch(torch.tensor([0]))
    (folder / INDEX_NAME).write_text(json.dumps(index | {"shape": [4, 3, 3]}))
    with pytest.raises(DataError, match=r"has not the bytes for as many float32 \(4, 3, 3\)"):
        LatentsConfig(folder=folder).load()


@pytest.mark.parametrize(
    ("ids", "source", "message"),
    [
        ((0, 1), "other", r"s\.json: a subset of 'other' with 3 classes does not fit 'toy train' with 3"),
        ((0, 11), "toy train", "1 of the 2 items .* such as 11; its items are 0 to 10"),
        (("a.png",), "toy train", "1 of the 1 items .* such as 'a.png'"),
    ],
)
def test_subsets_that_do_not_fit(folder: Path, tmp_path: Path, ids, source: str, message: str):
    write_subset(tmp_path / "s.json", Subset(source=source, num_classes=3, ids=ids))
    with pytest.raises(DataError, match=message):
        LatentsConfig(folder=folder, subset=tmp_path / "s.json").load()


def test_subset_file_and_per_class_together(folder: Path):
    with pytest.raises(DataError, match="both a subset file and per_class"):
        LatentsConfig(folder=folder, subset=Path("s.json"), per_class=1).load()


def test_folders_without_a_sound_index(folder: Path, tmp_path: Path):
    with pytest.raises(DataError, match=f"no latents in {tmp_path}"):
        read_index(tmp_path)
    (folder / INDEX_NAME).write_text('{"source": "toy"}')
    with pytest.raises(DataError, match=f"{INDEX_NAME} is not an index of latents"):
        read_index(folder)
    (folder / INDEX_NAME).write_text("{")
    with pytest.raises(DataError, match=f"{INDEX_NAME} is not an index of latents"):
        read_index(folder)


def test_writing_stops_without_an_index(tmp_path: Path):
    with pytest.raises(DataError, match=r"labels are 0\.\.1, found 0\.\.2"):
        write(tmp_path, num_classes=2)
    assert not (tmp_path / INDEX_NAME).exists()
    with pytest.raises(DataError, match="no latents to write"):
        write_latents(tmp_path, [], source="a", vae="b", scale=1.0, num_classes=1)
    large = LATENTS.clone()
    large[7, 0, 0, 0] = 1e5
    with pytest.raises(DataError, match=r"item 7 is not finite in torch\.float16: mend it or leave it out"):
        write(tmp_path, large)
    assert not (tmp_path / INDEX_NAME).exists()


def _name_items(folder: Path, names: list[str]) -> None:
    """Gives the items of a folder names, every second one mirrored."""
    (folder / "items.txt").write_text("".join(f"{name}\n" for name in names))
    index = json.loads((folder / INDEX_NAME).read_text())
    facts = {"mirrored": True, "items": {"file": "items.txt", "sha256": sha256_of(folder / "items.txt")}}
    (folder / INDEX_NAME).write_text(json.dumps(index | facts))


def test_a_subset_of_images_takes_their_mirror_images_along(tmp_path: Path):
    folder = tmp_path / "latents"
    batches = [(LATENTS[:8], torch.tensor([0, 0, 1, 1, 0, 0, 1, 1]))]
    write_latents(folder, batches, source="toy train", vae="toy-vae", scale=0.5, num_classes=2, shard_size=3)
    _name_items(folder, [name + end for name in ("a/0", "b/1", "a/2", "b/3") for end in ("", " mirrored")])
    listing = LatentsConfig(folder=folder).listing()
    assert (list(listing.ids), listing.labels.tolist()) == (["a/0", "b/1", "a/2", "b/3"], [0, 1, 0, 1])
    # drawn on the images themselves, whose folder has another name
    write_subset(tmp_path / "s.json", Subset(source="imagenet/train", num_classes=2, ids=("b/3", "a/0")))
    latents = LatentsConfig(folder=folder, subset=tmp_path / "s.json").load()
    assert latents.items.tolist() == [0, 1, 6, 7]
    assert LatentsConfig(folder=folder, per_class=1).load().labels.bincount().tolist() == [2, 2]

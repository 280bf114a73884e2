"""Subsets: how they are drawn, what their hash sees, what their file refuses."""

import json
import pickle
import re
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner, Result

from grafting.cli import app
from grafting.data import DataConfig, ScenesConfig
from grafting.data.bundled import BundledSubsetConfig
from grafting.data.images import ImageFolderConfig
from grafting.data.subset import (
    Listing,
    PartialData,
    Subset,
    read_subset,
    stratified_subset,
    subset_sha256,
    write_subset,
)
from grafting.errors import DataError

LABELS = torch.tensor([2, 0, 1, 0, 1, 2, 2, 0, 1, 0])


def _subset() -> Subset:
    return Subset(source="digits train", num_classes=3, ids=(9, 1, 4))


def test_every_class_has_as_many_and_indices_are_sorted():
    indices = stratified_subset(LABELS, per_class=2, seed=0)
    assert LABELS[indices].bincount().tolist() == [2, 2, 2]
    assert indices.tolist() == sorted(set(indices.tolist()))


def test_draw_depends_on_the_seed_alone():
    labels = torch.arange(10).repeat(50)
    draws = [stratified_subset(labels, per_class=5, seed=seed).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_a_class_keeps_its_draw_when_another_class_goes():
    labels = torch.arange(10).repeat(50)
    whole = stratified_subset(labels, per_class=5, seed=0)
    kept = labels < 9
    part = kept.nonzero().flatten()[stratified_subset(labels[kept], per_class=5, seed=0)]
    assert part.tolist() == whole[labels[whole] < 9].tolist()


def test_all_of_a_class_may_be_asked_for():
    assert stratified_subset(torch.tensor([1, 0, 1, 0]), per_class=2, seed=3).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("labels", "per_class", "message"),
    [
        (
            LABELS,
            4,
            "asked for 4 items of every class, but 2 of 3 classes have fewer: class 1: 3, class 2: 3",
        ),
        (LABELS, 0, "per_class must be at least 1, found 0"),
        (LABELS[:0], 1, "found no items"),
    ],
)
def test_what_cannot_be_drawn_is_refused(labels, per_class, message):
    with pytest.raises(DataError, match=message):
        stratified_subset(labels, per_class=per_class, seed=0)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 10**9), unique=True), st.randoms())
def test_hash_does_not_depend_on_order(ids, random):
    shuffled = random.sample(ids, len(ids))
    assert subset_sha256(tuple(ids)) == subset_sha256(tuple(shuffled))


def test_hash_of_known_ids():
    # printf '1\n2\n10\n' | sha256sum
    assert subset_sha256((10, 1, 2)) == "29186ee59865abdf5f37da40cefc9e7f345e49860aefd7a8f43438cdaf88f856"
    assert subset_sha256((1, 2)) != subset_sha256((12,))


@pytest.mark.parametrize("ids", [(9, 1, 4), ("b/2.png", "a/1.png")])
def test_file_round_trip(tmp_path, ids):
    subset = Subset(source="digits train", num_classes=3, ids=ids)
    write_subset(tmp_path / "subset.json", subset)
    assert read_subset(tmp_path / "subset.json") == subset


def _changed(content: dict, **changes) -> str:
    return json.dumps(content | changes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: "{", "is not a subset file"),
        (lambda c: "[1, 2]", "is not a subset file"),
        (lambda c: json.dumps({"ids": [1]}), "is not a subset file .*source: missing"),
        (lambda c: _changed(c, ids=[1, "a"]), "is not a subset file"),
        (lambda c: _changed(c, ids=[9, 1, 5]), "was changed: it says sha256 .* its 3 ids have"),
        (lambda c: _changed(c, ids=[]), "names no items"),
        (lambda c: _changed(c, ids=[9, 1, 4, 4]), "names 1 ids more than once"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    path = tmp_path / "subset.json"
    write_subset(path, _subset())
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(DataError, match=message):
        read_subset(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.json is missing"):
        read_subset(tmp_path / "none.json")


def _listing(labels: torch.Tensor = LABELS, **facts) -> Listing:
    given = {"source": "digits train", "num_classes": 3, "ids": range(len(labels))} | facts
    return Listing(read_labels=lambda: labels, **given)


def test_draw_of_a_listing_is_the_stratified_subset():
    subset = _listing().draw(per_class=2, seed=4)
    assert list(subset.ids) == stratified_subset(LABELS, per_class=2, seed=4).tolist()
    assert (subset.source, subset.num_classes, subset.drawn) == (
        "digits train",
        3,
        "2 of every class, seed 4",
    )


def test_a_larger_draw_holds_the_smaller_one():
    labels = torch.arange(10).repeat(50)
    small, large = (set(_listing(labels, num_classes=10).draw(per_class=n).ids) for n in (5, 20))
    assert small < large


def test_fraction_is_of_each_class():
    labels = torch.tensor([0] * 10 + [1] * 25 + [2] * 40)
    subset = _listing(labels).draw(fraction=0.1)
    # halves go to the even number: 2.5 to 2
    assert labels[list(subset.ids)].bincount().tolist() == [1, 2, 4]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "one of the two"),
        ({"per_class": 1, "fraction": 0.5}, "one of the two"),
        ({"fraction": 1.5}, "above 0 and at most 1, found 1.5"),
        ({"fraction": 0.1}, "a fraction of 0.1 leaves nothing of class 0: 4, class 1: 3, class 2: 3"),
        ({"per_class": 4}, "3 of 4 classes have fewer: class 1: 3, class 2: 3, class 3: 0"),
    ],
)
def test_what_cannot_be_drawn_of_a_listing_is_refused(how, message):
    with pytest.raises(DataError, match=message):
        _listing(num_classes=4 if "per_class" in how else 3).draw(**how)


def test_only_the_first_of_many_classes_are_named():
    with pytest.raises(
        DataError, match=r"but 1000 of 1000 classes have fewer: class 0: 1, .*, and 980 more$"
    ):
        _listing(torch.arange(1000), num_classes=1000).draw(per_class=2)


def test_places_are_sorted_whatever_the_order_of_the_file():
    listing = _listing(ids=tuple("badcfehgji"))
    places = [listing.places(Subset(source="x", num_classes=3, ids=ids)) for ids in (("c", "b"), ("b", "c"))]
    assert places[0].tolist() == places[1].tolist() == [0, 3]


def test_copies_of_an_item_come_along():
    listing = _listing(copies=2)
    places = listing.places(Subset(source="digits train", num_classes=3, ids=(4, 0)))
    assert places.tolist() == [0, 1, 8, 9]
    assert listing.places_drawn(per_class=2, seed=0).tolist() == [
        place for i in stratified_subset(LABELS, per_class=2, seed=0).tolist() for place in (2 * i, 2 * i + 1)
    ]


def test_a_tenth_of_imagenet_is_drawn_in_seconds():
    counts = 732 + torch.arange(1000) * 568 // 999
    listing = _listing(torch.arange(1000).repeat_interleave(counts), num_classes=1000)
    subset = listing.draw(per_class=128)
    assert len(subset.ids) == 128_000
    assert set(listing.labels[listing.places(subset)].bincount().tolist()) == {128}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """12 images of 2 classes, of another grey each."""
    for number in range(12):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), 20 * number).save(path)
    return tmp_path / "images"


def test_a_run_reads_what_the_file_names_and_no_other(folder: Path, tmp_path: Path):
    subset = Subset(source="elsewhere", num_classes=2, ids=("b/03.png", "a/10.png"))
    write_subset(tmp_path / "s.json", subset)
    (folder / "a" / "00.png").write_bytes(b"not an image")
    images = ImageFolderConfig(folder=folder, size=4, channels=1, subset=tmp_path / "s.json").load()
    assert images.images[:, 0, 0, 0].tolist() == [200, 60]
    assert images.labels.tolist() == [0, 1]


def test_drawing_in_the_recipe_and_by_file_are_the_same(folder: Path, tmp_path: Path):
    config = ImageFolderConfig(folder=folder, size=4, channels=1)
    write_subset(tmp_path / "s.json", config.listing().draw(per_class=3))
    by_file = config.model_copy(update={"subset": tmp_path / "s.json"})
    assert by_file.describe() == config.model_copy(update={"per_class": 3}).describe()
    assert by_file.describe() != config.describe()


def test_another_subset_than_the_recipe_says_is_refused_with_both_hashes(folder: Path, tmp_path: Path):
    first, second = (Subset(source="x", num_classes=2, ids=(name,)) for name in ("a/00.png", "a/02.png"))
    write_subset(tmp_path / "s.json", first)
    facts = {"folder": folder, "size": 4, "subset": tmp_path / "s.json"}
    pinned = ImageFolderConfig(**facts).pinned()
    assert pinned == ImageFolderConfig(**facts, subset_sha256=first.sha256)
    assert len(pinned.load()) == 1
    write_subset(tmp_path / "s.json", second)
    with pytest.raises(DataError, match=f"has sha256 {second.sha256}, the recipe asks for {first.sha256}"):
        pinned.load()


def test_every_config_takes_a_subset(tmp_path: Path):
    # numbers in Fashion-MNIST's training set, of which the bundled images are a part
    drawn = BundledSubsetConfig().listing().draw(per_class=2, seed=1)
    write_subset(tmp_path / "s.json", drawn)
    images = BundledSubsetConfig(subset=tmp_path / "s.json", subset_sha256=drawn.sha256).load()
    assert images.labels.bincount().tolist() == [2] * 10
    assert drawn.source == "fashion-mnist train"
    # of scenes a part is a range of seeds
    for member in set(get_args(get_args(DataConfig)[0])) - {ScenesConfig}:
        assert issubclass(member, PartialData)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"subset": "s.json", "per_class": 1}, "both a subset file and per_class"),
        ({"subset_sha256": "0" * 64}, "names no subset file"),
        ({"per_class": 7}, "asked for 7 items of every class, but 2 of 2 classes have fewer"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(folder: Path, facts, message):
    with pytest.raises(DataError, match=message):
        ImageFolderConfig(folder=folder, size=4, **facts).load()


def _command(*args: object) -> Result:
    return CliRunner().invoke(app, ["data", "subset", *map(str, args)], catch_exceptions=False)


def test_command_draws_a_subset_that_runs_take(folder: Path, tmp_path: Path):
    path = tmp_path / "s.json"
    result = _command(folder, path, "--per-class", 2, "--json")
    facts = json.loads(result.stdout)
    assert facts["all"] == {"items": 12, "min": 6, "median": 6.0, "max": 6}
    assert facts["subset"] == {"items": 4, "min": 2, "median": 2.0, "max": 2}
    config = ImageFolderConfig(folder=folder, size=4, subset=path, subset_sha256=facts["sha256"])
    assert config.load().labels.bincount().tolist() == [2, 2]
    picture = ElementTree.parse(path.with_suffix(".svg")).getroot()
    drawn = [e for e in picture.iter() if e.get("class") in ("all", "chosen") and e.get("d")]
    bars = {e.get("class"): e.get("d").count("M") for e in drawn}
    assert bars["all"] == bars["chosen"] == 2
    assert f"subset_sha256: {facts['sha256']}" in _command(folder, path, "--per-class", 2).stdout
    assert read_subset(path).drawn == "2 of every class, seed 0"


def test_command_leaves_another_subset_alone(folder: Path, tmp_path: Path):
    path = tmp_path / "s.json"
    _command(folder, path, "--per-class", 2)
    kept = path.read_bytes()
    result = _command(folder, path, "--fraction", 0.5)
    assert result.exit_code == 1
    assert f"is another subset, with sha256 {read_subset(path).sha256}" in result.stderr
    assert path.read_bytes() == kept


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("s.json",), "one of the two"),
        (("s.txt", "--per-class", 1), "ends in .json, found"),
        (("s.json", "--per-class", 7), "but 2 of 2 classes have fewer: class 0: 6, class 1: 6"),
    ],
)
def test_command_refuses_in_one_message(folder: Path, tmp_path: Path, args, message: str):
    result = _command(folder, tmp_path / args[0], *args[1:])
    assert result.exit_code == 1
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("pickled", [True, False])
def test_command_takes_the_paths_of_a_file(folder: Path, tmp_path: Path, pickled: bool):
    """As in the paper's published split: full paths on another machine, pickled."""
    paths = [f"/data/imagenet/train/{name}" for name in ("b/03.png", "a/10.png")]
    file = tmp_path / "paths"
    file.write_bytes(pickle.dumps(paths, protocol=4) if pickled else "\n".join(paths).encode())
    result = _command(folder, tmp_path / "s.json", "--paths", file)
    assert result.exit_code == 0, result.output
    assert read_subset(tmp_path / "s.json").ids == ("b/03.png", "a/10.png")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a/00.png\nc/00.png", "1 of 2 paths do not name one item of .*\n  c/00.png: no such items"),
        (b"a/00.png\n\na/00.png", "names 1 paths twice"),
        (b"\n", "names no path"),
        (pickle.dumps([print]), "its pickle holds more than a list of texts"),
        (pickle.dumps(["a/00.png"])[:-3], "is not a list of paths"),
        (b"\xff\xfe", "is not a list of paths"),
    ],
)
def test_command_refuses_paths_that_are_none(folder: Path, tmp_path: Path, content: bytes, message: str):
    (tmp_path / "paths").write_bytes(content)
    result = _command(folder, tmp_path / "s.json", "--paths", tmp_path / "paths")
    assert result.exit_code == 1
    assert re.search(message, result.stderr)
    assert not (tmp_path / "s.json").exists()


def test_paths_need_items_with_names_and_go_alone(tmp_path: Path):
    (tmp_path / "paths").write_text("a/00.png")
    numbers = _command("testbed", tmp_path / "s.json", "--paths", tmp_path / "paths")
    assert "have numbers and no names" in numbers.stderr
    both = _command("testbed", tmp_path / "s.json", "--paths", tmp_path / "paths", "--per-class", 1)
    assert "without --per-class and --fraction" in both.stderr

"""Sets of images in shards: the same for any number of processes, whatever is killed, and never a mixture of two."""

import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from grafting.errors import DataError, FaultWarning, RunError
from grafting.hosts import hosts
from grafting.latents.decoding import Decoder
from grafting.machine import processes
from grafting.sampling import drawing as drawing_module
from grafting.sampling.chain import SamplingConfig
from grafting.sampling.drawing import Drawing, describe_model
from grafting.sampling.files import open_samples, read_samples
from grafting.sampling.shards import INDEX_NAME, Shards
from grafting.weights.folder import load
from processes import run_in_processes
from toydata import denoiser

HOST = hosts()["dit"]
SAMPLERS = ("ddpm", "ddim", "dpm-solver++")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return HOST.tiny().eval()


def new(
    folder: Path, model, *, pictures: Path | None = None, identity=None, predict=None, **settings
) -> Drawing:
    defaults = {"sampler": "ddim", "steps": 3, "num_images": 21, "batch_size": 4, "clip": True}
    return Drawing(
        folder / "shards",
        SamplingConfig(**defaults | settings),
        denoiser=denoiser(predict),
        shape=HOST.shape(model),
        decoder=Decoder(),
        identity=identity or describe_model(model, settings={}),
        pictures=pictures,
    )


def draw(drawing: Drawing, model, *, rank: int = 0, world_size: int = 1) -> list[int]:
    """Draws, and says after how many images each step came."""
    return [step.done for step in drawing.draw(model, slice(rank, None, world_size))]


def drawn_by(num_processes: int, folder: Path, model, **settings) -> Path:
    """A samples file that was drawn by so many processes, one after the other, the last first."""
    for rank in reversed(range(num_processes)):
        draw(new(folder, model, **settings), model, rank=rank, world_size=num_processes)
    path = folder / "s.npz"
    new(folder, model, **settings).write(path)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model) -> Path:
    return drawn_by(1, tmp_path_factory.mktemp("whole"), model)


def assert_same_but_for_rounding(got: Path, want: Path) -> None:
    """8-bit values differ by at most 1, in at most one of a thousand pixels."""
    mine, theirs = read_samples(got), read_samples(want)
    assert torch.equal(mine.labels, theirs.labels)
    difference = (mine.images.int() - theirs.images.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= 1e-3


@pytest.mark.parametrize(
    ("sampler", "labels"), [("ddpm", "balanced"), ("ddim", "random"), ("dpm-solver++", "balanced")]
)
def test_the_set_does_not_depend_on_the_number_of_processes_nor_on_batches(tmp_path, model, sampler, labels):
    settings = {"sampler": sampler, "labels": labels, "seed": 5}
    want = drawn_by(1, tmp_path / "1", model, **settings)
    for num_processes in (2, 8):
        got = drawn_by(num_processes, tmp_path / str(num_processes), model, **settings)
        assert got.read_bytes() == want.read_bytes()
    for batch_size in (1, 64):
        got = drawn_by(2, tmp_path / f"b{batch_size}", model, batch_size=batch_size, **settings)
        assert_same_but_for_rounding(got, want)
        # measured as the same images, and not drawn again
        assert new(tmp_path / "1", model, batch_size=batch_size, **settings).matches(got)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_testbeds_images_are_the_same_in_any_batches(tmp_path, sampler):
    testbed = load("testbed")
    settings = {"sampler": sampler, "steps": 4, "num_images": 6}
    want = drawn_by(1, tmp_path / "1", testbed, batch_size=6, **settings)
    got = drawn_by(2, tmp_path / "2", testbed, batch_size=2, **settings)
    assert_same_but_for_rounding(got, want)
    assert read_samples(want).images.float().std() > 30


def _draw_as_one(folder: Path, model) -> int:
    """What a process of several does: draws its share, and the main one writes."""
    mine = new(folder, model)
    steps = draw(mine, model, rank=processes.rank(), world_size=processes.world_size())
    if processes.is_main():
        assert all(step.total == 21 for step in mine.wait())
        assert mine.num_drawn == 21
        mine.write(folder / "s.npz")
    return len(steps)


def test_two_processes_at_once_write_what_one_does(tmp_path, model, whole):
    assert run_in_processes(_draw_as_one, tmp_path, model) == [3, 3]
    assert (tmp_path / "s.npz").read_bytes() == whole.read_bytes()
    assert os.listdir(tmp_path) == ["s.npz"]


def test_shards_are_not_counted_at_each_step(tmp_path, model, monkeypatch):
    """A folder of as many names as images, listed for each of them, took longer than some models take to draw them."""
    looks = []
    missing = Shards.missing
    monkeypatch.setattr(Shards, "missing", lambda self: looks.append(1) or missing(self))
    monkeypatch.setattr(drawing_module, "_SECONDS_BETWEEN_LOOKS", 3600.0)
    alone = new(tmp_path / "alone", model, batch_size=1, pictures=tmp_path / "pictures")
    assert draw(alone, model) == list(range(1, 22))
    assert len(looks) <= 2
    looks.clear()
    draw(new(tmp_path / "two", model, batch_size=1), model, rank=1, world_size=2)
    assert len(looks) <= 3
    assert draw(new(tmp_path / "two", model, batch_size=1), model, rank=0, world_size=2)[0] == 11


def test_a_file_says_what_drew_it(whole, model):
    file = open_samples(whole)
    assert (file.num_images, file.shape) == (21, (1, 16, 16))
    assert file.origin["sampling"]["steps"] == 3
    assert file.origin["weights_dtype"] == "float32"
    assert file.record["drawing"]["model"] == describe_model(model, settings={})["model"]
    assert file.labels.tolist() == [i % 10 for i in range(21)]


def test_what_identifies_a_model(model):
    described = describe_model(model, settings={"plan": 1})
    assert described == describe_model(model, settings={"plan": 1})
    assert described["model"] != describe_model(model, settings={"plan": 2})["model"]
    half = HOST.tiny().bfloat16()
    assert describe_model(half, settings={})["weights_dtype"] == "bfloat16"


def killed(function) -> None:
    """Runs a function that is killed in a process of its own."""

    def run():
        torch.set_num_threads(1)
        function()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def counted(die_at: int | None = None):
    """A `predict` that counts its calls, and kills its process at one of them."""
    calls = []

    def predict(model, x, t, y):
        calls.append(len(x))
        if len(calls) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return HOST.predict(model, x, t, y)

    return predict, calls


def test_a_killed_process_loses_the_batch_that_it_was_at(tmp_path, model, whole):
    predict, _ = counted(die_at=8)  # in the third of six batches of three steps
    killed(lambda: draw(new(tmp_path, model, predict=predict), model))
    predict, calls = counted()
    again = new(tmp_path, model, predict=predict)
    assert again.num_drawn == 8
    assert [step.done for step in again.drawn_before()] == [4, 8]
    assert all(step.values["ms_per_image"] > 0 for step in again.drawn_before())
    assert draw(again, model) == [12, 16, 20, 21]
    assert len(calls) == 12
    again.write(tmp_path / "s.npz")
    assert (tmp_path / "s.npz").read_bytes() == whole.read_bytes()
    assert os.listdir(tmp_path) == ["s.npz"]


@pytest.mark.parametrize("name", ["drawing.json", "shard-000002.safetensors", "s.npz", "000009.png"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_while_a_file_is_written(tmp_path, model, whole, monkeypatch, name, when):
    def work() -> None:
        mine = new(tmp_path, model, pictures=tmp_path / "png")
        if not mine.matches(tmp_path / "s.npz"):
            draw(mine, model)
            mine.write(tmp_path / "s.npz")

    def die() -> None:
        replace = os.replace

        def fatal(source, target):
            if when == "after" or Path(target).name != name:
                replace(source, target)
            if Path(target).name == name:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = fatal
        work()

    killed(die)
    work()
    assert (tmp_path / "s.npz").read_bytes() == whole.read_bytes()
    assert len(list((tmp_path / "png").glob("[!.]*"))) == 21


def test_a_damaged_shard_is_drawn_anew_with_a_warning(tmp_path, model, whole):
    draw(new(tmp_path, model), model)
    shards = sorted((tmp_path / "shards").glob("shard-*"))
    content = bytearray(shards[1].read_bytes())
    content[-100] ^= 1
    shards[1].write_bytes(content)
    shards[3].write_bytes(shards[3].read_bytes()[:50])
    with pytest.warns(
        FaultWarning, match=r"shard-00000\d.safetensors is damaged and will be drawn again"
    ) as told:
        assert len(draw(new(tmp_path, model), model)) == 2
    assert len(told) == 2
    new(tmp_path, model).write(tmp_path / "s.npz")
    assert (tmp_path / "s.npz").read_bytes() == whole.read_bytes()


def test_a_shard_under_another_number_is_drawn_anew(tmp_path, model, whole):
    draw(new(tmp_path, model), model)
    shards = sorted((tmp_path / "shards").glob("shard-*"))
    shards[4].write_bytes(shards[2].read_bytes())
    with pytest.warns(FaultWarning, match="shard-000004"):
        assert len(draw(new(tmp_path, model), model)) == 1
    new(tmp_path, model).write(tmp_path / "s.npz")
    assert (tmp_path / "s.npz").read_bytes() == whole.read_bytes()


def test_a_shard_that_is_damaged_at_the_end_is_removed_and_named(tmp_path, model, whole):
    mine = new(tmp_path, model)
    draw(mine, model)
    path = tmp_path / "shards" / "shard-000003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with (
        pytest.warns(FaultWarning),
        pytest.raises(RunError, match=r"shard-000003.safetensors is missing or dam"),
    ):
        mine.write(tmp_path / "s.npz")
    assert not (tmp_path / "s.npz").exists()
    assert draw(new(tmp_path, model), model) == [21]
    new(tmp_path, model).write(tmp_path / "s.npz")
    assert (tmp_path / "s.npz").read_bytes() == whole.read_bytes()


def test_shards_of_other_images_are_not_mixed(tmp_path, model):
    draw(new(tmp_path, model), model, world_size=2)
    shards = {path: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    for settings, difference in (
        ({"steps": 5}, "drawing.sampling.steps: 3 there, 5 asked"),
        ({"batch_size": 8}, "batch_size: 4 there, 8 asked"),
        ({"num_images": 22}, "drawing.sampling.num_images: 21 there, 22 asked"),
    ):
        with pytest.raises(RunError, match=f"holds part of a different set of images.*\n  {difference}$"):
            new(tmp_path, model, **settings)
    torch.manual_seed(9)
    with pytest.raises(RunError, match=r"\n  drawing.model.sha256: \w+ there, \w+ asked$"):
        new(tmp_path, HOST.tiny())
    assert {path: path.read_bytes() for path in (tmp_path / "shards").iterdir()} == shards
    # speed is no difference
    assert new(tmp_path, model, compile=True).num_drawn == 12


def test_files_of_other_images_are_not_written_over(tmp_path, model, whole):
    assert new(tmp_path, model).matches(whole)
    assert not new(tmp_path, model).matches(tmp_path / "none.npz")
    with pytest.raises(RunError, match=r"holds other images.*\n  sampling.seed: 0 there, 1 asked$"):
        new(tmp_path, model, seed=1).matches(whole)
    np.savez(tmp_path / "foreign.npz", arr_0=np.zeros((3, 4, 4, 1), np.uint8))
    with pytest.raises(RunError, match="what drew them is not recorded"):
        new(tmp_path, model).matches(tmp_path / "foreign.npz")
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(RunError, match="text.npz exists and will not be overwritten"):
        new(tmp_path, model).matches(tmp_path / "text.npz")


def test_folders_of_something_else_are_left_alone(tmp_path, model):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="exists and holds no shards of images"):
        new(tmp_path, model)
    (tmp_path / "shards" / "drawing.json").write_text("{")
    with pytest.raises(RunError, match="is not a record of which images are drawn.*Remove"):
        new(tmp_path, model)


def test_another_process_may_make_the_folder_at_the_same_moment(tmp_path, model, monkeypatch):
    index, is_file = tmp_path / "shards" / INDEX_NAME, Path.is_file
    want = new(tmp_path / "other", model)
    draw(want, model)
    index.parent.mkdir()

    def then_the_other_draws(path: Path) -> bool:
        found = is_file(path)
        if path == index and not found:
            shutil.copytree(tmp_path / "other" / "shards", index.parent, dirs_exist_ok=True)
        return found

    monkeypatch.setattr(Path, "is_file", then_the_other_draws)
    assert new(tmp_path, model).num_drawn == 21


def test_killed_while_shards_are_removed(tmp_path, model, monkeypatch):
    drawing = new(tmp_path, model)
    draw(drawing, model)

    rmtree = shutil.rmtree

    def ends(folder: Path, **settings) -> None:
        if folder.name != ".shards.partial" or not folder.exists():
            return rmtree(folder, **settings)
        next(folder.iterdir()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", ends)
        drawing.write(tmp_path / "s.npz")
    again = new(tmp_path, model)
    assert again.matches(tmp_path / "s.npz")
    again.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]


def test_a_second_command_ends_when_the_first_has_drawn_all(tmp_path, model):
    mine, other = new(tmp_path, model), new(tmp_path, model)
    steps = mine.draw(model)
    next(steps)
    draw(other, model)
    other.write(tmp_path / "s.npz")
    assert list(steps) == list(mine.wait()) == []
    assert mine.matches(tmp_path / "s.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]


def test_a_process_that_has_ended_is_not_waited_for_for_ever(tmp_path, model, monkeypatch):
    monkeypatch.setattr(drawing_module, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(drawing_module, "_PATIENCE_SHARDS", 0)
    mine = new(tmp_path, model)
    draw(mine, model, world_size=2)
    with pytest.raises(RunError, match="3 of 6 shards .* are missing.*another process has ended"):
        list(mine.wait())


def test_a_full_disk_is_seen_before_any_work(tmp_path, model, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000, total=10**9))
    predict, calls = counted()
    with pytest.raises(RunError, match=r"21 images of \[1, 16, 16\] need 1.08e-05 GB.*1e-05 GB are free"):
        draw(new(tmp_path, model, predict=predict), model)
    assert calls == []
    assert not (tmp_path / "shards").exists()


def test_pictures_are_the_images(tmp_path, model, whole):
    folder = tmp_path / "png"
    mine = new(tmp_path, model, pictures=folder)
    draw(mine, model)
    mine.write(tmp_path / "s.npz")
    want = read_samples(whole).images
    paths = sorted(folder.iterdir())
    assert [path.name for path in paths] == [f"{i:06}.png" for i in range(21)]
    assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in paths]), want[:, 0].numpy())


def test_pictures_can_be_asked_for_later(tmp_path, model):
    draw(new(tmp_path, model), model)
    predict, calls = counted()
    later = new(tmp_path, model, pictures=tmp_path / "png", predict=predict)
    assert later.num_drawn == 0
    assert draw(later, model) == []
    assert calls == []
    assert (later.num_drawn, len(list((tmp_path / "png").iterdir()))) == (21, 21)
    later.write(tmp_path / "s.npz")
    (tmp_path / "png" / "000007.png").unlink()
    later.write_pictures_of(tmp_path / "s.npz")
    with Image.open(tmp_path / "png" / "000007.png") as picture:
        assert np.array_equal(np.asarray(picture), read_samples(tmp_path / "s.npz").images[7, 0].numpy())


def test_pictures_of_many_channels_are_refused(tmp_path, model):
    with pytest.raises(DataError, match="these images have 4 channels: omit --png"):
        Drawing(
            tmp_path / "shards",
            SamplingConfig(),
            denoiser=denoiser(),
            shape=(4, 16, 16),
            decoder=Decoder(),
            identity={},
            pictures=tmp_path / "png",
        )

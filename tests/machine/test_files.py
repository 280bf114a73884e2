"""Files and folders are whole or absent, and what killed processes leave goes; locks hold, and lead nowhere else."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from safetensors import serialize_file

from grafting.data.latentfolder import LatentFolder
from grafting.errors import DataError, RunError
from grafting.machine.files import atomic_files, atomic_path, clear_abandoned, new_folder, write_bytes
from grafting.machine.locks import Lock, Taken
from grafting.runs.folder import RunFolder


def in_child(function) -> int:
    """The exit status of a forked process that does this."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join()
    return process.exitcode


def killed_while_writing(path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        (temporary.parent / ".tmpOfALibrary").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_what_a_killed_process_left_goes_when_the_file_is_written_again(tmp_path):
    assert in_child(lambda: killed_while_writing(tmp_path / "a")) == -signal.SIGKILL
    assert names(tmp_path) == [".a.partial", *(f".a.partial/{n}" for n in (".lock", ".tmpOfALibrary", "a"))]
    write_bytes(tmp_path / "a", b"whole")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_a_block_that_fails_leaves_what_was_there(tmp_path):
    write_bytes(tmp_path / "a", b"old")
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_files_of_a_library_that_writes_elsewhere_first_are_readable(tmp_path):
    with atomic_path(tmp_path / "a") as temporary:
        serialize_file({}, temporary)
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_an_error_that_is_one_sentence_already_stays_so(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read \(os error 2\)"), atomic_path(tmp_path / "a"):
        raise DataError("it cannot be read (os error 2)")


def write_slowly(path: Path) -> None:
    for _ in range(20):
        with atomic_path(path) as temporary:
            temporary.write_text(f"{os.getpid()} " * 1000)
            time.sleep(0.002)


def test_two_writers_of_a_file_wait_for_each_other(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_slowly, args=(tmp_path / "a",)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    words = (tmp_path / "a").read_text().split()
    assert len(words) == 1000
    assert len(set(words)) == 1
    assert names(tmp_path) == ["a"]


def test_what_is_being_written_is_not_taken_for_abandoned(tmp_path):
    assert in_child(lambda: killed_while_writing(tmp_path / "b")) == -signal.SIGKILL
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("whole")
        clear_abandoned(tmp_path)
        assert names(tmp_path) == [".a.partial", ".a.partial/.lock", ".a.partial/a"]
    assert names(tmp_path) == ["a"]


def test_where_there_are_no_locks_two_writers_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.setattr("grafting.machine.files.hold", lambda descriptor, **settings: False)
    with atomic_path(tmp_path / "a") as temporary:
        assert temporary.parent.name == f".a.{os.getpid()}.partial"
        assert in_child(lambda: write_bytes(tmp_path / "a", b"other")) == 0
        temporary.write_text("mine")
    assert (tmp_path / "a").read_text() == "mine"
    assert names(tmp_path) == ["a"]


def fill(folder: Path, content: str) -> None:
    with new_folder(folder, last="config") as made:
        made.mkdir()
        for name in ("weights", "config"):
            (made / name).write_text(content)


def test_a_new_folder_may_hold_the_same_already_and_nothing_else(tmp_path):
    fill(tmp_path / "a", "1")
    fill(tmp_path / "a", "1")
    with pytest.raises(RunError, match="a exists and holds config, weights: name a new folder"):
        fill(tmp_path / "a", "2")
    assert (tmp_path / "a" / "config").read_text() == "1"
    (tmp_path / "clone" / ".git").mkdir(parents=True)
    (tmp_path / "clone" / ".git" / "HEAD").write_text("main")
    fill(tmp_path / "clone", "2")
    assert names(tmp_path / "clone") == [".git", ".git/HEAD", "config", "weights"]
    assert names(tmp_path) == sorted(
        ["a", "a/config", "a/weights", "clone", *(f"clone/{n}" for n in names(tmp_path / "clone"))]
    )


def test_a_folder_that_is_replaced_keeps_what_others_put_there(tmp_path):
    fill(tmp_path / "a", "1")
    (tmp_path / "a" / "notes").write_text("mine")
    with pytest.raises(ZeroDivisionError), atomic_files(tmp_path / "a", last="config", stale=["weights"]):
        1 / 0  # noqa: B018
    assert names(tmp_path / "a") == ["config", "notes", "weights"]
    with atomic_files(tmp_path / "a", last="config", stale=["weights"]) as made:
        (made / "config").write_text("2")
    assert names(tmp_path / "a") == ["config", "notes"]


def test_a_folder_that_another_process_writes_is_refused(tmp_path):
    with (
        atomic_files(tmp_path / "a", last="config"),
        pytest.raises(RunError, match="another process is writing .*a.partial: wait"),
        atomic_files(tmp_path / "a", last="config"),
    ):
        pass


def latents(folder: Path) -> None:
    target = LatentFolder(
        folder=folder, facts={}, num_images=1, per_shard=1, shape=(1, 1, 1), dtype="fp32", num_classes=1
    )
    with target.working(slice(0, None, 1)):
        pass


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize(
    ("name", "work"),
    [(".lock", lambda folder: RunFolder(folder, recipe_name="r")), (".lock-0-of-1", latents)],
)
def test_a_lock_that_is_a_link_is_refused_and_its_target_whole(tmp_path, name, work, link):
    precious = tmp_path / "precious"
    precious.write_text("all that there is")
    (tmp_path / "received").mkdir()
    link(precious, tmp_path / "received" / name)
    with pytest.raises(RunError, match=f"received/{name} is a link to another file.*remove it"):
        work(tmp_path / "received")
    assert precious.read_text() == "all that there is"


def test_a_folder_in_place_of_a_lock_is_named(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(RunError, match=r"\.lock is a link to another file, a folder or no file.*remove it"):
        RunFolder(tmp_path, recipe_name="r")


def test_a_lock_is_free_when_its_holder_was_killed(tmp_path):
    lock = Lock(tmp_path / "lock")
    with pytest.raises(Taken, match=f"process {os.getpid()} on "):
        Lock(tmp_path / "lock")
    lock.release()

    def die() -> None:
        held = Lock(tmp_path / "lock")
        os.kill(os.getpid(), signal.SIGKILL if held.works else signal.SIGTERM)

    assert in_child(die) == -signal.SIGKILL
    with Lock(tmp_path / "lock", wait=True) as lock:
        assert lock.works

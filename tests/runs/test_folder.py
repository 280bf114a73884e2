"""A run's folder skips what is done, starts anew what changed, and refuses what is not its own."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch

from grafting.contract import Step
from grafting.errors import CheckpointError, FaultWarning, ResumeWarning, RunError
from grafting.machine.files import sha256_of
from grafting.machine.signals import Interrupted, catching_signals
from grafting.runs.folder import RunFolder, read_log
from grafting.runs.states import Every, write_state


def _carry_out(folder, inputs, content="result"):
    """One stage with one output; returns whether it had work to do."""
    with RunFolder(folder, recipe_name="r") as run, run.stage("s", inputs) as stage:
        if stage.done:
            return False
        stage.folder.mkdir(parents=True, exist_ok=True)
        (stage.folder / "output").write_text(content)
        stage.outputs = [stage.folder / "output"]
    return True


def test_done_stage_is_skipped_until_its_inputs_or_outputs_change(tmp_path):
    assert _carry_out(tmp_path, {"lr": 1})
    assert not _carry_out(tmp_path, {"lr": 1})
    assert _carry_out(tmp_path, {"lr": 2})
    assert not _carry_out(tmp_path, {"lr": 2})
    for damage in (lambda path: path.write_text("tampered"), lambda path: path.unlink()):
        damage(tmp_path / "s" / "output")
        with pytest.warns(FaultWarning, match="s runs again"):
            assert _carry_out(tmp_path, {"lr": 2})


def test_stage_that_fails_is_not_done(tmp_path):
    with RunFolder(tmp_path, recipe_name="r") as run, pytest.raises(ZeroDivisionError), run.stage("s", 1):
        1 / 0  # noqa: B018
    with (
        RunFolder(tmp_path, recipe_name="r") as run,
        pytest.raises(RunError, match="stage s .* has not finished"),
    ):
        run.stage_outputs("s")


def _steps(first, last):
    for done in range(first + 1, last + 1):
        yield Step(
            done=done,
            total=10,
            values={"loss": 1.0},
            state=lambda done=done: {"step": done, "w": torch.ones(2)},
        )


def test_state_and_log_continue_where_the_state_was_saved(tmp_path):
    with (
        RunFolder(tmp_path, recipe_name="r") as run,
        pytest.raises(KeyboardInterrupt),
        run.stage("s", 1) as stage,
    ):
        assert stage.load_state() is None
        for step in stage.follow(_steps(0, 10), save_every=Every(3, 600)):
            if step.done == 8:
                raise KeyboardInterrupt
    with RunFolder(tmp_path, recipe_name="r") as run, run.stage("s", 1) as stage:
        state = stage.load_state()
        assert state["step"] == 6
        list(stage.follow(_steps(6, 10), save_every=Every(3, 600)))
    logged = [json.loads(line)["step"] for line in (tmp_path / "s" / "log.jsonl").read_text().splitlines()]
    assert logged == list(range(1, 11))
    assert not (tmp_path / "s" / "states").exists()


def test_a_state_is_as_it_was_at_its_step_whatever_training_does_next(tmp_path, monkeypatch):
    """The weights change in place as soon as the next step is asked for; here that is before the thread has written."""
    go_on, w = threading.Event(), torch.zeros(2)

    def write(*args, **kwargs):
        go_on.wait(30)
        return write_state(*args, **kwargs)

    monkeypatch.setattr("grafting.runs.states.write_state", write)
    with RunFolder(tmp_path, recipe_name="r") as run, run.stage("s", 1) as stage:
        stage.done = True
        steps = (Step(done=n, total=3, state=partial(dict, a=w, b={"again": w})) for n in (1, 2, 3))
        for step in stage.follow(steps, save_every=Every(2, 600)):
            w += 1
            if step.done == 3:
                go_on.set()
    state = _resumed(tmp_path)
    assert state["a"].tolist() == [1.0, 1.0]
    assert state["a"].data_ptr() == state["b"]["again"].data_ptr()  # written once


def test_a_state_that_cannot_be_written_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "grafting.runs.states.write_state", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with (
        RunFolder(tmp_path, recipe_name="r") as run,
        pytest.raises(OSError, match="full"),
        run.stage("s", 1) as stage,
    ):
        list(stage.follow(_steps(0, 4), save_every=Every(2, 600)))
    assert _carry_out(tmp_path, 1)  # it is not done


def test_states_are_saved_by_time_too(tmp_path):
    with RunFolder(tmp_path, recipe_name="r") as run, run.stage("s", 1) as stage:
        stage.done = True
        list(stage.follow(_steps(0, 6), save_every=Every(1000, 0)))
    assert len(list((tmp_path / "s" / "states").iterdir())) == 2


def test_changed_inputs_discard_the_states(tmp_path):
    _interrupted(tmp_path)
    with RunFolder(tmp_path, recipe_name="r") as run, run.stage("s", 2) as stage:
        assert stage.load_state() is None


def _interrupted(folder, steps=10, save_every=2):
    """A run that ended between stages' steps, with the states that it left, oldest first."""
    with (
        RunFolder(folder, recipe_name="r") as run,
        pytest.raises(KeyboardInterrupt),
        run.stage("s", 1) as stage,
    ):
        stage.load_state()
        for step in stage.follow(_steps(0, steps), save_every=Every(save_every, 600)):
            if step.done == steps:
                raise KeyboardInterrupt
    return sorted((folder / "s" / "states").iterdir())


def _resumed(folder):
    """The state that a run goes on from."""
    with RunFolder(folder, recipe_name="r") as run, run.stage("s", 1) as stage:
        stage.done = True  # leave the block without recording it as done
        return stage.load_state()


def _save(stage, state, step):
    write_state(stage.folder / "states", state, step, owner=stage._owner, is_writer=True)


def test_a_state_of_another_recipe_is_refused(tmp_path):
    """Its shapes are the same, so nothing else would tell."""
    mine, other = _interrupted(tmp_path / "mine"), tmp_path / "other"
    with RunFolder(other, recipe_name="r") as run, run.stage("s", 2) as stage:
        stage.done = True
        _save(stage, {"step": 12, "w": torch.zeros(2)}, 12)
    shutil.copytree(other / "s" / "states" / "0000000012", mine[0].parent / "0000000012")
    message = (
        f"0000000012 is the state of another recipe, or of another stage. Delete {mine[0].parent} to restart"
    )
    with pytest.raises(CheckpointError, match=message):
        _resumed(tmp_path / "mine")
    shutil.rmtree(mine[0].parent / "0000000012")
    assert _resumed(tmp_path / "mine")["step"] == 10


def test_a_state_of_an_earlier_version_is_taken_with_a_warning(tmp_path):
    for state in _interrupted(tmp_path):
        (state / "owner.txt").unlink()
        sums = state / "SHA256SUMS"
        sums.write_text(
            "".join(line for line in sums.read_text().splitlines(True) if "owner.txt" not in line)
        )
    with pytest.warns(ResumeWarning, match="10 is a state of an earlier version") as told:
        assert _resumed(tmp_path)["step"] == 10
    assert len(told) == 1


def _flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_the_last_two_states_are_kept_with_their_checksums(tmp_path):
    states = _interrupted(tmp_path)
    assert [state.name for state in states] == ["0000000008", "0000000010"]
    for state in states:
        sums = [line.split("  ")[::-1] for line in (state / "SHA256SUMS").read_text().splitlines()]
        assert sums == [[name, sha256_of(state / name)] for name in ("owner.txt", "state.pt")]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "sums", "add"])
def test_of_a_damaged_state_the_older_takes_the_place(tmp_path, damage):
    newest = _interrupted(tmp_path)[-1]
    if damage == "flip":
        _flip_a_bit(newest / "state.pt")
    elif damage == "cut":
        os.truncate(newest / "state.pt", 100)
    elif damage == "remove":
        (newest / "state.pt").unlink()
    elif damage == "sums":
        _flip_a_bit(newest / "SHA256SUMS")
    else:
        (newest / "more").write_text("x")
    with pytest.warns(FaultWarning, match=r"0000000010 is damaged: .*\. Resuming from step 8"):
        state = _resumed(tmp_path)
    assert state["step"] == 8
    logged = [line["step"] for line in read_log(tmp_path / "s" / "log.jsonl")]
    assert logged == list(range(1, 9))


def test_when_all_states_are_damaged_it_is_said_how_to_start_anew(tmp_path):
    for state in _interrupted(tmp_path):
        _flip_a_bit(state / "state.pt")
    with pytest.raises(
        CheckpointError, match=r"10 is damaged.*08 is damaged.*Delete .*/s/states to restart"
    ) as error:
        _resumed(tmp_path)
    assert "state.pt does not agree with its checksum" in str(error.value)
    shutil.rmtree(tmp_path / "s" / "states")
    assert _resumed(tmp_path) is None


def test_a_state_of_a_step_that_is_undone_does_not_outlive_its_return(tmp_path):
    with RunFolder(tmp_path, recipe_name="r") as run, run.stage("s", 1) as stage:
        stage.done = True
        for step in (2, 4, 6, 4):
            _save(stage, {"step": step}, step)
        assert [int(f.name) for f in sorted((tmp_path / "s" / "states").iterdir())] == [4]
    assert _resumed(tmp_path) == {"step": 4}


class _Shards:
    """A state that writes itself: a file for each process."""

    def save(self, folder):
        (folder / "0.shard").write_bytes(b"zero")
        (folder / "1.shard").write_bytes(b"one")


def test_a_state_that_writes_itself_is_kept_and_checked_like_any_other(tmp_path):
    with RunFolder(tmp_path, recipe_name="r") as run, run.stage("s", 1) as stage:
        stage.done = True
        for step in (1, 2, 3):
            _save(stage, _Shards(), step)
    folder = _resumed(tmp_path)
    assert folder == tmp_path / "s" / "states" / "0000000003"
    assert (folder / "1.shard").read_bytes() == b"one"
    _flip_a_bit(folder / "1.shard")
    with pytest.warns(FaultWarning, match=r"1\.shard does not agree with its checksum"):
        assert _resumed(tmp_path).name == "0000000002"


class _Half:
    """One process's half of a state that two write."""

    def __init__(self, rank, meet):
        self.rank, self.meet = rank, meet

    def save(self, folder):
        self.meet()  # as a collective save does
        (folder / f"{self.rank}.shard").write_text(str(self.rank))
        self.meet()


def test_two_processes_fill_one_state_and_only_the_main_one_writes_the_rest(tmp_path):
    meet = threading.Barrier(2, timeout=30)
    seen = {}

    def work(rank):
        run = RunFolder(tmp_path, recipe_name="r", writes=rank == 0, barrier=meet.wait)
        with run, run.stage("s", 1) as stage:
            stage.load_state()
            states = (
                dataclasses.replace(step, state=lambda: _Half(rank, meet.wait)) for step in _steps(0, 4)
            )
            list(stage.follow(states, save_every=Every(4, 600)))
            seen[rank] = (
                sorted(p.name for p in (tmp_path / "s" / "states" / "0000000004").iterdir())
                if rank == 0
                else None
            )
        seen[rank, "outputs"] = run.stage_outputs("s")

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen[0] == ["0.shard", "1.shard", "SHA256SUMS", "owner.txt"]
    assert seen[0, "outputs"] == seen[1, "outputs"] == {}
    assert [line["step"] for line in read_log(tmp_path / "s" / "log.jsonl")] == [1, 2, 3, 4]


def test_pickle_with_code_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    with RunFolder(tmp_path, recipe_name="r") as run, run.stage("s", 1) as stage:
        stage.done = True
        _save(stage, {"step": 1, "model": Evil()}, 1)
    with pytest.raises(CheckpointError, match=r"state\.pt is not a whole state"):
        _resumed(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", ["", "{", '{"recipe": "r"}', "[]", None])
def test_of_a_damaged_manifest_the_older_takes_the_place(tmp_path, content):
    _carry_out(tmp_path, 1)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    if content is None:
        path.unlink()
    elif "recipe" in content:
        path.write_text(json.dumps(manifest | {"recipe": "other"}))
    else:
        path.write_text(content)
    with pytest.warns(FaultWarning, match=r"manifest\.json .*; manifest\.previous\.json is used"):
        assert _carry_out(tmp_path, 1)
    assert not _carry_out(tmp_path, 1)


def test_when_both_manifests_are_damaged_it_is_said_how_to_start_anew(tmp_path):
    _carry_out(tmp_path, 1)
    for name in ("manifest.json", "manifest.previous.json"):
        (tmp_path / name).write_text("{")
    with pytest.raises(
        RunError, match=r"manifest\.json is not JSON.*previous\.json is not JSON.*delete both"
    ):
        RunFolder(tmp_path, recipe_name="r")
    assert (tmp_path / "s" / "output").read_text() == "result"


def test_damaged_output_is_named(tmp_path):
    _carry_out(tmp_path, 1)
    _flip_a_bit(tmp_path / "s" / "output")
    with pytest.warns(
        FaultWarning, match=r"s/output: missing, or changed since it was written; s runs again"
    ):
        assert _carry_out(tmp_path, 1)


def test_damaged_line_of_a_log_is_named_and_left_out(tmp_path):
    _interrupted(tmp_path)
    path = tmp_path / "s" / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_bytes("".join([lines[0], "{\n", lines[2][:5] + "\n", *lines[3:]]).encode() + b"\xff\xfe")
    with pytest.warns(FaultWarning, match=r"log\.jsonl, line [23] is damaged"):
        assert [line["step"] for line in read_log(path)] == [1, 4, 5, 6, 7, 8, 9, 10]


def test_a_log_that_was_emptied_is_named(tmp_path):
    _interrupted(tmp_path)
    path = tmp_path / "s" / "log.jsonl"
    path.write_text("")
    with pytest.warns(
        FaultWarning, match=r"log\.jsonl lost its steps up to 10: curves of s begin after them"
    ):
        _resumed(tmp_path)


def test_a_log_that_is_a_link_is_not_written_through(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("all that there is")
    with RunFolder(tmp_path / "run", recipe_name="r") as run, run.stage("s", 1) as stage:
        steps = stage.follow(_steps(0, 2), save_every=None)
        next(steps)
        (stage.folder / "log.jsonl").unlink()
        (stage.folder / "log.jsonl").symlink_to(precious)
        with pytest.raises(RunError, match="cannot write .*log.jsonl: Too many levels of symbolic links"):
            next(steps)
    assert precious.read_text() == "all that there is"


def test_log_of_a_stage_without_states_starts_anew(tmp_path):
    for _ in range(2):
        with RunFolder(tmp_path, recipe_name="r") as run, run.stage("s", 1) as stage:
            stage.done = True
            list(stage.follow(_steps(0, 3), save_every=None))
    assert [line["step"] for line in read_log(tmp_path / "s" / "log.jsonl")] == [1, 2, 3]


def test_two_runs_in_one_folder_are_refused_until_the_first_is_killed(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from grafting.runs.folder import RunFolder\n"
        f"run = RunFolder(Path({str(tmp_path)!r}), recipe_name='r'); print('open', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "open\n"
        message = (
            rf"another run is using .* \(process {process.pid} on .+\): wait for it to finish, or .* --out"
        )
        with pytest.raises(RunError, match=message):
            RunFolder(tmp_path, recipe_name="r")
        process.kill()
    RunFolder(tmp_path, recipe_name="r").close()


def test_two_runs_in_one_process_are_refused_too(tmp_path):
    with RunFolder(tmp_path, recipe_name="r"), pytest.raises(RunError, match="another run is using"):
        RunFolder(tmp_path, recipe_name="r")
    RunFolder(tmp_path, recipe_name="r").close()


def test_a_folder_is_a_run_from_its_first_file_on(tmp_path):
    """Else a run that was killed when it had written its recipe could not be gone on with."""
    RunFolder(tmp_path / "r", recipe_name="r").close()
    assert [path.name for path in (tmp_path / "r").glob("[!.]*")] == ["manifest.json"]
    (tmp_path / "r" / "recipe.yaml").write_text("name: r")
    assert _carry_out(tmp_path / "r", 1)


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    _carry_out(tmp_path, 1)
    (tmp_path / "s" / ".output.1234.partial").write_text("half")
    (tmp_path / "s" / "states" / ".0000000002.partial").mkdir(parents=True)
    assert not _carry_out(tmp_path, 1)
    assert not [*tmp_path.rglob("*.partial")]


def test_states_that_a_finished_stage_was_killed_with_are_removed(tmp_path):
    _carry_out(tmp_path, 1)
    (tmp_path / "s" / "states" / "0000000002").mkdir(parents=True)
    assert not _carry_out(tmp_path, 1)
    assert not (tmp_path / "s" / "states").exists()


def test_machines_are_on_record_and_change_nothing(tmp_path, monkeypatch):
    for host, threads in (("a", 1), ("b", 8), ("b", 8)):
        monkeypatch.setattr("platform.node", lambda host=host: host)
        monkeypatch.setattr("time.time", lambda: -1.0)
        with RunFolder(tmp_path, recipe_name="r") as run:
            run.describe_machine({"device": "cpu", "threads": threads})
        _carry_out(tmp_path, 1)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["machine"] == {"host": "b", "device": "cpu", "threads": 8}
    assert [m["host"] for m in manifest["machines"]] == ["a", "b"]
    assert not _carry_out(tmp_path, 1)


@pytest.mark.parametrize(("device", "told"), [("cpu", True), ("cuda:0", False)])
def test_other_threads_are_told_where_work_is_left(tmp_path, recwarn, device, told):
    for threads, stages in ((2, "a"), (1, "a"), (2, "a"), (3, "abc")):
        recwarn.clear()
        with RunFolder(tmp_path, recipe_name="r") as run:
            run.describe_machine({"device": device, "threads": threads})
            for name in stages:
                with run.stage(name, []):
                    pass
        expected = told and threads == 3
        assert [w.category for w in recwarn.list] == [ResumeWarning] * expected
    if told:
        assert "resumes with 3 CPU threads, not 2: results will differ in the last bits" in str(
            recwarn.list[0].message
        )


def test_folder_of_another_recipe(tmp_path):
    _carry_out(tmp_path, 1)
    with pytest.raises(RunError, match="belongs to recipe 'r', not 'other'"):
        RunFolder(tmp_path, recipe_name="other")


def test_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="is not a run folder"):
        RunFolder(tmp_path, recipe_name="r")
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_no_process_leaves_before_the_last_state_is_saved(tmp_path):
    """torchrun ends the others when the first one leaves."""
    found: list[list[str]] = []

    def barrier() -> None:
        found.append([state.name for state in sorted(tmp_path.glob("s/states/*"))])

    with (
        RunFolder(tmp_path, recipe_name="r", barrier=barrier) as run,
        pytest.raises(Interrupted),
        catching_signals(),
        run.stage("s", 1) as stage,
    ):
        for step in stage.follow(_steps(0, 9), save_every=Every(2, 600)):
            if step.done == 4:
                os.kill(os.getpid(), signal.SIGTERM)
    assert found[-1] == ["0000000004", "0000000005"]


def test_a_signal_after_the_last_step_waits_until_the_stage_is_done(tmp_path):
    """The last state is of step 2: what came after it would be lost."""
    with (
        RunFolder(tmp_path, recipe_name="r") as run,
        pytest.raises(Interrupted),
        catching_signals(),
        run.stage("s", 1) as stage,
    ):
        assert [step.done for step in stage.follow(_steps(0, 3), save_every=Every(2, 600))] == [1, 2, 3]
        os.kill(os.getpid(), signal.SIGTERM)
        (stage.folder / "output").write_text("result")
        stage.outputs = [stage.folder / "output"]
    assert not _carry_out(tmp_path, 1)

"""A run's folder skips what is done, starts anew what changed, and refuses what is not its own."""

import json

import pytest
import torch

from grafting.contract import Step
from grafting.errors import CheckpointError, RunError
from grafting.runfolder import RunFolder


def _carry_out(folder, inputs, content="result"):
    """One stage with one output; returns whether it had work to do."""
    run = RunFolder(folder, recipe_name="r")
    with run.stage("s", inputs) as stage:
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
    (tmp_path / "s" / "output").write_text("tampered")
    assert _carry_out(tmp_path, {"lr": 2})
    (tmp_path / "s" / "output").unlink()
    assert _carry_out(tmp_path, {"lr": 2})


def test_stage_that_fails_is_not_done(tmp_path):
    run = RunFolder(tmp_path, recipe_name="r")
    with pytest.raises(ZeroDivisionError), run.stage("s", 1):
        1 / 0  # noqa: B018
    with pytest.raises(RunError, match="stage s .* is not done"):
        RunFolder(tmp_path, recipe_name="r").stage_outputs("s")


def _steps(first, last):
    for done in range(first + 1, last + 1):
        yield Step(
            done=done,
            total=10,
            values={"loss": 1.0},
            state=lambda done=done: {"step": done, "w": torch.ones(2)},
        )


def test_state_and_log_continue_where_the_state_was_saved(tmp_path):
    run = RunFolder(tmp_path, recipe_name="r")
    with pytest.raises(KeyboardInterrupt), run.stage("s", 1) as stage:
        assert stage.load_state() is None
        for step in stage.follow(_steps(0, 10), save_every=3):
            if step.done == 8:
                raise KeyboardInterrupt
    run = RunFolder(tmp_path, recipe_name="r")
    with run.stage("s", 1) as stage:
        state = stage.load_state()
        assert state["step"] == 6
        list(stage.follow(_steps(6, 10), save_every=3))
    logged = [json.loads(line)["step"] for line in (tmp_path / "s" / "log.jsonl").read_text().splitlines()]
    assert logged == list(range(1, 11))
    assert not (tmp_path / "s" / "state.pt").exists()


def test_changed_inputs_discard_the_state(tmp_path):
    with RunFolder(tmp_path, recipe_name="r").stage("s", 1) as stage:
        list(stage.follow(_steps(0, 3), save_every=1))
        assert (tmp_path / "s" / "state.pt").exists()
        stage.done = True  # leave the block without recording it as done
    with RunFolder(tmp_path, recipe_name="r").stage("s", 2) as stage:
        assert stage.load_state() is None


def test_damaged_state_is_named(tmp_path):
    with RunFolder(tmp_path, recipe_name="r").stage("s", 1) as stage:
        stage.folder.mkdir()
        (stage.folder / "state.pt").write_bytes(b"PK\x03\x04 half a file")
        with pytest.raises(CheckpointError, match=r"state\.pt is damaged"):
            stage.load_state()


def test_pickle_with_code_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    with RunFolder(tmp_path, recipe_name="r").stage("s", 1) as stage:
        stage.folder.mkdir()
        torch.save({"step": 1, "model": Evil()}, stage.folder / "state.pt")
        with pytest.raises(CheckpointError, match=r"state\.pt is damaged"):
            stage.load_state()
    assert not (tmp_path / "executed").exists()


def test_folder_of_another_recipe(tmp_path):
    _carry_out(tmp_path, 1)
    with pytest.raises(RunError, match="belongs to recipe 'r', asked was 'other'"):
        RunFolder(tmp_path, recipe_name="other")


def test_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="is not the folder of a run"):
        RunFolder(tmp_path, recipe_name="r")
    assert (tmp_path / "thesis.tex").read_text() == "precious"

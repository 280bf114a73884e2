"""Whatever happens to a run at whatever moment, it goes on and ends as an undisturbed one: signals, kills, full disks, damage.

Every stage of a tiny recipe; `benchmarks/soak.py` does the same at random moments, a hundred times.
"""

import contextlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import tinyrecipe
from grafting import cli
from grafting.errors import CheckpointError, FaultWarning, RunError
from grafting.machine import signals as interruption
from grafting.machine.signals import Interrupted, catching_signals, deferred
from grafting.runs.folder import read_log
from grafting.runs.operator_cache import OperatorStore
from grafting.runs.recipe import Recipe
from grafting.runs.run import run
from grafting.weights.tensors import load_tensors

TINY = tinyrecipe.TINY | {
    "plan": [
        {"role": "attention", "blocks": [0], "operator": {"name": "hyena-x", "kernel_size": 3}},
        {"role": "mlp", "blocks": [1], "operator": {"name": "mlp", "ratio": 2}},
    ],
    "calibrate": {"samples": 32, "batch_size": 16},
    "distill": {"steps": 7, "batch_size": 4, "holdout": 8, "holdout_every": 3},
    "finetune": {"steps": 7, "batch_size": 4, "warmup_steps": 2, "ema_decay": 0.9},
    "rows": ["distilled", "finetuned"],
    "save_every": 3,
}
RECIPE = Recipe.model_validate(TINY)
MOMENTS = (
    ("calibrate", 2), ("distill", 0), ("distill", 3), ("distill", 6), ("finetune", 1), ("finetune", 7),
    ("sample distilled", 10), ("evaluate finetuned", 20),
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(RECIPE, tmp_path_factory.mktemp("runs") / "tiny")


def assert_alike(folder: Path, want: Path, *, until: str = "report") -> None:
    """All tensors and figures are the same, every step was logged once, and nothing else is left."""
    pattern = {
        "distill": "distill/*.safetensors",
        "finetune": "model/*.safetensors",
        "report": "**/*.safetensors",
    }[until]
    files = sorted(path.relative_to(want) for path in want.glob(pattern))
    assert files
    for name in files:
        a, b = load_tensors(want / name), load_tensors(folder / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    assert [line["step"] for line in read_log(folder / "distill" / "log.jsonl")] == list(range(8))
    if until != "distill":
        assert [line["step"] for line in read_log(folder / "finetune" / "log.jsonl")] == list(range(1, 8))
    if until == "report":
        assert sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors")) == files
        assert figures(folder) == figures(want)
    assert not [p for p in folder.rglob("*") if "partial" in p.name or p.name == "states"]


def figures(folder: Path) -> list[dict]:
    rows = json.loads((folder / "metrics.json").read_text())
    return [{key: value for key, value in row.items() if key != "ms_per_image"} for row in rows]


# signals


def _interrupt_at(stage: str, done: int, signum: int, seen: list | None = None):
    """What a run tells its steps to: sends itself a signal at one of them."""

    def on_step(name, step):
        if seen is not None:
            seen.append((name, step.done))
        if (name, step.done) == (stage, done):
            os.kill(os.getpid(), signum)

    return on_step


def test_signals_in_every_stage_and_a_clock_that_goes_backwards(undisturbed, tmp_path, monkeypatch):
    now = iter(range(10**9, 0, -1000))
    monkeypatch.setattr("time.time", lambda: float(next(now)))
    folder, last = tmp_path / "tiny", None
    for number, (stage, done) in enumerate(MOMENTS):
        signum, code = ((signal.SIGTERM, 143), (signal.SIGINT, 130))[number % 2]
        seen: list = []
        with pytest.raises(Interrupted) as ended, catching_signals():
            run(RECIPE, folder, on_step=_interrupt_at(stage, done, signum, seen))
        assert ended.value.exit_code == code
        # the signal waited for one step more, which was saved, or for the stage's end: nothing is done twice
        if last is not None and last[0] == seen[0][0] and last[0] in ("distill", "finetune"):
            assert seen[0][1] == last[1] + 2
        last = seen[-1]
        for path in folder.rglob("*"):
            os.utime(path, (10**9, 2 * 10**9))  # files from another time
    run(RECIPE, folder)
    assert_alike(folder, undisturbed)


def test_signals_wait_only_where_they_are_asked_to_and_a_second_wish_does_not(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    with catching_signals():
        with pytest.raises(Interrupted, match="interrupted by SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        with deferred() as caught:
            assert caught() is None
            os.kill(os.getpid(), signal.SIGINT)
            assert caught() == signal.SIGINT
            os.kill(os.getpid(), signal.SIGTERM)  # passed on by a launcher that got the same
            assert caught() == signal.SIGINT
            monkeypatch.setattr(interruption, "_ONE_WISH_S", 0.0)
            with pytest.raises(Interrupted) as second:
                os.kill(os.getpid(), signal.SIGTERM)
    assert second.value.exit_code == 143
    with deferred() as caught:
        assert caught() is None
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_foreign_code_takes_for_an_error_is_a_signal():
    """pydantic does so while it builds a model."""
    with pytest.raises(Interrupted, match="interrupted by SIGTERM"), catching_signals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as error:
            raise TypeError("cannot be built") from error
    with pytest.raises(TypeError), catching_signals():
        raise TypeError("an error of its own")


def _command(folder: Path, recipe: Path) -> None:
    sys.stdout, sys.stderr = (open(folder / f"{number}.txt", "w") for number in (1, 2))  # noqa: SIM115
    cli.app(["run", str(recipe), "--out", str(folder / "tiny")])


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_line_says_in_one_line_how_to_go_on(tmp_path, signum, code):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(TINY | {"finetune": {**TINY["finetune"], "steps": 10_000}}))
    process = multiprocessing.get_context("fork").Process(target=_command, args=(tmp_path, recipe))
    process.start()
    log = tmp_path / "tiny" / "finetune" / "log.jsonl"
    deadline = time.monotonic() + 60
    while not (log.is_file() and len(read_log(log)) >= 4) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signum)
    process.join()
    assert process.exitcode == code
    name = signal.Signals(signum).name
    message = f"\nInterrupted by {name}: run the same command again to resume.\n"
    assert (tmp_path / "2.txt").read_text() == message
    newest = max((tmp_path / "tiny" / "finetune" / "states").iterdir())
    assert int(newest.name) == read_log(log)[-1]["step"]


def _killed(folder: Path, stage: str, done: int) -> None:
    run(RECIPE, folder, on_step=_interrupt_at(stage, done, signal.SIGKILL))


@pytest.mark.slow
def test_kills_in_every_stage(undisturbed, tmp_path):
    folder = tmp_path / "tiny"
    for stage, done in MOMENTS:
        process = multiprocessing.get_context("fork").Process(target=_killed, args=(folder, stage, done))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    seen: list = []
    run(RECIPE, folder, on_step=lambda name, step: seen.append(name))
    assert set(seen) == {"evaluate distilled", "evaluate finetuned"}
    assert_alike(folder, undisturbed)


# full disks


@contextlib.contextmanager
def _small_disk(folder: Path, kilobytes: int):
    """A file system of so many kB; yields a function that changes its size."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield lambda kb: subprocess.run(["mount", "-o", f"remount,size={kb}k", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _assert_whole(folder: Path) -> None:
    """Every file in a folder can be read, and there are no others."""
    for path in folder.rglob("*"):
        assert "partial" not in path.name
        if path.suffix == ".json":
            json.loads(path.read_text())
        if path.suffix == ".safetensors":
            load_tensors(path)


@pytest.mark.slow
def test_a_full_disk_is_one_message_and_nothing_is_half_written(undisturbed, tmp_path):
    with _small_disk(tmp_path / "disk", 4) as resize:
        folder, stages = tmp_path / "disk" / "tiny", set()
        for kilobytes in (4, 64, 160, 320, 640):
            resize(kilobytes)
            message = r"cannot write .*/tiny(.*): No space left on device; what was there is unchanged"
            with pytest.raises(RunError, match=message) as error:
                run(RECIPE, folder)
            stages.add(re.search(message, str(error.value))[1].split("/")[1])
            _assert_whole(folder)
        assert len(stages) >= 3
        resize(20_000)
        run(RECIPE, folder)
        assert_alike(folder, undisturbed)


def test_a_limit_on_the_size_of_files_is_one_message(undisturbed, tmp_path):
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        with pytest.raises(
            RunError, match=r"cannot write .*/tiny/distill/.*: File too large; what was there is unchanged"
        ):
            run(RECIPE, tmp_path / "tiny")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    _assert_whole(tmp_path / "tiny")
    run(RECIPE, tmp_path / "tiny", until="distill")
    assert_alike(tmp_path / "tiny", undisturbed, until="distill")


# damage


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_a_damaged_state_costs_the_steps_since_the_one_before(undisturbed, tmp_path):
    folder = tmp_path / "tiny"
    states = folder / "finetune" / "states"
    with pytest.raises(Interrupted), catching_signals():
        run(RECIPE, folder, on_step=_interrupt_at("finetune", 4, signal.SIGTERM))
    _flip_a_bit(states / "0000000005" / "state.pt")
    seen: list = []
    with (
        pytest.warns(FaultWarning, match=r"0000000005 is damaged: state.pt .* Resuming from step 3"),
        pytest.raises(Interrupted),
        catching_signals(),
    ):
        run(RECIPE, folder, on_step=_interrupt_at("finetune", 4, signal.SIGTERM, seen))
    assert seen == [("finetune", 4)]
    for state in states.iterdir():
        _flip_a_bit(state / "state.pt")
    message = rf"5 is damaged.*3 is damaged.*Delete {states} to restart the stage"
    with pytest.raises(CheckpointError, match=message):
        run(RECIPE, folder)
    shutil.rmtree(states)
    run(RECIPE, folder, until="finetune")
    assert_alike(folder, undisturbed, until="finetune")


@pytest.mark.parametrize("name", ["distill/operators.safetensors", "metrics.json"])
def test_a_damaged_result_is_named_and_made_again(undisturbed, tmp_path, name):
    shutil.copytree(undisturbed, tmp_path / "tiny")
    _flip_a_bit(tmp_path / "tiny" / name)
    with pytest.warns(
        FaultWarning, match=rf"{name}: missing, or changed since it was written; .* runs again"
    ):
        run(RECIPE, tmp_path / "tiny")
    assert_alike(tmp_path / "tiny", undisturbed)


def test_a_damaged_operator_of_a_store_is_named_and_fitted_anew(tmp_path):
    store = OperatorStore(tmp_path / "store")
    run(RECIPE, tmp_path / "first", until="distill", store=store)
    path = sorted(store.folder.iterdir())[0]
    kept = {name: tensor.clone() for name, tensor in load_tensors(path).items()}
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.warns(FaultWarning, match=rf"{path.name} is damaged: .* its checksum; fitting it again"):
        run(RECIPE, tmp_path / "second", until="distill", store=store)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in load_tensors(path).items())
    wants, gots = (
        load_tensors(tmp_path / n / "distill" / "operators.safetensors") for n in ("first", "second")
    )
    assert all(torch.equal(wants[key], gots[key]) for key in wants)


def test_the_command_line_tells_of_damage_in_one_line(undisturbed, tmp_path, capsys):
    shutil.copytree(undisturbed, tmp_path / "tiny")
    (tmp_path / "tiny" / "manifest.json").write_text("{")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(TINY))
    with pytest.raises(SystemExit) as ended:
        cli.app(["run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "tiny"), "--until", "distill"])
    assert ended.value.code == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"Warning: {tmp_path / 'tiny' / 'manifest.json'} is not JSON")
    assert "manifest.previous.json is used" in line

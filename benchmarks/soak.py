"""Kill a run at random moments, again and again, go on each time, and compare what it ends with.

    python benchmarks/soak.py --kills 100 [--seed 0] [--keep FOLDER]

A tiny but complete recipe (a random DiT of the real class; calibrate, distill, finetune, sample, evaluate, report) is run
once undisturbed. Then it is run in child processes that get SIGKILL or SIGTERM, in turn by chance, after a random time,
and the same run is started again until it ends; then another begins, until as many signals have ended a process. Each time
it is checked that a process ended by the signal alone (SIGTERM with status 143), that no more steps are done twice than
lie between saved states (after SIGTERM: none), and at the end that weights, samples, figures and logged losses are those of
the undisturbed run, bit for bit. Children are forked from a process that has imported everything, so that a kill costs no
start. Ends with one line of JSON; exit status 1 unless all runs ended, and alike.

    kills      processes that a signal ended
    lost       runs that could not go on, or that ended otherwise than the undisturbed one
    identical  runs that ended as the undisturbed one did
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from grafting.contract import Step
from grafting.errors import GraftingError
from grafting.files import hash_json, sha256_of
from grafting.interruption import Interrupted, catching_signals
from grafting.recipe import Recipe, run
from grafting.runfolder import read_log

SAVE_EVERY = 5
RECIPE = {
    "name": "soak",
    "source": {
        "host": "dit",
        "config": {
            "input_size": 32, "patch_size": 4, "in_channels": 1, "hidden_size": 48,
            "depth": 4, "num_heads": 2, "num_classes": 10,
        },
    },
    "plan": [
        {"role": "attention", "blocks": "odd", "operator": {"name": "hyena-x", "kernel_size": 3}},
        {"role": "mlp", "blocks": "even", "operator": {"name": "mlp", "ratio": 2}},
    ],
    "data": {"name": "testbed-subset"},
    "calibrate": {"samples": 128, "batch_size": 32},
    "distill": {"steps": 32, "batch_size": 16, "holdout": 32, "holdout_every": 10},
    "finetune": {"steps": 32, "batch_size": 16, "warmup_steps": 4, "ema_decay": 0.9},
    "sample": {"sampler": "ddim", "steps": 4, "num_images": 48, "batch_size": 12, "cfg_scale": 1.5},
    "rows": ["distilled", "finetuned"],
    "save_every": SAVE_EVERY,
}  # fmt: skip
TRAINING = ("distill", "finetune")


@dataclass
class Tally:
    """What happened to all runs."""

    kills: Counter[str] = field(default_factory=Counter)  # by signal
    stages: Counter[str] = field(default_factory=Counter)  # where they landed
    starts: int = 0
    runs: int = 0
    identical: int = 0
    faults: list[str] = field(default_factory=list)
    most_steps_repeated: Counter[str] = field(default_factory=Counter)  # by signal


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="signals that end a process (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the signals and their moments (default 0)")
    parser.add_argument("--keep", type=Path, help="leave the runs' folders here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.keep or Path(tempfile.mkdtemp(prefix="soak-"))
    started = time.monotonic()
    seconds = undisturbed(folder / "undisturbed")
    print(f"An undisturbed run takes {seconds:.1f} s.", flush=True)
    tally = Tally()
    chance = random.Random(args.seed)
    while sum(tally.kills.values()) < args.kills and len(tally.faults) < 10:
        disturbed(folder, tally, chance, kills=args.kills, seconds=seconds)
    if args.keep is None:
        shutil.rmtree(folder)
    kills = sum(tally.kills.values())
    result = {
        "kills": kills,
        "lost": tally.runs - tally.identical,
        "identical": tally.identical,
        "runs": tally.runs,
        "starts": tally.starts,
        "signals": dict(tally.kills),
        "stages": dict(tally.stages),
        "save_every": SAVE_EVERY,
        "most_steps_repeated": dict(tally.most_steps_repeated),
        "faults": tally.faults,
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    print(json.dumps(result))
    return int(kills < args.kills or bool(tally.faults) or tally.identical < tally.runs)


def undisturbed(folder: Path) -> float:
    """Carries the recipe out in a child, as the disturbed runs are; returns its seconds."""
    started = time.monotonic()
    process = start(folder)
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"the undisturbed run ended with status {process.exitcode}")
    return time.monotonic() - started


def disturbed(folder: Path, tally: Tally, chance: random.Random, *, kills: int, seconds: float) -> None:
    """One run from start to end, disturbed as often as signals are left to send."""
    tally.runs += 1
    path = folder / f"run-{tally.runs}"
    faults = len(tally.faults)
    ended, last_signal = False, None
    while not ended:
        before = progress(path)
        process = start(path)
        tally.starts += 1
        if sum(tally.kills.values()) < kills:
            wait(process, path, len(before), chance, seconds=seconds)
            sent = chance.choice((signal.SIGKILL, signal.SIGTERM))
            if process.is_alive():
                os.kill(process.pid or 0, sent)
        else:
            sent = None
        process.join()
        steps = progress(path)[len(before) :]
        _check_repeated(before, steps, last_signal, tally)
        signal_now, ended = _ending(process.exitcode, sent), process.exitcode == 0
        if steps or last_signal is None:
            last_signal = signal_now  # what a start without a step repeats later, an earlier end has cost
        if signal_now:
            tally.kills[signal_now.name] += 1
            tally.stages[steps[-1][0].split()[0] if steps else "start"] += 1
        elif not ended:
            tally.faults.append(f"{path.name} ended with status {process.exitcode}")
            return
    differing = _differences(folder / "undisturbed", path)
    tally.faults += [f"{path.name}: {name} differs" for name in differing]
    tally.identical += len(tally.faults) == faults
    print(f"{path.name}: {tally.starts} starts, {sum(tally.kills.values())} kills so far", flush=True)
    if not differing:
        shutil.rmtree(path)


def wait(
    process: multiprocessing.process.BaseProcess,
    path: Path,
    known: int,
    chance: random.Random,
    *,
    seconds: float,
) -> None:
    """Returns at a random moment, or when the process ended.

    Half of the moments are even in time, so that they fall into loading, writing and stages of few steps as well; half are
    even in steps, so that a run goes on however slow the machine is.
    """
    if chance.random() < 0.5:
        process.join(chance.uniform(0, 0.5 * seconds))
        return
    steps = known + chance.randrange(20)
    while process.is_alive() and len(progress(path)) < steps:
        time.sleep(0.002)
    process.join(chance.uniform(0, 0.01 * seconds))


def start(folder: Path) -> multiprocessing.process.BaseProcess:
    """Starts a child that carries the recipe out in `folder`, noting its steps in a file beside it."""
    process = multiprocessing.get_context("fork").Process(target=attempt, args=(folder,))
    process.start()
    return process


def attempt(folder: Path) -> None:
    """One child's work; ends with the status of the command line."""
    with _progress_path(folder).open("ab", buffering=0) as noted:

        def note(stage: str, step: Step) -> None:
            noted.write(f"{json.dumps([stage, step.done])}\n".encode())

        try:
            with catching_signals():
                run(Recipe.model_validate(RECIPE), folder, on_step=note)
        except Interrupted as error:
            os._exit(error.exit_code)
        except GraftingError as error:
            print(f"Error: {error}", file=sys.stderr)
            os._exit(1)
        except BaseException:
            traceback.print_exc()
            os._exit(70)


def _progress_path(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder.with_suffix(".progress")


def progress(folder: Path) -> list[tuple[str, int]]:
    """Every stage's steps in the order in which they were done, over all starts of a run."""
    path = _progress_path(folder)
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def _ending(exitcode: int | None, sent: signal.Signals | None) -> signal.Signals | None:
    """The signal that ended a process; None if it ended by itself."""
    return sent if sent and exitcode in (-sent, 128 + sent) else None


def _check_repeated(
    before: list[tuple[str, int]], after: list[tuple[str, int]], sent: signal.Signals | None, tally: Tally
) -> None:
    """Adds a fault where a start repeats more steps of training than its last end, by a signal, may cost."""
    stage, last = before[-1] if before else ("", 0)
    again = [done for name, done in after if name == stage]
    if sent is None or stage not in TRAINING or not again:
        return
    # a process is killed before or after it tells of a step, so one step is in doubt; step 0 of stage 1 is a measurement
    repeated = max(0, last - again[0] + 1)
    tally.most_steps_repeated[sent.name] = max(tally.most_steps_repeated[sent.name], repeated)
    allowed = SAVE_EVERY if sent == signal.SIGKILL or again[0] == 0 else 0
    if repeated > allowed:
        tally.faults.append(f"{repeated} steps of {stage} were repeated after {sent.name}")


def _differences(want: Path, got: Path) -> list[str]:
    """The results that two runs have not in common."""
    a, b = (results(folder) for folder in (want, got))
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def results(folder: Path) -> dict[str, str]:
    """A hash of all that a run made: files of tensors, figures without times, losses."""
    found = {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*.safetensors"))}
    metrics = json.loads((folder / "metrics.json").read_text())
    found["metrics.json"] = hash_json(
        [{k: v for k, v in row.items() if k != "ms_per_image"} for row in metrics]
    )
    for stage in TRAINING:
        log = read_log(folder / stage / "log.jsonl")
        losses = [
            {k: v for k, v in line.items() if k == "step" or k.partition("/")[0] in ("loss", "r2")}
            for line in log
        ]
        found[f"{stage}/log.jsonl"] = hash_json(losses)
    return found


if __name__ == "__main__":
    raise SystemExit(main())

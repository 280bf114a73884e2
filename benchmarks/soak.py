"""Kill commands at random moments, again and again, go on each time, and compare what they end with.

    python benchmarks/soak.py --kills 100 [--seed 0] [--only JOB] [--keep FOLDER]
    python benchmarks/soak.py --every-write                 (not at random moments: see everywrite.py)

The jobs are a tiny but complete recipe (a random DiT of the real class; calibrate, distill, finetune, sample, evaluate,
report) by one process, by two, and by two that share sites and shards, images encoded into latents by two, and images drawn
by two. Each is carried out once undisturbed. Then each in turn is carried out in child processes, one of which gets SIGKILL
or SIGTERM, by chance, after a random time, and is started again until it ends; this is repeated until as many signals have
ended a process. Of several processes the others are ended as torchrun does it: when one fails they get SIGTERM. Each time
it is checked that a process ended by the signal alone (SIGTERM with status 143), that no more steps of training are done
twice than lie between saved states (after SIGTERM: none), and at the end that weights, samples, latents, figures and logged
losses are those of the undisturbed job, bit for bit. Children are forked from a process that has imported everything, so
that a kill costs no start. Ends with one line of JSON; exit status 1 unless all runs ended, and alike.

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
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import everywrite
import torch
from diffusers import AutoencoderKL
from PIL import Image

from grafting.cli import app
from grafting.contract import Step
from grafting.data.bundled import bundled_subset
from grafting.errors import GraftingError
from grafting.machine.files import hash_json, sha256_of
from grafting.machine.processes import is_main
from grafting.machine.signals import Interrupted, catching_signals
from grafting.runs.file import merge
from grafting.runs.folder import read_log
from grafting.runs.recipe import Recipe
from grafting.runs.run import run

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
SHARDED = {"distill": {"spread": "sites"}, "finetune": {"shard": True}}
TRAINING = ("distill", "finetune")
NUM_IMAGES = 96
SECONDS_TO_LEAVE = 30  # torchrun's, from SIGTERM to SIGKILL

Progress = list[tuple[str, int]]


@dataclass(frozen=True)
class Job:
    """What is carried out in a folder, by one or more processes, and gone on with after a signal."""

    name: str
    processes: int
    work: Callable[[Path], None]
    """A process's part; raises SystemExit with the status of the command line."""
    progress: Callable[[Path], Progress]
    """Each stage's steps so far, in the order in which they were done, over all starts."""
    results: Callable[[Path], dict[str, str]]
    """A hash of everything made that does not tell time."""


@dataclass
class Tally:
    """What happened to all runs."""

    kills: Counter[str] = field(default_factory=Counter)  # by signal
    stages: Counter[str] = field(default_factory=Counter)  # where they landed
    jobs: Counter[str] = field(default_factory=Counter)  # whom they hit
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
    parser.add_argument("--only", choices=[job.name for job in JOBS], help="disturb this job alone")
    parser.add_argument("--keep", type=Path, help="leave the runs' folders here")
    parser.add_argument("--every-write", action="store_true", help="stop commands at each of their writes")
    args = parser.parse_args()
    if args.every_write:
        return everywrite.main([] if args.keep is None else ["--keep", str(args.keep)])
    torch.set_num_threads(1)
    folder = args.keep or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    write_images(folder / "images")
    write_vae(folder / "vae")
    jobs = [job for job in JOBS if args.only in (None, job.name)]
    started = time.monotonic()
    seconds = {job.name: undisturbed(job, folder) for job in jobs}
    print("Undisturbed:", ", ".join(f"{name} {took:.1f} s" for name, took in seconds.items()), flush=True)
    tally = Tally()
    chance = random.Random(args.seed)
    for job in cycle(jobs):
        if sum(tally.kills.values()) >= args.kills or len(tally.faults) >= 10:
            break
        disturbed(job, folder, tally, chance, kills=args.kills, seconds=seconds[job.name])
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
        "jobs": dict(tally.jobs),
        "stages": dict(tally.stages),
        "save_every": SAVE_EVERY,
        "most_steps_repeated": dict(tally.most_steps_repeated),
        "faults": tally.faults,
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    print(json.dumps(result))
    return int(kills < args.kills or bool(tally.faults) or tally.identical < tally.runs)


def undisturbed(job: Job, folder: Path) -> float:
    """Carries a job out in children, as the disturbed runs are; returns its seconds."""
    started = time.monotonic()
    codes = leave(start(job, folder / f"{job.name}-undisturbed"))
    if any(codes):
        raise SystemExit(f"the undisturbed {job.name} ended with status {codes}")
    return time.monotonic() - started


def disturbed(
    job: Job, folder: Path, tally: Tally, chance: random.Random, *, kills: int, seconds: float
) -> None:
    """One run of a job from start to end, disturbed as often as signals are left to send."""
    tally.runs += 1
    path = folder / f"{job.name}-{tally.runs}"
    faults = len(tally.faults)
    ended, last_signal = False, None
    while not ended:
        before = job.progress(path)
        processes = start(job, path)
        tally.starts += 1
        victim, sent = chance.choice(processes), None
        if sum(tally.kills.values()) < kills:
            wait(victim, partial(_steps_since, job, path, before), chance, seconds=seconds)
            sent = chance.choice((signal.SIGKILL, signal.SIGTERM))
            if victim.is_alive():
                os.kill(victim.pid or 0, sent)
        codes = leave(processes)
        steps = job.progress(path)[len(before) :]
        _check_repeated(before, steps, last_signal, tally)
        ended = not any(codes)
        signal_now = sent if sent and victim.exitcode in (-sent, 128 + sent) else None
        if steps or last_signal is None:
            last_signal = signal_now  # what a start without a step repeats later, an earlier end has cost
        if signal_now:
            tally.kills[signal_now.name] += 1
            tally.stages[steps[-1][0].split()[0] if steps else "start"] += 1
            tally.jobs[job.name] += 1
        elif not ended:
            tally.faults.append(f"{path.name} ended with status {codes}: see {_log(path)}")
            return
    want, got = job.results(folder / f"{job.name}-undisturbed"), job.results(path)
    differing = sorted(name for name in want.keys() | got.keys() if want.get(name) != got.get(name))
    tally.faults += [f"{path.name}: {name} differs" for name in differing]
    tally.identical += len(tally.faults) == faults
    print(f"{path.name}: {tally.starts} starts, {sum(tally.kills.values())} kills so far", flush=True)
    if not differing:
        shutil.rmtree(path, ignore_errors=True)


def wait(
    process: BaseProcess, steps_done: Callable[[], int], chance: random.Random, *, seconds: float
) -> None:
    """Returns at a random moment, or when the process ended.

    Half of the moments are even in time, so that they fall into loading, writing and stages of few steps as well; half are
    even in steps, so that a run goes on however slow the machine is.
    """
    if chance.random() < 0.5:
        process.join(chance.uniform(0, 0.5 * seconds))
        return
    steps = chance.randrange(20)
    while process.is_alive() and steps_done() < steps:
        time.sleep(0.002)
    process.join(chance.uniform(0, 0.01 * seconds))


def start(job: Job, folder: Path) -> list[BaseProcess]:
    """Starts the children that carry a job out in `folder`; what they say is kept in a file beside it."""
    context = multiprocessing.get_context("fork")
    port = _free_port()
    processes = [
        context.Process(target=attempt, args=(job, folder, rank, port)) for rank in range(job.processes)
    ]
    for process in processes:
        process.start()
    return processes


def leave(processes: list[BaseProcess]) -> list[int]:
    """Waits for all processes, and when one fails, ends the others as torchrun does; returns their statuses."""
    while not any(process.exitcode for process in processes):
        if all(process.exitcode == 0 for process in processes):
            break
        time.sleep(0.002)
    for process in processes:
        if process.is_alive():
            process.terminate()
    for process in processes:
        process.join(SECONDS_TO_LEAVE)
        if process.is_alive():
            process.kill()
        process.join()
    return [process.exitcode or 0 for process in processes]


def attempt(job: Job, folder: Path, rank: int, port: int) -> None:
    """One child's life."""
    if job.processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with _log(folder).open("ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        job.work(folder)
    except SystemExit as error:
        _end(int(error.code or 0))
    except BaseException:
        traceback.print_exc()
        _end(70)
    _end(0)


def _end(status: int) -> None:
    sys.stdout.flush()
    os._exit(status)


def carry_out_recipe(folder: Path, changes: dict[str, Any] | None = None) -> None:
    """The recipe, as `grafting run` does it, noting its steps in a file beside its folder."""
    with _steps_file(folder).open("ab", buffering=0) as noted:

        def note(stage: str, step: Step) -> None:
            if is_main():
                noted.write(f"{json.dumps([stage, step.done])}\n".encode())

        try:
            with catching_signals():
                run(Recipe.model_validate(merge(RECIPE, changes or {})), folder, on_step=note)
        except Interrupted as error:
            raise SystemExit(error.exit_code) from None
        except GraftingError as error:
            print(f"Error: {error}", file=sys.stderr)
            raise SystemExit(1) from None


def noted_steps(folder: Path) -> Progress:
    path = _steps_file(folder)
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def recipe_results(folder: Path) -> dict[str, str]:
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


def encode_images(folder: Path) -> None:
    settings = ["--size", "28", "--shard-size", "4", "--batch-size", "2", "--flip"]
    inputs = ["--images", str(folder.parent / "images"), "--vae", str(folder.parent / "vae")]
    app(["data", "latents", str(folder), *inputs, *settings])


def draw_images(folder: Path) -> None:
    settings = ["--steps", "4", "--cfg-scale", "1.5", "--num-images", str(NUM_IMAGES), "--batch-size", "4"]
    places = ["--out", str(folder / "samples.npz"), "--png", str(folder / "pictures")]
    folder.mkdir(exist_ok=True)
    app(["sample", "testbed", *places, *settings])


def shards_of(stage: str) -> Callable[[Path], Progress]:
    """The progress of a job that fills shards."""

    def progress(folder: Path) -> Progress:
        # not rglob, which fails where a folder goes while it looks
        names = [name for _, _, names in os.walk(folder) for name in names]
        shards = [name for name in names if name.endswith(".safetensors") and not name.startswith(".")]
        return [(stage, number) for number in range(len(shards))]

    return progress


def all_files(folder: Path) -> dict[str, str]:
    """Without locks."""
    found = [
        path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".lock")
    ]
    return {str(path.relative_to(folder)): sha256_of(path) for path in found}


JOBS = (
    Job("recipe", 1, carry_out_recipe, noted_steps, recipe_results),
    Job("recipe-by-2", 2, carry_out_recipe, noted_steps, recipe_results),
    Job("sharded-by-2", 2, partial(carry_out_recipe, changes=SHARDED), noted_steps, recipe_results),
    Job("latents-by-2", 2, encode_images, shards_of("latents"), all_files),
    Job("images-by-2", 2, draw_images, shards_of("images"), all_files),
)


def write_images(folder: Path, *, count: int = NUM_IMAGES) -> None:
    """Bundled images as files, a subfolder a class."""
    images = bundled_subset()
    for number in range(count):
        path = folder / str(int(images.labels[number])) / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.images[number, 0].numpy()).save(path)


def write_vae(folder: Path) -> None:
    """A random autoencoder of the real class."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    torch.manual_seed(0)
    AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4).save_pretrained(folder)


def _steps_since(job: Job, folder: Path, before: Progress) -> int:
    return len(job.progress(folder)) - len(before)


def _steps_file(folder: Path) -> Path:
    return folder.with_suffix(".steps")


def _log(folder: Path) -> Path:
    return folder.with_suffix(".log")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _check_repeated(before: Progress, after: Progress, sent: signal.Signals | None, tally: Tally) -> None:
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


if __name__ == "__main__":
    raise SystemExit(main())

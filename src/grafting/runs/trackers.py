"""Trackers that follow a run beside its own log: TensorBoard, Weights & Biases, trackio.

They are fed with a run's steps alone and change nothing of it; `log.jsonl` in each stage's folder is always written and holds
the same figures. All of them write into the run's folder and send nothing away, unless the user has asked for that
(WANDB_MODE=online). A resumed run keeps its tracker id. Nothing of the environment is recorded.
"""

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

from pydantic import BaseModel, Field

from ..contract import Step
from ..errors import MissingBackend, RunError
from ..machine import processes
from ..machine.files import write_json
from ..machine.packages import install_line
from ..machine.reading import read_json
from ..words import is_number

FOLDER_NAME = "tracking"


@runtime_checkable
class Tracker(Protocol):
    """Somewhere that figures go."""

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files, a folder for each stage: `tensorboard --logdir RUN/tracking/tensorboard`."""

    def __init__(self, folder: Path, *, name: str, run_id: str, settings: Mapping[str, Any]):
        self._folder = folder / "tensorboard"
        self._writers: dict[str, Any] = {}

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if stage not in self._writers:
            # steps that a killed run logged after its last state are drawn once
            self._writers[stage] = SummaryWriter(
                str(self._folder / stage.replace(" ", "-")), purge_step=step, flush_secs=10
            )
        for name, value in values.items():
            self._writers[stage].add_scalar(name, value, step)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class WeightsAndBiases:
    """A run of the project `grafting`, offline by default: `wandb sync --append RUN/tracking/wandb/offline-run-*`."""

    def __init__(self, folder: Path, *, name: str, run_id: str, settings: Mapping[str, Any]):
        mode = os.environ.get("WANDB_MODE", "offline")
        if mode != "online":
            # read when wandb is imported; else it reports on itself, offline too
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "grafting"),
            name=name,
            id=run_id,
            resume="allow",
            dir=str(folder),
            mode=mode,
            config=dict(settings),
            # figures only: no command line, code, console, host facts or use of the machine
            settings=wandb.Settings(
                console="off", disable_code=True, disable_git=True, x_disable_meta=True, x_disable_stats=True
            ),
        )
        self._stages: set[str] = set()

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if stage not in self._stages:
            # each stage counts its own steps, and wandb's may only grow
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        self._run.log({f"{stage}/{name}": value for name, value in values.items()} | {f"{stage}/step": step})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A local dashboard: `TRACKIO_DIR=RUN/tracking/trackio trackio show`; elsewhere if TRACKIO_SPACE_ID or
    TRACKIO_SERVER_URL says so."""

    def __init__(self, folder: Path, *, name: str, run_id: str, settings: Mapping[str, Any]):
        # both are read when trackio is imported
        os.environ.setdefault("TRACKIO_DIR", str(folder.resolve() / "trackio"))
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        import trackio

        # figures only: no use of the machine, nor who is logged in to the Hub
        figures_only = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
        asked = any(key in os.environ for key in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"))
        with nullcontext() if asked else _without_hub():
            self._run = trackio.init(
                project="grafting", name=run_id, resume="allow", config=dict(settings), **figures_only
            )

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log({f"{stage}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[..., Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raises a MissingBackend that names every tracker that is not installed or not known, if there are any."""
    unknown = [name for name in names if name not in TRACKERS]
    missing = [name for name in names if name in TRACKERS and find_spec(name) is None]
    if unknown:
        raise MissingBackend(f"no tracker {', '.join(unknown)}; there are {', '.join(TRACKERS)}")
    if missing:
        raise MissingBackend(
            f"not installed: {', '.join(missing)}. {install_line(*missing)}, or leave out "
            f"{' '.join(f'--track {name}' for name in missing)}: log.jsonl is always written"
        )


@contextmanager
def tracking(
    names: Sequence[str], folder: Path, *, name: str, settings: Mapping[str, Any]
) -> Iterator[Callable[[str, Step], None]]:
    """Forward a run's steps to trackers, which start with the first step and end with the block.

    Of a run's processes the main one tracks.

    Args:
        folder: the run's.
        name: what the run is called.
        settings: the recipe, as JSON.
    """
    check_trackers(names)
    started: list[Tracker] = []
    with ExitStack() as ending:

        def on_step(stage: str, step: Step) -> None:
            if not (names and processes.is_main()):
                return
            if not started:
                for kind in dict.fromkeys(names):
                    started.append(_start(kind, folder / FOLDER_NAME, name, settings))
                    ending.callback(started[-1].close)
            values = {key: value for key, value in step.values.items() if is_number(value)}
            for tracker in started:
                tracker.log(stage, step.done, values)

        yield on_step


class _Tracked(BaseModel):
    """What is kept of a tracked run."""

    id: Annotated[str, Field(max_length=300)]


def run_id_of(folder: Path, name: str) -> str:
    """The id under which trackers know the run in `folder`: made once, kept in `run.json`."""
    path = folder / "run.json"
    if path.is_file():
        try:
            return read_json(path, _Tracked, error=RunError).id
        except RunError as error:
            raise RunError(f"{path} is damaged: delete it to continue tracking under a new id") from error
    run_id = f"{name}-{secrets.token_hex(4)}"
    write_json(path, {"id": run_id})
    return run_id


def _start(tracker: str, folder: Path, name: str, settings: Mapping[str, Any]) -> Tracker:
    run_id = run_id_of(folder, name)
    try:
        return TRACKERS[tracker](folder, name=name, run_id=run_id, settings=settings)
    except Exception as error:  # whatever a foreign package raises
        raise RunError(
            f"{tracker} cannot start: {error}. Leave out --track {tracker}; saved files are kept"
        ) from error


@contextmanager
def _without_hub() -> Iterator[None]:
    """Inside, huggingface_hub asks the Hub nothing: trackio would ask who is logged in, and record it."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before

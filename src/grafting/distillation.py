"""Stage 1: fit each new operator to the old one's activations, all sites in one streaming pass of the teacher.

Inputs follow arXiv:2506.05340 Eq. 2: data noised by the host's process, t and noise fresh at each step, conditions in
their place. At each site the operator sees the site's input and is fitted to the old module's output inside the teacher's
forward pass; its graph is freed before the next site, so memory holds one site's graph and disk holds nothing. A merged
pair of blocks is one site, fitted to the second block's output for the first one's input.

Sites do not know each other: each has its own optimizer and guard. So several processes may share every batch, or the sites.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from torch import Tensor, nn

from . import parallel
from .activations import (
    ActivationCache,
    Visit,
    prepare_for_training,
    run_on_batch,
    shuffled,
    visiting,
)
from .contract import Denoiser, Role, Step, TrainingData
from .data.loader import Loader
from .errors import CheckpointError, TrainingError
from .functional.losses import Regression, regression_loss
from .functional.schedule import learning_rate_factor
from .guard import Guard, GuardConfig
from .hosts import host_of
from .noising import NoisedBatch, check_batch_size, draw_noised
from .placed import Placed
from .precision import FP32_IS_ABSENT, Precision, settled
from .randomness import batch_indices, seeded
from .sharding import kept_copy
from .surgery import grafted

# arXiv:2506.05340 Table 1: L1 is best for attention, L2 for MLPs
LOSS_BY_ROLE: dict[Role, Regression] = {"attention": "l1", "mlp": "l2", "block": "l1"}


class DistillConfig(BaseModel):
    """Settings of stage 1. The defaults are the paper's amount of training: 8k samples x 200 epochs, batch 64."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    hashed_as_absent: ClassVar = FP32_IS_ABSENT
    how_it_runs: ClassVar[frozenset[str]] = frozenset({"accumulate", "spread", "compile"})
    """Fields that change no result beyond rounding: a run may be resumed with others."""

    steps: NonNegativeInt = 25_000
    batch_size: PositiveInt = 64
    """Images a step, over all processes and micro-batches."""
    accumulate: PositiveInt = 1
    """Micro-batches into which each process cuts its share of a step, to need less memory. `normalised` and
    `outlier_threshold` go by the statistics of a process's micro-batch."""
    spread: Literal["data", "sites"] = "data"
    """What several processes share: every batch (gradients are averaged once a step), or the sites (each process runs the
    teacher on whole batches and fits some of the operators)."""
    lr: PositiveFloat = 5e-4
    warmup_steps: NonNegativeInt = 0
    cooldown_steps: NonNegativeInt = 0
    """Last steps, in which the learning rate falls linearly to zero."""
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: PositiveFloat = 10.0
    """Largest gradient norm of each site."""
    loss: Regression | None = None
    """l1, l2 or huber; by default l1 for attention and merged blocks and l2 for MLPs."""
    huber_delta: PositiveFloat = 1.0
    normalised: bool = False
    """Divide each site's loss by that of predicting zero."""
    outlier_threshold: PositiveFloat | None = None
    """Leave out elements whose target exceeds this many times the target's root mean square."""
    inputs: Literal["teacher", "student"] = "teacher"
    """What operators see: the teacher's activations, or those of the grafted model, errors of earlier grafts included."""
    cache_samples: PositiveInt | None = None
    """Train on this many noised samples, fixed, with the teacher's activations on disk (the paper: 8,000); by default
    every step sees fresh noise and nothing is written."""
    images: PositiveInt | None = None
    """Train on this many images (the paper: 8,000), with fresh noise at every step; by default on all but the held out."""
    holdout: PositiveInt = 256
    """Images kept out of training, on which loss and R^2 are measured."""
    holdout_every: PositiveInt = 100
    """Steps between measurements on the held-out images; also done at the start and at the end."""
    precision: Precision = "auto"
    """fp32 or bf16; `auto` is bf16 where the device is faster in it."""
    compile: bool = False
    """Compile each operator."""
    guard: GuardConfig | None = None
    """What to do with a site's bad steps; left out, a loss that is not finite is an error."""
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _check(self) -> "DistillConfig":
        if self.cache_samples and self.inputs == "student":
            raise ValueError(
                "cache_samples goes with inputs: teacher; a student's activations change at each step"
            )
        if self.spread == "sites" and self.inputs == "student":
            raise ValueError("spread: sites goes with inputs: teacher; a student needs all of its operators")
        return self


def distill(
    teacher: nn.Module,
    operators: Mapping[str, Placed],
    data: TrainingData,
    config: DistillConfig,
    *,
    denoiser: Denoiser | None = None,
    cache_folder: Path | None = None,
    state: dict[str, Any] | None = None,
) -> Iterator[Step]:
    """Fit `operators` (by site path, built for `teacher`) in place. The teacher is unchanged.

    With several processes (see `parallel`) each runs this on the same arguments, and each has all operators fitted in the
    end; `state()` is then to be called by all of them, and is whole on the main one.

    A step's values are `loss/PATH`, and when measured `holdout_loss/PATH` and `r2/PATH`: 1 minus the squared error over
    the variance of the teacher's output.

    Args:
        denoiser: how the teacher is called, its process and its conditions, which are dropped in their share, so that
            operators also see the null one of guidance; by default its host's.
        cache_folder: where activations go when `config.cache_samples` is set.
        state: what an earlier step's `state()` returned, to go on from there.

    Raises:
        TrainingError: too few images, a batch does not divide among processes, or a loss is not finite.
        CheckpointError: the state is an earlier version's.
    """
    check_division(config)
    config = settled(config, next(teacher.parameters()).device, together=True)
    train, held_out = split(len(data), config)
    denoiser = denoiser or host_of(teacher).denoiser(teacher)
    fitting = _Fitting(teacher, operators, data, config, denoiser)
    first = fitting.load(state) if state else 0
    with fitting.training(), fitting.loader(train) as loader:
        cache = fitting.record(train, cache_folder) if config.cache_samples else None
        if first == 0:
            yield Step(
                done=0,
                total=config.steps,
                values=fitting.measure(held_out),
                state=lambda: fitting.snapshot(0),
            )
        for step in range(first, config.steps):
            waited = loader.seconds_waited
            if cache is None:
                values = fitting.step(step, fitting.runs(loader.at(step), step))
            else:
                indices = batch_indices(cache.num_samples, config.batch_size, step, config.seed)
                parts = indices[fitting.share].chunk(config.accumulate)
                values = fitting.step(step, [partial(cache.replay, part, fitting.mine) for part in parts])
            if (step + 1) % config.holdout_every == 0 or step + 1 == config.steps:
                values |= fitting.measure(held_out)
            yield Step(
                done=step + 1,
                total=config.steps,
                values=values,
                state=partial(fitting.snapshot, step + 1),
                seconds_waited=loader.seconds_waited - waited,
            )
        fitting.exchange()


def check_division(config: DistillConfig) -> None:
    """Raises a TrainingError if a batch does not divide among processes and micro-batches."""
    processes = parallel.world_size() if config.spread == "data" else 1
    check_batch_size("stage 1", config.batch_size, processes=processes, accumulate=config.accumulate)


class _Fitting:
    """The operators in training: their losses and optimizers, and the teacher that they are fitted to."""

    def __init__(
        self,
        teacher: nn.Module,
        operators: Mapping[str, Placed],
        data: TrainingData,
        config: DistillConfig,
        denoiser: Denoiser,
    ):
        self.teacher, self.operators, self.data, self.config = teacher, operators, data, config
        self.denoiser = denoiser
        self.fitted = {path: operator for path, operator in operators.items() if operator.fits}
        self.losses = {path: config.loss or LOSS_BY_ROLE[o.site.role] for path, o in self.fitted.items()}
        self.device = next(teacher.parameters()).device
        prepare_for_training("stage 1", teacher, operators, precision=config.precision)
        # the sites that this process fits, and the part of each batch that it fits them on
        spreads_sites = config.spread == "sites"
        self.mine = tuple(self.fitted)[parallel.share() if spreads_sites else slice(None)]
        self.share = slice(None) if spreads_sites else parallel.share()
        self.forward = {path: operator.forward for path, operator in self.fitted.items()}
        if config.compile:
            self.forward = {path: torch.compile(forward) for path, forward in self.forward.items()}
        self.sites = {path: _Site(self.fitted[path], config) for path in self.mine}
        self.guards = {path: Guard(config.guard) for path in self.fitted}

    @contextmanager
    def training(self) -> Iterator[None]:
        """Operators in training mode."""
        self.teacher.eval()
        for operator in self.operators.values():
            operator.train()
        try:
            yield
        finally:
            for operator in self.operators.values():
                operator.eval()

    def loader(self, train: Tensor) -> Loader:
        """Reads this process's part of each batch of these items."""
        config = self.config
        return Loader(
            self.data,
            config.batch_size,
            seed=config.seed,
            items=train,
            steps=config.steps,
            share=self.share,
            pin=self.device.type != "cpu",
        )

    def runs(self, images: tuple[Tensor, Tensor], step: int) -> list[Callable[[Visit], None]]:
        """What runs the teacher on this process's part of a batch, one micro-batch after the other."""
        entropy, config = (self.config.seed, step), self.config
        batch = self._draw(images, entropy, batch_size=config.batch_size, part=self.share)
        parts = batch.split(config.accumulate)
        return [partial(self._run, part, self.mine, (*entropy, number)) for number, part in enumerate(parts)]

    def _draw(
        self,
        images: tuple[Tensor, Tensor],
        entropy: tuple[int, ...],
        *,
        batch_size: int,
        part: slice = slice(None),
    ) -> NoisedBatch:
        with seeded(*entropy) as draw:
            return draw_noised(
                images,
                draw,
                batch_size=batch_size,
                denoiser=self.denoiser,
                device=self.device,
                part=part,
            )

    def _run(self, batch: NoisedBatch, paths: Sequence[str], entropy: tuple[int, ...], visit: Visit) -> None:
        """Run the teacher on a batch and visit these sites on the way."""
        config = self.config
        with _visiting(self.teacher, self.operators, paths, config.inputs, visit), seeded(*entropy):
            run_on_batch(self.teacher, batch, denoiser=self.denoiser, precision=config.precision)

    def _run_whole(
        self, indices: Tensor, paths: Sequence[str], entropy: tuple[int, ...], visit: Visit
    ) -> None:
        batch = self._draw(self.data.batch(indices), entropy, batch_size=len(indices))
        self._run(batch, paths, (*entropy, 1), visit)

    def step(self, step: int, runs: Sequence[Callable[[Visit], None]]) -> dict[str, float]:
        """One step of every operator; each of `runs` takes the teacher past the sites. Returns each site's loss."""
        sums = {path: torch.zeros((), device=self.device) for path in self.mine}

        def visit(path: str, args: tuple, kwargs: dict[str, Any], target: Any) -> None:
            with torch.enable_grad():
                loss = self._loss(path, self.forward[path](*args, **kwargs), target) / len(runs)
            sums[path] += loss.detach()
            if self.sites[path].parameters:
                loss.backward()

        for path in self.mine:
            if self.guards[path].keeps_at(step):
                self.sites[path].keep()
        for run in runs:
            run(visit)
        if self.config.spread == "data":
            gradients = [p for s in self.sites.values() for p in s.parameters if p.grad is not None]
            parallel.average_gradients(gradients)
        losses = self._figures(sums)
        norms = self._figures({path: site.clip() for path, site in self.sites.items()})
        findings = {
            path: self.guards[path].judge({"loss": losses[path], "grad_norm": norms[path]})
            for path in self.fitted
        }
        values = {f"loss/{path}": loss for path, loss in losses.items()}
        for path, finding in findings.items():
            lr = self._learning_rate(path, step)
            if finding and self.guards[path].stops:
                raise TrainingError(
                    f"stage 1, step {step}, {path}: the loss is {losses[path]}, its gradient norm {norms[path]}. Lower lr "
                    f"(now {lr:g}), use precision: fp32, or normalised: true{self.guards[path].why()}"
                )
        for path, finding in findings.items():
            if finding:
                values = self._pass_over(path, finding, step, values)
            elif path in self.sites:
                self.sites[path].step(self._learning_rate(path, step))
        return values

    def _pass_over(
        self, path: str, finding: Mapping[str, float], step: int, values: dict[str, float]
    ) -> dict[str, float]:
        """Do with a site's bad step what the guard says; the values, with words for it and without what JSON has none for."""
        guard, done = self.guards[path], {"skipped": 1.0}
        if guard.rolls_back:
            done = {"rolled_back_to": float(step - step % guard.config.window), "lr_factor": guard.lr_factor}
        if path in self.sites:
            self.sites[path].pass_over(back=guard.rolls_back)
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        return finite | {f"guard_{name}/{path}": value for name, value in (finding | done).items()}

    def _figures(self, mine: Mapping[str, Tensor]) -> dict[str, float]:
        """A figure of every site, from those of this process's sites."""
        here = torch.stack(list(mine.values())).tolist() if mine else []
        if self.config.spread == "data":
            return dict(zip(mine, parallel.mean(here), strict=True))
        known = dict(zip(mine, here, strict=True))
        return dict(zip(self.fitted, parallel.total([known.get(p, 0.0) for p in self.fitted]), strict=True))

    def _learning_rate(self, path: str, step: int) -> float:
        config = self.config
        factor = learning_rate_factor(
            step,
            steps=config.steps,
            warmup_steps=config.warmup_steps,
            cooldown_steps=config.cooldown_steps,
        )
        return self.guards[path].lr_factor * config.lr * factor

    def measure(self, held_out: Tensor) -> dict[str, float]:
        """Loss and R^2 of every site on held-out images, always with the same noise."""
        measured = {path: _Measured() for path in self.fitted}

        def visit(path: str, args: tuple, kwargs: dict[str, Any], target: Any) -> None:
            output = self.forward[path](*args, **kwargs)
            measured[path].update(self._loss(path, output, target), output, target)

        # whole batches are dealt out, so that each gives what it gives one process
        for number, indices in list(enumerate(held_out.split(self.config.batch_size)))[self.share]:
            self._run_whole(indices, self.mine, (self.config.seed, number, 1, 1), visit)
        sums = iter(parallel.total([value for site in measured.values() for value in site.sums]))
        found = {path: _Measured(*islice(sums, 4)) for path in self.fitted}
        losses = {f"holdout_loss/{path}": site.loss for path, site in found.items()}
        return losses | {f"r2/{path}": site.r2 for path, site in found.items()}

    def record(self, train: Tensor, folder: Path | None) -> ActivationCache:
        """The teacher's activations on the first `cache_samples` noised samples, on disk."""
        config = self.config
        if folder is None:
            raise TrainingError("cache_samples is set, but there is no folder for the activations")
        assert config.cache_samples is not None
        chosen = train[torch.arange(config.cache_samples) % len(train)].split(config.batch_size)
        cache = ActivationCache(folder, config.cache_samples)
        with parallel.main_first():
            cache.fill(
                partial(self._run_whole, indices, tuple(self.fitted), (config.seed, number, 1, 2))
                for number, indices in enumerate(chosen)
            )
        return cache

    def snapshot(self, step: int) -> dict[str, Any]:
        """All that is needed to go on after `step` steps."""
        here = {
            path: site.state(kept=not self.guards[path].keeps_at(step)) for path, site in self.sites.items()
        }
        if self.config.spread == "sites":
            here = {path: state for part in parallel.gather_on_main(here) for path, state in part.items()}
        return {
            "step": step,
            "operators": {path: here[path]["operator"] for path in self.fitted if path in here},
            "sites": here,
            "guards": {path: guard.state() for path, guard in self.guards.items()},
        }

    def load(self, state: dict[str, Any]) -> int:
        """Take up a snapshot; returns its step."""
        if "sites" not in state:
            raise CheckpointError(
                "stage 1's saved state is of an earlier version of grafting, which cannot be gone on from: delete the "
                "stage's folder to start it anew"
            )
        for path, operator in self.fitted.items():
            operator.load_state_dict(state["operators"][path])
            self.guards[path].load(state["guards"][path])
        for path, site in self.sites.items():
            site.load(state["sites"][path])
        return state["step"]

    def exchange(self) -> None:
        """Give every process every operator, where each has fitted some of them."""
        if self.config.spread == "sites":
            for number, operator in enumerate(self.fitted.values()):
                for tensor in operator.state_dict().values():
                    parallel.copy_from(number % parallel.world_size(), tensor)

    def _loss(self, path: str, output: Any, target: Any) -> Tensor:
        """The site's loss, summed over the tensors of its output."""
        losses = [
            regression_loss(
                y,
                want,
                self.losses[path],
                huber_delta=self.config.huber_delta,
                normalised=self.config.normalised,
                outlier_threshold=self.config.outlier_threshold,
            )
            for y, want in zip(_tensors(output), _tensors(target), strict=True)
        ]
        return torch.stack(losses).sum()


class _Site:
    """One operator in training: its parameters, its optimizer, and what a rollback returns to."""

    def __init__(self, operator: nn.Module, config: DistillConfig):
        self.operator, self.clip_norm = operator, config.clip_norm
        self.parameters = [p for p in operator.parameters() if p.requires_grad]
        # an operator that has nothing to learn is measured, not trained
        self.optimizer = (
            torch.optim.AdamW(self.parameters, weight_decay=config.weight_decay) if self.parameters else None
        )
        self.kept: dict[str, Any] | None = None

    def clip(self) -> Tensor:
        """Clips the gradient; its norm before."""
        if not self.parameters:
            return torch.zeros(())
        return torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)

    def step(self, lr: float) -> None:
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def keep(self) -> None:
        """Remember this moment, for a rollback."""
        self.kept = kept_copy(self._weights())

    def pass_over(self, *, back: bool) -> None:
        """Take no step, or all those since `keep` back."""
        if back and self.kept is not None:
            self._restore(copy.deepcopy(self.kept))
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)

    def state(self, *, kept: bool) -> dict[str, Any]:
        """What it goes on from; with what a rollback returns to, if that is not this state itself."""
        return self._weights() | ({"kept": self.kept} if kept and self.kept is not None else {})

    def load(self, state: Mapping[str, Any]) -> None:
        self._restore(state)
        self.kept = state.get("kept")

    def _weights(self) -> dict[str, Any]:
        optimizer = self.optimizer.state_dict() if self.optimizer else {}
        return {"operator": self.operator.state_dict(), "optimizer": optimizer}

    def _restore(self, weights: Mapping[str, Any]) -> None:
        self.operator.load_state_dict(weights["operator"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(weights["optimizer"])


@dataclass
class _Measured:
    """Running loss and R^2 of one site over held-out batches, as sums."""

    losses: float = 0.0
    batches: float = 0.0
    error: float = 0.0
    variation: float = 0.0

    @property
    def sums(self) -> tuple[float, ...]:
        return self.losses, self.batches, self.error, self.variation

    def update(self, loss: Tensor, output: Any, target: Any) -> None:
        self.losses += loss.item()
        self.batches += 1
        for y, want in zip(_tensors(output), _tensors(target), strict=True):
            want = want.double()
            self.error += (y.double() - want).square().sum().item()
            self.variation += (want - want.mean(dim=tuple(range(want.ndim - 1)))).square().sum().item()

    @property
    def loss(self) -> float:
        return self.losses / self.batches

    @property
    def r2(self) -> float:
        return 1 - self.error / max(self.variation, 1e-30)


@contextmanager
def _visiting(
    teacher: nn.Module,
    operators: Mapping[str, Placed],
    paths: Sequence[str],
    inputs: str,
    visit: Visit,
) -> Iterator[None]:
    """While the teacher runs, `visit` these sites with their calls' arguments and what the old modules give for them."""
    fitted = {path: operators[path] for path in paths}
    old = {path: [teacher.get_submodule(p) for p in o.replaces] for path, o in fitted.items()}
    if inputs == "teacher":
        first, last = ({path: blocks[end] for path, blocks in old.items()} for end in (0, -1))
        with visiting(first, visit, until=last):
            yield
        return

    def visit_student(path: str, args: tuple, kwargs: dict[str, Any], _: Any) -> None:
        visit(path, args, kwargs, fitted[path].replaced_output(old[path], args, kwargs))

    with grafted(teacher, operators, cast=False), visiting(fitted, visit_student):
        yield


def split(num_items: int, config: DistillConfig) -> tuple[Tensor, Tensor]:
    """Indices to train on and indices held out, by seed."""
    if num_items <= config.holdout:
        raise TrainingError(
            f"stage 1 holds out {config.holdout} images, but the data has {num_items}: lower `holdout`"
        )
    rest = num_items - config.holdout
    if config.images is not None and config.images > rest:
        raise TrainingError(
            f"stage 1 is to train on {config.images} images, but the data has {num_items}, of which "
            f"{config.holdout} are held out: {rest} are left"
        )
    held_out, train = shuffled(num_items, config.seed).split([config.holdout, rest])
    return train[: config.images], held_out


def _tensors(output: Any) -> list[Tensor]:
    """The tensors of a module's output: one, or those of a tuple (joint attention)."""
    return [output] if isinstance(output, Tensor) else [o for o in output if o is not None]

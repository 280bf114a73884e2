"""Stage 1: fit each new operator to the old one's activations, all sites in one streaming pass of the teacher.

Inputs follow arXiv:2506.05340 Eq. 2: data noised by the host's process, t and noise fresh at each step, conditions in
their place. At each site the operator sees the site's input and is fitted to the old module's output inside the teacher's
forward pass; its graph is freed before the next site, so memory holds one site's graph and disk holds nothing. A merged
pair of blocks is one site, fitted to the second block's output for the first one's input.

Sites do not know each other: each has its own optimizer and guard. So several processes may share every batch, or the sites.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from torch import Tensor, nn
from torch.optim import AdamW

from ..contract import Denoiser, Kwargs, Role, State, Step
from ..editing.placed import Placed
from ..errors import CheckpointError, TrainingError
from ..functional.losses import Regression, regression_loss
from ..hosts import host_of
from ..machine import processes
from ..machine.compiling import compiled
from ..machine.devices import mixed_precision
from ..machine.precision import FP32_IS_ABSENT, Precision, settled
from ..machine.settings import Settings
from .activations import ActivationCache, Repeatable, Source, Streamed, Visited
from .batches import Batches, check_batch_size
from .fit import Found, Measured, tensors_of
from .guard import GuardConfig, check_weights
from .stacking import Stacks
from .student import block_linears, held_in_bf16
from .supply import Data, Supply, supply_of
from .trainee import Trainee, adamw, take_step

# arXiv:2506.05340 Table 1: L1 is best for attention, L2 for MLPs
LOSS_BY_ROLE: dict[Role, Regression] = {"attention": "l1", "mlp": "l2", "block": "l1"}


class DistillConfig(Settings):
    """Settings of stage 1. The defaults are the paper's amount of training: 8k samples x 200 epochs, batch 64."""

    hashed_as_absent: ClassVar = FP32_IS_ABSENT
    how_it_runs: ClassVar[frozenset[str]] = frozenset({"accumulate", "spread", "compile", "stacked"})
    """Fields that change no result beyond rounding: a run may be resumed with others."""

    steps: NonNegativeInt = 25_000
    batch_size: PositiveInt = 64
    """Images per step, over all processes and micro-batches."""
    accumulate: PositiveInt = 1
    """Micro-batches into which each process cuts its share of a step, to need less memory. `normalised` and
    `outlier_threshold` go by the statistics of a process's micro-batch."""
    spread: Literal["data", "sites"] = "data"
    """Work that processes share: every batch (gradients are averaged once a step), or the sites (each process runs the
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
    """Inputs of the operators: the teacher's activations, or those of the grafted model, with errors of earlier grafts."""
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
    frozen: Literal["fp32", "bf16"] = "fp32"
    """Precision in which the linear layers of the teacher's blocks are held; bf16 needs half the memory, and `precision: bf16`,
    which computes with the same values. Operators are fp32 all the same."""
    compile: bool = False
    """Compile each operator, and the teacher's attention and MLPs one by one."""
    stacked: bool = False
    """Fit equal sites as one operator with stacked parameters, after the teacher's pass: faster where sites are so small that
    launching their operations takes the time. Activations and graphs of all sites are in memory at once."""
    guard: GuardConfig | None = None
    """Handling of a site's bad steps; if omitted, a non-finite loss is an error."""
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _check(self) -> "DistillConfig":
        if self.cache_samples and self.inputs == "student":
            raise ValueError(
                "cache_samples requires inputs: teacher; a student's activations change at each step"
            )
        if self.spread == "sites" and self.inputs == "student":
            raise ValueError("spread: sites requires inputs: teacher; a student needs all of its operators")
        if self.frozen == "bf16" and self.precision == "fp32":
            raise ValueError("frozen: bf16 requires precision: bf16")
        if self.stacked and self.inputs == "student":
            raise ValueError("stacked requires inputs: teacher; a student's operators run one after another")
        if self.stacked and self.compile:
            raise ValueError("stacked and compile exclude each other: both save launches")
        return self


def distill(
    teacher: nn.Module,
    operators: Mapping[str, Placed],
    data: Data,
    config: DistillConfig,
    *,
    denoiser: Denoiser | None = None,
    cache_folder: Path | None = None,
    state: State | None = None,
) -> Iterator[Step]:
    """Fit `operators` (by site path, built for `teacher`) in place. The teacher is unchanged.

    With several processes (see `machine.processes`) each runs this on the same arguments, and each has all operators fitted in the
    end; `state()` is then to be called by all of them, and is whole on the main one.

    A step's values are `loss/PATH`, and when measured `holdout_loss/PATH` and `r2/PATH`: 1 minus the squared error over
    the variance of the teacher's output.

    Args:
        data: images or latents with the numbers of their conditions, or states along the teacher's own trajectories.
        denoiser: how the teacher is called, its process and its conditions, which are dropped in their share, so that
            operators also see the null one of guidance; by default its host's.
        cache_folder: where activations go when `config.cache_samples` is set.
        state: what an earlier step's `state()` returned, to resume from there.

    Raises:
        TrainingError: too few images, a batch does not divide among processes, weights, activations or a loss are not
            finite, or weights are to be held in bf16 where `auto` is fp32.
        DataError: an image is not finite.
        CheckpointError: the state is an earlier version's.
    """
    check_division(config)
    check_weights(teacher, "stage 1")
    config = settled(config, next(teacher.parameters()).device, together=True)
    if config.frozen == "bf16" and config.precision == "fp32":
        raise TrainingError("stage 1: frozen: bf16 requires precision: bf16, and auto is fp32 on this device")
    denoiser = denoiser or host_of(teacher).denoiser(teacher)
    blocks = [site.path for site in host_of(teacher).blocks(teacher)] if config.frozen == "bf16" else []
    with (
        held_in_bf16(block_linears(teacher, blocks)),
        _training(teacher, operators),
        compiled(_regions(teacher, operators) if config.compile else {}),
    ):
        visited = Visited(teacher, operators, denoiser, config.precision, config.inputs)
        fitting = _Fitting(visited, data, config)
        first = fitting.load(state) if state else 0
        source = fitting.source(cache_folder)
        if first == 0:
            start = partial(fitting.snapshot, 0)
            yield Step(done=0, total=config.steps, values=fitting.measure(), state=start)
        yield from fitting.batches.steps(first, partial(fitting.step, source), fitting.snapshot)
        fitting.exchange()


@contextmanager
def _training(teacher: nn.Module, operators: Mapping[str, Placed]) -> Iterator[None]:
    """Operators in training mode."""
    teacher.eval()
    for operator in operators.values():
        operator.train()
    try:
        yield
    finally:
        for operator in operators.values():
            operator.eval()


def _regions(teacher: nn.Module, operators: Mapping[str, Placed]) -> dict[str, nn.Module]:
    """What runs compiled. Of a teacher that is attention and MLPs: it is visited between modules, not inside of them."""
    sites = {site.path: teacher.get_submodule(site.path) for site in host_of(teacher).sites(teacher)}
    return sites | {
        f"the operator at {path}": operator for path, operator in operators.items() if operator.fits
    }


def check_division(config: DistillConfig) -> None:
    """Raises a TrainingError if a batch does not divide among processes and micro-batches."""
    num_processes = processes.world_size() if config.spread == "data" else 1
    check_batch_size("stage 1", config.batch_size, processes=num_processes, accumulate=config.accumulate)


class _Fitting:
    """The operators in training, and where the activations come from that they are fitted to."""

    def __init__(self, visited: Visited, data: Data, config: DistillConfig):
        self.visited, self.config = visited, config
        supply = supply_of(
            data, visited.denoiser, teacher=visited.teacher, device=visited.device, precision=config.precision
        )
        self.train, held_out = split(supply, config)
        visited.prepare("stage 1")
        fitted = {path: operator for path, operator in visited.operators.items() if operator.fits}
        self.optimizer = adamw([_trained(operator) for operator in fitted.values()], config)
        self.sites = {path: _Site(operator, config, self.optimizer) for path, operator in fitted.items()}
        # the sites that this process fits, and the part of each batch that it fits them on
        mine, share = slice(None), processes.share()
        if config.spread == "sites":
            mine, share = share, mine
        self.mine = tuple(self.sites)[mine]
        self.stacks = Stacks({path: self.sites[path] for path in self.mine}) if config.stacked else None
        feed = self.train.steps(config, share=share, end=config.steps)
        self.batches = Batches(feed, config, share=share)
        self.held_out = self._repeatable(held_out, config.holdout, stream=1, paths=self.mine)

    def source(self, cache_folder: Path | None) -> Source:
        """The teacher as it runs, or its activations on the first `cache_samples` noised samples, on disk."""
        num_samples = self.config.cache_samples
        if num_samples is None:
            return Streamed(self.visited, self.batches, self.mine)
        if cache_folder is None:
            raise TrainingError("cache_samples is set, but there is no folder for the activations")
        cache = ActivationCache(cache_folder, num_samples, batches=self.batches, paths=self.mine)
        with processes.main_first():
            cache.fill(self._repeatable(self.train, num_samples, stream=2, paths=tuple(self.sites)))
        return cache

    def _repeatable(self, supply: Supply, count: int, *, stream: int, paths: tuple[str, ...]) -> Repeatable:
        """So many inputs in batches, which are whole in every process."""
        config = self.config
        feed = supply.fixed(count, batch_size=config.batch_size, seed=config.seed, stream=(1, stream))
        return Repeatable(self.visited, feed, (config.seed, 1, stream), paths)

    def step(self, source: Source, step: int) -> dict[str, float]:
        """One step of every operator. Each site's loss, what its guard found and did, and measurements that are due."""
        config = self.config
        for path in self.mine:
            self.sites[path].keep(step)
        losses, norms = self._figures(self._gradients(source, step))
        findings = {path: self._judge(path, step, losses[path], norms[path]) for path in self.sites}
        values = {f"loss/{path}": loss for path, loss in losses.items() if math.isfinite(loss)}
        for path, finding in findings.items():
            told = self.sites[path].settle(step, finding)
            values |= {f"guard_{name}/{path}": value for name, value in told.items()}
        self._clip({path: norms[path] for path in self.mine if not findings[path]})
        take_step(self.optimizer)
        due = (step + 1) % config.holdout_every == 0 or step + 1 == config.steps
        return values | self.measure() if due else values

    def _gradients(self, source: Source, step: int) -> dict[str, Tensor]:
        """Take the gradients of a step; the losses of this process's sites."""
        sums: dict[str, Tensor] = {}

        def learn(paths: Sequence[str], losses: Tensor) -> None:
            losses = losses / self.config.accumulate
            for path, loss in zip(paths, losses.detach(), strict=True):
                sums[path] = sums[path] + loss if path in sums else loss
            if losses.requires_grad:
                losses.sum().backward()

        def visit(path: str, args: tuple, kwargs: Kwargs, target: Any) -> None:
            site = self.sites[path]
            with torch.enable_grad():
                learn([path], site.loss(site.forward(*args, **kwargs), target)[None])

        with mixed_precision(self.visited.device, self.config.precision):
            if self.stacks is not None:
                self.stacks.visit(source, step, learn)
            else:
                source.visit(step, visit)
        if self.config.spread == "data":
            parameters = (p for site in self.sites.values() for p in site.parameters)
            processes.average_gradients([p for p in parameters if p.grad is not None])
        return sums

    def _figures(self, losses: Mapping[str, Tensor]) -> tuple[dict[str, float], dict[str, float]]:
        """Loss and gradient norm of every site, from those of this process's; they come from the device at once."""
        gradients = {path: self.sites[path].gradients for path in self.mine}
        flat = [gradient for several in gradients.values() for gradient in several]
        norms = torch._foreach_norm(flat) if flat else ()
        tensors = [*(losses[path] for path in self.mine), *norms]
        figures = iter(torch.stack(tensors).tolist() if tensors else ())
        here = [next(figures) for _ in self.mine]
        here += [math.hypot(*islice(figures, len(several))) for several in gradients.values()]
        if self.config.spread == "data":
            here = processes.mean(here)
        else:
            known = dict(zip(((kind, path) for kind in (0, 1) for path in self.mine), here, strict=True))
            here = processes.total([known.get((kind, path), 0.0) for kind in (0, 1) for path in self.sites])
        half = len(self.sites)
        return dict(zip(self.sites, here[:half], strict=True)), dict(
            zip(self.sites, here[half:], strict=True)
        )

    def _clip(self, norms: Mapping[str, float]) -> None:
        """Scale down the gradients of sites whose norm is too large."""
        for path, norm in norms.items():
            if norm > self.config.clip_norm:
                torch._foreach_mul_(self.sites[path].gradients, self.config.clip_norm / norm)

    def _judge(self, path: str, step: int, loss: float, norm: float) -> dict[str, float]:
        """Findings of a site's guard; raise an error if it says so."""
        site = self.sites[path]
        finding = site.guard.judge({"loss": loss, "grad_norm": norm})
        if finding and site.guard.stops:
            raise TrainingError(
                f"stage 1, step {step}, {path}: the loss is {loss}, its gradient norm {norm}. Lower lr (now "
                f"{site.learning_rate(step):g}), use precision: fp32, or normalised: true{site.guard.why()}"
            )
        return finding

    def measure(self) -> dict[str, float]:
        """Loss and R^2 of every site on held-out images, always with the same noise."""
        measured = {path: Measured(self.visited.device) for path in self.sites}

        def visit(path: str, args: tuple, kwargs: Kwargs, target: Any) -> None:
            output = self.sites[path].forward(*args, **kwargs)
            measured[path].update(self.sites[path].loss(output, target), output, target)

        # whole batches are dealt out, so that each gives what it gives one process
        for number in range(math.ceil(self.config.holdout / self.config.batch_size))[self.batches.share]:
            self.held_out.visit(number, visit)
        sums = iter(
            processes.total(torch.stack([site.sums for site in measured.values()]).flatten().tolist())
        )
        found = {path: Found(*islice(sums, 4)) for path in self.sites}
        for path, site in found.items():
            if not math.isfinite(site.variation):
                raise TrainingError(
                    f"stage 1, {path}: the teacher's output for held-out images is not finite, and so nothing to fit to: use "
                    "precision: fp32"
                )
        losses = {f"holdout_loss/{path}": site.loss for path, site in found.items()}
        return losses | {f"r2/{path}": site.r2 for path, site in found.items()}

    def snapshot(self, step: int) -> State:
        """State needed to resume after `step` steps."""
        here = {path: self.sites[path].state(step) for path in self.mine}
        if self.config.spread == "sites":
            here = {path: state for part in processes.gather_on_main(here) for path, state in part.items()}
        return {
            "step": step,
            "operators": {path: here[path]["operator"] for path in self.sites if path in here},
            "sites": here,
            "guards": {path: site.guard.state() for path, site in self.sites.items()},
        }

    def load(self, state: State) -> int:
        """Take up a snapshot; returns its step."""
        if "sites" not in state:
            raise CheckpointError(
                "this stage 1 state was written by an earlier version of grafting and cannot be resumed: delete the "
                "stage's folder to restart the stage"
            )
        for path, site in self.sites.items():
            site.guard.load(state["guards"][path])
        for path in self.mine:
            self.sites[path].load(state["sites"][path])
        return state["step"]

    def exchange(self) -> None:
        """Give every process every operator, where each has fitted some of them."""
        if self.config.spread == "sites":
            for number, path in enumerate(self.sites):
                for tensor in self.visited.operators[path].state_dict().values():
                    processes.copy_from(number % processes.world_size(), tensor)


class _Site(Trainee):
    """An operator in training. One that has nothing to learn is measured, not trained."""

    def __init__(self, operator: Placed, config: DistillConfig, optimizer: AdamW | None):
        super().__init__({"operator": operator}, _trained(operator), config, optimizer=optimizer)
        self.operator = operator
        self._loss = partial(
            regression_loss,
            kind=config.loss or LOSS_BY_ROLE[operator.site.role],
            huber_delta=config.huber_delta,
            normalised=config.normalised,
            outlier_threshold=config.outlier_threshold,
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.operator.forward(*args, **kwargs)

    @property
    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def loss(self, output: Any, target: Any) -> Tensor:
        """Summed over the tensors of the output."""
        first, *others = (
            self._loss(y, want) for y, want in zip(tensors_of(output), tensors_of(target), strict=True)
        )
        return sum(others, first)


def _trained(operator: Placed) -> list[nn.Parameter]:
    return [p for p in operator.parameters() if p.requires_grad]


def split(supply: Supply, config: DistillConfig) -> tuple[Supply, Supply]:
    """What stage 1 trains on, and what it holds out.

    Raises:
        TrainingError: there is too little.
    """
    return supply.split(holdout=config.holdout, images=config.images, seed=config.seed)

"""Stage 1: fit each new operator to the old one's activations, all sites in one streaming pass of the teacher.

Inputs follow arXiv:2506.05340 Eq. 2: data noised by the host's process, t and noise fresh at each step, labels in their
place. At each site the operator sees the site's input and is fitted to the old module's output inside the teacher's
forward pass; its graph is freed before the next site, so memory holds one site's graph and disk holds nothing. A merged
pair of blocks is one site, fitted to the second block's output for the first one's input.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

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

from .activations import ActivationCache, Precision, Visit, run_noised, shuffled, visiting
from .contract import Predict, Role, Step, TrainingData
from .diffusion import Diffusion
from .errors import TrainingError
from .functional.losses import Regression, regression_loss
from .functional.schedule import learning_rate_factor
from .randomness import batch_indices
from .surgery import MergedBlocks, Passage, grafted, sequence

# arXiv:2506.05340 Table 1: L1 is best for attention, L2 for MLPs
LOSS_BY_ROLE: dict[Role, Regression] = {"attention": "l1", "mlp": "l2", "block": "l1"}


class DistillConfig(BaseModel):
    """Settings of stage 1. The defaults are the paper's amount of training: 8k samples x 200 epochs, batch 64."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    steps: NonNegativeInt = 25_000
    batch_size: PositiveInt = 64
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
    precision: Precision = "fp32"
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _check(self) -> "DistillConfig":
        if self.cache_samples and self.inputs == "student":
            raise ValueError(
                "cache_samples goes with inputs: teacher; a student's activations change at each step"
            )
        return self


def distill(
    teacher: nn.Module,
    operators: Mapping[str, nn.Module],
    data: TrainingData,
    config: DistillConfig,
    *,
    roles: Mapping[str, Role],
    predict: Predict,
    diffusion: Diffusion,
    cache_folder: Path | None = None,
    state: dict[str, Any] | None = None,
) -> Iterator[Step]:
    """Fit `operators` (by site path, built for `teacher`) in place. The teacher is unchanged.

    A step's values are `loss/PATH`, and when measured `holdout_loss/PATH` and `r2/PATH`: 1 minus the squared error over
    the variance of the teacher's output.

    Args:
        roles: the role of each operator's site; `block` of a merged pair.
        cache_folder: where activations go when `config.cache_samples` is set.
        state: what an earlier step's `state()` returned, to go on from there.

    Raises:
        TrainingError: too few images, or a loss is not finite.
    """
    train, held_out = _split(len(data), config)
    fitting = _Fitting(teacher, operators, data, config, roles=roles, predict=predict, diffusion=diffusion)
    first = fitting.load(state) if state else 0
    with fitting.training():
        cache = fitting.record(train, cache_folder) if config.cache_samples else None
        if first == 0:
            yield Step(
                done=0,
                total=config.steps,
                values=fitting.measure(held_out),
                state=lambda: fitting.snapshot(0),
            )
        for step in range(first, config.steps):
            if cache is None:
                indices = train[batch_indices(len(train), config.batch_size, step, config.seed)]
                values = fitting.step(step, partial(fitting.run_teacher, indices, (config.seed, step)))
            else:
                indices = batch_indices(cache.num_samples, config.batch_size, step, config.seed)
                values = fitting.step(step, partial(cache.replay, indices))
            if (step + 1) % config.holdout_every == 0 or step + 1 == config.steps:
                values |= fitting.measure(held_out)
            yield Step(
                done=step + 1,
                total=config.steps,
                values=values,
                state=partial(fitting.snapshot, step + 1),
            )


class _Fitting:
    """The operators in training: their losses, one optimizer for all, and the teacher that they are fitted to."""

    def __init__(
        self,
        teacher: nn.Module,
        operators: Mapping[str, nn.Module],
        data: TrainingData,
        config: DistillConfig,
        *,
        roles: Mapping[str, Role],
        predict: Predict,
        diffusion: Diffusion,
    ):
        self.teacher, self.operators, self.data, self.config = teacher, operators, data, config
        self.predict, self.diffusion = predict, diffusion
        # what stands where a block was only passes tokens on
        self.fitted = {path: o for path, o in operators.items() if not isinstance(o, Passage)}
        self.losses = {path: config.loss or LOSS_BY_ROLE[roles[path]] for path in self.fitted}
        device = next(teacher.parameters()).device
        for operator in operators.values():
            operator.to(device)
        self.parameters = {
            path: [p for p in operator.parameters() if p.requires_grad]
            for path, operator in self.fitted.items()
        }
        trained = [p for parameters in self.parameters.values() for p in parameters]
        # a plan of kernels that have nothing to learn is measured, not trained
        self.optimizer = torch.optim.AdamW(trained, weight_decay=config.weight_decay) if trained else None

    @contextmanager
    def training(self) -> Iterator[None]:
        """Operators and teacher in training mode: labels are dropped, so operators also see the null label of guidance."""
        for module in (self.teacher, *self.operators.values()):
            module.train()
        try:
            yield
        finally:
            for module in (self.teacher, *self.operators.values()):
                module.eval()

    def run_teacher(self, indices: Tensor, entropy: tuple[int, ...], visit: Visit) -> None:
        """Run the teacher on these images, with noise and steps drawn from `entropy`, and visit each site on the way."""
        with _visiting(self.teacher, self.operators, self.config.inputs, visit):
            run_noised(
                self.teacher,
                self.data,
                indices,
                entropy,
                predict=self.predict,
                diffusion=self.diffusion,
                precision=self.config.precision,
            )

    def step(self, step: int, run: Callable[[Visit], None]) -> dict[str, float]:
        """One step of every operator; `run` takes the teacher past the sites. Returns each site's loss."""
        values: dict[str, float] = {}

        def visit(path: str, args: tuple, kwargs: dict[str, Any], target: Any) -> None:
            with torch.enable_grad():
                loss = self._loss(path, self.operators[path].forward(*args, **kwargs), target)
            values[f"loss/{path}"] = loss.item()
            if not math.isfinite(loss.item()):
                raise TrainingError(
                    f"stage 1, step {step}, {path}: the loss is {loss.item()}. Lower lr (now {self.config.lr:g}), "
                    "use precision: fp32, or normalised: true"
                )
            if self.parameters[path]:
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.parameters[path], self.config.clip_norm)

        run(visit)
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr * learning_rate_factor(
                    step,
                    steps=self.config.steps,
                    warmup_steps=self.config.warmup_steps,
                    cooldown_steps=self.config.cooldown_steps,
                )
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return values

    def measure(self, held_out: Tensor) -> dict[str, float]:
        """Loss and R^2 of every site on held-out images, always with the same noise."""
        measured = {path: _Measured() for path in self.fitted}

        def visit(path: str, args: tuple, kwargs: dict[str, Any], target: Any) -> None:
            output = self.operators[path].forward(*args, **kwargs)
            measured[path].update(self._loss(path, output, target), output, target)

        for number, indices in enumerate(held_out.split(self.config.batch_size)):
            self.run_teacher(indices, (self.config.seed, number, 1, 1), visit)
        losses = {f"holdout_loss/{path}": site.loss for path, site in measured.items()}
        return losses | {f"r2/{path}": site.r2 for path, site in measured.items()}

    def record(self, train: Tensor, folder: Path | None) -> ActivationCache:
        """The teacher's activations on the first `cache_samples` noised samples, on disk."""
        config = self.config
        if folder is None:
            raise TrainingError("cache_samples is set, but there is no folder for the activations")
        assert config.cache_samples is not None
        chosen = train[torch.arange(config.cache_samples) % len(train)].split(config.batch_size)
        cache = ActivationCache(folder, config.cache_samples)
        cache.fill(
            partial(self.run_teacher, indices, (config.seed, number, 1, 2))
            for number, indices in enumerate(chosen)
        )
        return cache

    def snapshot(self, step: int) -> dict[str, Any]:
        """All that is needed to go on after `step` steps."""
        return {
            "step": step,
            "operators": {path: operator.state_dict() for path, operator in self.fitted.items()},
            "optimizer": self.optimizer.state_dict() if self.optimizer else {},
        }

    def load(self, state: dict[str, Any]) -> int:
        """Take up a snapshot; returns its step."""
        for path, operator in self.fitted.items():
            operator.load_state_dict(state["operators"][path])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        return state["step"]

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


class _Measured:
    """Running loss and R^2 of one site over held-out batches."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._error = self._total = 0.0

    def update(self, loss: Tensor, output: Any, target: Any) -> None:
        self._losses.append(loss.item())
        for y, want in zip(_tensors(output), _tensors(target), strict=True):
            want = want.double()
            self._error += (y.double() - want).square().sum().item()
            self._total += (want - want.mean(dim=tuple(range(want.ndim - 1)))).square().sum().item()

    @property
    def loss(self) -> float:
        return sum(self._losses) / len(self._losses)

    @property
    def r2(self) -> float:
        return 1 - self._error / max(self._total, 1e-30)


@contextmanager
def _visiting(
    teacher: nn.Module, operators: Mapping[str, nn.Module], inputs: str, visit: Visit
) -> Iterator[None]:
    """While the teacher runs, `visit` each site with its call's arguments and what the old modules give for them."""
    fitted = {path: o for path, o in operators.items() if not isinstance(o, Passage)}
    old = {path: _replaced(teacher, path, operator) for path, operator in fitted.items()}
    if inputs == "teacher":
        first, last = ({path: blocks[end] for path, blocks in old.items()} for end in (0, -1))
        with visiting(first, visit, until=last):
            yield
        return

    def visit_student(path: str, args: tuple, kwargs: dict[str, Any], _: Any) -> None:
        operator = fitted[path]
        if isinstance(operator, MergedBlocks):
            visit(path, args, kwargs, sequence(old[path], operator.call, args, kwargs))
        else:
            visit(path, args, kwargs, old[path][0](*args, **kwargs))

    with grafted(teacher, operators), visiting(fitted, visit_student):
        yield


def _replaced(teacher: nn.Module, path: str, operator: nn.Module) -> list[nn.Module]:
    """The teacher's modules in whose place an operator stands, in the order in which they run."""
    paths = operator.paths if isinstance(operator, MergedBlocks) else (path,)
    return [teacher.get_submodule(path) for path in paths]


def _split(num_items: int, config: DistillConfig) -> tuple[Tensor, Tensor]:
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

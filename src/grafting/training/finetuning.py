"""Stage 2: train a model end to end with its diffusion loss, the teacher's outputs as targets, or both.

A generator of steps: it knows no file, logger or progress bar. Every draw of step s comes from (seed, s), for the whole
batch, so a run resumed from any step's state equals an uninterrupted one, and several processes train as one. Pretraining is
the same loop on a fresh model.
"""

import copy
import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..contract import Denoiser, Step, TrainingData
from ..errors import CheckpointError, TrainingError
from ..hosts import host_of
from ..machine import processes
from ..machine.devices import default_device, half_types, mixed_precision
from ..machine.precision import FP32_IS_ABSENT, Precision, settled
from ..machine.randomness import seeded
from ..machine.sharding import ShardedState, copy_whole, read_facts, read_tensors, shard
from .average import Average
from .batches import Batches, NoisedBatch, check_batch_size
from .guard import GuardConfig
from .trainee import Trainee

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin


class FinetuneConfig(BaseModel):
    """Settings of stage 2. The defaults are the paper's (arXiv:2506.05340, section 5)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    hashed_as_absent: ClassVar = FP32_IS_ABSENT
    how_it_runs: ClassVar[frozenset[str]] = frozenset({"accumulate", "ema_device"})
    """Fields that change no result beyond rounding: a run may be resumed with others."""

    steps: NonNegativeInt = 50_000
    batch_size: PositiveInt = 256
    """Images per step, over all processes and micro-batches."""
    accumulate: PositiveInt = 1
    """Micro-batches into which each process cuts its share of a step, to need less memory."""
    lr: PositiveFloat = 1e-4
    warmup_steps: NonNegativeInt = 1000
    cooldown_steps: NonNegativeInt = 0
    """Last steps, in which the learning rate falls linearly to zero."""
    halve_at: tuple[PositiveInt, ...] = ()
    """Steps from which on the learning rate is half of what it was."""
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: PositiveFloat = 10.0
    """Largest norm of the gradient of all trained parameters."""
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    ema_device: Literal["model", "cpu"] = "model"
    """Device of the averaged weights; on the CPU they cost a copy of the weights at every step."""
    diffusion_weight: NonNegativeFloat = 1.0
    """Weight of the host's diffusion loss; if omitted for a distilled model, 0."""
    output_weight: NonNegativeFloat = 0.0
    """Weight of the squared distance to the teacher's prediction (noise and variance); 1 if both are omitted for a distilled
    model."""
    trainable: Literal["all", "new"] | tuple[str, ...] = "all"
    """All parameters, only those of new operators, or those whose names match one of these patterns."""
    precision: Precision = "auto"
    """fp32 or bf16; `auto` is bf16 where the device is faster in it."""
    gradient_checkpointing: bool = False
    compile: bool = False
    """Compile each block, once for all blocks of a kind."""
    shard: bool = False
    """Spread weights, gradients, optimizer and averaged weights over the processes (FSDP2), block by block. States are then
    folders from which any number of processes can resume."""
    guard: GuardConfig | None = None
    """Handling of bad steps; if omitted, a non-finite loss or gradient is an error."""
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _check(self) -> "FinetuneConfig":
        if self.shard and self.ema_device == "cpu":
            raise ValueError(
                "ema_device: cpu cannot be combined with shard, which spreads averaged weights as it does weights"
            )
        return self


def finetune(
    model: nn.Module,
    data: TrainingData,
    config: FinetuneConfig,
    *,
    denoiser: Denoiser | None = None,
    blocks: Sequence[str] = (),
    teacher: nn.Module | None = None,
    new_parameters: frozenset[str] = frozenset(),
    state: dict[str, Any] | Path | None = None,
) -> Iterator[Step]:
    """Train `model` in place; when the iterator ends the model holds the averaged (EMA) weights.

    With several processes (see `machine.processes`) each runs this on the same arguments and takes its share of every batch; the
    values of a step are means over them.

    Args:
        model: the grafted model.
        data: images or latents with the numbers of their conditions.
        denoiser: how a model is called, its process and loss, and its conditions, which are dropped in their share;
            by default the host's.
        blocks: paths of the model's blocks, which `compile` and `shard` treat one by one.
        teacher: the pretrained model, needed when `output_weight` is positive.
        new_parameters: names of the parameters of new operators, for `trainable: new`.
        state: what an earlier step's `state()` returned, or the folder that it wrote, to resume from there.

    Raises:
        CheckpointError: the state is of another model, or of another way to train.
        TrainingError: nothing to train, no objective, a teacher is missing, a batch does not divide among processes, or
            the loss is not finite.
    """
    denoiser, device = denoiser or host_of(model).denoiser(model), default_device()
    config = with_objective(config, distilled=denoiser.distilled)
    _check(config, teacher, blocks)
    config = settled(config, device, together=True)
    _select_parameters(model, config.trainable, new_parameters)
    student = _Student(model, blocks, config, denoiser)
    batches = Batches(data, config, denoiser=denoiser, device=device, share=processes.share())
    training = _Training(student, batches, config, teacher.to(device).eval() if teacher is not None else None)
    first = training.load(state) if state is not None else 0
    yield from batches.steps(first, training.step, training.snapshot)
    training.finish()


class _Student:
    """The model as it is trained: compiled block by block, and by several processes, together or each a part of it."""

    def __init__(self, model: nn.Module, blocks: Sequence[str], config: FinetuneConfig, denoiser: Denoiser):
        self.model = self.result = model
        device = default_device()
        if config.shard and processes.connect():
            # the copy is spread; what it was copied from waits for the result
            self.model = copy.deepcopy(model).to(device)
            model.to("cpu")
        self.model.to(device).train()
        if config.gradient_checkpointing:
            cast("ModelMixin", self.model).enable_gradient_checkpointing()
        modules = [self.model.get_submodule(path) for path in blocks]
        self.compiled = modules if config.compile else []
        for block in self.compiled:
            block.compile()
        self.call: nn.Module = _Call(self.model, denoiser)
        if self.model is not model:
            shard(self.call, modules, device)
        elif processes.connect():
            # every process begins with the main one's weights
            devices = None if device.type == "cpu" else [device]
            self.call = DistributedDataParallel(self.call, device_ids=devices)

    def __call__(self, batch: NoisedBatch) -> Tensor:
        return self.call(batch.x_t, batch.t, batch.numbers)

    def gradients_averaged(self, averaged: bool) -> AbstractContextManager:
        """Inside, whether a backward pass averages gradients over processes; those that do not are added up here."""
        if isinstance(self.call, DistributedDataParallel) and not averaged:
            return self.call.no_sync()
        return nullcontext()

    def finish(self) -> None:
        """Leave the weights in the model that was given."""
        for block in self.compiled:
            block._compiled_call_impl = None
        if self.model is not self.result:
            copy_whole(self.model, self.result.to(default_device()))
        self.result.eval()


class _Call(nn.Module):
    """A model as its host calls it, so that what averages gradients over processes stands outside of that call."""

    def __init__(self, model: nn.Module, denoiser: Denoiser):
        super().__init__()
        self.model, self.denoiser = model, denoiser

    def forward(self, x_t: Tensor, t: Tensor, numbers: Tensor) -> Tensor:
        prediction = self.denoiser(self.model, x_t, t, numbers)
        # FSDP wants no view as the result: an operation in place on it would lose its hook
        return prediction.clone() if prediction._is_view() else prediction


class _Training:
    """A student in training, its averaged weights, and the teacher that it is compared with."""

    def __init__(
        self, student: _Student, batches: Batches, config: FinetuneConfig, teacher: nn.Module | None
    ):
        self.student, self.batches, self.config, self.teacher = student, batches, config, teacher
        parameters = [p for p in student.model.parameters() if p.requires_grad]
        on_cpu = torch.device("cpu") if config.ema_device == "cpu" else None
        self.average = Average(parameters, decay=config.ema_decay, device=on_cpu)
        parts = {"model": student.model, "ema": self.average}
        self.trainee = Trainee(parts, parameters, config, betas=config.betas, halve_at=config.halve_at)
        if config.shard and self.trainee.optimizer is not None:
            _fill(self.trainee.optimizer)

    def step(self, step: int) -> dict[str, float]:
        """Take a step, or do what the guard says; returns its figures."""
        trainee, lr = self.trainee, self.trainee.learning_rate(step)
        trainee.keep(step)
        losses = self._gradients(step)
        figures = {"loss": losses.pop("loss"), "lr": lr, "grad_norm": trainee.clip().item()} | losses
        finding = trainee.guard.judge({name: figures[name] for name in ("loss", "grad_norm")})
        if finding and trainee.guard.stops:
            raise TrainingError(
                f"stage 2, step {step}: loss {figures['loss']}, gradient norm {figures['grad_norm']}; the model is as it "
                f"was after step {step - 1}. Lower lr (now {lr:g}) or use precision: fp32{trainee.guard.why()}"
            )
        told = trainee.settle(step, finding)
        if not finding:
            self.average.step()
        # JSON has no words for the others
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        return finite | {f"guard/{name}": value for name, value in told.items()}

    def _gradients(self, step: int) -> dict[str, float]:
        """Take the gradients of a step; its losses, as means over processes."""
        sums: dict[str, Tensor] = {}
        parts = self.batches.at(step)
        for number, part in enumerate(parts):
            with self.student.gradients_averaged(number + 1 == len(parts)):
                losses = self._losses(part, (self.config.seed, step, processes.rank(), 1, number))
                (losses["loss"] / len(parts)).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / len(parts)
        return dict(zip(sums, processes.mean([value.item() for value in sums.values()]), strict=True))

    def _losses(self, batch: NoisedBatch, entropy: tuple[int, ...]) -> dict[str, Tensor]:
        """Mean losses of a batch: `loss`, of which gradients are taken, and its parts."""
        config, denoiser = self.config, self.batches.denoiser
        precision = partial(mixed_precision, self.batches.device, config.precision)
        losses: dict[str, Tensor] = {}
        with seeded(*entropy), precision():
            prediction = self.student(batch)
        if config.diffusion_weight:
            per_item = denoiser.process.loss(
                prediction, x=batch.x, x_t=batch.x_t, noise=batch.noise, t=batch.t
            )
            losses["diffusion"] = per_item.mean()
        if config.output_weight:
            assert self.teacher is not None
            with torch.no_grad(), precision():
                target = denoiser(self.teacher, batch.x_t, batch.t, batch.numbers)
            losses["output"] = (prediction.float() - target.float()).square().mean()
        weights = {"diffusion": config.diffusion_weight, "output": config.output_weight}
        return losses | {"loss": torch.stack([weights[name] * value for name, value in losses.items()]).sum()}

    def snapshot(self, step: int) -> dict[str, Any] | ShardedState:
        """State needed to resume after `step` steps."""
        guard = self.trainee.guard
        state = {"step": step, **self.trainee.state(step), "guard": guard.state()}
        if "kept" in state:
            state["kept"] = state["kept"] | {"step": guard.returns_to(step)}
        if not self.config.shard:
            return state
        kept = {"kept": _numbers(state["kept"])} if "kept" in state else {}
        return ShardedState(state, _numbers(state) | {"guard": state["guard"]} | kept)

    def load(self, state: Mapping[str, Any] | Path) -> int:
        """Take up a snapshot; returns its step."""
        if isinstance(state, Path) != self.config.shard:
            raise CheckpointError(
                f"stage 2's saved state was made with shard: {isinstance(state, Path)}, the recipe says "
                f"{self.config.shard}: resume with the same setting, or delete the stage's folder to restart the stage"
            )
        if isinstance(state, Path):
            state = self._read(state)
        self.trainee.load(state)
        if "guard" in state:
            self.trainee.guard.load(state["guard"])
        return state["step"]

    def _read(self, folder: Path) -> dict[str, Any]:
        """A sharded state, in tensors that are spread as this run's are."""
        facts = read_facts(folder)
        state = self.trainee.weights()
        if "kept" in facts:
            state["kept"] = copy.deepcopy(state)
        read_tensors(folder, state)
        _set_numbers(state, facts)
        if "kept" in facts:
            _set_numbers(state["kept"], facts["kept"])
        return state | {"guard": facts["guard"]}

    def finish(self) -> None:
        """Leave the averaged weights in the model."""
        self.average.copy_to_parameters()
        self.student.finish()


def _fill(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer its tensors, which it makes at its first step, so that a state can be read into them."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for moments in optimizer.state.values():
        moments["step"].zero_()


def _numbers(state: Mapping[str, Any]) -> dict[str, int]:
    """Parts of a state that are not tensors."""
    return {"step": state["step"], "ema_steps": state["ema"]["optimization_step"]}


def _set_numbers(state: dict[str, Any], numbers: Mapping[str, int]) -> None:
    state["step"], state["ema"]["optimization_step"] = numbers["step"], numbers["ema_steps"]


def with_objective(config: FinetuneConfig, *, distilled: bool) -> FinetuneConfig:
    """The same, with a distilled model's objective where it does not name the process's loss: the teacher's output alone."""
    if not distilled or "diffusion_weight" in config.model_fields_set:
        return config
    return config.model_copy(update={"diffusion_weight": 0.0, "output_weight": config.output_weight or 1.0})


def check_division(config: FinetuneConfig) -> None:
    """Raises a TrainingError if a batch does not divide among processes and micro-batches."""
    check_batch_size(
        "stage 2", config.batch_size, processes=processes.world_size(), accumulate=config.accumulate
    )


def _check(config: FinetuneConfig, teacher: nn.Module | None, blocks: Sequence[str]) -> None:
    check_division(config)
    for name in ("compile", "shard"):
        if getattr(config, name) and not blocks:
            raise TrainingError(f"stage 2 is to {name} block by block, but no blocks are named")
    if not (config.diffusion_weight or config.output_weight):
        raise TrainingError("stage 2 has no objective: diffusion_weight and output_weight are both 0")
    if config.output_weight and teacher is None:
        raise TrainingError("output_weight is positive, but there is no teacher to take outputs from")


def _select_parameters(
    model: nn.Module, trainable: str | tuple[str, ...], new_parameters: frozenset[str]
) -> None:
    """Marks what is trained; fixed parameters (such as positions) stay fixed."""
    candidates = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if trainable == "all":
        chosen = set(candidates)
    elif trainable == "new":
        chosen = set(candidates) & new_parameters
    else:
        chosen = {n for n in candidates if any(fnmatch.fnmatch(n, pattern) for pattern in trainable)}
    if not chosen:
        raise TrainingError(
            f"trainable: {trainable!r} selects none of the model's {len(candidates)} parameters, "
            f"such as {next(iter(candidates), 'none')}"
        )
    if half := half_types(candidates[name] for name in chosen):
        raise TrainingError(
            f"stage 2: the weights to train are {half}, in which most of an optimizer's steps round "
            "away: call model.float() first; with precision: bf16 it is computed in bf16 all the same"
        )
    for name, parameter in candidates.items():
        parameter.requires_grad_(name in chosen)

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
from typing import Any, ClassVar, Literal

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

from . import parallel
from .contract import Denoiser, Step, TrainingData
from .data.loader import Loader
from .devices import default_device, half_types, mixed_precision
from .errors import CheckpointError, TrainingError
from .functional.schedule import learning_rate_factor
from .guard import Guard, GuardConfig
from .hosts import host_of
from .noising import NoisedBatch, check_batch_size, draw_noised
from .precision import FP32_IS_ABSENT, Precision, settled
from .randomness import seeded
from .sharding import ShardedState, copy_whole, kept_copy, read_facts, read_tensors, shard, whole


class FinetuneConfig(BaseModel):
    """Settings of stage 2. The defaults are the paper's (arXiv:2506.05340, section 5)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    hashed_as_absent: ClassVar = FP32_IS_ABSENT
    how_it_runs: ClassVar[frozenset[str]] = frozenset({"accumulate", "ema_device"})
    """Fields that change no result beyond rounding: a run may be resumed with others."""

    steps: NonNegativeInt = 50_000
    batch_size: PositiveInt = 256
    """Images a step, over all processes and micro-batches."""
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
    """Where the averaged weights are kept; on the CPU they cost a copy of the weights at every step."""
    diffusion_weight: NonNegativeFloat = 1.0
    """Weight of the host's diffusion loss."""
    output_weight: NonNegativeFloat = 0.0
    """Weight of the squared distance to the teacher's prediction (noise and variance)."""
    trainable: Literal["all", "new"] | tuple[str, ...] = "all"
    """All parameters, only those of new operators, or those whose names match one of these patterns."""
    precision: Precision = "auto"
    """fp32 or bf16; `auto` is bf16 where the device is faster in it."""
    gradient_checkpointing: bool = False
    compile: bool = False
    """Compile each block, once for all blocks of a kind."""
    shard: bool = False
    """Spread weights, gradients, optimizer and averaged weights over the processes (FSDP2), block by block. States are then
    folders that any number of processes can go on from."""
    guard: GuardConfig | None = None
    """What to do with bad steps; left out, a loss or gradient that is not finite is an error."""
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _check(self) -> "FinetuneConfig":
        if self.shard and self.ema_device == "cpu":
            raise ValueError(
                "ema_device: cpu goes without shard, which spreads averaged weights as it does weights"
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

    With several processes (see `parallel`) each runs this on the same arguments and takes its share of every batch; the
    values of a step are means over them.

    Args:
        model: the grafted model.
        data: images or latents with the numbers of their conditions.
        denoiser: how a model is called, its process and loss, and its conditions, which are dropped in their share;
            by default the host's.
        blocks: paths of the model's blocks, which `compile` and `shard` treat one by one.
        teacher: the pretrained model, needed when `output_weight` is positive.
        new_parameters: names of the parameters of new operators, for `trainable: new`.
        state: what an earlier step's `state()` returned, or the folder that it wrote, to go on from there.

    Raises:
        CheckpointError: the state is of another model, or of another way to train.
        TrainingError: nothing to train, no objective, a teacher is missing, a batch does not divide among processes, or
            the loss is not finite.
    """
    _check(config, teacher, blocks)
    config = settled(config, default_device(), together=True)
    denoiser = denoiser or host_of(model).denoiser(model)
    training = _Training(
        model,
        data,
        config,
        denoiser=denoiser,
        blocks=blocks,
        teacher=teacher,
        new_parameters=new_parameters,
    )
    first = training.load(state) if state is not None else 0
    with training.loader as loader:
        for step in range(first, config.steps):
            waited = loader.seconds_waited
            values = training.step(step)
            yield Step(
                done=step + 1,
                total=config.steps,
                values=values,
                state=partial(training.snapshot, step + 1),
                seconds_waited=loader.seconds_waited - waited,
            )
    training.finish()


class _Training:
    """A model in training: its optimizer, its averaged weights, the guard, and the teacher that it is compared with."""

    def __init__(
        self,
        model: nn.Module,
        data: TrainingData,
        config: FinetuneConfig,
        *,
        denoiser: Denoiser,
        blocks: Sequence[str],
        teacher: nn.Module | None,
        new_parameters: frozenset[str],
    ):
        self.model, self.config = model, config
        self.denoiser = denoiser
        self.device = default_device()
        self.loader = Loader(
            data,
            config.batch_size,
            seed=config.seed,
            steps=config.steps,
            share=parallel.share(),
            pin=self.device.type != "cpu",
        )
        _select_parameters(model, config.trainable, new_parameters)
        self.whole_model = model
        if config.shard and parallel.connect():
            # the copy is spread; what it was copied from waits for the result
            self.model = model = copy.deepcopy(model).to(self.device)
            self.whole_model.to("cpu")
        model.to(self.device)
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        self.compiled = [model.get_submodule(path) for path in blocks] if config.compile else []
        for block in self.compiled:
            block.compile()
        model.train()
        student = _Student(model, denoiser)
        if self.model is not self.whole_model:
            shard(student, [model.get_submodule(path) for path in blocks], self.device)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        if config.shard:
            self._fill_optimizer()
        self.average = _Average(self.trained, config)
        self.guard = Guard(config.guard)
        self.kept: dict[str, Any] | None = None
        self.teacher = teacher.to(self.device).eval() if teacher is not None else None
        averages = parallel.connect() and not config.shard
        self.student = _averaging(student, self.device) if averages else student

    def step(self, step: int) -> dict[str, float]:
        """Take a step, or do what the guard says; returns its figures."""
        config, guard = self.config, self.guard
        if guard.keeps_at(step):
            self.kept = kept_copy(self._weights() | {"step": step})
        lr = self._set_learning_rate(step)
        sums: dict[str, Tensor] = {}
        parts = self._draw(step).split(config.accumulate)
        for number, part in enumerate(parts):
            with self._gradients_averaged(number + 1 == len(parts)):
                losses = self._losses(part, (config.seed, step, parallel.rank(), 1, number))
                (losses["loss"] / len(parts)).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / len(parts)
        norm = whole(nn.utils.clip_grad_norm_(self.trained, config.clip_norm))
        figures = dict(zip(sums, parallel.mean([value.item() for value in sums.values()]), strict=True))
        values = {"loss": figures.pop("loss"), "lr": lr, "grad_norm": norm.item()} | figures
        finding = guard.judge({name: values[name] for name in ("loss", "grad_norm")})
        if not finding:
            self.optimizer.step()
            self.average.step(self.trained)
        elif guard.stops:
            raise TrainingError(
                f"stage 2, step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; the model is as it "
                f"was after step {step - 1}. Lower lr (now {lr:g}) or use precision: fp32{guard.why()}"
            )
        elif guard.rolls_back:
            assert self.kept is not None
            self._restore(self.kept)
        self.optimizer.zero_grad(set_to_none=True)
        return values if not finding else _told(values, finding, guard, self.kept)

    def _losses(self, batch: NoisedBatch, entropy: tuple[int, ...]) -> dict[str, Tensor]:
        """Mean losses of a batch: `loss`, of which gradients are taken, and its parts."""
        config = self.config
        losses: dict[str, Tensor] = {}
        with seeded(*entropy), mixed_precision(self.device, config.precision):
            prediction = self.student(batch.x_t, batch.t, batch.numbers)
        if config.diffusion_weight:
            x, noise, x_t, t = batch.x, batch.noise, batch.x_t, batch.t
            per_item = self.denoiser.process.loss(prediction, x=x, x_t=x_t, noise=noise, t=t)
            losses["diffusion"] = per_item.mean()
        if config.output_weight:
            assert self.teacher is not None
            with torch.no_grad(), mixed_precision(self.device, config.precision):
                target = self.denoiser(self.teacher, batch.x_t, batch.t, batch.numbers)
            losses["output"] = (prediction.float() - target.float()).square().mean()
        weights = {"diffusion": config.diffusion_weight, "output": config.output_weight}
        return losses | {"loss": torch.stack([weights[name] * value for name, value in losses.items()]).sum()}

    def _draw(self, step: int) -> NoisedBatch:
        """This process's share of a step's batch."""
        images = self.loader.at(step)
        with seeded(self.config.seed, step) as draw:
            return draw_noised(
                images,
                draw,
                batch_size=self.config.batch_size,
                denoiser=self.denoiser,
                device=self.device,
                part=parallel.share(),
            )

    def _gradients_averaged(self, averaged: bool) -> AbstractContextManager:
        """Inside, whether a backward pass averages gradients over processes; those that do not are added up here."""
        waits = isinstance(self.student, DistributedDataParallel) and not averaged
        return self.student.no_sync() if waits else nullcontext()

    def _set_learning_rate(self, step: int) -> float:
        """Set the scheduled rate, as far as the guard has not lowered it, and return it."""
        config = self.config
        lr = (
            self.guard.lr_factor
            * config.lr
            * learning_rate_factor(
                step,
                steps=config.steps,
                warmup_steps=config.warmup_steps,
                cooldown_steps=config.cooldown_steps,
                halve_at=config.halve_at,
            )
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _weights(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.average.state_dict(),
        }

    def _restore(self, weights: Mapping[str, Any]) -> None:
        self.model.load_state_dict(weights["model"])
        # an optimizer takes tensors over as they are
        self.optimizer.load_state_dict(copy.deepcopy(weights["optimizer"]))
        self.average.load_state_dict(weights["ema"])

    def snapshot(self, step: int) -> dict[str, Any] | ShardedState:
        """All that is needed to go on after `step` steps."""
        state = {"step": step, **self._weights(), "guard": self.guard.state()}
        if self.kept is not None and not self.guard.keeps_at(
            step
        ):  # else this state is itself the one to keep
            state["kept"] = self.kept
        if not self.config.shard:
            return state
        kept = {"kept": _numbers(state["kept"])} if "kept" in state else {}
        return ShardedState(state, _numbers(state) | {"guard": state["guard"]} | kept)

    def load(self, state: Mapping[str, Any] | Path) -> int:
        """Take up a snapshot; returns its step."""
        if isinstance(state, Path) != self.config.shard:
            raise CheckpointError(
                f"stage 2's saved state was made with shard: {isinstance(state, Path)}, the recipe says "
                f"{self.config.shard}: go on as it began, or delete the stage's folder to start anew"
            )
        if isinstance(state, Path):
            state = self._read(state)
        self._restore(state)
        if "guard" in state:
            self.guard.load(state["guard"])
        self.kept = state.get("kept")
        return state["step"]

    def _read(self, folder: Path) -> dict[str, Any]:
        """A sharded state, in tensors that are spread as this run's are."""
        facts = read_facts(folder)
        state = self._weights()
        if "kept" in facts:
            state["kept"] = copy.deepcopy(state)
        read_tensors(folder, state)
        _set_numbers(state, facts)
        if "kept" in facts:
            _set_numbers(state["kept"], facts["kept"])
        return state | {"guard": facts["guard"]}

    def _fill_optimizer(self) -> None:
        """Give the optimizer its tensors, which it makes at its first step, so that a state can be read into them."""
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for moments in self.optimizer.state.values():
            moments["step"].zero_()

    def finish(self) -> None:
        """Leave the averaged weights in the model."""
        self.average.copy_to(self.trained)
        for block in self.compiled:
            block._compiled_call_impl = None
        if self.model is not self.whole_model:
            copy_whole(self.model, self.whole_model.to(self.device))
        self.whole_model.eval()


def _numbers(state: Mapping[str, Any]) -> dict[str, int]:
    """What of a state is no tensor."""
    return {"step": state["step"], "ema_steps": state["ema"]["optimization_step"]}


def _set_numbers(state: dict[str, Any], numbers: Mapping[str, int]) -> None:
    state["step"], state["ema"]["optimization_step"] = numbers["step"], numbers["ema_steps"]


class _Average:
    """An exponential moving average of parameters, faster at the start: the decay of step s is at most (1 + s) / (10 + s).

    Source: the default schedule of diffusers' `EMAModel`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], config: FinetuneConfig):
        self.decay = config.ema_decay
        self.num_steps = 0
        device = torch.device("cpu") if config.ema_device == "cpu" else None
        self.shadows = [p.detach().to(device=device, copy=True) for p in parameters]

    @torch.no_grad()
    def step(self, parameters: Sequence[nn.Parameter]) -> None:
        self.num_steps += 1
        s = self.num_steps - 1
        decay = min((1 + s) / (10 + s), self.decay) if s else 0.0
        for shadow, parameter in zip(self.shadows, parameters, strict=True):
            shadow.sub_((1 - decay) * (shadow - parameter.to(shadow.device)))

    @torch.no_grad()
    def copy_to(self, parameters: Sequence[nn.Parameter]) -> None:
        for shadow, parameter in zip(self.shadows, parameters, strict=True):
            parameter.copy_(shadow)

    def state_dict(self) -> dict[str, Any]:
        return {"optimization_step": self.num_steps, "shadow_params": self.shadows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_steps = state["optimization_step"]
        for shadow, saved in zip(self.shadows, state["shadow_params"], strict=True):
            shadow.copy_(saved)


class _Student(nn.Module):
    """A model as its host calls it, so that what averages gradients over processes stands outside of that call."""

    def __init__(self, model: nn.Module, denoiser: Denoiser):
        super().__init__()
        self.model, self.denoiser = model, denoiser

    def forward(self, x_t: Tensor, t: Tensor, numbers: Tensor) -> Tensor:
        prediction = self.denoiser(self.model, x_t, t, numbers)
        # FSDP wants no view as the result: an operation in place on it would lose its hook
        return prediction.clone() if prediction._is_view() else prediction


def _averaging(student: nn.Module, device: torch.device) -> nn.Module:
    """The same behind torch's data parallelism; every process begins with the main one's weights."""
    devices = None if device.type == "cpu" else [device]
    return DistributedDataParallel(student, device_ids=devices)


def _told(
    values: dict[str, float], finding: Mapping[str, float], guard: Guard, kept: Mapping[str, Any] | None
) -> dict[str, float]:
    """The figures of a step that was not taken, as far as JSON has words for them, and what was done instead."""
    done = {"skipped": 1.0}
    if guard.rolls_back and kept is not None:
        done = {"rolled_back_to": float(kept["step"]), "lr_factor": guard.lr_factor}
    told = {f"guard/{name}": value for name, value in (finding | done).items()}
    return {name: value for name, value in values.items() if math.isfinite(value)} | told


def check_division(config: FinetuneConfig) -> None:
    """Raises a TrainingError if a batch does not divide among processes and micro-batches."""
    check_batch_size(
        "stage 2", config.batch_size, processes=parallel.world_size(), accumulate=config.accumulate
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

"""Stage 2: train a model end to end with its diffusion loss, the teacher's outputs as targets, or both; in phases.

A generator of steps: it knows no file, logger or progress bar. Every draw of step s comes from (seed, s), for the whole
batch, so a run resumed from any step's state equals an uninterrupted one, and several processes train as one. Steps count
on through the phases; each phase begins with the averaged weights of the one before. Pretraining is the same loop on a
fresh model.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NotRequired

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from ..contract import Denoiser, State, Step
from ..editing.adapters import adapters_of
from ..editing.surgery import keep_apart, merge_adapters
from ..errors import CheckpointError, TrainingError
from ..hosts import host_of
from ..machine import processes
from ..machine.compiling import compiled
from ..machine.devices import default_device, mixed_precision, reading
from ..machine.precision import settled
from ..machine.randomness import seeded
from ..machine.sharding import ShardedState, read_facts, read_tensors
from .average import Average
from .batches import Batches, NoisedBatch
from .guard import GuardState, check_weights
from .levels import NoiseLevels, level_means
from .phases import FinetuneConfig as FinetuneConfig
from .phases import check_phases, phases_of, with_objectives
from .student import Student, block_linears, held_in_bf16
from .supply import Data, has_clean, supply_of
from .trained import Trained, mark, names_of, operator_parameters, selections
from .trainee import Trainee, adamw, take_step


def finetune(
    model: nn.Module,
    data: Data,
    config: FinetuneConfig | Sequence[FinetuneConfig],
    *,
    trainable: Any = None,
    denoiser: Denoiser | None = None,
    blocks: Sequence[str] = (),
    teacher: nn.Module | None = None,
    new_parameters: frozenset[str] | None = None,
    state: State | Path | None = None,
) -> Iterator[Step]:
    """Train `model` in place; when the iterator ends the model holds the averaged (EMA) weights.

    With several processes (see `machine.processes`) each runs this on the same arguments and takes its share of every batch; the
    values of a step are means over them.

    Args:
        model: the grafted model.
        data: images or latents with the numbers of their conditions, or states along the teacher's own trajectories, whose only
            objective is the teacher's output.
        config: of the one phase, or of each phase in turn.
        trainable: what is trained, in the place of what a config of one phase says, such as `{"lora": {"rank": 16}}`.
        denoiser: how a model is called, its process and loss, and its conditions, which are dropped in their share;
            by default the host's.
        blocks: paths of the model's blocks, which `compile`, `shard` and `frozen: bf16` treat one by one.
        teacher: the pretrained model, needed when `output_weight` is positive. The model may share memory with it: what is
            trained gets memory of its own first.
        new_parameters: names of the parameters of new operators, for `trainable: new`; by default of all that stand in the
            model.
        state: what an earlier step's `state()` returned, or the folder that it wrote, to resume from there.

    Raises:
        CheckpointError: the state is of another model, or of another way to train.
        TrainingError: nothing to train, no objective, a teacher is missing, a batch does not divide among processes, or
            weights or the loss are not finite.
        DataError: an image is not finite.
        MissingBackend: adapters are to be trained, and peft is not installed.
    """
    denoiser = denoiser or host_of(model).denoiser(model)
    given = phases_of(config if trainable is None else _with_trainable(config, trainable))
    phases = with_objectives(given, by_output=denoiser.distilled or not has_clean(data))
    check_phases(phases, has_teacher=teacher is not None, has_blocks=bool(blocks), has_clean=has_clean(data))
    for weights in (model, *([] if teacher is None else [teacher])):
        check_weights(weights, "stage 2")
    device = default_device()
    if adapters_of(model):
        raise TrainingError(
            "the model holds adapters that no weights have taken up: merge_adapters(model) first"
        )
    phases = tuple(settled(phase, device, together=True) for phase in phases)
    if any(phase.frozen == "bf16" and phase.precision == "fp32" for phase in phases):
        raise TrainingError("stage 2: frozen: bf16 requires precision: bf16, and auto is fp32 on this device")
    teacher = teacher.to(device).eval() if teacher is not None else None
    new = operator_parameters(model) if new_parameters is None else new_parameters
    candidates, selected_of = selections(model, phases, new)
    run = _Run(model, data, denoiser, blocks, teacher, total=sum(phase.steps for phase in phases))
    resumed, first = _step_of(state), 0
    for number, (phase, selected) in enumerate(zip(phases, selected_of, strict=True), start=1):
        last = first + phase.steps
        if resumed <= last:  # else the state is a later phase's, and holds what this one made
            trained = mark(model, candidates, selected, phase, first=first)
            named = number if len(phases) > 1 else None
            yield from run.phase(phase, trained, first=first, number=named, state=state)
            state = None
        run.changed += selected.changed
        first = last
    for parameter in candidates.values():
        parameter.requires_grad_()


def _with_trainable(config: FinetuneConfig | Sequence[FinetuneConfig], trainable: Any) -> FinetuneConfig:
    if not isinstance(config, FinetuneConfig):
        raise TrainingError("trainable goes with one config; of several phases each says its own")
    return FinetuneConfig.model_validate(config.model_dump(exclude_unset=True) | {"trainable": trainable})


def _step_of(state: State | Path | None) -> int:
    """Steps taken before a state; 0 where there is none."""
    if state is None:
        return 0
    return read_facts(state, _Facts)["step"] if isinstance(state, Path) else state["step"]


@dataclass
class _Run:
    """What all phases have in common, and the parameters that those before have changed."""

    model: nn.Module
    data: Data
    denoiser: Denoiser
    blocks: Sequence[str]
    teacher: nn.Module | None
    total: int
    changed: list[nn.Parameter] = field(default_factory=list)

    def phase(
        self,
        config: FinetuneConfig,
        trained: Sequence[nn.Parameter],
        *,
        first: int,
        number: int | None,
        state: State | Path | None,
    ) -> Iterator[Step]:
        """Carry out one phase, from its start or from a state of it.

        Args:
            first: steps before it.
            number: of the phase, where there are several.
        """
        model, device = self.model, default_device()
        kept = [*self.changed, *trained]
        if self.teacher is not None:
            keep_apart(kept, self.teacher)
        with held_in_bf16(self._held(kept) if config.frozen == "bf16" else []):
            student = Student(model, self.blocks, config, self.denoiser)
            names, end, share = names_of(kept, model), first + config.steps, processes.share()
            supply = supply_of(
                self.data, self.denoiser, teacher=self.teacher, device=device, precision=config.precision
            )
            feed = supply.steps(config, share=share, end=end)
            batches = Batches(feed, config, share=share, end=end, total=self.total)
            training = _Training(
                student, batches, config, self.teacher, self.denoiser, names, first=first, number=number
            )
            at = first if state is None else training.load(state)
            with compiled(student.regions):
                yield from batches.steps(at, training.step, training.snapshot)
            training.finish()
        if config.lora is not None and config.lora.adapter == "merged":
            merge_adapters(model)

    def _held(self, kept: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Linear layers that no phase has trained so far, and so no state holds; and all of the teacher's."""
        own = {id(parameter) for parameter in kept}
        held = [p for p in block_linears(self.model, self.blocks) if id(p) not in own]
        return held + (block_linears(self.teacher, self.blocks) if self.teacher is not None else [])


class _Training:
    """A student in training, its averaged weights, and the teacher that it is compared with.

    Args:
        names: of the parameters that this phase trains or an earlier one has changed.
        first: steps before this phase; its own steps are counted from there by schedules and the guard.
        number: of the phase, where there are several.
    """

    def __init__(
        self,
        student: Student,
        batches: Batches,
        config: FinetuneConfig,
        teacher: nn.Module | None,
        denoiser: Denoiser,
        names: Sequence[str],
        *,
        first: int,
        number: int | None,
    ):
        self.student, self.batches, self.config = student, batches, config
        self.teacher, self.denoiser = teacher, denoiser
        self.first, self.number = first, number
        self.levels = NoiseLevels(denoiser.process, default_device())
        parameters = [p for p in student.model.parameters() if p.requires_grad]
        on_cpu = torch.device("cpu") if config.ema_device == "cpu" else None
        self.average = Average(parameters, decay=config.ema_decay, device=on_cpu)
        kept = Trained({name: student.model.get_parameter(name) for name in names})
        parts = {"model": kept, "ema": self.average}
        optimizer = adamw([parameters], config, betas=config.betas)
        self.trainee = Trainee(parts, parameters, config, optimizer=optimizer, halve_at=config.halve_at)
        if config.shard and self.trainee.optimizer is not None:
            _fill(self.trainee.optimizer)

    def step(self, step: int) -> dict[str, float]:
        """Take a step, or do what the guard says; returns its figures."""
        trainee, own = self.trainee, step - self.first
        lr = trainee.learning_rate(own)
        trainee.keep(own)
        losses = self._gradients(step)
        levels = losses.pop("levels")
        known = torch.cat([torch.stack([*losses.values(), trainee.clip()]), levels.flatten()])
        read = reading(known)
        is_taken = trainee.launch(own, known)
        means = processes.mean(read())
        parts = dict(zip(losses, means, strict=False))
        norm, *sums = means[len(parts) :]
        figures = {"loss": parts.pop("loss"), "lr": lr, "grad_norm": norm} | parts | level_means(sums)
        finding = trainee.guard.judge({name: figures[name] for name in ("loss", "grad_norm")})
        if finding and trainee.guard.stops:
            raise TrainingError(
                f"stage 2{self._name}, step {step}: loss {figures['loss']}, gradient norm {figures['grad_norm']}; the model is as it "
                f"was after step {step - 1}. Lower lr (now {lr:g}) or use precision: fp32{trainee.guard.why()}"
            )
        told = {} if is_taken else trainee.settle(own, finding)
        if not is_taken:
            take_step(trainee.optimizer)
        if not finding:
            self.average.step()
        # JSON has no words for the others
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        if "rolled_back_to" in told:
            told["rolled_back_to"] += self.first
        phase = {} if self.number is None else {"phase": float(self.number)}
        return finite | {f"guard/{name}": value for name, value in told.items()} | phase

    @property
    def _name(self) -> str:
        return "" if self.number is None else f", phase {self.number}"

    def _gradients(self, step: int) -> dict[str, Tensor]:
        """Take the gradients of a step; its losses in this process, and `levels`, their sums by noise level."""
        sums: dict[str, Tensor] = {}
        parts = self.batches.at(step)
        for number, part in enumerate(parts):
            with self.student.gradients_averaged(number + 1 == len(parts)):
                losses = self._losses(part, (self.config.seed, step, processes.rank(), 1, number))
                (losses["loss"] / len(parts)).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / len(parts)
        return sums

    def _losses(self, batch: NoisedBatch, entropy: tuple[int, ...]) -> dict[str, Tensor]:
        """Mean losses of a batch: `loss`, of which gradients are taken, its parts, and their sums by noise level."""
        config, denoiser = self.config, self.denoiser
        precision = partial(
            mixed_precision,
            batch.x_t.device,
            config.precision,
            is_checkpointed=config.gradient_checkpointing,
        )
        losses: dict[str, Tensor] = {}
        each: list[Tensor] = []
        with seeded(*entropy), precision():
            prediction = self.student(batch)
        if config.diffusion_weight:
            assert batch.x is not None
            assert batch.noise is not None
            per_item = denoiser.process.loss(
                prediction, x=batch.x, x_t=batch.x_t, noise=batch.noise, t=batch.t
            )
            losses["diffusion"] = per_item.mean()
            each.append(config.diffusion_weight * per_item.detach())
        if config.output_weight:
            target = batch.target
            if target is None:
                assert self.teacher is not None
                with torch.no_grad(), precision():
                    target = denoiser(self.teacher, batch.x_t, batch.t, batch.numbers)
            squares = (prediction.float() - target.float()).square()
            losses["output"] = squares.mean()
            each.append(config.output_weight * squares.detach().flatten(1).mean(1))
        weights = {"diffusion": config.diffusion_weight, "output": config.output_weight}
        loss = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
        return losses | {"loss": loss, "levels": self.levels.sums(torch.stack(each).sum(0), batch.t)}

    def snapshot(self, step: int) -> State | ShardedState:
        """State needed to resume after `step` steps."""
        guard, own = self.trainee.guard, step - self.first
        state = {"step": step, **self.trainee.state(own), "guard": guard.state()}
        if "kept" in state:
            state["kept"] = state["kept"] | {"step": self.first + guard.returns_to(own)}
        if not self.config.shard:
            return state
        kept = {"kept": _numbers(state["kept"])} if "kept" in state else {}
        return ShardedState(state, _numbers(state) | {"guard": state["guard"]} | kept)

    def load(self, state: State | Path) -> int:
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

    def _read(self, folder: Path) -> State:
        """A sharded state, in tensors that are spread as this run's are."""
        facts = read_facts(folder, _Facts)
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


class _Numbers(TypedDict):
    """Parts of a state that are no tensors."""

    step: int
    ema_steps: int


class _Facts(_Numbers):
    """What a sharded state keeps beside its tensors."""

    guard: GuardState
    kept: NotRequired[_Numbers]


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


def _numbers(state: Mapping[str, Any]) -> _Numbers:
    return {"step": state["step"], "ema_steps": state["ema"]["optimization_step"]}


def _set_numbers(state: State, numbers: _Numbers) -> None:
    state["step"], state["ema"]["optimization_step"] = numbers["step"], numbers["ema_steps"]

"""Settings of stage 2: one phase of training, or several that run one after another on the same model."""

import fnmatch
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from ..errors import TrainingError
from ..machine import processes
from ..machine.precision import FP32_IS_ABSENT, Precision
from ..machine.settings import Settings
from .batches import check_batch_size
from .guard import GuardConfig


def _check_pattern(pattern: str) -> str:
    if "\\[" in fnmatch.translate(pattern):
        raise ValueError("a bracket is not closed: * and ? stand for any characters, [ab] for one of them")
    return pattern


Pattern = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_check_pattern)]
Targets = tuple[Pattern, ...]


class LoraSettings(Settings):
    """Low-rank adapters of linear layers."""

    rank: PositiveInt = 16
    alpha: PositiveFloat | None = None
    """An adapter's output is multiplied by alpha / rank; if omitted, by 1."""
    targets: Annotated[Targets, Field(min_length=1)] = ("attention", "mlp")
    """`attention` and `mlp`: all linear layers of the sites of that role that hold no operator; others are patterns of the
    names of linear layers, such as `*.attn2.to_q`."""
    adapter: Literal["merged", "saved"] = "merged"
    """merged: added to the weights when the phase ends. saved: kept apart, in peft's format, beside the model or delta that
    is saved; only in the last phase."""

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


class Lora(Settings):
    """Training of low-rank adapters: `lora: {rank: 16}`."""

    lora: LoraSettings = LoraSettings()


def _kind_of_trainable(value: Any) -> str:
    if isinstance(value, str):
        return "<word>"
    return "<lora>" if isinstance(value, dict | Lora) else "<names>"


def _kind_of_part(value: Any) -> str:
    return "<lora>" if isinstance(value, dict | Lora) else "<name>"


# a kind of settings is chosen by its look, so that a fault is told of that kind alone; recipes' faults leave <kinds> out
_Part = Annotated[
    Annotated[Pattern, Tag("<name>")] | Annotated[Lora, Tag("<lora>")], Discriminator(_kind_of_part)
]
Trainable = Annotated[
    Annotated[Literal["all", "new"], Tag("<word>")]
    | Annotated[Lora, Tag("<lora>")]
    | Annotated[tuple[_Part, ...], Tag("<names>")],
    Discriminator(_kind_of_trainable),
]
"""All parameters; those of `new` operators; low-rank adapters; or a list of name patterns, which may hold `new` and one
`lora` too."""


class Objective(Settings):
    """Weights of both objectives."""

    process: NonNegativeFloat = 0.0
    output: NonNegativeFloat = 0.0


class FinetuneConfig(Settings):
    """Settings of stage 2, or of one phase of it. The defaults are the paper's (arXiv:2506.05340, section 5)."""

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
    objective: Literal["process", "output"] | Objective | None = None
    """process: the loss of the noise process. output: the squared distance to the teacher's prediction. Or weights of
    both, `{process: 1, output: 0.5}`. A shorter way to write the two weights that follow, and kept as these."""
    diffusion_weight: NonNegativeFloat = 1.0
    """Weight of the host's diffusion loss; 0 if omitted for a distilled model."""
    output_weight: NonNegativeFloat = 0.0
    """Weight of the squared distance to the teacher's prediction (noise and variance); 1 if both are omitted for a distilled
    model."""
    trainable: Trainable = "all"
    """`all` parameters; those of `new` operators; low-rank adapters, `{lora: {rank: 16}}`; or a list of name patterns,
    which may hold `new` and `lora` too: `[new, {lora: {rank: 16}}]`."""
    frozen: Literal["fp32", "bf16"] = "fp32"
    """Precision in which the linear layers of blocks are held that are not trained; bf16 needs half the memory, and
    `precision: bf16`, which computes with the same values. What is trained, and what is saved, is fp32 all the same."""
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

    @model_validator(mode="before")
    @classmethod
    def _weights_of_objective(cls, settings: Any) -> Any:
        if not isinstance(settings, dict) or settings.get("objective") is None:
            return settings
        others = {name: value for name, value in settings.items() if name != "objective"}
        if given := sorted(others.keys() & {"diffusion_weight", "output_weight"}):
            raise ValueError(f"objective says what {' and '.join(given)} would say again: give one")
        asked = settings["objective"]
        weights = dict(asked) if isinstance(asked, dict | Objective) else {asked: 1.0}
        if unknown := sorted(str(name) for name in weights.keys() - {"process", "output"}):
            raise ValueError(f"objective is process, output or their weights, found {', '.join(unknown)}")
        return others | {
            "diffusion_weight": weights.get("process", 0.0),
            "output_weight": weights.get("output", 0.0),
        }

    @model_validator(mode="after")
    def _check(self) -> "FinetuneConfig":
        if self.shard and self.ema_device == "cpu":
            raise ValueError(
                "ema_device: cpu cannot be combined with shard, which spreads averaged weights as it does weights"
            )
        if self.frozen == "bf16" and (self.precision == "fp32" or self.shard):
            raise ValueError("frozen: bf16 requires precision: bf16, and no shard")
        if sum(isinstance(part, Lora) for part in self.parts) > 1:
            raise ValueError("trainable holds one lora at most: give it all targets")
        if isinstance(self.trainable, tuple) and "all" in self.trainable:
            raise ValueError("trainable: all stands alone; a list holds new, lora and patterns of names")
        return self

    @property
    def parts(self) -> tuple[str | Lora, ...]:
        """What is trained, as a list."""
        return self.trainable if isinstance(self.trainable, tuple) else (self.trainable,)

    @property
    def asks_for_process(self) -> bool:
        """Whether it names the loss of the process; one that says nothing has it where the model bears it."""
        return "diffusion_weight" in self.model_fields_set and self.diffusion_weight > 0

    @property
    def lora(self) -> LoraSettings | None:
        return next((part.lora for part in self.parts if isinstance(part, Lora)), None)

    @property
    def trained_in_words(self) -> str:
        """What is trained, in a word or a few: `new + lora 16`."""
        words = [f"lora {part.lora.rank}" if isinstance(part, Lora) else part for part in self.parts]
        return " + ".join(words)


Phases = tuple[FinetuneConfig, ...]


def phases_of(config: FinetuneConfig | Sequence[FinetuneConfig] | None) -> Phases:
    """The phases of stage 2: one, several, or none where there is no stage 2."""
    if config is None:
        return ()
    return (config,) if isinstance(config, FinetuneConfig) else tuple(config)


def with_objectives(phases: Phases, *, by_output: bool) -> Phases:
    """The same, where phases are `by_output`: each that says nothing of the process's loss has the teacher's output alone.

    So are those of distilled models, and those of data without clean inputs.
    """
    if not by_output:
        return phases
    return tuple(
        phase
        if "diffusion_weight" in phase.model_fields_set
        else phase.model_copy(update={"diffusion_weight": 0.0, "output_weight": phase.output_weight or 1.0})
        for phase in phases
    )


def phase_faults(phases: Phases) -> list[str]:
    """Reasons why phases cannot follow each other; empty if they can."""
    return [
        f"phase {number}: lora.adapter: saved is for the last phase; what follows trains on the merged weights"
        for number, config in enumerate(phases[:-1], start=1)
        if config.lora and config.lora.adapter == "saved"
    ]


def clean_faults(phases: Phases) -> list[str]:
    """Reasons why phases cannot train on states that have no clean inputs; empty if they can."""
    return [
        f"{'' if len(phases) == 1 else f'phase {number}: '}states along trajectories have no clean image, and so no loss of the "
        "process: set objective: output, the teacher's prediction, or have other data"
        for number, config in enumerate(phases, start=1)
        if config.diffusion_weight
    ]


def check_division(phases: Phases) -> None:
    """Raises a TrainingError if a batch does not divide among processes and micro-batches."""
    for number, config in enumerate(phases, start=1):
        name = "stage 2" if len(phases) == 1 else f"stage 2, phase {number}"
        check_batch_size(
            name, config.batch_size, processes=processes.world_size(), accumulate=config.accumulate
        )


def check_phases(phases: Phases, *, has_teacher: bool, has_blocks: bool, has_clean: bool = True) -> None:
    """Raises a TrainingError if stage 2 cannot be carried out as these say."""
    check_division(phases)
    if not phases:
        raise TrainingError("stage 2 has no phases")
    if faults := phase_faults(phases) + ([] if has_clean else clean_faults(phases)):
        raise TrainingError("; ".join(faults))
    for config in phases:
        for name, is_asked in (
            ("compile", config.compile),
            ("shard", config.shard),
            ("hold frozen weights in bf16", config.frozen == "bf16"),
        ):
            if is_asked and not has_blocks:
                raise TrainingError(f"stage 2 is to {name} block by block, but no blocks are named")
        if not (config.diffusion_weight or config.output_weight):
            raise TrainingError("stage 2 has no objective: diffusion_weight and output_weight are both 0")
        if config.output_weight and not has_teacher:
            raise TrainingError("output_weight is positive, but there is no teacher to take outputs from")

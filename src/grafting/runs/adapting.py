"""Both stages on a pipeline in memory, in one call: its transformer is grafted in place, and trained on what it makes itself."""

import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..contract import Denoiser
from ..data.prompts import Prompts
from ..editing.plan import Plan
from ..editing.surgery import Graft, build_operators, check_editable, sharing_copy
from ..errors import DataError, SettingsError, TrainingError
from ..hosts import host_of, process_of, transformer_of
from ..latents.prompting import Prompting, PromptingConfig, check_encodes
from ..machine.devices import default_device
from ..machine.reading import shown
from ..sampling.chain import check_sampling
from ..sampling.drawing import describe_model
from ..sampling.taught import Taught, TaughtConfig, teach
from ..sampling.trajectories import Trajectories, TrajectoriesConfig
from ..training.distillation import DistillConfig, check_division, distill
from ..training.finetuning import finetune as _finetune
from ..training.phases import FinetuneConfig, phases_of
from ..training.supply import deal
from ..weights.pipelines import check_drawn, place
from .remarks import LOSS_OF_DISTILLED, few_prompts
from .stage import OnStep

DISTILL = DistillConfig(steps=200, batch_size=8, holdout=16)
FINETUNE = FinetuneConfig(steps=500, batch_size=8, warmup_steps=50, trainable="new", objective="output")
"""Lengths to begin with: the operators alone, and then end to end with the rest held."""


def adapt(
    pipeline: Any,
    plan: Plan,
    *,
    prompts: Sequence[str],
    data: TaughtConfig | TrajectoriesConfig | None = None,
    distill_config: DistillConfig | None = DISTILL,
    finetune_config: FinetuneConfig | Sequence[FinetuneConfig] | None = FINETUNE,
    folder: str | Path | None = None,
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Graft:
    """Graft a pipeline's transformer in place, and train it on prompts alone: no images are needed.

    Prompts are encoded by the pipeline; its transformer makes latents for them; operators are fitted to what they replace (stage 1), and
    then trained end to end on the outputs of the transformer as it was (stage 2). The pipeline draws and saves with its graft
    afterwards. Nothing is resumed: for long work write a recipe.

    Args:
        pipeline: of diffusers, with its text encoders; moved to the accelerator, if there is one.
        prompts: words; a hundred or more, like those that the model will be asked.
        data: how many latents are made, and how, or the trajectories whose states are drawn instead; by default 1,000 latents of the
            native shape.
        distill_config, finetune_config: stages 1 and 2; None leaves one out. A `DistillConfig` that names no `holdout` holds out 16 here.
        folder: keeps the encoded prompts and the latents, so that a second call finds them; by default they go when this returns.
        call: what the pipeline is called with beside the prompt, `{"max_sequence_length": 128}`.
        seed: of the operators' random weights.
        on_step: called with a stage's name and each of its steps; nothing is printed.

    Returns:
        The record, which can undo the graft; weights of the model's own that were trained (`trainable: all`) stay in memory for it.

    Raises:
        SettingsError: a setting is of another class, such as a dict. DataError: prompts are none, one string, or no words; latents of a
            shape that the model does not take. PlanError: the plan does not fit the model as it stands. All before any work.
        HostError: the pipeline has no transformer that can be edited, has no text encoder, or does not run.
        TrainingError: there is nothing to train, or are too few latents for what is held out, before any work; what a stage says, and
            the transformer is then as it was.

    Warns:
        UserWarning: the prompts are so few that the graft learns them by heart; or a distilled model gets the loss of the process.
    """
    _check_prompts(prompts)
    _check_kinds(data=data, distill_config=distill_config, finetune_config=finetune_config)
    model = transformer_of(pipeline)
    host = host_of(model)
    check_drawn(pipeline, host)
    check_encodes(pipeline)
    check_editable(model, plan)
    data = data or TaughtConfig()
    distill_config = _check_training(
        distill_config, finetune_config, data, host.shape_faults(model, data.shape or host.shape(model))
    )
    phases = phases_of(finetune_config)
    for remark in few_prompts(prompts, steps=sum(phase.steps for phase in phases)):
        warnings.warn(f"prompts: {remark}", stacklevel=2)
    if host.distilled and any(phase.asks_for_process for phase in phases):
        warnings.warn(f"finetune_config: {LOSS_OF_DISTILLED}", stacklevel=2)
    pipeline.to(default_device())
    tell = on_step or (lambda name, step: None)
    with _kept(folder) as place_of_data:
        encoded = place_of_data / "prompts"
        work = Prompting(pipeline, prompts, encoded, PromptingConfig(), source="prompts", call=call)
        for step in work.steps():
            tell("prompts", step)
        known = process_of(pipeline)
        denoiser = host.denoiser(model, Prompts(encoded), host.built(model, known) if known else None)
        made = _made(model, denoiser, data, place_of_data / "latents", tell)
        teacher = sharing_copy(model).eval().requires_grad_(False)
        operators = build_operators(model, plan, seed=seed)
        if distill_config is not None:
            for step in distill(model, operators, made, distill_config, denoiser=denoiser):
                tell("distill", step)
        record = place(model, operators, cast=False)
        host.track_layout(model).stays = False  # until the graft is undone
        if phases:
            try:
                steps = _finetune(
                    model,
                    made,
                    phases,
                    denoiser=denoiser,
                    blocks=[site.path for site in host.blocks(teacher)],
                    teacher=teacher,
                    new_parameters=record.new_parameters,
                )
                for step in steps:
                    tell("finetune", step)
            except BaseException:
                _undoing_training(record, teacher).undo()
                raise
        for operator in operators.values():
            operator.to(next(teacher.parameters()).dtype)
    return _undoing_training(record, teacher)


def _check_prompts(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str) or not prompts:
        raise DataError(
            f"prompts: a list of them is needed, a hundred or more; found {'one string' if prompts else 'none'}"
        )
    for number, words in enumerate(prompts):
        if not isinstance(words, str) or not words.strip():
            raise DataError(f"prompts: {number} is {shown(words)}; each is a string with words in it")


def _check_kinds(**given: Any) -> None:
    """Raises a SettingsError if a setting is of another class than it is to be."""
    kinds: dict[str, tuple[type, ...]] = {
        "data": (TaughtConfig, TrajectoriesConfig),
        "distill_config": (DistillConfig,),
        "finetune_config": (FinetuneConfig,),
    }
    for name, value in given.items():
        several = name == "finetune_config" and isinstance(value, Sequence) and not isinstance(value, str)
        for each in value if several else [value]:
            if each is not None and not isinstance(each, kinds[name]):
                wanted = " or a ".join(kind.__name__ for kind in kinds[name])
                raise SettingsError(f"{name}: a {wanted} is needed, or None; found {shown(each)}")


def _check_training(
    distill_config: DistillConfig | None,
    finetune_config: FinetuneConfig | Sequence[FinetuneConfig] | None,
    data: TaughtConfig | TrajectoriesConfig,
    shape_faults: Sequence[str],
) -> DistillConfig | None:
    """Settings of stage 1, with what they leave out, where both stages fit the data."""
    if distill_config is None and not finetune_config:
        raise TrainingError(
            "distill_config and finetune_config are both None, so there is nothing to train: `grafting.graft` edits without training"
        )
    if shape_faults:
        raise DataError(f"data.shape: {shape_faults[0]}")
    if distill_config is None:
        return None
    if "holdout" not in distill_config.model_fields_set:
        distill_config = distill_config.model_copy(update={"holdout": DISTILL.holdout})
    check_division(distill_config)
    if isinstance(data, TaughtConfig):
        config = distill_config
        deal(data.num_images, holdout=config.holdout, images=config.images, seed=config.seed)
    return distill_config


def _undoing_training(record: Graft, teacher: nn.Module) -> Graft:
    """The record, which keeps the weights of the model's own that were trained, and puts them back too."""
    now, then = record.model.state_dict(), record.then
    before = {
        name: tensor
        for name, tensor in teacher.state_dict().items()
        if name in now and now[name].data_ptr() != tensor.data_ptr()
    }

    def put_back(model: nn.Module) -> None:
        model.load_state_dict(before, strict=False)
        if then is not None:
            then(model)

    return replace(record, then=put_back)


@contextmanager
def _kept(folder: str | Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as path:
        yield Path(path)


def _made(
    model: nn.Module,
    denoiser: Denoiser,
    config: TaughtConfig | TrajectoriesConfig,
    folder: Path,
    tell: OnStep,
) -> Taught | Trajectories:
    """Latents that the model makes, in the folder; or its trajectories, of which nothing is stored."""
    shape = config.shape or host_of(model).shape(model)
    check_sampling(config, denoiser=denoiser, channels=shape[0])
    if isinstance(config, TrajectoriesConfig):
        return Trajectories(config, shape=shape)
    made = Taught(config, shape=shape, num_classes=len(denoiser.conditions))
    made.folder = folder
    identity = describe_model(model, settings=[type(model).__name__])
    for step in teach(
        model,
        config,
        folder,
        denoiser=denoiser,
        shape=shape,
        identity=identity,
        source="the pipeline's transformer",
    ):
        tell("teach", step)
    return made

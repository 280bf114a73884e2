"""Stage 2: train a model end to end with its diffusion loss, the teacher's outputs as targets, or both.

A generator of steps: it knows no file, logger or progress bar. Every draw of step s comes from (seed, s), so a run
resumed from any step's state equals an uninterrupted one. Pretraining is the same loop on a fresh model.
"""

import fnmatch
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from torch import Tensor, nn

from .contract import Predict, Step, TrainingData
from .devices import mixed_precision
from .diffusion import NUM_STEPS, Diffusion
from .errors import TrainingError
from .functional.schedule import learning_rate_factor
from .randomness import batch_indices, seeded


class FinetuneConfig(BaseModel):
    """Settings of stage 2. The defaults are the paper's (arXiv:2506.05340, section 5)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    steps: NonNegativeInt = 50_000
    batch_size: PositiveInt = 256
    """Images a step, over all processes."""
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
    diffusion_weight: NonNegativeFloat = 1.0
    """Weight of the host's diffusion loss."""
    output_weight: NonNegativeFloat = 0.0
    """Weight of the squared distance to the teacher's prediction (noise and variance)."""
    trainable: Literal["all", "new"] | tuple[str, ...] = "all"
    """All parameters, only those of new operators, or those whose names match one of these patterns."""
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: NonNegativeInt = 0


def finetune(
    model: nn.Module,
    data: TrainingData,
    config: FinetuneConfig,
    *,
    predict: Predict,
    diffusion: Diffusion,
    teacher: nn.Module | None = None,
    new_parameters: frozenset[str] = frozenset(),
    state: dict[str, Any] | None = None,
) -> Iterator[Step]:
    """Train `model` in place; when the iterator ends the model holds the averaged (EMA) weights.

    Args:
        model: the grafted model.
        data: images or latents with labels.
        predict: the host's call of a model on (x_t, t, labels).
        diffusion: the host's noise process and loss.
        teacher: the pretrained model, needed when `output_weight` is positive.
        new_parameters: names of the parameters of new operators, for `trainable: new`.
        state: what an earlier step's `state()` returned, to go on from there.

    Raises:
        TrainingError: nothing to train, no objective, a teacher is missing, or the loss is not finite.
    """
    _check(config, teacher)
    trained = _select_parameters(model, config.trainable, new_parameters)
    accelerator = Accelerator()
    # not Accelerate's own autocast: its precision is fixed once a process, and a sweep runs many recipes in one
    autocast = partial(mixed_precision, accelerator.device, config.precision)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    ema = EMAModel(trained, decay=config.ema_decay)
    student, optimizer = accelerator.prepare(model, optimizer)
    if teacher is not None:
        teacher = teacher.to(accelerator.device).train()
    ema.to(accelerator.device)
    first = 0
    if state is not None:
        first = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
    if config.compile:
        student = torch.compile(student)

    def snapshot(step: int) -> dict[str, Any]:
        return {
            "step": step,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "ema": ema.state_dict(),
        }

    share = slice(accelerator.process_index, None, accelerator.num_processes)
    student.train()
    for step in range(first, config.steps):
        lr = config.lr * learning_rate_factor(
            step,
            steps=config.steps,
            warmup_steps=config.warmup_steps,
            cooldown_steps=config.cooldown_steps,
            halve_at=config.halve_at,
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        x, labels, noise, t = (a[share].to(accelerator.device) for a in _draw(data, config, step))
        x_t = diffusion.add_noise(x, noise, t)
        # both models drop the same labels: they start from the same random state
        entropy = (config.seed, step, accelerator.process_index, 1)
        with seeded(*entropy), autocast():
            prediction = predict(student, x_t, t, labels)
        values: dict[str, Tensor] = {}
        if config.diffusion_weight:
            values["diffusion"] = diffusion.loss(prediction, x=x, x_t=x_t, noise=noise, t=t).mean()
        if config.output_weight:
            assert teacher is not None
            with torch.no_grad(), seeded(*entropy), autocast():
                target = predict(teacher, x_t, t, labels)
            values["output"] = (prediction.float() - target.float()).square().mean()
        weights = {"diffusion": config.diffusion_weight, "output": config.output_weight}
        loss = torch.stack([weights[name] * value for name, value in values.items()]).sum()
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(trained, config.clip_norm)
        if not (math.isfinite(loss.item()) and math.isfinite(norm)):
            raise TrainingError(
                f"stage 2, step {step}: loss {loss.item()}, gradient norm {float(norm)}; the model is as it was "
                f"after step {step - 1}. Lower lr (now {lr:g}) or use precision: fp32"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(trained)
        yield Step(
            done=step + 1,
            total=config.steps,
            values={"loss": loss.item(), "lr": lr, "grad_norm": float(norm)}
            | {name: value.item() for name, value in values.items()},
            state=lambda step=step: snapshot(step + 1),
        )
    ema.copy_to(trained)
    model.eval()


def _draw(data: TrainingData, config: FinetuneConfig, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The whole step's images, labels, noise and steps, the same on every process."""
    with seeded(config.seed, step) as generator:
        x, labels = data.batch(batch_indices(len(data), config.batch_size, step, config.seed))
        noise = torch.randn(x.shape, generator=generator)
        t = torch.randint(0, NUM_STEPS, (len(x),), generator=generator)
    return x, labels, noise, t


def _check(config: FinetuneConfig, teacher: nn.Module | None) -> None:
    if not (config.diffusion_weight or config.output_weight):
        raise TrainingError("stage 2 has no objective: diffusion_weight and output_weight are both 0")
    if config.output_weight and teacher is None:
        raise TrainingError("output_weight is positive, but there is no teacher to take outputs from")


def _select_parameters(
    model: nn.Module, trainable: str | tuple[str, ...], new_parameters: frozenset[str]
) -> list[nn.Parameter]:
    """Marks what is trained and returns it; fixed parameters (such as positions) stay fixed."""
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
    for name, parameter in candidates.items():
        parameter.requires_grad_(name in chosen)
    return [candidates[n] for n in candidates if n in chosen]

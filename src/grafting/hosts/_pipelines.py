"""The call of a pipeline's transformer, caught in its first two steps, and what its scheduler makes of the output."""

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..contract import Kwargs
from ..diffusion import DiffusionConfig, FlowConfig, ProcessConfig, ShiftBySize
from ..errors import HostError
from ..machine.reading import failure_of
from ._arguments import Knowledge
from ._forwards import copied
from ._spec import Output, Time

_DEFAULTS: Mapping[str, str | int] = {
    "prompt": "a red cube on a table",
    "height": 128,
    "width": 192,
    "num_frames": 9,
    "num_inference_steps": 2,
    "use_resolution_binning": False,
}
"""What a pipeline is called with where its caller says nothing: as little as most take, and rows unlike columns."""


_LIKE = 0.3
"""Cosine above which what the scheduler is given is the output, guided or not, and not another quantity."""


_OF_THEIR_OWN = ("CogView4", "Flux2", "HiDream", "Lumina2", "QwenImageLayered")
"""Pipelines whose shift follows the size, or the number of steps, by a rule that their scheduler does not hold."""


@dataclass(frozen=True)
class Caught:
    """A model and an example of its keyword arguments, with what its pipeline told beside."""

    model: nn.Module
    inputs: Kwargs
    known: Knowledge


class Enough(Exception):  # no error
    """Ends a pipeline's call: what it was called for has been seen."""


def call_pipeline(pipeline: Any, given: Mapping[str, Any], *, told: str, advice: str) -> None:
    """Call a pipeline, until it ends or `Enough` is raised inside.

    Args:
        told: what it is called with, and `advice` what to do, for the error.

    Raises:
        HostError: it does not run.
    """
    try:
        with torch.no_grad():
            pipeline(**given)
    except Enough:
        pass
    except Exception as error:
        raise HostError(
            f"{type(pipeline).__name__} does not run on {told}: {failure_of(error, advice)}"
        ) from error


@dataclass
class _Spy:
    """What a transformer was called with and returned, and what the scheduler was given."""

    calls: list[Kwargs] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    stepped: list[Tensor] = field(default_factory=list)
    calls_at_step: int = 0

    def before(self, module: nn.Module, args: tuple, kwargs: Kwargs) -> None:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
        given = {k: v for k, v in bound.arguments.items() if v is not None and k != "return_dict"}
        self.calls.append(copied(given))
        if self.stepped:
            raise Enough

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.outputs.append(output)

    def stepping(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def spied(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.stepped.append(model_output.detach().clone())
            self.calls_at_step = len(self.calls)
            return step(model_output, *args, **kwargs)

        return spied


def catch(pipeline: Any, asked: Mapping[str, Any]) -> Caught:
    """The example that a pipeline's own call makes.

    Raises:
        HostError: it is no pipeline with a transformer, or does not run on this call.
    """
    model = transformer_of(pipeline)
    given = _arguments(pipeline, asked)
    spy = _Spy()
    advice = "give what it is called with, such as height=, width=, num_frames=, or prompt_embeds= where it has no text encoder"
    with _watching(pipeline, model, spy):
        call_pipeline(pipeline, given, told=", ".join(given), advice=advice)
    if not spy.calls:
        raise HostError(f"{type(pipeline).__name__} did not call its transformer")
    return Caught(model, spy.calls[0], _known(pipeline, spy))


def transformer_of(pipeline: Any) -> nn.Module:
    """A pipeline's transformer.

    Raises:
        HostError: it is no pipeline, or has a UNet in its place.
    """
    from diffusers import DiffusionPipeline

    if not isinstance(pipeline, cast(Any, DiffusionPipeline)):
        raise HostError(
            f"a diffusers pipeline is needed (a model alone can only be traced); found a {type(pipeline).__name__}"
        )
    parts: Mapping[str, Any] = pipeline.components
    for name in ("transformer", "transformer_2", "prior"):
        if isinstance(parts.get(name), nn.Module):
            return parts[name]
    if "unet" in parts:
        raise HostError(
            f"{type(pipeline).__name__} has a {type(parts['unet']).__name__}, whose blocks have several resolutions: grafting edits "
            "transformers"
        )
    raise HostError(f"{type(pipeline).__name__} has no transformer; it has {', '.join(sorted(parts))}")


def _arguments(pipeline: Any, call: Mapping[str, Any]) -> Kwargs:
    """A pipeline's call, with the defaults that it takes and its caller leaves out."""
    takes = call_of(pipeline, call)
    defaults = {name: value for name, value in _DEFAULTS.items() if name in takes}
    if any("embeds" in name for name in call):
        defaults.pop("prompt", None)
    return defaults | dict(call)


def call_of(pipeline: Any, call: Collection[str]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a pipeline's call.

    Raises:
        HostError: it does not take some of these names.
    """
    takes = inspect.signature(pipeline.__call__).parameters
    if unknown := [name for name in call if name not in takes]:
        raise HostError(
            f"{type(pipeline).__name__} is not called with {', '.join(unknown)}; it takes {', '.join(takes)}"
        )
    return takes


@contextmanager
def stepping_by(pipeline: Any, step: Callable[..., Any]) -> Iterator[None]:
    """Inside, the pipeline's scheduler steps by this function, and the pipeline shows no progress."""
    shows = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.scheduler.step = step
    pipeline.set_progress_bar_config(**shows | {"disable": True})
    try:
        yield
    finally:
        del pipeline.scheduler.step
        pipeline.set_progress_bar_config(**shows)


@contextmanager
def _watching(pipeline: Any, model: nn.Module, spy: _Spy) -> Iterator[None]:
    with (
        model.register_forward_pre_hook(spy.before, with_kwargs=True),
        model.register_forward_hook(spy.after),
        stepping_by(pipeline, spy.stepping(pipeline.scheduler.step)),
    ):
        yield


def _known(pipeline: Any, spy: _Spy) -> Knowledge:
    vae = dict(getattr(pipeline.components.get("vae"), "config", None) or {})
    size = getattr(pipeline, "default_sample_size", None)
    scheduler = type(pipeline.scheduler).__name__
    return Knowledge(
        time=_time(spy),
        output=_output(spy),
        process=process_of(pipeline),
        scheduler="" if _is_flow(scheduler, dict(pipeline.scheduler.config)) else scheduler,
        latent_size=size if isinstance(size, int) else None,
        latent_channels=next(
            (vae[key] for key in ("latent_channels", "z_dim") if isinstance(vae.get(key), int)), None
        ),
    )


def _time(spy: _Spy) -> Time | None:
    """The argument that differs between two steps, beside the image: its scale, and whether it falls towards the image."""
    if len(spy.calls) <= spy.calls_at_step or not spy.calls_at_step:
        return None
    first, second = spy.calls[0], spy.calls[-1]
    moved = [
        name
        for name, value in first.items()
        if isinstance(value, Tensor) and value.ndim < 3 and not torch.equal(value, second[name])
    ]
    if len(moved) != 1:
        return None
    values = [float(call[moved[0]].flatten()[0]) for call in (first, second)]
    return Time(
        argument=moved[0],
        scale=1000.0 if max(values) > 1 else 1.0,
        reversed=values[1] > values[0],
        whole=not first[moved[0]].is_floating_point(),
    )


def _output(spy: _Spy) -> Output | None:
    """The sign and the channels with which the scheduler was given the model's output; None if that does not resemble it."""
    if not spy.stepped:
        return None
    returned = torch.stack(
        [sample.flatten() for output in spy.outputs[: spy.calls_at_step] for sample in _samples(output)]
    )
    average, given = returned.float().mean(0), spy.stepped[0][0].float().flatten()
    half = len(average) == 2 * len(given)
    average = average[: len(given)] if half else average
    if len(average) != len(given):
        return None
    likeness = float(torch.cosine_similarity(average, given, dim=0))
    return Output(sign=-1 if likeness < 0 else 1, half=half) if abs(likeness) > _LIKE else None


def _samples(output: Any) -> list[Tensor]:
    """The predictions of a batch, one a sample: rows of a tensor, or a list of tensors."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, Mapping) else output
        if isinstance(output, list):
            return output
        output = output[0] if isinstance(output, tuple) else output
    return list(output)


def process_of(pipeline: Any) -> ProcessConfig | None:
    """The process that a pipeline's scheduler runs back; None where its predictions are of another kind."""
    scheduler = pipeline.scheduler
    config = dict(getattr(scheduler, "config", {}))
    return process_of_scheduler(type(scheduler).__name__, config, pipeline=type(pipeline).__name__)


def process_of_scheduler(
    scheduler: str, config: Mapping[str, Any], *, pipeline: str = ""
) -> ProcessConfig | None:
    """The same by the names of both classes and the scheduler's config."""
    if not _is_flow(scheduler, config):
        return DiffusionConfig() if config.get("prediction_type") == "epsilon" else None
    terminal = config.get("shift_terminal") or None
    if not config.get("use_dynamic_shifting"):
        shift = float(config.get("shift") or config.get("flow_shift") or 1)
        return FlowConfig(shift=shift, terminal=terminal)
    if pipeline.startswith(_OF_THEIR_OWN):
        return None
    return FlowConfig(shift_by_size=_by_size(config), terminal=terminal)


def _is_flow(scheduler: str, config: Mapping[str, Any]) -> bool:
    asked = config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas")
    return "Flow" in scheduler or bool(asked)


def _by_size(config: Mapping[str, Any]) -> ShiftBySize:
    names = {
        "base": "base_shift",
        "max": "max_shift",
        "base_tokens": "base_image_seq_len",
        "max_tokens": "max_image_seq_len",
        "kind": "time_shift_type",
    }
    return ShiftBySize(**{name: config[key] for name, key in names.items() if config.get(key) is not None})

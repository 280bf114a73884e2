"""Prompts as a pipeline encodes them, caught from its own calls of its transformer.

The pipeline is called as its users call it, one prompt at a time. Its transformer is stood in for by one that returns zeros, and the
call ends where the scheduler is asked for its first step. So the transformer's weights are not needed: they may be on `meta`. What an
argument depends on is found by changing one thing at a time: the prompt, the seed, the size, the number of prompts. The prompt that
asks for nothing is taken from a guided call, since some pipelines put an instruction before all others.
"""

import functools
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..contract import Kwargs
from ..data.promptfolder import Form, Prompt
from ..errors import HostError
from ..hosts import Enough, Host, call_pipeline, stepping_by, transformer_of
from ..machine.compiling import with_forward
from ..machine.reading import shown

_TRIED = (
    "a red cat on the mat",
    "a blue dog in the hat",
    "a small house beside the sea under three tall trees with a big red sun in the sea",
)
"""Two prompts of as many words, and a longer one."""
_SIZES = ((512, 768), (384, 256), (64, 96), (32, 64), (128, 256))
"""Heights and widths to try, until two are taken: one of them differs from the pipeline's own in both, and one in their ratio."""
_FRAMES = (9, 17)
_TIMES = frozenset({"timestep", "timesteps", "t"})
_SAME = 1e-5
"""Relative difference up to which a cut prompt gives what a padded one gives."""


def first_step(pipeline: Any, **call: Any) -> list[Kwargs]:
    """Arguments of the transformer's calls before the scheduler's first step, flat by name, on the CPU; None and {} left out.

    A dotted name is an argument inside a mapping; one that ends in `[]` is a list of tensors.

    Raises:
        HostError: the pipeline does not run on this call.
    """
    model = transformer_of(pipeline)
    calls: list[Kwargs] = []
    generator = torch.Generator().manual_seed(call.pop("seed", 0))
    given = {"num_inference_steps": 2, "generator": generator, **call}
    told = ", ".join(f"{k}={shown(v)}" for k, v in call.items())
    with _stood_in(model, calls), _ending(pipeline):
        call_pipeline(pipeline, given, told=told, advice="give what else it needs")
    if not calls:
        raise HostError(f"{type(pipeline).__name__} did not call its transformer")
    return calls


@contextmanager
def _stood_in(model: nn.Module, calls: list[Kwargs]) -> Iterator[None]:
    """Inside, the model notes what it is called with, and returns zeros."""
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    forward = model.forward

    @functools.wraps(forward)
    def noting(*args: Any, **kwargs: Any) -> Any:
        arguments = dict(inspect.signature(forward).bind(*args, **kwargs).arguments)
        calls.append(dict(_leaves(arguments)))
        zeros = _zeros_like(next(iter(arguments.values())))
        return (zeros,) if arguments.get("return_dict") is False else Transformer2DModelOutput(sample=zeros)

    with with_forward(model, noting):
        yield


def _zeros_like(x: Any) -> Any:
    return torch.zeros_like(x) if isinstance(x, Tensor) else [torch.zeros_like(item) for item in x]


@contextmanager
def _ending(pipeline: Any) -> Iterator[None]:
    """Inside, the scheduler's step ends the call."""

    @functools.wraps(pipeline.scheduler.step)  # pipelines look at its signature
    def step(*args: Any, **kwargs: Any) -> None:
        raise Enough

    with stepping_by(pipeline, step):
        try:
            yield
        finally:
            pipeline.maybe_free_model_hooks()


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list | tuple) and value and all(isinstance(item, Tensor) for item in value):
        yield f"{name}[]", [item.detach().cpu().clone() for item in value]
    elif isinstance(value, Tensor):
        yield name, value.detach().cpu().clone()
    elif value is not None and name != "return_dict":
        yield name, value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b)


@dataclass(frozen=True)
class Capture:
    """How a pipeline passes prompts to its transformer, and what its calls have beside.

    Made by `watch`; then `row` encodes a prompt.
    """

    pipeline: Any
    call: Kwargs
    """What the pipeline is called with, beside the prompt."""
    axes: dict[str, int | None]
    """Batch axis of each argument that depends on the prompt; None of a list."""
    place: int
    """Which of a step's rows is the prompt's, of the two that a guided call has."""
    null: dict[str, Tensor] | None
    """The prompt that asks for nothing; None where the pipeline does not guide."""
    common: dict[str, Tensor]
    constants: Kwargs
    masks: dict[str, str] = field(default_factory=dict)
    """Tensors that are cut to a prompt's own length, and the mask of each: where that was seen to change nothing, or the pipeline
    does so itself."""
    optional: dict[str, "_Optional"] = field(default_factory=dict)
    """Masks that the pipeline passes only where they hide something."""
    along: dict[str, int] = field(default_factory=dict)
    """Axis of a prompt's tensor that is as long as the prompt, where that is not its first, as which it is stored."""

    def row(self, words: str) -> Prompt:
        """A prompt, encoded.

        Raises:
            HostError: the pipeline does not run on it, or passes it otherwise than those that were tried.
        """
        calls = _with_masks(first_step(self.pipeline, prompt=words, **self.call), self.optional)
        rows = {name: _rows(calls, name, axis) for name, axis in self.axes.items()}
        if any(len(found) <= self.place for found in rows.values()):
            raise HostError(f"{type(self.pipeline).__name__} passes {words!r} otherwise than other prompts")
        first = {name: self.along.get(name, 0) for name in rows}
        return Prompt(
            words, self._cut({n: found[self.place].movedim(first[n], 0) for n, found in rows.items()})
        )

    @property
    def forms(self) -> dict[str, Form]:
        """How arguments are made of what is stored."""
        return {
            name: Form(axis=axis or 0, along=self.along.get(name, 0), optional=name in self.optional)
            for name, axis in self.axes.items()
        }

    def null_row(self, words: str) -> Prompt | None:
        return None if self.null is None else Prompt(words, self._cut(self.null))

    def _cut(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = dict(tensors)
        for name, mask in self.masks.items():
            length = 1 + max(tensors[mask].nonzero().flatten().tolist(), default=0)
            kept |= {part: tensors[part][:length].clone() for part in (name, mask)}
        return kept


@dataclass(frozen=True)
class _Optional:
    """A mask that is left out of calls in which it hides nothing."""

    of: str
    """The tensor whose tokens it hides."""
    axis: int
    """Of that tensor's tokens; its prompts stand along the first."""
    dtype: torch.dtype

    def ones(self, call: Kwargs) -> Tensor:
        """The mask [B, T] that hides nothing of a call."""
        shape = call[self.of].shape
        return torch.ones(shape[0], shape[self.axis], dtype=self.dtype)


@contextmanager
def _untold() -> Iterator[None]:
    """Inside, libraries do not warn of prompts too long for a pipeline: they are none of the user's."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@_untold()
def watch(pipeline: Any, host: Host | None, *, call: Mapping[str, Any]) -> Capture:
    """Find how a pipeline passes prompts, by a handful of calls that end before the transformer's first step.

    Args:
        host: of its transformer, which is asked whether a padded prompt may be cut; None: none is.
        call: what the pipeline is called with, beside the prompt.

    Raises:
        HostError: the pipeline does not run on this call, or passes a prompt in a way that no table can hold.
    """
    steps = [first_step(pipeline, prompt=prompts, **call) for prompts in (*_TRIED, list(_TRIED[:2]))]
    steps += [first_step(pipeline, prompt=_TRIED[0], seed=1, **call), *_of_other_sizes(pipeline, call)]
    optional = _optional_masks([*steps, *_of_unlike_lengths(pipeline, call)])
    first, other, longer, two, seeded, *sized = (_with_masks(calls, optional) for calls in steps)
    names = [name for name in first[0] if name not in _TIMES and _equal(first[0][name], seeded[0].get(name))]
    axes = {name: _batch_axis(first[0][name], two[0].get(name)) for name in names}
    moved = [name for name in names if _moves(name, first, other) or _moves(name, first, longer)]
    by_size = [name for name in names if any(_moves(name, first, step) for step in sized)]
    if both := sorted(set(moved) & set(by_size)):
        raise HostError(
            f"{type(pipeline).__name__} passes {', '.join(both)}, which depends on the prompt and on the size of the image: prompts "
            "of it cannot be stored"
        )
    if not moved:
        raise HostError(f"{type(pipeline).__name__} passes nothing that depends on the prompt")
    if alone := [name for name in moved if axes[name] is None and not name.endswith("[]")]:
        raise HostError(
            f"{type(pipeline).__name__} passes {', '.join(alone)} without an axis of prompts: they cannot be stored"
        )
    table = {name: axes[name] for name in moved}
    place, null = _places(pipeline, first, other, table)
    kept = [name for name in names if name not in moved and name not in by_size]
    common = {
        n: _rows(first, n, axes[n])[0]
        for n in kept
        if axes[n] is not None and isinstance(first[0][n], Tensor)
    }
    constants = {n: first[0][n] for n in kept if n not in common and first[0][n] != {}}
    constants = {n: list(value) if isinstance(value, tuple) else value for n, value in constants.items()}
    rows, long_rows = (
        {name: _rows(calls, name, axis)[place] for name, axis in table.items()} for calls in (first, longer)
    )
    own = {
        name: _length_axis(rows[name], long_rows[name])
        for name in rows
        if rows[name].shape != long_rows[name].shape and not name.endswith("[]")
    }
    masks = _masks(host, rows) | _own_masks(rows, own)
    if loose := sorted(own.keys() - {*masks, *masks.values()}):
        raise HostError(
            f"{type(pipeline).__name__} passes {', '.join(loose)} as long as each prompt is, and no mask, so that its transformer cannot "
            "tell the padding of a batch from words: prompts of it cannot be stored, unless an option of its call (--call) brings all to one length"
        )
    along = {name: axis for name, axis in own.items() if axis}
    null = null and {name: row.movedim(along.get(name, 0), 0) for name, row in null.items()}
    return Capture(pipeline, dict(call), table, place, null, common, constants, masks, optional, along)


def _length_axis(a: Tensor, b: Tensor) -> int | None:
    """The axis along which two tensors differ in length; None if there is no such axis, or more than one."""
    unlike = [i for i in range(a.ndim) if a.ndim == b.ndim and a.shape[i] != b.shape[i]]
    return unlike[0] if len(unlike) == 1 else None


def _own_masks(rows: Mapping[str, Tensor], own: Mapping[str, int | None]) -> dict[str, str]:
    """Of tensors in the length of each prompt, along these axes, the mask of each that has one."""
    masks = [name for name in own if rows[name].ndim == 1 and _is_mask(rows[name])]
    return {
        name: mask
        for mask in masks
        for name, axis in own.items()
        if name not in masks and axis is not None and rows[name].shape[axis] == len(rows[mask])
    }


def _optional_masks(steps: Sequence[list[Kwargs]]) -> dict[str, _Optional]:
    """Masks [B, T] of ones and zeros that some calls have and others have not, by name."""
    calls = [call for step in steps for call in step]
    found = {
        mask: _Optional(name, tensor.shape.index(value.shape[1], 1), value.dtype)
        for call in calls
        for mask, value in call.items()
        if isinstance(value, Tensor) and value.ndim == 2 and _is_mask(value)
        for name, tensor in call.items()
        if isinstance(tensor, Tensor)
        and tensor.ndim > 2
        and tensor.shape[0] == len(value)
        and value.shape[1] in tensor.shape[1:-1]
    }
    return {mask: of for mask, of in found.items() if any(mask not in call for call in calls)}


def _with_masks(calls: list[Kwargs], optional: Mapping[str, _Optional]) -> list[Kwargs]:
    """The same calls with the masks that they leave out, which hide nothing."""
    return [
        call | {m: of.ones(call) for m, of in optional.items() if m not in call and of.of in call}
        for call in calls
    ]


def _is_mask(tensor: Tensor) -> bool:
    return bool(((tensor == 0) | (tensor == 1)).all() and tensor.any())


def _of_other_sizes(pipeline: Any, call: Mapping[str, Any]) -> list[list[Kwargs]]:
    """Steps of images of two other sizes, and of videos of other lengths; none where the pipeline takes no size."""
    takes = inspect.signature(pipeline.__call__).parameters
    found: list[list[Kwargs]] = []
    for height, width in _SIZES if {"height", "width"} <= takes.keys() else ():
        with suppress(HostError):
            found.append(first_step(pipeline, prompt=_TRIED[0], **{**call, "height": height, "width": width}))
        if len(found) == 2:
            break
    else:
        if "height" in takes:
            raise HostError(
                f"{type(pipeline).__name__} takes none of the sizes that were tried, so what depends on the size is not known"
            )
    if "num_frames" in takes:
        found += [first_step(pipeline, prompt=_TRIED[0], **{**call, "num_frames": n}) for n in _FRAMES]
    return found


def _of_unlike_lengths(pipeline: Any, call: Mapping[str, Any]) -> list[list[Kwargs]]:
    """A step of a short and a long prompt together; none where the pipeline does not take them so."""
    with suppress(HostError):
        return [first_step(pipeline, prompt=list(_TRIED[1:]), **call)]
    return []


def _moves(name: str, a: list[Kwargs], b: list[Kwargs]) -> bool:
    return any(not _equal(x.get(name), y.get(name)) for x, y in zip(a, b, strict=True))


def _batch_axis(one: Any, two: Any) -> int | None:
    """The axis along which two prompts stand where one stood; None where none grows."""
    if not isinstance(one, Tensor) or not isinstance(two, Tensor) or one.ndim != two.ndim:
        return None
    grown = [i for i in range(one.ndim) if two.shape[i] == 2 * one.shape[i] and one.shape[i]]
    return grown[0] if len(grown) == 1 else None


def _rows(calls: list[Kwargs], name: str, axis: int | None) -> list[Tensor]:
    """An argument's rows of a step, without the batch axis: of a guided pipeline two, in one call or in two."""
    values = [call[name] for call in calls if name in call]
    if axis is None:
        return [item for value in values for item in value]
    return [row.clone() for value in values for row in value.unbind(axis)]


def _places(
    pipeline: Any, first: list[Kwargs], other: list[Kwargs], table: Mapping[str, int | None]
) -> tuple[int, dict[str, Tensor] | None]:
    """Which row of a step is the prompt's, and the rows of the null, if there is one."""
    pairs = {n: (_rows(first, n, axis), _rows(other, n, axis)) for n, axis in table.items()}
    count = max(len(rows) for rows, _ in pairs.values())
    moved = {
        i
        for rows, others in pairs.values()
        for i, (a, b) in enumerate(zip(rows, others, strict=True))
        if not _equal(a, b)
    }
    if len(moved) != 1 or count > 2 or any(len(rows) != count for rows, _ in pairs.values()):
        raise HostError(
            f"{type(pipeline).__name__} calls its transformer with {count} rows a prompt, of which {len(moved)} depend on it: one of one or "
            "two is expected"
        )
    place = moved.pop()
    null = {name: rows[1 - place] for name, (rows, _) in pairs.items()} if count == 2 else None
    return place, null


def _masks(host: Host | None, row: Mapping[str, Tensor]) -> dict[str, str]:
    """Tensors that may be cut to where their mask ends: if a tiny model of the class gives the same for a prompt that is cut and one
    that is padded."""
    masks = [n for n, t in row.items() if t.ndim == 1 and len(t) > 1 and _is_mask(t)] if host else []
    found = {
        name: mask
        for mask in masks
        for name, tensor in row.items()
        if tensor.ndim == 2
        and len(tensor) == len(row[mask])
        and not name.endswith("[]")
        and "." not in name + mask
    }
    return {name: mask for name, mask in found.items() if host and _cuts(host, name, mask, row[mask].dtype)}


@torch.no_grad()
def _cuts(host: Host, name: str, mask: str, dtype: torch.dtype) -> bool:
    model = host.tiny().eval()
    length, own = 6, 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inputs = host.example(model, rows=4, cols=4, batch_size=1, num_text=length)
    if name not in inputs or inputs[name].shape[1] != length:
        return False
    padded = torch.arange(length)[None] < own
    whole = model(**{**inputs, mask: padded.to(dtype)}, return_dict=False)[0]
    cut = model(
        **{**inputs, name: inputs[name][:, :own], mask: padded[:, :own].to(dtype)}, return_dict=False
    )[0]
    if isinstance(whole, Sequence):
        whole, cut = whole[0], cut[0]
    return bool((whole - cut).norm() <= _SAME * whole.norm())

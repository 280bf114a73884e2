"""A host's spec from traced calls of a model: `trace` observes, proposes, and says what it could not tell."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from ..contract import Grid
from ..errors import HostError
from ..machine.files import write_bytes
from ._forwards import run
from ._observing import AttentionCall, Observation, observe
from ._pipelines import Caught, catch
from ._proposing import Knowledge, propose
from ._sdpa import SdpaHost
from ._spec import SdpaSpec


@dataclass(frozen=True)
class SeenAttention:
    """A row of a trace: attentions of one kind."""

    path: str
    """Of their modules, `*` for the numbers of blocks."""
    count: int
    kind: str
    """`self`, `joint` with text, `mixed` (more keys than queries), `cross` to text, or `text` alone."""
    queries: str
    keys: str
    mask: str


@dataclass(frozen=True)
class Trace:
    """A proposed spec, what it rests on, and what a person has to say."""

    spec: SdpaSpec
    questions: tuple[str, ...]
    """What the trace could not tell, each with what was assumed."""
    grid: Grid
    """Of the example's image tokens."""
    num_forwards: int
    seen: tuple[SeenAttention, ...]
    model: nn.Module
    example: Mapping[str, Any]
    """The keyword arguments of the forward pass that was traced."""

    @property
    def host(self) -> SdpaHost:
        """What `graft(model, plan, host=...)` takes."""
        return SdpaHost(self.spec)

    def save(self, path: str | Path) -> None:
        """Write the spec as YAML, headed by the questions: for `--spec FILE`, and to edit by hand."""
        head = [f"# {self.spec.name}: traced from {type(self.model).__name__}, {self.num_forwards} forward passes"]
        head += [f"# to check: {question}" for question in self.questions]
        facts = self.spec.model_dump(mode="json", exclude_defaults=True)
        write_bytes(Path(path), ("\n".join(head) + "\n" + yaml.safe_dump(facts, sort_keys=False, width=120)).encode())


def trace(
    source: Any,
    *,
    example: Mapping[str, Any] | None = None,
    image: str | None = None,
    native_grid: Grid | None = None,
    **call: Any,
) -> Trace:
    """A spec of a transformer, proposed from traced forward passes: the host of any class that calls SDPA.

    In these passes attention does not mix tokens, and one argument at a time is perturbed, at some of its places: this shows
    whose tokens each attention sees, in what order and where on the image. It takes about 15 forward passes for each argument of
    tokens, at the sizes of the example; 20 to 40 for most models.

    Args:
        source: a diffusers pipeline, or a model.
        example: keyword arguments of the model's forward; only for a model without its pipeline.
        image: the argument that holds the image; by default the first that reaches the attention.
        native_grid: image tokens that the model was trained for; by default what the pipeline or the model says.
        call: what the pipeline is called with, such as `prompt` or `prompt_embeds`; sizes are small where it leaves them out.

    Raises:
        HostError: no transformer, no example, or no attention that kernels could take the place of.
    """
    caught = _example(source, example, call)
    seen = observe(caught.model, caught.inputs, image=image)
    proposal = propose(caught.model, caught.inputs, seen, known=caught.known, native_grid=native_grid)
    host = SdpaHost(proposal.spec)
    host.sites(caught.model)
    return Trace(
        spec=proposal.spec,
        questions=tuple(proposal.questions),
        grid=host.image_grid(caught.model, caught.inputs),
        num_forwards=seen.num_forwards,
        seen=tuple(_rows(seen)),
        model=caught.model,
        example=caught.inputs,
    )


def _example(source: Any, example: Mapping[str, Any] | None, call: Mapping[str, Any]) -> Caught:
    if not isinstance(source, nn.Module):
        if example is not None:
            raise HostError("example= is for a model; a pipeline makes its own, from what it is called with")
        return catch(source, call)
    if "UNet" in type(source).__name__:
        raise HostError(f"a {type(source).__name__} is a UNet, whose blocks have several resolutions: grafting edits transformers")
    if example is None:
        raise HostError(
            f"a {type(source).__name__} alone says nothing of its inputs: give example= the keyword arguments of a forward pass, or "
            "trace its pipeline"
        )
    if call:
        raise HostError(f"{', '.join(call)}: only a pipeline is called with these; a model's arguments go into example=")
    return Caught(source, dict(example), Knowledge())


def _rows(seen: Observation) -> list[SeenAttention]:
    rows = [_row(call) for call in seen.calls]
    return [SeenAttention(row.path, count, *_rest(row)) for row, count in Counter(rows).items()]


def _row(call: AttentionCall) -> SeenAttention:
    path = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", call.path)
    words = [" + ".join(map(str, runs)) for runs in (call.queries, call.keys)]
    mask = call.mask if call.mask_padded == call.mask else f"{call.mask}, {call.mask_padded} where prompts are padded"
    return SeenAttention(path, 1, call.kind, *words, "causal" if call.causal else mask)


def _rest(row: SeenAttention) -> tuple[str, str, str, str]:
    return row.kind, row.queries, row.keys, row.mask

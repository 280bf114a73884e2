"""A host's spec from traced calls of a model: `trace` observes, proposes, and says what it could not tell."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from ..contract import Grid
from ..errors import HostError
from ..machine.files import write_bytes
from ._arguments import Knowledge
from ._forwards import copied, run, tensors_of
from ._host import LayoutTracker
from ._observing import AttentionCall, observe
from ._pipelines import Caught, catch
from ._proposing import propose
from ._registry import hosts
from ._sdpa import SdpaHost
from ._spec import BlockList, SdpaSpec


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

    @property
    def tokens(self) -> str:
        """Its queries, and its keys where they are others."""
        return self.queries if self.queries == self.keys else f"{self.queries} over {self.keys}"


@dataclass(frozen=True)
class Trace:
    """A proposed spec, what it rests on, and what a person has to say."""

    spec: SdpaSpec
    questions: tuple[str, ...]
    """What the trace could not tell, each with what was assumed."""
    partial: tuple[str, ...]
    """Attentions among the spec's whose masks are not of keys alone: kernels cannot answer them, so plans leave them out."""
    grid: Grid
    """Of the example's image tokens."""
    num_forwards: int
    seen: tuple[SeenAttention, ...]
    takes: tuple[str, ...]
    """What may be edited in each of the spec's lists of blocks."""
    model: nn.Module
    example: Mapping[str, Any]
    """The keyword arguments of the forward pass that was traced."""

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks whose attention a kernel can answer."""
        sites = self.host.sites(self.model)
        return tuple(
            site.block
            for site in sites
            if site.role == "attention" and site.attention.turn and site.path not in self.partial
        )

    def outputs(self) -> list[Tensor]:
        """What the model, as it is now, returns for the example."""
        return tensors_of(run(self.model, copied(self.example)))

    def __str__(self) -> str:
        """What was seen, what the spec takes, and what is to be checked, a line each."""
        grid, spec = self.grid, self.spec
        lines = [
            f"{type(self.model).__name__}: {grid.frames} x {grid.rows} x {grid.cols} image tokens, {self.num_forwards} forward passes",
            *(f"  {row.count} x {row.path}: {row.kind}, {row.tokens}, mask: {row.mask}" for row in self.seen),
            *(
                f"{b.attention_of(f'{b.path}.*')} takes {edits}"
                for b, edits in zip(spec.blocks, self.takes, strict=True)
            ),
            *(f"To check: {question}" for question in self.questions),
        ]
        return "\n".join(lines)

    @property
    def host(self) -> SdpaHost:
        """What `graft(model, plan, host=...)` takes."""
        return SdpaHost(self.spec)

    def save(self, path: str | Path) -> None:
        """Write the spec as YAML, headed by the questions: for `--spec FILE`, and to edit by hand."""
        head = [
            f"# {self.spec.name}: traced from {type(self.model).__name__}, {self.num_forwards} forward passes"
        ]
        head += [f"# to check: {question}" for question in self.questions]
        facts = self.spec.model_dump(mode="json", exclude_defaults=True)
        write_bytes(
            Path(path), ("\n".join(head) + "\n" + yaml.safe_dump(facts, sort_keys=False, width=120)).encode()
        )


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
    if LayoutTracker.of(caught.model) is not None:
        raise HostError(
            f"the {type(caught.model).__name__} is grafted already: undo that, or trace the model that it was made from"
        )
    forwards: list[None] = []
    with caught.model.register_forward_pre_hook(lambda *_: forwards.append(None)):
        seen = observe(caught.model, caught.inputs, image=image)
        proposal = propose(caught.model, caught.inputs, seen, known=caught.known, native_grid=native_grid)
    name = proposal.spec.name
    spec = proposal.spec.model_copy(update={"name": f"{name}-traced"}) if name in hosts() else proposal.spec
    host = SdpaHost(spec)
    return Trace(
        spec=spec,
        questions=tuple(proposal.questions),
        partial=tuple(proposal.partial),
        grid=host.image_grid(caught.model, caught.inputs),
        num_forwards=len(forwards),
        seen=tuple(replace(row, count=count) for row, count in Counter(map(_row, seen.calls)).items()),
        takes=tuple(", ".join(_takes(host, caught.model, blocks)) for blocks in spec.blocks),
        model=caught.model,
        example=caught.inputs,
    )


def _example(source: Any, example: Mapping[str, Any] | None, call: Mapping[str, Any]) -> Caught:
    if not isinstance(source, nn.Module):
        if example is not None:
            raise HostError("example= is for a model; a pipeline makes its own, from what it is called with")
        return catch(source, call)
    if "UNet" in type(source).__name__:
        raise HostError(
            f"a {type(source).__name__} is a UNet, whose blocks have several resolutions: grafting edits transformers"
        )
    if example is None:
        raise HostError(
            f"a {type(source).__name__} alone says nothing of its inputs: give example= the keyword arguments of a forward pass, or "
            "trace its pipeline"
        )
    if call:
        raise HostError(
            f"{', '.join(call)}: only a pipeline is called with these; a model's arguments go into example="
        )
    return Caught(source, dict(example), Knowledge())


def _takes(host: SdpaHost, model: nn.Module, blocks: BlockList) -> Iterator[str]:
    """What surgery may edit in the blocks of a list."""
    inside = [site for site in host.sites(model) if site.path.startswith(f"{blocks.path}.")]
    if blocks.turn:
        yield "kernels"
    for role, word, weights in (
        ("attention", "mixers", host.attention_weights),
        ("mlp", "MLPs", host.mlp_weights),
    ):
        modules = [model.get_submodule(s.path) for s in inside if s.role == role and s.module is not None]
        if modules:
            yield word if all(_has(weights, module) for module in modules) else f"{word} with init: random"
    free = [s for s in host.blocks(model) if s.path.startswith(f"{blocks.path}.") and not s.fixed]
    can_merge = any(
        b.block == a.block + 1 and all(s.call is not None and s.call.merges for s in (a, b))
        for a, b in pairwise(free)
    )
    can_drop = bool(free) and len({site.block for site in host.sites(model)}) > 1
    if can_merge or can_drop:
        yield " and ".join(["merge"] * can_merge + ["drop"] * can_drop)


def _has(weights: Callable[[nn.Module], object], module: nn.Module) -> bool:
    """Whether a host gives weights of a module for a mixer to inherit."""
    try:
        weights(module)
    except HostError:
        return False
    return True


def _row(call: AttentionCall) -> SeenAttention:
    mask = (
        call.mask
        if call.mask_padded == call.mask
        else f"{call.mask}, {call.mask_padded} where prompts are padded"
    )
    return SeenAttention(
        path=re.sub(r"(?<=\.)\d+(?=\.|$)", "*", call.path),
        count=1,
        kind=call.kind,
        queries=" + ".join(map(str, call.queries)),
        keys=" + ".join(map(str, call.keys)),
        mask="causal" if call.causal else mask,
    )

"""From what was observed of a model to a spec of it, with the questions that the observation leaves open."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from ..contract import Grid, ModuleCall
from ..errors import HostError
from ._arguments import (
    Knowledge,
    beside_of,
    channels_of,
    fact_of,
    image_rule,
    length_of,
    native_grid_of,
    other_inputs,
    output_of,
    process_of,
    time_of,
    with_entries,
)
from ._conventions import BlockConvention, attention_convention, block_convention
from ._forwards import Inputs, copied, is_mask, run, tensors_of
from ._host import config_of
from ._observing import AttentionCall, Observation, Run
from ._spec import BlockList, Fact, MlpLayers, SdpaSpec


@dataclass
class Proposal:
    """A spec, and what a person should look at before it is used."""

    spec: SdpaSpec
    questions: list[str] = field(default_factory=list)
    partial: list[str] = field(default_factory=list)
    """Attentions among the spec's whose masks are not of keys alone."""


@dataclass(frozen=True)
class _List:
    """Calls of the attention that stands at one path inside the blocks of one list."""

    path: str
    attention: str
    """Inside a block; empty where the block itself is it."""
    blocks: tuple[str, ...]
    calls: tuple[AttentionCall, ...]

    def __str__(self) -> str:
        return f"{self.path}.*.{self.attention}".rstrip(".")

    @property
    def image_calls(self) -> list[AttentionCall]:
        """Over image tokens, which a kernel may answer."""
        return [call for call in self.calls if call.kind in ("self", "joint", "mixed")]

    @property
    def silent(self) -> list[AttentionCall]:
        """Those over image tokens that make no call, where others of the list do."""
        return [call for call in self.image_calls if not call.is_sdpa and self.usual.is_sdpa]

    @property
    def usual(self) -> AttentionCall:
        return next((call for call in self.image_calls if call.is_sdpa), self.image_calls[0])


def propose(
    model: nn.Module, inputs: Inputs, seen: Observation, *, known: Knowledge, native_grid: Grid | None = None
) -> Proposal:
    """The spec that follows from an observation.

    Raises:
        HostError: no attention over image tokens stands in a list of blocks.
    """
    questions: list[str] = []
    lists = list(_usable(_lists(model, seen), questions))
    if not lists:
        raise HostError(
            f"{type(model).__name__} has no attention over the tokens of {seen.image} that a kernel could take the place "
            f"of: {'; '.join(questions) or _seen_instead(seen)}"
        )
    usual = lists[0].usual
    image, grid = image_rule(model, inputs, seen.image, usual, known, questions)
    returned = tensors_of(run(model, copied(inputs)))
    if beside := beside_of(inputs, returned, image):
        image = image.model_copy(update={"beside": beside})
    if native_grid is None:
        native_grid = native_grid_of(model, image, grid, known, questions)
    orders = [_order(found, inputs) for found in lists]
    conventions = list(_conventions(model, inputs, seen, lists, orders))
    spec = SdpaSpec(
        name=_name(type(model)),
        model_class=_import_path(type(model)),
        blocks=tuple(blocks for blocks, _, _ in conventions),
        num_heads=fact_of(model, usual.num_heads, "heads", "num_attention_heads"),
        head_dim=_head_dim(model, usual),
        order=orders[0],
        image=image,
        native_grid=native_grid,
        native_num_text=max(map(_num_others, lists)),
        channels=channels_of(model, inputs[seen.image], image),
        projections=next((found for _, found, _ in conventions if found), None),
        mlp=next((found for _, _, found in conventions if found), None),
        time=with_entries(known.time or time_of(inputs, questions), inputs, grid),
        output=known.output or output_of(inputs, returned, image, questions),
        process=process_of(known, questions),
        distilled=bool(config_of(model).get("guidance_embeds")),
        inputs=dict(other_inputs(model, inputs, seen, image, usual)),
    )
    with_text = [found for found in lists if found.usual.kind != "self"]
    is_unmasked = all(call.mask_padded == "none" for found in with_text for call in found.image_calls)
    if with_text and is_unmasked and any(map(is_mask, tensors_of(dict(inputs)))):
        questions.append(
            "masked: the example has a mask that these attentions do not see; set it if they do with prompts of several lengths"
        )
    questions += [f"{path}: its class is called attention, and it makes no call" for path in seen.silent]
    partial = {call.path for found in lists for call in found.image_calls if _is_partial(call)}
    silent = {call.path for found in lists for call in found.silent}
    questions += [f"{path}: its mask is not of keys alone; leave it out of plans" for path in sorted(partial)]
    questions += [f"{path}: it makes no call, as others do; leave it out of plans" for path in sorted(silent)]
    partial |= silent
    return Proposal(_with_heads(model, spec, lists), questions, sorted(partial))


def _lists(model: nn.Module, seen: Observation) -> Iterator[_List]:
    """Attentions by their list of blocks, in the order in which they run first."""
    found: dict[tuple[str, str], dict[str, list[AttentionCall]]] = {}
    for call in seen.calls:
        place = re.fullmatch(r"(.*?)\.(\d+)(?:\.(.+))?", call.path)
        if place and isinstance(model.get_submodule(place[1]), nn.ModuleList | nn.Sequential):
            call = call if call.is_sdpa else _with_heads_of(model, call)
            found.setdefault((place[1], place[3] or ""), {}).setdefault(place[2], []).append(call)
    for (path, attention), blocks in found.items():
        calls = tuple(call for calls in blocks.values() for call in calls)
        yield _List(path, attention, tuple(blocks), calls)


def _with_heads_of(model: nn.Module, call: AttentionCall) -> AttentionCall:
    """With the heads that the model's config tells, of attention that makes no call which shows them."""
    heads = config_of(model).get("num_attention_heads")
    if not isinstance(heads, int) or call.head_dim % heads:
        return call
    return replace(call, num_heads=heads, num_kv_heads=heads, head_dim=call.head_dim // heads)


def _usable(lists: Iterator[_List], questions: list[str]) -> Iterator[_List]:
    """Those over image tokens that a spec can describe; at most one attention of a list of blocks, of SDPA where there is one."""
    taken: dict[str, _List] = {}
    with_image = [found for found in lists if found.image_calls]
    of_sdpa = {found.path for found in with_image if found.usual.is_sdpa}
    for found in with_image:
        where, usual = str(found), found.usual
        if not usual.is_sdpa:
            means = "is left out" if found.path in of_sdpa else "takes mixers alone"
            questions.append(
                f"{where} {means}: it makes no call of scaled_dot_product_attention, as linear attention"
            )
            if found.path in of_sdpa:
                continue
        if reason := _hindrance(found):
            questions.append(f"{where} is left out: {reason}")
        elif found.path in taken:
            questions.append(f"{where} is left out: {taken[found.path]} is the attention of these blocks")
        elif taken and usual.head_dim != (first := next(iter(taken.values())).usual).head_dim:
            questions.append(
                f"{where} is left out: heads of {usual.head_dim} channels, others of {first.head_dim}"
            )
        elif taken and usual.num_image != first.num_image:
            questions.append(
                f"{where} is left out: {usual.num_image} image tokens in a call, others {first.num_image}"
            )
        elif taken and _along(usual) != _along(first):
            # as many frames as a frame has tokens: attention along time is told by its axes alone
            questions.append(
                f"{where} is left out: its image tokens lie along {_along(usual)} of the image, others' along {_along(first)}"
            )
        else:
            taken[found.path] = found
            yield found


def _along(call: AttentionCall) -> str:
    """The axes of the image along which a call's tokens lie."""
    return f"axes {', '.join(str(axis.index) for axis in call.axes)}"


def _hindrance(found: _List) -> str:
    """Why a spec cannot describe an attention; empty if it can."""
    usual = found.usual
    if any((c.queries, c.keys) != (usual.queries, usual.keys) for c in found.image_calls):
        return "its calls have several layouts"
    if sum(run.kind == "image" for run in usual.keys) != 1 or not usual.raster:
        return "its image tokens do not stand side by side in raster order"
    if usual.kind == "mixed" and {run.kind for run in usual.queries} != {"image"}:
        return "its queries are neither all tokens nor those of the image"
    if usual.mask == "a bias":
        return "its mask adds other numbers than 0 and minus infinity to the scores, which hides nothing: one of bools can be answered"
    if all(map(_is_partial, found.image_calls)):
        return "it hides some keys from some queries alone"
    if usual.num_image < 2:
        return "it sees a single image token"
    return ""


def _is_partial(call: AttentionCall) -> bool:
    """Whether an attention has a mask that is not of keys alone."""
    return call.causal or not {"of pairs", "a bias"}.isdisjoint((call.mask, call.mask_padded))


def _seen_instead(seen: Observation) -> str:
    alone = [call.path for call in seen.calls if call.kind in ("self", "joint", "mixed")]
    if alone:
        return (
            f"{alone[0] or 'its own, of the model itself,'} stands in no list of blocks: what is edited is counted by its place in an "
            "nn.ModuleList"
        )
    kinds = ", ".join(sorted({f"{call.path} ({call.kind})" for call in seen.calls})[:4])
    silent = f"; no call was made by {', '.join(seen.silent[:2])}" if seen.silent else ""
    return f"found {kinds}{silent}"


def _num_keys(call: AttentionCall) -> int:
    return sum(run.length for run in call.keys)


def _num_others(found: _List) -> int:
    """Tokens beside the image's that an attention sees."""
    return _num_keys(found.usual) - found.usual.num_image


def _order(found: _List, inputs: Inputs) -> tuple[str, ...]:
    """The runs of tokens among the keys; where others stand on both sides, those of one side by their arguments."""
    keys = found.usual.keys
    place = next(i for i, run in enumerate(keys) if run.kind == "image")
    before, after = keys[:place], keys[place + 1 :]
    if not (before and after):
        return tuple("image" if run.kind == "image" else "rest" for run in _merged(keys))
    sides = (
        (after, ("rest", "image", *(tokens.argument for tokens in after))),
        (before, (*(tokens.argument for tokens in before), "image", "rest")),
    )
    for named, order in sides:
        if all(length_of(inputs, tokens.argument) == tokens.length for tokens in named):
            return order
    raise HostError(
        f"{found}: tokens stand on both sides of the image, and neither side is as long as "
        f"arguments are: {', '.join(map(str, keys))}"
    )


def _merged(keys: Sequence[Run]) -> list[Run]:
    """With runs that are not the image's, side by side, as one."""
    groups = itertools.groupby(keys, key=lambda run: run.kind == "image")
    return [next(iter(runs)) for _, runs in groups]


def _name(model_class: type) -> str:
    """Of the host: its class's, without what all classes are called."""
    short = re.sub(r"(Transformer|DiT)?(\d?D)?(Transformer|DiT)?(Model)?$", "", model_class.__name__)
    return re.sub(r"\W", "", short or model_class.__name__).lower()


def _import_path(model_class: type) -> str:
    package = model_class.__module__.partition(".")[0]
    if package == "diffusers":
        import diffusers

        if getattr(diffusers, model_class.__name__, None) is model_class:
            return f"diffusers:{model_class.__name__}"
    return f"{model_class.__module__}:{model_class.__qualname__}"


def _head_dim(model: nn.Module, usual: AttentionCall) -> Fact:
    """By its name, or as channels over heads."""
    named = fact_of(model, usual.head_dim, "head_dim", "attention_head_dim")
    heads = fact_of(model, usual.num_heads, "heads", "num_attention_heads")
    dim = usual.num_heads * usual.head_dim
    widths = [
        name for name in ("hidden_size", "dim", "model_dim", "inner_dim") if config_of(model).get(name) == dim
    ]
    if isinstance(named, str) or not widths or isinstance(heads, int):
        return named
    return f"config.{widths[0]} / {heads}"


def _conventions(
    model: nn.Module,
    inputs: Inputs,
    seen: Observation,
    lists: Sequence[_List],
    orders: Sequence[tuple[str, ...]],
) -> Iterator[tuple[BlockList, tuple[str, str, str, str] | None, MlpLayers | None]]:
    """Each list as the spec says it, with what is said once for all lists."""
    projections: tuple[str, str, str, str] | None = None
    layers: MlpLayers | None = None
    for found, order in zip(lists, orders, strict=True):
        usual = found.usual
        dim = usual.num_heads * usual.head_dim
        block = block_convention(
            model, inputs, found.path, num_image=usual.num_image, dim=dim, modules=seen.modules
        )
        paths = [f"{found.path}.{i}.{found.attention}".rstrip(".") for i in found.blocks]
        masked = any("of keys" in (call.mask, call.mask_padded) for call in found.image_calls)
        attention = None
        if usual.kind != "mixed" and not masked and _turn(found) in ((), ("image",)) and found.attention:
            attention = attention_convention(model, inputs, paths, num_tokens=_num_keys(usual), dim=dim)
        if attention and attention.projections and projections in (None, attention.projections):
            projections = attention.projections
        if not found.attention:
            block = BlockConvention()
        has_mlp = block.mlp is not None and layers in (None, block.mlp_layers)
        layers = layers or block.mlp_layers
        alone: dict[Literal["attention", "mlp"], bool] = {
            "attention": not _num_others(found),
            "mlp": has_mlp and block.mlp_of_image,
        }
        blocks = BlockList(
            path=found.path,
            attention=found.attention,
            order=None if order == orders[0] else order,
            image_queries=usual.kind == "mixed",
            turn=_turn(found),
            masked=masked,
            mixers=attention.call if attention else None,
            mlp=block.mlp if has_mlp else None,
            mlp_call=block.mlp_call if has_mlp else ModuleCall(),
            image_alone=tuple(role for role in alone if alone[role] and any(map(_num_others, lists))),
            arguments=block.arguments,
            returns=block.returns,
            fixed=block.fixed,
            apart=block.apart if len(block.returns) == 1 else {},
        )
        yield blocks, projections, layers


def _turn(found: _List) -> tuple[Any, ...]:
    """What the calls of a pass of the attention are over, in order; calls of one sample each count once."""
    first = [c for c in found.calls if c.path == found.usual.path and c.execution == found.usual.execution]
    turn = tuple("image" if call in found.image_calls else "other" for call in first if call.is_sdpa)
    if len(turn) > 1 and set(turn) == {"image"} and all(call.batch_size == 1 for call in first):
        return ("image",)
    return turn


def _with_heads(model: nn.Module, spec: SdpaSpec, lists: Sequence[_List]) -> SdpaSpec:
    """With the heads of lists that have other heads than the first."""
    blocks = tuple(
        blocks
        if found.usual.num_heads == lists[0].usual.num_heads
        else blocks.model_copy(
            update={"num_heads": fact_of(model, found.usual.num_heads, "heads", "num_attention_heads")}
        )
        for blocks, found in zip(spec.blocks, lists, strict=True)
    )
    return spec.model_copy(update={"blocks": blocks})

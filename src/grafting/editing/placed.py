"""Modules that surgery inserts into a model: operators behind the calling convention of what they replace.

A kernel stands inside a copy of the host's attention module, whose call of `scaled_dot_product_attention` it answers; a mixer
stands behind an adapter. A merged pair stands in the place of its first block; where a block is no more, a module passes the
tokens on.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..contract import BlockCall, Kernel, Kwargs, Mixer, OperatorConfig, Site, TokenLayout
from ..errors import HostError
from ..hosts import LayoutTracker
from .masks import key_mask_of, with_images_last
from .plan import Choice, Merge, words_of


class Placed(nn.Module):
    """Base of modules that surgery inserts at a site; reads the layout of the model's forward pass."""

    fits = True
    """True if stage 1 has anything to fit."""
    choice: Choice | None = None
    """The plan's choice for this site; None of what only keeps the place of a merged pair's second block."""
    read_of: tuple[nn.Module, ...] = ()
    """The module that is read in its place, such as its processor, by a host that knows its parts: itself, or its `outline`."""

    def __init__(self, site: Site, tracker: LayoutTracker):
        super().__init__()
        self.site = site
        self.tracker = tracker

    def __getattr__(self, name: str) -> Any:
        """What else the host reads of the module that stood here."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not self.read_of or name.startswith("__"):
                raise
            return getattr(self.read_of[0], name)

    @property
    def replaces(self) -> tuple[str, ...]:
        """Paths of the modules in whose place it stands, in the order in which they run."""
        return (self.site.path,)

    def replaced_output(self, old: Sequence[nn.Module], args: tuple, kwargs: Kwargs) -> Any:
        """Output of the replaced modules for the arguments of a call."""
        (module,) = old
        return module(*args, **kwargs)


def outline(module: nn.Module) -> nn.Module:
    """A copy of a module that is no more, without values."""
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(t): torch.empty(t.shape, dtype=t.dtype, device="meta") for t in tensors})


class KernelAttention(Placed):
    """A host's attention module in which a kernel does what softmax attention did."""

    def __init__(self, attention: nn.Module, kernel: Kernel, *, site: Site, tracker: LayoutTracker):
        super().__init__(site, tracker)
        self.attention = attention
        self.kernel = kernel
        self.read_of = (attention,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.tracker.check()
        _pin_to_native(self.attention)
        calls: list[int] = []
        with _Interception(self._answer, self.site.attention.turn, calls):
            output = self.attention(*args, **kwargs)
        turn = len(self.site.attention.turn)
        if not calls:
            raise HostError(
                f"{self.site.path}: {type(self.attention).__name__} called scaled_dot_product_attention 0 times, and its host "
                f"declares {_calls(turn)}: the attention of a host, `attention` in a spec, is a module that calls it"
            )
        if len(calls) % turn or (len(calls) > turn and max(calls) > 1):
            raise HostError(
                f"{type(self.attention).__name__} called scaled_dot_product_attention {len(calls)} times on {calls} images; "
                f"its host declares {_calls(turn)}, or as many for each image"
            )
        return output

    def _answer(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The kernel's output for the arguments of `scaled_dot_product_attention`."""
        if dropout_p or is_causal:
            raise HostError(
                "the host calls scaled_dot_product_attention with dropout or is_causal, which a kernel cannot honour "
                f"(dropout_p {dropout_p}, is_causal {is_causal})"
            )
        layout = self.tracker.layout(self.site, key.shape[2])
        if query.shape[2] != layout.num_queries:
            raise HostError(
                f"the attention of block {self.site.block} has {query.shape[2]} queries and {key.shape[2]} keys, of which "
                f"{layout.grid.num_tokens} are the image's: its host declares {layout.num_queries} queries"
            )
        if attn_mask is not None:
            layout = replace(layout, key_mask=self._key_mask(attn_mask, layout))
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        if layout.key_mask is None or "padding" not in self.site.attention.order:
            return self.kernel(query, key, value, layout, scale=scale)
        places, aligned = with_images_last(layout, layout.key_mask)
        parts = (x.gather(2, places.expand_as(x)) for x in (query, key, value))
        output = self.kernel(*parts, aligned, scale=scale)
        return torch.empty_like(output).scatter(2, places.expand_as(output), output)

    def _key_mask(self, mask: Tensor, layout: TokenLayout) -> Tensor | None:
        """What a mask amounts to; models give one mask to all their blocks, which is read once a pass."""
        known = self.tracker.masks.get(id(mask))
        if known is None or known[0] is not mask:
            known = self.tracker.masks[id(mask)] = mask, key_mask_of(mask, layout)
        is_checked = self.site.attention.masked  # with the plan
        if known[1] is not None and not is_checked and isinstance(self.choice, OperatorConfig):
            faults = self.choice.call_faults(replace(self.site.attention, masked=True))
            if faults:
                raise HostError(
                    f"{words_of(self.site)}: {faults[0]}: use another operator, or prompts of one length"
                )
        return known[1]


def _calls(count: int) -> str:
    return f"{count} {'call' if count == 1 else 'calls'}"


def _pin_to_native(attention: nn.Module) -> None:
    """Let diffusers' attention call torch's, which can be answered, whatever backend the model's other layers run on.

    `model.set_attention_backend` reaches into grafted sites too, so this is seen to at every call.
    """
    for module in attention.modules():
        processor = getattr(module, "processor", None)
        if getattr(processor, "_attention_backend", "native") != "native":
            processor._attention_backend = "native"  # type: ignore[union-attr]  # of None it is "native" already


class MixerAdapter(Placed):
    """A mixer behind the calling convention of the module that it replaces."""

    def __init__(self, mixer: Mixer, *, site: Site, tracker: LayoutTracker):
        super().__init__(site, tracker)
        assert site.module is not None
        self.mixer = mixer
        self.call = site.module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.tracker.check()
        x = args[0] if args else kwargs[self.call.tokens]
        for name in self.call.must_be_none:
            if kwargs.get(name) is not None:
                raise HostError(
                    f"the host passes {name} to its attention, and a mixer cannot honour it: use a kernel"
                )
        mixed = self.mixer(x, self.tracker.layout(self.site, x.shape[1]))
        return mixed if self.call.returns == 1 else (mixed, *[None] * (self.call.returns - 1))


class MergedBlocks(Placed):
    """Blocks that were sequential, as branches on one input, and a linear layer that merges them; see `plan.Merge`.

    Args:
        branches: called as a block is; gives what each branch adds to the tokens, [B, L, D] each.
        merge: what is merged, and how that starts.
        sites: the blocks', in order.
    """

    def __init__(
        self,
        branches: nn.ModuleList,
        merge: Merge,
        *,
        sites: tuple[Site, ...],
        tracker: LayoutTracker,
    ):
        super().__init__(sites[0], tracker)
        dim, call = sites[0].dim, sites[0].call
        assert call is not None
        self.branches = branches
        self.merge = nn.Linear(len(branches) * dim, dim)
        self.of_outputs = merge.of == "outputs"
        self.call = call
        self.sites = sites
        share = 1 / len(branches) if merge.start == "average" else 1.0
        with torch.no_grad():
            self.merge.weight.copy_(share * torch.eye(dim).repeat(1, len(branches)))
            self.merge.bias.zero_()

    @property
    def replaces(self) -> tuple[str, ...]:
        return tuple(site.path for site in self.sites)

    def replaced_output(self, old: Sequence[nn.Module], args: tuple, kwargs: Kwargs) -> Tensor:
        return sequence(old, self.call, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = self.call.argument(self.call.returns[0], args, kwargs)
        updates = self.branches(*args, **kwargs)
        if self.of_outputs:
            return self.merge(_concatenated([x + update for update in updates]))
        return x + self.merge(_concatenated(updates))


def _concatenated(updates: Tensor | Sequence[Tensor]) -> Tensor:
    """Concatenate the updates of n branches, [n, B, L, D] or a sequence of tensors, to [B, L, n D]."""
    if isinstance(updates, Tensor):
        return updates.permute(1, 2, 0, 3).flatten(2)
    return torch.cat(tuple(updates), dim=-1)


class Passage(Placed):
    """Stands where a block was and passes its tokens on; it has no parameters."""

    fits = False

    def __init__(self, site: Site, tracker: LayoutTracker):
        super().__init__(site, tracker)
        assert site.call is not None
        self.call = site.call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tokens = tuple(self.call.argument(name, args, kwargs) for name in self.call.returns)
        return tokens if len(tokens) > 1 else tokens[0]


def sequence(blocks: Sequence[nn.Module], call: BlockCall, args: tuple, kwargs: Kwargs) -> Tensor:
    """Run blocks in sequence, each with these arguments except for the tokens."""
    (name,) = call.returns
    place = call.arguments.index(name)
    for block in blocks:
        x = block(*args, **kwargs)
        if place < len(args):
            args = (*args[:place], x, *args[place + 1 :])
        else:
            kwargs = kwargs | {name: x}
    return x


class _Interception(TorchFunctionMode):
    """Answers the calls of `scaled_dot_product_attention` that a turn marks `image`; every other function runs as it is.

    It adds the batch size of each call to `calls`: a list of the caller's, since torch.compile forgets the attributes of a
    mode when its `with` ends.
    """

    def __init__(self, answer: Callable[..., Tensor], turn: tuple[str, ...], calls: list[int]):
        super().__init__()
        self.answer = answer
        self.turn = turn
        self.calls = calls

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.unflatten:
            # written in Python with super(), which torch.compile cannot trace inside a mode; this is its native form
            return torch.unflatten(*args, **kwargs)
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        is_answered = self.turn[len(self.calls) % len(self.turn)] == "image"
        output = self.answer(*args, **kwargs) if is_answered else func(*args, **kwargs)
        self.calls.append(output.shape[0])
        return output


Operators = dict[str, Placed]
"""New modules, ready to stand at a site, by the site's path.

Those of merged and dropped blocks stand at the blocks' own paths; operators of a merged block stand inside its pair.
"""

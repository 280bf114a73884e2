"""A plan: which operators go where, and which blocks are merged or dropped, as data.

It is checked whole against a model's sites before anything is edited. Blocks are counted from 0 and named in a small language: `all`, `odd`, `even`, `[1, 3, 5]`, `"8-18:2"` (18 included),
`"1, 8-10"`, `every 3 of 4` (all but the first of each four).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    GetJsonSchemaHandler,
    SerializeAsAny,
    Tag,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue

from ..contract import KernelConfig, MixerConfig, OperatorConfig, Site
from ..errors import PlanError, listed
from ..machine.reading import JsonObject, cut, shown
from ..machine.settings import Settings
from ..operators import PRESETS, operator_configs, parse_operator

_RANGE = re.compile(r"([0-9]{1,12})(?:\s*-\s*([0-9]{1,12})(?:\s*:\s*([1-9][0-9]{0,11}))?)?")
_EVERY = re.compile(r"every\s+([0-9]{1,12})\s+of\s+([0-9]{1,12})")


def resolve_blocks(blocks: "str | int | Sequence[int]", num_blocks: int) -> list[int]:
    """The block numbers that `blocks` names in a model of `num_blocks`, in their order; not checked for range.

    A range that leads out of the model ends with the first number that does.

    Raises:
        ValueError: not in the language; says what is.
    """
    if isinstance(blocks, int):
        return [blocks]
    if not isinstance(blocks, str):
        return list(blocks)
    everything = {"all": slice(None), "odd": slice(1, None, 2), "even": slice(0, None, 2)}
    if blocks in everything:
        return list(range(num_blocks))[everything[blocks]]
    if match := _EVERY.fullmatch(blocks.strip()):
        chosen, of = map(int, match.groups())
        if not 0 < chosen <= of:
            raise ValueError(f"{blocks!r}: cannot choose {chosen} of {of}")
        return [i for i in range(num_blocks) if i % of >= of - chosen]
    matches = [_RANGE.fullmatch(part.strip()) for part in blocks.split(",")]
    if None in matches:
        raise ValueError(
            f"{shown(blocks)} names no blocks: write all, odd, even, [1, 3], '8-18:2', '1, 8-10' or 'every 3 of 4'"
        )
    bounds = [(int(a), int(b or a), int(step or 1)) for a, b, step in (m.groups() for m in matches if m)]
    if any(last < first for first, last, _ in bounds):
        raise ValueError(f"{shown(blocks)}: a range ends before it begins")
    ranges = [range(first, last + 1, step) for first, last, step in bounds]
    return [i for numbers in ranges for i in numbers[: _num_until(numbers, num_blocks)]]


def _num_until(numbers: range, num_blocks: int) -> int:
    """How many of some numbers come up to the first that is no block's, with it."""
    return 1 + len(range(numbers.start, min(numbers.stop, num_blocks), numbers.step))


def _check_blocks(blocks: "str | int | tuple[int, ...]") -> "str | int | tuple[int, ...]":
    resolve_blocks(blocks, num_blocks=1)
    if blocks == ():
        raise ValueError("names no block")
    return blocks


class _OperatorSchema:
    """For editors: an operator is one of the names, presets included, or the settings of one operator."""

    @classmethod
    def __get_pydantic_json_schema__(cls, _: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        configs = operator_configs()
        settings = [handler(config.__pydantic_core_schema__) for config in configs.values()]
        return {
            "anyOf": [
                {"type": "string", "enum": [*configs, *PRESETS]},
                {"type": "object", "required": ["name"], "oneOf": settings},
            ]
        }


Blocks = Annotated[str | int | tuple[int, ...], AfterValidator(_check_blocks)]
Operator = Annotated[SerializeAsAny[OperatorConfig], BeforeValidator(parse_operator), _OperatorSchema]


class _Edit(Settings):
    """An edit of a model."""

    refused_as: ClassVar = PlanError


class Replace(_Edit):
    """Put an operator in place of one role in some blocks."""

    edit: Literal["replace"] = "replace"
    role: Literal["attention", "mlp"]
    """Role of the replaced modules."""
    blocks: Blocks = "all"
    """Blocks, counted from 0: all, odd, even, [1, 3], '8-18:2', 'every 3 of 4'."""
    operator: Operator
    """The operator's name, or a mapping of its name and settings."""

    def __str__(self) -> str:
        return f"Replace(role={self.role!r}, blocks={self.blocks!r}, operator={self.operator.name!r})"


class Merge(_Edit):
    """Run pairs of sequential blocks side by side on one input, and merge what they add by one linear layer.

    With branches b1, b2 on tokens x [B, L, D]: x + W [b1(x) - x; b2(x) - x] + bias, W [D, 2D]. A layer on the outputs,
    W [b1(x); b2(x)] + bias (`of: outputs`), has the same parameters and mixes the branches alike, and also maps x itself,
    by W1 + W2. Here x passes as it is, so that a pair can also start as the sum of both updates.

    Source:
        arXiv:2506.05340, section on depth to width: 28 -> 14 deep, one linear layer 2D -> D a pair.
    """

    model_config = ConfigDict(json_schema_extra={"required": ["edit"]})

    edit: Literal["merge"] = "merge"
    blocks: Blocks = "all"
    """Blocks to merge; each two in a row form a pair, so "8-11" is (8, 9) and (10, 11)."""
    start: Literal["average", "sum"] = "average"
    """Initial merge of a pair: the average of its branches, W = [I/2, I/2], or the input and both updates, W = [I, I]."""
    of: Literal["updates", "outputs"] = "updates"
    """Merged tensors: the branches' updates to their input, or their whole outputs."""

    @model_validator(mode="after")
    def _check(self) -> "Merge":
        if (self.start, self.of) == ("sum", "outputs"):
            raise ValueError("start: sum requires of: updates; two outputs hold the input twice")
        return self

    def __str__(self) -> str:
        return f"Merge(blocks={self.blocks!r})"


class Drop(_Edit):
    """Remove some blocks and pass their input to the next block."""

    model_config = ConfigDict(json_schema_extra={"required": ["edit", "blocks"]})

    edit: Literal["drop"] = "drop"
    blocks: Blocks
    """Blocks to drop, by their numbers in the original model."""

    def __str__(self) -> str:
        return f"Drop(blocks={self.blocks!r})"


def _kind(edit: Any) -> Any:
    return edit.get("edit", "replace") if isinstance(edit, dict) else getattr(edit, "edit", None)


def _not_one(edits: Any) -> Any:
    """Edits as they are; a model is a sequence of its fields, which says nothing of what is wrong."""
    if isinstance(edits, Settings):
        raise ValueError("a plan has a list of edits: write [...] around this one")
    return edits


Edit = Annotated[
    Annotated[Replace, Tag("replace")] | Annotated[Merge, Tag("merge")] | Annotated[Drop, Tag("drop")],
    Discriminator(_kind),
]
Choice = OperatorConfig | Merge | Drop
"""The edit of a site: an operator, or for a whole block the edit that merges or drops it."""


class Plan(Settings):
    """The edits of a model, in any mixture; every site is edited at most once.

    Block numbers are those of the model as it was, whatever is merged or dropped. Operators of a merged block stand
    inside its branch.
    """

    refused_as: ClassVar = PlanError

    edits: Annotated[tuple[Edit, ...], BeforeValidator(_not_one)] = ()

    def resolve(
        self,
        sites: Sequence[Site],
        *,
        blocks: Sequence[Site] = (),
        host: str = "model",
    ) -> dict[Site, Choice]:
        """The edit of every edited site, in the order of the sites; then of every block, in the order of the blocks.

        Args:
            blocks: the blocks as sites; those that are not among them cannot be merged or dropped.
            host: what faults call the model.

        Raises:
            PlanError: lists every fault: blocks out of range or named twice, operators that do not fit, blocks that are
                no pairs, or that the host cannot do without.
        """
        num_blocks = 1 + max(site.block for site in (*sites, *blocks))
        chosen: dict[Site, Choice] = {}
        faults = []
        for number, edit in enumerate(self.edits):
            name = f"plan.{number}: {edit}"
            numbers = resolve_blocks(edit.blocks, num_blocks)
            role = edit.role if isinstance(edit, Replace) else "block"
            available = {s.block: s for s in (*sites, *blocks) if s.role == role}
            if outside := [block for block in numbers if block not in range(num_blocks)]:
                faults.append(f"{name}: {_no_blocks(outside, num_blocks)}")
            misfits: dict[str, list[int]] = {}
            for block in numbers:
                if block in outside:
                    continue
                site = available.get(block)
                if site is None:
                    faults.append(f"{name}: {_missing(block, role)}")
                elif site in chosen:
                    faults.append(f"{name}: {words_of(site)} is named twice")
                elif isinstance(edit, Replace):
                    chosen[site] = edit.operator
                    for fault in _misfits(edit.operator, site):
                        misfits.setdefault(fault, []).append(block)
                else:
                    chosen[site] = edit
                    faults += [f"{name}: block {block} cannot be edited: {site.fixed}"] if site.fixed else []
            faults += [f"{name}, {_numbered(where)}: {fault}" for fault, where in misfits.items()]
            if isinstance(edit, Merge):
                faults += [f"{name}: {fault}" for fault in _unpaired(numbers, available)]
        faults += _left_without_block(chosen, num_blocks)
        if faults:
            raise PlanError(fault_list(faults, f"plan for {host} (blocks 0..{num_blocks - 1})"))
        return {site: chosen[site] for site in (*sites, *blocks) if site in chosen}

    def randomised(self) -> "Plan":
        """The same plan with nothing of new operators taken from the host's weights: the control experiment.

        Merged blocks keep their weights: there is no operator in their place.
        """
        return Plan(edits=tuple(_randomised(edit) for edit in self.edits))


def operators_of(chosen: Mapping[Site, Choice]) -> dict[Site, OperatorConfig]:
    """The operators of a resolved plan."""
    return {site: choice for site, choice in chosen.items() if isinstance(choice, OperatorConfig)}


def describe_choice(choice: Choice | None) -> JsonObject | None:
    """Describe a site's edit as JSON with a `name`: an operator's, `merge` or `drop`."""
    if choice is None:
        return None
    if isinstance(choice, OperatorConfig):
        return choice.model_dump(mode="json")
    settings = choice.model_dump(mode="json", exclude={"edit", "blocks"})
    return {"name": choice.edit, **settings}


def merged_pairs(chosen: Mapping[Site, Choice]) -> list[tuple[Site, Site, Merge]]:
    """The pairs of blocks that a resolved plan merges."""
    merged = [(site, edit) for site, edit in chosen.items() if isinstance(edit, Merge)]
    return [
        (first, second, edit) for (first, edit), (second, _) in zip(merged[::2], merged[1::2], strict=True)
    ]


def words_of(site: Site) -> str:
    """A site as messages name it."""
    return f"block {site.block}" if site.role == "block" else f"the {site.role} of block {site.block}"


def fault_list(faults: Sequence[str], where: str) -> str:
    """One message of all distinct faults."""
    distinct = list(dict.fromkeys(faults))
    return listed(f"{len(distinct)} fault{'s' * (len(distinct) > 1)} in {cut(where)}", distinct)


def _randomised(edit: Replace | Merge | Drop) -> Replace | Merge | Drop:
    if not isinstance(edit, Replace):
        return edit
    return edit.model_copy(update={"operator": edit.operator.randomised()})


def _no_blocks(outside: Sequence[int], num_blocks: int) -> str:
    return f"no {_numbered(outside)}; there are 0..{num_blocks - 1}"


def _numbered(blocks: Sequence[int]) -> str:
    """Blocks by their numbers, each once: `block 7`, `blocks 7, 9`."""
    distinct = dict.fromkeys(blocks)
    return cut(f"block{'s' * (len(distinct) > 1)} {', '.join(map(str, distinct))}")


def _missing(block: int, role: str) -> str:
    if role == "block":
        return f"the host does not declare how block {block} is called"
    return f"block {block} has no replaceable {role}"


def _unpaired(numbers: Sequence[int], blocks: Mapping[int, Site]) -> list[str]:
    """Why these blocks, two by two, are not pairs that can be merged."""
    if len(numbers) % 2:
        return [f"{len(numbers)} blocks do not form pairs"]
    faults = []
    for first, second in zip(numbers[::2], numbers[1::2], strict=True):
        if second != first + 1:
            faults.append(f"blocks {first} and {second} are not consecutive")
        elif first in blocks and second in blocks:
            faults += _unlike(blocks[first], blocks[second])
    return faults


def _unlike(first: Site, second: Site) -> list[str]:
    lists = [site.path.rpartition(".")[0] for site in (first, second)]
    if lists[0] != lists[1]:
        return [f"blocks {first.block} and {second.block} are of different kinds ({' and '.join(lists)})"]
    assert first.call is not None
    if len(first.call.returns) > 1:
        streams = " and ".join(first.call.returns)
        return [
            f"blocks {first.block} and {second.block} give {streams}: only one tensor of tokens can be merged"
        ]
    return [
        f"block {site.block} cannot be merged: {site.call.apart}"
        for site in (first, second)
        if site.call is not None and site.call.apart
    ]


def _left_without_block(chosen: Mapping[Site, Choice], num_blocks: int) -> list[str]:
    """Operators in blocks that are dropped, and a model of which nothing is left."""
    dropped = {site.block for site, edit in chosen.items() if isinstance(edit, Drop)}
    faults = [
        f"block {site.block} is dropped, but its {site.role} is to be {operator.name}"
        for site, operator in operators_of(chosen).items()
        if site.block in dropped
    ]
    return [*faults, "every block is dropped"] if len(dropped) == num_blocks else faults


def _kernels_like(operator: OperatorConfig) -> str:
    """The end of a message that asks for a kernel: those that take the operator's role, and the one that is nearest to it."""
    kernels = [
        name
        for name, config in operator_configs().items()
        if issubclass(config, KernelConfig) and config.roles & operator.roles
    ]
    near = operator.kernel if isinstance(operator, MixerConfig) else None
    hint = f"; did you mean {near!r}?" if near else ";"
    return f"{hint} there are {', '.join(kernels)}" if kernels else ""


def _misfits(operator: OperatorConfig, site: Site) -> list[str]:
    if site.role not in operator.roles:
        return [f"{operator.name} replaces {' or '.join(sorted(operator.roles))}, not {site.role}"]
    if not isinstance(operator, KernelConfig) and site.module is None:
        return [
            f"{operator.name} is a mixer, and the host takes only kernels for this {site.role}{_kernels_like(operator)}"
        ]
    of_call = operator.call_faults(site.attention) if site.role == "attention" else []
    return [*operator.faults(site), *of_call]

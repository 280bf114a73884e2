"""A plan: which operators go where, as data. It is checked whole against a model's sites before anything is edited.

Blocks are counted from 0 and named in a small language: `all`, `odd`, `even`, `[1, 3, 5]`, `"8-18:2"` (18 included),
`"1, 8-10"`, `every 3 of 4` (all but the first of each four).
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetJsonSchemaHandler,
    SerializeAsAny,
)
from pydantic.json_schema import JsonSchemaValue

from .contract import KernelConfig, OperatorConfig, Role, Site
from .errors import PlanError
from .operators import operator_configs, parse_operator

_RANGE = re.compile(r"(\d+)(?:\s*-\s*(\d+)(?:\s*:\s*([1-9]\d*))?)?")
_EVERY = re.compile(r"every\s+(\d+)\s+of\s+(\d+)")


def resolve_blocks(blocks: "str | int | Sequence[int]", num_blocks: int) -> list[int]:
    """The block numbers that `blocks` names in a model of `num_blocks`, in their order; not checked for range.

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
            f"{blocks!r} names no blocks: write all, odd, even, [1, 3], '8-18:2', '1, 8-10' or 'every 3 of 4'"
        )
    bounds = [(int(a), int(b or a), int(step or 1)) for a, b, step in (m.groups() for m in matches if m)]
    if any(last < first for first, last, _ in bounds):
        raise ValueError(f"{blocks!r}: a range ends before it begins")
    return [i for first, last, step in bounds for i in range(first, last + 1, step)]


def _check_blocks(blocks: "str | int | tuple[int, ...]") -> "str | int | tuple[int, ...]":
    resolve_blocks(blocks, num_blocks=1)
    return blocks


class _OperatorSchema:
    """For editors: an operator is one of the names, or the settings of one of them."""

    @classmethod
    def __get_pydantic_json_schema__(cls, _: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        configs = operator_configs()
        settings = [handler(config.__pydantic_core_schema__) for config in configs.values()]
        return {
            "anyOf": [
                {"type": "string", "enum": list(configs)},
                {"type": "object", "required": ["name"], "oneOf": settings},
            ]
        }


Blocks = Annotated[str | int | tuple[int, ...], AfterValidator(_check_blocks)]
Operator = Annotated[SerializeAsAny[OperatorConfig], BeforeValidator(parse_operator), _OperatorSchema]


class Replace(BaseModel):
    """Put an operator in place of one role in some blocks."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    edit: Literal["replace"] = "replace"
    role: Literal["attention", "mlp"]
    """What the replaced modules do."""
    blocks: Blocks = "all"
    """Which blocks, counted from 0: all, odd, even, [1, 3], '8-18:2', 'every 3 of 4'."""
    operator: Operator
    """The operator's name, or a mapping of its name and settings."""

    def __str__(self) -> str:
        return f"Replace(role={self.role!r}, blocks={self.blocks!r}, operator={self.operator.name!r})"


class Plan(BaseModel):
    """The edits of a model, in any mixture; every site is edited at most once."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    edits: tuple[Replace, ...] = ()

    def resolve(
        self,
        sites: Sequence[Site],
        *,
        host: str = "model",
        mixer_roles: frozenset[Role] = frozenset({"attention", "mlp"}),
    ) -> dict[Site, OperatorConfig]:
        """The operator of every edited site, in the order of the sites.

        Args:
            host: what faults call the model.
            mixer_roles: roles whose modules the host lets mixers replace.

        Raises:
            PlanError: lists every fault: blocks out of range or named twice, operators that do not fit.
        """
        num_blocks = 1 + max(site.block for site in sites)
        chosen: dict[Site, OperatorConfig] = {}
        faults = []
        for edit in self.edits:
            available = {s.block: s for s in sites if s.role == edit.role}
            for block in resolve_blocks(edit.blocks, num_blocks):
                site = available.get(block)
                if site is None:
                    faults.append(f"{edit}: {_missing(block, num_blocks, edit.role)}")
                elif site in chosen:
                    faults.append(f"{edit}: the {edit.role} of block {block} is named twice")
                else:
                    chosen[site] = edit.operator
                    misfits = _misfits(edit.operator, site, mixer_roles)
                    faults += [f"{edit}, block {block}: {fault}" for fault in misfits]
        if faults:
            raise PlanError(fault_list(faults, f"plan for {host} (blocks 0..{num_blocks - 1})"))
        return {site: chosen[site] for site in sites if site in chosen}

    def randomised(self) -> "Plan":
        """The same plan with nothing taken from the host's weights: the control experiment."""
        return Plan(
            edits=tuple(e.model_copy(update={"operator": e.operator.randomised()}) for e in self.edits)
        )


def fault_list(faults: Sequence[str], where: str) -> str:
    """One message of all distinct faults."""
    distinct = list(dict.fromkeys(faults))
    return "\n  ".join([f"{len(distinct)} fault{'s' * (len(distinct) > 1)} in {where}", *distinct])


def _missing(block: int, num_blocks: int, role: str) -> str:
    if block not in range(num_blocks):
        return f"no block {block}"
    return f"block {block} has no replaceable {role}"


def _misfits(operator: OperatorConfig, site: Site, mixer_roles: frozenset[Role]) -> list[str]:
    if site.role not in operator.roles:
        return [f"{operator.name} replaces {' or '.join(sorted(operator.roles))}, not {site.role}"]
    if not isinstance(operator, KernelConfig) and site.role not in mixer_roles:
        return [f"{operator.name} is a mixer, and the host takes only kernels for its {site.role}"]
    return operator.faults(site)

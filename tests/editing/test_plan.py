"""The language of blocks, plans as data, and every fault before any work."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from grafting.contract import BlockCall, Grid, KernelConfig, MixerConfig, ModuleCall, Site
from grafting.editing.plan import (
    Drop,
    Merge,
    Plan,
    Replace,
    fault_list,
    merged_pairs,
    operators_of,
    resolve_blocks,
)
from grafting.errors import PlanError
from grafting.operators import PRESETS, operator_configs


def sites(num_blocks: int) -> list[Site]:
    facts = {"dim": 16, "grid": Grid(4, 4), "module": ModuleCall()}
    return [
        site
        for i in range(num_blocks)
        for site in (
            Site(role="attention", block=i, path=f"b.{i}.attn", num_heads=2, **facts),
            Site(role="mlp", block=i, path=f"b.{i}.mlp", hidden_dim=64, **facts),
        )
    ]


ONE_STREAM = BlockCall(arguments=("x",), returns=("x",))


def whole_blocks(num_blocks: int, *, call: BlockCall = ONE_STREAM, path: str = "b") -> list[Site]:
    facts = {"role": "block", "dim": 16, "grid": Grid(4, 4), "call": call}
    return [Site(block=i, path=f"{path}.{i}", **facts) for i in range(num_blocks)]


def faults_of(*edits, num_blocks: int = 6, blocks: list[Site] | None = None) -> list[str]:
    blocks = whole_blocks(num_blocks) if blocks is None else blocks
    with pytest.raises(PlanError) as caught:
        Plan(edits=edits).resolve(sites(num_blocks), blocks=blocks)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def plan(*edits) -> Plan:
    return Plan(edits=[Replace(role=r, blocks=b, operator=o) for r, b, o in edits])


@pytest.mark.parametrize(
    ("blocks", "num_blocks", "want"),
    [
        ("all", 3, [0, 1, 2]),
        ("odd", 5, [1, 3]),
        ("even", 5, [0, 2, 4]),
        ("7", 28, [7]),
        (7, 28, [7]),
        ([5, 1], 28, [5, 1]),
        ("8-18:2", 28, [8, 10, 12, 14, 16, 18]),
        ("8 - 17 : 2", 28, [8, 10, 12, 14, 16]),
        ("1, 8-10", 28, [1, 8, 9, 10]),
        ("every 3 of 4", 28, [i for i in range(28) if i % 4]),
        ("every 1 of 2", 5, [1, 3]),
        ("every 2 of 2", 3, [0, 1, 2]),
    ],
)
def test_blocks(blocks, num_blocks, want):
    assert resolve_blocks(blocks, num_blocks) == want


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("", "names no blocks: write all, odd, even"),
        ("some", "names no blocks"),
        ("1-", "names no blocks"),
        ("-1", "names no blocks"),
        ("1;2", "names no blocks"),
        ("0-8:0", "names no blocks"),
        ("8-5", "a range ends before it begins"),
        ("every 5 of 4", "cannot choose 5 of 4"),
        ("every 0 of 4", "cannot choose 0 of 4"),
    ],
)
def test_what_is_not_the_language_is_refused_when_a_plan_is_made(blocks, message):
    with pytest.raises(PlanError, match=message):
        Replace(role="attention", blocks=blocks, operator="softmax")


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 9))
def test_a_range_includes_its_end(first, length, step):
    got = resolve_blocks(f"{first}-{first + length}:{step}", 100)
    assert got == [i for i in range(100) if first <= i <= first + length and (i - first) % step == 0]


@given(st.integers(1, 60), st.integers(1, 9), st.data())
def test_every_k_of_n_chooses_k_of_each_n(groups, of, data):
    chosen = data.draw(st.integers(1, of))
    got = resolve_blocks(f"every {chosen} of {of}", groups * of)
    assert len(got) == len(set(got)) == groups * chosen
    assert all(i % of >= of - chosen for i in got)


def test_sites_come_in_the_models_order_with_their_operators():
    chosen = plan(("mlp", [2, 0], "mlp"), ("attention", "all", "linear")).resolve(sites(3))
    paths = ["b.0.attn", "b.0.mlp", "b.1.attn", "b.2.attn", "b.2.mlp"]
    assert [site.path for site in chosen] == paths
    assert [c.name for c in chosen.values()] == ["linear", "mlp", "linear", "linear", "mlp"]


def test_one_message_lists_every_fault_once():
    faulty = plan(("attention", "2-4", "hyena-x"), ("attention", [2, 2], "linear"), ("mlp", 1, "hyena-x"))
    with pytest.raises(PlanError) as caught:
        faulty.resolve(sites(3), host="host 'dit'")
    assert str(caught.value).splitlines() == [
        "3 faults in plan for host 'dit' (blocks 0..2)",
        "  plan.0: Replace(role='attention', blocks='2-4', operator='hyena-x'): no block 3; there are 0..2",
        "  plan.1: Replace(role='attention', blocks=(2, 2), operator='linear'): the attention of block 2 is named twice",
        "  plan.2: Replace(role='mlp', blocks=1, operator='hyena-x'), block 1: hyena-x replaces attention, not mlp",
    ]


def test_blocks_that_a_model_does_not_have_are_one_fault_of_an_edit():
    with pytest.raises(PlanError) as caught:
        plan(("attention", [7, 1, 9, 7], "linear"), ("mlp", "5-9", "mlp")).resolve(sites(4))
    assert [line.partition("): ")[2] for line in str(caught.value).splitlines()[1:]] == [
        "no blocks 7, 9; there are 0..3",
        "no block 5; there are 0..3",
    ]


def test_a_misfit_is_told_once_with_its_blocks():
    with pytest.raises(
        PlanError, match=r"^1 fault in .*\n  .*, blocks 0, 1, 2: hyena-x replaces attention, not mlp$"
    ):
        plan(("mlp", "all", "hyena-x")).resolve(sites(3))


@pytest.mark.parametrize(
    ("mixer", "near"),
    [
        ("hyena-x", "; did you mean 'gated-conv-x'?"),
        ("hyena-y-published", "; did you mean 'gated-conv-y'?"),
        ("mha", "; did you mean 'softmax'?"),
        ("mamba2", ";"),
    ],
)
def test_for_a_mixer_the_kernels_are_named(mixer: str, near: str):
    edits = plan(("attention", 0, mixer))
    with pytest.raises(PlanError) as caught:
        edits.resolve([replace(site, module=None) for site in sites(1)])
    kernels = [name for name, config in operator_configs().items() if issubclass(config, KernelConfig)]
    assert str(caught.value).endswith(
        f"takes only kernels for this attention{near} there are {', '.join(kernels)}"
    )
    assert "window-2d" in kernels


def test_the_nearest_kernels_are_kernels():
    near = [config.kernel for config in operator_configs().values() if issubclass(config, MixerConfig)]
    assert {"gated-conv-se", "gated-conv-x", "gated-conv-y", "softmax", None} == set(near)
    assert all(issubclass(operator_configs()[name], KernelConfig) for name in near if name)


def test_a_choice_in_python_names_the_nearest():
    with pytest.raises(PlanError, match=r"role: .*, found 'attn'; did you mean 'attention'\?$"):
        Replace(role="attn", operator="softmax")


def test_what_a_message_refuses_is_named_once():
    with pytest.raises(PlanError, match="blocks: '3-1': a range ends before it begins$"):
        Replace(role="attention", blocks="3-1", operator="softmax")
    with pytest.raises(PlanError, match="no operator 'window2d'; .*, swa$"):
        Replace(role="attention", operator="window2d")


def test_a_host_may_take_kernels_only():
    edits = plan(("attention", 0, "mha"), ("attention", 1, "linear"))
    with pytest.raises(
        PlanError, match="1 fault in plan .*\n.*mha is a mixer, and the host takes only kernels"
    ):
        edits.resolve([replace(site, module=None) for site in sites(2)])


@pytest.mark.parametrize("role", ["attention", "mlp"])
def test_a_role_that_a_block_lacks_is_a_fault(role):
    kept = [s for s in sites(2) if s.role != role or s.block == 0]
    operator = "softmax" if role == "attention" else "mlp"
    with pytest.raises(PlanError, match=f"block 1 has no replaceable {role}"):
        plan((role, "all", operator)).resolve(kept)


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        ("hyena-z", r"no operator 'hyena-z'; did you mean 'hyena-.'. there are .*hyena-x.*softmax"),
        ({"name": "softmax", "widow": 3}, "operator.widow: unknown key"),
        ({"window": 3}, "an operator is a name, or a mapping with a name"),
        (3, "an operator is a name"),
        ({"name": "window-1d", "window": 0}, "greater than 0"),
    ],
)
def test_operators_that_are_none_are_refused(operator, message):
    with pytest.raises(PlanError, match=message):
        Replace(role="attention", operator=operator)


def test_unknown_roles_and_keys_are_refused():
    with pytest.raises(PlanError, match="role"):
        Replace(role="attn", operator="softmax")
    with pytest.raises(PlanError, match="block"):
        Replace(role="attention", block=1, operator="softmax")


@pytest.mark.parametrize("name", operator_configs())
def test_a_plan_survives_json(name):
    config = operator_configs()[name]()
    role = sorted(config.roles)[0]
    original = plan((role, "8-18:2", config.randomised()), (role, [1, 3], {"name": name}), (role, 5, name))
    text = original.model_dump_json()
    assert Plan.model_validate_json(text) == original
    assert Plan.model_validate(json.loads(text)) == original
    assert type(Plan.model_validate_json(text).edits[0].operator) is type(config)


def test_the_control_experiment_inherits_nothing():
    control = plan(("attention", 0, "softmax"), ("attention", 1, "hyena-x")).randomised()
    assert control.edits[0].operator.projections == "random"
    assert control.edits[1].operator.init == "random"
    assert [e.blocks for e in control.edits] == [0, 1]


def test_the_schema_tells_editors_every_operators_settings():
    schema = Plan.model_json_schema()
    operator = schema["$defs"]["Replace"]["properties"]["operator"]
    names, settings = operator["anyOf"]
    assert names["enum"] == [*operator_configs(), *PRESETS]
    # an operator that holds operators is described once, and referred to
    described = [schema["$defs"][d["$ref"].split("/")[-1]] if "$ref" in d else d for d in settings["oneOf"]]
    by_name = {d["properties"]["name"]["const"]: d for d in described}
    assert list(by_name) == list(operator_configs())
    assert by_name["window-1d"]["properties"]["window"]["exclusiveMinimum"] == 0
    assert "Image tokens seen" in by_name["window-1d"]["properties"]["window"]["description"]
    for operator, valid in [
        ("hyena-x", True),
        ("hyena-z", False),
        ("swa", True),
        ({"name": "swa", "window": 2}, False),
        ({"name": "hybrid", "first": {"name": "window-1d", "window": 0}}, False),
        ({"name": "window-1d", "window": 2}, True),
        ({"name": "window-1d", "window": 0}, False),
        ({"name": "linear", "window": 2}, False),
        ({"window": 2}, False),
    ]:
        edits = [{"role": "attention", "operator": operator}]
        assert Draft202012Validator(schema).is_valid({"edits": edits}) == valid, operator


@pytest.mark.parametrize(
    ("blocks", "num_blocks", "want"),
    [
        ("all", 6, [(0, 1), (2, 3), (4, 5)]),
        ("8-11", 28, [(8, 9), (10, 11)]),
        ([5, 6, 1, 2], 28, [(1, 2), (5, 6)]),
        ("1, 2, 4-7", 9, [(1, 2), (4, 5), (6, 7)]),
    ],
)
def test_blocks_are_merged_two_by_two(blocks, num_blocks, want):
    edits = Plan(edits=[{"edit": "merge", "blocks": blocks}])
    chosen = edits.resolve(sites(num_blocks), blocks=whole_blocks(num_blocks))
    assert [(first.block, second.block) for first, second, _ in merged_pairs(chosen)] == want
    assert not operators_of(chosen)


def test_operators_merges_and_drops_go_together():
    edits = [
        Merge(blocks="2-3"),
        {"role": "attention", "blocks": [3, 4], "operator": "linear"},
        {"edit": "drop", "blocks": [5]},
        Merge(blocks=[0, 1], start="sum"),
    ]
    chosen = Plan(edits=edits).resolve(sites(6), blocks=whole_blocks(6))
    assert [site.path for site in chosen] == ["b.3.attn", "b.4.attn", "b.0", "b.1", "b.2", "b.3", "b.5"]
    assert [(a.block, b.block, edit.start) for a, b, edit in merged_pairs(chosen)] == [
        (0, 1, "sum"),
        (2, 3, "average"),
    ]
    assert [site.path for site in operators_of(chosen)] == ["b.3.attn", "b.4.attn"]


def test_an_edit_that_does_not_say_what_it_is_replaces():
    written = {"role": "mlp", "operator": "mlp"}
    assert Plan(edits=[written]) == Plan(edits=[Replace(role="mlp", operator="mlp")])
    with pytest.raises(PlanError, match="'swap' found .* expected tags: 'replace', 'merge', 'drop'"):
        Plan(edits=[{"edit": "swap", "blocks": 1}])
    with pytest.raises(PlanError, match="role"):
        Plan(edits=[{"edit": "merge", "role": "mlp"}])
    with pytest.raises(PlanError, match="blocks"):
        Plan(edits=[{"edit": "drop"}])


def test_every_fault_of_merges_and_drops_is_listed():
    assert faults_of(
        Merge(blocks="0-2"),
        Merge(blocks=[3, 5]),
        Drop(blocks=[3, 9]),
        Merge(blocks=[2, 4]),
        Merge(blocks=[1, 0]),
    ) == [
        "plan.0: Merge(blocks='0-2'): 3 blocks do not form pairs",
        "plan.1: Merge(blocks=(3, 5)): blocks 3 and 5 are not consecutive",
        "plan.2: Drop(blocks=(3, 9)): no block 9; there are 0..5",
        "plan.2: Drop(blocks=(3, 9)): block 3 is named twice",
        "plan.3: Merge(blocks=(2, 4)): block 2 is named twice",
        "plan.3: Merge(blocks=(2, 4)): blocks 2 and 4 are not consecutive",
        "plan.4: Merge(blocks=(1, 0)): block 1 is named twice",
        "plan.4: Merge(blocks=(1, 0)): block 0 is named twice",
        "plan.4: Merge(blocks=(1, 0)): blocks 1 and 0 are not consecutive",
    ]


def test_a_dropped_block_holds_no_operator():
    edits = [Replace(role="attention", blocks="4-5", operator="linear"), Drop(blocks=5)]
    assert faults_of(*edits) == ["block 5 is dropped, but its attention is to be linear"]
    assert faults_of(Drop(blocks="all"), num_blocks=3) == ["every block is dropped"]


def test_what_the_host_says_of_its_blocks_is_honoured():
    two_streams = BlockCall(arguments=("x", "text"), returns=("text", "x"))
    joint = whole_blocks(2, call=two_streams)
    assert faults_of(Merge(), num_blocks=2, blocks=joint) == [
        "plan.0: Merge(blocks='all'): blocks 0 and 1 give text and x: only one tensor of tokens can be merged"
    ]
    single = [*whole_blocks(1, path="double"), *whole_blocks(2, path="single")[1:]]
    assert faults_of(Merge(), num_blocks=2, blocks=single) == [
        "plan.0: Merge(blocks='all'): blocks 0 and 1 are of different kinds (double and single)"
    ]
    head = Site(
        role="block", block=0, path="b.0", dim=16, grid=Grid(4, 4), call=ONE_STREAM, fixed="the head reads it"
    )
    assert faults_of(Drop(blocks=[0]), blocks=[head, *whole_blocks(6)[1:]]) == [
        "plan.0: Drop(blocks=(0,)): block 0 cannot be edited: the head reads it"
    ]
    assert faults_of(Drop(blocks=[1]), blocks=[]) == [
        "plan.0: Drop(blocks=(1,)): the host does not declare how block 1 is called"
    ]


def test_the_faults_of_an_edit_in_python_are_one_list():
    with pytest.raises(PlanError) as caught:
        Replace(role="attn", blocks="ood", operator={"name": "window-2d", "radius": 0})
    assert str(caught.value).splitlines() == [
        "3 faults in Replace",
        "  role: Input should be 'attention' or 'mlp', found 'attn'; did you mean 'attention'?",
        "  blocks: 'ood' names no blocks: write all, odd, even, [1, 3], '8-18:2', '1, 8-10' or 'every 3 of 4'",
        "  operator.radius: Input should be greater than 0, found 0",
    ]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Plan(edit=[]), "edit: unknown key; did you mean 'edits'"),
        (lambda: Plan(edits=Drop(blocks=0)), r"edits: a plan has a list of edits: write \[...\] around this one"),
        (lambda: Plan([Drop(blocks=0)]), r"Plan takes settings by name: Plan\(edits=...\)"),
        (lambda: Plan(edits=[{"role": "mlp", "operator": "mpl"}]), "edits.0.replace.operator: no operator 'mpl'; did you mean 'mlp'"),
    ],
)  # fmt: skip
def test_what_is_no_plan_says_what_one_is(made, message):
    with pytest.raises(PlanError, match=message):
        made()


def test_what_reads_a_plan_is_told_of_faults_by_pydantic():
    with pytest.raises(ValidationError):
        Plan.model_validate({"edits": [{"role": "mlp", "operator": "mpl"}]})


def test_outputs_do_not_start_as_a_sum():
    with pytest.raises(PlanError, match="start: sum requires of: updates"):
        Merge(start="sum", of="outputs")


def test_restructuring_survives_json_and_is_no_part_of_the_control():
    edits = (
        Merge(blocks="0-3", start="sum"),
        Drop(blocks=[5]),
        Replace(role="mlp", blocks=4, operator="mlp"),
    )
    original = Plan(edits=edits)
    assert Plan.model_validate_json(original.model_dump_json()) == original
    control = original.randomised()
    assert control.edits[:2] == edits[:2]
    assert control.edits[2].operator.init == "random"


@pytest.mark.parametrize(
    ("edit", "valid"),
    [
        ({"edit": "merge"}, True),
        ({"edit": "merge", "blocks": "8-11", "start": "sum"}, True),
        ({"edit": "merge", "role": "mlp"}, False),
        ({"blocks": "8-11"}, False),
        ({"edit": "drop", "blocks": [5]}, True),
        ({"edit": "drop"}, False),
        ({"edit": "replace", "role": "mlp", "operator": "mlp"}, True),
        ({"edit": "swap", "role": "mlp", "operator": "mlp"}, False),
    ],
)
def test_the_schema_tells_edits_apart(edit, valid):
    assert Draft202012Validator(Plan.model_json_schema()).is_valid({"edits": [edit]}) == valid


def test_the_head_of_a_message_is_short_whatever_is_at_fault():
    assert len(fault_list(["no name"], "9" * 5000)) < 300

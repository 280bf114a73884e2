"""What surgery promises beyond the contract of hosts: all or nothing, and no silent change of what attention means."""

import copy
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from closeness import assert_close
from grafting.contract import BlockCall, Grid, Kernel, ModuleCall, Site
from grafting.editing.placed import KernelAttention, MergedBlocks, MixerAdapter, Passage
from grafting.editing.plan import Drop, Merge, Plan, Replace
from grafting.editing.surgery import build_operators, graft, grafted, paths_after, place, resolve
from grafting.errors import HostError, PlanError
from grafting.hosts import LayoutTracker, hosts
from grafting.hosts._host import Branches
from grafting.models.dit import DiT
from grafting.operators.softmax import Softmax, SoftmaxConfig
from grafting.weights.folder import save_model

HOST = hosts()["dit"]
SITE = Site(role="attention", block=0, path="attn", dim=4, grid=Grid(1, 3), num_heads=1)


def plan(*edits) -> Plan:
    return Plan(edits=[Replace(role=r, blocks=b, operator=o) for r, b, o in edits])


@pytest.fixture
def model():
    return HOST.tiny().eval()


@pytest.fixture
def inputs(model):
    return HOST.example(model, rows=8, cols=8, batch_size=2)


def snapshot(model):
    return dict(model.named_modules()), dict(model.state_dict(keep_vars=True))


def unchanged(model, before) -> bool:
    modules, tensors = snapshot(model)
    same_modules = modules.keys() == before[0].keys() and all(modules[n] is m for n, m in before[0].items())
    same_tensors = tensors.keys() == before[1].keys() and all(tensors[n] is t for n, t in before[1].items())
    return same_modules and same_tensors and not model._forward_pre_hooks


def test_a_faulty_plan_lists_all_faults_and_changes_nothing(model):
    before = snapshot(model)
    faulty = plan(
        ("attention", [0, 7], "linear"),
        ("attention", "0-1", "hyena-x"),
        ("mlp", 1, "linear"),
        ("attention", 2, {"name": "window-2d", "radius": 9}),
    )
    with pytest.raises(PlanError) as caught:
        graft(model, faulty)
    assert str(caught.value).splitlines()[0] == "5 faults in plan for host 'dit' (blocks 0..2)"
    for fault in (
        "no block 7",
        "the attention of block 0 is named twice",
        "linear replaces attention, not mlp",
        "19 > 8 rows",
        "19 > 8 columns",
    ):
        assert fault in str(caught.value)
    assert unchanged(model, before)


def test_an_operator_that_fails_while_it_is_built_changes_nothing(model, monkeypatch):
    before = snapshot(model)

    def fail_at_block_2(config, site):
        if site.block == 2:
            raise MemoryError("no room")
        return Softmax()

    monkeypatch.setattr(SoftmaxConfig, "build", fail_at_block_2)
    with pytest.raises(MemoryError):
        graft(model, plan(("attention", "all", "softmax")))
    assert unchanged(model, before)


def test_operators_at_unknown_sites_change_nothing(model):
    before = snapshot(model)
    operators = build_operators(HOST.tiny(), plan(("attention", 0, "softmax")))
    with pytest.raises(AttributeError, match="nowhere"):
        place(model, operators | {"nowhere": operators["blocks.0.attn"]})
    assert unchanged(model, before)


def test_an_empty_plan_changes_nothing(model):
    before = snapshot(model)
    record = graft(model, Plan())
    assert not record.new_parameters
    assert unchanged(model, before)
    record.undo()
    assert unchanged(model, before)


def test_a_site_holds_one_operator(model):
    graft(model, plan(("attention", 1, "linear")))
    with pytest.raises(
        PlanError, match="attention of block 1 already holds an operator; undo that graft first"
    ):
        graft(model, plan(("attention", "all", "hyena-x")))
    graft(model, plan(("attention", 0, "hyena-x"), ("mlp", "all", "mlp")))
    assert isinstance(model.blocks[1].attn, KernelAttention)
    assert isinstance(model.blocks[0].attn, MixerAdapter)


def test_an_edit_or_a_list_is_no_plan():
    """In a process of its own, where nothing checks the types of arguments."""
    script = """
from grafting import Drop, DiT, PlanError, graft
for given in (Drop(blocks=1), [Drop(blocks=1)], {"edits": []}):
    try:
        graft(DiT(input_size=8, hidden_size=8, num_heads=2, depth=2), given)
    except PlanError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        f"a plan is grafting.Plan(edits=[...]); found {given}"
        for given in ("Drop(edit='drop', blocks=1)", "[Drop(edit='drop', blocks=1)]", "{'edits': []}")
    ]


def test_grafts_are_undone_one_by_one_in_any_order(model, inputs):
    before = snapshot(model)
    first = graft(model, plan(("attention", 0, "linear")))
    second = graft(model, plan(("mlp", 2, "mlp")))
    first.undo()
    assert LayoutTracker.of(model) is not None
    model(**inputs)
    second.undo()
    assert unchanged(model, before)
    second.undo()
    assert unchanged(model, before)


def test_modules_come_back_in_the_mode_of_the_model(model):
    record = graft(model, plan(("attention", 0, "linear")))
    model.train()
    record.undo()
    assert all(module.training for module in model.modules())


def test_grafted_lasts_as_long_as_its_block(model, inputs):
    before = snapshot(model)
    operators = build_operators(
        HOST.tiny(), plan(("attention", "all", {"name": "softmax", "projections": "random"}))
    )
    with pytest.raises(ZeroDivisionError), grafted(model, operators) as same:
        assert same is model
        assert model.blocks[0].attn is operators["blocks.0.attn"]
        model(**inputs)
        1 / 0  # noqa: B018
    assert unchanged(model, before)


def test_operators_built_on_one_model_run_on_another_on_its_own_grid(model):
    other = HOST.tiny().eval()
    operators = build_operators(other, plan(("attention", "all", {"name": "window-2d", "radius": 1})))
    place(model, operators)
    model(**HOST.example(model, rows=3, cols=5, batch_size=1))
    assert {o.tracker for o in operators.values()} == {LayoutTracker.of(model)}
    assert LayoutTracker.of(model).grid == Grid(3, 5)


def test_operators_share_no_memory_with_the_model(model):
    record = graft(
        model, plan(("attention", "even", "softmax"), ("attention", 1, "mha"), ("mlp", "all", "mlp"))
    )
    operators = {t.data_ptr() for o in record.operators.values() for t in o.parameters()}
    originals = {t.data_ptr() for m in record.replaced.values() for t in m.parameters()}
    assert not operators & originals


def test_random_weights_depend_on_the_seed_and_the_site_alone(model):
    random = {"name": "hyena-x", "init": "random"}
    alone = build_operators(model, plan(("attention", 1, random)), seed=3)
    among = build_operators(model, plan(("attention", [0, 1], random), ("mlp", "all", "mlp")), seed=3)
    torch.rand(1)
    other = build_operators(model, plan(("attention", 1, random)), seed=4)
    path = "blocks.1.attn"
    states = [operators[path].state_dict() for operators in (alone, among, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])
    assert any(not torch.equal(t, among["blocks.0.attn"].state_dict()[name]) for name, t in states[1].items())


def test_operators_take_the_models_dtype_and_mode(model):
    model.double().train()
    record = graft(model, plan(("attention", 0, "hyena-x"), ("attention", 1, {"name": "linear"})))
    for operator in record.operators.values():
        assert {p.dtype for p in operator.parameters()} == {torch.float64}
        assert all(m.training for m in operator.modules())


def test_resolve_gives_the_operator_of_every_site(model):
    chosen = resolve(model, plan(("mlp", 0, "mlp"), ("attention", "odd", "linear")))
    assert [(s.path, c.name) for s, c in chosen.items()] == [
        ("blocks.0.mlp", "mlp"),
        ("blocks.1.attn", "linear"),
    ]


def branches(model, inputs, pair=(0, 1)):
    """What two blocks of a model give for one input, and that input."""
    given = []
    handle = model.blocks[pair[0]].register_forward_pre_hook(lambda _, args: given.append(args))
    with torch.no_grad():
        model(**inputs)
        handle.remove()
        x, c = given[0]
        return x, c, model.blocks[pair[0]](x, c), model.blocks[pair[1]](x, c)


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"start": "average"}, lambda x, first, second: (first + second) / 2),
        ({"start": "average", "of": "outputs"}, lambda x, first, second: (first + second) / 2),
        ({"start": "sum"}, lambda x, first, second: first + second - x),
    ],
)
def test_a_pair_starts_as_what_its_edit_says(model, inputs, settings, want):
    x, c, first, second = branches(model, inputs)
    pair = build_operators(model, Plan(edits=[Merge(blocks="0-1", **settings)]))["blocks.0"]
    got = pair(x, c)
    assert got.requires_grad
    assert_close("one by one", got, want(x, first, second), 2e-7)
    with torch.no_grad():
        assert_close("as one pass", pair(x, c), want(x, first, second), 1e-6)


def test_a_trained_merge_is_a_linear_map_of_both_updates(model, inputs):
    x, c, first, second = branches(model, inputs)
    pair = build_operators(model, Plan(edits=[Merge(blocks="0-1")]))["blocks.0"]
    with torch.no_grad():
        for parameter in pair.merge.parameters():
            parameter.normal_()
        w_1, w_2 = pair.merge.weight.chunk(2, dim=1)
        want = x + (first - x) @ w_1.T + (second - x) @ w_2.T + pair.merge.bias
        assert_close("updates", pair(x, c), want, 1e-6)
        pair.of_outputs = True
        want = first @ w_1.T + second @ w_2.T + pair.merge.bias
        assert_close("outputs", pair(x, c), want, 1e-6)


def test_half_as_deep_is_as_large_as_published():
    """712.3M parameters (arXiv:2506.05340, depth to width)."""
    with torch.device("meta"):
        model = DiT.from_preset("DiT-XL/2")
        record = graft(model, Plan(edits=[Merge()]))
    assert sum(p.numel() for p in model.parameters()) == 712_304_672
    assert sum(isinstance(block, MergedBlocks) for block in model.blocks) == 14
    merges = [name for name in record.new_parameters if ".merge." in name]
    assert len(merges) == 28


def test_state_dicts_of_merged_and_dropped_blocks(model):
    names = set(model.state_dict())
    graft(model, Plan(edits=[Merge(blocks="0-1"), Drop(blocks=[2])]))
    kept = {name for name in names if not name.startswith("blocks.")}
    parts = {name.removeprefix("blocks.0.") for name in names if name.startswith("blocks.0.")}
    branches = {f"blocks.0.branches.{i}.{part}" for i in (0, 1) for part in parts}
    merge = {"blocks.0.merge.weight", "blocks.0.merge.bias"}
    assert set(model.state_dict()) == kept | branches | merge


def test_operators_of_a_merged_block_stand_in_its_branch(model, inputs):
    edits = [
        Merge(blocks="1-2"),
        Replace(role="attention", blocks=[0, 2], operator={"name": "window-2d", "radius": 1}),
        Replace(role="mlp", blocks=[1], operator={"name": "mlp", "ratio": 3}),
    ]
    alone = build_operators(model, Plan(edits=edits[1:]))
    record = graft(model, Plan(edits=edits))
    assert list(record.operators) == ["blocks.0.attn", "blocks.1", "blocks.2"]
    pair = record.operators["blocks.1"]
    inside = {"blocks.1.mlp": pair.branches[0].mlp, "blocks.2.attn": pair.branches[1].attn}
    for path, operator in inside.items():
        assert operator.tracker is LayoutTracker.of(model)
        states = alone[path].state_dict(), operator.state_dict()
        assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    model(**inputs)
    assert LayoutTracker.of(model).grid == Grid(8, 8)


def test_where_sites_stand_after_a_graft(model):
    edits = Plan(
        edits=[Merge(blocks="0-1"), Drop(blocks=2), Replace(role="mlp", blocks=1, operator={"name": "mlp"})]
    )
    sites = HOST.sites(model)
    after = paths_after(sites, resolve(model, edits))
    graft(model, edits)
    assert [site.block for site in after] == [0, 0, 1, 1]
    assert [type(model.get_submodule(path)).__name__ for path in after.values()] == [
        "Attention",
        "Mlp",
        "Attention",
        "MixerAdapter",
    ]
    assert paths_after(sites, {}) == {site: site.path for site in sites}


def test_a_restructured_model_takes_no_second_plan(model):
    for edits in (Plan(edits=[Merge(blocks="0-1")]), Plan(edits=[Drop(blocks=1)])):
        record = graft(model, edits)
        with pytest.raises(PlanError, match="has merged or dropped blocks, .* undo that graft first"):
            graft(model, plan(("attention", 2, "linear")))
        record.undo()
    graft(model, plan(("attention", 1, "linear")))
    with pytest.raises(PlanError, match="block 1 already holds an operator; undo that graft first"):
        graft(model, Plan(edits=[Drop(blocks=1)]))


def test_a_faulty_restructuring_changes_nothing(model):
    before = snapshot(model)
    with pytest.raises(PlanError) as caught:
        graft(model, Plan(edits=[Merge(), Drop(blocks=[7]), *plan(("attention", 9, "linear")).edits]))
    assert str(caught.value).splitlines() == [
        "3 faults in plan for host 'dit' (blocks 0..2)",
        "  plan.0: Merge(blocks='all'): 3 blocks do not form pairs",
        "  plan.1: Drop(blocks=(7,)): no block 7; there are 0..2",
        "  plan.2: Replace(role='attention', blocks=9, operator='linear'): no block 9; there are 0..2",
    ]
    assert unchanged(model, before)


def test_a_dropped_block_is_as_one_that_adds_nothing(model, inputs):
    silent = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in silent.blocks[1].adaLN_modulation.parameters():
            parameter.zero_()
        record = graft(model, Plan(edits=[Drop(blocks=1)]))
        assert torch.equal(model(**inputs), silent(**inputs))
    assert isinstance(model.blocks[1], Passage)
    assert not record.new_parameters
    assert not [name for name in model.state_dict() if name.startswith("blocks.1.")]


def test_two_restructured_models_do_not_disturb_each_other(model, inputs):
    edits = Plan(
        edits=[
            Merge(blocks="0-1"),
            Replace(role="attention", operator={"name": "window-2d", "radius": 1}),
        ]
    )
    other, other_inputs = HOST.tiny().eval(), HOST.example(model, rows=4, cols=3, batch_size=1)
    for each in (model, other):
        graft(each, edits)
    alone, other_alone = model(**inputs), other(**other_inputs)
    assert torch.equal(model(**inputs), alone)
    assert torch.equal(other(**other_inputs), other_alone)
    assert LayoutTracker.of(model).grid == Grid(8, 8)


_LOAD = """
import sys
from pathlib import Path
import torch
from grafting.weights.folder import load_model
from safetensors.torch import load_file, save_file

model, plan = load_model(Path(sys.argv[1]))
inputs = load_file(sys.argv[2])
with torch.no_grad():
    save_file({"output": model(**inputs)}, sys.argv[3])
print(*(type(block).__name__ for block in model.blocks))
"""


def test_a_restructured_model_loads_in_another_process(inputs, tmp_path):
    from safetensors.torch import load_file, save_file

    model = DiT(input_size=16, in_channels=1, hidden_size=32, depth=6, num_heads=2, num_classes=10).eval()
    edits = Plan(
        edits=[
            Merge(blocks="2-5"),
            Drop(blocks=[0]),
            Replace(role="attention", blocks=[1, 3], operator="hyena-x"),
        ]
    )
    graft(model, edits)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        want = model(**inputs)
    save_model(tmp_path / "model", model, edits)
    save_file(inputs, tmp_path / "inputs.safetensors")
    files = [str(tmp_path / name) for name in ("model", "inputs.safetensors", "output.safetensors")]
    process = subprocess.run(
        [sys.executable, "-c", _LOAD, *files], capture_output=True, text=True, env=os.environ
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.split() == [
        "Passage",
        "DiTBlock",
        "MergedBlocks",
        "Passage",
        "MergedBlocks",
        "Passage",
    ]
    assert_close("output", load_file(files[2])["output"], want, 1e-6)


class Attention(nn.Module):
    """Calls SDPA with what it is given, a number of times."""

    def __init__(self, times: int = 1):
        super().__init__()
        self.times = times

    def forward(self, *args, **kwargs):
        return [F.scaled_dot_product_attention(*args, **kwargs) for _ in range(self.times)][-1]


def tracker_of(rows: int, cols: int) -> LayoutTracker:
    tracker, model = LayoutTracker(HOST), HOST.tiny()
    tracker(model, (), HOST.example(model, rows=rows, cols=cols, batch_size=1))
    return tracker


def kernel_attention(num_tokens: int, kernel: Kernel | None = None, *, times: int = 1) -> KernelAttention:
    return KernelAttention(
        Attention(times), kernel or Softmax(), site=SITE, tracker=tracker_of(1, num_tokens)
    )


def qkv(heads=4, kv_heads=4, length=6):
    return torch.randn(2, heads, length, 8), *torch.randn(2, 2, kv_heads, length, 8)


def test_every_form_of_the_call_reaches_the_kernel():
    q, k, v = qkv()
    want = F.scaled_dot_product_attention(q, k, v, scale=0.3)
    attention = kernel_attention(6)
    assert torch.equal(attention(q, k, v, None, 0.0, False, scale=0.3), want)
    named = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": 0.3, "enable_gqa": False}
    assert torch.equal(attention(query=q, key=k, value=v, **named), want)


def test_grouped_queries_are_spread_over_heads():
    q, k, v = qkv(heads=4, kv_heads=2)
    want = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(kernel_attention(6)(q, k, v, enable_gqa=True), want)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ({"dropout_p": 0.1}, "dropout_p 0.1"),
        ({"is_causal": True}, "is_causal True"),
    ],
)
def test_what_a_kernel_cannot_honour_is_refused(argument, words):
    with pytest.raises(HostError, match=f"with dropout or is_causal, which a kernel cannot honour.*{words}"):
        kernel_attention(6)(*qkv(), **argument)


def test_tokens_that_are_not_the_layouts_are_refused():
    with pytest.raises(HostError, match=r"over 6 tokens, of which 7 are the image's"):
        kernel_attention(7)(*qkv())
    q, _, _ = qkv(length=6)
    _, k, v = qkv(length=5)
    with pytest.raises(HostError, match="over 5 tokens, of which 6"):
        kernel_attention(6)(q, k, v)


def test_an_operator_outside_of_a_forward_pass_says_so():
    attention = KernelAttention(Attention(), Softmax(), site=SITE, tracker=LayoutTracker(HOST))
    with pytest.raises(HostError, match="no forward pass of its model has set the token layout"):
        attention(*qkv())


@pytest.mark.parametrize("times", [0, 2])
def test_attention_must_call_sdpa_once(times):
    attention = kernel_attention(6, times=times)
    if times == 0:
        attention.attention.forward = lambda q, k, v: v
    with pytest.raises(
        HostError, match=f"Attention called scaled_dot_product_attention {times} times.* declares 1 call"
    ):
        attention(*qkv())


def test_a_mixer_refuses_what_changes_attentions_meaning():
    mixer = build_operators(HOST.tiny(), plan(("attention", 0, "mha")))["blocks.0.attn"].mixer
    site = replace(SITE, module=ModuleCall(tokens="x", must_be_none=("mask",)))
    adapter = MixerAdapter(mixer, site=site, tracker=tracker_of(2, 3))
    x = torch.randn(1, 6, 32)
    assert torch.equal(adapter(x, mask=None, other=1), adapter(x=x))
    with pytest.raises(HostError, match="the host passes mask to its attention"):
        adapter(x, mask=torch.ones(6))


def test_operators_of_a_frozen_model_can_be_trained(model):
    model.requires_grad_(False)
    edits = (
        Replace(role="attention", blocks=[0], operator="softmax"),
        Merge(blocks="1-2"),
    )
    operators = build_operators(model, Plan(edits=edits))
    parameters = [p for operator in operators.values() for p in operator.parameters()]
    assert parameters
    assert all(p.requires_grad for p in parameters)
    assert not any(p.requires_grad for p in model.parameters())


def test_built_operators_see_the_grid_after_they_stood_in_the_model_for_a_while(model):
    operators = build_operators(model, plan(("attention", [1], {"name": "window-2d", "radius": 1})))
    with grafted(model, operators):
        model(**HOST.example(model, rows=8, cols=8, batch_size=1))
    other = graft(model, plan(("mlp", [0], "mlp-r3")))
    other.undo()
    model(**HOST.example(model, rows=4, cols=6, batch_size=1))
    assert operators["blocks.1.attn"].tracker.grid == Grid(4, 6)


def test_an_undone_graft_follows_the_model_to_another_dtype(model, inputs):
    record = graft(model, plan(("attention", [1], "softmax"), ("mlp", [0], "mlp-r3")))
    model.double()
    record.undo()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    model(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})


def test_what_is_copied_keeps_its_own_dtype_and_what_is_new_gets_that_of_the_linears(model):
    """diffusers keeps some parameters of a half-precision model in float32."""
    model.bfloat16()
    for block in model.blocks:
        block.scale_shift_table = nn.Parameter(torch.zeros(2, 4))
        block._parameters = {"scale_shift_table": block._parameters.pop("scale_shift_table")}
    graft(model, Plan(edits=(Merge(blocks="0-1"),)))
    pair = model.blocks[0]
    assert pair.merge.weight.dtype == torch.bfloat16
    assert pair.branches[1].attn.qkv.weight.dtype == torch.bfloat16
    assert pair.branches[1].scale_shift_table.dtype == torch.float32


def test_without_a_cast_operators_keep_their_dtype(model):
    operators = build_operators(model, plan(("attention", [1], "hyena-x")))
    model.bfloat16()
    with grafted(model, operators, cast=False):
        pass
    assert {p.dtype for o in operators.values() for p in o.parameters()} == {torch.float32}


def test_branches_find_the_tokens_in_their_own_place():
    class Block(nn.Module):
        def forward(self, temb, hidden_states):
            return hidden_states + temb

    branches = Branches([Block(), Block()], BlockCall(("temb", "hidden_states"), ("hidden_states",)))
    temb, x = torch.full((1, 1, 4), 2.0), torch.randn(1, 3, 4)
    for update in (
        *branches(temb, x),
        *branches(temb, hidden_states=x),
        *branches(temb=temb, hidden_states=x),
    ):
        assert_close("update", update, torch.full((1, 3, 4), 2.0), 1e-5)


def test_a_pair_whose_layer_was_wrapped_on_the_instance_runs_block_by_block(model, inputs):
    """As accelerate wraps: it puts another `forward` beside the class's."""
    graft(model, Plan(edits=(Merge(blocks="0-1"),)))
    attention = model.blocks[0].branches[0].attn
    plain = attention.forward
    attention.forward = lambda x: 2 * plain(x)
    with torch.no_grad():
        quick = model(**inputs)
    assert_close("outputs", quick, model(**inputs).detach(), 1e-5)

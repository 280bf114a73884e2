"""Every spec that comes with the library, on its tiny instance: a new file in `hosts/specs/` is tested by being there."""

import dataclasses
import json

import pytest
import torch
import yaml
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from closeness import assert_close
from grafting.contract import Grid
from grafting.cost.count import host_flops
from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import graft
from grafting.errors import HostError
from grafting.hosts import SdpaHost, SdpaSpec, host_of, hosts
from grafting.hosts._grids import fact
from grafting.weights.folder import load, save_model

# MochiModel asks for autocast that a CPU has not
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
SPECS = {name: host for name, host in hosts().items() if isinstance(host, SdpaHost)}
WINDOW = Plan(edits=(Replace(role="attention", operator={"name": "window-2d", "radius": 1}),))
SOFTMAX = Plan(edits=(Replace(role="attention", operator="softmax"),))
KERNELS = [
    "softmax",
    {"name": "window-2d", "radius": 1},
    {"name": "window-1d", "window": 2},
    "linear",
    {"name": "linear", "conv": 3},
    "ttt",
    "hybrid",
]
NO_MLPS = {"cogview4", "hidream"}
# tokens beside the image's, for a text of 5: AuraFlow has registers, Z-Image pads
NUM_OTHERS = {"auraflow": 13, "zimage": 32}
PADDED = {
    "qwenimage": "encoder_hidden_states_mask",
    "lumina2": "encoder_attention_mask",
    "hunyuanvideo": "encoder_attention_mask",
    "mochi": "encoder_attention_mask",
    "zimage": None,
}


def outputs(model, inputs) -> Tensor:
    output = model(**inputs, return_dict=False)[0]
    return output if isinstance(output, Tensor) else torch.stack(list(output))


def example(host, model, *, rows=6, cols=4, **sizes):
    frames = 2 if host.spec.native_grid.frames > 1 else 1
    torch.manual_seed(1)
    return host.example(model, rows=rows, cols=cols, frames=frames, batch_size=2, **sizes)


@pytest.fixture(params=SPECS)
def host(request):
    return SPECS[request.param]


@pytest.fixture
def model(host):
    torch.manual_seed(0)
    return host.tiny().eval()


def test_a_spec_holds(host, model, tmp_path):
    """Softmax is the identity, bit for bit, on two grids; a window runs both ways, is saved with the spec, and loaded."""
    record = graft(model, SOFTMAX)
    for rows, cols in ((6, 4), (3, 5)):
        inputs = example(host, model, rows=rows, cols=cols)
        with torch.no_grad():
            got = outputs(model, inputs)
            record.undo()
            want = outputs(model, inputs)
        assert torch.equal(got, want)
        record = graft(model, SOFTMAX)
    record.undo()
    graft(model, WINDOW)
    output = outputs(model, inputs)
    assert not torch.allclose(output, want, rtol=1e-3)
    output.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    save_model(tmp_path, model, WINDOW)
    loaded = load(tmp_path)
    assert host_of(loaded).spec == host.spec
    assert host_of(loaded) is not host
    with torch.no_grad():
        assert torch.equal(outputs(loaded, inputs), output)


@pytest.mark.parametrize("name", [name for name, host in SPECS.items() if host.spec.own_grid])
def test_the_native_grid_is_that_of_the_models_config(name):
    """The published one of the class's defaults, its own of a small model, which takes inputs of that size."""
    host = SPECS[name]
    with torch.device("meta"):
        assert host.sites(host.model_class())[0].grid == host.spec.native_grid
    model = host.tiny().eval()
    shape, config = host.shape(model), model.config
    wide = config.get("sample_width", config.get("sample_size"))
    assert shape[-1] == wide
    inputs = example(host, model)
    condition = {name: inputs[name] for name in host.needed(model)}
    with torch.no_grad():
        x = torch.randn(2, *shape)
        assert host.predict(model, x, torch.ones(2), condition).shape == x.shape


@pytest.mark.parametrize("name", [name for name, host in SPECS.items() if host.spec.most])
def test_a_model_takes_no_more_tokens_than_it_has_positions_for(name):
    """Its native size is one that it takes, and larger ones are refused by `shape_faults`, before a model's IndexError."""
    host = SPECS[name]
    model = host.tiny().eval()
    shape, inputs = host.shape(model), example(host, model)
    most = [fact(model, side) for side in host.spec.most]
    grid = host.sites(model)[0].grid
    native = [grid.frames, grid.rows, grid.cols][-len(most) :]
    assert all(size <= limit < 64 for size, limit in zip(native, most, strict=True))
    condition = {name: inputs[name] for name in host.needed(model)}
    with torch.no_grad():
        x = torch.randn(2, *shape)
        assert host.predict(model, x, torch.ones(2), condition).shape == x.shape
    sides = [size // tokens for size, tokens in zip(shape[-len(most) :], native, strict=True)]
    largest = [limit * side for limit, side in zip(most, sides, strict=True)]
    assert host.shape_faults(model, (shape[0], *largest)) == []
    for axis, side in enumerate(sides):
        longer, tokens = list(largest), list(most)
        longer[axis] += side
        tokens[axis] += 1
        found, allowed = (" x ".join(map(str, sizes)) for sizes in (tokens, most))
        assert host.shape_faults(model, (shape[0], *longer)) == [
            f"{found} tokens; this {host.class_name} has positions for {allowed}"
        ]


def test_the_published_size_is_native_where_there_are_positions_for_it():
    host = SPECS["auraflow"]
    with torch.device("meta"):
        model = host.model_class(**host.spec.tiny | {"pos_embed_max_size": 9216})
    assert host.shape(model) == (4, 128, 128)


@pytest.mark.parametrize(
    ("name", "none"),
    [
        ("auraflow", ["num_mmdit_layers", "num_single_dit_layers"]),
        ("zimage", ["n_layers", "n_refiner_layers"]),
    ],
)
def test_a_model_without_blocks_is_one_error(name, none):
    host = SPECS[name]
    model = host.model_class(**host.spec.tiny | dict.fromkeys(none, 0))
    with pytest.raises(HostError, match="has no blocks, in .*: there is nothing that could be replaced"):
        graft(model, WINDOW)
    # one block is enough
    assert host.sites(host.model_class(**host.spec.tiny | {none[0]: 1, none[1]: 0}))


def test_it_predicts_images_of_any_size(host, model):
    """`predict` calls the model as `example` does, and gives back what it was given."""
    frames = 2 if host.spec.native_grid.frames > 1 else 1
    x = torch.randn(2, *host.at_grid(Grid(6, 4, frames)).shape(model))
    inputs = example(host, model)
    condition = {name: inputs[name] for name in host.needed(model)}
    with torch.no_grad():
        prediction = host.predict(model, x, host.spec.time.scale * torch.rand(2), condition)
    assert prediction.shape == x.shape
    assert prediction.isfinite().all()
    assert host.image_grid(model, inputs) == Grid(6, 4, frames)


def test_blocks_are_called_as_it_says(host, model):
    inputs = example(host, model)
    for site in (site for site in host.blocks(model) if not site.fixed):
        seen = []
        handle = model.get_submodule(site.path).register_forward_hook(
            lambda _, *call, seen=seen: seen.append(call), with_kwargs=True
        )
        outputs(model, inputs)
        handle.remove()
        ((args, kwargs, output),) = seen
        given = dict(zip(site.call.arguments, args, strict=False)) | kwargs
        returned = [output] if isinstance(output, Tensor) else output
        assert [t.shape for t in returned] == [given[name].shape for name in site.call.returns]


def test_the_flops_of_mlps_are_those_that_torch_counts(host, model):
    """Text is counted where an MLP sees it, and the layers of a gate are."""
    grid = Grid(8, 4, 2 if host.spec.native_grid.frames > 1 else 1)
    mlps = [site for site in host.sites(model) if site.role == "mlp"]
    inputs = example(host, model, rows=grid.rows, cols=grid.cols)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        outputs(model, inputs)
    counted = {
        path.partition(".")[2]: sum(flops.values()) for path, flops in counter.get_flop_counts().items()
    }
    for site in mlps:
        others = NUM_OTHERS.get(host.name, 5) if site.num_text else 0
        seen = dataclasses.replace(site, grid=grid, num_text=others)
        assert 2 * host_flops(seen).total == counted[site.path], site.path  # two samples
    assert bool(mlps) != (host.name in NO_MLPS)


@pytest.mark.parametrize(
    ("name", "num_text"),
    [
        ("flux", {"transformer_blocks": 0}),
        ("cogvideox", {"transformer_blocks": 226}),
        ("auraflow", {"joint_transformer_blocks": 0, "single_transformer_blocks": 264}),
    ],
)
def test_the_mlps_of_two_streams_see_the_image_alone(name, num_text):
    """Those of blocks that run text and image as one sequence see both."""
    host = SPECS[name]
    sites = [site for site in host.sites(host.tiny()) if site.role == "mlp"]
    assert {site.path.split(".")[0]: site.num_text for site in sites} == num_text


@pytest.mark.parametrize("name", ["lumina2", "zimage"])
def test_a_refiner_of_the_image_sees_no_text(name):
    host = SPECS[name]
    seen = {(site.path.split(".")[0], site.role, site.num_text) for site in host.sites(host.tiny())}
    num_text = host.spec.native_num_text
    refiner = {("noise_refiner", role, 0) for role in ("attention", "mlp")}
    assert seen == refiner | {("layers", role, num_text) for role in ("attention", "mlp")}


def test_mixers_stand_where_tokens_are_one_tensor(host, model):
    sites = [s for s in host.sites(model) if s.module and s.role == "attention" and not s.attention.masked]
    mlps = [s for s in host.sites(model) if s.role == "mlp"]
    edits = [Replace(role="attention", blocks=s.block, operator="hyena-x") for s in sites]
    edits += [
        Replace(role="mlp", blocks=s.block, operator={"name": "mlp", "ratio": 2, "init": "random"})
        for s in mlps
    ]
    if host.spec.projections is None:
        edits = [edit.model_copy(update={"operator": edit.operator.randomised()}) for edit in edits]
    if not edits:
        return
    inputs = example(host, model)
    with torch.no_grad():
        before = outputs(model, inputs)
        graft(model, Plan(edits=edits))
        assert not torch.allclose(outputs(model, inputs), before, rtol=1e-3)


def test_an_mlp_that_sees_the_image_alone_has_a_filter_for_each_of_its_tokens():
    host = SPECS["sd3"]
    model, grid = host.tiny().eval(), Grid(8, 8)
    assert host.sites(model)[0].grid == grid
    operator = {"name": "mlp-hyena-x", "filters": "per-token"}
    record = graft(model, Plan(edits=(Replace(role="mlp", operator=operator),)))
    assert {len(placed.mixer.short_filter.weight) for placed in record.operators.values()} == {64}
    assert outputs(model, example(host, model, rows=8, cols=8)).isfinite().all()


def test_a_spec_is_the_same_as_json_and_as_yaml(host):
    spec = host.spec
    assert SdpaSpec.model_validate(json.loads(spec.model_dump_json())) == spec
    brief = yaml.safe_dump(spec.model_dump(mode="json", exclude_defaults=True))
    assert SdpaSpec.model_validate(yaml.safe_load(brief)) == spec


@pytest.mark.parametrize("operator", KERNELS, ids=str)
@pytest.mark.parametrize("name", PADDED)
def test_a_padded_prompt_gives_what_it_gives_alone(name, operator):
    """In a batch of unlike prompts, the first of three tokens and the second of five."""
    host, mask = SPECS[name], PADDED[name]
    torch.manual_seed(0)
    model = host.tiny().eval()
    graft(model, Plan(edits=(Replace(role="attention", operator=operator),)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    # the image is a list of texts' own lengths for ZImage, which pads them to 32 each
    num_text = 40 if mask is None else 5
    kept = (20, 40) if mask is None else (3, 5)
    inputs = example(host, model, num_text=num_text)
    if mask is None:
        inputs["cap_feats"] = [x[:n] for x, n in zip(inputs["cap_feats"], kept, strict=True)]
    else:
        seen = torch.arange(num_text) < torch.tensor(kept)[:, None]
        inputs[mask] = seen if host.spec.inputs.get(mask) is None else seen.to(inputs[mask].dtype)
    with torch.no_grad():
        together = outputs(model, inputs)
        for i, n in enumerate(kept):
            alone = {key: _of_one(value, i) for key, value in inputs.items()}
            if mask is not None:
                alone |= {key: alone[key][:, :n] for key in ("encoder_hidden_states", mask)}
            assert_close(f"prompt {i}", together[i : i + 1], outputs(model, alone), 1e-4)


def _of_one(value, i):
    return value[i : i + 1] if isinstance(value, Tensor | list) else value

"""The native DiT against recorded outputs of the original code, and what the original does not promise."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from closeness import assert_close
from grafting.hosts._host import randomise
from grafting.models.dit import DIT_PRESETS, DiT, DiTBlock, ParallelBlocks, side_by_side

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "dit.safetensors")
WEIGHTS = {name.removeprefix("model."): x for name, x in GOLDEN.items() if name.startswith("model.")}
TINY = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 48,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 10,
}


@pytest.fixture
def model() -> DiT:
    model = DiT(**TINY).eval()
    model.load_state_dict(WEIGHTS, strict=True)
    return model


def example(batch_size: int = 2, height: int = 8, width: int = 8):
    x = torch.randn(batch_size, 4, height, width)
    return x, torch.randint(0, 1000, (batch_size,)), torch.randint(0, 10, (batch_size,))


def test_outputs_equal_the_originals_at_every_step(model):
    x, t, y = (GOLDEN[f"forward.{name}"] for name in ("x", "t", "y"))
    assert t.tolist() == [0, 10, 100, 500, 999]
    with torch.no_grad():
        got = model(x, t, y)
    for i, step in enumerate(t.tolist()):
        assert_close(f"output at t = {step}", got[i], GOLDEN["forward.output"][i], 1e-5)
    torch.testing.assert_close(got, GOLDEN["forward.output"], rtol=0, atol=1e-5)


def test_the_state_dict_is_the_originals():
    model = DiT(**TINY)
    assert {n: x.shape for n, x in model.state_dict().items()} == {n: x.shape for n, x in WEIGHTS.items()}
    assert_close("positions", model.pos_embed, WEIGHTS["pos_embed"], 1e-6)
    assert not model.pos_embed.requires_grad


def test_a_missing_or_unexpected_tensor_is_refused():
    model = DiT(**TINY)
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.0\.attn\.qkv\.weight"):
        model.load_state_dict({n: x for n, x in WEIGHTS.items() if n != "blocks.0.attn.qkv.weight"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(WEIGHTS | {"blocks.2.attn.qkv.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("preset", "published_millions"),
    [
        ("DiT-S/2", 33),
        ("DiT-B/4", 131),
        ("DiT-L/2", 458),
        ("DiT-XL/2", 675),
    ],  # arXiv:2212.09748 Tables 1 and 4
)
def test_presets_have_the_published_number_of_parameters(preset, published_millions):
    with torch.device("meta"):
        model = DiT.from_preset(preset)
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(published_millions, rel=0.01)
    if preset == "DiT-XL/2":
        positions = model.pos_embed.numel()
        assert count - positions == 674_834_720
        assert count == 675_129_632
        assert model.config.hidden_size == 1152
        assert len(model.blocks) == 28


def test_there_are_twelve_presets_and_no_others():
    assert sorted(DIT_PRESETS) == sorted(
        f"DiT-{size}/{p}" for size in ("S", "B", "L", "XL") for p in (2, 4, 8)
    )
    with pytest.raises(ValueError, match=r"no preset 'DiT-H/2'; there are DiT-S/2"):
        DiT.from_preset("DiT-H/2")


def test_a_new_model_predicts_zero():
    x, t, y = example()
    assert DiT(**TINY)(x, t, y).count_nonzero() == 0


def test_without_learned_sigma_only_the_noise_is_predicted():
    x, t, y = example()
    assert DiT(**TINY, learn_sigma=False)(x, t, y).shape == x.shape


def test_labels_are_taken_as_given_in_training_too(model):
    x, t, y = example()
    with torch.no_grad():
        assert torch.equal(model.train()(x, t, y), model.eval()(x, t, y))


def test_without_label_dropout_there_is_no_null_label():
    model = DiT(**TINY, class_dropout_prob=0.0)
    assert model.y_embedder.embedding_table.num_embeddings == 10
    x, t, _ = example()
    with pytest.raises(IndexError):
        model(x, t, torch.tensor([10, 10]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": 9}, "input_size 9 is not a multiple of patch_size 2"),
        ({"num_heads": 5}, "hidden_size 48 must be a multiple of num_heads 5"),
        ({"hidden_size": 50, "num_heads": 5}, "and of 4"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DiT(**TINY | change)


def test_an_image_that_does_not_divide_into_patches_is_refused(model):
    x, t, y = example(height=8, width=9)
    with pytest.raises(ValueError, match="an image of 8 x 9 pixels does not divide into patches of 2 x 2"):
        model(x, t, y)


def test_images_need_not_be_square(model):
    x, t, y = example(height=4, width=12)
    got = model(x, t, y)
    assert got.shape == (2, 8, 4, 12)
    assert got.isfinite().all()
    # transposing image and patches is not transposing the output: rows and columns have positions of their own
    assert model._positions(2, 6).shape == (1, 12, 48)
    torch.testing.assert_close(model._positions(4, 4), model.pos_embed)
    by_row = model._positions(2, 6).unflatten(1, (2, 6))
    square = model.pos_embed.unflatten(1, (4, 4))
    torch.testing.assert_close(by_row[:, :, :4], square[:, :2])


def test_gradient_checkpointing_changes_no_gradient(model):
    x, t, y = example()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(x, t, y).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    plain = gradients()
    model.enable_gradient_checkpointing()
    assert model.gradient_checkpointing
    checkpointed = gradients()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    assert all(gradient.count_nonzero() for gradient in plain.values())


def test_saving_and_loading_gives_the_same_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = DiT.from_pretrained(tmp_path)
    assert all(loaded.config[name] == value for name, value in TINY.items())
    assert loaded.state_dict().keys() == WEIGHTS.keys()
    assert not loaded.training
    x, t, y = example()
    assert torch.equal(loaded(x, t, y), model(x, t, y))


def test_steps_may_be_fractional(model):
    x, _, y = example()
    at = [model(x, torch.full((2,), t), y) for t in (10.0, 10.5, 11.0)]
    assert torch.equal(at[0], model(x, torch.full((2,), 10), y))
    assert not torch.allclose(at[0], at[1])
    assert not torch.allclose(at[1], at[2])


def test_bfloat16_stays_close(model):
    x, t, y = example()
    want = model(x, t, y)
    got = model.bfloat16()(x.bfloat16(), t, y)
    assert got.dtype == torch.bfloat16
    assert_close("bf16", got, want, 5e-2)


@pytest.fixture
def parallel() -> ParallelBlocks:
    return randomise(ParallelBlocks([DiTBlock(48, 4, 4.0) for _ in range(3)]), std=0.2)


def tokens(batch_size: int = 2):
    return torch.randn(batch_size, 7, 48), torch.randn(batch_size, 48)


def check_one_pass(parallel: ParallelBlocks, *, one_pass: bool = True, ratio: float = 1e-5) -> None:
    """Without gradients it gives what the blocks give one by one, as one tensor or not."""
    parameter = next(parallel.parameters())
    x, c = (a.to(parameter) for a in tokens())
    want = torch.stack([block(x, c) - x for block in parallel]).detach()
    with torch.no_grad():
        got = parallel(x, c)
    assert isinstance(got, torch.Tensor) == one_pass
    assert_close("updates", torch.stack(list(got)), want, ratio)


def test_parallel_blocks_are_one_pass_without_gradients(parallel):
    check_one_pass(parallel)
    assert isinstance(parallel(*tokens()), list)
    with torch.inference_mode():
        x, c = tokens(batch_size=1)
        assert_close("inference mode", parallel(x, c)[1], parallel[1](x, c) - x, 1e-5)


def test_the_pass_reads_the_weights_that_there_are(parallel):
    """Whatever changed them: an optimizer, a loaded state, a copy behind autograd's back, one gone and one come."""
    changes = [
        lambda: torch.optim.SGD(parallel.parameters(), lr=0.1).step(),
        lambda: parallel.load_state_dict({n: t + 0.1 for n, t in parallel.state_dict().items()}),
        lambda: parallel[1].mlp.fc1.weight.data.copy_(torch.randn(192, 48)),
        lambda: parallel[2].attn.qkv.bias.data.fill_(0.3),
    ]
    sum(update.square().sum() for update in parallel(*tokens())).backward()
    for change in changes:
        change()
        check_one_pass(parallel)


@pytest.mark.parametrize(
    "replace",
    [
        lambda blocks: setattr(blocks[1].attn.qkv, "weight", nn.Parameter(torch.randn(144, 48))),
        lambda blocks: setattr(blocks[0].mlp.fc2.weight, "data", torch.randn(48, 192)),
        lambda blocks: setattr(blocks[0].mlp, "fc2", nn.Sequential(nn.Linear(192, 48), nn.Tanh())),
        lambda blocks: setattr(blocks[2], "attn", nn.Linear(48, 48)),
        lambda blocks: blocks[1].attn.register_forward_hook(lambda _, args, output: 2 * output),
        lambda blocks: blocks.load_state_dict(
            {n: t.clone() for n, t in blocks.state_dict().items()}, assign=True
        ),
    ],
    ids=["parameter", "data", "layer", "attention", "hook", "assigned"],
)
def test_what_is_not_plain_runs_one_by_one(parallel, replace):
    replace(parallel)
    check_one_pass(parallel, one_pass=False)


def test_copies_and_conversions_lay_their_weights_side_by_side_again(parallel):
    before = {n: t.clone() for n, t in parallel.state_dict().items()}
    twin = copy.deepcopy(parallel)
    check_one_pass(twin)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(torch.equal(before[n], t) for n, t in parallel.state_dict().items())
    check_one_pass(parallel.double(), ratio=1e-10)
    check_one_pass(parallel.bfloat16(), ratio=5e-2)


def test_the_pass_under_autocast(parallel):
    x, c = tokens()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = parallel(x, c), [block(x, c) - x for block in parallel]
    assert_close("autocast", torch.stack(list(got)), torch.stack(want), 3e-2)


def test_only_neighbours_in_one_memory_are_side_by_side():
    together = torch.randn(3, 4, 5)
    got = side_by_side([*together])
    assert got.data_ptr() == together.data_ptr()
    assert torch.equal(got, together)
    assert torch.equal(side_by_side([together[1], together[2]]), together[1:])
    for apart in (
        [together[1], together[0]],
        [together[0], together[2]],
        [together[0], together[1].clone()],
        [together[0].T, together[1].T],
        [together[0], together[1, :2]],
    ):
        assert side_by_side(apart) is None

"""The network of FID, against torch-fidelity's (see tests/golden/README.md) and against formulas of its own parts."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from closeness import assert_close
from grafting.errors import CheckpointError, DataError
from grafting.metrics.inception import (
    Inception,
    Mixed8,
    Mixed17,
    Mixed35,
    StoredNorm,
    load_inception,
    max_pool,
    mean_pool,
    resize_as_tensorflow1,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def published_shapes():
    lines = (GOLDEN / "adm_inception_names.txt").read_text().splitlines()
    return {name: tuple(map(int, sizes)) for name, *sizes in (line.split() for line in lines)}


def seeded_weights():
    """The weights with which the golden outputs were made, drawn in the order of their names."""
    rng = np.random.default_rng(20151205)
    weights = {}
    for name, shape in sorted(published_shapes().items()):
        z = rng.standard_normal(shape, dtype=np.float32)
        kind = name.rsplit(".", 1)[-1]
        if kind == "running_var":
            value = 1 + 0.5 * np.tanh(z)
        elif kind in ("running_mean", "bias"):
            value = 0.2 * z
        elif len(shape) == 1:
            value = 1 + 0.2 * np.tanh(z)
        else:
            value = z * np.float32((2 / np.prod(shape[1:])) ** 0.5)
        weights[name] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    return weights


@pytest.fixture(scope="module")
def weights():
    return seeded_weights()


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights, path)
    return path


def test_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        network = Inception()
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == published_shapes()
    assert len(published_shapes()) == 94 * 5 + 2


def test_outputs_are_torch_fidelitys(file):
    golden = load_file(GOLDEN / "adm_inception.safetensors")
    network = load_inception(file)
    assert not network.training
    with torch.no_grad():
        output = network(golden["images"])
        alone = network(golden["images"][1:])
    for name in ("pooled", "logits", "spatial"):
        assert_close(name, getattr(output, name), golden[name], 1e-4)
        assert_close(name, getattr(alone, name), golden[name][1:], 1e-4)
    assert output.spatial.shape == (2, 17 * 17 * 7)


@pytest.mark.parametrize("shape", [(5, 7), (32, 32), (299, 299), (301, 640)])
def test_resize_is_tensorflows_formula(shape):
    x = torch.rand(2, 3, *shape)
    got = resize_as_tensorflow1(x, 299)
    want = np.empty((2, 3, 299, 299), dtype=np.float32)
    image = x.numpy()
    scale_y, scale_x = (np.float32(length) / np.float32(299) for length in shape)
    for i in range(0, 299, 13):
        for j in range(299):
            y, x_ = np.float32(i) * scale_y, np.float32(j) * scale_x
            top, left = int(y), int(x_)
            bottom, right = min(top + 1, shape[0] - 1), min(left + 1, shape[1] - 1)
            dy, dx = y - np.float32(top), x_ - np.float32(left)
            above = image[..., top, left] + (image[..., top, right] - image[..., top, left]) * dx
            below = image[..., bottom, left] + (image[..., bottom, right] - image[..., bottom, left]) * dx
            want[:, :, i, j] = above + (below - above) * dy
    rows = range(0, 299, 13)
    np.testing.assert_allclose(got[:, :, rows].numpy(), want[:, :, rows], rtol=0, atol=1e-6)
    if shape == (299, 299):
        assert torch.equal(got, x)


def test_resize_is_not_pytorchs():
    x = torch.rand(1, 1, 8, 8)
    assert not torch.allclose(
        resize_as_tensorflow1(x, 16), F.interpolate(x, size=16, mode="bilinear"), atol=0.05
    )


def test_norm_and_pools_by_their_formulas():
    norm = StoredNorm(4)
    for tensor in norm.state_dict().values():
        tensor.uniform_(0.5, 2)
    x = torch.randn(2, 4, 5, 6)
    mean, var, weight, bias = (
        getattr(norm, name)[:, None, None] for name in ("running_mean", "running_var", "weight", "bias")
    )
    assert_close("norm", norm(x), (x - mean) / (var + 1e-3).sqrt() * weight + bias, 1e-6)

    padded = F.pad(x, (1, 1, 1, 1), value=torch.nan)
    windows = padded.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)
    assert_close("mean", mean_pool(x), windows.nanmean(-1), 1e-6)
    assert torch.equal(max_pool(x), windows.nan_to_num(nan=-torch.inf).amax(-1))


def conv(weights, name, x, *, padding=0):
    """A convolution, its norm and ReLU from the state dict alone."""
    x = F.conv2d(x, weights[f"{name}.conv.weight"], padding=padding)
    scale = weights[f"{name}.bn.weight"] / (weights[f"{name}.bn.running_var"] + 1e-3).sqrt()
    shift = weights[f"{name}.bn.bias"] - scale * weights[f"{name}.bn.running_mean"]
    return (x * scale[:, None, None] + shift[:, None, None]).relu()


def chain(weights, x, *layers):
    for name, padding in layers:
        x = conv(weights, name, x, padding=padding)
    return x


def blocks():
    square, row, column = (1, 1), (0, 1), (1, 0)
    wide, tall = (0, 3), (3, 0)
    yield (
        Mixed35(16, pooled=8),
        16,
        lambda w, x: [
            conv(w, "branch1x1", x),
            chain(w, x, ("branch5x5_1", 0), ("branch5x5_2", 2)),
            chain(w, x, ("branch3x3dbl_1", 0), ("branch3x3dbl_2", square), ("branch3x3dbl_3", square)),
            conv(w, "branch_pool", mean_pool(x)),
        ],
    )
    yield (
        Mixed17(16, inner=8),
        16,
        lambda w, x: [
            conv(w, "branch1x1", x),
            chain(w, x, ("branch7x7_1", 0), ("branch7x7_2", wide), ("branch7x7_3", tall)),
            chain(
                w,
                x,
                ("branch7x7dbl_1", 0),
                ("branch7x7dbl_2", tall),
                ("branch7x7dbl_3", wide),
                ("branch7x7dbl_4", tall),
                ("branch7x7dbl_5", wide),
            ),
            conv(w, "branch_pool", mean_pool(x)),
        ],
    )
    for pool in (mean_pool, max_pool):
        yield (
            Mixed8(16, pool=pool),
            16,
            lambda w, x, pool=pool: [
                conv(w, "branch1x1", x),
                chain(w, x, ("branch3x3_1", 0), ("branch3x3_2a", row)),
                chain(w, x, ("branch3x3_1", 0), ("branch3x3_2b", column)),
                chain(w, x, ("branch3x3dbl_1", 0), ("branch3x3dbl_2", square), ("branch3x3dbl_3a", row)),
                chain(w, x, ("branch3x3dbl_1", 0), ("branch3x3dbl_2", square), ("branch3x3dbl_3b", column)),
                conv(w, "branch_pool", pool(x)),
            ],
        )


@pytest.mark.parametrize("case", range(4))
def test_blocks_by_functions(case):
    block, channels, branches = list(blocks())[case]
    for name, tensor in block.state_dict().items():
        if not name.endswith("conv.weight"):
            tensor.uniform_(0.5, 1.5)
    x = torch.randn(1, channels, 7, 6)
    with torch.no_grad():
        assert_close("block", block(x), torch.cat(branches(block.state_dict(), x), 1), 1e-5)


def test_grey_images_are_refused(file):
    with pytest.raises(DataError, match=r"colour images \[B, 3, H, W\]; found \[2, 1, 32, 32\]"):
        load_inception(file)(torch.zeros(2, 1, 32, 32, dtype=torch.uint8))


def test_other_weights_are_refused(weights, tmp_path):
    path = tmp_path / "w.pth"
    changed = weights | {"fc.weight": torch.zeros(1000, 2048), "AuxLogits.fc.bias": torch.zeros(1000)}
    del changed["Mixed_6d.branch1x1.bn.weight"]
    torch.save(changed, path)
    with pytest.raises(CheckpointError) as error:
        load_inception(path)
    lines = str(error.value).splitlines()
    assert "as pytorch-fid and torch-fidelity publish them" in lines[0]
    assert lines[1:] == [
        "  Mixed_6d.branch1x1.bn.weight is missing",
        "  AuxLogits.fc.bias is unknown",
        "  fc.weight is [1000, 2048], not [1008, 2048]",
    ]


def test_counts_of_training_batches_are_left_out(weights, tmp_path):
    counts = {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(0)}
    torch.save(weights | counts, tmp_path / "w.pth")
    assert load_inception(tmp_path / "w.pth").state_dict().keys() == weights.keys()


def test_files_that_are_no_weights(tmp_path):
    path = tmp_path / "w.pth"
    with pytest.raises(CheckpointError, match="w.pth is missing"):
        load_inception(path)
    path.write_bytes(b"PK\3\4 and then nothing")
    with pytest.raises(CheckpointError, match="not a complete file of tensors"):
        load_inception(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="holds list, not tensors by name"):
        load_inception(path)
    torch.save({"a": print}, path)
    with pytest.raises(CheckpointError, match="not a complete file of tensors"):
        load_inception(path)

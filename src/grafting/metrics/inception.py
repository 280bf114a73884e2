"""The network that FID, sFID and the Inception score are defined by: TensorFlow's Inception of 2015-12-05, in PyTorch.

Its weights do not come with this package. `load_inception` reads the file that pytorch-fid and torch-fidelity publish
(pt_inception-2015-12-05-6726825d.pth), whose names of modules are kept here. It is not torchvision's Inception v3: average
pools do not count their padding, the last block pools by maximum, there are 1008 classes and other weights.

Source: arXiv:1512.00567 (blocks); the names and where they stand in TensorFlow's graph: torch-fidelity,
utils/util_convert_inception_weights.py; what is read from the graph: openai/guided-diffusion, evaluations/evaluator.py.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from ..errors import CheckpointError, DataError, listed
from ..machine.reading import read_torch

# how the published file's SHA-256 begins, as its name says
PUBLISHED_SHA256_PREFIX = "6726825d"

_IMAGE_SIZE = 299
_SPATIAL_CHANNELS = 7


class InceptionOutput(NamedTuple):
    """Features that the network extracts from images."""

    pooled: Float[Tensor, "b 2048"]  # pool_3
    logits: Float[Tensor, "b 1008"]  # of pooled without the biases, as ADM and torch-fidelity take them
    # mixed_6/conv, 17 x 17 positions of its first 7 channels, in TensorFlow's order
    spatial: Float[Tensor, "b 2023"]


class Inception(nn.Module):
    """TensorFlow's Inception of 2015-12-05 as a fixed function of 8-bit images of any size.

    `spatial` is the graph's tensor mixed_6/conv:0. By torch-fidelity's table of names mixed_6/conv is
    `Mixed_6d.branch1x1`, and the node of that name follows its batch norm's, so it is the values after the ReLU. This was
    read, not run: `grafting reference` measures a published reference's own images against the statistics beside
    them, which can only agree if it is so.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = Mixed35(192, pooled=32)
        self.Mixed_5c = Mixed35(256, pooled=64)
        self.Mixed_5d = Mixed35(288, pooled=64)
        self.Mixed_6a = To17(288)
        self.Mixed_6b = Mixed17(768, inner=128)
        self.Mixed_6c = Mixed17(768, inner=160)
        self.Mixed_6d = Mixed17(768, inner=160)
        self.Mixed_6e = Mixed17(768, inner=192)
        self.Mixed_7a = To8(768)
        self.Mixed_7b = Mixed8(1280, pool=mean_pool)
        self.Mixed_7c = Mixed8(2048, pool=max_pool)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> InceptionOutput:
        """Features of 8-bit colour images.

        Raises:
            DataError: the images have not 3 channels.
        """
        if images.shape[1] != 3:
            raise DataError(f"Inception sees colour images [B, 3, H, W]; found {list(images.shape)}")
        x = resize_as_tensorflow1(images.to(self.fc.weight.dtype), _IMAGE_SIZE)
        x = (x - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.branch1x1(x)[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_6e(self.Mixed_6d(x))
        pooled = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))
        return InceptionOutput(pooled, pooled @ self.fc.weight.T, spatial)


def load_inception(path: Path) -> Inception:
    """The network with the weights of a file in the published layout, in eval mode.

    Raises:
        CheckpointError: no such file, it is not a file of tensors, or some are missing, of other shapes, or unknown.
    """
    weights = _read_weights(path)
    with torch.device("meta"):
        network = Inception()
    expected = network.state_dict()
    faults = [f"{name} is missing" for name in expected if name not in weights]
    faults += [f"{name} is unknown" for name in weights if name not in expected]
    faults += [
        f"{name} is {list(weights[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if faults:
        head = (
            f"{path} does not hold the weights of TensorFlow's Inception of 2015-12-05 as pytorch-fid and "
            f"torch-fidelity publish them (pt_inception-2015-12-05-{PUBLISHED_SHA256_PREFIX}.pth):"
        )
        raise CheckpointError(listed(head, faults, most=8))
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    return network.requires_grad_(False).eval()


def _read_weights(path: Path) -> dict[str, Tensor]:
    weights = read_torch(path, kind="a complete file of tensors")
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise CheckpointError(f"{path} holds {type(weights).__name__}, not tensors by name")
    # counts batches of training; files that PyTorch wrote may have it, nothing reads it
    return {name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}


def resize_as_tensorflow1(x: Float[Tensor, "b c h w"], size: int) -> Float[Tensor, "b c size size"]:
    """Bilinear, as TensorFlow 1's resize_bilinear without align_corners: output i is at input i * in / out.

    Pixels are not centred and larger images are not smoothed, unlike every resize of PyTorch.

    Source:
        tensorflow/core/kernels/image/resize_bilinear_op.cc, LegacyScaler.
    """
    x = _resize_axis(x, size, axis=3)  # TensorFlow's order: along rows first
    return _resize_axis(x, size, axis=2)


def _resize_axis(x: Tensor, size: int, *, axis: int) -> Tensor:
    length = x.shape[axis]
    scale = torch.tensor(length, dtype=torch.float32) / size
    position = torch.arange(size, dtype=torch.float32) * scale
    low = position.long()
    high = (low + 1).clamp(max=length - 1)
    share = (position - low).to(x).view([-1 if i == axis else 1 for i in range(4)])
    near, far = (x.index_select(axis, index.to(x.device)) for index in (low, high))
    return near + (far - near) * share


class Conv(nn.Module):
    """Convolution, batch norm by stored statistics, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
        self.bn = StoredNorm(outputs)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        return F.relu(self.bn(self.conv(x)))


class StoredNorm(nn.Module):
    """Batch norm of inference: nothing else than the four published vectors."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-3)


def mean_pool(x: Tensor) -> Tensor:
    """TensorFlow's average over 3 x 3: at the border, over the positions that are inside."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x: Tensor) -> Tensor:
    """The maximum over 3 x 3, which the last block has where the paper has an average."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


class Mixed35(nn.Module):
    """A block at 35 x 35: 1x1, 5x5, twice 3x3 and pooling, side by side."""

    def __init__(self, inputs: int, *, pooled: int):
        super().__init__()
        self.branch1x1 = Conv(inputs, 64, 1)
        self.branch5x5_1 = Conv(inputs, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(inputs, pooled, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        wide = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), wide, double, self.branch_pool(mean_pool(x))], 1)


class To17(nn.Module):
    """From 35 x 35 to 17 x 17."""

    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3 = Conv(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class Mixed17(nn.Module):
    """A block at 17 x 17: 1x1, 7x7 in two and in four parts, and pooling."""

    def __init__(self, inputs: int, *, inner: int):
        super().__init__()
        row = partial(Conv, kernel=(1, 7), padding=(0, 3))
        column = partial(Conv, kernel=(7, 1), padding=(3, 0))
        self.branch1x1 = Conv(inputs, 192, 1)
        self.branch7x7_1 = Conv(inputs, inner, 1)
        self.branch7x7_2 = row(inner, inner)
        self.branch7x7_3 = column(inner, 192)
        self.branch7x7dbl_1 = Conv(inputs, inner, 1)
        self.branch7x7dbl_2 = column(inner, inner)
        self.branch7x7dbl_3 = row(inner, inner)
        self.branch7x7dbl_4 = column(inner, inner)
        self.branch7x7dbl_5 = row(inner, 192)
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(mean_pool(x))], 1)


class To8(nn.Module):
    """From 17 x 17 to 8 x 8."""

    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3_1 = Conv(inputs, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(inputs, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        small = self.branch3x3_2(self.branch3x3_1(x))
        large = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([small, self.branch7x7x3_4(large), F.max_pool2d(x, 3, stride=2)], 1)


class Mixed8(nn.Module):
    """A block at 8 x 8: 1x1, two ways into a row and a column of 3, and pooling.

    Args:
        inputs: channels.
        pool: over 3 x 3 positions.
    """

    def __init__(self, inputs: int, *, pool: Callable[[Tensor], Tensor]):
        super().__init__()
        self.pool = pool
        self.branch1x1 = Conv(inputs, 320, 1)
        self.branch3x3_1 = Conv(inputs, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Conv(inputs, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        once = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        forks = [
            self.branch3x3_2a(once),
            self.branch3x3_2b(once),
            self.branch3x3dbl_3a(twice),
            self.branch3x3dbl_3b(twice),
        ]
        return torch.cat([self.branch1x1(x), *forks, self.branch_pool(self.pool(x))], 1)

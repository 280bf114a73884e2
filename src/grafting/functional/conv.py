"""Short depthwise filters over tokens, channels last: one filter of K taps for each channel.

Like all of torch, they are cross-correlations: tap j of a token's filter reads the token `j - before` places on, and
places outside the sequence or grid are zero. The references say the same as loops and are what the tests compare with.
No fast path of another package is used here.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def depthwise_1d(
    x: Float[Tensor, "b l d"],
    weight: Float[Tensor, "d 1 k"],
    bias: Float[Tensor, " d"] | None = None,
    *,
    before: int,
) -> Float[Tensor, "b l d"]:
    """y[t] = bias + sum_j weight[j] x[t + j - before], for each channel.

    Args:
        before: taps that lie before the token, 0..K-1; K-1 makes the filter causal. Tap `before` is the token itself.
    """
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if (
        torch.compiler.is_compiling()
    ):  # a compiler makes gradients of its own, and takes no function with a `jvp`
        return _correlate(x, weight, bias, before)
    return _Correlate1d.apply(x, weight, bias, before)


def depthwise_2d(
    x: Float[Tensor, "b rows cols d"],
    weight: Float[Tensor, "d 1 k k"],
    bias: Float[Tensor, " d"] | None = None,
) -> Float[Tensor, "b rows cols d"]:
    """The same over rows and columns, with K // 2 taps before the token along each."""
    kernel_size = weight.shape[-1]
    before = kernel_size // 2
    _, rows, cols, dim = x.shape
    # channels-last images are what x already is: nothing is copied; an even K leaves one row and column too many
    y = F.conv2d(
        x.permute(0, 3, 1, 2),
        weight.to(x.dtype),
        None if bias is None else bias.to(x.dtype),
        padding=before,
        groups=dim,
    )
    return y.permute(0, 2, 3, 1)[:, :rows, :cols]


def depthwise_3d(
    x: Float[Tensor, "b frames rows cols d"],
    weight: Float[Tensor, "d 1 k k k"],
    bias: Float[Tensor, " d"] | None = None,
) -> Float[Tensor, "b frames rows cols d"]:
    """The same over frames, rows and columns."""
    y = F.conv3d(
        x.permute(0, 4, 1, 2, 3),
        weight.to(x.dtype),
        None if bias is None else bias.to(x.dtype),
        padding=weight.shape[-1] // 2,
        groups=x.shape[-1],
    )
    return y.permute(0, 2, 3, 4, 1)[:, : x.shape[1], : x.shape[2], : x.shape[3]]


def depthwise_1d_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, before: int) -> Tensor:
    """The definition of `depthwise_1d`, token by token and tap by tap."""
    length = x.shape[1]
    tokens = []
    for t in range(length):
        y = torch.zeros_like(x[:, t]) if bias is None else bias.expand_as(x[:, t])
        for j in range(weight.shape[-1]):
            if 0 <= t + j - before < length:
                y = y + weight[:, 0, j] * x[:, t + j - before]
        tokens.append(y)
    return torch.stack(tokens, dim=1)


def depthwise_2d_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition of `depthwise_2d`: each row of the filter is a 1-D filter of one row of the grid."""
    rows, kernel_size = x.shape[1], weight.shape[-1]
    before = kernel_size // 2
    out = []
    for row in range(rows):
        y = torch.zeros_like(x[:, row]) if bias is None else bias.expand_as(x[:, row])
        for i in range(kernel_size):
            if 0 <= row + i - before < rows:
                y = y + depthwise_1d_reference(x[:, row + i - before], weight[:, :, i], before=before)
        out.append(y)
    return torch.stack(out, dim=1)


def depthwise_3d_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition of `depthwise_3d`: each frame of the filter is a 2-D filter of one frame of the grid."""
    frames, kernel_size = x.shape[1], weight.shape[-1]
    before = kernel_size // 2
    out = []
    for frame in range(frames):
        y = torch.zeros_like(x[:, frame]) if bias is None else bias.expand_as(x[:, frame])
        for i in range(kernel_size):
            if 0 <= frame + i - before < frames:
                y = y + depthwise_2d_reference(x[:, frame + i - before], weight[:, :, i])
        out.append(y)
    return torch.stack(out, dim=1)


class _Correlate1d(torch.autograd.Function):
    """`F.conv2d` on one row of pixels, with a weight gradient of its own.

    On CPU oneDNN's depthwise convolution of channels-last pixels is quick, but not its weight gradient (unless K = 3),
    and less so with a bias. Forward and backward, one thread, 4,096 tokens, 384 channels, K = 4: under 4 ms; 5.3 ms with the
    convolution's own weight gradient; 9 ms or more as a sum of shifted products under autograd; 12 ms with `F.conv1d`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, before: int) -> Tensor:
        return _correlate(x, weight, bias, before)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor | None, int], output: Tensor) -> None:
        x, weight, _, ctx.before = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        # under autocast the forward's output may be of a lower precision than its inputs, and so is its gradient
        if ctx.needs_input_grad[0]:
            after = weight.shape[-1] - 1 - ctx.before
            grad_x = _correlate(grad, weight.to(grad.dtype).flip(-1), None, after).to(x.dtype)
        if ctx.needs_input_grad[1]:
            taps = [_shifted_dot(grad, x.to(grad.dtype), j - ctx.before) for j in range(weight.shape[-1])]
            grad_weight = torch.stack(taps, dim=-1)[:, None].to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 1)).to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None

    @staticmethod
    def jvp(ctx, x_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None, _: None) -> Tensor:
        x, weight = ctx.saved_tensors
        tangent = torch.zeros_like(x)
        if x_t is not None:
            tangent = tangent + _correlate(x_t, weight, None, ctx.before)
        if weight_t is not None:
            tangent = tangent + _correlate(x, weight_t, None, ctx.before)
        return tangent if bias_t is None else tangent + bias_t


def _correlate(x: Tensor, weight: Tensor, bias: Tensor | None, before: int) -> Tensor:
    after = weight.shape[-1] - 1 - before
    row = F.pad(x, (0, 0, before, after)).transpose(1, 2)[:, :, None]  # [B, D, 1, L + K - 1]
    return F.conv2d(row, weight[:, :, None], bias, groups=weight.shape[0])[:, :, 0].transpose(1, 2)


def _shifted_dot(grad: Tensor, x: Tensor, shift: int) -> Tensor:
    """Sum over batch and tokens t of grad[t] x[t + shift]."""
    length = x.shape[1]
    start, stop = max(0, -shift), max(0, length - max(0, shift))
    part = x[:, start + shift : max(0, stop + shift)]
    return torch.linalg.vecdot(grad[:, start:stop], part, dim=1).sum(0)

"""Published layouts written out as plain functions of a state dict, to compare converted models with.

They share no code with the package: convolutions are padded on the left, windows are masks, and the state of Mamba-2 runs
token by token.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

HEADS = 2


def linear(x, w, name):
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def causal(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A causal depthwise convolution over the last axis of x [B, C, L]."""
    return F.conv1d(F.pad(x, (weight.shape[-1] - 1, 0)), weight, bias, groups=x.shape[1])


def attend(q, k, v, mask=None):
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def mha(x, w):
    return linear(attend(*linear(x, w, "qkv").chunk(3, -1)), w, "proj")


def swa(x, w, window=4):
    places = torch.arange(x.shape[1])
    mask = (places[:, None] - places).abs() <= window
    return linear(attend(*linear(x, w, "Wqkv").chunk(3, -1), mask), w, "out_proj")


def hyena(x, w):
    qkv = linear(x, w, "in_proj").mT
    if "short_filter.weight" in w:
        qkv = causal(qkv, w["short_filter.weight"], w["short_filter.bias"])
    q, k, v = qkv.chunk(3, 1)
    kv = k * v
    if "inner_filter.weight" in w:
        kv = causal(kv, w["inner_filter.weight"], w["inner_filter.bias"])
    return linear((q * kv).mT, w, "out_proj")


def mamba2(x, w):
    """h_t = exp(-a dt_t) h_{t-1} + dt_t x_t B_t, y_t = h_t C_t + D x_t, for each head; then a gated RMS norm."""
    heads, inner = len(w["D"]), w["out_proj.weight"].shape[1]
    state = (w["conv1d.weight"].shape[0] - inner) // 2
    z, xbc, dt = linear(x, w, "in_proj").split([inner, inner + 2 * state, heads], -1)
    xbc = F.silu(causal(xbc.mT, w["conv1d.weight"], w["conv1d.bias"]).mT)
    u, b, c = xbc.split([inner, state, state], -1)
    u, dt = u.unflatten(-1, (heads, -1)), F.softplus(dt + w["dt_bias"])
    h, outputs = torch.zeros(*u[:, 0].shape, state), []
    for t in range(x.shape[1]):
        decay = torch.exp(-w["A_log"].exp() * dt[:, t])
        h = decay[..., None, None] * h + (dt[:, t, :, None] * u[:, t])[..., None] * b[:, t, None, None]
        outputs.append(h @ c[:, t, None, :, None])
    y = torch.stack(outputs, 1).squeeze(-1) + w["D"][:, None] * u
    gated = y.flatten(2) * F.silu(z)
    normed = gated * (gated.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w["norm.weight"]
    return linear(normed, w, "out_proj")


def mlp(x, w):
    return linear(F.gelu(linear(x, w, "fc1"), approximate="tanh"), w, "fc2")


def mlp_hyena(x, w):
    """Tokens are the convolution's channels, and it runs along the channels of q, k and v together."""
    q, k, v = causal(linear(x, w, "in_proj"), w["short_filter.weight"], w["short_filter.bias"]).chunk(3, -1)
    return linear(q * k * v, w, "out_proj")


def dit(w: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor, modules: dict[str, object]) -> Tensor:
    """DiT's forward pass, with the function of each block's `attn` and `mlp` from `modules`."""
    patch = w["x_embedder.proj.weight"].shape[-1]
    rows = x.shape[-1] // patch
    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=patch).flatten(2).mT
    h = h + w["pos_embed"]
    angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    steps = torch.cat([angles.cos(), angles.sin()], -1)
    c = linear(F.silu(linear(steps, w, "t_embedder.mlp.0")), w, "t_embedder.mlp.2")
    c = F.silu(c + w["y_embedder.embedding_table.weight"][y])
    depth = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    for i in range(depth):
        m = linear(c, w, f"blocks.{i}.adaLN_modulation.1")[:, None].chunk(6, -1)
        for part, (shift, scale, gate) in (("attn", m[:3]), ("mlp", m[3:])):
            prefix = f"blocks.{i}.{part}."
            own = {n.removeprefix(prefix): v for n, v in w.items() if n.startswith(prefix)}
            normed = F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift
            h = h + gate * modules[prefix[:-1]](normed, own)
    shift, scale = linear(c, w, "final_layer.adaLN_modulation.1")[:, None].chunk(2, -1)
    h = linear(F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift, w, "final_layer.linear")
    h = h.reshape(len(x), rows, rows, patch, patch, -1)
    return torch.einsum("nhwpqc->nchpwq", h).reshape(len(x), -1, rows * patch, rows * patch)

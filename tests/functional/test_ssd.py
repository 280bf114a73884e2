"""The chunked scan equals the recurrence, whatever the chunks, and stays finite where decays over- or underflow."""

import jaxtyping
import pytest
import torch

from closeness import assert_close
from grafting.functional.ssd import ssd, ssd_reference

NAMES = ("x", "dt", "A", "B", "C")


def inputs(num_tokens, *, batch=2, heads=3, head_dim=5, state_dim=4, dtype=torch.float64):
    x = torch.randn(batch, num_tokens, heads, head_dim)
    dt = torch.rand(batch, num_tokens, heads)
    A = -torch.linspace(0.1, 3, heads)
    B, C = torch.randn(2, batch, num_tokens, state_dim)
    return [t.to(dtype).requires_grad_() for t in (x, dt, A, B, C)]


def gradients(y, tensors):
    weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad((y * weight).sum(), tensors)


def assert_same(got, want, tensors, ratio):
    assert_close("output", got, want, ratio)
    for name, a, b in zip(NAMES, gradients(got, tensors), gradients(want, tensors), strict=True):
        # one token decays nothing
        if got.shape[1] > 1 or name != "A":
            assert_close(f"gradient of {name}", a, b, ratio)


@pytest.mark.parametrize("num_tokens", [1, 2, 63, 100])
def test_equals_the_recurrence(num_tokens):
    tensors = inputs(num_tokens)
    assert_same(ssd(*tensors), ssd_reference(*tensors), tensors, 1e-12)


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 64, 1000])
def test_chunks_change_nothing(chunk_size):
    """350 tokens are one part or several: a part is 16 chunks, and its last state is the next one's first."""
    tensors = inputs(350)
    assert_same(ssd(*tensors, chunk_size=chunk_size), ssd_reference(*tensors), tensors, 1e-12)


def test_the_recurrence_is_a_weighted_sum_over_the_past():
    """One head by hand: y[t] = sum over s <= t of C[t].B[s] exp(A (dt[s + 1] + ... + dt[t])) dt[s] x[s]."""
    x, dt, A, B, C = inputs(20, batch=1, heads=1)
    want = torch.zeros_like(x[0, :, 0])
    for t in range(20):
        for s in range(t + 1):
            decay = (A[0] * dt[0, s + 1 : t + 1, 0].sum()).exp()
            want[t] += ((C[0, t] @ B[0, s]) * decay * dt[0, s, 0] * x[0, s, 0]).detach()
    assert_close("output", ssd_reference(x, dt, A, B, C)[0, :, 0], want, 1e-12)


@pytest.mark.parametrize("rate", [-1e-6, -1e4])
def test_extreme_decays_are_finite_and_exact(rate):
    """exp of a chunk's whole decay, either way, is 1, 0 or infinite here; no weight is made of such factors."""
    x, dt, _, B, C = inputs(200, heads=1, dtype=torch.float32)
    tensors = [x, dt, torch.tensor([rate], requires_grad=True), B, C]
    exact = ssd_reference(*(t.double() for t in tensors))
    assert_close("output", ssd(*tensors), exact, 1e-5)
    for name, gradient in zip(NAMES, gradients(ssd(*tensors), tensors), strict=True):
        assert gradient.isfinite().all(), name


def test_a_sudden_reset_does_not_blur_what_follows():
    """A step of 1,000 within a chunk of small ones: what follows it is not lost in its running sum."""
    x, dt, A, B, C = (t.detach().float() for t in inputs(64))
    dt = dt / 10
    dt[:, 10] = 1000
    exact = ssd_reference(*(t.double() for t in (x, dt, A, B, C)))
    got = ssd(x, dt, A, B, C)
    assert_close("tokens before", got[:, :10], exact[:, :10], 1e-5)
    assert_close("tokens after", got[:, 10:], exact[:, 10:], 1e-3)


def test_bf16_states_are_kept_in_float32():
    tensors = inputs(3000, dtype=torch.bfloat16)
    exact = ssd_reference(*(t.double() for t in tensors))
    got = ssd(*tensors)
    assert got.dtype == torch.bfloat16
    assert_close("output", got, exact, 4e-3)
    for name, gradient in zip(NAMES, gradients(got, tensors), strict=True):
        assert gradient.isfinite().all(), name


def test_autocast_does_not_round_the_states():
    tensors = inputs(300, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ssd(*tensors)
    assert torch.equal(got, ssd(*tensors))


@pytest.fixture
def _unchecked_shapes():
    """Dynamo cannot trace the checks of shapes that the tests put around every function."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.slow
@pytest.mark.usefixtures("_unchecked_shapes")
@pytest.mark.parametrize("num_tokens", [63, 700])
def test_compiles_as_one_graph(num_tokens):
    torch.compiler.reset()
    tensors = inputs(num_tokens)
    compiled = torch.compile(ssd, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*tensors), ssd(*tensors), tensors, 1e-10)

"""The one way in which tests compare tensors: relative root-mean-square error."""

from torch import Tensor


def assert_close(name: str, got: Tensor, want: Tensor, ratio: float) -> None:
    """Fails when rms(got - want) > ratio * rms(want), or anything is not finite."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    assert got.isfinite().all(), f"{name}: not finite"
    error = (got.double() - want.double()).square().mean().sqrt()
    size = want.double().square().mean().sqrt().clamp(min=1e-12)
    assert error / size <= ratio, f"{name}: relative error {error / size:.2e} > {ratio:.0e}"

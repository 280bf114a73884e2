"""The noise process and its loss, against recorded values of the original code."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file

from closeness import assert_close
from grafting.diffusion import BETA_END, BETA_START, NUM_STEPS, Diffusion, discretized_log_likelihood
from grafting.models.dit import DiT

GOLDEN = load_file(Path(__file__).parent / "golden" / "dit.safetensors")
CASE = {name: GOLDEN[f"loss.{name}"] for name in ("x", "x_t", "noise", "t", "y")}


def golden_prediction() -> torch.Tensor:
    model = DiT(
        input_size=8, in_channels=4, hidden_size=48, depth=2, num_heads=4, num_classes=10, patch_size=2
    ).eval()
    model.load_state_dict({n.removeprefix("model."): x for n, x in GOLDEN.items() if n.startswith("model.")})
    with torch.no_grad():
        return model(CASE["x_t"], CASE["t"], CASE["y"])


def loss_of(prediction: torch.Tensor) -> torch.Tensor:
    return Diffusion().loss(prediction, **{name: CASE[name] for name in ("x", "x_t", "noise", "t")})


def test_noised_images_equal_the_originals():
    got = Diffusion().add_noise(CASE["x"], CASE["noise"], CASE["t"])
    assert_close("x_t", got, CASE["x_t"], 1e-6)


def test_noised_images_equal_those_of_diffusers():
    scheduler = DDPMScheduler(num_train_timesteps=NUM_STEPS, beta_start=BETA_START, beta_end=BETA_END)
    got = Diffusion().add_noise(CASE["x"], CASE["noise"], CASE["t"])
    assert_close("x_t", got, scheduler.add_noise(CASE["x"], CASE["noise"], CASE["t"]), 1e-4)


def test_loss_equals_the_originals_at_every_step():
    assert CASE["t"].tolist() == [0, 0, 1, 250, 700, 999]
    prediction = golden_prediction()
    loss, mse = loss_of(prediction), loss_of(prediction[:, :4])
    torch.testing.assert_close(loss, GOLDEN["loss.loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(mse, GOLDEN["loss.mse"], rtol=1e-5, atol=0)
    # a difference of two rounded sums: to 1e-5 of the loss that it is part of
    torch.testing.assert_close(loss - mse, GOLDEN["loss.vb"], rtol=1e-5, atol=1e-6)


def test_the_bound_itself_equals_the_originals():
    eps, variance = golden_prediction().chunk(2, dim=1)
    got = Diffusion()._bound(eps, variance, x=CASE["x"], x_t=CASE["x_t"], t=CASE["t"])
    torch.testing.assert_close(got, GOLDEN["loss.vb"], rtol=1e-5, atol=0)


def test_the_bound_does_not_move_the_mean():
    prediction = golden_prediction().requires_grad_()
    loss_of(prediction).sum().backward()
    both = prediction.grad
    eps = prediction.detach()[:, :4].requires_grad_()
    loss_of(eps).sum().backward()
    assert torch.equal(both[:, :4], eps.grad)
    assert all(gradient.count_nonzero() for gradient in both[:, 4:])


def test_a_perfect_prediction_has_no_loss_but_the_likelihood_of_the_first_step():
    noise_only = loss_of(CASE["noise"])
    assert noise_only.count_nonzero() == 0
    # -1 chooses the variance of the true posterior
    bound = loss_of(torch.cat([CASE["noise"], torch.full_like(CASE["noise"], -1)], dim=1))
    assert (bound[:2] > 0.1).all()
    assert (bound[2:].abs() < 1e-4).all()


def test_8_bit_likelihoods_sum_to_one():
    values = torch.arange(256) / 127.5 - 1
    for mean, scale in ((0.0, 0.3), (0.99, 0.1), (-1.0, 0.02)):
        log_likelihood = discretized_log_likelihood(
            values, torch.full_like(values, mean), torch.full_like(values, math.log(scale))
        )
        assert log_likelihood.exp().sum() == pytest.approx(1, abs=1e-4)


def test_loss_of_a_bfloat16_prediction_is_float32():
    assert loss_of(golden_prediction().bfloat16()).dtype == torch.float32

"""Guidance: what it leads away from, which channels it moves, and how it is given back its spread."""

import pytest
import torch
from torch.linalg import vector_norm

from closeness import assert_close
from grafting.errors import ProtocolError
from grafting.sampling.chain import SamplingConfig, check_sampling, sample
from grafting.sampling.guidance import Guidance
from toydata import denoiser

COND, NULL = torch.randn(2, 3, 6, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()


def test_it_extrapolates_the_first_channels():
    got = Guidance(scale=3.0, channels=2)(COND, NULL, channels=4)
    assert_close("guided", got[:, :2], (NULL + 3 * (COND - NULL))[:, :2], 1e-6)
    assert torch.equal(got[:, 2:], COND[:, 2:])


def test_a_predicted_variance_is_not_guided():
    assert torch.equal(Guidance(scale=3.0)(COND, NULL, channels=4)[:, 4:], COND[:, 4:])


def test_at_scale_one_it_changes_nothing():
    assert_close("same", Guidance(scale=1.0)(COND, NULL, channels=6), COND, 1e-6)


def test_rescaling_gives_back_the_spread_of_the_conditional_prediction():
    got = Guidance(scale=7.5, rescale=1.0)(COND, NULL, channels=6)
    assert_close("spread", got.flatten(1).std(1), COND.flatten(1).std(1), 1e-5)
    plain = Guidance(scale=7.5)(COND, NULL, channels=6)
    half = Guidance(scale=7.5, rescale=0.5)(COND, NULL, channels=6)
    assert_close("half way", half, (got + plain) / 2, 1e-5)


def test_the_norm_gives_back_the_length_at_every_place():
    got = Guidance(scale=7.5, rescale="norm")(COND, NULL, channels=6)
    assert_close("lengths", got.norm(dim=1), COND.norm(dim=1), 1e-5)


def test_lengths_of_rows_and_of_squares_are_given_back():
    rows, squares = (
        Guidance(scale=7.5, rescale=kind)(COND, NULL, channels=6) for kind in ("norm-rows", "norm-2x2")
    )
    assert_close("rows", rows.norm(dim=-1), COND.norm(dim=-1), 1e-5)
    got, want = (x.unflatten(-1, (2, 2)).unflatten(-3, (2, 2)) for x in (squares, COND))
    assert_close("squares", vector_norm(got, dim=(1, 3, 5)), vector_norm(want, dim=(1, 3, 5)), 1e-5)


def test_lengths_of_squares_where_a_side_is_odd():
    cond, null = torch.randn(2, 1, 3, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    got = Guidance(scale=7.5, rescale="norm-2x2")(cond, null, channels=3)
    for rows, cols in ((slice(0, 2), slice(2, 4)), (slice(2, 3), slice(4, 5))):
        part = (..., rows, cols)
        assert_close(
            "lengths", vector_norm(got[part], dim=(1, 3, 4)), vector_norm(cond[part], dim=(1, 3, 4)), 1e-5
        )


def test_a_negative_condition_stands_in_the_place_of_the_null():
    asked = []

    def predict(model, x, t, y):
        asked.append(y.tolist())
        return x

    config = SamplingConfig(sampler="ddim", steps=1, cfg_scale=2.0, negative=7, num_images=3)
    how = denoiser(predict, null_label=None)  # a model without a null can be led away from something
    list(sample(torch.nn.Linear(1, 1), config, denoiser=how, shape=(1, 2, 2)))
    assert asked == [[0, 1, 2, 7, 7, 7]]
    with pytest.raises(ProtocolError, match=r"negative \[12\] are out of range: conditions are 0..9"):
        check_sampling(SamplingConfig(negative=12), denoiser=denoiser())


def test_where_it_is_off_there_is_none():
    assert SamplingConfig(cfg_scale=1).guidance is None
    assert SamplingConfig(cfg_scale=1.5, guided_channels=3).guidance == Guidance(scale=1.5, channels=3)


def test_settings_of_before_are_written_as_before():
    written = SamplingConfig(cfg_scale=1.5).model_dump(mode="json")
    assert not {"negative", "cfg_rescale", "shape"} & set(written)
    changed = SamplingConfig(negative=3, cfg_rescale=0.7, shape=(4, 8, 8)).model_dump(mode="json")
    assert (changed["negative"], changed["cfg_rescale"], changed["shape"]) == (3, 0.7, [4, 8, 8])

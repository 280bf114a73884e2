"""Losses by noise level: which level a step is of, their means, and what stage 2 logs of them."""

import copy

import pytest
import torch

from closeness import assert_close
from grafting.diffusion import Diffusion, FlowMatching
from grafting.hosts import hosts
from grafting.training.finetuning import FinetuneConfig, finetune
from grafting.training.levels import NoiseLevels, level_means
from toydata import denoiser, noise_images


@pytest.mark.parametrize(
    ("process", "steps"),
    [
        (Diffusion(), torch.tensor([0, 199, 200, 799, 800, 999])),
        (FlowMatching(scale=1000.0), torch.tensor([0.0, 199.0, 200.0, 799.0, 800.0, 1000.0])),
    ],
)
def test_a_level_begins_at_its_lower_end(process, steps):
    losses = torch.tensor([1.0, 3.0, 5.0, 7.0, 11.0, 13.0])
    sums = NoiseLevels(process, steps.device).sums(losses, steps)
    assert sums.tolist() == [[4, 5, 0, 7, 24], [2, 1, 0, 1, 2]]
    assert level_means(sums.flatten().tolist()) == {
        "loss_at_noise/0-20": 2.0, "loss_at_noise/20-40": 5.0, "loss_at_noise/60-80": 7.0, "loss_at_noise/80-100": 12.0
    }  # fmt: skip


@pytest.mark.parametrize(
    "weights", [{}, {"output_weight": 0.5}, {"diffusion_weight": 0.0, "output_weight": 2.0}]
)
def test_levels_make_up_the_loss_however_a_batch_is_cut(weights):
    model, teacher = hosts()["dit"].tiny(), hosts()["dit"].tiny()
    torch.nn.init.normal_(teacher.final_layer.linear.weight)

    def first_step(**settings):
        config = FinetuneConfig(steps=1, batch_size=16, warmup_steps=0, **weights, **settings)
        data = noise_images(32, size=16)
        (step,) = finetune(copy.deepcopy(model), data, config, denoiser=denoiser(), teacher=teacher)
        return step.values

    values, cut = first_step(), first_step(accumulate=4)
    levels = {key: value for key, value in values.items() if key.startswith("loss_at_noise/")}
    assert 3 <= len(levels) <= 5
    assert min(levels.values()) <= values["loss"] <= max(levels.values())
    found, wanted = ([part[key] for key in levels] for part in (cut, values))
    assert_close("levels", torch.tensor(found), torch.tensor(wanted), ratio=1e-5)

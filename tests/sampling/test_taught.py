"""Latents that a model makes: those of `sample`, in an ordinary folder, whoever made which."""

import pytest
import torch

from grafting import SamplingConfig, sample
from grafting.data.latents import INDEX_NAME, LatentsConfig
from grafting.data.promptfolder import Prompt, write_prompts
from grafting.data.prompts import Prompts, check_bound
from grafting.errors import DataError, RunError
from grafting.hosts import host_of, hosts
from grafting.sampling.taught import teach

CONFIG = SamplingConfig(sampler="ddim", steps=2, cfg_scale=2.0, num_images=7, batch_size=2, precision="fp32")
SHAPE = (4, 8, 8)


@pytest.fixture
def made(tmp_path):
    """A tiny PixArt, and its denoiser for three prompts and a null."""
    model = hosts()["pixart"].tiny()
    draw = torch.Generator().manual_seed(1)
    rows = [
        Prompt(
            words, {"encoder_hidden_states": torch.randn(5, model.config.caption_channels, generator=draw)}
        )
        for words in ("a", "b", "c", "")
    ]
    write_prompts(tmp_path / "prompts", rows[:3], nulls=rows[3:], source="words", dropout=0.1)
    return model, host_of(model).denoiser(model, conditions=Prompts(tmp_path / "prompts"))


def filled(made, folder, *, config=CONFIG, **share):
    model, denoiser = made
    given = {"denoiser": denoiser, "shape": SHAPE, "identity": {"model": "tiny"}, "source": "made by tiny"}
    return list(teach(model, config, folder, dtype="fp32", per_shard=3, **given, **share))


def test_latents_are_those_that_sampling_gives_bound_to_their_prompts(made, tmp_path):
    model, denoiser = made
    steps = filled(made, tmp_path / "latents")
    assert [step.done for step in steps] == [0, 2, 3, 5, 6, 7]
    data = LatentsConfig(folder=tmp_path / "latents").load()
    x, labels = data.batch(torch.arange(7))
    batches = list(sample(model, CONFIG, denoiser=denoiser, shape=SHAPE))
    torch.testing.assert_close(x, torch.cat([batch.x for batch in batches]), atol=1e-3, rtol=1e-3)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    check_bound(data, denoiser.conditions)
    with pytest.raises(DataError, match="name those that the data were made for"):
        check_bound(data, None)


def test_processes_share_shards_and_a_killed_one_resumes_in_the_same_bytes(made, tmp_path):
    filled(made, tmp_path / "whole")
    filled(made, tmp_path / "shared", share=slice(1, None, 2))
    assert not (tmp_path / "shared" / INDEX_NAME).exists()
    model, denoiser = made
    given = {"denoiser": denoiser, "shape": SHAPE, "identity": {"model": "tiny"}, "source": "made by tiny"}
    steps = teach(
        model, CONFIG, tmp_path / "shared", dtype="fp32", per_shard=3, share=slice(0, None, 2), **given
    )
    assert [next(steps).done for _ in range(3)] == [0, 2, 3]
    steps.close()
    assert [step.done for step in filled(made, tmp_path / "shared", share=slice(0, None, 2))] == [3, 4]
    whole, shared = [LatentsConfig(folder=tmp_path / name).load() for name in ("whole", "shared")]
    assert whole.index == shared.index


def test_other_settings_are_another_work(made, tmp_path):
    filled(made, tmp_path / "latents")
    other = CONFIG.model_copy(update={"steps": 3})
    with pytest.raises(RunError, match=r"sampling\.steps: asked 3, found 2"):
        filled(made, tmp_path / "latents", config=other)
    # batches are a circumstance
    assert [
        s.done for s in filled(made, tmp_path / "latents", config=CONFIG.model_copy(update={"batch_size": 5}))
    ] == [7]

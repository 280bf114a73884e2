"""From the same noise and prompt, our chain draws what diffusers' pipeline draws: the sum of rows, process, time, sign and steps."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from grafting import Prompts, SamplingConfig, sample
from grafting.hosts import host_of
from grafting.hosts._pipelines import process_of
from grafting.latents.prompting import Prompting, PromptingConfig
from grafting.machine.randomness import generator
from latents.textpipelines import ALL

# of each: the pipeline's call, what turns guidance off, a latent's shape, our sampler
CASES = {
    "pixart": ({"height": 32, "width": 48}, {"guidance_scale": 1.0, "use_resolution_binning": False}, (4, 16, 24), "dpm-solver++"),
    "sd3": ({"height": 32, "width": 48}, {"guidance_scale": 1.0}, (4, 16, 24), "euler"),
    "flux": ({"height": 32, "width": 48}, {}, (4, 16, 24), "euler"),
    "wan": ({"height": 32, "width": 48, "num_frames": 5}, {"guidance_scale": 1.0}, None, "euler"),
    "lumina2": ({"height": 64, "width": 96}, {"guidance_scale": 1.0}, (4, 8, 12), "euler"),
    "zimage": ({"height": 32, "width": 48}, {"guidance_scale": 0.0}, (4, 16, 24), "euler"),
}  # fmt: skip


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_latents_are_the_pipelines(name, steps, tmp_path):
    call, off, shape, sampler = CASES[name]
    pipe = ALL[name]()
    pipe.set_progress_bar_config(disable=True)
    if name == "wan":  # UniPC, its own, is none of ours
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    asked = {**call, **off, "num_inference_steps": steps, "output_type": "latent", "return_dict": False}
    if shape is None:
        shape = tuple(pipe("a red cat", **asked)[0].shape[1:])
    work = Prompting(
        pipe, ["sun", "a red cat"], tmp_path / "prompts", PromptingConfig(), source="words", call=call
    )
    for _ in work.steps():
        pass
    noise = torch.randn(shape, generator=generator(0, 0))[None]
    want = pipe("a red cat", latents=_packed(pipe, name, noise), **asked)[0]
    if name == "flux":
        want = pipe._unpack_latents(want, call["height"], call["width"], pipe.vae_scale_factor)
    host = host_of(pipe.transformer)
    process = process_of(pipe)
    if name == "flux":  # its shift follows the size
        config = pipe.scheduler.config
        slope = (config.max_shift - config.base_shift) / (
            config.max_image_seq_len - config.base_image_seq_len
        )
        mu = config.base_shift + slope * (8 * 12 - config.base_image_seq_len)
        process = process.model_copy(update={"shift": math.exp(mu)})
    denoiser = host.denoiser(
        pipe.transformer, Prompts(tmp_path / "prompts"), host.built(pipe.transformer, process)
    )
    config = SamplingConfig(
        sampler=sampler, steps=steps, cfg_scale=1.0, num_images=1, labels=(1,), precision="fp32", shape=shape
    )
    (batch,) = sample(pipe.transformer, config, denoiser=denoiser)
    torch.testing.assert_close(batch.x, want.float(), atol=1e-4 * float(want.abs().mean()), rtol=1e-4)


def _packed(pipe, name, noise):
    """The noise as the pipeline takes it."""
    return pipe._pack_latents(noise, 1, *noise.shape[1:]) if name == "flux" else noise.clone()

"""Sampling: chains recorded from the original code, guidance, and images that depend on (seed, i) alone."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from safetensors.torch import load_file

from closeness import assert_close
from grafting.diffusion import BETA_END, BETA_START, NUM_STEPS
from grafting.errors import GraftingError, SettingsError
from grafting.machine.randomness import sample_noise
from grafting.models.dit import DiT
from grafting.samplers import retained_steps
from grafting.sampling import chain as sampling
from grafting.sampling.chain import SamplingConfig, check_sampling, labels_of, sample
from toydata import denoiser

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "dit.safetensors")
WEIGHTS = {name.removeprefix("model."): x for name, x in GOLDEN.items() if name.startswith("model.")}
SHAPE = (4, 8, 8)
SAMPLERS = ("ddpm", "ddim", "dpm-solver++")


@pytest.fixture
def model() -> DiT:
    model = DiT(
        input_size=8, patch_size=2, in_channels=4, hidden_size=48, depth=2, num_heads=4, num_classes=10
    )
    model.load_state_dict(WEIGHTS)
    return model


class Recorder:
    """A `predict` that remembers how the model was called."""

    def __init__(self, answer=lambda model, x, t, y: model(x, t, y)):
        self.answer = answer
        self.calls: list[tuple[int, int, list[int]]] = []  # batch size, step, labels

    def __call__(self, model, x, t, y):
        assert t.unique().numel() == 1
        assert len(x) == len(t) == len(y)
        self.calls.append((len(x), int(t[0]), y.tolist()))
        return self.answer(model, x, t, y)


def draw(model, indices=None, predict=None, shape=SHAPE, classes=None, **settings) -> torch.Tensor:
    config = SamplingConfig(**{"steps": 5, "num_images": 8} | settings)
    how = denoiser(predict or Recorder(), **classes or {})
    batches = sample(model, config, denoiser=how, shape=shape, indices=indices)
    return torch.cat([batch.x for batch in batches])


@pytest.mark.parametrize("chain", ["ddpm", "ddpm_clip", "ddim", "ddim_clip"])
def test_a_chain_with_guidance_equals_the_originals(model, monkeypatch, chain):
    case = {name: GOLDEN[f"{chain}.{name}"] for name in ("initial", "labels", "timesteps", "sample")}
    monkeypatch.setattr(sampling, "_initial_noise", lambda streams, shape: case["initial"])
    if "ddpm" in chain:
        steps_noise = iter(GOLDEN[f"{chain}.noise"])
        monkeypatch.setattr("grafting.samplers._drawn", lambda streams, x: next(steps_noise))
    predict = Recorder()
    got = draw(
        model,
        predict=predict,
        sampler=chain.split("_")[0],
        clip="clip" in chain,
        cfg_scale=1.5,
        guided_channels=3,
        num_images=3,
        labels=tuple(case["labels"].tolist()),
    )
    assert [step for _, step, _ in predict.calls] == case["timesteps"].tolist()[::-1]
    assert_close(chain, got, case["sample"], 1e-5)


def test_250_steps_are_those_of_dit():
    assert retained_steps(250)[::-1] == GOLDEN["respaced.250"].tolist()


@pytest.mark.parametrize("num_steps", [1, 2, 3, 21, 50, 333, 999, 1000])
def test_any_number_of_steps_starts_at_the_noisiest(num_steps):
    steps = retained_steps(num_steps)
    assert steps[0] == 999
    assert len(set(steps)) == num_steps
    assert steps == sorted(steps, reverse=True)
    assert num_steps == 1 or steps[-1] == 0


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_steps", [1, 2, 250])
def test_chains_of_any_length_recover_an_image_that_the_model_knows(sampler, num_steps):
    known = torch.linspace(-0.9, 0.9, 64).view(1, 1, 8, 8)
    alpha_bars = (1 - torch.linspace(BETA_START, BETA_END, NUM_STEPS, dtype=torch.float64)).cumprod(0)

    def noise_of_the_known(model, x, t, y):
        alpha_bar = alpha_bars[t].view(-1, 1, 1, 1)
        return ((x - alpha_bar.sqrt() * known) / (1 - alpha_bar).sqrt()).float()

    got = draw(
        torch.nn.Linear(1, 1),
        predict=noise_of_the_known,
        shape=(1, 8, 8),
        classes={"count": 2, "null_label": None},
        sampler=sampler,
        steps=num_steps,
        cfg_scale=1,
        num_images=2,
    )
    assert_close(f"{sampler} in {num_steps} steps", got, known.expand(2, -1, -1, -1), 1e-3)


def test_a_model_without_predicted_variance_gets_that_of_the_posterior(monkeypatch):
    torch.manual_seed(1)
    model = DiT(
        input_size=8,
        in_channels=4,
        hidden_size=48,
        depth=1,
        num_heads=4,
        num_classes=10,
        learn_sigma=False,
    ).eval()
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    got = draw(model, steps=20, cfg_scale=1, num_images=1)

    scheduler = DDPMScheduler(
        beta_start=BETA_START,
        beta_end=BETA_END,
        variance_type="fixed_small",
        clip_sample=False,
        timestep_spacing="linspace",
    )
    scheduler.set_timesteps(20)
    stream = sampling.generator(0, 0)
    x = torch.randn(1, 4, 8, 8, generator=stream)
    with torch.no_grad():
        for t in scheduler.timesteps:
            eps = model(x, t.expand(1), torch.tensor([0]))
            x = scheduler.step(eps, t, x, generator=stream).prev_sample
    assert_close("fixed small variance", got, x, 1e-3)  # diffusers' own tables are float32


def test_dpm_solver_is_that_of_diffusers(model):
    got = draw(model, sampler="dpm-solver++", steps=8, cfg_scale=1, num_images=2)
    scheduler = DPMSolverMultistepScheduler(beta_start=BETA_START, beta_end=BETA_END)
    scheduler.set_timesteps(8)
    x = sample_noise(0, [0, 1], (4, 8, 8))
    model.eval()
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t.expand(2), torch.tensor([0, 1]))[:, :4], t, x).prev_sample
    assert_close("dpm-solver++", got, x, 1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_clipping_keeps_images_in_range(model, sampler):
    assert draw(model, sampler=sampler).abs().max() > 2
    clipped = draw(model, sampler=sampler, clip=True)
    assert clipped.abs().max() <= 1
    assert clipped.std() > 0.1


def pixels_differing(got: torch.Tensor, want: torch.Tensor) -> float:
    """Share of pixels that differ; never by more than 1."""
    difference = (got.int() - want.int()).abs()
    assert difference.max() <= 1
    return (difference > 0).float().mean().item()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("labels", ["balanced", "random"])
def test_an_image_depends_on_its_seed_and_number_alone(model, sampler, labels):
    def images(indices=None, batch_size=8):
        config = SamplingConfig(
            sampler=sampler,
            steps=6,
            clip=True,
            seed=7,
            labels=labels,
            num_images=8,
            batch_size=batch_size,
        )
        batches = list(sample(model, config, denoiser=denoiser(Recorder()), shape=SHAPE, indices=indices))
        return torch.cat([b.images() for b in batches]), torch.cat([b.labels for b in batches])

    want, want_labels = images()
    for batch_size in (1, 3):
        got, got_labels = images(batch_size=batch_size)
        assert torch.equal(got_labels, want_labels)
        assert pixels_differing(got, want) <= 1e-3
    chosen = [5, 0, 6]
    got, got_labels = images(indices=chosen, batch_size=2)
    assert torch.equal(got_labels, want_labels[chosen])
    assert pixels_differing(got, want[chosen]) <= 1e-3


def test_another_seed_gives_other_images(model):
    first, again, other = draw(model), draw(model), draw(model, seed=1)
    assert torch.equal(first, again)
    assert (first - other).abs().flatten(1).amax(1).min() > 0.1
    assert (first[:, None] - first[None]).abs().flatten(2).amax(2).fill_diagonal_(1).min() > 0.1


def test_labels_by_rule():
    def labels(rule, seed=0, indices=range(12)):
        return labels_of(indices, SamplingConfig(labels=rule, seed=seed), count=10).tolist()

    assert labels("balanced") == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert labels((3, 8)) == [3, 8] * 6
    assert labels("random") == labels("random") != labels("random", seed=1)
    assert labels("random", indices=[4])[0] == labels("random")[4]
    assert set(labels("random", indices=range(200))) == set(range(10))
    rules = [SamplingConfig(labels=rule).labels_rule for rule in ("balanced", "random", (3, 8))]
    assert rules == ["i mod number of classes", "uniform, from (seed, i)", "given, in turn: 3, 8"]


def test_batches_say_which_images_they_hold(model):
    config = SamplingConfig(steps=1, num_images=5, batch_size=2, labels=(9,))
    batches = list(sample(model, config, denoiser=denoiser(Recorder()), shape=SHAPE))
    assert [batch.indices for batch in batches] == [(0, 1), (2, 3), (4,)]
    assert all(batch.labels.tolist() == [9] * len(batch.indices) for batch in batches)
    assert list(sample(model, config, denoiser=denoiser(Recorder()), shape=SHAPE, indices=[])) == []


def test_without_guidance_the_null_half_is_not_computed(model):
    predict = Recorder()
    draw(model, predict=predict, cfg_scale=1, num_images=3)
    assert [(size, labels) for size, _, labels in predict.calls] == [(3, [0, 1, 2])] * 5
    predict = Recorder()
    draw(model, predict=predict, cfg_scale=2, num_images=3)
    assert [(size, labels) for size, _, labels in predict.calls] == [(6, [0, 1, 2, 10, 10, 10])] * 5


def test_guidance_is_on_inside_its_interval_only(model):
    predict = Recorder()
    draw(model, predict=predict, cfg_scale=2, cfg_interval=(500 / 999, 0.8), num_images=3)
    assert [(step, size) for size, step, _ in predict.calls] == [
        (999, 3),
        (749, 6),
        (500, 6),
        (250, 3),
        (0, 3),
    ]
    everywhere, nowhere = (draw(model, cfg_scale=scale, num_images=2, sampler="ddim") for scale in (2, 1))
    part = draw(model, cfg_scale=2, cfg_interval=(0.3, 0.8), num_images=2, sampler="ddim")
    assert not torch.allclose(part, everywhere)
    assert not torch.allclose(part, nowhere)


def test_guidance_extrapolates_the_guided_channels_and_no_variance(model):
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 4])
    config = SamplingConfig(cfg_scale=4, guided_channels=2)
    model.eval()
    asked = sampling._Asked(model, denoiser(Recorder()), labels, config.guidance)
    own, got = asked.predictions(x, step=300)
    t = torch.full((2,), 300)
    with torch.no_grad():
        conditional, null = model(x, t, labels), model(x, t, torch.full((2,), 10))
    assert_close("guided", got[:, :2], null[:, :2] + 4 * (conditional - null)[:, :2], 1e-5)
    assert_close("others and variance", got[:, 2:], conditional[:, 2:], 1e-5)
    assert_close("the model's own", own, conditional, 1e-5)


def test_guidance_of_zero_is_the_null_label(model):
    got = draw(model, cfg_scale=0, sampler="ddim", num_images=2)
    # asked for directly: the label that stands for no class counts as a class here
    want = draw(model, classes={"count": 11}, cfg_scale=1, labels=(10,), sampler="ddim", num_images=2)
    assert_close("no class", got, want, 1e-4)


def test_the_models_modes_are_restored_between_and_after_batches(model):
    model.train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    seen = []

    def predict(model, x, t, y):
        seen.append((any(module.training for module in model.modules()), torch.is_grad_enabled()))
        return model(x, t, y)

    for _ in sample(
        model, SamplingConfig(steps=2, num_images=2, batch_size=1), denoiser=denoiser(predict), shape=SHAPE
    ):
        assert [module.training for module in model.modules()] == modes
        assert torch.is_grad_enabled()
    assert seen == [(False, False)] * 4

    def failing(model, x, t, y):
        raise KeyError

    with pytest.raises(KeyError):
        draw(model, predict=failing)
    assert [module.training for module in model.modules()] == modes


def test_bf16_is_for_the_model_alone_and_stays_close(model):
    dtypes = []

    def predict(model, x, t, y):
        got = model(x, t, y)
        dtypes.append((x.dtype, got.dtype))
        return got

    want = draw(model, sampler="ddim", clip=True)
    got = draw(model, predict=predict, sampler="ddim", clip=True, precision="bf16")
    assert set(dtypes) == {(torch.float32, torch.bfloat16)}
    assert got.dtype == torch.float32
    assert_close("bf16", got, want, 0.1)


COMPILED = """
from dataclasses import replace

import torch
from torch._dynamo.utils import counters
from grafting.hosts import hosts
from grafting.sampling.chain import SamplingConfig, sample

host = hosts()["dit"]
model = host.tiny().train()
settings = {"sampler": "ddim", "clip": True, "num_images": 6, "batch_size": 4, "steps": 3}
sizes = []

def predict(model, x, t, y):
    sizes.append(len(x))
    return host.predict(model, x, t, y)

how = replace(host.denoiser(model), predict=predict)

def images(**more):
    config = SamplingConfig(**settings, **more)
    batches = sample(model, config, denoiser=how, shape=host.shape(model))
    return torch.cat([batch.images() for batch in batches]).int()

compiled, graphs = images(compile=True), counters["stats"]["unique_graphs"]
difference = (compiled - images()).abs()
assert sizes == ([8] * 3 + [4] * 3) * 2, sizes
assert graphs == counters["stats"]["unique_graphs"] == 2, graphs  # its blocks are alike: a graph for each size of batch
assert difference.max() <= 1 and (difference > 0).float().mean() <= 1e-3, difference
assert model.training
"""


@pytest.mark.slow
def test_a_compiled_model_draws_the_same_images():
    """In a process of its own: beartype, which checks shapes in tests, cannot be compiled."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_images": 0}, "num_images"),
        ({"batch_size": 0}, "batch_size"),
        ({"steps": -5}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"sampler": "midpoint"}, "sampler"),
        ({"cfg_rescale": 1.5}, "cfg_rescale"),
        ({"negative": -1}, "negative"),
        ({"shape": (4, 0, 8)}, "shape"),
        ({"seed": -1}, "seed"),
        ({"cfg_scale": float("nan")}, "cfg_scale"),
        ({"cfg_interval": (0.8, 0.2)}, r"found \[0.8, 0.2\]"),
        ({"cfg_interval": (0, float("nan"))}, "cfg_interval"),
        ({"guided_channels": 0}, "guided_channels"),
        ({"labels": ()}, "labels"),
        ({"labels": (-1,)}, "labels"),
        ({"labels": "alphabetical"}, "labels"),
        ({"num_steps": 5}, "num_steps"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        SamplingConfig(**settings)


def test_a_config_survives_json():
    config = SamplingConfig(
        labels=(1, 2), cfg_interval=(0.1, 0.9), guided_channels=3, cfg_rescale="norm", shape=(4, 8, 8)
    )
    assert SamplingConfig.model_validate_json(config.model_dump_json()) == config


def test_every_fault_is_named_at_the_call_before_any_work(model):
    def predict(model, x, t, y):
        pytest.fail("the model was called")

    config = SamplingConfig(labels=(0, 12, 10), guided_channels=5)
    with pytest.raises(GraftingError) as caught:
        sample(model, config, denoiser=denoiser(predict, null_label=None), shape=SHAPE)
    assert str(caught.value).splitlines() == [
        "these samples cannot be drawn:",
        "  cfg_scale is 1.5, but the model has no null label or prompt to lead away from (it was trained without one, or "
        "distilled): set cfg_scale to 1",
        "  guided_channels is 5, but images have 4 channels",
        "  labels [10, 12] are out of range: conditions are 0..9",
    ]
    with pytest.raises(GraftingError, match="numbers start at 0; found -2"):
        sample(model, SamplingConfig(), denoiser=denoiser(predict), shape=SHAPE, indices=[3, -2])


def test_a_model_without_null_label_is_sampled_without_guidance():
    check_sampling(SamplingConfig(cfg_scale=1), denoiser=denoiser(null_label=None))
    model = DiT(input_size=8, hidden_size=48, depth=1, num_heads=4, num_classes=10, class_dropout_prob=0.0)
    assert draw(model, classes={"null_label": None}, cfg_scale=1, num_images=2).isfinite().all()


def test_samples_that_are_not_finite_do_not_become_pixels(model):
    with torch.no_grad():
        model.final_layer.linear.bias.fill_(float("nan"))
    (batch,) = sample(
        model, SamplingConfig(steps=1, num_images=2), denoiser=denoiser(Recorder()), shape=SHAPE
    )
    with pytest.raises(GraftingError, match="not finite"):
        batch.images()

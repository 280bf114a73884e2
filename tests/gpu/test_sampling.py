"""Images, figures and locality of a model on CUDA are those of the CPU, but for rounding."""

import pytest
import torch

from closeness import assert_close
from grafting.analysis import noised_locality
from grafting.conditions import ClassLabels
from grafting.contract import Denoiser
from grafting.diffusion import FlowMatching
from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import graft
from grafting.evaluation import Evaluator, MetricsConfig, Protocol, Reference, evaluate
from grafting.hosts import hosts
from grafting.latents.autoencoder import load_autoencoder
from grafting.metrics.features import ModuleNetwork
from grafting.metrics.frechet import FeatureStatistics, FrechetInfluences
from grafting.metrics.inception_score import inception_score
from grafting.metrics.manifold import density_coverage, precision_recall
from grafting.models.classifier import Classifier
from grafting.sampling.chain import SamplingConfig, sample
from imagefiles import write_vae
from toydata import denoiser, noise_images

pytestmark = pytest.mark.gpu
HOST = hosts()["dit"]
CPU = torch.device("cpu")
PLAN = Plan(
    edits=(
        Replace(role="attention", blocks=[0], operator={"name": "window-2d", "radius": 1}),
        Replace(role="attention", blocks=[1], operator="hyena-x"),
    )
)
PROCESSES = {
    "ddpm": denoiser(),
    "ddim": denoiser(),
    "dpm-solver++": denoiser(),
    "euler": None,
    "heun": None,
    "dpm-solver++ of a flow": None,
}


def model_on(device):
    torch.manual_seed(2)
    model = HOST.tiny().eval()
    graft(model, PLAN)
    return model.to(device)


def how_for(name: str) -> Denoiser:
    """A DiT as it is trained, or as if its first channel were a velocity."""
    if PROCESSES[name] is not None:
        return PROCESSES[name]

    def predict(model, x, t, y):
        return HOST.predict(model, x, t, y)[:, : x.shape[1]]

    return Denoiser(
        predict, FlowMatching(scale=1000.0, shift=3.0), ClassLabels(10, null_label=10, dropout=0.1)
    )


def drawn(device, name, *, batch_size=4, indices=None, **settings):
    config = SamplingConfig(
        **{
            "sampler": name.split()[0],
            "steps": 4,
            "num_images": 8,
            "batch_size": batch_size,
            "seed": 3,
            "precision": "fp32",
        }
        | settings
    )
    batches = list(
        sample(model_on(device), config, denoiser=how_for(name), shape=(1, 16, 16), indices=indices)
    )
    assert {batch.x.device.type for batch in batches} == {"cpu"}
    return torch.cat([batch.x for batch in batches]), torch.cat([batch.labels for batch in batches])


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("name", PROCESSES)
def test_images_do_not_depend_on_the_device_nor_on_batches(name, guidance, device):
    want, labels = drawn(CPU, name, cfg_scale=guidance)
    for batch_size in (4, 3):
        got, got_labels = drawn(device, name, cfg_scale=guidance, batch_size=batch_size)
        assert torch.equal(got_labels, labels)
        assert_close("images", got, want, 1e-3)
    got, _ = drawn(device, name, cfg_scale=guidance, indices=[6, 1])
    assert_close("some", got, want[[6, 1]], 1e-3)


@pytest.mark.parametrize("name", ["ddim", "dpm-solver++", "ddpm"])
def test_clipped_and_rescaled_guidance(name, device):
    settings = {
        "clip": True,
        "cfg_scale": 3.0,
        "cfg_rescale": 0.7,
        "labels": "random",
        "cfg_interval": (0.2, 0.9),
    }
    want, _ = drawn(CPU, name, **settings)
    got, _ = drawn(device, name, **settings)
    assert_close("images", got, want, 1e-3)


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_bf16_stays_close(name, device):
    want, _ = drawn(CPU, name)
    got, _ = drawn(device, name, precision="bf16")
    assert_close("images", got, want, 0.2)


def test_latents_become_the_same_pixels(device, tmp_path):
    write_vae(tmp_path / "vae")
    here, there = load_autoencoder(tmp_path / "vae"), load_autoencoder(tmp_path / "vae", device=device)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    want, got = here.encode(images), there.encode(images)
    assert_close("latents", got, want, 1e-3)
    latents = want.chunk(2, dim=1)[0]
    assert_close("pixels", there.decode(latents), here.decode(latents), 1e-3)


def test_figures_are_those_of_the_cpu(device):
    x, labels = torch.randint(0, 256, (80, 1, 32, 32), dtype=torch.uint8), torch.arange(80) % 10
    found = []
    for where in (CPU, device):
        torch.manual_seed(4)
        network = ModuleNetwork(Classifier(widths=(4, 4, 4), feature_dim=6).to(where), "classifier")
        reference = Reference.build(x[:40].split(20), network, name="noise")
        protocol = Protocol.of(
            network,
            reference,
            sampling={"sampler": "ddim", "seed": 0},
            num_images=40,
            labels="i mod num_classes",
            weights_dtype="float32",
            metrics=MetricsConfig(score_splits=2),
        )
        evaluator = Evaluator(network, reference, protocol)
        for _ in evaluate([(x[40:60], labels[40:60]), (x[60:], labels[60:])], evaluator):
            pass
        found.append(evaluator.result().model_dump(exclude={"protocol", "notes"}))
    assert found[1] == pytest.approx(found[0], rel=1e-2, abs=1e-4)


def test_arithmetic_of_figures_runs_where_the_features_are(device):
    real, generated = torch.randn(2, 60, 5)
    generated = 1.2 * generated + 0.1
    found = []
    for where in (CPU, device):
        a, b = real.to(where), generated.to(where)
        frechet = FrechetInfluences.of(b, FeatureStatistics.of(a), strata=None).estimate()
        found.append(
            [
                frechet.value,
                frechet.low,
                precision_recall(a, b).precision,
                density_coverage(a, b).density,
                inception_score(b, splits=2),
            ]
        )
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_locality_is_that_of_the_cpu(device):
    found = []
    for where in (CPU, device):
        torch.manual_seed(2)
        model = HOST.tiny().eval().to(where)
        found.append(
            noised_locality(model, noise_images(32, size=16), denoiser=denoiser(), samples=12, batch_size=5)
        )
    want, got = (torch.tensor([site.raster for site in f.sites]) for f in found)
    assert_close("raster", got, want, 1e-4)
    want, got = (torch.tensor([site.chebyshev for site in f.sites]) for f in found)
    assert_close("chebyshev", got, want, 1e-4)

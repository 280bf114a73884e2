"""ADM's suite from files to figures, with a tiny random network of the same interface as Inception."""

import json
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from commandline import call
from grafting.data.bundled import bundled_subset
from grafting.errors import CheckpointError, DataError, ProtocolError, RecipeError
from grafting.evaluation import (
    INCEPTION_NAME,
    AdmConfig,
    AdmEvaluator,
    AdmReference,
    AdmSuite,
    Evaluator,
    MetricsConfig,
    Protocol,
    Reference,
    evaluate,
    inception_network,
    open_adm_reference,
    ratio,
)
from grafting.machine.reading import NpzFile
from grafting.metrics.adm import adm_precision_recall
from grafting.metrics.features import ModuleNetwork, extract
from grafting.metrics.frechet import FeatureStatistics, frechet_distance
from grafting.metrics.inception import Inception
from grafting.metrics.inception_score import adm_inception_score
from grafting.runs.identity import row_fingerprint
from grafting.runs.job import prepare
from grafting.runs.recipe import Recipe
from grafting.runs.run import run


class Spatial(nn.Module):
    """A tiny random network of colour images: 8 pooled features, 5 classes, 12 spatial features."""

    def __init__(self, *, width: int = 8):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.head = nn.Linear(width, 5, bias=False)

    def forward(self, images):
        x = self.conv(images.float() / 127.5 - 1).relu()
        pooled = x.mean((2, 3))
        spatial = nn.functional.adaptive_avg_pool2d(x[:, :3], 2).permute(0, 2, 3, 1).flatten(1)
        return pooled, self.head(pooled), spatial


@pytest.fixture
def network():
    return ModuleNetwork(Spatial(), "spatial")


def images(n, *, low=0, high=256):
    return torch.randint(low, high, (n, 3, 8, 8), dtype=torch.uint8)


def hwc(x):
    return x.permute(0, 2, 3, 1).numpy()


def statistics_of(network, x):
    """What ADM's files hold: mean and covariance of pooled and of spatial features, as numpy makes them."""
    pooled, _, spatial = (part.numpy() for part in extract(network, x))
    return {
        "mu": pooled.mean(0),
        "sigma": np.cov(pooled, rowvar=False),
        "mu_s": spatial.mean(0),
        "sigma_s": np.cov(spatial, rowvar=False),
    }


@pytest.fixture
def npz(tmp_path):
    def write(name="ref.npz", *, compressed=False, **arrays):
        path = tmp_path / name
        (np.savez_compressed if compressed else np.savez)(path, **arrays)
        return path

    return write


def protocol_of(network, reference, n, *, metrics=None):
    return Protocol.of(
        network,
        reference,
        sampling={"steps": 50},
        num_images=n,
        labels="i mod num_classes",
        weights_dtype="float32",
        metrics=metrics or AdmConfig(),
    )


def measured(network, reference, x, *, batch_size=16, metrics=None):
    evaluator = AdmEvaluator(network, reference, protocol_of(network, reference, len(x), metrics=metrics))
    for _ in evaluate(((part, None) for part in x.split(batch_size)), evaluator):
        pass
    return evaluator.result()


def test_figures_are_those_of_the_functions(network, npz):
    real, x = images(90), images(60, high=200)
    reference = AdmReference.of_npz(npz(arr_0=hwc(real)), network, batch_size=32)
    result = measured(network, reference, x, metrics=AdmConfig(score_split_size=25))
    (a, logits, a_s), (b, _, b_s) = extract(network, x), extract(network, real)
    assert result.frechet == pytest.approx(
        frechet_distance(FeatureStatistics.of(a), FeatureStatistics.of(b)), rel=1e-6
    )
    assert result.spatial_frechet == pytest.approx(
        frechet_distance(FeatureStatistics.of(a_s), FeatureStatistics.of(b_s)), rel=1e-6
    )
    assert result.frechet_low < result.frechet < result.frechet_high
    assert result.inception_score == pytest.approx(adm_inception_score(logits, split_size=25), rel=1e-6)
    assert (result.precision, result.recall) == adm_precision_recall(b, a)[:2]
    assert result.num_images == 60


def test_neither_batches_nor_interruptions_matter(network, npz):
    reference = AdmReference.of_npz(npz(arr_0=hwc(images(50))), network)
    x = images(40)
    whole, parts = (measured(network, reference, x, batch_size=size).model_dump() for size in (40, 7))
    for figures in (whole, parts):
        del figures["protocol"], figures["notes"], figures["agreement"], figures["frechet_bias"]
    assert parts == pytest.approx(whole, rel=1e-4)

    protocol = protocol_of(network, reference, 40)
    first = AdmEvaluator(network, reference, protocol)
    first.update(x[:15])
    second = AdmEvaluator(network, reference, protocol, state=first.state())
    assert second.num_images == 15
    for evaluator in (first, second):
        evaluator.update(x[15:])
    assert first.result() == second.result()


def test_statistics_in_the_file_are_used(network, npz):
    many, some, x = images(300, low=20), images(30), images(40)
    arrays = statistics_of(network, many)
    path = npz(arr_0=hwc(some), **arrays)
    reference = AdmReference.of_npz(path, network)
    assert reference.statistics == "given"
    everything = AdmReference.of_npz(npz("all.npz", arr_0=hwc(many)), network)
    assert everything.statistics == "computed"
    assert everything.spread is None
    a, b = measured(network, reference, x), measured(network, everything, x)
    assert a.frechet == pytest.approx(b.frechet, rel=1e-4)
    assert a.spatial_frechet == pytest.approx(b.spatial_frechet, rel=1e-4)
    assert (a.precision, a.recall) != (b.precision, b.recall)

    # the file's images are unlike its statistics by what is told
    pooled, spatial = (FeatureStatistics.of(part) for part in extract(network, some)[::2])
    assert reference.spread == pytest.approx(
        (
            frechet_distance(pooled, everything.pooled),
            frechet_distance(spatial, everything.spatial),
        ),
        rel=1e-4,
    )
    assert any("to its own 30 images" in note for note in a.notes)


def test_a_wrong_order_of_spatial_features_shows_in_the_spread(network, npz):
    # what would come of channels first, or of another layer
    x = images(200)
    arrays = statistics_of(network, x)
    right = AdmReference.of_npz(npz(arr_0=hwc(x), **arrays), network).spread
    order = torch.arange(12).view(2, 2, 3).permute(2, 0, 1).flatten().numpy()
    arrays |= {"mu_s": arrays["mu_s"][order], "sigma_s": arrays["sigma_s"][order][:, order]}
    wrong = AdmReference.of_npz(npz(arr_0=hwc(x), **arrays), network).spread
    assert max(right) < 1e-5
    assert wrong[0] == right[0]
    assert wrong[1] > 100 * right[1]


def test_statistics_alone_tell_no_precision(network, npz):
    reference = AdmReference.of_npz(npz(**statistics_of(network, images(80))), network)
    assert reference.features is None
    result = measured(network, reference, images(40))
    assert result.precision is None
    assert result.recall is None
    assert "the reference has no images: precision and recall cannot be measured" in result.notes


@pytest.mark.parametrize("compressed", [False, True])
def test_images_are_read_in_their_order(network, npz, compressed):
    x = images(23)
    reference = AdmReference.of_npz(npz(arr_0=hwc(x), compressed=compressed), network, batch_size=5)
    torch.testing.assert_close(reference.features, extract(network, x).pooled, rtol=1e-5, atol=1e-6)


def test_images_are_never_all_in_memory(npz):
    path = npz(arr_0=hwc(images(20_000)))  # 3.8 MB
    file = NpzFile(path)
    tracemalloc.start()
    num_images = sum(len(batch) for batch in file.rows("arr_0", 100))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_images == 20_000
    assert peak < 0.4e6


def test_steps_of_the_reference_are_told(network, npz):
    steps = []
    AdmReference.of_npz(npz(arr_0=hwc(images(23))), network, batch_size=10, on_step=steps.append)
    assert [(step.done, step.total) for step in steps] == [(10, 23), (20, 23), (23, 23)]


@pytest.mark.parametrize("alone", [False, True])
def test_a_reference_survives_its_file(network, npz, tmp_path, alone):
    arrays = statistics_of(network, images(60))
    path = npz(**arrays) if alone else npz(arr_0=hwc(images(30)), **arrays)
    reference = AdmReference.of_npz(path, network)
    reference.save(tmp_path / "kept.safetensors")
    again = open_adm_reference(tmp_path / "kept.safetensors", network)
    assert again.facts() == reference.facts()
    x = images(40)
    assert measured(network, again, x) == measured(network, reference, x)

    other = ModuleNetwork(Spatial(), "other")
    with pytest.raises(ProtocolError, match=r"holds features of network 'spatial' .* not of 'other'"):
        open_adm_reference(tmp_path / "kept.safetensors", other)
    whole = (tmp_path / "kept.safetensors").read_bytes()
    (tmp_path / "kept.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="does not have the hash written in it"):
        open_adm_reference(tmp_path / "kept.safetensors", network)


def test_unlike_protocols_are_refused(network, npz, tmp_path):
    x = images(40)
    reference = AdmReference.of_npz(npz(arr_0=hwc(images(30))), network)
    adm = measured(network, reference, x)
    assert ratio(adm, adm, "spatial_frechet") == 1
    exact = measured(network, reference, x, metrics=AdmConfig(distances="float32"))
    with pytest.raises(ProtocolError, match=r"metrics\.distances: float16 and float32"):
        ratio(adm, exact)
    own_reference = Reference.build([images(50)], network, name="own")
    evaluator = Evaluator(
        network, own_reference, protocol_of(network, own_reference, 40, metrics=MetricsConfig())
    )
    evaluator.update(x, torch.arange(40) % 5)
    with pytest.raises(ProtocolError, match=r"metrics\.suite: adm and nothing"):
        ratio(adm, evaluator.result())
    with pytest.raises(ProtocolError, match="metrics are of type AdmConfig; an Evaluator takes"):
        Evaluator(network, own_reference, protocol_of(network, own_reference, 40))
    with pytest.raises(ProtocolError, match="its metrics must be an AdmConfig"):
        AdmEvaluator(network, reference, protocol_of(network, reference, 40, metrics=MetricsConfig()))


def test_a_protocol_survives_json(network, npz):
    reference = AdmReference.of_npz(npz(arr_0=hwc(images(30))), network)
    for metrics in (AdmConfig(), AdmConfig(neighbours=5), MetricsConfig(), MetricsConfig(score_splits=3)):
        protocol = protocol_of(network, reference, 40, metrics=metrics)
        again = Protocol.model_validate_json(protocol.model_dump_json())
        assert again == protocol
        assert type(again.metrics) is type(metrics)


def test_notes_say_what_figures_are_worth(network, npz):
    reference = AdmReference.of_npz(npz(arr_0=hwc(images(30))), network)
    few, several, many = (measured(network, reference, images(n)) for n in (6, 20, 50))
    assert few.notes[0].startswith("the feature network is not the published inception-2015-12-05")
    assert "covariance lacks rank" in few.notes[1]
    assert few.frechet_bias is several.frechet_bias is None
    assert "the error can be estimated from 32 images on" in several.notes[1]
    assert many.frechet_bias is not None
    assert f"the Fréchet distance is about {many.frechet_bias:.3g} too high with 50 images" in many.notes
    assert "published figures use 50000 images; these use 50" in many.notes
    assert "the last part of the Inception score has 50 images, not 5000" in many.notes


BAD = [
    ({"x": np.zeros(3)}, "it holds x; a reference is images, arr_0, or statistics, mu, sigma, mu_s, sigma_s"),
    (
        {"mu": np.zeros(8), "arr_0": np.zeros((9, 8, 8, 3), np.uint8)},
        "its statistics lack sigma, mu_s, sigma_s",
    ),
    ({"mu": np.zeros(8), "sigma": np.eye(8)}, "it holds mu, sigma; a reference is"),
    (
        {"mu": np.zeros(8), "sigma": np.eye(7), "mu_s": np.zeros(12), "sigma_s": np.eye(12)},
        r"mu is [8] and sigma [7, 7]; expected [F] and [F, F]",
    ),
    ({"arr_0": np.zeros((1, 8, 8, 3), np.uint8)}, "statistics need at least 2 images"),
    ({"arr_0": np.zeros((9, 8, 8, 3))}, "must be images, uint8 [N, H, W, C]; found float64 [9, 8, 8, 3]"),
    ({"arr_0": np.asfortranarray(np.zeros((9, 8, 8, 3), np.uint8))}, "found an array stored by columns"),
    ({"arr_0": np.array([print] * 3)}, "arr_0 holds objects, which are not read"),
]


@pytest.mark.parametrize(("arrays", "message"), BAD)
def test_bad_references(network, npz, arrays, message):
    with pytest.raises(DataError) as error:
        AdmReference.of_npz(npz(**arrays), network)
    assert message in str(error.value)


def test_damaged_references(network, npz, tmp_path):
    with pytest.raises(DataError, match="is missing"):
        AdmReference.of_npz(tmp_path / "missing.npz", network)
    path = npz(arr_0=hwc(images(64)))
    whole = bytearray(path.read_bytes())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"not a complete \.npz file"):
        AdmReference.of_npz(path, network)
    whole[5000] ^= 1  # inside the pixels: the archive's checksum tells
    path.write_bytes(whole)
    with pytest.raises(DataError, match=r"not a complete \.npz file"):
        AdmReference.of_npz(path, network)
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(DataError, match=r"not a complete \.npz file"):
        AdmReference.of_npz(path, network)


def test_networks_that_do_not_fit(network, npz):
    narrow = ModuleNetwork(Spatial(width=6), "narrow")
    path = npz(**statistics_of(network, images(40)))
    reference = AdmReference.of_npz(path, narrow)
    evaluator = AdmEvaluator(narrow, reference, protocol_of(narrow, reference, 20))
    with pytest.raises(DataError, match="mu is of 8 features, feature network 'narrow' gives 6"):
        evaluator.update(images(20))
    with pytest.raises(DataError, match="mu is of 8 features"):
        AdmReference.of_npz(npz(arr_0=hwc(images(9)), **statistics_of(network, images(40))), narrow)

    class Flat(Spatial):
        def forward(self, x):
            return super().forward(x)[:2]

    with pytest.raises(DataError, match="'flat' gives no spatial features or no logits"):
        AdmReference.of_npz(npz(arr_0=hwc(images(9))), ModuleNetwork(Flat(), "flat"))


def test_as_many_images_as_the_protocol_says(network, npz):
    reference = AdmReference.of_npz(npz(arr_0=hwc(images(30))), network)
    evaluator = AdmEvaluator(network, reference, protocol_of(network, reference, 20))
    with pytest.raises(ProtocolError, match="no image has been evaluated"):
        evaluator.result()
    evaluator.update(images(15))
    with pytest.raises(ProtocolError, match="says 20 images; got only 15"):
        evaluator.result()
    with pytest.raises(ProtocolError, match="says 20 images; got 30"):
        evaluator.update(images(15))
    with pytest.raises(ProtocolError, match="says 3 images; its metrics need at least 4"):
        AdmEvaluator(network, reference, protocol_of(network, reference, 3))
    small = AdmReference.of_npz(npz("s.npz", arr_0=hwc(images(3))), network)
    with pytest.raises(ProtocolError, match="3 neighbours; the reference has 3 images"):
        AdmEvaluator(network, small, protocol_of(network, small, 20))


# the command line


@pytest.fixture
def tiny_inception(monkeypatch, tmp_path):
    """A weights file in whose place the tiny network is read."""
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"tiny")
    torch.manual_seed(5)
    module = Spatial()
    monkeypatch.setattr("grafting.evaluation.adm.load_inception", lambda path: module)
    return weights


def colour_subset(n, *, start=0):
    """Fashion-MNIST's images, 32 x 32, the grey in three channels."""
    return bundled_subset().images[start : start + n].expand(-1, 3, -1, -1)


def test_samples_are_measured_from_the_command_line(tiny_inception, npz, tmp_path):
    ours, real = npz("samples.npz", arr_0=hwc(colour_subset(60))), npz(arr_0=hwc(colour_subset(90, start=60)))
    kept = tmp_path / "kept.safetensors"
    made = call("reference", real, "--weights", tiny_inception, "--out", kept, "--batch-size", 50)
    assert made.exit_code == 0, made.output
    assert "90 images, statistics of these images" in made.output
    results = []
    for reference in (real, kept):
        options = ("--suite", "adm", "--reference", reference, "--weights", tiny_inception)
        result = call("evaluate", ours, *options, "--json")
        assert result.exit_code == 0, result.output
        results.append(json.loads(result.stdout))
    figures, again = results
    assert figures["protocol"] == again["protocol"]
    assert again["frechet"] == pytest.approx(figures["frechet"], rel=1e-9)
    assert (again["precision"], again["recall"]) == (figures["precision"], figures["recall"])
    assert figures["frechet_low"] < figures["frechet"] < figures["frechet_high"]
    assert figures["spatial_frechet"] > 0
    assert figures["protocol"]["metrics"]["suite"] == "adm"
    assert figures["protocol"]["reference"]["name"] == "ref"
    shown = call("evaluate", ours, *options).output
    assert "Spatial Fréchet distance" in shown
    assert "are not FID" in shown


def test_what_the_command_line_refuses(tiny_inception, npz, tmp_path):
    ours = npz("samples.npz", arr_0=hwc(colour_subset(8)))
    grey = npz("grey.npz", arr_0=hwc(colour_subset(8))[..., :1])
    known = ("--reference", ours, "--weights", tiny_inception)
    for arguments, message in (
        ((ours, "--suite", "adm"), "--suite adm needs --reference"),
        ((ours, "--suite", "adm", "--reference", ours), "--suite adm needs --weights"),
        ((grey, *known), "suite testbed takes no --reference and no --weights; --suite adm does"),
        (
            (grey, "--suite", "adm", *known),
            "8 images of 1 channels; ADM's suite measures 4 or more images of 3",
        ),
        ((ours, "--suite", "adm", "--reference", "no.npz", "--weights", tiny_inception), "no.npz is missing"),
    ):
        result = call("evaluate", *arguments)
        assert result.exit_code == 1, result.output
        assert message in result.stderr
    result = call("reference", ours, "--weights", tiny_inception, "--out", tmp_path / "x.npz")
    assert "--out names a .safetensors file" in result.stderr


def test_the_published_weights_are_known_by_their_hash(tiny_inception, monkeypatch):
    assert inception_network(tiny_inception).name == "inception-2015-12-05 with other weights"
    monkeypatch.setattr("grafting.evaluation.adm.sha256_of", lambda path: "6726825d" + "0" * 56)
    assert inception_network(tiny_inception).name == INCEPTION_NAME


def test_a_recipes_suite_is_checked_and_hashed(tiny_inception, npz):
    good = AdmSuite(reference=str(npz(arr_0=hwc(images(9)))), weights=str(tiny_inception))
    assert {name: len(digest) for name, digest in good.identity().items()} == {"reference": 64, "weights": 64}
    bad = AdmSuite(reference=str(npz("x.npz", x=np.zeros(3))), weights=str(tiny_inception))
    with pytest.raises(DataError, match="cannot be a reference"):
        bad.identity()


@pytest.mark.slow
def test_the_suite_on_the_real_network(npz, tmp_path):
    torch.manual_seed(0)
    weights = tmp_path / "random.pth"
    inception = Inception()
    for parameter in inception.parameters():
        if parameter.ndim == 4:  # torch's own start lets features die away on their path through 48 layers
            nn.init.kaiming_normal_(parameter)
    torch.save(inception.state_dict(), weights)
    ours, real = npz("samples.npz", arr_0=hwc(colour_subset(16))), npz(arr_0=hwc(colour_subset(24, start=16)))
    result = call("evaluate", ours, "--suite", "adm", "--reference", real, "--weights", weights, "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["protocol"]["feature_network"]["name"] == "inception-2015-12-05 with other weights"
    apart = figures["frechet"], figures["spatial_frechet"]
    assert min(apart) > 0.1
    same = call("evaluate", real, "--suite", "adm", "--reference", real, "--weights", weights, "--json")
    figures = json.loads(same.stdout)
    assert figures["frechet"] < 1e-6 * apart[0]
    assert figures["spatial_frechet"] < 1e-6 * apart[1]
    assert figures["precision"] == figures["recall"] == 1


# recipes


@pytest.fixture
def photographs(tmp_path):
    """Twelve colour images of two classes as a folder of PNGs."""
    for i, image in enumerate(hwc(colour_subset(12)).copy()):
        path = tmp_path / "images" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "images"


def recipe_of(folder, suite, **changes):
    config = {
        "input_size": 32, "patch_size": 8, "in_channels": 3, "hidden_size": 16, "depth": 1, "num_heads": 2,
        "num_classes": 2,
    }  # fmt: skip
    return Recipe.model_validate(
        {
            "name": "colour",
            "source": {"host": "dit", "config": config},
            "data": {"name": "image-folder", "folder": str(folder), "size": 32},
            "sample": {"sampler": "ddim", "steps": 2, "cfg_scale": 1.0, "num_images": 8, "clip": True},
            "evaluate": suite.model_dump(),
            "rows": ["pretrained"],
        }
        | changes
    )


def test_a_recipe_is_measured_by_the_suite(tiny_inception, npz, photographs, tmp_path):
    suite = AdmSuite(
        reference=str(npz(arr_0=hwc(colour_subset(9)))), weights=str(tiny_inception), batch_size=3
    )
    seen = []
    folder = run(recipe_of(photographs, suite), tmp_path / "run", on_step=lambda stage, _: seen.append(stage))
    (row,) = json.loads((folder / "metrics.json").read_text())
    assert row["spatial_frechet"] > 0
    assert row["agreement"] is None
    assert row["protocol"]["metrics"] == AdmConfig().model_dump()
    assert row["protocol"]["sampling"]["steps"] == 2
    assert seen.count("reference") == 3
    assert "Spatial Fr" in (folder / "report.html").read_text()

    # done is done; another reference measures anew, and samples nothing
    seen.clear()
    run(recipe_of(photographs, suite), folder, on_step=lambda stage, _: seen.append(stage))
    assert seen == []
    other = suite.model_copy(update={"reference": str(npz("b.npz", arr_0=hwc(colour_subset(9, start=9))))})
    run(recipe_of(photographs, other), folder, on_step=lambda stage, _: seen.append(stage))
    assert set(seen) == {"reference", "evaluate pretrained"}
    prints = {row_fingerprint(prepare(recipe_of(photographs, s)), "pretrained") for s in (suite, other)}
    assert len(prints) == 2


def test_a_recipe_that_the_suite_cannot_measure_is_refused_first(tiny_inception, npz, photographs, tmp_path):
    suite = AdmSuite(reference=str(npz(arr_0=hwc(colour_subset(9)))), weights=str(tiny_inception))
    few = {"sampler": "ddim", "steps": 2, "cfg_scale": 1.0, "num_images": 3, "clip": True}
    with pytest.raises(
        RecipeError, match="3 images of 3 channels; ADM's suite measures 4 or more images of 3"
    ):
        run(recipe_of(photographs, suite, sample=few), tmp_path / "run")
    with pytest.raises(RecipeError, match="the recipe has no `sample`"):
        run(recipe_of(photographs, suite, sample=None), tmp_path / "run")
    missing = suite.model_copy(update={"reference": "no.npz"})
    with pytest.raises(DataError, match=r"no\.npz is missing"):
        run(recipe_of(photographs, missing), tmp_path / "run")
    assert not (tmp_path / "run").exists()

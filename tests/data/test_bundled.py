"""The files that come with the package are whole, are what their cards say, and are refused when they are not."""

import json
from pathlib import Path

import pytest
import torch

from grafting.data import BundledSubsetConfig, bundled, load_data
from grafting.data.images import FASHION_MNIST_FOLDER, read_fashion_mnist
from grafting.data.subset import read_subset, stratified_subset
from grafting.errors import DataError
from grafting.evaluation import Reference
from grafting.metrics.features import ModuleNetwork, extract
from grafting.metrics.frechet import FeatureStatistics, frechet_distance

needs_fashion_mnist = pytest.mark.skipif(
    not FASHION_MNIST_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed"
)

ASSETS = Path(bundled.__file__).parents[1] / "assets" / "testbed"


@pytest.fixture
def network() -> ModuleNetwork:
    return ModuleNetwork(bundled.bundled_classifier(), name=bundled.CLASSIFIER_NAME)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An installation to damage, with a subset file only."""
    for name in ("subset.json", "checksums.json"):
        (tmp_path / name).write_bytes((ASSETS / name).read_bytes())
    monkeypatch.setattr(bundled, "_home", lambda bundle: tmp_path)
    return tmp_path


def test_subset_is_a_stratified_tenth():
    images = load_data(BundledSubsetConfig())
    assert images.images.shape == (6000, 1, 28, 28)
    assert images.labels.bincount().tolist() == [600] * 10
    assert images.batch(torch.tensor([0]))[0].shape == (1, 1, 32, 32)


def test_subset_is_what_its_card_says():
    card = (ASSETS / "subset.md").read_text()
    assert bundled.bundled_subset().sha256() in card
    assert read_subset(bundled.bundled_subset_file()).sha256 in card


def test_subset_is_described_by_its_content():
    described = BundledSubsetConfig().describe()
    assert described == {
        "name": "testbed-subset",
        "sha256": bundled.bundled_subset().sha256(),
        "count": 6000,
    }


@needs_fashion_mnist
def test_subset_comes_from_the_training_set_by_its_ids():
    train, subset = read_fashion_mnist(), read_subset(bundled.bundled_subset_file())
    ids = torch.tensor(subset.ids)
    assert torch.equal(ids, stratified_subset(train.labels, per_class=600, seed=0))
    assert train.take(ids).sha256() == bundled.bundled_subset().sha256()


@needs_fashion_mnist
def test_classifier_is_right_on_91_percent_of_test_images():
    test, model = read_fashion_mnist(train=False), bundled.bundled_classifier()
    with torch.no_grad():
        correct = [
            model(test.pixels(i)).logits.argmax(1) == test.labels[i] for i in torch.arange(10_000).split(500)
        ]
    assert torch.cat(correct).double().mean() >= 0.91


def test_reference_belongs_to_the_classifier(network):
    reference = Reference.load(bundled.bundled_reference_path(), network)
    assert reference.name == bundled.REFERENCE_NAME
    assert reference.statistics.count == 60_000
    assert reference.features.shape == (5000, 64)


def test_training_images_are_near_the_reference_and_noise_is_far(network):
    reference = Reference.load(bundled.bundled_reference_path(), network)
    near = bundled.bundled_subset().pixels(torch.arange(2000))
    far = torch.randint(0, 256, near.shape).byte()
    distances = [
        frechet_distance(FeatureStatistics.of(extract(network, images).pooled), reference.statistics)
        for images in (near, far)
    ]
    assert distances[0] < 0.05
    assert distances[1] > 5


def test_kept_rows_have_the_statistics_of_all(network):
    reference = Reference.load(bundled.bundled_reference_path(), network)
    rows = FeatureStatistics.of(reference.features)
    assert frechet_distance(rows, reference.statistics) < 0.01


def test_everything_is_small():
    ours = [p for p in ASSETS.iterdir() if p.is_file()]
    assert sum(p.stat().st_size for p in ours) < 6e6
    assert {p.with_suffix(".md").name for p in ours if p.suffix in {".safetensors", ".npz"}} <= {
        p.name for p in ours
    }


def test_a_missing_file_is_named(folder):
    with pytest.raises(
        DataError, match=r"bundled file .*classifier\.safetensors is missing: reinstall grafting"
    ):
        bundled.bundled_classifier()


def test_a_missing_list_is_named(folder):
    (folder / "checksums.json").unlink()
    with pytest.raises(DataError, match=r"checksums\.json is missing"):
        bundled.bundled_subset_file()


def test_a_damaged_file_is_refused(folder):
    path = bundled.bundled_subset_file()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"subset\.json is damaged: its sha256 is \w{12}, not \w{12}"):
        bundled.bundled_subset_file()


def test_the_models_folder_is_checked(folder):
    sums = json.loads((folder / "checksums.json").read_text())
    others = {name: digest for name, digest in sums.items() if not name.startswith("dit/")}
    (folder / "checksums.json").write_text(json.dumps(others))
    (folder / "dit").mkdir()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (folder / "dit" / name).write_text("{}")
    with pytest.raises(
        DataError, match=r"config\.json is not in .*checksums\.json; the script that made it writes it there"
    ):
        bundled.testbed_model_folder()


def test_the_models_folder_is_found(folder):
    sums = {}
    (folder / "dit").mkdir()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (folder / "dit" / name).write_text("{}")
        # sha256 of {}
        sums[f"dit/{name}"] = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    (folder / "checksums.json").write_text(json.dumps(sums))
    assert bundled.testbed_model_folder() == folder / "dit"

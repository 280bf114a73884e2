"""The feature network: what it takes and gives, and that a file holds all of it."""

import pytest
import torch

from closeness import assert_close
from grafting.errors import CheckpointError
from grafting.models.classifier import Classifier, load_classifier, save_classifier


def _images(num: int = 5, side: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (num, 1, side, side)).byte()


@pytest.fixture
def model() -> Classifier:
    """Small, with statistics and gains that are not those of a fresh network."""
    model = Classifier(widths=(4, 8, 8), feature_dim=6, num_classes=3)
    for _ in range(3):
        model(_images(16))
    return model.eval()


def test_features_and_logits(model):
    pooled, logits = model(_images())
    assert pooled.shape == (5, 6)
    assert logits.shape == (5, 3)
    assert (pooled >= 0).all()
    assert_close("logits", model.head(pooled), logits, 0)


def test_each_image_is_seen_alone(model):
    images = _images()
    assert_close("pooled", model(images[2:3]).pooled, model(images).pooled[2:3], 1e-5)


def test_other_sizes_of_images(model):
    assert model(_images(side=48)).pooled.shape == (5, 6)


def test_all_parameters_get_gradients(model):
    model.train()
    model(_images()).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_file_holds_the_values_rounded_to_float16(model, tmp_path):
    path = tmp_path / "classifier.safetensors"
    save_classifier(path, model)
    loaded = load_classifier(path)
    assert not loaded.training
    for name, value in model.state_dict().items():
        rounded = value.half().float() if value.is_floating_point() else value
        assert torch.equal(loaded.state_dict()[name], rounded), name
    images = _images()
    assert_close("logits", loaded(images).logits, model(images).logits, 1e-2)
    save_classifier(tmp_path / "again.safetensors", loaded)
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_bad_files_are_refused(model, tmp_path):
    path = tmp_path / "classifier.safetensors"
    with pytest.raises(CheckpointError, match="safetensors is missing"):
        load_classifier(path)
    save_classifier(path, model)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="is not a complete"):
        load_classifier(path)
    path.write_bytes(whole.replace(b'num_classes\\": 3', b'num_classes\\": 4'))
    with pytest.raises(CheckpointError, match=r"is not a complete classifier file: [\s\S]*head\.weight"):
        load_classifier(path)

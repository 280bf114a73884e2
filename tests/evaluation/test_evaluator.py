import json

import pytest
import torch
from torch import nn

from grafting.errors import CheckpointError, DataError, ProtocolError, SettingsError
from grafting.evaluation import (
    Evaluation,
    Evaluator,
    Identity,
    MetricsConfig,
    Protocol,
    Reference,
    evaluate,
    ratio,
)
from grafting.metrics.features import ModuleNetwork, extract
from grafting.metrics.frechet import FeatureStatistics, frechet_distance
from grafting.models.classifier import Classifier


class Convs(nn.Module):
    """A tiny random classifier of 8x8 grey images: 8 features, 3 classes."""

    def __init__(self, *, classes: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.head = nn.Linear(8, classes) if classes else None

    def forward(self, images):
        pooled = self.conv(images.float() / 127.5 - 1).relu().mean((2, 3))
        return pooled, self.head(pooled) if self.head else None


@pytest.fixture
def network():
    return ModuleNetwork(Convs(), "convs")


@pytest.fixture
def reference(network):
    return Reference.build(images(400).split(100), network, name="noise", num_features=100)


def images(n, *, low=0, high=256):
    return torch.randint(low, high, (n, 1, 8, 8), dtype=torch.uint8)


def protocol_of(network, reference, num_images=60, **sampling):
    return Protocol.of(
        network,
        reference,
        sampling={"sampler": "ddim", "steps": 50, "cfg_interval": [0.0, 1.0], "seed": 0} | sampling,
        num_images=num_images,
        labels="i mod num_classes",
        weights_dtype="float32",
    )


def measured(network, reference, x, *, batch_size=20, **sampling):
    evaluator = Evaluator(network, reference, protocol_of(network, reference, len(x), **sampling))
    labels = torch.arange(len(x)) % 3
    for _ in evaluate(zip(x.split(batch_size), labels.split(batch_size), strict=True), evaluator):
        pass
    return evaluator.result()


def test_measures_batches_as_they_come(network, reference):
    x, labels = images(60, high=180), torch.arange(60) % 3
    evaluator = Evaluator(network, reference, protocol_of(network, reference))
    steps = list(evaluate(zip(x.split(25), labels.split(25), strict=True), evaluator))
    assert [(step.done, step.total) for step in steps] == [(25, 60), (50, 60), (60, 60)]

    result = evaluator.result()
    pooled, logits, _ = extract(network, x)
    assert result.frechet == pytest.approx(
        frechet_distance(FeatureStatistics.of(pooled), reference.statistics), rel=1e-9
    )
    assert result.frechet_low < result.frechet < result.frechet_high
    assert result.agreement == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert result.kid > 0
    assert result.kid_error > 0
    assert 1 <= result.inception_score <= 3
    assert result.num_images == 60
    assert any("too high with" in note for note in result.notes)


def test_batching_does_not_matter(network, reference):
    x = images(60)
    a, b = (measured(network, reference, x, batch_size=size).model_dump() for size in (60, 7))
    assert a.pop("protocol") == b.pop("protocol")
    assert a.pop("notes") == b.pop("notes")
    assert a == pytest.approx(b, rel=1e-4)


def test_the_reference_images_themselves_are_perfect(network):
    x = images(300)
    reference = Reference.build([x], network, name="itself", num_features=300)
    result = measured(network, reference, x)
    assert result.frechet <= 1e-6
    assert result.precision == result.recall == result.coverage == 1


def test_interrupted_equals_uninterrupted(network, reference):
    x, labels = images(60), torch.arange(60) % 3
    protocol = protocol_of(network, reference)
    first = Evaluator(network, reference, protocol)
    for step in evaluate([(x[:20], labels[:20]), (x[20:40], labels[20:40])], first):
        state = step.state()
    second = Evaluator(network, reference, protocol, state=state)
    assert second.num_images == 40
    (last,) = evaluate([(x[40:], labels[40:])], second)
    assert last.done == 60
    first.update(x[40:], labels[40:])
    assert second.result() == first.result()


def test_a_network_without_classes_has_no_score(reference):
    network = ModuleNetwork(Convs(classes=0), "convs")
    reference = Reference.build([images(50)], network, name="noise")
    result = measured(network, reference, images(20))
    assert result.inception_score is None
    assert result.agreement is None


def test_says_when_images_are_too_few_for_the_features(network, reference):
    x = images(8)
    protocol = protocol_of(network, reference, 8).model_copy(
        update={"metrics": MetricsConfig(score_splits=2)}
    )
    evaluator = Evaluator(network, reference, protocol)
    evaluator.update(x, torch.zeros(8, dtype=torch.long))
    result = evaluator.result()
    assert result.frechet_bias is None
    assert "covariance lacks rank" in result.notes[0]


def test_pairwise_metrics_see_a_random_part(network, reference):
    x, labels = images(60), torch.arange(60) % 3
    protocol = protocol_of(network, reference).model_copy(
        update={"metrics": MetricsConfig(pairwise_images=30)}
    )
    evaluator = Evaluator(network, reference, protocol)
    evaluator.update(x, labels)
    part, whole = evaluator.result(), measured(network, reference, x)
    assert part.frechet == pytest.approx(whole.frechet)
    assert part.kid != whole.kid
    assert "are computed on 30 images drawn at random" in part.notes[-1]


def test_measures_with_the_bundled_kind_of_classifier():
    network = ModuleNetwork(Classifier(widths=(4, 4, 4), feature_dim=6), "classifier")
    noise = torch.randint(0, 256, (80, 1, 32, 32), dtype=torch.uint8)
    reference = Reference.build([noise[:40]], network, name="noise")
    result = measured(network, reference, noise[40:])
    assert 0 <= result.agreement <= 1


def test_an_evaluation_survives_json(network, reference):
    result = measured(network, reference, images(60))
    again = Evaluation.model_validate(json.loads(result.model_dump_json()))
    assert again == result
    assert ratio(again, result) == 1
    assert {"frechet", "frechet_low", "frechet_high", "agreement", "protocol"} <= result.model_dump().keys()


def test_ratio_of_like_protocols_whatever_ran_where(network, reference):
    a = measured(network, reference, images(60), device="cpu", batch_size=64)
    b = measured(network, reference, images(60, high=100), device="cuda", batch_size=8)
    assert ratio(b, a) == pytest.approx(b.frechet / a.frechet)
    assert ratio(b, a, "density") == pytest.approx(b.density / a.density)
    with pytest.raises(ProtocolError, match="figure 'fid' is not in both"):
        ratio(a, b, "fid")


def test_unlike_protocols_are_refused_field_by_field(network, reference):
    a = measured(network, reference, images(60))
    other = Reference.build([images(50)], network, name="fewer")
    b = measured(network, other, images(40), steps=250, seed=1, cfg_scale=4.0)
    with pytest.raises(ProtocolError) as refusal:
        ratio(a, b)
    lines = str(refusal.value).splitlines()[1:]
    assert {line.strip().split(":")[0] for line in lines} == {
        "sampling.steps",
        "sampling.seed",
        "sampling.cfg_scale",
        "num_images",
        "reference.name",
        "reference.sha256",
    }
    assert "  sampling.steps: 50 and 250" in lines
    assert "  sampling.cfg_scale: nothing and 4.0" in lines
    assert "  num_images: 60 and 40" in lines


def test_versions_are_recorded_but_not_compared(network, reference):
    a = protocol_of(network, reference)
    assert a.recorded["torch"] == torch.__version__
    b = a.model_copy(update={"recorded": {"torch": "9.9"}})
    assert a.differences(b) == []


def test_the_reference_survives_its_file(network, reference, tmp_path):
    path = tmp_path / "deep" / "reference.safetensors"
    reference.save(path)
    again = Reference.load(path, network)
    assert again.sha256 == reference.sha256
    assert again.name == "noise"
    assert again.statistics.count == 400
    assert torch.equal(again.statistics.covariance, reference.statistics.covariance)
    assert torch.equal(again.features, reference.features)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_reference_does_not_depend_on_batches(network):
    x = images(200)
    a, b = (Reference.build(x.split(size), network, name="n", num_features=50) for size in (200, 17))
    torch.testing.assert_close(a.features, b.features, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.statistics.scatter, b.statistics.scatter)
    everything = extract(network, x).pooled
    nearest = torch.cdist(a.features, everything).min(1)
    assert nearest.values.max() < 1e-3
    assert len(nearest.indices.unique()) == 50


def test_kept_features_in_half_precision(network):
    reference = Reference.build([images(60)], network, name="half", dtype=torch.float16)
    assert reference.features.dtype == torch.float16
    assert measured(network, reference, images(20)).density > 0

    class Loud(Convs):
        def forward(self, x):
            return super().forward(x)[0] * 1e9, None

    with pytest.raises(DataError, match=r"too large for torch\.float16"):
        Reference.build([images(60)], ModuleNetwork(Loud(), "loud"), name="half", dtype=torch.float16)


def test_another_network_is_refused(reference, network, tmp_path):
    reference.save(tmp_path / "r")
    other = ModuleNetwork(Convs(), "others")
    with pytest.raises(ProtocolError, match=r"network 'convs' \(sha256 .*not of 'others'"):
        Reference.load(tmp_path / "r", other)
    with pytest.raises(ProtocolError, match="not of 'others'"):
        Evaluator(other, reference, protocol_of(network, reference))


def test_damaged_files_are_refused(reference, tmp_path):
    path, missing = tmp_path / "r", tmp_path / "missing"
    with pytest.raises(CheckpointError, match="missing is missing"):
        Reference.load(missing)
    reference.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        Reference.load(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="does not have the hash written in it"):
        Reference.load(path)


def test_another_safetensors_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a reference of this library"):
        Reference.load(tmp_path / "model.safetensors")


def test_a_failed_write_leaves_the_old_file(reference, tmp_path, monkeypatch):
    path = tmp_path / "r"
    reference.save(path)
    before = path.read_bytes()
    monkeypatch.setattr(
        "os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(Exception, match="No space left on device"):
        reference.save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_no_image_is_an_error(network, reference):
    evaluator = Evaluator(network, reference, protocol_of(network, reference))
    with pytest.raises(ProtocolError, match="no images to evaluate"):
        list(evaluate([], evaluator))
    with pytest.raises(ProtocolError, match="no image has been evaluated"):
        evaluator.result()
    with pytest.raises(SettingsError, match="greater than 0"):
        protocol_of(network, reference, 0)
    with pytest.raises(DataError, match="at least 2 images"):
        Reference.build([], network, name="empty")


def test_as_many_images_as_the_protocol_says(network, reference):
    evaluator = Evaluator(network, reference, protocol_of(network, reference, 30))
    evaluator.update(images(20), torch.zeros(20, dtype=torch.long))
    with pytest.raises(ProtocolError, match="says 30 images; got only 20"):
        evaluator.result()
    with pytest.raises(ProtocolError, match="says 30 images; got 40"):
        evaluator.update(images(20), torch.zeros(20, dtype=torch.long))


def test_a_protocol_that_cannot_be_carried_out(network, reference):
    few = protocol_of(network, reference, 5)
    with pytest.raises(ProtocolError, match="says 5 images; its metrics need at least 10"):
        Evaluator(network, reference, few)
    small = Reference.build([images(50)], network, name="small", num_features=5)
    with pytest.raises(ProtocolError, match="5 neighbours; the reference keeps 5 rows"):
        Evaluator(network, small, protocol_of(network, small))
    with pytest.raises(ProtocolError, match="names reference 'noise'"):
        Evaluator(network, small, protocol_of(network, reference))
    wrong = protocol_of(network, reference).model_copy(
        update={"feature_network": Identity(name="inception", sha256="0" * 64)}
    )
    with pytest.raises(ProtocolError, match="names feature network 'inception'"):
        Evaluator(network, reference, wrong)


def test_bad_batches(network, reference):
    evaluator = Evaluator(network, reference, protocol_of(network, reference))
    labels = torch.zeros(4, dtype=torch.long)
    with pytest.raises(DataError, match="8-bit images"):
        evaluator.update(images(4).float(), labels)
    with pytest.raises(DataError, match=r"4 images came with labels \[3\]"):
        evaluator.update(images(4), labels[:3])
    with pytest.raises(DataError, match=r"label 3 is not a class of the feature network: it knows 0\.\.2"):
        evaluator.update(images(4), labels + 3)
    assert evaluator.num_images == 0


def test_features_that_are_not_finite_are_refused(network, reference):
    evaluator = Evaluator(network, reference, protocol_of(network, reference))
    nn.init.constant_(network.module.conv.bias, torch.nan)
    with pytest.raises(DataError, match="not finite for 4 of 4 images"):
        evaluator.update(images(4), torch.zeros(4, dtype=torch.long))

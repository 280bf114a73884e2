"""Rows compared image by image: what a run keeps of each image, what it says beside its figures, and when it refuses."""

import json
import shutil

import numpy as np
import pytest
import torch

from commandline import call
from grafting.errors import DataError, ProtocolError, RunError
from grafting.evaluation import PerImage
from grafting.evaluation.comparison import MeasuredRow, comparison, turned
from grafting.evaluation.influences import load_influences, save_influences
from grafting.metrics.frechet import FrechetInfluences, Gaussian
from grafting.runs import pairing
from grafting.runs.pairing import influences_path, read_row
from grafting.runs.recipe import Recipe
from grafting.runs.record import write_report
from grafting.runs.run import run
from report.synthetic_run import protocol
from tinyrecipe import TINY

ROWS = ["pretrained", "random", "inherited", "distilled", "finetuned"]
# as many as Frechet distances of 64 features are compared of
RECIPE = TINY | {
    "sample": TINY["sample"] | {"num_images": 260, "batch_size": 130},
    "rows": ["pretrained", "finetuned"],
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairing") / "run"
    run(Recipe.model_validate(RECIPE), folder)
    return folder


def metrics(folder):
    return {row["name"]: row for row in json.loads((folder / "metrics.json").read_text())}


def per_image(n=40, *, seed=0, shift=0.0):
    noise = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 4, generator=noise) + shift
    reference = Gaussian(torch.zeros(4).double(), torch.eye(4).double())
    strata = torch.arange(n) % 4
    return PerImage(
        labels=strata,
        scores={"agreement": (features[:, 0] > 0).double()},
        influences={"kid": features[:, 1].double()},
        frechet=FrechetInfluences.of(features, reference, strata=strata),
        points={"recall": torch.ones(7).double()},
        features=features,
    )


def figures(n=40, **changes):
    row = {"frechet": 0.5, "kid": 0.1, "num_images": n}
    return row | {"protocol": protocol(n) | changes.pop("protocol", {})} | changes


# what a run does


def test_a_run_compares_each_row_with_the_pretrained_one(ran):
    rows = metrics(ran)
    assert "paired" not in rows["pretrained"]
    paired = rows["finetuned"]["paired"]
    assert paired["to"] == "pretrained"
    ratio = paired["frechet"]["ratio"]
    assert ratio["value"] == pytest.approx(rows["finetuned"]["frechet"] / rows["pretrained"]["frechet"])
    assert ratio["low"] < ratio["value"] < ratio["high"]
    for key in ("agreement", "precision", "recall", "density", "coverage", "kid"):
        found = paired[key]["difference"]
        assert found["value"] == pytest.approx(rows["finetuned"][key] - rows["pretrained"][key], abs=1e-12)
        assert found["low"] <= found["value"] <= found["high"]
    alone = rows["finetuned"]["frechet_high"] / rows["finetuned"]["frechet_low"]
    assert ratio["high"] / ratio["low"] < alone


def test_images_of_one_seed_have_a_distance(ran):
    rows = metrics(ran)
    assert "image_distance" not in rows["pretrained"]
    row = rows["finetuned"]
    assert 0 < row["image_distance_low"] < row["image_distance"] < row["image_distance_high"] < 1
    assert row["feature_distance"] > 0


def test_the_report_and_the_command_line_say_so(ran):
    page = write_report(ran).read_text()
    assert "with its 95 % interval by images of the same seeds" in page
    assert "the kernel distance is degenerate" in page
    shown = call("compare", ran, f"{ran}:pretrained").stdout
    assert "first against second" in shown
    assert "\u00d7 (" in shown
    assert "Images of the same seed lie" in shown
    found = json.loads(call("compare", ran, f"{ran}:pretrained", "--json").stdout)
    for kind, estimate in metrics(ran)["finetuned"]["paired"]["frechet"].items():
        assert found["frechet"][kind] == pytest.approx(estimate, rel=1e-12)
    backwards = json.loads(call("compare", f"{ran}:pretrained", ran, "--json").stdout)
    assert backwards["frechet"]["ratio"]["value"] == pytest.approx(1 / found["frechet"]["ratio"]["value"])


@pytest.mark.parametrize("rows", [("finetuned", "pretrained"), ("finetuned", "pretrained", "pretrained")])
def test_a_page_and_the_terminal_share_the_work(rows, ran, tmp_path, monkeypatch):
    done = []
    for name in ("comparison", "_likeness"):
        work = getattr(pairing, name)
        monkeypatch.setattr(pairing, name, lambda *of, do=work, name=name: done.append(name) or do(*of))
    page = tmp_path / "page.html"
    assert call("compare", *(f"{ran}:{row}" for row in rows), "--out", page).exit_code == 0
    assert sorted(done) == sorted(["_likeness", "comparison"] * (len(rows) - 1))


def test_a_comparison_turned_is_that_of_the_other_order(ran):
    a, b = read_row(ran, "finetuned").measured, read_row(ran, "pretrained").measured
    want, got = comparison(b, a), turned(comparison(a, b))
    assert got.keys() == want.keys()
    assert got["notes"] == want["notes"]
    for key in want.keys() - {"notes"}:
        for kind, estimate in want[key].items():
            assert got[key][kind] == pytest.approx(estimate, rel=1e-9, abs=1e-12), (key, kind)


def test_a_row_that_keeps_nothing_of_each_image_is_shown_alone(ran, tmp_path):
    before = tmp_path / "before"
    shutil.copytree(ran, before)
    shutil.rmtree(before / "influences")
    rows = [{k: v for k, v in row.items() if k != "paired"} for row in metrics(before).values()]
    (before / "metrics.json").write_text(json.dumps(rows))
    assert "measured by a version that kept nothing of each image" in write_report(before).read_text()
    shown = call("compare", ran, before).stdout
    assert "Figures are not compared" in shown
    assert "keeps nothing of each image" in shown
    assert "may still differ" in shown


def test_what_is_asked_for_has_to_be_there(ran, tmp_path):
    with pytest.raises(RunError, match="no row 'random'; it has pretrained, finetuned"):
        read_row(ran, "random")
    with pytest.raises(RunError, match=r"has no metrics\.json"):
        read_row(tmp_path)
    assert call("compare", ran, f"{ran}:random").exit_code == 1


def test_influences_of_other_figures_are_refused(ran, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(ran, copy)
    shutil.copy(influences_path(copy, "pretrained"), influences_path(copy, "finetuned"))
    with pytest.raises(DataError, match=r"finetuned\.npz is of other figures than those beside it"):
        read_row(copy)
    influences_path(copy, "finetuned").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"is not a complete \.npz file"):
        read_row(copy)


# the file


def test_a_file_is_read_as_it_was_written(tmp_path):
    path, written = tmp_path / "a.npz", per_image()
    save_influences(path, written, figures=figures())
    read = load_influences(path, figures=figures())
    assert torch.equal(read.labels, written.labels)
    assert torch.equal(read.features, written.features)
    assert read.strata is read.clusters is None
    for kind in ("scores", "influences", "points"):
        assert getattr(read, kind).keys() == getattr(written, kind).keys()
    assert read.frechet.value == written.frechet.value
    assert read.frechet.ratio(per_image(seed=1).frechet) == written.frechet.ratio(per_image(seed=1).frechet)
    assert path.stat().st_size < 20_000
    np.savez(path, x=np.zeros(3))
    with pytest.raises(DataError, match="is not a complete .npz file of arrays"):
        load_influences(path, figures=figures())


# two rows


def row(name, images, **changes):
    return MeasuredRow(name, figures(**changes), images)


def test_a_suite_of_scores_needs_scores_alone():
    labels, task = torch.arange(60), torch.arange(60) % 6
    a, b = (torch.rand(60, generator=torch.Generator().manual_seed(s)).round() for s in (0, 1))
    images = [PerImage(labels=labels, scores={"correct": scores}, strata=task) for scores in (a, b)]
    found = comparison(row("a", images[0]), row("b", images[1]))
    assert found.keys() == {"correct", "notes"}
    assert found["correct"]["difference"]["value"] == pytest.approx(float((a - b).mean()))


def test_a_difference_of_shares_stays_within_100_points():
    labels, a, b = torch.arange(4), torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    rows = (
        row(name, PerImage(labels=labels, scores={"exact": scores})) for name, scores in (("a", a), ("b", b))
    )
    found = comparison(*rows)["exact"]["difference"]
    assert found["value"] == -0.5
    assert found["low"] == -1
    assert found["high"] == 1


def test_a_row_equals_itself():
    found = comparison(row("a", per_image()), row("b", per_image()))
    assert found["frechet"]["ratio"] == {"value": 1, "error": 0, "low": 1, "high": 1}
    assert found["agreement"]["difference"]["error"] == 0


def test_too_few_images_for_the_features_have_no_ratio():
    found = comparison(row("a", per_image(12)), row("b", per_image(12, seed=1)))
    assert "frechet" not in found
    assert (
        "no ratio of Fréchet distances: 12 images are too few for 4 features; 16 are enough" in found["notes"]
    )
    assert "agreement" in found


def test_rows_that_were_drawn_or_measured_differently_are_refused():
    mine = row("a", per_image())
    sampling = protocol()["sampling"] | {"seed": 1}
    with pytest.raises(
        ProtocolError, match=r"a and b were drawn or measured differently: sampling\.seed: 0 and 1"
    ):
        comparison(mine, row("b", per_image(), protocol={"sampling": sampling}))
    other = per_image()
    with pytest.raises(ProtocolError, match="asked for by other conditions"):
        comparison(mine, row("b", PerImage(labels=other.labels + 1, scores=other.scores)))
    with pytest.raises(ProtocolError, match="b keeps nothing of each image"):
        comparison(mine, row("b", None))

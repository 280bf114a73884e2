"""Suites: every one has its figures in `words.py`, and a new one needs a file, a line of the union and those rows.

The trial suite here measures how bright images are.
"""

import io
import json
from collections.abc import Callable
from typing import Annotated, Literal, get_type_hints

import pytest
import torch
from pydantic import Field
from rich.console import Console
from typer.testing import CliRunner

from grafting import cli, words
from grafting.cli.display import metrics_table
from grafting.errors import RecipeError
from grafting.evaluation import (
    SUITES,
    AdmEvaluation,
    AdmSuite,
    Evaluation,
    Identity,
    Metrics,
    Protocol,
    Suite,
    SuiteEvaluator,
    TestbedSuite,
    ratio,
)
from grafting.machine.files import hash_json
from grafting.machine.settings import Settings
from grafting.report import write_sweep_picture
from grafting.runs.identity import row_fingerprint
from grafting.runs.job import prepare
from grafting.runs.recipe import Recipe
from grafting.runs.record import write_report
from grafting.runs.run import run
from grafting.runs.sweep import Sweep, points
from grafting.runs.table import swept
from grafting.weights.card import model_card
from tinyrecipe import TINY


class TrialMetrics(Metrics):
    suite: Literal["trial"] = "trial"

    @property
    def min_images(self) -> int:
        return 2


class TrialResult(Settings):
    brightness: float
    brightness_low: float
    brightness_high: float
    num_images: int
    notes: tuple[str, ...] = ()
    protocol: Protocol


class TrialEvaluator(SuiteEvaluator):
    def __init__(self, protocol):
        self._protocol, self._seen = protocol, torch.empty(0)

    @property
    def protocol(self):
        return self._protocol

    @property
    def num_images(self):
        return len(self._seen)

    def update(self, images, labels):
        assert labels.shape == images.shape[:1]
        self._protocol.check_room(self.num_images + len(images))
        self._seen = torch.cat([self._seen, images.float().mean((1, 2, 3)) / 255])

    def state(self):
        return {"seen": self._seen}

    def result(self):
        self._protocol.check_whole(self.num_images)
        mean, error = float(self._seen.mean()), float(self._seen.std() / self.num_images**0.5)
        return TrialResult(
            brightness=mean,
            brightness_low=mean - 2 * error,
            brightness_high=mean + 2 * error,
            num_images=self.num_images,
            protocol=self._protocol,
        )


class TrialSuite(Suite):
    """How bright images are."""

    name: Literal["trial"] = "trial"
    judge: str = "mean"

    def faults(self, num_images, image_shape):
        return [f"{num_images} images; 2 are needed"] if num_images < 2 else []

    def identity(self):
        return {"judge": hash_json(self.judge)}

    def open(self, origin, *, on_step=None) -> Callable[[], SuiteEvaluator]:
        judge = Identity(name="judge", sha256=hash_json(self.judge))
        protocol = Protocol.of(judge, judge, metrics=TrialMetrics(), **origin)
        return lambda: TrialEvaluator(protocol)


class TrialRecipe(Recipe):
    evaluate: Annotated[TestbedSuite | AdmSuite | TrialSuite, Field(discriminator="name")] | None = None


@pytest.fixture(autouse=True)
def _trial(monkeypatch):
    row = words.Figure(key="brightness", title="Brightness", of="images", better="high", shown=("sweep",))
    monkeypatch.setitem(words.FIGURES, "brightness", row)
    monkeypatch.setitem(SUITES, "trial", TrialSuite)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suites") / "run"
    run(TrialRecipe.model_validate(TINY | {"evaluate": {"name": "trial"}}), folder)
    return folder


def call(*arguments):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_recipe_is_measured_by_it(ran):
    rows = json.loads((ran / "metrics.json").read_text())
    assert [row["name"] for row in rows] == ["pretrained", "random", "inherited", "distilled", "finetuned"]
    assert all(0 < row["brightness"] < 1 for row in rows)
    assert rows[0]["protocol"]["metrics"] == {"suite": "trial"}


def test_what_is_done_is_known_by_its_settings(ran):
    def seen(judge):
        stages = []
        recipe = TrialRecipe.model_validate(TINY | {"evaluate": {"name": "trial", "judge": judge}})
        run(recipe, ran, on_step=lambda stage, _: stages.append(stage))
        return stages, row_fingerprint(prepare(recipe), "pretrained")

    (again, same), (other, another) = seen("mean"), seen("median")
    assert again == []
    assert {stage.split()[0] for stage in other} == {"evaluate"}
    assert same != another


def test_a_recipe_that_it_cannot_measure_is_refused_first(tmp_path):
    few = TINY | {"evaluate": {"name": "trial"}, "sample": TINY["sample"] | {"num_images": 1}}
    with pytest.raises(RecipeError, match="evaluate: 1 images; 2 are needed"):
        run(TrialRecipe.model_validate(few), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_its_figures_are_shown(ran):
    page = write_report(ran).read_text()
    assert '<th scope="col" class="number">Brightness</th>' in page
    assert "Higher Brightness is better" in page
    assert "is the multiple of" not in page
    rows = json.loads((ran / "metrics.json").read_text())
    console = Console(file=io.StringIO(), width=120)
    console.print(metrics_table(rows))
    assert f"{rows[0]['brightness']:.3f} (" in console.file.getvalue()
    card = model_card(json.loads((ran / "model/config.json").read_text()), name="x", metrics=rows)
    assert "| model | Brightness |" in card


def test_the_command_line_takes_it_from_the_table(ran):
    samples = ran / "samples" / "finetuned.safetensors"
    shown = call("evaluate", samples, "--suite", "trial", "--set", "judge=median")
    assert "Brightness, lower limit" in shown
    figures = json.loads(call("evaluate", samples, "--suite", "trial", "--json"))
    assert figures["num_images"] == 20
    unknown = CliRunner().invoke(cli.app, ["evaluate", str(samples), "--suite", "hue"])
    assert "trial: How bright images are." in unknown.stderr
    kept = CliRunner().invoke(cli.app, ["reference", str(samples), "--suite", "trial"])
    assert "suite trial takes no --reference; --suite adm does" in kept.stderr


def test_a_sweep_keeps_its_figures(ran, tmp_path):
    rows = json.loads((ran / "metrics.json").read_text())
    lines = [{"design": "a", "stage": row["name"]} | {key: row[key] for key in swept(row)} for row in rows]
    assert {"brightness", "brightness_low", "brightness_high"} < lines[0].keys()
    text = write_sweep_picture(tmp_path / "table.svg", lines).read_text()
    assert "Brightness; more is better" in text


def test_a_protocol_is_read_again_as_it_was_written(ran):
    (first, *_), metrics = json.loads((ran / "metrics.json").read_text()), TrialMetrics()
    protocol = Protocol.model_validate(first["protocol"])
    assert protocol.metrics == metrics
    result = TrialResult.model_validate({k: first[k] for k in TrialResult.model_fields})
    assert ratio(result, result, "brightness") == 1
    with pytest.raises(ValueError, match="no suite 'hue' measures here"):
        Protocol.model_validate(first["protocol"] | {"metrics": {"suite": "hue"}})


# the suites that there are


def test_every_figure_of_a_suite_is_in_the_table():
    for result in (Evaluation, AdmEvaluation):
        hints = get_type_hints(result)
        for key in result.model_fields.keys() - {"notes", "protocol"}:
            assert words.name_of(key, []), (result, key)
            assert hints[key]


@pytest.mark.parametrize("name", list(SUITES))
def test_a_suite_says_what_it_is(name):
    suite = SUITES[name]
    assert suite.model_fields["name"].default == name
    assert suite.__doc__.splitlines()[0].endswith(".")


def test_a_suite_is_named_or_is_of_a_recipe_of_before():
    files = {"reference": "r.npz", "weights": "w.pth"}
    suites = [
        Recipe.model_validate(TINY | {"evaluate": written}).suite
        for written in (files, {"suite": "adm"} | files, {"name": "adm"} | files)
    ]
    assert suites == [AdmSuite(**files)] * 3
    # a run's folder knows its recipe by these bytes
    assert json.dumps(suites[0].model_dump()) == json.dumps({"suite": "adm"} | files | {"batch_size": 64})
    assert Recipe.model_validate(TINY).suite == TestbedSuite()
    assert "evaluate" not in Recipe.model_validate(TINY).model_dump(exclude_none=True)


def test_the_testbeds_figures_are_the_same_named_or_not():
    left_out, named = (Recipe.model_validate(TINY | e) for e in ({}, {"evaluate": {"name": "testbed"}}))
    assert row_fingerprint(prepare(left_out), "pretrained") == row_fingerprint(prepare(named), "pretrained")
    with pytest.raises(RecipeError, match="evaluate: 5 images; the testbed's figures need at least 10"):
        prepare(named.model_copy(update={"sample": named.sample.model_copy(update={"num_images": 5})}))


def test_faults_of_a_suite_are_told_by_their_place():
    settings = {k: v for k, v in TINY.items() if k != "name"}
    sweep = Sweep(
        name="s", settings=settings | {"evaluate": {"name": "adm"}}, grids=[{"axes": {"a": {"b": {}}}}]
    )
    with pytest.raises(RecipeError, match=r"evaluate\.reference: missing"):
        points(sweep)

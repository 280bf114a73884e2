"""`grafting init`: recipes for a model at hand are valid, and say what they need."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import tinypipeline
from grafting import Plan, Replace, graft, save
from grafting.cli import app
from grafting.hosts import hosts
from grafting.latents.prompting import WordsConfig
from grafting.runs.file import load_recipe
from grafting.sampling.taught import TaughtConfig
from grafting.training.calibration import CalibrateConfig
from latents.textpipelines import sd3

RECIPES = Path(__file__).parents[2] / "recipes"


def init(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["init", *map(str, arguments)])


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_for_the_testbed_it_is_the_quickstart_and_a_short_one():
    result = init("mine.yaml")
    assert result.exit_code == 0, result.output
    assert "Next: grafting check mine.yaml, grafting run mine-smoke.yaml" in result.stdout
    quickstart = load_recipe(RECIPES / "testbed/quickstart.yaml")
    mine, smoke = load_recipe("mine.yaml"), load_recipe("mine-smoke.yaml")
    for section in ("plan", "calibrate", "distill", "finetune", "sample", "rows"):
        assert getattr(mine, section) == getattr(quickstart, section), section
    assert (mine.trial, smoke.trial) == (False, True)
    said = "# images are drawn of each of these; there are also random, inherited\nrows: [pretrained, distilled, finetuned]\n"
    assert Path("mine.yaml").read_text().endswith(said)
    assert smoke.name == "mine-smoke"
    assert smoke.plan == mine.plan
    assert smoke.distill.steps == smoke.finetune.steps == 2


def test_for_scenes_it_is_the_quickstart():
    assert init("mine.yaml", "--source", "scenes").exit_code == 0
    quickstart, mine = load_recipe(RECIPES / "scenes/quickstart.yaml"), load_recipe("mine.yaml")
    for section in ("plan", "data", "calibrate", "distill", "finetune", "sample", "rows"):
        assert getattr(mine, section) == getattr(quickstart, section), section


def test_an_operator_comes_with_its_settings_and_keeps_the_default_blocks():
    assert init("mine.yaml", "--operator", "{name: hyena-x, geometry: 2d}").exit_code == 0
    (edit,) = load_recipe("mine.yaml").plan
    assert (edit.operator.geometry, edit.blocks) == ("2d", "4-7")


def test_for_a_pipeline_words_are_enough():
    tinypipeline.of(hosts()["pixart"].tiny()).save_pretrained("pipe")
    result = init("recipes/mine.yaml", "--source", "pipe", "--operator", "swa")
    assert result.exit_code == 0, result.output
    here = Path.cwd()
    recipe = load_recipe("recipes/mine.yaml")
    assert recipe.source == str(here / "pipe")
    assert recipe.vae.source == str(here / "pipe/vae")
    assert recipe.conditions == WordsConfig(file=here / "prompts.txt")
    assert recipe.data == TaughtConfig(num_images=1000, steps=20)  # its sampler is that of noise predicted
    assert recipe.plan[0].operator.name == "window-1d"
    assert recipe.sample.sampler == "dpm-solver++"
    assert recipe.rows == ("pretrained", "finetuned")
    new, both = recipe.finetune
    assert (new.steps, new.trainable, new.diffusion_weight, new.output_weight) == (500, "new", 0, 1)
    assert (both.steps, both.trained_in_words) == (2000, "new + lora 16")
    assert f"To be made: {here / 'prompts.txt'}: a prompt a line" in result.stdout
    smoke = load_recipe("recipes/mine-smoke.yaml")
    assert smoke.data == TaughtConfig(num_images=12, steps=2, batch_size=4)
    assert (smoke.finetune.steps, smoke.finetune.trained_in_words) == (2, "new + lora 16")


def test_a_recipe_with_adapters_says_that_peft_is_missing(monkeypatch: pytest.MonkeyPatch):
    tinypipeline.of(hosts()["pixart"].tiny()).save_pretrained("pipe")
    monkeypatch.setattr("grafting.editing.surgery.find_spec", lambda name: None)
    result = init("mine.yaml", "--source", "pipe")
    assert result.exit_code == 0, result.output
    assert "To be made: peft, for `lora`: pip install 'peft>=0.17'\n" in result.stdout


def test_its_trial_runs_from_a_pipelines_folder_and_words():
    sd3().save_pretrained("pipe")
    Path("prompts.txt").write_text("a red cat\nthe blue dog\n")
    assert init("mine.yaml", "--source", "pipe").exit_code == 0
    result = CliRunner().invoke(app, ["run", "mine-smoke.yaml", "--out", "run"])
    assert result.exit_code == 0, result.output
    assert "A trial: too few steps" in result.stdout
    assert "A trial: too few steps" in Path("run/report.html").read_text()
    assert Path("run/pipeline/model_index.json").is_file()
    assert result.stdout.endswith(
        "Pipeline: run/pipeline; `import grafting` before you load it\nReport: run/report.html\n"
    )
    card = Path("run/pipeline/README.md").read_text()
    assert "# A grafted StableDiffusion3Pipeline" in card
    assert "import grafting  #" in card
    # nothing judges these images, so the table has how far they are from the pretrained model's
    assert "distance to the" in result.stdout


def test_for_a_pipeline_it_takes_ones_own_latents_and_encoded_prompts():
    tinypipeline.of(hosts()["pixart"].tiny()).save_pretrained("pipe")
    result = init("mine.yaml", "--source", "pipe", "--data", "data/latents", "--prompts", "encoded")
    assert result.exit_code == 0, result.output
    here = Path.cwd()
    recipe = load_recipe("mine.yaml")
    assert recipe.data.folder == here / "data/latents"
    assert recipe.conditions.folder == here / "encoded"
    assert [(phase.diffusion_weight, phase.output_weight) for phase in recipe.finetune] == [(1, 1), (1, 1)]
    for folder in ("data/latents", "encoded"):
        assert f"To be made: {here / folder}" in result.stdout


@pytest.mark.parametrize("name", ["dit", "flux", "pixart", "sd3", "wan"])
def test_it_is_valid_for_every_host(name: str):
    hosts()[name].tiny().save_pretrained("model")
    result = init("mine.yaml", "--source", "model")
    assert result.exit_code == 0, result.output
    smoke, recipe = load_recipe("mine-smoke.yaml"), load_recipe("mine.yaml")
    assert smoke.source == str(Path("model").resolve())
    if name == "dit":
        assert f"{Path.cwd() / 'latents'}: images, a folder for each class" in result.stdout
        assert recipe.finetune.steps == 50_000
        assert smoke.finetune.diffusion_weight == 1
    else:
        assert f"{Path.cwd() / 'prompts'}: `grafting data prompts` encodes" in result.stdout
        assert isinstance(recipe.data, TaughtConfig)
        assert (recipe.data.shape is not None) == (name == "wan")  # a video's is long: seen, it is thought of
        assert smoke.finetune.diffusion_weight == 0
    assert smoke.calibrate.samples == 4
    assert recipe.calibrate == CalibrateConfig()


@pytest.mark.parametrize("heads", [4, 24])
def test_a_large_model_is_held_in_half_precision(heads: int):
    sizes = {"num_layers": 24, "num_attention_heads": heads, "caption_projection_dim": 64 * heads}
    config = {"_class_name": "SD3Transformer2DModel", "sample_size": 128} | sizes
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(config))
    assert init("mine.yaml", "--source", "model").exit_code == 0
    recipe = load_recipe("mine.yaml")
    large = heads == 24  # 2 billion parameters
    stages = (recipe.distill, *recipe.finetune)
    assert [stage.frozen for stage in stages] == ["bf16" if large else "fp32"] * 3
    assert [stage.batch_size for stage in stages] == [2 if large else 8] * 3
    assert [phase.gradient_checkpointing for phase in recipe.finetune] == [large, large]
    smoke = load_recipe("mine-smoke.yaml")
    kept = {"steps": 2, "batch_size": 4, "warmup_steps": 0, "cooldown_steps": 0}
    assert smoke.finetune == recipe.finetune[1].model_copy(update=kept)
    assert smoke.distill.frozen == recipe.distill.frozen


def test_adapters_need_sites_that_keep_their_linear_layers():
    hosts()["cogview4"].tiny().save_pretrained("model")
    assert init("mine.yaml", "--source", "model", "--blocks", "all").exit_code == 0
    phase = load_recipe("mine.yaml").finetune
    assert (phase.steps, phase.trainable) == (2500, "new")
    assert load_recipe("mine-smoke.yaml").finetune.trainable == "new"


def test_a_file_of_prompts_without_one_is_refused_at_once():
    tinypipeline.of(hosts()["pixart"].tiny()).save_pretrained("pipe")
    Path("words.txt").write_text("\n \n")
    result = init("mine.yaml", "--source", "pipe", "--prompts", "words.txt")
    assert result.exit_code == 1
    assert "no prompts in words.txt: it has no line" in result.stderr
    assert not Path("mine.yaml").exists()
    Path("words.txt").write_text("a cat\na dog\n")
    assert init("mine.yaml", "--source", "pipe", "--prompts", "words.txt").exit_code == 0
    checked = CliRunner().invoke(app, ["check", "mine.yaml"])
    assert "\nprompts: 2 to encode\n" in checked.stdout


def test_prompts_in_a_file_need_the_pipelines_text_encoders():
    hosts()["pixart"].tiny().save_pretrained("model")
    result = init("mine.yaml", "--source", "model", "--prompts", "words.jsonl")
    assert result.exit_code == 1
    assert "words.jsonl is a file of prompts, which a pipeline's text encoders read" in result.stderr
    assert not Path("mine.yaml").exists()


@pytest.mark.parametrize("operator", ["mlp", "{name: mlp}"])
def test_an_mlp_of_no_stated_width_is_narrower_than_the_hosts(operator: str):
    assert init("mine.yaml", "--operator", operator).exit_code == 0
    (edit,) = load_recipe("mine.yaml").plan
    assert (edit.role, edit.operator.ratio) == ("mlp", 3)  # the testbed's is 4


def test_an_mlp_of_a_stated_width_is_as_stated():
    assert init("mine.yaml", "--operator", "{name: mlp, ratio: 4}").exit_code == 0
    assert load_recipe("mine.yaml").plan[0].operator.ratio == 4


def test_a_graft_is_no_model_to_start_from():
    model = hosts()["dit"].tiny()
    graft(model, Plan(edits=[Replace(role="attention", blocks=0, operator="window-2d")]))
    save(model, "grafted")
    result = init("mine.yaml", "--source", "grafted")
    assert result.exit_code == 1
    assert "grafted is already grafted, and a recipe starts from a model without a plan" in result.stderr
    assert not Path("mine.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mine.txt",), "a recipe's file ends in .yaml, found mine.txt"),
        (("there.yaml",), "there.yaml: there already; name another file"),
        (
            ("mine.yaml", "--source", "nowhere"),
            "no model in nowhere: it does not exist; a model is `testbed`",
        ),
        (("mine.yaml", "--operator", "{name: hyena-x"), "--operator is not YAML: line 1"),
        (
            ("mine.yaml", "--operator", "{name: window-2d, radus: 2}"),
            "radus: unknown key; did you mean 'radius'?",
        ),
        (
            ("mine.yaml", "--operator", "{radius: 2}"),
            "an operator is a name, or a mapping with a name; found None",
        ),
        (("mine.yaml", "--blocks", ""), "names no blocks"),
        (("mine.yaml", "--operator", "hyena"), "no operator 'hyena'; did you mean 'hyena-"),
        (("mine.yaml", "--blocks", "ood"), "'ood' names no blocks"),
        (("mine.yaml", "--blocks", "0-9"), "plan for host 'dit' (blocks 0..7)"),
        (("mine.yaml", "--blocks", "[1, 8]"), "names no blocks"),
    ],
)
def test_it_refuses_and_writes_nothing(arguments: tuple[str, ...], message: str):
    Path("there.yaml").write_text("name: there\n")
    result = init(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert [path.name for path in Path.cwd().iterdir()] == ["there.yaml"]

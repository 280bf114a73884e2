"""The recipes in the repository: each loads and fits its source; those for ImageNet cost what the paper's Table 4 says."""

from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import yaml
from diffusers import DiffusionPipeline
from torch import nn

from grafting.cost.plan import PlanCost, plan_cost
from grafting.editing.surgery import resolve
from grafting.runs.file import load_recipe
from grafting.runs.job import skeleton
from grafting.runs.recipe import FreshModel, Recipe
from grafting.runs.run import run
from grafting.runs.sweep import load_sweep, points
from grafting.weights.portable import plan_of
from latents.textpipelines import flux, sd3, wan

ROOT = Path(__file__).parents[1] / "recipes"
FILES = sorted(path for path in ROOT.rglob("*.yaml") if path.name != "base.yaml")
HEADINGS = ("# What:", "# Command:", "# Hardware:", "# Time:", "# Result:")

# arXiv:2506.05340 Table 4: change in percent of operator FLOPs, of projection and featurizer FLOPs, of parameters
TABLE4 = {
    "hyena_se_50": (-49.52, 0.13, 0.22),
    "hyena_se_75": (-74.27, 0.20, 0.33),
    "hyena_se_100": (-99.03, 0.26, 0.43),
    "hyena_x_50": (-49.90, 0.13, 0.16),
    "hyena_x_75": (-74.85, 0.20, 0.24),
    "hyena_x_100": (-99.81, 0.26, 0.33),
    "hyena_y_50": (-49.52, 0.0, 0.05),
    "hyena_y_75": (-74.27, 0.0, 0.08),
    "hyena_y_100": (-99.03, 0.0, 0.11),
    "swa_50": (-48.24, 0.0, 0.0),
    "swa_75": (-72.36, 0.0, 0.0),
    "swa_100": (-96.48, 0.0, 0.0),
    "mamba2_50": (-37.59, 77.89, 28.02),
    "mamba2_75": (-56.38, 116.83, 42.04),
    "mamba2_100": (-75.17, 155.77, 56.05),
    "mlp_r3_50": (-12.50, 0.0, -12.50),
    "mlp_r3_75": (-18.75, 0.0, -18.75),
    "mlp_r3_100": (-25.00, 0.0, -25.00),
    "mlp_r6_50": (25.00, 0.0, 25.00),
    "mlp_r6_75": (37.50, 0.0, 37.50),
    "mlp_r6_100": (50.00, 0.0, 50.00),
    "mlp_hyena_x_50": (0.01, 0.0, 0.02),
    "mlp_hyena_x_75": (0.02, 0.0, 0.03),
    "mlp_hyena_x_100": (0.02, 0.0, 0.03),
}

# counted are 49.9946 %: the paper's 50 % is that of the weights alone, as r / 4 has it. In its other rows biases make no
# difference to the digits, or are counted (MLP Hyena-X)
WITHOUT_BIASES = {"mlp_r6_100": 49.99}


def is_sweep(path: Path) -> bool:
    return "grids" in yaml.safe_load(path.read_text())


def recipes_in(path: Path) -> list[Recipe]:
    """The recipe of a file, or those of a sweep."""
    return [point.recipe for point in points(load_sweep(path))] if is_sweep(path) else [load_recipe(path)]


@cache
def skeleton_of(source: str) -> nn.Module:
    """The model of a source, as YAML; nothing here changes it."""
    settings = yaml.safe_load(source)
    return skeleton(settings if isinstance(settings, str) else FreshModel.model_validate(settings))


def model_of(recipe: Recipe) -> nn.Module:
    if isinstance(recipe.source, str) and recipe.source.startswith("runs/"):
        # the model that another of these recipes makes
        (recipe,) = [r for path in FILES for r in recipes_in(path) if r.name == Path(recipe.source).parts[1]]
    return skeleton_of(yaml.safe_dump(recipe.model_dump(mode="json")["source"]))


def cost_of(name: str, *, depth: int = 28) -> PlanCost:
    recipe = load_recipe(ROOT / "imagenet" / f"{name}.yaml")
    assert isinstance(recipe.source, FreshModel)
    source = recipe.source.model_copy(update={"config": recipe.source.config | {"depth": depth}})
    return plan_cost(model_of(recipe.model_copy(update={"source": source})), recipe.edits)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipe_fits_its_source(path: Path):
    for recipe in recipes_in(path):
        assert bool(resolve(model_of(recipe), recipe.edits)) == bool(recipe.plan)


def test_names_are_unique():
    names = Counter(recipe.name for path in FILES for recipe in recipes_in(path))
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipe_begins_with_what_it_is(path: Path):
    lines = [line for line in path.read_text().splitlines() if line.startswith(HEADINGS)]
    assert [line.partition(":")[0] + ":" for line in lines] == list(HEADINGS)


@pytest.mark.parametrize("path", sorted((ROOT / "imagenet").glob("*.yaml")), ids=lambda path: path.stem)
def test_command_names_the_file_that_it_is_in(path: Path):
    command = next(line for line in path.read_text().splitlines() if line.startswith("# Command:"))
    words = command.split()
    if path.stem == "base":
        assert words[2] == "none;"
    else:
        assert words[3:5] == ["sweep" if is_sweep(path) else "run", f"recipes/imagenet/{path.name}"]


def test_every_design_of_table_4_has_its_recipe():
    single = {path.stem for path in FILES if path.parent.name == "imagenet" and not is_sweep(path)}
    others = {"self_graft_attention", "self_graft_mlp", "depth_to_width", "demo", "full_1gpu", "full_8gpu"}
    assert single - set(TABLE4) == others
    assert set(TABLE4) <= single


@pytest.mark.parametrize("name", TABLE4)
def test_table_4_to_the_last_digit(name: str):
    # blocks are alike, and of 4 the plans take the same share as of 28
    found = cost_of(name, depth=4).to_json()
    op, ft, params = (round(found[f"{what}_delta_pct"], 2) for what in ("flops_op", "flops_ft", "params"))
    published_op, published_ft, published_params = TABLE4[name]
    assert (op, ft) == (published_op, published_ft)
    assert params == WITHOUT_BIASES.get(name, published_params)


def test_shares_of_4_blocks_are_those_of_all_28():
    whole, part = (cost_of("mamba2_75", depth=depth).to_json() for depth in (28, 4))
    for what in ("flops_op", "flops_ft", "flops", "params"):
        assert whole[f"{what}_delta_pct"] == pytest.approx(part[f"{what}_delta_pct"], rel=1e-12)


def test_depth_to_width_has_the_published_number_of_parameters():
    cost = cost_of("depth_to_width")
    assert (cost.before.params, cost.after.params) == (675_129_632, 712_304_672)  # published: 712M
    assert not cost.to_json()["sites"]


def test_stages_are_the_published_ones():
    recipe = load_recipe(ROOT / "imagenet" / "hyena_x_50.yaml")
    assert recipe.distill is not None
    assert recipe.finetune is not None
    assert recipe.distill.steps * recipe.distill.batch_size == 200 * 8000
    stage2 = recipe.finetune
    assert (stage2.steps, stage2.batch_size, stage2.warmup_steps, stage2.lr) == (50_000, 256, 1000, 1e-4)
    assert (stage2.ema_decay, stage2.weight_decay, stage2.clip_norm, stage2.precision) == (
        0.9999,
        0,
        10,
        "auto",
    )


# of each recipe for a pipeline: a small pipeline of its class, and what makes it small
SMALL = {
    "flux": ({"shape": [4, 16, 16]}, {"kernel_size": 3}),
    "sd35_medium": ({"shape": [4, 16, 16]}, {"radius": 1}),
    "wan": ({"shape": [4, 3, 8, 12]}, {"radius": 1, "frames": 1}),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # norms in fp32 on what autocast made bf16
@pytest.mark.parametrize("name", SMALL)
def test_a_recipe_for_a_pipeline_ends_in_one(name, tmp_path):
    pytest.importorskip("peft")
    pipelines = {"flux": flux, "sd35_medium": sd3, "wan": wan}
    pipelines[name]().save_pretrained(tmp_path / "pipe")
    (tmp_path / "captions.txt").write_text("a red cat\nsun and moon\n")
    shape, operator = SMALL[name]
    recipe = yaml.safe_load((ROOT / f"text_to_image/{name}.yaml").read_text())
    recipe["source"] = str(tmp_path / "pipe")
    recipe["conditions"] |= {"file": str(tmp_path / "captions.txt"), "pipeline": str(tmp_path / "pipe")}
    recipe["data"] = {
        "name": "teacher",
        "num_images": 4,
        "sampler": "euler",
        "steps": 2,
        "batch_size": 2,
    } | shape
    recipe["plan"][0]["operator"] |= operator
    recipe["distill"] |= {"steps": 2, "batch_size": 2, "cooldown_steps": 0, "holdout": 2}
    phases = recipe["finetune"] if isinstance(recipe["finetune"], list) else [recipe["finetune"]]
    recipe["finetune"] = [phase | {"steps": 2, "batch_size": 2, "warmup_steps": 0} for phase in phases]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "run", until="pipeline")
    made = DiffusionPipeline.from_pretrained(tmp_path / "run/pipeline")
    assert plan_of(made.transformer).edits == load_recipe(tmp_path / "recipe.yaml").plan

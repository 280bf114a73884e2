"""Commands on a model whose class grafting does not know: `--spec FILE`, and the key `spec` of recipes."""

import json

import pytest
import yaml

import foreignmodel
from commandline import call
from grafting.cli import _shared
from grafting.editing.plan import Plan
from grafting.hosts import _registry as registry
from grafting.hosts import use_spec
from grafting.runs.file import load_recipe
from grafting.runs.job import prepare
from grafting.weights.folder import save_model

RECIPE = {
    "name": "foreign",
    "source": "./base",
    "plan": [{"role": "attention", "operator": {"name": "window-2d", "radius": 1}}],
    "data": {"name": "scenes"},
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with a model, its spec, and a recipe that names neither a host nor a spec."""
    monkeypatch.setattr(registry, "_given", {})
    monkeypatch.setattr(_shared, "_specs", [])
    use_spec(foreignmodel.SPEC)
    save_model(tmp_path / "base", foreignmodel.tiny(), Plan())
    registry._given.clear()
    (tmp_path / "foreign.yaml").write_text(yaml.safe_dump(foreignmodel.SPEC.model_dump(mode="json")))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


def test_sites_of_a_model_with_its_spec(folder):
    refused = call("sites", folder / "base")
    assert refused.exit_code == 1
    assert "no host for a model of class ForeignTransformer" in refused.stderr
    done = call("sites", folder / "base", "--spec", folder / "foreign.yaml", "--json")
    assert done.exit_code == 0, done.output
    paths = [site["path"] for site in json.loads(done.output)["sites"]]
    assert paths == ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]


def test_cost_of_a_recipe_with_a_spec(folder):
    done = call("cost", folder / "recipe.yaml", "--spec", folder / "foreign.yaml", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["recipe"] == "foreign"
    missing = call("cost", folder / "recipe.yaml", "--spec", folder / "nowhere.yaml")
    assert missing.exit_code == 1
    assert "nowhere.yaml is missing" in missing.stderr


def test_a_recipe_names_its_spec_and_depends_on_its_content(folder):
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(RECIPE | {"spec": "./foreign.yaml", "source": "./base"})
    )
    recipe = load_recipe(folder / "recipe.yaml", changes={"conditions": {"name": "scenes"}})
    assert recipe.spec == str(folder / "foreign.yaml")
    with pytest.raises(Exception, match="the data has items of shape"):
        prepare(recipe)  # the host is known: what does not fit is the data
    assert "foreign" in registry._given

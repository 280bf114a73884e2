"""Paths in recipes are relative to the file that writes them; everything else is a name, or read from the working directory."""

import pickle
from pathlib import Path

import pytest
import yaml

import tinyrecipe
from grafting.errors import GraftingError, RecipeError
from grafting.runs import paths
from grafting.runs.file import load_recipe
from grafting.runs.forecast import forecast
from grafting.runs.identity import essence
from grafting.runs.job import prepare
from grafting.runs.paths import WrittenPaths, naming_paths, with_paths, written_in
from grafting.runs.run import run
from grafting.runs.sweep import load_sweep, points

FOLDER = {"name": "image-folder", "size": 32, "channels": 1}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with `recipes/`, `bases/` and `elsewhere/`, the working directory."""
    for name in ("recipes", "bases", "elsewhere", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path.resolve()


def _write(path: Path, settings: dict) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path


def _recipe(path: Path, **changes) -> Path:
    return _write(path, tinyrecipe.TINY | changes)


def test_a_path_is_relative_to_its_file(place):
    for written, found in {
        "./data": "recipes/data",
        "../data": "data",
        "./a/../b/": "recipes/b",
        "~/data": "home/data",
        str(place / "elsewhere"): "elsewhere",
    }.items():
        file = _recipe(place / "recipes" / "r.yaml", data=FOLDER | {"folder": written})
        assert load_recipe(file).data.folder == place / found
        assert load_recipe("../recipes/r.yaml").data.folder == place / found


def test_other_values_are_names_or_read_from_the_working_directory(place):
    settings = {"source": "owner/name", "vae": {"source": "stabilityai/sd-vae-ft-ema"}}
    file = _recipe(
        place / "recipes" / "r.yaml", **settings, data=FOLDER | {"folder": "data", "subset": "a/b.json"}
    )
    recipe = load_recipe(file)
    assert (recipe.source, recipe.vae.source) == ("owner/name", "stabilityai/sd-vae-ft-ema")
    assert (recipe.data.folder, recipe.data.subset) == (Path("data"), Path("a/b.json"))
    assert not recipe.written


def test_every_key_of_a_path_follows_the_rule(place):
    settings = {
        "source": tinyrecipe.TINY["source"] | {"weights": "./model"},
        "vae": {"source": "../vae"},
        "conditions": {"name": "prompts", "folder": "./prompts"},
        "data": FOLDER | {"folder": "./images", "subset": "./part.json"},
        "evaluate": {"name": "adm", "reference": "./reference.npz", "weights": "~/inception.pth"},
    }  # fmt: skip
    recipe = load_recipe(_recipe(place / "recipes" / "r.yaml", **settings))
    assert recipe.source.weights == str(place / "recipes/model")
    assert recipe.vae.source == str(place / "vae")
    assert recipe.conditions.folder == place / "recipes/prompts"
    assert recipe.data.subset == place / "recipes/part.json"
    assert recipe.evaluate.reference == str(place / "recipes/reference.npz")
    assert recipe.evaluate.weights == str(place / "home/inception.pth")


def test_text_and_a_models_config_hold_no_paths(place):
    source = {"host": "dit", "config": tinyrecipe.TINY["source"]["config"] | {"_name_or_path": "./model"}}
    recipe = load_recipe(_recipe(place / "recipes" / "r.yaml", description="~5 % faster", source=source))
    assert recipe.description == "~5 % faster"
    assert recipe.source.config["_name_or_path"] == "./model"


def test_a_base_has_its_own_folder(place):
    _recipe(
        place / "bases" / "deep.yaml",
        data=FOLDER | {"folder": "./data", "subset": "../part.json"},
        source="./model",
    )
    _write(place / "bases" / "base.yaml", {"base": "deep.yaml", "vae": {"source": "./vae"}})
    file = _write(
        place / "recipes" / "r.yaml",
        {"base": "../bases/base.yaml", "name": "r", "data": {"subset": "./part.json"}},
    )
    recipe = load_recipe(file)
    assert recipe.data.folder == place / "bases/data"
    assert recipe.data.subset == place / "recipes/part.json"
    assert recipe.source == str(place / "bases/model")
    assert recipe.vae.source == str(place / "bases/vae")


def test_a_base_in_the_home_folder(place):
    _recipe(place / "home" / "base.yaml")
    file = _write(place / "recipes" / "r.yaml", {"base": "~/base.yaml", "name": "r"})
    assert load_recipe(file).name == "r"


def test_a_missing_base_is_named_as_written_and_as_found(place):
    file = _write(place / "recipes" / "r.yaml", {"base": "../base.yaml", "name": "r"})
    with pytest.raises(
        RecipeError, match=rf"no recipe file {place}/base.yaml, which {file} names by `base: ../base.yaml`"
    ):
        load_recipe(file)


def test_paths_of_a_bundled_recipe_are_relative_to_the_working_directory(place, monkeypatch):
    monkeypatch.setattr(paths, "recipes_folder", lambda: place / "bases")
    (place / "bases" / "testbed").mkdir()
    _recipe(place / "bases" / "testbed" / "base.yaml", data=FOLDER | {"folder": "./data"})
    assert load_recipe(place / "bases" / "testbed" / "base.yaml").data.folder == place / "elsewhere/data"
    file = _write(place / "recipes" / "r.yaml", {"base": "../bases/testbed/base.yaml", "source": "./model"})
    recipe = load_recipe(file)
    assert recipe.data.folder == place / "elsewhere/data"
    assert recipe.source == str(place / "recipes/model")


def test_changes_are_relative_to_the_working_directory(place):
    file = _recipe(place / "recipes" / "r.yaml", data=FOLDER | {"folder": "./data"})
    recipe = load_recipe(file, changes={"data.folder": "./x", "source": "~/model"})
    assert recipe.data.folder == place / "elsewhere/x"
    assert recipe.source == str(place / "home/model")
    assert load_recipe(file, changes={"data": {"subset": "../x.json"}}).data.subset == place / "x.json"
    assert load_recipe(file, changes={"source.config.sample": "./x"}).source.config["sample"] == "./x"


def test_paths_of_a_sweep(place):
    settings = tinyrecipe.TINY | {
        "data": FOLDER | {"folder": "./data"},
        "grids": [
            {
                "changes": {"data.subset": "./part.json", "source.config._name": "./x"},
                "axes": {"description": {"0.5": {"source": "../half"}, "1.0": {"source": "testbed"}}},
            }
        ],
    }
    first, second = points(load_sweep(_write(place / "recipes" / "s.yaml", settings)))
    assert [first.labels, second.labels] == [{"description": "0.5"}, {"description": "1.0"}]
    assert (first.recipe.source, second.recipe.source) == (str(place / "half"), "testbed")
    assert first.recipe.data.folder == place / "recipes/data"
    assert first.recipe.data.subset == place / "recipes/part.json"


def test_errors_name_a_path_as_written_and_as_found(place):
    file = _recipe(place / "recipes" / "r.yaml", data=FOLDER | {"folder": "./data"})
    with pytest.raises(GraftingError, match=rf"{place}/recipes/data is written ./data in {file}"):
        prepare(load_recipe(file))
    with pytest.raises(GraftingError, match=rf"{place}/elsewhere/x is written ./x$"):
        run(load_recipe(file, changes={"data.folder": "./x"}), "out")
    with pytest.raises(
        GraftingError, match=rf"no model in {place}/nothing: .*\n  {place}/nothing is written ~/../nothing"
    ):
        forecast(load_recipe(file, changes={"source": "~/../nothing"}))
    with pytest.raises(
        RecipeError, match=rf"save_every: .*, found ./x in {file}, which is {place}/recipes/x"
    ):
        load_recipe(_recipe(file, save_every="./x"))


def test_a_folder_is_not_named_by_what_is_in_it():
    written = WrittenPaths({"/x/sd3": "../sd3", "/x/sd3/text": "../sd3/text", "/x/sd": "../sd"})

    def named(text: str) -> list[str]:
        with pytest.raises(GraftingError) as caught, naming_paths(written):
            raise GraftingError(text)
        return str(caught.value).splitlines()[1:]

    assert named("/x/sd3/text holds nothing") == ["  /x/sd3/text is written ../sd3/text"]
    assert named("no model in /x/sd3: /x/sd3/vae is missing") == ["  /x/sd3 is written ../sd3"]
    assert named("/x/sd3/text is not in /x/sd3") == [
        "  /x/sd3/text is written ../sd3/text",
        "  /x/sd3 is written ../sd3",
    ]


def test_a_path_that_is_written_whole_is_named_once(place):
    file = _recipe(place / "recipes" / "r.yaml", data=FOLDER | {"folder": str(place / "none")})
    with pytest.raises(GraftingError, match=rf"{place}/none") as caught:
        prepare(load_recipe(file))
    assert "is written" not in str(caught.value)


def test_how_a_path_is_written_makes_no_recipe_another(place):
    whole = load_recipe(_recipe(place / "recipes" / "a.yaml", data=FOLDER | {"folder": str(place / "data")}))
    written = load_recipe(_recipe(place / "recipes" / "b.yaml", data=FOLDER | {"folder": "../data"}))
    assert written.written != dict(whole.written)
    assert written == whole
    assert essence(written) == essence(whole)


def test_a_recipe_that_is_written_down_is_the_same_from_any_folder(place, monkeypatch):
    recipe = load_recipe(
        _recipe(place / "recipes" / "r.yaml", source="./model", data=FOLDER | {"folder": "./data"})
    )
    dumped = _write(place / "bases" / "recipe.yaml", recipe.model_dump(mode="json", exclude_none=True))
    monkeypatch.chdir(place)
    assert load_recipe(dumped) == recipe
    assert pickle.loads(pickle.dumps(recipe)).written == recipe.written


def test_settings_keep_their_paths_when_pickled(place):
    settings = with_paths({"source": "./x"})
    assert dict(written_in(pickle.loads(pickle.dumps(settings)))) == {str(place / "elsewhere/x"): "./x"}


def test_a_value_that_holds_itself(place):
    (place / "recipes" / "r.yaml").write_text("name: &a [*a]\n")
    with pytest.raises(RecipeError, match="r.yaml is not YAML: a value holds itself"):
        load_recipe(place / "recipes" / "r.yaml")
